"""A client's API key: sent with every call, and shown nowhere.

Not in a repr, whose text ends up in logs and in tracebacks that show variables, and not in a pickle, which lies on
disks and travels to other machines. Knows nothing of servers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import NoReturn

import httpx

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.server.__main__ import API_KEY_ENV

__all__ = ["ApiKey", "key_of_pickle", "warn_of_plain_http"]

# The keys of this process, by addresses: what is pickled and loaded here, or in a fork, needs no variable.
_KEYS: dict[tuple[str, ...], ApiKey] = {}
_WARNED: set[str] = set()


class ApiKey(httpx.Auth):
    """A bearer token that httpx sends. It has no attribute, repr or pickle that shows the key.

    Args:
        key: the key, of printable ASCII characters.

    Raises:
        InputTypeError: no string.
        InputError: nothing that a header carries.
    """

    def __init__(self, key: object) -> None:
        # httpx would show the key in its own error.
        if not isinstance(key, str):
            raise InputTypeError(f"api_key is a {type(key).__name__}; expected a string")
        if not (key and key.isascii() and key.isprintable() and key.strip() == key):
            raise InputError(
                "api_key is empty, or has white space around it, a line break or a character outside ASCII, which no "
                "HTTP header carries; strip() it when you read it from a file"
            )
        # In a closure: whoever prints an object's __dict__, such as a debugger or an error reporter, sees no key.
        self._header: Callable[[], str] = lambda: f"Bearer {key}"

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Add the key to a request."""
        request.headers["Authorization"] = self._header()
        yield request

    def remember(self, urls: Sequence[str]) -> None:
        """Keep the key for clients of these addresses that are unpickled in this process."""
        _KEYS[tuple(urls)] = self

    def __repr__(self) -> str:
        return "ApiKey(***)"

    def __reduce__(self) -> NoReturn:
        raise InputError(
            f"an API key is not pickled; set {API_KEY_ENV} where the pickle is loaded, which clients read there"
        )


def key_of_pickle(urls: Sequence[str]) -> ApiKey | None:
    """Return the key for a client that is unpickled: of this process, or of the environment; None without one."""
    found = _KEYS.get(tuple(urls))
    key = os.environ.get(API_KEY_ENV)
    return found if found is not None or not key else ApiKey(key)


def warn_of_plain_http(url: str) -> None:
    """Warn, once for each address, that a key travels in plain text."""
    if url not in _WARNED:
        _WARNED.add(url)
        warnings.warn(
            f"the API key goes to {url} in plain text, as all prompts do: whoever is on the way can read it; use "
            "https, an SSH tunnel to 127.0.0.1, or a network that is yours alone",
            stacklevel=5,
        )
