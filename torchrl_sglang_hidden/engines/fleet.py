"""Calls that several servers share: rows are spread by load, and go to the other servers when one is lost.

Knows which servers answer, and the versions of their weights; nothing of how weights, heads or requests travel.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import itertools
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TypeVar

from torchrl_sglang_hidden.engines.attempts import new_request_ids
from torchrl_sglang_hidden.engines.endpoint import ABORT_TIMEOUT_S, Endpoint
from torchrl_sglang_hidden.engines.http_answers import reached
from torchrl_sglang_hidden.engines.mixtures import Mixtures
from torchrl_sglang_hidden.engines.retries import Retries
from torchrl_sglang_hidden.engines.sharing import LoadSharing
from torchrl_sglang_hidden.engines.waits import INTERRUPT_S, in_daemon_thread
from torchrl_sglang_hidden.errors import EngineError, EngineUnreachableError
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request, failed_completion
from torchrl_sglang_hidden.weights.heads import PushedHeads

__all__ = ["Fleet", "model_of"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A lost server is asked again after this time, then after twice as long, and so on up to the second one.
AWAY_S = 5.0
MAX_AWAY_S = 60.0


class Fleet:
    """Spreads calls over servers of one model, and leaves out a server that is lost.

    A server that cannot be reached, or goes away while it answers, gets nothing more. It is asked now and then whether
    it is back, and takes rows again when it serves the weights that the others serve and has taken the heads that this
    client pushed. Its rows go to the other servers where that does no harm: nothing of them was sent, or they only
    read. A row that was being sampled is not sampled a second time behind the caller's back: it is an error, of the
    row where `Request.return_errors` says so, else of the call.

    Args:
        endpoints: the servers. With one there is nothing to leave out, and every error is the call's.
        is_updating: whether this process is giving the servers new weights, so that their versions may differ.
        heads: the heads that this client pushes to the servers.
    """

    def __init__(self, endpoints: Sequence[Endpoint], is_updating: Callable[[], bool], heads: PushedHeads) -> None:
        self._endpoints = tuple(endpoints)
        self._is_updating = is_updating
        self._heads = heads
        self._mixtures = Mixtures(is_updating, lambda: heads.kept.lock.locked())
        self._model = model_of(endpoints[0].info)
        self._sharing = LoadSharing(len(endpoints))
        self._turns = itertools.count()
        self._away: dict[Endpoint, _Absence] = {}
        # Why one that answers again gets no rows, so that it is said once.
        self._stays_out: dict[Endpoint, str] = {}
        self._lock = threading.Lock()

    # --- which servers ----------------------------------------------------------------------------------------------

    def present(self) -> list[int]:
        """Return the numbers of the servers that get calls: all, where none is known to answer."""
        with self._lock:
            up = [number for number, one in enumerate(self._endpoints) if one not in self._away]
        return up or list(range(len(self._endpoints)))

    def bring_back(self) -> None:
        """Let the lost servers that answer take calls again: an update of the weights just reached them all."""
        with self._lock:
            away = list(self._away)
        self._ask_whether_back(away)

    def _lose(self, endpoint: Endpoint, error: EngineUnreachableError) -> None:
        with self._lock:
            known = endpoint in self._away
            self._away.setdefault(endpoint, _Absence(monotonic() + AWAY_S, AWAY_S))
            left = len(self._endpoints) - len(self._away)
        if not known:
            take = f"{left} of {len(self._endpoints)} servers take the rows until it is back"
            logger.warning("%s; %s", error, take if left else "no other server is left")

    def _prepare(self) -> None:
        """Ask for absent servers whose time has come, and check that the present ones serve the same weights.

        Raises:
            EngineError: they do not, and a call would mix them.
        """
        if len(self._endpoints) == 1 or self._is_updating():
            return
        self._ask_whether_back(self._due())
        present = [self._endpoints[number] for number in self.present()]
        if len({endpoint.info.weight_version for endpoint in present}) == 1:
            return
        # What a client read when it connected may be of the middle of another's update.
        for endpoint in present:
            endpoint.info = dataclasses.replace(endpoint.info, weight_version=endpoint.weight_version())
        versions = {endpoint.url: endpoint.info.weight_version for endpoint in present}
        if len(set(versions.values())) > 1 and not self._is_updating():
            raise EngineError(
                f"the servers serve different weights, {versions}, and one call would mix them; update the weights "
                "again, or connect to those servers alone that have the right ones"
            )

    def _due(self) -> list[Endpoint]:
        """Return the absent servers to ask now; nobody else asks them meanwhile."""
        now = monotonic()
        with self._lock:
            if len(self._away) == len(self._endpoints):
                return list(self._endpoints)  # nobody to wait for them with
            due = [endpoint for endpoint, absence in self._away.items() if absence.ask_at <= now]
            for endpoint in due:
                wait_s = min(2 * self._away[endpoint].wait_s, MAX_AWAY_S)
                self._away[endpoint] = _Absence(now + wait_s, wait_s)
        return due

    def _ask_whether_back(self, absent: Sequence[Endpoint]) -> None:
        """Let those of the lost servers take calls again that serve what the present ones serve."""
        with self._lock:
            present = [endpoint for endpoint in self._endpoints if endpoint not in self._away]
        for endpoint in absent:
            try:
                why = self._make_ready(endpoint, present)
            except EngineError as error:
                logger.info("%s is not back: %s", endpoint.url, error)
                continue
            if why:
                if self._stays_out.get(endpoint) != why:
                    logger.warning("%s is back %s", endpoint.url, why)
                self._stays_out[endpoint] = why
                continue
            with self._lock:
                self._away.pop(endpoint, None)
                self._stays_out.pop(endpoint, None)
            logger.warning("%s is back, and takes rows again", endpoint.url)

    def _make_ready(self, endpoint: Endpoint, present: Sequence[Endpoint]) -> str:
        """Give a server that is back its heads; return why it gets no rows even so, "" where it does.

        Raises:
            EngineError: it is not back, or failed.
        """
        # Another process, which may have another model, other weights and other features. Asked once: the rows of a
        # call wait for it.
        endpoint.read_description(Retries(0))
        found = endpoint.info
        if model_of(found) != self._model:
            return f"with another model, {found.model_path}; it gets no rows"
        # Where all were lost there is nothing to compare with, and `_prepare` compares those that are back.
        expected = present[0].weight_version() if present else found.weight_version
        if found.weight_version != expected:
            return (
                f"with weights of version {found.weight_version!r}, and the others serve {expected!r}; it gets no rows "
                "until an update reaches all servers"
            )
        try:
            self._heads.push_again(endpoint.url)
        except EngineUnreachableError:
            raise
        except EngineError as error:
            return f"and does not take the heads that the others have ({error}); it gets no rows until it does"
        return ""

    # --- one request on one server ----------------------------------------------------------------------------------

    def open(self, opened: Callable[[Endpoint], T]) -> T:
        """Open something on the next server, such as a stream; on another one, where the next cannot be reached."""
        self._prepare()
        while True:
            endpoint = self._next()
            try:
                return opened(endpoint)
            except EngineUnreachableError as error:
                if not self._goes_on_without(endpoint, error):
                    raise

    async def aopen(self, opened: Callable[[Endpoint], Awaitable[T]]) -> T:
        """Open something as `open` does, without blocking the event loop."""
        await self._aprepare()
        while True:
            endpoint = self._next()
            try:
                return await opened(endpoint)
            except EngineUnreachableError as error:
                if not self._goes_on_without(endpoint, error):
                    raise

    def _next(self) -> Endpoint:
        present = self.present()
        return self._endpoints[present[next(self._turns) % len(present)]]

    def _goes_on_without(self, endpoint: Endpoint, error: EngineUnreachableError) -> bool:
        return self._has_others(endpoint, error) and not reached(error)

    def _has_others(self, endpoint: Endpoint, error: EngineUnreachableError) -> bool:
        """Leave a lost server out, and return whether others are left."""
        if len(self._endpoints) == 1:
            return False
        self._lose(endpoint, error)
        with self._lock:
            return len(self._away) < len(self._endpoints)

    async def _aprepare(self) -> None:
        if len(self._endpoints) > 1:
            await asyncio.to_thread(self._prepare)

    # --- batches ----------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Generate one completion per request.

        Args:
            requests: checked requests.

        Returns:
            One `Completion` per request, in order; what went wrong with one of them alone is in its ``error``.

        Raises:
            EngineError: a server failed, or none is left; or they serve different weights.
        """
        self._prepare()
        found: dict[int, Completion] = {}
        rows = list(range(len(requests)))
        while rows:
            with self._share(requests, rows) as shares:
                parts = [self._generate(shares[0])] if len(shares) == 1 else _in_threads(self._generate, shares)
            rows = self._collect(found, shares, parts)
        return [found[row] for row in range(len(requests))]

    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        """Generate as `generate` does, without blocking the event loop."""
        await self._aprepare()
        found: dict[int, Completion] = {}
        rows = list(range(len(requests)))
        while rows:
            with self._share(requests, rows) as shares:
                calls = [asyncio.ensure_future(self._agenerate(share)) for share in shares]
                try:
                    parts = await asyncio.gather(*calls)
                finally:
                    # After one failure the other answers are of no use. Cancelling a task that is done does nothing.
                    for call in calls:
                        call.cancel()
                    # They abort their requests, for which the event loop must go on.
                    await asyncio.wait(calls, timeout=ABORT_TIMEOUT_S)
                    await asyncio.gather(*(share.endpoint.wait_for_aborts() for share in shares))
            rows = self._collect(found, shares, parts)
        return [found[row] for row in range(len(requests))]

    @contextmanager
    def _share(self, requests: Sequence[Request], rows: Sequence[int]) -> Iterator[list[Share]]:
        with self._sharing.share([requests[row] for row in rows], self.present()) as shares:
            yield [
                Share(
                    endpoint,
                    [rows[place] for place in places],
                    [requests[rows[place]] for place in places],
                    new_request_ids(len(places)),
                )
                for endpoint, places in zip(self._endpoints, shares, strict=True)
                if places
            ]

    def _generate(self, share: Share) -> Sequence[Completion | None]:
        try:
            return share.endpoint.generate(share.requests, share.rids, share.rows)
        except EngineUnreachableError as error:
            return self._after_loss(share, error)

    async def _agenerate(self, share: Share) -> Sequence[Completion | None]:
        try:
            return await share.endpoint.agenerate(share.requests, share.rids, share.rows)
        except EngineUnreachableError as error:
            return self._after_loss(share, error)

    def _after_loss(self, share: Share, error: EngineUnreachableError) -> list[Completion | None]:
        """Return for each row of a lost server None where another may answer it, else a completion with the error.

        Raises:
            EngineUnreachableError: no other server is left, or a row's error is the call's.
        """
        if not self._has_others(share.endpoint, error):
            raise error
        if not reached(error):
            return [None] * len(share.rows)
        version = share.endpoint.info.weight_version
        answered: list[Completion | None] = []
        for row, request in zip(share.rows, share.requests, strict=True):
            if request.reads_only:
                answered.append(None)
                continue
            lost = copy.copy(error)
            lost.args = (f"row {row}: {error}; it was being sampled, and another server would sample another response",)
            if not request.return_errors:
                raise lost from error
            answered.append(failed_completion(request, lost, version))
        return answered

    def _collect(
        self, found: dict[int, Completion], shares: Sequence[Share], parts: Sequence[Sequence[Completion | None]]
    ) -> list[int]:
        """Put the completions of all shares where they belong, and return the rows that are still to be answered."""
        left = []
        for share, part in zip(shares, parts, strict=True):
            for row, completion in zip(share.rows, part, strict=True):
                if completion is None:
                    left.append(row)
                else:
                    found[row] = completion
        self._mixtures.tell({share.endpoint.url: part for share, part in zip(shares, parts, strict=True)})
        return sorted(left)


@dataclass(frozen=True, slots=True)
class _Absence:
    """When to ask for a lost server again (`monotonic`), and how long after that."""

    ask_at: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class Share:
    """One server's part of a batch.

    Args:
        endpoint: the server.
        rows: where its requests stand in the batch.
        requests: its requests.
        rids: their names on the server.
    """

    endpoint: Endpoint
    rows: list[int]
    requests: list[Request]
    rids: list[str]


def model_of(info: EngineInfo) -> tuple[object, ...]:
    """Return what servers that share rows must have in common."""
    return info.model_path, info.vocab_size, info.hidden_size


def _in_threads(generate: Callable[[Share], T], shares: Sequence[Share]) -> list[T]:
    calls = [in_daemon_thread(partial(generate, share)) for share in shares]
    try:
        waits = True
        while waits:
            # A failed server is reported at once, not when the slowest of the others is done.
            done, others = wait(calls, timeout=INTERRUPT_S, return_when=FIRST_EXCEPTION)
            waits = bool(others) and not any(call.exception() for call in done)
        for call in calls:
            if call.done() and (error := call.exception()) is not None:
                raise error
        return [call.result() for call in calls]
    finally:
        # The caller may close the engine next, or end.
        wait(
            [
                in_daemon_thread(partial(share.endpoint.abort, share.rids))
                for share, call in zip(shares, calls, strict=True)
                if not call.done()
            ],
            timeout=ABORT_TIMEOUT_S,
        )
