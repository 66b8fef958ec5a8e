"""One SGLang server over HTTP: connections, routes, timeouts; statuses and foreign errors become this package's.

`SGLangServer` has one `Endpoint` per server, and spreads rows, streams, sessions and weights over them. Knows no other
server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from torchrl_sglang_hidden.engines.base import ask_model
from torchrl_sglang_hidden.engines.sessions import SessionHost
from torchrl_sglang_hidden.errors import (
    AuthenticationError,
    CapabilityError,
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
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
from torchrl_sglang_hidden.weights.network import NetworkPath
from torchrl_sglang_hidden.weights.transports import ChosenTransport, Receiver, WeightUpdate, choose_transport, send
from torchrl_sglang_hidden.weights.validation import Transport, Weights

__all__ = ["Endpoint"]

# uvicorn closes an idle connection after 5 s; a connection reused in that instant would fail.
KEEPALIVE_S = 2.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_EVENT = "data: "
_LAST_EVENT = "data: [DONE]"


class Endpoint:
    """One server: its address, its connections, and its `EngineInfo`, read at connect.

    Args:
        url: ``http://host:port``.
        api_key: sent as a bearer token; None sends none.
        connect_timeout_s: seconds to reach the server.
        read_timeout_s: seconds to wait for the answer to a request.

    Raises:
        InputError: the URL or the API key cannot be used.
        EngineError: the server cannot be reached, or refuses the key.
    """

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
                with _translated(self.url):
                    _read_json(self._client.post("/generate", json=payload), self.url)
                server_info = self._get("/server_info")
            self.info = read_info(self._get("/model_info"), server_info, ask_model)
            stack.pop_all()
        self.streams_cumulatively = not server_info.get("incremental_streaming_output")
        ranks = server_info.get("dp_size") or 1
        self.session_host = SessionHost(lambda: self.info, self.call, self.ask, binary=False, num_ranks=ranks)

    def _get(self, path: str) -> dict[str, Any]:
        with _translated(self.url):
            response = self._client.get(path)
        body = _read_json(response, self.url)
        if not isinstance(body, dict):
            raise ProtocolError(f"{self.url}{path} answered {str(body)[:80]!r}; is that an SGLang server?")
        return body

    def generate(self, requests: Sequence[Request], first_row: int) -> list[Completion]:
        """Generate one completion per request; errors count rows from ``first_row``."""
        rows = self.ask(to_payload(requests, self.info, binary=False))
        return read_responses(requests, rows, self.info, first_row=first_row)

    def ask(self, payload: dict[str, Any]) -> Any:
        """Post a payload to SGLang's ``/generate``, and return the JSON of the answer."""
        with _translated(self.url):
            response = self._client.post("/generate", json=payload)
        return _read_json(response, self.url)

    async def agenerate(self, requests: Sequence[Request], first_row: int) -> list[Completion]:
        """Generate as `generate` does, without blocking the event loop."""
        payload = to_payload(requests, self.info, binary=False)
        with _translated(self.url):
            response = await self._async_client().post("/generate", json=payload)
        return read_responses(requests, _read_json(response, self.url), self.info, first_row=first_row)

    def stream(self, payload: dict[str, Any]) -> Generator[Any, None, None]:
        """Yield None once the request is on its way, then each of SGLang's answers, for `Stream`.

        Closing the generator closes the connection, whereupon SGLang drops the request.
        """
        with _translated(self.url), self._client.stream("POST", "/generate", json=payload) as response:
            if response.is_error:
                response.read()
                _read_json(response, self.url)
            yield None
            for line in response.iter_lines():
                event = _read_event(line, self.url)
                if event is not None:
                    yield event

    async def astream(self, payload: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """Yield what `stream` yields, without blocking the event loop."""
        with _translated(self.url):
            async with self._async_client().stream("POST", "/generate", json=payload) as response:
                if response.is_error:
                    await response.aread()
                    _read_json(response, self.url)
                yield None
                async for line in response.aiter_lines():
                    event = _read_event(line, self.url)
                    if event is not None:
                        yield event

    def call(self, route: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Call one of SGLang's control routes.

        Returns:
            ``success`` and ``message``, whether the route answers in JSON or in words.
        """
        with _translated(self.url):
            response = self._client.post(f"/{route}", json=payload)
        if response.status_code not in (200, 400):
            return dict(_read_json(response, self.url))
        try:
            body = response.json()
        except ValueError:
            return {"success": response.status_code == 200, "message": response.text}
        if isinstance(body, str):
            return {"success": response.status_code == 200, "message": body}
        if not isinstance(body, dict) or (response.status_code == 400 and "success" not in body):
            raise RequestRejectedError(
                f"{self.url}/{route} answered {response.status_code}: {_reason(response)}; look at the server's log"
            )
        return body

    def weight_version(self) -> str:
        """Ask for the version of the weights at this moment: another client may have changed them."""
        return str(self._get("/model_info")["weight_version"])

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
            except (KeyError, TypeError, ValueError) as error:
                raise ProtocolError(
                    f"{self.url} does not say which weights it serves ({error}); use the same version of "
                    "torchrl_sglang_hidden here and there"
                ) from error
        try:
            return served_weights(self.info.model_path)
        except (OSError, ValueError) as error:
            raise CapabilityError(
                f"the names and shapes of the weights that {self.url} serves are not known: {self.info.model_path!r} "
                f"cannot be read from here ({error}), and wrong ones end an SGLang server; start the server with "
                "`torchrl-sglang-hidden serve`"
            ) from error

    def choose_transport(self, transport: Transport, weights: Weights) -> ChosenTransport:
        """Resolve ``"auto"``, and refuse a transport that cannot serve this server."""
        return choose_transport(transport, weights, self._receiver())

    def load(self, transport: ChosenTransport, update: WeightUpdate) -> None:
        """Send checked weights to the server, and note their version."""
        send(transport, update, self._receiver())
        self.info = dataclasses.replace(self.info, weight_version=update.version)

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

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        # An AsyncClient can only be closed in its own loop, which is not ours to run; the sockets end with the client.
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


# --- SGLang's answers, and what can go wrong with a call --------------------------------------------------------------


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn httpx's exceptions into this package's: nothing else in the package does."""
    try:
        yield
    except httpx.ConnectError as error:
        raise EngineUnreachableError(f"nothing answers at {url} ({error}); is the server running?") from error
    except httpx.ConnectTimeout as error:
        raise EngineUnreachableError(f"{url} did not accept a connection in time; is the address right?") from error
    except httpx.TimeoutException as error:
        raise EngineTimeoutError(f"{url} did not answer in time; raise read_timeout_s, or ask for less") from error
    except httpx.TransportError as error:
        raise EngineUnreachableError(f"{url} went away while answering ({error}); look at the server's log") from error
    except httpx.HTTPError as error:
        raise ProtocolError(f"{url} answered what cannot be read ({error}); is that an SGLang server?") from error
    except RuntimeError as error:
        if "client has been closed" not in str(error):
            raise
        raise EngineError(f"the connection to {url} was closed by close(); connect again") from error


def _read_json(response: httpx.Response, url: str) -> Any:
    """Return the JSON of an answer.

    Raises:
        AuthenticationError: status 401 or 403.
        RequestRejectedError: another 4xx status.
        EngineError: a 5xx status.
        ProtocolError: no JSON.
    """
    if response.status_code in (401, 403):
        raise AuthenticationError(f"{url} refused the API key (status {response.status_code}); pass the right api_key")
    if response.status_code >= 400:
        kind = RequestRejectedError if response.status_code < 500 else EngineError
        raise kind(f"{url} answered {response.status_code}: {_reason(response)}; look at the server's log")
    try:
        return response.json()
    except ValueError as error:
        raise ProtocolError(f"{url} answered no JSON: {response.text[:80]!r}; is that an SGLang server?") from error


def _read_event(line: str, url: str) -> Any:
    """Read one line of a streamed answer.

    Returns:
        The event's JSON; None for an empty line and for the end mark.

    Raises:
        RequestRejectedError: the event is a refusal. The status of the stream was sent before, as 200.
        EngineError: the event is a failure of the server.
        ProtocolError: the line is no event.
    """
    if not line or line == _LAST_EVENT:
        return None
    try:
        if not line.startswith(_EVENT):
            raise ValueError("no event")
        event = json.loads(line.removeprefix(_EVENT))
    except ValueError as error:
        raise ProtocolError(f"{url} streamed {line[:80]!r} ({error}); is that an SGLang server?") from error
    if isinstance(event, dict) and isinstance(event.get("error"), dict):
        refused, code = event["error"], event["error"].get("code")
        kind = EngineError if isinstance(code, int) and code >= 500 else RequestRejectedError
        raise kind(f"{url} answered {code}: {str(refused.get('message', refused))[:300]}; look at the server's log")
    return event


def _reason(response: httpx.Response) -> str:
    """Return the server's own words about an error."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:300]
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
