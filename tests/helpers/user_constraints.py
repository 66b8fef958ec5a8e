"""Constraints as a user would write them. The tests' servers import this module by its name."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from torchrl_sglang_hidden import ConstraintStep, LogitConstraint

# Far below any logit, so that what is told is never chosen; and float32 still holds every integer there.
FAR = 2**22
NUM_TOLD, NUM_SETTINGS = 8, 4


@dataclass(frozen=True)
class NoImmediateRepeat(LogitConstraint, name="no_immediate_repeat"):
    """Forbids the token that was chosen just before."""

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        logits_V[step.response_ids[-1:]] = -math.inf
        return logits_V


@dataclass(frozen=True)
class Tell(LogitConstraint, name="tell"):
    """Writes what it is told into the logits of the first tokens, where a test can read it."""

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        logits_V[:NUM_TOLD] = torch.tensor(told(step), dtype=torch.float32, device=logits_V.device)
        return logits_V


@dataclass(frozen=True)
class TellSettings(LogitConstraint, name="tell_settings"):
    """Writes settings of the process it runs in, which is the scheduler's, into the logits of the first tokens."""

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        logits_V[:NUM_SETTINGS] = torch.tensor(settings_here(), dtype=torch.float32) - FAR
        return logits_V


def settings_here() -> list[int]:
    """Return the number of torch's threads, and whether what the CPU engine's set-up says has come here.

    That is: threads wait without spinning, NCCL is out of reach, and freed memory is kept.
    """
    nccl = os.environ.get("SGLANG_NCCL_SO_PATH", "")
    return [
        torch.get_num_threads(),
        os.environ.get("OMP_WAIT_POLICY") == "PASSIVE",
        nccl != "" and not os.path.exists(nccl),
        int(os.environ.get("MALLOC_TRIM_THRESHOLD_", "0")) >= 2**29,
    ]


def told(step: ConstraintStep) -> list[float]:
    ids = step.response_ids.tolist()
    last, before = ([-1, -1, *ids])[-1], ([-1, -1, *ids])[-2]
    numbers = [step.index, step.max_new_tokens, len(step.prompt_ids), step.prompt_ids[-1], len(ids), last, before]
    return [float(number - FAR) for number in (*numbers, sum(ids) % 65521)]


@dataclass(frozen=True)
class Fails(LogitConstraint, name="fails"):
    """Fails at one token of the response, in one of several ways."""

    how: str
    at: int = 0

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        if step.index != self.at:
            return logits_V
        answers: dict[str, Any] = {
            "nan": logits_V.fill_(math.nan),
            "one nan": logits_V.clone().zero_().index_fill_(0, torch.tensor([3]), math.nan),
            "infinity": torch.full_like(logits_V, math.inf),
            "nothing left": torch.full_like(logits_V, -math.inf),
            "wrong shape": logits_V[:-1],
            "wrong dimensions": logits_V[None],
            "no tensor": None,
            "words": "the first token, please",
        }
        if self.how == "raises":
            raise ValueError("on purpose")
        return answers[self.how]
