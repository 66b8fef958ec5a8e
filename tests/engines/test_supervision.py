"""What a client asks of whoever started its server: before each call, and after each change of weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_engine import RecordingServer

from torchrl_sglang_hidden import SGLangServer
from torchrl_sglang_hidden.engines import endpoint as endpoint_module
from torchrl_sglang_hidden.engines.supervision import Supervision
from torchrl_sglang_hidden.errors import EngineError, RestartError, ServerRestartingError
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.weights.adapters import Adapter
from torchrl_sglang_hidden.weights.transports import WeightUpdate

REQUEST = Request((6, 7), {"max_new_tokens": 2})


class Asked(Supervision):
    """Answers every call with an error or not, and keeps what it was asked."""

    keeps = True
    start = 4

    def __init__(self, error: EngineError | None = None) -> None:
        self.error = error
        self.asked: list[Any] = []

    def admit(self, *, generates: bool) -> None:
        self.asked.append(generates)
        if self.error is not None and (generates or not isinstance(self.error, RestartError)):
            raise self.error

    async def aadmit(self, *, generates: bool) -> None:
        self.admit(generates=generates)

    def keep_weights(self, directory: Path | None, version: str, start: int, *, is_users: bool) -> None:
        self.asked.append(("weights", directory, version, start, is_users))

    def keep_adapter(self, name: str, directory: Path, version: str, start: int, *, is_users: bool) -> None:
        self.asked.append((name, directory.is_dir(), version, start, is_users))

    def drop_adapter(self, name: str) -> None:
        self.asked.append(("dropped", name))


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    server = RecordingServer()
    yield server
    server.stop()


@pytest.fixture
def engine(server: RecordingServer) -> Iterator[SGLangServer]:
    with SGLangServer(server.url) as engine:
        yield engine


async def _astream(engine: SGLangServer) -> None:
    await engine.astream(REQUEST)


CALLS: dict[str, Callable[[SGLangServer], Any]] = {
    "generate": lambda engine: engine.generate([REQUEST]),
    "agenerate": lambda engine: asyncio.run(engine.agenerate([REQUEST])),
    "stream": lambda engine: engine.stream(REQUEST),
    "astream": lambda engine: asyncio.run(_astream(engine)),
    "session": lambda engine: engine.session(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("error", [ServerRestartingError("it comes back"), RestartError("weights are lost")])
def test_nothing_is_sent_before_the_server_is_back(
    server: RecordingServer, engine: SGLangServer, call: Callable[[SGLangServer], Any], error: EngineError
) -> None:
    engine._endpoints[0].supervision = supervision = Asked(error)
    with pytest.raises(type(error), match=str(error)):
        call(engine)
    assert server.payloads == []
    assert supervision.asked == [True]


def test_new_weights_may_come_where_the_old_ones_are_lost(server: RecordingServer, engine: SGLangServer) -> None:
    (endpoint,) = engine._endpoints
    endpoint.supervision = supervision = Asked(RestartError("weights are lost"))
    server.respond = lambda handler, payload: handler.say((200, {"success": True}))
    assert endpoint.weight_version() == "v7"
    assert endpoint.call("update_weights_from_disk", {}) == {"success": True}
    assert supervision.asked == [False, False]


@pytest.mark.parametrize("pools", [True, False])
def test_weights_that_were_taken_are_kept(
    engine: SGLangServer, pools: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (endpoint,) = engine._endpoints
    endpoint.info = endpoint_module.dataclasses.replace(endpoint.info, pools_in_server=pools)
    endpoint.supervision = supervision = Asked()
    monkeypatch.setattr(endpoint_module, "send", lambda transport, update, receiver: None)
    update = WeightUpdate(tensors={}, version="7", running="finish", directory=tmp_path, is_users=True)
    endpoint.load("disk", update)
    # Without the server half nobody could load them at the next start.
    assert supervision.asked == [False, ("weights", tmp_path if pools else None, "7", 4, True)]
    assert endpoint.info.weight_version == "7"


def test_weights_that_were_refused_are_not(
    engine: SGLangServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (endpoint,) = engine._endpoints
    endpoint.supervision = supervision = Asked()

    def refuse(*args: object) -> None:
        raise EngineError("refused")

    monkeypatch.setattr(endpoint_module, "send", refuse)
    update = WeightUpdate(tensors={}, version="7", running="finish", directory=tmp_path)
    with pytest.raises(EngineError, match="refused"):
        endpoint.load("disk", update)
    assert supervision.asked == [False]


@pytest.mark.parametrize("is_users", [True, False])
def test_adapters_are_kept_and_dropped(
    server: RecordingServer, engine: SGLangServer, is_users: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (endpoint,) = engine._endpoints
    endpoint.supervision = supervision = Asked()
    server.pages["/v1/models"] = (200, {"data": []})
    monkeypatch.setattr(endpoint_module, "load", lambda *args, taken, **options: taken(tmp_path))
    endpoint.load_adapter("a", Adapter({}, tmp_path if is_users else tmp_path / "other"), "8")
    server.respond = lambda handler, payload: handler.say((200, {"success": True}))
    endpoint.unload_adapter("a")
    assert supervision.asked == [False, ("a", True, "8", 4, is_users), False, ("dropped", "a")]


def test_a_server_that_others_started_is_asked_nothing() -> None:
    supervision = Supervision()
    supervision.admit(generates=True)
    asyncio.run(supervision.aadmit(generates=True))
    supervision.keep_weights(None, "1", supervision.start, is_users=False)
    assert supervision.how_it_ended() == ""
    assert not supervision.keeps
