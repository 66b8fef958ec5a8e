"""`add_next_states`: the states after each step of a rollout, without asking again for those that are there.

Knows nothing of values: GAE reads what is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from tensordict import TensorDictBase, lazy_stack
from tensordict.utils import NestedKey, unravel_key

from torchrl_sglang_hidden.errors import InputError, InputTypeError, MissingKeyError

__all__ = ["add_next_states"]

Encoder: TypeAlias = Callable[[TensorDictBase], TensorDictBase]


def add_next_states(
    batch: TensorDictBase,
    *,
    state_key: NestedKey = ("hidden_states", "prompt"),
    encoder: Encoder | None = None,
) -> TensorDictBase:
    """Write the hidden states at ``"next"`` that GAE reads, from those that a rollout has already.

    A policy that writes hidden states writes them before each step, so that ``"next"`` has none. After step t stands:

    - where the episode goes on, the state before step t + 1: the same prompt, encoded already;
    - where it ended by itself (``terminated``), the state before step t again. None comes after it, its value is 0
      whatever stands there, and TorchRL's estimators put the same in the place of what is missing;
    - where it was cut off (``done`` and not ``terminated``) or the batch ends in its middle, what ``encoder`` makes of
      ``"next"``. The state before step t + 1 is none of this episode there: it is the next one's first. Without an
      encoder this raises. TorchRL's ``GAE(shifted=True)`` takes V(s) for V(s') there without a word.

    Not for these: a `HiddenStateTransform` encodes what each step gives, ends included, and has written ``"next"``
    itself. An environment that resets itself inside the step has the next episode's observation at ``"next"`` of a cut:
    no state of it is right, and ``GAE(auto_reset_env=True)`` is made for it. After ``MultiStep``, ``"next"`` is n steps
    away.

    Args:
        batch: a rollout ``[*batch, T]`` with time as its last dimension, named or not, and with ``("next", "done")``;
            written to. Not the samples of a buffer, whose rows do not follow each other.
        state_key: the states, floating ``[*batch, T, D]`` or ``[*batch, T, K, D]``.
        encoder: a policy or transform that writes ``state_key`` for the rows that it is given, those of
            ``batch["next"]`` that have no state yet. One call; none where every episode ended by itself.

    Returns:
        The batch.

    Raises:
        MissingKeyError: no states, or no ``("next", "done")``.
        InputTypeError: states that are no floating tensor.
        InputError: a last dimension that is not time, steps of several, ``"next"`` states that are there already, or
            cut episodes without an encoder.

    Example:
        >>> encoder = policy.get_new_version(generate_kwargs={"max_new_tokens": 0}, text_key=None, history_key=None)
        >>> GAE(gamma=0.99, lmbda=0.95, value_network=critic)(add_next_states(batch, encoder=encoder))
    """
    key = unravel_key(state_key)
    next_key = ("next", *key) if isinstance(key, tuple) else ("next", key)
    states = _read_states(batch, key, next_key)
    last, terminated = _ends(batch)
    time = batch.ndim - 1
    # The last row's own state comes after it, and is not kept.
    after = torch.cat([states.narrow(time, 1, states.shape[time] - 1), states.narrow(time, -1, 1)], time)
    found = torch.where(last.reshape(*last.shape, *[1] * (states.ndim - last.ndim)), states, after)
    unknown = (last & ~terminated).nonzero().tolist()
    if unknown:
        if encoder is None:
            raise InputError(
                f"{len(unknown)} of {last.numel()} steps end their episode without terminating it, the first at "
                f"{tuple(unknown[0])}: the state after them was never encoded; pass encoder=, a policy that reads the "
                "prompts at 'next'"
            )
        after_cuts = batch.get("next")
        rows = [after_cuts[tuple(index)].copy() for index in unknown]
        encoded = encoder(lazy_stack(rows)).get(key)
        if encoded is None or encoded.shape != (len(rows), *states.shape[batch.ndim :]):
            shape = None if encoded is None else tuple(encoded.shape)
            raise InputError(
                f"encoder wrote {key!r} of shape {shape}; expected {(len(rows), *states.shape[batch.ndim :])}: use one "
                "that pools as the policy of the rollout does"
            )
        for index, state in zip(unknown, encoded.to(found), strict=True):
            found[tuple(index)] = state
    if isinstance(key, tuple) and batch.get(next_key[:-1]) is None:
        # Of the class that the rollout's own states are in: GAE stacks the two.
        batch.set(next_key[:-1], batch.get(key[:-1]).empty())
    batch.set(next_key, found)
    return batch


def _read_states(batch: TensorDictBase, key: NestedKey, next_key: NestedKey) -> torch.Tensor:
    """Return the states of a rollout; refuse what is none, and states at ``"next"``."""
    # LLMCollector names no dimension; GAE too takes the last one then.
    names = list(batch.names or ())
    if not batch.ndim or "time" in names[:-1]:
        raise InputError(
            f"a batch of size {tuple(batch.batch_size)} with the dimensions {names}: expected time to be the last one, "
            "as in a rollout; change their order"
        )
    if not batch.batch_size.numel():
        raise InputError(f"a batch of size {tuple(batch.batch_size)} has no steps; expected at least 1")
    states = batch.get(key)
    if states is None:
        raise MissingKeyError(f"no {key!r} in the batch: name the states with state_key, or pool the prompts")
    if not isinstance(states, torch.Tensor) or not states.is_floating_point():
        raise InputTypeError(f"{key!r} is a {type(states).__name__}; expected a floating tensor: name one segment")
    if batch.get(next_key) is not None:
        raise InputError(f"{next_key!r} is there already; leave this call out: GAE reads it as it is")
    return states


def _ends(batch: TensorDictBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which steps have no step of their episode after them, and which terminated it, bool ``[*batch, T]``."""
    done = batch.get(("next", "done"))
    if done is None:
        raise MissingKeyError("no ('next', 'done') in the batch, which says where episodes end: add it")
    steps = batch.get(("next", "steps_to_next_obs"), None)
    steps = batch.get("steps_to_next_obs", None) if steps is None else steps
    if steps is not None and (steps > 1).any():
        raise InputError(
            f"'next' is up to {int(steps.max())} steps away, as MultiStep makes it; expected 1: run the encoder on "
            "batch['next'] instead"
        )
    terminated = batch.get(("next", "terminated"), done)
    last, terminated = (flag.reshape(*batch.batch_size, -1).any(-1) for flag in (done, terminated))
    last = last.clone()
    last[..., -1] = True
    # Trajectories that a collector put one behind the other.
    names = batch.get(("collector", "traj_ids"), None)
    if names is not None:
        last[..., :-1] |= names[..., 1:] != names[..., :-1]
    return last, terminated
