"""The layer taps against SGLang's own classes: what a server on one CPU never runs, such as graphs and ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS / "helpers" / "sglang_classes_program.py"
PLAIN = {
    "full_states": False, "packed_states": False, "diffuses": False, "two_batches": False, "compiles": False,
    "splits_attention": False, "tensor_ranks": 1, "decode_graph_rows": 0, "graphs": "",
    "raw_log_probs": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what sglang_classes_program.py found."""
    result = tmp_path_factory.mktemp("classes") / "result.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(result)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    loaded: dict[str, Any] = json.loads(result.read_text())
    return loaded


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("plain", {}),
        ("full", {"full_states": True}),
        ("flag", {"full_states": True}),
        ("last", {"full_states": False}),
        ("packed", {"full_states": True, "packed_states": True}),
        ("compiled", {"compiles": True}),
        ("diffusion", {"diffuses": True}),
        ("two batches", {"two_batches": True}),
        ("two ranks", {"tensor_ranks": 2}),
        ("split attention", {"tensor_ranks": 2, "splits_attention": True}),
        ("cuda", {"graphs": "cuda", "decode_graph_rows": 160}),
        ("cuda, no graphs", {}),
    ],
)
def test_settings_are_what_sglang_made_of_its_arguments(
    found: dict[str, Any], name: str, changes: dict[str, Any]
) -> None:
    """The record of the arguments has none of that: neither defaults nor what one option means for another."""
    assert found["settings"][name] == {**PLAIN, **changes}


def test_every_hooked_function_is_there(found: dict[str, Any]) -> None:
    assert found["missing"] == []


def test_ranks_of_data_parallel_attention_would_wait_for_each_other(found: dict[str, Any]) -> None:
    """The rank whose request wants a layer completes it by a collective, in which the other takes no part."""
    asking, idle = found["collectives"]["counts"]
    assert found["collectives"]["layers"] == [0, 1, 2]
    assert asking == idle + 1, "nothing was shown: the layer needs no collective"
    refused = found["refused"]
    assert refused["counts"][0] == refused["counts"][1]
    assert refused["layers"] == []
    assert "start the server without --enable-dp-attention" in refused["problem"]


@pytest.mark.parametrize(("name", "parts"), [("plain sums", (1, 3, 6)), ("owed sums", (2, 6, 12))])
def test_eager_steps_and_replayed_graphs_read_the_same_stream(
    found: dict[str, Any], name: str, parts: tuple[int, ...]
) -> None:
    """Also where SGLang leaves the sum over the ranks to the layer that comes next: here it doubles each part."""
    assert found[name]["layers"] == [0, 1, 2]
    for layer, part in enumerate(parts):
        assert found[name]["eager"][str(layer)] == [part] * 4
        assert found[name]["replayed"][str(layer)] == [10 + part] * 3


def test_a_graph_that_hands_on_what_cannot_be_read(found: dict[str, Any]) -> None:
    assert found["deferred"]["layers"] == []
    assert found["deferred"]["problem"].startswith("layer 1 returns something else than the residual stream in a CUDA ")


def test_an_image_without_its_start_has_the_positions_of_text(found: dict[str, Any]) -> None:
    """So that prompts of Qwen's models without it are refused; Hugging Face gives both the same positions."""
    started, bare = found["positions"]
    assert started == [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]
    assert bare == [list(range(8))] * 3
