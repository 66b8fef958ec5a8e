"""`Completion`s to TensorDict rows: TorchRL's TensorClasses and this package's. All padding happens here.

Knows nothing of engines or payloads. The contract of shapes and sides is TorchRL's own
(``torchrl.modules.llm.policies.common``): prompts are padded on the left, responses on the right, ``full`` is
``[prompt | response]``, so that each row of the attention mask is one block.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, lazy_stack
from tensordict.utils import NestedKey
from torchrl.modules.llm.policies import ChatHistory, LogProbs, Masks, Text, Tokens

from torchrl_sglang_hidden.policy.assemble_chat import chat_of_row
from torchrl_sglang_hidden.policy.assemble_heads import NO_HEADS, HeadRows
from torchrl_sglang_hidden.policy.assemble_logits import logits_of_row
from torchrl_sglang_hidden.policy.assemble_states import most_rows, pooled_states, token_states
from torchrl_sglang_hidden.policy.image_rows import NO_IMAGE_ROWS, ImageRows
from torchrl_sglang_hidden.policy.outputs import Logits, OutputKeys
from torchrl_sglang_hidden.policy.rows import Row
from torchrl_sglang_hidden.policy.sampling_rows import SampledRows
from torchrl_sglang_hidden.records import NO_RECORDS, Completion, SamplingRecords
from torchrl_sglang_hidden.spec.hidden import HiddenSpec, Segment
from torchrl_sglang_hidden.spec.logits import LogitsSpec

__all__ = ["assemble", "assemble_scores"]

# A log-prob that nobody measured is not 0, which would be probability 1.
NOT_MEASURED = float("nan")


def assemble(
    rows: Sequence[Row],
    completions: Sequence[Completion],
    *,
    batch_size: torch.Size,
    keys: OutputKeys,
    hidden: HiddenSpec | None,
    hidden_size: int,
    logits: LogitsSpec | None,
    num_columns: int = 0,
    heads: HeadRows = NO_HEADS,
    records: SamplingRecords = NO_RECORDS,
    images: ImageRows = NO_IMAGE_ROWS,
    pad_id: int | None,
    device: torch.device | None,
) -> TensorDictBase:
    """Build the output of generation.

    Args:
        rows: the B prompt rows, in row-major order of ``batch_size``.
        completions: one for each row, in the same order.
        batch_size: the shape of the output, any number of dimensions, none included.
        keys: where each output is written.
        hidden: the states that the completions have.
        hidden_size: D.
        logits: the logits that the completions have.
        num_columns: C of these logits, for the rows that have none.
        heads: makes what is written of the heads' scores.
        images: makes what is written of the rows' images.
        records: what the completions recorded of the sampling.
        pad_id: pads every ragged leaf with this id (log-probs with NaN, masks with False); None leaves them ragged.
        device: where the tensors go.

    Returns:
        A TensorDict of ``batch_size``, lazily stacked from one TensorDict per row, so that rows of different lengths
        can be stacked with the outputs of other calls. Read ragged leaves with ``get(key, as_list=True)``.
    """
    prompt_width = max(len(row.prompt_ids) for row in rows)
    response_width = max(len(completion.response_ids) for completion in completions)
    widths = (prompt_width, response_width) if pad_id is not None else None
    asked: dict[str, Any] = {"keys": keys, "hidden": hidden, "hidden_size": hidden_size, "logits": logits}
    asked |= {"num_columns": num_columns, "images": images}
    asked["span_widths"] = None if pad_id is None else most_rows(hidden, completions)
    asked["heads"] = heads if pad_id is None else heads.padded_for(completions)
    asked["sampled"] = SampledRows.of(records, completions)
    out = [
        _row(row, completion, widths=widths, pad_id=pad_id or 0, **asked)
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
    hidden_size: int,
    logits: LogitsSpec | None,
    num_columns: int = 0,
    heads: HeadRows = NO_HEADS,
    logits_only: bool = False,
    images: ImageRows = NO_IMAGE_ROWS,
    pad_id: int | None,
    device: torch.device | None,
) -> TensorDictBase:
    """Build the output of scoring; arguments and result as for `assemble`, with ``full`` as the only segment.

    With ``pad_id``, sequences that came as one padded tensor keep their places in it; others are padded on the left.
    With ``logits_only`` the logits of ``full`` are written as one plain tensor.
    """
    placements: list[tuple[bool, ...] | None] = [None] * len(rows)
    if pad_id is not None:
        placements = [row.placement for row in rows]
        if len({None if real is None else len(real) for real in placements}) > 1 or placements[0] is None:
            width = max(len(row.prompt_ids) for row in rows)
            lengths = [len(row.prompt_ids) for row in rows]
            placements = [(False,) * (width - length) + (True,) * length for length in lengths]
    asked: dict[str, Any] = {"keys": keys, "hidden": hidden, "hidden_size": hidden_size, "logits": logits}
    asked |= {"num_columns": num_columns, "images": images}
    asked["span_widths"] = None if pad_id is None else most_rows(hidden, completions)
    asked["heads"] = heads if pad_id is None else heads.padded_for(completions)
    out = [
        _scored_row(row, completion, placement=placement, pad_id=pad_id or 0, logits_only=logits_only, **asked)
        for row, completion, placement in zip(rows, completions, placements, strict=True)
    ]
    return _stack(out, batch_size, device)


def _stack(rows: list[TensorDictBase], batch_size: torch.Size, device: torch.device | None) -> TensorDictBase:
    """Stack rows lazily to any shape, one dimension at a time from the last."""
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
    hidden_size: int,
    logits: LogitsSpec | None,
    num_columns: int,
    heads: HeadRows,
    span_widths: Mapping[str, int] | None,
    images: ImageRows,
    sampled: SampledRows,
    widths: tuple[int, int] | None,
    pad_id: int,
) -> TensorDictBase:
    padded, num_prompt, num_response = widths is not None, len(row.prompt_ids), len(completion.response_ids)
    left, right = (0, 0) if widths is None else (widths[0] - num_prompt, widths[1] - num_response)
    pads = {"prompt": (left, 0), "response": (0, right), "full": (left, right)}
    prompt_P = _pad(_ids_tensor(row.prompt_ids), left, 0, pad_id)
    response_T = _pad(_ids_tensor(completion.response_ids), 0, right, pad_id)
    values: dict[NestedKey | None, Any] = {
        keys.text: _make(
            Text, prompt=row.prompt_text, response=completion.text, full=row.prompt_text + completion.text
        ),
        keys.tokens: _make(
            Tokens, prompt=prompt_P, response=response_T, full=torch.cat([prompt_P, response_T]), padded=padded
        ),
        keys.masks: _masks(row, completion, left, right, padded),
        keys.weight_version: completion.weight_version,
        keys.finish_reason: completion.finish_reason,
        keys.mixed_weights: torch.tensor(completion.mixed_weights),
        keys.error: _error(completion),
        keys.weight_versions: NonTensorData(completion.versions),
    }
    if completion.log_probs_T is not None:
        log_probs_T = _pad(completion.log_probs_T, 0, right, NOT_MEASURED)
        full_N = torch.cat([_pad(_known_log_probs(row), left, 0, NOT_MEASURED), log_probs_T])
        values[keys.log_probs] = _make(LogProbs, response=log_probs_T, full=full_N, padded=padded)
    if hidden is not None and hidden.pooling is not None:
        own: dict[str, str] = {str(segment): segment for segment in hidden.segments}
        values[keys.hidden_states] = pooled_states(row, completion, hidden, hidden_size, own, span_widths)
    if hidden is not None and hidden.tokens:
        positions = {str(name): Segment(name).positions(num_prompt, num_response) for name in hidden.segments}
        values[keys.token_hidden_states] = token_states(
            row,
            completion,
            hidden,
            hidden_size,
            positions,
            pad=(lambda field, rows_ND: _pad(rows_ND, *pads[field], 0)) if padded else None,
        )
    if logits is not None:
        values[keys.logits] = logits_of_row(
            completion, logits, num_columns, logits.segments, pad=lambda field, rows_NC: _pad(rows_NC, *pads[field], 0)
        )
    values |= sampled.values(completion, pads, keys) | heads.values(completion, pads if padded else None)
    values |= images.values(row, num_response, lambda types_N: _pad(types_N, left, right, 0))
    values |= {} if row.history is None else chat_of_row(row, row.history, completion, keys)
    return _tensordict(values)


def _known_log_probs(row: Row) -> torch.Tensor:
    """Return the log-probs of a prompt's tokens, [P], which are known where they were sampled in an earlier turn."""
    known_P = None if row.turns is None else row.turns.log_probs_P
    return torch.full((len(row.prompt_ids),), NOT_MEASURED) if known_P is None else known_P


def _error(completion: Completion) -> str:
    return "" if completion.error is None else f"{type(completion.error).__name__}: {completion.error}"


def _masks(row: Row, completion: Completion, left: int, right: int, padded: bool) -> Masks:
    start = left + len(row.prompt_ids)
    stop = start + len(completion.response_ids)
    attention_N = torch.zeros(stop + right, dtype=torch.bool)
    attention_N[left:stop] = True
    assistant_N = torch.zeros_like(attention_N)
    # What was aborted, or failed on the way, is not the model's whole answer, and no loss should take it for one.
    assistant_N[start:stop] = completion.finish_reason not in ("abort", "error")
    if row.turns is not None and row.turns.sampled is not None:
        assistant_N[left:start] = torch.tensor(row.turns.sampled)
    return _make(Masks, all_attention_mask=attention_N, all_assistant_mask=assistant_N, padded=padded)


def _scored_row(
    row: Row,
    completion: Completion,
    *,
    keys: OutputKeys,
    hidden: HiddenSpec | None,
    hidden_size: int,
    logits: LogitsSpec | None,
    num_columns: int,
    heads: HeadRows,
    span_widths: Mapping[str, int] | None,
    images: ImageRows,
    logits_only: bool,
    placement: tuple[bool, ...] | None,
    pad_id: int,
) -> TensorDictBase:
    padded = placement is not None
    real_N = torch.tensor(placement or (True,) * len(row.prompt_ids), dtype=torch.bool)

    def placed(values: torch.Tensor, pad: float | bool) -> torch.Tensor:
        out_N = torch.full((*real_N.shape, *values.shape[1:]), pad, dtype=values.dtype)
        out_N[real_N] = values
        return out_N

    values: dict[NestedKey | None, Any] = {
        keys.text: _make(Text, full=row.prompt_text),
        keys.tokens: _make(Tokens, full=placed(_ids_tensor(row.prompt_ids), pad_id), padded=padded),
        keys.masks: _scored_masks(row, completion, real_N, placed, padded),
        keys.weight_version: completion.weight_version,
        keys.error: _error(completion),
    }
    if completion.prompt_log_probs_P is not None:
        log_probs = completion.prompt_log_probs_P.clone()
        if completion.error is None:
            log_probs[0] = 0.0  # TorchRL's convention: the first token's, which nothing conditions
        values[keys.log_probs] = _make(LogProbs, full=placed(log_probs, NOT_MEASURED), padded=padded)
    if hidden is not None and hidden.pooling is not None:
        own = {"full": "prompt"}
        values[keys.hidden_states] = pooled_states(row, completion, hidden, hidden_size, own, span_widths)
    if hidden is not None and hidden.tokens:
        values[keys.token_hidden_states] = token_states(
            row,
            completion,
            hidden,
            hidden_size,
            {"full": range(len(row.prompt_ids))},
            pad=(lambda field, rows_ND: placed(rows_ND, 0)) if padded else None,
        )
    if logits is not None:
        # The engine gets all of a scored sequence as its prompt.
        as_prompt = logits_of_row(
            completion, logits, num_columns, ("prompt",), pad=lambda field, rows_NC: placed(rows_NC, 0)
        )
        ids = {} if as_prompt.prompt_token_ids is None else {"full_token_ids": as_prompt.prompt_token_ids}
        scored = _make(Logits, full=as_prompt.prompt, **ids)
        values[keys.logits] = scored.full if logits_only else scored
    values |= heads.scored_values(completion, (lambda scores_N: placed(scores_N, NOT_MEASURED)) if padded else None)
    values |= images.values(row, 0, lambda types_N: placed(types_N, 0))
    values |= {} if row.history is None else {keys.history: ChatHistory(full=row.history, batch_size=())}
    return _tensordict(values)


def _scored_masks(
    row: Row,
    completion: Completion,
    real_N: torch.Tensor,
    placed: Callable[[torch.Tensor, float | bool], torch.Tensor],
    padded: bool,
) -> Masks:
    masks: dict[str, Any] = {"all_attention_mask": real_N, "padded": padded}
    if row.assistant_mask is not None:
        scored = completion.error is None
        masks["all_assistant_mask"] = placed(torch.tensor(row.assistant_mask, dtype=torch.bool) & scored, False)
    elif row.error is not None and row.history is not None:
        # A chat that could not be read has no tokens, and the mask that other chats have.
        masks["all_assistant_mask"] = torch.zeros_like(real_N)
    return cast("Masks", _make(Masks, **masks))


def _tensordict(values: dict[NestedKey | None, Any]) -> TensorDictBase:
    td = TensorDict({key: _wrapped(value) for key, value in values.items() if isinstance(key, str)})
    for key, value in values.items():
        if isinstance(key, tuple):
            td.set(key, value)
    return td


def _make(cls: Any, **fields: Any) -> Any:
    """Make a TensorClass without batch dimensions, as its constructor does that sets one field after the other.

    That took half of the time of a batch of 256 rows. TorchRL's own wrappers make theirs with ``_from_tensordict`` too.
    """
    return cls._from_tensordict(TensorDict({name: _wrapped(value) for name, value in fields.items()}))


def _wrapped(value: Any) -> Any:
    """Return a string or a bool as TensorDict holds it, which saves it a search for what the value could be."""
    return NonTensorData(value) if isinstance(value, (str, bool)) else value


def _ids_tensor(ids: Sequence[int]) -> torch.Tensor:
    # A third of the time of torch.tensor, which looks at each element. The clone owns its memory.
    return torch.frombuffer(array("q", ids), dtype=torch.int64).clone() if ids else torch.empty(0, dtype=torch.int64)


def _pad(values: torch.Tensor, left: int, right: int, value: float | bool) -> torch.Tensor:
    """Pad the first dimension; values that need none are returned as they are."""
    if not (left or right):
        return values
    return torch.nn.functional.pad(values, (0, 0) * (values.ndim - 1) + (left, right), value=value)
