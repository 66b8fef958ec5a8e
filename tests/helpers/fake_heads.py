"""Heads of the fake engine: head ``d3`` gives dimension 3 of a state, and its version is ``v-d3``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.answer import STREAMED
from torchrl_sglang_hidden.reduce.head_scores import FoundScores, WantedScores
from torchrl_sglang_hidden.reduce.host_pools import HostPools
from torchrl_sglang_hidden.spec.head_scores import HeadSpec
from torchrl_sglang_hidden.spec.span_search import Decode


def scores_of(states_ND: torch.Tensor, name: str) -> torch.Tensor:
    """Return the scores of states, ``[N]``."""
    return states_ND[:, int(name.removeprefix("d"))].float()


def until_rule(wanted: WantedScores | None, states_ND: torch.Tensor, num_prompt: int, count: int) -> int:
    """Return after how many of ``count`` response tokens a rule ends the response; ``count`` where it does not."""
    if wanted is None or wanted.stop is None:
        return count
    scores = scores_of(states_ND, wanted.stop.head)[num_prompt - 1 :].tolist()
    return next((token + 1 for token, score in enumerate(scores) if wanted.stop.holds(score)), count)


def feed(pools: HostPools, hidden_NKD: torch.Tensor) -> None:
    """Add a request's rows to its pools, as a server does that computes the prompt in one piece."""
    num_prompt = pools.num_prompt
    step = pools.plan_prompt(0, num_prompt)
    if step is not None:
        pools.add_rows(step, hidden_NKD)
    for index, position in enumerate(range(num_prompt - 1, len(hidden_NKD))):
        pools.add_produced(hidden_NKD[position].float(), index)


def found_scores(
    wanted: WantedScores, states_ND: torch.Tensor, num_prompt: int, response_ids: Sequence[int], decode: Decode
) -> FoundScores:
    """Return what the server half would send."""
    every_HN, pools = torch.stack([scores_of(states_ND, name) for name in wanted.heads]), None
    if wanted.pooled is not None:
        rows = HostPools(wanted.pooled, num_prompt)
        feed(rows, every_HN.T[:, None])
        pools = rows.results(response_ids, decode)
    return FoundScores(
        tuple(f"v-{name}" for name in wanted.heads),
        every_HN[:, :num_prompt] if wanted.prompt else None,
        every_HN[:, num_prompt - 1 :] if wanted.response else None,
        pools,
    )


def streamed_parts(spec: HeadSpec | None, num_prompt: int, states_ND: torch.Tensor) -> list[dict[str, Any]]:
    """Return what the server half sends with each part of a stream, one part for each token; nothing for no scores."""
    if spec is None or not spec.sends_response:
        return []
    every_HN = torch.stack([scores_of(states_ND, name) for name in spec.heads])
    return [{STREAMED: [[score] for score in scores]} for scores in every_HN.T.tolist()[num_prompt - 1 :]]


def with_parts(row: dict[str, Any], parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a row of an answer with the parts that came before."""
    meta = row["meta_info"]
    return {**row, "meta_info": {**meta, CHANNEL: [*parts, *meta.get(CHANNEL, [])]}} if parts else row
