"""Defines a temperature that depends on a token's index in its response.

Knows nothing of requests or of the server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self, TypeAlias

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.spec.constraints.base import ConstraintStep, LogitConstraint

__all__ = ["ExponentialSchedule", "LinearSchedule", "TemperatureScale"]

# Wide enough for any schedule, and narrow enough that float32 logits stay finite.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-2, 1e2


@dataclass(frozen=True, slots=True)
class LinearSchedule:
    """Changes the temperature in equal differences from ``start`` to ``end``.

    Args:
        start: temperature of token 0.
        end: temperature of token ``steps - 1`` and of every later token.
        steps: tokens from ``start`` to ``end``, at least 2; None for the request's ``max_new_tokens``.
    """

    start: float
    end: float
    steps: int | None = None

    def at(self, progress: float) -> float:
        """Return the temperature at a progress from 0 (token 0) to 1 (the last step)."""
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True, slots=True)
class ExponentialSchedule:
    """Changes the temperature in equal ratios from ``start`` to ``end``.

    Args:
        start: temperature of token 0.
        end: temperature of token ``steps - 1`` and of every later token.
        steps: tokens from ``start`` to ``end``, at least 2; None for the request's ``max_new_tokens``.
    """

    start: float
    end: float
    steps: int | None = None

    def at(self, progress: float) -> float:
        """Return the temperature at a progress from 0 (token 0) to 1 (the last step)."""
        return float(self.start * (self.end / self.start) ** progress)


Schedule: TypeAlias = float | tuple[float, ...] | LinearSchedule | ExponentialSchedule
_CURVES: dict[str, type[LinearSchedule | ExponentialSchedule]] = {
    "linear": LinearSchedule,
    "exponential": ExponentialSchedule,
}


@dataclass(frozen=True)
class TemperatureScale(LogitConstraint, name="temperature_scale"):
    """Divides the logits by a temperature that changes as the response grows.

    The request's own ``temperature`` divides the logits too; leave it at 1 to use this schedule alone. At
    ``temperature=0`` the best token stays the best, and only the log-probs change.

    Args:
        schedule: one number for all tokens; a list with one number for each token, whose last number goes on; a
            `LinearSchedule`; or an `ExponentialSchedule`. Each temperature is in [0.01, 100].

    Raises:
        InputError: a temperature outside [0.01, 100], NaN, an empty list, or fewer than 2 steps.
        InputTypeError: a value of another type.
    """

    schedule: Schedule

    def __post_init__(self) -> None:
        super().__post_init__()
        schedule = self.schedule
        if isinstance(schedule, (LinearSchedule, ExponentialSchedule)):
            steps = schedule.steps
            if steps is not None and type(steps) is not int:
                raise InputTypeError(
                    f"TemperatureScale({schedule}): expected steps to be an integer of at least 2, or None"
                )
            if steps is not None and steps < 2:
                raise InputError(f"TemperatureScale({schedule}): expected steps of at least 2, or None")
            start, end = _read_temperature(schedule.start), _read_temperature(schedule.end)
            object.__setattr__(self, "schedule", type(schedule)(start, end, steps))
        elif isinstance(schedule, (list, tuple)):
            if not schedule:
                raise InputError("TemperatureScale([]): 0 temperatures; give at least 1")
            object.__setattr__(self, "schedule", tuple(_read_temperature(value) for value in schedule))
        else:
            object.__setattr__(self, "schedule", _read_temperature(schedule))

    def at(self, index: int, max_new_tokens: int) -> float:
        """Return the temperature of the response's token ``index``, of at most ``max_new_tokens``."""
        schedule = self.schedule
        if isinstance(schedule, float):
            return schedule
        if isinstance(schedule, tuple):
            return schedule[min(index, len(schedule) - 1)]
        last = (max_new_tokens if schedule.steps is None else schedule.steps) - 1
        return schedule.at(min(index / last, 1.0) if last > 0 else 0.0)

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        """See `LogitConstraint.apply`."""
        return logits_V / self.at(step.index, step.max_new_tokens)

    def fields(self) -> dict[str, Any]:
        """See `LogitConstraint.fields`."""
        schedule: Any = self.schedule
        for name, kind in _CURVES.items():
            if isinstance(schedule, kind):
                schedule = {name: [schedule.start, schedule.end, schedule.steps]}
                break
        return {**super().fields(), "schedule": schedule}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """See `LogitConstraint.from_fields`."""
        schedule = fields["schedule"]
        if isinstance(schedule, dict):
            ((name, values),) = schedule.items()
            schedule = _CURVES[name](*values)
        return super().from_fields({**fields, "schedule": schedule})


def _read_temperature(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputTypeError(
            f"TemperatureScale: {value!r:.80} is no temperature; expected a number, a list, or a schedule"
        )
    try:
        number = float(value)
    except OverflowError:  # an integer that is too large for a float
        number = math.inf
    if not MIN_TEMPERATURE <= number <= MAX_TEMPERATURE:
        raise InputError(
            f"TemperatureScale: temperature {number}; expected one in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE:g}]. For "
            "the best token alone use temperature=0"
        )
    return number
