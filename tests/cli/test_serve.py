"""``serve`` without a server: its arguments, signals and ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from helpers.command_line import invoke

from torchrl_sglang_hidden import EngineError, InputError, UnknownOptionError
from torchrl_sglang_hidden.cli.serve import parse_server_arguments
from torchrl_sglang_hidden.demo import model as model_module
from torchrl_sglang_hidden.engines import launch as launch_module
from torchrl_sglang_hidden.server.__main__ import API_KEY_ENV

URL = "http://127.0.0.1:4321"
EXIT_3 = "raise SystemExit(3)"
SIGTERM_PARENT = "import os, signal; input(); os.kill(os.getppid(), signal.SIGTERM); input()"
SIGINT_PARENT = "import os, signal; input(); os.kill(os.getppid(), signal.SIGINT); input()"


@dataclass
class FakeServer:
    """What `launch` returns, around a child process that runs ``code`` and gets a line once it is waited for."""

    code: str
    log_path: Path
    calls: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    closed: int = 0
    url: str = URL

    info: Any = field(default_factory=lambda: SimpleNamespace(model_path="some-model"))

    def wait(self) -> NoReturn:
        # Called when everything is printed. Short waits, as the real one: a signal in front of a long one is seen late.
        self.say("go")
        while self.child.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(0.1)
        raise EngineError("the server ended by itself, with exit code 3. Last log lines:\n    last words")

    def launch(self, model: Any, **options: Any) -> FakeServer:
        self.calls.append((model, options))
        self.child = subprocess.Popen([sys.executable, "-c", self.code], stdin=subprocess.PIPE)
        return self

    def say(self, line: str) -> None:
        assert self.child.stdin is not None
        with suppress(BrokenPipeError):
            self.child.stdin.write(f"{line}\n".encode())
            self.child.stdin.flush()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed += 1


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], FakeServer]]:
    """Lets ``serve`` launch a child that runs some code in place of a server."""
    # A shell starts what runs in its background, such as these tests, with Ctrl-C ignored.
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    servers: list[FakeServer] = []

    def make(code: str) -> FakeServer:
        server = FakeServer(code, tmp_path / "server.log")
        monkeypatch.setattr(launch_module, "launch", server.launch)
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.child.kill()
        server.child.wait()
        assert server.child.stdin is not None
        server.child.stdin.close()
    signal.signal(signal.SIGINT, ctrl_c)


class TestParseServerArguments:
    @pytest.mark.parametrize(
        ("arguments", "model", "server_args"),
        [
            ([], None, {}),
            (["some/model"], "some/model", {}),
            (["m", "--dtype", "float32"], "m", {"dtype": "float32"}),
            (["m", "--dtype=float32"], "m", {"dtype": "float32"}),
            (["m", "--chunked-prefill-size", "64"], "m", {"chunked_prefill_size": "64"}),
            (["--skip-server-warmup"], None, {"skip_server_warmup": True}),
            (["m", "--lora-paths", "a=b", "c=d", "--x", "1"], "m", {"lora_paths": ["a=b", "c=d"], "x": "1"}),
            (["m", "--x", "-1", "--y", "-0.5"], "m", {"x": "-1", "y": "-0.5"}),
            (["m", "--json=a=b"], "m", {"json": "a=b"}),
            (["m", "--json", '{"a": 1}'], "m", {"json": '{"a": 1}'}),
        ],
    )
    def test_reads(self, arguments: list[str], model: str | None, server_args: dict[str, Any]) -> None:
        assert parse_server_arguments(arguments) == (model, server_args)

    @pytest.mark.parametrize(
        ("arguments", "error", "named"),
        [
            (["m", "other"], UnknownOptionError, "other"),
            (["m", "-x", "1"], UnknownOptionError, "-x"),
            (["m", "--=1"], UnknownOptionError, "--=1"),
            (["--model", "m"], UnknownOptionError, "serve MODEL"),
            (["m", "--dtype", "a", "--dtype", "b"], InputError, "--dtype"),
        ],
    )
    def test_refuses(self, arguments: list[str], error: type[Exception], named: str) -> None:
        with pytest.raises(error, match=named):
            parse_server_arguments(arguments)


class TestServe:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["/no/such/model"], "/no/such/model does not exist"),
            (["m", "other"], "one model only"),
            (["m", "--model-path", "other"], "pass the model as the first argument"),
            (["m", "--enable-return-hidden-states"], "it is always on"),
            (["m", "--port", "99999"], "port=99999"),
            (["m", "--device", "abacus"], "device='abacus'"),
            (["m", "--host", "0.0.0.0"], "no api_key given"),
            (["m", "--layers", "7;15"], "--layers 7;15"),
            (["m", "--layers", ""], "commas"),
        ],
    )
    def test_refuses_before_anything_starts(
        self, arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(launch_module, "ServerProcess", lambda *args, **kwargs: pytest.fail("it was started"))
        result = invoke("serve", *arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert named in result.stderr

    def test_passes_everything_to_launch(self, serving: Callable[[str], FakeServer]) -> None:
        server = serving(SIGTERM_PARENT)
        options = ["--device", "cpu", "--port", "4321", "--log-file", "x.log", "--host", "127.0.0.2"]
        options += ["--layers", "7,-2", "--constraints", "json,my.rules"]
        result = invoke("serve", "m", "--dtype", "float32", *options, "--tp", "2")
        assert result.exit_code == 0, result.output
        assert server.calls == [
            (
                "m",
                {
                    "device": "cpu",
                    "layers": (7, -2),
                    "constraint_modules": ("json", "my.rules"),
                    "host": "127.0.0.2",
                    "port": 4321,
                    "api_key": None,
                    "log_file": Path("x.log"),
                    "dtype": "float32",
                    "tp": "2",
                },
            )
        ]

    @pytest.mark.parametrize("model", [(), ("demo",)])
    def test_serves_the_demo_model_by_name_and_without_one(
        self, serving: Callable[[str], FakeServer], monkeypatch: pytest.MonkeyPatch, model: tuple[str, ...]
    ) -> None:
        monkeypatch.setattr(model_module, "demo_model", lambda: Path("the-demo-model"))
        server = serving(SIGTERM_PARENT)
        assert invoke("serve", *model, "--dtype", "float32").exit_code == 0
        assert server.calls[0][0] == Path("the-demo-model")
        assert server.calls[0][1]["dtype"] == "float32"
        assert server.calls[0][1]["layers"] is None, "all where that is cheap"

    @pytest.mark.parametrize("code", [SIGTERM_PARENT, SIGINT_PARENT], ids=["SIGTERM", "Ctrl-C"])
    def test_runs_until_a_signal_then_closes_and_is_content(
        self, serving: Callable[[str], FakeServer], code: str
    ) -> None:
        before = signal.getsignal(signal.SIGTERM)
        server = serving(code)
        result = invoke("serve", "m")
        assert (result.exit_code, server.closed) == (0, 1)
        assert result.stdout.endswith("Stopped.\n")
        assert signal.getsignal(signal.SIGTERM) is before

    def test_prints_the_address_and_lines_to_paste(self, serving: Callable[[str], FakeServer]) -> None:
        serving(SIGTERM_PARENT)
        out = invoke("serve", "m").stdout
        assert f"Serving some-model at {URL}" in out
        assert f'SGLangHiddenWrapper("{URL}", ' in out
        snippet = out[out.index("from torchrl_sglang_hidden") : out.index("Stopped.")]
        compile(snippet, "snippet", "exec")

    def test_a_key_is_passed_on_and_never_printed(self, serving: Callable[[str], FakeServer]) -> None:
        server = serving(SIGTERM_PARENT)
        result = invoke("serve", "m", env={API_KEY_ENV: "hush-hush"})
        assert server.calls[0][1]["api_key"] == "hush-hush"
        assert "hush-hush" not in result.output
        assert f'connect("{URL}", api_key=' in result.stdout

    def test_a_server_that_ends_by_itself_is_an_error(self, serving: Callable[[str], FakeServer]) -> None:
        server = serving(EXIT_3)
        result = invoke("serve", "m")
        assert (result.exit_code, server.closed) == (1, 1)
        assert "ended by itself, with exit code 3" in result.stderr
        assert result.stderr.splitlines()[-1] == "    last words"
        assert "Traceback" not in result.stderr
