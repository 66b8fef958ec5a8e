"""The server half's way into SGLang, as far as it needs no server: off unless asked for, and on only when it fits."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest

from torchrl_sglang_hidden import HiddenSpec
from torchrl_sglang_hidden.channel import CHANNEL, PLUGIN_ENV, pack_options
from torchrl_sglang_hidden.server.capture import Capture

# SGLang's two modules, as much of them as `register` touches: importing the real ones takes seconds and a CUDA wheel.
FAKE_SGLANG = """
import enum, sys, types
registered = []
class HookType(enum.Enum):
    AFTER = "after"
class HookRegistry:
    @staticmethod
    def register(target, hook, kind):
        registered.append((target, hook, kind))
def fake(version):
    sglang = types.ModuleType("sglang")
    sglang.__version__ = version
    hooks = types.ModuleType("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry, hooks.HookType = HookRegistry, HookType
    names = {"sglang": sglang, "sglang.srt": types.ModuleType("sglang.srt")}
    names |= {"sglang.srt.plugins": types.ModuleType("sglang.srt.plugins"), hooks.__name__: hooks}
    sys.modules.update(names)
"""


def run(script: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != PLUGIN_ENV}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


INERT = """
import sys
from torchrl_sglang_hidden.server.plugin import register
register()
print("sglang" in sys.modules, "torchrl" in sys.modules, "tensordict" in sys.modules)
"""


@pytest.mark.parametrize("value", [None, "", "0", "true", "yes", " 1", "2"])
def test_it_does_nothing_unless_opted_in(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrl_sglang_hidden.server import plugin

    monkeypatch.setitem(sys.modules, "sglang", None)  # importing it raises
    if value is None:
        monkeypatch.delenv(PLUGIN_ENV, raising=False)
    else:
        monkeypatch.setenv(PLUGIN_ENV, value)
    plugin.register()


def test_it_loads_nothing_unless_opted_in() -> None:
    assert run(INERT).split() == ["False"] * 3


def test_opted_in_it_registers_every_hook_once() -> None:
    script = """
    fake("0.5.23")
    from torchrl_sglang_hidden.server import plugin
    plugin.register()
    assert [target for target, _, _ in registered] == list(plugin._HOOKS)
    assert all(kind is HookType.AFTER and callable(hook) for _, hook, kind in registered)
    assert len(registered) >= 6
    """
    run(FAKE_SGLANG + textwrap.dedent(script), **{PLUGIN_ENV: "1"})


def test_it_stays_off_in_another_sglang() -> None:
    script = """
    fake("0.6.0")
    from torchrl_sglang_hidden.server import plugin
    plugin.register()
    assert registered == []
    """
    said = run(FAKE_SGLANG + textwrap.dedent(script), **{PLUGIN_ENV: "1"})
    assert "written for SGLang 0.5.23 and this is 0.6.0; it stays off" in said


def test_sglang_finds_it() -> None:
    (entry,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="torchrl_sglang_hidden")
    assert entry.value == "torchrl_sglang_hidden.server.plugin:register"


class Asking:
    """SGLang's request, as much of it as is read."""

    sampling_params = SimpleNamespace(custom_params={CHANNEL: pack_options(HiddenSpec(), binary=False)})
    origin_input_ids = (1, 2)

    def finished(self) -> bool:
        return False


class Streamer:
    """SGLang's output streamer, as much of it as is subclassed."""

    def is_request_level_customized_info_key(self, key: str) -> bool:
        return key == "theirs"

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
        return {"theirs": [1 for _ in reqs]}


@pytest.mark.parametrize(("rust_server", "pp_size"), [(object(), 1), (None, 2)])
def test_off_where_sglang_cannot_carry_the_rows(
    monkeypatch: pytest.MonkeyPatch, rust_server: object, pp_size: int
) -> None:
    from torchrl_sglang_hidden.server import plugin

    capture = Capture()
    monkeypatch.setattr(plugin, "_capture", capture)
    scheduler = SimpleNamespace(rust_server=rust_server, server_args=SimpleNamespace(pp_size=pp_size))
    assert plugin.after_streamer_class(Streamer, scheduler) is Streamer
    assert capture.pools_of(Asking()) is None
    capture.on = True
    assert capture.pools_of(Asking()) is not None, "else the test proves nothing"


def test_the_streamer_keeps_what_others_add(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrl_sglang_hidden.server import plugin

    scheduler = SimpleNamespace(rust_server=None, server_args=SimpleNamespace(pp_size=1))
    streamer = plugin.after_streamer_class(Streamer, scheduler)()
    assert streamer.has_additional_customized_info
    assert streamer.is_request_level_customized_info_key(plugin.CHANNEL)
    assert streamer.is_request_level_customized_info_key("theirs")
    assert not streamer.is_request_level_customized_info_key("nobody's")

    answers = {"asked": ["answer"], "quiet": []}
    monkeypatch.setattr(plugin._capture, "answer", answers.get)
    found = streamer.build_additional_customized_info(["quiet", "asked"])
    assert found == {"theirs": [1, 1], plugin.CHANNEL: [[], ["answer"]]}
    assert streamer.build_additional_customized_info(["quiet"]) == {"theirs": [1]}


def test_requests_that_did_not_ask_lose_the_empty_answer() -> None:
    from torchrl_sglang_hidden.server import plugin

    quiet, asked, stock = {plugin.CHANNEL: [], "id": 1}, {plugin.CHANNEL: ["answer"]}, {"id": 2}
    for meta_info in (quiet, asked, stock):
        assert plugin.after_update_meta_info(None, None, meta_info, "request") is None
    assert (quiet, asked, stock) == ({"id": 1}, {plugin.CHANNEL: ["answer"]}, {"id": 2})


def test_a_request_that_pools_its_prompt_does_not_hit_the_prefix_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrl_sglang_hidden.server import plugin

    monkeypatch.setattr(plugin._capture, "needs_uncached_prompt", {"asked": True, "quiet": False}.get)
    assert plugin.after_max_prefix_len(17, "asked", 18) == 0
    assert plugin.after_max_prefix_len(17, "quiet", 18) is None  # None keeps SGLang's own value
