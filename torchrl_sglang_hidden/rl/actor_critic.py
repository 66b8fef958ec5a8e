"""`make_actor_critic`: an actor and a critic on hidden vectors, alone or beside what else an environment shows.

Knows nothing of losses: TorchRL's A2C and PPO take what is built here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import nn
from torchrl.data import Composite, TensorSpec
from torchrl.modules import MLP, ActorValueOperator, ConvNet, ValueOperator

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.rl.action_heads import make_actor_head, read_action_spec
from torchrl_sglang_hidden.rl.observations import ObservationInput, find_observations
from torchrl_sglang_hidden.rl.state_source import StateInput, States, check_cells, find_states

__all__ = ["FusedFeatures", "make_actor_critic"]


class FusedFeatures(nn.Module):
    """The common part: features of the observations and of the hidden vector side by side, then the shared trunk.

    Args:
        observations: the networks of the observations, in the order in which they are read.
        states: the network of the hidden vector, which is read after them.
        trunk: reads all of their features.
    """

    def __init__(self, observations: Sequence[ObservationInput], states: StateInput, trunk: nn.Module) -> None:
        super().__init__()
        self.observations, self.states, self.trunk = nn.ModuleList(observations), states, trunk

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return features ``[*batch, F]`` of the observations and, the last input, the hidden vector."""
        parts = [net(values) for net, values in zip((*self.observations, self.states), inputs, strict=True)]
        features: torch.Tensor = self.trunk(torch.cat(parts, -1))
        return features


def make_actor_critic(
    states: States,
    action_spec: TensorSpec,
    *,
    state_key: NestedKey | None = None,
    observation_spec: Composite | None = None,
    observation_keys: Sequence[NestedKey] = (),
    conv: ConvNet | None = None,
    image_features: int = 512,
    num_cells: Sequence[int] = (256,),
    norm: bool = True,
    action_key: NestedKey = "action",
    action_mask_key: NestedKey | None = None,
    features_key: NestedKey = "features",
    device: torch.device | str | None = None,
) -> ActorValueOperator:
    """Make an actor and a critic with a shared trunk: TorchRL's ``ActorValueOperator``, ``ConvNet`` and ``MLP``.

    An image becomes ``image_features`` features, a vector stays as it is, and the hidden vector stands beside them:
    with one image the trunk reads 512 + D numbers.

    Args:
        states: the policy or `HiddenStateTransform` that writes the hidden vectors, which says their key and size; or
            their size D.
        action_spec: the environment's: ``Categorical`` or ``OneHot``, drawn from a categorical distribution; or
            floating ``Bounded`` or ``Unbounded`` of shape ``[*batch, A]``, drawn from ``TanhNormal`` or
            ``IndependentNormal``.
        state_key: where the vectors stand, if not where ``states`` writes them, such as behind a ``VecNormV2``.
        observation_spec: the environment's, for ``observation_keys``.
        observation_keys: what else is read: images ``[*batch, C, H, W]`` of floats, and vectors ``[*batch, F]``.
        conv: the convolutions of each image; by default three of them, those of Mnih et al. 2015 for images of at least
            36 × 36 pixels. Its last step must flatten, as TorchRL's does.
        image_features: features of each image, float32.
        num_cells: sizes of the trunk's layers, which actor and critic share; with none both are linear in the features.
        norm: whether each hidden vector is normalised to mean 0 and variance 1. Observations are read as they are.
        action_key: where the action is written, with its log-prob beside it.
        action_mask_key: where the environment says which of A discrete actions it allows, bool ``[*batch, A]``.
        features_key: where the trunk's features are written.
        device: of the parameters.

    Returns:
        An operator whose ``get_policy_operator()`` collects, and whose two operators make a loss: the trunk is then
        trained by both. It draws actions unless ``set_exploration_type`` says otherwise. No part of it calls the
        language model; where the policy itself writes the vectors, collect with ``TensorDictSequential(policy,
        operator.get_policy_operator())``.

    Raises:
        InputError: sizes, shapes, specs or keys that do not fit; when it is called, tensors of another shape.
        InputTypeError: an argument of another type, or actions of another kind.
        MissingKeyError: ``observation_spec`` lacks a key.

    Example:
        >>> encode = HiddenStateTransform(policy, "You see {mission}.", in_keys=["mission"])
        >>> env = TransformedEnv(make_env(), Compose(ToTensorImage(in_keys=["pixels"]), encode))
        >>> both = make_actor_critic(
        ...     encode, env.action_spec, observation_spec=env.observation_spec, observation_keys=["pixels"]
        ... )
        >>> loss = ClipPPOLoss(both.get_policy_operator(), both.get_value_operator())
    """
    source = find_states(states, state_key)
    cells = check_cells("num_cells", num_cells)
    check_cells("image_features", [image_features])
    found = find_observations(observation_spec, observation_keys)
    if conv is not None and not isinstance(conv, ConvNet):
        raise InputTypeError(f"conv is a {type(conv).__name__}; expected torchrl's ConvNet, or None for the default")
    images = [observation for observation in found if observation.is_image]
    if conv is not None and len(images) != 1:
        raise InputError(f"conv for {len(images)} images; expected one image: leave conv out")
    inputs = [ObservationInput(observation, image_features, conv, device) for observation in found]
    num_features = sum(net.num_features for net in inputs) + source.shape.numel()
    trunk: nn.Module = nn.Identity()
    if cells:
        *hidden_cells, last = cells
        trunk = MLP(
            in_features=num_features,
            out_features=last,
            num_cells=hidden_cells,
            activate_last_layer=True,
            device=device,
        )
        num_features = last
    common = TensorDictModule(
        FusedFeatures(inputs, StateInput(source, norm), trunk),
        in_keys=[*(observation.key for observation in found), source.key],
        out_keys=[features_key],
    )
    actor = make_actor_head(
        read_action_spec(action_spec, masked=action_mask_key is not None),
        num_features,
        features_key=features_key,
        action_key=action_key,
        action_mask_key=action_mask_key,
        spec=action_spec,
        device=device,
    )
    critic = ValueOperator(
        MLP(in_features=num_features, out_features=1, num_cells=[], device=device), in_keys=[features_key]
    )
    return ActorValueOperator(common, actor, critic)
