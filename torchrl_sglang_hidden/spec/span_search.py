"""Finds the tokens that spans select, by their text or by their number.

Used in the server half and by the client, who must agree. Knows nothing of SGLang or TensorDicts, and of a tokenizer
only its ``decode``.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from typing import NamedTuple, TypeAlias, assert_never

from torchrl_sglang_hidden.errors import SpanError
from torchrl_sglang_hidden.spec.places import At, Each, Every, Window
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, ResponseSpan

__all__ = ["Decode", "find_between", "find_marked", "find_rows", "tokens_around"]

Decode: TypeAlias = Callable[[Sequence[int]], str]

CHARACTER_BYTES = 4  # most bytes of a character in UTF-8, and so most tokens that share one character

# Tokens that are decoded at a time where many markers are searched for: otherwise the text of all tokens before each of
# them would be read again and again. So many tokens behind a piece say whether the text may be cut there.
_PIECE, _BEHIND = 64, 8


def find_rows(span: ResponseSpan, ids: Sequence[int], decode: Decode) -> Sequence[int]:
    """Find the rows of a response that a span selects; row t is the state that produced token t.

    Args:
        span: of the response.
        ids: the response's T token ids.
        decode: turns ids into text, special tokens included. It is called where markers are searched for.

    Returns:
        Rows from 0 to T-1, in order; none where the span may be empty.

    Raises:
        SpanError: a marker is missing, or there are fewer tokens than the span must have.
    """
    num_rows = len(ids)
    match span:
        case LastTokens(count=count, allow_fewer=allow_fewer):
            if count > num_rows and not allow_fewer:
                raise SpanError(
                    f"LastTokens({count}): the response has {num_rows} tokens; raise min_new_tokens, or pass "
                    "allow_fewer=True"
                )
            return range(max(num_rows - count, 0), num_rows)
        case Between():
            return range(*find_between(span, ids, decode))
        case Window(start=start, stop=stop):
            return range(num_rows)[start:stop]
        case Every(n=n):
            return range(0, num_rows, n)
        case At() | Each():
            # The state that has read token i produced token i+1. The last token's is never computed.
            rows = [read + 1 for read in find_marked(span, ids, decode) if read + 1 < num_rows]
            if not rows and span.missing == "error":
                raise SpanError(
                    f"{span!r}: the marker ends the response, whose last token has no state; let the model go on "
                    "behind it, or pass missing='nan'"
                )
            return rows
        case _:
            assert_never(span)


def find_marked(span: At | Each, ids: Sequence[int], decode: Decode) -> list[int]:
    """Find where the states of markers stand: each has read the tokens up to an index, and no more.

    Args:
        span: the marker, and whether the state after it or before it is meant.
        ids: the segment's token ids.
        decode: turns ids into text, special tokens included.

    Returns:
        The indices in order, each once. -1 is the state before the first token.

    Raises:
        SpanError: the marker is not in the text, and ``missing="error"``.
    """
    text = decode(ids)
    offsets, found = [], text.find(span.marker)
    while found >= 0:
        end = found + len(span.marker)
        offsets.append(end if span.where == "after" else found)
        found = -1 if isinstance(span, At) else text.find(span.marker, end)
    if not offsets and span.missing == "error":
        raise SpanError(
            f"{span!r}: the marker is not in the {span.segment}, {text[-80:]!r}; check that the model writes it, raise "
            "max_new_tokens, or pass missing='nan'"
        )
    # A token with any part of the marker is the marker's.
    around = _around_many(offsets, text, ids, decode) if len(offsets) > 1 else tokens_around(offsets, text, ids, decode)
    return sorted({(begun if span.where == "after" else ended) - 1 for ended, begun in around})


def find_between(span: Between, ids: Sequence[int], decode: Decode) -> tuple[int, int]:
    """Find the tokens between the markers.

    Args:
        span: the markers.
        ids: the segment's token ids.
        decode: turns ids into text, special tokens included.

    Returns:
        ``(start, stop)``: the span is ``ids[start:stop]``.

    Raises:
        SpanError: a marker is missing, or no token is between the markers.
    """
    text = decode(ids)
    begin = 0
    if span.start is not None:
        found = text.find(span.start)
        if found < 0:
            raise SpanError(
                f"the marker {span.start!r} is not in the {span.segment}, {text[-80:]!r}; check that the model "
                "writes it, or use start=None for a span that begins with the segment"
            )
        begin = found + len(span.start)
    end = len(text) if span.end is None else text.find(span.end, begin)
    if end < 0 and span.unclosed == "error":
        raise SpanError(
            f"the marker {span.end!r} is not in the {span.segment} behind {span.start!r}, {text[-80:]!r}; raise "
            "max_new_tokens, or pass unclosed='end'"
        )
    closed = span.end is not None and end >= 0
    around = tokens_around((begin, end) if closed else (begin,), text, ids, decode)
    first, last = around[0][1], around[1][0] if closed else len(ids)
    if last <= first:
        raise SpanError(
            f"nothing stands between {span.start!r} and {span.end!r} in the {span.segment}, {text[-80:]!r}; an empty "
            "span has no state: choose other markers"
        )
    return first, last


def tokens_around(offsets: Sequence[int], text: str, ids: Sequence[int], decode: Decode) -> list[tuple[int, int]]:
    """Count, for each offset into the text, the tokens that end at or before it and the tokens that begin before it.

    The two counts differ by one where a token holds text on both sides of the offset. For example, with the tokens
    ``["ab", "cd"]`` offset 2 gives ``(1, 1)`` and offset 3 gives ``(1, 2)``.

    Some tokenizers write one U+FFFD for several bytes, so that between two U+FFFD the counts are approximate.

    Args:
        offsets: in characters, from 0 to ``len(text)``.
        text: the text of all ids.
        ids: the token ids.
        decode: turns ids into text. It is called about ``log2(len(ids))`` times for an offset, and at most
            `CHARACTER_BYTES` times as often where tokens share characters.
    """

    @functools.cache
    def read(count: int) -> tuple[int, bool]:
        """Return the length of text that the first ids agree with, and whether all their text agrees."""
        prefix = decode(ids[:count])
        if text.startswith(prefix):
            return len(prefix), True
        differs = bisect_left(range(len(prefix)), True, key=lambda last: not text.startswith(prefix[: last + 1]))
        return differs, False

    @functools.cache
    def end(count: int) -> int:
        """Return the offset behind the last character that the first ids hold any part of."""
        same, agrees = read(count)
        if agrees:
            return same
        # The last token ends inside a character. Byte fallback then writes U+FFFD for the whole characters right before
        # it too, so count characters with the ids that end before it.
        fewer = range(count - 1, max(count - CHARACTER_BYTES, 0), -1)
        return max(same, next((read(some)[0] for some in fewer if read(some)[1]), 0)) + 1

    def around(offset: int) -> tuple[int, int]:
        before = bisect_right(range(1, len(ids) + 1), offset, key=end)
        return before, before if read(before) == (offset, True) else min(before + 1, len(ids))

    return [around(offset) for offset in offsets]


class _Piece(NamedTuple):
    """Some tokens whose text stands on its own: the tokens from ``first`` on, and their text from ``offset`` on."""

    first: int
    ids: Sequence[int]
    offset: int
    text: str


def _around_many(offsets: Sequence[int], text: str, ids: Sequence[int], decode: Decode) -> list[tuple[int, int]]:
    """Do as `tokens_around` for many offsets, which are in order: each is searched for in a piece of the text."""
    around: list[tuple[int, int]] = []
    pieces = list(_pieces(text, ids, decode))
    ends = [piece.offset + len(piece.text) for piece in pieces]
    # A token that ends at the offset is in the piece that does, too.
    for place, inside in groupby(offsets, key=lambda offset: bisect_left(ends, offset)):
        first, piece_ids, start, piece_text = pieces[place]
        found = tokens_around([offset - start for offset in inside], piece_text, piece_ids, decode)
        around += [(first + ended, first + begun) for ended, begun in found]
    return around


def _pieces(text: str, ids: Sequence[int], decode: Decode) -> Iterator[_Piece]:
    """Cut tokens into pieces of about `_PIECE`, where each piece's own text is what it has among the others.

    This is not so inside a character, or in front of a word whose blank a tokenizer leaves out at a beginning. Where
    there is no better place, a piece grows.
    """
    first = offset = 0
    while first < len(ids):
        for size in chain(range(_PIECE, _PIECE + _BEHIND), (2**power * _PIECE for power in range(1, 64))):
            stop = min(first + size, len(ids))
            piece = text[offset:] if stop == len(ids) else decode(ids[first:stop])
            if stop == len(ids) or _goes_on(ids[stop : stop + _BEHIND], text, offset, piece, decode):
                yield _Piece(first, ids[first:stop], offset, piece)
                break
        first, offset = stop, offset + len(piece)


def _goes_on(behind: Sequence[int], text: str, offset: int, piece: str, decode: Decode) -> bool:
    """Return whether the text from ``offset`` on is a piece, and then what the ids behind it are on their own."""
    if not text.startswith(piece, offset):
        return False
    # The last of them may end inside a character, which byte fallback writes over those before it.
    for fewer in range(min(CHARACTER_BYTES, len(behind))):
        beginning = decode(behind[: len(behind) - fewer]).rstrip("\ufffd")
        if beginning and text.startswith(beginning, offset + len(piece)):
            return True
    return False
