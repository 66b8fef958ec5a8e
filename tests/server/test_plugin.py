"""The server half's way into SGLang, as far as it needs no server: off unless asked for, and on only when it fits."""

from __future__ import annotations

import enum
import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sglang_stand_ins import Req

from torchrl_sglang_hidden.protocol import CHANNEL, CONSTRAINTS_ENV, PLUGIN_ENV, Status
from torchrl_sglang_hidden.protocol.shared_memory import SharedFiles
from torchrl_sglang_hidden.reduce.wanted import BLOCK, Wanted
from torchrl_sglang_hidden.server import plugin
from torchrl_sglang_hidden.server.capture import Capture
from torchrl_sglang_hidden.server.settings import Settings
from torchrl_sglang_hidden.spec.constraints import base, known_constraints
from torchrl_sglang_hidden.spec.spans import PromptSpan


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what is registered with SGLang's registry. Importing the real one takes seconds and a CUDA wheel."""
    calls: list[Any] = []
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.plugins.hook_registry"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    registry = sys.modules["sglang.srt.plugins.hook_registry"]
    registry.HookType = HookType
    registry.HookRegistry = SimpleNamespace(register=lambda *call: calls.append(call))
    sys.modules["sglang"].__version__ = "0.5.23"
    monkeypatch.setenv(PLUGIN_ENV, "1")
    return calls


def run(script: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != PLUGIN_ENV}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=240,
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
    monkeypatch.setitem(sys.modules, "sglang", None)  # importing it raises
    if value is None:
        monkeypatch.delenv(PLUGIN_ENV, raising=False)
    else:
        monkeypatch.setenv(PLUGIN_ENV, value)
    plugin.register()


def test_it_loads_nothing_unless_opted_in() -> None:
    assert run(INERT).split() == ["False"] * 3


def test_opted_in_it_registers_every_hook_once(registered: list[Any]) -> None:
    plugin.register()
    kinds = [(plugin._BEFORE, "before"), (plugin._AFTER, "after"), (plugin._AROUND, "around")]
    assert registered == [(target, hook, HookType(kind)) for hooks, kind in kinds for target, hook in hooks.items()]
    # SGLang wraps a target once for each of its hooks: one before it and one after it go together.
    assert len({(target, kind) for target, _, kind in registered}) == len(registered) >= 14


def test_it_stays_off_in_another_sglang(registered: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    sys.modules["sglang"].__version__ = "0.6.0"
    plugin.register()
    assert registered == []
    assert "written for SGLang 0.5.23 and 0.5.22, and this is 0.6.0; it stays off" in caplog.text


def test_sglang_finds_it() -> None:
    (entry,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="torchrl_sglang_hidden")
    assert entry.value == "torchrl_sglang_hidden.server.plugin:register"


class Streamer:
    """SGLang's output streamer, as much of it as is subclassed."""

    send_to_detokenizer = SimpleNamespace(socket="a socket")

    def __post_init__(self) -> None:
        pass

    def is_request_level_customized_info_key(self, key: str) -> bool:
        return key == "theirs"

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
        return {"theirs": [1 for _ in reqs]}


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rust_server", "pp_size"), [(object(), 1), (None, 2)])
def test_off_where_sglang_cannot_carry_the_rows(capture: Capture, rust_server: object, pp_size: int) -> None:
    scheduler = SimpleNamespace(rust_server=rust_server, server_args=SimpleNamespace(pp_size=pp_size))
    assert plugin.after_streamer_class(Streamer, scheduler) is Streamer
    assert capture.open(Req(Wanted(("response",)))) is None
    capture.on = True
    assert capture.open(Req(Wanted(("response",)))) is not None, "else the test proves nothing"


def test_the_streamer_keeps_what_others_add(monkeypatch: pytest.MonkeyPatch, capture: Capture) -> None:
    scheduler = SimpleNamespace(rust_server=None, server_args=SimpleNamespace(pp_size=1))
    streamer = plugin.after_streamer_class(Streamer, scheduler)()
    assert streamer.has_additional_customized_info
    assert streamer.is_request_level_customized_info_key(CHANNEL)
    assert streamer.is_request_level_customized_info_key("theirs")
    assert not streamer.is_request_level_customized_info_key("nobody's")

    waits = Req(MEAN)
    assert capture.open(waits) is not None
    answers = {"asked": SimpleNamespace(finish=lambda: ["answer"]), "quiet": None}
    monkeypatch.setattr(capture, "answers", lambda reqs: [answers[req] for req in reqs])
    found = streamer.build_additional_customized_info(["quiet", "asked"])
    assert found == {"theirs": [1, 1], CHANNEL: [[], ["answer"]]}
    assert streamer.build_additional_customized_info(["quiet"]) == {"theirs": [1]}
    capture.opened.clear()
    monkeypatch.setattr(capture, "answers", None)
    assert streamer.build_additional_customized_info(["quiet"]) == {"theirs": [1]}, "nobody is asked for an answer"


def test_requests_that_did_not_ask_lose_the_empty_answer() -> None:
    quiet, asked, stock = {CHANNEL: [], "id": 1}, {CHANNEL: ["answer"]}, {"id": 2}
    for meta_info in (quiet, asked, stock):
        assert plugin.after_update_meta_info(None, None, meta_info, "request") is None
    assert (quiet, asked, stock) == ({"id": 1}, {CHANNEL: ["answer"]}, {"id": 2})


# --- the prefix cache -------------------------------------------------------------------------------------------------


class Cache:
    """SGLang's prefix cache, and its own part of `init_next_round_input`.

    Args:
        has: how many of a request's positions it has, on the device and on the host; the last one stays.
        page_size: matches are multiples of it.
        mamba: whether the model keeps a recurrent state.

    Attributes:
        limits: of every match.
    """

    def __init__(self, has: int | tuple[int, int] = 1000, page_size: int = 1, mamba: bool = False) -> None:
        self.has = has if isinstance(has, tuple) else (has, 0)
        self.page_size = page_size
        self.supports_mamba = lambda: mamba
        self.limits: list[int] = []

    def match(self, req: Any, tree_cache: Any = None, cow_mamba: bool | None = None) -> None:
        assert (tree_cache, cow_mamba) in ((self, None), (self, False), (None, None))
        limit = len(req.origin_input_ids) + len(req.output_ids) - 1
        given = plugin.after_max_prefix_len(limit, req, limit + 1)
        limit = limit if given is None else given
        self.limits.append(limit)
        device, host = self.has
        found = min(device + host, limit) // self.page_size * self.page_size
        req.prefix_len, req.host_hit_length = min(device, found), max(found - device, 0)


def kept(capture: Capture, *lengths: int) -> None:
    """Keep sums over the beginnings of `Req`'s ids."""
    req = Req(Wanted(("prompt",)))
    one = capture.open(req)
    for length in lengths:
        capture.sums.put(one.keys, length, torch.full((1, 4), float(length)))


MEAN = Wanted(("prompt",))
MASK = Wanted(("prompt",), spans={"m": PromptSpan(((100, 110),))})


@pytest.mark.parametrize(
    ("wanted", "sums", "cache", "limits", "found"),
    [
        (MEAN, [], Cache(), [0], 0),
        (MEAN, [64, 150], Cache(), [150], 150),
        (MASK, [64, 150], Cache(), [64], 64),
        (Wanted(("prompt",), "last"), [], Cache(), [199], 199),
        (Wanted(("prompt",), "sum"), [64, 150], Cache(), [150], 150),
        (Wanted(("prompt",), "max"), [64, 150], Cache(), [0], 0),  # sums are no maxima
        # The cache has forgotten a part of what it was asked for, and then ends where no sum is kept.
        (MEAN, [64, 150], Cache(120), [150, 64], 64),
        (MEAN, [64, 128, 150], Cache(140), [150, 128], 128),
        (MEAN, [150], Cache(120), [150, 0], 0),
        (MEAN, [64, 150], Cache(64), [150], 64),
        (MEAN, [10, 20, 30, 150], Cache(25), [150, 20], 20),
        (MEAN, [64, 150], Cache((60, 60)), [150, 64], 64),
        (MEAN, [64, 150], Cache((30, 34)), [150], 64),
        # Pages: a sum inside one is of no use.
        (MEAN, [64, 150], Cache(page_size=16), [64], 64),
        (MEAN, [48, 96, 150], Cache(90, page_size=16), [96, 48], 48),
        (MEAN, [64, 150], Cache(mamba=True), [0], 0),
    ],
)
def test_a_request_hits_the_prefix_cache_as_far_as_sums_reach(
    capture: Capture, wanted: Wanted, sums: list[int], cache: Cache, limits: list[int], found: int
) -> None:
    kept(capture, *sums)
    req = Req(wanted)
    cache.limits.clear()
    plugin.around_match_prefix(cache.match, req, cache, False)
    assert (cache.limits, req.prefix_len + req.host_hit_length) == (limits, found)
    one = capture.open(req)
    assert one.limit is None
    assert plugin.after_max_prefix_len(17, req, 18) is None, "others that ask for the limit get SGLang's own"
    if found and wanted.pools_prefix:
        assert (one.base[0], float(one.base[1][0, 0])) == (found, found)


@pytest.mark.parametrize(("streaming", "limits"), [(True, [199]), (False, [150])])
def test_a_streaming_session_keeps_its_own_prefix(capture: Capture, streaming: bool, limits: list[int]) -> None:
    """SGLang asserts that a match gives all of it."""
    kept(capture, 150)
    req, cache = Req(MEAN), Cache()
    req.session = SimpleNamespace(streaming=streaming)
    plugin.around_match_prefix(cache.match, req, cache)
    assert cache.limits == limits


def test_images_match_as_far_as_sums_reach(capture: Capture) -> None:
    """SGLang extends the positions of a retracted request with images at every match: once is right."""
    kept(capture, 64, 150)
    req, cache = Req(MEAN), Cache(120)
    req.multimodal_inputs = SimpleNamespace(mrope_positions=[0, 1, 2])
    req.origin_input_ids_unpadded = req.origin_input_ids

    def match(req: Any, *args: Any) -> None:
        cache.match(req, *args)
        req.multimodal_inputs.mrope_positions = [*req.multimodal_inputs.mrope_positions, 3]

    plugin.around_match_prefix(match, req, cache)
    assert (cache.limits, req.prefix_len) == ([150, 64], 64)
    assert req.multimodal_inputs.mrope_positions == [0, 1, 2, 3]


def test_a_cache_that_heeds_no_limit_does_not_stop_the_scheduler(capture: Capture) -> None:
    kept(capture, 64)
    req, cache, rounds = Req(MEAN), Cache(), []

    def match(req: Any, tree_cache: Any, cow_mamba: Any) -> None:
        rounds.append(capture.open(req).limit)
        req.prefix_len = 180

    plugin.around_match_prefix(match, req, cache)
    assert rounds == [64, 64]
    assert capture.open(req).limit is None


@pytest.mark.parametrize(("sampled", "fresh"), [([], True), ([7], False)])
def test_a_prompt_that_starts_over_under_other_weights_keeps_nothing(
    capture: Capture, sampled: list[int], fresh: bool
) -> None:
    """Retracted between two chunks: no token would say that the first of them is of weights that are gone."""
    req, cache = Req(MEAN), Cache(0)
    one = capture.open(req)
    step = one.pools.plan_prompt(0, 60)
    one.pools.add_prompt(step, [torch.zeros(1, 4)] * len(step.groups))
    req.output_ids = sampled
    plugin.around_match_prefix(cache.match, req, cache)
    assert capture.open(req) is one, "the weights are the same"
    plugin.after_flush_cache(True, None)
    plugin.around_match_prefix(cache.match, req, cache)
    assert (capture.open(req) is not one) is fresh
    assert capture.open(req).pools.done == (0 if fresh else 60)


def test_other_weights_forget_the_sums_without_a_flush(capture: Capture) -> None:
    kept(capture, 64)
    plugin.after_weight_version(None, None, new_version="v2")
    assert capture.sums.bytes == 0


def test_each_match_begins_with_what_has_arrived(capture: Capture) -> None:
    """A chunk that was planned and never ran is planned again; positions that came need no sum."""
    kept(capture, 150)
    req, cache = Req(MEAN), Cache(50)
    one = capture.open(req)
    for start, stop in ((0, 30), (30, 200)):
        step = one.pools.plan_prompt(start, stop)
        if stop == 30:
            one.pools.add_prompt(step, [torch.zeros(1, 4)])
    plugin.around_match_prefix(cache.match, req, cache)
    assert (cache.limits, req.prefix_len) == ([150, 30], 30)
    assert one.pools.plan_prompt(30, 200).begin == 30


def test_a_retracted_request_hits_all_of_its_own(capture: Capture) -> None:
    req, cache = Req(MEAN, length=4), Cache()
    one = capture.open(req)
    one.pools.add_prompt(one.pools.plan_prompt(0, 4), [torch.zeros(1, 4)] * 2)
    req.output_ids = [7, 7]
    plugin.around_match_prefix(cache.match, req, cache)
    assert (cache.limits, req.prefix_len) == ([5], 5), "SGLang itself keeps the last position back"


@pytest.mark.parametrize("wanted", [None, Wanted(("response",)), Wanted(("full",), "last")])
def test_requests_that_want_nothing_of_the_prompt_hit_what_they_can(capture: Capture, wanted: Wanted | None) -> None:
    req, cache = Req(wanted), Cache()
    plugin.around_match_prefix(cache.match, req, cache)
    assert (cache.limits, req.prefix_len) == ([199], 199)


def test_a_chunk_that_goes_on_matches_nothing(capture: Capture) -> None:
    """SGLang calls without a cache then. What was planned stays planned."""
    req, cache = Req(MEAN), Cache()
    one = capture.open(req)
    one.pools.plan_prompt(0, 50)
    plugin.around_match_prefix(cache.match, req)
    assert cache.limits == [199]
    assert one.pools.plan_prompt(50, 200).planned == 50
    assert Capture().opened.get(req) is None


def test_sums_go_with_the_prefix_cache(capture: Capture) -> None:
    kept(capture, BLOCK)
    plugin.after_flush_cache(False, None)
    assert capture.sums.bytes > 0, "a flush that SGLang refused: requests are running"
    plugin.after_flush_cache(True, None, empty_cache=True)
    assert capture.sums.bytes == 0


# --- status -----------------------------------------------------------------------------------------------------------


def scheduler_of(**changes: Any) -> Any:
    fields = {
        "model_config": SimpleNamespace(
            vocab_size=96, hidden_size=8, num_hidden_layers=4, context_len=64, is_image_understandable_model=False
        ),
        "spec_algorithm": SimpleNamespace(is_none=lambda: True),
        "disaggregation_mode": SimpleNamespace(value="null"),
        "enable_pdmux": False,
    }
    return SimpleNamespace(**{**fields, **changes})


def status_of(scheduler: Any) -> Status:
    output = SimpleNamespace(internal_state={"theirs": 1})
    plugin.after_internal_state(output, scheduler, None)
    assert output.internal_state["theirs"] == 1
    return Status.unpack(output.internal_state[CHANNEL])


@pytest.fixture
def served(capture: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Capture:
    monkeypatch.setattr(plugin, "_in_place", lambda: True)
    monkeypatch.setattr(plugin, "read_settings", Settings)
    capture._shared = SharedFiles(tmp_path)
    return capture


def test_a_server_says_what_it_is(served: Capture) -> None:
    reqs = [Req(MEAN), Req(MEAN)]
    for req in reqs:
        served.open(req)
    kept(served, 10, 20)
    assert served.sums.bytes > 0
    assert status_of(scheduler_of()) == Status(
        vocab_size=96,
        hidden_size=8,
        num_layers=4,
        context_length=64,
        layers=(-1,),
        because="",
        normed=True,
        shared=served.shared.sign,
        open_pools=2,
        prefix_bytes=served.sums.bytes,
        constraints=known_constraints(),
        raw_log_probs=False,
        image_token_id=None,
    )


def with_settings(**changes: Any) -> Callable[[Capture, pytest.MonkeyPatch], None]:
    return lambda capture, patch: patch.setattr(plugin, "read_settings", lambda: Settings(**changes))


def test_a_server_says_which_layers_it_takes(served: Capture) -> None:
    served.taps.layers, served.taps.checked = (0, 2), False
    assert status_of(scheduler_of()).layers is None
    served.taps.checked = True
    assert (status_of(scheduler_of()).layers, status_of(scheduler_of()).because) == ((0, 2, -1), "")
    served.taps.limit = "the graphs record some"
    found = status_of(scheduler_of())
    assert (found.layers, found.because) == ((0, 2, -1), "the graphs record some")
    served.taps.problem = "Gemma 9 is another"
    assert (status_of(scheduler_of()).layers, status_of(scheduler_of()).because) == ((-1,), "Gemma 9 is another")
    refused = status_of(scheduler_of(enable_pdmux=True))
    assert (refused.layers, refused.because) == ((), "--enable-pdmux splits the forward pass")


@pytest.mark.parametrize(
    ("scheduler", "spoil", "words"),
    [
        ({}, lambda capture, patch: patch.setattr(plugin, "_in_place", lambda: False), "a hook .* is not in place"),
        ({}, with_settings(full_states=False), "without --enable-return-hidden-states"),
        ({}, with_settings(packed_states=True), "--enable-return-aux-hidden-states packs .*; start the server without"),
        ({}, lambda capture, patch: setattr(capture, "on", False), r"pipeline stages \(pp_size > 1\)"),
        ({}, lambda capture, patch: plugin.after_states_to_store(None, None, 1, 2), "from before the final norm"),
        ({"spec_algorithm": SimpleNamespace(is_none=lambda: False)}, None, "speculative decoding"),
        ({"disaggregation_mode": SimpleNamespace(value="prefill")}, None, "disaggregated"),
        ({"enable_pdmux": True}, None, "--enable-pdmux"),
        ({}, with_settings(diffuses=True), "diffusion"),
    ],
)
def test_a_server_that_takes_no_states_says_why(
    served: Capture,
    monkeypatch: pytest.MonkeyPatch,
    scheduler: dict[str, Any],
    spoil: Callable[[Capture, pytest.MonkeyPatch], Any] | None,
    words: str,
) -> None:
    if spoil is not None:
        spoil(served, monkeypatch)
    status = status_of(scheduler_of(**scheduler))
    assert status.layers == ()
    assert re.search(words, status.because)
    assert status.normed is ("norm" not in words)


def test_states_after_the_norm_only_are_as_they_should_be(capture: Capture) -> None:
    plugin.after_states_to_store(None, None, torch.zeros(1), None)
    assert capture.normed


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("", False),
        ("import nothing_of_this_name", False),
        ("this is no python", False),
        ("raise RuntimeError('at import')", False),
        ("class A(LogitConstraint, name='action_mask'): pass", False),
        ("class A(LogitConstraint, name='plugin_mine'): pass", True),
    ],
)
def test_constraints_of_the_users_own(
    registered: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, known: bool
) -> None:
    """What they raise is logged. The server half is there all the same, and says which constraints it has."""
    (tmp_path / "my_constraints.py").write_text(
        f"from torchrl_sglang_hidden.spec.constraints import LogitConstraint\n{source}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    monkeypatch.delitem(sys.modules, "my_constraints", raising=False)
    monkeypatch.setenv(CONSTRAINTS_ENV, "my_constraints,,no.such.module")
    plugin.register()
    assert len(registered) >= 14
    assert ("plugin_mine" in known_constraints()) is known
    monkeypatch.delitem(sys.modules, "my_constraints", raising=False)
