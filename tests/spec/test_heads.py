"""Small heads: what they compute, their files, and what is none; and rules on their scores."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import heads_oracle
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from torchrl_sglang_hidden import (
    Each,
    Every,
    Head,
    HeadSpec,
    HiddenSpec,
    InputError,
    InputTypeError,
    WeightsError,
    Window,
)
from torchrl_sglang_hidden.spec import heads
from torchrl_sglang_hidden.spec.head_scores import StopRule

D = 6
STATES = torch.randn(9, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("output", ["raw", "sigmoid"])
@pytest.mark.parametrize("normalize", ["none", "layer", "rms", "standard"])
@pytest.mark.parametrize(
    ("kind", "activation"),
    [("linear", "silu"), *((kind, act) for kind in ("mlp", "gated") for act in ("relu", "gelu", "silu", "tanh"))],
)
def test_scores_and_files(kind: str, activation: str, normalize: str, output: str, tmp_path: Path) -> None:
    head = heads_oracle.make_head(kind, D, activation=activation, normalize=normalize, output=output, layer=3)
    expected = heads_oracle.score(head, STATES)
    heads_oracle.assert_scores(head.score(STATES), expected, kind)
    assert head.score(STATES.view(3, 3, D)).shape == (3, 3)
    assert head.score(STATES[0]).shape == ()
    head.save(tmp_path / "head.safetensors")
    loaded = Head.load(tmp_path / "head.safetensors")
    assert loaded.to_bytes() == head.to_bytes()
    assert (loaded.kind, loaded.layer, loaded.activation, loaded.normalize, loaded.output, loaded.width) == (
        kind, 3, activation, normalize, output, D
    )  # fmt: skip
    assert torch.equal(loaded.score(STATES), head.score(STATES))


def test_what_may_be_left_out_or_shaped_as_torch_has_it() -> None:
    layer = torch.nn.Linear(D, 1)
    head = Head("linear", {name: value.detach() for name, value in layer.state_dict().items()})
    torch.testing.assert_close(head.score(STATES), layer(STATES)[:, 0].detach())
    bare = Head("linear", {"weight": torch.ones(D, dtype=torch.bfloat16)})
    torch.testing.assert_close(bare.score(STATES), STATES.sum(-1))
    assert Head("linear", {"weight": torch.ones(D), "bias": torch.tensor(2.0)}).score(torch.zeros(D)) == 2
    weight = torch.ones(D)
    mine = Head("linear", {"weight": weight})
    weight.zero_()
    assert mine.score(torch.ones(D)) == D, "the head has a copy"


GOOD = {"hidden.weight": torch.ones(4, D), "output.weight": torch.ones(4)}


@pytest.mark.parametrize(
    ("kind", "tensors", "options", "error", "said"),
    [
        ("deep", GOOD, {}, InputError, r"kind='deep'.*expected one of \('linear', 'mlp', 'gated'\)"),
        ("mlp", GOOD, {"activation": "exec"}, InputError, "activation='exec'"),
        ("mlp", GOOD, {"normalize": "batch"}, InputError, "normalize='batch'"),
        ("mlp", GOOD, {"output": "softmax"}, InputError, "output='softmax'"),
        ("mlp", GOOD, {"layer": "last"}, InputTypeError, "layer='last'"),
        ("mlp", GOOD, {"layer": True}, InputTypeError, "layer=True"),
        ("mlp", [1], {}, InputTypeError, "a dict of names"),
        ("mlp", {}, {}, WeightsError, r"expected \['hidden.weight', 'output.weight'\]"),
        ("mlp", {**GOOD, "more": torch.ones(1)}, {}, WeightsError, r"has the tensors \['hidden.weight', 'more'"),
        ("mlp", GOOD, {"normalize": "standard"}, WeightsError, "'mean'"),
        ("mlp", {**GOOD, "output.weight": torch.ones(5)}, {}, WeightsError, r"\(5,\): expected \[H\] with H=4, D=6"),
        ("mlp", {**GOOD, "hidden.weight": torch.ones(4)}, {}, WeightsError, r"\(4,\): expected \[H, D\]"),
        ("mlp", {**GOOD, "hidden.weight": torch.ones(0, D)}, {}, WeightsError, r"\(0, 6\)"),
        ("mlp", {**GOOD, "output.bias": torch.ones(2)}, {}, WeightsError, r"\(2,\): expected \[1\]"),
        ("mlp", {**GOOD, "output.weight": torch.ones(4).int()}, {}, InputTypeError, "floating-point"),
        ("mlp", {**GOOD, "output.weight": 3}, {}, InputTypeError, "floating-point"),
        ("mlp", {**GOOD, "output.weight": torch.full((4,), torch.nan)}, {}, WeightsError, "not finite; look at what"),
        ("mlp", {**GOOD, "output.bias": torch.tensor([torch.inf])}, {}, WeightsError, "'output.bias'.*not finite"),
        (
            "linear",
            {"weight": torch.ones(D), "mean": torch.ones(D), "std": torch.zeros(D)},
            {"normalize": "standard"},
            WeightsError,
            "'std' has values of 0",
        ),
        ("linear", {"weight": torch.ones(2**24 + 1)}, {}, WeightsError, "64 MiB of float32, over the limit of 64"),
    ],
)  # fmt: skip
def test_what_is_no_head(kind: Any, tensors: Any, options: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Head(kind, tensors, **options)


def test_states_that_are_no_tensor() -> None:
    with pytest.raises(InputTypeError, match=r"states: a list; expected a tensor \[..., 6\]"):
        Head("mlp", GOOD).score([1.0] * D)  # type: ignore[arg-type]


def test_states_of_another_size() -> None:
    with pytest.raises(InputError, match=r"\(9, 6\): expected \[..., 7\]"):
        Head("linear", {"weight": torch.ones(7)}).score(STATES)


def described(**changes: Any) -> bytes:
    fields = {"kind": "linear", "layer": -1, "activation": "silu", "normalize": "none", "output": "raw", **changes}
    return save({"weight": torch.ones(D)}, metadata={heads._METADATA: json.dumps(fields)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        pickle.dumps({"weight": 1}),
        b"\xff" * 64,
        save({"weight": torch.ones(D)}),
        save({"weight": torch.ones(D)}, metadata={heads._METADATA: "[1]"}),
        save({"weight": torch.ones(D)}, metadata={heads._METADATA: "{"}),
        described()[:-1],
        described().replace(b'"F32"', b'"F99"'),
    ],
)
def test_files_that_are_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "head").write_bytes(data)
    with pytest.raises(WeightsError, match=rf"{len(data)} bytes are no safetensors file .*Head\(…\).save\(path\)"):
        Head.load(tmp_path / "head")


def test_files_that_say_wrong_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Head.from_bytes(described()).width == D
    with pytest.raises(InputError, match="kind='code'"):
        Head.from_bytes(described(kind="code"))
    with pytest.raises(InputTypeError, match="expected names"):
        Head.from_bytes(described(kind=["linear"]))
    with pytest.raises(WeightsError, match=r"cannot be read \(.*No such file"):
        Head.load(tmp_path / "none")
    monkeypatch.setattr(heads, "MAX_HEAD_BYTES", 100)
    (tmp_path / "head").write_bytes(described() + b" " * 10**6)
    with pytest.raises(WeightsError, match="over the limit"):
        Head.load(tmp_path / "head")


@given(data=st.binary(max_size=300), at=st.integers(0, 200))
def test_spoilt_files(data: bytes, at: int) -> None:
    """Whatever stands in a file, it is a head or a named error."""
    good = described()
    for spoilt in (data, good[:at] + data + good[at + len(data) :], good[:at]):
        try:
            Head.from_bytes(spoilt)
        except InputError:
            continue


# --- which scores, and when they end a response -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("confident > 0.9", ("confident", ">", 0.9)),
        ("a>=1", ("a", ">=", 1.0)),
        ("  a-b_2\t<  -1e-3 ", ("a-b_2", "<", -1e-3)),
        ("_ <= +.5", ("_", "<=", 0.5)),
    ],
)
def test_rules(text: str, rule: tuple[str, str, float]) -> None:
    found = StopRule.parse(text)
    assert (found.head, found.comparison, found.threshold) == rule
    assert StopRule.parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "", "confident", "> 0.9", "confident >", "confident = 0.9", "confident == 1", "0.9 > confident", "a > b",
        "a > nan", "a > inf", "a > 1e999", "a > 1_000", "a > 1 and b > 2", "a > 1; b", "__import__('os') > 1",
        "a.b > 1", "a > 0x1", "a > ١", "ä > 1", "a > 1\n2", "a" * 65 + " > 1", "a > 0.9)",
    ],
)  # fmt: skip
def test_texts_that_are_no_rules(text: str) -> None:
    with pytest.raises(InputError, match=r"stop_when=.*such as 'confident > 0.9'"):
        StopRule.parse(text)


@pytest.mark.parametrize("value", [None, 0.9, b"a > 1", ["a > 1"]])
def test_values_that_are_no_rules(value: Any) -> None:
    with pytest.raises(InputTypeError, match="expected a string"):
        StopRule.parse(value)


@pytest.mark.parametrize(
    ("comparison", "holds"), [(">", (False, False, True)), (">=", (False, True, True)), ("<", (True, False, False)),
                              ("<=", (True, True, False))],
)  # fmt: skip
def test_what_fulfils_a_rule(comparison: str, holds: tuple[bool, ...]) -> None:
    rule = StopRule.parse(f"a {comparison} 0.5")
    assert tuple(rule.holds(score) for score in (0.4, 0.5, 0.6)) == holds
    assert not rule.holds(float("nan"))


def test_specs_of_pooled_scores() -> None:
    spans = {"each": Each("w"), "start": Window(0, 2, segment="prompt")}
    spec = HeadSpec(("a",), ["response"], pooling="max", spans=spans)  # type: ignore[arg-type]
    assert spec.pooled == HiddenSpec(("response",), "max", spans=spans)
    assert (spec.of_prompt, spec.of_response) == (True, True)
    assert (spec.prompt_tokens, spec.response_tokens) == (False, False)
    assert spec.unpooled == ("each",)
    beside = replace(spec, pooling=None)
    assert beside.pooled == HiddenSpec((), "mean", spans=spans)
    assert (beside.prompt_tokens, beside.response_tokens) == (False, True)
    assert HeadSpec(("a",)).pooled is None
    alone = HeadSpec(("a",), (), spans={"start": spans["start"]})
    assert (alone.of_prompt, alone.of_response) == (True, False)
    assert hash(spec) == hash(replace(spec))


def test_specs() -> None:
    spec = HeadSpec(["a", "b"], ["prompt", "full"], "b < 2")  # type: ignore[arg-type]
    assert (spec.heads, spec.segments, spec.rule) == (("a", "b"), ("prompt", "full"), StopRule("b", "<", 2.0))
    assert (spec.of_prompt, spec.of_response) == (True, True)
    assert not HeadSpec(("a",)).of_prompt
    assert not HeadSpec(("a",), ("prompt",)).of_response
    assert replace(spec, stop_when=None).rule is None


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"heads": "a"}, InputTypeError, "heads='a'.*a tuple of names"),
        ({"heads": ()}, InputError, "1 to 64 names"),
        ({"heads": ("a", "a")}, InputError, "each once"),
        ({"heads": tuple(f"h{i}" for i in range(65))}, InputError, "1 to 64 names"),
        ({"heads": (3,)}, InputTypeError, "head name 3"),
        ({"heads": ("a b",)}, InputError, "head name 'a b'.*letters, digits"),
        ({"heads": ("a",), "segments": "prompt"}, InputTypeError, "segments='prompt'"),
        ({"heads": ("a",), "segments": ()}, InputError, r"segments=\(\)"),
        ({"heads": ("a",), "segments": ("answer",)}, InputError, "answer"),
        ({"heads": ("a",), "stop_when": "b > 1"}, InputError, "'b' is not among heads"),
        ({"heads": ("a",), "stop_when": "a"}, InputError, "such as 'confident > 0.9'"),
        ({"heads": ("a",), "stop_when": "a > 1", "segments": ("prompt",)}, InputError, "add 'response'"),
        ({"heads": ("a",), "pooling": "median"}, InputError, r"^HeadSpec\(pooling='median'\): expected one of"),
        ({"heads": ("a",), "spans": []}, InputTypeError, r"HeadSpec\(spans=\[\]\): expected a dict"),
        ({"heads": ("a",), "spans": {"x": "last"}}, InputTypeError, r"^HeadSpec\(spans={'x': 'last'}\): expected"),
        ({"heads": ("a",), "spans": {"": Every(2)}}, InputTypeError, "a non-empty string for a span's name"),
        ({"heads": ("a",), "segments": (), "pooling": "mean"}, InputError, "none only beside spans"),
        (
            {"heads": ("a",), "segments": (), "spans": {"x": Every(2, segment="prompt")}, "stop_when": "a > 1"},
            InputError,
            "add 'response'",
        ),
    ],
)
def test_specs_that_are_none(fields: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        HeadSpec(**fields)
