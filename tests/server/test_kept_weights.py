"""A server and kept weights: it loads them before it reads a request, or ends; and it says what it serves."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from torchrl_sglang_hidden.protocol import server_files
from torchrl_sglang_hidden.protocol.served_weights import KEPT_ENV
from torchrl_sglang_hidden.protocol.server_files import FILES_ENV, ServerFiles
from torchrl_sglang_hidden.server import kept_weights, plugin
from torchrl_sglang_hidden.server.kept_weights import after_scheduler_start, after_version


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The updates that SGLang is asked for."""
    module = ModuleType("sglang.srt.managers.io_struct")
    module.UpdateWeightFromDiskReqInput = SimpleNamespace  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.managers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return []


def scheduler(requests: list[Any], message: str = "") -> Any:
    def update(request: Any) -> Any:
        requests.append(request)
        return SimpleNamespace(success=not message, message=message)

    return SimpleNamespace(weight_updater=SimpleNamespace(update_weights_from_disk=update))


def test_kept_weights_are_loaded_at_the_start(requests: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEPT_ENV, "/kept")
    assert after_scheduler_start(None, scheduler(requests), "server_args", 0) is None
    assert requests == [SimpleNamespace(model_path="/kept", load_format="safetensors")]


def test_a_server_without_kept_weights_loads_nothing(requests: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEPT_ENV, raising=False)
    after_scheduler_start(None, scheduler(requests))
    assert requests == []


def test_a_scheduler_that_is_complete_notes_its_memory(requests: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[bool]()
    monkeypatch.setattr(kept_weights, "note_shared_memory", lambda: calls.append(True))
    after_scheduler_start(None, scheduler(requests))
    assert calls == [True]


def test_old_weights_are_not_served_in_their_place(requests: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEPT_ENV, "/kept")
    with pytest.raises(RuntimeError, match=r"the kept weights in /kept cannot be loaded: no such file"):
        after_scheduler_start(None, scheduler(requests, "no such file"))


def test_the_owner_reads_which_version_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_files.tempfile, "tempdir", str(tmp_path))
    files = ServerFiles()
    monkeypatch.setenv(FILES_ENV, str(files.directory))
    assert files.version() is None
    after_version(None)
    assert files.version() is None
    for version in ("7", "step/8 – ä"):
        plugin.after_weight_version(None, object(), new_version=version)
        assert files.version() == version
    files.remove()
    after_version("9")  # the directory is gone: the server goes on
    assert files.version() is None


def test_a_server_without_an_owner_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FILES_ENV, raising=False)
    monkeypatch.chdir(tmp_path)
    after_version("7")
    assert list(tmp_path.iterdir()) == []
