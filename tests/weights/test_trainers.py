"""Weights of real trainers: wrapped, adapted, and what is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3MoeConfig

from torchrl_sglang_hidden import WeightsError
from torchrl_sglang_hidden.protocol.served_weights import served_weights
from torchrl_sglang_hidden.weights.trainers import LazyWeights, plain_names, split
from torchrl_sglang_hidden.weights.validation import check_weights, open_weights

SIZES = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 24, "head_dim": 4,
}  # fmt: skip


def tiny(*, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=tied))


class DataParallel(nn.Module):
    """Holds its model as torch's DataParallel and DistributedDataParallel do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


class Policy(nn.Module):
    """Holds its model as torchrl's TransformersWrapper does, beside a head of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.value_head = model, nn.Linear(8, 1)


def compiled_layers(model: PreTrainedModel) -> PreTrainedModel:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer)
    return model


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": torch.compile,
    "data-parallel": DataParallel,
    "torch's DataParallel": nn.DataParallel,
    "compiled data-parallel": lambda model: torch.compile(DataParallel(model)),
    "data-parallel compiled": lambda model: DataParallel(torch.compile(model)),
    "twice": lambda model: DataParallel(torch.compile(DataParallel(torch.compile(model)))),
    "policy of compiled": lambda model: Policy(torch.compile(model)),
    "compiled policy": lambda model: torch.compile(DataParallel(Policy(model))),
    "compiled layers": compiled_layers,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("form", ["module", "state dict", "parameters"])
def test_wrappers_are_taken_off(kind: str, form: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(tied=tied)
    model.save_pretrained(tmp_path)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = WRAPPERS[kind](model)
    if form != "module" and "policy" in kind:
        wrapped = wrapped._modules.get("_orig_mod", wrapped)
        wrapped = wrapped._modules.get("module", wrapped).model
    given = {
        "module": lambda: wrapped,
        "state dict": wrapped.state_dict,
        "parameters": lambda: dict(wrapped.named_parameters()),
    }
    served = served_weights(str(tmp_path))
    found = check_weights(open_weights(given[form]()), served)
    assert found.keys() == served.tensors.keys()
    assert all(torch.equal(found[name], state[name]) for name in found)


def test_a_weight_under_two_names_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"a\.b and a\._orig_mod\.b are the same weight, a\.b"):
        plain_names({"a.b": 1, "a._orig_mod.b": 2})


def test_a_part_called_module_stays() -> None:
    assert plain_names({"module.a": 1, "b": 2}) == {"module.a": "module.a", "b": "b"}


# --- adapters -------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "all": {"target_modules": "all-linear", "use_rslora": True},
    "of several strengths": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 16}},
    "with a head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]},
}


def adapted(kind: str, model: PreTrainedModel | None = None) -> PeftModel:
    torch.manual_seed(1)
    options = ADAPTERS[kind]
    found = get_peft_model(model or tiny(), LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **options))
    for name, parameter in found.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            parameter.data.mul_(2)
    return found


@pytest.mark.parametrize(
    "wrap", [lambda model: model, torch.compile, Policy, lambda model: torch.compile(DataParallel(model))]
)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_merged_and_the_trainer_stays_as_it_is(
    kind: str, wrap: Callable[[Any], Any], tmp_path: Path
) -> None:
    tiny().save_pretrained(tmp_path)
    model = adapted(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    found = check_weights(open_weights(wrap(model)), served_weights(str(tmp_path)))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    assert any(not torch.equal(found[name], value) for name, value in tiny().state_dict().items())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(getattr(part, "merged", False) for part in model.modules())


def test_a_disabled_adapter_is_left_out() -> None:
    model = adapted("with a head")
    with model.disable_adapter():
        found = open_weights(model)
    assert isinstance(found, LazyWeights)
    # The adapter is on again when the weights are read, and they are what the trainer computes with then.
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found[name], merged[name])
    with model.disable_adapter():
        plain = open_weights(model)
        assert torch.equal(plain[name], tiny().state_dict()[name])
        assert torch.equal(plain["lm_head.weight"], tiny().state_dict()["lm_head.weight"])


def test_a_merged_adapter_counts_once() -> None:
    model = adapted("plain")
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    model.merge_adapter()
    found = open_weights(model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_an_adapter_that_peft_cannot_merge_is_refused() -> None:
    options = {"target_modules": ["q_proj"], "alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}
    found = open_weights(get_peft_model(tiny(), LoraConfig(r=2, **options)))
    with pytest.raises(WeightsError, match=r"adapter cannot be merged: aLoRA does not.*plain LoRA one"):
        found["model.layers.0.self_attn.q_proj.weight"]


def test_the_active_adapter_has_no_layer_of_its_own() -> None:
    """Another one has: the layer and the tokens are then the model's, as PEFT computes."""
    options = {"modules_to_save": ["lm_head"], "trainable_token_indices": [1, 3]}
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], **options), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            parameter.data.mul_(2)
    for active in (["second"], ["first", "second"], ["first"]):
        model.base_model.set_adapter(active)
        found = open_weights(model)
        inner = model.get_base_model()
        ids, states = torch.arange(24), torch.eye(8)
        torch.testing.assert_close(found["model.embed_tokens.weight"], inner.model.embed_tokens(ids))
        torch.testing.assert_close(found["lm_head.weight"], inner.lm_head(states).T)


def test_adapters_that_transformers_injected() -> None:
    model = tiny()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    name = "model.layers.0.self_attn.q_proj.weight"
    layer = model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    found = open_weights(model)
    assert found.keys() == tiny().state_dict().keys()
    torch.testing.assert_close(found[name], expected.detach(), rtol=0, atol=0)


def test_adapters_on_a_model_whose_checkpoint_has_other_names(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    served = served_weights(str(tmp_path))
    trained = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert check_weights(open_weights(trained), served).keys() == served.tensors.keys()


# --- what is refused ------------------------------------------------------------------------------------------------


def prompt_tuned() -> Any:
    return get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


class FullyShardedDataParallel(nn.Module):
    """Has the name of FSDP1's class, as its modules do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = model


class Params4bit(nn.Parameter):
    """Has the name of bitsandbytes' class."""


def qlora() -> Any:
    model = tiny()
    model.lm_head.weight = Params4bit(model.lm_head.weight.data)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def zero3() -> Any:
    model = tiny()
    for parameter in model.parameters():
        parameter.ds_id = 1  # type: ignore[attr-defined]
    return DataParallel(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (prompt_tuned, r"learns a prompt, .*train LoRA instead"),
        (lambda: FullyShardedDataParallel(tiny()), r"FSDP1's flat parameters.*fully_shard"),
        (lambda: torch.compile(DataParallel(FullyShardedDataParallel(tiny()))), r"FSDP1's flat parameters"),
        (qlora, r"keeps its weights quantised \(Params4bit\).*load_adapter"),
        (zero3, r"DeepSpeed ZeRO-3 .*GatheredParameters"),
        (lambda: adapted("plain").state_dict(), r"lora_A.*how strongly it acts; pass the adapted model itself"),
        (lambda: {"_fsdp_wrapped_module._flat_param": torch.ones(3)}, r"FSDP1 keeps flat parameters"),
    ],
)
def test_what_has_not_the_models_weights_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        open_weights(make())


# --- buckets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bucket_bytes", "groups"),
    [(1, [["a"], ["b"], ["c"]]), (8, [["a"], ["b"], ["c"]]), (9, [["a", "b"], ["c"]]), (100, [["a", "b", "c"]])],
)
def test_buckets(bucket_bytes: int, groups: list[list[str]]) -> None:
    weights = {name: torch.ones(2) for name in "abc"}
    assert split(weights, bucket_bytes) == groups
    assert split({}, bucket_bytes) == [[]]
