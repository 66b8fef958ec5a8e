"""Counts what an operator looks at: requests, rows, gaps, retries, bytes. Read in Python, and in SGLang's ``/metrics``.

A `Tally` is added to by those who do the work, from any thread, and read as a frozen record. `Counters` are those of a
client, and `ServerCounters` those of the server half in one of SGLang's processes, whose tally is `SERVER`. Knows
nothing of what is counted, nor of engines.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, ParamSpec, Self, TypeVar

__all__ = ["SERVER", "Counters", "ServerCounters", "Tally", "timed"]

# Of a counter that a server sends: no float holds some integers, and NaN and infinity spoil every sum.
_MOST = 2**63

Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Counters:
    """Holds what one engine's client counted since it was made; `Engine.counters` returns it.

    Args:
        requests: requests sent: one for each prompt, sample and scored sequence. A retried one counts once.
        completions: answers that were read and counted to be whole.
        prompt_tokens: tokens of the prompts in these answers.
        cached_tokens: those of them that SGLang had in its prefix cache.
        response_tokens: tokens sampled in these answers.
        rows: hidden states in these answers, pooled or as they are.
        gaps: answers whose states, log-probs or ids did not agree with their tokens: `AlignmentError`.
        refusals: calls that the engine read and refused.
        failures: calls that failed otherwise: no connection, no answer in time, no readable answer.
        retries: calls sent again.
        sent_bytes: bytes of the bodies of HTTP calls.
        received_bytes: bytes of the bodies of the answers, as they came over the network. What comes through shared
            memory is not in it.
        weight_updates: updates of the weights that reached the engine, of adapters too.
        weight_seconds: seconds that these took.
    """

    requests: int = 0
    completions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    response_tokens: int = 0
    rows: int = 0
    gaps: int = 0
    refusals: int = 0
    failures: int = 0
    retries: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    weight_updates: int = 0
    weight_seconds: float = 0.0

    def __add__(self, other: Self) -> Self:
        """Return the sums, such as of several servers' clients."""
        return type(self)(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )


@dataclass(frozen=True, slots=True)
class ServerCounters:
    """Holds what the server half counted since the server started, over all its clients.

    Args:
        requests: finished requests that asked something of the server half.
        rows: hidden states taken for them.
        refusals: requests that the server half refused, each with the reason in its answer.
        answer_bytes: bytes of states and logits in the answers.
        shared_bytes: those of them that went through shared memory.
        prefix_hits: prompts that went on from running values kept for a prompt that began alike.
        prefix_rows: rows that were not computed again for that reason.
        steps: forward steps in which the server half had something to do.
        step_seconds: time of the scheduler's thread that it took in them, to plan, take, constrain and count. The
            device works on meanwhile.
        weight_updates: changes of the weights that it saw.
    """

    requests: int = 0
    rows: int = 0
    refusals: int = 0
    answer_bytes: int = 0
    shared_bytes: int = 0
    prefix_hits: int = 0
    prefix_rows: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    weight_updates: int = 0

    def __add__(self, other: Self) -> Self:
        """Return the sums, such as of several ranks."""
        return type(self)(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )

    @classmethod
    def of(cls, packed: Iterable[object]) -> Self:
        """Return the sums of what `Tally.pack` wrote; what is missing, or no number that a counter reaches, is 0."""
        total = cls()
        for values in packed:
            if isinstance(values, Mapping):
                total += cls(**{field.name: _number(values.get(field.name)) for field in fields(cls)})
        return total


Kind = TypeVar("Kind", bound=Counters | ServerCounters)


class Tally(Generic[Kind]):
    """Adds up one kind of counters, from any thread.

    Args:
        kind: the record that it is read as.

    Attributes:
        on_add: called with the amounts after each addition; None for nobody. Set where they are published.
    """

    def __init__(self, kind: type[Kind]) -> None:
        self._kind = kind
        self._values: dict[str, Any] = {field.name: field.default for field in fields(kind)}
        self._lock = threading.Lock()
        self.on_add: Callable[[Mapping[str, float]], None] | None = None

    def add(self, **amounts: float) -> None:
        """Add to counters by their names: ``tally.add(requests=1, rows=12)``."""
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount
        if self.on_add is not None:
            self.on_add(amounts)

    def read(self) -> Kind:
        """Return the counters at this moment."""
        with self._lock:
            return self._kind(**self._values)

    def pack(self) -> dict[str, float]:
        """Return the counters as JSON carries them."""
        with self._lock:
            return dict(self._values)


def timed(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """Make a method of the server half add its time to ``SERVER.step_seconds``. Not for one that calls another such."""

    @functools.wraps(method)
    def measure(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            SERVER.add(step_seconds=time.perf_counter() - start)

    return measure


def _number(value: object) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and 0 <= value < _MOST else 0  # type: ignore[operator]


# Of the process that this module is loaded in: the server half's parts add to it wherever they run.
SERVER: Tally[ServerCounters] = Tally(ServerCounters)
