"""Rooms of MiniGrid, many side by side, whose mission says which of two things to fetch; and PPO on image and mission.

The image shows both things, and the mission, a sentence of MiniGrid's own, says which is the right one. To pick up the
other ends the episode with nothing: an agent that does not read fetches the right one half of the time.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX
from minigrid.envs import FetchEnv
from minigrid.wrappers import RGBImgPartialObsWrapper
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import TensorSpec, Unbounded
from torchrl.envs import (
    Compose,
    ExplorationType,
    GymWrapper,
    RewardSum,
    TransformedEnv,
    VecNormV2,
    set_exploration_type,
)
from torchrl.envs.transforms import Transform
from torchrl.modules import ConvNet
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_sglang_hidden import HiddenSpec, HiddenStateTransform, SGLangHiddenWrapper, connect
from torchrl_sglang_hidden.rl import make_actor_critic

MAX_STEPS, MISSION_BYTES = 20, 32
ACTIONS = ("turn left", "turn right", "go forward", "pick up")
# MiniGrid has six colours: with two of them a small agent learns in a minute.
SHOWN = {"red", "blue", "key", "ball"}


class TwoThings(FetchEnv):
    """MiniGrid's Fetch with the things in `SHOWN`, where the two of a room differ in shape, colour or both."""

    def _rand_elem(self, iterable: Any) -> Any:
        return super()._rand_elem([value for value in iterable if value in SHOWN])

    def _gen_grid(self, width: int, height: int) -> None:
        things: set[Any] = set()
        while len(things) < 2:
            super()._gen_grid(width, height)
            cells = (cell for cell in self.grid.grid if cell is not None and cell.type in self.obj_types)
            things = {(cell.type, cell.color) for cell in cells}


class Room(gymnasium.ObservationWrapper):
    """One room of 3 × 3 cells, with the four actions that matter.

    Args:
        pixels: show it as a picture of 40 × 40 pixels, and not as MiniGrid's codes of things and colours.
        render_mode: "rgb_array", to draw it from above.
    """

    def __init__(self, *, pixels: bool = False, render_mode: str | None = None) -> None:
        env: gymnasium.Env = TwoThings(
            size=5, numObjs=2, agent_view_size=5, max_steps=MAX_STEPS, render_mode=render_mode
        )
        super().__init__(RGBImgPartialObsWrapper(env, tile_size=8) if pixels else env)
        self.action_space = spaces.Discrete(len(ACTIONS))
        # Of many rooms at once TorchRL reads numbers: the sentence travels as its bytes.
        mission = spaces.Box(0, 255, (MISSION_BYTES,), np.uint8)
        self.observation_space = spaces.Dict(image=self.env.observation_space["image"], mission=mission)

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        mission = observation["mission"].ljust(MISSION_BYTES).encode()
        return {"image": observation["image"], "mission": np.frombuffer(mission, np.uint8)}


def read_mission(row: TensorDictBase) -> str:
    """Write the prompt of one room: the mission as MiniGrid says it."""
    return bytes(row["mission"].tolist()).decode().strip()


def make_rooms(num_envs: int, *, seed: int = 0, pixels: bool = False) -> GymWrapper:
    """Return rooms side by side; TorchRL resets each when its episode ends."""
    # Left to gymnasium, the observation that an episode ends with would be lost.
    rooms = SyncVectorEnv([partial(Room, pixels=pixels)] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
    env = GymWrapper(rooms, categorical_action_encoding=True)
    env.set_seed(seed)
    return env


class GridChannels(Transform):
    """Turns MiniGrid's codes, ``[*, H, W, 3]``, into one channel for each kind of thing and each colour."""

    def __init__(self) -> None:
        super().__init__(in_keys=["image"], out_keys=["grid"])

    def _apply_transform(self, image: torch.Tensor) -> torch.Tensor:
        things = torch.nn.functional.one_hot(image[..., 0].long(), len(OBJECT_TO_IDX))
        colors = torch.nn.functional.one_hot(image[..., 1].long(), len(COLOR_TO_IDX))
        return torch.cat([things, colors], -1).movedim(-1, -3).float()

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: TensorSpec) -> TensorSpec:
        height, width, _ = observation_spec["image"].shape[-3:]
        channels = len(OBJECT_TO_IDX) + len(COLOR_TO_IDX)
        observation_spec["grid"] = Unbounded((*observation_spec.shape, channels, height, width))
        return observation_spec


class Trainer:
    """An agent that reads the room as an image and the mission as a hidden vector, and its PPO.

    Args:
        encode: writes the vectors; its ``ablate`` says what the agent is given in their place.
        seed: of rooms and agent.
        num_envs: rooms side by side.
        steps: of all rooms together.
    """

    def __init__(self, encode: HiddenStateTransform, *, seed: int, steps: int, num_envs: int = 64) -> None:
        torch.manual_seed(seed)
        self.encode, self.seed, self.steps = encode, seed, steps
        self.norm = VecNormV2(in_keys=["hidden_state"], out_keys=["hidden_state_norm"], reduce_batch_dims=True)
        self.env = TransformedEnv(make_rooms(num_envs, seed=seed), self._transforms(encode, self.norm))
        channels = self.env.observation_spec["grid"].shape[1]
        agent = make_actor_critic(
            encode,
            self.env.action_spec,
            state_key="hidden_state_norm",
            observation_spec=self.env.observation_spec,
            observation_keys=["grid"],
            conv=ConvNet(channels, num_cells=[32, 32], kernel_sizes=[1, 3], strides=1, activation_class=torch.nn.ReLU),
            image_features=64,
            num_cells=(128, 128),
            norm=False,
        )
        self.actor, value = agent.get_policy_operator(), agent.get_value_operator()
        self.advantage = GAE(gamma=0.95, lmbda=0.95, value_network=value, average_gae=True)
        self.loss = ClipPPOLoss(self.actor, value, entropy_coeff=0.02)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=1.5e-3)

    @staticmethod
    def _transforms(encode: Transform, norm: Transform) -> Compose:
        return Compose(GridChannels(), encode, norm, RewardSum(in_keys=["reward"], out_keys=["episode_reward"]))

    def train(self) -> list[float]:
        """Train, and return which part of the episodes of each batch fetched the right thing."""
        per_batch = 32 * self.env.batch_size.numel()
        curve = []
        for batch in Collector(
            self.env,
            self.actor,
            frames_per_batch=per_batch,
            total_frames=self.steps,
            auto_register_policy_transforms=False,  # the policy has no state of its own between steps
        ):
            with torch.no_grad():
                self.advantage(batch)
            # Images of bytes and missions have been read.
            rows = batch.exclude("image", "mission", ("next", "image"), ("next", "mission")).reshape(-1)
            for _ in range(8):
                for places in torch.randperm(len(rows)).split(512):
                    losses = self.loss(rows[places])
                    total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                    self.optimizer.zero_grad()
                    total.backward()
                    torch.nn.utils.clip_grad_norm_(self.loss.parameters(), 1.0)
                    self.optimizer.step()
            curve.append(share_fetched(batch))
        return curve

    def evaluate(self, num_envs: int = 256) -> float:
        """Return which part of the episodes in new rooms fetched the right thing; statistics stay as they are."""
        env = TransformedEnv(
            make_rooms(num_envs, seed=10_000 + self.seed),
            self._transforms(self.encode.clone(), self.norm.clone().freeze()),
        )
        with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
            return share_fetched(env.rollout(2 * MAX_STEPS, self.actor, break_when_any_done=False))


def share_fetched(batch: TensorDictBase) -> float:
    """Return which part of the episodes that ended in a batch fetched the right thing; only those are rewarded."""
    ended = batch["next", "done"]
    return float((batch["next", "episode_reward"][ended] > 0).float().mean())


def train_agent(url: str, ablate: str | None, seed: int, steps: int) -> tuple[list[float], float]:
    """Train one agent with the states of a running server, as a process of its own may.

    Args:
        url: of the server.
        ablate: see `HiddenStateTransform`.
        seed: of rooms and agent.
        steps: of all rooms together.

    Returns:
        Which part of the episodes fetched the right thing: while training, batch by batch; and in new rooms after it.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "ignore", message="Support of VecNormV2"
    )  # of a library underneath, in a process of its own
    with connect(url) as engine:
        policy = SGLangHiddenWrapper(
            engine,
            input_mode="text",
            hidden=HiddenSpec(segments=("prompt",)),
            generate_kwargs={"max_new_tokens": 0},
        )
        # A mission stays for an episode: its vector is that of the reset.
        encode = HiddenStateTransform(
            policy, read_mission, in_keys=["mission"], every=MAX_STEPS, cache_size=64, project=64, ablate=ablate
        )
        trainer = Trainer(encode, seed=seed, steps=steps)
        return trainer.train(), trainer.evaluate()
