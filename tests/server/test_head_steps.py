"""Scores in the scheduler, step by step: prompts in pieces, batches of many kinds, what is thrown out, and the rule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import heads_oracle
from helpers.fake_engine import HIDDEN_SIZE
from helpers.fake_scheduler import LAYERS, Req, Scheduler, Step, asking, capturing, last, states_of

from torchrl_sglang_hidden.errors import CapabilityError, InputError, WeightsError
from torchrl_sglang_hidden.protocol import CHANNEL, pack_options, unpack_answer
from torchrl_sglang_hidden.protocol.head_call import HeadCall
from torchrl_sglang_hidden.reduce.head_scores import RequestScores, WantedScores
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.server import head_steps, request_isolation
from torchrl_sglang_hidden.server import heads as served_heads
from torchrl_sglang_hidden.server.capture import Capture
from torchrl_sglang_hidden.spec.head_scores import StopRule
from torchrl_sglang_hidden.spec.heads import Head
from torchrl_sglang_hidden.spec.places import Every
from torchrl_sglang_hidden.spec.spans import LastTokens, PromptSpan

CPU = torch.device("cpu")
HEADS = {
    "a": heads_oracle.make_head("linear", HIDDEN_SIZE, seed=1),
    "b": heads_oracle.make_head("mlp", HIDDEN_SIZE, seed=2, layer=1),
    "c": heads_oracle.make_head("gated", HIDDEN_SIZE, seed=3, normalize="rms"),
}


@pytest.fixture
def scheduler() -> Scheduler:
    found = Scheduler()
    for name, head in HEADS.items():
        push(found.capture, name, head)
    return found


def push(capture: Capture, name: str, head: Head, version: str = "1") -> None:
    capture.heads.answer(HeadCall(name, version, head.to_bytes()), HIDDEN_SIZE, CPU)


class Scored(Req):
    """A request that asks for scores, as SGLang ends it."""

    def __init__(self, ids: list[int], scores: WantedScores, wanted: Wanted | None = None) -> None:
        wanted = wanted or Wanted((), None)
        super().__init__(ids, custom={CHANNEL: pack_options(wanted, "binary", None, scores)})
        self.wanted, self.scores = wanted, scores


def scored(*ids: int, heads: tuple[str, ...] = ("a", "b", "c"), wanted: Wanted | None = None, **more: Any) -> Scored:
    return Scored(list(ids), WantedScores(heads, **more), wanted)


def assert_scored(scheduler: Scheduler, req: Scored, versions: tuple[str, ...] | None = None) -> None:
    found = unpack_answer(scheduler.finish(req), "row 0", HIDDEN_SIZE).scores
    num_prompt = len(req.origin_input_ids)
    assert found is not None
    assert found.versions == (versions or ("1",) * len(req.scores.heads))
    for index, name in enumerate(req.scores.heads):
        head = HEADS[name]
        full = heads_oracle.score(head, states_of(req.ids[:-1], (head.layer,))[:, 0])
        for scores_HN, wanted, expected in (
            (found.prompt_HP, req.scores.prompt, full[:num_prompt]),
            (found.response_HT, req.scores.response, full[num_prompt - 1 :]),
        ):
            assert (scores_HN is not None) is wanted
            if scores_HN is not None:
                heads_oracle.assert_scores(scores_HN[index], expected, name)


@pytest.mark.parametrize(("prompt", "response"), [(True, True), (True, False), (False, True)])
def test_prefill_and_decode(scheduler: Scheduler, prompt: bool, response: bool) -> None:
    req = scored(9, 8, 7, prompt=prompt, response=response)
    scheduler.prefill(req)
    for _ in range(3):
        scheduler.decode(req)
    assert_scored(scheduler, req)
    assert not scheduler.capture.scored


@pytest.mark.parametrize("pooling", ["mean", "sum", "max", "last"])
@pytest.mark.parametrize("count", [1, 5])
def test_scores_that_are_pooled(scheduler: Scheduler, pooling: Any, count: int) -> None:
    """The prompt in pieces; segments, and spans of prompt and response with poolings of their own."""
    spans = {
        "part": PromptSpan(((0, 2), (3, 4)), "max"),
        "rows": PromptSpan(((1, 3),), None),
        "end": LastTokens(2, segment="response", allow_fewer=True),
        "each": Every(2, segment="response"),
    }
    names = ("a", "c")
    req = scored(
        9, 8, 7, 6, 5, heads=names, response=False, pooled=Wanted(("prompt", "response", "full"), pooling, spans=spans)
    )
    scheduler.run(Step("EXTEND", [req], [(0, 2)], [False]))
    scheduler.run(Step("EXTEND", [req], [(2, 5)], [True]))
    for _ in range(count - 1):
        scheduler.decode(req)
    found = unpack_answer(scheduler.finish(req), "row 0", HIDDEN_SIZE).scores
    assert found is not None
    assert (found.prompt_HP, found.response_HT) == (None, None)
    assert found.pools is not None
    pool = {"mean": np.mean, "sum": np.sum, "max": np.max, "last": lambda scores_N: scores_N[-1]}[pooling]
    for index, name in enumerate(names):
        head = HEADS[name]
        full = heads_oracle.score(head, states_of(req.ids[:-1], (head.layer,))[:, 0])
        prompt, response = full[:5], full[4:]
        for segment, truth in (("prompt", prompt), ("response", response), ("full", full)):
            value, number = found.pools.segments[segment]
            assert value is not None
            assert number == len(truth)
            assert abs(float(value[0, index]) - pool(truth)) < heads_oracle.SCORE_ATOL
        for span, expected in (
            ("part", prompt[[0, 1, 3]].max()),
            ("rows", prompt[1:3]),
            ("end", pool(response[-2:])),
            ("each", response[::2]),
        ):
            value, _ = found.pools.spans[span]
            assert value is not None
            np.testing.assert_allclose(value[..., 0, index], expected, atol=heads_oracle.SCORE_ATOL)


def test_scores_that_arrive_twice_or_late_are_left_out() -> None:
    scores = RequestScores(WantedScores(("a",), True, True), ("1",), 4)
    scores.add_prompt(0, 2, [[0.0, 1.0]])
    scores.add_prompt(0, 2, [[9.0, 9.0]])
    scores.add_prompt(3, 4, [[9.0]])
    scores.add_prompt(2, 4, [[2.0, 3.0]])
    for index, score in ((0, 0.0), (0, 9.0), (2, 9.0), (1, 1.0)):
        scores.add_produced(index, [score])
    found = scores.finish()
    assert found.prompt_HP is not None
    assert found.response_HT is not None
    assert (found.prompt_HP.tolist(), found.response_HT.tolist()) == ([[0, 1, 2, 3]], [[0, 1]])


def test_pooled_scores_behind_a_gap(scheduler: Scheduler) -> None:
    """The counts are those of the tokens that were scored, and the client finds that they are too few."""
    req = scored(9, 8, 7, 6, heads=("a",), response=False, pooled=Wanted(("prompt", "full"), "mean"))
    scheduler.run(Step("EXTEND", [req], [(0, 2)], [False]))
    scheduler.run(Step("EXTEND", [req], [(3, 4)], [True]))
    found = unpack_answer(scheduler.finish(req), "row 0", HIDDEN_SIZE).scores
    assert found is not None
    assert found.pools is not None
    assert found.pools.segments["prompt"] == (None, 2)
    assert found.pools.segments["full"][1] != 4


def test_nothing_that_is_pooled(scheduler: Scheduler) -> None:
    """Of a prompt without the spans that alone are asked for: an answer that says so."""
    req = scored(9, 8, 7, heads=("a",), response=False, pooled=Wanted((), "mean"))
    scheduler.prefill(req)
    scheduler.decode(req)
    found = unpack_answer(scheduler.finish(req), "row 0", HIDDEN_SIZE).scores
    assert found is not None
    assert (found.versions, found.prompt_HP, found.response_HT) == (("1",), None, None)
    assert found.pools is not None
    assert (found.pools.segments, found.pools.spans) == ({}, {})


def test_a_mixed_batch(scheduler: Scheduler) -> None:
    """Requests of other heads, of states, and of nothing, in one step; a decode beside a chunk of a prompt."""
    many = [
        scored(9, 8, 7, prompt=True),
        scored(5, heads=("b",)),
        scored(
            4, 3, heads=("c", "a"), prompt=True, wanted=Wanted(("prompt", "response"), "mean", (-1, 2), tokens=True)
        ),
    ]
    states, nothing = asking(6, 5, 4, tokens=True), Req([1, 2])
    scheduler.prefill(many[0], states, many[1], nothing)
    late = many[2]
    scheduler.run(Step("MIXED", [late, many[0], nothing], [(0, 1), last(many[0]), last(nothing)], [False, True, True]))
    scheduler.run(Step("MIXED", [states, late], [last(states), (1, 2)], [True, True]))
    scheduler.decode(many[1], late, nothing, states, many[0], padding=3)
    scheduler.decode(states, many[0], commits=[True, False])
    scheduler.decode(many[0], late)
    scheduler.assert_right(states)
    for req in many:
        assert_scored(scheduler, req)


def test_a_step_behind_the_last_token(scheduler: Scheduler) -> None:
    """Overlap launches a step before it knows that the response has ended: nothing of it is kept."""
    req = scored(9, 8, prompt=True)
    scheduler.prefill(req)
    scheduler.launch(Step("DECODE", [req], [last(req)], [True]))
    scheduler.launch(Step("DECODE", [req], [last(req)], [False]))
    scheduler.commit()
    answer_of_finished = unpack_answer(scheduler.finish(req), "row 0", HIDDEN_SIZE).scores
    scheduler.commit()
    assert answer_of_finished is not None
    assert answer_of_finished.response_HT is not None
    assert answer_of_finished.response_HT.shape == (3, 2)


def test_after_a_retraction(scheduler: Scheduler) -> None:
    """The prompt's scores go on where they had arrived, and response tokens are not scored twice."""
    req = scored(9, 8, 7, 6, prompt=True)
    scheduler.run(Step("EXTEND", [req], [(0, 1)], [False]))
    scheduler.launch(Step("EXTEND", [req], [(1, 2)], [False]))
    scheduler.waiting.clear()  # its results never arrive
    scheduler.capture.opened[req].restart()
    scheduler.run(Step("EXTEND", [req], [(0, 4)], [True]))
    scheduler.decode(req)
    scheduler.launch(Step("DECODE", [req], [last(req)], [False]))  # thrown out in the middle
    scheduler.commit()
    scheduler.capture.opened[req].restart()
    scheduler.run(Step("EXTEND", [req], [(0, len(req.ids))], [True]))
    scheduler.decode(req)
    assert_scored(scheduler, req)


def test_a_prompt_that_is_scored_leaves_nothing_to_the_prefix_cache(scheduler: Scheduler) -> None:
    reads, skips = scored(9, 8, 7, 6, prompt=True), scored(9, 8, 7, 5)
    for req, expected in ((reads, 0), (skips, 3)):
        tracked = scheduler.capture.open(req)
        assert tracked is not None
        assert tracked.reads_prompt is (req is reads)
        assert scheduler.capture.prefix_limit(tracked, 3) == expected
    scheduler.run(Step("EXTEND", [reads], [(0, 2)], [False]))
    assert scheduler.capture.prefix_limit(scheduler.capture.opened[reads], 3) == 2
    # Positions that no step computed are missing, and the client counts.
    scheduler.run(Step("EXTEND", [reads], [(3, 4)], [True]))
    found = unpack_answer(scheduler.finish(reads), "row 0", HIDDEN_SIZE).scores
    assert found is not None
    assert found.prompt_HP is not None
    assert found.prompt_HP.shape == (3, 2)


def test_a_head_that_is_pushed_again_and_one_that_is_dropped(scheduler: Scheduler) -> None:
    """A request keeps the head that it began with."""
    early = scored(9, 8, heads=("a",))
    scheduler.prefill(early)
    push(scheduler.capture, "a", HEADS["c"], "2")
    scheduler.decode(early)
    scheduler.capture.heads.answer(HeadCall("a"), HIDDEN_SIZE, CPU)
    scheduler.decode(early)
    assert_scored(scheduler, early)
    late = scored(9, 7, heads=("a",))
    scheduler.prefill(late)
    with pytest.raises(CapabilityError, match="a head was dropped before the request began"):
        unpack_answer(scheduler.finish(late), "row 0", HIDDEN_SIZE)


def test_a_rank_that_does_not_answer(scheduler: Scheduler) -> None:
    """Counts as the others do, and scores nothing."""
    scheduler.capture.sends = False
    req = scored(9, 8, 7, prompt=True)
    scheduler.prefill(req)
    scheduler.decode(req)
    scores = scheduler.capture.opened[req].scores
    assert scores is not None
    assert (scores.done, scores.count, len(scores._prompt[0])) == (3, 2, 0)


def test_a_device_without_memory(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs the requests of that head, and no others."""
    full = scheduler.capture.heads.of(WantedScores(("b",)))[0]
    original = served_heads.ServedHead.scores

    def compute(self: Any, states_ND: torch.Tensor) -> torch.Tensor:
        if self is full:
            raise torch.OutOfMemoryError
        return original(self, states_ND)

    monkeypatch.setattr(served_heads.ServedHead, "scores", compute)
    lost, kept = scored(9, 8), scored(7, 6, heads=("a", "c"), prompt=True)
    scheduler.prefill(lost, kept)
    assert_scored(scheduler, kept)
    with pytest.raises(CapabilityError, match="ran out of memory"):
        unpack_answer(scheduler.finish(lost), "row 0", HIDDEN_SIZE)


def test_states_that_are_not_one_for_each_position(scheduler: Scheduler) -> None:
    req = scored(9, 8, heads=("a",))
    batch = Step("EXTEND", [req], [(0, 2)], [True]).batch()
    plan = scheduler.capture.plan_step(batch)
    assert plan is not None
    assert plan.layers == {-1}
    host = plan.gather({-1: torch.zeros(1, HIDDEN_SIZE)}).copy_to_host(torch.clone)
    host.consume(batch, [SimpleNamespace(output_index=0)])
    scores = scheduler.capture.opened[req].scores
    assert scores is not None
    assert not scores._response[0]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (
            HeadCall("x", "1", heads_oracle.make_head("linear", 5).to_bytes()),
            WeightsError,
            "5 numbers, and the model's",
        ),
        (HeadCall("x", "1", heads_oracle.make_head("linear", 8, layer=7).to_bytes()), InputError, "reads layer 7"),
        (HeadCall("x", "1", heads_oracle.make_head("linear", 8, layer=-2).to_bytes()), InputError, "reads layer -2"),
        (HeadCall("x", "1", b"code"), WeightsError, "no safetensors file"),
        (HeadCall("x"), InputError, r"no head 'x': it has \['a', 'b', 'c'\]"),
        (HeadCall("a", "1", HEADS["c"].to_bytes()), InputError, "has version '1' with other weights"),
    ],
)
def test_calls_that_are_refused(scheduler: Scheduler, call: HeadCall, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        scheduler.capture.heads.answer(call, HIDDEN_SIZE, CPU)
    req = scored(9, 8, 7, prompt=True)
    scheduler.prefill(req)
    assert_scored(scheduler, req)


def test_more_heads_than_a_server_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = capturing()
    for number in range(served_heads.MAX_HEADS):
        push(capture, f"h{number}", HEADS["a"])
    with pytest.raises(InputError, match=r"65 heads .* limits of 64 and 512 MiB; drop one"):
        push(capture, "more", HEADS["a"])
    push(capture, "h3", HEADS["c"], "2")
    monkeypatch.setattr(served_heads, "MAX_HEADS_BYTES", 1000)
    with pytest.raises(InputError, match="drop one"):
        push(capture, "h3", HEADS["a"], "3")


@pytest.mark.parametrize(
    ("scores", "ranks", "said"),
    [
        (WantedScores(("a", "z")), 1, "no head 'z'"),
        (WantedScores(("a",), stop=StopRule("a", ">", 1.0)), 2, r"stop_when='a > 1.0' with 2 tensor-parallel ranks"),
        (WantedScores(("a",), stop=StopRule("a", ">", 1.0)), 1, ""),
        (WantedScores(("a",)), 2, ""),
    ],
)
def test_requests_that_are_refused(scheduler: Scheduler, scores: WantedScores, ranks: int, said: str) -> None:
    scheduler.capture.ranks = ranks
    refused: list[str] = []
    taken: list[Any] = []
    req = Scored([1, 2], scores)
    recv_req = SimpleNamespace(sampling_params=req.sampling_params, rid="r", custom_logit_processor=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_isolation, "_abort", lambda scheduler, recv_req, message: refused.append(message))
        sglang = SimpleNamespace(server_args=SimpleNamespace(enable_custom_logit_processor=False))
        request_isolation.take_in(lambda *args: taken.append(args), sglang, recv_req, scheduler.capture)
    assert (len(refused), len(taken)) == ((1, 0) if said else (0, 1))
    if said:
        assert said in refused[0].replace("\\", "")


def test_the_hook_on_weights_by_name(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = SimpleNamespace(GetWeightsByNameReqOutput=lambda parameter: ("answered", parameter))
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.io_struct", module)
    ((_, hook),) = served_heads.make_head_hooks(scheduler.capture.heads).items()
    runner = SimpleNamespace(model_config=SimpleNamespace(hidden_size=HIDDEN_SIZE), device="cpu")
    updater = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))
    original = lambda updater, recv_req: ("original", recv_req.name)  # noqa: E731
    assert hook(original, updater, SimpleNamespace(name="model.norm.weight")) == ("original", "model.norm.weight")
    call = HeadCall("d", "7", HEADS["a"].to_bytes())
    assert hook(original, updater, SimpleNamespace(name=call.pack())) == ("answered", [])
    assert scheduler.capture.heads.of(WantedScores(("d",)))[0].version == "7"


# --- the rule ---------------------------------------------------------------------------------------------------------


class FinishLength:
    """Stands in for SGLang's own."""


class Ending(Scored):
    """Ends as SGLang's request does: by a stop token, then by its length."""

    def __init__(self, ids: list[int], scores: WantedScores, *, limit: int = 99, eos: int = -1) -> None:
        super().__init__(ids, scores)
        self.finished_reason: Any = None
        self.finished_len: int | None = None
        self.limit, self.eos = limit, eos

    def finished(self) -> bool:
        return self.finished_reason is not None or self.is_finished

    def update_finish_state(self, new_accepted_len: int = 1) -> None:
        if self.output_ids[-1] == self.eos:
            self.finished_reason, self.finished_len = "stop", len(self.output_ids)
        elif len(self.output_ids) >= self.limit:
            self.finished_reason, self.finished_len = FinishLength(), self.limit


@pytest.fixture
def finishing(monkeypatch: pytest.MonkeyPatch) -> None:
    class FinishedByHead:
        def __init__(self, rule: str) -> None:
            self.rule = rule

    monkeypatch.setattr(head_steps, "_finish_classes", lambda: (FinishedByHead, FinishLength))


def run_step(scheduler: Scheduler, req: Ending, span: tuple[int, int], *, commits: bool = True) -> None:
    """Run a step as SGLang does: its scores are looked at, then its token is committed, then its rows handed over."""
    batch = Step("EXTEND" if span[0] == 0 else "DECODE", [req], [span], [True]).batch()
    plan = scheduler.capture.plan_step(batch)
    assert plan is not None
    states = dict(zip(LAYERS, states_of([*req.ids, 0])[slice(*span)].unbind(1), strict=True))
    host = plan.gather(states).copy_to_host(torch.clone)
    result = SimpleNamespace(auxiliary_host_output=SimpleNamespace(outputs=(SimpleNamespace(output=host), object())))
    head_steps.after_output_starts([0], type(req), batch, result)
    commit = None
    if commits and not req.finished():
        req.output_ids.append((len(req.ids) + req.ids[-1]) % 3)
        commit = SimpleNamespace(output_index=len(req.output_ids) - 1)
        req.update_finish_state(1)
    host.consume(batch, [commit])


def free_scores(scheduler: Scheduler, ids: list[int], count: int) -> list[float]:
    req = Ending(ids, WantedScores(("a",)))
    run_step(scheduler, req, (0, len(ids)))
    for _ in range(count - 1):
        run_step(scheduler, req, last(req))
    found = unpack_answer(scheduler.finish(req), "row 0", HIDDEN_SIZE).scores
    assert found is not None
    assert found.response_HT is not None
    return found.response_HT[0].tolist()


IDS = [9, 8, 7]


@pytest.mark.usefixtures("finishing")
@pytest.mark.parametrize("token", range(6))
def test_the_token_that_fulfils_a_rule_is_the_last(scheduler: Scheduler, token: int) -> None:
    scores = free_scores(scheduler, IDS, 6)
    rule = StopRule("a", ">=", scores[token] - 1e-5)
    expected = next(index for index, score in enumerate(scores) if rule.holds(score)) + 1
    req = Ending(list(IDS), WantedScores(("b", "a"), prompt=True, stop=rule))
    run_step(scheduler, req, (0, 3))
    while not req.finished():
        run_step(scheduler, req, last(req))
    assert (len(req.output_ids), req.finished_len) == (expected, expected)
    assert req.finished_reason.rule == str(rule)
    assert "update_finish_state" not in vars(req)
    # The step that overlap launched behind it.
    run_step(scheduler, req, last(req))
    assert_scored(scheduler, req)


@pytest.mark.usefixtures("finishing")
def test_a_rule_and_another_end_at_once(scheduler: Scheduler) -> None:
    always = WantedScores(("a",), stop=StopRule("a", ">", -1e9))
    stopped, long = Ending(list(IDS), always, eos=(3 + 7) % 3), Ending(list(IDS), always, limit=1)
    for req in (stopped, long):
        run_step(scheduler, req, (0, 3))
    assert stopped.finished_reason == "stop"
    assert long.finished_reason.rule == "a > -1000000000.0"


@pytest.mark.usefixtures("finishing")
def test_what_was_decided_of_a_token_that_is_not_committed(scheduler: Scheduler) -> None:
    """A request that was thrown out in the middle is computed again, and the rule looked at again."""
    scores = free_scores(scheduler, IDS, 3)
    req = Ending(list(IDS), WantedScores(("a",), stop=StopRule("a", ">=", max(scores[:2]) - 1e-5)))
    run_step(scheduler, req, (0, 3), commits=False)
    decided = "update_finish_state" in vars(req)
    assert decided is (scores[0] >= max(scores[:2]))
    scheduler.capture.opened[req].restart()
    run_step(scheduler, req, (0, 3))
    while not req.finished():
        run_step(scheduler, req, last(req))
    assert len(req.output_ids) == (1 if decided else 2)
