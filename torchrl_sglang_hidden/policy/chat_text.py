"""Finding things in a prompt: a message's words in the chat's text, and spans in the prompt's tokens.

Knows nothing of TensorDict keys or engines.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torchrl_sglang_hidden.errors import ChatTemplateError, InputError, SpanError
from torchrl_sglang_hidden.policy.chat_template import ChatTemplate, Message, goes_on, unused_number
from torchrl_sglang_hidden.spec.span_search import tokens_around
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan, Role, Turn, intervals_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chat", "assistant_tokens", "decode_all", "last_tokens", "opened_by", "spoken_tokens", "tokens_at"]


def decode_all(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the exact text of ids: with special tokens, and with every space."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Chat:
    """A chat and its text.

    Args:
        messages: its messages, in order.
        text: what the template writes for them.
        template: renders another chat in the same way.
        add_generation_prompt: whether the text ends with one.
    """

    messages: Sequence[Message]
    text: str
    template: ChatTemplate
    add_generation_prompt: bool

    def words_of(self, turn: int) -> tuple[int, int]:
        """Return where the words of a message stand in the text, ``(start, stop)``. The message must have words.

        The chat is rendered a second time with a number in the place of the words, so that neither the template's own
        text nor another message with the same words is mistaken for them. The template may strip the words.

        Raises:
            InputError: the template changes the words in any other way.
        """
        message = self.messages[turn]
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str):
            raise InputError(
                f"message {turn} is a {type(content).__name__}, and only a text's tokens can be found; give a "
                "chat_template that writes its words as they are"
            )
        mark = unused_number(self.text)
        marked = self._render([*self.messages[:turn], {**message, "content": mark}, *self.messages[turn + 1 :]])
        before, found, after = marked.partition(mark)
        start, stop = len(before), len(self.text) - len(after)
        ends = found and self.text.endswith(after)
        framed = ends and start <= stop and self.text.startswith(before)
        if framed and self.text[start:stop].strip() == content.strip():
            return start, stop
        # A template that looks into the answer, for its thoughts, writes another frame around the number. Its end is
        # the same: the words may stand elsewhere too, in that frame or in another message.
        if role == "assistant" and ends and self.text[:stop].endswith(content):
            start = stop - len(content)
            if start >= self._same_before(self.messages[:turn]):
                return start, stop
        raise InputError(
            f"the chat template rewrites the {role}'s message {turn}, so its tokens are not known; give a "
            "chat_template that writes its words as they are"
        )

    def ranges_of(self, turn: int) -> list[tuple[int, int]]:
        """Return where the words of a message stand in the text: of one with parts, those of each part of text.

        Raises:
            InputError: the template changes the words.
        """
        message = self.messages[turn]
        content = message.get("content")
        if not isinstance(content, list):
            return [self.words_of(turn)]
        ranges = []
        for index, part in enumerate(content):
            words = part.get("text")
            if not words:
                continue
            mark = unused_number(self.text)
            parts = [*content[:index], {**part, "text": mark}, *content[index + 1 :]]
            marked = self._render([*self.messages[:turn], {**message, "content": parts}, *self.messages[turn + 1 :]])
            before, found, after = marked.partition(mark)
            start, stop = len(before), len(self.text) - len(after)
            same = found and self.text.startswith(before) and self.text.endswith(after)
            if not same or self.text[start:stop].strip() != words.strip():
                raise InputError(
                    f"the chat template rewrites the {message.get('role')}'s message {turn}, part {index}, so its "
                    "tokens are not known; give a chat_template that writes its words as they are"
                )
            ranges.append((start, stop))
        return ranges

    def check_generated(self) -> None:
        """Refuse ranges of ``{% generation %}`` that stand elsewhere than the assistant's words.

        Hugging Face counts the characters that were written before the tag. Inside of a ``{% set %}`` or
        ``{% filter %}`` block the text may come to stand elsewhere.

        Raises:
            ChatTemplateError: none of the ranges has any of the words.
        """
        mark = unused_number(f"{self.messages}{self.text}")
        marked = [
            {**message, "content": mark}
            if message.get("role") == "assistant" and isinstance(message.get("content"), str)
            else message
            for message in self.messages
        ]
        try:
            rendered = self.template.render(marked, add_generation_prompt=self.add_generation_prompt)
        except ChatTemplateError:
            return  # a template that takes answers of one form alone
        ranges = rendered.generated or ()
        if mark in rendered.text and not any(mark in rendered.text[start:end] for start, end in ranges):
            raise ChatTemplateError(
                "the chat template has {% generation %} where its place in the text is not known, such as inside of "
                "{% set %} or {% filter %}; move the tag out of that block, or leave it out"
            )

    def before(self, turn: int) -> str:
        """Return what the template writes for the messages before one of them, without a prompt for the answer."""
        return self._render(self.messages[:turn], add_generation_prompt=False) if turn else ""

    def text_after(self, turn: int) -> str:
        """Return what the template writes behind the words of a message, whatever these are.

        Raises:
            ChatTemplateError: the template does not write the message, writes it more than once, or writes a later
                message before it.
        """
        message, mark = self.messages[turn], unused_number(f"{self.messages}{self.text}")
        marked = self._render([*self.messages[:turn], {**message, "content": mark}, *self.messages[turn + 1 :]])
        if marked.count(mark) != 1:
            raise ChatTemplateError(
                f"the chat template writes the {message.get('role')}'s message {turn} {marked.count(mark)} times, so "
                "that nothing can be put behind it; give a chat_template that writes it once"
            )
        self._check_order(turn)
        return marked.partition(mark)[2]

    def _check_order(self, turn: int) -> None:
        """Refuse a template that writes a later message before one, such as every system's message at the head.

        Tools' messages are left out: a template may read them as JSON.
        """
        taken, marks, marked = f"{self.messages}{self.text}", {}, list(self.messages)
        for later, message in enumerate(self.messages[turn:], turn):
            if later == turn or (isinstance(message.get("content"), str) and message.get("role") != "tool"):
                marks[later] = unused_number(taken)
                taken += marks[later]
                marked[later] = {**message, "content": marks[later]}
        before, _, behind = self._render(marked).partition(marks.pop(turn))
        for later, mark in marks.items():
            if mark in before and mark not in behind:
                raise ChatTemplateError(
                    f"the chat template writes the {self.messages[later].get('role')}'s message {later} before the "
                    f"message {turn}, so that it cannot be put behind what was sampled; use chat='render'"
                )

    def is_answered_in(self, text: str) -> bool:
        """Whether a text has all that the template writes before the chat's last answer, and goes on behind it."""
        turns = [turn for turn, message in enumerate(self.messages) if message.get("role") == "assistant"]
        if not turns:
            return False
        mark = unused_number(f"{self.messages}{self.text}")
        answer = {**self.messages[turns[-1]], "content": mark}
        before, found, _ = self._render([*self.messages[: turns[-1]], answer]).partition(mark)
        return bool(found) and text.startswith(before) and len(text) > len(before)

    def _same_before(self, messages: Sequence[Message]) -> int:
        """Return how much of the text the previous messages and the header of the next response make up."""
        before = self._render(messages, add_generation_prompt=True) if messages else ""
        return next((i for i, (a, b) in enumerate(zip(before, self.text, strict=False)) if a != b), len(before))

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool | None = None) -> str:
        wanted = self.add_generation_prompt if add_generation_prompt is None else add_generation_prompt
        return self.template.render(messages, add_generation_prompt=wanted).text


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


def assistant_tokens(
    chat: Chat,
    generated: Sequence[tuple[int, int]] | None,
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends: bool = False,
) -> list[bool] | None:
    """Return which tokens of a chat hold any text of the assistant's.

    Args:
        chat: the chat.
        generated: what its template put into ``{% generation %}``; None finds the words of the assistant's messages.
        ids: the chat's token ids.
        tokenizer: the tokenizer of the ids.
        ends: whether the token that ends each of the assistant's turns is one of these. Where the template says
            ``{% generation %}``, it says that too.

    Returns:
        One bool for each id, or None if the ids do not decode to the chat's text.

    Raises:
        InputError: the template rewrites a message, so that its tokens cannot be known, or ends it without a token.
    """
    if generated is None:
        turns = [turn for turn, message in enumerate(chat.messages) if message.get("role") == "assistant"]
        turns = [turn for turn in turns if chat.messages[turn].get("content")]
        try:
            if ends:
                generated = [chat.words_of(turn) for turn in turns]
            else:
                generated = [words for turn in turns for words in chat.ranges_of(turn)]
        except InputError as error:
            raise InputError(f"{error}; or give one that says {{% generation %}}") from error
        if ends:
            special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
            # A message that is gone on from has no end yet.
            last = len(chat.messages) - 1 if goes_on(chat.messages) else None
            generated = [
                words if turn == last else _with_end(chat, turn, words, special)
                for turn, words in zip(turns, generated, strict=True)
            ]
    elif generated:
        chat.check_generated()
    # Not by the tokens at the first and the last character, as Hugging Face does: a last character of several tokens
    # would be marked in part.
    return tokens_at([(start, stop) for start, stop in generated if start < stop], chat.text, ids, tokenizer)


def _with_end(chat: Chat, turn: int, words: tuple[int, int], special: Sequence[str]) -> tuple[int, int]:
    """Return the range of a message's words up to the end of the special token behind them."""
    rest = chat.text[words[1] :].lstrip()
    end = max((token for token in special if token and rest.startswith(token)), key=len, default=None)
    if end is None:
        raise InputError(
            f"mark_end_of_turn=True: the chat template writes no special token behind the assistant's message {turn}, "
            f"but {rest[:20]!r}; leave it out, or give a chat_template that says {{% generation %}}"
        )
    return words[0], len(chat.text) - len(rest) + len(end)


def spoken_tokens(span: Turn | Role, chat: Chat, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> PromptSpan:
    """Find the tokens of the words of one message, or of all messages of one role.

    Raises:
        SpanError: the chat has no such message, or the message has no words.
        InputError: the tokens of the words cannot be known.
    """
    messages = chat.messages
    roles = [message.get("role") for message in messages]
    if isinstance(span, Turn):
        if not -len(roles) <= span.index < len(roles):
            raise SpanError(f"{span}: the chat has {len(roles)} messages, of {roles}; name one of those")
        turns = [span.index % len(roles)]
    else:
        turns = [turn for turn, role in enumerate(roles) if role == span.name]
        if not turns:
            raise SpanError(f"{span}: the chat has no message of this role; name one of {roles}")
    found = [words for turn in turns if messages[turn].get("content") for words in chat.ranges_of(turn)]
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


def opened_by(span: Between, chat: Chat) -> Between:
    """Return a span of the response to a chat as it is to be searched: from the beginning, where the chat opened it.

    A generation prompt that opens a thought ends with ``start``, blanks apart. An assistant's message that the response
    goes on from may open the span too.
    """
    if span.start is None or span.end is None:
        return span
    prompt, prefill = chat.text, str(chat.messages[-1].get("content")) if goes_on(chat.messages) else ""
    opened = prompt.rstrip().endswith(span.start) or prefill.rfind(span.start) > prefill.rfind(span.end)
    return replace(span, start=None) if opened else span


def last_tokens(span: LastTokens, num_prompt: int) -> PromptSpan:
    """Find the last tokens of a prompt.

    Raises:
        SpanError: the prompt has fewer tokens, and the span does not allow fewer.
    """
    if span.count > num_prompt and not span.allow_fewer:
        raise SpanError(f"{span}: the prompt has {num_prompt} tokens; lower the count, or pass allow_fewer=True")
    return PromptSpan(((max(num_prompt - span.count, 0), num_prompt),))
