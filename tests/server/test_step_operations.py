"""A step costs the same number of tensor operations however many requests it serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fake_scheduler import LAYERS, Req, Scheduler, Step, asking, last
from stand_ins import Operations

from torchrl_sglang_hidden.reduce.wanted import BLOCK
from torchrl_sglang_hidden.spec.hidden import POOLINGS, SEGMENTS
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan

# Of four tokens each: longer steps select the rows of each layer first, and reduce windows of rows one by one.
FEW, MANY = 8, 256
KINDS: list[dict[str, Any]] = [
    *({"pooling": pooling} for pooling in POOLINGS),
    {"layers": (2, 0, -1)},
    {"layers": LAYERS, "spans": {"m": PromptSpan(((0, 1), (2, 4)))}},
    {"segments": ("response",)},
    {"segments": ("prompt", "response"), "pooling": None, "tokens": True},
    {"segments": ("response",), "spans": {"t": LastTokens(2, allow_fewer=True)}},
    {"segments": (), "spans": {"b": Between("|", None, unclosed="end")}},
]


class CountingScheduler(Scheduler):
    """Counts the operations of the server half, and not those of the "model"."""

    def count(self, step: Step, states: dict[int, torch.Tensor]) -> int:
        batch = step.batch()
        with Operations() as operations:
            host = self.capture.plan_step(batch).gather(states).copy_to_host(lambda tensor: tensor)
        commits = []
        for req in step.reqs:
            commits.append(type("Commit", (), {"output_index": len(req.output_ids)}))
            req.output_ids.append(1)
        with operations:
            host.consume(batch, commits)
        return operations.count


def states_for(step: Step) -> dict[int, torch.Tensor]:
    """Return states of one row per position of the step."""
    return {layer: torch.randn(sum(stop - start for start, stop in step.spans), 6) for layer in LAYERS}


def operations_of(kind: dict[str, Any], num_requests: int, num_prompt: int = 4) -> tuple[int, int, int]:
    """Return the operations of a prefill, a decode step, and a decode step whose full values are kept."""
    scheduler = CountingScheduler()
    reqs = [asking(*[number % 3] * num_prompt, **kind) for number in range(num_requests)]
    step = Step("EXTEND", reqs, [(0, num_prompt)] * num_requests, [True] * num_requests)
    prefill = scheduler.count(step, states_for(step))
    found = []
    for _ in range(BLOCK + 1 - num_prompt):
        step = Step("DECODE", reqs, [last(req) for req in reqs], [True] * num_requests)
        found.append(scheduler.count(step, states_for(step)))
    for req in reqs[:2]:
        assert scheduler.finish(req) != []
    return prefill, found[1], max(found)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_number_of_requests_does_not_count(kind: dict[str, Any]) -> None:
    few, many = operations_of(kind, FEW), operations_of(kind, MANY)
    assert few == many
    assert few[1] <= 12, "few for a step that an accelerator runs in milliseconds"


def test_the_number_of_layers_does_not_count_where_requests_decode() -> None:
    one, all_of_them = operations_of({"layers": (-1,)}, FEW), operations_of({"layers": LAYERS}, FEW)
    assert one[1] == all_of_them[1]


def test_prefix_hits_do_not_count() -> None:
    """Each request goes on from a kept value of its own, and all are merged at once."""

    def hits(num_requests: int) -> int:
        scheduler = CountingScheduler()
        reqs = [asking(*[number % 3] * 9) for number in range(num_requests)]
        for req in reqs:
            tracked = scheduler.capture.open(req)
            tracked.base = (4, torch.ones(1, 6))
        step = Step("EXTEND", reqs, [(4, 9)] * num_requests, [True] * num_requests)
        count = scheduler.count(step, states_for(step))
        assert scheduler.capture.opened[reqs[0]].pools.done == 9
        return count

    assert hits(FEW) == hits(MANY)


def test_steps_where_nobody_asks_take_nothing() -> None:
    scheduler, reqs = Scheduler(), [Req([1, 2]) for _ in range(FEW)]
    with Operations() as operations:
        assert scheduler.capture.plan_step(Step("DECODE", reqs, [(1, 2)] * FEW, [True] * FEW).batch()) is None
    assert operations.count == 1, "the test's own list of lengths"
    assert len(SEGMENTS) == 3
