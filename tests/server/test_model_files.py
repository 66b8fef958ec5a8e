"""SGLang imports the file of the model that it serves, and no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import torchrl_sglang_hidden
from torchrl_sglang_hidden.server.model_files import ARCHITECTURE_ENV, PACKAGE_ENV, offer_model

ROOT = Path(torchrl_sglang_hidden.__file__).parents[1]
FILES = {
    "alpaca.py": "class AlpacaForCausalLM:\n    pass\nclass Helper(AlpacaForCausalLM):\n    pass\n"
    "EntryClass = AlpacaForCausalLM\n",
    "camel.py": "class CamelForCausalLM:\n    pass\nclass CamelForReward:\n    pass\n"
    "EntryClass = [CamelForReward, CamelForCausalLM]\n",
    "users.py": "# class VicunaForCausalLM\nfrom sglang.srt.models.alpaca import AlpacaForCausalLM\n",
}
READ = """
import json, os, sys
from torchrl_sglang_hidden.server.served_model import entry
loaded = sorted(name.rpartition(".")[2] for name in sys.modules if name.startswith("sglang.srt.models."))
print(json.dumps([[cls.__name__ for cls in entry.EntryClass], loaded]))
"""


@pytest.fixture
def sglang(tmp_path: Path) -> Path:
    """Return the directory of an SGLang that has these models alone."""
    package = tmp_path / "sglang" / "srt" / "models"
    package.mkdir(parents=True)
    for directory in (package, package.parent, package.parent.parent):
        (directory / "__init__.py").touch()
    for name, source in FILES.items():
        (package / name).write_text(source, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("architecture", "found"),
    [
        ("AlpacaForCausalLM", [["AlpacaForCausalLM"], ["alpaca"]]),
        ("CamelForCausalLM", [["CamelForCausalLM"], ["camel"]]),
        ("Helper", [[], ["alpaca"]]),
        ("Camel", [[], []]),
        ("VicunaForCausalLM", [[], []]),
    ],
)
def test_the_served_models_file_alone_is_imported(sglang: Path, architecture: str, found: Any) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{sglang}{os.pathsep}{ROOT}", ARCHITECTURE_ENV: architecture}
    done = subprocess.run(
        [sys.executable, "-c", READ], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == found


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (PACKAGE_ENV, ARCHITECTURE_ENV):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def model_of(directory: Path, **config: Any) -> str:
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(directory)


@pytest.mark.usefixtures("unset")
def test_the_model_that_is_offered_is_the_whole_one(tmp_path: Path) -> None:
    """A model with images has a language model's configuration inside its own."""
    text_config = {"architectures": ["LlamaForCausalLM"]}
    offer_model(model_of(tmp_path, architectures=["AlpacaForConditionalGeneration"], text_config=text_config))
    assert os.environ[ARCHITECTURE_ENV] == "AlpacaForConditionalGeneration"
    assert os.environ[PACKAGE_ENV] == "torchrl_sglang_hidden.server.served_model"


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": ["A", "B"]}, None])
def test_nothing_is_offered_where_no_one_class_is_named(config: Any, tmp_path: Path) -> None:
    offer_model(str(tmp_path) if config is None else model_of(tmp_path, **config))
    assert PACKAGE_ENV not in os.environ


@pytest.mark.usefixtures("unset")
def test_a_package_of_the_users_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PACKAGE_ENV, "my.models")
    offer_model(model_of(tmp_path, architectures=["LlamaForCausalLM"]))
    assert os.environ[PACKAGE_ENV] == "my.models"
    assert ARCHITECTURE_ENV not in os.environ
