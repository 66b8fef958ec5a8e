"""``doctor``: what it says of servers of every kind, as a table and as JSON, and the exit code."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.command_line import invoke
from helpers.fake_engine import RecordingServer, model_page, server_page

from torchrl_sglang_hidden import __version__
from torchrl_sglang_hidden.engines.examination import Examination, _ranges, examine
from torchrl_sglang_hidden.protocol import CHANNEL, PROTOCOL
from torchrl_sglang_hidden.server.metrics import COUNTERS

Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that serves pages by their paths, and returns the address."""
    servers: list[ThreadingHTTPServer] = []

    def start(pages: dict[str, Any], *, key: str | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = pages.get(self.path)
                status = 404 if page is None else 200
                if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
                    status, page = 401, {"error": "Unauthorized"}
                body = page if isinstance(page, bytes) else json.dumps(page).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@contextmanager
def closing_server() -> Iterator[RecordingServer]:
    server = RecordingServer()
    yield server
    server.stop()


def pages(**changes: Any) -> dict[str, Any]:
    return {"/model_info": model_page("m"), "/server_info": server_page() | changes}


def said(found: Examination) -> dict[str, tuple[str, str]]:
    return {finding.name: (finding.mark, finding.says) for finding in found.findings}


def test_a_server_with_everything() -> None:
    with closing_server() as server:
        result = invoke("doctor", server.url)
        found = examine(server.url)
    assert result.exit_code == 0, result.output
    assert found.healthy
    assert said(found)["server half"][0] == "yes"
    assert said(found)["hidden states"][0] == "yes"
    for finding in found.findings:
        assert finding.name in result.stdout


def test_json_is_for_programs() -> None:
    with closing_server() as server:
        result = invoke("doctor", server.url, "--json")
    found = json.loads(result.stdout)
    assert (found["client"], found["healthy"], found["url"]) == (__version__, True, server.url)
    assert {"name", "mark", "says"} == set(found["findings"][0])


def test_the_counters_of_the_server_half(serve: Serve) -> None:
    page = server_page()
    page["internal_states"][0][COUNTERS] = {"requests": 7, "rows": 90, "steps": 10, "step_seconds": 0.002}
    found = examine(serve({"/model_info": model_page("m"), "/server_info": page}))
    assert said(found)["so far"] == ("", "7 requests, 90 rows, 0 refused, 200 µs a step")


def test_an_old_server_half(serve: Serve) -> None:
    page = server_page()
    page["internal_states"][0][CHANNEL] |= {"protocol": 3}
    result = invoke("doctor", serve({"/model_info": model_page("m"), "/server_info": page}))
    assert result.exit_code == 1
    assert "speaks protocol 3" in result.stdout
    assert f"install torchrl-sglang-hidden {__version__} beside the server" in result.stdout


def test_a_stock_sglang(serve: Serve) -> None:
    result = invoke("doctor", serve(pages(internal_states=[{}])))
    assert result.exit_code == 1
    assert "a stock SGLang" in result.stdout
    assert "start it with the server half: torchrl-sglang-hidden serve MODEL" in result.stdout


def test_a_stock_sglang_whose_model_is_here(serve: Serve, tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = server_page() | {"internal_states": [{}]}
    found = examine(serve({"/model_info": model_page(str(tmp_path)), "/server_info": page}))
    assert said(found)["big answers"] == ("", "over HTTP: no server half")


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"/model_info": b"<html>", "/server_info": b"<html>"},
        {"/model_info": [], "/server_info": []},
        {"/model_info": {}, "/server_info": {}},
        {"/model_info": {"model_path": "m"}, "/server_info": {"status": "ok"}},
    ],
)
def test_what_is_no_sglang(serve: Serve, other: dict[str, Any]) -> None:
    result = invoke("doctor", serve(other))
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "1. " in result.stdout, "it says what to do"


@pytest.mark.parametrize(
    "changes",
    [
        {"internal_states": None},
        {"internal_states": [{CHANNEL: 3}]},
        {"internal_states": [{CHANNEL: {}}]},
        {"internal_states": "many"},
        {"max_req_input_len": None},
        {"internal_states": [{CHANNEL: {"protocol": PROTOCOL}}]},
    ],
)
def test_pages_that_are_not_whole(serve: Serve, changes: dict[str, Any]) -> None:
    result = invoke("doctor", serve(pages(**changes)))
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception


def test_nothing_listens() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    result = invoke("doctor", f"http://127.0.0.1:{port}")
    assert result.exit_code == 1
    assert "nothing answers" in result.stdout
    assert "start a server" in result.stdout


def test_a_key(serve: Serve) -> None:
    url = serve(pages(api_key="***", host="0.0.0.0"), key="sesame")
    result = invoke("doctor", url)
    assert result.exit_code == 1
    assert "pass the server's key: --api-key" in result.stdout
    assert "none was sent" in result.stdout
    wrong = invoke("doctor", url, "--api-key", "sesam")
    assert (wrong.exit_code, "refused the API key" in wrong.stdout) == (1, True)
    for arguments, env in (((), {"TORCHRL_SGLANG_HIDDEN_API_KEY": "sesame"}), (("--api-key", "sesame"), {})):
        result = invoke("doctor", url, *arguments, env=env)
        assert result.exit_code == 0, result.output
        assert "the one that was given is right" in result.stdout
        assert "sesame" not in result.output


def test_an_open_server_without_a_key_is_warned_of(serve: Serve) -> None:
    found = examine(serve(pages(host="0.0.0.0")))
    assert said(found)["API key"] == ("warn", "none wanted")
    assert found.remedies[0].startswith("give it a key, for others can reach it")
    assert said(examine(serve(pages(host="127.0.0.1"))))["API key"] == ("", "none wanted")


def test_what_lets_clients_run_code_is_warned_of(serve: Serve) -> None:
    found = examine(serve(pages(enable_custom_logit_processor=True)))
    assert said(found)["trust"][0] == "warn"


def test_an_address_that_is_none() -> None:
    result = invoke("doctor", "localhost:30000")
    assert result.exit_code == 1
    assert "expected http://host:port" in result.output


@pytest.mark.parametrize(
    ("layers", "text"), [((-1,), "-1"), ((-1, 0, 1, 2), "-1, 0…2"), ((2, 7, 8, -1), "-1, 2, 7…8"), ((), "")]
)
def test_layers_in_short(layers: tuple[int, ...], text: str) -> None:
    assert _ranges(layers) == text


def test_the_key_is_in_no_process_listing() -> None:
    """The program has taken it out before it sends anything."""
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "torchrl_sglang_hidden", "doctor", url, "--api-key", "hush-5c1e"]
        process = psutil.Popen(command)
        try:
            connection, _ = silent.accept()
            with closing(connection):
                assert b"Bearer hush-5c1e" in connection.recv(4096)
                assert process.cmdline()[-2:] == ["doctor", url]
        finally:
            process.kill()
            process.wait()
