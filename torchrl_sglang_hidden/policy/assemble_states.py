"""The states of one row, as `HiddenStates` and `TokenHiddenStates`. Knows nothing of the other outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch.nn.functional import pad as padded

from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.policy.outputs import HiddenStates, TokenHiddenStates
from torchrl_sglang_hidden.policy.rows import Row
from torchrl_sglang_hidden.records import Completion, Pooled, TokenRows
from torchrl_sglang_hidden.spec.hidden import HiddenSpec

__all__ = ["most_rows", "pooled_states", "token_states"]

# The place of a row that is there to fill up.
NO_PLACE = -1


def most_rows(spec: HiddenSpec | None, completions: Sequence[Completion]) -> Mapping[str, int]:
    """Return the most rows that any completion has of each span without a pooling: what they are padded to."""
    counts = [{name: one.count for name, one in completion.spans.items()} for completion in completions]
    return {} if spec is None else {name: max(count.get(name, 0) for count in counts) for name in spec.unpooled}


def pooled_states(
    row: Row,
    completion: Completion,
    spec: HiddenSpec,
    hidden_size: int,
    sources: Mapping[str, str],
    widths: Mapping[str, int] | None,
) -> HiddenStates:
    """Return the pooled states of one row.

    Args:
        row: the prompt row.
        completion: has the states.
        spec: says which.
        hidden_size: D.
        sources: the completion's segment that each field takes.
        widths: what the rows of spans without a pooling are padded to; None leaves them ragged.
    """

    def is_missing(pools: Mapping[Any, Pooled], name: str) -> bool:
        return row.wants_states is False or (completion.error is not None and name not in pools)

    def cast_to_dtype(name: str, states: torch.Tensor) -> torch.Tensor:
        cast_states = states.to(spec.dtype)
        if spec.dtype == torch.float16 and bool((cast_states.isinf() & states.isfinite()).any()):
            raise InputError(
                f"{name!r} has a state of {float(states.abs().max()):.6g}, over 65504, the largest torch.float16; use "
                "HiddenSpec(dtype=torch.float32) or torch.bfloat16"
            )
        return cast_states

    def read(pools: Mapping[Any, Pooled], name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if is_missing(pools, name):
            return torch.full(_state_shape(spec, hidden_size), torch.nan, dtype=spec.dtype), torch.tensor(0)
        return cast_to_dtype(name, pools[name].vector), torch.tensor(pools[name].count)

    def read_rows(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        width = 0 if widths is None else widths[name]
        if is_missing(completion.spans, name):
            rows_SD = torch.full((width, *_state_shape(spec, hidden_size)), torch.nan, dtype=spec.dtype)
            return rows_SD, torch.tensor(0), torch.full((width,), NO_PLACE)
        found = completion.spans[name]
        # Several samples of a prompt have the same rows.
        rows_SD = cast_to_dtype(name, found.vector).clone()
        places_S = torch.tensor(found.places or (), dtype=torch.int64)
        more = max(width - len(rows_SD), 0)
        rows_SD = padded(rows_SD, (0, 0) * (rows_SD.ndim - 1) + (0, more))
        return rows_SD, torch.tensor(found.count), padded(places_S, (0, more), value=NO_PLACE)

    fields: dict[str, Any] = {}
    for field, segment in sources.items():
        fields[field], fields[f"{field}_count"] = read(completion.hidden, segment)
    if spec.spans:
        unpooled = {name: read_rows(name) for name in spec.unpooled}
        spans = {name: unpooled[name] if name in unpooled else read(completion.spans, name) for name in spec.spans}
        fields["spans"] = TensorDict({name: found[0] for name, found in spans.items()})
        fields["span_counts"] = TensorDict({name: found[1] for name, found in spans.items()})
        if unpooled:
            fields["span_places"] = TensorDict({name: places_S for name, (_, _, places_S) in unpooled.items()})
    return cast("HiddenStates", HiddenStates._from_tensordict(TensorDict(fields)))


def token_states(
    row: Row,
    completion: Completion,
    spec: HiddenSpec,
    hidden_size: int,
    positions: Mapping[str, range],
    *,
    pad: Callable[[str, torch.Tensor], torch.Tensor] | None,
) -> TokenHiddenStates:
    """Return the states of one row's tokens: ``positions`` says which each field has, and ``pad`` pads it."""
    fields, rows = {}, completion.token_rows
    for field, of_field in positions.items():
        # Of a row with an error, the rows of some fields may be there, and not those of others.
        there = rows is not None and rows.first <= of_field.start and of_field.stop <= rows.first + len(rows.rows_ND)
        if row.wants_states is False or (completion.error is not None and not there):
            num_rows = 0 if pad is None else len(of_field)
            none_ND = torch.empty((num_rows, *_state_shape(spec, hidden_size)), dtype=spec.dtype)
            fields[field] = none_ND if pad is None else torch.full_like(pad(field, none_ND), torch.nan)
        else:
            rows = cast("TokenRows", rows)
            # Copied: the fields overlap, and several samples of a prompt have the same rows.
            rows_ND = rows.rows_ND[of_field.start - rows.first : of_field.stop - rows.first].to(spec.dtype, copy=True)
            fields[field] = rows_ND if pad is None else pad(field, rows_ND)
    return cast("TokenHiddenStates", TokenHiddenStates._from_tensordict(TensorDict(fields)))


def _state_shape(spec: HiddenSpec, hidden_size: int) -> tuple[int, ...]:
    return (len(spec.layers), hidden_size) if isinstance(spec.layers, tuple) else (hidden_size,)
