"""An environment that only the words decide: an instruction names one of four things, and the agent meets them in turn.

The observation shows the thing that is there. Whether it is the one to take stands in the instruction alone, in words,
of which some are kept back for the evaluation: an agent that reads no words gets nothing on average.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase

THINGS = ("apple", "book", "key", "lamp")
WORDINGS = (
    "Pick up the {thing}.",
    "Take the {thing} with you.",
    "I want the {thing}.",
    "Get me the {thing}, please.",
    "Go and find the {thing}.",
    "Your task is to collect the {thing}.",
    "Leave everything but the {thing}.",
    "The {thing} is what you need.",
)
HELD_OUT_WORDINGS = (
    "Bring the {thing} here.",
    "Only the {thing} is worth taking.",
    "Could you fetch the {thing} for me?",
    "We are looking for the {thing}.",
)
SENTENCES = [wording.format(thing=thing) for wording in (*WORDINGS, *HELD_OUT_WORDINGS) for thing in THINGS]
NUM_TRAINED = len(WORDINGS) * len(THINGS)


def read_instruction(row: TensorDictBase) -> str:
    """Write the prompt of one environment."""
    return SENTENCES[int(row["instruction"])]


class InstructionEnv(EnvBase):
    """Shows one thing after another; the action 1 takes it and ends the episode, 0 goes on to the next.

    The thing that was asked for comes with probability 1/2 in each step. To take it gives 1, to take another -1, and
    an episode in which nothing is taken gives 0. An agent that knows nothing of the instruction gets at most 0 on
    average: what it passes by was as likely the right thing as what it takes.

    Args:
        num_envs: environments side by side, which begin and end their episodes each by itself.
        held_out: give the instructions in the wordings that training does not have.
        max_steps: most steps of an episode.
        seed: of instructions and things.
    """

    def __init__(self, num_envs: int, *, held_out: bool = False, max_steps: int = 8, seed: int = 0) -> None:
        super().__init__(batch_size=[num_envs])
        self.held_out, self.max_steps = held_out, max_steps
        self.observation_spec = Composite(
            thing=OneHot(len(THINGS), shape=(num_envs, len(THINGS)), dtype=torch.float32),
            instruction=Categorical(len(SENTENCES), shape=(num_envs, 1), dtype=torch.int64),
            shape=self.batch_size,
        )
        self.action_spec = Categorical(2, shape=(num_envs,), dtype=torch.int64)
        self.reward_spec = Unbounded((num_envs, 1))
        self.done_spec = Binary(1, shape=(num_envs, 1), dtype=torch.bool)
        self.instruction = torch.zeros(num_envs, dtype=torch.int64)
        self.thing, self.steps = self.instruction.clone(), self.instruction.clone()
        self.set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        self.random = torch.Generator().manual_seed(seed or 0)

    def _integers(self, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, self.batch_size, generator=self.random)

    def _show(self, where: torch.Tensor) -> TensorDict:
        """Put new things where a mask says, and return the observation of all."""
        asked = self.instruction % len(THINGS)
        other = (asked + self._integers(1, len(THINGS))) % len(THINGS)
        self.thing = torch.where(where, torch.where(self._integers(0, 2).bool(), asked, other), self.thing)
        return TensorDict(
            thing=torch.nn.functional.one_hot(self.thing, len(THINGS)).float(),
            instruction=self.instruction[:, None].clone(),
            batch_size=self.batch_size,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset")
        begins = torch.ones(self.batch_size, dtype=torch.bool) if mask is None else mask[:, 0]
        first, end = (NUM_TRAINED, len(SENTENCES)) if self.held_out else (0, NUM_TRAINED)
        self.instruction = torch.where(begins, self._integers(first, end), self.instruction)
        self.steps = torch.where(begins, 0, self.steps)
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        return self._show(begins).update({"done": done, "terminated": done.clone()})

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        takes = tensordict["action"] == 1
        right = self.thing == self.instruction % len(THINGS)
        reward = torch.where(takes, torch.where(right, 1.0, -1.0), 0.0)
        self.steps = self.steps + 1
        done = (takes | (self.steps >= self.max_steps))[:, None]
        return self._show(torch.ones_like(takes)).update(
            {"reward": reward[:, None], "done": done, "terminated": done.clone()}
        )
