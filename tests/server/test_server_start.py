"""What ``python -m torchrl_sglang_hidden.server`` does around SGLang's start, with stand-ins for SGLang's modules."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Iterator

import pytest

from torchrl_sglang_hidden.protocol import PLUGIN_ENV
from torchrl_sglang_hidden.server.__main__ import SECRET_ARGUMENTS, main


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
