"""A running SGLang server, or several that share the rows of each batch, over HTTP.

Knows how rows, streams, sessions and weights are spread over servers; one server's HTTP is `Endpoint`'s.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

from torchrl_sglang_hidden.engines.address import server_at
from torchrl_sglang_hidden.engines.api_key import ApiKey, key_of_pickle
from torchrl_sglang_hidden.engines.attempts import check_open_files
from torchrl_sglang_hidden.engines.base import Engine
from torchrl_sglang_hidden.engines.endpoint import Endpoint
from torchrl_sglang_hidden.engines.fleet import Fleet, model_of
from torchrl_sglang_hidden.engines.meter import Meter
from torchrl_sglang_hidden.engines.retries import RETRIES, Retries
from torchrl_sglang_hidden.engines.router import open_endpoints
from torchrl_sglang_hidden.engines.sessions import Session
from torchrl_sglang_hidden.engines.streams import AsyncStream, Stream, check_stream
from torchrl_sglang_hidden.errors import (
    EngineError,
    EngineUnreachableError,
    InputError,
    ProtocolError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.protocol.head_call import HeadCall
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import raise_errors
from torchrl_sglang_hidden.weights.adapters import AdapterSource, check_adapter, check_adapter_options, open_adapter
from torchrl_sglang_hidden.weights.heads import HeadServer, PushedHeads
from torchrl_sglang_hidden.weights.lease import Leases, leased
from torchrl_sglang_hidden.weights.sharding import update_together
from torchrl_sglang_hidden.weights.transports import open_update
from torchrl_sglang_hidden.weights.validation import (
    BUCKET_BYTES,
    Running,
    ShardedWeights,
    Transport,
    Weights,
    check_options,
    check_weights,
    choose_version,
    open_weights,
)

__all__ = ["SGLangServer", "connect"]

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0
# One update at a time for each server, however many clients this process has of it.
_UPDATING: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


class SGLangServer(Engine):
    """A client of one running SGLang server, or of several that share the rows of each batch.

    Making a client connects to its servers. Each `generate` is one batched HTTP request per server, so that SGLang
    schedules the rows together. Each stream and each session goes to one server; the servers take turns. A client may
    be used from several threads; connections are pooled. A pickle holds addresses and options but no key, and
    reconnects when it is loaded: with the key of this process, or with that of the variable
    ``TORCHRL_SGLANG_HIDDEN_API_KEY`` in another one. A copy has the key.

    Args:
        url: ``"http://host:port"``, or a sequence of them. Several servers must serve the same model, and share the
            rows of each batch by load: by the tokens of prompts, and those to sample, that this client has under way
            on each. Rows of one prompt stay together where that is even enough. A server that cannot be reached any
            more is left out until it is back with the weights of the others and has taken the heads that this client
            pushed: rows go to the others, except those that it was sampling, which are errors. The address of SGLang's
            router stands for the servers behind it, to which the client connects itself.
        api_key: sent as a bearer token. It is in no repr, error or pickle. A warning says where it would travel in
            plain text: over http, to another machine.
        connect_timeout_s: seconds to reach a server.
        read_timeout_s: seconds to wait for the answer to a batch; its requests are then aborted on the server.
        retries: most times that one call of a server is made again, after waits of 0.1, 0.2, 0.4 … seconds and a bit
            by chance; 0 never does. Only where nothing was generated: the server could not be reached, or answered 503
            because its queue is full; and where an answer broke off that only read, such as of ``max_new_tokens=0``.
            An answer that broke off in the middle of sampling is an error at once.

    Raises:
        InputError: ``url`` is no HTTP URL, or has a server twice; or ``retries`` is negative.
        EngineUnreachableError: nothing answers at an address.
        AuthenticationError: the server refuses the key, or wants one.
        CapabilityError: the server does not generate text.
        ProtocolError: the server half speaks another protocol, or the servers do not serve the same model.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        api_key: str | ApiKey | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        read_timeout_s: float = READ_TIMEOUT_S,
        retries: int = RETRIES,
    ) -> None:
        urls: tuple[Any, ...] = tuple(url) if isinstance(url, (list, tuple)) else (url,)
        if not urls:
            raise InputError("SGLangServer(url=()): 0 addresses; pass at least one, such as 'http://127.0.0.1:30000'")
        self._key = api_key if api_key is None or isinstance(api_key, ApiKey) else ApiKey(api_key)
        timeouts = {"connect_timeout_s": connect_timeout_s, "read_timeout_s": read_timeout_s}
        self._config: dict[str, Any] = {**timeouts, "retries": retries}
        self._meter: Meter = Meter(", ".join(map(str, urls)), self._internal_states)
        self._read_timeout_s = read_timeout_s
        again = Retries(retries, lambda: self._meter.tally.add(retries=1))
        addresses: dict[object, str] = {}

        def make(address: str) -> Endpoint:
            if (earlier := addresses.get(server_at(address))) is not None:
                raise InputError(f"url: {earlier!r} and {address!r} are one server; pass each of several servers once")
            endpoint = Endpoint(address, self._key, **timeouts, retries=again)
            addresses[server_at(address)] = address
            endpoint.exchanged = self._meter.exchanged
            return endpoint

        with ExitStack() as stack:
            self._endpoints: list[Endpoint] = []
            for address in urls:
                for endpoint in open_endpoints(address, make, self._key, connect_timeout_s):
                    self._endpoints.append(endpoint)
                    stack.callback(endpoint.close)
            stack.pop_all()
        if self._key is not None:
            self._key.remember(self.urls)
        self._heads = PushedHeads(
            [
                HeadServer(one.url, partial(getattr, one, "info"), partial(_call_and_keep, one))
                for one in self._endpoints
            ]
        )
        self._fleet = Fleet(self._endpoints, self._is_updating, self._heads)
        models = {model_of(endpoint.info) for endpoint in self._endpoints}
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

    @property
    def retried(self) -> int:
        """How many calls of a server this client has made again, as in `counters`; each is a line in the log too."""
        return self._meter.tally.read().retries

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.generate`. Several servers share the requests by load, see `Fleet`.

        A timeout or Ctrl-C aborts the requests on all of them, and so does the failure of one.
        """
        self._check_everywhere(requests)
        with self._meter.watching(requests) as took:
            completions = self._fleet.generate(requests)
            took(completions)
            raise_errors(requests, completions)
        return completions

    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.agenerate`. A cancelled task aborts its requests on the servers."""
        self._check_everywhere(requests)
        with self._meter.watching(requests) as took:
            completions = await self._fleet.agenerate(requests)
            took(completions)
            raise_errors(requests, completions)
        return completions

    def _check_everywhere(self, requests: Sequence[Request]) -> None:
        # All rows are checked before any is sent: a bad one must not leave half a batch running.
        for endpoint in self._endpoints:
            self._check(requests, endpoint.info)

    def check_calls(self, count: int) -> None:
        """See `Engine.check_calls`."""
        check_open_files(count)

    async def close_event_loop(self) -> None:
        """See `Engine.close_event_loop`."""
        for endpoint in self._endpoints:
            await endpoint.close_event_loop()

    def stream(self, request: Request) -> Stream:
        """See `Engine.stream`."""
        self._check_stream(request)

        def opened(endpoint: Endpoint) -> Stream:
            rows = endpoint.stream(_stream_payload(request, endpoint))
            return Stream(rows, request, endpoint.info, self._meter)

        with self._meter.opening():
            return self._fleet.open(opened)

    async def astream(self, request: Request) -> AsyncStream:
        """See `Engine.astream`."""
        self._check_stream(request)

        async def opened(endpoint: Endpoint) -> AsyncStream:
            rows = endpoint.astream(_stream_payload(request, endpoint))
            return await AsyncStream.open(rows, request, endpoint.info, self._meter)

        with self._meter.opening():
            return await self._fleet.aopen(opened)

    def _check_stream(self, request: Request) -> None:
        for endpoint in self._endpoints:
            check_stream(request, endpoint.info, cumulative=endpoint.streams_cumulatively)
        self._check_everywhere([request])

    def session(self) -> Session:
        """See `Engine.session`."""
        return self._fleet.open(lambda endpoint: Session(endpoint.session_host, self._check, self._meter))

    def _internal_states(self) -> list[Any]:
        states: list[Any] = []
        lost: list[EngineUnreachableError] = []
        for endpoint in self._endpoints:
            try:
                states += endpoint.internal_states()
            except EngineUnreachableError as error:
                lost.append(error)
        if len(lost) == len(self._endpoints):
            raise lost[0]
        for one in lost:
            logger.warning("%s; its counters are not in the sums of the others", one)
        return states

    def weight_version(self) -> str:
        """See `Engine.weight_version`; of several servers that differ, all versions with ``and`` between them."""
        return " and ".join(sorted({endpoint.weight_version() for endpoint in self._endpoints}))

    def update_weights(
        self,
        weights: Weights,
        *,
        version: str | None = None,
        transport: Transport = "auto",
        running: Running = "finish",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> str:
        """See `Engine.update_weights`. All servers get the weights, at the same time."""
        check_options(version, transport, running, bucket_bytes)
        opened = open_weights(weights)
        if isinstance(opened, ShardedWeights):
            update = partial(
                self.update_weights, version=version, transport=transport, running=running, bucket_bytes=bucket_bytes
            )
            return update_together(opened, update, bucket_bytes=bucket_bytes)
        with ExitStack() as stack:
            for url in sorted(self.urls):
                stack.enter_context(_UPDATING[url])
            updated = stack.enter_context(self._meter.updating())
            tensors = check_weights(opened, self._endpoints[0].served_weights())
            leases = stack.enter_context(self._leases())
            version = self._new_version(version)
            leases.name(version)
            chosen = [endpoint.choose_transport(transport, weights) for endpoint in self._endpoints]
            ready = stack.enter_context(
                open_update(
                    chosen,
                    weights,
                    tensors,
                    version=version,
                    running=running,
                    bucket_bytes=bucket_bytes,
                    keeps=any(endpoint.supervision.keeps for endpoint in self._endpoints),
                )
            )
            ways = dict(zip(self._endpoints, chosen, strict=True))
            errors = self._everywhere(lambda endpoint: endpoint.load(ways[endpoint], ready))
            return updated(self._all_updated(version, errors))

    def load_adapter(
        self,
        name: str,
        adapter: AdapterSource,
        *,
        which: str | None = None,
        version: str | None = None,
    ) -> str:
        """See `Engine.load_adapter`. All servers get the adapter, at the same time."""
        check_adapter_options(name, version)
        opened = open_adapter(adapter, which)
        with ExitStack() as stack:
            for url in sorted(self.urls):
                stack.enter_context(_UPDATING[url])
            updated = stack.enter_context(self._meter.updating())
            check_adapter(opened, self._endpoints[0].served_weights())
            leases = stack.enter_context(self._leases())
            version = self._new_version(version, whole=True)
            leases.name(version)
            errors = self._everywhere(lambda endpoint: endpoint.load_adapter(name, opened, version))
            return updated(self._all_updated(version, errors))

    def unload_adapter(self, name: str) -> None:
        """See `Engine.unload_adapter`. All servers lose the adapter."""
        check_adapter_options(name)
        for error in self._everywhere(lambda endpoint: endpoint.unload_adapter(name)):
            if error is not None:
                raise error

    def _pushed_heads(self) -> PushedHeads:
        return self._heads

    def _is_updating(self) -> bool:
        return any(_UPDATING[url].locked() for url in self.urls)

    def _leases(self) -> AbstractContextManager[Leases]:
        """Keep other trainers from the servers' weights, and let the servers know that this process lives."""
        endpoints = sorted(self._endpoints, key=lambda endpoint: endpoint.url)
        return leased([one.call for one in endpoints if one.info.pools_in_server], self._read_timeout_s)

    def _new_version(self, version: str | None, *, whole: bool = False) -> str:
        """See `choose_version`."""
        return choose_version(version, [endpoint.weight_version() for endpoint in self._endpoints], whole=whole)

    def _everywhere(self, call: Callable[[Endpoint], None]) -> list[BaseException | None]:
        """Call something of every server at the same time, and return what each raised."""
        with ThreadPoolExecutor(len(self._endpoints), thread_name_prefix="sglang-weights") as pool:
            calls = [pool.submit(call, endpoint) for endpoint in self._endpoints]
        return [call.exception() for call in calls]

    def _all_updated(self, version: str, errors: Sequence[BaseException | None]) -> str:
        failed = [(url, error) for url, error in zip(self.urls, errors, strict=True) if error is not None]
        if not failed:
            self._fleet.bring_back()
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

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reconnect, (self.urls, self._config))

    def __copy__(self) -> SGLangServer:
        copied = SGLangServer(self.urls, api_key=self._key, **self._config)
        copied._heads.kept = self._heads.kept
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> SGLangServer:
        return self.__copy__()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.urls)})"


def connect(url: str | Sequence[str], *, api_key: str | None = None) -> SGLangServer:
    """Connect to running SGLang servers; see `SGLangServer` for the arguments and errors."""
    return SGLangServer(url, api_key=api_key)


def _stream_payload(request: Request, endpoint: Endpoint) -> dict[str, Any]:
    return {**to_payload([request], endpoint.info, binary=False), "stream": True}


def _reconnect(urls: tuple[str, ...], config: dict[str, Any]) -> SGLangServer:
    return SGLangServer(urls, api_key=key_of_pickle(urls), **config)


def _call_and_keep(endpoint: Endpoint, route: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Call about a head, and let whoever starts the server again know what it has."""
    start, call = endpoint.supervision.start, HeadCall.unpack(payload["name"])
    answer = endpoint.call(route, payload)
    if answer.get("success"):
        endpoint.supervision.keep_head(call.name, payload["name"] if call.data else None, start)
    return answer
