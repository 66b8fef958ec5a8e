"""Holds the second rank of a test's server before it reads new weights, for as long as a FIFO stands in its way.

The server imports this module for its constraint, as it does a user's, and finds the FIFO's path in its environment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchrl_sglang_hidden import ConstraintStep, LogitConstraint
from torchrl_sglang_hidden.protocol import PLUGIN_ENV

GATE_ENV = "TORCHRL_SGLANG_HIDDEN_TEST_GATE"
READING = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_disk"


@dataclass(frozen=True)
class Nothing(LogitConstraint, name="nothing"):
    """Changes nothing: without a constraint no server would import this module."""

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        return logits_V


def wait_at_the_gate(*args: Any, **kwargs: Any) -> None:
    gate = Path(os.environ[GATE_ENV])
    if gate.exists() and torch.distributed.get_rank() == 1:
        gate.read_bytes()  # until the test has opened it for writing, and closed it


if os.environ.get(PLUGIN_ENV) == "1":  # in the server, and not in the client that names it
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(READING, wait_at_the_gate, HookType.BEFORE)
