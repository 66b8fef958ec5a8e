"""One SGLang server over HTTP: what `SGLangServer` has one or several of."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from torchrl_sglang_hidden.engines.base import ask_model
from torchrl_sglang_hidden.engines.replies import read_event, read_json, reason, translated
from torchrl_sglang_hidden.engines.sessions import SessionHost
from torchrl_sglang_hidden.errors import (
    CapabilityError,
    EngineError,
    InputError,
    InputTypeError,
    ProtocolError,
    RequestRejectedError,
)
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.served_weights import ServedWeights, is_readable, served_weights
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses
from torchrl_sglang_hidden.sglang_api.server_info import read_info, warm_up
from torchrl_sglang_hidden.weights import network
from torchrl_sglang_hidden.weights.disk import load_from_disk
from torchrl_sglang_hidden.weights.validation import Running, Transport, Weights

__all__ = ["Endpoint"]

# uvicorn closes an idle connection after 5 s; one reused in that instant would fail.
KEEPALIVE_S = 2.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Endpoint:
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
            # Reading the certificates takes longer than connecting, and nothing on this way has one.
            "verify": parts.scheme == "https" or parts.hostname not in LOOPBACK,
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
            network.broadcast(
                self.call,
                tensors,
                version,
                server_info=self._get("/server_info"),
                address=network.own_address(self._host, self._port),
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
