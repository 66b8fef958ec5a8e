"""SGLang's router (``sglang-router``): the addresses of the servers behind one.

The router reads each request into fields of its own and writes it again: what asks the server half for states, logits
and constraints is not among them, and it has no routes for weights, sessions or aborts. A client goes past it. Knows
the router's list of workers, and nothing of requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx

from torchrl_sglang_hidden.engines.address import LOOPBACK
from torchrl_sglang_hidden.engines.api_key import ApiKey
from torchrl_sglang_hidden.engines.endpoint import Endpoint
from torchrl_sglang_hidden.engines.http_answers import read_json, translated
from torchrl_sglang_hidden.errors import (
    CapabilityError,
    EngineUnreachableError,
    ProtocolError,
    RequestRejectedError,
)
from torchrl_sglang_hidden.protocol import excerpt

__all__ = ["open_endpoints"]

logger = logging.getLogger(__name__)


def open_endpoints(
    url: str, make: Callable[[str], Endpoint], api_key: ApiKey | None, timeout_s: float
) -> list[Endpoint]:
    """Connect to the server at an address, or to those behind the router there.

    Args:
        url: the address.
        make: connects to one server.
        api_key: the router's, or None.
        timeout_s: seconds to wait for the router.

    Raises:
        SGLangHiddenError: what ``make`` raises; or what `_servers_behind` does.
    """
    try:
        return [make(url)]
    except RequestRejectedError:  # a router has no route that describes a server
        addresses = _servers_behind(url.rstrip("/"), api_key, timeout_s)
        if not addresses:
            raise
    with ExitStack() as stack:
        opened = []
        for address in addresses:
            opened.append(make(address))
            stack.callback(opened[-1].close)
        stack.pop_all()
    return opened


def _servers_behind(url: str, api_key: ApiKey | None, timeout_s: float) -> list[str]:
    """Return the addresses of the servers behind a router that are in order now.

    Returns:
        The addresses in the router's order; none where no router answers there.

    Raises:
        CapabilityError: the servers are parts of one, such as a prefill and a decode server, or speak gRPC.
        EngineUnreachableError: the router finds none of its servers in order.
        ProtocolError: the answer cannot be read.
    """
    with translated(url):
        local = urlsplit(url).hostname in LOOPBACK
        response = httpx.get(f"{url}/workers", auth=api_key, timeout=timeout_s, trust_env=not local)
    if response.status_code == 404:
        return []
    answer = read_json(response, url)
    found: list[str] = []
    unwell: list[str] = []
    try:
        for worker in answer["workers"]:
            kind, mode = str(worker["worker_type"]), str(worker["connection_mode"])
            if kind != "regular" or mode.upper() != "HTTP":
                raise CapabilityError(
                    f"{url} is SGLang's router, and its server {worker['url']} is of the kind {kind!r} with "
                    f"{mode!r}: no states come of it; connect to servers that generate whole responses, over HTTP"
                )
            # Of a server with data-parallel ranks the router may list each as "http://host:port@rank".
            address = str(worker["url"])
            address = address.rsplit("@", 1)[0] if "@" in urlsplit(address).netloc else address
            (found if worker["is_healthy"] else unwell).append(address.rstrip("/"))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"{url}/workers lacks {error}: {excerpt(answer, 200)}; pass the addresses of the servers behind SGLang's "
            "router"
        ) from error
    addresses = list(dict.fromkeys(found))
    if not addresses:
        raise EngineUnreachableError(
            f"{url} is SGLang's router, and 0 of its servers are in order ({unwell or 'it has none'}); look at its log"
        )
    logger.warning(
        "%s is SGLang's router, which takes the requests for hidden states off what it passes on: this client goes to "
        "the servers behind it, %s%s",
        url,
        ", ".join(addresses),
        f", and leaves out {', '.join(unwell)}" if unwell else "",
    )
    return addresses
