"""One SGLang server over HTTP: connections, routes, timeouts, and the requests that nobody waits for any more.

`SGLangServer` has one `Endpoint` per server, and spreads rows, streams, sessions and weights over them. Knows no other
server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import resource
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from torchrl_sglang_hidden.engines.api_key import ApiKey, warn_of_plain_http
from torchrl_sglang_hidden.engines.base import ask_model
from torchrl_sglang_hidden.engines.http_answers import read_event, read_json, reason_of, text_of, translated
from torchrl_sglang_hidden.engines.sessions import SessionHost
from torchrl_sglang_hidden.errors import (
    CapabilityError,
    EngineError,
    InputError,
    InputTypeError,
    ProtocolError,
    RequestRejectedError,
)
from torchrl_sglang_hidden.protocol import CHANNEL, excerpt
from torchrl_sglang_hidden.protocol.served_weights import ServedWeights, is_readable, served_weights
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_rows
from torchrl_sglang_hidden.sglang_api.server_info import read_info, warm_up
from torchrl_sglang_hidden.weights.adapters import Adapter, load
from torchrl_sglang_hidden.weights.network import NetworkPath
from torchrl_sglang_hidden.weights.transports import ChosenTransport, Receiver, WeightUpdate, choose_transport, send
from torchrl_sglang_hidden.weights.validation import Transport, Weights

__all__ = ["Endpoint", "check_open_files", "new_request_ids", "split_url"]

# uvicorn closes an idle connection after 5 s; a connection reused in that instant would fail.
KEEPALIVE_S = 2.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Longest wait for the answer to one abort: a server that hangs must not hold up whoever gave up on it.
ABORT_TIMEOUT_S = 3.0


class Endpoint:
    """One server: its address, its connections, and its `EngineInfo`, read at connect.

    Args:
        url: ``http://host:port``.
        api_key: sent with every call; None for none.
        connect_timeout_s: seconds to reach the server.
        read_timeout_s: seconds to wait for the answer to a request.

    Raises:
        InputError: the URL or the API key cannot be used.
        EngineError: the server cannot be reached, or refuses the key.
    """

    def __init__(self, url: str, api_key: ApiKey | None, connect_timeout_s: float, read_timeout_s: float) -> None:
        parts = split_url(url)
        self._host, self._port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
        self._read_timeout_s = read_timeout_s
        self.url = url.rstrip("/")
        if api_key is not None and parts.scheme == "http" and parts.hostname not in LOOPBACK:
            warn_of_plain_http(self.url)
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "auth": api_key,
            "timeout": httpx.Timeout(read_timeout_s, connect=connect_timeout_s),
            "limits": httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S),
            # A proxy from the environment is for the world outside, never for this machine.
            "trust_env": parts.hostname not in LOOPBACK,
            # Reading the certificates takes longer than connecting, and nothing on this way has one.
            "verify": parts.scheme == "https" or parts.hostname not in LOOPBACK,
        }
        # Whoever started the server sets this: it knows how the process ended, and this client does not.
        self.how_it_ended: Callable[[], str] = str
        # Whoever counts sets this: called with each answer to a batch.
        self.exchanged: Callable[[httpx.Response], None] = lambda response: None
        self._client = httpx.Client(**self._options)
        # An async connection belongs to the event loop it was opened in.
        self._async_clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}
        # An event loop holds its tasks weakly.
        self._aborting: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        with ExitStack() as stack:
            stack.callback(self._client.close)
            server_info = self._get("/server_info")
            payload = warm_up(server_info)
            if payload is not None:
                with self._translated():
                    read_json(self._client.post("/generate", json=payload), self.url)
                server_info = self._get("/server_info")
            self.info = read_info(self._get("/model_info"), server_info, ask_model)
            stack.pop_all()
        self.streams_cumulatively = not server_info.get("incremental_streaming_output")
        ranks = server_info.get("dp_size") or 1
        if type(ranks) is not int or ranks < 1:
            raise ProtocolError(f"{self.url}/server_info has dp_size={excerpt(ranks)}; is that an SGLang server?")
        self.session_host = SessionHost(lambda: self.info, self.call, self.ask, binary=False, num_ranks=ranks)

    def _translated(self) -> AbstractContextManager[None]:
        return translated(self.url, self.how_it_ended)

    def _get(self, path: str) -> dict[str, Any]:
        with self._translated():
            response = self._client.get(path)
        body = read_json(response, self.url)
        if not isinstance(body, dict):
            raise ProtocolError(f"{self.url}{path} answered {excerpt(body)}; is that an SGLang server?")
        return body

    def generate(self, requests: Sequence[Request], rids: Sequence[str], rows: Sequence[int]) -> list[Completion]:
        """Generate one completion per request.

        Args:
            requests: any number of requests, sent as one batch.
            rids: the name of each request on the server, see `new_request_ids`.
            rows: where each request stands in the caller's batch, for the errors.

        Returns:
            One `Completion` per request; what went wrong with one of them alone is in its ``error``.
        """
        answer = self.ask({**to_payload(requests, self.info, binary=False), "rid": list(rids)})
        return read_rows(requests, answer, self.info, numbers=rows, rids=rids)

    def ask(self, payload: dict[str, Any]) -> Any:
        """Post a payload to SGLang's ``/generate``, and return the JSON of the answer.

        Whatever ends the wait for the answer, a timeout or Ctrl-C, aborts the payload's requests on the server.
        """
        try:
            with self._translated():
                response = self._client.post("/generate", json=payload)
        except BaseException:
            self.abort(payload["rid"])
            raise
        self.exchanged(response)
        return read_json(response, self.url)

    async def agenerate(
        self, requests: Sequence[Request], rids: Sequence[str], rows: Sequence[int]
    ) -> list[Completion]:
        """Generate as `generate` does, without blocking the event loop. A cancelled task aborts its requests."""
        payload = {**to_payload(requests, self.info, binary=False), "rid": list(rids)}
        client = self._async_client()
        try:
            with self._translated():
                response = await client.post("/generate", json=payload)
        except GeneratorExit:  # the event loop ends, and nothing can be awaited
            raise
        except BaseException:
            # A task of its own, so that a second cancellation of the caller does not end it; see `wait_for_aborts`.
            task = asyncio.ensure_future(_abort(client, rids))
            self._aborting.add(task)
            task.add_done_callback(self._aborting.discard)
            raise
        self.exchanged(response)
        return read_rows(requests, read_json(response, self.url), self.info, numbers=rows, rids=rids)

    async def wait_for_aborts(self) -> None:
        """Wait until what was given up in this event loop is aborted on the server, or was not in time."""
        loop = asyncio.get_running_loop()
        tasks = [task for task in self._aborting if task.get_loop() is loop]
        if tasks:
            await asyncio.wait(tasks, timeout=ABORT_TIMEOUT_S)

    def abort(self, rids: Sequence[str]) -> None:
        """Abort requests on the server, as far as it can be reached; those that have ended are ignored.

        SGLang sees by itself, after some seconds, that the connection of a request is gone.
        """
        with suppress(httpx.HTTPError, RuntimeError):  # the server is gone, or the client was closed
            for rid in rids:
                self._client.post("/abort_request", json={"rid": rid}, timeout=ABORT_TIMEOUT_S)

    def stream(self, payload: dict[str, Any]) -> Generator[Any, None, None]:
        """Yield None once the request is on its way, then each of SGLang's answers, for `Stream`.

        Closing the generator closes the connection, whereupon SGLang drops the request.
        """
        with self._translated(), self._client.stream("POST", "/generate", json=payload) as response:
            if response.is_error:
                response.read()
                read_json(response, self.url)
            yield None
            for line in response.iter_lines():
                event = read_event(line, self.url)
                if event is not None:
                    yield event

    async def astream(self, payload: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """Yield what `stream` yields, without blocking the event loop."""
        with self._translated():
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
        """Call one of SGLang's control routes.

        Returns:
            ``success`` and ``message``, whether the route answers in JSON or in words.
        """
        with self._translated():
            response = self._client.post(f"/{route}", json=payload)
        if response.status_code not in (200, 400):
            body = read_json(response, self.url)
            if not isinstance(body, dict):
                raise ProtocolError(f"{self.url}/{route} answered {excerpt(body)}; is that an SGLang server?")
            return body
        try:
            body = response.json()
        except (ValueError, RecursionError):
            return {"success": response.status_code == 200, "message": text_of(response)}
        if isinstance(body, str):
            return {"success": response.status_code == 200, "message": body}
        if not isinstance(body, dict) or (response.status_code == 400 and "success" not in body):
            raise RequestRejectedError(
                f"{self.url}/{route} answered {response.status_code}: {reason_of(response)}; look at the server's log"
            )
        return body

    def internal_states(self) -> list[Any]:
        """Ask for SGLang's internal state at this moment, one for each data-parallel rank."""
        return list(self._get("/server_info").get("internal_states") or [])

    def weight_version(self) -> str:
        """Ask for the version of the weights at this moment: another client may have changed them."""
        version = self._get("/model_info").get("weight_version")
        if not isinstance(version, str):
            raise ProtocolError(f"{self.url}/model_info has the weight_version {excerpt(version)}; is it SGLang?")
        return version

    def served_weights(self) -> ServedWeights:
        """Read names and shapes of the served checkpoint from the server half, or from the model's directory.

        Raises:
            CapabilityError: neither can be read.
            ProtocolError: the server half's answer cannot be read.
        """
        if self.info.pools_in_server:
            try:
                return ServedWeights.unpack(self.call("get_weights_by_name", {"name": CHANNEL}))
            except RequestRejectedError as error:
                raise CapabilityError(
                    f"{self.url} cannot read the names and shapes of the weights that it serves ({error}), and wrong "
                    "ones end an SGLang server; serve a directory with safetensors"
                ) from error
        try:
            found = served_weights(self.info.model_path)
        except (OSError, ValueError) as error:
            raise CapabilityError(
                f"the names and shapes of the weights that {self.url} serves are not known: {self.info.model_path!r} "
                f"cannot be read from here ({error}), and wrong ones end an SGLang server; start the server with "
                "`torchrl-sglang-hidden serve`"
            ) from error
        server_info = self._get("/server_info")
        return dataclasses.replace(found, quantization=str(server_info.get("quantization") or found.quantization))

    def choose_transport(self, transport: Transport, weights: Weights) -> ChosenTransport:
        """Resolve ``"auto"``, and refuse a transport that cannot serve this server."""
        return choose_transport(transport, weights, self._receiver())

    def load(self, transport: ChosenTransport, update: WeightUpdate) -> None:
        """Send checked weights to the server, and note their version."""
        send(transport, update, self._receiver())
        self.info = dataclasses.replace(self.info, weight_version=update.version)

    def load_adapter(self, name: str, adapter: Adapter, version: str) -> None:
        """Load a checked adapter into the server, and note the version; see `Engine.load_adapter`."""
        models = self._get("/v1/models").get("data")
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            raise ProtocolError(f"{self.url}/v1/models lists {excerpt(models)}; is that an SGLang server?")
        loaded = [model.get("id") for model in models]
        server_info = self._get("/server_info")
        load(
            self._receiver(),
            name,
            adapter,
            version,
            server_info=server_info,
            replace=name in loaded,
        )
        self.info = dataclasses.replace(self.info, weight_version=version)

    def _receiver(self) -> Receiver:
        return Receiver(
            name=self.url,
            call=self.call,
            has_server_half=self.info.pools_in_server,
            # A loopback address may be a tunnel to another machine, which has other files.
            reads_local_files=self._host in LOOPBACK and is_readable(self.info.model_path),
            network=NetworkPath(
                host=self._host,
                port=self._port,
                server_info=lambda: self._get("/server_info"),
                timeout_s=self._read_timeout_s,
            ),
        )

    def _async_client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._client.is_closed:
                raise EngineError(f"the connection to {self.url} was closed by close(); connect again")
            if loop not in self._async_clients:
                # A client keeps its loop alive: without this, one asyncio.run after another would pile up clients.
                alive = {other: client for other, client in self._async_clients.items() if not other.is_closed()}
                self._async_clients = {**alive, loop: httpx.AsyncClient(**self._options)}
            return self._async_clients[loop]

    async def close_event_loop(self) -> None:
        """Close the connections of the running event loop."""
        with self._lock:
            client = self._async_clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        # An AsyncClient can only be closed in its own loop, which is not ours to run; the sockets end with the client.
        self._async_clients.clear()


def new_request_ids(count: int) -> list[str]:
    """Return names for the requests of one batch. None is the beginning of another: SGLang aborts by beginnings."""
    batch = uuid.uuid4().hex
    return [f"{batch}-{index:08d}" for index in range(count)]


def check_open_files(count: int) -> None:
    """Check that this process can open so many connections more.

    Raises:
        InputError: its limit of open files is too low.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = limit - len(os.listdir("/dev/fd"))
    if limit != resource.RLIM_INFINITY and count > free:
        raise InputError(
            f"{count} requests side by side, each on a connection of its own: this process can open {max(free, 0)} "
            f"files more (its limit is {limit}); raise the limit (ulimit -n), or send fewer prompts or samples at once"
        )


async def _abort(client: httpx.AsyncClient, rids: Sequence[str]) -> None:
    """Abort requests as `Endpoint.abort` does, without blocking the event loop."""
    with suppress(httpx.HTTPError, RuntimeError):
        for rid in rids:
            await client.post("/abort_request", json={"rid": rid}, timeout=ABORT_TIMEOUT_S)


def split_url(url: object) -> SplitResult:
    """Check a server's address, and return its parts.

    Raises:
        InputError: it is no HTTP address, or has a password.
    """
    if not isinstance(url, str):
        raise InputTypeError(f"url={url!r}: expected a string, such as 'http://127.0.0.1:30000'")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        has_password = parts.username is not None or parts.password is not None
    except ValueError:  # a port that is no number, an unclosed bracket
        valid = has_password = False
    if has_password:
        # Without the URL, which errors and logs name.
        raise InputError("url: has a name or a password before '@'; pass http://host:port, and the key as api_key")
    if not valid:
        raise InputError(f"url={url!r}: expected http://host:port, such as 'http://127.0.0.1:30000'")
    return parts
