"""`ragged`: prompts of differing lengths to the TensorDict that a policy reads.

Knows nothing of engines, tokenizers or the policy: what a row's ids are in this model's vocabulary is checked when the
row is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, is_non_tensor, is_tensor_collection, lazy_stack
from torchrl.data.llm import History
from torchrl.data.llm.history import ContentBase
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens

from torchrl_sglang_hidden.errors import InputError, InputTypeError, PromptLengthError, TokenIdError

__all__ = ["ragged"]

MESSAGE_FIELDS = ("role", "content", "is_complete", "tool_calls", "tool_responses")
# What torch.int64 holds; which ids the model has is the engine's to say.
MAX_ID = 2**63 - 1


def ragged(
    *,
    tokens: Iterable[Any] | None = None,
    text: Iterable[str] | None = None,
    history: Iterable[Any] | None = None,
    full: bool = False,
    batch_size: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    **fields: Any,
) -> TensorDictBase:
    """Stack prompts of differing lengths into the TensorDict that a policy reads, without padding.

    Example:
        >>> policy = SGLangHiddenWrapper(engine, input_mode="tokens")
        >>> out = policy(ragged(tokens=[[504, 3575, 282], [28, 216]]))
        >>> out.get(("tokens", "response"), as_list=True)  # one tensor per row

    Args:
        tokens: for ``input_mode="tokens"``: one row of token ids per prompt, a list of ints or an integer tensor [P].
        text: for ``input_mode="text"``: one string per prompt.
        history: for ``input_mode="history"``: one chat per prompt, a list of messages such as ``{"role": "user",
            "content": "Hi"}``, or a ``torchrl.data.llm.History`` of shape [turns]. A content may be a list of parts, as
            ``[{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]``. Exactly one of these three
            is given.
        full: write whole sequences, as a policy with ``generate=False`` reads them to score, in place of prompts.
        batch_size: the shape of the batch, filled in row-major order; by default ``[B]`` for B rows.
        device: of the tensors; by default each keeps its own, and lists are put on the CPU.
        **fields: what else a row has, under the argument's name: one value per row, such as masks of the rows' own
            lengths, or a tensor [B, …]. A mapping nests: ``masks={"all_assistant_mask": [[False, True], [True]]}``.

    Returns:
        A lazy stack of the rows. The prompts are at ``(kind, "prompt")``, or ``(kind, "full")``, as TorchRL's
        ``Tokens`` (int64 [P]), ``Text`` or ``ChatHistory``; read ragged leaves with ``get(key, as_list=True)``.

    Raises:
        PromptLengthError: no rows, or a row without ids, text or messages.
        TokenIdError: an id that is negative, or too large for int64.
        InputTypeError: a row of another type, ids nested too deep or too little, or ids that are no integers.
        InputError: none or several of the three kinds, a message with unknown fields, or rows, fields and
            ``batch_size`` that do not agree in number.
    """
    given = {
        kind: rows for kind, rows in (("tokens", tokens), ("text", text), ("history", history)) if rows is not None
    }
    if len(given) != 1:
        also = f", and the fields {sorted(fields)}" if fields else ""
        raise InputError(
            f"ragged() got {sorted(given) or 'no prompts'}{also}; expected exactly one of tokens=, text= and history="
        )
    if not isinstance(full, bool):
        raise InputTypeError(f"full={full!r:.80}: expected True or False")
    ((kind, rows),) = given.items()
    read, segment = _READERS[kind], "full" if full else "prompt"
    prompts = [
        TensorDict({kind: read(f"{kind}, row {index}:", row, segment)}, batch_size=())
        for index, row in enumerate(_rows_of(kind, rows))
    ]
    if not prompts:
        raise PromptLengthError(f"{kind}={rows!r:.80} has 0 rows; pass at least 1")
    for name, values in fields.items():
        for prompt, value in zip(prompts, _field(name, values, len(prompts)), strict=True):
            prompt[name] = value
    shape = _shape(batch_size, len(prompts))
    if device is not None:
        prompts = [prompt.to(device) for prompt in prompts]
    for size in reversed(shape):
        prompts = [lazy_stack(prompts[start : start + size]) for start in range(0, len(prompts), size)]
    (stacked,) = prompts
    return stacked


def _rows_of(kind: str, rows: Any) -> list[Any]:
    """Return the rows of one kind as a list. A single prompt instead of a list of prompts is refused."""
    if isinstance(rows, History) and rows.ndim:
        return list(rows.unbind(0))
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise InputTypeError(f"{kind}={rows!r:.80} is a {type(rows).__name__}; expected one entry per row: {kind}=[…]")
    if isinstance(rows, torch.Tensor) and rows.ndim == 0:
        raise InputTypeError(f"{kind}={rows!r:.80} has no dimension of rows; expected one entry per row: {kind}=[…]")
    return list(rows)


def _read_tokens(name: str, row: Any, segment: str) -> Tokens:
    if isinstance(row, torch.Tensor):
        ids = row
    elif isinstance(row, (str, bytes, Mapping)) or not isinstance(row, Iterable):
        raise InputTypeError(
            f"{name} {row!r:.80} is a {type(row).__name__}; expected ids, such as [1, 2]. One row alone is "
            "ragged(tokens=[[1, 2]]), and strings go to ragged(text=…)"
        )
    else:
        ids = _tensor_of(name, list(row))
    if ids.ndim != 1:
        raise InputTypeError(f"{name} a tensor of shape {tuple(ids.shape)}; expected the ids of one row, [P]")
    if not len(ids):
        raise PromptLengthError(f"{name} 0 ids; SGLang needs at least 1")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputTypeError(f"{name} ids of {ids.dtype}; expected integers, such as torch.int64")
    if bool((ids < 0).any()):
        raise TokenIdError(f"{name} id {int(ids.min())}; expected ids from 0, and no padding")
    return Tokens(**{segment: ids.long()}, batch_size=())


def _tensor_of(name: str, ids: list[Any]) -> torch.Tensor:
    """Turn the ids of one row into a tensor [P], and name the first that is none."""
    # Numpy's integers and tensors without dimensions are integers too.
    plain = [i.item() if hasattr(i, "item") and getattr(i, "ndim", None) == 0 else i for i in ids]
    for position, token_id in enumerate(plain):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise InputTypeError(
                f"{name} token {position} is {token_id!r:.80}, a {type(token_id).__name__}; expected an int. A row is "
                "one flat list of ids"
            )
        if not 0 <= token_id <= MAX_ID:
            raise TokenIdError(f"{name} token {position} has id {token_id}; expected ids in 0..{MAX_ID}")
    return torch.tensor(plain, dtype=torch.int64)


def _read_text(name: str, row: Any, segment: str) -> Text:
    if not isinstance(row, str):
        raise InputTypeError(
            f"{name} {row!r:.80} is a {type(row).__name__}; expected a string. Ids go to ragged(tokens=…), and "
            "messages to ragged(history=…)"
        )
    if not row:
        raise PromptLengthError(f"{name} an empty string, 0 tokens; SGLang needs at least 1")
    return Text(**{segment: row}, batch_size=())


def _read_chat(name: str, row: Any, segment: str) -> ChatHistory:
    if not isinstance(row, History):
        if isinstance(row, (str, bytes, Mapping, torch.Tensor)) or not isinstance(row, Iterable):
            raise InputTypeError(
                f"{name} {row!r:.80} is a {type(row).__name__}; expected a list of messages. One chat alone is "
                'ragged(history=[[{"role": "user", "content": "Hi"}]])'
            )
        messages = list(row)
        for turn, message in enumerate(messages):
            _check_message(f"{name[:-1]}, message {turn}:", message)
        if not messages:
            raise PromptLengthError(f"{name} 0 messages; expected at least 1")
        (row,) = History.from_chats([[_with_stacked_parts(message) for message in messages]])
    if row.ndim != 1:
        raise InputTypeError(f"{name} a History of shape {tuple(row.batch_size)}; expected one chat, [turns]")
    if not len(row):
        raise PromptLengthError(f"{name} 0 messages; expected at least 1")
    return ChatHistory(**{segment: row}, batch_size=())


def _check_message(name: str, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise InputTypeError(
            f"{name} {message!r:.80} is a {type(message).__name__}; expected a dict with role and content"
        )
    unknown = sorted(set(map(str, message)) - set(MESSAGE_FIELDS))
    if unknown:
        raise InputError(f"{name} unknown fields {unknown}; a History has {', '.join(MESSAGE_FIELDS)}: leave them out")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise InputTypeError(f"{name} role {role!r:.80}; expected a string, such as 'user'")
    parts = content if isinstance(content, (list, tuple)) and content else [content]
    is_call = content is None and message.get("tool_calls")
    if not is_call and not isinstance(content, str) and not _are_parts(parts):
        raise InputTypeError(
            f"{name} content {content!r:.80}; expected a string, or the parts of one message, all of them torchrl's "
            'ContentBase, or all dicts such as {"type": "image", "image": image}'
        )


def _are_parts(parts: Sequence[Any]) -> bool:
    return any(all(isinstance(part, kind) for part in parts) for kind in (ContentBase, dict))


def _with_stacked_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose parts are one value of a `History`.

    torchrl's parts become a lazy stack, for a `History` itself stacks only parts of the same fields. A list of dicts is
    wrapped, for a `History` makes a stack of it, and neither it nor its TensorDict can be printed beside a text.
    """
    content = message.get("content")
    if isinstance(content, (list, tuple)) and content:
        is_torchrl = isinstance(content[0], ContentBase)
        return {**message, "content": lazy_stack(list(content)) if is_torchrl else NonTensorData(list(content))}
    return dict(message)


_READERS: dict[str, Callable[[str, Any, str], Any]] = {
    "tokens": _read_tokens,
    "text": _read_text,
    "history": _read_chat,
}


def _field(name: str, values: Any, num_rows: int) -> list[Any]:
    """Split a further field into one value per row; a mapping into one TensorDict per row."""
    if isinstance(values, Mapping):
        columns = {key: _field(f"{name}[{key!r}]", column, num_rows) for key, column in values.items()}
        return [
            TensorDict({key: column[row] for key, column in columns.items()}, batch_size=()) for row in range(num_rows)
        ]
    if is_tensor_collection(values) and not is_non_tensor(values):
        size = values.batch_size[0] if values.ndim else None
    elif isinstance(values, (str, bytes)) or not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0:
        size = None
    else:
        size = len(values)
    if size != num_rows:
        found = f"{values!r:.80}, a {type(values).__name__}" if size is None else f"{size} values"
        raise InputError(f"{name}: {found}; expected one value for each of the {num_rows} rows")
    # A TensorDict takes lists of anything, and tuples of numbers alone.
    fields = (values[row] for row in range(num_rows))
    return [list(value) if type(value) is tuple else value for value in fields]


def _shape(batch_size: Sequence[int] | None, num_rows: int) -> tuple[int, ...]:
    shape = (num_rows,) if batch_size is None else tuple(batch_size)
    if not shape or math.prod(shape) != num_rows:
        raise InputError(f"batch_size={shape} with {num_rows} rows; expected a shape of {num_rows} entries")
    return shape
