"""What rows of a TensorDict say of themselves: which are reset or stepped, and how far each is from its reset.

Knows nothing of prompts. N rows are those of a batch of any shape, in row-major order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from tensordict import NonTensorData, NonTensorStack, TensorDictBase
from tensordict.utils import NestedKey
from torchrl.envs.transforms import Compose, Transform

from torchrl_sglang_hidden.errors import InputError, MissingKeyError
from torchrl_sglang_hidden.rl.schedule import Schedule, steps_since_reset

__all__ = ["refuse_lost", "reset_rows", "stepped_rows", "text_leaf", "trajectory_sources", "transforms_behind"]


def trajectory_sources(tensordict: TensorDictBase, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for the rows of trajectories and of their ``"next"`` whose vector they get, and its age, ``[2N]``."""
    if not tensordict.ndim or (tensordict.names or [None])[-1] != "time":
        raise InputError(
            f"every, late or ablate='frozen' and data of batch size {tuple(tensordict.batch_size)} with the "
            f"dimensions {tensordict.names}: expected the last one to be 'time', as in a rollout; name it with "
            "refine_names(..., 'time'), or use every=1"
        )
    done = tensordict.get(("next", "done"))
    if done is None:
        raise MissingKeyError("data without ('next', 'done'), which ends episodes: add it, or use every=1")
    done = done.reshape(*tensordict.batch_size, -1).any(-1).cpu()
    steps = steps_since_reset(done).flatten()
    index = torch.arange(done.numel())
    own = schedule.source(steps)
    after = schedule.source(steps + 1)
    is_next = after == steps + 1
    sources = torch.cat([index - steps + own, torch.where(is_next, done.numel() + index, index - steps + after)])
    return sources, torch.cat([steps - own, steps + 1 - after])


def _any_of(tensordict: TensorDictBase, name: str, num_rows: int) -> torch.Tensor | None:
    """Return where a row has a True under any key of a name, bool ``[N]``; None without such a key."""
    keys = [key for key in tensordict.keys(True, True) if (key if isinstance(key, str) else key[-1]) == name]
    masks = [tensordict.get(key).reshape(num_rows, -1).any(-1).cpu() for key in keys]
    return torch.stack(masks).any(0) if masks else None


def reset_rows(tensordict: TensorDictBase, num_rows: int) -> torch.Tensor:
    """Return which rows are reset, bool ``[N]``; all of them where nothing is said."""
    mask = _any_of(tensordict, "_reset", num_rows)
    return torch.ones(num_rows, dtype=torch.bool) if mask is None else mask


def stepped_rows(tensordict: TensorDictBase, num_rows: int) -> torch.Tensor:
    """Return which rows take a step, bool ``[N]``; all of them where nothing is said."""
    mask = _any_of(tensordict, "_step", num_rows)
    return torch.ones(num_rows, dtype=torch.bool) if mask is None else mask


def text_leaf(texts: list[str], batch: torch.Size) -> NonTensorData | NonTensorStack:
    """Return texts as a leaf of a batch of any shape."""
    if not batch:
        return NonTensorData(texts[0])
    if not batch.numel():  # a stack of nothing is no leaf
        return NonTensorData("", batch_size=batch)
    nested: list[Any] = texts
    for size in reversed(batch[1:]):
        nested = [nested[start : start + size] for start in range(0, len(nested), size)]
    return NonTensorStack.from_list(nested)


def refuse_lost(key: NestedKey | None) -> NoReturn:
    """Raise for a TensorDict that lacks what the step before wrote."""
    raise MissingKeyError(
        f"no {key!r}, which the step before wrote: pass the TensorDict that reset or step_mdp returned, whole"
    )


def transforms_behind(transform: Transform) -> list[Transform]:
    """Return the transforms that run after one of an environment's, in their order."""
    transforms = list(_flat(transform.container.transform))
    return transforms[transforms.index(transform) + 1 :]


def _flat(transform: Transform) -> Iterator[Transform]:
    """Yield the transforms of a `Compose` in their order, those of one inside it too."""
    if not isinstance(transform, Compose):
        yield transform
        return
    for part in transform:
        yield from _flat(part)
