"""Small random checkpoints that SGLang serves, for what the demo model cannot show.

The demo model ties its head to its embeddings, is a Llama, and has learned to be sure: a capture that read the wrong
tensor or layer could still look right there. Here every weight is random, those of the norms too, so that the state
before a norm, the one after it and the ones of its neighbours are all far apart.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# Wide enough that the two best of 49152 random logits lie far apart (about 0.5 on average): greedy is never a tie.
INITIALIZER_RANGE = 0.3
NORM_SPREAD = 0.5
# Shorter than the prompts of most tests, so that the sliding layers of the Gemma forget.
SLIDING_WINDOW = 16
# A Gemma norms what its layers add. At 1 their sum stays below the scaled embeddings, and with a tied head the
# best next token is then always the last one.
GEMMA_POST_NORM = 4.0
# Of logits up to 15: the largest end up well below.
GEMMA_SOFTCAP = 6.0
# Not a multiple of 64, up to which SGLang pads its head.
ODD_VOCAB_LESS = 40

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": INITIALIZER_RANGE,
}

LORA_RANK = 8
LORA_ALPHA = 16
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_random_llama(directory: Path, tokenizer_dir: str) -> Path:
    """Save a Llama of five layers and D=64 whose head is its embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = LlamaConfig(**SHAPE, **_token_ids(tokenizer), num_hidden_layers=5, tie_word_embeddings=True)
    return _save(LlamaForCausalLM, config, tokenizer, directory)


def save_random_qwen3(directory: Path, tokenizer_dir: str) -> Path:
    """Save a Qwen3 of four layers and D=64 whose head is its own matrix."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = Qwen3Config(**SHAPE, **_token_ids(tokenizer), num_hidden_layers=4, tie_word_embeddings=False)
    return _save(Qwen3ForCausalLM, config, tokenizer, directory)


def save_random_qwen3_moe(directory: Path, tokenizer_dir: str, vocab_less: int = ODD_VOCAB_LESS) -> Path:
    """Save a Qwen3-MoE of four layers and D=64: eight experts, two for each token, and an odd vocabulary size.

    Its vocabulary is ``vocab_less`` smaller than the tokenizer's, which a policy does not accept unless it is 0.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = Qwen3MoeConfig(
        **SHAPE,
        **{**_token_ids(tokenizer), "vocab_size": len(tokenizer) - vocab_less},
        num_hidden_layers=4,
        tie_word_embeddings=False,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    return _save(Qwen3MoeForCausalLM, config, tokenizer, directory)


def save_random_gemma3(directory: Path, tokenizer_dir: str) -> Path:
    """Save a Gemma 3, text only, of six layers and D=64. Every third layer attends to all, others to `SLIDING_WINDOW`.

    Its head is its embeddings, and its logits are softcapped.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = Gemma3TextConfig(
        **SHAPE,
        **_token_ids(tokenizer),
        num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        sliding_window=SLIDING_WINDOW,
        query_pre_attn_scalar=16,
        final_logit_softcapping=GEMMA_SOFTCAP,
    )
    return _save(Gemma3ForCausalLM, config, tokenizer, directory)


def save_random_granite(directory: Path, tokenizer_dir: str) -> Path:
    """Save a Granite of 36 layers and D=64: its head is its embeddings, and its logits are divided by a number."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    config = GraniteConfig(
        **shape,
        **_token_ids(tokenizer),
        num_hidden_layers=36,
        tie_word_embeddings=True,
        embedding_multiplier=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.3,
        logits_scaling=3.0,
    )
    return _save(GraniteForCausalLM, config, tokenizer, directory)


def save_random_lora(directory: Path, model_dir: str, seed: int = 1) -> Path:
    """Save a LoRA adapter for all projections of a Llama or Qwen3 at ``model_dir``, as `peft` would write it."""
    weights = load_file(Path(model_dir) / "model.safetensors")
    torch.manual_seed(seed)
    adapter = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in LORA_TARGETS:
            out_features, in_features = weight.shape
            adapter[f"base_model.model.{module}.lora_A.weight"] = torch.randn(LORA_RANK, in_features) * 0.1
            adapter[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out_features, LORA_RANK) * 0.1
    directory.mkdir(parents=True)
    save_file(adapter, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_dir,
        "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(LORA_TARGETS),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def save_merged(directory: Path, model_dir: str, adapter_dir: str) -> Path:
    """Save the model at ``model_dir`` with the adapter added to its weights, to compare the adapter's requests with."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    adapter = load_file(Path(adapter_dir) / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" in adapter:
                product = adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
                parameter += LORA_ALPHA / LORA_RANK * product
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(directory)
    return directory


def _token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save(
    kind: type[PreTrainedModel], config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> Path:
    torch.manual_seed(0)
    model = kind(config).to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += torch.empty_like(parameter).uniform_(-NORM_SPREAD, NORM_SPREAD)
            if isinstance(config, Gemma3TextConfig) and ("post_attention" in name or "post_feedforward" in name):
                parameter += GEMMA_POST_NORM - 1
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
