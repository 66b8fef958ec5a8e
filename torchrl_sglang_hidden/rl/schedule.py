"""`Schedule`: at which steps of an episode an observation is encoded, and whose vector each step is given.

Knows nothing of prompts or environments: a step is the number of steps since its episode's reset, an age the number of
steps since the observation was seen whose vector a step has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError

__all__ = ["Schedule", "make_schedule", "steps_since_reset"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """When to encode. The observation of the reset is always encoded, and given with the reset.

    Args:
        every: encode each n-th observation after the reset; None for none of them.
        late: give a vector one step after its observation.

    Raises:
        InputTypeError: ``every`` is no integer, or ``late`` no bool.
        InputError: ``every`` is below 1.
    """

    every: int | None = 1
    late: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.late, bool):
            raise InputTypeError(f"late={self.late!r:.80}: expected True or False")
        if self.every is not None and type(self.every) is not int:
            raise InputTypeError(f"every={self.every!r:.80}: expected an integer of at least 1")
        if self.every is not None and self.every < 1:
            raise InputError(f"every={self.every}: expected an integer of at least 1; 1 encodes every step")

    @property
    def reuses(self) -> bool:
        """Whether a step may be given the vector of a step before."""
        return self.late or self.every != 1

    def is_due(self, age: torch.Tensor) -> torch.Tensor:
        """Return where a step brings a new vector, from the ages of the vectors before it.

        With ``late`` the new vector is that of the observation before the step, otherwise of the one after it.
        """
        if self.every is None:
            return torch.zeros_like(age, dtype=torch.bool)
        return age + (not self.late) >= self.every

    def age_after(self, age: torch.Tensor, due: torch.Tensor) -> torch.Tensor:
        """Return the ages after a step, from those before it."""
        return torch.where(due, int(self.late), age + 1)

    def source(self, step: torch.Tensor) -> torch.Tensor:
        """Return the step of an episode whose observation's vector a step of the same episode is given."""
        if self.every is None:
            return torch.zeros_like(step)
        seen = (step - int(self.late)).clamp(min=0)
        return seen - seen % self.every


def make_schedule(every: int, late: bool, *, frozen: bool) -> Schedule:
    """Return a schedule; with ``frozen`` that of the reset alone.

    Raises:
        InputTypeError, InputError: arguments that `Schedule` refuses, or that ``frozen`` leaves nothing to do.
    """
    schedule = Schedule(every, late)
    if not frozen:
        return schedule
    if schedule.reuses:
        raise InputError(
            f"ablate='frozen' with every={every} and late={late}: only the reset is encoded; leave both out"
        )
    return Schedule(None)


def steps_since_reset(done: torch.Tensor) -> torch.Tensor:
    """Return for each row of trajectories how many steps its episode's reset, or the trajectory's start, is ago.

    Args:
        done: bool ``[*, T]``, whether the episode ended with the step that begins at a row.

    Returns:
        int64 ``[*, T]``.
    """
    steps = torch.zeros(done.shape, dtype=torch.int64, device=done.device)
    for t in range(1, done.shape[-1]):
        steps[..., t] = torch.where(done[..., t - 1], 0, steps[..., t - 1] + 1)
    return steps
