"""Finding things in a prompt: a message's words in the chat's text, and spans in the prompt's tokens.

Knows nothing of TensorDict keys or engines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from tensordict import lazy_stack
from torchrl.data.llm import History
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden.errors import InputError, SpanError
from torchrl_sglang_hidden.spec.spans import LastTokens, PromptSpan, Role, Turn, intervals_of, tokens_around

__all__ = ["Chat", "decode_all", "last_tokens", "spoken_tokens", "tokens_at"]

NO_MESSAGE = "<none>"  # the role of what fills a chat up to the length of others; torchrl does not render it


def decode_all(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the exact text of ids: with special tokens, and with every space."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Chat:
    """A chat and its text.

    Args:
        history: ``[turns]``.
        text: what the template writes for it.
        render: renders another chat in the same way; the keyword ``add_generation_prompt`` overrides the default.
    """

    history: History
    text: str
    render: Callable[..., str]

    @functools.cached_property
    def messages(self) -> list[History]:
        """Its messages, in order."""
        return [message for message in self.history.unbind(-1) if message.role != NO_MESSAGE]

    def words_of(self, turn: int) -> tuple[int, int]:
        """Return where the words of a message stand in the text, ``(start, stop)``. The message must have words.

        The chat is rendered a second time with a number in the place of the words, so that neither the template's own
        text nor another message with the same words is mistaken for them. The template may strip the words.

        Raises:
            InputError: the template changes the words in any other way.
        """
        messages = self.messages
        content = messages[turn].content
        if not isinstance(content, str):
            raise InputError(
                f"message {turn} is a {type(content).__name__}, and only a text's tokens can be found; give a "
                "chat_template that writes its words as they are"
            )
        mark = next(number for number in map(str, count(10**15)) if number not in self.text)
        changed = messages[turn].clone()
        changed.content = mark
        marked = self.render(lazy_stack([*messages[:turn], changed, *messages[turn + 1 :]]))
        before, found, after = marked.partition(mark)
        start, stop = len(before), len(self.text) - len(after)
        framed = found and start <= stop and self.text.startswith(before) and self.text.endswith(after)
        if framed and self.text[start:stop].strip() == content.strip():
            return start, stop
        if messages[turn].role == "assistant":
            # A template that looks into the answer, for its thoughts, writes another frame around the number.
            start = self.text.find(content, self._same_before(messages[:turn]))
            if start >= 0:
                return start, start + len(content)
        raise InputError(
            f"the chat template rewrites the {messages[turn].role}'s message {turn}, so its tokens are not known; give "
            "a chat_template that writes its words as they are"
        )

    def _same_before(self, messages: list[History]) -> int:
        """Return how much of the text the previous messages and the header of the next response make up."""
        before = self.render(lazy_stack(messages), add_generation_prompt=True) if messages else ""
        return next((i for i, (a, b) in enumerate(zip(before, self.text, strict=False)) if a != b), len(before))


def tokens_at(
    ranges: Sequence[tuple[int, int]], text: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[bool] | None:
    """Return a mask of the ids that hold any part of some ranges of the text.

    Args:
        ranges: half-open ranges of characters, none of them empty.
        text: what the ids stand for.
        ids: token ids.
        tokenizer: the tokenizer of the ids.

    Returns:
        One bool for each id: by the tokenizer's offsets if they are its own ids of the text, else by decoding. None if
        the ids do not decode to the text.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    if "offset_mapping" in encoded and list(encoded["input_ids"]) == list(ids):
        offsets = encoded["offset_mapping"]
        return [any(start < until and end > since for since, until in ranges) for start, end in offsets]
    if decode_all(tokenizer, ids) != text:
        return None
    mask = [False] * len(ids)
    decode = functools.partial(decode_all, tokenizer)
    around = tokens_around([edge for pair in ranges for edge in pair], text, ids, decode)
    for (first, _), (_, stop) in zip(around[::2], around[1::2], strict=True):
        mask[first:stop] = [True] * (stop - first)
    return mask


def spoken_tokens(span: Turn | Role, chat: Chat, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> PromptSpan:
    """Find the tokens of the words of one message, or of all messages of one role.

    Raises:
        SpanError: the chat has no such message, or the message has no words.
        InputError: the tokens of the words cannot be known.
    """
    messages = chat.messages
    roles = [message.role for message in messages]
    if isinstance(span, Turn):
        if not -len(roles) <= span.index < len(roles):
            raise SpanError(f"{span}: the chat has {len(roles)} messages, of {roles}; name one of those")
        turns = [span.index % len(roles)]
    else:
        turns = [turn for turn, role in enumerate(roles) if role == span.name]
        if not turns:
            raise SpanError(f"{span}: the chat has no message of this role; name one of {roles}")
    found = [chat.words_of(turn) for turn in turns if messages[turn].content]
    ranges = [(since, until) for since, until in found if since < until]
    if not ranges:
        raise SpanError(f"{span}: the chat's messages {turns} are empty, and an empty span has no state; name others")
    mask = tokens_at(ranges, chat.text, ids, tokenizer)
    if mask is None:
        raise InputError(
            f"{span}: the {len(ids)} ids do not decode to the chat's text, so where a message stands in them is not "
            "known; leave prefer_tokens and tokenizer_kwargs out, or give a fast tokenizer"
        )
    return intervals_of(mask)


def last_tokens(span: LastTokens, num_prompt: int) -> PromptSpan:
    """Find the last tokens of a prompt.

    Raises:
        SpanError: the prompt has fewer tokens, and the span does not allow fewer.
    """
    if span.count > num_prompt and not span.allow_fewer:
        raise SpanError(f"{span}: the prompt has {num_prompt} tokens; lower the count, or pass allow_fewer=True")
    return PromptSpan(((max(num_prompt - span.count, 0), num_prompt),))
