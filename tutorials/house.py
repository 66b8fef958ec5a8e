"""A house in words: five rooms, a key in one of them and a locked chest in another, and what can be done in each room.

To fetch the key and open the chest takes five actions: out of the hall, take, back to the hall, out again, open. An
agent sees a sentence of what there is, and a mask of the actions that are possible.
"""

from __future__ import annotations

from itertools import permutations

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

ACTIONS = ("north", "south", "east", "west", "take", "open")
TAKE, OPEN = 4, 5
# What lies in the direction of each of the first four actions, and the hall, from which they go.
ROOMS = ("kitchen", "cellar", "garden", "library", "hall")
HALL = 4
BACK = (1, 0, 3, 2)
# The rooms of key and chest.
LAYOUTS = tuple(permutations(range(4), 2))
PRIZES = {"gold": 1.0, "copper": 0.25}
NUM_STATES = len(LAYOUTS) * len(PRIZES) * len(ROOMS) * 2


def describe(number: int) -> str:
    """Write the prompt of a state, which the environment shows as a number."""
    number, has_key = divmod(int(number), 2)
    number, room = divmod(number, len(ROOMS))
    layout, prize = divmod(number, len(PRIZES))
    key, chest = LAYOUTS[layout]
    held = "You have the key." if has_key else f"The key is in the {ROOMS[key]}."
    return (
        "The kitchen is north of the hall, the cellar south, the garden east, the library west. "
        f"The chest in the {ROOMS[chest]} is full of {list(PRIZES)[prize]}. {held} You are in the {ROOMS[room]}. "
        "What is the next step? One word: north, south, east, west, take or open. The next step is:"
    )


class HouseEnv(EnvBase):
    """Opens the chest for its prize: 1 for gold, 0.25 for copper; whatever else is done gives nothing.

    An action that is not possible takes a step and changes nothing. An episode ends when the chest is open, or after
    ``max_steps``.

    Args:
        num_envs: houses side by side, whose episodes begin and end each by itself.
        masked: show in ``"allowed"`` what is possible; else everything is allowed.
        max_steps: most steps of an episode.
        seed: of the houses.
    """

    def __init__(self, num_envs: int, *, masked: bool = True, max_steps: int = 12, seed: int = 0) -> None:
        super().__init__(batch_size=[num_envs])
        self.masked, self.max_steps = masked, max_steps
        self.observation_spec = Composite(
            number=Categorical(NUM_STATES, shape=(num_envs,), dtype=torch.int64),
            allowed=Binary(len(ACTIONS), shape=(num_envs, len(ACTIONS)), dtype=torch.bool),
            shape=self.batch_size,
        )
        self.action_spec = Categorical(len(ACTIONS), shape=(num_envs,), dtype=torch.int64)
        self.reward_spec = Unbounded((num_envs, 1))
        self.done_spec = Binary(1, shape=(num_envs, 1), dtype=torch.bool)
        nothing = torch.zeros(num_envs, dtype=torch.int64)
        self.layout, self.prize, self.room, self.has_key, self.steps = (nothing.clone() for _ in range(5))
        self.set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        self.random = torch.Generator().manual_seed(seed or 0)

    def _possible(self) -> torch.Tensor:
        """Return what can be done in each house, bool ``[num_envs, A]``."""
        key, chest = torch.tensor(LAYOUTS)[self.layout].unbind(-1)
        possible = torch.zeros(*self.batch_size, len(ACTIONS), dtype=torch.bool)
        in_hall = self.room == HALL
        possible[in_hall, :HALL] = True
        possible[~in_hall, torch.tensor(BACK)[self.room[~in_hall]]] = True
        possible[:, TAKE] = (self.room == key) & (self.has_key == 0)
        possible[:, OPEN] = (self.room == chest) & (self.has_key == 1)
        return possible

    def _show(self) -> TensorDict:
        self.possible = self._possible()
        number = (self.layout * len(PRIZES) + self.prize) * len(ROOMS) + self.room
        allowed = self.possible if self.masked else torch.ones_like(self.possible)
        return TensorDict(number=number * 2 + self.has_key, allowed=allowed.clone(), batch_size=self.batch_size)

    def _draw(self, high: int) -> torch.Tensor:
        return torch.randint(high, self.batch_size, generator=self.random)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset")
        begins = torch.ones(self.batch_size, dtype=torch.bool) if mask is None else mask[:, 0]
        self.layout = torch.where(begins, self._draw(len(LAYOUTS)), self.layout)
        self.prize = torch.where(begins, self._draw(len(PRIZES)), self.prize)
        self.room = torch.where(begins, HALL, self.room)
        self.has_key = torch.where(begins, 0, self.has_key)
        self.steps = torch.where(begins, 0, self.steps)
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        return self._show().update({"done": done, "terminated": done.clone()})

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict["action"]
        works = self.possible.gather(-1, action[:, None])[:, 0]
        goes, opens = works & (action < TAKE), works & (action == OPEN)
        self.room = torch.where(goes, torch.where(self.room == HALL, action, HALL), self.room)
        self.has_key = torch.where(works & (action == TAKE), 1, self.has_key)
        self.steps = self.steps + 1
        reward = torch.where(opens, torch.tensor(list(PRIZES.values()))[self.prize], 0.0)
        done = (opens | (self.steps >= self.max_steps))[:, None]
        return self._show().update({"reward": reward[:, None], "done": done, "terminated": done.clone()})
