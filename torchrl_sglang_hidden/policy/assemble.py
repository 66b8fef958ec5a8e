"""`Completion`s to TensorDict rows: TorchRL's TensorClasses and this package's. All padding happens here.

Knows nothing of engines or payloads. The contract of shapes and sides is TorchRL's own
(``torchrl.modules.llm.policies.common``): prompts are padded on the left, responses on the right, ``full`` is
``[prompt | response]``, so that each row of the attention mask is one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.utils import NestedKey
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, LogProbs, Masks, Text, Tokens

from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.policy.outputs import HiddenStates, Logits, OutputKeys, TokenHiddenStates
from torchrl_sglang_hidden.policy.prompts import Row
from torchrl_sglang_hidden.records import Completion, Pooled, TokenLogits, TokenRows
from torchrl_sglang_hidden.spec.hidden import HiddenSpec, Segment, reads_prompt, reads_response
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
    logits_only: bool = False,
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
    widths: tuple[int, int] | None,
    pad_id: int,
) -> TensorDictBase:
    padded = widths is not None
    left, right = 0, 0
    if widths is not None:
        left, right = widths[0] - len(row.prompt_ids), widths[1] - len(completion.response_ids)
    pads = {"prompt": (left, 0), "response": (0, right), "full": (left, right)}
    prompt_P = _pad(torch.tensor(row.prompt_ids, dtype=torch.int64), left, 0, pad_id)
    response_T = _pad(torch.tensor(completion.response_ids, dtype=torch.int64), 0, right, pad_id)
    values: dict[NestedKey | None, Any] = {
        keys.text: Text(
            prompt=row.prompt_text, response=completion.text, full=row.prompt_text + completion.text, batch_size=()
        ),
        keys.tokens: Tokens(
            prompt=prompt_P, response=response_T, full=torch.cat([prompt_P, response_T]), padded=padded, batch_size=()
        ),
        keys.masks: _masks(len(row.prompt_ids), len(completion.response_ids), left, right, padded),
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
    if hidden is not None and hidden.pooling is not None:
        own: dict[str, str] = {str(segment): segment for segment in hidden.segments}
        values[keys.hidden_states] = _hidden_states(row, completion, hidden, hidden_size, own)
    if hidden is not None and hidden.tokens:
        num_prompt, num_response = len(row.prompt_ids), len(completion.response_ids)
        positions = {str(name): Segment(name).positions(num_prompt, num_response) for name in hidden.segments}
        values[keys.token_hidden_states] = _token_states(
            row,
            completion,
            hidden,
            hidden_size,
            positions,
            pad=(lambda field, rows_ND: _pad(rows_ND, *pads[field], 0)) if padded else None,
        )
    if logits is not None:
        values[keys.logits] = _logits(
            completion, logits.segments, pad=lambda field, rows_NC: _pad(rows_NC, *pads[field], 0)
        )
    if row.history is not None:
        values[keys.history] = _chat_history(row.history, completion.text)
    return _tensordict(values)


def _masks(num_prompt: int, num_response: int, left: int, right: int, padded: bool) -> Masks:
    prompt_P = _pad(torch.ones(num_prompt, dtype=torch.bool), left, 0, False)
    response_T = _pad(torch.ones(num_response, dtype=torch.bool), 0, right, False)
    return Masks(
        all_attention_mask=torch.cat([prompt_P, response_T]),
        all_assistant_mask=torch.cat([torch.zeros_like(prompt_P), response_T]),
        padded=padded,
        batch_size=(),
    )


def _scored_row(
    row: Row,
    completion: Completion,
    *,
    keys: OutputKeys,
    hidden: HiddenSpec | None,
    hidden_size: int,
    logits: LogitsSpec | None,
    logits_only: bool,
    placement: tuple[bool, ...] | None,
    pad_id: int,
) -> TensorDictBase:
    padded = placement is not None
    real_N = torch.tensor(placement or (True,) * len(row.prompt_ids))

    def placed(values: torch.Tensor, pad: float | bool) -> torch.Tensor:
        out_N = torch.full((*real_N.shape, *values.shape[1:]), pad, dtype=values.dtype)
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
    if hidden is not None and hidden.pooling is not None:
        values[keys.hidden_states] = _hidden_states(row, completion, hidden, hidden_size, {"full": "prompt"})
    if hidden is not None and hidden.tokens:
        values[keys.token_hidden_states] = _token_states(
            row,
            completion,
            hidden,
            hidden_size,
            {"full": range(len(row.prompt_ids))},
            pad=(lambda field, rows_ND: placed(rows_ND, 0)) if padded else None,
        )
    if logits is not None:
        # The engine gets all of a scored sequence as its prompt.
        as_prompt = _logits(completion, ("prompt",), pad=lambda field, rows_NC: placed(rows_NC, 0))
        scored = Logits(full=as_prompt.prompt, full_token_ids=as_prompt.prompt_token_ids, batch_size=())
        values[keys.logits] = scored.full if logits_only else scored
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
    """Pad the first dimension."""
    return torch.nn.functional.pad(values, (0, 0) * (values.ndim - 1) + (left, right), value=value)


def _state_shape(spec: HiddenSpec, hidden_size: int) -> tuple[int, ...]:
    return (len(spec.layers), hidden_size) if isinstance(spec.layers, tuple) else (hidden_size,)


def _hidden_states(
    row: Row, completion: Completion, spec: HiddenSpec, hidden_size: int, sources: Mapping[str, str]
) -> HiddenStates:
    """Return the pooled states of one row; ``sources`` names the completion's segment that each field takes."""

    def read(pools: Mapping[Any, Pooled], name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if row.wants_states is False:
            return torch.full(_state_shape(spec, hidden_size), NOT_MEASURED, dtype=spec.dtype), torch.tensor(0)
        vector = pools[name].vector.to(spec.dtype)
        if spec.dtype == torch.float16 and bool((vector.isinf() & pools[name].vector.isfinite()).any()):
            raise InputError(
                f"{name!r} has a state of {float(pools[name].vector.abs().max()):.6g}, over 65504, the largest "
                "torch.float16; use HiddenSpec(dtype=torch.float32) or torch.bfloat16"
            )
        return vector, torch.tensor(pools[name].count)

    fields: dict[str, Any] = {}
    for field, segment in sources.items():
        fields[field], fields[f"{field}_count"] = read(completion.hidden, segment)
    if spec.spans:
        spans = {name: read(completion.spans, name) for name in spec.spans}
        fields["spans"] = TensorDict({name: vector for name, (vector, _) in spans.items()})
        fields["span_counts"] = TensorDict({name: count for name, (_, count) in spans.items()})
    return HiddenStates(**fields, batch_size=())


def _token_states(
    row: Row,
    completion: Completion,
    spec: HiddenSpec,
    hidden_size: int,
    positions: Mapping[str, range],
    *,
    pad: Callable[[str, torch.Tensor], torch.Tensor] | None,
) -> TokenHiddenStates:
    """Return the states of one row's tokens: ``positions`` says which each field has, and ``pad`` pads it."""
    fields = {}
    for field, of_field in positions.items():
        if row.wants_states is False:
            num_rows = 0 if pad is None else len(of_field)
            none_ND = torch.empty((num_rows, *_state_shape(spec, hidden_size)), dtype=spec.dtype)
            fields[field] = none_ND if pad is None else torch.full_like(pad(field, none_ND), NOT_MEASURED)
        else:
            rows = cast("TokenRows", completion.token_rows)
            # Copied: the fields overlap, and several samples of a prompt have the same rows.
            rows_ND = rows.rows_ND[of_field.start - rows.first : of_field.stop - rows.first].to(spec.dtype, copy=True)
            fields[field] = rows_ND if pad is None else pad(field, rows_ND)
    return TokenHiddenStates(**fields, batch_size=())


def _logits(
    completion: Completion, segments: Sequence[str], *, pad: Callable[[str, torch.Tensor], torch.Tensor]
) -> Logits:
    """Return the logits of one row's tokens; ``pad`` pads the rows of a field."""
    parts: dict[str, TokenLogits] = {}
    if reads_prompt(segments):
        parts["prompt"] = _with_first_token(cast("TokenLogits", completion.prompt_logits))
    if reads_response(segments):
        parts["response"] = cast("TokenLogits", completion.logits)
    if Segment.FULL in segments:
        parts["full"] = _joined(parts["prompt"], parts["response"])
    fields: dict[str, torch.Tensor] = {}
    for segment in segments:
        fields[str(segment)] = pad(segment, parts[segment].values_NC)
        ids_NC = parts[segment].token_ids_NC
        if ids_NC is not None:
            fields["token_ids" if segment == Segment.RESPONSE else f"{segment}_token_ids"] = pad(segment, ids_NC)
    return Logits(**fields, batch_size=())


def _with_first_token(logits: TokenLogits) -> TokenLogits:
    """Return the rows of the prompt's tokens, with a row of zeros for the first token, which no token precedes."""
    columns = torch.arange(logits.values_NC.shape[1])[None]
    zeros = TokenLogits(
        torch.zeros(columns.shape, dtype=logits.values_NC.dtype), None if logits.token_ids_NC is None else columns
    )
    return _joined(zeros, logits)


def _joined(first: TokenLogits, second: TokenLogits) -> TokenLogits:
    ids = [part.token_ids_NC for part in (first, second) if part.token_ids_NC is not None]
    return TokenLogits(torch.cat([first.values_NC, second.values_NC]), torch.cat(ids) if ids else None)


def _chat_history(prompt: History, text: str) -> ChatHistory:
    response = History(role="assistant", content=text, batch_size=())
    full = prompt.append(response, inplace=False, dim=-1)
    return ChatHistory(prompt=prompt, response=lazy_stack([response]), full=full, batch_size=())
