"""The heads' scores of one row, as `HeadScores`. Knows nothing of the other outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from tensordict import NonTensorData, TensorDict
from tensordict.utils import NestedKey
from torch.nn.functional import pad as padded

from torchrl_sglang_hidden.policy.outputs import HeadScores
from torchrl_sglang_hidden.records import Completion, Scores
from torchrl_sglang_hidden.spec.head_scores import HeadSpec
from torchrl_sglang_hidden.spec.hidden import Segment

__all__ = ["NO_HEADS", "HeadRows"]

Pad = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Makes the scores of the rows of one call.

    Args:
        spec: says which; None for none.
        key: where they are written.
    """

    spec: HeadSpec | None = None
    key: NestedKey | None = None

    def values(
        self, completion: Completion, pads: Mapping[str, tuple[int, int]] | None
    ) -> dict[NestedKey | None, HeadScores]:
        """Return the scores of a generated row by their key.

        Args:
            completion: has them.
            pads: how many scores of NaN each segment gets on the left and right; None leaves them ragged.
        """
        sources = {} if self.spec is None else {str(segment): segment for segment in self.spec.segments}
        if pads is None:
            return self._values(completion, sources, None)
        return self._values(completion, sources, lambda name, one: padded(one, pads[name], value=torch.nan))

    def scored_values(
        self, completion: Completion, pad: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> dict[NestedKey | None, HeadScores]:
        """Return the scores of a scored sequence by their key; ``pad`` pads them, and None leaves them ragged."""
        return self._values(completion, {"full": "prompt"}, None if pad is None else lambda name, one: pad(one))

    def _values(
        self, completion: Completion, sources: Mapping[str, str], pad: Pad | None
    ) -> dict[NestedKey | None, HeadScores]:
        if self.spec is None:
            return {}
        sizes, names = (len(completion.prompt_ids), len(completion.response_ids)), self.spec.heads
        fields: dict[str, Any] = {}
        for field, segment in sources.items():
            rows = {name: _segment(completion.scores.get(name), segment) for name in names}
            # A row with an error may lack them.
            num_rows = 0 if pad is None else len(Segment(segment).positions(*sizes))
            filled = {name: torch.full((num_rows,), torch.nan) if one is None else one for name, one in rows.items()}
            fields[field] = TensorDict({name: one if pad is None else pad(field, one) for name, one in filled.items()})
        versions = {name: completion.scores[name].version if name in completion.scores else "" for name in names}
        fields["versions"] = TensorDict({name: NonTensorData(version) for name, version in versions.items()})
        return {self.key: cast("HeadScores", HeadScores._from_tensordict(TensorDict(fields)))}


NO_HEADS = HeadRows()


def _segment(scores: Scores | None, segment: str) -> torch.Tensor | None:
    """Return the scores of a segment; None where they are missing."""
    if scores is None:
        return None
    if segment != Segment.FULL:
        return scores.prompt_P if segment == Segment.PROMPT else scores.response_T
    if scores.prompt_P is None or scores.response_T is None:
        return None
    # The response's first score is of the prompt's last position.
    return torch.cat([scores.prompt_P, scores.response_T[1:]])
