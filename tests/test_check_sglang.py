"""The script that holds another SGLang against what this package needs: the same is green, and each change is red."""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path

import check_sglang
import pytest
import sglang_needs
from packaging.requirements import Requirement
from sglang_needs import ROUTES, SERVER_ARGS, Need
from sglang_sources import Sources

from torchrl_sglang_hidden.server.plugin import SGLANG_VERSIONS

FILES = {
    "sglang/__init__.py": 'Engine = LazyImport("sglang.srt.engine", "Engine")\n',
    "sglang/_version.py": f'__version__ = version = "{SGLANG_VERSIONS[0]}"\n',
    "sglang/srt/__init__.py": "",
    "sglang/srt/engine.py": "class Engine:\n    async def generate(self, ids, *, stream=False):\n        return ids\n",
    "sglang/srt/base.py": (
        "class Base:\n    def finished(self):\n        return self.done\n\ndef helper(x):\n    return x\n"
    ),
    "sglang/srt/req.py": (
        "try:\n    from .base import Base as Parent, helper\nexcept ImportError:\n    Parent = object\n"
        "class Req(Parent):\n"
        "    kind: int = 0\n"
        "    def __init__(self):\n        self.ids = []\n"
        "    @property\n    def length(self):\n        return len(self.ids)\n"
        '    def match(self, tree: "Tree", cow=None):\n        """Match."""\n        return tree.match(self)\n'
    ),
    "sglang/srt/server_args.py": "class ServerArgs:\n    def resolve(self):\n        pass\n",
    "sglang/srt/arg_groups/fields/device.py": "class Device:\n    device: str | None = None\n",
    "sglang/srt/entrypoints/http_server.py": '@app.post("/generate")\nasync def generate(obj):\n    return obj\n',
}
NEEDS = [
    Need("hook", "sglang.srt.req.Req.match", "around_match(original, req, tree, cow=None)"),
    Need("attribute", "sglang.srt.req.Req.finished", "server/capture.py"),
    Need("attribute", "sglang.srt.req.Req.ids", "server/capture.py"),
    Need("attribute", "sglang.srt.req.Req.kind", "server/capture.py"),
    Need("attribute", "sglang.srt.req.Req.length", "server/capture.py"),
    Need("import", "sglang.Engine.generate", "engines/offline.py"),
    Need("import", "sglang.srt.req.helper", "server/plugin.py"),
    Need("argument", f"{SERVER_ARGS}.device", "server/cpu.py"),
    Need("route", f"{ROUTES}./generate", "engines/endpoint.py"),
]


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def write_wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(check_sglang, "needs", lambda: NEEDS)
    return str(write(tmp_path / "own", FILES))


def test_what_is_needed_is_there_in_the_sglang_it_is_written_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_sglang.main([str(check_sglang.installed())]) == 0
    same, *others = capsys.readouterr().out.splitlines()[-1].split(", ")
    assert int(same.split()[0]) > 200
    assert others == ["0 body changed", "0 signature changed", "0 gone"]


def test_the_served_versions_can_be_installed() -> None:
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        required = map(Requirement, tomllib.load(file)["project"]["optional-dependencies"]["sglang"])
    (sglang,) = (requirement for requirement in required if requirement.name == "sglang")
    assert [version for version in SGLANG_VERSIONS if version not in sglang.specifier] == []


def test_every_hook_and_import_is_listed() -> None:
    listed = {need.target for need in sglang_needs.needs()}
    assert sglang_needs.hooks().keys() <= listed
    # One of each kind that the package's sources are read for.
    assert {
        "sglang.srt.managers.auxiliary_output.append_auxiliary_output",
        "sglang.srt.managers.io_struct.OpenSessionReqInput",
        "sglang.srt.managers.io_struct.GenerateReqInput.cache_salt",
        "sglang.srt.managers.schedule_batch.Req.prefix_len",
        "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output",
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.pause_generation",
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.served_model_name",
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.captured_req_width",
        f"{ROUTES}./abort_request",
        f"{ROUTES}.model_info",
        f"{SERVER_ARGS}.enable_torch_compile",
    } <= listed


@pytest.mark.parametrize("packed", [True, False])
def test_the_same_is_green(own: str, tmp_path: Path, packed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    # Comments, docstrings, annotations and the order of definitions say nothing.
    changed = FILES["sglang/srt/req.py"].replace('"""Match."""', "# matches").replace('tree: "Tree"', "tree: Any")
    files = {**FILES, "sglang/srt/req.py": changed, "sglang/_version.py": '__version__ = version = "9.9"\n'}
    other = write_wheel(tmp_path / "other.whl", files) if packed else write(tmp_path / "other", files)
    assert check_sglang.main([str(other), "--own", own]) == 0
    assert "SGLang 9.9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("req", "match(self", "match(self, batch", ["signature changed: hook", "change the hook", "(self, batch"]),
        ("req", "    def match", "    async def match", ["signature changed: hook", "async (self"]),
        ("req", "tree.match(self)", "tree.match(self, 1)", ["body changed: hook", "| -    return tree.match(self)"]),
        ("req", "def match", "def matches", ["gone: hook", "nearest: sglang.srt.req.Req.matches"]),
        ("req", "self.ids = []", "self.fill_ids = []", ["gone: attribute sglang.srt.req.Req.ids"]),
        ("req", "    kind: int = 0\n", "", ["gone: attribute sglang.srt.req.Req.kind"]),
        ("req", "    @property\n", "", ["signature changed: attribute sglang.srt.req.Req.length", "value → (self)"]),
        ("req", "class Req(Parent)", "class Req", ["gone: attribute", "nearest: finished in sglang/srt/base.py"]),
        ("req", "import Base as Parent, helper", "import Base as Parent", ["gone: import sglang.srt.req.helper"]),
        ("base", "return self.done", "return False", ["body changed: attribute sglang.srt.req.Req.finished"]),
        ("base", "def helper(x)", "def helper(x, y=1)", ["signature changed: import", "change the call"]),
        ("engine", "stream=False", "stream=True", ["signature changed: import sglang.Engine.generate"]),
        ("arg_groups/fields/device", "device:", "backend:", ["gone: argument"]),
        ("entrypoints/http_server", "/generate", "/v2/generate", ["gone: route"]),
    ],
)  # fmt: skip
def test_each_change_is_red(
    own: str, tmp_path: Path, file: str, old: str, new: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"sglang/srt/{file}.py"
    assert old in FILES[name]
    other = write_wheel(tmp_path / "other.whl", {**FILES, name: FILES[name].replace(old, new)})
    assert check_sglang.main([str(other), "--own", own, "--diff"]) == 1
    printed = capsys.readouterr().out
    assert [word for word in words if word not in printed] == []
    assert printed.splitlines()[-1].startswith(f"{len(NEEDS) - 1} same")


def test_a_need_that_is_wrong_itself_is_told_apart(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_sglang, "needs", lambda: [Need("import", "sglang.srt.req.nothing", "server/plugin.py")])
    with pytest.raises(SystemExit) as ended:
        check_sglang.main([own, "--own", own])
    assert ended.value.code == 2


def test_what_is_no_sglang_is_refused(own: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no sglang"):
        check_sglang.main([str(tmp_path), "--own", own])
    write(tmp_path / "own", {"sglang/_version.py": '__version__ = version = "0.1"\n'})
    with pytest.raises(SystemExit, match=r"has SGLang 0\.1; the package is written for"):
        check_sglang.main([own, "--own", own])


def test_a_name_through_every_way_of_importing(tmp_path: Path) -> None:
    files = {
        "sglang/__init__.py": "",
        "sglang/a/__init__.py": "from . import b\nfrom .b import *\nimport sys\nif sys.platform:\n    value = 1\n",
        "sglang/a/b.py": "from ..c import f as g\n",
        "sglang/c.py": "def f(): pass\n",
    }
    sources = Sources(write(tmp_path, files))
    for name in ("sglang.a.g", "sglang.a.b.g", "sglang.c.f"):
        found = sources.find(name)
        assert found is not None, name
        assert found.module == "sglang.c"
    assert sources.find("sglang.a.value") is not None
    assert sources.find("sglang.a.f") is None
    assert sources.find("nothing.at.all") is None
    assert sources.version == ""
