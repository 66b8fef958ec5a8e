"""What can go wrong with an HTTP call, as this package's errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from torchrl_sglang_hidden.errors import (
    AuthenticationError,
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
    ProtocolError,
    RequestRejectedError,
)

__all__ = ["read_event", "read_json", "reason", "translated"]

_EVENT = "data: "
_LAST_EVENT = "data: [DONE]"


@contextmanager
def translated(url: str) -> Iterator[None]:
    """The one place where httpx's exceptions become this package's."""
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


def read_json(response: httpx.Response, url: str) -> Any:
    """The answer's body, or the error that its status means."""
    if response.status_code in (401, 403):
        raise AuthenticationError(f"{url} refused the API key (status {response.status_code}); pass the right api_key")
    if response.status_code >= 400:
        message = f"{url} answered {response.status_code}: {reason(response)}"
        raise (RequestRejectedError if response.status_code < 500 else EngineError)(message)
    try:
        return response.json()
    except ValueError as error:
        raise ProtocolError(f"{url} answered no JSON: {response.text[:80]!r}; is that an SGLang server?") from error


def read_event(line: str, url: str) -> Any:
    """One line of a streamed answer: what SGLang says in it, or None where it says nothing.

    SGLang's status is 200 by the time that it refuses a request, so that the refusal is an event.
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
        raise kind(f"{url} answered {code}: {str(refused.get('message', refused))[:300]}")
    return event


def reason(response: httpx.Response) -> str:
    """The server's own words about an error."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:300]
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
