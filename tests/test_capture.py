"""Capture inside the scheduler, step by step, with batches and requests of SGLang's shape.

`Scheduler` here drives what SGLang drives: it plans, "runs" the model, copies, commits and consumes, in that order. The
states of each request are those of tests/recorder.py, so a pool that got a wrong row has a wrong value.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorder import ALL_SEGMENTS, HIDDEN_SIZE, pooled_D, state_D

from torchrl_sglang_hidden.channel import CHANNEL, pack_options, unpack_answer
from torchrl_sglang_hidden.server.capture import Capture, HostRows
from torchrl_sglang_hidden.specs import POOLINGS, SEGMENTS, HiddenSpec, Pooling, rows_expected

POISON = 1e4  # the value of rows that belong to nobody


class Req:
    """A request as the scheduler holds it."""

    def __init__(self, prompt_ids: list[int], spec: HiddenSpec | None = None, custom: Any = None) -> None:
        if spec is not None:
            custom = {CHANNEL: pack_options(spec, binary=True)}
        self.origin_input_ids = prompt_ids
        self.output_ids: list[int] = []
        self.sampling_params = SimpleNamespace(custom_params=custom)
        self.is_finished = False

    @property
    def ids(self) -> list[int]:
        return self.origin_input_ids + self.output_ids

    def finished(self) -> bool:
        return self.is_finished


@dataclass
class Step:
    """One forward step: which positions of each request are computed, and whether each commits a token."""

    mode: str
    reqs: list[Req]
    spans: list[tuple[int, int]]
    commits: list[bool]
    padding: int = 0


@dataclass
class Scheduler:
    capture: Capture = field(default_factory=Capture)
    dtype: torch.dtype = torch.float32
    waiting: list[tuple[HostRows | None, Any, list[Any]]] = field(default_factory=list)

    def run(self, step: Step) -> None:
        self.launch(step)
        self.commit()

    def launch(self, step: Step) -> None:
        """Forward pass and copy. The device's buffer is overwritten at once, as a CUDA graph's is."""
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(name=step.mode),
            reqs=list(step.reqs),
            extend_lens=[stop - start for start, stop in step.spans] if step.mode != "DECODE" else None,
            prefix_lens=[start for start, _ in step.spans] if step.mode != "DECODE" else None,
        )
        plan = self.capture.plan_step(batch)
        rows = [
            state_D([*req.ids, 0], position)
            for req, (start, stop) in zip(step.reqs, step.spans, strict=True)
            for position in range(start, stop)
        ]
        rows += [torch.full((HIDDEN_SIZE,), POISON)] * step.padding
        hidden_ND = torch.stack(rows).to(self.dtype)
        device = plan.gather(hidden_ND) if plan is not None else None
        hidden_ND.fill_(POISON)
        host = device.copy_to_host(torch.clone) if device is not None else None
        commits: list[Any] = []
        for req, commits_one in zip(step.reqs, step.commits, strict=True):
            commits.append(SimpleNamespace(output_index=len(req.output_ids)) if commits_one else None)
            if commits_one:
                req.output_ids.append(7 + 3 * len(req.ids))
        self.waiting.append((host, batch, commits))

    def commit(self) -> None:
        host, batch, commits = self.waiting.pop(0)
        if host is not None:
            host.consume(batch, commits)

    def prefill(self, *reqs: Req, mode: str = "EXTEND") -> None:
        self.run(Step(mode, list(reqs), [(0, len(req.ids)) for req in reqs], [True] * len(reqs)))

    def decode(self, *reqs: Req, commits: list[bool] | None = None, padding: int = 0) -> None:
        spans = [(len(req.ids) - 1, len(req.ids)) for req in reqs]
        self.run(Step("DECODE", list(reqs), spans, commits or [True] * len(reqs), padding))

    def finish(self, req: Req) -> list[dict[str, Any]]:
        req.is_finished = True
        return self.capture.answer(req)


def assert_pooled(answer: Any, req: Req, pooling: Pooling = "mean", segments: Any = ALL_SEGMENTS) -> None:
    found = unpack_answer(answer, "row 0")
    assert tuple(found) == tuple(segments)
    num_prompt, num_response = len(req.origin_input_ids), len(req.output_ids)
    hidden_ND = torch.stack([state_D(req.ids, position) for position in range(num_prompt + num_response - 1)])
    for segment, (vector_D, count) in found.items():
        assert count == rows_expected(segment, num_prompt, num_response), segment
        expected_D = pooled_D(hidden_ND, segment, pooling, num_prompt)
        torch.testing.assert_close(vector_D.double(), expected_D, rtol=1e-5, atol=1e-5)


def asking(*prompt_ids: int, pooling: Pooling = "mean", segments: Any = ALL_SEGMENTS) -> Req:
    return Req(list(prompt_ids), HiddenSpec(segments, pooling))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_prefill_and_decode(pooling: Pooling) -> None:
    scheduler, req = Scheduler(), asking(9, 8, 7, pooling=pooling)
    scheduler.prefill(req)
    for _ in range(3):
        scheduler.decode(req)
    assert_pooled(scheduler.finish(req), req, pooling)


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_segment_alone(segment: Any, pooling: Pooling) -> None:
    scheduler, req = Scheduler(), asking(9, 8, 7, pooling=pooling, segments=(segment,))
    scheduler.prefill(req)
    scheduler.decode(req)
    assert_pooled(scheduler.finish(req), req, pooling, (segment,))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("cuts", [[2, 5], [1, 2, 3, 4, 5], [4, 5]])
def test_a_prompt_in_chunks(pooling: Pooling, cuts: list[int]) -> None:
    scheduler, req = Scheduler(), asking(9, 8, 7, 6, 5, pooling=pooling)
    for start, stop in zip([0, *cuts], cuts, strict=False):
        scheduler.run(Step("EXTEND", [req], [(start, stop)], [stop == 5]))
    scheduler.decode(req)
    assert_pooled(scheduler.finish(req), req, pooling)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_mixed_step_of_prefill_and_decode(pooling: Pooling) -> None:
    scheduler = Scheduler()
    early, late, quiet = asking(9, 8, pooling=pooling), asking(5, 4, 3, pooling=pooling), Req([2, 2])
    scheduler.prefill(early)
    scheduler.run(
        Step("MIXED", [quiet, late, early], [(0, 2), (0, 3), (len(early.ids) - 1, len(early.ids))], [True] * 3)
    )
    scheduler.decode(late, quiet, early, padding=5)
    for req in (early, late):
        assert_pooled(scheduler.finish(req), req, pooling)


def test_neighbours_that_did_not_ask() -> None:
    scheduler = Scheduler()
    quiet, req, also_quiet = Req([4, 4, 4]), asking(9, 8, 7), Req([1])
    scheduler.prefill(quiet, req, also_quiet)
    scheduler.decode(quiet, also_quiet, req)
    scheduler.decode(req, quiet)
    assert_pooled(scheduler.finish(req), req)
    assert scheduler.finish(quiet) == scheduler.finish(also_quiet) == []
    assert len(scheduler.capture.pools) == 0


def test_nobody_asked_nothing_is_planned() -> None:
    capture = Capture()
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(name="EXTEND"), reqs=[Req([1, 2])], extend_lens=[2], prefix_lens=[0]
    )
    assert capture.plan_step(batch) is None
    assert not capture.needs_uncached_prompt(batch.reqs[0])


def test_an_overshoot_step_commits_nothing() -> None:
    """With overlap scheduling the step after a request's last token is launched before that token is known."""
    scheduler, req, other = Scheduler(), asking(9, 8, 7), asking(3, 2)
    scheduler.prefill(req, other)
    scheduler.launch(Step("DECODE", [req, other], [(3, 4), (2, 3)], [True, True]))
    scheduler.launch(Step("DECODE", [req, other], [(4, 5), (3, 4)], [False, True]))
    scheduler.commit()
    answer = scheduler.finish(req)
    assert_pooled(answer, req)
    scheduler.commit()
    assert req not in scheduler.capture.pools
    assert_pooled(scheduler.finish(other), other)


def test_a_finished_request_opens_no_pools_again() -> None:
    scheduler, req = Scheduler(), asking(9, 8)
    scheduler.prefill(req)
    scheduler.finish(req)
    scheduler.decode(req, commits=[False])
    assert len(scheduler.capture.pools) == 0
    assert scheduler.capture.answer(req) == []


def test_a_request_that_is_not_finished_has_no_answer_yet() -> None:
    scheduler, req = Scheduler(), asking(9, 8)
    scheduler.prefill(req)
    assert scheduler.capture.answer(req) == []
    scheduler.decode(req)
    assert_pooled(scheduler.finish(req), req)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("cuts", [[6], [2, 6], [3, 4, 6], [4, 5, 6]])
def test_a_retraction_repeats_prompt_and_tokens(pooling: Pooling, cuts: list[int]) -> None:
    scheduler, req = Scheduler(), asking(9, 8, 7, 6, pooling=pooling)
    scheduler.prefill(req)
    scheduler.decode(req)
    for start, stop in zip([0, *cuts], cuts, strict=False):
        scheduler.run(Step("EXTEND", [req], [(start, stop)], [stop == 6]))
    scheduler.decode(req)
    assert_pooled(scheduler.finish(req), req, pooling)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_retraction_with_a_prefix_hit(pooling: Pooling) -> None:
    scheduler, req = Scheduler(), asking(9, 8, 7, 6, pooling=pooling)
    scheduler.prefill(req)
    scheduler.decode(req)
    assert not scheduler.capture.needs_uncached_prompt(req)
    scheduler.run(Step("EXTEND", [req], [(5, 6)], [True]))
    assert_pooled(scheduler.finish(req), req, pooling)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_retraction_in_the_middle_of_the_prompt(pooling: Pooling) -> None:
    scheduler, req = Scheduler(), asking(9, 8, 7, 6, pooling=pooling)
    scheduler.run(Step("EXTEND", [req], [(0, 3)], [False]))
    assert scheduler.capture.needs_uncached_prompt(req) is (pooling == "mean")
    scheduler.prefill(req)
    scheduler.decode(req)
    assert_pooled(scheduler.finish(req), req, pooling)


def test_a_prefix_hit_leaves_the_count_short() -> None:
    scheduler, req = Scheduler(), asking(9, 8, 7, 6)
    scheduler.run(Step("EXTEND", [req], [(2, 4)], [True]))
    found = unpack_answer(scheduler.finish(req), "row 0")
    assert {segment: count for segment, (_, count) in found.items()} == {"prompt": 0, "response": 1, "full": 0}


@pytest.mark.parametrize("mode", ["TARGET_VERIFY", "DRAFT_EXTEND", "IDLE", "SPLIT_PREFILL", "PREBUILT", "DLLM_EXTEND"])
def test_other_forward_modes_are_not_read(mode: str) -> None:
    """Their rows are not one per position; the request comes back short, which the client refuses."""
    scheduler, req = Scheduler(), asking(9, 8, 7)
    scheduler.prefill(req)
    scheduler.run(Step(mode, [req], [(3, 4)], [True]))
    scheduler.decode(req)
    assert unpack_answer(scheduler.finish(req), "row 0")["response"][1] == 1


@pytest.mark.parametrize("states", [None, torch.zeros(2, HIDDEN_SIZE), torch.zeros(3), torch.zeros(1, 3, HIDDEN_SIZE)])
def test_states_of_another_shape_are_left_out(states: Any) -> None:
    capture, req = Capture(), asking(9, 8, 7)
    batch = SimpleNamespace(forward_mode=SimpleNamespace(name="EXTEND"), reqs=[req], extend_lens=[3], prefix_lens=[0])
    assert capture.plan_step(batch).gather(states) is None
    req.is_finished = True
    assert unpack_answer(capture.answer(req), "row 0") == dict.fromkeys(ALL_SEGMENTS, (None, 0))


GOOD = pack_options(HiddenSpec(), binary=False)
GARBAGE = [
    None, {}, [], "text", 7, {CHANNEL: None}, {CHANNEL: []}, {CHANNEL: "response"}, {CHANNEL: 3.5}, {"other": GOOD},
    *({CHANNEL: {**GOOD, "protocol": value}} for value in (None, 0, 2, "1", [1], {})),
    *({CHANNEL: {**GOOD, "segments": value}} for value in (None, "", ",", "answer", "prompt,prompt", 1, ["prompt"])),
    *({CHANNEL: {**GOOD, "pooling": value}} for value in (None, "max", 1, ["mean"], {})),
    *({CHANNEL: {name: GOOD[name] for name in GOOD if name != gone}} for gone in ("protocol", "segments", "pooling")),
]  # fmt: skip


@pytest.mark.parametrize("custom", GARBAGE, ids=lambda custom: repr(custom)[:80])
def test_what_is_not_understood_is_not_answered(custom: Any) -> None:
    scheduler, req, good = Scheduler(), Req([5, 6], custom=custom), asking(9, 8)
    scheduler.prefill(req, good)
    scheduler.decode(req, good)
    assert not scheduler.capture.needs_uncached_prompt(req)
    assert scheduler.finish(req) == []
    assert_pooled(scheduler.finish(good), good)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(CHANNEL),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*GOOD, CHANNEL]) | st.text(), inner),
)


@given(
    custom=anything
    | st.fixed_dictionaries({CHANNEL: st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, anything))})
)
def test_no_options_end_the_scheduler(custom: Any) -> None:
    scheduler, req = Scheduler(), Req([5, 6], custom=custom)
    scheduler.prefill(req)
    scheduler.decode(req)
    scheduler.finish(req)
    assert len(scheduler.capture.pools) == 0


def test_pools_end_with_an_aborted_request() -> None:
    """An abort tells nobody: SGLang just drops the request."""
    scheduler, req = Scheduler(), asking(9, 8)
    scheduler.prefill(req)
    assert len(scheduler.capture.pools) == 1
    pools = weakref.ref(req)
    del req
    gc.collect()
    assert pools() is None
    assert len(scheduler.capture.pools) == 0


def test_rows_of_a_request_that_left_the_batch_are_dropped() -> None:
    """The scheduler filters a batch in place between a step's launch and its results."""
    scheduler, gone, stays = Scheduler(), asking(9, 8), asking(3, 2)
    scheduler.prefill(gone, stays)
    scheduler.launch(Step("DECODE", [gone, stays], [(2, 3), (2, 3)], [True, True]))
    host, batch, commits = scheduler.waiting[0]
    batch.reqs[:] = [stays]
    scheduler.waiting[0] = (host, batch, commits[1:])
    scheduler.commit()
    for req in (stays, gone):
        counts = {segment: count for segment, (_, count) in unpack_answer(scheduler.finish(req), "row 0").items()}
        assert counts == {"prompt": 2, "response": 1, "full": 2}, "a commit of another request is not this one's"


def test_only_rows_that_are_pooled_are_copied() -> None:
    """A middle chunk of a prompt is one row, its sum. The last one has token 0's too; "last" has those two alone."""
    mean, last = asking(9, 8, 7, 6), asking(9, 8, 7, 6, pooling="last")
    for start, stop, num_rows in ((0, 2, 1), (2, 4, 1 + 1 + 2)):
        reqs = [mean] if stop == 2 else [mean, last]
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(name="EXTEND"),
            reqs=reqs,
            extend_lens=[stop - start] * len(reqs),
            prefix_lens=[start] * len(reqs),
        )
        rows = Capture().plan_step(batch).gather(torch.zeros(2 * len(reqs), HIDDEN_SIZE)).rows_SD
        assert rows.shape == (num_rows, HIDDEN_SIZE)


def test_a_decode_step_copies_only_the_rows_of_those_who_asked() -> None:
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(name="DECODE"), reqs=[Req([1]), asking(2, 3), Req([4]), asking(5)]
    )
    hidden_ND = torch.arange(4.0)[:, None].expand(4, HIDDEN_SIZE).clone()
    rows_SD = Capture().plan_step(batch).gather(hidden_ND).rows_SD
    assert rows_SD[:, 0].tolist() == [1.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rows_are_pooled_in_float32(dtype: torch.dtype) -> None:
    scheduler, req = Scheduler(dtype=dtype), asking(9, 8, 7, 6, 5)
    scheduler.prefill(req)
    for _ in range(4):
        scheduler.decode(req)
    found = unpack_answer(scheduler.finish(req), "row 0")
    rows_TD = torch.stack([state_D(req.ids, position) for position in range(4, 9)]).to(dtype)
    expected_D = rows_TD.double().mean(0)
    torch.testing.assert_close(found["response"][0].double(), expected_D, rtol=1e-6, atol=1e-6)


def test_states_before_the_norm_are_not_taken() -> None:
    scheduler, req = Scheduler(), asking(9, 8)
    scheduler.capture.normed = False
    scheduler.prefill(req)
    assert scheduler.finish(req) == []
