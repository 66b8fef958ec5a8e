"""The client's key: sent with every call, and found nowhere else."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from helpers.fake_engine import RecordingServer

from torchrl_sglang_hidden import AuthenticationError, EngineError, InputError, Request, SGLangServer, connect
from torchrl_sglang_hidden.engines import api_key as module
from torchrl_sglang_hidden.engines.api_key import API_KEY_ENV, ApiKey, warn_of_plain_http
from torchrl_sglang_hidden.engines.http_answers import read_json

KEY = "sesame-5c1e"


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    with RecordingServer() as server:
        yield server


def sent_by(server: RecordingServer) -> set[str | None]:
    return {headers["Authorization"] for _, headers in server.seen}


def everything_in(thing: object) -> str:
    """Return what a debugger or an error reporter shows of an object, five levels deep."""
    seen: set[int] = set()

    def show(value: Any, depth: int) -> str:
        if id(value) in seen or depth > 5:
            return ""
        seen.add(id(value))
        inner = vars(value).values() if hasattr(value, "__dict__") else ()
        if isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, (list, tuple, set)):
            inner = value
        return repr(value) + "".join(show(one, depth + 1) for one in inner)

    return show(thing, 0)


def test_it_is_in_nothing_that_a_client_shows(server: RecordingServer) -> None:
    with connect(server.url, api_key=KEY) as engine:
        assert sent_by(server) == {f"Bearer {KEY}"}
        assert KEY not in everything_in(engine)
        assert KEY.encode() not in pickle.dumps(engine)
    with pytest.raises(InputError, match="is not pickled"):
        pickle.dumps(ApiKey(KEY))
    assert repr(ApiKey(KEY)) == "ApiKey(***)"


@pytest.mark.parametrize("fault", ["refuses", "fails", "is gone"])
def test_it_is_in_no_error(server: RecordingServer, fault: str) -> None:
    with connect(server.url, api_key=KEY) as engine:
        server.respond = lambda handler, payload: handler.say((401 if fault == "refuses" else 500, {"error": "no"}))
        if fault == "is gone":
            server.stop()
        with pytest.raises(EngineError) as raised:
            engine.generate([Request((1, 2), {"max_new_tokens": 2})])
        trace = traceback.TracebackException.from_exception(raised.value, capture_locals=True)
    assert KEY not in "".join(trace.format())


def test_copies_keep_it(server: RecordingServer) -> None:
    with connect(server.url, api_key=KEY) as engine:
        for again in (copy.copy(engine), copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
            with again:
                assert type(again) is SGLangServer
    assert sent_by(server) == {f"Bearer {KEY}"}


def test_a_pickle_in_another_process_reads_the_variable(server: RecordingServer) -> None:
    with connect(server.url, api_key=KEY) as engine:
        data = pickle.dumps(engine)
    code = "import pickle, sys; pickle.load(sys.stdin.buffer).close()"
    for variable, sent in ((None, None), ("another", "Bearer another")):
        server.seen.clear()
        env = {name: value for name, value in os.environ.items() if name != API_KEY_ENV}
        subprocess.run(
            [sys.executable, "-c", code],
            input=data,
            check=True,
            env=env | ({API_KEY_ENV: variable} if variable else {}),
        )
        assert {headers.get("Authorization") for _, headers in server.seen} == {sent}


@pytest.mark.parametrize(
    ("headers", "says"),
    [({}, "wants an API key, and none was sent"), ({"Authorization": "Bearer x"}, "refused the API key")],
)
def test_a_server_that_refuses_says_why_and_where_a_pickle_finds_a_key(headers: dict[str, str], says: str) -> None:
    asked = httpx.Request("GET", "http://server", headers=headers)
    with pytest.raises(AuthenticationError, match=f"{says}.*{API_KEY_ENV}"):
        read_json(httpx.Response(401, request=asked), "http://server")


def test_plain_http_to_another_machine_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WARNED", set())
    with pytest.warns(UserWarning, match="in plain text"):
        warn_of_plain_http("http://far")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_plain_http("http://far")


@pytest.mark.parametrize(
    ("url", "key", "warned"),
    [
        ("http://192.0.2.1:9", KEY, ["http://192.0.2.1:9"]),
        ("http://192.0.2.1:9", None, []),
        ("https://192.0.2.1:9", KEY, []),
        ("http://127.0.0.1:9", KEY, []),
    ],
)
def test_where_it_warns(url: str, key: str | None, warned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    asked = httpx.Request("GET", "http://server")
    monkeypatch.setattr("torchrl_sglang_hidden.engines.endpoint.warn_of_plain_http", found.append)
    monkeypatch.setattr(httpx.Client, "get", lambda *args, **kwargs: httpx.Response(401, request=asked))
    with pytest.raises(AuthenticationError):
        connect(url, api_key=key)
    assert found == warned


@pytest.mark.parametrize("url", ["http://me:hush@127.0.0.1:9", "http://hush@127.0.0.1:9", "http://:hush@h"])
def test_a_password_in_an_address_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(InputError, match="the key as api_key") as raised:
        connect(url)
    assert "hush" not in str(raised.value)
