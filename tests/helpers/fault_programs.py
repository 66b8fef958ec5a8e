"""Programs that a test kills: a client in the middle of a call, and a trainer in the middle of an update."""

from __future__ import annotations

from typing import Any

import torch

from torchrl_sglang_hidden import HiddenSpec, connect
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.weights.validation import open_weights

ENDLESS = {"temperature": 0.0, "max_new_tokens": 900, "ignore_eos": True}


def generate_endlessly(url: str, rows: int, ready: Any) -> None:
    """Ask for long responses, one call after another."""
    torch.set_num_threads(1)
    with connect(url) as engine:
        ready.set()
        while True:
            engine.generate([Request((1, 4093, 198 + row), ENDLESS, hidden=HiddenSpec()) for row in range(rows)])


def update_weights(url: str, model_dir: str, options: dict[str, Any], ready: Any) -> None:
    """Send other weights, of a model saved at ``model_dir``."""
    torch.set_num_threads(1)
    weights = open_weights(model_dir)
    with connect(url) as engine:
        ready.set()
        engine.update_weights(dict(weights), **options)  # type: ignore[call-overload]
