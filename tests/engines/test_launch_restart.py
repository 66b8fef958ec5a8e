"""`launch(restart=True)` as a whole, with a server of the fake engine in SGLang's place."""

from __future__ import annotations

import json
import os
import signal
import textwrap
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers import heads_oracle
from helpers.process_watch import still_running, watched

from torchrl_sglang_hidden import InputTypeError, Restart, RestartError, launch
from torchrl_sglang_hidden.engines import launch as launch_module
from torchrl_sglang_hidden.engines import process as process_module
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.protocol.head_call import HeadCall
from torchrl_sglang_hidden.records import Request

TESTS = Path(__file__).parents[1]
REQUEST = Request((6, 7), {"max_new_tokens": 2})
# Notes its command line, the variables that are this package's, and its temporary directory.
SERVES = """
    import json, os, sys, tempfile
    from pathlib import Path
    from helpers.fake_engine import RecordingEngine, RecordingServer, model_page
    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    kept = os.environ.get("TORCHRL_SGLANG_HIDDEN_KEPT_WEIGHTS")
    log = {"options": options, "kept": kept, "tmp": tempfile.mkdtemp(), "read": os.listdir(kept) if kept else []}
    with open(os.environ["STARTS"], "a") as file:
        print(json.dumps(log), file=file)
    server = RecordingServer(port=int(options["--port"]))
    model = model_page("m")
    def respond(handler, payload):
        if handler.path != "/get_weights_by_name":
            handler.say((200, RecordingEngine().answer(payload)))
            return
        with open(os.environ["STARTS"] + ".heads", "a") as file:
            print(json.dumps([os.getpid(), payload["name"]]), file=file)
        handler.say((200, {"success": True, "message": ""}))
    server.respond = respond
    server.pages["/health_generate"] = (200, "")
    server.pages["/model_info"] = (200, {**model, "weight_version": options.get("--weight-version", "default")})
    sys.stdin.read()  # until its parent closes the pipe, or is killed
"""


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fake_server.py").write_text(textwrap.dedent(SERVES))
    package = Path(launch_module.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, TESTS, package))))
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    monkeypatch.setattr(process_module, "_SERVER_MODULE", "fake_server")
    return tmp_path / "starts"


@pytest.fixture
def server(starts: Path, tmp_path: Path) -> Iterator[LaunchedServer]:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"num_hidden_layers": 4}')
    with launch(
        model,
        restart=Restart(backoff_s=0.0, max_backoff_s=0.0, limit=2),
        log_file=tmp_path / "server.log",
        lora_paths=["old=/old"],
        progress=False,
    ) as engine:
        yield engine


def kill(server: LaunchedServer) -> None:
    with watched([server.pid]) as handles:
        os.kill(server.pid, signal.SIGKILL)
        assert still_running(handles, timeout_s=10) == []
    # The moment in which nobody has noticed the death.
    gone = threading.Event()
    while server._supervisor is not None and server._supervisor._state == "up" and not gone.wait(0.01):
        pass


def read(starts: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in starts.read_text().splitlines()]


def test_the_same_client_goes_on_with_what_was_pushed(server: LaunchedServer, starts: Path, tmp_path: Path) -> None:
    first_pid = server.pid
    assert server.generate([REQUEST])[0].prompt_ids == (6, 7)
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    (pushed / "model.safetensors").touch()
    supervision = server._endpoints[0].supervision
    assert supervision.keeps
    supervision.keep_weights(pushed, "7", 0, is_users=False)
    supervision.keep_adapter("step", pushed, "8", 0, is_users=False)
    supervision.drop_adapter("old")
    (pushed / "model.safetensors").unlink()
    kill(server)
    assert server.generate([REQUEST])[0].prompt_ids == (6, 7)
    assert (server.restarts, server.info.weight_version) == (1, "8")
    assert server.pid != first_pid
    first, second = read(starts)
    kept = Path(second["kept"])
    assert (first["kept"], second["read"]) == (None, ["model.safetensors"])
    assert first["options"]["--lora-paths"] == "old=/old"
    (adapter,) = (second["options"].pop(name) for name in ("--lora-paths",))
    assert adapter.startswith(f"step={tmp_path}/torchrl-sglang-hidden-weights-{os.getpid()}-kept-")
    assert second["options"].pop("--weight-version") == "8"
    assert second["options"].items() <= first["options"].items()
    assert not Path(first["tmp"]).exists(), "the temporary files of the dead server"
    assert Path(second["tmp"]).exists()
    server.close()
    assert not Path(second["tmp"]).exists()
    assert not kept.exists()


def test_a_server_that_stays_down_says_so_to_whoever_waits_for_it(
    server: LaunchedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "_SERVER_MODULE", "no_such_module")
    kill(server)
    with pytest.raises(
        RestartError, match=r"2 times within 600 s.*No module named no_such_module|2 times(?s:.)*no_such"
    ):
        server.generate([REQUEST])
    with pytest.raises(RestartError, match="stays down"):
        server.wait()


@pytest.mark.parametrize("restart", [None, 3, "yes", {"limit": 2}])
def test_a_restart_that_is_none(restart: Any, tmp_path: Path) -> None:
    with pytest.raises(InputTypeError, match=r"launch\(restart=.*expected True, False or a Restart"):
        launch(tmp_path, restart=restart)


@pytest.mark.parametrize("restart", [True, False])
def test_yes_or_no(restart: bool, starts: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4}')
    with ExitStack() as stack:
        with launch(tmp_path, restart=restart, log_file=tmp_path / "log", progress=False) as server:
            handles = stack.enter_context(watched([server.pid]))
            assert server._endpoints[0].supervision.keeps is restart
            assert server.restarts == 0
        assert still_running(handles, timeout_s=0) == []


def test_heads_are_pushed_again(server: LaunchedServer, starts: Path) -> None:
    """The same calls, before a request is answered; not those of heads that were dropped or refused."""
    first, width = server.pid, server.info.hidden_size
    heads = [heads_oracle.make_head("linear", width, seed=seed) for seed in range(3)]
    version = server.push_head("a", heads[0])
    server.push_head("b", heads[1])
    server.push_head("a", heads[2], version="2")
    server.drop_head("b")
    assert (server.restarts, version) != (0, "2")
    kill(server)
    assert server.generate([REQUEST])[0].prompt_ids == (6, 7)
    calls = [json.loads(line) for line in Path(f"{starts}.heads").read_text().splitlines()]
    again = [HeadCall.unpack(name) for pid, name in calls if pid == server.pid]
    assert len(calls) == 5
    assert server.pid != first
    assert again == [HeadCall("a", "2", heads[2].to_bytes())]
