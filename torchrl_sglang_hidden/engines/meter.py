"""Counts what goes through one engine, and writes the log's line about what an operator should know of it.

Every engine of this package has a `Meter`; `Engine.counters` and `Engine.server_counters` read it. Knows requests,
completions and errors, and nothing of how they travel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import httpx

from torchrl_sglang_hidden.counters import Counters, ServerCounters, Tally
from torchrl_sglang_hidden.errors import (
    AlignmentError,
    BatchCancelledError,
    EngineError,
    RequestAbortedError,
    RequestRejectedError,
)
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.server.metrics import COUNTERS

__all__ = ["Meter"]

logger = logging.getLogger(__name__)

Took = Callable[[Sequence[Completion | None]], None]


class Meter:
    """The counters of one engine's client.

    Args:
        name: of the engine, for the log.
        states: asks the engine for SGLang's internal state, one for each data-parallel rank.

    Attributes:
        tally: what was counted; whoever sends calls again adds its retries.
    """

    def __init__(self, name: str, states: Callable[[], Iterable[Any]]) -> None:
        self.tally: Tally[Counters] = Tally(Counters)
        self._name, self._states = name, states

    @classmethod
    def of_nobody(cls) -> Self:
        """Return a meter that nobody reads, for an engine of another class."""
        return cls("the engine", list)

    def server(self) -> ServerCounters:
        """Ask the server half for its counters, summed over data-parallel ranks and servers."""
        return ServerCounters.of(state.get(COUNTERS) for state in self._states() if isinstance(state, Mapping))

    @contextmanager
    def watching(self, requests: Sequence[Request]) -> Iterator[Took]:
        """Count requests, the completions that the block passes on, and the error that it ends with.

        Yields:
            What takes the completions, once they are read.
        """
        self.tally.add(requests=len(requests))
        try:
            yield self.took
        except BaseException as error:
            self.failed(error)
            raise

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Count the request of a stream that no server opens, and why. A stream that is open counts itself."""
        try:
            yield
        except BaseException as error:
            self.tally.add(requests=1)
            self.failed(error)
            raise

    def failed(self, error: BaseException) -> None:
        """Count what a call ended with; bad input, which was not sent, and Ctrl-C are nothing to an operator."""
        # The error itself, and who supervises the server, have the last lines of the server's log.
        says = str(error).partition("\n")[0]
        if isinstance(error, AlignmentError):
            self.tally.add(gaps=1)
            logger.error("%s: a gap, and no numbers in its place: %s", self._name, says)
        elif isinstance(error, RequestRejectedError):
            self.tally.add(refusals=1)
            logger.warning("%s refused a call: %s", self._name, says)
        elif isinstance(error, EngineError) and not isinstance(error, (BatchCancelledError, RequestAbortedError)):
            self.tally.add(failures=1)
            logger.warning("%s: a call failed: %s", self._name, says)

    def took(self, completions: Sequence[Completion | None]) -> None:
        """Count completions that were read; those with an error are no whole answers."""
        read = [one for one in completions if one is not None and one.error is None]
        self.tally.add(
            completions=len(read),
            prompt_tokens=sum(len(one.prompt_ids) for one in read),
            cached_tokens=sum(one.cached_tokens for one in read),
            response_tokens=sum(len(one.response_ids) for one in read),
            rows=sum(map(_rows_of, read)),
        )

    def exchanged(self, response: httpx.Response) -> None:
        """Count the bytes of one HTTP call whose answer was read."""
        self.tally.add(sent_bytes=len(response.request.content), received_bytes=response.num_bytes_downloaded)

    @contextmanager
    def updating(self) -> Iterator[Callable[[str], str]]:
        """Count an update of the weights.

        Yields:
            What takes the new version once the engine has it, and returns it.
        """
        start = time.perf_counter()

        def updated(version: str) -> str:
            seconds = time.perf_counter() - start
            self.tally.add(weight_updates=1, weight_seconds=seconds)
            logger.info("%s has the weights of version %s, after %.2f s", self._name, version, seconds)
            return version

        try:
            yield updated
        except EngineError as error:
            logger.error("%s did not get the new weights: %s", self._name, error)
            raise


def _rows_of(completion: Completion) -> int:
    """Return how many hidden states an answer stands for: a row counts once in each segment or span that it is in."""
    pooled = (*completion.hidden.values(), *completion.spans.values())
    kept = 0 if completion.token_rows is None else len(completion.token_rows.rows_ND)
    return sum(one.count for one in pooled) + kept
