"""Decides who may ask what of SGLang's HTTP server, beside and behind SGLang's own check of the key.

With a key, SGLang lets everybody read ``/metrics``, whatever begins like ``/health``, and the WebSocket route; and it
reads the path from an address that older Starlettes build of the client's ``Host``. Without a key, it lets in every
page in a browser on this machine: by its scripts, by an image whose address is a control route, or under a name of the
page's own site that leads to this machine (DNS rebinding). Three of its routes unpickle what they are sent.
`AccessGuard` closes these.

Knows paths and headers, and nothing of bodies or of SGLang.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.websockets import WebSocketClose

from torchrl_sglang_hidden.counters import SERVER
from torchrl_sglang_hidden.server.__main__ import API_KEY_ENV, is_loopback

__all__ = ["AccessGuard"]

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What probes of load balancers and clusters ask, which have no key. They say nothing but that the server lives.
OPEN = frozenset({"/health", "/health_generate", "/ready"})
# SGLang unpickles what these are sent. Its allow-list of classes is long, and a pickle that it lets through is code.
UNPICKLING = frozenset({"/update_weights_from_tensor", "/load_lora_adapter_from_tensors", "/update_weights_from_ipc"})


class Refusal(NamedTuple):
    """Holds the status and the words of a request that is not let in."""

    status: int
    reason: str


class AccessGuard:
    """Lets a request through to SGLang's application, or answers it. An ASGI middleware.

    Args:
        app: what answers the requests that are let through.
        host: the address that the server is bound to.
        keys: SGLang's API key and admin key, as far as it has them. SGLang itself checks which of them a route wants.
        guarded: paths that nobody on another machine reaches without a key.
    """

    def __init__(self, app: App, *, host: str, keys: Iterable[str | None], guarded: Iterable[str] = ()) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys if key]
        self._is_local = is_loopback(host)
        self._guarded = frozenset(guarded) if not self._keys and not self._is_local else frozenset[str]()
        if self._guarded:
            logger.warning(
                "torchrl_sglang_hidden: %s is reachable from other machines, and the server has no API key: start it "
                "with --api-key, or on 127.0.0.1; %s answers 403 until then",
                host,
                ", ".join(sorted(self._guarded)),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        SERVER.add(refusals=1)
        logger.info(
            "torchrl_sglang_hidden: %s %s refused with %d: %s",
            scope.get("method", "WebSocket"),
            scope["path"][:200],
            refusal.status,
            refusal.reason,
        )
        if scope["type"] == "websocket":
            await WebSocketClose(code=1008, reason=refusal.reason[:100])(scope, receive, send)
            return
        error = {"message": refusal.reason, "type": "access", "code": refusal.status}
        await JSONResponse({"error": error}, status_code=refusal.status)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        # As the routes are matched: the path alone, and not the address that Starlette makes of it and of Host.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if set(headers.get(b"host", b"")) & set(b"/?#@\\"):
            return Refusal(400, "the Host header is no host; send the server's name and port")
        if self._keys and path not in OPEN and scope.get("method") != "OPTIONS" and not self._has_key(headers):
            return Refusal(401, "no API key, or a wrong one; send Authorization: Bearer …")
        if not self._keys and self._is_of_a_page(headers):
            return Refusal(
                403,
                "a page of another site asks, through the browser of somebody on this machine; start the server with "
                f"a key ({API_KEY_ENV}=…), and have the page send it",
            )
        if path.rstrip("/") in UNPICKLING:
            return Refusal(
                403,
                f"{path} unpickles what it is sent, which can run code; use engine.update_weights or "
                "engine.load_adapter, whose weights travel as numbers",
            )
        if path.rstrip("/") in self._guarded:
            return Refusal(403, "the server is reachable from other machines and has no API key; start it with one")
        return None

    def _is_of_a_page(self, headers: dict[bytes, bytes]) -> bool:
        """Return whether a browser's page of another site asks; programs send none of these headers but Host."""
        origin = headers.get(b"origin")
        if origin is not None:
            name = _name_in(origin)
            return name is None or not is_loopback(name)
        # With the address of an image, a link or a frame a browser sends no Origin, and this, which no page can change.
        if headers.get(b"sec-fetch-site") == b"cross-site":
            return True
        # A page that reads from a name of its own site, which leads to this machine, sends neither. An address is no
        # such name.
        host = headers.get(b"host")
        return self._is_local and host is not None and not _is_address_or_localhost(_name_in(b"//" + host))

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and any(secrets.compare_digest(token, key) for key in self._keys)


def _name_in(address: bytes) -> str | None:
    """Return the host that an address names; None where it names none."""
    try:
        return urlsplit(address.decode("latin-1")).hostname
    except ValueError:
        return None


def _is_address_or_localhost(name: str | None) -> bool:
    try:
        ipaddress.ip_address(name or "")
    except ValueError:
        return name == "localhost"
    return True
