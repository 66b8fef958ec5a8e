"""The address of SGLang's router: what its list of workers says, over `RecordingServer`s.

What the real router does with requests is tested in tests/engine/test_router_engine.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.fake_engine import RecordingServer

from torchrl_sglang_hidden import SGLangServer, connect
from torchrl_sglang_hidden.errors import (
    AuthenticationError,
    CapabilityError,
    EngineUnreachableError,
    InputError,
    ProtocolError,
    RequestRejectedError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.records import Request

Make = Callable[..., RecordingServer]


@pytest.fixture
def make_server() -> Iterator[Make]:
    servers: list[RecordingServer] = []

    def make(workers: Any = None) -> RecordingServer:
        servers.append(RecordingServer())
        if workers is not None:
            servers[-1].pages = {"/workers": (200, workers)}
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def worker(url: str, **changes: Any) -> dict[str, Any]:
    return {"url": url, "worker_type": "regular", "connection_mode": "HTTP", "is_healthy": True, **changes}


def test_a_server_that_stands_behind_a_router_too(make_server: Make) -> None:
    server = make_server()
    router = make_server({"workers": [worker(server.url)]})
    with pytest.raises(InputError, match=f"'{server.url}/' and '{server.url}' are one server"):
        connect([server.url + "/", router.url])


def test_a_routers_address_stands_for_its_servers(make_server: Make, caplog: pytest.LogCaptureFixture) -> None:
    servers = [make_server(), make_server()]
    urls = tuple(server.url for server in servers)
    router = make_server({"workers": [worker(url) for url in urls]})
    with SGLangServer(router.url + "/", api_key="sesame") as engine:
        assert engine.urls == urls
        assert len(engine.generate([Request((6, 7)), Request((7, 7))])) == 2
        with pickle.loads(pickle.dumps(engine)) as again:
            assert again.urls == urls
    assert [len(server.sent_rows) for server in servers] == [1, 1]
    assert router.payloads == []
    assert [headers["Authorization"] for _, headers in router.seen] == ["Bearer sesame"] * 2
    assert f"{router.url} is SGLang's router" in caplog.text
    assert "sesame" not in caplog.text


def test_servers_of_ranks_are_one_and_sick_ones_are_left_out(make_server: Make) -> None:
    server = make_server()
    ranks = [worker(f"{server.url}@{rank}") for rank in range(2)]
    router = make_server({"workers": [*ranks, worker("http://127.0.0.1:9", is_healthy=False)]})
    with connect(router.url) as engine:
        assert engine.urls == (server.url,)


@pytest.mark.parametrize(
    ("workers", "kind", "message"),
    [
        ({"workers": []}, EngineUnreachableError, "0 of its servers are in order .it has none"),
        (
            {"workers": [worker("http://h:1", is_healthy=False)]},
            EngineUnreachableError,
            "0 of its servers .*http://h:1",
        ),
        ({"workers": [worker("http://h:1", worker_type="prefill")]}, CapabilityError, "http://h:1 .*kind 'prefill'"),
        ({"workers": [worker("grpc://h:1", connection_mode="GRPC")]}, CapabilityError, "'GRPC'.*over HTTP"),
        ({"workers": [{"url": "http://h:1"}]}, ProtocolError, "workers lacks 'worker_type'.*the servers behind"),
        ({"workers": None}, ProtocolError, "workers lacks .*the servers behind"),
        ([], ProtocolError, "workers lacks .*the servers behind"),
    ],
)
def test_what_no_server_stands_behind(
    make_server: Make, workers: Any, kind: type[SGLangHiddenError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        connect(make_server(workers).url)


def test_a_key_that_the_router_refuses(make_server: Make) -> None:
    router = make_server({})
    router.pages["/workers"] = (401, "no")
    with pytest.raises(AuthenticationError):
        connect(router.url)


def test_what_is_neither_server_nor_router(make_server: Make) -> None:
    with pytest.raises(RequestRejectedError, match="answered 404: Not Found"):
        connect(make_server({"workers": []}).url + "/elsewhere")


def test_a_server_behind_it_that_cannot_be_reached(make_server: Make) -> None:
    first = make_server()
    router = make_server({"workers": [worker(first.url), worker("http://127.0.0.1:9")]})
    with pytest.raises(EngineUnreachableError, match=r"nothing answers at http://127.0.0.1:9"):
        connect(router.url)
