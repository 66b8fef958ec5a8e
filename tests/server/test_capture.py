"""Capture inside the scheduler, step by step: one request, several, and what they are answered with."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.bad_options import CHOICES, GARBAGE, anything, custom_of, logits_of, span_of
from helpers.fake_engine import HIDDEN_SIZE
from helpers.fake_scheduler import (
    DENY,
    LAYERS,
    VOCAB,
    Req,
    Scheduler,
    Step,
    asking,
    capturing,
    choosing,
    counts,
    last,
    states_of,
)
from helpers.reference_pooling import DTYPES, SUBSETS, decode
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import answer_of

from torchrl_sglang_hidden.errors import CapabilityError
from torchrl_sglang_hidden.protocol import CHANNEL, tensors, unpack_answer, unpack_options
from torchrl_sglang_hidden.protocol.shared_memory import MIN_BYTES, SharedFiles, fetch
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.server import capture as capture_module
from torchrl_sglang_hidden.server.prefix_sums import TokensOf
from torchrl_sglang_hidden.spec.hidden import POOLINGS, SEGMENTS
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.places import At, Each, Every, Window
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan

# --- one request ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", SUBSETS, ids="+".join)
@pytest.mark.parametrize("pooling", [*POOLINGS, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_and_decode(segments: Any, pooling: Any, dtype: torch.dtype) -> None:
    """Half rows are pooled in float32, and travel as they are."""
    tokens = pooling is None
    scheduler, req = Scheduler(dtype=dtype), asking(9, 8, 7, segments=segments, pooling=pooling, tokens=tokens)
    scheduler.prefill(req)
    for _ in range(3):
        scheduler.decode(req)
    scheduler.assert_right(req)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("cuts", [[2, 5], [1, 2, 3, 4, 5], [4, 5]])
def test_a_prompt_in_chunks(pooling: Any, tokens: bool, cuts: list[int]) -> None:
    spans = {"p": PromptSpan(((0, 1), (3, 5))), "q": PromptSpan(((1, 3),)), "r": LastTokens(1), **OWN}
    scheduler, req = Scheduler(), asking(9, 8, 7, 6, 5, pooling=pooling, tokens=tokens, layers=(0, -1), spans=spans)
    for start, stop in zip([0, *cuts], cuts, strict=False):
        scheduler.run(Step("EXTEND", [req], [(start, stop)], [stop == 5]))
    scheduler.decode(req)
    scheduler.assert_right(req)


# Spans that are pooled otherwise than their request, of prompt and response.
OWN = {
    "single": PromptSpan(((0, 1), (2, 4)), pooling=None),
    **{f"own {pooling}": PromptSpan(((0, 2), (3, 4)), pooling=pooling) for pooling in POOLINGS},
    "each": Each("b"),
    "mean of each": Each("b", "before", pooling="mean"),
    "at": At("|", "before", pooling="sum"),
    "none": At("z"),
    "window": Window(1, 9, pooling="max"),
    "past": Window(50, 51, pooling=None),
    "every": Every(2),
}


def test_the_markers_are_looked_for_with_special_tokens() -> None:
    scheduler = Scheduler()
    found, unknown = (asking(9, 8, 7, segments=(), spans={"b": Between("|", None)}) for _ in range(2))
    unknown.tokenizer = None
    scheduler.prefill(found, unknown)
    for _ in range(3):
        scheduler.decode(found, unknown)
    assert decode(found.output_ids) == "b|bb"
    scheduler.assert_right(found)
    faults = unpack_answer(scheduler.finish(unknown), "row 0", HIDDEN_SIZE).pools.faults
    assert "no tokenizer" in faults["b"]


def test_nobody_asked_nothing_is_planned() -> None:
    assert capturing().plan_step(Step("EXTEND", [Req([1, 2])], [(0, 2)], [True]).batch()) is None


def test_a_finished_request_opens_no_pools_again() -> None:
    scheduler, req = Scheduler(), asking(9, 8)
    scheduler.prefill(req)
    scheduler.finish(req)
    scheduler.decode(req, commits=[False])
    assert len(scheduler.capture.opened) == 0
    assert answer_of(scheduler.capture, req) == []


def test_slots_that_nobody_has_are_dropped() -> None:
    """Whoever tries one set of layers after another would fill the device with matrices."""
    scheduler, long = Scheduler(), asking(9, 8, layers=(0,))
    capture = scheduler.capture
    capture.reserve(HIDDEN_SIZE, torch.device("cpu"), 4)
    scheduler.prefill(long)
    for layers in ((1,), (2,), (1, 2), (1, 2, -1)):
        short = asking(7, 6, layers=layers)
        scheduler.prefill(short)
        scheduler.assert_right(short)
        del short
    gc.collect()
    scheduler.prefill(asking(5, 4, layers=(2, 1)))
    assert [layers for layers, _ in capture._slots] == [(-1,), (0,), (2, 1)], "reserved, in use, and asked for last"
    scheduler.decode(long)
    scheduler.assert_right(long)


def test_nothing_keeps_a_request_that_was_answered() -> None:
    """The last step's plan would, until the next decode step: its logits and rows with it."""
    scheduler, req = Scheduler(), asking(9, 8)
    scheduler.prefill(req)
    scheduler.decode(req)
    tracked = weakref.ref(scheduler.capture.opened[req])
    scheduler.assert_right(req)
    gc.collect()
    assert tracked() is None


def test_a_request_that_is_not_finished_has_no_answer_yet() -> None:
    scheduler, req = Scheduler(), asking(9, 8)
    scheduler.prefill(req)
    assert answer_of(scheduler.capture, req) == []
    scheduler.decode(req)
    scheduler.assert_right(req)


def test_a_request_that_was_aborted_before_its_first_token() -> None:
    """In the middle of its prompt. The answer is short, and nothing is raised."""
    scheduler, req = Scheduler(), asking(9, 8, 7, tokens=True, spans={"r": LastTokens(1, allow_fewer=True)})
    scheduler.run(Step("EXTEND", [req], [(0, 2)], [False]))
    assert counts(scheduler.finish(req)) == {"prompt": 2, "response": 0, "full": 2}


def test_pools_end_with_a_request_that_is_dropped() -> None:
    """An abort tells nobody: SGLang just drops the request."""
    scheduler, req = Scheduler(), asking(9, 8)
    scheduler.prefill(req)
    assert len(scheduler.capture.opened) == 1
    pools = weakref.ref(req)
    del req
    gc.collect()
    assert pools() is None
    assert len(scheduler.capture.opened) == 0


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("cuts", [[6], [2, 6], [3, 4, 6], [4, 5, 6]])
def test_a_retraction_repeats_prompt_and_tokens(pooling: Any, tokens: bool, cuts: list[int]) -> None:
    scheduler, req = Scheduler(), asking(9, 8, 7, 6, pooling=pooling, tokens=tokens, spans=OWN)
    scheduler.prefill(req)
    scheduler.decode(req)
    for start, stop in zip([0, *cuts], cuts, strict=False):
        scheduler.run(Step("EXTEND", [req], [(start, stop)], [stop == 6]))
    scheduler.decode(req)
    scheduler.assert_right(req)


@pytest.mark.parametrize("mode", ["TARGET_VERIFY", "DRAFT_EXTEND", "IDLE", "SPLIT_PREFILL", "PREBUILT", "DLLM_EXTEND"])
def test_other_forward_modes_are_not_read(mode: str) -> None:
    """Their rows are not one per position; the request comes back short, which the client refuses."""
    scheduler, req = Scheduler(), asking(9, 8, 7)
    scheduler.prefill(req)
    scheduler.run(Step(mode, [req], [(3, 4)], [True]))
    scheduler.decode(req)
    assert counts(scheduler.finish(req))["response"] == 1


@pytest.mark.parametrize("spoiled", [None, torch.zeros(2, HIDDEN_SIZE), torch.zeros(3), torch.zeros(1, 3, HIDDEN_SIZE)])
def test_states_of_another_shape_are_left_out(spoiled: Any) -> None:
    """For any of the layers, and where the states are missing."""
    capture, req = capturing(), asking(9, 8, 7, layers=(0, -1))
    plan = capture.plan_step(Step("EXTEND", [req], [(0, 3)], [True]).batch())
    assert plan.layers == {0, -1}
    good = torch.zeros(3, HIDDEN_SIZE)
    assert plan.gather({0: good, -1: good}) is not None
    assert plan.gather({0: spoiled, -1: good}) is None
    assert plan.gather({0: good, -1: spoiled}) is None
    assert plan.gather({-1: good}) is None
    req.is_finished = True
    assert counts(answer_of(capture, req)) == dict.fromkeys(SEGMENTS, 0)


def test_states_before_the_norm_are_not_taken() -> None:
    scheduler, req = Scheduler(), asking(9, 8)
    scheduler.capture.normed = False
    scheduler.prefill(req)
    assert scheduler.finish(req) == []


# --- several ----------------------------------------------------------------------------------------------------------


def crowd() -> list[Req]:
    """Return requests that want different things of different layers, and some that want nothing."""
    mask = PromptSpan(((0, 1), (2, 3)))
    return [
        Req([4, 4, 4]),
        asking(9, 8, 7),
        asking(5, 4, 3, 2, layers=(2, 0), tokens=True, spans={"m": mask, "r": LastTokens(2, allow_fewer=True)}),
        asking(3, 2, 1, pooling="last", layers=(0,), spans={"m": mask}),
        asking(3, 2, 1, 5, layers=(0,), spans=OWN),
        asking(2, 2, 1, 7, pooling="max", spans=OWN),
        asking(8, 2, 1, segments=(), spans={"s": replace(mask, pooling=None), "x": replace(mask, pooling="max")}),
        Req([1]),
        asking(6, pooling=None, tokens=True, layers=(-1, 2, 1), row_dtype=torch.bfloat16),
        asking(6, 6, pooling=None, tokens=True, segments=("response",), layers=(1,)),
        asking(7, 6, segments=("response",), layers=(0, -1)),
    ]


@pytest.mark.parametrize("mode", ["EXTEND", "MIXED"])
@pytest.mark.parametrize("order", [1, -1])
def test_everybody_gets_their_own(mode: str, order: int) -> None:
    scheduler, reqs = Scheduler(), crowd()[::order]
    scheduler.prefill(*reqs, mode=mode)
    for shift in (0, 3, 5):
        scheduler.decode(*reqs[shift:], *reqs[:shift], padding=shift)
    for req in reqs:
        if req.wanted is None:
            assert scheduler.finish(req) == []
        else:
            scheduler.assert_right(req)
    assert len(scheduler.capture.opened) == 0


def test_a_mixed_step_of_prefill_and_decode() -> None:
    scheduler, early, late = Scheduler(), crowd(), crowd()
    scheduler.prefill(*early)
    mixed = [req for pair in zip(late, early, strict=True) for req in pair]
    spans = [(0, len(req.ids)) if req in late else last(req) for req in mixed]
    scheduler.run(Step("MIXED", mixed, spans, [True] * len(mixed)))
    scheduler.decode(*late, *early)
    for req in mixed:
        if req.wanted is not None:
            scheduler.assert_right(req)


def test_an_overshoot_step_commits_nothing() -> None:
    """With overlap scheduling the step after a request's last token is launched before that token is known."""
    scheduler, req, other = Scheduler(), asking(9, 8, 7, tokens=True), asking(3, 2)
    scheduler.prefill(req, other)
    scheduler.launch(Step("DECODE", [req, other], [(3, 4), (2, 3)], [True, True]))
    scheduler.launch(Step("DECODE", [req, other], [(4, 5), (3, 4)], [False, True]))
    scheduler.commit()
    scheduler.assert_right(req)
    scheduler.commit()
    assert req not in scheduler.capture.opened
    scheduler.assert_right(other)


def test_rows_of_a_request_that_left_the_batch_are_dropped() -> None:
    """The scheduler filters a batch in place between a step's launch and its results."""
    scheduler, gone, stays = Scheduler(), asking(9, 8), asking(3, 2)
    scheduler.prefill(gone, stays)
    scheduler.launch(Step("DECODE", [gone, stays], [(2, 3), (2, 3)], [True, True]))
    hosts, batch, commits = scheduler.waiting[0]
    batch.reqs[:] = [stays]
    scheduler.waiting[0] = (hosts, batch, commits[1:])
    scheduler.commit()
    for req in (stays, gone):
        found = counts(scheduler.finish(req))
        assert found == {"prompt": 2, "response": 1, "full": 2}, "a commit of another request is not this one's"


def test_only_rows_that_are_wanted_are_copied() -> None:
    """A middle chunk is one value per layer. The row that produces a token stays on the device."""
    capture = capturing()

    def copied(step: Step) -> tuple[list[int], int, int]:
        rows = capture.plan_step(step.batch()).gather(dict.fromkeys(LAYERS, torch.zeros(8, HIDDEN_SIZE)))
        seen: list[torch.Tensor] = []
        rows.copy_to_host(lambda tensor: seen.append(tensor) or tensor)
        assert all(tensor.dtype == torch.float32 for tensor in seen)
        produced = sum(len(one.produced_NKD) for one in rows.groups if one.produced_NKD is not None)
        return [tensor.flatten(0, 1).shape[0] for tensor in seen], len(rows.groups), produced

    def chunk(start: int, stop: int, *reqs: Req) -> Step:
        return Step("EXTEND", list(reqs), [(start, stop)] * len(reqs), [True] * len(reqs))

    mean, final = asking(9, 8, 7, 6), asking(9, 8, 7, 6, pooling="last")
    assert copied(chunk(0, 2, mean)) == ([1], 1, 0)
    assert copied(chunk(2, 4, mean, final)) == ([2, 1], 2, 2)  # up to the last token, and to the end; the last alone
    assert copied(chunk(0, 4, asking(9, 8, 7, 6, pooling=None, tokens=True, layers=(0, 2)))) == ([2 * 5], 1, 0)
    assert copied(chunk(0, 2, asking(9, 8, 7, 6, pooling=None, tokens=True, layers=(0, 2)))) == ([2 * 2], 1, 0)
    assert copied(chunk(0, 4, asking(9, 8, 7, 6, segments=("response",), layers=(0, 2, 1)))) == ([], 1, 1)


def test_a_decode_step_copies_only_what_is_wanted_on_the_host() -> None:
    reqs = [Req([1]), asking(2, 3), Req([4]), asking(5, layers=(0, -1))]
    states = {layer: torch.arange(4.0)[:, None].expand(4, HIDDEN_SIZE) + 10 * layer for layer in (-1, 0)}
    rows = capturing().plan_step(Step("DECODE", reqs, [(1, 2)] * 4, [True] * 4).batch()).gather(states)
    found = [one.produced_NKD[..., 0].tolist() for one in rows.groups]
    assert found == [[[-9.0]], [[3.0, -7.0]]]
    assert rows.copy_to_host(lambda tensor: pytest.fail("nothing is wanted there")).groups == rows.groups


def test_a_requests_rows_do_not_keep_those_of_others() -> None:
    """Pages are given back when a request is forgotten, and used again."""
    scheduler = Scheduler()
    for _ in range(5):
        small, big = asking(9, 8, tokens=True), asking(*range(150), tokens=True)
        scheduler.prefill(small, big)
        scheduler.decode(small, big)
        (store,) = scheduler.capture._stores.values()
        assert store._used == 1 + 1 + 3
        scheduler.assert_right(big)
        scheduler.assert_right(small)


def test_rows_are_kept_in_the_scheduler_s_inference_mode() -> None:
    """What is made there may not be written to outside of it, and another thread writes."""
    with torch.inference_mode():
        scheduler, req = Scheduler(), asking(9, 8, tokens=True, spans={"r": LastTokens(1)})
        scheduler.prefill(req)
        scheduler.decode(req)
        scheduler.assert_right(req)


def test_values_of_a_step_do_not_keep_the_whole_step() -> None:
    scheduler = Scheduler()
    small, big = asking(9, 8), asking(*range(50))
    scheduler.prefill(small, big)
    value_KD = scheduler.capture.opened[small].pools._prefix.value_KD
    assert value_KD.untyped_storage().nbytes() == value_KD.nbytes == HIDDEN_SIZE * 4


# --- answers ----------------------------------------------------------------------------------------------------------


def test_many_rows_are_answered_through_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "fetch", lambda name, size: fetch(name, size, tmp_path))
    scheduler, wanted = Scheduler(), Wanted(("prompt",), None, tokens=True)
    scheduler.capture._shared = SharedFiles(tmp_path)
    reqs = [Req([7] * (MIN_BYTES // (4 * HIDDEN_SIZE)), wanted, way=way) for way in ("shared", "text", "binary")]
    scheduler.prefill(*reqs)
    answers = [scheduler.finish(req) for req in reqs]
    assert ["shared" in answer[0]["rows"] for answer in answers] == [True, False, False]
    assert type(answers[1][0]["rows"]["data"]) is str
    assert type(answers[2][0]["rows"]["data"]) is bytes
    for answer in answers:
        rows_NKD = unpack_answer(answer, "row 0", HIDDEN_SIZE).pools.rows.rows_NKD
        assert torch.equal(rows_NKD[:, 0], states_of(reqs[0].origin_input_ids)[:, 0])


def test_an_answer_without_room_is_refused_and_the_others_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "MAX_TEXT_BYTES", 1000)
    scheduler, wanted = Scheduler(), Wanted(("prompt",), None, tokens=True)
    scheduler.capture._shared = SharedFiles(tmp_path, max_bytes=0)
    bad, good = Req([7] * 40, wanted, way="shared"), asking(9, 8)
    scheduler.prefill(bad, good)
    with pytest.raises(CapabilityError, match=r"row 0: .* do not fit into the server's shared memory"):
        unpack_answer(scheduler.finish(bad), "row 0", HIDDEN_SIZE)
    scheduler.assert_right(good)


def test_options_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them at every step would hold up everybody. A refusal is final, because the first rows are gone."""
    read: list[Any] = []

    def reading(custom: Any) -> Any:
        read.append(custom)
        return unpack_options(custom)

    monkeypatch.setattr(capture_module, "unpack_options", reading)
    scheduler, other_layers = Scheduler(), Wanted(("response",), layers=(0,))
    reqs = [Req([1]), Req([5, 6], custom={CHANNEL: "text"}), Req([4, 3], other_layers), asking(9, 8)]
    scheduler.capture.taps.layers = (1, 2)
    scheduler.prefill(*reqs)
    assert len(read) == 4
    scheduler.capture.taps.layers = LAYERS[1:]
    for _ in range(3):
        scheduler.decode(*reqs)
    assert len(read) == 4
    assert [scheduler.finish(req) for req in reqs[:3]] == [[]] * 3
    scheduler.assert_right(reqs[3])
    assert len(read) == 4
    assert len(scheduler.capture._refused) == 3
    reqs.clear()
    gc.collect()
    assert len(scheduler.capture._refused) == 0


@pytest.mark.parametrize("custom", GARBAGE, ids=lambda custom: repr(custom)[:80])
def test_what_is_not_understood_is_not_answered(custom: Any) -> None:
    scheduler, req, good = Scheduler(), Req([5, 6], custom=custom), asking(9, 8)
    scheduler.prefill(req, good)
    scheduler.decode(req, good)
    assert scheduler.finish(req) == []
    scheduler.assert_right(good)


@pytest.mark.parametrize(
    "custom",
    [
        custom_of(segments=[], spans={}),
        custom_of(segments=[], spans={}, pooling=None),
        custom_of(spans={"": ["spec", "prompt", 0, 1]}, pooling="last"),
        custom_of(spans={"p": ["spec", "prompt", 0, 1], "r": ["spec", "last", 1, True]}, pooling=None, tokens=False),
        span_of("prompt", 0, 10**30),
        span_of("prompt", 10**30, 10**31),
        span_of("last", 10**30, True),
        span_of("between", "a" * 10_000, None, "end"),
        custom_of(spans={"": [None, "prompt", 0, 1]}, pooling="mean"),
        span_of("prompt", 0, 4096, pooling=None),
        span_of("window", 0, 10**30, pooling=None),
        span_of("window", 10**30, 10**31),
        span_of("every", 10**30, pooling="max"),
        span_of("each", "a" * 10_000, "before", "error"),
        logits_of(spec={**CHOICES["spec"], "top_k": VOCAB + 1}),
        logits_of(spec={**CHOICES["spec"], "top_k": 10**30}),
        logits_of(spec={**CHOICES["spec"], "top_k": None, "token_ids": [VOCAB]}),
        logits_of(spec={**CHOICES["spec"], "top_k": None, "token_ids": [10**30]}),
        logits_of(constraints=[f'action_mask:{{"valid_token_ids":"{VOCAB}"}}']),
        logits_of(constraints=['disallowed_tokens:{"ids":"0-99999"}']),
        logits_of(constraints=[f'disallowed_tokens:{{"ids":"0-{VOCAB - 1}"}}']),
        logits_of(constraints=[f'disallowed_tokens:{{"ids":"{10**12}"}}']),
        logits_of(prompt_from=10**30),
        logits_of(prompt_from=3),
        logits_of(response_ranges=[-5, 2]),
        logits_of(response_ranges=[1, 10**30]),
        logits_of(response_ranges=[1, 3, 1, 3, 2, 9]),
        logits_of(scored=True, response_ranges=[]),
        logits_of(scored=False),
    ],
    ids=range(29),
)
def test_options_that_no_client_sends_harm_nobody(custom: Any) -> None:
    """They can be read, but ask for what does not exist."""
    scheduler, req, good = Scheduler(), Req([5, 6, 7], custom=custom), asking(9, 8)
    scheduler.capture.prefix_limit(scheduler.capture.open(req), 3)
    scheduler.run(Step("EXTEND", [req, good], [(0, 2), (0, 2)], [False, True]))
    scheduler.run(Step("MIXED", [req, good], [(2, 3), last(good)], [True, True]))
    scheduler.decode(req, good)
    scheduler.finish(req)
    scheduler.assert_right(good)


@pytest.mark.parametrize("asked", [{"top_k": VOCAB + 1}, {"token_ids": (0, VOCAB)}])
@pytest.mark.parametrize("mode", ["EXTEND", "DECODE"])
def test_columns_that_the_model_does_not_have_are_not_taken(asked: Any, mode: str) -> None:
    """The short count of rows tells, and other requests' constraints still act."""
    scheduler, good = Scheduler(), choosing(9, 8, spec=LogitsSpec(full=True), constraints=DENY)
    req = Req([5, 6, 7], logits=WantedLogits(LogitsSpec(**asked, segments=("full",)), prompt_from=1))
    scheduler.prefill(req, good)
    scheduler.decode(req, good)
    found = unpack_answer(scheduler.finish(req), "row 0", HIDDEN_SIZE).logits
    assert (found.response, found.prompt, found.constrained) == (None, None, 0)
    scheduler.assert_right(good)


@pytest.mark.parametrize(("layers", "problem"), [((-1, 99), ""), ((-7,), ""), ((3,), ""), ((0,), "Gemma 9")])
def test_a_layer_that_this_server_does_not_take_costs_nobody_else_their_rows(
    layers: tuple[int, ...], problem: str
) -> None:
    scheduler, req, good = Scheduler(), asking(5, 6, 7, layers=layers), asking(9, 8)
    scheduler.capture.taps.problem = problem
    scheduler.prefill(req, good)
    scheduler.decode(good, req)
    assert scheduler.finish(req) == []
    scheduler.assert_right(good)


@settings(max_examples=60)
@given(
    custom=anything
    | st.fixed_dictionaries({}, optional=dict.fromkeys(["layers", "segments", "spans", "pooling"], anything)).map(
        lambda changes: custom_of(**changes)
    )
    | st.fixed_dictionaries({}, optional=dict.fromkeys(CHOICES, anything)).map(lambda changes: logits_of(**changes))
    | st.fixed_dictionaries({}, optional=dict.fromkeys(CHOICES["spec"], anything)).map(
        lambda changes: logits_of(spec={**CHOICES["spec"], **changes})
    )
    | st.lists(anything, max_size=4).flatmap(
        lambda values: st.sampled_from(["prompt", "last", "between"]).map(lambda kind: span_of(kind, *values))
    )
)
def test_no_options_end_the_scheduler(custom: Any) -> None:
    scheduler, req = Scheduler(), Req([5, 6], custom=custom)
    scheduler.prefill(req)
    scheduler.decode(req)
    scheduler.finish(req)
    assert len(scheduler.capture.opened) == 0


@given(prompt=st.lists(st.integers(0, 9), min_size=1), response=st.lists(st.integers(0, 9)), data=st.data())
def test_prompt_and_response_are_read_as_one(prompt: list[int], response: list[int], data: st.DataObject) -> None:
    req = Req(prompt)
    req.output_ids = response
    tokens, ids = TokensOf(req), prompt + response
    start, stop = (data.draw(st.none() | st.integers(0, len(ids) + 2)) for _ in range(2))
    assert (len(tokens), tokens[start:stop]) == (len(ids), ids[start:stop])
    del req
    gc.collect(0)
    assert (len(tokens), tokens[0:3]) == (0, []), "and their reader does not keep the request"


def test_a_tokenizer_that_fails_is_a_fault_of_the_span() -> None:
    """It is anybody's code, and runs inside the scheduler."""

    def fail(*args: Any, **kwargs: Any) -> str:
        raise IndexError("piece id is out of range")

    scheduler, req = Scheduler(), asking(9, 8, 7, spans={"thought": Between("a", "b")})
    req.tokenizer = SimpleNamespace(decode=fail)
    scheduler.prefill(req)
    faults = unpack_answer(scheduler.finish(req), "row 0", HIDDEN_SIZE).pools.faults
    assert re.search(r"tokenizer cannot read .*piece id is out of range", faults["thought"])
