"""Every Python program of README and of the site does as it says, against a real server, as it is printed.

The blocks of a page run in one namespace, in order; a block with ``if __name__ == "__main__":`` in one of its own. A
line prints what its comment ``# prints …`` says. To start few servers, `launch` gives a client of the session's server
where a program asks for the demo model and no arguments that this one does not have (it serves float32, also where none
is asked for), and the addresses that the pages name lead to it.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shlex
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from helpers.documents import PAGES, ROOT, Block, agrees, commands_of, expected_prints, programs_of, shell_lines

import torchrl_sglang_hidden
from torchrl_sglang_hidden import SGLangServer, connect, demo_model, launch
from torchrl_sglang_hidden.cli.serve import parse_server_arguments
from torchrl_sglang_hidden.server.__main__ import command_line
from torchrl_sglang_hidden.server.cpu import cpu_engine_environment, cpu_server_args, has_accelerator

# The servers that the pages speak of as running.
DOCUMENTED_PORTS = (30000, 30001)
SHARED_ARGUMENTS = {"dtype": "float32"}
START_TIMEOUT_S = 240.0
CHILD_TIMEOUT_S = 300.0
# Of `torchrl-sglang-hidden serve`; every other option is SGLang's.
OWN_OPTIONS = {"layers", "constraints", "host", "port", "api_key", "log_file", "device"}

WITH_PROGRAMS = [page for page in PAGES if programs_of(page)]
TRAINING = [page for page in WITH_PROGRAMS if "update_weights" in page.read_text(encoding="utf-8")]


# --- running ---------------------------------------------------------------------------------------------------------


class Printed:
    """Takes the place of ``print``, and notes what each line printed."""

    def __init__(self) -> None:
        self.by_line: dict[int, list[str]] = defaultdict(list)

    def __call__(self, *values: object, sep: str = " ", end: str = "\n", file: Any = None, flush: bool = False) -> None:
        self.by_line[sys._getframe(1).f_lineno].append(sep.join(map(str, values)))


def run_in_process(blocks: Sequence[Block]) -> None:
    """Runs blocks in one namespace, and holds what they print against their comments."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        namespace["print"] = printed = Printed()
        tree = ast.increment_lineno(ast.parse(block.code), block.line - 1)
        exec(compile(tree, str(block.page), "exec"), namespace)
        for line, expected in expected_prints(block).items():
            found = printed.by_line[line]
            assert found, f"{block.page.name}:{line} printed nothing"
            assert all(agrees(expected, text) for text in found), (f"{block.page.name}:{line}", expected, found)


def run_in_child(block: Block, directory: Path) -> None:
    """Runs a block as a script, for what changes the process that it runs in."""
    script = directory / "program.py"
    script.write_text(block.code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=CHILD_TIMEOUT_S,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = iter(done.stdout.splitlines())
    for line, expected in expected_prints(block).items():
        assert any(agrees(expected, text) for text in lines), (f"{block.page.name}:{line}", expected, done.stdout)


@contextmanager
def forwarded(ports: Sequence[int], url: str) -> Iterator[None]:
    """Passes what comes to these ports of this machine on to a server."""
    host, port = urlsplit(url).hostname, urlsplit(url).port

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    class Forward(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((host, port)) as server:
                back = threading.Thread(target=pump, args=(server, self.request), daemon=True)
                back.start()
                pump(self.request, server)
                back.join()

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address, daemon_threads, block_on_close = True, True, False

    with ExitStack() as stack:
        for documented in ports:
            server = stack.enter_context(Server(("127.0.0.1", documented), Forward))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
        yield


def run_page(page: Path, server: SGLangServer, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the programs of a page."""
    with ExitStack() as own:

        def stand_in(model: Any, **arguments: Any) -> SGLangServer:
            if model == demo_model() and arguments.items() <= SHARED_ARGUMENTS.items():
                return connect(server.url)
            # An idle SGLang spins on a core that the programs need.
            return own.enter_context(contextlib.closing(launch(model, **{"sleep_on_idle": True, **arguments})))

        monkeypatch.setattr(torchrl_sglang_hidden, "launch", stand_in)
        monkeypatch.chdir(directory)
        monkeypatch.syspath_prepend(str(directory))
        own.enter_context(forwarded(DOCUMENTED_PORTS, server.url))
        for blocks in programs_of(page):
            for block in blocks:
                if block.file:
                    (directory / block.file).write_text(block.code, encoding="utf-8")
            if blocks[0].is_guarded and "SGLangOffline(" in blocks[0].code:
                run_in_child(blocks[0], directory)
            else:
                run_in_process([block for block in blocks if not block.file])


# --- the programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in WITH_PROGRAMS if page not in TRAINING], ids=lambda page: page.stem)
def test_programs(page: Path, smol: SGLangServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(page, smol, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", TRAINING, ids=lambda page: page.stem)
def test_programs_that_train(
    page: Path, trainee: SGLangServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, trainee, tmp_path, monkeypatch)


# --- the commands ----------------------------------------------------------------------------------------------------


def documented_server_commands() -> list[str]:
    """Every line that starts SGLang's own server, each once."""
    lines = [line for page in PAGES for line in shell_lines(page) if "-m sglang.launch_server --" in line]
    return list(dict.fromkeys(lines))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("line", documented_server_commands())
def test_the_command_that_starts_sglang_with_the_server_half(line: str, smol_dir: str, tmp_path: Path) -> None:
    """As it is printed, but for the model and the port; and with what the CPU engine needs where there is no GPU."""
    words, environment = shlex.split(line, comments=True), dict(os.environ)
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        environment[name] = value
    assert words[0] == "python"
    words[0] = sys.executable
    words[words.index("--model-path") + 1] = smol_dir
    port = free_port()
    if "--port" in words:
        words[words.index("--port") + 1] = str(port)
    else:
        words += ["--port", str(port)]
    if not has_accelerator():
        arguments = {**cpu_server_args(smol_dir, context_length=1024), "context_length": 1024, "max_total_tokens": 2048}
        words += [word for name, value in arguments.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with cpu_engine_environment(not has_accelerator()), (tmp_path / "log").open("w") as log:
        environment |= {name: value for name, value in os.environ.items() if name not in environment or "PATH" in name}
        server = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_TIMEOUT_S
        while not answers(url):
            with suppress(subprocess.TimeoutExpired):
                server.wait(0.5)
            ended = server.poll() is not None or time.monotonic() > end
            assert not ended, (tmp_path / "log").read_text()[-4000:]
        with connect(url) as engine:
            assert engine.info.pools_in_server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, 9)
        server.wait()


def answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health_generate", timeout=10, trust_env=False).status_code == 200
    return False


PARSE = """
import argparse, json, sys
from torchrl_sglang_hidden.server.__main__ import command_line
from torchrl_sglang_hidden.server.cpu import has_accelerator, use_cpu_engine

if not has_accelerator():
    use_cpu_engine()
from sglang.srt.server_args import ServerArgs

parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
for arguments in json.loads(sys.argv[1]):
    parser.parse_args(arguments)
"""


def test_sglang_takes_every_argument_that_is_passed_on_to_it() -> None:
    calls = [
        words[1:] for page in PAGES for words in commands_of(page, "torchrl-sglang-hidden") if "serve" in words[:1]
    ]
    passed = [parse_server_arguments([word for word in words if word != "…"])[1] for words in calls]
    commands = [
        ["--model-path", "a/model", *command_line({name: given[name] for name in given.keys() - OWN_OPTIONS})]
        for given in passed
    ]
    assert any(len(command) > 2 for command in commands)
    done = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=CHILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
