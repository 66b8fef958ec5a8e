"""The command line without a server: help, version, errors; ``serve``'s arguments, signals and ends."""

from __future__ import annotations

import json
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
from helpers.fake_engine import RecordingServer
from helpers.recordings import TOKENIZER
from typer.testing import CliRunner, Result

from torchrl_sglang_hidden import (
    EngineError,
    InputError,
    LaunchError,
    SGLangServer,
    UnknownOptionError,
    __version__,
    cli,
    connect,
    load_recording,
)
from torchrl_sglang_hidden.cli import app, parse_server_arguments
from torchrl_sglang_hidden.demo import model as model_module
from torchrl_sglang_hidden.demo import run as run_module
from torchrl_sglang_hidden.demo.prompts import MAX_NEW_TOKENS
from torchrl_sglang_hidden.engines import launch as launch_module
from torchrl_sglang_hidden.server.__main__ import API_KEY_ENV

URL = "http://127.0.0.1:4321"
EXIT_3 = "raise SystemExit(3)"
SIGTERM_PARENT = "import os, signal; input(); os.kill(os.getppid(), signal.SIGTERM); input()"
SIGINT_PARENT = "import os, signal; input(); os.kill(os.getppid(), signal.SIGINT); input()"


def invoke(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(
        app, list(arguments), env={"COLUMNS": "100", "TERM": "dumb", API_KEY_ENV: "", **(env or {})}
    )


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


class TestHelp:
    def test_names_the_commands(self) -> None:
        result = invoke("--help")
        assert result.exit_code == 0
        for word in ("demo", "serve", "record", "report", "--version", "--debug"):
            assert word in result.stdout

    @pytest.mark.parametrize(
        ("command", "options"),
        [
            ("demo", ["--output", "--max-new-tokens", "--temperature"]),
            ("serve", ["--device", "--host", "--port", "--api-key", "--log-file", "MODEL", API_KEY_ENV]),
            (
                "record",
                ["DATA", "OUT", "--url", "--model", "--prompt-key", "--prompt", "--segments", "--layers", "--pooling"],
            ),
            ("record", ["--tokens", "--max-new-tokens", "--batch-size", "--every", API_KEY_ENV]),
            ("report", ["RECORDING", "--out", "--target", "--against"]),
        ],
    )
    def test_of_a_command_names_its_options(self, command: str, options: list[str]) -> None:
        result = invoke(command, "--help")
        assert result.exit_code == 0
        assert [option for option in options if option not in result.stdout] == []

    def test_without_a_command_is_the_help(self) -> None:
        assert "serve" in invoke().output

    def test_loads_neither_torch_nor_sglang(self) -> None:
        code = (
            "import sys; sys.argv[1:] = ['--help']\n"
            "from torchrl_sglang_hidden.cli import main\n"
            "try:\n    main()\nexcept SystemExit as end:\n    print(end.code)\n"
            "print(sorted({'torch', 'torchrl', 'sglang', 'transformers', 'matplotlib', 'httpx'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-2:] == ["0", "[]"]

    def test_python_dash_m_is_the_same(self) -> None:
        command = [sys.executable, "-m", "torchrl_sglang_hidden", "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"torchrl-sglang-hidden {__version__}\n"

    def test_version(self) -> None:
        result = invoke("--version")
        assert (result.exit_code, result.stdout) == (0, f"torchrl-sglang-hidden {__version__}\n")


class TestErrors:
    @pytest.fixture
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(**options: Any) -> None:
            raise LaunchError("the value, the limit, the remedy")

        monkeypatch.setattr(run_module, "run_demo", fail)

    @pytest.mark.usefixtures("failing")
    def test_are_one_line_on_stderr(self) -> None:
        result = invoke("demo")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == "Error: the value, the limit, the remedy\n"

    @pytest.mark.usefixtures("failing")
    def test_are_red_in_a_terminal(self) -> None:
        result = CliRunner().invoke(app, ["demo"], color=True)
        assert result.stderr == "\x1b[31mError: the value, the limit, the remedy\x1b[0m\n"

    @pytest.mark.usefixtures("failing")
    def test_debug_shows_where_they_come_from(self) -> None:
        result = invoke("--debug", "demo")
        assert isinstance(result.exception, LaunchError)
        assert result.stderr == ""

    def test_faults_of_the_program_keep_their_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run_module, "run_demo", lambda **options: 1 / 0)
        assert isinstance(invoke("demo").exception, ZeroDivisionError)

    @pytest.mark.parametrize(
        "arguments", [["demo", "--tokens", "3"], ["draw"], ["record"], ["demo", "--max-new-tokens", "0"]]
    )
    def test_unknown_or_impossible_arguments_are_usage_errors(self, arguments: list[str]) -> None:
        assert invoke(*arguments).exit_code == 2


class TestDemo:
    def test_passes_its_options_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[dict[str, Any]] = []
        monkeypatch.setattr(run_module, "run_demo", lambda **options: seen.append(options))
        assert invoke("demo").exit_code == 0
        assert invoke("demo", "--output", "here", "--max-new-tokens", "5", "--temperature", "0.5").exit_code == 0
        assert seen == [
            {"output_dir": Path("demo_output"), "max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.0},
            {"output_dir": Path("here"), "max_new_tokens": 5, "temperature": 0.5},
        ]


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

    def test_without_a_model_serves_the_demo_model(
        self, serving: Callable[[str], FakeServer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model_module, "demo_model", lambda: Path("the-demo-model"))
        server = serving(SIGTERM_PARENT)
        assert invoke("serve", "--dtype", "float32").exit_code == 0
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
        snippet = out[out.index("from tensordict") : out.index("Stopped.")]
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


class TestRecord:
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[RecordingServer]:
        TOKENIZER.save_pretrained(tmp_path / "model")
        server = RecordingServer(model_path=str(tmp_path / "model"))
        yield server
        server.stop()

    @pytest.fixture
    def data(self, tmp_path: Path) -> str:
        rows = [{"number": number, "ask": "w1 w2", "chat": [{"role": "user", "content": "w3"}]} for number in range(5)]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / "data.jsonl")

    def test_reads_prompts_of_a_template(self, server: RecordingServer, data: str, tmp_path: Path) -> None:
        options = ["--prompt", "w{number} w2", "--every", "2", "--batch-size", "2"]
        result = invoke("record", data, str(tmp_path / "r"), "--url", server.url, *options)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"Recorded 5 rows in {tmp_path / 'r'}; 0 of them have no label.\n"
        out = load_recording(tmp_path / "r")
        assert (out.metadata["segments"], out.metadata["layers"], out.metadata["pooling"]) == (["prompt"], -1, "mean")
        assert [len(payload["input_ids"]) for payload in server.payloads] == [2, 1]
        assert out.tensordict["label_row"].tolist() == [0, 0, 2, 2, 4]
        assert server.payloads[0]["input_ids"][1] == TOKENIZER("w2 w2")["input_ids"]

    def test_generates_greedily_from_a_field(self, server: RecordingServer, data: str, tmp_path: Path) -> None:
        options = ["--prompt-key", "chat", "--max-new-tokens", "3", "--tokens"]
        options += ["--segments", "prompt,response", "--layers", "0,-1", "--pooling", "last"]
        result = invoke("record", data, str(tmp_path / "r"), "--url", server.url, *options)
        assert result.exit_code == 0, result.output
        metadata = load_recording(tmp_path / "r").metadata
        assert (metadata["segments"], metadata["layers"], metadata["pooling"]) == (
            ["prompt", "response"],
            [0, -1],
            "last",
        )
        assert metadata["tokens"] == "torch.float16"
        assert metadata["generate_kwargs"] == {"max_new_tokens": 3, "temperature": 0.0}
        assert metadata["prompt"]["repr"] == "Field(name='chat')"
        (sampling,) = {json.dumps(one) for one in server.payloads[0]["sampling_params"]}
        assert json.loads(sampling)["temperature"] == 0.0

    def test_says_what_failed(self, server: RecordingServer, data: str, tmp_path: Path) -> None:
        Path(data).write_text('{"ask": "w1"}\n{"ask": ""}\n')
        with pytest.warns(UserWarning, match="1 of 2 rows"):
            result = invoke("record", data, str(tmp_path / "r"), "--url", server.url, "--prompt-key", "ask")
        assert result.exit_code == 0
        assert "1 of them have no label" in result.stdout
        assert "    PromptLengthError: text, row 1: an empty string" in result.stdout

    def test_serves_a_model_meanwhile(
        self, server: RecordingServer, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started: list[Any] = []

        def launch(model: Any, **options: Any) -> SGLangServer:
            started.append((model, options))
            return connect(server.url)

        monkeypatch.setattr(launch_module, "launch", launch)
        monkeypatch.setattr(model_module, "demo_model", lambda: Path("the-demo-model"))
        for model in ("m", "demo"):
            options = ["--model", model, "--prompt", "w{number}", "--layers", "2"]
            assert invoke("record", data, str(tmp_path / model), *options).exit_code == 0
        assert started == [
            ("m", {"layers": (2,), "api_key": None}), (Path("the-demo-model"), {"layers": (2,), "api_key": None})
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--prompt", "{a}"], "--url None --model None: expected one of the two"),
            (["--prompt", "{a}", "--url", URL, "--model", "m"], "expected one of the two"),
            (["--url", URL], "--prompt None --prompt-key None: expected one of the two"),
            (["--url", URL, "--prompt", "{a}", "--prompt-key", "a"], "expected one of the two"),
            (["--url", URL, "--prompt", "{a}", "--layers", "x"], "record --layers x: expected integers"),
            (["--url", URL, "--prompt", "{a}", "--layers", "all"], "record --layers all: expected integers"),
            (["--model", "/no/such/model", "--prompt", "{a}"], "/no/such/model does not exist"),
        ],
    )
    def test_refuses(self, options: list[str], words: str, data: str, tmp_path: Path) -> None:
        result = invoke("record", data, str(tmp_path / "r"), *options)
        assert result.exit_code == 1
        assert words in result.stderr
        assert not (tmp_path / "r").exists()


def test_the_api_key_variable_is_the_servers() -> None:
    assert cli.API_KEY_ENV == API_KEY_ENV


def test_the_console_script_is_main() -> None:
    script = Path(sys.executable).parent / "torchrl-sglang-hidden"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"torchrl-sglang-hidden {__version__}\n"
