"""Keeps the scores that small heads gave one request's tokens, and plans which prompt positions are still to be scored.

On the host: what is kept are numbers, a few bytes a token. Knows nothing of batches, of what a head computes, or of
TensorDicts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchrl_sglang_hidden.reduce.host_pools import HostPools
from torchrl_sglang_hidden.reduce.pooling import Pools, WantedRows
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.spec.head_scores import StopRule
from torchrl_sglang_hidden.spec.hidden import reads_prompt
from torchrl_sglang_hidden.spec.span_search import Decode
from torchrl_sglang_hidden.spec.spans import PromptSpan

__all__ = ["FoundScores", "RequestScores", "WantedScores"]


@dataclass(frozen=True, slots=True)
class WantedScores:
    """Says which heads score which tokens of one request.

    Args:
        heads: their names, H of them.
        prompt: whether a score of each prompt token is wanted.
        response: whether one of each response token is.
        stop: ends the response; None for no such rule.
        pooled: what is wanted pooled, of scores as if they were states of H dimensions; None for nothing.
    """

    heads: tuple[str, ...]
    prompt: bool = False
    response: bool = True
    stop: StopRule | None = None
    pooled: Wanted | None = None

    @property
    def reads_prompt(self) -> bool:
        """Whether prompt tokens are scored, for themselves or for what is pooled."""
        wanted = self.pooled
        return self.prompt or (
            wanted is not None
            and (reads_prompt(wanted.segments) or any(isinstance(one, PromptSpan) for one in wanted.spans.values()))
        )

    @property
    def reads_response(self) -> bool:
        """Whether response tokens are scored, for themselves, for what is pooled or for the rule."""
        return self.response or self.stop is not None or (self.pooled is not None and self.pooled.produced)


@dataclass(frozen=True, slots=True)
class FoundScores:
    """Holds the scores of one finished request.

    Args:
        versions: of the heads that gave them, in the order of `WantedScores.heads`.
        prompt_HP: float32 ``[H, P]``; None where the prompt was not scored.
        response_HT: float32 ``[H, T]``; None where the response was not scored.
        pools: what was pooled, in vectors of H scores; None for nothing.
    """

    versions: tuple[str, ...]
    prompt_HP: torch.Tensor | None = None
    response_HT: torch.Tensor | None = None
    pools: Pools | None = None


class RequestScores:
    """Collects the scores of one request while it runs.

    Args:
        wanted: what it asks for.
        versions: the versions of its heads, which it keeps to its end.
        num_prompt: P.
    """

    def __init__(self, wanted: WantedScores, versions: Sequence[str], num_prompt: int) -> None:
        self.wanted = wanted
        self.versions = tuple(versions)
        self.num_prompt = num_prompt
        # What a rule of another head's never asks is not compared.
        self.rule_head = -1 if wanted.stop is None else wanted.heads.index(wanted.stop.head)
        # The next prompt position to be scored. P, so none, where the prompt is not scored.
        self.done = 0 if wanted.reads_prompt else num_prompt
        self._planned = self.done
        self.count = 0
        self._streamed = 0
        self._prompt = [array("f") for _ in wanted.heads]
        self._response = [array("f") for _ in wanted.heads]

    @property
    def first_needed(self) -> int | None:
        """The first position that must still be computed; None where the whole prompt is scored."""
        return self.done if self.done < self.num_prompt else None

    def restart(self) -> None:
        """Drop what was planned and has not arrived: the request went back into the queue."""
        self._planned = self.done

    def plan_prompt(self, start: int, stop: int) -> tuple[int, int] | None:
        """Plan a forward step that computes the positions ``start … stop-1``.

        Returns:
            The positions to score, as ``(first, stop)``; None where none is new, or one was left out before.
        """
        stop = min(stop, self.num_prompt)
        if start > self._planned or stop <= self._planned:
            return None
        first, self._planned = self._planned, stop
        return first, stop

    def add_prompt(self, first: int, stop: int, scores: Sequence[Sequence[float]]) -> None:
        """Add the scores of some positions, of each head; those that are not the next ones are left out.

        Args:
            first: the first position.
            stop: the position after the last.
            scores: of each head; empty on a rank that keeps none.
        """
        if first != self.done:
            return
        self.done = stop
        for kept, found in zip(self._prompt, scores, strict=False):
            kept.extend(found)

    def add_produced(self, index: int, scores: Sequence[float]) -> None:
        """Add the scores of response token ``index``, of each head; where it is not the next one it is left out."""
        if index != self.count:
            return
        self.count += 1
        for kept, score in zip(self._response, scores, strict=False):
            kept.append(score)

    def ends(self, scores: Sequence[float]) -> bool:
        """Return whether a response token with these scores, of each head, ends the response."""
        return self.wanted.stop is not None and self.wanted.stop.holds(scores[self.rule_head])

    def next_of_stream(self) -> list[list[float]]:
        """Return the scores of the response tokens, of each head, that this has not returned before."""
        first, self._streamed = self._streamed, self.count
        return [kept[first:].tolist() for kept in self._response]

    def finish(self, response_ids: Sequence[int] = (), decode: Decode | None = None) -> FoundScores:
        """Return what was collected, and pool it.

        Args:
            response_ids: the T tokens of the response.
            decode: turns ids into text, where spans are found by it; None without a tokenizer.
        """
        return FoundScores(
            versions=self.versions,
            prompt_HP=_stacked(self._prompt) if self.wanted.prompt else None,
            response_HT=_stacked(self._response) if self.wanted.response else None,
            pools=None if self.wanted.pooled is None else self._pool(self.wanted.pooled, response_ids, decode),
        )

    def _pool(self, wanted: Wanted, response_ids: Sequence[int], decode: Decode | None) -> Pools:
        """Pool scores by the code that pools states: each token's are one row ``[1, H]``."""
        pools = HostPools(wanted, self.num_prompt)
        if pools.reads_prompt:
            step = pools.plan_prompt(0, self.done)
            if step is not None:
                pools.add_rows(step, _stacked(self._prompt).T[:, None])
        response_KH = kept = None
        pools.count = self.count if self.wanted.reads_response else 0
        if pools.count:
            rows_TKH = _stacked(self._response).T[:, None]
            response_KH, kept = wanted.reducer.rows(rows_TKH), WantedRows(self.num_prompt - 1, rows_TKH)
        return pools.finish(response_ids, decode, response_KH, kept)


def _stacked(scores: Sequence[array[float]]) -> torch.Tensor:
    # Number by number a long prompt would take milliseconds. No buffer is read where there is nothing.
    return torch.stack([torch.frombuffer(one, dtype=torch.float32) if one else torch.empty(0) for one in scores])
