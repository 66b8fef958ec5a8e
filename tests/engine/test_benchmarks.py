"""The benchmarks run, compare their sides before they print a ratio, and end in one line of JSON."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import serving

from torchrl_sglang_hidden import SGLangServer

Run = Callable[..., dict[str, Any]]
# What the programs below ask of a server at most.
ROOM = {"context_length": 256, "total_tokens": 4096}


@pytest.fixture(scope="module")
def started() -> Iterator[Callable[[str], SGLangServer]]:
    """Return a function that starts the server of a model once for all programs; they would each start their own."""
    with ExitStack() as stack:
        servers: dict[str, SGLangServer] = {}

        def start(model: str) -> SGLangServer:
            if model not in servers:
                served = serving.served(model, dtype="float32", sleep_on_idle=True, wide_layers=4, **ROOM)
                servers[model] = stack.enter_context(served)
            return servers[model]

        yield start


@pytest.fixture
def run(
    started: Callable[[str], SGLangServer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Return a function that runs a program with options, and returns what its last line says."""

    @contextmanager
    def served(model: str, *, dtype: str, sleep_on_idle: bool = False, wide_layers: int = 1, **room: int) -> Any:
        assert dtype == "float32"
        assert all(room[name] <= most for name, most in ROOM.items())
        yield started(model)

    def run_program(name: str, *options: str) -> dict[str, Any]:
        program = importlib.import_module(name)
        monkeypatch.setattr(program, "served", served)
        monkeypatch.setattr(sys, "argv", [name, *options])
        program.main()
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    return run_program


def test_hidden_states(run: Run) -> None:
    sizes = ("--prompts", "2", "--prompt-tokens", "96", "--new-tokens", "4", "--rounds", "1")
    found = run("hidden_states", "--model", "wide", *sizes)
    wide = found["models"]["wide"]
    assert wide["hidden_size"] == 4096
    assert wide["worst_relative_difference"] < 1e-4
    sides = wide["sides"]
    assert set(sides) == {"plain", "pooled", "tokens", "tokens, HTTP", "stock"}
    assert all(side["seconds"] > 0 for side in sides.values())
    # Bytes do not depend on how busy the machine is: 2 vectors for each prompt against a hundred rows of numbers.
    assert sides["stock"]["http_bytes"] > 40 * sides["pooled"]["http_bytes"]
    assert sides["tokens"]["shared_bytes"] > 2 * 96 * 4096 * 4


def test_rollout(run: Run) -> None:
    found = run("rollout", "--prompts", "3", "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "1")
    assert found["new_tokens_a_round"] > 3
    assert found["speed_of_torchrl"] > 0


def test_logits(run: Run) -> None:
    sizes = ("--prompts", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "1")
    found = run("logits", *sizes, "--columns", "50")
    sides = found["sides"]
    stock = {"top_logprobs_num", "flat top_logprobs", "token_ids_logprob"}
    assert set(sides) == {"plain", "mask", "top_k", "token_ids", "full", "full, bf16", "full, HTTP", *stock}
    assert all(side["seconds"] > 0 for side in sides.values())
    assert found["worst_difference"] < 1e-3
    # Bytes do not depend on how busy the machine is: 4 as base64 for each logit, and all of 49152.
    assert sides["token_ids"]["http_bytes"] < 0.8 * sides["token_ids_logprob"]["http_bytes"]
    assert sides["full, HTTP"]["http_bytes"] > 2 * 4 * 49152 * 4


def test_the_speed_table(run: Run) -> None:
    """Every part, at sizes that say nothing about speed, but compare all sides' answers."""
    found = run("speed_table", "--quick")
    lines = {line["what"]: line["value"] for part in found["parts"].values() for line in part["lines"]}
    assert len(found["parts"]) == 14
    assert all(value > 0 for value in lines.values())
    # Bytes do not depend on how busy the machine is.
    assert lines["bytes of the answer, 2 prompts of 40 tokens"] > 20
    assert list(found["scaling"]) == ["rows", "prompt_tokens", "new_tokens", "hidden_size"]


def test_state_encoder(run: Run) -> None:
    sizes = ("--envs", "4", "--system-tokens", "48", "--observation-tokens", "4", "--new-tokens", "4")
    found = run("state_encoder", "--model", "wide", *sizes, "--rounds", "1", "--steps", "60")
    wide = found["models"]["wide"]
    assert wide["worst_relative_difference"] < 1e-4
    assert set(wide["sides"]) == {"prompt only", "generating"}
    for side in wide["sides"].values():
        assert side["encodings_per_s"] > 0
        # The system prompt is read once, and its sums stand for it in the prompt of each environment.
        assert side["fewest_cached_tokens"] == 48
    points = wide["memory"]["points"]
    # The reset and the steps 25 and 50, of four environments.
    assert wide["memory"]["encoded"] == 12
    assert (points[0]["step"], points[-1]["step"], len(points)) == (0, 60, 21)
    assert all(point[name] > 10 for point in points for name in ("client_pss_mib", "server_pss_mib", "server_rss_mib"))


def test_heads(run: Run) -> None:
    sizes = ("--prompts", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "1")
    found = run("heads", "--model", "wide", *sizes)["models"]["wide"]
    assert found["worst_difference"] < 1e-3
    assert found["sides"].keys() == {"plain", "linear", "million", "tokens"}
    assert found["sides"]["million"]["new_tokens"] == 8
