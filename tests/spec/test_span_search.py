"""`span_search`: the states that stand at a text, however its tokens are cut, and windows.

Where a marker's tokens are is held against a count of bytes: a token is the marker's if any of its bytes is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from helpers.byte_tokenizers import byte_tokenizer, fallback_tokenizer
from helpers.fake_engine import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import At, Each, Every, HiddenSpec, LastTokens, Window
from torchrl_sglang_hidden.errors import InputError, InputTypeError, SpanError
from torchrl_sglang_hidden.spec.span_search import find_marked, find_rows, tokens_around
from torchrl_sglang_hidden.spec.spans import PromptSpan, span_over

KINDS = {"byte-level": byte_tokenizer(), "byte fallback": fallback_tokenizer()}
WORDS = tiny_tokenizer()
MARKERS = ("<t>", "</t>", "é", "😀", "本", "ab", "t><", "aa")
WHERES = ("after", "before")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: At(""), InputError, r"At\(marker=''.*an empty marker is everywhere"),
        (lambda: At(None), InputTypeError, r"marker=None.*a marker is a string"),  # type: ignore[arg-type]
        (lambda: Each("a", "behind"), InputError, r"Each\(.*where is one of"),  # type: ignore[arg-type]
        (lambda: Each("a", missing="zero"), InputError, r"missing is one of"),  # type: ignore[arg-type]
        (lambda: At("a", segment="full"), InputError, r"At\(segment='full'\)"),  # type: ignore[arg-type]
        (lambda: At("a", pooling="median"), InputError, r"At\(pooling='median'\)"),  # type: ignore[arg-type]
        (lambda: LastTokens(1, pooling="median"), InputError, r"pooling='median'"),  # type: ignore[arg-type]
        (lambda: Window(-1, 2), InputError, r"Window\(start=-1, stop=2.*0 <= start < stop"),
        (lambda: Window(2, 2), InputError, r"start=2, stop=2"),
        (lambda: Window(3, 2), InputError, r"start=3, stop=2"),
        (lambda: Window(0, 2.0), InputTypeError, r"stop=2\.0"),  # type: ignore[arg-type]
        (lambda: Window(False, 2), InputTypeError, r"start=False"),
        (lambda: Every(0), InputError, r"Every\(n=0.*at least 1"),
        (lambda: Every("2"), InputTypeError, r"Every\(n='2'"),  # type: ignore[arg-type]
    ],
)
def test_spans_that_mean_nothing(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def cut(text: bytes, tokens: list[bytes], choose: Any) -> list[int]:
    """Cut a text into ids, through characters too."""
    ids = []
    while text:
        ids.append(choose([i for i, token in enumerate(tokens) if text.startswith(token)]))
        text = text[len(tokens[ids[-1]]) :]
    return ids


def states_at(pieces: list[bytes], span: At | Each) -> list[int]:
    """Return how many tokens each state has read, less one."""
    data, ends = b"".join(pieces), list(accumulate(map(len, pieces)))
    starts = [0, *ends[:-1]]
    found = []
    for one in re.finditer(re.escape(span.marker.encode()), data):
        touched = [place for place in range(len(pieces)) if starts[place] < one.end() and ends[place] > one.start()]
        found.append(touched[-1] if span.where == "after" else touched[0] - 1)
    return sorted(set(found[:1] if isinstance(span, At) else found))


def check(kind: str, ids: list[int], span: At | Each) -> None:
    tokenizer, tokens = KINDS[kind]
    expected = states_at([tokens[token] for token in ids], span)
    of_kind = functools.partial(decode, tokenizer=tokenizer)
    assert find_marked(span, ids, of_kind) == expected
    assert find_rows(span, ids, of_kind) == [place + 1 for place in expected if place + 1 < len(ids)]


@pytest.mark.parametrize("kind", KINDS)
@given(make=st.sampled_from([At, Each]), marker=st.sampled_from(MARKERS), where=st.sampled_from(WHERES), data=st.data())
def test_a_token_is_the_markers_if_any_of_its_bytes_is(
    kind: str, make: type[At | Each], marker: str, where: Any, data: st.DataObject
) -> None:
    """Markers are split over tokens, begin and end inside them, and overlap."""
    tokenizer, tokens = KINDS[kind]
    parts = st.sampled_from(["<t>", "</t>", "a", "b", "é", "😀", "日本", "<", "t", "> "])
    text = "".join(data.draw(st.lists(parts, max_size=12))) * data.draw(st.sampled_from([1, 1, 40]))
    chance = data.draw(st.randoms(use_true_random=False))
    ids = cut(text.encode(), tokens, chance.choice)
    assert decode(ids, tokenizer) == text
    check(kind, ids, make(marker, where))


@pytest.mark.parametrize("kind", KINDS)
@given(
    parts=st.lists(
        st.sampled_from([b"<t>", b"ab"]) | st.lists(st.sampled_from([*"é日😀".encode(), 0xFF]), max_size=9).map(bytes),
        max_size=7,
    ),
    times=st.sampled_from([1, 30]),
    span=st.sampled_from([kind(marker, where) for kind in (At, Each) for marker in ("<t>", "ab") for where in WHERES]),
)
def test_bytes_that_are_no_character(kind: str, parts: list[bytes], times: int, span: At | Each) -> None:
    tokens = KINDS[kind][1]
    pieces = [piece for part in parts for piece in ([part] if part in tokens else [bytes([byte]) for byte in part])]
    check(kind, [tokens.index(piece) for piece in pieces] * times, span)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("between", ["漢", "é", "a", "😀"])
def test_many_markers_take_about_as_many_tokens_as_there_are(kind: str, between: str) -> None:
    """Not the tokens before each: of 2000 markers among 40 000 tokens that would be minutes."""
    tokenizer, tokens = KINDS[kind]
    unit = [*(between * 20).encode()[:20].decode(errors="ignore").encode(), tokens.index(b"<t>")]
    ids, seen = unit * 2000, 0

    def counting(some: Sequence[int]) -> str:
        nonlocal seen
        seen += len(some)
        return decode(some, tokenizer)

    rows = find_rows(Each("<t>", "before"), ids, counting)
    assert list(rows) == [len(unit) * number + len(unit) - 1 for number in range(2000)]
    assert seen < 40 * len(ids)


@given(
    st.lists(st.sampled_from([f"w{n}" for n in (1, 2, 3, 12)]), min_size=1, max_size=9),
    st.sampled_from([1, 30]),
    st.sampled_from(WHERES),
)
def test_words_whose_blanks_belong_to_nobody(words: list[str], times: int, where: Any) -> None:
    """A tokenizer that writes no blank in front of the first word: nowhere may the text be cut."""
    ids = WORDS(" ".join(words * times))["input_ids"]
    of_words = functools.partial(decode, tokenizer=WORDS)
    text = of_words(ids)
    offsets = [one.end() if where == "after" else one.start() for one in re.finditer("2", text)]
    around = tokens_around(offsets, text, ids, of_words)
    expected = sorted({(begun if where == "after" else ended) - 1 for ended, begun in around})
    assert find_marked(Each("2", where), ids, of_words) == expected


def test_markers_do_not_overlap_and_coinciding_states_are_one() -> None:
    tokens = KINDS["byte-level"][1]
    ids = [*b"aaaa", *b"a"]
    check("byte-level", ids, Each("aa"))
    of_bytes = functools.partial(decode, tokenizer=KINDS["byte-level"][0])
    assert find_rows(Each("aa"), ids, of_bytes) == [2, 4]
    twice = [tokens.index(b"t><"), *b"b"]
    assert find_rows(Each("t"), twice, of_bytes) == find_rows(Each("<"), twice, of_bytes) == [1]
    assert find_rows(Each(">"), [tokens.index(b"ab"), *b">>>"], of_bytes) == [2, 3]


def test_where_a_response_has_no_state() -> None:
    """After its last token there is none; before its first one is the prompt's last."""
    of_bytes = functools.partial(decode, tokenizer=KINDS["byte-level"][0])
    assert find_rows(At("ab"), [*b"ab"], of_bytes) == []
    assert find_rows(At("ab", "before"), [*b"ab"], of_bytes) == [0]
    assert find_rows(At("x"), [*b"ab"], of_bytes) == []
    with pytest.raises(SpanError, match=r"At\(marker='x'.*the marker is not in the response, 'ab'; .* missing='nan'"):
        find_rows(At("x", missing="error"), [*b"ab"], of_bytes)
    with pytest.raises(
        SpanError, match=r"the marker ends the response, whose last token has no state; .*missing='nan'"
    ):
        find_rows(Each("ab", missing="error"), [*b"ab"], of_bytes)


@pytest.mark.parametrize("num_rows", [1, 5, 12])
def test_windows_are_slices(num_rows: int) -> None:
    ids, rows = list(range(num_rows)), list(range(num_rows))

    def no_text(_: Sequence[int]) -> str:
        raise AssertionError("decoded")

    for start, stop in ((0, 1), (0, 99), (3, 7), (4, 5), (20, 30)):
        assert list(find_rows(Window(start, stop), ids, no_text)) == rows[start:stop]
    for n in (1, 2, 5, 99):
        assert list(find_rows(Every(n), ids, no_text)) == rows[::n]


@given(st.sets(st.integers(0, 30)))
def test_a_span_over_positions(places: set[int]) -> None:
    span = span_over(sorted(places))
    assert span.positions == sorted(places)
    assert (span.count, span.end) == (len(places), max(places, default=-1) + 1)
    assert all(stop < start for (_, stop), (start, _) in zip(span.intervals, span.intervals[1:], strict=False))
    assert span_over(range(3)) == PromptSpan(((0, 3),))


def test_a_spec_says_how_each_span_is_pooled() -> None:
    spans = {"a": At("x"), "e": Each("x"), "n": Every(2, pooling="max"), "t": LastTokens(1, pooling=None)}
    spec = HiddenSpec((), "last", spans=spans)
    assert [spec.pooling_of(name) for name in spans] == ["last", None, "max", None]
    assert spec.unpooled == ("e", "t")
    with pytest.raises(InputError, match=r"pooling='sum', dtype=torch.float16"):
        HiddenSpec((), dtype=torch.float16, spans={"a": At("x", pooling="sum")})


def test_a_span_is_written_as_recordings_have_it() -> None:
    """Recordings are gone on with where this text is the same, so that it does not change for older spans."""
    assert repr(LastTokens(8)) == "LastTokens(count=8, segment='response', allow_fewer=False)"
    assert repr(LastTokens(8, pooling=None)) == (
        "LastTokens(count=8, segment='response', allow_fewer=False, pooling=None)"
    )
