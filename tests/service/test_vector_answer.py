"""Vectors as a client reads them: every number exactly, as JSON and as bytes, and what stands beside them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang_hidden import Completion, Pooled
from torchrl_sglang_hidden.errors import EngineError
from torchrl_sglang_hidden.service.answer import as_bytes, as_json

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def completion(*vectors: list[float], version: str = "v7", response_ids: tuple[int, ...] = ()) -> Completion:
    names = ("prompt", "full")
    return Completion(
        prompt_ids=(5, 6, 7),
        response_ids=response_ids,
        text="so",
        log_probs_T=None,
        hidden={name: Pooled(torch.tensor(vector), 3) for name, vector in zip(names, vectors, strict=False)},
        finish_reason="stop",
        weight_version=version,
    )


@given(st.lists(FLOATS, min_size=1, max_size=5))
def test_both_ways_carry_every_number_exactly(numbers: list[float]) -> None:
    rows = [completion(numbers)]
    (row,) = json.loads(as_json(rows, ("prompt",), "m"))["data"]
    assert row["hidden_states"]["prompt"] == numbers
    data, headers = as_bytes(rows, ("prompt",), "m")
    assert headers["Hidden-States-Shape"] == f"1,1,{len(numbers)}"
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == numbers


def test_bytes_have_rows_segments_layers_and_dimensions_in_this_order() -> None:
    rows = [completion([[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]) for _ in range(3)]
    data, headers = as_bytes(rows, ("full", "prompt"), "m")
    assert headers["Hidden-States-Shape"] == "3,2,2,2"
    assert headers["Hidden-States-Segments"] == "full,prompt"
    first = torch.frombuffer(bytearray(data), dtype=torch.float32)[:8]
    assert first.tolist() == [5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0]


def test_headers_take_every_name() -> None:
    rows = [completion([1.0], version=version) for version in ("v7", "v8", "v7", "a b\r\nSet-Cookie: ü")]
    _, headers = as_bytes(rows, ("prompt",), "models/ünï:1")
    assert headers["Hidden-States-Model"] == "models/%C3%BCn%C3%AF:1"
    assert headers["Hidden-States-Weight-Version"] == "v7,v8,a%20b%0D%0ASet-Cookie:%20%C3%BC"


def test_a_row_says_what_was_counted_and_generated() -> None:
    answer = json.loads(as_json([completion([1.0]), completion([2.0], response_ids=(8, 9))], ("prompt",), "m"))
    assert answer["model"] == "m"
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 2, "total_tokens": 8}
    read, sampled = answer["data"]
    assert read == {
        "object": "hidden_states",
        "index": 0,
        "hidden_states": {"prompt": [1.0]},
        "counts": {"prompt": 3},
        "prompt_tokens": 3,
        "completion_tokens": 0,
        "text": None,
        "token_ids": [],
        "finish_reason": None,
        "weight_version": "v7",
        "mixed_weights": False,
    }
    assert sampled["index"] == 1
    assert (sampled["text"], sampled["token_ids"], sampled["finish_reason"]) == ("so", [8, 9], "stop")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_number_in_json(number: float) -> None:
    rows = [completion([1.0, 2.0]), completion([3.0, number])]
    with pytest.raises(EngineError, match=r'row 1: the states of the prompt .*encoding_format="bytes"'):
        as_json(rows, ("prompt",), "m")
    data, _ = as_bytes(rows, ("prompt",), "m")
    assert str(torch.frombuffer(bytearray(data), dtype=torch.float32)[3].item()) == str(number)
