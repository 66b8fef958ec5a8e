"""`Completion`s to TensorDict rows: TorchRL's TensorClasses and this package's. All padding happens here.

Knows nothing of engines or payloads. The contract of shapes and sides is TorchRL's own
(``torchrl.modules.llm.policies.common``): prompts are padded on the left, responses on the right, ``full`` is
``[prompt | response]``, so that each row of the attention mask is one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorClass, TensorDict, TensorDictBase, lazy_stack
from tensordict.utils import NestedKey
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, LogProbs, Masks, Text, Tokens

from torchrl_sglang_hidden.prompts import Row
from torchrl_sglang_hidden.specs import SEGMENTS, Completion, HiddenSpec

__all__ = ["HiddenStates", "OutputKeys", "assemble", "assemble_scores"]

# A log-prob that nobody measured is not 0, which would be probability 1.
NOT_MEASURED = float("nan")


class HiddenStates(TensorClass["nocast"]):  # type: ignore[misc,name-defined]
    """Pooled hidden states, aligned with the tokens of the same row.

    Args:
        prompt (torch.Tensor | None): prompt positions ``0 … P-1``.
        response (torch.Tensor | None): the states that produced the response tokens, positions ``P-1 … P+T-2``.
        full (torch.Tensor | None): every position once: ``0 … P+T-2``; of a scored sequence ``0 … N-1``.
        prompt_count (torch.Tensor | None): rows of the segment, P. Each was pooled for ``"mean"``; ``"last"`` took the
            last of them.
        response_count (torch.Tensor | None): likewise, T.
        full_count (torch.Tensor | None): likewise, P+T-1, or N.

    Shapes:
        - prompt, response, full: ``[*batch, D]``, float32 unless `HiddenSpec.dtype` says otherwise. None for a segment
          that was not asked for.
        - counts: int64 ``[*batch]``.

    The convention of ``response`` is that of Hugging Face ``generate(output_hidden_states=True)``, last layer.
    """

    prompt: torch.Tensor | None = None
    response: torch.Tensor | None = None
    full: torch.Tensor | None = None
    prompt_count: torch.Tensor | None = None
    response_count: torch.Tensor | None = None
    full_count: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class OutputKeys:
    """Where each result is written; None leaves it out."""

    text: NestedKey | None
    tokens: NestedKey | None
    masks: NestedKey | None
    log_probs: NestedKey | None
    history: NestedKey | None
    hidden_states: NestedKey | None
    weight_version: NestedKey | None
    finish_reason: NestedKey | None
    mixed_weights: NestedKey | None

    def present(self) -> list[NestedKey]:
        """The keys that are written."""
        keys = (
            self.text, self.masks, self.tokens, self.log_probs, self.history, self.hidden_states, self.weight_version,
            self.finish_reason, self.mixed_weights,
        )  # fmt: skip
        return [key for key in keys if key is not None]


def assemble(
    rows: Sequence[Row],
    completions: Sequence[Completion],
    *,
    batch_size: torch.Size,
    keys: OutputKeys,
    hidden: HiddenSpec | None,
    pad_id: int | None,
    device: torch.device | None,
) -> TensorDictBase:
    """Builds the output.

    Args:
        rows: what was asked, B rows in row-major order of ``batch_size``.
        completions: what came back, likewise.
        batch_size: the shape of the input, any number of dimensions, none included.
        keys: where to write what.
        hidden: the spec that the completions' states answer.
        pad_id: pads every ragged leaf with this id (log-probs with NaN, masks with False); None leaves them ragged.
        device: where the tensors go.

    Returns:
        A TensorDict of ``batch_size``, lazily stacked from one TensorDict per row, so that rows of different lengths
        stack with those of other calls. Read ragged leaves with ``get(key, as_list=True)``.
    """
    prompt_width = max(len(row.prompt_ids) for row in rows)
    response_width = max(len(completion.response_ids) for completion in completions)
    widths = (prompt_width, response_width) if pad_id is not None else None
    out = [
        _row(row, completion, keys=keys, hidden=hidden, widths=widths, pad_id=pad_id or 0)
        for row, completion in zip(rows, completions, strict=True)
    ]
    return _stack(out, batch_size, device)


def assemble_scores(
    rows: Sequence[Row],
    completions: Sequence[Completion],
    *,
    batch_size: torch.Size,
    keys: OutputKeys,
    hidden: HiddenSpec | None,
    pad_id: int | None,
    device: torch.device | None,
) -> TensorDictBase:
    """Builds the output of scoring; arguments and result as for `assemble`, with ``full`` as the only segment.

    Under ``pad_id`` sequences given as one padded tensor keep their places in it; others are padded on the left.
    """
    placements: list[tuple[bool, ...] | None] = [None] * len(rows)
    if pad_id is not None:
        placements = [row.placement for row in rows]
        if len({None if given is None else len(given) for given in placements}) > 1 or placements[0] is None:
            width = max(len(row.prompt_ids) for row in rows)
            lengths = [len(row.prompt_ids) for row in rows]
            placements = [(False,) * (width - length) + (True,) * length for length in lengths]
    out = [
        _scored_row(row, completion, keys=keys, hidden=hidden, placement=placement, pad_id=pad_id or 0)
        for row, completion, placement in zip(rows, completions, placements, strict=True)
    ]
    return _stack(out, batch_size, device)


def _stack(rows: list[TensorDictBase], batch_size: torch.Size, device: torch.device | None) -> TensorDictBase:
    """Stacks rows lazily to any shape, one dimension at a time from the last."""
    if device is not None:
        rows = [td.to(device) for td in rows]
    for size in reversed(batch_size):
        rows = [lazy_stack(rows[start : start + size]) for start in range(0, len(rows), size)]
    return rows[0]


def _row(
    row: Row,
    completion: Completion,
    *,
    keys: OutputKeys,
    hidden: HiddenSpec | None,
    widths: tuple[int, int] | None,
    pad_id: int,
) -> TensorDictBase:
    padded = widths is not None
    left, right = 0, 0
    if widths is not None:
        left, right = widths[0] - len(row.prompt_ids), widths[1] - len(completion.response_ids)
    prompt_P = _pad(torch.tensor(row.prompt_ids), left, 0, pad_id)
    response_T = _pad(torch.tensor(completion.response_ids), 0, right, pad_id)
    response_mask_T = _pad(torch.ones(len(completion.response_ids), dtype=torch.bool), 0, right, False)
    prompt_mask_P = _pad(torch.ones(len(row.prompt_ids), dtype=torch.bool), left, 0, False)
    values: dict[NestedKey | None, Any] = {
        keys.text: Text(
            prompt=row.prompt_text, response=completion.text, full=row.prompt_text + completion.text, batch_size=()
        ),
        keys.tokens: Tokens(
            prompt=prompt_P, response=response_T, full=torch.cat([prompt_P, response_T]), padded=padded, batch_size=()
        ),
        keys.masks: Masks(
            all_attention_mask=torch.cat([prompt_mask_P, response_mask_T]),
            all_assistant_mask=torch.cat([torch.zeros_like(prompt_mask_P), response_mask_T]),
            padded=padded,
            batch_size=(),
        ),
        keys.weight_version: completion.weight_version,
        keys.finish_reason: completion.finish_reason,
        keys.mixed_weights: torch.tensor(completion.mixed_weights),
    }
    if completion.log_probs_T is not None:
        log_probs_T = _pad(completion.log_probs_T, 0, right, NOT_MEASURED)
        prompt_nan_P = torch.full(prompt_P.shape, NOT_MEASURED)
        values[keys.log_probs] = LogProbs(
            response=log_probs_T, full=torch.cat([prompt_nan_P, log_probs_T]), padded=padded, batch_size=()
        )
    if hidden is not None:
        values[keys.hidden_states] = _hidden_states(completion, hidden)
    if row.history is not None:
        values[keys.history] = _chat_history(row.history, completion.text)
    return _tensordict(values)


def _scored_row(
    row: Row,
    completion: Completion,
    *,
    keys: OutputKeys,
    hidden: HiddenSpec | None,
    placement: tuple[bool, ...] | None,
    pad_id: int,
) -> TensorDictBase:
    padded = placement is not None
    real_N = torch.tensor(placement or (True,) * len(row.prompt_ids))

    def placed(values: torch.Tensor, pad: float | bool) -> torch.Tensor:
        out_N = torch.full(real_N.shape, pad, dtype=values.dtype)
        out_N[real_N] = values
        return out_N

    masks = Masks(all_attention_mask=real_N, padded=padded, batch_size=())
    if row.assistant_mask is not None:
        masks.all_assistant_mask = placed(torch.tensor(row.assistant_mask), False)
    values: dict[NestedKey | None, Any] = {
        keys.text: Text(full=row.prompt_text, batch_size=()),
        keys.tokens: Tokens(full=placed(torch.tensor(row.prompt_ids), pad_id), padded=padded, batch_size=()),
        keys.masks: masks,
        keys.weight_version: completion.weight_version,
    }
    if completion.prompt_log_probs_P is not None:
        log_probs = completion.prompt_log_probs_P.clone()
        log_probs[0] = 0.0  # TorchRL's convention: the first token's, which nothing conditions
        values[keys.log_probs] = LogProbs(full=placed(log_probs, NOT_MEASURED), padded=padded, batch_size=())
    if hidden is not None:
        whole = completion.hidden["prompt"]
        values[keys.hidden_states] = HiddenStates(
            full=whole.vector_D.to(hidden.dtype), full_count=torch.tensor(whole.count), batch_size=()
        )
    if row.history is not None:
        values[keys.history] = ChatHistory(full=row.history, batch_size=())
    return _tensordict(values)


def _tensordict(values: dict[NestedKey | None, Any]) -> TensorDictBase:
    td = TensorDict()
    for key, value in values.items():
        if key is not None:
            td.set(key, value)
    return td


def _pad(values: torch.Tensor, left: int, right: int, value: float | bool) -> torch.Tensor:
    return torch.nn.functional.pad(values, (left, right), value=value)


def _hidden_states(completion: Completion, spec: HiddenSpec) -> HiddenStates:
    fields: dict[str, torch.Tensor] = {}
    for segment in SEGMENTS:
        pooled = completion.hidden.get(segment)
        if pooled is not None:
            fields[segment] = pooled.vector_D.to(spec.dtype)
            fields[f"{segment}_count"] = torch.tensor(pooled.count)
    return HiddenStates(**fields, batch_size=())


def _chat_history(prompt: History, text: str) -> ChatHistory:
    response = History(role="assistant", content=text, batch_size=())
    full = prompt.append(response, inplace=False, dim=-1)
    return ChatHistory(prompt=prompt, response=lazy_stack([response]), full=full, batch_size=())
