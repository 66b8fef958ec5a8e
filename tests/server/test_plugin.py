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
from torch import nn

from torchrl_sglang_hidden.protocol import CHANNEL, CONSTRAINTS_ENV, LAYERS_ENV, PLUGIN_ENV, Status, pack_options
from torchrl_sglang_hidden.protocol.shared_memory import SharedFiles
from torchrl_sglang_hidden.reduce.pooling import BLOCK, Wanted
from torchrl_sglang_hidden.reduce.token_logits import WantedLogits
from torchrl_sglang_hidden.server import plugin
from torchrl_sglang_hidden.server.capture import Capture
from torchrl_sglang_hidden.spec.constraints import DisallowedTokens, TemperatureScale, base, known_constraints
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import PromptSpan


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was registered with SGLang's registry. Importing the real one takes seconds and a CUDA wheel."""
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
    assert len({target for target, _, _ in registered}) == len(registered) >= 14


def test_it_stays_off_in_another_sglang(registered: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    sys.modules["sglang"].__version__ = "0.6.0"
    plugin.register()
    assert registered == []
    assert "written for SGLang 0.5.23 and this is 0.6.0; it stays off" in caplog.text


def test_sglang_finds_it() -> None:
    (entry,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="torchrl_sglang_hidden")
    assert entry.value == "torchrl_sglang_hidden.server.plugin:register"


class Req:
    """SGLang's request, as much of it as is read."""

    def __init__(self, wanted: Wanted | None = None, length: int = 200, logits: WantedLogits | None = None) -> None:
        wanted = Wanted((), None) if wanted is None and logits is not None else wanted
        custom = {CHANNEL: pack_options(wanted, "text", logits)} if wanted is not None else None
        self.sampling_params = SimpleNamespace(custom_params=custom, max_new_tokens=9)
        self.origin_input_ids = list(range(length))
        self.output_ids: list[int] = []
        self.extra_key = None
        self.session: Any = None
        self.multimodal_inputs: Any = None
        self.prefix_len = self.host_hit_length = 0

    def finished(self) -> bool:
        return False


class Streamer:
    """SGLang's output streamer, as much of it as is subclassed."""

    def is_request_level_customized_info_key(self, key: str) -> bool:
        return key == "theirs"

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
        return {"theirs": [1 for _ in reqs]}


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """The plugin's, of this test alone."""
    capture = Capture()
    monkeypatch.setattr(plugin, "_capture", capture)
    return capture


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

    answers = {"asked": ["answer"], "quiet": []}
    monkeypatch.setattr(capture, "answer", answers.get)
    found = streamer.build_additional_customized_info(["quiet", "asked"])
    assert found == {"theirs": [1, 1], CHANNEL: [[], ["answer"]]}
    assert streamer.build_additional_customized_info(["quiet"]) == {"theirs": [1]}


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
    """Sums over the beginnings of `Req`'s ids."""
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


def test_images_match_once_and_nothing(capture: Capture) -> None:
    """SGLang moves a retracted request's image positions at every match."""
    kept(capture, 150)
    req, cache = Req(MEAN), Cache()
    req.multimodal_inputs = object()
    plugin.around_match_prefix(cache.match, req, cache)
    assert cache.limits == [0]


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
    one.pools.add_prompt(step, [torch.zeros(1, 4)] * len(step.groups), None)
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


def test_layers_that_run_in_parts_are_not_tapped(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAYERS_ENV, "1,-1")
    plugin.after_load_model(None, runner(enable_two_batch_overlap=True))
    assert "two-batch-overlap" in capture.taps.problem
    assert capture.taps.layers == ()


def test_each_match_begins_with_what_has_arrived(capture: Capture) -> None:
    """A chunk that was planned and never ran is planned again; positions that came need no sum."""
    kept(capture, 150)
    req, cache = Req(MEAN), Cache(50)
    one = capture.open(req)
    for start, stop in ((0, 30), (30, 200)):
        step = one.pools.plan_prompt(start, stop)
        if stop == 30:
            one.pools.add_prompt(step, [torch.zeros(1, 4)], None)
    plugin.around_match_prefix(cache.match, req, cache)
    assert (cache.limits, req.prefix_len) == ([150, 30], 30)
    assert one.pools.plan_prompt(30, 200).begin == 30


def test_a_retracted_request_hits_all_of_its_own(capture: Capture) -> None:
    req, cache = Req(MEAN, length=4), Cache()
    one = capture.open(req)
    one.pools.add_prompt(one.pools.plan_prompt(0, 4), [torch.zeros(1, 4)] * 2, None)
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


# --- a step -----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        return x_ND + 1


class Model(nn.Module):
    """Four layers that add one, and a norm that doubles."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.norm = nn.Identity()

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_ND = layer(x_ND)
        return self.norm(x_ND)


def runner(is_draft_worker: bool = False, **args: Any) -> Any:
    sizes = {"chunked_prefill_size": 64, "max_prefill_tokens": None, "max_running_requests": 9}
    return SimpleNamespace(
        model=Model(),
        model_config=SimpleNamespace(num_hidden_layers=4, vocab_size=VOCAB),
        is_draft_worker=is_draft_worker,
        server_args=SimpleNamespace(**{**sizes, **args}),
    )


@pytest.fixture
def auxiliary(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's list of auxiliary outputs; importing the real one takes seconds."""
    outputs, logits = "sglang.srt.managers.auxiliary_output", "sglang.srt.layers.logits_processor"
    for name in ("sglang", "sglang.srt", "sglang.srt.managers", outputs, "sglang.srt.layers", logits):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[outputs].append_auxiliary_output = lambda given, more: [*(given or []), *([more] if more else [])]
    sys.modules[logits].LogitsMetadata = SimpleNamespace(from_forward_batch=lambda batch: ("metadata of", batch))


VOCAB, NUM_ROWS = 7, 5
HEAD_DV = torch.randn(3, VOCAB + 2, generator=torch.Generator().manual_seed(0))


class Processor:
    """SGLang's logits processor, as much of it as is called: logits of the last positions alone."""

    def __init__(self, batch: Any, parallel: bool = False, head: Any = "head") -> None:
        self.batch, self.head, self.do_tensor_parallel_all_gather_dp_attn = batch, head, parallel
        self.asked: list[int] = []

    def _get_logits(self, rows_ND: torch.Tensor, lm_head: Any, metadata: Any, use_logits_buffer: bool) -> torch.Tensor:
        assert (lm_head, metadata, use_logits_buffer) == (self.head, ("metadata of", "a copy"), False)
        self.asked.append(len(rows_ND))
        return rows_ND @ HEAD_DV

    def forward(self, ids: Any, states_ND: torch.Tensor, lm_head: Any, metadata: Any, *more: Any) -> torch.Tensor:
        assert (ids, lm_head, metadata, more) == ("ids", self.head, "a copy", ("more",))
        ends = torch.tensor(self.batch.extend_lens).cumsum(0) - 1
        return states_ND[ends] @ HEAD_DV


def run_step(
    model_runner: Any,
    batch: Any,
    token_indices: Any = None,
    sampling_info: Any = None,
    processor: Processor | None = None,
    fails: bool = False,
) -> list[Any]:
    """One forward step, hook by hook; what goes to the host with its results."""
    sampling_info = sampling_info or sampling_of(batch)
    forward_batch = SimpleNamespace(input_ids=torch.arange(NUM_ROWS), sampling_info=sampling_info)
    plugin.after_forward_batch(forward_batch, object, batch, model_runner)
    processor = processor or Processor(batch)

    def forward(runner: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        assert (runner, given, args, kwargs) == (model_runner, forward_batch, (1,), {"two": 2})
        if fails:
            raise RuntimeError("out of memory")
        states_ND = model_runner.model(torch.arange(float(NUM_ROWS))[:, None].expand(NUM_ROWS, 3).clone())
        # SGLang hands the model a copy of its batch.
        original = type(processor).forward
        logits_BV = plugin.around_logits(original, processor, "ids", states_ND, processor.head, "a copy", "more")
        return SimpleNamespace(
            hidden_states=states_ND,
            hidden_states_token_indices=token_indices,
            auxiliary_device_output=None,
            next_token_logits=logits_BV,
        )

    def sample(runner: Any, logits_output: Any, given: Any) -> torch.Tensor:
        assert (runner, given) == (model_runner, forward_batch)
        logits_BV = logits_output.next_token_logits
        logits_BV += 1  # a penalty
        assert plugin.after_preprocess(logits_BV, None, logits_BV, sampling_info) is None
        return logits_BV.argmax(-1)

    output = plugin.around_forward(forward, model_runner, forward_batch, 1, two=2)
    assert plugin._capture.running is None
    token_ids = plugin.around_sample(sample, model_runner, output, forward_batch)
    assert torch.equal(token_ids, output.next_token_logits.argmax(-1)), "those that SGLang sampled"
    batch.logits_BV = output.next_token_logits
    return output.auxiliary_device_output or []


def sampling_of(batch: Any, greedy: bool = False) -> Any:
    return SimpleNamespace(temperatures=torch.full((len(batch.reqs), 1), 2.0), is_all_greedy=greedy)


def batch_of(*reqs: Req) -> Any:
    lengths = [len(req.origin_input_ids) for req in reqs]
    mode = SimpleNamespace(name="EXTEND")
    return SimpleNamespace(forward_mode=mode, reqs=list(reqs), extend_lens=lengths, prefix_lens=[0] * len(reqs))


def states_of_step() -> torch.Tensor:
    return Model()(torch.arange(float(NUM_ROWS))[:, None].expand(NUM_ROWS, 3))


def stock_logits(batch: Any) -> torch.Tensor:
    """What SGLang's sampler sees where nobody asks for anything."""
    return Processor(batch).forward("ids", states_of_step(), "head", "a copy", "more") + 1


DENY = WantedLogits(constraints=(DisallowedTokens((2,)),))


@pytest.mark.usefixtures("auxiliary", "capture")
def test_requests_that_ask_for_nothing_keep_their_logits() -> None:
    """Alone, beside one that wants states, and beside one that wants logits and constraints."""
    quiet = batch_of(Req(None, 2), Req(None, 3))
    assert run_step(runner(), quiet) == []
    assert torch.equal(quiet.logits_BV, stock_logits(quiet))
    states = batch_of(Req(None, 2), Req(Wanted(("response",)), 3))
    assert len(run_step(runner(), states)) == 1
    assert torch.equal(states.logits_BV, stock_logits(states))
    masked = batch_of(Req(None, 2), Req(None, 2, DENY), Req(None, 1))
    assert len(run_step(runner(), masked)) == 1
    expected_BV = stock_logits(masked)
    assert torch.equal(masked.logits_BV[[0, 2]], expected_BV[[0, 2]])
    expected_BV[1, [2, VOCAB, VOCAB + 1]] = float("-inf")
    assert torch.equal(masked.logits_BV[1], expected_BV[1])


@pytest.mark.usefixtures("auxiliary", "capture")
def test_what_an_earlier_step_chose_is_cleared() -> None:
    """Without overlap scheduling SGLang keeps the sampling info from step to step."""
    asked, quiet = batch_of(Req(None, 3, DENY), Req(None, 2)), batch_of(Req(None, 3), Req(None, 2))
    sampling_info, model_runner = sampling_of(asked), runner()
    run_step(model_runner, asked, sampling_info=sampling_info)
    assert asked.logits_BV[0, 2] == float("-inf")
    assert getattr(sampling_info, plugin._STEP_LOGITS) is not None
    assert run_step(model_runner, quiet, sampling_info=sampling_info) == []
    assert torch.equal(quiet.logits_BV, stock_logits(quiet))
    assert getattr(sampling_info, plugin._STEP_LOGITS) is None


@pytest.mark.usefixtures("auxiliary", "capture")
def test_a_step_takes_logits_of_prompt_and_response() -> None:
    logits = [
        WantedLogits(LogitsSpec(full=True, segments=("full",), stage=s), prompt_from=1) for s in ("raw", "processed")
    ]
    batch = batch_of(Req(Wanted(("response",)), 2, logits[0]), Req(None, 3, logits[1]))
    processor = Processor(batch)
    found, rows = run_step(runner(), batch, processor=processor)
    assert processor.asked == [1, 2]
    raw_NV = Model()(torch.arange(float(NUM_ROWS))[:, None].expand(NUM_ROWS, 3)) @ HEAD_DV[:, :VOCAB]
    assert [group.batch_rows for group in found.sampled] == [(0,), (1,)]
    torch.testing.assert_close(found.sampled[0].logits.values_NC, raw_NV[1:2])
    torch.testing.assert_close(found.sampled[1].logits.values_NC, (raw_NV[4:] + 1) / 2)
    torch.testing.assert_close(found.prompts[0].logits.values_NC, raw_NV[:1])
    torch.testing.assert_close(found.prompts[1].logits.values_NC, raw_NV[2:4])
    assert torch.equal(found.step.input_ids, torch.arange(NUM_ROWS))
    assert rows.values_MD.shape == (1, 3)


@pytest.mark.usefixtures("auxiliary", "capture")
def test_a_head_that_is_a_collective_is_asked_for_nothing_more() -> None:
    """Ranks that have no such rows would wait for ever. The count tells."""
    batch = batch_of(Req(None, 5, WantedLogits(LogitsSpec(full=True, segments=("prompt",)), prompt_from=1)))
    processor = Processor(batch, parallel=True)
    (found,) = run_step(runner(), batch, processor=processor)
    assert (processor.asked, found.prompts) == ([], ())


@pytest.mark.usefixtures("auxiliary")
@pytest.mark.parametrize("scored", [False, True])
def test_a_head_with_adapters_gives_no_logits_of_prompts(capture: Capture, scored: bool) -> None:
    """SGLang applies them by the places of a step's last positions. What is refused is said, and the step runs."""
    constraints = DENY.constraints if scored else ()
    spec = None if scored else LogitsSpec(full=True, segments=("full",))
    asked = Req(None, 3, WantedLogits(spec, constraints, 1, scored, ((1, 2),) if scored else ()))
    watched = Req(None, 2, WantedLogits(LogitsSpec(full=True)))
    head = SimpleNamespace(set_lora=None)
    batch = batch_of(asked, watched)
    processor = Processor(batch, head=head)
    (found,) = run_step(runner(), batch, processor=processor)
    assert (processor.asked, found.prompts) == ([], ())
    assert torch.equal(batch.logits_BV, stock_logits(batch))
    assert [group.batch_rows for group in found.sampled] == ([(1,)] if scored else [(0,), (1,)])
    found = [capture.opened[req].logits.finish() for req in (asked, watched)]
    assert found[0].refused == "the server's LoRA adapters act on the head, which then gives no logits of prompts"
    assert found[1].refused == "", "of its response they are"


@pytest.mark.usefixtures("auxiliary")
def test_a_step_that_fails_leaves_nothing_for_the_next(capture: Capture) -> None:
    batch = batch_of(Req(None, 5, WantedLogits(LogitsSpec(full=True, segments=("prompt",)), prompt_from=1)))
    with pytest.raises(RuntimeError, match="out of memory"):
        run_step(runner(), batch, fails=True)
    assert capture.running is None


@pytest.mark.usefixtures("auxiliary", "capture")
def test_the_temperature_of_a_request_is_divided_by_once() -> None:
    wanted = WantedLogits(LogitsSpec(full=True, stage="processed"), (TemperatureScale(4.0),))
    batch = batch_of(Req(None, 5, wanted))
    (found,) = run_step(runner(), batch)
    expected_1V = stock_logits(batch)[:, :VOCAB] / 4
    torch.testing.assert_close(batch.logits_BV[:, :VOCAB], expected_1V)
    torch.testing.assert_close(found.sampled[0].logits.values_NC, expected_1V / 2)


@pytest.mark.usefixtures("auxiliary", "capture")
def test_a_greedy_batch_is_divided_by_nothing() -> None:
    """So that its processed logits are those of its log-probs. Constraints' own temperatures stay."""
    wanted = WantedLogits(LogitsSpec(full=True, stage="processed"), (TemperatureScale(4.0),))
    batch = batch_of(Req(None, 5, wanted))
    (found,) = run_step(runner(), batch, sampling_info=sampling_of(batch, greedy=True))
    expected_1V = stock_logits(batch)[:, :VOCAB] / 4
    torch.testing.assert_close(batch.logits_BV[:, :VOCAB], expected_1V)
    torch.testing.assert_close(found.sampled[0].logits.values_NC, expected_1V)


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


@pytest.mark.usefixtures("auxiliary")
def test_a_step_takes_the_layers_that_are_asked_for(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAYERS_ENV, "2,0,-1")
    model_runner = runner()
    plugin.after_load_model(None, model_runner)
    assert (capture.taps.layers, capture.taps.checked) == ((0, 2), False)
    assert run_step(model_runner, batch_of(Req(None, 5))) == []
    assert (capture.taps.checked, capture.taps.problem) == (True, ""), "the first step shows it, whoever asked"
    asked = Req(Wanted(("response",), layers=(2, 0, -1)), 3)
    (rows,) = run_step(model_runner, batch_of(Req(None, 2), asked))
    assert rows.values_MD[:, 0].tolist() == [4 + 3.0, 4 + 1.0, 4 + 4.0]
    assert capture.taps.take() == {}, "nothing of a step stays"


@pytest.mark.usefixtures("auxiliary")
def test_a_server_for_the_last_layer_has_no_hooks(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAYERS_ENV, raising=False)
    model_runner = runner()
    plugin.after_load_model(None, model_runner)
    assert all(not layer._forward_hooks for layer in model_runner.model.layers)
    (rows,) = run_step(model_runner, batch_of(Req(Wanted(("response",)), 5)))
    assert rows.values_MD[:, 0].tolist() == [8.0]
    assert run_step(model_runner, batch_of(Req(Wanted(("response",)), 5)), token_indices=[4]) == []


@pytest.mark.usefixtures("auxiliary")
def test_a_draft_model_is_left_alone(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAYERS_ENV, "0")
    plugin.after_load_model(None, runner())
    hooked, draft = capture.taps, runner(is_draft_worker=True)
    plugin.after_load_model(None, draft)
    assert all(not layer._forward_hooks for layer in draft.model.layers)
    assert (capture.taps is hooked, hooked.layers) == (True, (0,))
    assert run_step(draft, batch_of(Req(Wanted(("response",)), 5))) == []
    assert len(capture.opened) == 0


@pytest.mark.parametrize(("asked", "words"), [("4", "the model has 4 layers"), ("x", "invalid literal"), ("", "")])
def test_layers_that_cannot_be_read(capture: Capture, monkeypatch: pytest.MonkeyPatch, asked: str, words: str) -> None:
    """From the environment of a server that was started by hand. It serves its last layer, and says why."""
    monkeypatch.setenv(LAYERS_ENV, asked)
    plugin.after_load_model(None, runner())
    assert (capture.taps.layers, capture.taps.checked) == ((), True)
    assert capture.taps.problem.startswith(f"{LAYERS_ENV}={asked}: ")
    assert words in capture.taps.problem


@pytest.mark.parametrize(("asked", "layers"), [("-2,1,1", (1, 2)), ("-1", ()), ("3", (3,))])
def test_layers_by_their_canonical_ids(
    capture: Capture, monkeypatch: pytest.MonkeyPatch, asked: str, layers: tuple[int, ...]
) -> None:
    monkeypatch.setenv(LAYERS_ENV, asked)
    plugin.after_load_model(None, runner())
    assert capture.taps.layers == layers


# --- status -----------------------------------------------------------------------------------------------------------


def scheduler_of(**changes: Any) -> Any:
    args = SimpleNamespace(enable_return_hidden_states=True, dllm_algorithm=None)
    fields = {
        "server_args": args,
        "model_config": SimpleNamespace(vocab_size=96, hidden_size=8, num_hidden_layers=4, context_len=64),
        "spec_algorithm": SimpleNamespace(is_none=lambda: True),
        "disaggregation_mode": SimpleNamespace(value="null"),
        "enable_pdmux": False,
    }
    for name, value in changes.items():
        if name in vars(args):
            setattr(args, name, value)
        else:
            fields[name] = value
    return SimpleNamespace(**fields)


def status_of(scheduler: Any) -> Status:
    output = SimpleNamespace(internal_state={"theirs": 1})
    plugin.after_internal_state(output, scheduler, None)
    assert output.internal_state["theirs"] == 1
    return Status.unpack(output.internal_state[CHANNEL])


@pytest.fixture
def served(capture: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Capture:
    monkeypatch.setattr(plugin, "_in_place", lambda: True)
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
    )


def test_a_server_says_which_layers_it_takes(served: Capture) -> None:
    served.taps.layers, served.taps.checked = (0, 2), False
    assert status_of(scheduler_of()).layers is None
    served.taps.checked = True
    assert (status_of(scheduler_of()).layers, status_of(scheduler_of()).because) == ((0, 2, -1), "")
    served.taps.problem = "Gemma 9 is another"
    assert (status_of(scheduler_of()).layers, status_of(scheduler_of()).because) == ((-1,), "Gemma 9 is another")
    refused = status_of(scheduler_of(enable_pdmux=True))
    assert (refused.layers, refused.because) == ((), "--enable-pdmux splits the forward pass")


@pytest.mark.parametrize(
    ("scheduler", "spoil", "words"),
    [
        ({}, lambda capture, patch: patch.setattr(plugin, "_in_place", lambda: False), "a hook .* is not in place"),
        ({"enable_return_hidden_states": False}, None, "without --enable-return-hidden-states"),
        ({}, lambda capture, patch: setattr(capture, "on", False), r"pipeline stages \(pp_size > 1\)"),
        ({}, lambda capture, patch: plugin.after_states_to_store(None, None, 1, 2), "from before the final norm"),
        ({"spec_algorithm": SimpleNamespace(is_none=lambda: False)}, None, "speculative decoding"),
        ({"disaggregation_mode": SimpleNamespace(value="prefill")}, None, "disaggregated"),
        ({"enable_pdmux": True}, None, "--enable-pdmux"),
        ({"dllm_algorithm": "x"}, None, "diffusion"),
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
