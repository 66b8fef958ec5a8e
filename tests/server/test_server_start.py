"""What ``python -m torchrl_sglang_hidden.server`` does around SGLang's start, with stand-ins for SGLang's modules."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest

from torchrl_sglang_hidden.protocol import PLUGIN_ENV
from torchrl_sglang_hidden.server.__main__ import API_KEY_ENV, SECRET_ARGUMENTS, main

NAMED = """
import os
import setproctitle
from pathlib import Path
from torchrl_sglang_hidden.server import __main__ as server

def serve(*arguments, **options):
    os.environ["FIRST"] = "another"
    if os.fork() == 0:
        setproctitle.setproctitle("sglang::scheduler")
        print(Path("/proc/self/cmdline").read_text().strip(chr(0)), flush=True)
        os._exit(0)
    os.wait()
    print(b"SHOWN=still" in Path("/proc/self/environ").read_bytes())

server._run_server = serve
server.main(["--device", "cuda"])
"""


@pytest.fixture
def collecting() -> Iterator[None]:
    """Leave the collector after the test as it was before."""
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.usefixtures("collecting")
def test_nothing_is_collected_while_sglang_is_imported_and_what_came_of_it_is_left_alone_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, tuple[bool, bool]] = {}

    def note(name: str) -> None:
        found[name] = gc.isenabled(), gc.get_freeze_count() > 1000

    arguments = {"host": "127.0.0.1", "tokenizer_worker_num": 1, **dict.fromkeys(SECRET_ARGUMENTS)}
    members = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.entrypoints": {},
        "sglang.launch_server": {"run_server": lambda chosen: note("serving")},
        "sglang.srt.plugins": {"load_plugins": lambda: note("importing")},
        "sglang.srt.server_args": {"prepare_server_args": lambda words: types.SimpleNamespace(**arguments)},
        "sglang.srt.utils": {"kill_process_tree": lambda pid, include_parent: None},
        "sglang.srt.entrypoints.http_server": {"get_global_state": lambda: None},
    }
    for name, attributes in members.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(PLUGIN_ENV, "1")
    main(["--model-path", "a/model", "--device", "cuda"])
    assert found == {"importing": (False, False), "serving": (True, True)}


@pytest.mark.parametrize("first", ["FIRST", API_KEY_ENV])
def test_forks_take_a_name_though_the_environment_changes(first: str) -> None:
    environment = {first: "one", "SHOWN": "still", **os.environ}
    done = subprocess.run([sys.executable, "-c", NAMED], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "sglang::scheduler\nTrue\n", "what /proc shows of the environment is still there"
