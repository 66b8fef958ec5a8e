"""The heads' scores of one row, as `HeadScores`. Knows nothing of the other outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from tensordict import NonTensorData, TensorDict
from tensordict.utils import NestedKey
from torch.nn.functional import pad as padded

from torchrl_sglang_hidden.policy.assemble_states import NO_PLACE, most_rows
from torchrl_sglang_hidden.policy.outputs import HeadScores
from torchrl_sglang_hidden.records import Completion, Pooled, Scores
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
        widths: what the scores of spans without a pooling are padded to; None leaves them ragged.
    """

    spec: HeadSpec | None = None
    key: NestedKey | None = None
    widths: Mapping[str, int] | None = None

    def padded_for(self, completions: Sequence[Completion]) -> HeadRows:
        """Return the same, with spans padded to the most rows that any of these completions has of each."""
        if self.spec is None:
            return self
        first = [replace(one, spans=next((s.spans for s in one.scores.values()), {})) for one in completions]
        return replace(self, widths=most_rows(self.spec.pooled, first))

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
            if self.spec.pooling is not None:
                pooled = {name: completion.scores[name].pooled if name in completion.scores else {} for name in names}
                fields[field] = TensorDict({name: _number(found.get(segment)) for name, found in pooled.items()})
                continue
            rows = {name: _segment(completion.scores.get(name), segment) for name in names}
            # A row with an error may lack them.
            num_rows = 0 if pad is None else len(Segment(segment).positions(*sizes))
            filled = {name: torch.full((num_rows,), torch.nan) if one is None else one for name, one in rows.items()}
            fields[field] = TensorDict({name: one if pad is None else pad(field, one) for name, one in filled.items()})
        versions = {name: completion.scores[name].version if name in completion.scores else "" for name in names}
        fields["versions"] = TensorDict({name: NonTensorData(version) for name, version in versions.items()})
        spans = {span: self._span(completion, span) for span in self.spec.spans}
        if spans:
            fields["spans"] = TensorDict({span: TensorDict(found) for span, (found, _) in spans.items()})
        if self.spec.unpooled:
            fields["span_places"] = TensorDict({span: spans[span][1] for span in self.spec.unpooled})
        return {self.key: cast("HeadScores", HeadScores._from_tensordict(TensorDict(fields)))}

    def _span(self, completion: Completion, span: str) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Return the scores of a span by head, and of one without a pooling its places."""
        assert self.spec is not None
        found = {
            name: completion.scores[name].spans.get(span) if name in completion.scores else None
            for name in self.spec.heads
        }
        if span not in self.spec.unpooled:
            return {name: _number(one) for name, one in found.items()}, None
        width = 0 if self.widths is None else self.widths[span]
        rows = {name: torch.empty(0) if one is None else one.vector for name, one in found.items()}
        first = found[self.spec.heads[0]]
        places_S = torch.tensor((() if first is None else first.places) or (), dtype=torch.int64)
        more = max(width - len(places_S), 0)
        return {name: padded(rows_S, (0, more), value=torch.nan) for name, rows_S in rows.items()}, padded(
            places_S, (0, more), value=NO_PLACE
        )


NO_HEADS = HeadRows()


def _number(found: Pooled | None) -> torch.Tensor:
    """Return a pooled score; NaN for one that a row with an error lacks."""
    return torch.tensor(torch.nan) if found is None else found.vector


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
