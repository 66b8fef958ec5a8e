"""What SGLang answers over HTTP, and what can go wrong with a call: statuses and foreign errors become this package's.

Knows no routes and no connections.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
from torchrl_sglang_hidden.protocol import excerpt

__all__ = ["reached", "read_control", "read_event", "read_json", "reason_of", "text_of", "translated"]

_EVENT = "data: "
_LAST_EVENT = "data: [DONE]"


@contextmanager
def translated(url: str, how_it_ended: Callable[[], str] = str) -> Iterator[None]:
    """Turn httpx's exceptions into this package's: nothing else in the package does.

    Args:
        url: the server's address, for the messages.
        how_it_ended: says how the server's process ended; "" while it runs, or where that is not known.
    """
    try:
        yield
    except httpx.ConnectError as error:
        remedy = how_it_ended() or "is the server running?"
        raise EngineUnreachableError(f"nothing answers at {url} ({error}); {remedy}") from error
    except httpx.ConnectTimeout as error:
        raise EngineUnreachableError(f"{url} did not accept a connection in time; is the address right?") from error
    except httpx.TimeoutException as error:
        raise EngineTimeoutError(f"{url} did not answer in time; raise read_timeout_s, or ask for less") from error
    except httpx.TransportError as error:
        remedy = how_it_ended() or "look at the server's log"
        raise EngineUnreachableError(f"{url} went away while answering ({error}); {remedy}") from error
    except httpx.HTTPError as error:
        raise ProtocolError(f"{url} answered what cannot be read ({error}); is that an SGLang server?") from error
    except RuntimeError as error:
        if "client has been closed" not in str(error):
            raise
        raise EngineError(f"the connection to {url} was closed by close(); connect again") from error


def reached(error: EngineUnreachableError) -> bool:
    """Return whether the server may have got something of a call that ended in this error."""
    return not isinstance(error.__cause__, (httpx.ConnectError, httpx.ConnectTimeout))


def read_json(response: httpx.Response, url: str) -> Any:
    """Return the JSON of an answer.

    Raises:
        AuthenticationError: status 401 or 403.
        RequestRejectedError: another 4xx status.
        EngineError: a 5xx status.
        ProtocolError: no JSON.
    """
    if response.status_code in (401, 403):
        sent = "Authorization" in response.request.headers
        refusal = "refused the API key" if sent else "wants an API key, and none was sent"
        raise AuthenticationError(
            f"{url} {refusal} (status {response.status_code}); pass {'the right' if sent else 'its'} api_key. "
            "TORCHRL_SGLANG_HIDDEN_API_KEY is read by commands and where a pickled client is loaded, not by connect()"
        )
    if response.status_code >= 400:
        kind = RequestRejectedError if response.status_code < 500 else EngineError
        raise kind(f"{url} answered {response.status_code}: {reason_of(response)}; look at the server's log")
    try:
        return response.json()
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{url} answered no JSON: {text_of(response)[:80]!r}; is that an SGLang server?") from error


def read_event(line: str, url: str) -> Any:
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
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{url} streamed {line[:80]!r} ({error}); is that an SGLang server?") from error
    if isinstance(event, dict) and isinstance(event.get("error"), dict):
        refused, code = event["error"], event["error"].get("code")
        kind = EngineError if isinstance(code, int) and code >= 500 else RequestRejectedError
        raise kind(
            f"{url} answered {excerpt(code)}: {_words(refused.get('message', refused))}; look at the server's log"
        )
    return event


def read_control(response: httpx.Response, url: str) -> dict[str, Any]:
    """Return the answer of a control route: ``success`` and ``message``, whether it came in JSON or in words.

    Raises:
        EngineError: as for `read_json`, where the answer has neither.
    """
    if response.status_code not in (200, 400):
        body = read_json(response, url)
        if not isinstance(body, dict):
            raise ProtocolError(f"{url} answered {excerpt(body)}; is that an SGLang server?")
        return body
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return {"success": response.status_code == 200, "message": text_of(response)}
    if isinstance(body, str):
        return {"success": response.status_code == 200, "message": body}
    if not isinstance(body, dict) or (response.status_code == 400 and "success" not in body):
        raise RequestRejectedError(
            f"{url} answered {response.status_code}: {reason_of(response)}; look at the server's log"
        )
    return body


def text_of(response: httpx.Response) -> str:
    """Return the text of an answer as UTF-8, whatever its header says it is: the header may be wrong too."""
    return response.content.decode("utf-8", "replace")


def reason_of(response: httpx.Response) -> str:
    """Return the server's own words about an error."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        # A page of HTML has many lines, and an error is one.
        return " ".join(text_of(response)[:300].split())
    error = body.get("error", body) if isinstance(body, dict) else body
    return _words(error.get("message", error) if isinstance(error, dict) else error)


def _words(message: object) -> str:
    return message[:300] if isinstance(message, str) else excerpt(message, 300)
