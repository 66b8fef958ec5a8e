"""`launch` without SGLang: what it refuses, how it starts, waits for, reports on and ends a child process.

The processes are real. Where a server is needed, a few lines of http.server answer for it.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.fake_engine import RecordingServer
from helpers.process_watch import still_running, watched

from torchrl_sglang_hidden import EngineError, InputError, LaunchError, UnknownOptionError, launch
from torchrl_sglang_hidden.engines import launch as launch_module
from torchrl_sglang_hidden.engines import process as process_module
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.engines.process import HEADERS_ENV, ServerProcess
from torchrl_sglang_hidden.engines.server_options import resolve_layers, resolve_model
from torchrl_sglang_hidden.errors import CapabilityError, EngineUnreachableError, InputTypeError, SGLangHiddenError
from torchrl_sglang_hidden.protocol import LAYERS_ENV
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.server.__main__ import API_KEY_ENV, PARENT_PID_ENV, SECRETS_ENV, command_line, watch_parent

START = Callable[..., ServerProcess]
REQUEST = Request((1, 2, 3), {"max_new_tokens": 1})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"num_hidden_layers": 4}')
    return directory


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that starts a script in the server's place; whatever is left of it ends after the test."""
    started: list[ServerProcess] = []

    def run(script: str, arguments: list[str] | None = None, **options: Any) -> ServerProcess:
        (tmp_path / "fake_server.py").write_text(textwrap.dedent(script))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(process_module, "_SERVER_MODULE", "fake_server")
        options = {"log_path": tmp_path / "logs" / "server.log", "api_key": None, **options}
        started.append(ServerProcess(arguments or [], **options))
        return started[-1]

    yield run
    for process in started:
        process.stop()


# Arguments


def test_server_arguments_become_a_command_line() -> None:
    arguments = {
        "chunked_prefill_size": 64,
        "disable_radix_cache": True,
        "skip_tokenizer_init": False,
        "quantization": None,
        "lora_paths": ["a", "b"],
        "mem_fraction_static": 0.5,
        "preferred_sampling_params": {"top_k": 1},
        "max_queued_requests": 0,
    }
    assert command_line(arguments) == [
        *("--chunked-prefill-size", "64"),
        "--disable-radix-cache",
        *("--lora-paths", "a", "b"),
        *("--mem-fraction-static", "0.5"),
        *("--preferred-sampling-params", '{"top_k": 1}'),
        *("--max-queued-requests", "0"),
    ]


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model_path": "x"}, UnknownOptionError, "launch(model_path=…)"),
        ({"tokenizer_worker_num": 2}, CapabilityError, "tokenizer_worker_num=2: SGLang's several tokenizer processes"),
        ({"enable_return_hidden_states": False}, UnknownOptionError, "always on"),
        ({"device": "tpu"}, InputError, "launch(device='tpu'): expected one of ('auto', 'cpu'"),
        ({"port": 0}, InputError, "launch(port=0): expected 1..65535"),
        ({"port": True}, InputError, "launch(port=True)"),
        ({"timeout_s": 0}, InputError, "launch(timeout_s=0)"),
        (
            {"layers": "7,15"},
            InputTypeError,
            "layers='7,15': expected an integer or a tuple of them, such as (7, 15, -1), or None for all",
        ),
        ({"layers": (7, 1.5)}, InputTypeError, "layers=(7, 1.5): expected"),
        ({"layers": (7, True)}, InputTypeError, "layers=(7, True): expected"),
        ({"layers": {7}}, InputTypeError, "layers={7}: expected"),
        ({"layers": (3, 4)}, InputError, "layers=4: the model has 4 layers; use 0..3, -1 for the final norm's output"),
        ({"layers": -5}, InputError, "layers=-5: the model has 4 layers"),
        ({"timeout_s": float("nan")}, InputError, "launch(timeout_s=nan)"),
        ({"host": "0.0.0.0"}, InputError, "no api_key given"),
        ({"host": "::"}, InputError, "no api_key given"),
        ({"host": "my-machine"}, InputError, "no api_key given"),
        ({"host": "0.0.0.0", "api_key": " "}, InputError, "launch(api_key=''): an empty one protects nothing"),
        ({"admin_api_key": ""}, InputError, "launch(admin_api_key=''): an empty one"),
        (
            {"host": "0.0.0.0", "api_key": "sesame", "enable_custom_logit_processor": True},
            InputError,
            "whoever has the key runs code on this machine; leave it out and define a LogitConstraint",
        ),
    ],
)
def test_arguments_that_cannot_work_start_nothing(
    arguments: dict[str, Any], error: type[SGLangHiddenError], message: str, model: Path
) -> None:
    with pytest.raises(error) as raised:
        launch(model, **arguments)
    assert message in str(raised.value)


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("name", ["./missing", "~/missing-model-of-this-test", "/missing-model-of-this-test"])
def test_a_path_that_is_no_model_starts_nothing(name: str) -> None:
    with pytest.raises(InputError, match=r"does not exist; pass a directory written by save_pretrained"):
        launch(name)


@pytest.mark.usefixtures("no_process")
def test_a_directory_without_a_config_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path} is not a directory with a config\.json"):
        launch(str(tmp_path))


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("name", ["", None, 3])
def test_a_model_of_another_type_starts_nothing(name: Any) -> None:
    with pytest.raises(InputTypeError):
        launch(name)


def test_models_reach_sglang_as_absolute_directories_or_as_hub_names(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    monkeypatch.setenv("HOME", str(model.parent))
    assert {resolve_model(name) for name in (model, "model", "./model", "~/model")} == {str(model)}
    assert resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


@pytest.mark.usefixtures("no_process")
def test_a_port_in_use_starts_nothing(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"port={port}\): cannot be bound: .*; pass port=None"):
            launch(model, port=port)


@pytest.mark.usefixtures("no_process")
def test_without_sglang_the_error_says_how_to_install_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sglang" else find_spec(name))
    with pytest.raises(CapabilityError, match=r"pip install 'torchrl-sglang-hidden\[sglang\]'"):
        launch(model)


@pytest.mark.parametrize("config", ['{"num_hidden_layers": 4}', '{"text_config": {"num_hidden_layers": 4}}'])
@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (-1, "-1"),
        (0, "0,-1"),
        ((-1,), "-1"),
        ([], "-1"),
        ((3, 1), "3,1,-1"),
        ([1, -1, 3], "1,-1,3"),
        ((-2, 2, -4), "2,0,-1"),
    ],
)
def test_layers_get_their_canonical_ids_and_the_last_is_always_there(
    layers: Any, chosen: str, config: str, model: Path
) -> None:
    (model / "config.json").write_text(config)
    assert resolve_layers(layers, str(model)) == chosen


@pytest.mark.parametrize("layers", [-2, (99, -2, -1)])
def test_layers_of_a_model_that_cannot_be_read_from_here_are_the_servers_to_check(layers: Any, tmp_path: Path) -> None:
    expected = "-2,-1" if layers == -2 else "99,-2,-1"
    assert resolve_layers(layers, str(tmp_path / "elsewhere")) == expected


def test_the_chosen_layers_reach_the_server(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(arguments: list[str], **options: Any) -> Any:
        raise LaunchError(f"{arguments} {options['layers']}")

    monkeypatch.setattr(launch_module, "ServerProcess", started)
    monkeypatch.setattr(launch_module, "require_sglang", lambda: None)
    for layers, chosen in (
        ({}, "all"),
        ({"layers": None}, "all"),
        ({"layers": -1}, "-1"),
        ({"layers": (1, -2)}, "1,2,-1"),
    ):
        with pytest.raises(LaunchError) as raised:
            launch(model, **layers)
        assert str(raised.value).endswith(f"] {chosen}")
        assert "--layers" not in str(raised.value), "SGLang knows no such argument"


# The child process

SERVES_AFTER_TWO_PROBES = """
    import http.server, sys
    probes = 0
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            global probes
            probes += 1
            self.send_response(200 if self.path == "/health_generate" and probes > 2 else 503)
            self.end_headers()
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_ready_only_when_it_generates(start: START) -> None:
    with launch_module._hold_port("127.0.0.1", None) as held:
        port = held.getsockname()[1]
        process = start(SERVES_AFTER_TWO_PROBES, [str(port)])
        process.wait_until_ready(f"http://127.0.0.1:{port}", timeout_s=60, progress=False)
    answers = [line.split('" ')[1].split()[0] for line in process.log_tail()]
    assert answers == ["503", "503", "200"]


def test_a_port_is_kept_for_the_server_that_binds_it_later() -> None:
    with launch_module._hold_port("127.0.0.1", None) as held:
        address = held.getsockname()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(address)
        for _ in range(2):  # and once more, after its first life
            with socket.create_server(address), socket.create_connection(address):
                pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


def test_a_failed_start_tells_the_exit_code_the_log_and_its_last_lines(start: START, tmp_path: Path) -> None:
    log_path = tmp_path / "mine.log"
    log_path.write_text("an earlier start\n")
    process = start(
        """
        import os, sys
        print("line", *range(30), sep="\\nline ")
        print('INFO: "GET /health_generate HTTP/1.1" 503 Service Unavailable')
        print("0%\\r50%\\r100%", "\\n\\nkey:", os.environ["TORCHRL_SGLANG_HIDDEN_API_KEY"], file=sys.stderr)
        sys.exit(3)
        """,
        log_path=log_path,
        api_key="sesame",
    )
    with pytest.raises(LaunchError) as raised:
        process.wait_until_ready("http://127.0.0.1:9", timeout_s=60, progress=False)
    head, title, *lines = str(raised.value).splitlines()
    assert title == "Last log lines:"
    assert head.startswith("the server ended with exit code 3 after ")
    assert str(log_path) in head
    assert [line.strip() for line in lines] == [
        *(f"line {n}" for n in range(14, 30)),
        *("0%", "50%", "100%", "key: ***"),
    ]
    assert process.log_tail(1000)[0] == "line"
    assert log_path.read_text().startswith("an earlier start\n")


@pytest.mark.parametrize(
    ("end", "how"), [("sys.exit(3)", "exit code 3"), ("os.kill(os.getpid(), 9)", r"signal 9 \(Killed\)")]
)
def test_waiting_ends_when_the_server_ends_by_itself(start: START, end: str, how: str) -> None:
    process = start(
        f"import os, sys; print('the key', os.environ['{API_KEY_ENV}'], flush=True); {end}", api_key="sesame"
    )
    with pytest.raises(
        EngineError, match=rf"ended by itself, with {how}; read the whole log in .*(?s:.)*the key \*\*\*"
    ):
        process.wait()


def test_a_client_says_how_its_own_server_ended(start: START, tmp_path: Path) -> None:
    """The one that started the process knows; a copy of the client does not."""
    process = start("import signal; print('no memory', flush=True); signal.pause()")
    answering = RecordingServer()
    try:
        held = launch_module._hold_port("127.0.0.1", None)
        server = LaunchedServer(answering.url, process=process, api_key=None, port=held)
        copied = copy.deepcopy(server)
    finally:
        answering.stop()
    with server, copied:
        # A server that does not accept connections, and whose process runs.
        with pytest.raises(EngineUnreachableError, match=r"is the server running\?$"):
            server.generate([REQUEST])
        while not process.log_tail():
            assert process.how_it_ended() == ""
        os.kill(process.pid, signal.SIGKILL)
        ended = r"the server ended by itself, with signal 9 \(Killed\); read the whole log in .*(?s:.)*no memory"
        with pytest.raises(EngineUnreachableError, match=ended):
            server.generate([REQUEST])
        with pytest.raises(EngineUnreachableError, match=ended):
            asyncio.run(server.agenerate([REQUEST]))
        with pytest.raises(EngineUnreachableError, match=r"is the server running\?$"):
            copied.generate([REQUEST])
        assert held.fileno() != -1
    assert held.fileno() == -1, "who closes the client may have the port"


def test_without_a_key_the_server_gets_none_from_the_environment(start: START, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_ENV, "of another server")
    process = start(f"import os; print('key:', os.environ.get('{API_KEY_ENV}'))")
    with pytest.raises(EngineError, match="key: None"):
        process.wait()


@pytest.mark.parametrize(("options", "layers"), [({}, "all"), ({"layers": "7,15,-1"}, "7,15,-1")])
def test_layers_travel_in_the_environment(
    start: START, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], layers: str
) -> None:
    monkeypatch.setenv(LAYERS_ENV, "of another server")
    process = start(f"import os; print('layers:', os.environ['{LAYERS_ENV}'])", **options)
    with pytest.raises(EngineError, match=f"layers: {layers}"):
        process.wait()


@pytest.mark.parametrize(("given", "made"), [("", "0"), ("1", "1")])
def test_a_start_makes_no_precompiled_headers_unless_the_user_says_so(
    start: START, monkeypatch: pytest.MonkeyPatch, given: str, made: str
) -> None:
    """They would be made anew in each start's temporary directory, which is removed with the server."""
    monkeypatch.setenv(HEADERS_ENV, given)
    process = start(f"import os; print('headers:', os.environ['{HEADERS_ENV}'])")
    with pytest.raises(EngineError, match=f"headers: {made}"):
        process.wait()


def test_a_killed_server_is_named_by_its_signal(start: START) -> None:
    process = start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(LaunchError, match=r"signal 9 \(Killed\) .* The log is empty"):
        process.wait_until_ready("http://127.0.0.1:9", timeout_s=60, progress=False)


def test_a_start_that_takes_too_long_fails(start: START) -> None:
    process = start("import signal; signal.pause()")
    with pytest.raises(LaunchError, match=r"nothing within timeout_s=0\.5; raise timeout_s"):
        process.wait_until_ready("http://127.0.0.1:9", timeout_s=0.5, progress=False)


def test_the_api_key_travels_in_the_environment_and_the_log_is_private(start: START) -> None:
    # The child tells itself: what others see of it is empty for an instant while it starts.
    process = start(
        f"""
        import os, pathlib
        on_command_line = "sesame" in pathlib.Path("/proc/self/cmdline").read_text()
        print(os.environ["{API_KEY_ENV}"], os.environ["{PARENT_PID_ENV}"], on_command_line)
        """,
        api_key="sesame",
    )
    with pytest.raises(EngineError, match="ended by itself, with exit code 0"):
        process.wait()
    assert process.log_path.read_text().split() == ["sesame", str(os.getpid()), "False"]
    assert API_KEY_ENV not in os.environ
    assert stat.S_IMODE(process.log_path.stat().st_mode) == 0o600


def test_other_secrets_go_the_same_way(start: START) -> None:
    secrets = {"admin_api_key": "rules"}
    process = start(
        f"import os, sys; print(os.environ['{SECRETS_ENV}'], 'rules' in ' '.join(sys.argv))", secrets=secrets
    )
    with pytest.raises(EngineError, match="ended by itself") as raised:
        process.wait()
    assert process.log_path.read_text().strip() == '{"admin_api_key": "rules"} False'
    assert "rules" not in str(raised.value)
    assert "***" in str(raised.value)


def test_a_death_is_logged_once(start: START, caplog: pytest.LogCaptureFixture) -> None:
    process = start("raise SystemExit(7)")
    for _ in range(2):
        with pytest.raises(EngineError):
            process.wait()
    assert caplog.messages == [f"the server of process {process.pid} ended by itself, with exit code 7"]
    assert caplog.records[0].name == "torchrl_sglang_hidden.engines.process"


STARTS_A_WORKER = """
    import signal, subprocess, sys
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    print(subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]).pid, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("ignored", ["[]", "[signal.SIGINT, signal.SIGTERM]"])
def test_stop_ends_the_whole_group_and_may_be_called_again(
    ignored: str, start: START, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "_TERMINATE_TIMEOUT_S", 0.5)
    process = start(STARTS_A_WORKER.replace("IGNORED", ignored))
    worker = int(first_line(process))
    with watched([process.pid, worker]) as handles:
        process.stop()
        assert still_running(handles, timeout_s=10) == []
    process.stop()


def test_stop_ends_the_workers_of_a_leader_that_is_gone(start: START) -> None:
    process = start(STARTS_A_WORKER.replace("IGNORED", "[]"))
    worker = int(first_line(process))
    with watched([process.pid, worker]) as handles:
        os.kill(process.pid, signal.SIGKILL)
        assert still_running({process.pid: handles[process.pid]}, timeout_s=10) == []
        assert still_running({worker: handles[worker]}, timeout_s=0) == [worker]
        process.stop()
        assert still_running(handles, timeout_s=10) == []


def test_a_forked_child_does_not_end_its_parents_server(start: START) -> None:
    process = start("import signal; signal.pause()")
    pid = os.fork()
    if pid == 0:
        process.stop()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert psutil.Process(process.pid).is_running()
    with watched([process.pid]) as handles:
        assert still_running(handles, timeout_s=0) == [process.pid]


def first_line(process: ServerProcess) -> str:
    """Return the first line of the log, once the child has written it."""
    command = ["tail", "--follow", "--lines=+1", f"--pid={process.pid}", str(process.log_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        line = tail.stdout.readline()
        tail.kill()
    return line


# The end with the parent, however it ends

CHILD = "import signal; from torchrl_sglang_hidden.server.__main__ import _end_with_parent; _end_with_parent(); {then}"

PARENT = """
import os, signal, subprocess, sys
environment = {{**os.environ, {variable!r}: str(os.getpid())}}
child = subprocess.Popen(
    [sys.executable, "-c", {child!r}], stdin=subprocess.PIPE, env=environment, start_new_session=True
)
sibling = (os.fork() or signal.pause()) if {forks} else 0
print(child.pid, sibling, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("forks", [False, True], ids=["pipe-closed", "pipe-held-by-a-fork"])
def test_the_server_ends_when_its_parent_is_killed(forks: bool) -> None:
    child = CHILD.format(then="signal.pause()")
    code = PARENT.format(variable=PARENT_PID_ENV, child=child, forks=forks)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server, sibling = map(int, parent.stdout.readline().split())
        with watched([server]) as handles:
            parent.kill()
            left = still_running(handles, timeout_s=30)
        for pid in [*left, *([sibling] if sibling else [])]:
            os.kill(pid, signal.SIGKILL)
        assert left == []


def test_the_closed_pipe_tells_by_itself() -> None:
    read_end, write_end = os.pipe()
    ended = threading.Event()
    threading.Thread(target=watch_parent, args=(os.getppid(), read_end, ended.set), daemon=True).start()
    assert not ended.is_set()
    os.close(write_end)
    assert ended.wait(10)
    os.close(read_end)


def test_a_server_started_by_hand_does_not_watch_its_stdin() -> None:
    names = "import threading; print([thread.name for thread in threading.enumerate()])"
    result = subprocess.run(
        [sys.executable, "-c", CHILD.format(then=names)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    assert result.stdout.strip() == "['MainThread']"


def test_a_watching_server_that_shares_its_callers_group_refuses_to_run() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CHILD.format(then="")],
        stdin=subprocess.DEVNULL,
        env={**os.environ, PARENT_PID_ENV: str(os.getpid())},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 1
    assert "ending with the parent ends the group" in result.stderr
