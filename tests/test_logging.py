"""The package's logging: by module, silent unless asked for, and nothing printed but by the command line."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import torchrl_sglang_hidden

ROOT = Path(torchrl_sglang_hidden.__file__).parent
# What talks to who sits before a terminal; nothing else prints.
TALKS = {"cli", "demo"}


def faults(source: str) -> list[str]:
    """Return what a module does that a library should not: prints, loggers by another name, handlers of its own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name, told = ast.unparse(node.func), [ast.unparse(one) for one in node.args]
            if name == "print":
                found.append("prints")
            if name == "logging.getLogger" and told != ["__name__"]:
                found.append("has a logger of another name")
            if name in ("logging.basicConfig", "logging.warning", "logging.info", "logging.error"):
                found.append("uses the root logger")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_logs_as_a_library(path: Path) -> None:
    found = faults(path.read_text())
    assert [fault for fault in found if not (fault == "prints" and path.relative_to(ROOT).parts[0] in TALKS)] == []


@pytest.mark.parametrize(
    "source",
    ["print(1)", "logging.getLogger('x')", "logging.getLogger()", "logging.basicConfig()", "logging.info('x')"],
)
def test_the_check_goes_red(source: str) -> None:
    assert faults(source)


def test_nothing_is_written_unless_somebody_asks() -> None:
    code = (
        "import logging, torchrl_sglang_hidden\n"
        "logging.getLogger('torchrl_sglang_hidden.engines.meter').error('a gap')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_program_hears_it(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("torchrl_sglang_hidden.engines.meter").error("a gap")
    assert caplog.messages == ["a gap"]
