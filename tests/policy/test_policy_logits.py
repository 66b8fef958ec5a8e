"""`Logits` and ``logits_only`` over an engine with made-up logits: every row stands at its token.

1. The columns that were asked for, of every segment, padded or not, for any batch shape.
2. Given sequences: ``full``, and ``logits_only`` as TorchRL defines it.
3. What is asked of the engine, and what cannot be asked.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.fake_engine import PAD_ID, WORDS, RecordingEngine, logits_V, response_of, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.modules.llm.policies import Masks, Text, Tokens

from torchrl_sglang_hidden import (
    ActionMask,
    HiddenSpec,
    InputError,
    InputTypeError,
    Logits,
    LogitsSpec,
    SGLangHiddenError,
    SGLangHiddenWrapper,
    TokenIdError,
)
from torchrl_sglang_hidden.spec.hidden import SEGMENTS

TOKENIZER = tiny_tokenizer()
V = len(WORDS)
PROMPTS = [[6, 7, 8], [9], [10, 11, 12, 13]]
FIELDS = {"prompt": "prompt_token_ids", "response": "token_ids", "full": "full_token_ids"}
TEMPERATURE = 0.5


def make(mode: str = "tokens", **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    engine = options.pop("engine", None) or RecordingEngine(tokenizer=TOKENIZER)
    return SGLangHiddenWrapper(
        engine, **{"tokenizer": TOKENIZER, "input_mode": mode, "hidden": None, **options}
    ), engine


def ragged(rows: list[list[int]], field: str = "prompt", shape: tuple[int, ...] | None = None) -> TensorDictBase:
    out: list[TensorDictBase] = [TensorDict(tokens=Tokens(**{field: torch.tensor(ids)}), batch_size=()) for ids in rows]
    for size in reversed((len(rows),) if shape is None else shape):
        out = [lazy_stack(out[start : start + size]) for start in range(0, len(out), size)]
    return out[0]


def flat(td: TensorDictBase) -> list[TensorDictBase]:
    return [row for part in td.unbind(0) for row in flat(part)] if td.ndim else [td]


def head_NV(ids: list[int], sampled: int = 0) -> torch.Tensor:
    """What the made-up head says of each token given those before it; of token 0 nothing, which is zeros.

    Args:
        ids: the sequence.
        sampled: how many at its end were sampled: the head prefers those that came out.
    """
    rows = [torch.zeros(V), *(logits_V(ids[:place]) for place in range(1, len(ids)))]
    for place in range(len(ids) - sampled, len(ids)):
        rows[place][ids[place]] = 20.0
    return torch.stack(rows)


def columns(rows_NV: torch.Tensor, spec: LogitsSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the requested columns, and their ids where they differ from row to row. Row 0 is of no token."""
    if spec.top_k is not None:
        values_NC, ids_NC = rows_NV.topk(spec.top_k, -1)
        ids_NC[0] = torch.arange(spec.top_k)
        return values_NC, ids_NC
    return (rows_NV if spec.full else rows_NV[:, list(spec.token_ids or ())]), None


def pad(values: torch.Tensor, left: int, right: int) -> torch.Tensor:
    empty = torch.zeros(1, *values.shape[1:], dtype=values.dtype)
    return torch.cat([*[empty] * left, values, *[empty] * right])


# --- 1. what was sampled ---------------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.lists(st.integers(6, 95), min_size=1, max_size=5), min_size=1, max_size=4),
    selection=st.sampled_from([{"full": True}, {"top_k": 3}, {"token_ids": (9, 1, 50)}]),
    segments=st.lists(st.sampled_from(SEGMENTS), min_size=1, unique=True).map(tuple),
    stage=st.sampled_from(["raw", "processed"]),
    padded=st.booleans(),
    grid=st.booleans(),
)
def test_every_row_stands_at_its_token(
    rows: list[list[int]], selection: Any, segments: Any, stage: Any, padded: bool, grid: bool
) -> None:
    spec = LogitsSpec(segments=segments, stage=stage, **selection)
    policy, _ = make(logits=spec, pad_output=padded, generate_kwargs={"temperature": TEMPERATURE})
    shape = (1, len(rows)) if grid else (len(rows),)
    out = policy(ragged(rows, shape=shape))
    assert out.batch_size == shape
    most = [max(map(len, rows)), max(len(response_of(ids)) for ids in rows)]
    for row, prompt in zip(flat(out), rows, strict=True):
        response = response_of(prompt)
        assert isinstance(row["logits"], Logits)
        left, right = (most[0] - len(prompt), most[1] - len(response)) if padded else (0, 0)
        rows_NV = head_NV(prompt + response, len(response))
        if stage == "processed":  # a prompt's are the model's own at both stages
            rows_NV[len(prompt) :] /= TEMPERATURE
        values_NC, ids_NC = columns(rows_NV, spec)
        places = {"prompt": slice(0, len(prompt)), "response": slice(len(prompt), None), "full": slice(None)}
        pads = {"prompt": (left, 0), "response": (0, right), "full": (left, right)}
        for segment in SEGMENTS:
            found, ids = getattr(row["logits"], segment), getattr(row["logits"], FIELDS[segment])
            if segment not in segments:
                assert found is None
                assert ids is None
                continue
            expected_NC = pad(values_NC[places[segment]], *pads[segment])
            assert len(found) == len(getattr(row["tokens"], segment))
            torch.testing.assert_close(found, expected_NC, atol=1e-5, rtol=0)
            assert (ids is None) == (ids_NC is None)
            if ids_NC is not None:
                assert ids.dtype == torch.int64
                assert ids.tolist() == pad(ids_NC[places[segment]], *pads[segment]).tolist()


def test_processed_logits_are_those_of_the_log_probs() -> None:
    policy, _ = make(
        logits=LogitsSpec(full=True, stage="processed"),
        constraints=ActionMask([20, 21, 22]),
        generate_kwargs={"temperature": TEMPERATURE},
    )
    for row in policy(ragged(PROMPTS)).unbind(0):
        log_probs_TV = row["logits"].response.log_softmax(-1)
        found_T = log_probs_TV.gather(-1, row["tokens"].response[:, None])[:, 0]
        torch.testing.assert_close(found_T, row["log_probs"].response, atol=1e-5, rtol=0)
        assert (row["logits"].response > -math.inf).sum(-1).tolist() == [3] * len(found_T)


def test_raw_logits_know_nothing_of_constraints() -> None:
    policy, _ = make(logits=LogitsSpec(full=True), constraints=ActionMask([20, 21, 22]))
    for row in policy(ragged(PROMPTS)).unbind(0):
        assert row["logits"].response.isfinite().all()


def test_logits_of_samples() -> None:
    policy, _ = make(logits=LogitsSpec(top_k=2, segments=("prompt", "response")), num_samples=2)
    out = policy(ragged(PROMPTS))
    assert out.batch_size == (3, 2)
    for row, prompt in zip(flat(out), [ids for ids in PROMPTS for _ in range(2)], strict=True):
        response = response_of(prompt)
        values_NC, ids_NC = columns(head_NV(prompt + response, len(response)), LogitsSpec(top_k=2))
        assert torch.equal(row["logits"].prompt, values_NC[: len(prompt)])
        assert torch.equal(row["logits"].token_ids, ids_NC[len(prompt) :])


def test_the_dtype_asked_for() -> None:
    policy, _ = make(logits=LogitsSpec(full=True, dtype=torch.bfloat16, segments=SEGMENTS))
    for row in policy(ragged(PROMPTS)).unbind(0):
        assert {getattr(row["logits"], segment).dtype for segment in SEGMENTS} == {torch.bfloat16}


def test_the_prompt_alone() -> None:
    policy, engine = make(logits=LogitsSpec(token_ids=[9, 8], segments=("prompt",)))
    for row, prompt in zip(policy(ragged(PROMPTS), max_new_tokens=0).unbind(0), PROMPTS, strict=True):
        assert torch.equal(row["logits"].prompt, head_NV(prompt)[:, [9, 8]])
        assert (row["logits"].response, len(row["tokens"].response)) == (None, 0)
    assert all(request.reads_only for request in engine.requests)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("logits_key", ["logits", ("my", "logits")])
@pytest.mark.parametrize("selection", [{"top_k": 2}, {"full": True}])
def test_out_keys_list_what_is_written(generate: bool, logits_key: Any, selection: Any) -> None:
    spec = LogitsSpec(segments=("prompt", "response"), **selection)
    policy, _ = make(logits=spec, logits_key=logits_key, generate=generate, inplace=False)
    out = policy(ragged(PROMPTS, "prompt" if generate else "full"))
    path = (logits_key,) if isinstance(logits_key, str) else logits_key
    listed = {key[len(path) :] for key in policy.out_keys if isinstance(key, tuple) and key[: len(path)] == path}
    written = out[0].get(logits_key).to_tensordict().keys(True, True)
    assert listed == {key if isinstance(key, tuple) else (key,) for key in written}


def test_logits_replace_those_of_the_turn_before() -> None:
    policy, _ = make(logits=LogitsSpec(top_k=2, segments=("response",)))
    batch = policy(ragged(PROMPTS))
    again = policy.get_new_version(logits=LogitsSpec(full=True, segments=("prompt",)))(batch)
    for row in again.unbind(0):
        assert row["logits"].response is row["logits"].token_ids is None
        assert row["logits"].prompt.shape[1] == V


def test_without_logits_nothing_is_written_or_asked_for() -> None:
    policy, engine = make()
    assert "logits" not in policy(ragged(PROMPTS))
    assert [request.logits for request in engine.requests] == [None] * 3
    left_out, _ = make(logits=LogitsSpec(full=True), logits_key=None)
    assert "logits" not in left_out(ragged(PROMPTS))


# --- 2. given sequences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("selection", [{"full": True}, {"top_k": 3}, {"token_ids": (9, 1)}])
def test_given_sequences_have_full(selection: Any, padded: bool) -> None:
    spec = LogitsSpec(segments=("response",), **selection)
    policy, engine = make(generate=False, logits=spec, pad_output=padded)
    width = max(map(len, PROMPTS))
    for row, ids in zip(policy(ragged(PROMPTS, "full")).unbind(0), PROMPTS, strict=True):
        values_NC, ids_NC = columns(head_NV(ids), spec)
        left = width - len(ids) if padded else 0
        assert torch.equal(row["logits"].full, pad(values_NC, left, 0))
        assert row["logits"].prompt is row["logits"].response is None
        found = row["logits"].full_token_ids
        assert found is ids_NC is None or torch.equal(found, pad(ids_NC, left, 0))
        assert row["log_probs"].full is not None
    assert {request.logits for request in engine.requests} == {LogitsSpec(segments=("prompt",), **selection)}


@pytest.mark.parametrize(
    ("logits", "own"),
    [
        (None, LogitsSpec(full=True)),
        (LogitsSpec(top_k=2), LogitsSpec(full=True)),
        (LogitsSpec(full=True, dtype=torch.bfloat16), LogitsSpec(full=True, dtype=torch.bfloat16)),
        (LogitsSpec(token_ids=[9, 1]), LogitsSpec(token_ids=[9, 1])),
    ],
)
@pytest.mark.parametrize("padded", [True, False])
def test_logits_only(logits: LogitsSpec | None, own: LogitsSpec, padded: bool) -> None:
    policy, engine = make(generate=False, logits=logits, pad_output=padded, hidden=HiddenSpec(tokens=True))
    batch = ragged(PROMPTS, "full")
    # A row's wish for states is not this call's.
    batch["return_hidden_states"] = torch.ones(3, 1, dtype=torch.bool)
    batch["log_probs"] = batch["tokens"].clone()  # of another call, and gone
    out = policy(batch, logits_only=True)
    assert out is batch
    assert set(out.keys()) == {"text", "tokens", "masks", "weight_version", "logits", "return_hidden_states"}
    width = max(map(len, PROMPTS))
    for row, ids in zip(out.unbind(0), PROMPTS, strict=True):
        values_NC, _ = columns(head_NV(ids), own)
        assert row["logits"].dtype == own.dtype
        assert torch.equal(row["logits"], pad(values_NC.to(own.dtype), width - len(ids) if padded else 0, 0))
    for request in engine.requests:
        assert (request.hidden, request.score_prompt, request.return_log_probs, request.spans) == (
            None,
            False,
            False,
            {},
        )
        assert (request.logits.stage, request.logits.segments) == ("processed", ("prompt",))


def test_logits_only_of_any_batch() -> None:
    policy, _ = make(generate=False, logits_key=("my", "logits"))
    one = policy(ragged(PROMPTS, "full")[0], logits_only=True)
    assert torch.equal(one["my", "logits"], head_NV(PROMPTS[0]))
    grid = policy(ragged(PROMPTS, "full", (3, 1)), logits_only=True)
    assert torch.equal(grid[2, 0]["my", "logits"], head_NV(PROMPTS[2]))
    fresh = policy.get_new_version(inplace=False)(ragged(PROMPTS, "full"), logits_only=True)
    assert [len(row) for row in fresh.get(("my", "logits"), as_list=True)] == [3, 1, 4]


def test_logits_only_into_a_dense_tensordict() -> None:
    policy, _ = make("text", generate=False)
    data = TensorDict(text=Text(full=["w1 w2", "w3"], batch_size=2), batch_size=2)
    out = policy(data, logits_only=True)
    assert out is data
    expected = [head_NV(TOKENIZER(text)["input_ids"]) for text in ("w1 w2", "w3")]
    for row, expected_NV in zip(out["logits"].unbind(0), expected, strict=True):
        assert torch.equal(row, expected_NV)
    data["text"] = Text(full=["w1 w2", "w3 w4"], batch_size=2)
    assert policy(data, logits_only=True)["logits"].shape == (2, 2, V)


def test_logits_only_under_constraints_are_what_the_log_probs_are_of() -> None:
    policy, _ = make(generate=False, constraints=ActionMask([20, 21]))
    ids_N, mask_N = torch.tensor([6, 7, 20, 21]), torch.tensor([False, False, True, True])
    data = TensorDict(tokens=Tokens(full=ids_N, batch_size=()), masks=Masks(all_assistant_mask=mask_N, batch_size=()))
    scored = policy(data.clone())["log_probs"].full
    logits_NV = policy(data, logits_only=True)["logits"]
    found_N = logits_NV.log_softmax(-1).gather(-1, ids_N[:, None])[:, 0]
    torch.testing.assert_close(found_N[1:], scored[1:], atol=1e-5, rtol=0)
    assert (logits_NV[2:] > -math.inf).sum(-1).tolist() == [2, 2]


# --- 3. what cannot be asked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"logits": True}, InputTypeError, r"logits=True: expected a LogitsSpec"),
        ({"logits": LogitsSpec(top_k=V + 1)}, InputError, rf"top_k={V + 1}\): the model has {V} tokens"),
        ({"logits": LogitsSpec(token_ids=[5, V])}, TokenIdError, f"id {V} is outside the vocabulary of {V}"),
        ({"logits": LogitsSpec(full=True), "logits_key": "text"}, InputError, "'text' is the key of 2 outputs"),
        ({"logits": LogitsSpec(full=True), "logits_key": ("tokens", "x")}, InputError, "is inside"),
    ],
)
def test_arguments_that_cannot_work(options: dict[str, Any], error: type[SGLangHiddenError], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)


def test_the_largest_selections_are_served() -> None:
    policy, _ = make(logits=LogitsSpec(top_k=V))
    assert policy(ragged(PROMPTS))[0]["logits"].response.shape[1] == V
    policy, _ = make(generate=False, return_log_probs=False, logits=LogitsSpec(token_ids=[V - 1]))
    assert policy(ragged(PROMPTS, "full"))[0]["logits"].full.shape == (3, 1)


@pytest.mark.parametrize(
    ("options", "call", "words"),
    [
        ({}, {"logits_only": True}, r"logits_only=True with generate=True.*get_new_version\(generate=False\)"),
        ({"logits": LogitsSpec(full=True)}, {"max_new_tokens": 0}, r"segments=\('response',\)\): .*no response"),
        ({}, {"max_new_tokens": 0}, "without hidden states, logits or scores"),
        ({"generate": False, "logits_key": None}, {"logits_only": True}, "neither log-probs, hidden states, logits"),
        ({"generate": False, "logits_key": "masks"}, {"logits_only": True}, "'masks' is the key of 2 outputs"),
    ],
)
def test_calls_that_cannot_work(options: dict[str, Any], call: dict[str, Any], words: str) -> None:
    policy, engine = make(**options)
    batch = ragged(PROMPTS, "full" if options.get("generate") is False else "prompt")
    before = sorted(map(str, batch.keys(True, True)))
    with pytest.raises(InputError, match=words):
        policy(batch, **call)
    assert engine.requests == []
    assert sorted(map(str, batch.keys(True, True))) == before


def test_the_pad_token_is_scored_as_a_token() -> None:
    """A mask tells pads; zeros stand there, and nowhere else."""
    policy, _ = make(generate=False, pad_output=True)
    tokens = Tokens(full=torch.tensor([[PAD_ID, PAD_ID, 6, PAD_ID]]), padded=True, batch_size=1)
    masks = Masks(all_attention_mask=torch.tensor([[False, False, True, True]]), padded=True, batch_size=1)
    out = policy(TensorDict(tokens=tokens, masks=masks, batch_size=1), logits_only=True)
    assert torch.equal(out["logits"], pad(head_NV([6, PAD_ID]), 2, 0)[None])
