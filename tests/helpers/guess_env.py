"""A small task for agents: each step shows a word, and the reward is for what the word asks for."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

NUM_WORDS = 4
NUM_ACTIONS = 3
IMAGE = (3, 8, 8)


class GuessEnv(EnvBase):
    """N environments with episodes of three steps; each step draws a word (a number) and a colour, 0 or 1.

    The word is the ``observation``, for a prompt; the colour fills ``pixels`` ``[N, 3, 8, 8]``, and ``sight`` is
    ``[N, 2]``. The right action is ``word % 2``, and with ``needs_both`` 0 where the colour is 0: word or colour
    alone are right three times of four. Action 2 is never allowed. A continuous action must be near ``word % 2 - 0.5``.
    """

    def __init__(self, num_envs: int = 32, *, continuous: bool = False, needs_both: bool = False) -> None:
        super().__init__(batch_size=(num_envs,))
        batch = self.batch_size
        self.continuous, self.needs_both = continuous, needs_both
        self.draws = torch.Generator().manual_seed(0)
        self.count = torch.zeros(batch, dtype=torch.int64)
        self.observation_spec = Composite(
            observation=Unbounded((*batch, 1), dtype=torch.int64),
            pixels=Unbounded((*batch, *IMAGE)),
            sight=Unbounded((*batch, 2)),
            allowed=Binary(shape=(*batch, NUM_ACTIONS), dtype=torch.bool),
            shape=batch,
        )
        self.action_spec = Bounded(-1, 1, shape=(*batch, 1)) if continuous else Categorical(NUM_ACTIONS, shape=batch)
        self.reward_spec = Unbounded((*batch, 1))

    def _show(self) -> TensorDict:
        shape = (*self.batch_size, 1)
        self.word = torch.randint(0, NUM_WORDS, shape, generator=self.draws)
        self.colour = torch.randint(0, 2, shape, generator=self.draws)
        allowed = torch.ones(*self.batch_size, NUM_ACTIONS, dtype=torch.bool)
        allowed[..., 2] = False
        return TensorDict(
            observation=self.word,
            pixels=self.colour.float().reshape(-1, 1, 1, 1).expand(-1, *IMAGE).clone(),
            sight=torch.cat([self.colour, 1 - self.colour], -1).float(),
            allowed=allowed,
            batch_size=self.batch_size,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset")
        self.count = torch.zeros_like(self.count) if mask is None else torch.where(mask[..., 0], 0, self.count)
        return self._show()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        right = self.word % 2 * (self.colour if self.needs_both else 1)
        action = tensordict["action"]
        distance = (action - right + 0.5).abs() if self.continuous else (action[:, None] != right).float()
        self.count = self.count + 1
        done = (self.count >= 3)[:, None]
        return self._show().update({"reward": 1 - distance, "done": done, "terminated": done.clone()})

    def _set_seed(self, seed: int | None) -> None:
        self.draws.manual_seed(seed or 0)
