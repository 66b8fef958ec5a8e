"""`SGLangHiddenWrapper.resume`: an aborted response is gone on from, and both parts become one row."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.fake_engine import CHAT_TEMPLATE, Answer, RecordingEngine
from helpers.policy_batches import PROMPTS, TOKENIZER, batch_of, flat, make
from helpers.templates_zoo import CHATML, QWEN3, R1, ZooTemplate, byte_by_byte, zoo_tokenizer
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory

from torchrl_sglang_hidden import (
    ActionMask,
    At,
    Between,
    Each,
    HeadSpec,
    HiddenSpec,
    InputError,
    InputTypeError,
    LastTokens,
    LogitsSpec,
    MissingKeyError,
    Role,
    SGLangHiddenWrapper,
    Window,
    ragged,
)
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.spec.hidden import POOLINGS, SEGMENTS, Pooling

WHOLE = [40, 41, 42, 43, 44, 1]
MODES = pytest.mark.parametrize("mode", ["history", "text", "tokens"])


class Parts(RecordingEngine):
    """An engine whose response to any prompt is `WHOLE`, and which aborts responses after some tokens.

    ``aborts`` has, for each call that generates, the number of tokens after which each row is aborted; None for a row
    that ends, and 0 for one that never leaves the queue.
    """

    def __init__(self, *aborts: list[int | None]) -> None:
        super().__init__(tokenizer=TOKENIZER, respond=self._rest)
        self.aborts, self.versions = iter(aborts), iter(f"v{7 + call}" for call in range(9))

    def _rest(self, ids: Any) -> list[int]:
        ids = list(ids)
        done = next((count for count in range(5, 0, -1) if ids[-count:] == WHOLE[:count]), 0)
        return WHOLE[done:]

    def answer(self, payload: dict[str, Any], requests: Sequence[Request] | None = None) -> Answer:
        limits = next(self.aborts, [None] * len(payload["input_ids"]))
        sampling = [
            {**params, "max_new_tokens": limit or params["max_new_tokens"]}
            for params, limit in zip(payload["sampling_params"], limits, strict=True)
        ]
        version, rows = next(self.versions), super().answer({**payload, "sampling_params": sampling}, requests)
        for row, limit in zip(rows, limits, strict=True):
            meta = row["meta_info"]
            meta["weight_version"] = version
            if limit is not None:
                meta["finish_reason"] = {"type": "abort", "message": "paused"}
            if limit == 0:
                row.update(output_ids=[], text="")
                del meta["prompt_tokens"]
                meta.pop(CHANNEL, None)
        return rows


def policy_of(mode: str, *aborts: list[int | None], **options: Any) -> tuple[SGLangHiddenWrapper, Parts]:
    engine = Parts(*aborts)
    defaults: dict[str, Any] = {"on_error": "nan", "generate_kwargs": {"max_new_tokens": 20}}
    return make(mode, engine=engine, **{**defaults, **options})[0], engine


def assert_rows_equal(found: TensorDictBase, expected: TensorDictBase, *but: str) -> None:
    for one, other in zip(flat(found), flat(expected), strict=True):
        for key, value in other.items(True, True):
            if isinstance(value, torch.Tensor) and key not in but:
                torch.testing.assert_close(one[key], value, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert one["text"].full == other["text"].full
        assert (one["finish_reason"], one["error"]) == (other["finish_reason"], other["error"])


@MODES
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layers", [-1, (0, -1)])
def test_a_response_in_parts_is_the_response(mode: str, pooling: Pooling, layers: Any) -> None:
    """The states of the fake engine depend on ids and positions alone, so that both parts' are those of the whole."""
    options: dict[str, Any] = {
        "hidden": HiddenSpec(
            SEGMENTS,
            pooling,
            layers,
            spans={
                "last": LastTokens(2),
                "rows": LastTokens(2, pooling=None),
                "each": Each("w", segment="prompt"),
                "none": At("never", segment="prompt"),
                "window": Window(0, 2, "prompt", pooling="max"),
                "past": Window(90, 95, "prompt", pooling=None),
            },
        ),
        "logits": LogitsSpec(top_k=3, segments=("full",)),
    }
    policy, engine = policy_of(mode, [2, None, 4], [1, None], [None], **options)
    out = policy(batch_of(mode))
    assert out["finish_reason"] == ["abort", "stop", "abort"]
    out = policy.resume(out)
    assert out["finish_reason"] == ["abort", "stop", "stop"]
    out = policy.resume(out)
    assert policy.resume(out) is out
    expected = policy_of(mode, **options)[0](batch_of(mode))
    assert_rows_equal(out, expected, "mixed_weights")
    assert out["masks"].get("all_assistant_mask", as_list=True)[0].sum() == len(WHOLE)
    # What was sent: prompt and tokens so far, for as many tokens as are left.
    assert [len(engine.requests[row].prompt_ids) for row in (3, 5)] == [
        len(engine.requests[0].prompt_ids) + done for done in (2, 3)
    ]
    assert [engine.requests[row].sampling["max_new_tokens"] for row in (3, 5)] == [18, 17]
    assert out["weight_versions"][0] == (("v7", 2), ("v8", 1), ("v9", 3))
    assert out["weight_versions"][1] == (("v7", 6),)
    assert [bool(row["mixed_weights"]) for row in flat(out)] == [True, False, True]
    assert out["weight_version"] == ["v9", "v7", "v8"]


@pytest.mark.parametrize("segments", [("prompt",), ("response",), ("full",), SEGMENTS])
def test_scores_of_heads_stand_one_after_another(segments: Any) -> None:
    options: dict[str, Any] = {"hidden": None, "heads": HeadSpec(("d0", "d3"), segments)}
    policy, engine = policy_of("tokens", [2, 0, 3], [1, None, None], [None], **options)
    out = policy.resume(policy.resume(policy(batch_of("tokens"))))
    assert_rows_equal(out, policy_of("tokens", **options)[0](batch_of("tokens")), "mixed_weights")
    assert all(row["head_scores", "versions", "d3"] == "v-d3" for row in flat(out))
    asked = [request.heads for request in engine.requests[3:]]
    # The request that never left the queue is sent whole.
    of_rest = None if segments == ("prompt",) else HeadSpec(("d0", "d3"))
    assert asked == [of_rest, options["heads"], of_rest, of_rest]


@MODES
@pytest.mark.parametrize("pooling", [*POOLINGS, None])
@pytest.mark.parametrize("segments", [("prompt",), ("full",), SEGMENTS])
def test_pooled_scores_are_those_of_both_parts(mode: str, pooling: Pooling | None, segments: Any) -> None:
    spans = {
        "last": LastTokens(2),
        "rows": LastTokens(2, pooling=None),
        "each": Each("w", segment="prompt", pooling=None),
        "none": At("never", segment="prompt", pooling="max"),
        "window": Window(0, 2, "prompt", pooling="max"),
    }
    options: dict[str, Any] = {"hidden": None, "heads": HeadSpec(("d0", "d3"), segments, pooling=pooling, spans=spans)}
    policy, engine = policy_of(mode, [2, 0, 3], [1, None, None], [None], **options)
    out = policy.resume(policy.resume(policy(batch_of(mode))))
    expected = policy_of(mode, **options)[0](batch_of(mode))
    assert_rows_equal(out, expected, "mixed_weights")
    for row, other in zip(flat(out), flat(expected), strict=True):
        assert torch.equal(row["head_scores", "span_places", "rows"], other["head_scores", "span_places", "rows"])
    # The prompt is not scored again.
    assert [len(request.head_spans) for request in engine.requests[3:]] == [2, 5, 2, 2]


def test_a_rule_beside_pooled_scores_ends_the_second_part() -> None:
    """Also where nothing else is asked of the response."""
    spans = {"second": Between("w35", "w37", segment="response")}
    for segments, pooled in ((("response",), {}), (("prompt",), spans)):
        heads = HeadSpec(("d5",), segments, stop_when="d5 > 0.9", pooling="mean", spans=pooled)
        (whole, *_) = flat(policy_of("tokens", hidden=None, heads=heads)[0](batch_of("tokens")))
        policy, _ = policy_of("tokens", [2, None, None], hidden=None, heads=heads)
        row = policy.resume(policy(batch_of("tokens")))[0]
        assert (row["finish_reason"], row["tokens"].response.tolist()) == ("head", WHOLE[:4])
        for segment in segments:
            torch.testing.assert_close(row["head_scores", segment, "d5"], whole["head_scores", segment, "d5"])
        assert row["error"].startswith("SpanError: span 'second'" if pooled else "")
        assert bool(row["error"]) is bool(pooled)


def test_a_rule_whose_scores_have_no_key_ends_the_second_part() -> None:
    heads = HeadSpec(("d5",), stop_when="d5 > 0.9")
    policy, _ = policy_of("tokens", [2, None, None], heads=heads, head_scores_key=None)
    row = policy.resume(policy(batch_of("tokens")))[0]
    assert (row["finish_reason"], row["tokens"].response.tolist(), row["error"]) == ("head", WHOLE[:4], "")


def test_a_rule_ends_the_second_part() -> None:
    heads = HeadSpec(("d5",), stop_when="d5 > 0.9")
    (whole, *_) = flat(policy_of("tokens", hidden=None, heads=heads)[0](batch_of("tokens")))
    policy, _ = policy_of("tokens", [2, None, None], hidden=None, heads=heads)
    row = policy.resume(policy(batch_of("tokens")))[0]
    assert (row["finish_reason"], whole["finish_reason"]) == ("head", "head")
    assert row["tokens"].response.tolist() == WHOLE[:4]
    torch.testing.assert_close(row["head_scores", "response", "d5"], whole["head_scores", "response", "d5"])


def test_heads_that_were_pushed_between_two_parts() -> None:
    policy, engine = policy_of("tokens", [2, None, None], hidden=None, heads=HeadSpec(("d0",)))
    out = policy(batch_of("tokens"))

    def other(rows: Any) -> None:
        rows[0]["meta_info"][CHANNEL][0]["scores"]["versions"] = ["new"]

    engine.fault = other
    row = policy.resume(out)[0]
    assert row["finish_reason"] == "stop"
    assert "head 'd0': version 'v-d0' scored the first part of the response, and 'new' the second" in row["error"]


def test_a_default_limit_ends_where_the_context_does() -> None:
    policy, engine = policy_of("tokens", [2, None, None], generate_kwargs={})
    out = policy.resume(policy(batch_of("tokens")))[0]
    assert (out["tokens"].response.tolist(), out["error"], out["finish_reason"]) == (WHOLE, "", "stop")
    rooms = [payload["sampling_params"][0]["max_new_tokens"] for payload in engine.payloads]
    assert rooms == [engine.info.max_prompt_tokens - 3, engine.info.max_prompt_tokens - 5]


@pytest.mark.parametrize("segments", [("prompt",), ("response",), ("full",), ("prompt", "response"), SEGMENTS])
def test_states_of_every_token_stand_one_after_another(segments: Any) -> None:
    options: dict[str, Any] = {"hidden": HiddenSpec(segments, tokens=True), "logits": LogitsSpec(full=True)}
    policy = policy_of("tokens", [2, 1, 4], **options)[0]
    out = policy.resume(policy(batch_of("tokens")))
    assert_rows_equal(out, policy_of("tokens", **options)[0](batch_of("tokens")), "mixed_weights")


@pytest.mark.parametrize("tokens", [False, True])
def test_a_sample_that_lacks_what_its_prompt_was_to_bring_is_not_gone_on_from(tokens: bool) -> None:
    """The requests that went ahead were aborted, and their samples too: the second part cannot have the prompt's."""
    spec = HiddenSpec(("prompt", "response"), None if tokens else "mean", tokens=tokens)
    policy, engine = policy_of("text", [0, None, None], [2, 0, 2, 2, None, None], hidden=spec, num_samples=2)
    out = policy(batch_of("text"))
    # The second sample never left the queue, and is sent whole.
    assert [row["finish_reason"] for row in flat(out)] == ["error", "abort", "abort", "abort", "stop", "stop"]
    assert flat(out)[0]["error"].startswith("RequestAbortedError")
    assert not flat(out)[0]["masks"].all_assistant_mask.any()
    done = policy.resume(out)
    assert [row["finish_reason"] for row in flat(done)] == ["error", *["stop"] * 5]
    expected = policy_of("text", hidden=spec, num_samples=2)[0](batch_of("text"))
    assert_rows_equal(done[0][1], expected[0][1], "mixed_weights")
    assert_rows_equal(done[1], expected[1], "mixed_weights")
    assert len(engine.requests) == 3 + 6 + 3


@MODES
def test_a_row_that_never_left_the_queue_is_generated(mode: str) -> None:
    policy = policy_of(mode, [0, 0, None])[0]
    out = policy(batch_of(mode))
    assert [len(row["tokens"].response) for row in flat(out)] == [0, 0, 6]
    assert_rows_equal(policy.resume(out), policy_of(mode)[0](batch_of(mode)), "mixed_weights")


def test_samples_are_resumed_each() -> None:
    policy = policy_of("text", [None, None], [2, None, None, 3], num_samples=2)[0]
    out = policy(batch_of("text", PROMPTS[:2]))
    assert out["finish_reason"] == [["abort", "stop"], ["stop", "abort"]]
    out = policy.resume(out)
    assert out.batch_size == (2, 2)
    assert [[len(ids) for ids in row["tokens"].get("response", as_list=True)] for row in out.unbind(0)] == [[6, 6]] * 2


def test_a_span_in_the_first_part_is_missing_and_says_so() -> None:
    spec = HiddenSpec(("response",), spans={"wide": LastTokens(5), "b": Between(None, "w37")})
    policy = policy_of("text", [3, 1, None], hidden=spec)[0]
    out = policy.resume(policy(batch_of("text")))
    assert out["hidden_states"].span_counts["wide"].tolist() == [0, 5, 5]
    assert out["error"][0].startswith("SpanError: span 'wide': the response came in two parts")
    assert out["finish_reason"] == ["stop"] * 3
    assert out["hidden_states"].response_count.tolist() == [6] * 3


@pytest.mark.parametrize("tokens_key", ["tokens", "scored"])
def test_an_output_that_was_scored_in_place_is_not_gone_on_from(tokens_key: str) -> None:
    policy, engine = policy_of("tokens", [2, None, None])
    out = policy(batch_of("tokens"))
    input_key = ("tokens", "full")
    policy.get_new_version(generate=False, input_key=input_key, tokens_key=tokens_key)(out)
    what = "prompt tokens" if tokens_key == "tokens" else "log-probs"
    with pytest.raises(MissingKeyError, match=rf"no {what} at \('\w+', '\w+'\), which resume reads"):
        policy.resume(out)
    assert len(engine.requests) == 6


def test_log_probs_that_another_program_wrote_are_named() -> None:
    policy, engine = policy_of("tokens", [2, None, None])
    out = lazy_stack([row.exclude("log_probs").set("log_probs", torch.zeros(3)) for row in policy(batch_of("tokens"))])
    with pytest.raises(InputTypeError, match=r"row 0: 'log_probs' holds a Tensor; expected torchrl's LogProbs"):
        policy.resume(out)
    assert len(engine.requests) == 3


@pytest.mark.parametrize(
    ("options", "call", "error", "words"),
    [
        ({"pad_output": True}, {}, InputError, "the output is padded"),
        ({"on_error": "raise"}, {}, InputError, "on_error='raise'.*use get_new_version"),
        ({}, {"regex": "a+"}, InputError, "regex: it begins with the response's first token"),
        ({}, {"stop_regex": "a+"}, InputError, "stop_regex: it begins with the response's first token"),
        ({}, {"action_mask": ActionMask((40,), first_tokens=1)}, InputError, "action_mask: it begins with"),
        ({}, {"max_new_tokens": 2}, InputError, "the response has 2 tokens, and max_new_tokens=2; raise"),
        ({"tokens_key": None}, {}, MissingKeyError, "no tokens at None, which resume reads"),
    ],
)
def test_what_cannot_be_resumed(options: Any, call: Any, error: type[Exception], words: str) -> None:
    out = policy_of("text", [2, None, None])[0](batch_of("text"))
    policy = policy_of("text", **options)[0]
    if options.get("pad_output"):
        out = policy_of("text", [2, None, None], **options)[0](batch_of("text"))
    with pytest.raises(error, match=words):
        policy.resume(out, **call)


def test_a_mask_of_every_token_goes_on() -> None:
    policy, engine = policy_of("text", [2, None, None], constraints=(ActionMask((40, 41, 42, 43, 44, 1)),))
    policy.resume(policy(batch_of("text")))
    assert len(engine.requests[-1].constraints) == 1


def test_penalties_are_refused_and_neutral_ones_are_not() -> None:
    """SGLang counts the tokens that a request sampled, of which the second part's has none at its beginning."""
    out = policy_of("text", [2, None, None])[0](batch_of("text"))
    for name, value, neutral in (
        ("frequency_penalty", 0.5, 0),
        ("presence_penalty", -1, 0),
        ("repetition_penalty", 1.1, 1),
    ):
        with pytest.raises(InputError, match=f"^{name}: it begins with the response's first token"):
            policy_of("text")[0].resume(out, **{name: value})
        assert policy_of("text")[0].resume(out, **{name: neutral})["finish_reason"] == ["stop"] * 3


@pytest.mark.parametrize("stop", ["w35 w36", ["w99", "w34 w35 w36"]])
def test_a_stop_string_across_the_border_is_said(stop: Any) -> None:
    policy = policy_of("text", [2, 1, None], generate_kwargs={"max_new_tokens": 20, "stop_sequences": stop})[0]
    out = policy.resume(policy(batch_of("text")))
    assert out["finish_reason"] == (["error", "stop", "stop"] if stop == "w35 w36" else ["error", "error", "stop"])
    assert "stop string 'w3" in out["error"][0]
    assert out["error"][0].startswith("InputError: row 0: ")
    assert out["error"][2] == ""
    assert not out["masks"].get("all_assistant_mask", as_list=True)[0].any()
    assert policy.resume(out) is out


def test_a_stop_string_in_the_second_part_is_the_engines() -> None:
    policy = policy_of("text", [2, 1, None], generate_kwargs={"max_new_tokens": 20, "stop_sequences": "w37 w38"})[0]
    out = policy.resume(policy(batch_of("text")))
    assert out["error"] == [""] * 3


@pytest.mark.parametrize(("done", "ended"), [(2, ["error", "stop"]), (1, ["stop", "stop"])])
def test_a_stop_string_that_comes_again_in_the_second_part(
    monkeypatch: pytest.MonkeyPatch, done: int, ended: list[str]
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "WHOLE", [40, 41, 42, 41, 42, 1])
    options = {"generate_kwargs": {"max_new_tokens": 20, "stop_sequences": "w35 w36"}}
    policy = policy_of("text", [done, None], **options)[0]
    assert policy.resume(policy(batch_of("text", PROMPTS[:2])))["finish_reason"] == ended


def test_a_second_part_that_cannot_be_sent_ends_the_loop() -> None:
    policy, engine = policy_of("text", [2, None, None])
    out = policy(batch_of("text"))
    engine._info = dataclasses.replace(engine.info, max_prompt_tokens=4)
    out = policy.resume(out)
    assert out["finish_reason"] == ["error", "stop", "stop"]
    assert out["error"][0].startswith("PromptLengthError: row 0")
    assert len(out[0]["tokens"].response) == 2
    assert not out[0]["masks"].all_assistant_mask.any()
    assert policy.resume(out) is out


def test_an_output_on_another_device_is_read_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU: what is there cannot be read, and not be joined with what an engine returns."""
    policy, engine = policy_of("text", [2, None, None], logits=LogitsSpec(top_k=3))
    out = policy(batch_of("text"))
    rows = flat(out)
    monkeypatch.setattr(TensorDict, "cpu", lambda _: rows[0])
    resumed = policy.resume(out.to("meta"))
    assert resumed["finish_reason"] == ["stop"] * 3
    assert engine.requests[-1].prompt_ids[-2:] == (40, 41)
    assert [row["log_probs"].response.device.type for row in flat(resumed)] == ["meta"] * 3
    assert [len(row["log_probs"].response) for row in flat(resumed)] == [6] * 3


def test_a_prompt_that_would_be_rendered_otherwise_now_stays_as_it_was_sent() -> None:
    """The text is the ids', with the call's variables, and a span that is searched for in it is found or refused."""
    spans = HiddenSpec(("prompt",), spans={"q": Role("user")})
    options: dict[str, Any] = {"chat_template": "{{ opening }}" + CHAT_TEMPLATE, "hidden": spans}
    variables = {"chat_template_kwargs": {"opening": "w50 "}}
    whole = policy_of("history", **options)[0](batch_of("history"), **variables)
    assert all(row["text"].prompt.startswith("w50 ") for row in flat(whole))
    policy = policy_of("history", [2, 1, None], **options)[0]
    assert_rows_equal(policy.resume(policy(batch_of("history"), **variables)), whole, "mixed_weights")
    out = policy_of("history", [2, 0, None], **options)[0](batch_of("history"), **variables)
    with pytest.raises(InputError, match=r"^row 1, span 'q': the chat template rewrites the user's message 1"):
        policy.resume(out)
    assert_rows_equal(policy.get_new_version(**variables).resume(out), whole, "mixed_weights")


class Conversation(RecordingEngine):
    """An engine that answers every turn with the same ids, and aborts the response of one call after two of them."""

    def __init__(self, template: ZooTemplate, answer: str, aborted_call: int) -> None:
        self.ids = zoo_tokenizer(template)
        self.whole = [*byte_by_byte(answer, self.ids), self.ids.eos_token_id]
        self.calls, self.aborted_call = 0, aborted_call
        size = {"vocab_size": len(self.ids), "context_length": 9999, "max_prompt_tokens": 9000}
        super().__init__(tokenizer=self.ids, respond=self._rest, **size)

    def _rest(self, ids: Any) -> list[int]:
        ids = list(ids)
        done = next((count for count in range(len(self.whole) - 1, 0, -1) if ids[-count:] == self.whole[:count]), 0)
        return self.whole[done:]

    def answer(self, payload: dict[str, Any], requests: Sequence[Request] | None = None) -> Answer:
        self.calls += 1
        if self.calls != self.aborted_call:
            return super().answer(payload, requests)
        sampling = [{**params, "max_new_tokens": 2} for params in payload["sampling_params"]]
        rows = super().answer({**payload, "sampling_params": sampling}, requests)
        for row in rows:
            row["meta_info"]["finish_reason"] = {"type": "abort", "message": "paused"}
        return rows


def two_turns(template: ZooTemplate, answer: str, aborted_call: int, **options: Any) -> TensorDictBase:
    engine = Conversation(template, answer, aborted_call)
    asked = {"tokenizer": engine.ids, "hidden": None, "chat": "append", "on_error": "nan"}
    asked["generate_kwargs"] = {"max_new_tokens": 50}
    policy = SGLangHiddenWrapper(engine, **{**asked, **options})
    out = policy(ragged(history=[[{"role": "user", "content": "Where?"}]]))
    out = policy.resume(out)
    row = flat(out)[0].copy()
    question = History(role="user", content="Why?", batch_size=())
    prompt = row["history"].full.append(question, inplace=False, dim=-1)
    row["history"] = ChatHistory(prompt=prompt, batch_size=())
    return policy.resume(policy(lazy_stack([row])))


@pytest.mark.parametrize(
    "options", [{}, {"prefer_tokens": "strict"}, {"chat": "render", "prefer_tokens": True}], ids=str
)
@pytest.mark.parametrize("aborted_call", [1, 2])
@pytest.mark.parametrize("template", [CHATML, QWEN3, R1], ids=str)
def test_what_is_known_of_earlier_turns_stays(template: ZooTemplate, aborted_call: int, options: Any) -> None:
    """Masks, log-probs and the digest are those of a conversation in which nothing was aborted."""
    answer = "Paris" if template is CHATML else "<think>\nhm\n</think>\n\nParis"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "row 0: the ids of the turns before")
        found = two_turns(template, answer, aborted_call, **options)
        expected = two_turns(template, answer, 0, **options)
    assert flat(found)[0]["chat_digest"] == flat(expected)[0]["chat_digest"]
    assert flat(found)[0]["history"].full.content == flat(expected)[0]["history"].full.content
    assert_rows_equal(found, expected)
