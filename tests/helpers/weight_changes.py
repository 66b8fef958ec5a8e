"""A server whose weights tests may change, and the ways to change them and back."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from torchrl_sglang_hidden import demo_model
from torchrl_sglang_hidden.engines import Engine


def restore(engine: Engine) -> str:
    """Gives an engine the demo model's own weights again. Every test that changed them ends with this."""
    return engine.update_weights(demo_model())


def load_trainer(model_dir: str | Path) -> PreTrainedModel:
    """A model of its own, float32, for a test to change."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


@torch.no_grad()
def perturb(model: PreTrainedModel, scale: float = 0.02, seed: int = 0) -> PreTrainedModel:
    """Changes every weight by some per cent, in place: an optimiser step that everybody would notice."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 + scale * torch.randn(parameter.shape, generator=generator))
    return model
