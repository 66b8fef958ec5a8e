"""Heads of the fake engine: head ``d3`` gives dimension 3 of a state, and its version is ``v-d3``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchrl_sglang_hidden.protocol.answer import STREAMED
from torchrl_sglang_hidden.reduce.head_scores import FoundScores, WantedScores
from torchrl_sglang_hidden.reduce.pooling import Pools


def scores_of(states_ND: torch.Tensor, name: str) -> torch.Tensor:
    """Return the scores of states, ``[N]``."""
    return states_ND[:, int(name.removeprefix("d"))].float()


def until_rule(wanted: WantedScores | None, states_ND: torch.Tensor, num_prompt: int, count: int) -> int:
    """Return after how many of ``count`` response tokens a rule ends the response; ``count`` where it does not."""
    if wanted is None or wanted.stop is None:
        return count
    scores = scores_of(states_ND, wanted.stop.head)[num_prompt - 1 :].tolist()
    return next((token + 1 for token, score in enumerate(scores) if wanted.stop.holds(score)), count)


def every_score(wanted: WantedScores, states_ND: torch.Tensor) -> torch.Tensor:
    """Return the scores of all positions, ``[H, N]``."""
    return torch.stack([scores_of(states_ND, name) for name in wanted.heads])


def found_scores(
    wanted: WantedScores, states_ND: torch.Tensor, num_prompt: int, pools: Pools | None = None
) -> FoundScores:
    """Return what the server half would send; ``pools`` is what is pooled of the scores."""
    every_HN = every_score(wanted, states_ND)
    return FoundScores(
        tuple(f"v-{name}" for name in wanted.heads),
        every_HN[:, :num_prompt] if wanted.prompt else None,
        every_HN[:, num_prompt - 1 :] if wanted.response else None,
        pools,
    )


def streamed_parts(heads: Sequence[str], states_ND: torch.Tensor) -> list[dict[str, list[list[float]]]]:
    """Return what the server half sends with each part of a stream, one part for each state."""
    every_HN = torch.stack([scores_of(states_ND, name) for name in heads])
    return [{STREAMED: [[score] for score in scores]} for scores in every_HN.T.tolist()]
