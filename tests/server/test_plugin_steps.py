"""What the plugin's hooks do around one forward step: logits, constraints and layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_graphs import FakeGraph
from helpers.sglang_stand_ins import Req
from torch import nn

from torchrl_sglang_hidden.protocol import LAYERS_ENV
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.server import plugin
from torchrl_sglang_hidden.server.capture import Capture
from torchrl_sglang_hidden.server.settings import Settings
from torchrl_sglang_hidden.spec.constraints import DisallowedTokens, TemperatureScale
from torchrl_sglang_hidden.spec.logits import LogitsSpec


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


def runner(is_draft_worker: bool = False) -> Any:
    return SimpleNamespace(
        model=Model(),
        model_config=SimpleNamespace(num_hidden_layers=4, vocab_size=VOCAB, hidden_size=3),
        is_draft_worker=is_draft_worker,
        dtype=torch.float32,
        device="cpu",
    )


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets how the server runs; at first on a CPU, without graphs."""

    def set_to(**changes: Any) -> None:
        monkeypatch.setattr(plugin, "read_settings", lambda: Settings(**changes))

    set_to()
    return set_to


@pytest.fixture
def auxiliary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace SGLang's list of auxiliary outputs; importing the real one takes seconds."""
    outputs, logits = "sglang.srt.managers.auxiliary_output", "sglang.srt.layers.logits_processor"
    for name in ("sglang", "sglang.srt", "sglang.srt.managers", outputs, "sglang.srt.layers", logits):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[outputs].append_auxiliary_output = lambda given, more: [*(given or []), *([more] if more else [])]
    sys.modules[logits].LogitsMetadata = type(
        "LogitsMetadata", (), {"from_forward_batch": staticmethod(lambda batch: ("metadata of", batch))}
    )


VOCAB, NUM_ROWS = 7, 5
HEAD_DV = torch.randn(3, VOCAB + 2, generator=torch.Generator().manual_seed(0))


class Processor:
    """SGLang's logits processor, as much of it as is called: logits of the last positions alone."""

    def __init__(self, batch: Any, parallel: bool = False, head: Any = "head") -> None:
        self.batch, self.head, self.do_tensor_parallel_all_gather_dp_attn = batch, head, parallel
        self.asked: list[int] = []
        self.do_tensor_parallel_all_gather = parallel

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
    """Run one forward step, hook by hook, and return what goes to the host with its results."""
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
    return [isolated.output for isolated in output.auxiliary_device_output or []]


def sampling_of(batch: Any, greedy: bool = False) -> Any:
    return SimpleNamespace(temperatures=torch.full((len(batch.reqs), 1), 2.0), is_all_greedy=greedy)


def batch_of(*reqs: Req) -> Any:
    lengths = [len(req.origin_input_ids) for req in reqs]
    mode = SimpleNamespace(name="EXTEND")
    return SimpleNamespace(forward_mode=mode, reqs=list(reqs), extend_lens=lengths, prefix_lens=[0] * len(reqs))


def states_of_step() -> torch.Tensor:
    return Model()(torch.arange(float(NUM_ROWS))[:, None].expand(NUM_ROWS, 3))


def stock_logits(batch: Any) -> torch.Tensor:
    """Return what SGLang's sampler sees where nobody asks for anything."""
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
    assert processor.asked == [3], "one call of the head for both"
    raw_NV = Model()(torch.arange(float(NUM_ROWS))[:, None].expand(NUM_ROWS, 3)) @ HEAD_DV[:, :VOCAB]
    assert [group.batch_rows for group in found.sampled] == [(0,), (1,)]
    torch.testing.assert_close(found.sampled[0].logits.values_NC, raw_NV[1:2])
    torch.testing.assert_close(found.sampled[1].logits.values_NC, (raw_NV[4:] + 1) / 2)
    ((place, raw), (other, processed)) = found.prompts[0].columns
    assert (place, other) == ((0,), (1,))
    torch.testing.assert_close(raw.values_NC, raw_NV[:1])
    torch.testing.assert_close(processed.values_NC, raw_NV[2:4])
    assert [one.produced_NKD.shape for one in rows.groups] == [(1, 1, 3)]


@pytest.mark.usefixtures("auxiliary", "capture")
def test_a_head_that_is_a_collective_is_asked_for_nothing_more() -> None:
    """Ranks that have no such rows would wait for ever. The short count of rows tells the client."""
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
    assert [group.batch_rows for group in found.sampled] == ([(1,)] if scored else [(0, 1)])
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


@pytest.mark.usefixtures("auxiliary")
def test_a_step_takes_the_layers_that_are_asked_for(capture: Capture) -> None:
    model_runner = runner()
    plugin.after_load_model(None, model_runner)
    assert (capture.taps.layers, capture.taps.checked) == ((), False)
    assert run_step(model_runner, batch_of(Req(None, 5))) == []
    assert (capture.taps.checked, capture.taps.problem) == (True, ""), "the first step shows it, whoever asked"
    assert capture.taps.layers == (0, 1, 2, 3)
    asked = Req(Wanted(("response",), layers=(2, 0, -1)), 3)
    (rows,) = run_step(model_runner, batch_of(Req(None, 2), asked))
    assert rows.groups[0].produced_NKD[0, :, 0].tolist() == [4 + 3.0, 4 + 1.0, 4 + 4.0]
    assert capture.taps.take() == {}, "nothing of a step stays"


def test_slots_are_reserved_when_the_model_is_loaded(capture: Capture) -> None:
    """SGLang sizes its KV cache behind that, and counts what is taken."""
    plugin.after_load_model(None, runner(is_draft_worker=True))
    assert capture._slots == {}
    plugin.after_load_model(None, runner())
    (slots,) = capture._slots.values()
    assert (slots.layers, slots.device_bytes) == ((-1,), plugin.RESERVED_SLOTS * 3 * 4)


@pytest.mark.usefixtures("auxiliary")
def test_a_step_of_the_last_layer(capture: Capture) -> None:
    model_runner = runner()
    (rows,) = run_step(model_runner, batch_of(Req(Wanted(("response",)), 5)))
    assert rows.groups[0].produced_NKD[..., 0].tolist() == [[8.0]]
    assert run_step(model_runner, batch_of(Req(Wanted(("response",)), 5)), token_indices=[4]) == []


@pytest.mark.usefixtures("auxiliary")
def test_a_draft_model_is_left_alone(capture: Capture) -> None:
    plugin.after_load_model(None, runner())
    hooked, draft = capture.taps, runner(is_draft_worker=True)
    plugin.after_load_model(None, draft)
    assert all(not layer._forward_hooks for layer in draft.model.layers)
    assert (capture.taps is hooked, hooked.checked) == (True, False)
    assert run_step(draft, batch_of(Req(Wanted(("response",)), 5))) == []
    assert len(capture.opened) == 0


def decode_of(*reqs: Req) -> Any:
    return SimpleNamespace(forward_mode=SimpleNamespace(name="DECODE"), reqs=list(reqs))


def test_a_decode_that_nobody_asked_anything_of_is_not_planned(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[str] = []
    monkeypatch.setattr(capture, "plan_step", lambda *args: planned.append("states"))
    monkeypatch.setattr(plugin, "plan_logits", lambda *args: planned.append("logits"))
    forward_batch = SimpleNamespace()
    batch = decode_of(Req(None, 5))
    plugin.after_forward_batch(forward_batch, object, batch, runner())
    assert planned == []
    nothing = {plugin._PLAN: None, plugin._STEP_LOGITS: None}
    assert vars(forward_batch) == {plugin.REQUESTS: tuple(batch.reqs), **nothing}
    asked = Req(Wanted(("response",)), 5)
    capture.open(asked)
    plugin.after_forward_batch(forward_batch, object, decode_of(asked), runner())
    plugin.after_forward_batch(forward_batch, object, batch_of(Req(None, 5)), runner())
    assert planned == ["states", "logits"] * 2


# --- decode graphs ----------------------------------------------------------------------------------------------------


def graph_runner(model_runner: Any, width: int = 1) -> Any:
    return SimpleNamespace(model_runner=model_runner, captured_req_width=width)


def capture_graphs(model_runner: Any, *sizes: int) -> tuple[torch.Tensor, dict[int, FakeGraph]]:
    """Capture decode graphs as SGLang does, and return what they read, and the graphs."""
    inputs_ND, graphs = torch.zeros(max(sizes), 3), {size: FakeGraph() for size in sizes}

    def capture_one_shape(given: Any, size: int, forward: Any, stream_idx: Any = None) -> str:
        assert (forward, stream_idx) == ("forward", 7)
        for run in (lambda f: f(), lambda f: f(), graphs[size].capture):
            run(lambda: model_runner.model(inputs_ND[:size]))
        return "captured"

    for size in sizes:
        given = plugin.around_capture(capture_one_shape, graph_runner(model_runner), size, "forward", stream_idx=7)
        assert given == "captured"
    return inputs_ND, graphs


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch, settings: Callable[..., None]) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    settings(graphs="cuda", decode_graph_rows=8)


@pytest.mark.usefixtures("auxiliary", "on_device")
def test_a_replayed_step_brings_the_layers_that_its_graph_wrote(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAYERS_ENV, "2,0,-1")
    model_runner = runner()
    plugin.after_load_model(None, model_runner)
    inputs_ND, graphs = capture_graphs(model_runner, 8, 4)
    run_step(model_runner, batch_of(Req(None, 5)))
    assert (capture.taps.problem, capture.taps.layers) == ("", (0, 2))
    asked = Req(Wanted(("response",), layers=(2, 0, -1)), 3)
    run_step(model_runner, batch_of(Req(None, 2), asked))
    forward_batch, batch = SimpleNamespace(), decode_of(Req(None, 2), asked, Req(None, 1))
    batch.seq_lens_cpu = torch.tensor([3, 4, 2])
    for start in (10.0, 20.0):
        plugin.after_forward_batch(forward_batch, object, batch, model_runner)

        def forward(runner: Any, given: Any, start: float = start) -> None:
            inputs_ND[:3] = start + torch.arange(3.0)[:, None]
            plugin.around_replay(lambda given, *args: graphs[4].replay(), graph_runner(runner), given, 1)

        plugin.around_forward(forward, model_runner, forward_batch)
        states = getattr(forward_batch, plugin._STATES)
        assert {layer: state_ND[:, 0].tolist() for layer, state_ND in states.items()} == {
            layer: [start + row + layer + 1 for row in range(3)] for layer in (0, 2)
        }
        gathered: list[Any] = []
        setattr(forward_batch, plugin._PLAN, SimpleNamespace(gather=gathered.append))
        output = SimpleNamespace(
            hidden_states=inputs_ND[:3], hidden_states_token_indices=None, auxiliary_device_output=None
        )
        forward_batch.sampling_info = sampling_of(batch)
        plugin.around_sample(lambda *args: "ids", model_runner, output, forward_batch)
        assert set(gathered[0]) == {0, 2, -1}
        assert -1 not in states, "what a graph wrote is read again in the next step"


@pytest.mark.usefixtures("on_device")
def test_a_prefill_that_takes_layers_has_no_graph(capture: Capture) -> None:
    """It would run no hook, and its graph records nothing. Nor has one that is to check the layers."""
    model_runner = runner()
    plugin.after_load_model(None, model_runner)
    can_run, draft = graph_runner(model_runner), graph_runner(runner(is_draft_worker=True))

    def asked(given: Any = can_run) -> bool:
        found: bool = plugin.around_can_prefill(lambda runner, batch: batch == "batch", given, "batch")
        return found

    plugin.after_forward_batch(SimpleNamespace(), object, batch_of(Req(None, 5)), model_runner)
    assert (asked(), asked(draft)) == (False, True), "the layers are not checked"
    capture.taps._finish_check()
    for wanted, found in ((None, True), (Wanted(("response",)), True), (Wanted(("response",), layers=(1, -1)), False)):
        plugin.after_forward_batch(SimpleNamespace(), object, batch_of(Req(wanted, 5)), model_runner)
        assert (asked(), asked(draft)) == (found, True)


@pytest.mark.usefixtures("on_device")
def test_graphs_of_a_draft_model_record_nothing(capture: Capture) -> None:
    plugin.after_load_model(None, runner())
    draft = runner(is_draft_worker=True)
    assert plugin.around_capture(lambda *args: capture.taps.taking, graph_runner(draft), 4, "forward") is False
    plugin.around_replay(lambda *args: None, graph_runner(draft))
    assert not capture.taps._replayed


@pytest.mark.usefixtures("on_device")
def test_a_capture_that_fails_leaves_no_recording(capture: Capture) -> None:
    """SGLang's error is the one to see."""

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    plugin.after_load_model(None, runner())
    with pytest.raises(RuntimeError, match="out of memory"):
        plugin.around_capture(fail, graph_runner(runner()), 4, "forward")
    assert "the CUDA graph of 4 rows does not write layer 0" in capture.taps.problem
    assert not capture.taps.taking
