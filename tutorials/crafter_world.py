"""A task in Crafter whose goal is said in words and whose things stand in the picture, and an agent that reads both.

Crafter (Hafner 2021) has gym's old interface and one picture as its observation. The words are a mission.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import crafter
import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite
from torchrl.envs import (
    Compose,
    ExplorationType,
    GymWrapper,
    ObservationNorm,
    ToTensorImage,
    TransformedEnv,
    set_exploration_type,
)
from torchrl.modules import ActorValueOperator, ConvNet

from torchrl_sglang_hidden import Engine, HiddenSpec, HiddenStateTransform, SGLangHiddenWrapper
from torchrl_sglang_hidden.rl import make_actor_critic

# What each goal may be called. The last of either goal are for the test.
DRINK = (
    "You are thirsty: find something to drink.",
    "Drink some water.",
    "Your throat is dry. Go and drink.",
    "Find water and drink it.",
    "You need a drink of water.",
    "Go to the lake and drink.",
    "Quench your thirst.",
    "You have had nothing to drink all day. Find water.",
    "Walk to the water and have a drink.",
    "Water is what you need now: drink.",
    "Take a sip of water.",
    "It is hot and you want a drink.",
    "Look for a pond and drink from it.",
    "You must drink soon, or you will die of thirst.",
    "Get yourself a drink.",
    "Have a drink before you go on.",
    "Refresh yourself with water.",
    "Your bottle is empty and your mouth is dry. Go and drink.",
    "Fetch water.",
    "Thirst is your trouble: look for water.",
)
WOOD = (
    "We need planks: get wood.",
    "Collect some wood.",
    "There is no wood left. Go and get some.",
    "Find a tree and cut it.",
    "You need a piece of wood.",
    "Go to the forest and chop a tree.",
    "Gather timber.",
    "You have gathered no wood all day. Find a tree.",
    "Walk to the tree and take its wood.",
    "Wood is what you need now: chop.",
    "Take a log from a tree.",
    "It is cold and you want wood for a fire.",
    "Look for an oak and cut wood from it.",
    "You must build soon, and for that you need timber.",
    "Get yourself some wood.",
    "Chop some wood before you go on.",
    "Supply yourself with timber.",
    "Your wood pile is empty and the stove is cold. Go and chop.",
    "Fetch wood.",
    "Timber is your trouble: look for trees.",
)
HELD_OUT = 5
MISSIONS = (*DRINK, *WOOD)
# What a mission wants, by its number: the name of what the bag then has more of.
WANTED = ("drink",) * len(DRINK) + ("wood",) * len(WOOD)
IN_DATA = tuple(n for n in range(len(MISSIONS)) if n % len(DRINK) < len(DRINK) - HELD_OUT)
NEW_WORDS = tuple(n for n in range(len(MISSIONS)) if n not in IN_DATA)

# The picture shows 9 x 7 tiles, and below them what the player has. The world is no larger than the picture.
AREA, CENTRE = (9, 9), np.array([4, 4])
SIDES = ("left", "right", "up", "down")
STEPS_TO = dict(zip(SIDES, ((-1, 0), (1, 0), (0, -1), (0, 1)), strict=True))
# One of each stands on each side of the player, at most so many tiles away. Stone cannot be gathered without a pickaxe.
THINGS, FARTHEST = ("water", "tree", "stone", None), 2
GROUND = ("grass", "grass", "grass", "sand", "path")
# Crafter's action "do", which drinks or gathers what is in front; its actions 1 to 4 are moves in the order of `SIDES`.
DO = 5
# The deviation of each number of a hidden state beside the features of the picture.
LOUD = 0.5


@lru_cache(maxsize=1)
def make_start() -> crafter.Env:
    """Return an empty world, to be copied: Crafter takes long to make one."""
    world = crafter.Env(area=AREA, length=0, seed=0)
    world.reset()
    for thing in list(world._world.objects):
        if thing is not world._player:
            world._world.remove(thing)
    # Not full: a drink that makes no difference would not be seen.
    world._player.inventory["drink"] = 5
    return world


class World(gymnasium.Env):
    """A world of Crafter with gymnasium's interface, and the number of a mission beside the picture.

    Water, a tree and a stone stand on three of four sides of the player, on ground that differs from world to world.
    The agent chooses a side once: the player walks there until something is in its way, and drinks or gathers it. The
    reward is 1 if it then has more of what the mission wants.

    Args:
        missions: the numbers of the missions to draw from.
    """

    def __init__(self, missions: Sequence[int] = IN_DATA) -> None:
        self.missions = missions
        self.action_space = spaces.Discrete(len(SIDES))
        self.observation_space = spaces.Dict(
            image=spaces.Box(0, 255, (64, 64, 3), np.uint8), mission=spaces.Box(0, len(MISSIONS) - 1, (1,), np.int64)
        )

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        draw = self.np_random
        self.mission = int(draw.choice(self.missions))
        self.crafter = copy.deepcopy(make_start())
        tiles = draw.choice(GROUND, AREA).astype(object)
        self.side_of = dict(zip(draw.permutation(np.array(THINGS, object)), SIDES, strict=True))
        for thing, side in self.side_of.items():
            if thing is not None:
                tiles[tuple(CENTRE + draw.integers(1, FARTHEST + 1) * np.array(STEPS_TO[side]))] = thing
        for place, tile in np.ndenumerate(tiles):
            self.crafter._world[place] = tile
        return self._see(self.crafter.render()), {}

    def _see(self, image: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": image, "mission": np.array([self.mission])}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        player, wanted = self.crafter._player, WANTED[self.mission]
        before = player.inventory[wanted]
        for _ in range(FARTHEST):
            self.crafter.step(1 + int(action))
        image, *_ = self.crafter.step(DO)
        return self._see(image), float(player.inventory[wanted] > before), True, False, {}


def choose_at_random(num_episodes: int, *, seed: int) -> TensorDict:
    """Return episodes of somebody who walks to any side: image, mission, side, action and reward, ``[N]``.

    Args:
        num_episodes: N.
        seed: of worlds, missions and choices.
    """
    rng, world, rows = np.random.default_rng(seed), World(), []
    for number in range(num_episodes):
        observation, _ = world.reset(seed=seed if number == 0 else None)
        action = int(rng.integers(len(SIDES)))
        _, reward, *_ = world.step(action)
        water = SIDES.index(world.side_of["water"])
        rows.append({**observation, "water": water, "action": action, "reward": reward})
    stacked = {name: torch.as_tensor(np.stack([row[name] for row in rows])) for name in rows[0]}
    stacked["mission"] = stacked["mission"][:, 0]
    stacked["reward"] = stacked["reward"].float()
    return TensorDict(stacked, batch_size=num_episodes)


def make_worlds(num_envs: int, missions: Sequence[int] = IN_DATA) -> GymWrapper:
    """Return worlds side by side."""
    worlds = SyncVectorEnv([lambda: World(missions)] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
    return GymWrapper(worlds, categorical_action_encoding=True)


def read_mission(row: TensorDictBase) -> str:
    """Write the prompt of one world: its mission, and nothing else."""
    return MISSIONS[int(row["mission"])]


def make_policy(engine: Engine) -> SGLangHiddenWrapper:
    """Return what reads words and generates nothing."""
    return SGLangHiddenWrapper(
        engine,
        input_mode="text",
        hidden=HiddenSpec(segments=("prompt",)),
        generate_kwargs={"max_new_tokens": 0},
    )


def make_encoder(policy: SGLangHiddenWrapper, ablate: Any = None) -> HiddenStateTransform:
    """Return what reads each world's mission; a mission that it read before is not sent again."""
    return HiddenStateTransform(policy, read_mission, in_keys=["mission"], cache_size=len(MISSIONS), ablate=ablate)


def make_norm(states: torch.Tensor) -> ObservationNorm:
    """Return what gives hidden states the mean 0 and the deviation `LOUD` of those in the data, ``[N, D]``.

    Zeros stay zeros. With every number as large as 1, agents learned the missions of the data by heart; with smaller
    ones they found what the wordings of a goal have in common.
    """
    scale = states.std(0).clamp(min=1e-3) / LOUD
    return ObservationNorm(states.mean(0), scale, ["hidden_state"], ["hidden_state_norm"], standard_normal=True)


def make_agent(size: int, *, pixels: bool, seed: int) -> ActorValueOperator:
    """Return an agent on hidden states of D dimensions, and on the convolutional features of the picture if wanted."""
    torch.manual_seed(seed)
    observations: dict[str, Any] = {}
    if pixels:
        # The picture has 9 x 9 tiles of 7 x 7 pixels: the convolution looks at one tile at a time.
        conv = ConvNet(3, num_cells=[16], kernel_sizes=[7], strides=[7], activation_class=torch.nn.ReLU)
        spec = Composite(pixels=Bounded(0, 1, (3, 64, 64)))
        observations = {"observation_spec": spec, "observation_keys": ["pixels"], "conv": conv, "image_features": 512}
    actions = Categorical(len(SIDES))
    return make_actor_critic(size, actions, state_key="hidden_state_norm", num_cells=(128,), norm=False, **observations)


def train(agent: ActorValueOperator, data: TensorDict, *, steps: int, beta: float = 0.2) -> list[float]:
    """Train an agent by advantage-weighted regression (Peng et al. 2019), and return its losses.

    The mean return of the data stands in for the critic. A row is not weighted but drawn as often as its weight says:
    few of what was chosen at random was right, and most steps would be spent on the rest.

    Args:
        agent: its actor is trained.
        data: its ``image`` ``[N, 64, 64, 3]``, ``hidden_state_norm`` ``[N, D]``, ``action`` and ``reward`` ``[N]``.
        steps: of 64 rows each.
        beta: how much the return of a row counts.
    """
    actor, to_pixels = agent.get_policy_operator(), ToTensorImage(in_keys=["image"], out_keys=["pixels"])
    weight = ((data["reward"] - data["reward"].mean()) / beta).exp().clamp(max=20)
    optimizer, losses = torch.optim.AdamW(actor.parameters(), lr=1e-3, weight_decay=0.1), []
    for _ in range(steps):
        rows = to_pixels(data[torch.multinomial(weight, 64, replacement=True)])
        loss = -actor.get_dist(rows).log_prob(rows["action"]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def make_live(
    num_envs: int, encode: HiddenStateTransform, norm: ObservationNorm, missions: Sequence[int]
) -> TransformedEnv:
    """Return new worlds side by side in which an agent can be tried."""
    to_pixels = ToTensorImage(in_keys=["image"], out_keys=["pixels"])
    return TransformedEnv(make_worlds(num_envs, missions), Compose(to_pixels, encode, norm.clone()))


def try_online(agent: ActorValueOperator, env: TransformedEnv) -> float:
    """Return the share of worlds in which the agent did what was right; always the same worlds."""
    env.set_seed(10_000_000)
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        steps = env.rollout(1, agent.get_policy_operator())
    return float(steps["next", "reward"].mean())
