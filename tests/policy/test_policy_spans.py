"""Spans, layers and every token's states through `SGLangHiddenWrapper`; prompts that are only read; who wants states.

1. What is written under ``spans`` and ``token_hidden_states`` is what plain torch makes of the rows, and `out_keys`
   says so.
2. A marker found otherwise by the engine than here is an error.
3. ``max_new_tokens=0`` reads a prompt, generates nothing, and wants nothing of a response.
4. ``return_hidden_states`` turns states on and off: for a wrapper, a call, a row.
5. ``lora_path`` and ``priority`` go with a request, not with its sampling parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.fake_engine import EOS_ID, HIDDEN_SIZE, PAD_ID, RecordingEngine, of_layer, response_of, states_ND
from helpers.policy_batches import TOKENIZER, batch_of, flat, make, plain, tokens_batch
from helpers.reference_pooling import pool
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.modules.llm.policies import Tokens

from torchrl_sglang_hidden import (
    Between,
    HiddenSpec,
    LastTokens,
    LogitsSpec,
    Role,
    SGLangHiddenWrapper,
    TokenMask,
    Turn,
    ragged,
)
from torchrl_sglang_hidden.errors import AlignmentError, InputError, InputTypeError, SpanError
from torchrl_sglang_hidden.records import Completion, Pooled, Request
from torchrl_sglang_hidden.spec.hidden import SEGMENTS, Segment

STATES = {"hidden_states", "token_hidden_states"}


def rows_of(prompt: Sequence[int], response: Sequence[int], spec: HiddenSpec) -> torch.Tensor:
    """Return what the engine computes for a row: ``[P+T-1, D]``, or ``[P+T-1, K, D]``."""
    states = states_ND(prompt, response)
    layers = torch.stack([of_layer(states, layer % 4 if layer < -1 else layer) for layer in spec.layer_ids], 1)
    return layers if isinstance(spec.layers, tuple) else layers[:, 0]


def assert_states(row: TensorDictBase, spec: HiddenSpec, spans: dict[str, list[int]], response: list[int]) -> None:
    """Check the states of one unpadded row; ``spans`` gives the positions of each span."""
    prompt = row["tokens"].prompt.tolist()
    assert row["tokens"].response.tolist() == response
    rows = rows_of(prompt, response, spec)
    num_prompt, num_read = len(prompt), len(prompt) + len(response) - 1
    positions = {
        "prompt": list(range(num_prompt)), "response": list(range(num_prompt - 1, num_read)),
        "full": list(range(num_read)),
    }  # fmt: skip

    def assert_pooled(found: torch.Tensor, count: torch.Tensor, places: list[int]) -> None:
        expected = pool(rows[places].double(), str(spec.pooling))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert int(count) == len(places)

    if spec.pooling is None:
        assert "hidden_states" not in row
    else:
        hidden = row["hidden_states"]
        for segment in SEGMENTS:
            if segment in spec.segments:
                assert_pooled(getattr(hidden, segment), getattr(hidden, f"{segment}_count"), positions[segment])
            else:
                assert getattr(hidden, segment) is None
        for name, places in spans.items():
            assert_pooled(row["hidden_states", "spans", name], row["hidden_states", "span_counts", name], places)
    assert ("token_hidden_states" in row) == spec.tokens
    for segment in SEGMENTS if spec.tokens else ():
        found = getattr(row["token_hidden_states"], segment)
        if segment in spec.segments:
            torch.testing.assert_close(found, rows[positions[segment]].to(spec.dtype), rtol=0, atol=0)
        else:
            assert found is None


# --- what is written --------------------------------------------------------------------------------------------------

LAYERS: st.SearchStrategy[Any] = st.sampled_from([-1, 2, (0, -1), (-2,), (2, 0)])


@given(
    # Words of two digits: none is inside another.
    prompts=st.lists(st.lists(st.integers(16, 95), min_size=2, max_size=7), min_size=1, max_size=3),
    segments=st.lists(st.sampled_from(SEGMENTS), unique=True),
    pooling=st.sampled_from(["mean", "last", "max", "sum"]),
    layers=LAYERS,
    tokens=st.booleans(),
    num_samples=st.sampled_from([None, 1, 2]),
    padded=st.booleans(),
)
def test_states_are_those_of_the_rows(
    prompts: list[list[int]],
    segments: Any,
    pooling: Any,
    layers: Any,
    tokens: bool,
    num_samples: int | None,
    padded: bool,
) -> None:
    spec = HiddenSpec(
        tuple(segments),
        pooling,
        layers,
        tokens and bool(segments),
        spans={
            "tail": LastTokens(2, allow_fewer=True),
            "end": LastTokens(2, "prompt"),
            "mask": TokenMask("mask"),
            "head": Between(None, TOKENIZER.decode(prompts[0][-1:]), "prompt", unclosed="end"),
        },
    )
    policy, _ = make("tokens", hidden=spec, num_samples=num_samples, pad_output=padded, inplace=False)
    masks = [[place % 2 == 0 for place in range(len(prompt))] for prompt in prompts]
    rows = [
        TensorDict(tokens=Tokens(prompt=torch.tensor(ids)), mask=torch.tensor(mask), batch_size=())
        for ids, mask in zip(prompts, masks, strict=True)
    ]
    marker = prompts[0][-1]
    if any(prompt[0] == marker for prompt in prompts):
        with pytest.raises(SpanError, match=r"span 'head': nothing stands between"):
            policy(lazy_stack(rows))
        return
    out = policy(lazy_stack(rows))
    assert all(key in out for key in policy.out_keys)
    if padded:
        return
    for index, row in enumerate(flat(out)):
        prompt = prompts[index // (num_samples or 1)]
        response = response_of(prompt)
        last = len(prompt) + len(response) - 2
        cut = prompt.index(marker) if marker in prompt else len(prompt)
        spans = {
            "tail": list(range(max(last - 1, len(prompt) - 1), last + 1)),
            "end": [len(prompt) - 2, len(prompt) - 1],
            "mask": list(range(0, len(prompt), 2)),
            "head": list(range(cut)),
        }
        assert_states(row, spec, spans, response)


@pytest.mark.parametrize(
    ("hidden", "leaves"),
    [
        (HiddenSpec(("prompt",), spans={"a": LastTokens(1), "b": LastTokens(1, "prompt")}),
         ["prompt", "prompt_count", ("spans", "a"), ("span_counts", "a"), ("spans", "b"), ("span_counts", "b")]),
        (HiddenSpec((), spans={"a": LastTokens(1)}), [("spans", "a"), ("span_counts", "a")]),
        (HiddenSpec(("response", "full"), tokens=True), ["response", "response_count", "full", "full_count"]),
        (HiddenSpec(("full",), None, tokens=True), []),
    ],
)  # fmt: skip
def test_out_keys_say_which_states_are_written(hidden: HiddenSpec, leaves: list[Any]) -> None:
    policy, _ = make(hidden=hidden, token_hidden_states_key=("my", "rows"))
    out = policy(batch_of("text"))
    assert all(key in out for key in policy.out_keys)
    expected = {("hidden_states", *((leaf,) if isinstance(leaf, str) else leaf)) for leaf in leaves}
    expected |= {("my", "rows", segment) for segment in hidden.segments if hidden.tokens}
    assert {key for key in policy.out_keys if isinstance(key, tuple)} == expected
    assert ("hidden_states" in out) is bool(leaves)
    assert (("my", "rows") in out) is hidden.tokens


def test_a_state_key_that_is_none_is_left_out() -> None:
    options = {"hidden": HiddenSpec(tokens=True), "hidden_states_key": None, "token_hidden_states_key": None}
    policy, _ = make(**options)
    assert not any(isinstance(key, tuple) for key in policy.out_keys)
    assert not STATES & set(policy(batch_of("text")).keys())
    with pytest.raises(InputError, match=r"'hidden_states' is the key of 2 outputs"):
        make(hidden=HiddenSpec(tokens=True), token_hidden_states_key="hidden_states")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_token_states_in_another_dtype(dtype: torch.dtype) -> None:
    out = make("tokens", hidden=HiddenSpec(("prompt",), tokens=True, dtype=dtype))[0](tokens_batch([6, 7]))
    found = out[0]["token_hidden_states"].prompt
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), states_ND([6, 7], [8])[:2].to(dtype).float(), rtol=1e-2, atol=0)


def test_states_of_a_chat() -> None:
    spans = {"asked": Turn(-1), "told": Role("system"), "start": Between("<|start|>", "<|end|>", "prompt")}
    policy, engine = make("history", hidden=HiddenSpec((), spans=spans))
    out = policy(batch_of("history", ["w1 w2"], (1,)))
    # <|start|> system w9 <|end|> <|start|> user w1 w2 <|end|> <|start|> assistant
    rows = states_ND(engine.requests[0].prompt_ids, [6])
    for name, places in {"asked": [6, 7], "told": [2], "start": [1, 2]}.items():
        found = out[0]["hidden_states", "spans", name]
        torch.testing.assert_close(found, rows[places].mean(0), rtol=1e-5, atol=1e-6)


# --- markers in the response ------------------------------------------------------------------------------------------

THOUGHT = Between("w1", "w2")


def thinking(*responses: Sequence[str], **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    """Return a policy that answers its n-th prompt, of one token, with the n-th text."""
    texts = {6 + index: TOKENIZER(text)["input_ids"] for index, text in enumerate(responses)}
    engine = RecordingEngine(tokenizer=TOKENIZER, respond=lambda prompt_ids: texts[prompt_ids[0]])
    spec = HiddenSpec(("response",), spans={"why": THOUGHT})
    return make("tokens", engine=engine, hidden=spec, **options)


def test_a_thought_is_pooled_over_the_rows_that_produced_it() -> None:
    responses = ["w0 w1 w3 w4 w2 w5", "w1 w7 w2"]
    policy, _ = thinking(*responses)
    out = policy(tokens_batch([6], [7]))
    for row, text, places in zip(flat(out), responses, ([2, 3], [1]), strict=True):
        states = states_ND(row["tokens"].prompt.tolist(), TOKENIZER(text)["input_ids"])
        found = row["hidden_states", "spans", "why"]
        torch.testing.assert_close(found, states[places].mean(0), rtol=1e-5, atol=1e-6)
        assert row["hidden_states", "span_counts", "why"] == len(places)


@pytest.mark.parametrize(
    ("mode", "prompt", "opened"),
    [("history", "w10 w20", True), ("history", "w10 w20 ", True), ("history", "w20 w10", False)],
)
def test_a_thought_that_the_prompt_opened(mode: str, prompt: str, opened: bool) -> None:
    # As R1's template does: the generation prompt ends with the first marker, and the response has the second alone.
    thought, marked = [8, 9, 27, 7, EOS_ID], [26, 8, 27, 7, EOS_ID]
    engine = RecordingEngine(tokenizer=TOKENIZER, respond=lambda ids: thought if opened else marked)
    hidden = HiddenSpec(("response",), spans={"thought": Between("w20", "w21")})
    options = {"chat_template": "{{ messages[1].content }}"} if mode == "history" else {}
    policy, _ = make(mode, engine=engine, hidden=hidden, **options)
    row = policy(batch_of(mode, [prompt]))[0]
    given = row["tokens"].prompt.tolist()
    assert row["hidden_states", "span_counts", "thought"] == (2 if opened else 1)
    start = 0 if opened else 1
    rows = rows_of(given, thought if opened else marked, hidden)[len(given) - 1 + start : len(given) + 1]
    torch.testing.assert_close(row["hidden_states", "spans", "thought"], rows.mean(0), rtol=1e-5, atol=1e-5)


def test_a_thought_that_a_prefill_opened() -> None:
    engine = RecordingEngine(tokenizer=TOKENIZER, respond=lambda ids: [8, 27, 7, EOS_ID])
    hidden = HiddenSpec(("response",), spans={"thought": Between("w20", "w21")})
    policy, _ = make("history", engine=engine, hidden=hidden)
    asked = {"role": "user", "content": "w1 w20"}
    for words, count in (("w20 w2", 1), ("w20 w2 w21", None), ("w2", None)):
        chat = [asked, {"role": "assistant", "content": words, "is_complete": False}]
        if count is None:
            with pytest.raises(SpanError, match=r"'w20' is not in the response.*or use start=None"):
                policy(ragged(history=[chat]))
        else:
            assert policy(ragged(history=[chat]))[0]["hidden_states", "span_counts", "thought"] == count


@pytest.mark.parametrize("num_samples", [None, 2])
def test_a_thought_that_was_read_otherwise_is_an_error(num_samples: int | None) -> None:
    policy, engine = thinking("w1 w3 w2", "w1 w3 w4 w2", num_samples=num_samples)
    generate = engine.generate

    def longer(requests: Sequence[Request]) -> list[Completion]:
        completions = generate(requests)
        spans = {"why": Pooled(torch.zeros(HIDDEN_SIZE), 3)}
        return [*completions[:-1], dataclasses.replace(completions[-1], spans=spans)]

    engine.generate = longer  # type: ignore[method-assign]
    batch = tokens_batch([6], [7])
    before = plain(batch)
    sample = 0 if num_samples is None else 1
    with pytest.raises(
        AlignmentError, match=rf"row 1, sample {sample}, span 'why': 3 rows .* the 2 rows of Between\(start='w1'"
    ):
        policy(batch)
    assert plain(batch) == before


def test_a_response_without_the_markers() -> None:
    policy, _ = thinking("w1 w3 w2", "w3 w4")
    with pytest.raises(SpanError, match=r"row 1.*span 'why'.*'w1' is not in the response"):
        policy(tokens_batch([6], [7]))


# --- prompts that are only read ---------------------------------------------------------------------------------------

READ = HiddenSpec(("prompt",), tokens=True, spans={"end": LastTokens(1, "prompt")})


@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("way", ["wrapper", "call"])
def test_a_prompt_is_read_and_nothing_generated(mode: str, padded: bool, way: str) -> None:
    options = {"max_tokens": 0}
    policy, engine = make(mode, hidden=READ, pad_output=padded, generate_kwargs=options if way == "wrapper" else None)
    out = policy(batch_of(mode), **(options if way == "call" else {}))
    assert all(key in out for key in policy.out_keys)
    assert all(request.reads_only for request in engine.requests)
    for row, request in zip(flat(out), engine.requests, strict=True):
        mask, ids = row["masks"].all_attention_mask, list(request.prompt_ids)
        assert row["text"].response == ""
        assert row["text"].full == row["text"].prompt
        assert row["finish_reason"] == "length"
        assert row["tokens"].response.shape == row["log_probs"].response.shape == (0,)
        assert row["tokens"].full[mask].tolist() == row["tokens"].prompt[mask].tolist() == ids
        assert not row["masks"].all_assistant_mask.any()
        states = states_ND(ids, [0])
        torch.testing.assert_close(row["hidden_states"].prompt, states.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(row["hidden_states", "spans", "end"], states[-1])
        torch.testing.assert_close(row["token_hidden_states"].prompt[mask], states)
        if mode == "history":
            assert row["history"].full.content[-1] == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"hidden": None},
            r"max_new_tokens=0 without hidden states, logits or scores of heads: there is nothing to compute",
        ),
        ({"hidden": True}, r"max_new_tokens=0 with segments=\('response',\).*ask for segments=\('prompt',\)"),
        ({"hidden": HiddenSpec(("prompt", "full"))}, r"no 'full'"),
        ({"hidden": HiddenSpec((), spans={"a": LastTokens(1)})}, r"spans=\{'a': LastTokens"),
        ({"hidden": READ, "num_samples": 2}, r"max_new_tokens=0 with num_samples=2"),
    ],
)
def test_what_a_prompt_that_is_only_read_does_not_have(options: dict[str, Any], words: str) -> None:
    policy, engine = make("text", **options)
    with pytest.raises(InputError, match=words):
        policy(batch_of("text"), max_new_tokens=0)
    # A scorer of it has nothing to do with that.
    policy.get_new_version(generate_kwargs={"max_new_tokens": 0}, generate=False)
    assert engine.requests == []


# --- who wants states -------------------------------------------------------------------------------------------------


def test_the_option_turns_a_wrappers_states_on_and_off() -> None:
    on, _ = make(hidden=None, generate_kwargs={"return_hidden_states": True})
    assert on.hidden == HiddenSpec()
    assert "hidden_states" in on(batch_of("text"))
    kept, _ = make(hidden=READ, generate_kwargs={"return_hidden_states": True})
    assert kept.hidden == READ
    off, engine = make(hidden=READ, generate_kwargs={"return_hidden_states": False})
    assert off.hidden is None
    assert not STATES & set(off(batch_of("text")).keys())
    assert all(request.hidden is None for request in engine.requests)
    assert all("return_hidden_states" not in request.sampling for request in engine.requests)
    for policy in (on, kept, off):
        assert policy.get_new_version().config == policy.config
    # Two names of one thing: the one that is changed wins.
    assert off.get_new_version(hidden=READ).hidden == READ
    assert on.get_new_version(hidden=None).hidden is None
    assert kept.get_new_version(generate_kwargs={"return_hidden_states": False}).hidden is None


def test_the_option_turns_a_calls_states_on_and_off() -> None:
    policy, engine = make(hidden=READ, inplace=False)
    assert not STATES & set(policy(batch_of("text"), return_hidden_states=False).keys())
    assert set(policy(batch_of("text"), return_hidden_states=True).keys()) >= STATES
    assert [request.hidden for request in engine.requests] == [None] * 3 + [READ] * 3
    without, engine = make(hidden=None, inplace=False)
    out = without(batch_of("text"), return_hidden_states=True)
    assert out["hidden_states"].response.shape == (3, HIDDEN_SIZE)
    assert "hidden_states" not in without(batch_of("text"))
    assert without.hidden is None
    clash, engine = make(hidden=None, text_key="hidden_states")
    clash(batch_of("text"))
    with pytest.raises(InputError, match=r"'hidden_states' is the key of 2 outputs"):
        clash(batch_of("text"), return_hidden_states=True)
    with pytest.raises(InputTypeError, match=r"return_hidden_states=1: expected True or False"):
        policy(batch_of("text"), return_hidden_states=1)


def test_a_call_without_states_leaves_none_of_the_turn_before() -> None:
    policy, _ = make(hidden=HiddenSpec(tokens=True))
    batch = batch_of("text")
    policy(batch)
    assert set(batch[0].keys()) >= STATES
    policy(batch, return_hidden_states=False)
    assert not STATES & set(batch[0].keys())


@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("trailing", [True, False])
def test_each_row_says_whether_it_wants_states(num_samples: int | None, padded: bool, trailing: bool) -> None:
    spec = HiddenSpec(SEGMENTS, tokens=True, spans={"end": LastTokens(1, "prompt"), "tail": LastTokens(1)})
    policy, engine = make("tokens", hidden=spec, num_samples=num_samples, pad_output=padded, inplace=False)
    batch = batch_of("tokens")
    wants = torch.tensor([True, False, True])
    batch["return_hidden_states"] = wants[:, None] if trailing else wants
    out = policy(batch)
    assert [request.hidden is not None for request in engine.requests[:3]] == wants.tolist()
    many = num_samples or 1
    for index, row in enumerate(flat(out)):
        wanted = bool(wants[index // many])
        hidden = row["hidden_states"]
        for vector, count in (
            (hidden.prompt, hidden.prompt_count),
            (hidden.full, hidden.full_count),
            (hidden.spans["end"], hidden.span_counts["end"]),
            (hidden.spans["tail"], hidden.span_counts["tail"]),
        ):
            assert vector.shape == (HIDDEN_SIZE,)
            assert vector.isnan().all() == (not wanted)
            assert (int(count) == 0) == (not wanted)
        if not padded:
            assert (len(row["token_hidden_states"].full) == 0) == (not wanted)
        assert len(row["log_probs"].response) == len(row["tokens"].response)
    assert out["hidden_states"].response.shape[-1] == HIDDEN_SIZE, "the batch stays dense"


def test_a_single_row_that_wants_none_and_a_scorers() -> None:
    policy, engine = make("tokens", hidden=True)
    row = TensorDict(tokens=Tokens(prompt=torch.tensor([6, 7])), return_hidden_states=False, batch_size=())
    assert policy(row)["hidden_states"].response.isnan().all()
    scorer = policy.get_new_version(generate=False, inplace=False)
    assert scorer(row)["hidden_states"].full.isnan().all()
    assert scorer(row, return_hidden_states=False).get("hidden_states", None) is None
    assert all(request.hidden is None for request in engine.requests)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (torch.ones(1), InputTypeError, r"row 0, 'return_hidden_states': .*expected one bool per row"),
        (torch.ones(1, 2).bool(), InputTypeError, r"row 0, 'return_hidden_states'"),
        (torch.ones(1, dtype=torch.int64), InputTypeError, r"row 0, 'return_hidden_states'"),
    ],
)
def test_a_wish_that_is_no_bool(value: torch.Tensor, error: type[InputError], words: str) -> None:
    policy, engine = make("tokens")
    with pytest.raises(error, match=words):
        policy(tokens_batch([6, 7], return_hidden_states=value))
    assert engine.requests == []


@pytest.mark.parametrize("options", [{"hidden": None}, {}])
def test_a_row_wants_what_the_call_does_not_return(options: dict[str, Any]) -> None:
    policy, engine = make("tokens", **options)
    wanting = tokens_batch([6, 7], return_hidden_states=torch.tensor([True]))
    with pytest.raises(InputError, match=r"row 0: 'return_hidden_states' is True, and this call returns no hidden"):
        policy(wanting, **({} if options else {"return_hidden_states": False}))
    assert engine.requests == []
    quiet = tokens_batch([6, 7], return_hidden_states=torch.tensor([False]))
    assert "hidden_states" not in policy(quiet, return_hidden_states=False)


# --- adapters and priorities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generate", [True, False])
def test_an_adapter_and_a_priority_go_with_every_request(generate: bool) -> None:
    options = {"lora_path": "poet", "priority": -3, "temperature": 0.5}
    policy, engine = make("tokens", generate=generate, generate_kwargs=options, inplace=False)
    batch = TensorDict(
        tokens=Tokens(**{"prompt" if generate else "full": torch.tensor([[6, 7]])}, batch_size=1), batch_size=1
    )
    policy(batch)
    policy(batch, lora_path="judge", priority=2)
    policy(batch, lora_path=None, priority=None)
    assert [(request.lora, request.priority) for request in engine.requests] == [
        ("poet", -3),
        ("judge", 2),
        (None, None),
    ]
    assert not any({"lora_path", "priority"} & request.sampling.keys() for request in engine.requests)
    assert engine.payloads[0]["lora_path"] == ["poet"]
    assert policy.get_new_version().config == policy.config


@pytest.mark.parametrize(
    ("options", "error"),
    [({"lora_path": ""}, InputError), ({"lora_path": 1}, InputTypeError), ({"priority": 1.5}, InputTypeError),
     ({"priority": True}, InputTypeError), ({"priority": 2**63}, InputError)],
)  # fmt: skip
def test_adapters_and_priorities_that_are_none(options: dict[str, Any], error: type[InputError]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        make(generate_kwargs=options)


# --- scoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last", "max", "sum", None])
def test_a_scored_sequence_has_all_of_its_states(padded: bool, pooling: Any) -> None:
    spans = {} if pooling is None else {"end": LastTokens(2, "prompt"), "sampled": LastTokens(1)}
    spec = HiddenSpec(("response",), pooling, (0, -1), tokens=True, spans=spans)
    policy, _ = make("tokens", hidden=spec, generate=False, pad_output=padded)
    sequences = [[6, 7, 8], [9, EOS_ID]]
    out = policy(lazy_stack([TensorDict(tokens=Tokens(full=torch.tensor(ids)), batch_size=()) for ids in sequences]))
    assert all(key in out for key in policy.out_keys)
    for row, ids in zip(flat(out), sequences, strict=True):
        rows, real = rows_of(ids, [0], spec), row["masks"].all_attention_mask
        torch.testing.assert_close(row["token_hidden_states"].full[real], rows)
        assert (row["token_hidden_states"].full[~real] == 0).all()
        assert row["token_hidden_states"].response is None
        if pooling is None:
            assert "hidden_states" not in row
            continue
        hidden = row["hidden_states"]
        torch.testing.assert_close(hidden.full, pool(rows, pooling), rtol=1e-5, atol=1e-6)
        assert set(hidden.spans.keys()) == {"end"}
        assert hidden.span_counts["end"] == 2
    assert PAD_ID == EOS_ID, "a genuine EOS at the end is no padding"


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("generate", [True, False])
def test_keys_are_plain_strings_whatever_the_segments_are(padded: bool, generate: bool) -> None:
    """A `Segment` is a string of a class of its own, which a stored TensorDict should not need."""
    segments = tuple(Segment)
    logits = LogitsSpec(top_k=2, segments=segments if generate else ("full",))
    policy, _ = make(
        "tokens", hidden=HiddenSpec(segments, tokens=True), logits=logits, generate=generate, pad_output=padded
    )
    tokens = {"prompt" if generate else "full": torch.tensor([6, 7])}
    [row] = flat(policy(lazy_stack([TensorDict(tokens=Tokens(**tokens), batch_size=())])))
    keys = [*row.keys(True, True), *policy.out_keys]
    assert {("hidden_states", "full"), ("token_hidden_states", "full"), ("logits", "full")} <= set(keys)
    for key in keys:
        assert {type(part) for part in (key if isinstance(key, tuple) else (key,))} == {str}, key
