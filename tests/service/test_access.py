"""Who is let in to SGLang's HTTP server: with and without a key, from browsers, past tricks with addresses."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from torchrl_sglang_hidden.service.access import OPEN, UNPICKLING, AccessGuard

KEY, ADMIN = "sesame", "rules"


def answer(
    path: str = "/generate",
    *,
    keys: tuple[str | None, ...] = (KEY, ADMIN),
    host: str = "127.0.0.1",
    guarded: tuple[str, ...] = (),
    kind: str = "http",
    method: str = "POST",
    root: str = "",
    **headers: str,
) -> tuple[int, str]:
    """Return the status and the body; 200 where the request was let through."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the body is nothing to the guard")

    scope = {
        "type": kind,
        "path": path,
        "root_path": root,
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        **({"method": method} if kind == "http" else {}),
    }
    asyncio.run(AccessGuard(app, host=host, keys=keys, guarded=guarded)(scope, receive, send))
    if sent[0]["type"] == "websocket.close":
        return sent[0]["code"], sent[0]["reason"]
    return sent[0]["status"], sent[1]["body"].decode() if len(sent) > 1 else ""


@pytest.mark.parametrize("key", [KEY, ADMIN])
def test_a_key_opens(key: str) -> None:
    assert answer(Authorization=f"Bearer {key}") == (200, "")
    assert answer(Authorization=f"bearer {key}") == (200, "")


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", "Bearer sesam", "Basic sesame", "sesame", "Bearer  sesame"])
def test_anything_else_does_not(value: str) -> None:
    status, body = answer(Authorization=value)
    assert status == 401
    assert "send Authorization: Bearer" in body
    assert KEY not in body


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/healthy", "/health/../generate", "/ready/x", "/"])
def test_what_sglang_leaves_open_wants_a_key(path: str) -> None:
    assert answer(path, method="GET")[0] == 401


@pytest.mark.parametrize("path", sorted(OPEN))
def test_probes_need_none(path: str) -> None:
    assert answer(path, method="GET")[0] == 200
    assert answer(f"/api{path}", method="GET", root="/api")[0] == 200


def test_a_websocket_wants_a_key() -> None:
    assert answer("/v1/realtime", kind="websocket")[0] == 1008
    assert answer("/v1/realtime", kind="websocket", Authorization=f"Bearer {KEY}")[0] == 200


@pytest.mark.parametrize("host", ["x/health?", "x#", "me@there", "a\\b"])
def test_a_host_that_is_no_host(host: str) -> None:
    assert answer(Host=host, Authorization=f"Bearer {KEY}")[0] == 400
    assert answer(Host="server:30000", Authorization=f"Bearer {KEY}")[0] == 200


def test_without_a_key_programs_are_let_in_and_pages_of_other_sites_are_not() -> None:
    assert answer(keys=(None, None))[0] == 200
    for origin in ("http://localhost:3000", "http://127.0.0.1", "http://[::1]:80"):
        assert answer(keys=(), Origin=origin)[0] == 200
    for origin in ("https://evil.example", "null", "http://[::", "http://127.0.0.1.evil.example"):
        assert answer(keys=(), Origin=origin)[0] == 403
        assert answer(Origin=origin, Authorization=f"Bearer {KEY}")[0] == 200


def test_without_a_key_a_page_cannot_call_a_route_by_the_address_of_an_image() -> None:
    """Most of SGLang's control routes take GET, with which browsers send no Origin."""
    assert answer("/flush_cache", keys=(), method="GET", **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    for site in ("none", "same-origin", "same-site"):  # typed by the user, or of a page of this machine
        assert answer("/flush_cache", keys=(), method="GET", **{"Sec-Fetch-Site": site})[0] == 200
    local = {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "cross-site"}
    assert answer(keys=(), **local)[0] == 200, "a page of localhost that asks at 127.0.0.1"
    key = {"Authorization": f"Bearer {KEY}", "Sec-Fetch-Site": "cross-site"}
    assert answer("/flush_cache", method="GET", **key)[0] == 200


def test_without_a_key_a_page_cannot_read_under_a_name_of_its_own_that_leads_here() -> None:
    """A page of evil.example:30000 is of the same origin as this server, if that name leads to this machine."""
    for host in ("evil.example:30000", "evil.example", "127.0.0.1.evil.example", "[::", ""):
        assert answer("/server_info", keys=(), method="GET", Host=host)[0] == 403
    for host in ("127.0.0.1:30000", "localhost:30000", "LOCALHOST", "[::1]:30000", "0.0.0.0:30000"):
        assert answer("/server_info", keys=(), method="GET", Host=host)[0] == 200
    assert answer("/server_info", keys=(), method="GET", Host="gpu7:30000", host="0.0.0.0")[0] == 200
    assert answer("/server_info", method="GET", Host="evil.example", Authorization=f"Bearer {KEY}")[0] == 200


@pytest.mark.parametrize("path", sorted(UNPICKLING))
def test_nobody_sends_a_pickle(path: str) -> None:
    for end in ("", "/"):
        status, body = answer(path + end, Authorization=f"Bearer {KEY}")
        assert status == 403
        assert "engine.update_weights" in body


def test_the_vector_route_of_an_open_server_without_a_key(caplog: pytest.LogCaptureFixture) -> None:
    route = "/v1/hidden_states"
    with caplog.at_level(logging.WARNING):
        assert answer(route, host="0.0.0.0", keys=(), guarded=(route,))[0] == 403
        assert answer("/generate", host="0.0.0.0", keys=(), guarded=(route,))[0] == 200, "SGLang's own to decide"
    assert "start it with --api-key" in caplog.text
    assert answer(route, keys=(), guarded=(route,))[0] == 200
    assert answer(route, host="0.0.0.0", guarded=(route,), Authorization=f"Bearer {KEY}")[0] == 200


def test_other_messages_pass() -> None:
    assert answer("", kind="lifespan")[0] == 200
