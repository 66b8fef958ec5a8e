"""Every rank of a tensor-parallel server counts alike, and only the one that answers holds states and logits.

All ranks run the same batches, so that they must give SGLang's prefix cache the same limits: a rank with another limit
would compute other positions, and the ranks would wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import fake_scheduler
from helpers.fake_scheduler import DENY, LAYERS, Req, Scheduler, Step, choosing, last
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.reduce.wanted import BLOCK, Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.server import next_tokens, prompt_logits
from torchrl_sglang_hidden.server.next_tokens import StepLogits
from torchrl_sglang_hidden.server.slots import Slots
from torchrl_sglang_hidden.spec.hidden import POOLINGS, SEGMENTS
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan

SPANS = {"m": PromptSpan(((0, 1),)), "t": LastTokens(2, allow_fewer=True), "b": Between("|", None, unclosed="end")}
BASES = [[2] * (BLOCK - 2), [2] * (2 * BLOCK + 3), [1, 2] * BLOCK]
TOP = LogitsSpec(top_k=2, segments=("full",))
PROCESSED = LogitsSpec(full=True, segments=("prompt",), stage="processed")


class Ranks:
    """Two ranks that get the same requests and run the same steps."""

    def __init__(self) -> None:
        self.ranks = [Scheduler(), Scheduler()]
        self.ranks[1].capture.sends = False
        for scheduler in self.ranks:
            scheduler.capture.ranks = 2

    def start(self, *asked: tuple[list[int], Wanted, WantedLogits | None]) -> list[tuple[Req, Req]]:
        """Prefill requests as far as their prefixes are not cached; the cache has what any request had."""
        pairs = [
            (Req(list(ids), wanted, logits=logits), Req(list(ids), wanted, logits=logits))
            for ids, wanted, logits in asked
        ]
        starts = []
        for rank, scheduler in enumerate(self.ranks):
            limits = []
            for pair in pairs:
                tracked = scheduler.capture.open_again(pair[rank])
                limits.append(scheduler.capture.prefix_limit(tracked, len(pair[rank].ids) - 1))
            starts.append(limits)
        assert starts[0] == starts[1]
        for rank, scheduler in enumerate(self.ranks):
            reqs = [pair[rank] for pair in pairs]
            spans = [(start, len(req.ids)) for start, req in zip(starts[rank], reqs, strict=True)]
            scheduler.run(Step("EXTEND", reqs, spans, [True] * len(reqs)))
        return pairs

    def decode(self, pairs: list[tuple[Req, Req]]) -> None:
        for rank, scheduler in enumerate(self.ranks):
            scheduler.run(
                Step("DECODE", [pair[rank] for pair in pairs], [last(p[rank]) for p in pairs], [True] * len(pairs))
            )

    def finish(self, pair: tuple[Req, Req]) -> None:
        collected = [self.ranks[rank].capture.opened[pair[rank]].logits for rank in (0, 1)]
        assert collected[0].first_needed == collected[1].first_needed
        assert not holds_logits(collected[1])
        self.ranks[0].assert_right(pair[0])
        assert self.ranks[1].finish(pair[1]) == []

    def assert_alike(self) -> None:
        one, other = (scheduler.capture for scheduler in self.ranks)
        assert one.sums.bytes == other.sums.bytes
        assert list(one.sums._sums) == list(other.sums._sums)
        assert all(value_KD.numel() == 0 for value_KD, _ in other.sums._sums.values()), "a rank that answers nothing"
        assert other._stores == {}
        assert all(slots.device_bytes == 0 for slots in other._slots.values())


def holds_logits(logits: RequestLogits) -> bool:
    found = logits.finish()
    return any(held is not None for held in (found.response, found.prompt, found.log_probs_N))


@st.composite
def wanted_logits(draw: st.DrawFn, num_prompt: int) -> WantedLogits | None:
    constraints = draw(st.sampled_from([(), DENY]))
    kinds = [None, WantedLogits(constraints=DENY), WantedLogits(TOP, constraints, prompt_from=1)]
    if num_prompt > 1:
        more = {"prompt_from": 1, "scored": True, "response_ranges": ((1, num_prompt),)}
        kinds += [WantedLogits(spec, constraints, **more) for spec in (None, PROCESSED)]
    return draw(st.sampled_from(kinds))


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], Wanted, WantedLogits | None]:
    base = draw(st.sampled_from(BASES))
    ids = base[: draw(st.integers(1, len(base)))] + draw(st.lists(st.integers(0, 2), max_size=3))
    names = draw(st.sets(st.sampled_from(sorted(SPANS))))
    wanted = Wanted(
        tuple(draw(st.sets(st.sampled_from(SEGMENTS), min_size=1))),
        draw(st.sampled_from(POOLINGS)),
        draw(st.sampled_from([(-1,), LAYERS])),
        spans={name: SPANS[name] for name in names},
        tokens=draw(st.booleans()),
    )
    return ids, wanted, draw(wanted_logits(len(ids)))


@given(data=st.data())
def test_ranks_count_alike_whoever_holds_the_states(data: st.DataObject) -> None:
    ranks = Ranks()
    for _ in range(data.draw(st.integers(1, 4))):
        pairs = ranks.start(*data.draw(st.lists(requests(), min_size=1, max_size=3)))
        for _ in range(data.draw(st.integers(0, 4))):
            ranks.decode(pairs)
        for pair in pairs:
            ranks.finish(pair)
        ranks.assert_alike()


def test_ranks_count_alike_where_one_of_them_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ranks, wanted = Ranks(), Wanted(("prompt", "full"))
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "fold", out_of_memory)
        pairs = ranks.start((BASES[0], wanted, None))
        for _ in range(4):
            ranks.decode(pairs)
    for rank, scheduler in enumerate(ranks.ranks):
        scheduler.finish(pairs[0][rank])
    one, other = (scheduler.capture.sums for scheduler in ranks.ranks)
    assert list(one._sums) == list(other._sums)
    assert one.bytes == other.bytes
    ranks.start((pairs[0][0].ids, wanted, None))


class Rank(Scheduler):
    """Notes how often the head is called with how many rows, what is sampled from, and whether columns are taken."""

    def __init__(self, patch: pytest.MonkeyPatch, sends: bool) -> None:
        super().__init__()
        self.capture.ranks, self.capture.sends = 2, sends
        self.head_rows: list[int] = []
        self.sampled_from: list[torch.Tensor] = []
        self.selections = 0
        head, constrain, select_rows = fake_scheduler.head, StepLogits.constrain, next_tokens.select_rows

        def note_head(states_ND: torch.Tensor) -> torch.Tensor:
            self.head_rows.append(len(states_ND))
            return head(states_ND)

        def note_constrain(step_logits: StepLogits, logits_BV: torch.Tensor, *more: Any) -> None:
            constrain(step_logits, logits_BV, *more)
            self.sampled_from.append(logits_BV.clone())

        def note_selection(*args: Any) -> Any:
            self.selections += 1
            return select_rows(*args)

        patch.setattr(fake_scheduler, "head", note_head)
        patch.setattr(StepLogits, "constrain", note_constrain)
        patch.setattr(next_tokens, "select_rows", note_selection)
        patch.setattr(prompt_logits, "select_rows", note_selection)


def on_both_ranks(monkeypatch: pytest.MonkeyPatch, run: Callable[[Rank], None]) -> tuple[Rank, Rank]:
    ranks = []
    for sends in (True, False):
        with monkeypatch.context() as patch:
            ranks.append(Rank(patch, sends))
            run(ranks[-1])
    return ranks[0], ranks[1]


def test_ranks_share_the_head_and_only_one_takes_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has a part of the head: one that left a call out would leave the others waiting."""
    monkeypatch.setattr(prompt_logits, "MAX_PIECE_ROWS", 3)
    copied: list[int] = []

    def run(rank: Rank) -> None:
        scored = {"prompt_from": 1, "scored": True, "response_ranges": ((2, 4),)}
        reqs = [
            choosing(5, 4, 3, 2, spec=TOP, prompt_from=1),
            choosing(1, 2, 1, 2, spec=PROCESSED, constraints=DENY, **scored),
            choosing(1, 2, constraints=DENY),
        ]
        rank.launch(Step("EXTEND", reqs, [(0, len(req.ids)) for req in reqs], [True] * 3))
        (host,) = rank.waiting[0][0]
        copied.append(sum(len(prompts.columns) for prompts in host.prompts) + len(host.sampled))
        rank.commit()
        for _ in range(2):
            rank.decode(*reqs)

    one, other = on_both_ranks(monkeypatch, run)
    assert one.head_rows == other.head_rows == [3, 3, 3, 3, 3]
    assert len(one.sampled_from) == 3
    for one_BV, other_BV in zip(one.sampled_from, other.sampled_from, strict=True):
        assert torch.equal(one_BV, other_BV)
    assert one.selections > 0
    assert copied[0] > 0
    assert (other.selections, copied[1]) == (0, 0)


def test_ranks_count_alike_where_logits_of_a_prompt_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that goes back into the queue is given the prefix that all ranks leave it."""

    def out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ranks = Ranks()
    with monkeypatch.context() as patch:
        patch.setattr(next_tokens, "prompt_logits_of", out_of_memory)
        pairs = ranks.start(([5, 4, 3], Wanted((), None), WantedLogits(TOP, prompt_from=1)))
    tracked = [scheduler.capture.opened[pairs[0][rank]] for rank, scheduler in enumerate(ranks.ranks)]
    assert [bool(one.logits.refused) for one in tracked] == [True, False]
    assert [one.logits.first_needed for one in tracked] == [None, None]
