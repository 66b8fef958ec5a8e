"""Images and vectors of an environment as features that stand beside a hidden vector.

Knows nothing of language models: a network for each observation, by the shape that its spec says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict.utils import NestedKey, unravel_key
from torch import nn
from torchrl.data import Composite, NonTensor, TensorSpec
from torchrl.modules import MLP, ConvNet

from torchrl_sglang_hidden.errors import InputError, InputTypeError, MissingKeyError

__all__ = ["Observation", "ObservationInput", "find_observations"]

# From this size on the convolutions of Mnih et al. 2015 (doi:10.1038/nature14236) leave something of an image.
_NATURE_SIZE = 36


class Observation(NamedTuple):
    """An observation's key and the shape of one: ``[C, H, W]`` for an image, ``[F]`` for a vector."""

    key: NestedKey
    shape: torch.Size

    @property
    def is_image(self) -> bool:
        """Whether it has three dimensions."""
        return len(self.shape) == 3


def find_observations(observation_spec: Composite | None, keys: Sequence[NestedKey]) -> list[Observation]:
    """Return the observations under some keys of an environment's ``observation_spec``.

    Raises:
        InputError: keys without a spec, an observation that is neither image nor vector, or images that are integers or
            have their channels last.
        InputTypeError: a spec of another kind, or an observation that is no tensor.
        MissingKeyError: the spec lacks a key.
    """
    if not keys:
        return []
    if observation_spec is None:
        raise InputError(f"observation_keys={keys!r:.80} without a spec: pass observation_spec=env.observation_spec")
    if not isinstance(observation_spec, Composite):
        raise InputTypeError(
            f"observation_spec is a {type(observation_spec).__name__}; expected a Composite: pass env.observation_spec"
        )
    there = set(observation_spec.keys(True, True))
    found = []
    for key in map(unravel_key, keys):
        if key not in there:
            raise MissingKeyError(
                f"observation_keys: the environment has no {key!r}; it has {sorted(map(str, there))}: change the keys"
            )
        spec = observation_spec[key]
        found.append(Observation(key, _shape_of(key, spec, len(observation_spec.shape))))
    return found


def _shape_of(key: NestedKey, spec: TensorSpec, num_batch_dims: int) -> torch.Size:
    if isinstance(spec, NonTensor):
        raise InputTypeError(f"{key!r} is no tensor; expected an image or a vector: put texts into the prompt instead")
    shape = spec.shape[num_batch_dims:]
    if len(shape) not in (1, 3):
        raise InputError(
            f"{key!r} has shape {tuple(shape)}; expected an image (C, H, W) or a vector (F,): use torchrl's "
            "ToTensorImage, FlattenObservation or UnsqueezeTransform"
        )
    if len(shape) == 3 and not spec.dtype.is_floating_point:
        raise InputError(f"{key!r} is an image of {spec.dtype}; expected floats: add torchrl's ToTensorImage")
    if len(shape) == 3 and shape[-1] in (1, 3, 4) and shape[0] not in (1, 3, 4):
        raise InputError(f"{key!r} has shape {tuple(shape)}, with the channels last; expected (C, H, W): permute it")
    return torch.Size(shape)


class ObservationInput(nn.Module):
    """Turns an observation ``[*batch, *shape]`` into features ``[*batch, num_features]``; a vector stays as it is.

    Args:
        observation: its key and shape.
        image_features: how many features an image becomes.
        conv: the convolutions of an image; by default three of them, those of Mnih et al. 2015 for large ones.
        device: of the parameters.

    Attributes:
        num_features: how many there are.

    Raises:
        InputError: convolutions that do not read such an image.
    """

    _like: torch.Tensor

    def __init__(
        self, observation: Observation, image_features: int, conv: ConvNet | None, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.observation = observation
        # Follows `.double()` and the like, as the parameters of the layers behind this one do.
        self.register_buffer("_like", torch.empty(0), persistent=False)
        self.num_features = observation.shape[0]
        self.net: nn.Module = nn.Identity()
        if observation.is_image:
            self.num_features = image_features
            convolutions = _default_conv(observation.shape, device) if conv is None else conv
            self.net = nn.Sequential(
                convolutions,
                MLP(
                    in_features=_num_outputs(convolutions, observation, device),
                    out_features=image_features,
                    num_cells=[],
                    activation_class=nn.ReLU,
                    activate_last_layer=True,
                    device=device,
                ),
            )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the features, in the dtype that the module was given: float32, or what ``.to(dtype)`` says.

        Raises:
            InputError: an observation of another shape.
        """
        key, shape = self.observation
        if values.shape[-len(shape) :] != shape:
            raise InputError(
                f"{key!r} has shape {tuple(values.shape)}; expected {('*batch', *shape)}: make the actor with the "
                "observation_spec of this environment"
            )
        features: torch.Tensor = self.net(values.to(self._like.dtype))
        return features


def _default_conv(shape: torch.Size, device: torch.device | str | None) -> ConvNet:
    if min(shape[1:]) >= _NATURE_SIZE:
        sizes = {"kernel_sizes": [8, 4, 3], "strides": [4, 2, 1]}
    else:
        sizes = {"kernel_sizes": [3, 3, 3], "strides": [1, 2, 2], "paddings": [1, 1, 1]}
    return ConvNet(in_features=shape[0], num_cells=[32, 64, 64], activation_class=nn.ReLU, device=device, **sizes)


def _num_outputs(conv: nn.Module, observation: Observation, device: torch.device | str | None) -> int:
    """Return how many numbers the convolutions make of an image."""
    try:
        with torch.no_grad():
            features = conv(torch.zeros(1, *observation.shape, device=device))
    except RuntimeError as error:
        raise InputError(
            f"conv does not read {observation.key!r} of shape {tuple(observation.shape)} ({error}); pass a ConvNet for "
            "such images"
        ) from error
    if features.ndim != 2:
        raise InputError(
            f"conv makes {tuple(features.shape[1:])} of {observation.key!r}; expected one dimension: leave its "
            "aggregator_class as it is"
        )
    return int(features.shape[-1])
