"""Scores of heads in what a policy writes, over the fake engine."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import policy_batches
from helpers.fake_engine import EOS_ID, RecordingEngine, make_info, states_ND
from helpers.policy_batches import TOKENIZER, batch_of, flat
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.modules.llm.policies import Tokens

from torchrl_sglang_hidden import (
    AlignmentError,
    At,
    CapabilityError,
    EngineError,
    Every,
    HeadSpec,
    HiddenSpec,
    InputError,
    InputTypeError,
    LastTokens,
    ProtocolError,
    Request,
    SGLangHiddenWrapper,
    SpanError,
    TokenMask,
    Turn,
    Window,
)
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.spec.spans import PromptSpan, Span

NAMES = ("d0", "d3")
ALL = ("prompt", "response", "full")
# What SGLang's other clients read as a "stop".
BY_HEAD = {"type": "stop", "head": "d0 > 0.5"}


def response_to(prompt_ids: Sequence[int]) -> list[int]:
    return [7 + len(prompt_ids) + i for i in range(1 + len(prompt_ids) % 4)]


def make(mode: str = "tokens", **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    engine = options.pop("engine", None) or RecordingEngine(tokenizer=TOKENIZER, respond=response_to)
    return policy_batches.make(mode, engine=engine, **{"hidden": None, **options})


def real(row: TensorDictBase) -> tuple[list[int], list[int]]:
    """Return prompt and response without padding."""
    mask, num_prompt = row["masks"].all_attention_mask, len(row["tokens"].prompt)
    return row["tokens"].prompt[mask[:num_prompt]].tolist(), row["tokens"].response[mask[num_prompt:]].tolist()


def expected(row: TensorDictBase, name: str) -> dict[str, torch.Tensor]:
    prompt, response = real(row)
    full = states_ND(prompt, response)[:, int(name[1:])]
    return {"prompt": full[: len(prompt)], "response": full[len(prompt) - 1 :], "full": full}


@pytest.mark.parametrize("mode", ["tokens", "text", "history"])
@pytest.mark.parametrize("pad_output", [False, True])
@pytest.mark.parametrize("segments", [("response",), ("prompt",), ("full", "prompt"), ALL])
def test_scores_stand_at_their_tokens(mode: str, pad_output: bool, segments: Any) -> None:
    policy, _ = make(mode, heads=HeadSpec(NAMES, segments), pad_output=pad_output, head_scores_key=("my", "scores"))
    out = policy(batch_of(mode))
    leaves = {("my", "scores", part, name) for part in (*segments, "versions") for name in NAMES}
    assert {key for key in policy.out_keys if key[:2] == ("my", "scores")} == leaves
    for row in flat(out):
        found = row["my", "scores"]
        for segment in ALL:
            assert (getattr(found, segment) is None) is (segment not in segments)
        for name in NAMES:
            assert row["my", "scores", "versions", name] == f"v-{name}"
            for segment in segments:
                scores_N, truth_N = row["my", "scores", segment, name], expected(row, name)[segment]
                assert scores_N.dtype == torch.float32
                if pad_output:
                    width = len(getattr(row["tokens"], segment)) - (segment == "full")
                    left = segment != "response"
                    assert len(scores_N) == width
                    pads = torch.ones(width - len(truth_N), dtype=torch.bool)
                    is_real = torch.ones(len(truth_N), dtype=torch.bool)
                    if segment != "full":
                        order = [~pads, is_real] if left else [is_real, ~pads]
                        assert torch.equal(~scores_N.isnan(), torch.cat(order))
                torch.testing.assert_close(scores_N[~scores_N.isnan()], truth_N)


def test_several_samples_and_collected_rows() -> None:
    policy, engine = make(heads=HeadSpec(NAMES, ALL, "d0 > 2"), num_samples=3)
    out = policy(batch_of("tokens"))
    assert out.batch_size == (3, 3)
    assert [request.heads.segments for request in engine.requests] == [("prompt",)] * 3 + [("response",)] * 9
    assert [request.heads.stop_when for request in engine.requests] == [None] * 3 + ["d0 > 2"] * 9
    for row in flat(out):
        for segment in ALL:
            torch.testing.assert_close(row["head_scores", segment, "d3"], expected(row, "d3")[segment])
    stacked = lazy_stack([*flat(out), *flat(make(heads=HeadSpec(NAMES, ALL))[0](batch_of("tokens")))])
    assert len(stacked.get(("head_scores", "response", "d0"), as_list=True)) == 12
    copied = pickle.loads(pickle.dumps(policy.config)).heads
    assert copied == HeadSpec(NAMES, ALL, "d0 > 2")


def test_a_head_that_is_pushed_between_a_prompt_and_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row names one version of a head, which must have given all its scores."""
    from helpers import fake_engine, fake_heads

    def pushed_again(wanted: Any, *args: Any) -> Any:
        found = fake_heads.found_scores(wanted, *args)
        return replace(found, versions=("v-2",)) if wanted.response else found

    monkeypatch.setattr(fake_engine, "found_scores", pushed_again)
    policy, _ = make(heads=HeadSpec(("d0",), ALL), num_samples=2)
    with pytest.raises(InputError, match="head 'd0': version 'v-d0' scored the prompt, and 'v-2' the response; send"):
        policy(batch_of("tokens"))
    rows = flat(policy.get_new_version(on_error="nan")(batch_of("tokens")))
    assert all("'v-2' the response" in row["error"] for row in rows)
    alone = policy.get_new_version(heads=HeadSpec(("d0",)))
    assert {row["head_scores", "versions", "d0"] for row in flat(alone(batch_of("tokens")))} == {"v-2"}


@pytest.mark.parametrize("pad_output", [False, True])
def test_a_scored_sequence(pad_output: bool) -> None:
    """All its tokens are scored, and no rule ends it."""
    policy, engine = make(
        heads=HeadSpec(("d2",), stop_when="d2 > -9"), generate=False, pad_output=pad_output, return_log_probs=False
    )
    rows = [[3, 4, 5, 6], [8, 9]]
    out = policy(lazy_stack([TensorDict(tokens=Tokens(full=torch.tensor(ids), batch_size=())) for ids in rows]))
    for row, ids, request in zip(out.unbind(0), rows, engine.requests, strict=True):
        assert (request.heads.segments, request.heads.stop_when) == (("prompt",), None)
        scores_N = row["head_scores", "full", "d2"]
        assert len(scores_N) == (4 if pad_output else len(ids))
        torch.testing.assert_close(scores_N[~scores_N.isnan()], states_ND(ids, [1])[: len(ids), 2])
    assert ("head_scores", "full", "d2") in policy.out_keys


def rule_for(ids: list[int], token: int) -> str:
    """Return a rule that holds first at a token of the response."""
    score = float(states_ND(ids, response_to(ids))[len(ids) - 1 + token, 0])
    return f"d0 >= {score - 1e-4!r}"


def test_a_rule_ends_a_response() -> None:
    ids = TOKENIZER("w1 w2 w3")["input_ids"]
    (free,) = flat(make(heads=HeadSpec(("d0",)))[0](batch_of("tokens", ["w1 w2 w3"])))
    best = int(free["head_scores", "response", "d0"].argmax())
    policy, _ = make(heads=HeadSpec(("d0",), stop_when=rule_for(ids, best)), hidden=HiddenSpec(ALL))
    (row,) = flat(policy(batch_of("tokens", ["w1 w2 w3"])))
    assert row["finish_reason"] == "head"
    assert len(row["tokens"].response) == best + 1
    assert int(row["hidden_states"].response_count) == best + 1
    assert row["masks"].all_assistant_mask.sum() == best + 1


# --- answers that do not add up ---------------------------------------------------------------------------------------


def spoilt(change: Any) -> Any:
    def fault(rows: list[dict[str, Any]]) -> None:
        change(rows[0]["meta_info"], rows[0]["meta_info"][CHANNEL][0]["scores"])

    return fault


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda meta, scores: meta[CHANNEL][0].pop("scores"), ProtocolError, "are not in the answer; send it again"),
        (lambda meta, scores: scores.update(versions=["v"]), ProtocolError, "cannot be read"),
        (lambda meta, scores: scores.update(versions=[1, 2]), ProtocolError, "cannot be read"),
        (lambda meta, scores: scores.pop("response"), AlignmentError, "None scores of each head for 4 response tokens"),
        (
            lambda meta, scores: scores.update(prompt=scores["response"]),
            AlignmentError,
            "prompt tokens, asked for: False",
        ),
        (lambda meta, scores: scores["response"].update(shape=[2, 3]), ProtocolError, "cannot be read"),
        (lambda meta, scores: scores["response"].update(shape=[1, 8]), ProtocolError, "cannot be read"),
        (lambda meta, scores: scores["response"].update(crc32=1), ProtocolError, "cannot be read"),
        (lambda meta, scores: scores.pop("versions"), ProtocolError, "cannot be read"),
        (lambda meta, scores: meta.update(finish_reason=BY_HEAD), AlignmentError, "finished with 'head'"),
    ],
)
def test_answers_that_do_not_add_up(change: Any, error: type[Exception], said: str) -> None:
    policy, engine = make(heads=HeadSpec(NAMES))
    engine.fault = spoilt(change)
    with pytest.raises(error, match=f"row 0 .*{said}"):
        policy(batch_of("tokens", ["w1 w2 w3"]))


def test_a_response_that_no_head_was_asked_for_and_ended() -> None:
    policy, engine = make(hidden=HiddenSpec())
    engine.fault = lambda rows: rows[0]["meta_info"].update(finish_reason=BY_HEAD)
    with pytest.raises(ProtocolError, match="finished with 'head', and no head was asked for"):
        policy(batch_of("tokens", ["w1 w2 w3"]))


def test_a_response_that_goes_on_behind_its_rule() -> None:
    ids = TOKENIZER("w1 w2 w3")["input_ids"]
    engine = RecordingEngine(tokenizer=TOKENIZER, respond=response_to)
    never = HeadSpec(("d0",), stop_when="d0 > 9")
    (completion,) = engine.generate([Request(tuple(ids), heads=never)])
    scores_T = completion.scores["d0"].response_T
    assert scores_T is not None

    def goes_on(rows: list[dict[str, Any]]) -> None:
        assert engine.requests[-1].heads == HeadSpec(("d0",), stop_when="d0 > 9")
        # What the client asked for holds at the first token of the answer.
        object.__setattr__(engine.requests[-1].heads, "stop_when", "d0 > -9")

    engine.fault = goes_on
    with pytest.raises(AlignmentError, match=r"stop_when='d0 > -9' holds at token 0 of 4, which should be the last"):
        engine.generate([Request(tuple(ids), heads=HeadSpec(("d0",), stop_when="d0 > 9"))])


def test_scores_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import fake_heads

    monkeypatch.setattr(fake_heads, "scores_of", lambda states_ND, name: states_ND[:, 0] * torch.nan)
    policy, _ = make(heads=HeadSpec(("d0",)))
    with pytest.raises(EngineError, match=r"the scores have NaN; the model's numbers .* and at those of the head"):
        policy(batch_of("tokens", ["w1"]))
    lenient = policy.get_new_version(on_error="nan", heads=HeadSpec(("d0",), ALL), pad_output=True)
    (row,) = flat(lenient(batch_of("tokens", ["w1"])))
    assert row["head_scores", "response", "d0"].isnan().all()
    assert "have NaN" in row["error"]


# --- what cannot be asked ---------------------------------------------------------------------------------------------


def test_what_cannot_be_asked() -> None:
    with pytest.raises(InputTypeError, match=r"heads='d0': expected a HeadSpec"):
        make(heads="d0")
    stock = RecordingEngine(tokenizer=TOKENIZER, pools_in_server=False, returns_hidden_states=True)
    with pytest.raises(CapabilityError, match=r"row 0: heads=\('d0',\) are asked of a server without the server half"):
        make(heads=HeadSpec(("d0",)), engine=stock)[0](batch_of("tokens"))
    assert stock.payloads == []
    with pytest.raises(InputError, match=r"max_new_tokens=0 with HeadSpec\(segments=\('response',\), spans"):
        make(heads=HeadSpec(("d0",)), generate_kwargs={"max_new_tokens": 0})[0](batch_of("tokens"))
    with pytest.raises(InputError, match=r"row 0: max_new_tokens=0 generates nothing, and HeadSpec"):
        check_requests([Request((1,), {"max_new_tokens": 0}, heads=HeadSpec(("d0",)))], make_info())
    with pytest.raises(InputError, match="'head_scores' is the key of 2 outputs"):
        make(heads=HeadSpec(("d0",)), text_key="head_scores")[0](batch_of("tokens"))


def test_scores_that_nobody_would_see_are_not_asked_for() -> None:
    policy, engine = make(heads=HeadSpec(("d0",)), head_scores_key=None)
    assert "head_scores" not in policy(batch_of("tokens"))
    scorer = policy.get_new_version(generate=False)
    scorer(scored_batch())
    assert [request.heads for request in engine.requests] == [None] * 4
    # A rule reads them.
    ruled = policy.get_new_version(heads=HeadSpec(("d0",), stop_when="d0 > -9"))
    out = ruled(batch_of("tokens"))
    assert "head_scores" not in out
    assert out["finish_reason"] == ["head"] * 3


def test_a_prompt_that_is_only_read() -> None:
    policy, _ = make(heads=HeadSpec(("d1",), ("prompt",)), generate_kwargs={"max_new_tokens": 0})
    for row in flat(policy(batch_of("tokens"))):
        prompt, _ = real(row)
        torch.testing.assert_close(row["head_scores", "prompt", "d1"], states_ND(prompt, [EOS_ID])[: len(prompt), 1])


# --- pooled scores ----------------------------------------------------------------------------------------------------

WORDS = {"mean": torch.mean, "sum": torch.sum, "max": torch.max, "last": lambda scores_N: scores_N[-1]}


@pytest.mark.parametrize("pooling", ["mean", "sum", "max", "last"])
@pytest.mark.parametrize("pad_output", [False, True])
@pytest.mark.parametrize("num_samples", [None, 2])
def test_one_number_for_a_segment(pooling: Any, pad_output: bool, num_samples: int | None) -> None:
    policy, _ = make(heads=HeadSpec(NAMES, ALL, pooling=pooling), pad_output=pad_output, num_samples=num_samples)
    out = policy(batch_of("tokens"))
    assert out["head_scores", "response", "d3"].shape == out.batch_size
    for row in flat(out):
        for name in NAMES:
            for segment in ALL:
                truth = WORDS[pooling](expected(row, name)[segment])
                torch.testing.assert_close(row["head_scores", segment, name], truth)
    (row, *_) = flat(policy.get_new_version(num_samples=None, generate=False)(scored_batch()))
    torch.testing.assert_close(row["head_scores", "full", "d3"], WORDS[pooling](states_ND([5, 6, 7], [EOS_ID])[:3, 3]))


@pytest.mark.parametrize("num_samples", [None, 2])
def test_a_rule_beside_pooled_scores(num_samples: int | None) -> None:
    """The scores that it reads come too, for the response's end is held against them, and are not written."""
    policy, _ = make(heads=HeadSpec(("d0", "d3"), pooling="max", stop_when="d3 > -9"), num_samples=num_samples)
    for row in flat(policy(batch_of("tokens"))):
        _, response = real(row)
        assert (row["finish_reason"], len(response)) == ("head", 1)
        torch.testing.assert_close(row["head_scores", "response", "d3"], expected(row, "d3")["response"][0])


def scored_batch() -> TensorDict:
    return TensorDict(tokens=Tokens(full=torch.tensor([[5, 6, 7]]), batch_size=1), batch_size=1)


SPANS: dict[str, Span] = {
    "end": LastTokens(2, segment="response", allow_fewer=True),
    "each": Every(2, segment="response"),
    "never": At("w499", segment="response", missing="nan"),
    "start": Window(0, 1, segment="prompt"),
    "best": Window(0, 64, segment="response", pooling="max"),
}


@pytest.mark.parametrize("pad_output", [False, True])
@pytest.mark.parametrize("pooling", [None, "sum"])
@pytest.mark.parametrize("num_samples", [None, 2])
def test_scores_of_spans(pad_output: bool, pooling: Any, num_samples: int | None) -> None:
    """Beside the scores of the tokens, or of the segments, or alone; and beside states of other spans."""
    segments = ("response",) if pooling is None else ()
    policy, _ = make(
        heads=HeadSpec(NAMES, segments, pooling=pooling, spans=SPANS),
        hidden=HiddenSpec(spans={"end": LastTokens(1)}),
        pad_output=pad_output,
        num_samples=num_samples,
    )
    out = policy(batch_of("tokens"))
    keys = {("head_scores", "spans", span, name) for span in SPANS for name in NAMES}
    assert keys | {("head_scores", "span_places", "each")} <= set(policy.out_keys)
    most = max(len(real(row)[1]) for row in flat(out))
    for row in flat(out):
        for name in NAMES:
            truth, found = expected(row, name), row["head_scores", "spans"]
            pool = torch.mean if pooling is None else torch.sum
            torch.testing.assert_close(found["end", name], pool(truth["response"][-2:]))
            torch.testing.assert_close(found["start", name], truth["prompt"][0])
            torch.testing.assert_close(found["best", name], truth["response"].max())
            assert found["never", name].isnan()
            each, rows = found["each", name], truth["response"][::2]
            torch.testing.assert_close(each[: len(rows)], rows)
            assert len(each) == ((most + 1) // 2 if pad_output else len(rows))
            assert each[len(rows) :].isnan().all()
            places = row["head_scores", "span_places", "each"]
            assert places[: len(rows)].tolist() == list(range(0, len(truth["response"]), 2))
            assert (places[len(rows) :] == -1).all()
            assert row["hidden_states", "span_counts", "end"] == 1


@pytest.mark.parametrize("num_samples", [None, 2])
def test_a_prompt_without_the_marker_that_alone_is_scored(num_samples: int | None) -> None:
    """Nothing of such a row is scored; the others of its batch are."""
    spans = {"at": At("w2", segment="prompt"), "each": Window(2, 9, segment="prompt", pooling=None)}
    policy, _ = make(heads=HeadSpec(("d0",), segments=(), spans=spans), num_samples=num_samples)
    rows = flat(policy(batch_of("tokens", ["w1 w2 w3", "w1"])))
    for row in rows[: len(rows) // 2]:
        assert row["head_scores", "spans", "at", "d0"] == expected(row, "d0")["prompt"][1]
        assert row["head_scores", "spans", "each", "d0"].tolist() == expected(row, "d0")["prompt"][2:].tolist()
    for row in rows[len(rows) // 2 :]:
        assert row["head_scores", "spans", "at", "d0"].isnan()
        assert row["head_scores", "spans", "each", "d0"].shape == (0,)
        assert row["head_scores", "versions", "d0"] == "v-d0"


def test_scored_sequences_have_no_spans_of_a_response() -> None:
    policy, _ = make(heads=HeadSpec(("d0",), pooling="max", spans=SPANS), generate=False)
    assert {key[2] for key in policy.out_keys if key[:2] == ("head_scores", "spans")} == {"start"}
    (row,) = flat(policy(scored_batch()))
    assert row["head_scores"].spans.keys() == {"start"}
    torch.testing.assert_close(row["head_scores", "spans", "start", "d0"], states_ND([5, 6, 7], [EOS_ID])[0, 0])


def test_spans_that_another_tokenizer_finds_elsewhere() -> None:
    policy, engine = make(heads=HeadSpec(("d0",), (), spans={"five": At("w5")}))
    engine.fault = spoilt(lambda meta, scores: scores["pools"]["rows_of_spans"].update(five=[1]))
    with pytest.raises(
        AlignmentError, match=r"span 'five': .*\(1,\) there and \(2,\) here; .* the wrapper's tokenizer"
    ):
        policy(batch_of("tokens", ["w1 w2 w3"]))


def test_spans_of_scores_that_cannot_be_found() -> None:
    policy, _ = make(heads=HeadSpec(("d0",), spans={"answer": At("w499", missing="error")}))
    with pytest.raises(SpanError, match=r"span 'answer' of heads: At.*w499.* the marker is not in the response"):
        policy(batch_of("tokens"))
    with pytest.raises(InputError, match=r"the span 'said', Turn.* only history mode"):
        make(heads=HeadSpec(("d0",), spans={"said": Turn(0)}))
    masked, _ = make(heads=HeadSpec(("d0",), (), spans={"mask": TokenMask("my_mask")}))
    assert "my_mask" in masked.in_keys
    lenient = policy.get_new_version(on_error="nan", pad_output=True)
    for row in flat(lenient(batch_of("tokens"))):
        assert row["head_scores", "spans", "answer", "d0"].isnan()
    request = Request((1, 2), {}, heads=HeadSpec(("d0",), spans={"a": At("w1")}))
    with pytest.raises(InputError, match=r"head_spans \[\] are resolved, and \['a'\] are asked for"):
        check_requests([request], make_info())
    with pytest.raises(InputError, match=r"head_spans \['b'\] are resolved"):
        check_requests([replace(request, heads=HeadSpec(("d0",)), head_spans={"b": Window(0, 1)})], make_info())
    far = replace(request, heads=HeadSpec(("d0",), spans={"a": Window(0, 9, segment="prompt")}))
    with pytest.raises(SpanError, match="ends at 9 in a prompt of 2 tokens"):
        check_requests([replace(far, head_spans={"a": PromptSpan(((0, 9),))})], make_info())


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda scores: scores.pop("pools"), ProtocolError, "pooled scores asked for: True, in the answer: False"),
        (lambda scores: scores["pools"].update(scores=scores), ProtocolError, "scores of their own"),
        (lambda scores: scores.update(pools=[]), ProtocolError, "pooled scores|expected one"),
        (lambda scores: scores["pools"]["places"][0].__setitem__(2, 1), AlignmentError, "1 rows of states"),
    ],
)
def test_pooled_answers_that_are_wrong(spoil: Any, error: type[Exception], said: str) -> None:
    policy, engine = make(heads=HeadSpec(("d0",), pooling="mean"))
    engine.fault = spoilt(lambda meta, scores: spoil(scores))
    with pytest.raises(error, match=said):
        policy(batch_of("tokens"))
