"""Broken and hostile answers, requests and files: a few of each for every reader, and the program that tries a million.

What is looked for stands in `helpers/fuzz_targets.py`: a reader raises an error of this package, or returns values of
the right types and sizes, in bounded time and memory. `make fuzz` tries the same with a fuzzer that watches which code
its inputs reach.
"""

from __future__ import annotations

import itertools
import json
import re
import time
import warnings
from collections.abc import Callable

import fuzz
import pytest
from helpers.fuzz_targets import TARGETS, read_spoiled
from helpers.spoiling import Choices, spoil
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sglang_hidden.errors import ProtocolError, SGLangHiddenError

# Those of which an input takes milliseconds get fewer.
EXAMPLES, SLOW_EXAMPLES = 150, 30


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_broken_is_refused_or_read_right(name: str) -> None:
    @settings(max_examples=SLOW_EXAMPLES if name in fuzz.SLOW else EXAMPLES)
    @given(data=st.binary(max_size=48))
    def try_one(data: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of a damaged file
            watch = fuzz.Watch(name, lambda data: read_spoiled(name, data), SGLangHiddenError)
            watch.one(data)
        assert watch.report.found == {}

    try_one()


# --- what changes a good value ----------------------------------------------------------------------------------------

GOOD = {"rows": [{"id": 7, "text": "abc", "data": "AAAA", "crc32": 1}], "more": [1.5, None, True]}


def test_the_same_bytes_spoil_in_the_same_way() -> None:
    for index in range(200):
        data = index.to_bytes(2, "little") * 20
        assert repr(spoil(GOOD, Choices(data))) == repr(spoil(GOOD, Choices(data)))
    assert GOOD["rows"][0]["id"] == 7, "a good value stays as it is"  # type: ignore[index]


@given(st.binary(max_size=60))
@settings(max_examples=200)
def test_anything_can_be_spoiled_again(data: bytes) -> None:
    choices = Choices(data)
    value = GOOD
    for _ in range(4):
        value = spoil(value, choices)
        json.dumps(value, default=str)


# --- what watches -----------------------------------------------------------------------------------------------------


def refuses(data: bytes) -> None:
    raise ProtocolError("no")


def fails(data: bytes) -> None:
    raise KeyError("a bare one")


def hides_a_lack_of_memory(data: bytes) -> None:
    try:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes")
    except RuntimeError as error:
        raise ProtocolError("cannot be read") from error


def takes_long(data: bytes) -> None:
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass


def takes_memory(data: bytes) -> None:
    """Do nothing: the test says that this took memory."""


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda data: None, None),
        (refuses, None),
        (fails, r"KeyError at test_fuzz.py:\d+"),
        (hides_a_lack_of_memory, "memory of a size that was not checked"),
        (takes_long, r"over 0.02 s of processor time"),
        (takes_memory, r"over 256 MiB for one input"),
    ],
)
def test_what_the_fuzzer_looks_for(
    read: Callable[[bytes], None], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "MAX_SECONDS", 0.02 if read is takes_long else 10.0)
    peaks = iter((0, 300 * 2**20 if read is takes_memory else 0))
    monkeypatch.setattr(fuzz, "_peak_bytes", lambda: next(peaks))
    watch = fuzz.Watch("x", read, SGLangHiddenError)
    watch.one(b"\x01\x02")
    assert watch.report.inputs == 1
    if found is None:
        assert watch.report.found == {}
        return
    ((what, (count, first)),) = watch.report.found.items()
    assert (count, first) == (1, "0102")
    assert re.match(found, what)


@pytest.mark.parametrize(("left", "found"), [(0, []), (2**20, []), (5 * 2**20, ["memory grew by over 16 MiB"])])
def test_memory_that_stays_is_found(left: int, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    used = itertools.count(10**9, left)
    monkeypatch.setattr(fuzz, "_used_bytes", lambda: next(used))
    watch = fuzz.Watch("x", refuses, SGLangHiddenError)
    watch.replay([b"\1", b"\2"])
    assert (watch.report.inputs, watch.report.growth_bytes) == (2 * (1 + fuzz.REPLAYS), fuzz.REPLAYS * left)
    assert list(watch.report.found) == found


def test_the_table_adds_up() -> None:
    one = fuzz.Report("a", 10, 1.0, 0.25, 2**20, {"x": (3, "00")})
    table = fuzz.table_of([one, fuzz.Report("b", 5)]).splitlines()
    assert table[2] == "| a | 10 | 3 | 250 ms | 1.0 MiB |"
    assert table[-1] == "| all | 15 | 3 | 250 ms | 1.0 MiB |"
