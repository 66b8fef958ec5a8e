"""`Sampling` and `RoutedExperts` of one row, from what a `Completion` recorded.

What an aborted response lacks is NaN, or -1 for ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey

from torchrl_sglang_hidden.policy.outputs import OutputKeys, RoutedExperts, Sampling
from torchrl_sglang_hidden.records import Completion, SamplingRecords
from torchrl_sglang_hidden.spec.hidden import Segment

__all__ = ["SampledRows"]


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Makes the records of the rows of one call, all with the same sizes but T, so that they stack.

    Args:
        records: what was recorded.
        width: S, the most tokens that any token of the call was drawn from.
        experts: L and k.
    """

    records: SamplingRecords
    width: int
    experts: tuple[int, int]

    @classmethod
    def of(cls, records: SamplingRecords, completions: Sequence[Completion]) -> SampledRows:
        """Return the maker of the rows of one call."""
        masks = [one.sampling_mask.token_ids_TS.shape[1] for one in completions if one.sampling_mask is not None]
        experts = [one.routed_experts.shape[1:] for one in completions if one.routed_experts is not None]
        num_layers, num_experts = experts[0] if experts else (0, 0)
        return cls(records, max(masks, default=0), (num_layers, num_experts))

    def values(
        self, completion: Completion, pads: Mapping[str, tuple[int, int]], keys: OutputKeys
    ) -> dict[NestedKey, Any]:
        """Return the records of one row by key; ``pads`` says how many rows each segment gets on the left and right."""
        found: dict[NestedKey, Any] = {}
        if keys.sampling is not None:
            found[keys.sampling] = self._sampling(completion, pads["response"][1])
        if keys.routed_experts is not None:
            found[keys.routed_experts] = self._routed_experts(completion, pads)
        return found

    def _sampling(self, completion: Completion, right: int) -> Sampling:
        num_tokens, mask = len(completion.response_ids), completion.sampling_mask
        fields: dict[str, torch.Tensor] = {}
        if self.records.entropy:
            fields["entropy"] = _filled(completion.entropy_T, (num_tokens + right,), torch.nan)
        if self.records.sampling_mask:
            shape = (num_tokens + right, self.width)
            fields["log_probs"] = _filled(None if mask is None else mask.log_probs_T, shape[:1], torch.nan)
            fields["token_ids"] = _filled(None if mask is None else mask.token_ids_TS, shape, -1, torch.int64)
            fields["token_log_probs"] = _filled(None if mask is None else mask.token_log_probs_TS, shape, -torch.inf)
        return cast("Sampling", Sampling._from_tensordict(TensorDict(fields)))

    def _routed_experts(self, completion: Completion, pads: Mapping[str, tuple[int, int]]) -> RoutedExperts:
        num_prompt, num_response = len(completion.prompt_ids), len(completion.response_ids)
        fields: dict[str, torch.Tensor] = {}
        for name, (left, right) in pads.items():
            if name != "prompt" and not num_response:
                continue
            places = Segment(name).positions(num_prompt, num_response)
            rows = completion.routed_experts
            own = None if rows is None else rows[places.start : places.stop]
            out = torch.full((left + len(places) + right, *self.experts), -1, dtype=torch.int32)
            if own is not None:
                out[left : left + len(places)] = own
            fields[name] = out
        return cast("RoutedExperts", RoutedExperts._from_tensordict(TensorDict(fields)))


def _filled(
    values: torch.Tensor | None, shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return a tensor of a shape that begins with the given values and is ``value`` elsewhere."""
    out = torch.full(shape, value, dtype=dtype)
    if values is not None:
        out[tuple(slice(size) for size in values.shape)] = values
    return out
