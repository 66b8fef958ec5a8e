"""`SGLangHiddenWrapper` over the fake engine: what it reads, sends and writes, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fake_engine import (
    EOS_ID,
    FAULTS,
    HIDDEN_SIZE,
    PAD_ID,
    WORDS,
    Fault,
    RecordingEngine,
    pooled_D,
    response_of,
    states_ND,
    tiny_tokenizer,
)
from helpers.policy_batches import PROMPTS, TOKENIZER, batch_of, chat, flat, make, plain, row_of, stacked, tokens_batch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tokenizers.processors import TemplateProcessing
from torchrl.modules.llm.policies import ChatHistory, Masks, Text, Tokens

from torchrl_sglang_hidden import HiddenSpec, HiddenStates
from torchrl_sglang_hidden.errors import (
    InputError,
    InputTypeError,
    PromptLengthError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.spec.hidden import SEGMENTS

MODES = ["history", "text", "tokens"]
CLASSES = {
    "text", "tokens", "masks", "log_probs", "hidden_states", "weight_version", "finish_reason", "mixed_weights",
}  # fmt: skip


def sent(engine: RecordingEngine) -> list[list[int]]:
    return [list(request.prompt_ids) for request in engine.requests]


def assert_rows(out: TensorDictBase, prompts: list[list[int]]) -> None:
    """Check every field of every row, for prompts that the fake engine answers with `response_of` them."""
    rows = flat(out)
    assert len(rows) == len(prompts)
    for row, prompt in zip(rows, prompts, strict=True):
        response = response_of(prompt)
        mask = row["masks"].all_attention_mask
        assert row["tokens"].full[mask].tolist() == prompt + response
        assert row["masks"].all_assistant_mask.sum() == len(response)
        assert row["log_probs"].full[row["masks"].all_assistant_mask].isfinite().all()
        assert row["log_probs"].full[~row["masks"].all_assistant_mask].isnan().all()
        assert row["text"].response == TOKENIZER.decode(response, skip_special_tokens=True)
        assert row["text"].full == row["text"].prompt + row["text"].response
        assert row["weight_version"] == "v7"
        assert row["finish_reason"] == ("stop" if response[-1] == EOS_ID else "length")
        hidden_ND = states_ND(prompt, response)
        for segment in SEGMENTS:
            found_D = getattr(row["hidden_states"], segment)
            expected_D = pooled_D(hidden_ND, segment, "mean", len(prompt))
            torch.testing.assert_close(found_D.double(), expected_D, rtol=1e-5, atol=1e-6)


# --- what is read and sent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [True, False])
def test_every_field_in_every_mode(mode: str, padded: bool) -> None:
    policy, engine = make(mode, pad_output=padded)
    batch = batch_of(mode)
    out = policy(batch)
    assert out is batch
    assert set(out.keys()) == CLASSES | {mode}
    assert_rows(out, sent(engine))
    texts = {
        "history": [
            TOKENIZER.apply_chat_template(chat(p), tokenize=False, add_generation_prompt=True) for p in PROMPTS
        ],
        "text": PROMPTS,
        "tokens": PROMPTS,
    }[mode]
    assert [row["text"].prompt for row in flat(out)] == texts
    # Token in, token out: the ids of the text, and nothing else, in `tokens.prompt` and at the engine.
    assert sent(engine) == [TOKENIZER(text)["input_ids"] for text in texts]
    assert len(engine.payloads) == 1, "one call is one batched request"


def test_a_chat_goes_on_where_it_ended() -> None:
    policy, engine = make("history")
    out = policy(batch_of("history", ["w1"], (1,)))
    response = out["history"].response[0].content[0]
    assert out["history"].full[0].content == ["w9", "w1", response]
    again = TensorDict(history=ChatHistory(prompt=out["history"].full, batch_size=1), batch_size=1)
    policy(again)
    first, second = sent(engine)
    assert TOKENIZER.decode(second).startswith("<|start|> system w9 <|end|> <|start|> user w1 <|end|> <|start|> assist")
    assert response in TOKENIZER.decode(second)
    assert len(second) > len(first)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize("padded", [True, False])
def test_every_shape(mode: str, shape: tuple[int, ...], padded: bool) -> None:
    policy, engine = make(mode, pad_output=padded)
    prompts = [f"w{i} " * (1 + i % 4) for i in range(torch.Size(shape).numel())]
    out = policy(batch_of(mode, prompts, shape))
    assert out.batch_size == torch.Size(shape)
    assert_rows(out, sent(engine))
    assert out["hidden_states"].response.shape == (*shape, HIDDEN_SIZE)


@pytest.mark.parametrize("mode", MODES)
def test_no_rows(mode: str) -> None:
    policy, engine = make(mode)
    for empty in (TensorDict(batch_size=0), TensorDict(batch_size=(2, 0))):
        with pytest.raises(PromptLengthError, match=r"has 0 rows; pass at least 1 prompt"):
            policy(empty)
    assert engine.requests == []


def test_a_batch_of_tensors_that_are_no_lazy_stack() -> None:
    policy, engine = make("tokens", pad_output=True)
    assert_rows(policy(tokens_batch([6, 7, 8], [9, 8, 7])), [[6, 7, 8], [9, 8, 7]])
    text = TensorDict(text=Text(prompt=["w1", "w2"], batch_size=2), batch_size=2)
    assert_rows(make("text", engine=engine)[0](text), [TOKENIZER(p)["input_ids"] for p in ("w1", "w2")])


@pytest.mark.parametrize(
    ("ids", "of_tokens", "mask", "expected"),
    [
        ([PAD_ID, 6, 7], {"padded": True}, None, [6, 7]),
        ([PAD_ID, 6, PAD_ID], {"padded": True}, None, [6, PAD_ID]),
        ([6, PAD_ID, 7], {"padded": True}, None, [6, PAD_ID, 7]),
        ([PAD_ID, 6, 7], {"padded": False}, None, [PAD_ID, 6, 7]),
        ([PAD_ID, 6, PAD_ID], {}, None, [PAD_ID, 6, PAD_ID]),
        ([PAD_ID, PAD_ID, 6], {"padded": True}, [False, True, True], [PAD_ID, 6]),
        ([0, 6, 7], {}, [0, 1, 1], [6, 7]),
        ([6, 7, PAD_ID], {}, [1, 1, 0], [6, 7]),
    ],
)
def test_pads_are_never_sent_and_genuine_ids_always(ids: Any, of_tokens: Any, mask: Any, expected: list[int]) -> None:
    policy, engine = make("tokens")
    others = {} if mask is None else {"attention_mask": torch.tensor([mask])}
    out = policy(tokens_batch(ids, of_tokens=of_tokens, **others))
    assert sent(engine) == [expected]
    assert_rows(out, [expected])


def test_the_mask_is_read_where_it_is_said_to_be() -> None:
    policy, engine = make("tokens", attention_mask_key=("my", "mask"))
    batch = tokens_batch([0, 6, 7], attention_mask=torch.tensor([[1, 1, 0]]))
    batch["my", "mask"] = torch.tensor([[False, True, True]])
    policy(batch)
    assert sent(engine) == [[6, 7]]


def test_a_mask_of_another_shape() -> None:
    policy, engine = make("tokens")
    with pytest.raises(InputError, match=r"row 0, .*shape \(3,\), and 'attention_mask' of \(2,\)"):
        policy(tokens_batch([0, 6, 7], attention_mask=torch.tensor([[1, 1]])))
    assert engine.requests == []


def test_padding_of_the_tokenizer_is_taken_off() -> None:
    policy, engine = make("text", tokenizer_kwargs={"padding": "max_length", "max_length": 9})
    policy(batch_of("text"))
    assert sent(engine) == [TOKENIZER(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.mark.parametrize("mode", MODES)
def test_prompts_are_read_where_they_are_said_to_be(mode: str) -> None:
    policy, engine = make(mode, input_key=("my", "prompt"))
    batch = stacked([TensorDict(my={"prompt": row_of(mode, p)[mode].prompt}) for p in PROMPTS], (3,))
    assert policy.in_keys == [("my", "prompt")]
    assert_rows(policy(batch), sent(engine))


def test_the_template_writes_the_special_tokens_of_a_chat() -> None:
    """A text gets the tokenizer's own; a chat that got them too would start twice."""
    adds_start = tiny_tokenizer()
    adds_start.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", WORDS.index("<|start|>"))]
    )
    engine = RecordingEngine(tokenizer=adds_start)
    for mode in ("text", "history"):
        make(mode, engine=engine, tokenizer=adds_start)[0](batch_of(mode, ["w1"]))
    of_text, of_chat = (TOKENIZER.decode(ids) for ids in sent(engine))
    assert of_text == "<|start|> w1"
    assert of_chat == "<|start|> system w9 <|end|> <|start|> user w1 <|end|> <|start|> assistant"


def test_the_chat_template_may_be_given() -> None:
    policy, engine = make("history", chat_template="{% for m in messages %}{{ m.content }} {% endfor %}")
    policy(batch_of("history", ["w1 w2"]))
    assert sent(engine) == [TOKENIZER("w9 w1 w2")["input_ids"]]


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,)])
def test_where_the_outputs_go(shape: tuple[int, ...]) -> None:
    prompts = PROMPTS if shape else PROMPTS[:1]

    def fresh() -> TensorDictBase:
        return batch_of("tokens", prompts, shape).set("reward", torch.ones(*shape, 1))

    batch = fresh()
    assert make("tokens")[0](batch) is batch
    assert "reward" in batch
    for inplace in (False, "empty"):
        batch = fresh()
        before = plain(batch)
        out = make("tokens", inplace=inplace)[0](batch)
        assert set(out.keys()) == CLASSES
        assert plain(batch) == before
    for inplace in (True, False, "empty"):
        batch, target = fresh(), TensorDict(kept=torch.ones(shape), batch_size=shape)
        before = plain(batch)
        assert make("tokens", inplace=inplace)[0](batch, tensordict_out=target) is target
        assert set(target.keys()) == CLASSES | {"kept"}
        assert plain(batch) == before


def test_a_target_that_cannot_be_written_to_costs_no_call() -> None:
    policy, engine = make("tokens")
    with pytest.raises(InputError, match=r"batch size \(2,\) and the output has \(3,\)"):
        policy(batch_of("tokens"), tensordict_out=TensorDict(batch_size=2))
    with pytest.raises(InputError, match=r"locked; unlock_\(\)"):
        policy(tokens_batch([6, 7]).lock_())
    with pytest.raises(InputTypeError, match=r"tensordict_out=\{\} is a dict; expected a TensorDict"):
        policy(batch_of("tokens"), tensordict_out={})
    assert engine.requests == []


@pytest.mark.parametrize("key", ["tokens_key", "hidden_states_key", "history_key"])
def test_a_key_that_leads_through_a_tensor_costs_no_call(key: str) -> None:
    policy, engine = make("history", **{key: ("obs", "deep", "x")})
    batch = batch_of("history").set("obs", torch.ones(3, 2))
    before = plain(batch)
    with pytest.raises(InputError, match=r"\('obs', 'deep', 'x'\) cannot be written: there is a Tensor at \('obs',\)"):
        policy(batch)
    assert engine.requests == []
    assert plain(batch) == before


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_half_written(mode: str, fault: Fault) -> None:
    policy, engine = make(mode)
    batch = batch_of(mode).set("reward", torch.ones(3, 1))
    before, keys = plain(batch), list(batch.keys())
    rows = flat(batch)
    leaves = [{key: row.get(key) for key in row.keys(True, True) if torch.is_tensor(row.get(key))} for row in rows]
    engine.fault = fault
    with pytest.raises(SGLangHiddenError):
        policy(batch)
    assert (plain(batch), list(batch.keys())) == (before, keys)
    for row, values in zip(rows, leaves, strict=True):
        assert all(row.get(key) is value for key, value in values.items())
    engine.fault = None
    assert_rows(policy(batch), sent(engine)[3:])


@pytest.mark.parametrize("mode", MODES)
def test_the_last_steps_fields_do_not_survive(mode: str) -> None:
    """`step_mdp` carries last turn's outputs into the next root; half of them would be taken for this turn's."""
    batch = make(mode)[0](batch_of(mode))
    fewer, _ = make(mode, hidden=HiddenSpec(("response",)))
    batch["log_probs"] = batch["log_probs"].clone()
    for row in flat(batch):
        row["log_probs"].prompt = torch.ones(2)
    out = fewer(batch)
    assert (out["hidden_states"].prompt, out["hidden_states"].full_count) == (None, None)
    assert all(row["log_probs"].prompt is None for row in flat(out))


@pytest.mark.parametrize("hidden", [False, None])
def test_no_states(hidden: Any) -> None:
    policy, engine = make(hidden=hidden)
    assert set(policy(batch_of("text")).keys()) == CLASSES - {"hidden_states"}
    assert "custom_params" not in engine.payloads[0]["sampling_params"][0]
    assert not any("hidden_states" in key for key in policy.out_keys)


def test_true_is_the_default_states() -> None:
    policy, _ = make(hidden=True)
    assert policy.hidden == HiddenSpec()
    with pytest.raises(InputTypeError, match=r"hidden='mean': expected a HiddenSpec, True, False or None"):
        make(hidden="mean")


def test_no_log_probs() -> None:
    policy, engine = make(return_log_probs=False)
    assert set(policy(batch_of("text")).keys()) == CLASSES - {"log_probs"}
    assert engine.payloads[0]["return_logprob"] == [False] * 3


@pytest.mark.parametrize("name", ["text", "tokens", "masks", "log_probs", "hidden_states"])
def test_keys_of_the_users_own(name: str) -> None:
    other = ("deep", f"my_{name}")
    policy, _ = make("tokens", **{f"{name}_key": other})
    out = policy(batch_of("tokens"))
    assert any(key[:2] == other for key in policy.out_keys)
    assert type(out[other]) is type(make("tokens")[0](batch_of("tokens"))[name])
    left_out, _ = make("text" if name == "tokens" else "tokens", **{f"{name}_key": None})
    assert name not in left_out.out_keys
    assert name not in left_out(batch_of(left_out.input_mode))


@pytest.mark.parametrize("mode", MODES)
def test_out_keys_say_what_is_written(mode: str) -> None:
    policy, _ = make(mode)
    out = policy(batch_of(mode))
    assert all(key in out for key in policy.out_keys)
    states = {("hidden_states", f"{segment}{suffix}") for segment in SEGMENTS for suffix in ("", "_count")}
    classes = CLASSES | ({"history"} if mode == "history" else set())
    assert set(policy.out_keys) == classes - {"hidden_states"} | states
    assert set(out.keys()) == classes | {mode}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_states_in_another_dtype(dtype: torch.dtype) -> None:
    out = make(hidden=HiddenSpec(dtype=dtype))[0](batch_of("text"))
    assert out["hidden_states"].response.dtype is dtype
    assert isinstance(out["hidden_states"], HiddenStates)


def test_the_device() -> None:
    out = make(device="meta", inplace=False)[0](batch_of("text"))
    assert out[0]["tokens"].full.device.type == "meta"
    assert make(device="meta")[0].device == torch.device("meta")
    assert make()[0].device is None


@pytest.mark.parametrize("padded", [True, False])
def test_outputs_of_two_calls_stack(padded: bool) -> None:
    policy, engine = make("text", pad_output=padded)
    both = lazy_stack([policy(batch_of("text")), policy(batch_of("text", ["w1 " * 9, "w2", "w3 w4"]))])
    assert_rows(both, sent(engine))
    assert both["hidden_states"].full.shape == (2, 3, HIDDEN_SIZE)


@given(
    rows=st.lists(st.lists(st.integers(0, 95), min_size=1, max_size=9), min_size=1, max_size=6),
    padded=st.booleans(),
    inplace=st.sampled_from([True, False, "empty"]),
)
def test_any_ragged_batch_of_ids(rows: list[list[int]], padded: bool, inplace: Any) -> None:
    policy, engine = make("tokens", pad_output=padded, inplace=inplace)
    batch = lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(ids)), batch_size=()) for ids in rows])
    out = policy(batch)
    assert sent(engine) == rows
    assert_rows(out, rows)
    # Its own padded output is a prompt again: what it wrote, it reads. A pad id that starts a prompt is ambiguous.
    if padded and all(ids[0] != PAD_ID for ids in rows):
        policy(out)
        assert sent(engine) == rows + rows


def test_the_mask_of_a_padded_turn_tells_the_pads_of_the_next() -> None:
    # torchrl's ChatEnv in tokens mode: the next prompt is the padded `full`, in a `Tokens` that no longer says so.
    policy, engine = make("tokens", pad_output=True)
    first = policy(batch_of("tokens"))
    masks = first["masks"].all_attention_mask
    turn = TensorDict(tokens=Tokens(prompt=first["tokens"].full, batch_size=3), masks=first["masks"], batch_size=3)
    policy(turn)
    real = [ids[mask].tolist() for ids, mask in zip(first["tokens"].full, masks, strict=True)]
    assert [list(request.prompt_ids) for request in engine.requests[3:]] == real
    assert not all(mask.all() for mask in masks), "nothing was padded"
    # Nor does a mask that leaves nothing out say that a padded prompt has no pads.
    padded = tokens_batch([PAD_ID, 6, 7], [8, 9, 10], of_tokens={"padded": True})
    padded["masks"] = Masks(all_attention_mask=torch.ones(2, 3, dtype=torch.bool), batch_size=2)
    policy(padded)
    assert [list(request.prompt_ids) for request in engine.requests[6:]] == [[6, 7], [8, 9, 10]]
    # A mask that would leave out anything but pads is of other ids.
    other = tokens_batch([6, 7, 8], [9, 10, 11])
    other["masks"] = Masks(all_attention_mask=torch.tensor([[1, 0, 1], [1, 1, 1]]).bool(), batch_size=2)
    policy(other)
    assert [list(request.prompt_ids) for request in engine.requests[8:]] == [[6, 7, 8], [9, 10, 11]]
