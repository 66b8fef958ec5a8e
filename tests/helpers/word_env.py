"""A TorchRL environment whose observations are numbers of words, so that a test can say each prompt and its vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Composite, Unbounded
from torchrl.envs import EnvBase

from helpers.fake_engine import HIDDEN_SIZE, state_D, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPT = "w1 w{observation} w2"


class WordEnv(EnvBase):
    """Counts: ``observation`` is ``start + 3 * episode + step``, with episodes of given lengths.

    Args:
        lengths: the length of each environment's episodes; a number for an environment without batch dimensions.
        start: the first observation.
    """

    def __init__(
        self, lengths: int | Sequence[int] = 100, start: int = 0, shape: tuple[int, ...] | None = None
    ) -> None:
        self.lengths = torch.tensor(lengths)
        batch = self.lengths.shape if shape is None else torch.Size(shape)
        super().__init__(batch_size=batch)
        self.lengths = self.lengths.reshape(batch)
        self.first = (start + 20 * torch.arange(batch.numel())).reshape(batch)
        self.episode, self.count = torch.full(batch, -1), torch.zeros(batch, dtype=torch.int64)
        self.fails = False
        self.observation_spec = Composite(
            observation=Unbounded((*batch, 1), dtype=torch.int64), other=Unbounded((*batch, 2)), shape=batch
        )
        self.action_spec = Binary(n=1, shape=(*batch, 1), dtype=torch.bool)
        self.reward_spec = Unbounded((*batch, 1))

    def _seen(self) -> TensorDict:
        number = (self.first + 3 * self.episode + self.count)[..., None]
        done = (self.count >= self.lengths)[..., None]
        return TensorDict(
            observation=number,
            other=torch.cat([number, -number], -1) / 10,
            done=done,
            terminated=done.clone(),
            batch_size=self.batch_size,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset")
        which = torch.ones(self.batch_size, dtype=torch.bool) if mask is None else mask[..., 0]
        self.episode = torch.where(which, self.episode + 1, self.episode)
        self.count = torch.where(which, 0, self.count)
        return self._seen()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        if self.fails:
            raise RuntimeError("the environment failed")
        self.count = self.count + 1
        return self._seen().set("reward", torch.zeros(*self.batch_size, 1))

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed or 0)


def ids_of(observation: int) -> list[int]:
    """Return the token ids of the prompt for an observation."""
    return list(TOKENIZER(PROMPT.format(observation=observation))["input_ids"])


def vector_of(observation: int) -> torch.Tensor:
    """Return what the prompt of an observation is pooled to, ``[D]``."""
    ids = ids_of(observation)
    return torch.stack([state_D(ids, place) for place in range(len(ids))]).mean(0)


def vectors_of(observations: torch.Tensor) -> torch.Tensor:
    """Return the vectors of observations ``[*, 1]``, as ``[*, D]``."""
    found = torch.stack([vector_of(int(number)) for number in observations.flatten()])
    return found.reshape(*observations.shape[:-1], HIDDEN_SIZE)
