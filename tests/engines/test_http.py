"""The HTTP client against a local server of a few lines: errors, connections, keys, threads and event loops.

The server is that of helpers/fake_engine.py, so that what is read here is what a good server says, and a test spoils
one thing of it. What a real SGLang says is tested in tests/engine/.
"""

from __future__ import annotations

import asyncio
import gc
import pickle
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers.fake_engine import Handler, RecordingEngine, RecordingServer, Respond, abort_a_row, server_page

from torchrl_sglang_hidden import SGLangServer, connect
from torchrl_sglang_hidden.engines.address import server_at
from torchrl_sglang_hidden.errors import (
    AuthenticationError,
    CapabilityError,
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
    InputError,
    InputTypeError,
    ProtocolError,
    RequestAbortedError,
    RequestRejectedError,
    SGLangHiddenError,
    TokenIdError,
)
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.spec.hidden import HiddenSpec


@pytest.fixture
def make_server() -> Iterator[Callable[..., RecordingServer]]:
    servers: list[RecordingServer] = []

    def make(**options: Any) -> RecordingServer:
        servers.append(RecordingServer(**options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def server(make_server: Callable[..., RecordingServer]) -> RecordingServer:
    return make_server()


@pytest.fixture
def engine(server: RecordingServer) -> Iterator[SGLangServer]:
    with connect(server.url) as engine:
        yield engine


def requests_of(num_rows: int) -> list[Request]:
    return [Request((6 + row, 7), hidden=HiddenSpec()) for row in range(num_rows)]


def ids_of(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [one.prompt_ids for one in completions]


def generate(engine: SGLangServer, way: str, requests: list[Request]) -> list[Completion]:
    return engine.generate(requests) if way == "sync" else asyncio.run(engine.agenerate(requests))


# --- errors -----------------------------------------------------------------------------------------------------------

SGLANG_400 = {"error": {"message": "Requested token count exceeds the model's limit of 64"}}

STATUSES: list[tuple[int, Any, type[SGLangHiddenError], str]] = [
    (
        401,
        {"error": "Unauthorized"},
        AuthenticationError,
        r"wants an API key, and none was sent \(status 401\); pass its api_key",
    ),
    (403, "no", AuthenticationError, r"wants an API key, and none was sent \(status 403\)"),
    (400, SGLANG_400, RequestRejectedError, r"answered 400: Requested token count exceeds the model's limit of 64"),
    (400, {"object": "error", "message": "top_p"}, RequestRejectedError, r"answered 400: top_p"),
    (400, ["a", "list"], RequestRejectedError, r"answered 400: \['a', 'list'\]"),
    (400, "plain words", RequestRejectedError, r"answered 400: plain words"),
    (404, "<html>\n  <p>no\n  such page", RequestRejectedError, r"answered 404: <html> <p>no such page; look"),
    (404, "Not Found", RequestRejectedError, r"answered 404: Not Found"),
    (422, {"detail": "input_ids"}, RequestRejectedError, r"answered 422: .*input_ids"),
    (500, {"error": "CUDA out of memory"}, EngineError, r"answered 500: CUDA out of memory"),
    (503, "", EngineError, r"answered 503"),
    (200, "<html>a router</html>", ProtocolError, r"answered no JSON: '<html>a router</html>'; is that an SGLang"),
    (302, "elsewhere", ProtocolError, r"answered no JSON: 'elsewhere'"),
    (200, {"text": "one, not a list"}, ProtocolError, r"sent 2 requests and got"),
    (200, [], ProtocolError, r"sent 2 requests and got 0"),
    (200, "[" * 5000, ProtocolError, r"answered no JSON: '\[\[\["),
    (400, "[" * 5000, RequestRejectedError, r"answered 400: \[\[\["),
    (200, "1" * 5000, ProtocolError, r"answered no JSON: '111"),
    (400, {"error": {"message": {"x": "y" * 999}}}, RequestRejectedError, r"answered 400: \{'x': 'yyy.{1,60}'\};"),
]


# An asynchronous client is slow to make; what it reads goes through the same code.
@pytest.mark.parametrize(
    ("way", "status", "body", "error", "words"),
    [*(("sync", *case) for case in STATUSES), *(("async", *case) for case in STATUSES[::4])],
)
def test_answers_that_are_errors(
    server: RecordingServer,
    engine: SGLangServer,
    way: str,
    status: int,
    body: Any,
    error: type[SGLangHiddenError],
    words: str,
) -> None:
    good, server.respond = server.respond, lambda handler, payload: handler.say((status, body))
    with pytest.raises(error, match=words) as caught:
        generate(engine, way, requests_of(2))
    assert type(caught.value) is error
    server.respond = good
    assert ids_of(generate(engine, way, requests_of(2))) == [(6, 7), (7, 7)]


@pytest.mark.parametrize(
    ("page", "answer", "error", "words"),
    [
        ("/model_info", (401, {}), AuthenticationError, r"wants an API key"),
        ("/model_info", (404, "Not Found"), RequestRejectedError, r"answered 404"),
        ("/model_info", (200, "hello"), ProtocolError, r"answered no JSON"),
        ("/model_info", (200, ["a list"]), ProtocolError, r"/model_info answered .*is that an SGLang server\?"),
        ("/server_info", (200, {}), CapabilityError, r"'\./no-such-model' cannot be read from this machine"),
        ("/server_info", (500, "broken"), EngineError, r"answered 500: broken"),
        ("/server_info", (200, {**server_page(), "dp_size": "2"}), ProtocolError, r"has dp_size='2'; is that an SGL"),
        ("/server_info", (200, {**server_page(), "dp_size": -1}), ProtocolError, r"has dp_size=-1; is that an SGLang"),
    ],
)
def test_a_server_that_is_another(
    make_server: Callable[..., RecordingServer], page: str, answer: Any, error: type[SGLangHiddenError], words: str
) -> None:
    server = make_server(model_path="./no-such-model")
    server.pages[page] = answer
    with pytest.raises(error, match=words):
        connect(server.url)


@pytest.mark.parametrize("version", [{}, {"weight_version": None}, {"weight_version": 7}])
def test_a_server_that_does_not_name_its_weights(server: RecordingServer, engine: SGLangServer, version: Any) -> None:
    server.pages["/model_info"] = (200, version)
    with pytest.raises(ProtocolError, match=r"/model_info has the weight_version (None|7); is it SGLang"):
        engine._endpoints[0].weight_version()


@pytest.mark.parametrize("answer", [(503, ["down"]), (200, [1]), (200, "[" * 5000)])
def test_a_control_route_that_answers_something_else(
    server: RecordingServer, engine: SGLangServer, answer: Any
) -> None:
    server.respond = lambda handler, payload: handler.say(answer)
    endpoint = engine._endpoints[0]
    if isinstance(answer[1], str):
        assert endpoint.call("flush_cache", {}) == {"success": True, "message": answer[1]}
        return
    with pytest.raises(EngineError, match=r"answered (503: \['down'\]|200: \[1\])"):
        endpoint.call("flush_cache", {})


@pytest.mark.parametrize("way", ["sync", "async"])
def test_the_answers_to_other_requests(server: RecordingServer, engine: SGLangServer, way: str) -> None:
    """What stands between client and server mixes up two rows of equal lengths."""
    good, server.respond = server.respond, lambda handler, payload: handler.say((200, swapped(payload)))
    with pytest.raises(ProtocolError, match=r"row 0: the answer is wrong, it answers '.*-00000001', and '.*-00000000'"):
        generate(engine, way, requests_of(2))
    server.respond = good


def swapped(payload: dict[str, Any]) -> list[Any]:
    return RecordingEngine().answer(payload)[::-1]


def test_a_server_that_has_not_run_yet_is_warmed_up(make_server: Callable[..., RecordingServer]) -> None:
    """Which layers it gives shows on its first step."""
    server = make_server()
    status, ready = server.pages["/server_info"]
    half = ready["internal_states"][0][CHANNEL]
    server.pages["/server_info"] = (status, {**ready, "internal_states": [{CHANNEL: {**half, "layers": None}}]})
    good = server.respond

    def run(handler: Handler, payload: dict[str, Any]) -> None:
        server.pages["/server_info"] = (status, ready)
        good(handler, {"return_logprob": [False], **payload, "sampling_params": [payload["sampling_params"]]})

    server.respond = run
    with connect(server.url) as engine:
        assert engine.info.layers == (-1, 0, 2)
        server.respond = good
        assert len(engine.generate([Request((6, 7), hidden=HiddenSpec(layers=2))])) == 1
    first, second = server.payloads
    assert (first["input_ids"], second["input_ids"]) == ([list(range(8))], [[6, 7]])
    with connect(server.url):
        assert len(server.payloads) == 2, "one that has run is not warmed up"


def cut_short(handler: Handler, payload: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'[{"text": "so far')
    handler.close_connection = True


def say_nothing(handler: Handler, payload: dict[str, Any]) -> None:
    handler.close_connection = True


def say_no_http(handler: Handler, payload: dict[str, Any]) -> None:
    handler.wfile.write(b"\x00\x01\x02 not http\r\n\r\n")
    handler.close_connection = True


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("respond", [cut_short, say_nothing, say_no_http])
def test_a_server_that_goes_away_while_answering(
    server: RecordingServer, engine: SGLangServer, way: str, respond: Respond
) -> None:
    good, server.respond = server.respond, respond
    with pytest.raises(EngineUnreachableError, match=r"went away while answering .*look at the server's log"):
        generate(engine, way, requests_of(1))
    server.respond = good
    assert len(generate(engine, way, requests_of(1))) == 1


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_server_that_never_answers(server: RecordingServer, way: str) -> None:
    release, good = threading.Event(), server.respond
    server.respond = lambda handler, payload: (release.wait(), good(handler, payload))[1]
    try:
        with SGLangServer(server.url, read_timeout_s=1.0) as engine:
            with pytest.raises(EngineTimeoutError, match=r"did not answer in time; raise read_timeout_s") as caught:
                generate(engine, way, requests_of(1))
            assert isinstance(caught.value, TimeoutError)
    finally:
        release.set()


def free_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_nobody_there() -> None:
    url = free_url()
    with pytest.raises(EngineUnreachableError, match=rf"nothing answers at {url} .*is the server running\?") as caught:
        connect(url)
    assert isinstance(caught.value, ConnectionError)


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_server_that_stops_and_comes_back(make_server: Callable[..., RecordingServer], way: str) -> None:
    server = make_server()
    with connect(server.url) as engine:
        expected = ids_of(generate(engine, way, requests_of(3)))
        server.stop()
        with pytest.raises(EngineUnreachableError):
            generate(engine, way, requests_of(3))
        make_server(port=server.server_address[1])
        assert ids_of(generate(engine, way, requests_of(3))) == expected


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_closed_engine(engine: SGLangServer, way: str) -> None:
    generate(engine, way, requests_of(1))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match=r"closed by close\(\); connect again"):
        generate(engine, way, requests_of(1))


@pytest.mark.parametrize(
    "url",
    ["", "not a url", "127.0.0.1:30000", "ftp://127.0.0.1", "http://", "http://:30000", "file:///tmp", "http://h:port",
     "http://h:99999", "http://[::1"],
)  # fmt: skip
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(InputError) as caught:
        connect(url)
    assert repr(url) in str(caught.value)
    assert "http://127.0.0.1:30000" in str(caught.value)


@pytest.mark.parametrize("url", [None, 7, b"http://127.0.0.1", [7], ["http://127.0.0.1:1", None]])
def test_what_is_no_string(url: Any) -> None:
    with pytest.raises((InputTypeError, EngineUnreachableError)):
        connect(url)


def test_no_address_at_all() -> None:
    with pytest.raises(InputError, match=r"0 addresses; pass at least one"):
        connect([])


def test_a_slash_at_the_end_is_nothing(server: RecordingServer) -> None:
    with connect(server.url + "/") as engine:
        assert engine.url == server.url
        assert len(engine.generate(requests_of(2))) == 2


@pytest.mark.parametrize(
    "spell",
    [
        lambda url: url,
        lambda url: url + "/",
        lambda url: url.replace("http", "HTTP"),
        lambda url: url.replace("127.0.0.1", "localhost"),
        lambda url: url.replace("127.0.0.1", "LOCALHOST."),
    ],
)
def test_a_server_that_stands_there_twice(server: RecordingServer, spell: Callable[[str], str]) -> None:
    words = rf"'{server.url}' and '{spell(server.url)}' are one server; pass each of several servers once"
    with pytest.raises(InputError, match=re.escape(words)):
        connect([server.url, spell(server.url)])


def test_addresses_of_one_server_and_of_several() -> None:
    one = {server_at(url) for url in ("http://h", "http://H:80/", "HTTP://h.:80//", "http://h:80")}
    assert one == {("http", "h", 80, "")}
    assert server_at("http://[::1]:3") == server_at("http://[0:0::0:1]:3/")
    several = ("http://h", "https://h", "http://h:443", "http://h/a", "http://h/b", "http://[::1]", "http://127.0.0.1")
    assert len({server_at(url) for url in several}) == len(several)


# --- several servers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize(
    ("num_servers", "num_rows", "shares"),
    [(2, 4, [2, 2]), (2, 5, [3, 2]), (2, 1, [1, 0]), (3, 4, [2, 1, 1]), (1, 3, [3])],
)
def test_servers_share_the_rows(
    make_server: Callable[..., RecordingServer], way: str, num_servers: int, num_rows: int, shares: list[int]
) -> None:
    servers = [make_server() for _ in range(num_servers)]
    requests = requests_of(num_rows)
    with connect([server.url for server in servers]) as engine:
        assert engine.urls == tuple(server.url for server in servers)
        assert ids_of(generate(engine, way, requests)) == [one.prompt_ids for one in requests]
    assert [len(server.sent_rows) for server in servers] == shares
    together = [tuple(ids) for server in servers for ids in server.sent_rows]
    assert sorted(together) == [one.prompt_ids for one in requests], "each row went to one server"


def test_servers_work_at_the_same_time(make_server: Callable[..., RecordingServer]) -> None:
    """Each answers only when the other was asked too."""
    both, servers = threading.Barrier(2, timeout=10), [make_server(), make_server()]
    for server in servers:
        good = server.respond
        server.respond = lambda handler, payload, good=good: (both.wait(), good(handler, payload))[1]
    with connect([server.url for server in servers]) as engine:
        assert len(engine.generate(requests_of(2))) == 2
        assert len(asyncio.run(engine.agenerate(requests_of(2)))) == 2


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("bad_row", [0, 4])
def test_a_bad_row_sends_nothing_anywhere(make_server: Callable[..., RecordingServer], way: str, bad_row: int) -> None:
    servers, requests = [make_server(), make_server()], requests_of(5)
    requests[bad_row] = Request((5, 96))
    with connect([server.url for server in servers]) as engine:
        with pytest.raises(TokenIdError, match=rf"row {bad_row}: token id 96"):
            generate(engine, way, requests)
        assert [server.payloads for server in servers] == [[], []]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_one_of_two_servers_fails_and_is_reported_while_the_other_works(
    make_server: Callable[..., RecordingServer], way: str
) -> None:
    servers, reported = [make_server(), make_server()], threading.Event()
    servers[0].respond = lambda handler, payload: reported.wait(30)
    servers[1].respond = lambda handler, payload: handler.say((500, "broken"))
    with (
        connect([server.url for server in servers]) as engine,
        pytest.raises(EngineError, match=rf"{servers[1].url} answered 500: broken"),
    ):
        generate(engine, way, requests_of(4))
    assert not reported.is_set()
    reported.set()


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_row_is_named_by_its_place_in_the_whole_batch(make_server: Callable[..., RecordingServer], way: str) -> None:
    servers = [make_server(), make_server()]

    def abort(handler: Handler, payload: dict[str, Any]) -> None:
        rows = RecordingEngine().answer(payload)
        abort_a_row(rows)
        handler.say((200, rows))

    servers[1].respond = abort
    with (
        connect([server.url for server in servers]) as engine,
        pytest.raises(RequestAbortedError, match="row 1 ") as caught,
    ):
        generate(engine, way, requests_of(5))
    found = caught.value.completions
    assert [one.prompt_ids for one in found] == [one.prompt_ids for one in requests_of(5)]
    assert [one.finish_reason == "abort" for one in found] == [False, True, False, False, False]


def test_the_version_of_the_weights_at_this_moment(make_server: Callable[..., RecordingServer]) -> None:
    first, second = make_server(), make_server()
    with connect([first.url, second.url]) as engine:
        assert engine.weight_version() == "v7"
        second.pages["/model_info"][1]["weight_version"] = "v8"
        assert engine.weight_version() == "v7 and v8"
        assert engine.info.weight_version == "v7", "read at connect"


def test_servers_of_two_models_do_not_share(make_server: Callable[..., RecordingServer]) -> None:
    urls = [make_server(model_path=name).url for name in ("one", "two")]
    with pytest.raises(ProtocolError, match=r"do not serve the same model: .*'one'.*'two'"):
        connect(urls)


# --- keys, pickles, connections ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["sync", "async"])
def test_the_api_key_goes_along_and_is_never_shown(server: RecordingServer, way: str) -> None:
    with connect(server.url, api_key="sesame") as engine:
        generate(engine, way, requests_of(1))
        assert "sesame" not in repr(engine)
        assert server.url in repr(engine)
    assert len(server.seen) == 3
    assert {headers["Authorization"] for _, headers in server.seen} == {"Bearer sesame"}


def test_no_api_key_no_header(server: RecordingServer, engine: SGLangServer) -> None:
    engine.generate(requests_of(1))
    assert all("Authorization" not in headers for _, headers in server.seen)


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines", 7])
def test_a_key_that_no_header_holds(server: RecordingServer, key: Any) -> None:
    with pytest.raises(InputError, match="api_key") as caught:
        connect(server.url, api_key=key)
    assert str(key) not in str(caught.value)


def test_a_pickled_engine_connects_again(make_server: Callable[..., RecordingServer]) -> None:
    servers = [make_server(), make_server()]
    engine = SGLangServer([server.url for server in servers], api_key="sesame", connect_timeout_s=3, read_timeout_s=4)
    data = pickle.dumps(engine)
    engine.close()
    with pickle.loads(data) as again:
        assert (again.urls, again.info, again._config) == (engine.urls, engine.info, engine._config)
        assert ids_of(again.generate(requests_of(2))) == [(6, 7), (7, 7)]
    assert all(headers["Authorization"] == "Bearer sesame" for _, headers in servers[0].seen)


def test_connections_are_used_again(server: RecordingServer, engine: SGLangServer) -> None:
    for _ in range(5):
        engine.generate(requests_of(2))
    assert len(server.connections) == 1

    async def five() -> None:
        for _ in range(5):
            await engine.agenerate(requests_of(2))

    asyncio.run(five())
    assert len(server.connections) == 2


def test_threads_get_their_own_rows(server: RecordingServer, engine: SGLangServer) -> None:
    calls = [[Request((6 + n, 7 + m)) for m in range(3)] for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(engine.generate, calls))
    assert [ids_of(answer) for answer in answers] == [[one.prompt_ids for one in call] for call in calls]


def test_every_event_loop_gets_its_own_connections(server: RecordingServer, engine: SGLangServer) -> None:
    for _ in range(3):
        assert len(asyncio.run(engine.agenerate(requests_of(2)))) == 2

    def in_a_thread(row: int) -> list[Completion]:
        return asyncio.run(engine.agenerate([Request((6 + row,))]))

    with ThreadPoolExecutor(4) as pool:
        assert [ids_of(answer) for answer in pool.map(in_a_thread, range(8))] == [[(6 + row,)] for row in range(8)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_event_loops_that_ended_leave_nothing(server: RecordingServer, engine: SGLangServer) -> None:
    for _ in range(5):
        asyncio.run(engine.agenerate(requests_of(1)))
    gc.collect()
    assert len(engine._endpoints[0]._async_clients) <= 1


def test_a_proxy_of_the_environment_is_not_for_this_machine(
    server: RecordingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, free_url())
    with connect(server.url) as engine:
        assert len(engine.generate(requests_of(1))) == 1
