"""`HiddenSpec` and the records: what is accepted, what raises, what cannot be changed."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch

from torchrl_sglang_hidden import HiddenSpec, InputError, InputTypeError
from torchrl_sglang_hidden.specs import SEGMENTS, Request, rows_expected


@pytest.mark.parametrize(
    ("segment", "num_prompt", "num_response", "rows"),
    [
        ("prompt", 1, 1, 1),
        ("prompt", 7, 3, 7),
        ("response", 1, 1, 1),
        ("response", 7, 3, 3),
        ("full", 1, 1, 1),
        ("full", 7, 3, 9),
    ],
)
def test_rows_of_a_segment(segment: Any, num_prompt: int, num_response: int, rows: int) -> None:
    assert rows_expected(segment, num_prompt, num_response) == rows


def test_defaults_are_the_mean_of_the_response() -> None:
    spec = HiddenSpec()
    assert (spec.segments, spec.pooling, spec.layers, spec.dtype) == (("response",), "mean", -1, torch.float32)


def test_a_list_of_segments_is_kept_as_a_tuple() -> None:
    spec = HiddenSpec(segments=["full", "prompt"])  # type: ignore[arg-type]
    assert spec.segments == ("full", "prompt")
    assert hash(spec) == hash(HiddenSpec(segments=("full", "prompt")))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_floating_dtype(dtype: torch.dtype) -> None:
    assert HiddenSpec(dtype=dtype).dtype is dtype


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"segments": "response"}, InputTypeError, r"segments='response'.*expected a tuple"),
        ({"segments": None}, InputTypeError, r"segments=None.*expected a tuple"),
        ({"segments": {"prompt"}}, InputTypeError, r"expected a tuple"),
        ({"segments": ()}, InputError, r"segments=\(\).*one or more of .*'prompt', 'response', 'full'"),
        ({"segments": ("answer",)}, InputError, r"'answer'.*one or more of"),
        ({"segments": (1,)}, InputError, r"\(1,\).*one or more of"),
        ({"segments": ("prompt", "prompt")}, InputError, r"each once"),
        ({"pooling": "max"}, InputError, r"pooling='max'.*'mean', 'last'"),
        ({"pooling": None}, InputError, r"pooling=None.*'mean', 'last'"),
        ({"pooling": ["mean"]}, InputError, r"pooling=\['mean'\]"),
        ({"layers": 40}, InputError, r"layers=40.*use layers=-1"),
        ({"layers": True}, InputError, r"layers=True.*use layers=-1"),
        ({"layers": -1.0}, InputError, r"layers=-1\.0.*use layers=-1"),
        ({"layers": (-1,)}, InputError, r"layers=\(-1,\).*use layers=-1"),
        ({"dtype": "float32"}, InputTypeError, r"dtype='float32'.*torch\.dtype"),
        ({"dtype": torch.int64}, InputError, r"torch\.int64.*torch\.float32"),
        ({"dtype": torch.complex64}, InputError, r"torch\.complex64.*torch\.float32"),
    ],
)
def test_other_values_raise(arguments: dict[str, Any], error: type[InputError], words: str) -> None:
    with pytest.raises(error, match=words):
        HiddenSpec(**arguments)


def test_unhashable_segments_are_named() -> None:
    with pytest.raises(InputError, match=r"\[\['prompt'\]\]|\(\['prompt'\],\)"):
        HiddenSpec(segments=[["prompt"]])  # type: ignore[list-item]


def test_an_unknown_field_raises() -> None:
    with pytest.raises(TypeError, match="tokens"):
        HiddenSpec(tokens=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("segments", "pooling", "whole"),
    [
        (("response",), "mean", False),
        (("prompt",), "mean", True),
        (("response", "full"), "mean", True),
        (SEGMENTS, "last", False),
    ],
)
def test_what_reads_the_whole_prompt(segments: Any, pooling: Any, whole: bool) -> None:
    assert HiddenSpec(segments, pooling).reads_whole_prompt is whole


@pytest.mark.parametrize("record", [HiddenSpec(), Request((1, 2))])
def test_records_are_frozen(record: Any) -> None:
    name = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, name, ())


def test_a_spec_pickles() -> None:
    spec = HiddenSpec(("prompt", "full"), "last", dtype=torch.bfloat16)
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_the_default_sampling_cannot_be_written_to() -> None:
    with pytest.raises(TypeError):
        Request((1,)).sampling["temperature"] = 0.0  # type: ignore[index]
