"""Where memory is short the request is refused, and the server and all other requests go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fake_engine import HIDDEN_SIZE
from helpers.fake_scheduler import Scheduler, Step, asking, last
from stand_ins import wait_for_jobs

from torchrl_sglang_hidden.errors import CapabilityError
from torchrl_sglang_hidden.protocol import unpack_answer
from torchrl_sglang_hidden.reduce.bags import Bags
from torchrl_sglang_hidden.server.slots import Slots
from torchrl_sglang_hidden.server.state_store import PAGE, StateBudget, StateStore
from torchrl_sglang_hidden.server.step_rows import StepPlan


def out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def assert_refused(scheduler: Scheduler, req: Any, words: str) -> None:
    with pytest.raises(CapabilityError, match=words):
        unpack_answer(scheduler.finish(req), "row 0", HIDDEN_SIZE)


@pytest.mark.parametrize(
    ("holder", "name"), [(StepPlan, "_select"), (Bags, "reduce"), (Slots, "fold"), (Slots, "_make_room")]
)
def test_a_step_without_memory_costs_its_requests(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str) -> None:
    scheduler, hit, later = Scheduler(), asking(9, 8), asking(7, 6)
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, out_of_memory)
        scheduler.prefill(hit)
    scheduler.prefill(later)
    scheduler.decode(hit, later)
    assert_refused(scheduler, hit, r"ran out of memory on its device .*; lower --mem-fraction-static")
    scheduler.assert_right(later)


def test_a_result_without_memory_costs_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, hit, later = Scheduler(), asking(9, 8), asking(7, 6)
    scheduler.prefill(hit, later)
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "read", out_of_memory)
        assert_refused(scheduler, hit, "ran out of memory")
    scheduler.assert_right(later)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_was_lost_is_computed_again_unless_other_ranks_count_on_it(
    monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """All ranks must give the prefix cache the same limits, whichever of them was short of memory."""
    scheduler, lost = Scheduler(), asking(*[2] * 70)
    scheduler.capture.ranks = ranks
    with monkeypatch.context() as patch:
        patch.setattr(Bags, "reduce", out_of_memory)
        scheduler.prefill(lost)
    assert_refused(scheduler, lost, "ran out of memory")
    req = asking(*[2] * 70, 1)
    start = scheduler.capture.prefix_limit(scheduler.capture.open(req), 70)
    assert start == (0 if ranks == 1 else 70)
    scheduler.run(Step("EXTEND", [req], [(start, 71)], [True]))
    if ranks == 1:
        scheduler.assert_right(req)
    else:
        assert_refused(scheduler, req, r"were lost when memory was short; empty the cache")


def test_token_states_without_room_cost_their_request() -> None:
    scheduler = Scheduler()
    scheduler.capture._state_budget = StateBudget(2 * PAGE * HIDDEN_SIZE * 4)
    big, small = asking(*[1] * 3 * PAGE, tokens=True), asking(9, 8, tokens=True)
    scheduler.prefill(big, small)
    scheduler.decode(big, small)
    assert_refused(scheduler, big, r"memory for token states is full")
    del big
    scheduler.assert_right(small)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_value_of_the_response_that_could_not_be_read_is_not_kept_as_one(
    monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    scheduler, req = Scheduler(), asking(*[2] * 62, segments=("full",))
    scheduler.capture.ranks = ranks
    scheduler.prefill(req)
    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(Slots, "read", out_of_memory)
            scheduler.run(Step("DECODE", [req], [last(req)], [True]))
    scheduler.assert_right(req)
    other = asking(*req.ids[:64], 1)
    start = scheduler.capture.prefix_limit(scheduler.capture.open(other), 64)
    assert start == (62 if ranks == 1 else 64), "up to the prompt's own value, which was not lost"
    scheduler.run(Step("EXTEND", [other], [(start, 65)], [True]))
    if ranks == 1:
        scheduler.assert_right(other)
    else:
        assert_refused(scheduler, other, "were lost")


def test_neighbours_do_not_cost_a_request_the_value_that_is_kept_of_it() -> None:
    """Three reach a block's end in one step: one whose prompt is a single token, and one that was refused."""
    scheduler = Scheduler()
    alone, usual = asking(2, segments=("full",)), asking(1, 2, segments=("full",))
    hit = asking(0, 2, segments=("full",))
    scheduler.prefill(alone, usual, hit)
    for _ in range(61):
        scheduler.decode(alone, usual, hit)
    scheduler.capture.opened[hit].refuse("for a reason of its own")
    scheduler.decode(alone)
    scheduler.decode(alone, usual, hit)
    scheduler.capture.land_all()
    for req in (alone, usual):
        other = asking(*req.ids[:64], 1)
        assert scheduler.capture.prefix_limit(scheduler.capture.open(other), 64) == 64
        scheduler.run(Step("EXTEND", [other], [(64, 65)], [True]))
        scheduler.assert_right(other)


def test_a_step_behind_the_end_costs_a_finished_request_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlap scheduling launches one more step; its memory is not the answer's."""
    scheduler, req = Scheduler(), asking(9, 8)
    scheduler.prefill(req)
    scheduler.launch(Step("DECODE", [req], [last(req)], [True]))
    with monkeypatch.context() as patch:
        patch.setattr(StepPlan, "_select", out_of_memory)
        scheduler.launch(Step("DECODE", [req], [last(req)], [False]))
    scheduler.commit()
    req.is_finished = True
    (unfinished,) = scheduler.capture.answers([req])
    scheduler.commit()
    assert unpack_answer(unfinished.finish(), "row 0", HIDDEN_SIZE).pools.segments["response"][1] == 2


def test_rows_that_could_not_be_written_are_never_taken_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, hit, pooled = Scheduler(), asking(9, 8, tokens=True), asking(7, 6)
    with monkeypatch.context() as patch:
        patch.setattr(
            StateStore, "write", lambda *args: torch.zeros(2).index_copy_(0, torch.tensor([5]), torch.ones(1))
        )
        scheduler.prefill(hit, pooled)
        wait_for_jobs(scheduler.capture.later)
    scheduler.decode(hit, pooled)
    assert_refused(scheduler, hit, r"token states could not be kept \(.*\); see the server's log")
    scheduler.assert_right(pooled)
