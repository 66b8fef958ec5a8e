"""Encoding a chat's content apart from its frame: what a user writes does not become a special token.

Knows nothing of TensorDicts. In most programs a user who writes ``<|im_end|>`` ends the turn, because the chat is
tokenized as one text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.policy.chat_text import Chat
from torchrl_sglang_hidden.policy.tokenizer import OwnTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_chat"]

# What goes before a piece of text, so that it is not taken for the beginning of a text; nothing for tokenizers that
# write all texts alike.
CONTEXTS = ("", "\n", ".", "a ")
HARMLESS = "x"


def encode_chat(chat: Chat, own: OwnTokenizer) -> tuple[int, ...] | None:
    """Return the ids of a chat in which added tokens inside of messages are plain text; None if there are none.

    Messages of the assistant are left out: their tokens, such as ``<think>``, are what the model wrote.

    Raises:
        InputError: a message with such a text whose place in the chat's text is not known, or a tokenizer whose tokens
            do not stand by themselves.
    """
    tokens = own.plain.get_added_vocab()
    if not tokens:
        return None
    added = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
    turns = [
        turn
        for turn, message in enumerate(chat.messages)
        if message.get("role") != "assistant" and added.search(str(message.get("content") or ""))
    ]
    if not turns:
        return None
    ranges = [words for turn in turns for words in chat.ranges_of(turn)]
    pieces = list(_pieces(chat.text, ranges, added))
    # The same chat without the texts in question has ids that are known, and says how this tokenizer is to be called.
    harmless = _harmless(chat.text, ranges, added)
    expected = list(own.plain(harmless, add_special_tokens=False)["input_ids"])
    harmless_pieces = [(piece if is_token else added.sub(HARMLESS, piece), is_token) for piece, is_token in pieces]
    bare = own.bare()
    for context in CONTEXTS:
        if _encode(harmless_pieces, context, tokens, bare) == expected:
            ids = _encode(pieces, context, tokens, bare)
            if ids is not None:
                return tuple(ids)
    found = added.findall(chat.text[slice(*ranges[0])])
    raise InputError(
        f"literal_content=True: message {turns[0]} has {found!r:.60}, which the tokenizer {own.plain.name_or_path!r} "
        "does not write as plain text: its special tokens are words of its vocabulary, or change the text beside them; "
        "remove them from the message"
    )


def _pieces(text: str, ranges: list[tuple[int, int]], added: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """Yield the text in pieces, each with whether it is a token of the frame. Neighbouring text is one piece."""
    start = position = 0
    for since, until in [*ranges, (len(text), len(text))]:
        for found in added.finditer(text, position, since):
            if found.start() > start:
                yield text[start : found.start()], False
            yield found.group(), True
            start = found.end()
        position = until
    if start < len(text):
        yield text[start:], False


def _harmless(text: str, ranges: list[tuple[int, int]], added: re.Pattern[str]) -> str:
    parts, position = [], 0
    for since, until in ranges:
        parts += [text[position:since], added.sub(HARMLESS, text[since:until])]
        position = until
    return "".join([*parts, text[position:]])


def _encode(
    pieces: list[tuple[str, bool]], context: str, tokens: dict[str, int], bare: PreTrainedTokenizerBase
) -> list[int] | None:
    """Return the ids of all pieces, each text behind a context but the first.

    None if the context changes them, or if a text has an added token even so, as a word of the vocabulary.
    """
    ids: list[int] = []
    not_text = set(tokens.values()) - {bare.unk_token_id}
    for index, (piece, is_token) in enumerate(pieces):
        if is_token:
            ids.append(tokens[piece])
            continue
        before = context if index else ""
        head = list(bare(before, add_special_tokens=False)["input_ids"]) if before else []
        whole = list(bare(before + piece, add_special_tokens=False)["input_ids"])
        if whole[: len(head)] != head or not not_text.isdisjoint(whole[len(head) :]):
            return None
        ids += whole[len(head) :]
    return ids
