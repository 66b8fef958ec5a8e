"""What an action spec asks of an actor: how many numbers, and the distribution that they are parameters of.

Knows nothing of observations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict.nn import InteractionType, TensorDictModule
from tensordict.utils import NestedKey
from torch import nn
from torch.distributions import Categorical as CategoricalDistribution
from torchrl.data import Bounded, Categorical, OneHot, TensorSpec, Unbounded
from torchrl.modules import (
    MLP,
    IndependentNormal,
    MaskedCategorical,
    MaskedOneHotCategorical,
    NormalParamExtractor,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
)

from torchrl_sglang_hidden.errors import InputError, InputTypeError

__all__ = ["ActionSpace", "make_actor_head", "read_action_spec"]

# Of the last layer at the start: every action is about as likely, and the state decides later (Andrychowicz et al.
# 2021, "What matters for on-policy deep actor-critic methods?").
_FIRST_WEIGHTS = 0.01


class ActionSpace(NamedTuple):
    """How an actor draws its actions.

    Args:
        num_outputs: numbers that the distribution needs.
        distribution: its class.
        options: its other arguments.
        is_discrete: whether the numbers are logits; else they are the locations and, after them, the scales.
    """

    num_outputs: int
    distribution: type
    options: dict[str, Any]
    is_discrete: bool


def read_action_spec(spec: TensorSpec, *, masked: bool) -> ActionSpace:
    """Return what an action spec asks of an actor.

    Args:
        spec: ``Categorical`` or ``OneHot``; floating ``Bounded`` or ``Unbounded`` of shape ``[*batch, A]``.
        masked: whether a mask says which actions are allowed.

    Raises:
        InputError: bounds of which some are infinite or that differ among environments, a number in place of a vector,
            or a mask of continuous actions.
        InputTypeError: another kind of spec.
    """
    # Binary and the specs of several actions are subclasses of these two.
    if type(spec) is Categorical:
        return ActionSpace(int(spec.space.n), MaskedCategorical if masked else CategoricalDistribution, {}, True)
    if type(spec) is OneHot:
        return ActionSpace(int(spec.space.n), MaskedOneHotCategorical if masked else OneHotCategorical, {}, True)
    if not isinstance(spec, (Bounded, Unbounded)) or not spec.dtype.is_floating_point:
        raise InputTypeError(
            f"action_spec is a {type(spec).__name__}; expected Categorical, OneHot, or floating Bounded or Unbounded: "
            "pass env.action_spec, and build actors for other actions with torchrl's ProbabilisticActor"
        )
    if masked:
        raise InputError("action_mask_key with continuous actions: a mask needs actions to choose from; leave it out")
    if not spec.shape:
        raise InputError("action_spec has shape (); expected (*batch, A): add torchrl's UnsqueezeTransform")
    size = spec.shape[-1]
    if isinstance(spec, Unbounded):
        return ActionSpace(2 * size, IndependentNormal, {}, False)
    low, high = (bound.reshape(-1, size) for bound in (spec.space.low, spec.space.high))
    bounds = torch.stack([low, high])
    if bounds.isinf().all():
        return ActionSpace(2 * size, IndependentNormal, {}, False)
    if not bounds.isfinite().all():
        raise InputError(f"action_spec: some of its bounds are infinite ({low[0]} … {high[0]}); set all, or none")
    if (bounds != bounds[:, :1]).any():
        raise InputError(
            "action_spec: its bounds differ among the environments; expected one actor's: make one for each"
        )
    return ActionSpace(2 * size, TanhNormal, {"low": low[0], "high": high[0]}, False)


def make_actor_head(
    space: ActionSpace,
    num_features: int,
    *,
    features_key: NestedKey,
    action_key: NestedKey,
    action_mask_key: NestedKey | None,
    spec: TensorSpec,
    device: torch.device | str | None,
) -> ProbabilisticActor:
    """Make the actor that reads features ``[*batch, num_features]``: one linear layer, and the distribution."""
    linear = MLP(in_features=num_features, out_features=space.num_outputs, num_cells=[], device=device)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.mul_(_FIRST_WEIGHTS)
    names = ["logits"] if space.is_discrete else ["loc", "scale"]
    net = linear if space.is_discrete else nn.Sequential(linear, NormalParamExtractor())
    reads: dict[str, NestedKey] = {name: name for name in names}
    if action_mask_key is not None:
        reads["mask"] = action_mask_key
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=[features_key], out_keys=names),
        in_keys=reads,
        out_keys=[action_key],
        spec=spec,
        distribution_class=space.distribution,
        distribution_kwargs=space.options,
        default_interaction_type=InteractionType.RANDOM,
        return_log_prob=True,
    )
