"""Reads the scores of heads that come with the parts of a stream, and holds them against those of its end.

Knows nothing of texts or log-probs, nor of how the parts travel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from torchrl_sglang_hidden.errors import AlignmentError, ProtocolError
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.answer import STREAMED
from torchrl_sglang_hidden.protocol.excerpts import excerpt
from torchrl_sglang_hidden.records import Completion
from torchrl_sglang_hidden.spec.head_scores import HeadSpec

__all__ = ["StreamedScores"]


class StreamedScores:
    """Collects the scores of one stream.

    Args:
        spec: the scores that were asked for; None for none.
    """

    def __init__(self, spec: HeadSpec | None) -> None:
        self._heads = spec.heads if spec is not None and spec.sends_response else ()
        self._shown = self._heads if spec is not None and spec.response_tokens else ()
        self._num_parts = 0
        self._kept: list[list[float]] = [[] for _ in self._heads]

    def read(self, name: str, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Add the scores that are new in SGLang's ``meta_info``, which grows with every part.

        Args:
            name: names the request in errors.
            meta: of the response so far.

        Returns:
            The same without what belongs to the parts: as of a response that is not streamed.

        Raises:
            ProtocolError: they cannot be read.
        """
        found = meta.get(CHANNEL)
        if not self._heads or not isinstance(found, list):
            return dict(meta)
        parts = [one[STREAMED] for one in found if isinstance(one, dict) and STREAMED in one]
        try:
            for part in parts[self._num_parts :]:
                if len({len(scores) for scores in part}) > 1:
                    raise ValueError("the heads have different numbers of scores")
                for kept, scores in zip(self._kept, part, strict=True):
                    kept += [_number(score) for score in scores]
        except (TypeError, ValueError) as error:
            raise ProtocolError(
                f"{name}: the scores of a part of a stream are wrong ({error}): {excerpt(parts[-1], 200)}; use the "
                "same version of torchrl_sglang_hidden on both sides"
            ) from error
        self._num_parts = len(parts)
        others = [one for one in found if not (isinstance(one, dict) and STREAMED in one)]
        rest = {key: value for key, value in meta.items() if key != CHANNEL}
        return {**rest, CHANNEL: others} if others else rest

    def of(self, name: str, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Return the scores of the response tokens ``start … stop-1``, float32, by head.

        Raises:
            AlignmentError: they are not there yet.
        """
        found = {head: scores[start:stop] for head, scores in zip(self._heads, self._kept, strict=True)}
        for head, scores in found.items():
            if len(scores) != stop - start:
                raise AlignmentError(
                    f"{name}: {start + len(scores)} scores of head {head!r} for the {stop} tokens so far; send it again"
                )
        return {head: torch.tensor(found[head], dtype=torch.float32) for head in self._shown}

    def end(self, name: str, completion: Completion, start: int) -> dict[str, torch.Tensor]:
        """Return the scores of the last part, from token ``start`` on, of the whole response.

        Raises:
            AlignmentError: those that came with the parts are others.
        """
        found = {}
        for head, kept in zip(self._heads, self._kept, strict=True):
            scores = completion.scores.get(head)
            if scores is None or scores.response_T is None:
                continue  # a response that failed, and says so
            before_T = torch.tensor(kept[: len(scores.response_T)], dtype=torch.float32)
            there_T = scores.response_T[: len(before_T)]
            # What is not finite came as null, see `_number`.
            if not torch.where(there_T.isfinite(), before_T == there_T, ~before_T.isfinite()).all():
                raise AlignmentError(
                    f"{name}: the scores of head {head!r} in the stream are not those of its end; send it again, and "
                    "report it if it stays"
                )
            found[head] = scores.response_T[start:]
        return found


def _number(score: object) -> float:
    if score is None:  # JSON has neither NaN nor infinity; the end says which it is
        return math.nan
    if not isinstance(score, (int, float)) or isinstance(score, bool):
        raise TypeError(f"{excerpt(score)} stands where a score is expected")
    return float(score)
