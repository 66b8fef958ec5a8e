"""How `SGLangOffline` starts ``sglang.Engine``: in what environment, and what is left of it afterwards.

In a process of its own, shared by all cases, with an engine in place of SGLang's that records what it is started with.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
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
names, found = json.loads(sys.argv[2]), []
for server_args, environment in json.loads(sys.argv[3]):
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(environment)
    engine = _start(sys.argv[1], -1, (), {"device": "cpu", **server_args})
    found.append([engine.given, engine.environment, dict(os.environ)])
print(json.dumps(found))
"""
NAMES = (BIND_ENV, NCCL_ENV, THREADS_ENV)
# Of each: SGLang's arguments, and the division of the cores and the number of threads that the engine finds.
RANKS: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({}, None, None),
    ({"tp_size": 2}, "0,2|1,3", "2"),
    ({"dp_size": 2, "tp_size": 2}, "0|1|2|3", "1"),
]
OF_THE_USER = {BIND_ENV: "0|3", NCCL_ENV: "/opt/nccl.so", THREADS_ENV: "3"}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """Return the engine's arguments, and of `NAMES` what it found in the environment and what is there afterwards.

    For each of `RANKS`, and for two ranks in an environment with `OF_THE_USER`.
    """
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    cases = [*((server_args, {}) for server_args, _, _ in RANKS), ({"tp_size": 2}, OF_THE_USER)]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), json.dumps(NAMES), json.dumps(cases)],
        env={**os.environ, CPU_ENGINE_ENV: "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return [
        (given, [during.get(name) for name in NAMES], [after.get(name) for name in NAMES])
        for given, during, after in json.loads(result.stdout.splitlines()[-1])
    ]


@pytest.mark.parametrize("index", range(len(RANKS)))
def test_the_ranks_of_an_engine_share_the_cores(started: list[tuple[Any, ...]], index: int) -> None:
    server_args, bound, threads = RANKS[index]
    given, during, after = started[index]
    assert given.items() >= server_args.items()
    assert during == [bound, NO_NCCL, threads]
    assert after == [None, None, None]


def test_what_the_user_set_stays(started: list[tuple[Any, ...]]) -> None:
    _, during, after = started[-1]
    assert during == after == ["0|3", "/opt/nccl.so", "3"]


def test_it_serves_the_process_that_made_it_alone() -> None:
    engine = SGLangOffline.__new__(SGLangOffline)
    engine._closed, engine._pid = False, os.getpid() + 1  # as in a fork
    for use in (pickle.dumps, copy.copy, copy.deepcopy, lambda engine: engine.generate([])):
        with pytest.raises(
            CapabilityError, match=rf"alone \(pid {engine._pid}\).*around the ParallelEnv, or use launch"
        ):
            use(engine)
