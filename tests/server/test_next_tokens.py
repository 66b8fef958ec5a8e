"""What one step chooses, with made-up batches: whose rows are changed, which columns are kept, and who gets them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchrl_sglang_hidden.reduce.row_store import PAGE_ROWS
from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.reduce.wanted_logits import FoundLogits, WantedLogits
from torchrl_sglang_hidden.server import prompt_logits
from torchrl_sglang_hidden.server.next_tokens import StepLogits
from torchrl_sglang_hidden.server.taken_logits import HostLogits
from torchrl_sglang_hidden.server.token_rows import PromptPart, SamplingRow
from torchrl_sglang_hidden.spec.constraints import (
    ActionMask,
    ConstraintStep,
    DisallowedTokens,
    LinearSchedule,
    LogitConstraint,
    TemperatureScale,
)
from torchrl_sglang_hidden.spec.logits import LogitsSpec

INF = math.inf
V = 5
TOP = LogitsSpec(top_k=2)
PROCESSED = LogitsSpec(full=True, stage="processed")


@dataclass(frozen=True)
class Seen(LogitConstraint, name="choices_seen"):
    """Takes away the ids before, and notes them."""

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        seen.append((step.index, list(step.prompt_ids), step.response_ids.tolist()))
        logits_V[step.response_ids] = -INF
        return logits_V


seen: list[tuple[int, list[int], list[int]]] = []


@dataclass(frozen=True)
class Nothing(LogitConstraint, name="choices_nothing"):
    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        return logits_V - INF


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def asking(spec: LogitsSpec | None = None, *constraints: LogitConstraint, **more: Any) -> RequestLogits:
    ids = more.pop("prompt_ids", (1, 2, 3))
    return RequestLogits(WantedLogits(spec, constraints, **more), ids)


class Batch:
    """A decode step of these requests, None for those that ask nothing."""

    def __init__(self, *ones: RequestLogits | None, index: int = 0, before: Sequence[int] = (), padding: int = 0):
        self.ones = ones
        self.reqs = [object() for _ in ones]
        found = [SamplingRow(row, row, index, one, 9, tuple(before)) for row, one in enumerate(ones) if one is not None]
        self.step = StepLogits(tuple(found), (), tuple(self.reqs), V, len(ones))
        self.index = index
        self.logits_BV = numbers(len(ones), V + padding, seed=index)

    def run(self, temperature: float = 1.0) -> torch.Tensor:
        """As SGLang samples: what the sampler sees."""
        self.step.take_raw(self.logits_BV)
        self.logits_BV += 1  # a penalty
        self.step.constrain(self.logits_BV, torch.full((len(self.ones), 1), temperature))
        return self.logits_BV

    def host(self) -> HostLogits:
        device = self.step.taken()
        host = device.copy_to_host(torch.clone)
        self.logits_BV.fill_(7.0)  # a CUDA graph's buffer
        return host

    def commits(self, *indices: int | None) -> list[Any]:
        found = indices or (self.index,) * len(self.ones)
        return [None if index is None else SimpleNamespace(output_index=index) for index in found]

    def consume(self, *indices: int | None) -> None:
        self.host().consume(SimpleNamespace(reqs=self.reqs), self.commits(*indices))


def found_of(one: RequestLogits) -> FoundLogits:
    return one.finish()


# --- constraints ------------------------------------------------------------------------------------------------------


def test_only_rows_that_asked_are_written_to() -> None:
    batch = Batch(None, asking(None, ActionMask((1, 3))), asking(TOP), asking(None, TemperatureScale(2.0)), None)
    before_BV = batch.logits_BV + 1
    found_BV = batch.run()
    for row in (0, 2, 4):
        assert torch.equal(found_BV[row], before_BV[row])
    assert found_BV[1].tolist() == [-INF, before_BV[1, 1], -INF, before_BV[1, 3], -INF]
    assert torch.equal(found_BV[3], before_BV[3] / 2)


def test_who_asks_for_nothing_writes_nothing() -> None:
    batch = Batch(asking(TOP), None)
    version, expected_BV = batch.logits_BV._version, batch.logits_BV + 1
    assert torch.equal(batch.run(), expected_BV)
    assert batch.logits_BV._version == version + 1, "the penalty alone"


@pytest.mark.parametrize("padding", [0, 3])
def test_the_heads_padding_is_no_token(padding: int) -> None:
    """Columns beyond the vocabulary: nobody's constraint knows of them, and none may be drawn under one."""
    own, raw, stock = asking(LogitsSpec(top_k=V), Seen()), asking(LogitsSpec(full=True)), None
    batch = Batch(own, raw, stock, padding=padding)
    batch.logits_BV[:, V:] = 50.0
    before_BV = batch.logits_BV.clone()
    found_BV = batch.run()
    assert found_BV.shape == (3, V + padding)
    assert found_BV[0, V:].tolist() == [-INF] * padding
    assert torch.equal(found_BV[1:], before_BV[1:] + 1)
    batch.consume()
    assert found_of(own).response.token_ids_NC.max() < V
    assert torch.equal(found_of(raw).response.values_NC[0], before_BV[1, :V])


def test_a_row_where_nothing_is_left_is_a_fault() -> None:
    dead, good = asking(PROCESSED, Nothing()), asking(None, DisallowedTokens((0,)))
    batch = Batch(dead, good, index=3)
    before_BV = batch.logits_BV + 1
    found_BV = batch.run()
    assert torch.equal(found_BV[0], before_BV[0])
    for one in (dead, good):
        for index in range(3):
            one.add_response(index, None)
    batch.consume()
    assert found_of(dead).fault.startswith("token 3 of the response: 0 tokens are left to choose from by the constrai")
    assert "(choices_nothing; one that gives NaN" in found_of(dead).fault
    assert "loosen one of them" in found_of(dead).fault
    assert (found_of(good).fault, found_of(dead).constrained, found_of(good).constrained) == ("", 4, 4)


def test_a_dead_row_that_is_not_committed_is_no_fault() -> None:
    """For example in a step after a request's end."""
    dead = asking(None, Nothing())
    batch = Batch(dead)
    batch.run()
    batch.consume(None)
    assert (found_of(dead).fault, found_of(dead).constrained) == ("", 0)


def test_a_dead_row_behind_the_response_is_no_fault() -> None:
    """Under overlap scheduling a token after the last one is chosen, and thrown away."""
    dead = asking(None, Nothing(positions=(1,)))
    for index in (0, 1):
        batch = Batch(dead, index=index)
        batch.run()
        batch.consume(0)
    assert (found_of(dead).fault, found_of(dead).constrained) == ("", 1)
    batch = Batch(dead, index=1)
    batch.run()
    batch.consume(1)
    assert found_of(dead).fault.startswith("token 1 of the response: 0 tokens are left")


def test_a_sampler_that_none_of_it_went_through_leaves_the_count_short() -> None:
    masked, watched = asking(TOP, ActionMask((1,))), asking(TOP)
    batch = Batch(masked, watched)
    batch.step.take_raw(batch.logits_BV)
    batch.consume()
    assert (found_of(masked).constrained, found_of(masked).response) == (0, None)
    assert found_of(watched).constrained == 1


def test_constraints_of_a_scored_prompt_leave_the_token_behind_it_alone() -> None:
    one = asking(TOP, Nothing(), prompt_from=1, scored=True, response_ranges=((1, 2),))
    batch = Batch(one)
    before_BV = batch.logits_BV + 1
    assert torch.equal(batch.run(), before_BV)
    batch.consume()
    assert (found_of(one).fault, found_of(one).constrained) == ("", 1)


# --- what is cut ------------------------------------------------------------------------------------------------------


def test_raw_is_before_everything_and_processed_behind_the_temperature() -> None:
    raw, processed = asking(LogitsSpec(full=True)), asking(PROCESSED)
    both = asking(PROCESSED, TemperatureScale(4.0), DisallowedTokens((0,)))
    raw_both = asking(LogitsSpec(full=True), DisallowedTokens((0,)))
    batch = Batch(raw, processed, both, raw_both)
    head_BV = batch.logits_BV.clone()
    batch.step.take_raw(batch.logits_BV)
    batch.logits_BV += 1
    temperatures_B1 = torch.tensor([[1.0], [2.0], [0.5], [8.0]])
    batch.step.constrain(batch.logits_BV, temperatures_B1)
    batch.consume()
    assert torch.equal(found_of(raw).response.values_NC, head_BV[:1])
    assert torch.equal(found_of(raw_both).response.values_NC, head_BV[3:])
    assert torch.equal(found_of(processed).response.values_NC, (head_BV[1:2] + 1) / 2)
    expected_V = (head_BV[2] + 1) / 4 / 0.5
    expected_V[0] = -INF
    torch.testing.assert_close(found_of(both).response.values_NC[0], expected_V)


def test_processed_without_a_temperature() -> None:
    """In a batch where all rows are greedy, SGLang divides by no temperature."""
    processed, both = asking(PROCESSED), asking(PROCESSED, TemperatureScale(4.0))
    batch = Batch(processed, both)
    head_BV = batch.logits_BV.clone()
    batch.step.take_raw(batch.logits_BV)
    batch.step.constrain(batch.logits_BV, None)
    batch.consume()
    assert torch.equal(found_of(processed).response.values_NC, head_BV[:1])
    assert torch.equal(found_of(both).response.values_NC, head_BV[1:] / 4)


def test_different_specs_in_one_step() -> None:
    specs = [
        TOP,
        LogitsSpec(top_k=1),
        LogitsSpec(token_ids=(4, 0)),
        TOP,
        LogitsSpec(full=True, dtype=torch.bfloat16),
        LogitsSpec(token_ids=(0, 4)),
        LogitsSpec(top_k=2, stage="processed"),
        LogitsSpec(full=True, segments=("prompt",)),
    ]
    ones = [asking(spec) for spec in specs]
    batch = Batch(*ones)
    head_BV = batch.logits_BV.clone()
    batch.run(temperature=2.0)
    assert [group.batch_rows for group in batch.step._sampled] == [(0, 3), (1,), (2, 5), (4,), (6,)]
    batch.consume()
    for row, (one, spec) in enumerate(zip(ones, specs, strict=True)):
        found, found_V = found_of(one).response, head_BV[row]
        if not spec.of_response:
            assert found is None
        elif spec.top_k is not None:
            values_V = (found_V + 1) / 2 if spec.stage == "processed" else found_V
            values_C, ids_C = values_V.topk(spec.top_k)
            assert torch.equal(found.values_NC[0], values_C)
            assert torch.equal(found.token_ids_NC[0], ids_C)
        else:
            columns = range(V) if spec.token_ids is None else spec.token_ids
            assert torch.equal(found.values_NC[0], found_V[list(columns)].to(spec.dtype))
            assert (found.values_NC.dtype, found.token_ids_NC) == (spec.dtype, None)


def test_a_long_request_does_not_keep_the_rows_of_its_neighbours() -> None:
    """Of those that have ended, the pages are used again; and a step's own buffers are nobody's."""
    long, stores = asking(LogitsSpec(top_k=3)), []
    for index in range(3 * PAGE_ROWS):
        ones = [asking(LogitsSpec(top_k=3)) for _ in range(40)]
        batch = Batch(long, *ones, index=index)
        for one in ones:
            for before in range(index):
                one.accept(before)
        batch.run()
        batch.consume()
        stores.append(long._response._store.num_pages)
    assert stores[-1] <= 2 * stores[0] <= 2 * 41
    assert found_of(long).constrained == 3 * PAGE_ROWS


# --- who gets it ------------------------------------------------------------------------------------------------------


def test_rows_go_to_those_who_committed_their_token() -> None:
    """A request that committed nothing, one that moved in the batch, one that left it, and one of another token."""
    names = ("stays", "no commit", "moved", "other index", "left")
    ones = {name: asking(TOP, TemperatureScale(2.0)) for name in names}
    batch = Batch(*ones.values(), index=2)
    for one in ones.values():
        one.add_response(0, None)
        one.add_response(1, None)
    head_BV = batch.logits_BV.clone()
    batch.run()
    moved = [batch.reqs[0], batch.reqs[1], object(), batch.reqs[3]]
    batch.host().consume(SimpleNamespace(reqs=moved), batch.commits(2, None, 2, 3, 2))
    assert {name: found_of(one).constrained for name, one in ones.items()} == {
        "stays": 3, "no commit": 2, "moved": 2, "other index": 2, "left": 2,
    }  # fmt: skip
    assert torch.equal(found_of(ones["stays"]).response.values_NC[0], head_BV[0].topk(2).values)


def test_a_response_is_every_step_of_it() -> None:
    one, other = asking(TOP), asking(PROCESSED, DisallowedTokens((2,)))
    heads = []
    for index in range(4):
        batch = Batch(None, one, other, index=index)
        heads.append(batch.logits_BV.clone())
        batch.run(temperature=0.5)
        batch.consume()
    assert found_of(one).constrained == found_of(other).constrained == 4
    head_TBV = torch.stack(heads)
    assert torch.equal(found_of(one).response.values_NC, head_TBV[:, 1].topk(2).values)
    expected_TV = (head_TBV[:, 2] + 1) / 0.5
    expected_TV[:, 2] = -INF
    assert torch.equal(found_of(other).response.values_NC, expected_TV)


# --- the ids before ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "before", "input_ids", "ids"),
    [
        (0, (), [9, 9], []),
        (2, (4, 3), [9, 9], [4, 3]),
        (2, (4,), [9, 1], [4, 1]),  # under overlap scheduling: the last one is on the device only
        (1, (), [9, 2], [2]),
        (2, (4, 3, 2), [9, 9], [4, 3]),
        (2, (4, 3), None, [4, 3]),
    ],
)
def test_the_ids_before_a_token(index: int, before: tuple[int, ...], input_ids: Any, ids: list[int]) -> None:
    seen.clear()
    batch = Batch(None, asking(None, Seen()), index=index, before=before)
    if input_ids is not None:
        batch.step.input_ids = torch.tensor(input_ids, dtype=torch.int32)
    found_BV = batch.run()
    assert seen == [(index, [1, 2, 3], ids)]
    assert [i for i in range(V) if found_BV[1, i] == -INF] == sorted(ids)


# --- prompts ----------------------------------------------------------------------------------------------------------


PROMPT = tuple(range(300))
WIDE = 310
PIECE = 128  # rows that the head gets at once
PARTS = [(1, 300)], [(1, 2), (2, 130), (130, 300)], [(1, 129), (129, 257), (257, 300)]


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_logits, "PIECE_BYTES", 4 * WIDE * PIECE)


def given_rows(one: RequestLogits, states_ND: torch.Tensor, parts: Any, padding: int = 4) -> list[int]:
    """Run steps where another request's rows come first; return the sizes of what the head computed."""
    head_DV = numbers(states_ND.shape[1], WIDE + padding, seed=9)
    sizes: list[int] = []

    def head(rows_ND: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows_ND))
        return rows_ND @ head_DV

    for first, stop in parts:
        # Positions first-1 … stop-2, behind seven rows of somebody else.
        step_ND = torch.cat([torch.full((7, states_ND.shape[1]), 1e4), states_ND[first - 1 : stop - 1]])
        given = PromptPart(1, 7 - (first - 1), first, stop, one)
        step = StepLogits((), (given,), (object(), object()), WIDE, len(step_ND))
        step.take_prompts(step_ND.clone(), head)
        host = step.taken().copy_to_host(torch.clone)
        host.consume(SimpleNamespace(reqs=[]), [])
    return sizes


def head_rows(states_ND: torch.Tensor, padding: int = 4) -> torch.Tensor:
    """Return the model's logits for tokens 1 … P-1."""
    return (states_ND @ numbers(states_ND.shape[1], WIDE + padding, seed=9))[: len(PROMPT) - 1, :WIDE]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("scored", [False, True])
def test_rows_of_a_prompt_in_pieces(parts: Any, scored: bool) -> None:
    states_ND = numbers(len(PROMPT), 8)
    spec = LogitsSpec(full=True, segments=("prompt",))
    one = asking(spec, prompt_from=1, scored=scored, prompt_ids=PROMPT)
    sizes = given_rows(one, states_ND, parts)
    assert sizes == [min(PIECE, left) for first, stop in parts for left in range(stop - first, 0, -PIECE)]
    assert sum(sizes) == len(PROMPT) - 1
    expected_NV = head_rows(states_ND)
    found = found_of(one)
    torch.testing.assert_close(found.prompt.values_NC, expected_NV)
    if scored:
        log_probs_N = expected_NV.log_softmax(-1)[torch.arange(len(expected_NV)), torch.tensor(PROMPT[1:])]
        torch.testing.assert_close(found.log_probs_N, log_probs_N)
    else:
        assert found.log_probs_N is None
    assert found.fault == ""


@pytest.mark.parametrize("stage", ["raw", "processed"])
@pytest.mark.parametrize("parts", PARTS)
def test_constraints_act_inside_the_responses_of_a_prompt(stage: Any, parts: Any) -> None:
    """Each with a count of its own, over the ends of pieces and steps; outside of them the rows are the model's own."""
    seen.clear()
    states_ND, responses = numbers(len(PROMPT), 8), ((126, 131), (131, 132), (290, 300))
    constraints = (Seen(positions=(3,)), TemperatureScale([2.0, 4.0]), DisallowedTokens((7,), first_tokens=1))
    spec = LogitsSpec(full=True, stage=stage, segments=("full",))
    one = asking(spec, *constraints, prompt_from=1, scored=True, response_ranges=responses, prompt_ids=PROMPT)
    given_rows(one, states_ND, parts)
    raw_NV = head_rows(states_ND)
    expected_NV = raw_NV.clone()
    for start, stop in responses:
        for index, token in enumerate(range(start, stop)):
            row_V = expected_NV[token - 1]
            if index == 3:
                row_V[list(range(start, token))] = -INF
            row_V /= 2.0 if index == 0 else 4.0
            if index == 0:
                row_V[7] = -INF
    found = found_of(one)
    torch.testing.assert_close(found.prompt.values_NC, expected_NV if stage == "processed" else raw_NV)
    log_probs_N = expected_NV.log_softmax(-1)[torch.arange(len(raw_NV)), torch.tensor(PROMPT[1:])]
    torch.testing.assert_close(found.log_probs_N, log_probs_N)
    assert (found.fault, found.constrained) == ("", 0)
    # Where each asks, its prompt ends where its response starts.
    expected = [(3, list(range(start)), list(range(start, start + 3))) for start in (126, 290)]
    assert seen == expected


@pytest.mark.parametrize(("limit", "temperatures"), [(3, [2.0, 1.5, 1.0]), (5, [2.0, 1.75, 1.5]), (1, [2.0] * 3)])
def test_a_schedule_of_a_scored_response_goes_by_its_limit(limit: int, temperatures: list[float]) -> None:
    """The response may have ended before its limit."""
    states_ND = numbers(4, 8)
    scale = TemperatureScale(LinearSchedule(2.0, 1.0))
    more = {"response_ranges": ((1, 4),), "response_limit": limit, "prompt_ids": (1, 2, 3, 4)}
    one = asking(None, scale, prompt_from=1, scored=True, **more)
    given_rows(one, states_ND, [(1, 4)])
    logits_NV = head_rows(states_ND)[:3] / torch.tensor(temperatures)[:, None]
    torch.testing.assert_close(found_of(one).log_probs_N, logits_NV.log_softmax(-1)[range(3), [2, 3, 4]])


def test_a_token_that_constraints_take_away_has_no_probability() -> None:
    states_ND = numbers(4, 8)
    one = asking(
        None, DisallowedTokens((2,)), prompt_from=1, scored=True, response_ranges=((1, 4),), prompt_ids=(1, 2, 3, 4)
    )
    given_rows(one, states_ND, [(1, 4)])
    found = found_of(one).log_probs_N
    assert found[0] == -INF
    assert found[1:].isfinite().all()


def test_nothing_left_inside_a_prompt_is_a_fault() -> None:
    states_ND = numbers(len(PROMPT), 8)
    one = asking(
        None, Nothing(positions=(4,)), prompt_from=1, scored=True, response_ranges=((200, 300),), prompt_ids=PROMPT
    )
    given_rows(one, states_ND, PARTS[0])
    assert found_of(one).fault.startswith("token 204 of the sequence: 0 tokens are left to choose from")
    assert found_of(one).log_probs_N.isfinite().all()


@pytest.mark.parametrize("states", [numbers(3, 8), numbers(5), numbers(1, 5, 8)])
def test_states_that_are_not_one_per_position_are_left_out(states: torch.Tensor) -> None:
    one = asking(LogitsSpec(full=True, segments=("prompt",)), prompt_from=1)
    step = StepLogits((), (PromptPart(0, 0, 1, 3, one),), (object(),), WIDE, 5)
    step.take_prompts(states, lambda rows: numbers(len(rows), WIDE))
    assert step.taken().prompts == ()


def test_padding_behind_the_positions_is_no_harm() -> None:
    one = asking(LogitsSpec(full=True, segments=("prompt",)), prompt_from=1)
    step = StepLogits((), (PromptPart(0, 0, 1, 3, one),), (object(),), V, 3)
    step.take_prompts(numbers(8, V), lambda rows: rows)
    step.taken().copy_to_host(torch.clone).consume(SimpleNamespace(reqs=[]), [])
    assert torch.equal(found_of(one).prompt.values_NC, numbers(8, V)[:2])


def test_several_prompts_and_choices_in_one_step() -> None:
    """The rows of the second prompt stand behind those of the first."""
    spec = LogitsSpec(token_ids=(1, 0), segments=("full",))
    ones = [asking(spec, prompt_from=1, prompt_ids=(1, 2, 3)), asking(spec, prompt_from=2, prompt_ids=(4, 5, 6, 7))]
    reqs = [object(), object()]
    step = StepLogits(
        (SamplingRow(0, 2, 0, ones[0], 9, ()), SamplingRow(1, 6, 0, ones[1], 9, ())),
        (PromptPart(0, 0, 1, 3, ones[0]), PromptPart(1, 3, 2, 4, ones[1])),
        tuple(reqs),
        V,
        7,
    )
    states_NV, last = numbers(7, V), [2, 6]
    step.take_prompts(states_NV, lambda rows: rows)
    next_BV = states_NV[last].clone()
    step.take_raw(next_BV)
    step.constrain(next_BV, torch.ones(2, 1))
    host = step.taken().copy_to_host(torch.clone)
    host.consume(SimpleNamespace(reqs=reqs), [SimpleNamespace(output_index=0)] * 2)
    for one, places, end in ((ones[0], [0, 1], 2), (ones[1], [4, 5], 6)):
        assert torch.equal(found_of(one).prompt.values_NC, states_NV[places][:, [1, 0]])
        assert torch.equal(found_of(one).response.values_NC, states_NV[end : end + 1, [1, 0]])
