"""Constraints on the next token: what the user writes, how it travels, and what it does to logits.

Knows nothing of SGLang, wires or TensorDicts. The same code checks constraints before they are sent, and applies them
inside the server. A constraint travels as ``name:{json}``, names and numbers; the server half has the code.

The order in which logits are changed: SGLang's penalties, grammar, logit bias and its own processors; then, of these,
users' own in the order they are given, temperatures, and masks last, so that nothing gives back what a mask took. Then
SGLang's temperature, and top-k, top-p and min-p. Several masks leave what all of them allow and none of them denies.
"""

from __future__ import annotations

from torchrl_sglang_hidden.spec.constraints.base import (
    ConstraintStep,
    LogitConstraint,
    constraints_of,
    known_constraints,
)
from torchrl_sglang_hidden.spec.constraints.masks import (
    ActionMask,
    DisallowedTokens,
    TokenConstraint,
    check_constraints,
)
from torchrl_sglang_hidden.spec.constraints.temperature import ExponentialSchedule, LinearSchedule, TemperatureScale

__all__ = [
    "ActionMask",
    "ConstraintStep",
    "DisallowedTokens",
    "ExponentialSchedule",
    "LinearSchedule",
    "LogitConstraint",
    "TemperatureScale",
    "TokenConstraint",
    "check_constraints",
    "constraints_of",
    "known_constraints",
]
