"""`HiddenSpec` and the records: what is accepted, what raises, what cannot be changed."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch

from torchrl_sglang_hidden import (
    Between,
    HiddenSpec,
    InputError,
    InputTypeError,
    LastTokens,
    LogitsSpec,
    Role,
    TokenMask,
)
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.spec.hidden import Segment, canonical_layer, positions_of, reads_prompt, reads_response


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
    assert len(Segment(segment).positions(num_prompt, num_response)) == rows


def test_defaults_are_the_mean_of_the_response() -> None:
    spec = HiddenSpec()
    assert (spec.segments, spec.pooling, spec.layers, spec.dtype) == (("response",), "mean", -1, torch.float32)
    assert (spec.tokens, spec.spans) == (False, {})


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
        ({"segments": (), "tokens": True}, InputError, r"segments=\(\), tokens=True.*none only beside spans"),
        ({"segments": (), "tokens": True, "spans": {"a": LastTokens(1)}}, InputError, r"without tokens=True"),
        ({"segments": ("answer",)}, InputError, r"'answer'.*one or more of"),
        ({"segments": (1,)}, InputError, r"\(1,\).*one or more of"),
        ({"segments": ("prompt", "prompt")}, InputError, r"each once"),
        ({"pooling": "median"}, InputError, r"pooling='median'.*'mean', 'last', 'max', 'sum'"),
        ({"pooling": None}, InputError, r"pooling=None, tokens=False.*pass tokens=True and no spans, or a pooling"),
        ({"pooling": None, "tokens": True, "spans": {"a": LastTokens(1)}}, InputError, r"spans=\['a'\]"),
        ({"pooling": ["mean"]}, InputError, r"pooling=\['mean'\]"),
        ({"layers": True}, InputTypeError, r"layers=True.*an integer, or a tuple of them"),
        ({"layers": -1.0}, InputTypeError, r"layers=-1\.0.*an integer"),
        ({"layers": (-1, "0")}, InputTypeError, r"layers=\(-1, '0'\)"),
        ({"layers": None}, InputTypeError, r"layers=None"),
        ({"layers": ()}, InputError, r"layers=\(\).*each once"),
        ({"layers": (2, -1, 2)}, InputError, r"layers=\(2, -1, 2\).*each once"),
        ({"tokens": 1}, InputTypeError, r"tokens=1.*True or False"),
        ({"spans": [LastTokens(1)]}, InputTypeError, r"spans=\[.*a dict of names"),
        ({"spans": {"": LastTokens(1)}}, InputTypeError, r"'': .*a non-empty string"),
        ({"spans": {1: LastTokens(1)}}, InputTypeError, r"1: .*a non-empty string"),
        ({"spans": {"tail": "last"}}, InputTypeError, r"'tail': 'last'.*expected LastTokens, TokenMask"),
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
    with pytest.raises(TypeError, match="token"):
        HiddenSpec(token=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("layers", "kept", "ids"), [(-1, -1, (-1,)), (3, 3, (3,)), ((0,), (0,), (0,)), ([2, -1], (2, -1), (2, -1))]
)
def test_layers_keep_their_order_and_their_kind(layers: Any, kept: Any, ids: tuple[int, ...]) -> None:
    spec = HiddenSpec(layers=layers)
    assert (spec.layers, spec.layer_ids) == (kept, ids)
    assert hash(spec) == hash(HiddenSpec(layers=kept))


def test_the_spans_are_a_copy() -> None:
    spans: dict[str, Any] = {"tail": LastTokens(2)}
    spec = HiddenSpec(spans=spans)
    spans["head"] = LastTokens(1)
    assert spec.spans == {"tail": LastTokens(2)}


@pytest.mark.parametrize(("layer", "name"), [(0, 0), (3, 3), (-1, -1), (-2, 2), (-4, 0)])
def test_every_layer_has_one_name(layer: int, name: int) -> None:
    assert canonical_layer(layer, 4) == name


@pytest.mark.parametrize("layer", [4, 40, -5])
def test_layers_the_model_does_not_have(layer: int) -> None:
    with pytest.raises(InputError, match=rf"layers={layer}: the model has 4 layers; use 0\.\.3, -1 .*-2\.\.-4"):
        canonical_layer(layer, 4)


@pytest.mark.parametrize(
    ("arguments", "needs"),
    [
        ({"segments": ("prompt",)}, False),
        ({"segments": ("prompt",), "tokens": True, "pooling": None}, False),
        ({"segments": ("prompt", "full")}, True),
        ({}, True),
        ({"segments": (), "spans": {"a": TokenMask("m"), "b": Role("user"), "c": LastTokens(1, "prompt")}}, False),
        ({"segments": ("prompt",), "spans": {"a": LastTokens(1)}}, True),
        ({"segments": (), "spans": {"a": Between("x", None)}}, True),
        ({"segments": (), "spans": {"a": Between("x", None, "prompt")}}, False),
    ],
)
def test_what_needs_a_response(arguments: dict[str, Any], needs: bool) -> None:
    assert HiddenSpec(**arguments).needs_response is needs


@pytest.mark.parametrize("record", [HiddenSpec(), Request((1, 2))])
def test_records_are_frozen(record: Any) -> None:
    name = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, name, ())


def test_a_spec_pickles() -> None:
    spans = {"tail": LastTokens(2, allow_fewer=True), "why": Between("<t>", "</t>")}
    spec = HiddenSpec(("prompt", "full"), "last", (0, -1), tokens=True, dtype=torch.bfloat16, spans=spans)
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_requests_share_no_defaults() -> None:
    one, other = Request((1,)), Request((1,))
    assert one.sampling is not other.sampling
    assert one.spans is not other.spans


@pytest.mark.parametrize(
    ("sampling", "reads"), [({}, False), ({"max_new_tokens": 0}, True), ({"max_new_tokens": 1}, False)]
)
def test_a_request_of_no_tokens_only_reads(sampling: dict[str, Any], reads: bool) -> None:
    assert Request((1,), sampling=sampling).reads_only is reads


def test_sums_do_not_fit_into_float16() -> None:
    with pytest.raises(InputError, match=r"65504.*torch\.float32 or torch\.bfloat16"):
        HiddenSpec(pooling="sum", dtype=torch.float16)


# --- segments ---------------------------------------------------------------------------------------------------------


def test_a_segment_is_equal_to_its_name() -> None:
    spec = HiddenSpec(("prompt", Segment.FULL))
    assert spec.segments == ("prompt", "full") == (Segment.PROMPT, Segment.FULL)
    # Keys, YAML and stored TensorDicts made of them need no class of this package.
    assert {type(name) for name in (*spec.segments, *LogitsSpec(full=True, segments=(Segment.FULL,)).segments)} == {str}
    assert (spec, hash(spec)) == (HiddenSpec((Segment.PROMPT, "full")), hash(HiddenSpec(("prompt", "full"))))
    assert repr(spec) == repr(eval(repr(spec), {"HiddenSpec": HiddenSpec, "torch": torch}))
    assert json.dumps(spec.segments) == '["prompt", "full"]'
    assert {"full": 1}[Segment.FULL] == 1
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize(
    ("segments", "positions"),
    [
        (("prompt",), range(5)),
        (("response",), range(4, 7)),
        (("full",), range(7)),
        (("prompt", "response"), range(7)),
        (("response", "full"), range(7)),
        ((), range(0)),
    ],
)
def test_segments_together_leave_no_hole(segments: Any, positions: range) -> None:
    """P = 5 and T = 3."""
    assert positions_of(segments, 5, 3) == positions
    assert reads_prompt(segments) is (0 in positions)
    assert reads_response(segments) is (6 in positions)
