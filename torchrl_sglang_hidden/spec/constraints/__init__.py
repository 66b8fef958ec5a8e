"""Defines constraints on the next token: what the user writes, how it is sent, and what it does to logits.

The same code checks constraints before they are sent and applies them inside the server. A constraint is sent as
``name:{json}``, names and numbers only, and the server half has the code. Knows nothing of SGLang or TensorDicts.

Logits are changed in this order: SGLang's penalties, grammar, logit bias and native processors; the constraints of the
user's own classes, in the order given; temperatures; masks; SGLang's temperature, and top-k, top-p and min-p. Masks
come after every other constraint, so that no constraint can return a token that a mask removed. Several masks leave the
tokens that every mask allows.
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
