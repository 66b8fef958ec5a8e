"""What the tests start computes with all of the processor, and starts where that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import mkl_on_amd
from helpers.mkl_on_amd import FUNCTION, PRELOAD_ENV, helps, use_whole_processor

from torchrl_sglang_hidden.demo.cache import CACHE_ENV

ASK = f"import ctypes; print(ctypes.CDLL(None).{FUNCTION}())"
BEFORE = "one.so:two.so"


def test_mkl_takes_an_amd_processor_for_one_that_it_knows() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=False)
    assert (done.stdout == "1\n") is helps(), done.stderr


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory with what a machine has on which the function helps: ``cache``, and programs in ``bin``."""
    monkeypatch.setattr(mkl_on_amd, "helps", lambda: True)
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.setenv(PRELOAD_ENV, BEFORE)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "bin").mkdir()
    write_compiler(tmp_path, 'for made; do :; done; echo > "$made"')
    return tmp_path


def write_compiler(machine: Path, script: str) -> None:
    (machine / "bin" / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (machine / "bin" / "cc").chmod(0o755)


def test_it_stands_before_what_is_preloaded_already_and_once(machine: Path) -> None:
    for _ in range(2):
        use_whole_processor()
        assert os.environ[PRELOAD_ENV] == f"{machine / 'cache' / 'mkl-on-amd.so'} {BEFORE}"
    assert [path.name for path in (machine / "cache").iterdir()] == ["mkl-on-amd.so"]


def test_a_library_that_cannot_be_made_is_warned_of(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_compiler(machine, "echo no linker >&2; exit 1")
    with pytest.warns(UserWarning, match=r"the tests take longer, without .*mkl-on-amd.so: (.|\n)*no linker"):
        use_whole_processor()
    (machine / "file").touch()
    monkeypatch.setenv(CACHE_ENV, str(machine / "file"))
    with pytest.warns(UserWarning, match=r"the tests take longer, without .*File exists"):
        use_whole_processor()
    assert os.environ[PRELOAD_ENV] == BEFORE


@pytest.mark.parametrize("name", ["a cache", "a:cache"])
def test_a_cache_that_the_loader_cannot_name(machine: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(CACHE_ENV, str(machine / name))
    use_whole_processor()
    assert os.environ[PRELOAD_ENV] == BEFORE
