"""What is done to logits: which columns are selected, the order of constraints, and rows with no token left."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from helpers.logits_cases import (
    ASKED,
    INF,
    Add,
    Ask,
    BadMask,
    BadMaskWhen,
    BadTemperature,
    BadWhen,
    Doubling,
    Even,
    Fail,
    Give,
    OnHost,
    Soft,
    Times,
    V,
    Warm,
    numbers,
    one_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sglang_hidden.reduce.columns import select_columns
from torchrl_sglang_hidden.reduce.constraining import constrain
from torchrl_sglang_hidden.reduce.device import on_device
from torchrl_sglang_hidden.reduce.token_logits import NextToken, RequestLogits
from torchrl_sglang_hidden.spec.constraints import (
    ActionMask,
    DisallowedTokens,
    LinearSchedule,
    LogitConstraint,
    TemperatureScale,
)
from torchrl_sglang_hidden.spec.logits import LogitsSpec


def at(one: RequestLogits, index: int, limit: int = 8, ids: Iterable[int] | None = None) -> NextToken:
    given_ids = list(range(index)) if ids is None else list(ids)
    return NextToken(one, index, limit, lambda: torch.tensor(given_ids, dtype=torch.int64))


def fault_of(one: RequestLogits, last: int) -> str:
    """Return the fault of the response up to token ``last``."""
    for index in range(last + 1):
        one.add_response(index, None)
    return one.finish().fault


def changed(logits_V: Sequence[float], *constraints: LogitConstraint, index: int = 0) -> list[float]:
    one = one_of(*constraints)
    found_1V, choosable_1 = constrain(torch.tensor([logits_V]), [at(one, index)])
    assert (choosable_1.tolist(), fault_of(one, index)) == ([True], "")
    return list(found_1V[0].tolist())


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_columns_that_are_asked_for(source: torch.dtype, dtype: torch.dtype) -> None:
    logits_NV = torch.tensor([[0.0, 3.0, -INF, 1.0], [4.0, 1.0, 2.0, 3.0]], dtype=source)
    top = select_columns(logits_NV, LogitsSpec(top_k=3, dtype=dtype))
    assert top.values_NC.tolist() == [[3.0, 1.0, 0.0], [4.0, 3.0, 2.0]]
    assert top.token_ids_NC.tolist() == [[1, 3, 0], [0, 3, 2]]
    assert top.token_ids_NC.dtype == torch.int64
    some = select_columns(logits_NV, LogitsSpec(token_ids=(3, 0), dtype=dtype))
    assert (some.values_NC.tolist(), some.token_ids_NC) == ([[1.0, 0.0], [3.0, 4.0]], None)
    full = select_columns(logits_NV, LogitsSpec(full=True, dtype=dtype))
    assert (full.values_NC.tolist(), full.token_ids_NC) == (logits_NV.tolist(), None)
    assert {top.values_NC.dtype, some.values_NC.dtype, full.values_NC.dtype} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [{"top_k": 4}, {"token_ids": (0, 1, 2, 3)}, {"full": True}])
def test_columns_are_copies(asked: Any, dtype: torch.dtype) -> None:
    """The logits are a buffer that the next step overwrites."""
    logits_NV = numbers(3, 4).to(dtype)
    found = select_columns(logits_NV, LogitsSpec(**asked, dtype=dtype))
    before_NC = found.values_NC.clone()
    logits_NV.fill_(9.0)
    assert torch.equal(found.values_NC, before_NC)
    assert not (before_NC == 9.0).any()


def test_the_same_columns_in_another_order() -> None:
    """Column ids are cached."""
    logits_NV = numbers(1, 4)
    for ids in ((0, 1), (1, 0), (0, 1)):
        assert torch.equal(select_columns(logits_NV, LogitsSpec(token_ids=ids)).values_NC, logits_NV[:, list(ids)])


# --- constraints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_own_then_temperatures_then_masks(order: tuple[int, ...]) -> None:
    """The order in which they are given does not matter, except among the user's own constraints."""
    given_ones = [Add(2.0), TemperatureScale(4.0), DisallowedTokens((0,)), Times(10.0)]
    found = changed([1.0, 2.0, -4.0], *(given_ones[i] for i in order))
    if order.index(0) < order.index(3):
        assert found == [-INF, (2 + 2) * 10 / 4, (-4 + 2) * 10 / 4]
    else:
        assert found == [-INF, (2 * 10 + 2) / 4, (-4 * 10 + 2) / 4]


def test_nothing_gives_back_what_a_mask_took() -> None:
    assert changed([1.0, 2.0, 3.0], ActionMask((1,)), Give(torch.tensor([7.0, 8.0, 9.0]))) == [-INF, 8.0, -INF]


def test_temperatures_multiply_and_masks_are_all_kept() -> None:
    constraints = [TemperatureScale(2.0), TemperatureScale([4.0, 8.0])]
    assert changed([8.0, -16.0], *constraints) == [1.0, -2.0]
    assert changed([16.0, -32.0], *constraints, index=1) == [1.0, -2.0]
    masks = [ActionMask((0, 1, 2)), DisallowedTokens((0,)), DisallowedTokens((1,), positions=(1,))]
    assert changed([1.0, 2.0, 3.0, 4.0], *masks) == [-INF, 2.0, 3.0, -INF]
    assert changed([1.0, 2.0, 3.0, 4.0], *masks, index=1) == [-INF, -INF, 3.0, -INF]


def test_what_a_subclass_does_itself_is_done() -> None:
    """A subclass that overrides `apply` is called, before all masks and temperatures."""
    assert changed([1.0, 2.0, 3.0], Soft((1,))) == [-7.0, 2.0, -5.0]
    assert changed([1.0, 2.0, 3.0], TemperatureScale(0.5), DisallowedTokens((0,)), Soft((1,))) == [-INF, 4.0, -10.0]
    assert changed([8.0, 4.0], ActionMask((0,)), Warm(4.0), index=3) == [5.0, -INF]
    assert one_of(Soft((1,))).reads_response is one_of(Warm(2.0)).reads_response is True


def test_a_subclass_without_an_apply_of_its_own_is_of_its_kind() -> None:
    assert changed([1.0, 2.0, 3.0], Even(), Give(torch.tensor([7.0, 8.0, 9.0]))) == [7.0, -INF, 9.0]
    assert changed([8.0, 4.0], Doubling(1.0), Add(8.0), index=2) == [4.0, 3.0]
    assert one_of(Even(), Doubling(1.0)).reads_response is False


def test_each_acts_on_its_own_tokens_only() -> None:
    constraints = [Add(1.0, first_tokens=1), TemperatureScale(2.0, positions=(1,)), ActionMask((0,), positions=(2,))]
    one = one_of(*constraints)
    logits_NV = torch.tensor([[4.0, 6.0]] * 4)
    found_NV, choosable_N = constrain(logits_NV, [at(one, index) for index in range(4)])
    assert found_NV.tolist() == [[5.0, 7.0], [2.0, 3.0], [4.0, -INF], [4.0, 6.0]]
    assert choosable_N.tolist() == [True] * 4


def test_each_row_is_of_its_own_request() -> None:
    """A row that no constraint acts on is unchanged, bit for bit."""
    logits_NV = torch.tensor([[0.1, -0.0, 3.3, -INF]] * 6)
    ones = [
        one_of(Add(1.0)),
        one_of(TemperatureScale(3.0)),
        one_of(ActionMask((0,))),
        one_of(Times(2.0, positions=(9,)), TemperatureScale(3.0, positions=(9,)), ActionMask((0,), positions=(9,))),
        one_of(),
        one_of(TemperatureScale(LinearSchedule(4.0, 2.0))),
    ]
    before_NV = logits_NV.clone()
    found_NV, choosable_N = constrain(logits_NV, [at(one, 2, limit=3) for one in ones])
    assert torch.equal(logits_NV.view(torch.int32), before_NV.view(torch.int32))
    base_V = logits_NV[0]
    expected = [base_V + 1, base_V / 3, torch.tensor([0.1, -INF, -INF, -INF]), base_V, base_V, base_V / 2]
    assert torch.equal(found_NV, torch.stack(expected))
    assert torch.equal(found_NV[3:5].view(torch.int32), before_NV[3:5].view(torch.int32)), "-0.0 too"
    assert choosable_N.all()


@settings(max_examples=30)
@given(data=st.data())
def test_rows_together_are_as_rows_alone(data: st.DataObject) -> None:
    some = st.lists(st.integers(0, V - 1), min_size=1, max_size=V, unique=True)
    make = st.one_of(
        st.builds(Add, st.floats(-3, 3)),
        st.builds(TemperatureScale, st.floats(0.1, 10)),
        st.builds(ActionMask, some),
        st.builds(DisallowedTokens, some),
        st.builds(lambda ids: ActionMask(ids, positions=(1,)), some),
    )
    rows = data.draw(st.lists(st.lists(make, max_size=3), min_size=1, max_size=4))
    logits_NV, steps = numbers(len(rows), V), [data.draw(st.integers(0, 2)) for _ in rows]
    found_NV, choosable_N = constrain(logits_NV, [at(one_of(*row), i) for row, i in zip(rows, steps, strict=True)])
    for place, (row, index) in enumerate(zip(rows, steps, strict=True)):
        alone_1V, choosable_1 = constrain(logits_NV[place : place + 1], [at(one_of(*row), index)])
        assert torch.equal(found_NV[place], alone_1V[0])
        assert choosable_N[place] == choosable_1[0]


@pytest.mark.parametrize(
    "constraint",
    [
        Give(torch.full((3,), -INF)),
        Give(torch.full((3,), math.nan)),
        Give(torch.tensor([1.0, math.nan, 2.0])),
        Give(torch.tensor([1.0, INF, 2.0])),
        Add(INF),
        Times(math.nan),
        ActionMask((2,)),  # its only token has no logit any more
    ],
)
def test_a_row_where_nothing_can_be_chosen_is_as_it_was(constraint: LogitConstraint) -> None:
    """A probability of nothing would end the scheduler. Other rows are changed as they should be."""
    logits_NV = torch.tensor([[1.0, 2.0, -INF], [1.0, 2.0, -INF]])
    bad, good = one_of(constraint, TemperatureScale(2.0)), one_of(TemperatureScale(2.0), DisallowedTokens((0,)))
    found_NV, choosable_N = constrain(logits_NV, [at(bad, 0), at(good, 0)])
    assert found_NV.tolist() == [[1.0, 2.0, -INF], [-INF, 1.0, -INF]]
    assert choosable_N.tolist() == [False, True]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Fail(), r"logits_fail failed at token 4 of the response: KeyError('no such key')"),
        (
            Give(None),
            "logits_give failed at token 4 of the response: TypeError('expected logits of shape (3,), got None",
        ),
        (Give(torch.zeros(2)), "expected logits of shape (3,), got (2,)"),
        (Give(torch.zeros(3, device="meta")), "expected logits on cpu, as they were given, got them on meta"),
        (Give(torch.ones(3, dtype=torch.bool)), "expected logits of a float dtype, got torch.bool"),
        (Give([1.0, 2.0, 3.0]), "shape (3,), got [1.0, 2.0, 3.0]"),
        (BadMask(), "logits_bad_mask failed at token 4 of the response: IndexError('out of range')"),
        (BadWhen(1.0), "logits_bad_when failed at token 4 of the response: ZeroDivisionError('never')"),
        (BadMaskWhen((1,)), "logits_bad_mask_when failed at token 4 of the response: ZeroDivisionError('never')"),
        (BadTemperature(1.0), "logits_bad_temperature failed at token 4 of the response: OverflowError('too hot')"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_constraint_that_fails_is_a_fault_of_its_request(bad: LogitConstraint, words: str) -> None:
    """It is anybody's code inside the scheduler. What the others did stays, and other rows are not touched."""
    one, other = one_of(Add(2.0), bad, DisallowedTokens((0,))), one_of(TemperatureScale(2.0))
    logits_NV = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    found_NV, choosable_N = constrain(logits_NV, [at(one, 4), at(other, 4)])
    assert words in fault_of(one, 4)
    assert (fault_of(other, 4), choosable_N.tolist()) == ("", [True, True])
    assert found_NV.tolist() == [[-INF, 4.0, 5.0], [0.5, 1.0, 1.5]]
    assert logits_NV.tolist() == [[1.0, 2.0, 3.0]] * 2


def test_the_first_fault_is_kept() -> None:
    one = one_of(Fail())
    for index in (2, 5):
        constrain(torch.zeros(1, 3), [at(one, index)])
    one.fail("another", None)
    assert "at token 2" in fault_of(one, 5)


def test_the_fault_of_a_token_that_was_thrown_away_is_nobodys() -> None:
    """Under overlap scheduling one token more is chosen than the response has; what it failed at is never seen."""
    one = one_of(Fail(positions=(3,)), BadMask(positions=(4,)))
    for index in range(5):
        constrain(torch.zeros(1, 3), [at(one, index)])
    assert [fault_of(one, last)[:27] for last in (1, 2, 3, 4)] == ["", "", *["logits_fail failed at token"] * 2]


def test_what_fails_inside_a_given_sequence_counts() -> None:
    """None of a scored sequence's tokens are sampled, but all of them are part of the answer."""
    for bad in (Fail(positions=(1,)), BadMask(positions=(1,)), BadWhen(1.0), BadTemperature(1.0)):
        one = one_of(bad, prompt_ids=(4, 5, 6, 7))
        constrain(torch.zeros(1, 3), [NextToken(one, 1, 2, lambda: torch.tensor([6]), response_start=2)])
        found = one.finish()
        assert (found.constrained, f"{bad.name} failed at token 1" in found.fault) == (0, True)


def test_logits_of_another_dtype_are_as_they_were() -> None:
    """A user may compute in float64."""
    one = one_of(Give(torch.tensor([1, 2, 3])), Times(0.5))
    found_NV, _ = constrain(torch.zeros(1, 3), [at(one, 0)])
    assert (found_NV.dtype, found_NV.tolist()) == (torch.float32, [[0.5, 1.0, 1.5]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_temperature_keeps_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    found_NV, _ = constrain(torch.ones(1, 3, dtype=dtype), [at(one_of(TemperatureScale(2.0)), 0)])
    assert (found_NV.dtype, found_NV.tolist()) == (dtype, [[0.5] * 3])


def test_columns_that_no_case_handles_are_not_taken_for_others() -> None:
    """As after a fourth selection is added to `LogitsSpec` alone."""
    spec = LogitsSpec(top_k=1)
    object.__setattr__(spec, "top_k", None)
    with pytest.raises(NotImplementedError, match="add a case to columns_of"):
        select_columns(torch.zeros(1, 3), spec)
    with pytest.raises(NotImplementedError, match="add a case to num_columns"):
        spec.num_columns(3)


@pytest.mark.parametrize("values", [[3, 0, 7], [0.5, 2.0], []])
def test_numbers_on_a_device_are_those_numbers(values: list[Any]) -> None:
    found = on_device(values, torch.device("cpu"))
    assert (found.tolist(), found.dtype) == (values, torch.tensor(values).dtype)


def test_where_a_constraint_is_asked() -> None:
    ASKED.clear()
    one = one_of(Ask(positions=(0, 2)), prompt_ids=(4, 5))
    for index in range(3):
        constrain(torch.zeros(1, 3), [at(one, index, limit=7, ids=[8, 9][:index])])
    found = [(step.index, step.max_new_tokens, list(step.prompt_ids), step.response_ids.tolist()) for step in ASKED]
    assert found == [(0, 7, [4, 5], []), (2, 7, [4, 5], [8, 9])]
    assert all(step.response_ids.dtype == torch.int64 for step in ASKED)


def test_inside_a_given_sequence_the_prompt_ends_where_the_response_starts() -> None:
    """What is scored is what was sampled: then nothing of the response stood in the prompt."""
    ASKED.clear()
    one = one_of(Ask(), prompt_ids=(4, 5, 6, 7))
    before = torch.tensor([6])
    constrain(torch.zeros(1, 3), [NextToken(one, 1, 2, lambda: before, response_start=2)])
    assert (list(ASKED[0].prompt_ids), ASKED[0].response_ids.tolist()) == ([4, 5], [6])


def test_a_constraint_on_the_host_gets_copies_and_gives_them_back() -> None:
    """An operation that fails on an accelerator's own side would end the server; on the host it fails here."""
    ASKED.clear()
    ids = torch.tensor([8, 9])
    one = one_of(OnHost(1), Add(1.0))
    found_NV, _ = constrain(torch.zeros(1, 3, dtype=torch.bfloat16), [NextToken(one, 2, 8, lambda: ids)])
    assert (found_NV.dtype, found_NV.tolist()) == (torch.bfloat16, [[1.0, 6.0, 1.0]])
    (step,) = ASKED
    assert (step.response_ids.device.type, step.response_ids.tolist(), step.index) == ("cpu", [8, 9], 2)
    bad, other = one_of(OnHost(7)), one_of(OnHost(2))
    found_NV, choosable_N = constrain(torch.zeros(2, 3), [at(bad, 0), at(other, 0)])
    assert (found_NV.tolist(), choosable_N.tolist()) == ([[0.0] * 3, [0.0, 0.0, 5.0]], [True, True])
    assert "index 7 is out of bounds" in fault_of(bad, 0)
    assert fault_of(other, 0) == ""


def test_the_prompt_is_not_copied_for_every_token() -> None:
    ASKED.clear()
    one = one_of(Ask(), prompt_ids=(4, 5, 6, 7))
    constrain(
        torch.zeros(4, 3), [NextToken(one, n, 9, lambda: torch.zeros(0), start) for n, start in enumerate([2] * 4)]
    )
    assert len({id(step.prompt_ids) for step in ASKED}) == 1
    constrain(torch.zeros(1, 3), [NextToken(one, 0, 9, lambda: torch.zeros(0), 3)])
    assert list(ASKED[-1].prompt_ids) == [4, 5, 6]


def test_a_mask_of_several_requests_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In later steps none is, and the masks of all rows together are kept as well."""
    built: list[int] = []
    plain = ActionMask.allowed

    def allowed(mask: ActionMask, vocab_size: int) -> torch.Tensor:
        built.append(vocab_size)
        return plain(mask, vocab_size)

    monkeypatch.setattr(ActionMask, "allowed", allowed)
    shared, own = ActionMask((1, 2)), ActionMask((0,))
    ones = [one_of(shared), one_of(own), one_of(shared), one_of()]
    for index in range(3):
        found_NV, _ = constrain(torch.zeros(4, 3), [at(one, index) for one in ones])
        assert found_NV.tolist() == [[-INF, 0, 0], [0, -INF, -INF], [-INF, 0, 0], [0, 0, 0]]
    constrain(torch.zeros(1, 3), [at(one_of(shared), 0)])
    assert built == [3, 3]
    constrain(torch.zeros(1, 4), [at(one_of(shared), 0)])
    assert built == [3, 3, 4]


def test_a_mask_that_fails_fails_for_each_of_its_requests() -> None:
    mask = ActionMask((5,))
    ones = [one_of(mask), one_of(mask)]
    for index in range(2):
        constrain(torch.zeros(2, 3), [at(one, index) for one in ones])
    assert ["IndexError" in fault_of(one, 1) for one in ones] == [True, True]


def test_the_ids_before_are_not_made_for_nobody() -> None:
    """They may wait for the accelerator."""

    def never() -> torch.Tensor:
        raise AssertionError("asked for")

    one = one_of(TemperatureScale(2.0), ActionMask((1,)), Add(1.0, positions=(3,)))
    constrain(torch.zeros(1, 3), [NextToken(one, 1, 8, never)])
    assert one.reads_response
    assert not one_of(TemperatureScale(2.0), ActionMask((1,))).reads_response
