"""Ways to change a server's weights and back, and to check which weights answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchrl.modules.llm import TransformersWrapper
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from helpers import hf_oracle
from helpers.policy_checks import (
    LOG_PROB_ATOL,
    SEGMENTS,
    STATE_RTOL,
    relative_error,
)
from torchrl_sglang_hidden import (
    HiddenSpec,
    demo_model,
)
from torchrl_sglang_hidden.engines import Engine
from torchrl_sglang_hidden.records import Completion, Request


def restore(engine: Engine) -> str:
    """Give an engine the demo model's own weights again. Every test that changed them ends with this."""
    return engine.update_weights(demo_model())


def load_trainer(model_dir: str | Path) -> PreTrainedModel:
    """Return a model of its own, float32, for a test to change."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


@torch.no_grad()
def perturb(model: PreTrainedModel, scale: float = 0.02, seed: int = 0) -> PreTrainedModel:
    """Change every weight by some per cent, in place: a step of training that every check would notice."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 + scale * torch.randn(parameter.shape, generator=generator))
    return model


def wrapper_of(trainer: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformersWrapper:
    return TransformersWrapper(trainer, tokenizer=tokenizer, input_mode="tokens")


def answers(engine: Any, prompts: list[list[int]], num_tokens: int = 8) -> list[Completion]:
    sampling = {"max_new_tokens": num_tokens, "temperature": 0}
    return engine.generate([Request(tuple(ids), sampling, hidden=HiddenSpec(segments=SEGMENTS)) for ids in prompts])


def assert_answered_with(completion: Completion, model_dir: str) -> None:
    """Check that log-probs and pooled states are Hugging Face's on the weights of a directory."""
    truth = hf_oracle.teacher_force(model_dir, completion.prompt_ids, completion.response_ids)
    torch.testing.assert_close(completion.log_probs_T, truth.log_probs_T, atol=LOG_PROB_ATOL, rtol=0)
    for segment, pooled in completion.hidden.items():
        assert relative_error(pooled.vector, truth.pooled(segment, "mean")) < STATE_RTOL
