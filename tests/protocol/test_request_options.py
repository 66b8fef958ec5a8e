"""The options of a request: what goes in comes out, and what is not understood is not read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.bad_options import (
    CHOICES,
    CHOSEN,
    FIELDS,
    GARBAGE,
    GOOD,
    SPEC,
    WANTED,
    anything,
    custom_of,
    logits_of,
    span_of,
)
from helpers.reference_pooling import DTYPES
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang_hidden.protocol import (
    CHANNEL,
    MAX_CONSTRAINTS,
    PROTOCOL,
    Options,
    Way,
    pack_options,
    request_options,
    unpack_options,
)
from torchrl_sglang_hidden.reduce.head_scores import WantedScores
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.spec.constraints import (
    ActionMask,
    DisallowedTokens,
    LinearSchedule,
    TemperatureScale,
)
from torchrl_sglang_hidden.spec.head_scores import StopRule
from torchrl_sglang_hidden.spec.hidden import POOLINGS, SEGMENTS
from torchrl_sglang_hidden.spec.logits import STAGES, LogitsSpec
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, intervals_of

WAYS: tuple[Way, ...] = ("binary", "text", "shared")

markers = st.text(min_size=1)
resolved = (
    st.lists(st.booleans(), min_size=1).filter(any).map(intervals_of)
    | st.builds(LastTokens, st.integers(1, 10**6), allow_fewer=st.booleans())
    | st.builds(Between, markers, st.none() | markers, unclosed=st.sampled_from(["error", "end"]))
    | st.builds(Between, st.none(), markers, unclosed=st.sampled_from(["error", "end"]))
)
columns = st.one_of(
    st.integers(1, 10**6).map(lambda k: {"top_k": k}),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True).map(lambda ids: {"token_ids": tuple(ids)}),
    st.just({"full": True}),
)
specs = st.builds(
    lambda asked, **more: LogitsSpec(**asked, **more),
    columns,
    stage=st.sampled_from(STAGES),
    segments=st.permutations(SEGMENTS).flatmap(lambda all_: st.integers(1, 3).map(lambda size: tuple(all_[:size]))),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
constraints = st.one_of(
    st.builds(ActionMask, st.lists(st.integers(0, 10**5), min_size=1, max_size=9, unique=True)),
    st.builds(
        lambda ids: DisallowedTokens(ids, first_tokens=3), st.lists(st.integers(0, 10**5), max_size=9, unique=True)
    ),
    st.builds(TemperatureScale, st.floats(0.01, 100)),
    st.just(TemperatureScale(LinearSchedule(2.0, 0.5), positions=(0, 4))),
)
chosen = st.builds(
    WantedLogits,
    spec=st.none() | specs,
    constraints=st.lists(constraints, max_size=3).map(tuple),
    prompt_from=st.none() | st.integers(1, 10**6),
    scored=st.booleans(),
    response_ranges=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 99)), max_size=3).map(
        lambda parts: tuple((start, start + size) for start, size in parts)
    ),
    response_limit=st.integers(0, 10**6),
    entropy=st.booleans(),
)
head_names = st.lists(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", fullmatch=True), min_size=1, max_size=4, unique=True
)
pooled_scores = st.builds(
    Wanted,
    st.lists(st.sampled_from(SEGMENTS), unique=True).map(tuple),
    st.sampled_from(POOLINGS),
    spans=st.dictionaries(st.text(min_size=1, max_size=4), st.builds(LastTokens, st.integers(1, 9)), max_size=2),
)
scored = head_names.flatmap(
    lambda names: st.builds(
        WantedScores,
        st.just(tuple(names)),
        prompt=st.booleans(),
        response=st.just(True),
        stop=st.none()
        | st.builds(
            StopRule,
            st.sampled_from(names),
            st.sampled_from([">", ">=", "<", "<="]),
            st.floats(allow_nan=False, allow_infinity=False),
        ),
        pooled=st.none() | pooled_scores,
    )
)
options = st.builds(
    Options,
    st.builds(
        Wanted,
        segments=st.permutations(SEGMENTS).flatmap(lambda all_: st.integers(0, 3).map(lambda size: tuple(all_[:size]))),
        pooling=st.sampled_from([*POOLINGS, None]),
        layers=st.lists(st.integers(-1, 200), min_size=1, max_size=4, unique=True).map(tuple),
        spans=st.dictionaries(st.text(min_size=1), resolved, max_size=4),
        tokens=st.booleans(),
        row_dtype=st.sampled_from(DTYPES),
    ),
    st.sampled_from(WAYS),
    chosen,
    st.none() | scored,
)


@given(asked=options)
def test_options_round_trip(asked: Options) -> None:
    custom = {CHANNEL: pack_options(asked.wanted, asked.way, asked.logits, asked.scores)}
    assert all(isinstance(value, (str, int)) for value in custom[CHANNEL].values()), "SGLang carries scalars"
    assert unpack_options(json.loads(json.dumps(custom))) == asked


def test_more_constraints_than_there_may_be_are_not_read() -> None:
    """Reading and applying each constraint holds up all other requests."""
    for count in (MAX_CONSTRAINTS, MAX_CONSTRAINTS + 1):
        logits = WantedLogits(constraints=(TemperatureScale(2.0),) * count)
        found = unpack_options({CHANNEL: pack_options(Wanted((), None), "text", logits)})
        assert found == (Options(Wanted((), None), "text", logits) if count == 64 else None)


@given(wanted=options.map(lambda asked: asked.wanted))
def test_who_wants_no_logits_says_nothing_of_them(wanted: Wanted) -> None:
    packed = pack_options(wanted, "text")
    assert "logits" not in json.loads(packed["options"])
    assert unpack_options({CHANNEL: packed}) == Options(wanted, "text", WantedLogits())


@pytest.mark.parametrize("custom", GARBAGE, ids=lambda custom: repr(custom)[:80])
def test_options_that_are_not_understood(custom: Any) -> None:
    assert unpack_options({CHANNEL: GOOD}) == Options(WANTED, "text", CHOSEN)
    assert unpack_options(custom) is None


@given(
    custom=anything
    | st.fixed_dictionaries({CHANNEL: anything})
    | st.fixed_dictionaries({CHANNEL: st.fixed_dictionaries({"protocol": st.just(PROTOCOL), "options": anything})})
    | st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, anything)).map(lambda changes: custom_of(**changes))
    | st.fixed_dictionaries({}, optional=dict.fromkeys(CHOICES, anything)).map(lambda changes: logits_of(**changes))
    | st.fixed_dictionaries({}, optional=dict.fromkeys(SPEC, anything)).map(
        lambda changes: logits_of(spec={**SPEC, **changes})
    )
    | st.lists(anything, max_size=4).flatmap(
        lambda values: st.sampled_from(["prompt", "last", "between"]).map(lambda kind: span_of(kind, *values))
    )
)
def test_no_options_raise(custom: Any) -> None:
    """An exception in the scheduler ends the server."""
    found = unpack_options(custom)
    if found is not None:
        assert unpack_options({CHANNEL: pack_options(found.wanted, found.way, found.logits)}) == found


def test_masks_of_equal_text_are_read_once() -> None:
    """A mask of half a vocabulary takes milliseconds to read, while all requests of the server wait."""
    text = ActionMask(tuple(range(0, 90_000, 2))).to_str()
    first, second = (unpack_options(logits_of(constraints=["".join(text)])).logits.constraints[0] for _ in range(2))
    assert first is second
    other = DisallowedTokens((1,)).to_str()
    assert unpack_options(logits_of(constraints=[other, text])).logits.constraints[1] is first
    bounded = request_options._MASKS
    assert bounded.size <= bounded.limit


def test_other_constraints_are_read_for_each_request() -> None:
    """A constraint of the user's own may keep something of its request."""
    for text in (TemperatureScale(2.0).to_str(), 'channel_masked:{"valid_token_ids":"1"}'):
        first, second = (unpack_options(logits_of(constraints=[text])).logits.constraints[0] for _ in range(2))
        assert (first == second, first is second) == (True, False)


@dataclass(frozen=True)
class Masked(ActionMask, name="channel_masked"):
    """A user's own kind of mask."""


@pytest.mark.parametrize(
    "change",
    [
        lambda scores: scores[4].update(pooling=None),
        lambda scores: scores[4].update(pooling="median"),
        lambda scores: scores[4].update(layers=[0]),
        lambda scores: scores[4].update(tokens=True),
        lambda scores: scores[4].update(segments=["answer"]),
        lambda scores: scores[4].update(spans={"a": ["mean", "code"]}),
        lambda scores: scores.__setitem__(4, []),
        lambda scores: scores.__setitem__(0, ["a b"]),
        lambda scores: scores.__setitem__(3, "b > 1"),
        lambda scores: scores.pop(),
        lambda scores: scores.append(None),
        lambda scores: scores.__setitem__(slice(1, 5), [False, False, None, None]),
    ],
)
def test_scores_that_nobody_can_ask_for(change: Any) -> None:
    asked = WantedScores(("a",), True, True, StopRule("a", ">", 1.0), Wanted(("full",), "mean"))
    custom: Any = {CHANNEL: pack_options(Wanted((), None), "binary", None, asked)}
    assert unpack_options(custom).scores == asked  # type: ignore[union-attr]
    fields = json.loads(custom[CHANNEL]["options"])
    change(fields["scores"])
    custom[CHANNEL]["options"] = json.dumps(fields)
    assert unpack_options(custom) is None
