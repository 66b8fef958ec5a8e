"""A ``stop_regex`` whose search does not end costs its request, and is searched as SGLang does otherwise."""

from __future__ import annotations

import re
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from torchrl_sglang_hidden.counters import SERVER
from torchrl_sglang_hidden.server.stop_patterns import MAX_SEARCH_S, BoundedPatterns, around_stops

ENDLESS, ENDLESS_TEXT = "(a|aa)+$b", "a" * 60


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """SGLang's module that searches for stops."""
    batches = ModuleType("sglang.srt.managers.schedule_batch")
    batches.re = re  # type: ignore[attr-defined]
    context = ModuleType("sglang.srt.runtime_context")
    context.get_parallel = lambda: SimpleNamespace(tp_size=1)  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.managers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["sglang.srt.managers"].schedule_batch = batches  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, batches.__name__, batches)
    monkeypatch.setitem(sys.modules, context.__name__, context)
    return batches


class Request:
    """SGLang's ``Req``, as much of it as searches."""

    def __init__(self, batches: Any, text: str, *patterns: str) -> None:
        self.batches, self.text = batches, text
        self.sampling_params = SimpleNamespace(stop_regex_strs=list(patterns))
        self.finished_reason: Any = None

    def check(self, new_accepted_len: int = 1) -> bool:
        for pattern in self.sampling_params.stop_regex_strs:
            try:
                matched = self.batches.re.search(pattern, self.text)
            except (self.batches.re.error, RecursionError) as error:
                self.finished_reason = f"invalid stop_regex {pattern!r}: {error}"
                break
            if matched:
                self.finished_reason = f"matched {pattern}"
                return True
        return False


def test_a_search_without_end_costs_its_request(batches: ModuleType) -> None:
    start, before = time.monotonic(), SERVER.read().refusals
    req = Request(batches, ENDLESS_TEXT, ENDLESS)
    assert around_stops(Request.check, req), "SGLang would go on, and put another reason in its place"
    assert time.monotonic() - start < 20
    assert f"not searched within {MAX_SEARCH_S:g} s in 60 characters" in req.finished_reason
    assert "use no repeat within a repeat" in req.finished_reason
    assert SERVER.read().refusals == before + 1


@pytest.mark.parametrize("pattern", ["b+", r"User:\s*$", "(?i)HELLO", r"(\n|\s)*END", "x{3}", "^a"])
@pytest.mark.parametrize("text", ["abba", "hello\n\n END", "User:  ", "xxx", ""])
def test_other_searches_find_what_they_found(batches: ModuleType, pattern: str, text: str) -> None:
    req = Request(batches, text, pattern)
    assert around_stops(Request.check, req, 1) == (re.search(pattern, text) is not None)
    assert (req.finished_reason is None) == (re.search(pattern, text) is None)


def test_a_pattern_that_the_library_does_not_take(batches: ModuleType) -> None:
    with pytest.raises(re.error):
        BoundedPatterns.search("(", "a")


def test_a_request_without_patterns_is_left_alone(batches: ModuleType) -> None:
    assert not around_stops(lambda req: False, Request(batches, "a"))
    assert batches.re is re


def test_several_ranks_search_as_sglang_does(batches: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of which one stops earlier would wait for each other for good."""
    context = sys.modules["sglang.srt.runtime_context"]
    monkeypatch.setattr(context, "get_parallel", lambda: SimpleNamespace(tp_size=2))
    assert around_stops(Request.check, Request(batches, "ab", "b"))
    assert batches.re is re
