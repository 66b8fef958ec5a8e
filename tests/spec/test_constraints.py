"""What constraints accept, when they act, how they travel as text, and which of them leave nothing to choose."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from torchrl_sglang_hidden.errors import (
    ConstraintError,
    InputError,
    InputTypeError,
    SGLangHiddenError,
    TokenIdError,
    UnknownOptionError,
)
from torchrl_sglang_hidden.spec.constraints import (
    ActionMask,
    ConstraintStep,
    DisallowedTokens,
    ExponentialSchedule,
    LinearSchedule,
    LogitConstraint,
    TemperatureScale,
    TokenConstraint,
    base,
    check_constraints,
    known_constraints,
)
from torchrl_sglang_hidden.spec.constraints.masks import MAX_IDS

INF = math.inf


@dataclass(frozen=True)
class Push(LogitConstraint, name="test_push"):
    """A user's own, with a field of every kind that JSON has."""

    amounts: tuple[float, ...]
    ids: tuple[tuple[int, ...], ...] = ()
    word: str = ""
    strict: bool = False
    limit: int | None = 5
    table: Any = None

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        return logits_V + sum(self.amounts)


@dataclass(frozen=True)
class Kept(TokenConstraint, name="test_kept"):
    """A user's own mask, that keeps what it gives."""

    def allowed(self, vocab_size: int) -> torch.Tensor:
        return KEPT


KEPT = torch.tensor([True, True, True, False])


@pytest.fixture(autouse=True)
def same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the constraint names that a test registers."""
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))


def step_at(index: int, max_new_tokens: int = 8) -> ConstraintStep:
    return ConstraintStep(index, max_new_tokens, (5, 6), torch.arange(index))


# --- what is accepted -------------------------------------------------------------------------------------------------

BAD: list[tuple[Any, dict[str, Any], type[SGLangHiddenError], str]] = [
    (ActionMask, {"valid_token_ids": ()}, ConstraintError, r"ActionMask\(valid_token_ids=\(\)\): 0 tokens .* least 1"),
    (ActionMask, {"valid_token_ids": torch.empty(0, dtype=torch.int64)}, ConstraintError, r"0 tokens are allowed"),
    (ActionMask, {"valid_token_ids": (4, -2, -1)}, TokenIdError, r"ActionMask\(.*\): -2 is negative; .*at least 0"),
    (ActionMask, {"valid_token_ids": (1, 0, 1)}, InputTypeError, r"3 zeros and ones, which is a mask; pass it as bool"),
    (ActionMask, {"valid_token_ids": torch.tensor([0, 0, 0, 1])}, InputTypeError, r"4 zeros and ones, .*mask\.bool"),
    (DisallowedTokens, {"ids": [1] * 5}, InputTypeError, r"DisallowedTokens\(ids=…\): 5 zeros and ones"),
    (DisallowedTokens, {"ids": [0] * 3}, InputTypeError, r"3 zeros and ones"),
    (ActionMask, {"valid_token_ids": (4, 5.0)}, InputTypeError, r"ActionMask\(.*\): 5\.0 is a float; .*integers"),
    (ActionMask, {"valid_token_ids": (4, True)}, InputTypeError, r"True is a bool"),
    (ActionMask, {"valid_token_ids": (4, None)}, InputTypeError, r"None is a NoneType"),
    (ActionMask, {"valid_token_ids": [torch.tensor(4)]}, InputTypeError, r"tensor\(4\) is a Tensor"),
    (ActionMask, {"valid_token_ids": 4}, InputTypeError, r"4 is a int; expected token ids"),
    (ActionMask, {"valid_token_ids": "45"}, InputTypeError, r"'45' is a str; expected token ids"),
    (ActionMask, {"valid_token_ids": b"45"}, InputTypeError, r"is a bytes; expected token ids"),
    (ActionMask, {"valid_token_ids": {4: 1.0}}, InputTypeError, r"\{4: 1\.0\} is a dict; expected token ids"),
    (ActionMask, {"valid_token_ids": torch.tensor([True])}, InputTypeError, r"torch\.bool; .*ActionMask\.from_mask"),
    (ActionMask, {"valid_token_ids": torch.tensor([1.0])}, InputTypeError, r"a tensor of torch\.float32"),
    (ActionMask, {"valid_token_ids": torch.tensor([1j])}, InputTypeError, r"a tensor of torch\.complex64"),
    (ActionMask, {"valid_token_ids": torch.tensor([-1])}, TokenIdError, r"-1 is negative"),
    (DisallowedTokens, {"ids": (-1,)}, TokenIdError, r"DisallowedTokens\(ids=…\): -1 is negative"),
    (DisallowedTokens, {"ids": ("a",)}, InputTypeError, r"DisallowedTokens\(ids=…\): 'a' is a str"),
    (DisallowedTokens, {"ids": None}, InputTypeError, r"None is a NoneType; expected token ids"),
    (ActionMask, {"valid_token_ids": (1,), "first_tokens": 0}, InputError, r"ActionMask\(first_tokens=0\): .* 1"),
    (ActionMask, {"valid_token_ids": (1,), "first_tokens": -3}, InputError, r"first_tokens=-3\): expected at least 1"),
    (ActionMask, {"valid_token_ids": (1,), "first_tokens": True}, InputTypeError, r"first_tokens=True\): .*integer"),
    (ActionMask, {"valid_token_ids": (1,), "first_tokens": 2.0}, InputTypeError, r"first_tokens=2\.0\): .* an integer"),
    (DisallowedTokens, {"ids": (), "positions": ()}, InputError, r"DisallowedTokens\(positions=\(\)\): .*least one"),
    (DisallowedTokens, {"ids": (), "positions": (0, -1)}, InputError, r"\(positions=\(0, -1\)\): .*each of at least 0"),
    (DisallowedTokens, {"ids": (), "positions": (0, 1.0)}, InputTypeError, r"\(positions=\(0, 1\.0\)\): .*integers"),
    (DisallowedTokens, {"ids": (), "positions": (True,)}, InputTypeError, r"\(positions=\(True,\)\)"),
    (DisallowedTokens, {"ids": (), "positions": 3}, InputTypeError, r"\(positions=3\)"),
    (DisallowedTokens, {"ids": (), "positions": "01"}, InputTypeError, r"\(positions='01'\)"),
    (
        DisallowedTokens,
        {"ids": (), "first_tokens": 2, "positions": (0,)},
        InputError,
        r"DisallowedTokens: first_tokens and positions are both given; keep one",
    ),
    (Push, {"amounts": (), "first_tokens": 0}, InputError, r"Push\(first_tokens=0\)"),
    (TemperatureScale, {"schedule": 0}, InputError, r"temperature 0\.0; .*\[0\.01, 100\].* use temperature=0"),
    (TemperatureScale, {"schedule": 0.009}, InputError, r"temperature 0\.009; expected one in \[0\.01, 100\]"),
    (TemperatureScale, {"schedule": 10**400}, InputError, r"temperature inf; expected one in \[0\.01, 100\]"),
    (TemperatureScale, {"schedule": [1, -(10**400)]}, InputError, r"temperature .*inf; expected one in \[0\.01"),
    (TemperatureScale, {"schedule": 100.1}, InputError, r"temperature 100\.1"),
    (TemperatureScale, {"schedule": -1.0}, InputError, r"temperature -1\.0"),
    (TemperatureScale, {"schedule": math.nan}, InputError, r"temperature nan"),
    (TemperatureScale, {"schedule": INF}, InputError, r"temperature inf"),
    (TemperatureScale, {"schedule": True}, InputTypeError, r"True is no temperature; .*a number, a list, or"),
    (TemperatureScale, {"schedule": "1"}, InputTypeError, r"'1' is no temperature"),
    (TemperatureScale, {"schedule": None}, InputTypeError, r"None is no temperature"),
    (TemperatureScale, {"schedule": {"linear": [1, 2]}}, InputTypeError, r"is no temperature"),
    (TemperatureScale, {"schedule": []}, InputError, r"TemperatureScale\(\[\]\): 0 temperatures; give at least 1"),
    (TemperatureScale, {"schedule": [1.0, 0.0]}, InputError, r"temperature 0\.0"),
    (TemperatureScale, {"schedule": [1.0, [2.0]]}, InputTypeError, r"\[2\.0\] is no temperature"),
    (TemperatureScale, {"schedule": LinearSchedule(1.0, 0.0)}, InputError, r"temperature 0\.0"),
    (TemperatureScale, {"schedule": ExponentialSchedule(math.nan, 1.0)}, InputError, r"temperature nan"),
    (TemperatureScale, {"schedule": LinearSchedule("1", 1.0)}, InputTypeError, r"'1' is no temperature"),
    (TemperatureScale, {"schedule": LinearSchedule(1, 2, 1)}, InputError, r"steps=1\).*: expected steps of at least 2"),
    (TemperatureScale, {"schedule": ExponentialSchedule(1, 2, 0)}, InputError, r"expected steps of at least 2"),
    (TemperatureScale, {"schedule": LinearSchedule(1, 2, 3.0)}, InputTypeError, r"steps=3\.0\).*an integer"),
    (TemperatureScale, {"schedule": LinearSchedule(1, 2, True)}, InputTypeError, r"steps=True\).*an integer"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arguments", "error", "words"), BAD, ids=lambda value: str(value)[:60])
def test_other_values_raise(kind: Any, arguments: Any, error: type[SGLangHiddenError], words: str) -> None:
    with pytest.raises(error, match=words):
        kind(**arguments)


@pytest.mark.parametrize("ids", [(7, 3, 3, 5), [5, 3, 7], {3, 5, 7}, range(3, 8, 2), torch.tensor([[7, 3], [5, 3]])])
def test_ids_are_kept_once_and_in_order(ids: Any) -> None:
    assert ActionMask(ids).valid_token_ids == DisallowedTokens(ids).ids == (3, 5, 7)
    assert all(type(one) is int for one in ActionMask(ids).valid_token_ids)
    assert DisallowedTokens(()).ids == ()
    assert [ActionMask(few).valid_token_ids for few in ((0, 1), (1, 0), (1, 1), (0, 1, 2, 1))] == [
        (0, 1), (0, 1), (1,), (0, 1, 2),
    ], "no masks"  # fmt: skip


def test_a_mask_of_a_tensor() -> None:
    mask_V = torch.tensor([False, True, False, True])
    assert ActionMask.from_mask(mask_V, first_tokens=2) == ActionMask((1, 3), first_tokens=2)
    assert ActionMask.from_mask(mask_V, positions=(4,)) == ActionMask((1, 3), positions=(4,))
    for wrong in (mask_V.int(), mask_V[None], [True, False], None):
        with pytest.raises(InputTypeError, match=r"ActionMask\.from_mask\(.*\): expected a bool tensor \[V\]"):
            ActionMask.from_mask(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConstraintError, match="0 tokens are allowed"):
        ActionMask.from_mask(torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize("temperature", [0.01, 100, Fraction(1, 2)])
def test_every_number_is_a_temperature(temperature: Any) -> None:
    scale = TemperatureScale(temperature)
    assert (scale.schedule, type(scale.schedule)) == (float(temperature), float)


def test_positions_are_kept_once_and_in_order() -> None:
    for positions in ((4, 0, 4), [0, 4], {4, 0}, range(0, 5, 4)):
        assert ActionMask((1,), positions=positions).positions == (0, 4)  # type: ignore[arg-type]


def test_constraints_are_frozen_and_can_be_keys() -> None:
    one = ActionMask((1,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.first_tokens = 3  # type: ignore[misc]
    assert {one: 1}[ActionMask([1])] == 1
    assert one != DisallowedTokens((1,))


# --- when they act ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "acts"),
    [
        ({}, [True] * 6),
        ({"first_tokens": 1}, [True] + [False] * 5),
        ({"first_tokens": 4}, [True] * 4 + [False] * 2),
        ({"positions": (0,)}, [True] + [False] * 5),
        ({"positions": (1, 4)}, [False, True, False, False, True, False]),
        ({"positions": (9,)}, [False] * 6),
    ],
)
def test_when_a_constraint_acts(limits: Any, acts: list[bool]) -> None:
    for one in (ActionMask((1,), **limits), TemperatureScale(2.0, **limits), Push((), **limits)):
        assert [one.acts_on(index) for index in range(6)] == acts


@pytest.mark.parametrize(
    ("schedule", "max_new_tokens", "temperatures"),
    [
        (2, 3, [2.0] * 5),
        ([1.0, 3.0, 0.5], 9, [1.0, 3.0, 0.5, 0.5, 0.5]),
        ([4.0], 9, [4.0, 4.0]),
        (LinearSchedule(2.0, 1.0, steps=5), 100, [2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0]),
        (LinearSchedule(1.0, 2.0, steps=2), 1, [1.0, 2.0, 2.0]),
        (LinearSchedule(2.0, 1.0), 5, [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]),
        (LinearSchedule(2.0, 1.0), 3, [2.0, 1.5, 1.0]),
        (LinearSchedule(2.0, 1.0), 1, [2.0, 2.0]),
        (ExponentialSchedule(8.0, 0.5, steps=5), 100, [8.0, 4.0, 2.0, 1.0, 0.5, 0.5]),
        (ExponentialSchedule(0.25, 1.0), 3, [0.25, 0.5, 1.0, 1.0]),
        (ExponentialSchedule(0.25, 1.0), 1, [0.25]),
    ],
)
def test_a_schedule_at_every_token(schedule: Any, max_new_tokens: int, temperatures: list[float]) -> None:
    scale = TemperatureScale(schedule)
    found = [scale.at(index, max_new_tokens) for index in range(len(temperatures))]
    assert found == temperatures
    logits_V = torch.tensor([1.0, -2.0, -INF])
    for index, temperature in enumerate(temperatures):
        expected_V = torch.tensor([1 / temperature, -2 / temperature, -INF])
        torch.testing.assert_close(scale.apply(logits_V, step_at(index, max_new_tokens)), expected_V)


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.none() | st.integers(2, 50), st.integers(1, 60))
def test_every_temperature_of_a_schedule_is_one(start: float, end: float, steps: int | None, limit: int) -> None:
    low, high = sorted((start, end))
    for schedule in (LinearSchedule(start, end, steps), ExponentialSchedule(start, end, steps)):
        scale = TemperatureScale(schedule)
        for index in (0, 1, limit - 1, limit, 100):
            assert low * (1 - 1e-9) <= scale.at(index, limit) <= high * (1 + 1e-9)
        assert scale.at(0, limit) == start


def test_masks_take_tokens_away() -> None:
    logits_V = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert ActionMask((1, 3)).allowed(4).tolist() == [False, True, False, True]
    assert DisallowedTokens((1, 3)).allowed(4).tolist() == [True, False, True, False]
    assert DisallowedTokens(()).allowed(4).tolist() == [True] * 4
    assert ActionMask((1, 3)).apply(logits_V, step_at(0)).tolist() == [-INF, 2.0, -INF, 4.0]
    assert DisallowedTokens((1, 3)).apply(logits_V, step_at(0)).tolist() == [1.0, -INF, 3.0, -INF]
    assert logits_V.tolist() == [1.0, 2.0, 3.0, 4.0]


# --- as text ----------------------------------------------------------------------------------------------------------

limits = st.just({}) | st.integers(1, 9).map(lambda n: {"first_tokens": n}) | st.lists(
    st.integers(0, 99), min_size=1
).map(lambda places: {"positions": tuple(places)})  # fmt: skip
ids = st.lists(st.integers(0, 40) | st.integers(0, 200_000), min_size=1, unique=True)
temperatures = st.floats(0.01, 100)
schedules = (
    temperatures
    | st.lists(temperatures, min_size=1, max_size=5)
    | st.builds(LinearSchedule, temperatures, temperatures, st.none() | st.integers(2, 99))
    | st.builds(ExponentialSchedule, temperatures, temperatures, st.none() | st.integers(2, 99))
)
finite = st.floats(allow_nan=False, allow_infinity=False)
anyone = st.one_of(
    st.builds(lambda given, more: ActionMask(given, **more), ids, limits),
    st.builds(lambda given, more: DisallowedTokens(given, **more), ids | st.just([]), limits),
    st.builds(lambda given, more: TemperatureScale(given, **more), schedules, limits),
    st.builds(
        lambda amounts, ids, word, strict, limit, table, more: Push(amounts, ids, word, strict, limit, table, **more),
        st.lists(finite, max_size=3).map(tuple),
        st.lists(st.lists(st.integers(), max_size=2).map(tuple), max_size=2).map(tuple),
        st.text(max_size=9),
        st.booleans(),
        st.none() | st.integers(),
        st.none() | st.dictionaries(st.text(max_size=3), finite, max_size=2),
        limits,
    ),
)


@given(one=anyone)
def test_what_is_written_is_read(one: LogitConstraint) -> None:
    text = one.to_str()
    assert LogitConstraint.from_str(text) == one
    assert text.startswith(f"{one.name}:{{")


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (ActionMask((9, 3, 4, 5, 7)), 'action_mask:{"valid_token_ids":"3-5,7,9"}'),
        (ActionMask((0, 1), first_tokens=2), 'action_mask:{"first_tokens":2,"valid_token_ids":"0-1"}'),
        (DisallowedTokens(()), 'disallowed_tokens:{"ids":""}'),
        (DisallowedTokens((8,), positions=(2, 0)), 'disallowed_tokens:{"positions":[0,2],"ids":"8"}'),
        (TemperatureScale(2), 'temperature_scale:{"schedule":2.0}'),
        (TemperatureScale((2, 1)), 'temperature_scale:{"schedule":[2.0,1.0]}'),
        (TemperatureScale(LinearSchedule(2, 1)), 'temperature_scale:{"schedule":{"linear":[2.0,1.0,null]}}'),
        (
            TemperatureScale(ExponentialSchedule(2, 1, 4)),
            'temperature_scale:{"schedule":{"exponential":[2.0,1.0,4]}}',
        ),
    ],
)
def test_how_they_are_written(one: LogitConstraint, text: str) -> None:
    assert one.to_str() == text
    assert LogitConstraint.from_str(text) == one


def test_a_whole_vocabulary_is_a_short_text() -> None:
    one = DisallowedTokens(range(1, 150_000))
    assert one.to_str() == 'disallowed_tokens:{"ids":"1-149999"}'
    assert LogitConstraint.from_str(one.to_str()) == one


@given(seed=st.integers(0, 99), size=st.integers(100, 3000), share=st.floats(0.01, 0.99))
@example(seed=0, size=2762, share=0.96875)  # few runs, of two long numbers each
def test_a_dense_mask_is_written_in_the_shorter_way(seed: int, size: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask_V = torch.rand(size, generator=generator) < share
    mask_V[size // 2] = True
    one = ActionMask.from_mask(mask_V)
    text = one.to_str()
    assert LogitConstraint.from_str(text) == one
    assert len(text) < min(size // 4 + 150, 6 * len(one.valid_token_ids) + 150)


def test_how_bits_are_written() -> None:
    """The lowest bit of the first byte is token 0."""
    assert LogitConstraint.from_str(MASK + '{"valid_token_ids":"base64:BQE="}') == ActionMask((0, 2, 8))
    odd = ActionMask(range(1, 161, 2))
    assert odd.to_str() == f'{MASK}{{"valid_token_ids":"base64:{base64.b64encode(bytes([0xAA] * 20)).decode()}"}}'
    assert LogitConstraint.from_str(DENY + '{"ids":"base64:"}') == DisallowedTokens(())


@pytest.mark.parametrize(
    "amounts", [(math.nan,), (INF,), (torch.tensor(1.0),), (SimpleNamespace(),)], ids=lambda value: str(value)
)
def test_what_json_cannot_carry(amounts: Any) -> None:
    with pytest.raises(InputTypeError, match=r"Push\(.* cannot travel as JSON \(.*\); use numbers, strings and lists"):
        Push(amounts).to_str()


@pytest.mark.parametrize("name", ["nobody", "", "ActionMask", " action_mask"])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(
        UnknownOptionError,
        match=rf"no constraint has the name '{name}'; known: action_mask, .*disallowed_tokens, .*temperature_scale.* "
        "Import the module that defines it",
    ):
        LogitConstraint.from_str(f'{name}:{{"a":1}}')


MASK, DENY, SCALE = "action_mask:", "disallowed_tokens:", "temperature_scale:"


@pytest.mark.parametrize(
    "text",
    [
        "", "action_mask", MASK, MASK + "{", MASK + "[]", MASK + "null", MASK + "7", MASK + "{}", MASK + "[" * 100_000,
        *(MASK + f'{{"valid_token_ids":{value}}}' for value in (
            "null", "7", "[3]", '""', '"a"', '"3-"', '"-3"', '"3--5"', '"5-3"', '"3,"', '",3"', '"3;4"', '"1-2-3"',
            '"3.0"', '"' + "9" * 5000 + '"', '"1,5-3"')),
        *(DENY + f'{{"ids":{value}}}' for value in ('"base64:A"', '"base64:%%%%"', '"base64"', '"base64:BQE=,3"',
            '"5-3"', '","', "null", "{}")),
        MASK + '{"valid_token_ids":"3","first_tokens":0}', MASK + '{"valid_token_ids":"3","first_tokens":"1"}',
        MASK + '{"valid_token_ids":"3","positions":[]}', MASK + '{"valid_token_ids":"3","positions":5}',
        MASK + '{"valid_token_ids":"3","positions":[[1]]}', MASK + '{"valid_token_ids":"3","other":1}',
        *(SCALE + f'{{"schedule":{value}}}' for value in (
            "null", '"1"', "NaN", "Infinity", "0", "[]", "[[1]]", "{}", '{"linear":[]}', '{"linear":[1]}',
            '{"linear":[1,2,3,4]}', '{"linear":1}', '{"cubic":[1,2,3]}', '{"linear":[1,2],"exponential":[1,2]}',
            '{"linear":[1,2,1]}', '{"linear":[1,2,2.0]}', '{"linear":["a",2]}')),
        'test_push:{}', 'test_push:{"amounts":[1],"more":2}',
    ],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_text_that_cannot_be_read(text: str) -> None:
    with pytest.raises(InputError):
        LogitConstraint.from_str(text)


@given(name=st.sampled_from(["action_mask", "disallowed_tokens", "temperature_scale", "test_push"]), data=st.data())
def test_no_text_raises_anything_else(name: str, data: st.DataObject) -> None:
    """The text comes from the network."""
    fields = ["valid_token_ids", "ids", "schedule", "first_tokens", "positions", "amounts"]
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("3-7"),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["linear", "a"]), inner, max_size=2)
        ),
        max_leaves=4,
    )
    text = json.dumps(data.draw(st.dictionaries(st.sampled_from(fields), value, max_size=3) | value))
    try:
        found = LogitConstraint.from_str(f"{name}:{text}")
    except InputError:
        return
    assert found.name == name


@pytest.mark.parametrize("runs", ["0-1048576", "0-99999999999999", "0-2097151,0-2097152", "7,0-1048575"])
def test_a_few_letters_do_not_fill_the_memory(runs: str) -> None:
    assert MAX_IDS == 2**20
    with pytest.raises(InputError, match=rf"'{runs}': more than {MAX_IDS} token ids"):
        LogitConstraint.from_str(f'{DENY}{{"ids":"{runs}"}}')


def test_many_bits_are_not_decoded() -> None:
    """The longest text that is read is of bits for all ids; a longer one is refused unread."""
    most = (MAX_IDS // 6 - len("base64:")) // 4 * 4
    assert LogitConstraint.from_str(f'{DENY}{{"ids":"base64:{"A" * most}"}}') == DisallowedTokens(())
    for letter in "A%":
        with pytest.raises(InputError, match=rf"'base64:{letter}+: more than {MAX_IDS} token ids"):
            LogitConstraint.from_str(f'{DENY}{{"ids":"base64:{letter * (most + 4)}"}}')


# --- a user's own -----------------------------------------------------------------------------------------------------


def test_a_constraint_without_a_name() -> None:
    @dataclass(frozen=True)
    class Nameless(LogitConstraint):
        def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
            return logits_V

    with pytest.raises(InputTypeError, match=r"Nameless has no name; define it as class Nameless\(LogitConstraint, n"):
        Nameless()
    assert "Nameless" not in known_constraints()


def test_a_constraint_does_not_go_by_another_ones_name() -> None:
    """The server would build the other constraint."""

    @dataclass(frozen=True)
    class Warmer(TemperatureScale):
        def at(self, index: int, max_new_tokens: int) -> float:
            return 2 * super().at(index, max_new_tokens)

    with pytest.raises(InputTypeError, match=r"Warmer has no name; define it as class Warmer\(TemperatureScale, name="):
        Warmer(1.0)


@pytest.mark.parametrize("name", ["", "no repeat", "no-repeat", "1st", "a:b"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(InputError, match=rf"Odd: name='{name}' is no identifier; give letters"):

        class Odd(LogitConstraint, name=name):
            pass


def test_a_name_that_is_taken() -> None:
    with pytest.raises(InputError, match=r"Other: name='action_mask' is that of .*constraints\.masks\.ActionMask"):

        class Other(LogitConstraint, name="action_mask"):
            pass

    assert LogitConstraint.from_str(ActionMask((1,)).to_str()) == ActionMask((1,))


def test_a_notebooks_cell_runs_again() -> None:
    def cell(amount: int) -> Any:
        @dataclass(frozen=True)
        class Mine(LogitConstraint, name="test_mine"):
            by: int = amount

            def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
                return logits_V

        return Mine

    first, second = cell(1), cell(2)
    assert "test_mine" in known_constraints()
    assert type(LogitConstraint.from_str("test_mine:{}")) is second
    assert (first().by, second().by) == (1, 2)


def test_a_constraint_must_say_what_it_does() -> None:
    class Idle(LogitConstraint, name="test_idle"):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Idle()  # type: ignore[abstract]


def test_the_names_that_are_known() -> None:
    assert known_constraints() == tuple(sorted(known_constraints()))
    assert {"action_mask", "disallowed_tokens", "temperature_scale", "test_push"} <= set(known_constraints())


# --- against the model, and one another -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "error", "words"),
    [
        (ActionMask((1, 10)), TokenIdError, r"ActionMask: id 10 is outside the vocabulary of 10; ids are 0\.\.9\. Was"),
        (DisallowedTokens((10,)), TokenIdError, r"DisallowedTokens: id 10 is outside"),
        (DisallowedTokens(range(10)), ConstraintError, r"DisallowedTokens: all 10 tokens .* are denied; leave some"),
    ],
)
def test_ids_that_the_model_does_not_have(one: LogitConstraint, error: type[SGLangHiddenError], words: str) -> None:
    with pytest.raises(error, match=words):
        check_constraints([TemperatureScale(1.0), one], 10, 5)


@pytest.mark.parametrize("one", [ActionMask(range(10)), DisallowedTokens(()), DisallowedTokens(range(9))])
def test_ids_at_the_limits(one: LogitConstraint) -> None:
    check_constraints([one], 10, 5)


ALLOW, OTHERS = (3, 5), (0, 1, 2, 4, 6, 7, 8, 9)


@pytest.mark.parametrize(
    ("masks", "place"),
    [
        ([ActionMask(ALLOW), DisallowedTokens(ALLOW)], 0),
        ([DisallowedTokens((3,)), ActionMask(ALLOW), DisallowedTokens((5,))], 0),
        ([ActionMask(ALLOW), ActionMask(OTHERS)], 0),
        ([DisallowedTokens(ALLOW), DisallowedTokens(OTHERS)], 0),
        ([ActionMask(ALLOW, positions=(3,)), DisallowedTokens(ALLOW)], 3),
        ([ActionMask(ALLOW, positions=(0, 4)), DisallowedTokens(ALLOW, positions=(2, 4))], 4),
        ([ActionMask(ALLOW, positions=(2,)), DisallowedTokens(ALLOW, first_tokens=3)], 2),
        ([ActionMask((3,), first_tokens=2), ActionMask(ALLOW), DisallowedTokens((3,), positions=(1,))], 1),
        ([DisallowedTokens((1,), first_tokens=3), ActionMask(ALLOW, positions=(5,)), ActionMask(OTHERS)], 5),
    ],
)
def test_masks_that_leave_nothing_somewhere(masks: list[LogitConstraint], place: int) -> None:
    words = rf"together leave 0 of 10 tokens for token {place} of the response; allow one that is not denied"
    with pytest.raises(ConstraintError, match=words):
        check_constraints(masks, 10, place + 1)
    if place:
        check_constraints(masks, 10, place)  # the response ends before it


@pytest.mark.parametrize(
    "masks",
    [
        [ActionMask(ALLOW), DisallowedTokens((3,))],
        [ActionMask(ALLOW, positions=(0, 2)), DisallowedTokens(ALLOW, positions=(1, 3))],
        [ActionMask(ALLOW, first_tokens=2), DisallowedTokens(ALLOW, positions=(2,))],
        [ActionMask(ALLOW), TemperatureScale(2.0), Push((1.0,))],
        [],
    ],
)
def test_masks_that_leave_something_everywhere(masks: list[LogitConstraint]) -> None:
    check_constraints(masks, 10, 8)


def test_a_response_of_no_tokens_has_its_first_checked() -> None:
    """SGLang draws at least one token."""
    with pytest.raises(ConstraintError, match="for token 0"):
        check_constraints([ActionMask(ALLOW), DisallowedTokens(ALLOW)], 10, 0)


@given(data=st.data())
def test_what_is_refused_is_what_leaves_nothing(data: st.DataObject) -> None:
    """Compared with a check of every token of the response, one by one."""
    some = st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)
    limit = st.just({}) | st.integers(1, 5).map(lambda n: {"first_tokens": n}) | st.sets(
        st.integers(0, 5), min_size=1, max_size=3
    ).map(lambda places: {"positions": tuple(places)})  # fmt: skip
    make = st.builds(
        lambda kind, ids, more: kind(ids, **more), st.sampled_from([ActionMask, DisallowedTokens]), some, limit
    )
    masks = data.draw(st.lists(make, max_size=4))
    num_tokens = data.draw(st.integers(1, 6))
    left = [torch.ones(5, dtype=torch.bool) for _ in range(num_tokens)]
    for mask in masks:
        for index in range(num_tokens):
            if mask.acts_on(index):
                left[index] &= mask.allowed(5)
    dead = [index for index in range(num_tokens) if not left[index].any()]
    if dead:
        with pytest.raises(ConstraintError, match=rf"token {dead[0]} of the response"):
            check_constraints(masks, 5, num_tokens)
    else:
        check_constraints(masks, 5, num_tokens)


def test_a_users_mask_is_not_written_to() -> None:
    check_constraints([Kept(), DisallowedTokens((0,))], 4, 3)
    assert KEPT.tolist() == [True, True, True, False]
    with pytest.raises(ConstraintError, match="Kept and ActionMask together leave 0 of 4 tokens"):
        check_constraints([Kept(), ActionMask((3,))], 4, 3)
