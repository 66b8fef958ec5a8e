"""Ablations of hidden states: the controls that tell whether an agent uses what the vectors say.

Knows nothing of prompts or environments.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch

from torchrl_sglang_hidden.errors import InputError

__all__ = ["Ablation", "Shuffler", "check_ablation"]

Ablation: TypeAlias = Literal["zero", "shuffle", "frozen"]
# So many vectors that a drawn one says next to nothing of when it was seen, and at D = 8192 no more than 32 MiB.
POOL_SIZE = 1024


def check_ablation(ablate: str | None, known: Sequence[str] = get_args(Ablation)) -> None:
    """Refuse an ablation that is none of those that a part knows."""
    if ablate is not None and ablate not in known:
        raise InputError(f"ablate={ablate!r:.80}: expected None or one of {tuple(known)}")


class Shuffler:
    """Gives each vector away for one of another row: of the same call, or of the `POOL_SIZE` vectors before it.

    The vectors stay those that the model gives, and say nothing of their own row. A permutation of the call's rows
    alone would leave a single environment, or a partial reset of one, what it had. Only the very first vector of a
    process that encodes a single row has no other to be exchanged for, and becomes zeros.
    """

    def __init__(self) -> None:
        self._pool: deque[torch.Tensor] = deque(maxlen=POOL_SIZE)
        self._random = random.Random(0)

    def shuffle(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return vectors ``[N, …]`` of other rows in the place of each."""
        others = list(self._pool)
        rows = list(vectors.unbind(0))
        self._pool.extend(rows)
        drawn = []
        for row, vector in enumerate(rows):
            choice = self._random.randrange(max(len(others) + len(rows) - 1, 1))
            pool = others + rows[:row] + rows[row + 1 :] or [torch.zeros_like(vector)]
            drawn.append(pool[choice])
        return torch.stack(drawn) if drawn else vectors
