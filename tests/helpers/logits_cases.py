"""Constraints as a user would write them, good and bad, for the tests of what is done to logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.spec.constraints import (
    ActionMask,
    ConstraintStep,
    DisallowedTokens,
    LogitConstraint,
    TemperatureScale,
    TokenConstraint,
)

INF = math.inf
V = 6


@dataclass(frozen=True)
class Add(LogitConstraint, name="logits_add"):
    """Changes the logits in place, as most users would."""

    by: float

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        logits_V += self.by
        return logits_V


@dataclass(frozen=True)
class Times(LogitConstraint, name="logits_times"):
    by: float

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        return logits_V * self.by


@dataclass(frozen=True)
class Give(LogitConstraint, name="logits_give"):
    """Returns whatever it is told to."""

    values: Any

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        return self.values  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Fail(LogitConstraint, name="logits_fail"):
    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        logits_V.fill_(0)
        raise KeyError("no such key")


@dataclass(frozen=True)
class Ask(LogitConstraint, name="logits_ask"):
    """Records where it was called."""

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        ASKED.append(step)
        return logits_V


ASKED: list[ConstraintStep] = []


@dataclass(frozen=True)
class OnHost(LogitConstraint, name="logits_on_host", on_host=True):
    """Raises one token's logit, which may be outside of the vocabulary."""

    token: int

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        assert logits_V.device.type == "cpu"
        ASKED.append(step)
        logits_V[self.token] += 5
        return logits_V


@dataclass(frozen=True)
class BadMask(TokenConstraint, name="logits_bad_mask"):
    def allowed(self, vocab_size: int) -> torch.Tensor:
        raise IndexError("out of range")


@dataclass(frozen=True)
class BadWhen(Add, name="logits_bad_when"):
    def acts_on(self, index: int) -> bool:
        raise ZeroDivisionError("never")


@dataclass(frozen=True)
class BadMaskWhen(DisallowedTokens, name="logits_bad_mask_when"):
    def acts_on(self, index: int) -> bool:
        raise ZeroDivisionError("never")


@dataclass(frozen=True)
class BadTemperature(TemperatureScale, name="logits_bad_temperature"):
    def at(self, index: int, max_new_tokens: int) -> float:
        raise OverflowError("too hot")


@dataclass(frozen=True)
class Soft(ActionMask, name="logits_soft"):
    """A subclass of a mask that changes logits in its own way."""

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        return torch.where(self.allowed(len(logits_V)), logits_V, logits_V - 8)


@dataclass(frozen=True)
class Warm(TemperatureScale, name="logits_warm"):
    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        return logits_V / self.at(step.index, step.max_new_tokens) + len(step.response_ids)


@dataclass(frozen=True)
class Even(TokenConstraint, name="logits_even"):
    def allowed(self, vocab_size: int) -> torch.Tensor:
        return torch.arange(vocab_size) % 2 == 0


@dataclass(frozen=True)
class Doubling(TemperatureScale, name="logits_doubling"):
    def at(self, index: int, max_new_tokens: int) -> float:
        return 2.0**index


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_of(*constraints: LogitConstraint, prompt_ids: Sequence[int] = (1, 2, 3)) -> RequestLogits:
    return RequestLogits(WantedLogits(None, constraints), prompt_ids)
