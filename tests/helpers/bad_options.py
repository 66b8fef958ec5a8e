"""Options of the server half that a client must not have sent: each is one good request with one thing wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from torchrl_sglang_hidden.protocol import (
    CHANNEL,
    PROTOCOL,
    pack_options,
)
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.spec.constraints import (
    ActionMask,
    ConstraintStep,
    LogitConstraint,
    TemperatureScale,
)
from torchrl_sglang_hidden.spec.hidden import SEGMENTS
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.places import At, Each, Every, Window
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan

SPANS = {
    "p": PromptSpan(((0, 2), (3, 4))),
    "r": LastTokens(2),
    "b": Between("|", None),
    "a": At("|"),
    "e": Each("|", pooling="max"),
    "w": Window(1, 3),
    "n": Every(2),
}
WANTED = Wanted(SEGMENTS, "mean", (0, -1), SPANS, tokens=True)
CHOSEN = WantedLogits(LogitsSpec(top_k=2), (ActionMask((3,)), TemperatureScale(2.0)), 1, True, ((1, 2), (3, 5)))
GOOD = pack_options(WANTED, "text", CHOSEN)
FIELDS = json.loads(GOOD["options"])
CHOICES = FIELDS["logits"]
SPEC = CHOICES["spec"]


def custom_of(**changes: Any) -> dict[str, Any]:
    return {CHANNEL: {"protocol": PROTOCOL, "options": json.dumps({**FIELDS, **changes})}}


def span_of(*values: Any, pooling: Any = "spec") -> dict[str, Any]:
    return custom_of(spans={"s": [pooling, *values]})


def logits_of(**changes: Any) -> dict[str, Any]:
    return custom_of(logits={**CHOICES, **changes})


def without(fields: dict[str, Any], gone: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != gone}


@dataclass(frozen=True)
class Bad(LogitConstraint, name="channel_bad"):
    """Anybody's code."""

    def __post_init__(self) -> None:
        raise ArithmeticError("on its way in")

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        return logits_V


INFINITY, DEEP = float("inf"), "[" * 100_000
GARBAGE = [
    None, {}, [], "text", 7, {CHANNEL: None}, {CHANNEL: []}, {CHANNEL: "response"}, {CHANNEL: 3.5}, {"other": GOOD},
    *({CHANNEL: {**GOOD, "protocol": value}} for value in (None, 0, 1, 2, "3", [3], {})),
    *({CHANNEL: {**GOOD, "options": value}} for value in (None, 1, "", "{", "[]", "null", "7", '"a"', [1], {}, DEEP)),
    *({CHANNEL: {name: GOOD[name] for name in GOOD if name != gone}} for gone in GOOD),
    *({CHANNEL: {**GOOD, "options": json.dumps({n: FIELDS[n] for n in FIELDS if n != gone})}} for gone in FIELDS
      if gone not in ("tokens", "logits")),
    *(custom_of(logits=value) for value in (None, [], 7, "spec", {}, *(without(CHOICES, n) for n in CHOICES
                                                                       if n not in ("spec", "scored")))),
    *(logits_of(spec=value) for value in (7, [], "full", {}, without(SPEC, "dtype"), without(SPEC, "top_k"),
                                          {**SPEC, "more": 1})),
    *(logits_of(spec={**SPEC, **value}) for value in (
        {"top_k": 0}, {"top_k": "2"}, {"top_k": 2.0}, {"top_k": None}, {"full": True}, {"full": 1}, {"token_ids": [1]},
        {"top_k": None, "token_ids": [-1]}, {"top_k": None, "token_ids": [1, 1]}, {"top_k": None, "token_ids": 7},
        {"stage": "cooked"}, {"stage": ["raw"]}, {"segments": []}, {"segments": ["answer"]}, {"segments": [["full"]]},
        {"dtype": "float16"}, {"dtype": "float64"}, {"dtype": "int32"}, {"dtype": None}, {"dtype": ["float32"]})),
    *(logits_of(constraints=value) for value in (None, 7, "action_mask:{}", ["nobody:{}"], [None], [7], ["action_mask"],
                                                 ['action_mask:{"valid_token_ids":""}'], ["channel_bad:{}"], [DEEP],
                                                 [f'disallowed_tokens:{{"ids":"{10**30}"}}'])),
    *(logits_of(prompt_from=value) for value in (0, -1, "a", [1], INFINITY)),
    *(logits_of(response_limit=value) for value in (None, "a", [1], INFINITY)),
    *(logits_of(response_ranges=value) for value in (None, 7, [1], [2, 1], [1, 1], [1, 2, 3], [1, 2, 4, 3], ["a", 2],
                                               [[1, 2]], [1, INFINITY])),
    *(custom_of(segments=value) for value in (None, "prompt", ["answer"], ["prompt", "prompt"], 1, [["prompt"]])),
    *(custom_of(pooling=value) for value in ("median", 1, ["mean"], {})),
    *(custom_of(layers=value) for value in (None, 1, [None], ["a"], [[1]], [INFINITY], [], [1, 1])),
    *(custom_of(row_dtype=value) for value in (None, "float64", 1, [])),
    *(custom_of(way=value) for value in (None, "pigeon", 1, ["text"])),
    *(custom_of(spans=value) for value in (None, [], "s", {"s": None}, {"s": 7}, {"s": []}, {"s": ["spec"]},
                                           {"s": "last"})),
    *(span_of(*values, pooling=pooling) for pooling in ("median", 1, ["mean"], {}, "")
      for values in (("prompt", 0, 2), ("last", 1, True), ("between", "a", "b", "end"), ("at", "a", "after", "nan"),
                     ("each", "a", "after", "nan"), ("window", 0, 1), ("every", 1))),
    span_of("prompt", 0, 4097, pooling=None),
    *(span_of(kind, *values) for kind in ("at", "each") for values in (
        [], ["a"], ["a", "after"], ["", "after", "nan"], [None, "after", "nan"], [1, "after", "nan"],
        ["a", "behind", "nan"], ["a", "after", "zero"], ["a", "after", "nan", 1], ["a", ["after"], "nan"])),
    *(span_of("window", *values) for values in ([], [1], [1, 1], [2, 1], [-1, 2], [0, "2"], [0, INFINITY], [0, 1, 2, 3],
                                                [True, 2])),
    *(span_of("every", *values) for values in ([], [0], [-1], ["1"], [1.0], [None], [INFINITY])),
    span_of("turn", 0),
    *(span_of("prompt", *places) for places in ([], [1], [1, 2, 3], [2, 1], [1, 1], [-1, 2], [0, 2, 1, 3], [0, 2, 2, 3],
                                                ["a", 2], [None, 1], [0, INFINITY])),
    *(span_of("last", *values) for values in ([], [1], [0, False], [-2, False], [None, True], [INFINITY, True])),
    *(span_of("between", *values) for values in ([], ["a"], ["a", "b"], [None, None, "end"], ["", "b", "end"],
                                                 [1, "b", "end"], ["a", "b", "never"], ["a", "b", ["end"]])),
]  # fmt: skip


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([*FIELDS, *SEGMENTS, "last"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*FIELDS, CHANNEL]) | st.text(), inner),
    max_leaves=8,
)
