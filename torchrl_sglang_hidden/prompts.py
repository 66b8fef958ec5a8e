"""Reading prompts: rows of a TensorDict to token ids, in history, text and tokens mode.

Knows nothing of engines. What is read here is what the engine gets, and what ``tokens.prompt`` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase, is_non_tensor, is_tensor_collection
from tensordict.utils import NestedKey
from torchrl.data.llm import History
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden.errors import InputError, InputTypeError, MissingKeyError, PromptLengthError

__all__ = ["INPUT_MODES", "InputMode", "PromptReader", "Row"]

InputMode = Literal["history", "text", "tokens"]
INPUT_MODES: tuple[InputMode, ...] = get_args(InputMode)
CONTAINERS = {"history": "ChatHistory", "text": "Text", "tokens": "Tokens"}


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt as the user gave it, beside the ids made of it.

    Args:
        prompt_ids: P ids.
        prompt_text: the text that the ids stand for.
        history: the chat that the text was made of, ``[turns]``, in history mode.
    """

    prompt_ids: tuple[int, ...]
    prompt_text: str
    history: History | None = None


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Reads the prompts of a TensorDict; the arguments are those of `SGLangHiddenWrapper`.

    Args:
        padding_value: the id that pads a ``Tokens`` that says it is padded.
    """

    tokenizer: PreTrainedTokenizerBase
    input_mode: InputMode
    input_key: NestedKey
    attention_mask_key: NestedKey
    tokenizer_kwargs: Mapping[str, Any]
    chat_template: str | None
    chat_template_name: str | None
    padding_value: int

    def read(self, tensordict: TensorDictBase) -> list[Row]:
        """The prompts in row-major order of the batch.

        Raises:
            PromptLengthError: no rows, or a row without text. Rows without ids are the engine's to refuse.
            MissingKeyError: the input key is not there.
            InputTypeError: what is there is not what the input mode reads.
        """
        if not is_tensor_collection(tensordict):
            raise InputTypeError(f"{tensordict!r:.80} is a {type(tensordict).__name__}; the policy reads a TensorDict")
        rows = [self._read_row(index, row) for index, row in enumerate(_unbind(tensordict))]
        if not rows:
            raise PromptLengthError(
                f"the batch of size {tuple(tensordict.batch_size)} has 0 rows; pass at least 1 prompt"
            )
        return rows

    def _read_row(self, index: int, row: TensorDictBase) -> Row:
        """The prompt of one row, a TensorDict without batch dimensions."""
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
                f"{sorted(map(str, row.keys(True, True)))}"
            )
        if is_non_tensor(value):
            value = value.data
        name = f"row {index}, {self.input_key!r}:"
        if self.input_mode == "history":
            return self._read_history(name, value)
        if self.input_mode == "text":
            return self._read_text(name, value)
        return self._read_tokens(name, row, value)

    def _read_history(self, name: str, history: Any) -> Row:
        if not isinstance(history, History):
            raise InputTypeError(f"{name} a {type(history).__name__}; history mode reads a torchrl.data.llm.History")
        if history.ndim == 0:
            raise InputTypeError(
                f"{name} one message without a dimension of turns; give History.from_chats([[…]]) one list of messages "
                "per row"
            )
        # Given neither, torchrl guesses a template from the tokenizer's name; the tokenizer's own is no guess.
        template = self.chat_template
        if template is None and self.chat_template_name is None:
            template = self.tokenizer.chat_template
        text = history.apply_chat_template(
            tokenizer=self.tokenizer,
            add_generation_prompt=True,
            chat_template=template,
            chat_template_name=self.chat_template_name,
            tokenize=False,
        )
        # The template wrote the special tokens already.
        return Row(self._encode(text, add_special_tokens=False), text, history)

    def _read_text(self, name: str, text: Any) -> Row:
        if not isinstance(text, str):
            raise InputTypeError(f"{name} a {type(text).__name__}, {text!r:.80}; text mode reads one string per row")
        if not text:
            raise PromptLengthError(f"{name} an empty string, 0 tokens; SGLang needs at least 1")
        return Row(self._encode(text), text)

    def _encode(self, text: str, **defaults: Any) -> tuple[int, ...]:
        options = {**defaults, **self.tokenizer_kwargs, "return_attention_mask": True, "return_tensors": None}
        encoded = self.tokenizer(text, **options)
        return tuple(i for i, real in zip(encoded["input_ids"], encoded["attention_mask"], strict=True) if real)

    def _read_tokens(self, name: str, row: TensorDictBase, ids: Any) -> Row:
        if not isinstance(ids, torch.Tensor) or ids.ndim != 1:
            shape = f" of shape {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else ""
            raise InputTypeError(
                f"{name} a {type(ids).__name__}{shape}; tokens mode reads one tensor of ids per row, [P]"
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InputTypeError(f"{name} of dtype {ids.dtype}; token ids are integers, such as torch.int64")
        mask = row.get(self.attention_mask_key, None)
        if mask is not None:
            if mask.shape != ids.shape:
                raise InputError(
                    f"{name} of shape {tuple(ids.shape)}, and {self.attention_mask_key!r} of {tuple(mask.shape)}; give "
                    "both the same"
                )
            ids = ids[mask.bool()]
        elif self._is_padded(row):
            real = (ids != self.padding_value).cumsum(0).bool()
            ids = ids[real]
        prompt_ids = tuple(ids.tolist())
        return Row(prompt_ids, self._decode(prompt_ids))

    def _is_padded(self, row: TensorDictBase) -> bool:
        """Whether the ids come from a ``Tokens`` that says it is padded."""
        parent = row.get(self.input_key[:-1], None) if isinstance(self.input_key, tuple) else None
        return getattr(parent, "padded", None) is True

    def _decode(self, prompt_ids: tuple[int, ...]) -> str:
        """The text of the ids; of unknown ids too, which the engine's check names with their row."""
        if any(not 0 <= i < len(self.tokenizer) for i in prompt_ids):
            return ""
        return str(self.tokenizer.decode(prompt_ids))


def _unbind(tensordict: TensorDictBase) -> Iterator[TensorDictBase]:
    """The rows in row-major order, without reshaping: ragged and lazy leaves have no reshape."""
    if tensordict.ndim == 0:
        yield tensordict
    elif isinstance(tensordict, LazyStackedTensorDict) and not tensordict.tensordicts:
        return
    else:
        for part in tensordict.unbind(0):
            yield from _unbind(part)
