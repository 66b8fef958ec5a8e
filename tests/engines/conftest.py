"""Fixtures of the engines' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.held_engine import Held, Turned


@pytest.fixture
def inner() -> Iterator[Held]:
    engine = Held()
    yield engine
    engine.gate.set()


@pytest.fixture
def make(inner: Held) -> Iterator[Callable[..., Turned]]:
    """Yield a function that makes batching engines over `inner`. At the end it ends whatever still waits."""
    made: list[Turned] = []

    def make_one(**options: Any) -> Turned:
        made.append(Turned(inner, **options))
        return made[-1]

    yield make_one
    for one in made:
        one.close()
