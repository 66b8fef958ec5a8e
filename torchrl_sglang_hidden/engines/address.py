"""Checks the address that a client is given to reach a server, and says how httpx is to connect to it.

Has no connections, and knows nothing of requests.
"""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from torchrl_sglang_hidden.errors import InputError, InputTypeError

__all__ = ["LOOPBACK", "client_options", "server_at", "split_url"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# uvicorn closes an idle connection after 5 s; a connection reused in that instant would fail.
KEEPALIVE_S = 2.0


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


def server_at(url: object) -> tuple[str, str, int, str]:
    """Return what all spellings of a server's address have in common: scheme, host, port and path.

    Raises:
        InputError: see `split_url`.
    """
    parts = split_url(url)
    host = str(parts.hostname).rstrip(".")
    with suppress(ValueError):  # a name
        host = str(ipaddress.ip_address(host))
    host = "127.0.0.1" if host == "localhost" else host
    return parts.scheme, host, parts.port or (443 if parts.scheme == "https" else 80), parts.path.rstrip("/")


def client_options(address: SplitResult) -> dict[str, Any]:
    """Return the options that a client of httpx needs for an address, whatever it sends there."""
    is_here = address.hostname in LOOPBACK
    return {
        "limits": httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S),
        # A proxy from the environment is for the world outside, never for this machine.
        "trust_env": not is_here,
        # Reading the certificates takes longer than connecting, and nothing on this way has one.
        "verify": address.scheme == "https" or not is_here,
    }
