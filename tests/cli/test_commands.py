"""What all commands have in common: help, version, errors; and ``demo``, which passes its options on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import invoke
from typer.testing import CliRunner

from torchrl_sglang_hidden import LaunchError, __version__
from torchrl_sglang_hidden.cli import app, main, options
from torchrl_sglang_hidden.cli.commands import take_secrets
from torchrl_sglang_hidden.demo import run as run_module
from torchrl_sglang_hidden.demo.prompts import MAX_NEW_TOKENS
from torchrl_sglang_hidden.server import __main__ as server_main
from torchrl_sglang_hidden.server.__main__ import API_KEY_ENV, SECRETS_ENV


class TestHelp:
    def test_names_the_commands(self) -> None:
        result = invoke("--help")
        assert result.exit_code == 0
        for word in ("demo", "serve", "record", "report", "doctor", "--version", "--debug"):
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
            ("doctor", ["URL", "--api-key", "--json", API_KEY_ENV]),
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


def test_the_variables_are_the_servers() -> None:
    for name in ("API_KEY_ENV", "SECRETS_ENV", "SECRET_ARGUMENTS"):
        assert getattr(options, name) == getattr(server_main, name)


@pytest.mark.parametrize(
    ("arguments", "rest", "secrets"),
    [
        (["serve", "m", "--api-key", "a b", "--port", "3"], ["serve", "m", "--port", "3"], {"api_key": "a b"}),
        (["serve", "--api-key=x=y"], ["serve"], {"api_key": "x=y"}),
        (["serve", "--admin-api-key", "x", "--ssl-keyfile-password=y"], ["serve"],
         {"admin_api_key": "x", "ssl_keyfile_password": "y"}),
        (["serve", "--api-key"], ["serve", "--api-key"], {}),
        (["serve", "--api-key", "", "--admin-api-key="], ["serve", "--api-key", "", "--admin-api-key="], {}),
        (["record", "api_key", "--host", "x"], ["record", "api_key", "--host", "x"], {}),
    ],
)  # fmt: skip
def test_secrets_are_taken_out_of_a_command_line(
    arguments: list[str], rest: list[str], secrets: dict[str, str]
) -> None:
    assert take_secrets(arguments) == (rest, secrets)


def test_the_program_starts_again_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["script", "serve", "--api-key", "hush", "--admin-api-key=sh", "m"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "script", *sys.argv[1:]])
    monkeypatch.setattr(os, "execv", lambda *call: started.append(call))
    monkeypatch.setattr("torchrl_sglang_hidden.cli.commands.app", lambda: None)
    monkeypatch.setenv(API_KEY_ENV, "")
    monkeypatch.setenv(SECRETS_ENV, "")
    main()
    assert started == [(sys.executable, [sys.executable, "-X", "dev", "script", "serve", "m"])]
    assert (os.environ[API_KEY_ENV], os.environ[SECRETS_ENV]) == ("hush", '{"admin_api_key": "sh"}')


def test_the_console_script_is_main() -> None:
    script = Path(sys.executable).parent / "torchrl-sglang-hidden"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"torchrl-sglang-hidden {__version__}\n"
