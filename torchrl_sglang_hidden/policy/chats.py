"""Reading a row in history mode: a chat to the text of its template, to token ids, and to the assistant's tokens.

Knows nothing of engines, nor of the other input modes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase
from torchrl.data.llm import History

from torchrl_sglang_hidden.errors import InputError, InputTypeError, PromptLengthError
from torchrl_sglang_hidden.images.expansion import ImageProcessor, RowImages
from torchrl_sglang_hidden.images.image_data import ImageData
from torchrl_sglang_hidden.images.messages import take_images
from torchrl_sglang_hidden.policy.chat_template import ChatTemplate, messages_of
from torchrl_sglang_hidden.policy.chat_text import Chat, assistant_tokens
from torchrl_sglang_hidden.policy.row_fields import read_template_variables
from torchrl_sglang_hidden.policy.sampled_turns import SampledTurns, TurnsPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatReader", "ChatRow"]


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A chat that was read.

    Args:
        ids: its token ids, with one placeholder for each image.
        chat: its messages, and the text that the ids stand for.
        assistant_mask: of a scored chat, which of the ids are the assistant's.
        turns: of a prompt, what is known of its earlier turns; None where nothing is to be known.
        images: its images, or None.
    """

    ids: tuple[int, ...]
    chat: Chat
    assistant_mask: tuple[bool, ...] | None = None
    turns: TurnsPrompt | None = None
    images: RowImages | None = None


@dataclass(frozen=True, slots=True)
class ChatReader:
    """Reads the chats of one call.

    Args:
        tokenizer: the policy's.
        processor: says which ids an image becomes.
        make_template: makes the template for a row's variables.
        variables: the template's, of the policy and the call.
        generate: True reads prompts, and ends them with a generation prompt; False reads chats to score.
        encode: turns a text into ids, without special tokens beside those of the text.
        tokenizer_kwargs: the policy's, for an error that names them.
        turns: puts the ids of earlier turns into prompts; None for a policy that does not ask for it.
        mark_end_of_turn: whether the token that ends an answer is one of the assistant's.
        encode_chat: returns the ids of a chat whose messages have special tokens' texts in them; None for another chat.
    """

    tokenizer: PreTrainedTokenizerBase
    processor: ImageProcessor
    make_template: Callable[[Mapping[str, Any]], ChatTemplate]
    variables: Mapping[str, Any]
    generate: bool
    encode: Callable[[str], tuple[int, ...]]
    tokenizer_kwargs: Mapping[str, Any]
    turns: SampledTurns | None = None
    mark_end_of_turn: bool = False
    encode_chat: Callable[[Chat], tuple[int, ...] | None] | None = None

    def check_template(self, row: TensorDictBase) -> None:
        """Check what the template of a row has in common with those of all rows: the row says nothing of its own.

        Raises:
            ChatTemplateError: there is no template, or it can write no chat.
        """
        if not read_template_variables(row):
            self.make_template(self.variables)

    def read(self, name: str, row: TensorDictBase, history: Any, given: Sequence[ImageData] = ()) -> ChatRow:
        """Read one chat.

        Args:
            name: of the row and its key, for errors.
            row: the row, for its template variables.
            history: what stands under the row's key.
            given: the row's images, for parts of the chat that have none of their own.

        Raises:
            InputTypeError: no ``History`` of shape ``[turns]``, or template variables that are no dict.
            PromptLengthError: a chat without messages.
            ChatTemplateError: the template cannot write the chat.
            ImageError: an image that cannot be read, or has no place.
            CapabilityError: an image, and the engine's model takes none.
            InputError: assistant's tokens that cannot be known.
        """
        if not isinstance(history, History):
            raise InputTypeError(f"{name} a {type(history).__name__}; Expected History object: use ragged(history=…)")
        if history.ndim == 0:
            raise InputTypeError(
                f"{name} one message without a dimension of turns; give History.from_chats([[…]]) one list of messages "
                "per row"
            )
        messages, found_images = take_images(name, messages_of(history), given)
        if not messages:
            raise PromptLengthError(f"{name} 0 messages; give at least 1")
        images = self.processor.row_images(name, found_images)
        try:
            template = self.make_template({**self.variables, **read_template_variables(row)})
            rendered = template.render(messages, add_generation_prompt=self.generate)
            # The template wrote the special tokens already.
            chat = Chat(messages, rendered.text, template, self.generate)
            ids = (None if self.encode_chat is None else self.encode_chat(chat)) or self.encode(rendered.text)
            if self.generate and self.turns is not None:
                found = self.turns.follow(row, chat, ids, images)
                return ChatRow(found.ids, replace(chat, text=found.text), turns=found, images=images)
            if self.generate:
                return ChatRow(ids, chat, images=images)
            mask = assistant_tokens(chat, rendered.generated, ids, self.tokenizer, ends=self.mark_end_of_turn)
        except InputError as error:
            raise type(error)(f"{name} {error}") from error
        if mask is None:
            raise InputError(
                f"{name} tokenizer_kwargs={dict(self.tokenizer_kwargs)} change the ids of the chat, so that the "
                "template's assistant mask does not fit them, or this tokenizer does not tell where a token stands in "
                "the text; leave them out to score a chat, and give a fast tokenizer"
            )
        return ChatRow(ids, chat, tuple(mask), images=images)
