"""`launch` with real SGLang: two servers that start, one that does not; `test_demo_engine.py` has another."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.process_watch import still_running, watched

from torchrl_sglang_hidden import (
    AuthenticationError,
    EngineUnreachableError,
    HiddenSpec,
    LaunchError,
    SGLangServer,
    launch,
)
from torchrl_sglang_hidden.engines import endpoint
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.server.cpu import has_accelerator
from torchrl_sglang_hidden.sglang_api.server_info import warm_up

pytestmark = pytest.mark.engine

API_KEY = "open-sesame-5c1e"
REQUEST = Request(prompt_ids=(1, 4093, 198), sampling={"max_new_tokens": 4, "temperature": 0.0}, hidden=HiddenSpec())

# The key comes over stdin, so that this process's own command line does not show it either.
LAUNCHES = """
import json, signal, sys
from torchrl_sglang_hidden import launch
model, log_file = sys.argv[1:]
server = launch(model, api_key=sys.stdin.readline().strip(), log_file=log_file)
print(json.dumps([server.url, server.pid]), flush=True)
signal.pause()
"""


def libraries_of(pid: int) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "r-xp" in line and "torch" in line]


def group_of(leader: int) -> list[int]:
    return [leader, *(child.pid for child in psutil.Process(leader).children(recursive=True))]


def test_a_server_generates_is_copied_as_a_client_and_ends_with_close(
    smol_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_ups: list[dict[str, Any] | None] = []
    monkeypatch.setattr(endpoint, "warm_up", lambda info: warm_ups.append(warm_up(info)) or warm_ups[-1])
    server = launch(smol_dir, log_file=tmp_path / "server.log")
    with server:
        assert warm_ups == [None], "a server that says that it is ready has checked its layers"
        assert server.info.layers == tuple(range(-1, 30)), "all of them, though nobody named any"
        every = replace(REQUEST, hidden=HiddenSpec(layers=tuple(range(30))))
        assert server.generate([every])[0].hidden["response"].vector.shape == (30, 576)
        completion = server.generate([REQUEST])[0]
        assert len(completion.response_ids) == 4
        assert completion.hidden["response"].count == 4
        assert server.info.pools_in_server
        # A prompt of the model's full context length has room in the KV cache; SGLang keeps a few tokens for itself.
        assert server.info.context_length - server.info.max_prompt_tokens < 16

        copied, unpickled = copy.deepcopy(server), pickle.loads(pickle.dumps(server))
        assert type(copied) is type(unpickled) is SGLangServer
        copied.close()
        assert unpickled.generate([REQUEST])[0].response_ids == completion.response_ids

        handles = group_of(server.pid)
        assert len(handles) > 2
        # A fork has its libraries where its parent has them, and a process that starts Python anew has not.
        forked = [pid for pid in handles[1:] if libraries_of(pid) == libraries_of(server.pid)]
        assert len(forked) == (0 if has_accelerator() else 2), "on the CPU: a scheduler and a detokenizer"
        maps = Path(f"/proc/{server.pid}/maps").read_text()
        assert has_accelerator() or "cutlass" not in maps, "flashinfer is imported, whose kernels no CPU runs"
        with watched(handles) as group:
            server.close()
            assert still_running(group, timeout_s=5) == []
        server.close()
    with pytest.raises(EngineUnreachableError):
        unpickled.generate([REQUEST])
    log = (tmp_path / "server.log").read_text()
    assert "crashed" not in log
    # Some of SGLang's models cannot be imported on a CPU, and it says so of each that it tries.
    assert "Ignore import error" not in log, "SGLang imports models that it does not serve"


def test_a_server_keeps_its_key_and_ends_when_its_parent_is_killed(smol_dir: str, tmp_path: Path) -> None:
    log_file = tmp_path / "server.log"
    parent = subprocess.Popen(
        [sys.executable, "-c", LAUNCHES, smol_dir, str(log_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(f"{API_KEY}\n")
        parent.stdin.flush()
        try:
            url, leader = json.loads(parent.stdout.readline())
            with SGLangServer(url, api_key=API_KEY) as server:
                assert len(server.generate([REQUEST])[0].response_ids) == 4
            for wrong in (None, "guessed"):
                with pytest.raises(AuthenticationError):
                    SGLangServer(url, api_key=wrong)
            group = group_of(leader)
            command_lines = [" ".join(psutil.Process(pid).cmdline()) for pid in group]
            with watched(group) as handles:
                parent.send_signal(signal.SIGKILL)
                assert still_running(handles, timeout_s=30) == []
        finally:
            parent.kill()
    assert not [line for line in command_lines if API_KEY in line]
    assert API_KEY not in log_file.read_text()


def test_a_model_without_weights_fails_the_start_with_the_last_log_lines(smol_dir: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(smol_dir, model, ignore=shutil.ignore_patterns("*.safetensors"))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(LaunchError) as raised:
        launch(model, log_file=tmp_path / "server.log")
    assert "Cannot find any model weights" in str(raised.value)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
