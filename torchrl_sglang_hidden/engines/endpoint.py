"""One SGLang server over HTTP: connections, routes, timeouts, and the requests that nobody waits for any more.

`SGLangServer` has one `Endpoint` per server, and spreads rows, streams, sessions and weights over them. Knows no other
server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, closing, suppress
from pathlib import Path
from typing import Any

import httpx

from torchrl_sglang_hidden.engines.address import LOOPBACK, client_options, split_url
from torchrl_sglang_hidden.engines.api_key import ApiKey, warn_of_plain_http
from torchrl_sglang_hidden.engines.attempts import Attempts
from torchrl_sglang_hidden.engines.base import ask_model
from torchrl_sglang_hidden.engines.http_answers import read_control, read_event, read_json, translated
from torchrl_sglang_hidden.engines.retries import Retries
from torchrl_sglang_hidden.engines.sessions import SessionHost
from torchrl_sglang_hidden.engines.supervision import Supervision
from torchrl_sglang_hidden.errors import CapabilityError, EngineError, ProtocolError, RequestRejectedError
from torchrl_sglang_hidden.protocol import CHANNEL, excerpt
from torchrl_sglang_hidden.protocol.served_weights import ServedWeights, is_readable, served_weights
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_rows
from torchrl_sglang_hidden.sglang_api.server_info import read_info, warm_up
from torchrl_sglang_hidden.weights.adapters import Adapter, load, unload
from torchrl_sglang_hidden.weights.network import NetworkPath
from torchrl_sglang_hidden.weights.transports import ChosenTransport, Receiver, WeightUpdate, choose_transport, send
from torchrl_sglang_hidden.weights.validation import Transport, Weights

__all__ = ["Endpoint"]

# Longest wait for the answer to one abort: a server that hangs must not hold up whoever gave up on it.
ABORT_TIMEOUT_S = 3.0


class Endpoint:
    """One server: its address, its connections, and its `EngineInfo`, read at connect.

    Args:
        url: ``http://host:port``.
        api_key: sent with every call; None for none.
        connect_timeout_s: seconds to reach the server.
        read_timeout_s: seconds to wait for the answer to a request.
        retries: see `Retries`.

    Attributes:
        info: the server's description.
        supervision: what whoever started the server knows of it, who sets it.

    Raises:
        InputError: the URL or the API key cannot be used.
        EngineError: the server cannot be reached, or refuses the key.
    """

    def __init__(
        self, url: str, api_key: ApiKey | None, connect_timeout_s: float, read_timeout_s: float, retries: Retries
    ) -> None:
        parts = split_url(url)
        self._host, self._port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
        self._read_timeout_s = read_timeout_s
        self.url = url.rstrip("/")
        if api_key is not None and parts.scheme == "http" and parts.hostname not in LOOPBACK:
            warn_of_plain_http(self.url)
        timeout = httpx.Timeout(read_timeout_s, connect=connect_timeout_s)
        self._options = {**client_options(parts), "base_url": self.url, "auth": api_key, "timeout": timeout}
        self.supervision = Supervision()
        # Whoever counts sets this: called with each answer to a batch.
        self.exchanged: Callable[[httpx.Response], None] = lambda response: None
        self._retries = retries
        self._client = httpx.Client(**self._options)
        # An async connection belongs to the event loop it was opened in.
        self._async_clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}
        # An event loop holds its tasks weakly.
        self._aborting: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        with ExitStack() as stack:
            stack.callback(self._client.close)
            server_info = self.read_description()
            stack.pop_all()
        self.streams_cumulatively = not server_info.get("incremental_streaming_output")
        ranks = server_info.get("dp_size") or 1
        if type(ranks) is not int or ranks < 1:
            raise ProtocolError(f"{self.url}/server_info has dp_size={excerpt(ranks)}; is that an SGLang server?")
        self.session_host = SessionHost(lambda: self.info, self.call, self.ask, binary=False, num_ranks=ranks)

    def read_description(self, retries: Retries | None = None) -> dict[str, Any]:
        """Read `info` anew, and return SGLang's ``/server_info``: another process may serve at the address now.

        Args:
            retries: of the first call, which shows whether the server is there; None for those of all calls.
        """
        server_info = self._get("/server_info", retries)
        payload = warm_up(server_info)
        if payload is not None:
            with self._translated():
                read_json(self._client.post("/generate", json=payload), self.url)
            server_info = self._get("/server_info")
        self.info = read_info(self._get("/model_info"), server_info, ask_model)
        return server_info

    def _translated(self) -> AbstractContextManager[None]:
        return translated(self.url, lambda: self.supervision.how_it_ended())

    def _get(self, path: str, retries: Retries | None = None) -> dict[str, Any]:
        with self._translated():
            run = (retries or self._retries).run
            response = run(lambda: self._client.get(path), what=self.url + path, reads=True)
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
        attempts = Attempts({**to_payload(requests, self.info, binary=False), "rid": list(rids)})
        answer = self._ask(attempts, reads=_only_read(requests))
        return read_rows(requests, answer, self.info, numbers=rows, rids=attempts.rids)

    def ask(self, payload: dict[str, Any], *, reads: bool = False) -> Any:
        """Post a payload to SGLang's ``/generate``, and return the JSON of the answer; see `Retries` for ``reads``.

        Whatever ends the wait for the answer, a timeout or Ctrl-C, aborts the payload's requests on the server.
        """
        return self._ask(Attempts(payload), reads=reads)

    def _ask(self, attempts: Attempts, *, reads: bool) -> Any:
        rids = attempts.rids

        def attempt() -> httpx.Response:
            self.supervision.admit(generates=True)
            if attempts.may_run:
                self.abort(rids)
            with attempts.sending() as sent:
                return self._client.post("/generate", json=sent)

        try:
            with self._translated():
                response = self._retries.run(attempt, what=f"{self.url}/generate", reads=reads)
        except BaseException:
            self.abort(rids)
            raise
        self.exchanged(response)
        return read_json(response, self.url)

    async def agenerate(
        self, requests: Sequence[Request], rids: Sequence[str], rows: Sequence[int]
    ) -> list[Completion]:
        """Generate as `generate` does, without blocking the event loop. A cancelled task aborts its requests."""
        attempts = Attempts({**to_payload(requests, self.info, binary=False), "rid": list(rids)})
        client = self._async_client()

        async def attempt() -> httpx.Response:
            await self.supervision.aadmit(generates=True)
            if attempts.may_run:
                await _abort(client, rids)
            with attempts.sending() as sent:
                return await client.post("/generate", json=sent)

        try:
            with self._translated():
                response = await self._retries.arun(attempt, what=self.url, reads=_only_read(requests))
        except GeneratorExit:  # the event loop ends, and nothing can be awaited
            raise
        except BaseException:
            # A task of its own, so that a second cancellation of the caller does not end it; see `wait_for_aborts`.
            task = asyncio.ensure_future(_abort(client, rids))
            self._aborting.add(task)
            task.add_done_callback(self._aborting.discard)
            raise
        self.exchanged(response)
        answer = read_json(response, self.url)
        return read_rows(requests, answer, self.info, numbers=rows, rids=attempts.rids)

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

        def attempt() -> httpx.Response:
            self.supervision.admit(generates=True)
            request = self._client.build_request("POST", "/generate", json=payload)
            response = self._client.send(request, stream=True)
            if response.is_error:
                response.read()
            return response

        with self._translated(), closing(self._retries.run(attempt, what=self.url, reads=False)) as response:
            if response.is_error:
                read_json(response, self.url)
            yield None
            for line in response.iter_lines():
                if (event := read_event(line, self.url)) is not None:
                    yield event

    async def astream(self, payload: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """Yield what `stream` yields, without blocking the event loop."""
        client = self._async_client()

        async def attempt() -> httpx.Response:
            await self.supervision.aadmit(generates=True)
            response = await client.send(client.build_request("POST", "/generate", json=payload), stream=True)
            if response.is_error:
                await response.aread()
            return response

        with self._translated():
            opened = await self._retries.arun(attempt, what=self.url, reads=False)
            async with aclosing(opened) as response:
                if response.is_error:
                    read_json(response, self.url)
                yield None
                async for line in response.aiter_lines():
                    if (event := read_event(line, self.url)) is not None:
                        yield event

    def call(self, route: str, payload: dict[str, Any], *, admitted: bool = False) -> dict[str, Any]:
        """Call one of SGLang's control routes; ``admitted`` also while the server is not said to be back.

        Returns:
            ``success`` and ``message``, whether the route answers in JSON or in words.
        """

        def attempt() -> httpx.Response:
            if not admitted:
                self.supervision.admit(generates=route == "open_session")
            return self._client.post(f"/{route}", json=payload)

        with self._translated():
            response = self._retries.run(attempt, what=f"{self.url}/{route}", reads=False)
        return read_control(response, f"{self.url}/{route}")

    def internal_states(self) -> list[Any]:
        """Ask for SGLang's internal state at this moment, one for each data-parallel rank."""
        return list(self._get("/server_info").get("internal_states") or [])

    def weight_version(self) -> str:
        """Ask for the version of the weights at this moment: another client may have changed them."""
        self.supervision.admit(generates=False)
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
        self.supervision.admit(generates=False)
        start = self.supervision.start
        send(transport, update, self._receiver())
        directory = update.directory if self.info.pools_in_server else None
        self.supervision.keep_weights(directory, update.version, start, is_users=update.is_users)
        self.info = dataclasses.replace(self.info, weight_version=update.version)

    def load_adapter(self, name: str, adapter: Adapter, version: str) -> None:
        """Load a checked adapter into the server, and note the version; see `Engine.load_adapter`."""
        self.supervision.admit(generates=False)
        start = self.supervision.start

        def taken(directory: Path) -> None:
            is_users = directory == adapter.directory
            self.supervision.keep_adapter(name, directory, version, start, is_users=is_users)

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
            taken=taken,
        )
        self.info = dataclasses.replace(self.info, weight_version=version)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter; see `Engine.unload_adapter`."""
        unload(self.call, name)
        self.supervision.drop_adapter(name)

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


def _only_read(requests: Sequence[Request]) -> bool:
    return all(request.reads_only for request in requests)


async def _abort(client: httpx.AsyncClient, rids: Sequence[str]) -> None:
    """Abort requests as `Endpoint.abort` does, without blocking the event loop."""
    with suppress(httpx.HTTPError, RuntimeError):
        for rid in rids:
            await client.post("/abort_request", json={"rid": rid}, timeout=ABORT_TIMEOUT_S)
