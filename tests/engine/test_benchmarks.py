"""The benchmarks run, compare their sides before they print a ratio, and end in one line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_hidden_states() -> None:
    sizes = ("--prompts", "2", "--prompt-tokens", "96", "--new-tokens", "4", "--rounds", "1")
    found = run("hidden_states.py", "--model", "wide", *sizes)
    wide = found["models"]["wide"]
    assert wide["hidden_size"] == 4096
    assert wide["worst_relative_difference"] < 1e-4
    sides = wide["sides"]
    assert set(sides) == {"plain", "pooled", "tokens", "tokens, HTTP", "stock"}
    assert all(side["seconds"] > 0 for side in sides.values())
    # Bytes do not depend on how busy the machine is: 2 vectors for each prompt against a hundred rows of numbers.
    assert sides["stock"]["http_bytes"] > 40 * sides["pooled"]["http_bytes"]
    assert sides["tokens"]["shared_bytes"] > 2 * 96 * 4096 * 4


def test_rollout() -> None:
    found = run("rollout.py", "--prompts", "3", "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "1")
    assert found["new_tokens_a_round"] > 3
    assert found["speed_of_torchrl"] > 0


def test_logits() -> None:
    sizes = ("--prompts", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "1")
    found = run("logits.py", *sizes, "--columns", "50")
    sides = found["sides"]
    stock = {"top_logprobs_num", "flat top_logprobs", "token_ids_logprob"}
    assert set(sides) == {"plain", "mask", "top_k", "token_ids", "full", "full, bf16", "full, HTTP", *stock}
    assert all(side["seconds"] > 0 for side in sides.values())
    assert found["worst_difference"] < 1e-3
    # Bytes do not depend on how busy the machine is: 4 as base64 for each logit, and all of 49152.
    assert sides["token_ids"]["http_bytes"] < 0.8 * sides["token_ids_logprob"]["http_bytes"]
    assert sides["full, HTTP"]["http_bytes"] > 2 * 4 * 49152 * 4


def test_the_speed_table() -> None:
    """Every part, at sizes that say nothing about speed, but compare all sides' answers."""
    found = run("speed_table.py", "--quick")
    lines = {line["what"]: line["value"] for part in found["parts"].values() for line in part["lines"]}
    assert len(found["parts"]) == 11
    assert all(value > 0 for value in lines.values())
    # Bytes do not depend on how busy the machine is.
    assert lines["bytes of the answer, 2 prompts of 40 tokens"] > 20
    assert list(found["scaling"]) == ["rows", "prompt_tokens", "new_tokens", "hidden_size"]
