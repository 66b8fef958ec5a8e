"""What `SGLangOffline` removes when it closes: the files that SGLang made for this engine, and no others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from torchrl_sglang_hidden.protocol import server_files
from torchrl_sglang_hidden.protocol.server_files import files_of


def test_sockets_and_load_of_one_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_files, "SHARED_MEMORY", tmp_path)
    for name in ("sglang_loads_abc123_77.shm", "sglang_loads_other_77.shm", "mine"):
        (tmp_path / name).touch()
    arguments = SimpleNamespace(
        tokenizer_ipc_name="ipc:///tmp/tmpa",
        rpc_ipc_name="tcp://127.0.0.1:9",
        nccl_port=7,
        tokenizer_worker_ipc_name=None,
        instance_id="abc123",
    )
    assert files_of(arguments) == [Path("/tmp/tmpa"), tmp_path / "sglang_loads_abc123_77.shm"]
    arguments.instance_id = ""
    assert files_of(arguments) == [Path("/tmp/tmpa")]
    assert files_of(None) == []
