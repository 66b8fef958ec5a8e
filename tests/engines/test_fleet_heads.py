"""Heads on several servers of which one is lost and comes back; over `RecordingServer`s.

1. Who comes back has the heads that this client pushed before it takes rows: the same bytes and versions.
2. Who does not take them gets no rows, and one warning says why.
3. Rows of one call that two versions of a head scored are told of once.
"""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from helpers import heads_oracle
from helpers.fake_engine import HIDDEN_SIZE, Handler, RecordingEngine, RecordingServer

from torchrl_sglang_hidden import HeadSpec, Request, RequestRejectedError, SGLangServer, connect
from torchrl_sglang_hidden.engines import fleet
from torchrl_sglang_hidden.engines.mixtures import Mixtures
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.head_call import HeadCall
from torchrl_sglang_hidden.protocol.request_options import unpack_options
from torchrl_sglang_hidden.records import Scores

HEADS = [heads_oracle.make_head("mlp", HIDDEN_SIZE, seed=seed) for seed in range(3)]


class HeadServer(RecordingServer):
    """A `RecordingServer` that takes heads, and answers with the version of each.

    Attributes:
        refuses: why it takes none; "" where it does.
        steps: what came, in order: calls about heads, and None for rows.
    """

    def __init__(self, port: int = 0, refuses: str = "") -> None:
        super().__init__(port)
        self.refuses, self.heads = refuses, dict[str, str]()
        self.steps: list[HeadCall | None] = []
        self.respond = self.answer

    @property
    def sent_rows(self) -> list[list[int]]:
        return [ids for payload in self.payloads for ids in payload.get("input_ids", [])]

    def answer(self, handler: Handler, payload: dict[str, Any]) -> None:
        if not HeadCall.is_packed(payload.get("name")):
            self.steps.append(None)
            rows = RecordingEngine().answer(payload)
            for row, params in zip(rows, payload["sampling_params"], strict=True):
                options = unpack_options(params["custom_params"])
                versions = [self.heads.get(name, "never pushed") for name in options.scores.heads]
                row["meta_info"][CHANNEL][0]["scores"]["versions"] = versions
            handler.say((200, rows))
            return
        call = HeadCall.unpack(payload["name"])
        if self.refuses:
            handler.say((400, {"success": False, "message": self.refuses}))
            return
        self.steps.append(call)
        if call.data:
            self.heads[call.name] = call.version
        else:
            del self.heads[call.name]
        handler.say((200, {"success": True, "message": ""}))


Make = Callable[..., HeadServer]


@pytest.fixture
def make_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(fleet, "AWAY_S", 0.0)
    servers: list[HeadServer] = []

    def make(**options: Any) -> HeadServer:
        servers.append(HeadServer(**options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def servers(make_server: Make) -> list[HeadServer]:
    return [make_server(), make_server()]


@pytest.fixture
def engine(servers: list[HeadServer]) -> Iterator[SGLangServer]:
    with connect([server.url for server in servers]) as engine:
        yield engine


def requests_of(num_rows: int, head: str = "d3") -> list[Request]:
    return [Request((6 + row, 7), heads=HeadSpec((head,))) for row in range(num_rows)]


def versions_of(engine: SGLangServer, *, head: str = "d3", way: str = "sync") -> list[str]:
    requests = requests_of(4, head)
    found = engine.generate(requests) if way == "sync" else asyncio.run(engine.agenerate(requests))
    return [one.scores[head].version for one in found]


def lose(engine: SGLangServer, server: HeadServer) -> int:
    """Stop a server, let the client find out, and return its port."""
    server.stop()
    assert len(engine.generate(requests_of(4))) == 4
    return int(server.server_address[1])


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_server_that_is_back_has_the_heads_before_it_takes_rows(
    make_server: Make, servers: list[HeadServer], engine: SGLangServer, way: str
) -> None:
    engine.push_head("d1", HEADS[0])
    engine.push_head("d2", HEADS[0])
    engine.push_head("d3", HEADS[0], version="old")
    engine.push_head("d3", HEADS[1], version="new")
    engine.drop_head("d2")
    again = make_server(port=lose(engine, servers[0]))
    assert versions_of(engine, way=way) == ["new"] * 4
    pushed = [HeadCall("d1", servers[1].heads["d1"], HEADS[0].to_bytes()), HeadCall("d3", "new", HEADS[1].to_bytes())]
    assert again.steps == [*pushed, None]
    assert len(again.sent_rows) == 2


def test_a_head_that_was_dropped_meanwhile_does_not_come_back(
    make_server: Make, servers: list[HeadServer], engine: SGLangServer
) -> None:
    for name in ("d3", "d4"):
        engine.push_head(name, HEADS[0])
    port = lose(engine, servers[0])
    with pytest.raises(Exception, match=rf"{servers[0].url} did not drop head 'd4': nothing answers"):
        engine.drop_head("d4")
    again = make_server(port=port)
    versions_of(engine)
    assert again.heads == servers[1].heads == {"d3": again.heads["d3"]}


def test_a_head_that_a_lost_server_cannot_take_is_taken_by_none(
    make_server: Make, servers: list[HeadServer], engine: SGLangServer
) -> None:
    engine.push_head("d3", HEADS[0], version="1")
    port = lose(engine, servers[0])
    with pytest.raises(ConnectionError, match=rf"{servers[0].url} did not take head 'd3' of version '2': nothing"):
        engine.push_head("d3", HEADS[1], version="2")
    assert versions_of(engine) == ["1"] * 4
    make_server(port=port)
    assert versions_of(engine) == ["1"] * 4
    engine.push_head("d3", HEADS[1], version="2")
    assert versions_of(engine) == ["2"] * 4


def test_a_refusal_leaves_no_server_with_the_new_head(servers: list[HeadServer], engine: SGLangServer) -> None:
    engine.push_head("d3", HEADS[0], version="1")
    servers[1].refuses = "no room"
    with pytest.raises(RequestRejectedError, match=rf"{servers[1].url} did not take head 'd3' .*: .*no room"):
        engine.push_head("d3", HEADS[1], version="2")
    with pytest.raises(RequestRejectedError, match=rf"{servers[1].url} did not take head 'd4' .*no head of that name"):
        engine.push_head("d4", HEADS[1])
    assert [server.heads for server in servers] == [{"d3": "1"}] * 2
    assert versions_of(engine) == ["1"] * 4


def test_one_that_does_not_take_them_stays_out_and_one_warning_says_why(
    make_server: Make, servers: list[HeadServer], engine: SGLangServer, caplog: pytest.LogCaptureFixture
) -> None:
    engine.push_head("d3", HEADS[0])
    again = make_server(port=lose(engine, servers[0]), refuses="layer 3 is not recorded")
    for _ in range(3):
        versions_of(engine)
    assert again.sent_rows == []
    words = rf"{again.url} is back and does not take the heads that the others have \(.*layer 3 is not recorded"
    assert len([one for one in caplog.messages if re.match(words, one)]) == 1
    again.refuses = ""
    versions_of(engine)
    assert again.steps[-1] is None
    assert caplog.messages[-1] == f"{again.url} is back, and takes rows again"
    # Another loss is told of again.
    again = make_server(port=lose(engine, again), refuses="layer 3 is not recorded")
    versions_of(engine)
    assert len([one for one in caplog.messages if re.match(words, one)]) == 2


def test_one_that_ends_while_it_takes_them_is_not_back(
    make_server: Make, servers: list[HeadServer], engine: SGLangServer, caplog: pytest.LogCaptureFixture
) -> None:
    engine.push_head("d3", HEADS[0])
    again = make_server(port=lose(engine, servers[0]))
    again.respond = lambda handler, payload: setattr(handler, "close_connection", True)
    versions_of(engine)
    assert again.sent_rows == []
    assert "does not take the heads" not in caplog.text
    again.respond = again.answer
    versions_of(engine)
    assert len(again.sent_rows) == 2


def test_after_all_were_lost_each_gets_the_heads(
    make_server: Make, servers: list[HeadServer], engine: SGLangServer
) -> None:
    engine.push_head("d3", HEADS[0], version="1")
    ports = [server.server_address[1] for server in servers]
    for server in servers:
        server.stop()
    with pytest.raises(ConnectionError):
        engine.generate(requests_of(4))
    again = [make_server(port=port) for port in ports]
    assert versions_of(engine) == ["1"] * 4
    assert [server.heads for server in again] == [{"d3": "1"}] * 2


def test_a_copy_of_the_client_knows_the_heads(
    make_server: Make, servers: list[HeadServer], engine: SGLangServer
) -> None:
    with copy.deepcopy(engine) as copied:
        engine.push_head("d3", HEADS[0], version="1")
        again = make_server(port=lose(copied, servers[0]))
        assert versions_of(copied) == ["1"] * 4
    assert again.heads == {"d3": "1"}


def test_rows_of_two_versions_are_told_of_once(
    servers: list[HeadServer], engine: SGLangServer, caplog: pytest.LogCaptureFixture
) -> None:
    engine.push_head("d3", HEADS[0], version="1")
    versions_of(engine)
    assert caplog.messages == []
    with connect(servers[1].url) as alone:
        alone.push_head("d3", HEADS[1], version="2")
        with engine._heads.kept.lock:  # as in the middle of a push of its own
            versions_of(engine)
        assert caplog.messages == []
        assert sorted(versions_of(engine)) == sorted(versions_of(engine)) == ["1", "1", "2", "2"]
        (said,) = caplog.messages
        assert said.startswith("the rows of one call are scored by different versions of head 'd3', ")
        assert f"'{servers[0].url}': ['1'], '{servers[1].url}': ['2']" in said
        alone.push_head("d3", HEADS[2], version="3")
        versions_of(engine)
    assert len(caplog.messages) == 2


def test_what_was_told_of_three_servers_is_told_again_when_it_was_mended(caplog: pytest.LogCaptureFixture) -> None:
    """A call may reach two of them only, now these and now those."""

    def scored(**versions: str) -> None:
        requests = [Request((6,), {"max_new_tokens": 1}, heads=HeadSpec(("d3",)))]
        (blank,) = RecordingEngine().generate(requests)
        mixtures.tell({url: [replace(blank, scores={"d3": Scores(None, None, one)})] for url, one in versions.items()})

    mixtures = Mixtures(lambda: False, lambda: False)
    for _ in range(2):
        scored(a="1", b="2")
        scored(c="1", b="2")
        scored(a="1", b="2", c="1")
        scored(a="1", c="1")
    assert len(caplog.messages) == 2, "each server once"
    scored(a="2", b="2")
    scored(b="2", c="1")
    assert len(caplog.messages) == 2, "c was never mended"
    scored(a="1", b="2")
    assert len(caplog.messages) == 3
