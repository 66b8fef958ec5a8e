"""`Background`: one call at a time, whose result is taken once."""

from __future__ import annotations

import pickle
import threading

import pytest

from torchrl_sglang_hidden.rl.background import Background


def test_a_result_is_taken_once() -> None:
    background: Background[int] = Background()
    assert background.take() is None
    background.start(lambda: threading.get_ident())
    assert background.take() not in (None, threading.get_ident())
    assert background.take() is None


def test_an_error_is_raised_where_it_is_taken_and_not_where_it_is_settled() -> None:
    background: Background[int] = Background()
    background.start(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        background.take()
    background.start(lambda: 1 // 0)
    background.settle()
    assert background.take() is None


def test_after_the_end_of_its_thread_another_begins() -> None:
    background: Background[int] = Background()
    for _ in range(2):
        background.start(lambda: 7)
        assert background.take() == 7
        background.close()
    copied = pickle.loads(pickle.dumps(background))
    copied.start(lambda: 8)
    assert copied.take() == 8
    copied.close()
