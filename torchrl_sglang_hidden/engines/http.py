"""A running SGLang server, or several that share the rows of each batch, over HTTP.

Knows how rows, streams, sessions and weights are spread over servers; one server's HTTP is `Endpoint`'s.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

from torchrl_sglang_hidden.engines.base import Engine
from torchrl_sglang_hidden.engines.endpoint import Endpoint
from torchrl_sglang_hidden.engines.sessions import Session
from torchrl_sglang_hidden.engines.streams import AsyncStream, Stream, check_stream
from torchrl_sglang_hidden.errors import (
    EngineError,
    InputError,
    ProtocolError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.weights.transports import open_update
from torchrl_sglang_hidden.weights.validation import (
    Running,
    Transport,
    Weights,
    check_options,
    check_weights,
    new_version,
    open_weights,
)

__all__ = ["SGLangServer", "connect"]

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0
# One update at a time for each server, however many clients this process has of it.
_UPDATING: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


class SGLangServer(Engine):
    """A client of one running SGLang server, or of several that share the rows of each batch.

    Making a client connects to its servers. Each `generate` is one batched HTTP request per server, so that SGLang
    schedules the rows together. Each stream and each session goes to one server; the servers take turns. A client may
    be used from several threads; connections are pooled. A pickle holds addresses and options, and reconnects when it
    is loaded.

    Args:
        url: ``"http://host:port"``, or a sequence of them. Several servers must serve the same model; each gets an
            equal contiguous share of the rows.
        api_key: sent as a bearer token.
        connect_timeout_s: seconds to reach a server.
        read_timeout_s: seconds to wait for the answer to a batch.

    Raises:
        InputError: ``url`` is no HTTP URL.
        EngineUnreachableError: nothing answers at an address.
        AuthenticationError: the server refuses the key, or wants one.
        CapabilityError: the server does not generate text.
        ProtocolError: the server half speaks another protocol, or the servers do not serve the same model.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        api_key: str | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        urls: tuple[Any, ...] = tuple(url) if isinstance(url, (list, tuple)) else (url,)
        if not urls:
            raise InputError("SGLangServer(url=()): 0 addresses; pass at least one, such as 'http://127.0.0.1:30000'")
        self._config = {"api_key": api_key, "connect_timeout_s": connect_timeout_s, "read_timeout_s": read_timeout_s}
        with ExitStack() as stack:
            self._endpoints = []
            for address in urls:
                self._endpoints.append(Endpoint(address, api_key, connect_timeout_s, read_timeout_s))
                stack.callback(self._endpoints[-1].close)
            stack.pop_all()
        self._turns = itertools.count()
        models = {(e.info.model_path, e.info.vocab_size, e.info.hidden_size) for e in self._endpoints}
        if len(models) > 1:
            self.close()
            raise ProtocolError(
                f"the servers do not serve the same model: {sorted(models, key=str)}; pass servers of one model"
            )

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses of all servers."""
        return tuple(endpoint.url for endpoint in self._endpoints)

    @property
    def url(self) -> str:
        """Address of the first server."""
        return self.urls[0]

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`: of the first server, read at connect; the weight version follows `update_weights`."""
        return self._endpoints[0].info

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.generate`. Each server gets an equal contiguous share of the requests."""
        shares = self._share(requests)
        if len(shares) == 1:
            endpoint, share, first_row = shares[0]
            return endpoint.generate(share, first_row)
        pool = ThreadPoolExecutor(len(shares), thread_name_prefix="sglang-server")
        calls = [pool.submit(endpoint.generate, share, first_row) for endpoint, share, first_row in shares]
        # A failed server is reported at once, not when the slowest of the others is done.
        wait(calls, return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=False)
        for call in calls:
            if call.done() and (error := call.exception()) is not None:
                raise error
        return [completion for call in calls for completion in call.result()]

    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.agenerate`."""
        calls = [
            asyncio.ensure_future(endpoint.agenerate(share, first_row))
            for endpoint, share, first_row in self._share(requests)
        ]
        try:
            parts = await asyncio.gather(*calls)
        finally:
            # After one failure the other answers are of no use. Cancelling a task that is done does nothing.
            for call in calls:
                call.cancel()
        return [completion for part in parts for completion in part]

    def stream(self, request: Request) -> Stream:
        """See `Engine.stream`."""
        endpoint = self._next_endpoint()
        payload = self._stream_payload(request, endpoint)
        return Stream(endpoint.stream(payload), request, endpoint.info)

    async def astream(self, request: Request) -> AsyncStream:
        """See `Engine.astream`."""
        endpoint = self._next_endpoint()
        payload = self._stream_payload(request, endpoint)
        return await AsyncStream.open(endpoint.astream(payload), request, endpoint.info)

    def _stream_payload(self, request: Request, endpoint: Endpoint) -> dict[str, Any]:
        check_stream(request, endpoint.info, cumulative=endpoint.streams_cumulatively)
        self._check([request], endpoint.info)
        return {**to_payload([request], endpoint.info, binary=False), "stream": True}

    def session(self) -> Session:
        """See `Engine.session`."""
        return Session(self._next_endpoint().session_host, self._check)

    def _next_endpoint(self) -> Endpoint:
        return self._endpoints[next(self._turns) % len(self._endpoints)]

    def update_weights(
        self,
        weights: Weights,
        *,
        version: str | None = None,
        transport: Transport = "auto",
        running: Running = "finish",
    ) -> str:
        """See `Engine.update_weights`. All servers get the weights, at the same time."""
        check_options(version, transport, running)
        with ExitStack() as stack:
            for url in sorted(set(self.urls)):
                stack.enter_context(_UPDATING[url])
            tensors = check_weights(open_weights(weights), self._endpoints[0].served_weights())
            before = [endpoint.weight_version() for endpoint in self._endpoints]
            version = new_version(before) if version is None else version
            if set(before) == {version}:
                raise InputError(
                    f"version={version!r} is that of the weights already served, so that no sample could tell the two "
                    "apart; pass another, or None"
                )
            chosen = [endpoint.choose_transport(transport, weights) for endpoint in self._endpoints]
            update = stack.enter_context(open_update(chosen, weights, tensors, version=version, running=running))
            pool = stack.enter_context(ThreadPoolExecutor(len(chosen), thread_name_prefix="sglang-weights"))
            calls = [
                pool.submit(endpoint.load, name, update) for endpoint, name in zip(self._endpoints, chosen, strict=True)
            ]
            errors = [call.exception() for call in calls]
        return self._all_updated(version, errors)

    def _all_updated(self, version: str, errors: Sequence[BaseException | None]) -> str:
        failed = [(url, error) for url, error in zip(self.urls, errors, strict=True) if error is not None]
        if not failed:
            return version
        unforeseen = next((error for _, error in failed if not isinstance(error, SGLangHiddenError)), None)
        if unforeseen is not None or len(errors) == 1:
            raise unforeseen or failed[0][1]
        raise EngineError(
            f"{len(errors) - len(failed)} of {len(errors)} servers took version {version!r}, and not "
            f"{'; '.join(f'{url}: {error}' for url, error in failed)}; they serve different weights until an update "
            "reaches all of them; update again"
        ) from failed[0][1]

    def close(self) -> None:
        """Close the connections; the servers run on."""
        for endpoint in self._endpoints:
            endpoint.close()

    def _share(self, requests: Sequence[Request]) -> list[tuple[Endpoint, Sequence[Request], int]]:
        """Return each server with its requests and the row of the batch at which they start."""
        # All rows are checked before any is sent: a bad one must not leave half a batch running.
        for endpoint in self._endpoints:
            self._check(requests, endpoint.info)
        size = -(-len(requests) // len(self._endpoints))
        starts = range(0, len(requests), size)
        return [(e, requests[start : start + size], start) for e, start in zip(self._endpoints, starts, strict=False)]

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reconnect, (self.urls, self._config))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.urls)})"


def connect(url: str | Sequence[str], *, api_key: str | None = None) -> SGLangServer:
    """Connect to running SGLang servers; see `SGLangServer` for the arguments and errors."""
    return SGLangServer(url, api_key=api_key)


def _reconnect(urls: tuple[str, ...], config: dict[str, Any]) -> SGLangServer:
    return SGLangServer(urls, **config)
