"""`spans`: what may be written, masks to intervals, and which tokens stand between two markers.

The tokens between markers are held against a count of bytes: a token is in the span if all of its bytes are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
from helpers.byte_tokenizers import byte_tokenizer, fallback_tokenizer
from helpers.fake_engine import tiny_tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import Between, LastTokens, Role, TokenMask, Turn
from torchrl_sglang_hidden.errors import InputError, InputTypeError, SpanError
from torchrl_sglang_hidden.spec.span_search import find_between
from torchrl_sglang_hidden.spec.spans import PromptSpan, intervals_of

# --- what may be written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LastTokens(0), InputError, r"LastTokens\(count=0\): expected an integer of at least 1"),
        (lambda: LastTokens(-3), InputError, r"count=-3"),
        (lambda: LastTokens(True), InputTypeError, r"LastTokens\(count=True\)"),
        (lambda: LastTokens(1.0), InputTypeError, r"count=1\.0"),  # type: ignore[arg-type]
        (lambda: LastTokens(1, "full"), InputError, r"segment='full'.*'prompt', 'response'"),  # type: ignore[arg-type]
        (lambda: TokenMask(""), InputTypeError, r"TokenMask\(key=''\)"),
        (lambda: TokenMask(()), InputTypeError, r"TokenMask\(key=\(\)\)"),
        (lambda: TokenMask(("a", 1)), InputTypeError, r"\('a', 1\)"),  # type: ignore[arg-type]
        (lambda: Turn("0"), InputTypeError, r"Turn\(index='0'\)"),  # type: ignore[arg-type]
        (lambda: Turn(False), InputTypeError, r"Turn\(index=False\)"),
        (lambda: Role(""), InputTypeError, r"Role\(name=''\)"),
        (lambda: Role(0), InputTypeError, r"Role\(name=0\)"),  # type: ignore[arg-type]
        (lambda: Between(None, None), InputError, r"at least one marker"),
        (lambda: Between("", "b"), InputError, r"none of them empty"),
        (lambda: Between("a", ""), InputError, r"none of them empty"),
        (lambda: Between(1, "b"), InputTypeError, r"a marker is a string"),  # type: ignore[arg-type]
        (lambda: Between("a", "b", "full"), InputError, r"segment='full'"),  # type: ignore[arg-type]
        (lambda: Between("a", "b", unclosed="skip"), InputError, r"unclosed is one of"),  # type: ignore[arg-type]
    ],
)
def test_spans_that_mean_nothing(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


# --- masks ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=40))
def test_intervals_are_the_true_places(mask: list[bool]) -> None:
    if not any(mask):
        with pytest.raises(SpanError, match=f"a mask of {len(mask)} tokens is False everywhere"):
            intervals_of(mask)
        return
    span = intervals_of(mask)
    places = [place for start, stop in span.intervals for place in range(start, stop)]
    assert places == [place for place, inside in enumerate(mask) if inside]
    assert all(start < stop for start, stop in span.intervals)
    assert all(stop < start for (_, stop), (start, _) in zip(span.intervals, span.intervals[1:], strict=False))
    assert (span.count, span.end) == (len(places), places[-1] + 1)


def test_the_size_of_a_span() -> None:
    span = PromptSpan(((0, 2), (5, 6)))
    assert (span.count, span.end) == (3, 6)


# --- between markers --------------------------------------------------------------------------------------------------

KINDS = {"byte-level": byte_tokenizer(), "byte fallback": fallback_tokenizer()}
WORDS = tiny_tokenizer()


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


@st.composite
def cut_texts(draw: st.DrawFn, tokens: list[bytes]) -> tuple[str, list[int]]:
    """Draw a text and one way to cut it into ids, through characters too."""
    text = "".join(
        draw(st.lists(st.sampled_from(["<t>", "</t>", "a", "b", "é", "😀", "日本", "<", "t", "> "]), max_size=12))
    )
    rest, ids = text.encode(), []
    while rest:
        fitting = [i for i, token in enumerate(tokens) if rest.startswith(token)]
        ids.append(draw(st.sampled_from(fitting)))
        rest = rest[len(tokens[ids[-1]]) :]
    return text, ids


def tokens_between(pieces: list[bytes], span: Between) -> list[int] | None:
    """Return the tokens all of whose bytes stand between the markers; None where a marker is missing."""
    data, begin = b"".join(pieces), 0
    if span.start is not None:
        found = data.find(span.start.encode())
        if found < 0:
            return None
        begin = found + len(span.start.encode())
    end = len(data) if span.end is None else data.find(span.end.encode(), begin)
    if end < 0:
        if span.unclosed == "error":
            return None
        end = len(data)
    ends = list(accumulate(map(len, pieces)))
    starts = [0, *ends[:-1]]
    return [place for place in range(len(pieces)) if starts[place] >= begin and ends[place] <= end]


MARKERS = st.sampled_from([None, "<t>", "</t>", "é", "😀", "本", "ab"])


def check_between(kind: str, ids: list[int], span: Between) -> None:
    tokenizer, tokens = KINDS[kind]
    of_kind = functools.partial(decode, tokenizer=tokenizer)
    expected = tokens_between([tokens[token] for token in ids], span)
    if not expected:
        with pytest.raises(SpanError, match="nothing stands between" if expected == [] else "the marker"):
            find_between(span, ids, of_kind)
        return
    first, stop = find_between(span, ids, of_kind)
    assert list(range(first, stop)) == expected


@pytest.mark.parametrize("kind", KINDS)
@given(start=MARKERS, end=MARKERS, unclosed=st.sampled_from(["error", "end"]), data=st.data())
def test_a_token_is_between_the_markers_if_all_of_its_bytes_are(
    kind: str, start: str | None, end: str | None, unclosed: Any, data: st.DataObject
) -> None:
    assume(start is not None or end is not None)
    tokenizer, tokens = KINDS[kind]
    text, ids = data.draw(cut_texts(tokens))
    assert decode(ids, tokenizer) == text
    check_between(kind, ids, Between(start, end, unclosed=unclosed))


@pytest.mark.parametrize(
    "pieces", [[b"\xf0", b"\x9f", "😀".encode()[2:] + b"<", b"t"], [b"\xc3", b"\xa9\xe6", b"\x97", b"\xa5"]]
)
def test_a_token_that_ends_the_marker_and_begins_the_next_character(pieces: list[bytes]) -> None:
    marker = b"".join(pieces).decode()[0]
    tokens = KINDS["byte-level"][1]
    ids = [tokens.index(piece) for piece in pieces]
    check_between("byte-level", ids, Between(marker, None))
    check_between("byte-level", ids, Between(None, marker))
    check_between("byte-level", ids, Between(None, b"".join(pieces).decode()[1]))


# Bytes of characters and of none: a sampled response has both, and may end inside a character.
HIGH_BYTES = st.sampled_from([*"é日😀\ufffd".encode(), 0xFF, 0x80])


@pytest.mark.parametrize("kind", KINDS)
@given(
    parts=st.lists(st.sampled_from([b"<t>", b"</t>", b"ab"]) | st.lists(HIGH_BYTES, max_size=9).map(bytes), max_size=7),
    span=st.sampled_from(
        [Between("<t>", "</t>"), Between(None, "</t>"), Between("<t>", None), Between("<t>", "</t>", unclosed="end")]
    ),
)
def test_bytes_that_are_no_character(kind: str, parts: list[bytes], span: Between) -> None:
    tokens = KINDS[kind][1]
    # A marker is one token, and anything else one token for each byte.
    pieces = [piece for part in parts for piece in ([part] if part in tokens else [bytes([byte]) for byte in part])]
    check_between(kind, [tokens.index(piece) for piece in pieces], span)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", ["漢".encode() * 10_000, b"a" * 29_999 + b"\xff", b"\xff" * 30_000])
def test_a_long_response_takes_few_decodes(kind: str, inner: bytes) -> None:
    tokenizer, tokens = KINDS[kind]
    ids = [tokens.index(b"<t>"), *inner, tokens.index(b"</t>"), tokens.index(b"ab")]
    decodes = 0

    def counting(some: Sequence[int]) -> str:
        nonlocal decodes
        decodes += 1
        return decode(some, tokenizer)

    assert find_between(Between("<t>", "</t>"), ids, counting) == (1, 1 + len(inner))
    assert decodes <= 2 * 4 * (len(ids).bit_length() + 2)


WORD_CASES: list[tuple[Between, str, str | None]] = [
    (Between("w1", "w3"), "w0 w1 w2 w2 w3 w4", "w2 w2"),
    (Between(None, "w3"), "w0 w1 w3 w3", "w0 w1"),
    (Between("w3", None), "w0 w3 w1 w3", "w1 w3"),
    (Between("w1", "w3", unclosed="end"), "w1 w4 w5", "w4 w5"),
    (Between("w1", "w3"), "w1 w4 w5", None),
    (Between("w1", "w3"), "w4 w3", None),
    (Between("w1", "w3"), "w3 w1 w3", None),
    (Between("w1", "<|end|>"), "w1 w2 <|end|>", "w2"),
    # A word that holds the marker is not between it and anything.
    (Between("w1", None), "w12 w5", "w5"),
    (Between(None, "2"), "w5 w12 w5", "w5"),
]


@pytest.mark.parametrize(("span", "text", "between"), WORD_CASES)
def test_words(span: Between, text: str, between: str | None) -> None:
    ids = WORDS(text)["input_ids"]
    of_words = functools.partial(decode, tokenizer=WORDS)
    if between is None:
        with pytest.raises(SpanError):
            find_between(span, ids, of_words)
        return
    first, stop = find_between(span, ids, of_words)
    assert of_words(ids[first:stop]) == between


def test_a_missing_end_says_what_to_do() -> None:
    ids = WORDS("w1 w2")["input_ids"]
    with pytest.raises(SpanError, match=r"'w3' is not in the response behind 'w1', 'w1 w2'; raise max_new_tokens"):
        find_between(Between("w1", "w3"), ids, functools.partial(decode, tokenizer=WORDS))
