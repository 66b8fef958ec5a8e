"""Reading prompts: rows of a TensorDict to token ids, in history, text and tokens mode.

Knows nothing of engines. The ids that are read here are the ids that the engine gets, and those in ``tokens.prompt``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase, is_non_tensor, is_tensor_collection
from tensordict.utils import NestedKey, unravel_key
from torchrl.data.llm import History
from torchrl.data.llm.history import _CHAT_TEMPLATES as CHAT_TEMPLATES
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden.errors import (
    InputError,
    InputTypeError,
    MissingKeyError,
    PromptLengthError,
    SpanError,
)
from torchrl_sglang_hidden.policy.action_masks import ActionMaskReader
from torchrl_sglang_hidden.policy.chat_text import Chat, decode_all, last_tokens, spoken_tokens, tokens_at
from torchrl_sglang_hidden.policy.row_fields import keys_of, read_action_mask, read_token_mask, read_wants_states
from torchrl_sglang_hidden.spec.constraints import ActionMask
from torchrl_sglang_hidden.spec.spans import (
    Between,
    LastTokens,
    PromptSpan,
    ResolvedSpan,
    Role,
    Span,
    TokenMask,
    Turn,
    find_between,
)

__all__ = ["INPUT_MODES", "InputMode", "PromptReader", "Row"]

InputMode = Literal["history", "text", "tokens"]
INPUT_MODES: tuple[InputMode, ...] = get_args(InputMode)
# A chat template that says which tokens the assistant wrote.
GENERATION = re.compile(r"\{%-?\s*generation\b")
CONTAINERS = {"history": "ChatHistory", "text": "Text", "tokens": "Tokens"}


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt row: a prompt, or with ``generate=False`` a sequence to score, as token ids.

    Args:
        prompt_ids: P ids.
        prompt_text: the text that the ids stand for.
        history: the chat that was rendered to the text, ``[turns]``, in history mode.
        assistant_mask: for scoring, which of the ids the assistant wrote; None where nothing says so.
        placement: in tokens mode, the places of the ids tensor: True at an id, False at a pad; else None.
        wants_states: what the row says at ``"return_hidden_states"``; None where it says nothing.
        spans: the spans by name, spans of the prompt as positions; empty where the row wants no states.
        action_mask: the tokens that the row allows, or None.
    """

    prompt_ids: tuple[int, ...]
    prompt_text: str
    history: History | None = None
    assistant_mask: tuple[bool, ...] | None = None
    placement: tuple[bool, ...] | None = None
    wants_states: bool | None = None
    spans: Mapping[str, ResolvedSpan] = field(default_factory=dict)
    action_mask: ActionMask | None = None


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Reads the prompts of a TensorDict. Arguments that are not described here are those of `PolicyConfig`.

    Args:
        generate: True reads prompts, False whole sequences to score.
        padding_value: the id that pads a ``Tokens`` that says it is padded.
        prefer_tokens: the key of ids that history mode prefers to the tokenizer's own, or None.
        spans: the spans to find in each prompt. Spans of a response stay as they are.
        action_masks: reads each row's action mask; None reads none.
    """

    tokenizer: PreTrainedTokenizerBase
    input_mode: InputMode
    input_key: NestedKey
    attention_mask_key: NestedKey | None
    masks_key: NestedKey | None
    generate: bool
    tokenizer_kwargs: Mapping[str, Any]
    chat_template: str | None
    chat_template_name: str | None
    padding_value: int
    prefer_tokens: NestedKey | None = None
    spans: Mapping[str, Span] = field(default_factory=dict)
    action_masks: ActionMaskReader | None = None

    def read(self, tensordict: TensorDictBase) -> list[Row]:
        """Read the prompts, in row-major order of the batch.

        Raises:
            PromptLengthError: no rows, or a row without text. The engine refuses rows without ids.
            MissingKeyError: the input key is not there.
            InputTypeError: the input key holds something that the input mode does not read.
            SpanError: a span has no tokens in a row's prompt, or wants more tokens than there are.
            InputError: a mask of another length, or a span whose tokens cannot be known.
            ConstraintError: an action mask that allows nothing.
        """
        if not is_tensor_collection(tensordict):
            raise InputTypeError(
                f"{tensordict!r:.80} is a {type(tensordict).__name__}; the policy reads a TensorDict, such as ragged(…)"
            )
        rows = [self._read_row(index, row) for index, row in enumerate(_unbind(tensordict))]
        if not rows:
            raise PromptLengthError(
                f"the batch of size {tuple(tensordict.batch_size)} has 0 rows; pass at least 1 prompt"
            )
        return rows

    def _read_row(self, index: int, row: TensorDictBase) -> Row:
        """Read the prompt of one row, a TensorDict without batch dimensions."""
        try:
            value = row.get(self.input_key, None)
        except ValueError as error:  # a tensor where the key's path has a container
            raise InputTypeError(
                f"{self.input_key!r} cannot be read: {error}; input_mode={self.input_mode!r} reads a "
                f"{CONTAINERS[self.input_mode]} there"
            ) from error
        if value is None:
            raise MissingKeyError(
                f"the TensorDict has no {self.input_key!r}, which input_mode={self.input_mode!r} reads; it has "
                f"{keys_of(row)}: add it, or pass input_key"
            )
        if is_non_tensor(value):
            value = value.data
        name = f"row {index}, {self.input_key!r}:"
        if self.input_mode == "history":
            found = self._read_history(name, row, value)
        elif self.input_mode == "text":
            found = self._read_text(name, value)
        else:
            found = self._read_tokens(name, row, value)
        if self.action_masks is not None:
            found = replace(found, action_mask=read_action_mask(index, row, self.action_masks))
        wants_states = read_wants_states(index, row)
        # The engine refuses ids that no tokenizer has.
        readable = found.prompt_ids and all(0 <= token_id < 2**31 for token_id in found.prompt_ids)
        if wants_states is False or not readable:
            return replace(found, wants_states=wants_states)
        spans = {
            key: self._resolve(f"row {index}, span {key!r}:", row, found, span) for key, span in self.spans.items()
        }
        return replace(found, wants_states=wants_states, spans=spans)

    def _read_history(self, name: str, row: TensorDictBase, history: Any) -> Row:
        if not isinstance(history, History):
            raise InputTypeError(
                f"{name} a {type(history).__name__}; history mode reads a History: use ragged(history=…)"
            )
        if history.ndim == 0:
            raise InputTypeError(
                f"{name} one message without a dimension of turns; give History.from_chats([[…]]) one list of messages "
                "per row"
            )
        text = self._render(history, add_generation_prompt=self.generate)
        # The template wrote the special tokens already.
        ids = self._encode(text, add_special_tokens=False)
        if self.generate:
            return Row(self._preferred(row, ids) if self.prefer_tokens else ids, text, history)
        assistant_mask = self._assistant_mask(name, Chat(history, text, self._render), ids)
        return Row(ids, text, history, assistant_mask=assistant_mask)

    def _template(self) -> str | None:
        # Given neither, torchrl guesses a template from the tokenizer's name; the tokenizer's own is no guess.
        if self.chat_template_name is not None:
            return str(CHAT_TEMPLATES[self.chat_template_name])
        if self.chat_template is not None:
            return self.chat_template
        own: str | None = self.tokenizer.chat_template
        return own

    def _render(self, history: History, *, add_generation_prompt: bool | None = None, **options: Any) -> Any:
        return history.apply_chat_template(
            tokenizer=self.tokenizer,
            chat_template=self._template(),
            add_generation_prompt=self.generate if add_generation_prompt is None else add_generation_prompt,
            **options,
        )

    def _assistant_mask(self, name: str, chat: Chat, ids: tuple[int, ...]) -> tuple[bool, ...]:
        """Return which tokens are the assistant's: by ``{% generation %}``, or else the tokens of its messages."""
        mask: list[bool] | None
        if GENERATION.search(str(self._template())):
            mask = self._render(chat.history, return_assistant_tokens_mask=True)["assistant_masks"].bool().tolist()
        else:
            turns = [
                turn for turn, message in enumerate(chat.messages) if message.role == "assistant" and message.content
            ]
            try:
                mask = tokens_at([chat.words_of(turn) for turn in turns], chat.text, ids, self.tokenizer)
            except InputError as error:
                raise InputError(f"{name} {error}, or one that says {{% generation %}}") from error
        if mask is None or len(mask) != len(ids):
            raise InputError(
                f"{name} tokenizer_kwargs={dict(self.tokenizer_kwargs)} change the ids of the chat, so that the "
                "template's assistant mask does not fit them, or this tokenizer does not tell where a token stands in "
                "the text; leave them out to score a chat, and give a fast tokenizer"
            )
        return tuple(mask)

    def _resolve(self, name: str, row: TensorDictBase, found: Row, span: Span) -> ResolvedSpan:
        """Return a span as positions in a prompt, or as it is if it is of the response."""
        ids = found.prompt_ids
        try:
            match span:
                case LastTokens(segment="response") | Between(segment="response"):
                    return span
                case LastTokens():
                    return last_tokens(span, len(ids))
                case Between():
                    decode = functools.partial(decode_all, self.tokenizer)
                    return PromptSpan((find_between(span, ids, decode),))
                case TokenMask():
                    return read_token_mask(row, span, found.placement or (True,) * len(ids))
                case Turn() | Role():
                    chat = Chat(cast("History", found.history), found.prompt_text, self._render)
                    return spoken_tokens(span, chat, ids, self.tokenizer)
        except (SpanError, InputError) as error:
            raise type(error)(f"{name} {error}") from error

    def _preferred(self, row: TensorDictBase, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids at `prefer_tokens` if they stand for the chat, or for its beginning; else ``prompt_ids``.

        The beginning is what torchrl's IncrementalTokenizer leaves after a turn: the prompt, and the response as it was
        sampled, without the generation prompt and the messages that follow; the ids of the rest are then appended. Ids
        with any other text belong to another chat.
        """
        try:
            found = row.get(self.prefer_tokens, None)
        except ValueError as error:  # a tensor where the key's path has a container
            raise InputTypeError(
                f"{self.prefer_tokens!r} cannot be read: {error}; prefer_tokens=True reads a Tokens there"
            ) from error
        if found is None:
            return prompt_ids
        _check_ids(f"{self.prefer_tokens!r}:", found)
        text, ids = self._decode(prompt_ids), tuple(found.tolist())
        for preferred in (ids, _strip(ids, self.padding_value)):
            rest = text[len(self._decode(preferred)) :]
            whole = preferred + self._encode(rest, add_special_tokens=False)
            # Differs for ids of another chat, and where a tokenizer writes a text otherwise than its two halves.
            if self._decode(whole) == text:
                return whole
        return prompt_ids

    def _read_text(self, name: str, text: Any) -> Row:
        if not isinstance(text, str):
            raise InputTypeError(f"{name} a {type(text).__name__}, {text!r:.80}; expected a string: use ragged(text=…)")
        if not text:
            raise PromptLengthError(f"{name} an empty string, 0 tokens; SGLang needs at least 1")
        return Row(self._encode(text), text)

    def _encode(self, text: str, **defaults: Any) -> tuple[int, ...]:
        options = {**defaults, **self.tokenizer_kwargs, "return_attention_mask": True, "return_tensors": None}
        encoded = self.tokenizer(text, **options)
        return tuple(i for i, real in zip(encoded["input_ids"], encoded["attention_mask"], strict=True) if real)

    def _read_tokens(self, name: str, row: TensorDictBase, ids: Any) -> Row:
        _check_ids(name, ids)
        real = assistant_mask = None
        if not self.generate and self.masks_key is not None:
            # Read before the user's own mask, which may cover the prompt alone.
            real = self._read_mask(name, row, ids, unravel_key((self.masks_key, "all_attention_mask")))
            assistant_mask = self._read_mask(name, row, ids, unravel_key((self.masks_key, "all_assistant_mask")))
        if real is None and self.attention_mask_key is not None:
            real = self._read_mask(name, row, ids, self.attention_mask_key)
        if real is None:
            real = self._guess_padding(name, row, ids)
        prompt_ids = tuple(ids[real].tolist())
        return Row(
            prompt_ids,
            self._decode(prompt_ids),
            assistant_mask=None if assistant_mask is None else tuple(assistant_mask[real].tolist()),
            placement=tuple(real.tolist()),
        )

    def _read_mask(self, name: str, row: TensorDictBase, ids: torch.Tensor, key: NestedKey) -> torch.Tensor | None:
        try:
            mask = row.get(key, None)
        except ValueError as error:  # a tensor where the key's path has a container
            raise InputTypeError(f"{key!r} cannot be read: {error}; tokens mode reads a mask there") from error
        if mask is not None and mask.shape != ids.shape:
            raise InputError(
                f"{name} of shape {tuple(ids.shape)}, and {key!r} of {tuple(mask.shape)}; give both the same"
            )
        return None if mask is None else mask.bool()

    def _guess_padding(self, name: str, row: TensorDictBase, ids: torch.Tensor) -> torch.Tensor:
        """Return which ids are real without a mask: all but the left padding of a ``Tokens`` that says it is padded."""
        if self.generate and self.masks_key is not None:
            # torchrl's ChatEnv makes a padded ``full`` the next prompt, and forgets that it is padded. The mask of that
            # turn is still there; it is this prompt's where it leaves out pads, and nothing else.
            previous = row.get(unravel_key((self.masks_key, "all_attention_mask")), None)
            if previous is not None and previous.shape == ids.shape:
                mask: torch.Tensor = previous.bool()
                if not mask.all() and bool((ids[~mask] == self.padding_value).all()):
                    return mask
        if not self._is_padded(row):
            return torch.ones_like(ids, dtype=torch.bool)
        if not self.generate and len(ids) and ids[-1] == self.padding_value:
            raise InputError(
                f"{name} is padded and ends with the pad id {self.padding_value}, which may be padding or a token that "
                f"was sampled; give the mask, at {self.attention_mask_key!r} or in {self.masks_key!r}"
            )
        return (ids != self.padding_value).cumsum(0).bool()

    def _is_padded(self, row: TensorDictBase) -> bool:
        """Whether the ids come from a ``Tokens`` that says it is padded."""
        parent = row.get(self.input_key[:-1], None) if isinstance(self.input_key, tuple) else None
        return getattr(parent, "padded", None) is True

    def _decode(self, prompt_ids: tuple[int, ...]) -> str:
        """Return the text of the ids; an empty one for unknown ids, which the engine's check reports by row."""
        if any(not 0 <= i < len(self.tokenizer) for i in prompt_ids):
            return ""
        return str(self.tokenizer.decode(prompt_ids))


def _check_ids(name: str, ids: Any) -> None:
    if not isinstance(ids, torch.Tensor) or ids.ndim != 1:
        shape = f" of shape {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else ""
        raise InputTypeError(f"{name} a {type(ids).__name__}{shape}; expected ids [P] per row: use ragged(tokens=…)")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputTypeError(f"{name} of dtype {ids.dtype}; token ids are integers, such as torch.int64")


def _strip(ids: tuple[int, ...], pad_id: int) -> tuple[int, ...]:
    """Return the ids without the pads at both ends."""
    real = [index for index, token_id in enumerate(ids) if token_id != pad_id]
    return ids[real[0] : real[-1] + 1] if real else ()


def _unbind(tensordict: TensorDictBase) -> Iterator[TensorDictBase]:
    """Yield the rows in row-major order, without a reshape, which ragged and lazy leaves do not have."""
    if tensordict.ndim == 0:
        yield tensordict
    elif isinstance(tensordict, LazyStackedTensorDict) and not tensordict.tensordicts:
        return
    else:
        for part in tensordict.unbind(0):
            yield from _unbind(part)
