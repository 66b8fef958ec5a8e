"""A running SGLang server, or several, over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from torchrl_sglang_hidden.channel import CHANNEL
from torchrl_sglang_hidden.engines import broadcast
from torchrl_sglang_hidden.engines.base import Engine, ask_model
from torchrl_sglang_hidden.engines.replies import read_event, read_json, reason, translated
from torchrl_sglang_hidden.engines.sessions import Session, SessionHost
from torchrl_sglang_hidden.engines.streams import AsyncStream, Stream, check_stream
from torchrl_sglang_hidden.engines.weights import (
    Running,
    Transport,
    Weights,
    check_options,
    check_weights,
    checkpoint,
    load_from_disk,
    new_version,
    open_weights,
)
from torchrl_sglang_hidden.errors import (
    CapabilityError,
    EngineError,
    InputError,
    InputTypeError,
    ProtocolError,
    RequestRejectedError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.server.checkpoint import ServedWeights, is_readable, served_weights
from torchrl_sglang_hidden.specs import Completion, EngineInfo, Request
from torchrl_sglang_hidden.wire import read_info, read_responses, to_payload, warm_up

__all__ = ["SGLangServer", "connect"]

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0
# uvicorn closes an idle connection after 5 s; one reused in that instant would fail.
KEEPALIVE_S = 2.0
# One update at a time for each server, however many clients this process has of it.
_UPDATING: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class SGLangServer(Engine):
    """A client of one running SGLang server, or of several that share the rows of each batch.

    Streams and sessions go to the servers in turn, each to one of them.

    Connects when made. Each call is one batched request per server, so that SGLang schedules the rows together. Safe
    from several threads; connections are pooled. Pickles as its addresses and reconnects.

    Args:
        url: ``"http://host:port"``, or a sequence of them. Several servers must serve the same model; each gets an
            equal contiguous share of the rows.
        api_key: sent as a bearer token.
        connect_timeout_s: seconds to reach a server.
        read_timeout_s: seconds to wait for a batch.

    Raises:
        InputError: not an HTTP URL.
        EngineUnreachableError: nothing answers there.
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
            for one in urls:
                self._endpoints.append(_Endpoint(one, api_key, connect_timeout_s, read_timeout_s))
                stack.callback(self._endpoints[-1].close)
            stack.pop_all()
        self._turns = itertools.count()
        models = {(e.info.model_path, e.info.vocab_size, e.info.hidden_size) for e in self._endpoints}
        if len(models) > 1:
            self.close()
            raise ProtocolError(f"the servers do not serve the same model: {sorted(models, key=str)}")

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers' addresses."""
        return tuple(endpoint.url for endpoint in self._endpoints)

    @property
    def url(self) -> str:
        """The first server's address."""
        return self.urls[0]

    @property
    def info(self) -> EngineInfo:
        """What the first server said of itself at connect, and the version of the weights sent to it since."""
        return self._endpoints[0].info

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.generate`."""
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
            # Where one failed, the others' answers are of no use. A task that is done takes no notice.
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

    def _stream_payload(self, request: Request, endpoint: _Endpoint) -> dict[str, Any]:
        check_stream(request, endpoint.info, cumulative=endpoint.streams_cumulatively)
        self._check([request], endpoint.info)
        return {**to_payload([request], endpoint.info, binary=False), "stream": True}

    def session(self) -> Session:
        """See `Engine.session`."""
        return Session(self._next_endpoint().session_host, self._check)

    def _next_endpoint(self) -> _Endpoint:
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
            ways = [endpoint.way(transport, weights) for endpoint in self._endpoints]
            path = None
            if "disk" in ways:
                # One checkpoint for all servers of this machine; a directory of the user's is one already.
                if isinstance(weights, (str, os.PathLike)):
                    path = Path(weights).expanduser().absolute()
                else:
                    path = stack.enter_context(checkpoint(tensors))
            pool = stack.enter_context(ThreadPoolExecutor(len(ways), thread_name_prefix="sglang-weights"))
            calls = [
                pool.submit(endpoint.load, way, path, tensors, version, running)
                for endpoint, way in zip(self._endpoints, ways, strict=True)
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
            "reaches all of them"
        ) from failed[0][1]

    def close(self) -> None:
        """Closes the connections; the servers run on."""
        for endpoint in self._endpoints:
            endpoint.close()

    def _share(self, requests: Sequence[Request]) -> list[tuple[_Endpoint, Sequence[Request], int]]:
        """Each server's requests, and the row that they start at."""
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
    """Connects to running SGLang servers; see `SGLangServer` for the arguments and errors."""
    return SGLangServer(url, api_key=api_key)


def _reconnect(urls: tuple[str, ...], config: dict[str, Any]) -> SGLangServer:
    return SGLangServer(urls, **config)


class _Endpoint:
    """One server: its address, its connections, what it said of itself."""

    def __init__(self, url: str, api_key: str | None, connect_timeout_s: float, read_timeout_s: float) -> None:
        parts = _split(url)
        self._host, self._port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
        self._read_timeout_s = read_timeout_s
        if api_key is not None:
            _check_api_key(api_key)
        self.url = url.rstrip("/")
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            "timeout": httpx.Timeout(read_timeout_s, connect=connect_timeout_s),
            "limits": httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S),
            # A proxy from the environment is for the world outside, never for this machine.
            "trust_env": parts.hostname not in LOOPBACK,
        }
        self._client = httpx.Client(**self._options)
        # An async connection belongs to the event loop it was opened in.
        self._async_clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}
        self._lock = threading.Lock()
        with ExitStack() as stack:
            stack.callback(self._client.close)
            server_info = self._get("/server_info")
            payload = warm_up(server_info)
            if payload is not None:
                with translated(self.url):
                    read_json(self._client.post("/generate", json=payload), self.url)
                server_info = self._get("/server_info")
            self.info = read_info(self._get("/model_info"), server_info, ask_model)
            stack.pop_all()
        self.streams_cumulatively = not server_info.get("incremental_streaming_output")
        ranks = server_info.get("dp_size") or 1
        self.session_host = SessionHost(lambda: self.info, self.call, self.ask, binary=False, num_ranks=ranks)

    def _get(self, path: str) -> dict[str, Any]:
        with translated(self.url):
            response = self._client.get(path)
        body = read_json(response, self.url)
        if not isinstance(body, dict):
            raise ProtocolError(f"{self.url}{path} answered {str(body)[:80]!r}; is that an SGLang server?")
        return body

    def generate(self, requests: Sequence[Request], first_row: int) -> list[Completion]:
        rows = self.ask(to_payload(requests, self.info, binary=False))
        return read_responses(requests, rows, self.info, first_row=first_row)

    def ask(self, payload: dict[str, Any]) -> Any:
        with translated(self.url):
            response = self._client.post("/generate", json=payload)
        return read_json(response, self.url)

    async def agenerate(self, requests: Sequence[Request], first_row: int) -> list[Completion]:
        payload = to_payload(requests, self.info, binary=False)
        with translated(self.url):
            response = await self._async_client().post("/generate", json=payload)
        return read_responses(requests, read_json(response, self.url), self.info, first_row=first_row)

    def stream(self, payload: dict[str, Any]) -> Generator[Any, None, None]:
        """See `Stream`. Closing it closes the connection, on which SGLang drops the request."""
        with translated(self.url), self._client.stream("POST", "/generate", json=payload) as response:
            if response.is_error:
                response.read()
                read_json(response, self.url)
            yield None
            for line in response.iter_lines():
                event = read_event(line, self.url)
                if event is not None:
                    yield event

    async def astream(self, payload: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """As `stream`."""
        with translated(self.url):
            async with self._async_client().stream("POST", "/generate", json=payload) as response:
                if response.is_error:
                    await response.aread()
                    read_json(response, self.url)
                yield None
                async for line in response.aiter_lines():
                    event = read_event(line, self.url)
                    if event is not None:
                        yield event

    def call(self, route: str, payload: dict[str, Any]) -> dict[str, Any]:
        """One of SGLang's control routes. Some say in words what others say in JSON."""
        with translated(self.url):
            response = self._client.post(f"/{route}", json=payload)
        if response.status_code not in (200, 400):
            return dict(read_json(response, self.url))
        try:
            body = response.json()
        except ValueError:
            return {"success": response.status_code == 200, "message": response.text}
        if isinstance(body, str):
            return {"success": response.status_code == 200, "message": body}
        if not isinstance(body, dict) or (response.status_code == 400 and "success" not in body):
            raise RequestRejectedError(f"{self.url}/{route} answered {response.status_code}: {reason(response)}")
        return body

    def weight_version(self) -> str:
        """The version at this moment: other clients may have moved it."""
        return str(self._get("/model_info")["weight_version"])

    def served_weights(self) -> ServedWeights:
        """Names and shapes of the served checkpoint: from the server half, or from the directory itself."""
        if self.info.pools_in_server:
            try:
                return ServedWeights.unpack(self.call("get_weights_by_name", {"name": CHANNEL}))
            except RequestRejectedError as error:
                raise CapabilityError(
                    f"{self.url} cannot read the names and shapes of the weights that it serves ({error}), and wrong "
                    "ones end an SGLang server; serve a directory with safetensors"
                ) from error
            except (KeyError, TypeError, ValueError) as error:
                raise ProtocolError(f"{self.url} does not say which weights it serves ({error})") from error
        try:
            return served_weights(self.info.model_path)
        except (OSError, ValueError) as error:
            raise CapabilityError(
                f"the names and shapes of the weights that {self.url} serves are not known: {self.info.model_path!r} "
                f"cannot be read from here ({error}), and wrong ones end an SGLang server; start the server with "
                "`torchrl-sglang-hidden serve`"
            ) from error

    def way(self, transport: Transport, weights: Weights) -> Transport:
        """How weights get to this server: ``"disk"`` or ``"network"``."""
        # Without the server half SGLang would go on naming the deleted checkpoint as its model, and later clients would
        # fail on it. A directory of the user's stays.
        stays = self.info.pools_in_server or isinstance(weights, (str, os.PathLike))
        if transport == "disk" and not stays:
            raise CapabilityError(
                f"transport='disk' for a {type(weights).__name__}: {self.url} has no torchrl_sglang_hidden server half "
                "and would go on naming the deleted checkpoint as its model; pass a directory, or use "
                "transport='network'"
            )
        if transport != "auto":
            return transport
        # A loopback address may be a tunnel to another machine.
        near = self._host in LOOPBACK and is_readable(self.info.model_path)
        return "disk" if near and self.info.pools_in_server else "network"

    def load(self, way: Transport, path: Path | None, tensors: Any, version: str, running: Running) -> None:
        """Sends checked weights, and takes note of their version."""
        if way == "disk" and path is not None:
            load_from_disk(self.call, path, version, running)
        else:
            broadcast.broadcast(
                self.call,
                tensors,
                version,
                server_info=self._get("/server_info"),
                address=broadcast.own_address(self._host, self._port),
                running=running,
                timeout_s=self._read_timeout_s,
            )
        self.info = dataclasses.replace(self.info, weight_version=version)

    def _async_client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._client.is_closed:
                raise EngineError(f"the connection to {self.url} was closed by close(); connect again")
            if loop not in self._async_clients:
                # A client holds its loop, so that neither goes by itself: one asyncio.run after another would pile up.
                alive = {one: client for one, client in self._async_clients.items() if not one.is_closed()}
                self._async_clients = {**alive, loop: httpx.AsyncClient(**self._options)}
            return self._async_clients[loop]

    def close(self) -> None:
        self._client.close()
        # An AsyncClient can only be closed in its own loop, which is not ours to run; its sockets end with it.
        self._async_clients.clear()


def _check_api_key(api_key: object) -> None:
    # httpx would show the key in its own error.
    if not isinstance(api_key, str):
        raise InputTypeError(f"api_key is a {type(api_key).__name__}; expected a string")
    if not (api_key and api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key):
        raise InputError(
            "api_key is empty, or has white space around it, a line break or a character outside ASCII, which no HTTP "
            "header carries; strip() it when you read it from a file"
        )


def _split(url: object) -> SplitResult:
    if not isinstance(url, str):
        raise InputTypeError(f"url={url!r}: expected a string, such as 'http://127.0.0.1:30000'")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an unclosed bracket
        valid = False
    if not valid:
        raise InputError(f"url={url!r}: expected http://host:port, such as 'http://127.0.0.1:30000'")
    return parts
