"""`logits_from_hidden`: what a model's own head makes of given states, and the check against sampled log-probs."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import peft
import pytest
import torch
from helpers.fake_engine import RecordingEngine, tiny_tokenizer
from tensordict import TensorDict, lazy_stack
from torch import nn
from torchrl.modules.llm.policies import Tokens
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from torchrl_sglang_hidden import (
    AlignmentError,
    HiddenSpec,
    InputError,
    InputTypeError,
    SGLangHiddenWrapper,
    TokenIdError,
    WeightsError,
    logits_from_hidden,
)

VOCAB, SIZE = 50, 16
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": SIZE,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    # The logits reach well over every cap below.
    "initializer_range": 0.8,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# What each does to its logits, by the name of its model type.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    "gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    # One divides by `logits_scaling`, and the other multiplies.
    "granite": {"logits_scaling": 7.0},
    "hyperclovax": {"logits_scaling": 7.0},
    "phi": {},
    # It keeps its multiplier in the decoder.
    "falcon_h1": {"lm_head_multiplier": 0.2, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8},
}
PLAIN = ("llama", "qwen3")


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **MODELS[kind])).float().eval()
    if model.get_output_embeddings().bias is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make(request.param)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make("llama")


@torch.no_grad()
def states_and_logits(model: PreTrainedModel, shape: tuple[int, int] = (2, 5)) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(1))
    return model.base_model(ids)[0], model(ids).logits


def drawn(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and their log-probs as a server would return them."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=generator)
    return tokens, logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def test_the_models_own_code_makes_the_logits(model: PreTrainedModel) -> None:
    before = dict(model._modules)
    states, logits = states_and_logits(model)
    found = logits_from_hidden(states, model)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach(), logits, atol=1e-5, rtol=0)
    # Else a test of caps and scales would pass with a plain product.
    head = model.get_output_embeddings()
    assert (logits_from_hidden(states, head) - logits).abs().max().le(1e-5) == (
        model.config.model_type in (*PLAIN, "phi")
    )
    # The model is as it was, and still runs.
    assert dict(model._modules) == before
    assert torch.equal(states_and_logits(model)[1], logits)


def test_a_forward_that_was_put_on_the_object_is_passed_by() -> None:
    """As accelerate does to move inputs from device to device."""
    model = make("gemma2")
    states, logits = states_and_logits(model)
    model.forward = functools.partial(type(model).forward, model)
    torch.testing.assert_close(logits_from_hidden(states, model).detach(), logits, atol=1e-5, rtol=0)


def test_a_bias_counts() -> None:
    model = make("phi")
    states, logits = states_and_logits(model)
    without = logits_from_hidden(states, model.get_output_embeddings().weight)
    torch.testing.assert_close(without + model.get_output_embeddings().bias, logits)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_narrow_weights_and_states_are_multiplied_in_float32(model: PreTrainedModel, narrow: torch.dtype) -> None:
    states, _ = states_and_logits(model)
    states = states.to(narrow)
    try:
        model.to(narrow)
        found = logits_from_hidden(states, model).detach()
        assert found.dtype == torch.float32
        rounded = model.to(torch.float32)
        expected = logits_from_hidden(states.float(), rounded).detach()
    finally:
        model.to(torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_autocast_does_not_narrow_them(llama: PreTrainedModel) -> None:
    states, logits = states_and_logits(llama)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits_from_hidden(states, llama).detach(), logits)


def test_any_shape_and_ragged_rows(llama: PreTrainedModel) -> None:
    states, logits = states_and_logits(llama, (6, 4))
    for shape in ((6, 4), (2, 3, 4), (24,)):
        found = logits_from_hidden(states.reshape(*shape, SIZE), llama)
        torch.testing.assert_close(found.detach(), logits.reshape(*shape, VOCAB))
    rows = [states[0, :3], states[1, :0], states[2]]
    found_rows = logits_from_hidden(rows, llama)
    assert [tuple(row.shape) for row in found_rows] == [(3, VOCAB), (0, VOCAB), (4, VOCAB)]
    torch.testing.assert_close(found_rows[0].detach(), logits[0, :3])


def test_gradients_reach_the_head() -> None:
    model = make("gemma2")
    states, _ = states_and_logits(model)
    logits_from_hidden(states, model).square().sum().backward()
    expected = model.get_output_embeddings().weight.grad
    assert expected is not None
    assert expected.abs().sum() > 0


def test_the_check_passes_what_belongs_together(model: PreTrainedModel) -> None:
    states, logits = states_and_logits(model)
    tokens, log_probs = drawn(logits)
    found = logits_from_hidden(states, model, tokens=tokens, log_probs=log_probs)
    torch.testing.assert_close(found.detach(), logits)
    log_probs[0, 0] = torch.nan  # nothing was measured there
    logits_from_hidden(states, model, tokens=tokens, log_probs=log_probs)
    logits_from_hidden(list(states), model, tokens=list(tokens), log_probs=list(log_probs))


def test_the_check_names_the_token(llama: PreTrainedModel) -> None:
    states, logits = states_and_logits(llama)
    tokens, log_probs = drawn(logits)
    log_probs[1, 3] -= 0.002
    name = rf"token \(1, 3\), id {int(tokens[1, 3])}: its log-prob is {float(log_probs[1, 3]):.4f}.*1 of 10 are.*-1"
    with pytest.raises(AlignmentError, match=name):
        logits_from_hidden(states, llama, tokens=tokens, log_probs=log_probs)
    logits_from_hidden(states, llama, tokens=tokens, log_probs=log_probs, tolerance=0.003)
    with pytest.raises(AlignmentError, match=rf"row 1, token 3, id {int(tokens[1, 3])}"):
        logits_from_hidden(list(states), llama, tokens=list(tokens), log_probs=list(log_probs))


@pytest.mark.parametrize("spoil", ["states", "head", "order", "minus infinity"])
def test_the_check_finds_what_does_not_belong_together(llama: PreTrainedModel, spoil: str) -> None:
    states, logits = states_and_logits(llama)
    tokens, log_probs = drawn(logits)
    head: Any = llama
    if spoil == "states":
        states = states + 0.01 * torch.sin(torch.arange(float(SIZE)))
    elif spoil == "head":
        head = llama.get_output_embeddings().weight * 1.01
    elif spoil == "order":
        tokens, log_probs = tokens.roll(1, -1), log_probs.roll(1, -1)
    else:
        log_probs[0, 0] = -torch.inf
    with pytest.raises(AlignmentError):
        logits_from_hidden(states, head, tokens=tokens, log_probs=log_probs)


def test_another_weight_version_is_refused(llama: PreTrainedModel) -> None:
    states, _ = states_and_logits(llama)
    for versions in ("3", ["3", "3"], [["3"], ["3"]]):
        logits_from_hidden(states, llama, weight_version=versions, head_version="3")
    with pytest.raises(WeightsError, match=r"weight version '2' and the head of '3'"):
        logits_from_hidden(states, llama, weight_version=["3", "2"], head_version="3")
    with pytest.raises(InputTypeError, match="weight_version: 3 is a int"):
        logits_from_hidden(states, llama, weight_version=[3], head_version="3")


def test_it_takes_what_the_wrapper_writes() -> None:
    tokenizer = tiny_tokenizer()
    engine = RecordingEngine(tokenizer=tokenizer)
    policy = SGLangHiddenWrapper(engine, tokenizer=tokenizer, input_mode="tokens", hidden=HiddenSpec(tokens=True))
    out = policy(lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(ids))) for ids in ([6, 7], [8, 9, 10])]))
    states = out.get(("token_hidden_states", "response"), as_list=True)
    head = torch.randn(96, states[0].shape[-1])
    versions = {"weight_version": out["weight_version"], "head_version": "v7"}
    found = logits_from_hidden(states, head, **versions)
    assert [len(row) for row in found] == [len(row) for row in out.get(("tokens", "response"), as_list=True)]
    logits_from_hidden(states[0], head, weight_version=out[0].get("weight_version"), head_version="v7")
    for version in (out["weight_version"], out.get("weight_version"), out[0].get("weight_version")):
        with pytest.raises(WeightsError, match="'v7' and the head of 'v8'"):
            logits_from_hidden(states, head, weight_version=version, head_version="v8")
    # The recorder's log-probs are made up.
    tokens, log_probs = (out.get((key, "response"), as_list=True) for key in ("tokens", "log_probs"))
    with pytest.raises(AlignmentError, match="row 0, token 0"):
        logits_from_hidden(states, head, tokens=tokens, log_probs=log_probs)


GOOD = torch.zeros(2, 3, SIZE)


@pytest.mark.parametrize(
    ("error", "words", "states", "options"),
    [
        (InputTypeError, "states: a list", [[1.0]], {}),
        (InputTypeError, "states: a tensor of torch.int64", torch.zeros(3, SIZE, dtype=torch.int64), {}),
        (InputError, rf"shape \(3, 8\), and the head is \({VOCAB}, {SIZE}\)", torch.zeros(3, 8), {}),
        (InputError, rf"row 1, states: shape \(16,\).*N, {SIZE}", [GOOD[0], torch.zeros(SIZE)], {}),
        (InputError, "tokens and log_probs belong together", GOOD, {"tokens": torch.zeros(2, 3)}),
        (InputError, "weight_version=None and head_version='1' belong", GOOD, {"head_version": "1"}),
        (
            InputError,
            r"log_probs: \(2, 2\) for states of \(2, 3\)",
            GOOD,
            {"tokens": torch.zeros(2, 3), "log_probs": torch.zeros(2, 2)},
        ),
        (InputError, "tokens: a list", GOOD, {"tokens": [[1]], "log_probs": torch.zeros(2, 3)}),
        (InputError, "2 rows of states and 1 of tokens", list(GOOD), {"tokens": [1], "log_probs": [1, 2]}),
        (
            TokenIdError,
            f"id {VOCAB}; the head has ids 0..{VOCAB - 1}",
            GOOD,
            {"tokens": torch.full((2, 3), VOCAB), "log_probs": torch.zeros(2, 3)},
        ),
    ],
)
def test_bad_input(
    llama: PreTrainedModel, error: type[Exception], words: str, states: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=words):
        logits_from_hidden(states, llama, **options)


@pytest.mark.parametrize("kind", ["llama", "granite"])
@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["lm_head"], "lora_dropout": 0.5},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_adapters_of_the_head_count(kind: str, adapter: dict[str, Any], dtype: torch.dtype) -> None:
    """Exactly, in float32, without dropout though the model is in training; and they have gradients."""
    adapted = peft.get_peft_model(make(kind), peft.LoraConfig(**adapter, init_lora_weights=False)).to(dtype)
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in ("modules_to_save", "trainable_tokens", "magnitude")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    states = torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = copy.deepcopy(adapted).float().eval().get_base_model()
    with torch.no_grad():
        expected = exact.get_output_embeddings()(states.float()) / getattr(exact.config, "logits_scaling", 1.0)
    adapted.train()
    of_head = [one for name, one in adapted.named_parameters() if one.requires_grad and "lm_head" in name]
    assert bool(of_head) is ("lm_head" in str(adapter))
    for model in (adapted, adapted.get_base_model()):
        found = logits_from_hidden(states, model)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if of_head:
            adapted.zero_grad()
            found.square().sum().backward()
            assert all(one.grad is not None and one.grad.any() for one in of_head)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_a_heads_adapter_alone(llama: PreTrainedModel, wrapped: bool) -> None:
    adapted = peft.get_peft_model(
        copy.deepcopy(llama), peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    )
    head = adapted.get_output_embeddings() if wrapped else adapted.get_output_embeddings().base_layer
    torch.testing.assert_close(logits_from_hidden(GOOD, head), head(GOOD))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (None, "head: a NoneType"),
        (nn.Embedding(VOCAB, SIZE), "head: a Embedding"),
        (torch.zeros(VOCAB, SIZE, dtype=torch.int8), "of a floating dtype"),
        (torch.zeros(SIZE), "head: a Tensor"),
    ],
)
def test_what_is_no_head(head: Any, words: str) -> None:
    with pytest.raises(InputTypeError, match=words):
        logits_from_hidden(GOOD, head)


def test_models_of_another_build_are_refused(llama: PreTrainedModel) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama

        def get_output_embeddings(self) -> nn.Module:
            return llama.get_output_embeddings()

    with pytest.raises(InputTypeError, match=re.escape("a Nested, whose forward is not that of a decoder and a head")):
        logits_from_hidden(GOOD, Nested())
    # An OPT's head is beside a decoder that it reaches around the model that stands for it.
    opt = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **SHAPE, ffn_dim=32, word_embed_proj_dim=SIZE))
    with pytest.raises(InputTypeError, match="a OPTForCausalLM"):
        logits_from_hidden(GOOD, opt)
    assert logits_from_hidden(GOOD, opt.get_output_embeddings()).shape == (2, 3, VOCAB)
