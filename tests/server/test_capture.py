"""Capture inside the scheduler, step by step, with batches and requests of SGLang's shape.

`Scheduler` here drives what SGLang drives: it plans, "runs" the model, copies, commits and consumes, in that order. The
states are those of helpers/fake_engine.py, so a pool that got a wrong row has a wrong value. `World` adds a prefix
cache, and goes through the plugin's hooks as SGLang does.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.bad_options import CHOICES, GARBAGE, anything, custom_of, logits_of, span_of
from helpers.fake_engine import HIDDEN_SIZE, of_layer
from helpers.reference_pooling import DTYPES, SUBSETS, Case, assert_pools, decode, wanted_of
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sglang_hidden.errors import CapabilityError, ConstraintError, SpanError
from torchrl_sglang_hidden.protocol import CHANNEL, pack_options, unpack_answer, unpack_options
from torchrl_sglang_hidden.protocol import tensors as blocks
from torchrl_sglang_hidden.protocol.shared_memory import MIN_BYTES, SharedFiles, fetch
from torchrl_sglang_hidden.reduce.pooling import BLOCK, Wanted
from torchrl_sglang_hidden.reduce.token_logits import WantedLogits, select_columns
from torchrl_sglang_hidden.server import capture as capture_module
from torchrl_sglang_hidden.server import plugin
from torchrl_sglang_hidden.server.capture import Capture, _Tokens
from torchrl_sglang_hidden.server.next_tokens import HostLogits, StepLogits
from torchrl_sglang_hidden.server.prefix_sums import ENTRY_BYTES
from torchrl_sglang_hidden.server.step_rows import HostRows
from torchrl_sglang_hidden.spec.constraints import ActionMask, ConstraintStep, DisallowedTokens, LogitConstraint
from torchrl_sglang_hidden.spec.hidden import POOLINGS, SEGMENTS
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan

POISON = 1e4  # the value of rows that belong to nobody
LAYERS = (-1, 0, 1, 2)
VOCAB = 9
HEAD_DV = torch.randn(HIDDEN_SIZE, VOCAB, generator=torch.Generator().manual_seed(0))
TOKENIZER = SimpleNamespace(
    decode=lambda ids, *, skip_special_tokens, clean_up_tokenization_spaces: (
        decode(ids) if not (skip_special_tokens or clean_up_tokenization_spaces) else "?"
    )
)


def states_of(ids: list[int], layers: tuple[int, ...] = LAYERS) -> torch.Tensor:
    """`recorder.state_D` of every position, ``[N, K, D]``: of the tokens up to there."""
    ids_N = torch.tensor(ids)
    before_N = torch.cat([torch.zeros(1, dtype=torch.int64), ids_N[:-1]])
    angles_ND = torch.arange(1, HIDDEN_SIZE + 1) * (1.0 + ids_N)[:, None]
    last_ND = torch.sin(angles_ND + (0.37 * before_N + torch.arange(len(ids)))[:, None])
    return torch.stack([of_layer(last_ND, layer) for layer in layers], 1)


def capturing() -> Capture:
    """A server that was started for all layers."""
    capture = Capture()
    capture.taps.layers = LAYERS[1:]
    return capture


class Req:
    """A request as the scheduler holds it."""

    def __init__(
        self,
        prompt_ids: list[int],
        wanted: Wanted | None = None,
        custom: Any = None,
        way: Any = "binary",
        logits: WantedLogits | None = None,
    ) -> None:
        self.wanted = Wanted((), None) if wanted is None and logits is not None else wanted
        self.logits = logits
        if self.wanted is not None:
            custom = {CHANNEL: pack_options(self.wanted, way, logits)}
        self.origin_input_ids = prompt_ids
        self.output_ids: list[int] = []
        self.sampling_params = SimpleNamespace(custom_params=custom, max_new_tokens=9)
        self.extra_key: str | None = None
        self.session: Any = None
        self.multimodal_inputs: Any = None
        self.tokenizer = TOKENIZER
        self.is_finished = False
        self.prefix_len = self.host_hit_length = 0

    @property
    def ids(self) -> list[int]:
        return self.origin_input_ids + self.output_ids

    @property
    def output_ids_through_stop(self) -> list[int]:
        return self.output_ids

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

    def batch(self) -> Any:
        extends = self.mode != "DECODE"
        return SimpleNamespace(
            forward_mode=SimpleNamespace(name=self.mode),
            reqs=list(self.reqs),
            extend_lens=[stop - start for start, stop in self.spans] if extends else None,
            prefix_lens=[start for start, _ in self.spans] if extends else None,
            seq_lens_cpu=torch.tensor([stop for _, stop in self.spans]),
        )


@dataclass
class Scheduler:
    capture: Capture = field(default_factory=capturing)
    dtype: torch.dtype = torch.float32
    waiting: list[tuple[list[HostRows | HostLogits], Any, list[Any]]] = field(default_factory=list)

    def run(self, step: Step) -> None:
        self.launch(step)
        self.commit()

    def launch(self, step: Step) -> None:
        """Forward pass and copy. The device's buffers are overwritten at once, as a CUDA graph's are."""
        batch = step.batch()
        plan = self.capture.plan_step(batch)
        step_logits = self.capture.plan_logits(batch, VOCAB)
        parts = [states_of([*req.ids, 0])[start:stop] for req, (start, stop) in zip(step.reqs, step.spans, strict=True)]
        parts.append(torch.full((step.padding, len(LAYERS), HIDDEN_SIZE), POISON))
        states = {
            layer: rows.to(self.dtype).clone() for layer, rows in zip(LAYERS, torch.cat(parts).unbind(1), strict=True)
        }
        devices = [plan.gather(states) if plan is not None else None]
        if step_logits is not None:
            devices.append(self.choose(step, step_logits, states[-1]))
        for state_ND in states.values():
            state_ND.fill_(POISON)
        hosts = [device.copy_to_host(torch.clone) for device in devices if device is not None]
        commits: list[Any] = []
        for req, commits_one in zip(step.reqs, step.commits, strict=True):
            commits.append(SimpleNamespace(output_index=len(req.output_ids)) if commits_one else None)
            if commits_one:
                req.output_ids.append((len(req.ids) + req.ids[-1]) % 3)
        self.waiting.append((hosts, batch, commits))

    def choose(self, step: Step, step_logits: StepLogits, last_ND: torch.Tensor) -> Any:
        """What the head and the sampler see of a step."""
        ends = torch.tensor([stop - start for start, stop in step.spans]).cumsum(0) - 1
        ids = [i for req, (start, stop) in zip(step.reqs, step.spans, strict=True) for i in [*req.ids, 0][start:stop]]
        step_logits.input_ids = torch.tensor(ids + [77] * step.padding)
        step_logits.take_prompts(last_ND, head)
        next_BV = head(last_ND[ends])
        step_logits.take_raw(next_BV)
        step_logits.constrain(next_BV, torch.ones(len(step.reqs), 1))
        device = step_logits.taken()
        next_BV.fill_(POISON)
        return device

    def commit(self) -> None:
        hosts, batch, commits = self.waiting.pop(0)
        for host in hosts:
            host.consume(batch, commits)

    def prefill(self, *reqs: Req, mode: str = "EXTEND") -> None:
        self.run(Step(mode, list(reqs), [(0, len(req.ids)) for req in reqs], [True] * len(reqs)))

    def decode(self, *reqs: Req, commits: list[bool] | None = None, padding: int = 0) -> None:
        self.run(Step("DECODE", list(reqs), [last(req) for req in reqs], commits or [True] * len(reqs), padding))

    def finish(self, req: Req) -> list[dict[str, Any]]:
        req.is_finished = True
        return self.capture.answer(req)

    def assert_right(self, req: Req) -> None:
        """Finishes the request, and holds its answer against plain torch."""
        wanted = req.wanted
        assert wanted is not None
        case = Case(
            wanted,
            len(req.origin_input_ids),
            tuple(req.output_ids),
            states_of(req.ids[:-1], wanted.layers).to(self.dtype),
        )
        answer = self.finish(req)
        missing = [name for name in wanted.spans if case.rows(name) is None]
        if missing:
            with pytest.raises(SpanError, match=rf"row 0, span '{missing[0]}'"):
                unpack_answer(answer, "row 0", HIDDEN_SIZE)
        else:
            found = unpack_answer(answer, "row 0", HIDDEN_SIZE)
            assert_pools(case, found.pools)
            if req.logits is None:
                assert found.logits is None
            else:
                states_ND = states_of(req.ids[:-1], (-1,))[:, 0].to(self.dtype)
                assert_logits(req, head(states_ND), found.logits)


def head(states_ND: torch.Tensor) -> torch.Tensor:
    return states_ND.float() @ HEAD_DV


DENIED = 1


def assert_logits(req: Req, raw_NV: torch.Tensor, found: Any) -> None:
    """All that was wanted is there. Of constraints `DisallowedTokens` of one token is known here."""
    wanted, num_prompt = req.logits, len(req.origin_input_ids)
    assert wanted is not None
    processed_NV = raw_NV.clone()
    denied = range(num_prompt - 1, len(raw_NV)) if wanted.constrains_sampled else ()
    if wanted.scored:
        denied = [token - 1 for start, stop in wanted.response_ranges for token in range(start, stop)]
    if wanted.constraints:
        processed_NV[list(denied), DENIED] = -torch.inf
    assert found.constrained == (len(req.output_ids) if wanted.wants_sampled else 0)
    first = num_prompt if wanted.prompt_from is None else wanted.prompt_from
    if wanted.scored and first < num_prompt:
        ids = torch.tensor(req.origin_input_ids[first:])[:, None]
        log_probs_N = processed_NV[first - 1 : num_prompt - 1].log_softmax(-1).gather(1, ids)[:, 0]
        torch.testing.assert_close(found.log_probs_N, log_probs_N)
    else:
        assert found.log_probs_N is None
    spec = wanted.spec
    for rows, places, asked in (
        (found.response, slice(num_prompt - 1, None), spec is not None and spec.of_response),
        (found.prompt, slice(first - 1, num_prompt - 1), spec is not None and spec.of_prompt and first < num_prompt),
    ):
        assert (rows is not None) is asked
        if rows is not None:
            expected = select_columns((raw_NV if spec.stage == "raw" else processed_NV)[places], spec)
            torch.testing.assert_close(rows.values_NC, expected.values_NC)
            assert spec.top_k is None or torch.equal(rows.token_ids_NC, expected.token_ids_NC)


def last(req: Req) -> tuple[int, int]:
    return len(req.ids) - 1, len(req.ids)


def asking(*prompt_ids: int, pooling: Any = "mean", segments: Any = SEGMENTS, **more: Any) -> Req:
    return Req(list(prompt_ids), Wanted(segments, pooling, **more))


DENY = (DisallowedTokens((DENIED,)),)


def choosing(*prompt_ids: int, wanted: Wanted | None = None, **logits: Any) -> Req:
    return Req(list(prompt_ids), wanted, logits=WantedLogits(**logits))


def counts(answer: Any) -> dict[str, int]:
    found = unpack_answer(answer, "row 0", HIDDEN_SIZE).pools
    return {segment: count for segment, (_, count) in found.segments.items()}


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
    spans = {"p": PromptSpan(((0, 1), (3, 5))), "q": PromptSpan(((1, 3),)), "r": LastTokens(1)}
    scheduler, req = Scheduler(), asking(9, 8, 7, 6, 5, pooling=pooling, tokens=tokens, layers=(0, -1), spans=spans)
    for start, stop in zip([0, *cuts], cuts, strict=False):
        scheduler.run(Step("EXTEND", [req], [(start, stop)], [stop == 5]))
    scheduler.decode(req)
    scheduler.assert_right(req)


def test_the_markers_are_looked_for_with_special_tokens() -> None:
    scheduler = Scheduler()
    found, unknown = (asking(9, 8, 7, segments=(), spans={"b": Between("|", None)}) for _ in range(2))
    unknown.tokenizer = None
    scheduler.prefill(found, unknown)
    for _ in range(3):
        scheduler.decode(found, unknown)
    assert decode(found.output_ids) == "b|bb"
    scheduler.assert_right(found)
    with pytest.raises(SpanError, match="no tokenizer"):
        unpack_answer(scheduler.finish(unknown), "row 0", HIDDEN_SIZE)


def test_nobody_asked_nothing_is_planned() -> None:
    assert capturing().plan_step(Step("EXTEND", [Req([1, 2])], [(0, 2)], [True]).batch()) is None


def test_a_finished_request_opens_no_pools_again() -> None:
    scheduler, req = Scheduler(), asking(9, 8)
    scheduler.prefill(req)
    scheduler.finish(req)
    scheduler.decode(req, commits=[False])
    assert len(scheduler.capture.opened) == 0
    assert scheduler.capture.answer(req) == []


def test_a_request_that_is_not_finished_has_no_answer_yet() -> None:
    scheduler, req = Scheduler(), asking(9, 8)
    scheduler.prefill(req)
    assert scheduler.capture.answer(req) == []
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
    scheduler, req = Scheduler(), asking(9, 8, 7, 6, pooling=pooling, tokens=tokens)
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
    """Of any of the layers, or not there at all."""
    capture, req = capturing(), asking(9, 8, 7, layers=(0, -1))
    plan = capture.plan_step(Step("EXTEND", [req], [(0, 3)], [True]).batch())
    assert plan.layers == {0, -1}
    good = torch.zeros(3, HIDDEN_SIZE)
    assert plan.gather({0: good, -1: good}) is not None
    assert plan.gather({0: spoiled, -1: good}) is None
    assert plan.gather({0: good, -1: spoiled}) is None
    assert plan.gather({-1: good}) is None
    req.is_finished = True
    assert counts(capture.answer(req)) == dict.fromkeys(SEGMENTS, 0)


def test_states_before_the_norm_are_not_taken() -> None:
    scheduler, req = Scheduler(), asking(9, 8)
    scheduler.capture.normed = False
    scheduler.prefill(req)
    assert scheduler.finish(req) == []


# --- several ----------------------------------------------------------------------------------------------------------


def crowd() -> list[Req]:
    """Requests that want different things of different layers, and some that want nothing."""
    mask = PromptSpan(((0, 1), (2, 3)))
    return [
        Req([4, 4, 4]),
        asking(9, 8, 7),
        asking(5, 4, 3, 2, layers=(2, 0), tokens=True, spans={"m": mask, "r": LastTokens(2, allow_fewer=True)}),
        asking(3, 2, 1, pooling="last", layers=(0,), spans={"m": mask}),
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
    """A middle chunk is one row per layer, its sum. The last one has token 0's too; "last" has those two alone."""

    capture = capturing()

    def copied(step: Step) -> tuple[int, int]:
        rows = capture.plan_step(step.batch()).gather(dict.fromkeys(LAYERS, torch.zeros(8, HIDDEN_SIZE)))
        assert rows.values_MD.dtype == torch.float32
        return len(rows.values_MD), 0 if rows.rows_ND is None else len(rows.rows_ND)

    def chunk(start: int, stop: int, *reqs: Req) -> Step:
        return Step("EXTEND", list(reqs), [(start, stop)] * len(reqs), [True] * len(reqs))

    mean, final = asking(9, 8, 7, 6), asking(9, 8, 7, 6, pooling="last")
    assert copied(chunk(0, 2, mean)) == (1, 0)
    assert copied(chunk(2, 4, mean, final)) == (2 + 1 + 1 + 1, 0)  # up to the last token, and that; then token 0's
    assert copied(chunk(0, 4, asking(9, 8, 7, 6, pooling=None, tokens=True, layers=(0, 2)))) == (2, 8)
    assert copied(chunk(0, 2, asking(9, 8, 7, 6, pooling=None, tokens=True, layers=(0, 2)))) == (0, 4)
    assert copied(chunk(0, 4, asking(9, 8, 7, 6, segments=("response",), layers=(0, 2, 1)))) == (3, 0)


def test_a_decode_step_copies_only_the_rows_of_those_who_asked() -> None:
    reqs = [Req([1]), asking(2, 3), Req([4]), asking(5, layers=(0, -1))]
    states = {layer: torch.arange(4.0)[:, None].expand(4, HIDDEN_SIZE) + 10 * layer for layer in (-1, 0)}
    rows = capturing().plan_step(Step("DECODE", reqs, [(1, 2)] * 4, [True] * 4).batch()).gather(states)
    assert (rows.values_MD[:, 0].tolist(), rows.rows_ND) == ([-9.0, 3.0, -7.0], None)


def test_a_requests_rows_do_not_keep_the_whole_step() -> None:
    scheduler = Scheduler()
    small, big = asking(9, 8, tokens=True), asking(*range(50), tokens=True)
    scheduler.prefill(small, big)
    rows_NKD = scheduler.capture.opened[small].pools._prompt_rows[0]
    assert rows_NKD.untyped_storage().nbytes() == rows_NKD.nbytes == 2 * HIDDEN_SIZE * 4


# --- answers ----------------------------------------------------------------------------------------------------------


def test_many_rows_are_answered_through_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "fetch", lambda name: fetch(name, tmp_path))
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
    monkeypatch.setattr(blocks, "MAX_TEXT_BYTES", 1000)
    scheduler, wanted = Scheduler(), Wanted(("prompt",), None, tokens=True)
    scheduler.capture._shared = SharedFiles(tmp_path, max_bytes=0)
    bad, good = Req([7] * 40, wanted, way="shared"), asking(9, 8)
    scheduler.prefill(bad, good)
    with pytest.raises(CapabilityError, match=r"row 0: .*no room in the server's shared memory"):
        unpack_answer(scheduler.finish(bad), "row 0", HIDDEN_SIZE)
    scheduler.assert_right(good)


def test_options_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its steps they would hold up everybody. Who is refused is so for good, as its first rows are gone."""
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
        custom_of(spans={"": ["prompt", 0, 1]}, pooling="last"),
        custom_of(spans={"p": ["prompt", 0, 1], "r": ["last", 1, True]}, pooling=None, tokens=False),
        span_of("prompt", 0, 10**30),
        span_of("prompt", 10**30, 10**31),
        span_of("last", 10**30, True),
        span_of("between", "a" * 10_000, None, "end"),
        logits_of(spec={**CHOICES["spec"], "top_k": VOCAB + 1}),
        logits_of(spec={**CHOICES["spec"], "top_k": 10**30}),
        logits_of(spec={**CHOICES["spec"], "top_k": None, "token_ids": [VOCAB]}),
        logits_of(spec={**CHOICES["spec"], "top_k": None, "token_ids": [10**30]}),
        logits_of(constraints=[f'action_mask:{{"valid_token_ids":"{VOCAB}"}}']),
        logits_of(constraints=['disallowed_tokens:{"ids":"0-99999"}']),
        logits_of(constraints=[f'disallowed_tokens:{{"ids":"0-{VOCAB - 1}"}}']),
        logits_of(constraints=[f'disallowed_tokens:{{"ids":"{10**30}"}}']),
        logits_of(prompt_from=10**30),
        logits_of(prompt_from=3),
        logits_of(response_ranges=[-5, 2]),
        logits_of(response_ranges=[1, 10**30]),
        logits_of(response_ranges=[1, 3, 1, 3, 2, 9]),
        logits_of(scored=True, response_ranges=[]),
        logits_of(scored=False),
    ],
    ids=range(23),
)
def test_options_that_no_client_sends_harm_nobody(custom: Any) -> None:
    """They can be understood, and ask for what is not there."""
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
    """The count of rows then tells, and the constraints of the others are kept."""
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
    tokens, ids = _Tokens(req), prompt + response
    start, stop = (data.draw(st.none() | st.integers(0, len(ids) + 2)) for _ in range(2))
    assert (len(tokens), tokens[start:stop]) == (len(ids), ids[start:stop])
    del req
    gc.collect(0)
    assert (len(tokens), tokens[0:3]) == (0, []), "and their reader does not keep the request"


# --- the prefix cache -------------------------------------------------------------------------------------------------


PROMPT = list(range(200))


def computed(capture: Capture, *lengths: int, extra_key: str | None = None, **wanted: Any) -> None:
    """Requests that left their sums behind: over all of a prompt of this length, and over all but its last token."""
    scheduler = Scheduler(capture)
    for length in lengths:
        req = asking(*PROMPT[:length], segments=("prompt",), **wanted)
        req.extra_key = extra_key
        scheduler.prefill(req)
        scheduler.assert_right(req)


def limit_of(capture: Capture, length: int = 200, extra_key: str | None = None, done: int = 0, **wanted: Any) -> int:
    req = asking(*PROMPT, **{"segments": ("prompt",), **wanted})
    req.extra_key = extra_key
    if done:
        Scheduler(capture).run(Step("EXTEND", [req], [(0, done)], [False]))
    return capture.prefix_limit(capture.open(req), length)


MASK = {"m": PromptSpan(((100, 110),))}


@pytest.mark.parametrize(
    ("wanted", "without", "with_150"),
    [
        ({}, 0, 150),
        ({"segments": ("full",)}, 0, 150),
        ({"pooling": "sum"}, 0, 150),  # a mean's sums are sums
        ({"pooling": "max"}, 0, 0),  # and no maxima
        ({"segments": ("response",)}, 200, 200),
        ({"segments": ("prompt",), "pooling": "last"}, 199, 199),
        ({"segments": ("full",), "pooling": "last"}, 200, 200),
        ({"tokens": True}, 0, 0),
        ({"segments": ("response",), "tokens": True}, 200, 200),
        ({"spans": MASK}, 0, BLOCK),
        ({"segments": (), "spans": MASK}, 100, 100),
        ({"segments": (), "spans": MASK, "pooling": "last"}, 109, 109),
        ({"segments": (), "spans": {"r": LastTokens(2)}}, 200, 200),
        ({"layers": (-1, 0)}, 0, 0),
        ({"layers": (0,)}, 0, 0),
        ({"extra_key": "lora"}, 0, 0),
        ({"length": 149}, 0, 149),
        ({"length": 148}, 0, 2 * BLOCK),
        ({"length": 2 * BLOCK - 1}, 0, BLOCK),
        ({"done": 70}, 70, 150),
        ({"done": 70, "length": 60}, 60, 60),
        ({"done": 70, "tokens": True}, 70, 70),
        ({"done": 70, "segments": (), "spans": MASK}, 100, 100),
        ({"done": 105, "segments": (), "spans": MASK}, 105, 105),
        ({"done": 110, "segments": (), "spans": MASK}, 200, 200),
        ({"done": 160}, 160, 160),
        ({"done": 200}, 200, 200),
    ],
)
def test_how_far_a_request_may_hit_the_prefix_cache(wanted: Any, without: int, with_150: int) -> None:
    """Where nothing is kept, and where a prompt of 150 that begins alike was computed."""
    capture = capturing()
    assert limit_of(capture, **wanted) == without
    computed(capture, 150)
    assert limit_of(capture, **wanted) == with_150


def test_a_hit_ends_where_a_page_does() -> None:
    capture = capturing()
    computed(capture, 90)
    capture.page_size = 16
    assert limit_of(capture) == BLOCK
    computed(capture, 97)  # all but its last token are six pages
    assert limit_of(capture) == 96


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
def test_a_maximum_has_a_maximum_kept(pooling: Any) -> None:
    capture = capturing()
    computed(capture, 150, pooling=pooling)
    found = {other: limit_of(capture, pooling=other) for other in ("mean", "sum", "max")}
    assert found == {other: 150 if (other == "max") is (pooling == "max") else 0 for other in found}


def test_sums_of_other_layers_and_adapters_are_their_own() -> None:
    capture = capturing()
    computed(capture, 150, layers=(0, -1))
    computed(capture, 100, extra_key="lora")
    assert limit_of(capture) == 0
    assert limit_of(capture, layers=(0, -1)) == 150
    assert limit_of(capture, extra_key="lora") == 100


@pytest.mark.parametrize("start", [BLOCK, 149, 150])
def test_a_request_that_hits_a_kept_sum_is_complete(start: int) -> None:
    capture = capturing()
    computed(capture, 150)
    scheduler, req = Scheduler(capture), asking(*PROMPT)
    assert capture.prefix_limit(capture.open(req), start) == start
    scheduler.run(Step("EXTEND", [req], [(start, 170)], [False]))
    scheduler.run(Step("EXTEND", [req], [(170, 200)], [True]))
    scheduler.decode(req)
    scheduler.assert_right(req)


def test_a_response_is_a_beginning_too() -> None:
    """Of the prompt of a chat's next turn."""
    scheduler = Scheduler()
    first = asking(*PROMPT[:50], segments=("full",))
    scheduler.prefill(first)
    for _ in range(BLOCK):
        scheduler.decode(first)
    scheduler.assert_right(first)
    second = asking(*first.ids, 5, 6, segments=("prompt",))
    assert scheduler.capture.prefix_limit(scheduler.capture.open(second), len(second.ids)) == len(first.ids) - 1
    assert scheduler.capture.prefix_limit(scheduler.capture.open(second), len(first.ids) - 2) == BLOCK
    assert scheduler.capture.prefix_limit(scheduler.capture.open(second), len(first.ids) - 1) == len(first.ids) - 1
    scheduler.run(Step("EXTEND", [second], [(len(first.ids) - 1, len(second.ids))], [True]))
    scheduler.assert_right(second)


@pytest.mark.parametrize("hit", [1, 3])
def test_a_hit_without_a_sum_leaves_the_count_short(hit: int) -> None:
    scheduler, req = Scheduler(), asking(9, 8, 7, 6)
    scheduler.run(Step("EXTEND", [req], [(hit, 4)], [True]))
    assert counts(scheduler.finish(req)) == {"prompt": 0, "response": 1, "full": 0}


def test_a_hit_elsewhere_than_the_sum_that_was_looked_up_leaves_the_count_short() -> None:
    """A wrong sum would give a wrong mean with the right count."""
    capture = capturing()
    computed(capture, 150)
    scheduler, req = Scheduler(capture), asking(*PROMPT, segments=("prompt",))
    assert capture.prefix_limit(capture.open(req), 200) == 150
    scheduler.run(Step("EXTEND", [req], [(130, 200)], [True]))
    assert counts(scheduler.finish(req)) == {"prompt": 0}


def test_after_a_flush_nothing_older_is_used_or_kept() -> None:
    """The weights may be others: states from before and after do not mix."""
    capture = capturing()
    scheduler, old = Scheduler(capture), asking(*PROMPT, segments=("prompt",))
    scheduler.run(Step("EXTEND", [old], [(0, 10)], [False]))
    computed(capture, 150)
    assert capture.sums.bytes > 0
    capture.forget_sums()
    assert capture.sums.bytes == 0
    assert limit_of(capture) == 0
    scheduler.run(Step("EXTEND", [old], [(10, 100)], [False]))
    assert capture.sums.bytes == 0, "of one that began before"
    computed(capture, 150)
    assert limit_of(capture) == 150
    assert capture.prefix_limit(capture.open(old), 200) == 100, "one that began before gets none that began after"
    scheduler.run(Step("EXTEND", [old], [(100, 200)], [True]))
    before = capture.sums.bytes
    scheduler.finish(old)
    assert capture.sums.bytes == before


def test_kept_sums_are_handed_on_once() -> None:
    scheduler, req = Scheduler(), asking(*PROMPT)
    scheduler.prefill(req)
    assert scheduler.capture.opened[req].pools.sums == []
    lengths = {BLOCK, 2 * BLOCK, 3 * BLOCK, 199, 200}
    assert scheduler.capture.sums.bytes == sum(HIDDEN_SIZE * 4 + 8 * (n % BLOCK) + ENTRY_BYTES for n in lengths)


class World(Scheduler):
    """A scheduler with a prefix cache, chunks, retractions and evictions, through the plugin's hooks."""

    def __init__(self, data: st.DataObject, page_size: int) -> None:
        super().__init__()
        self.data = data
        self.tree_cache = SimpleNamespace(page_size=page_size, supports_mamba=lambda: False)
        self.cached: list[tuple[str | None, list[int]]] = []
        self.queue: list[Req] = []
        self.chunked: Req | None = None
        self.running: list[Req] = []

    def match(self, req: Req, tree_cache: Any, cow_mamba: Any) -> None:
        """SGLang's own `init_next_round_input`, as far as it is about the prefix."""
        limit = len(req.ids) - 1
        given = plugin.after_max_prefix_len(limit, req, len(req.ids))
        limit = limit if given is None else given
        shared = (
            next((i for i, (a, b) in enumerate(zip(ids, req.ids, strict=False)) if a != b), min(len(ids), len(req.ids)))
            for key, ids in self.cached
            if key == req.extra_key
        )
        size = self.tree_cache.page_size
        req.prefix_len = min(max(shared, default=0), limit) // size * size

    def act(self) -> None:
        what = self.data.draw(st.sampled_from(["step", "step", "step", "retract", "evict", "flush"]))
        if what == "step":
            self.step()
        elif what == "retract" and (self.running or self.chunked):
            self.settle()
            req = self.data.draw(st.sampled_from([*self.running, *([self.chunked] if self.chunked else [])]))
            self.cached.append((req.extra_key, req.ids[: req.prefix_len]))
            if req is self.chunked:
                self.chunked = None
            else:
                self.running.remove(req)
            self.queue.append(req)
        elif what == "evict" and self.cached:
            place = self.data.draw(st.integers(0, len(self.cached) - 1))
            key, ids = self.cached.pop(place)
            self.cached.append((key, ids[: self.data.draw(st.integers(0, len(ids)))]))
        elif what == "flush":
            self.cached.clear()
            plugin.after_flush_cache(True, self)

    def step(self) -> None:
        """One chunk, all that decode, or both; its results may wait for the next one."""
        if self.chunked is None and self.queue:
            self.settle()
            self.chunked = self.queue.pop(0)
            plugin.around_match_prefix(self.match, self.chunked, self.tree_cache)
        reqs, spans, commits = [], [], []
        mixed = self.data.draw(st.booleans())
        if self.chunked is not None:
            req, end = self.chunked, len(self.chunked.ids)
            stop = min(req.prefix_len + self.data.draw(st.sampled_from([5, BLOCK, 1000])), end)
            reqs, spans, commits = [req], [(req.prefix_len, stop)], [stop == end]
            req.prefix_len = stop
        if self.chunked is None or mixed:
            reqs += self.running
            spans += [last(req) for req in self.running]
            commits += [True] * len(self.running)
            for req in self.running:
                req.prefix_len = len(req.ids)
        if not reqs:
            return
        self.launch(Step("DECODE" if self.chunked is None else "MIXED" if mixed else "EXTEND", reqs, spans, commits))
        if len(self.waiting) > 1 or self.data.draw(st.booleans()):
            self.commit()
        if self.chunked is not None and commits[0]:
            self.running.append(self.chunked)
            self.chunked = None
        for req in [*self.running]:
            if len(req.output_ids) == req.target:
                self.settle()
                self.running.remove(req)
                self.cached.append((req.extra_key, req.ids[:-1]))
                if req.wanted is not None:
                    self.assert_right(req)

    def settle(self) -> None:
        while self.waiting:
            self.commit()


prompts = st.builds(
    lambda base, length, tail: [base] * length + tail,
    st.sampled_from([3, 4]),
    st.sampled_from([0, 3, BLOCK - 1, BLOCK, 2 * BLOCK + 5]),
    st.lists(st.integers(3, 5), min_size=1, max_size=4),
)


@st.composite
def chosen_of(draw: st.DrawFn, num_prompt: int) -> WantedLogits:
    """Anything that a client asks of the logits of a prompt of this length."""
    columns = draw(st.sampled_from([None, {"full": True}, {"top_k": 2}, {"token_ids": (4, DENIED)}]))
    stage = draw(st.sampled_from(["raw", "processed"]))
    segments = draw(st.sampled_from([("response",), ("prompt",), ("full",)]))
    spec = None if columns is None else LogitsSpec(**columns, stage=stage, segments=segments)
    scored = num_prompt > 1 and draw(st.booleans())
    responses = ()
    if scored:
        start = draw(st.integers(1, num_prompt - 1))
        responses = ((start, draw(st.integers(start + 1, num_prompt))),)
    given = 1 if spec is not None and spec.of_prompt else draw(st.integers(1, num_prompt - 1)) if scored else None
    constraints = DENY if scored or spec is None or draw(st.booleans()) else ()
    return WantedLogits(spec, constraints, given, scored, responses)


@settings(max_examples=45)
@given(data=st.data())
def test_a_storm(data: st.DataObject) -> None:
    """Whatever the scheduler does, every request that asks comes back complete, and equal to plain torch."""
    world = World(data, data.draw(st.sampled_from([1, 16])))
    for _ in range(data.draw(st.integers(2, 5))):
        prompt = data.draw(prompts)
        wanted = data.draw(st.none() | wanted_of(len(prompt)) | st.just(Wanted(("prompt", "full"))))
        req = Req(prompt, wanted, logits=data.draw(st.none() | chosen_of(len(prompt))))
        req.extra_key = data.draw(st.sampled_from([None, None, "lora"]))
        req.target = data.draw(st.integers(1, 4))
        world.queue.append(req)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "_capture", world.capture)
        for _ in range(data.draw(st.integers(0, 25))):
            world.act()
        for _ in range(400):
            world.step()
        assert (world.queue, world.running, world.chunked) == ([], [], None)
    assert len(world.capture.opened) == 0


def test_a_tokenizer_that_fails_is_a_fault_of_the_span() -> None:
    """It is anybody's code, and runs inside the scheduler."""

    def fail(*args: Any, **kwargs: Any) -> str:
        raise IndexError("piece id is out of range")

    scheduler, req = Scheduler(), asking(9, 8, 7, spans={"thought": Between("a", "b")})
    req.tokenizer = SimpleNamespace(decode=fail)
    scheduler.prefill(req)
    with pytest.raises(SpanError, match=r"span 'thought': .*tokenizer cannot read .*piece id is out of range"):
        unpack_answer(scheduler.finish(req), "row 0", HIDDEN_SIZE)


# --- logits and constraints -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask(LogitConstraint, name="capture_ask"):
    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        asked.append((step.index, step.max_new_tokens, list(step.prompt_ids), step.response_ids.tolist()))
        return logits_V


asked: list[tuple[int, int, list[int], list[int]]] = []
FULL = LogitsSpec(full=True)
BOTH = LogitsSpec(top_k=3, segments=("full",))


def planned(capture: Capture, step: Step) -> tuple[list[Any], list[Any]]:
    """Of each choice its row, input row and index; of each given run its row, offset, first and last."""
    capture.plan_step(step.batch())
    found = capture.plan_logits(step.batch(), VOCAB)
    if found is None:
        return [], []
    assert (found.reqs, found.vocab_size) == (tuple(step.reqs), VOCAB)
    assert found.num_rows == sum(stop - start for start, stop in step.spans)
    assert all(row.max_new_tokens == 128 for row in found.sampling_rows), "as asked; SGLang lowered its own to 9"
    return (
        [(row.row, row.input_row, row.index) for row in found.sampling_rows],
        [(part.row, part.offset, part.first, part.stop) for part in found.prompts],
    )


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
    """The request went back into the queue behind it."""
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


def test_who_wants_logits_only_takes_no_rows() -> None:
    req = choosing(9, 8, 7, spec=BOTH, prompt_from=1)
    assert capturing().plan_step(Step("EXTEND", [req], [(0, 3)], [True]).batch()) is None


def test_the_ids_before_are_those_of_the_response() -> None:
    """Also where the host lags by one, as under overlap scheduling."""
    asked.clear()
    scheduler, req = Scheduler(), choosing(9, 8, 7, constraints=(Ask(),), response_limit=11)
    scheduler.prefill(req)
    scheduler.decode(req)
    step, last_id = Step("DECODE", [Req([1]), req], [(0, 1), last(req)], [True] * 2), req.output_ids[-1]
    batch = step.batch()
    lagging = req.output_ids.pop()
    step_logits = scheduler.capture.plan_logits(batch, VOCAB)
    assert [row.ids_before for row in step_logits.sampling_rows] == [tuple(req.output_ids)]
    req.output_ids.append(lagging)
    scheduler.choose(step, step_logits, torch.zeros(2, HIDDEN_SIZE))
    assert asked == [(index, 11, [9, 8, 7], req.output_ids[:index]) for index in range(3)]
    assert asked[-1][-1][-1] == last_id


def test_the_ids_before_are_not_copied_for_nobody() -> None:
    scheduler, req = Scheduler(), choosing(9, 8, constraints=DENY)
    scheduler.prefill(req)
    (row,) = scheduler.capture.plan_logits(Step("DECODE", [req], [last(req)], [True]).batch(), VOCAB).sampling_rows
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


@pytest.mark.parametrize(
    ("wanted", "given_from", "limit"),
    [
        (None, None, 6),
        (None, 1, 0),
        (None, 4, 3),
        (None, 6, 6),  # nothing is behind the last token
        (Wanted(("response",)), 4, 3),
        (Wanted(("prompt",), "last"), 4, 3),
        (Wanted(("prompt",), "last"), 6, 5),
        (Wanted((), spans={"p": PromptSpan(((1, 3),))}), 4, 1),
        (Wanted((), spans={"p": PromptSpan(((4, 6),))}), 4, 3),
        (Wanted(("prompt",)), 4, 0),
    ],
)
def test_how_far_logits_let_a_request_hit_the_prefix_cache(wanted: Any, given_from: Any, limit: int) -> None:
    """The row of token t is at the position before it; pools may need more."""
    spec = LogitsSpec(full=True, segments=("prompt",)) if given_from == 1 else None
    scored = given_from not in (None, 1)
    capture = capturing()
    req = choosing(
        5, 4, 3, 6, 1, 7, wanted=wanted, spec=spec, constraints=DENY, prompt_from=given_from, scored=scored,
        response_ranges=((given_from, 6),) if scored and given_from < 6 else (),
    )  # fmt: skip
    one = capture.open(req)
    assert capture.prefix_limit(one, 6) == limit
    assert capture.prefix_limit(one, 0) == 0
    assert one.reads_prompt is (one.pools.reads_prompt or given_from is not None)
    scheduler = Scheduler(capture)
    if limit < 6:
        scheduler.run(Step("EXTEND", [req], [(limit, 6)], [True]))
        scheduler.decode(req)
        scheduler.assert_right(req)
        return
    assert planned(capture, Step("EXTEND", [req], [(5, 6)], [True]))[1] == []


def test_a_kept_sum_is_no_use_where_logits_need_more() -> None:
    capture = capturing()
    computed(capture, 150)
    for given_from, limit in ((140, 2 * BLOCK), (151, 150), (200, 150)):
        req = Req(PROMPT, Wanted(("prompt",)), logits=WantedLogits(None, DENY, given_from, True, ((190, 200),)))
        assert capture.prefix_limit(capture.open(req), 200) == limit


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
    with pytest.raises(ConstraintError, match=r"^row 0: action_mask failed at token 0 of the response: IndexError"):
        unpack_answer(scheduler.finish(bad), "row 0", HIDDEN_SIZE)
    scheduler.assert_right(good)
