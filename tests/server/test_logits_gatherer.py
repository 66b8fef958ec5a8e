"""SGLang's own logits processor, called several times in one step under tensor parallelism."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchrl_sglang_hidden.server.cpu import CPU_ENGINE_ENV

PROGRAM = Path(__file__).parent.parent / "helpers/gatherer_program.py"


@pytest.fixture(scope="module")
def found() -> Any:
    """Return what the program printed. It imports SGLang, which takes seconds, so the tests share it."""
    environment = {name: value for name, value in os.environ.items() if name != CPU_ENGINE_ENV}
    paths = [str(PROGRAM.parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    result = subprocess.run(
        [sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_logits_of_prompts_are_gathered_with_barriers(found: Any) -> None:
    """SGLang's gatherer has none at entry. It is called once in a step, by SGLang itself, for three rows."""
    two = found["two ranks"]
    assert two["calls"] == [["safe", 3], ["safe", 2], ["multimem", 3]]
    assert two["restored"]
    assert two["prompts"], "as the whole head computes them"
    assert two["next"]


def test_one_rank_gathers_nothing(found: Any) -> None:
    one = found["one rank"]
    assert (one["calls"], one["restored"], one["prompts"], one["next"]) == ([], True, True, True)


def test_the_gatherer_is_put_back_where_the_head_fails(found: Any) -> None:
    fails = found["fails"]
    assert (fails["error"], fails["restored"], fails["calls"]) == ("RuntimeError", True, [])
