"""Capture of logits inside the scheduler, and the constraints that act there."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_engine import HIDDEN_SIZE
from helpers.fake_scheduler import (
    DENY,
    VOCAB,
    Req,
    Scheduler,
    Step,
    asking,
    capturing,
    choosing,
    last,
    planned,
)

from torchrl_sglang_hidden.protocol import unpack_answer
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.server.next_tokens import plan_logits
from torchrl_sglang_hidden.spec.constraints import ActionMask, ConstraintStep, LogitConstraint
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import PromptSpan


@dataclass(frozen=True)
class Ask(LogitConstraint, name="capture_ask"):
    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        asked.append((step.index, step.max_new_tokens, list(step.prompt_ids), step.response_ids.tolist()))
        return logits_V


asked: list[tuple[int, int, list[int], list[int]]] = []
FULL = LogitsSpec(full=True)
BOTH = LogitsSpec(top_k=3, segments=("full",))


def test_what_a_prefill_chooses() -> None:
    reqs = [Req([1, 1]), choosing(9, 8, 7, spec=FULL), asking(3, 2), choosing(5, 4, spec=BOTH, prompt_from=1)]
    step = Step("EXTEND", reqs, [(0, len(req.ids)) for req in reqs], [True] * 4)
    assert planned(capturing(), step) == ([(1, 4, 0), (3, 8, 0)], [(3, 7, 1, 2)])


def test_what_a_decode_step_chooses() -> None:
    capture = capturing()
    reqs = [Req([1, 1]), choosing(9, 8, 7, spec=BOTH, prompt_from=1), choosing(4, constraints=DENY)]
    for index in (1, 2, 5):
        step = Step("DECODE", reqs, [(len(r.ids) + index - 1, len(r.ids) + index) for r in reqs], [True] * 3)
        assert planned(capture, step) == ([(1, 1, index), (2, 2, index)], [])


def test_the_middle_of_a_prompt_chooses_nothing() -> None:
    capture = capturing()
    req, other = choosing(*range(7), spec=BOTH, prompt_from=2), choosing(5, 4, constraints=DENY)
    chunks = [(0, 1), (1, 4), (4, 6), (6, 7)]
    found = [planned(capture, Step("EXTEND", [req], [chunk], [False])) for chunk in chunks]
    assert found == [([], []), ([], [(0, -1, 2, 5)]), ([], [(0, -4, 5, 7)]), ([(0, 0, 0)], [])]
    mixed = Step("MIXED", [choosing(8, 7, 6, spec=FULL), other], [(0, 2), (2, 3)], [False, True])
    assert planned(capture, mixed) == ([(1, 2, 1)], [])


def test_a_mixed_step_chooses_for_both() -> None:
    late, early = choosing(9, 8, 7, spec=BOTH, prompt_from=1), choosing(5, 4, spec=FULL, constraints=DENY)
    step = Step("MIXED", [early, late], [(4, 5), (0, 3)], [True, True])
    assert planned(capturing(), step) == ([(0, 0, 3), (1, 3, 0)], [(1, 1, 1, 3)])


def test_after_a_retraction_the_next_token_is_chosen() -> None:
    capture, req = capturing(), choosing(9, 8, 7, spec=BOTH, constraints=DENY, prompt_from=1)
    scheduler = Scheduler(capture)
    scheduler.prefill(req)
    scheduler.decode(req)
    assert len(req.output_ids) == 2
    capture.opened[req].restart()
    assert planned(capture, Step("EXTEND", [req], [(0, 4)], [False])) == ([(0, 3, 1)], []), "as SGLang would"
    assert planned(capture, Step("EXTEND", [req], [(0, 5)], [True])) == ([(0, 4, 2)], [])
    scheduler.run(Step("EXTEND", [req], [(0, 5)], [True]))
    scheduler.decode(req)
    scheduler.assert_right(req)


def test_a_chunk_that_never_ran_is_planned_again() -> None:
    """The request went back into the queue after it was planned."""
    capture, req = capturing(), choosing(9, 8, 7, 6, spec=BOTH, prompt_from=1)
    Scheduler(capture).run(Step("EXTEND", [req], [(0, 2)], [False]))
    assert planned(capture, Step("EXTEND", [req], [(2, 4)], [True]))[1] == [(0, -2, 3, 4)]
    assert planned(capture, Step("EXTEND", [req], [(2, 4)], [True]))[1] == []
    capture.opened[req].restart()
    assert planned(capture, Step("EXTEND", [req], [(0, 4)], [True]))[1] == [(0, 0, 3, 4)]


def test_nobody_who_asks_for_logits_plans_nothing() -> None:
    capture = capturing()
    assert planned(capture, Step("EXTEND", [asking(9, 8), Req([1])], [(0, 2), (0, 1)], [True] * 2)) == ([], [])
    scored = choosing(9, 8, constraints=DENY, prompt_from=1, scored=True, response_ranges=((1, 2),))
    assert planned(capture, Step("EXTEND", [scored], [(0, 2)], [True])) == ([], [(0, 0, 1, 2)])
    assert planned(capture, Step("TARGET_VERIFY", [choosing(9, spec=FULL)], [(0, 1)], [True])) == ([], [])


class _Counted(SimpleNamespace):
    """A batch that knows which of its fields were read."""

    def __getattribute__(self, name: str) -> Any:
        read.append(name)
        return super().__getattribute__(name)


read: list[str] = []


def test_a_step_where_nobody_asks_for_logits_is_not_even_read() -> None:
    """One finished, another was aborted and is gone, and those that pool states only do not count."""
    scheduler = Scheduler()
    gone, done, pooling = choosing(9, 8, spec=FULL), choosing(3, 2, constraints=DENY), asking(7, 6)
    scheduler.prefill(gone, done, pooling)
    scheduler.finish(done)
    del gone
    batch = _Counted(**vars(Step("DECODE", [pooling], [last(pooling)], [True]).batch()))
    read.clear()
    assert plan_logits(batch, scheduler.capture.logits, VOCAB) is None
    assert read == [], "the mapping is empty"


def test_who_wants_logits_only_takes_no_rows() -> None:
    req = choosing(9, 8, 7, spec=BOTH, prompt_from=1)
    assert capturing().plan_step(Step("EXTEND", [req], [(0, 3)], [True]).batch()) is None


def test_the_ids_before_are_those_of_the_response() -> None:
    """Also where the host is one token behind, as under overlap scheduling."""
    asked.clear()
    scheduler, req = Scheduler(), choosing(9, 8, 7, constraints=(Ask(),), response_limit=11)
    scheduler.prefill(req)
    scheduler.decode(req)
    step, last_id = Step("DECODE", [Req([1]), req], [(0, 1), last(req)], [True] * 2), req.output_ids[-1]
    batch = step.batch()
    lagging = req.output_ids.pop()
    step_logits = plan_logits(batch, scheduler.capture.logits, VOCAB)
    assert [row.ids_before for row in step_logits.sampling_rows] == [req.output_ids], "one short"
    ids = [*req.ids, lagging]
    step_logits.input_ids = torch.tensor([1, ids[-1]])
    step_logits.constrain(torch.zeros(2, VOCAB), None)
    req.output_ids.append(lagging)
    assert asked == [(index, 11, [9, 8, 7], req.output_ids[:index]) for index in range(3)]
    assert asked[-1][-1][-1] == last_id


def test_the_ids_before_are_not_copied_for_nobody() -> None:
    scheduler, req = Scheduler(), choosing(9, 8, constraints=DENY)
    scheduler.prefill(req)
    batch = Step("DECODE", [req], [last(req)], [True]).batch()
    (row,) = plan_logits(batch, scheduler.capture.logits, VOCAB).sampling_rows
    assert row.ids_before == ()


@pytest.mark.parametrize("cuts", [[6], [2, 6], [1, 2, 3, 4, 5, 6], [4, 6]])
@pytest.mark.parametrize("spec", [None, FULL, BOTH, LogitsSpec(token_ids=(1, 4), segments=("prompt",))])
@pytest.mark.parametrize("scored", [False, True])
def test_logits_of_a_prompt_in_chunks(cuts: list[int], spec: Any, scored: bool) -> None:
    given_from = 1 if spec is not None and spec.of_prompt else 3 if scored else None
    more = {"scored": True, "response_ranges": ((2, 4), (5, 6))} if scored else {}
    wanted = Wanted(("prompt",), spans={"p": PromptSpan(((1, 3),))})
    req = choosing(5, 4, 3, 6, 1, 7, wanted=wanted, spec=spec, constraints=DENY, prompt_from=given_from, **more)
    scheduler = Scheduler()
    for start, stop in zip([0, *cuts], cuts, strict=False):
        scheduler.run(Step("EXTEND", [req], [(start, stop)], [stop == 6]))
    for _ in range(3):
        scheduler.decode(req, padding=2)
    scheduler.assert_right(req)


def test_a_hit_that_went_too_far_leaves_the_count_of_logits_short() -> None:
    scheduler, req = Scheduler(), choosing(5, 4, 3, 6, spec=BOTH, prompt_from=1)
    scheduler.run(Step("EXTEND", [req], [(2, 4)], [True]))
    found = unpack_answer(scheduler.finish(req), "row 0", HIDDEN_SIZE).logits
    assert (found.prompt, found.response.values_NC.shape) == (None, (1, 3))


def test_a_finished_request_answers_with_what_it_asked_for() -> None:
    scheduler = Scheduler()
    quiet, masked = asking(9, 8), choosing(9, 8, constraints=DENY)
    scheduler.prefill(quiet, masked)
    assert "constrained" not in scheduler.finish(quiet)[0]
    (answer,) = scheduler.finish(masked)
    assert (answer["constrained"], answer["fault"], answer["places"]) == (1, "", [])
    assert answer.keys().isdisjoint({"logits", "prompt_logits", "log_probs", "rows"})


def test_a_mask_that_leaves_nothing_is_a_fault_of_its_request_alone() -> None:
    scheduler, bad, good = (
        Scheduler(),
        choosing(9, 8, constraints=(ActionMask((VOCAB,)),)),
        choosing(7, constraints=DENY),
    )
    scheduler.prefill(bad, good)
    scheduler.decode(bad, good)
    logits = unpack_answer(scheduler.finish(bad), "row 0", HIDDEN_SIZE).logits
    assert logits is not None
    assert logits.fault.startswith("action_mask failed at token 0 of the response: IndexError")
    scheduler.assert_right(good)
