"""Reading prompts: rows of a TensorDict to token ids, in history, text and tokens mode.

Knows nothing of engines. The ids that are read here are the ids that the engine gets, and those in ``tokens.prompt``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, get_args

from tensordict import TensorDictBase, is_non_tensor, is_tensor_collection
from tensordict.utils import NestedKey

from torchrl_sglang_hidden.errors import (
    ChatTemplateError,
    ConstraintError,
    ImageError,
    InputTypeError,
    MissingKeyError,
    PromptLengthError,
    SpanError,
)
from torchrl_sglang_hidden.images.expansion import NO_IMAGES, ImageProcessor, RowImages
from torchrl_sglang_hidden.policy.action_masks import ActionMaskReader
from torchrl_sglang_hidden.policy.chat_template import ChatTemplate, select_template
from torchrl_sglang_hidden.policy.chats import ChatReader
from torchrl_sglang_hidden.policy.images import read_images
from torchrl_sglang_hidden.policy.literal_content import encode_chat
from torchrl_sglang_hidden.policy.prompt_spans import resolve_span
from torchrl_sglang_hidden.policy.row_fields import keys_of, read_action_mask, read_wants_states
from torchrl_sglang_hidden.policy.rows import Row, expand_row, unbind_rows
from torchrl_sglang_hidden.policy.sampled_turns import ChatMode, SampledTurns
from torchrl_sglang_hidden.policy.text_rows import TextReader
from torchrl_sglang_hidden.policy.token_rows import TokenReader, warn_of_pads
from torchrl_sglang_hidden.policy.tokenizer import OwnTokenizer
from torchrl_sglang_hidden.sglang_api.prompt_text import check_no_placeholder
from torchrl_sglang_hidden.spec.spans import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["INPUT_MODES", "InputMode", "PromptReader"]

InputMode = Literal["history", "text", "tokens"]
INPUT_MODES: tuple[InputMode, ...] = get_args(InputMode)
CONTAINERS = {"history": "ChatHistory", "text": "Text", "tokens": "Tokens"}


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Reads the prompts of a TensorDict. Arguments that are not described here are those of `PolicyConfig`.

    Args:
        own: the policy's copies of its tokenizer.
        generate: True reads prompts, False whole sequences to score.
        padding_value: the id that pads a ``Tokens`` that says it is padded.
        said: what the policy has warned of.
        spans: the spans to find in each prompt. Spans of a response stay as they are.
        head_spans: those whose scores are wanted, which are found also where a row wants no states.
        action_masks: reads each row's action mask; None reads none.
        processor: says which ids an image becomes.
        keeps_errors: whether an error of one row is kept in `Row.error`, and not raised.
    """

    own: OwnTokenizer
    input_mode: InputMode
    input_key: NestedKey
    attention_mask_key: NestedKey | None
    tokens_key: NestedKey | None
    masks_key: NestedKey | None
    generate: bool
    tokenizer_kwargs: Mapping[str, Any]
    chat_template: str | None
    chat_template_name: str | None
    chat_template_kwargs: Mapping[str, Any]
    padding_value: int
    log_probs_key: NestedKey | None = None
    prefer_tokens: bool | Literal["strict"] = False
    chat: ChatMode = "render"
    literal_content: bool = False
    mark_end_of_turn: bool = False
    said: set[str] = field(default_factory=set)
    spans: Mapping[str, Span] = field(default_factory=dict)
    head_spans: Mapping[str, Span] = field(default_factory=dict)
    action_masks: ActionMaskReader | None = None
    images_key: NestedKey | None = None
    processor: ImageProcessor = NO_IMAGES
    keeps_errors: bool = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's own tokenizer, which is called without truncation and padding."""
        return self.own.plain

    def read(self, tensordict: TensorDictBase) -> list[Row]:
        """Read the prompts, in row-major order of the batch.

        Raises:
            PromptLengthError: no rows, or a row without text. The engine refuses rows without ids.
            MissingKeyError: the input key is not there.
            InputTypeError: the input key holds something that the input mode does not read.
            SpanError: a span has no tokens in a row's prompt, or wants more tokens than there are.
            ImageError: an image that cannot be read, or an image and its placeholder without each other.
            CapabilityError: an image, and the engine's model takes none.
            InputError: a mask of another length, or a span whose tokens cannot be known.
            ConstraintError: an action mask that allows nothing.
        """
        if not is_tensor_collection(tensordict):
            raise InputTypeError(
                f"{tensordict!r:.80} is a {type(tensordict).__name__}; the policy reads a TensorDict, such as ragged(…)"
            )
        chats = self.make_chats() if self.input_mode == "history" else None
        read = self._read_or_keep if self.keeps_errors else self._read_row
        rows = [read(index, row, chats) for index, row in enumerate(unbind_rows(tensordict))]
        if not rows:
            raise PromptLengthError(
                f"the batch of size {tuple(tensordict.batch_size)} has 0 rows; pass at least 1 prompt"
            )
        if self.input_mode == "tokens" and all(row.placement is None for row in rows):
            special = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            warn_of_pads([row.prompt_ids for row in rows], self.padding_value, *special)
        return rows

    def _read_row(self, index: int, row: TensorDictBase, chats: ChatReader | None) -> Row:
        """Read one row, a TensorDict without batch dimensions."""
        return self.read_fields(index, row, self.read_prompt(index, row, chats))

    def _read_or_keep(self, index: int, row: TensorDictBase, chats: ChatReader | None) -> Row:
        """Read one row; what is wrong with it alone goes into `Row.error`, and what is with all rows is raised."""
        try:
            found = self.read_prompt(index, row, chats)
        except (ChatTemplateError, ImageError, PromptLengthError) as error:
            if chats is not None:
                chats.check_template(row)
            return Row((), "", row.get(self.input_key) if chats is not None else None, error=error)
        try:
            return self.read_fields(index, row, found)
        except (SpanError, ConstraintError) as error:
            return replace(found, error=error)

    def read_prompt(self, index: int, row: TensorDictBase, chats: ChatReader | None) -> Row:
        """Read the prompt of one row; ``chats`` is what `make_chats` returned, in history mode."""
        try:
            # No default, here as elsewhere: TensorDict 0.15 would return it where a tensor stands in the key's path.
            value = row.get(self.input_key)
        except ValueError as error:  # a tensor where the key's path has a container
            raise InputTypeError(
                f"{self.input_key!r} cannot be read: {error}; input_mode={self.input_mode!r} reads a "
                f"{CONTAINERS[self.input_mode]} there"
            ) from error
        if value is None:
            raise MissingKeyError(
                f"Expected {self.input_key!r} key for input_mode={self.input_mode!r}: the TensorDict has no "
                f"{self.input_key!r}; it has {keys_of(row)}: add it, or pass input_key"
            )
        if is_non_tensor(value):
            value = value.data
        name = f"row {index}, {self.input_key!r}:"
        given = read_images(f"row {index},", row, self.images_key)
        if chats is not None:
            read = chats.read(name, row, value, given)
            if read.turns is not None and read.turns.parted:
                self._say_where_parted(index, read.turns.parted)
            if read.turns is not None and read.turns.outdated and "outdated" not in self.said:
                self.said.add("outdated")
                warnings.warn(
                    f"row {index}: chat='append' keeps the beginning of a chat as it was sent, and the chat template "
                    f"writes it otherwise now: {read.turns.outdated}. Variables of the template that change, such as "
                    "tools, need a new chat, or chat='render'; this is said once",
                    stacklevel=5,
                )
            found = Row(
                read.ids,
                read.chat.text,
                value,
                read.chat,
                read.turns,
                assistant_mask=read.assistant_mask,
                images=read.images,
            )
        elif self.input_mode == "text":
            found = self._read_text(name, row, value, self.processor.row_images(name, given))
        else:
            found = self._read_tokens(name, row, value, self.processor.row_images(name, given))
        if found.images is not None:
            self.processor.check_sent(name, found.prompt_ids)
        return expand_row(name, found)

    def read_fields(self, index: int, row: TensorDictBase, found: Row) -> Row:
        """Add what a row says beside its prompt, and the spans of the prompt."""
        if self.action_masks is not None:
            found = replace(found, action_mask=read_action_mask(index, row, self.action_masks))
        wants_states = read_wants_states(index, row)
        # The engine refuses ids that no tokenizer has.
        readable = found.prompt_ids and min(found.prompt_ids) >= 0 and max(found.prompt_ids) < 2**31
        if not readable:
            return replace(found, wants_states=wants_states)
        spans, head_spans = (
            {
                key: resolve_span(f"row {index}, span {key!r}:", row, found, span, self.tokenizer)
                for key, span in wanted.items()
            }
            for wanted in ({} if wants_states is False else self.spans, self.head_spans)
        )
        return replace(found, wants_states=wants_states, spans=spans, head_spans=head_spans)

    def _say_where_parted(self, index: int, parted: str) -> None:
        """Raise or warn, once for a policy, where ids of earlier turns are at hand and not in a prompt."""
        if self.prefer_tokens == "strict":
            raise ChatTemplateError(
                f"row {index}, prefer_tokens='strict': the ids of the turns before cannot be kept: {parted}; use "
                "chat='append', or a chat_template that writes answers as they were sampled"
            )
        if "parted" not in self.said:
            self.said.add("parted")
            warnings.warn(
                f"row {index}: the ids of the turns before are not those of its prompt: {parted}. chat='append' keeps "
                "sampled ids whatever the template writes, prefer_tokens='strict' raises; this is said once",
                stacklevel=6,
            )

    def make_chats(self) -> ChatReader:
        """Return the reader of the chats of one call, whose templates have one clock."""
        chat_template = self.chat_template
        if chat_template is None and self.chat_template_name is None:
            chat_template = self.processor.own_template(self.tokenizer)
        choice = functools.partial(select_template, self.tokenizer, chat_template, self.chat_template_name)
        # The template wrote the special tokens already.
        encode = functools.partial(self._encode, add_special_tokens=False)
        now = datetime.now()

        def make_template(variables: Mapping[str, Any]) -> ChatTemplate:
            return ChatTemplate(self.tokenizer, choice(tools=bool(variables.get("tools"))), variables, now)

        return ChatReader(
            tokenizer=self.tokenizer,
            processor=self.processor,
            make_template=make_template,
            variables=self.chat_template_kwargs,
            generate=self.generate,
            encode=encode,
            tokenizer_kwargs=self.tokenizer_kwargs,
            turns=self._make_turns(encode),
            mark_end_of_turn=self.mark_end_of_turn,
            encode_chat=functools.partial(encode_chat, own=self.own) if self.literal_content else None,
        )

    def _make_turns(self, encode: Callable[[str], tuple[int, ...]]) -> SampledTurns | None:
        if not self.generate or self.tokens_key is None or not (self.prefer_tokens or self.chat == "append"):
            return None
        return SampledTurns(
            tokenizer=self.tokenizer,
            encode=encode,
            chat=self.chat,
            tokens_key=self.tokens_key,
            masks_key=self.masks_key,
            log_probs_key=self.log_probs_key,
            padding_value=self.padding_value,
        )

    def _read_text(self, name: str, row: TensorDictBase, text: Any, images: RowImages | None) -> Row:
        reader = TextReader(self.own, self.input_key, self.tokens_key, self.masks_key, self.generate)
        found = reader.read(name, row, text, images)
        if self.generate:
            # Placeholders of images are counted when they are expanded.
            check_no_placeholder(name, found.text, self.tokenizer, beside_images=images is not None)
        return Row(found.ids, found.text, images=images)

    def _encode(self, text: str, **defaults: Any) -> tuple[int, ...]:
        return self.own.encode(text, **defaults).ids

    def _read_tokens(self, name: str, row: TensorDictBase, ids: Any, images: RowImages | None) -> Row:
        reader = TokenReader(self.input_key, self.attention_mask_key, self.masks_key, self.generate, self.padding_value)
        found = reader.read(name, row, ids)
        ids, mask, placement = found.ids, found.assistant_mask, found.placement
        short_placement: tuple[bool, ...] | None = None
        if images is not None:
            kept = images.kept_in_short(name, found.ids)
            ids = tuple(found.ids[i] for i in kept)
            mask = None if mask is None else tuple(mask[i] for i in kept)
            if len(images.expand(ids)[0]) != len(found.ids):
                placement, short_placement = None, placement or (True,) * len(ids)
        return Row(
            ids,
            self._decode(ids),
            assistant_mask=mask,
            placement=placement,
            short_placement=short_placement,
            images=images,
        )

    def _decode(self, prompt_ids: tuple[int, ...]) -> str:
        """Return the text of the ids; an empty one for unknown ids, which the engine's check reports by row."""
        if not prompt_ids or min(prompt_ids) < 0 or max(prompt_ids) >= len(self.tokenizer):
            return ""
        return str(self.tokenizer.decode(prompt_ids))
