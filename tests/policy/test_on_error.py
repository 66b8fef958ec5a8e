"""``on_error``: what a call writes of rows that went wrong, and that it loses nothing of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fake_engine import Answer, RecordingEngine, tiny_tokenizer
from helpers.policy_batches import TOKENIZER, batch_of, flat, make, tokens_batch
from tensordict import NonTensorData, TensorDictBase, lazy_stack
from torchrl.data import LazyStackStorage, ReplayBuffer

from torchrl_sglang_hidden import (
    Between,
    ChatTemplateError,
    HiddenSpec,
    InputError,
    LastTokens,
    LogitsSpec,
    PromptLengthError,
    RequestAbortedError,
    SpanError,
    TokenIdError,
)
from torchrl_sglang_hidden.spec.hidden import SEGMENTS

MODES = pytest.mark.parametrize("mode", ["history", "text", "tokens"])
PADDING = pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])


def aborting(row: int, queued: bool = False) -> RecordingEngine:
    def spoil(answers: Answer) -> None:
        meta = answers[row]["meta_info"]
        meta["finish_reason"] = {"type": "abort", "message": "out of memory"}
        if queued:
            answers[row].update(output_ids=[], text="")
            for field in meta.keys() - {"id", "finish_reason", "weight_version"}:
                del meta[field]

    return RecordingEngine(tokenizer=TOKENIZER, fault=spoil)


def same_but(out: TensorDictBase, expected: TensorDictBase, bad: int) -> None:
    """Check that every row but one is as it was without that one's trouble."""
    for row, (one, other) in enumerate(zip(flat(out), flat(expected), strict=True)):
        if row != bad:
            assert one["error"] == ""
            for key, value in other.items(True, True):
                torch.testing.assert_close(one[key], value, rtol=0, atol=0, equal_nan=True)


@MODES
def test_one_response_without_a_marker_keeps_the_63_others(mode: str) -> None:
    """NaN and count 0 in that row, whose response is there; the others whole."""
    spec = HiddenSpec(SEGMENTS, spans={"thought": Between("w7", None)})
    prompts = [f"w{1 + row % 8}" for row in range(63)] + ["w9"]
    w7, w9 = TOKENIZER("w7 w9")["input_ids"]
    # In a chat w9 is the system's word in every row.
    last = 2 if mode == "history" else 1
    engine = RecordingEngine(
        tokenizer=TOKENIZER, respond=lambda ids: [50, 51] if list(ids).count(w9) == last else [w7, 40, 41]
    )
    with pytest.raises(SpanError, match=r"row 63 .*span 'thought'.*'w7' is not in the response"):
        make(mode, engine=engine, hidden=spec)[0](batch_of(mode, prompts))
    out = make(mode, engine=engine, hidden=spec, on_error="nan")[0](batch_of(mode, prompts))
    states = out["hidden_states"]
    assert states.span_counts["thought"].tolist() == [2] * 63 + [0]
    assert states.spans["thought"].isnan().any(-1).tolist() == [False] * 63 + [True]
    assert states.response.isfinite().all()
    assert states.response_count[-1] == 2
    assert out["error"][:63] == [""] * 63
    assert out["error"][63].startswith("SpanError: row 63 (request recorded-63), span 'thought': the marker 'w7'")
    assert out["finish_reason"][63] == "length"


@MODES
@PADDING
@pytest.mark.parametrize("queued", [False, True], ids=["running", "queued"])
def test_an_aborted_row_comes_back_with_what_it_has(mode: str, pad_output: bool, queued: bool) -> None:
    with pytest.raises(RequestAbortedError, match="row 1 ") as caught:
        make(mode, engine=aborting(1, queued), pad_output=pad_output)[0](batch_of(mode))
    assert len(caught.value.completions) == 3
    out = make(mode, engine=aborting(1, queued), pad_output=pad_output, on_error="nan")[0](batch_of(mode))
    expected = make(mode, pad_output=pad_output)[0](batch_of(mode))
    if not (pad_output and queued):  # the width may be another
        same_but(out, expected, 1)
    row, whole = flat(out)[1], flat(expected)[1]
    assert row["finish_reason"] == "abort"
    assert row["error"].startswith("RequestAbortedError: row 1 ")
    assert not row["masks"].all_assistant_mask.any(), "no loss takes it for a whole answer"
    num_tokens = int(whole["masks"].all_attention_mask.sum())
    num_response = int(whole["masks"].all_assistant_mask.sum())
    assert row["masks"].all_attention_mask.sum() == (num_tokens - num_response if queued else num_tokens)
    if not queued:
        assert row["tokens"].response.equal(whole["tokens"].response)
        assert row["log_probs"].response.equal(whole["log_probs"].response) or pad_output
        assert row["hidden_states"].response.equal(whole["hidden_states"].response)
    else:
        assert row["hidden_states"].response.isnan().all()
        assert row["hidden_states"].full_count == 0


def aborting_ahead() -> RecordingEngine:
    """Return an engine that aborts the first prompt of its first call: of samples, the one that goes ahead."""

    def spoil(answers: Answer) -> None:
        if len(engine.payloads) == 1:
            answers[0]["meta_info"]["finish_reason"] = {"type": "abort", "message": "out of memory"}

    engine = RecordingEngine(tokenizer=TOKENIZER, respond=lambda ids: [40, 41, 42], fault=spoil)
    return engine


@PADDING
@pytest.mark.parametrize("segments", [("full",), ("prompt",), ("prompt", "response"), ("response",), SEGMENTS])
def test_samples_whose_prompt_was_aborted_have_no_rows_of_it(segments: Any, pad_output: bool) -> None:
    """What lacks the prompt's rows is NaN where it is padded, and empty where it is ragged; the rest is whole."""
    options: dict[str, Any] = {
        "hidden": HiddenSpec(segments, tokens=True), "on_error": "nan", "num_samples": 2, "pad_output": pad_output,
    }  # fmt: skip
    out = flat(make(engine=aborting_ahead(), **options)[0](batch_of("text")))
    expected = flat(make(engine=RecordingEngine(tokenizer=TOKENIZER, respond=lambda ids: [40, 41, 42]), **options)[0](
        batch_of("text")
    ))  # fmt: skip
    lacking = segments != ("response",)
    for index, (row, whole) in enumerate(zip(out, expected, strict=True)):
        assert row["tokens"].full.equal(whole["tokens"].full)
        assert bool(row["error"]) == (lacking and index < 2)
        for segment in segments:
            found, wanted = (getattr(one["token_hidden_states"], segment) for one in (row, whole))
            if not row["error"]:
                torch.testing.assert_close(found, wanted, rtol=0, atol=0)
            elif pad_output:
                assert found.shape == wanted.shape
                assert found.isnan().all()
            else:
                assert len(found) == 0
        pooled = row["hidden_states"]
        if "response" in segments:
            assert pooled.response.equal(whole["hidden_states"].response)
        if "prompt" in segments:
            assert (int(pooled.prompt_count) == 0) == pooled.prompt.isnan().all() == bool(row["error"])


@pytest.mark.parametrize("hidden", [None, HiddenSpec(("response",)), HiddenSpec(("response",), tokens=True)])
def test_samples_that_ask_nothing_of_their_prompt_miss_nothing(hidden: HiddenSpec | None) -> None:
    out = make(engine=aborting_ahead(), hidden=hidden, on_error="nan", num_samples=2)[0](batch_of("text"))
    assert [row["error"] for row in flat(out)] == [""] * 6
    assert all(row["tokens"].response.tolist() == [40, 41, 42] for row in flat(out))


def test_prompt_logits_that_are_missing_leave_the_states_of_the_response() -> None:
    options: dict[str, Any] = {"hidden": HiddenSpec(("response",), tokens=True), "num_samples": 2, "on_error": "nan"}
    policy, _ = make(engine=aborting_ahead(), logits=LogitsSpec(top_k=2, segments=("prompt",)), **options)
    row = flat(policy(batch_of("text")))[0]
    assert row["error"].startswith("RequestAbortedError: row 0 ")
    assert row["logits"].prompt[1:].isnan().all()
    assert row["token_hidden_states"].response.shape == (3, 8)
    assert row["token_hidden_states"].response.isfinite().all()


@PADDING
@pytest.mark.parametrize("num_samples", [None, 2])
def test_a_prompt_that_is_too_long_is_not_sent(pad_output: bool, num_samples: int | None) -> None:
    rows = [[6, 7], [8] * 60, [9, 10]]
    options: dict[str, Any] = {
        "pad_output": pad_output,
        "num_samples": num_samples,
        "hidden": HiddenSpec(("prompt", "response"), tokens=True),
    }
    batch = lazy_stack([tokens_batch(row)[0] for row in rows])
    with pytest.raises(PromptLengthError, match="row 1: the prompt has 60 tokens"):
        make("tokens", **options)[0](batch.clone())
    policy, engine = make("tokens", on_error="nan", logits=LogitsSpec(top_k=2, segments=("full",)), **options)
    out = flat(policy(batch.clone()))
    n = num_samples or 1
    assert [tuple(request.prompt_ids) for request in engine.requests[-2 * n :]] == [
        tuple(row) for row in (rows[0], rows[2]) for _ in range(n)
    ]
    for row in out[n : 2 * n]:
        assert row["finish_reason"] == "error"
        assert row["error"].startswith("PromptLengthError: row 1: the prompt has 60 tokens")
        assert row["tokens"].prompt.tolist()[-60:] == rows[1]
        assert not row["masks"].all_assistant_mask.any()
        assert row["hidden_states"].prompt.isnan().all()
        assert row["hidden_states"].prompt_count == 0
        assert (len(row["log_probs"].response) == 0) or row["log_probs"].response.isnan().all()
    assert [row["error"] for row in (*out[:n], *out[2 * n :])] == [""] * 2 * n


@MODES
def test_a_span_that_the_prompt_does_not_have(mode: str) -> None:
    spec = HiddenSpec(("prompt",), spans={"s": Between("w3", None, segment="prompt")})
    batch = batch_of(mode, ["w1 w2 w3 w4", "w4", "w3 w5"])
    with pytest.raises(SpanError, match="row 1, span 's'"):
        make(mode, hidden=spec)[0](batch.clone())
    policy, engine = make(mode, hidden=spec, on_error="nan")
    out = policy(batch.clone())
    assert len(engine.requests) == 2
    assert [error[:16] for error in out["error"]] == ["", "SpanError: row 1", ""]
    assert out["hidden_states"].span_counts["s"].bool().tolist() == [True, False, True]


def test_a_mask_that_allows_nothing() -> None:
    masks = torch.ones(3, 96, dtype=torch.bool)
    masks[1] = False
    policy, engine = make("text", action_mask_key="mask", on_error="nan")
    out = policy(batch_of("text").set("mask", masks))
    assert (len(engine.requests), out["error"][1][:23]) == (2, "ConstraintError: row 1,")


def test_a_chat_that_its_template_does_not_write() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'w4' in m.content %}{{ raise_exception('no w4 here') }}{% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    policy, engine = make("history", tokenizer=tokenizer, on_error="nan")
    out = flat(policy(batch_of("history")))
    assert (len(engine.requests), [row["error"] == "" for row in out]) == (2, [True, False, True])
    assert "no w4 here" in out[1]["error"]
    assert out[1]["tokens"].full.shape == (0,)
    assert out[1]["history"].prompt.content[-1] == "w4"


@pytest.mark.parametrize("pad_output", [False, True])
def test_a_scored_chat_that_its_template_does_not_write(pad_output: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'w4' in m.content %}{{ raise_exception('no w4 here') }}{% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    options: dict[str, Any] = {"generate": False, "on_error": "nan", "pad_output": pad_output}
    policy = make(
        "history",
        tokenizer=tokenizer,
        input_key=("history", "prompt"),
        logits=LogitsSpec(top_k=2, segments=("full",)),
        **options,
    )[0]
    out = flat(policy(batch_of("history")))
    assert [row["error"] == "" for row in out] == [True, False, True]
    assert "no w4 here" in out[1]["error"]
    assert not out[1]["masks"].all_attention_mask.any()
    assert out[1]["log_probs"].full.shape == out[1]["tokens"].full.shape == out[1]["masks"].all_assistant_mask.shape
    assert (out[1]["hidden_states"].full_count, out[0]["hidden_states"].full_count) == (0, 4)


@MODES
def test_scores_of_rows_that_are_too_long_are_nan(mode: str) -> None:
    long = "w4 " * 60
    policy = make(mode, generate=False, on_error="nan", input_key=(mode, "prompt"))[0]
    out = flat(policy(batch_of(mode, ["w1 w2", long.strip(), "w5"])))
    expected = flat(make(mode, generate=False, input_key=(mode, "prompt"))[0](batch_of(mode, ["w1 w2", "w5"])))
    assert [row["error"] == "" for row in out] == [True, False, True]
    assert out[1]["log_probs"].full.isnan().all()
    assert out[1]["log_probs"].full.shape == out[1]["tokens"].full.shape
    assert out[1]["hidden_states"].full_count == 0
    for row, other in zip((out[0], out[2]), expected, strict=True):
        assert row["log_probs"].full.equal(other["log_probs"].full)


# --- what concerns the whole call, and where the key is ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rows", "error"),
    [
        ({}, [[6, 7], [6, 96]], TokenIdError),
        ({"generate_kwargs": {"max_new_tokens": 64}}, [[6, 7], [6, 7]], PromptLengthError),
        ({"generate_kwargs": {"stop_token_ids": [96]}}, [[6, 7], [6, 7]], TokenIdError),
        ({"hidden": HiddenSpec(layers=9)}, [[6, 7], [6, 7]], InputError),
        ({"hidden": HiddenSpec(spans={"s": LastTokens(9)}), "generate_kwargs": {"max_new_tokens": 9}}, [[6, 7]], None),
    ],
)
def test_what_concerns_the_call_is_raised(options: dict[str, Any], rows: Any, error: type[Exception] | None) -> None:
    policy, engine = make("tokens", on_error="nan", **options)
    if error is None:
        assert policy(tokens_batch(*rows))["error"][0].startswith("SpanError")
        return
    with pytest.raises(error):
        policy(tokens_batch(*rows))
    assert engine.requests == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chat_template": None}, "has no chat template"),
        ({"chat_template": "chat.jinja"}, "reads no messages"),
        ({"chat_template": "{% for m in messages %}"}, "TemplateSyntaxError"),
        ({"chat_template_kwargs": {"enable_thinkin": True}}, r"has \['enable_thinkin'\], which the chat template"),
    ],
)
@pytest.mark.parametrize("generate", [True, False])
def test_a_template_that_writes_no_chat_concerns_the_call(options: Any, words: str, generate: bool) -> None:
    tokenizer = tiny_tokenizer()
    if "chat_template" in options:
        tokenizer.chat_template = None
    input_key = ("history", "prompt")
    policy, engine = make(
        "history", tokenizer=tokenizer, on_error="nan", generate=generate, input_key=input_key, **options
    )
    with pytest.raises(ChatTemplateError, match=words):
        policy(batch_of("history"))
    assert engine.requests == []


def test_a_rows_own_variable_that_the_template_does_not_read_concerns_the_row() -> None:
    batch = batch_of("history")
    flat(batch)[1]["chat_template_kwargs"] = NonTensorData({"enable_thinkin": True})
    policy, engine = make("history", on_error="nan")
    out = policy(batch)
    assert (len(engine.requests), [error == "" for error in out["error"]]) == (2, [True, False, True])


def test_a_call_may_say_otherwise() -> None:
    policy = make("text", engine=aborting(1))[0]
    assert policy(batch_of("text"), on_error="nan")["error"][1] != ""
    with pytest.raises(RequestAbortedError):
        policy(batch_of("text"))
    lenient = policy.get_new_version(on_error="nan")
    with pytest.raises(RequestAbortedError):
        lenient(batch_of("text"), on_error="raise")


def test_the_key_is_an_out_key_only_where_errors_are_kept() -> None:
    assert "error" not in make("text")[0].out_keys
    policy = make("text", on_error="nan")[0]
    assert "error" in policy.out_keys
    assert policy(batch_of("text"))["error"] == ["", "", ""]


@pytest.mark.parametrize("value", ["ignore", None, True])
def test_unknown_ways(value: Any) -> None:
    with pytest.raises(InputError, match=r"on_error=.*expected one of"):
        make("text", on_error=value)


def test_rows_of_all_outcomes_stack_and_are_stored() -> None:
    policy = make("tokens", engine=aborting(1), on_error="nan")[0]
    batch = lazy_stack([tokens_batch(row)[0] for row in ([6, 7], [8, 9, 10], [8] * 60)])
    out = policy(batch)
    assert [row["finish_reason"] for row in flat(out)][1:] == ["abort", "error"]
    buffer = ReplayBuffer(storage=LazyStackStorage(8), batch_size=8)
    buffer.extend(out)
    buffer.extend(make("tokens", on_error="nan")[0](tokens_batch([6, 7])))
    sampled = buffer.sample()
    assert set(sampled["error"]) >= {""}
    assert torch.cat([out["hidden_states"].response, out["hidden_states"].full]).shape == (6, 8)
