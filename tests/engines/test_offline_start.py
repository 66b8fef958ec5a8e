"""How `SGLangOffline` starts ``sglang.Engine``: in what environment, and what is left of it afterwards.

In a process of its own, with an engine in place of SGLang's that records what it is started with.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchrl_sglang_hidden import CapabilityError, SGLangOffline
from torchrl_sglang_hidden.server.cpu import BIND_ENV, CPU_ENGINE_ENV, NCCL_ENV, NO_NCCL, THREADS_ENV

PROGRAM = """
import importlib.machinery, json, os, sys, types
sglang = sys.modules["sglang"] = types.ModuleType("sglang")
sglang.__spec__ = importlib.machinery.ModuleSpec("sglang", None)
sglang.Engine = lambda **given: types.SimpleNamespace(given=given, environment=dict(os.environ))
os.sched_getaffinity = lambda pid: {0, 1, 2, 3}
from torchrl_sglang_hidden.engines.offline import _start
engine = _start(sys.argv[1], -1, (), {"device": "cpu", **json.loads(sys.argv[2])})
print(json.dumps([engine.given, engine.environment, dict(os.environ)]))
"""
NAMES = (BIND_ENV, NCCL_ENV, THREADS_ENV)


def start(model: Path, server_args: dict[str, Any], **environment: str) -> tuple[Any, ...]:
    """Return the engine's arguments, and of `NAMES` what it found in the environment and what is there afterwards."""
    (model / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    inherited = {name: value for name, value in os.environ.items() if name not in NAMES}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), json.dumps(server_args)],
        env={**inherited, CPU_ENGINE_ENV: "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    given, during, after = json.loads(result.stdout.splitlines()[-1])
    return given, [during.get(name) for name in NAMES], [after.get(name) for name in NAMES]


@pytest.mark.parametrize(
    ("server_args", "bound", "threads"),
    [
        ({}, None, None),
        ({"tp_size": 2}, "0,2|1,3", "2"),
        ({"dp_size": 2, "tp_size": 2}, "0|1|2|3", "1"),
    ],
)
def test_the_ranks_of_an_engine_share_the_cores(
    server_args: dict[str, Any], bound: str | None, threads: str | None, tmp_path: Path
) -> None:
    given, during, after = start(tmp_path, server_args)
    assert given.items() >= server_args.items()
    assert during == [bound, NO_NCCL, threads]
    assert after == [None, None, None]


def test_what_the_user_set_stays(tmp_path: Path) -> None:
    environment = {BIND_ENV: "0|3", NCCL_ENV: "/opt/nccl.so", THREADS_ENV: "3"}
    _, during, after = start(tmp_path, {"tp_size": 2}, **environment)
    assert during == after == ["0|3", "/opt/nccl.so", "3"]


def test_it_serves_the_process_that_made_it_alone() -> None:
    engine = SGLangOffline.__new__(SGLangOffline)
    engine._closed, engine._pid = False, os.getpid() + 1  # as in a fork
    for use in (pickle.dumps, copy.copy, copy.deepcopy, lambda engine: engine.generate([])):
        with pytest.raises(
            CapabilityError, match=rf"alone \(pid {engine._pid}\).*around the ParallelEnv, or use launch"
        ):
            use(engine)
