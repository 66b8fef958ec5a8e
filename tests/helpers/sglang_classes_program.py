"""A program that runs the layer taps against SGLang's own classes, as far as a CPU can import them.

    python sglang_classes_program.py RESULT.json

Importing SGLang changes a process for good. Run by test_sglang_classes.py, which says what the numbers must be.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from helpers.fake_graphs import FakeGraph
from torchrl_sglang_hidden.server import plugin
from torchrl_sglang_hidden.server.cpu import use_cpu_engine
from torchrl_sglang_hidden.server.layer_setup import attach_taps
from torchrl_sglang_hidden.server.layer_taps import LayerTaps
from torchrl_sglang_hidden.server.settings import Settings, read_settings

D, L = 8, 3
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"return_hidden_states_mode": "full"},
    "flag": {"enable_return_hidden_states": True},
    "last": {"return_hidden_states_mode": "last", "enable_return_hidden_states": True},
    "packed": {"enable_return_hidden_states": True, "enable_return_aux_hidden_states": True},
    "compiled": {"enable_torch_compile": True},
    "diffusion": {"dllm_algorithm": "LowConfidence"},
    "two batches": {"enable_two_batch_overlap": True},
    "two ranks": {"tp_size": 2},
    "split attention": {"tp_size": 2, "attn_dp_size": 2},
    "cuda": {"device": "cuda"},
    "cuda, no graphs": {"device": "cuda", "decode_backend": "disabled"},
}


def settings_of(changes: dict[str, Any]) -> dict[str, Any]:
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, with_phase
    from sglang.srt.runtime_context import get_context

    changes = {"device": "cpu", **changes}
    backend = changes.pop("decode_backend", "full")
    config = with_phase(CudaGraphConfig(), "decode", backend=backend, bs=[1, 2, 4, 160])
    with get_context().override_server_args(cuda_graph_config=config, **changes):
        settings = read_settings()
    return {name: getattr(settings, name) for name in Settings.__slots__}


class Layer(nn.Module):
    """Writes to SGLang's own residual stream. What it owes of its output is made by ``owe``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.owe: Callable[[torch.Tensor], Any] = lambda output_ND: output_ND

    def forward(self, hidden: Any, batch: Any) -> Any:
        stream = batch.residual_stream
        # What the layer's own boundary does: complete what came before, and add it to the residual.
        hidden_ND = stream.complete(hidden)
        stream.write(hidden_ND if stream.residual is None else stream.residual + hidden_ND)
        output_ND = torch.full_like(stream.residual, self.number)
        return stream.record(self.owe(output_ND), SimpleNamespace(bind=None, is_plain_add=True))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(number) for number in range(1, L + 1))
        self.norm = nn.Identity()

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        from sglang.srt.layers.layer_boundary.residual.stream import ResidualStream

        batch = SimpleNamespace(residual_stream=ResidualStream())
        hidden: Any = x_ND
        for layer in self.layers:
            hidden = layer(hidden, batch)
        hidden_ND, residual_ND = batch.residual_stream.export(hidden)
        result: torch.Tensor = hidden_ND + residual_ND
        return result


def taps_of(model: Model, **settings: Any) -> LayerTaps:
    taps = LayerTaps()
    config = SimpleNamespace(num_hidden_layers=L, hidden_size=D)
    attach_taps(
        taps,
        SimpleNamespace(model=model, model_config=config, dtype=torch.float32, device="cpu"),
        Settings(**settings),
    )
    return taps


def eager(taps: LayerTaps, model: Model, layers: tuple[int, ...] = ()) -> dict[int, list[float]]:
    taps.open(layers)
    head_ND = model(torch.zeros(4, D))
    states = taps.take(None)
    taps.check(states, head_ND)
    return {layer: state_ND[:, 0].tolist() for layer, state_ND in states.items()}


def collectives(**settings: Any) -> dict[str, Any]:
    """Count the collectives that two data-parallel ranks run in a step in which one of them reads a layer."""
    from sglang.srt.layers.layer_boundary.output import UnreducedOutput

    counts = []
    for layers in ((1,), ()):
        calls: list[int] = []

        def reduce(partial_ND: torch.Tensor, calls: list[int] = calls) -> torch.Tensor:
            calls.append(1)
            return partial_ND * 2

        model = Model()
        for layer in model.layers:
            layer.owe = lambda output_ND, reduce=reduce: UnreducedOutput(output_ND, reduce_to_dp_local=reduce)
        taps = taps_of(model, **settings)
        eager(taps, model)
        calls.clear()
        states = eager(taps, model, layers)
        counts.append(len(calls))
    return {"counts": counts, "layers": taps.layers, "problem": taps.problem, "taken": bool(states)}


def owed_sums() -> dict[str, Any]:
    """Read layers whose output is not reduced yet, eagerly and from a decode graph."""
    from sglang.srt.layers.layer_boundary.output import UnreducedOutput

    model = Model()
    group = SimpleNamespace(all_reduce=lambda partial_ND: partial_ND * 2)
    for layer in model.layers:
        layer.owe = lambda output_ND: UnreducedOutput(output_ND, group=group)
    taps = taps_of(model, graphs="cuda", decode_graph_rows=4)
    replay = record(taps, model, 4)
    eager(taps, model)
    return {"layers": taps.layers, "eager": eager(taps, model, (0, 1, 2)), "replayed": replayed(taps, replay, 3)}


def record(taps: LayerTaps, model: Model, size: int) -> Callable[[], None]:
    """Capture one decode graph through SGLang's own backend, with the hook around its runner; return its replay."""
    from sglang.srt.model_executor.runner.shape_key import ShapeKey
    from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend

    plugin._capture.taps = taps
    inputs_ND, key = torch.zeros(size, D), ShapeKey(size=size)
    backend = FullCudaGraphBackend.__new__(FullCudaGraphBackend)
    runner = SimpleNamespace(model_runner=SimpleNamespace(is_draft_worker=False), captured_req_width=1)
    precarve = SimpleNamespace(measure=contextlib.nullcontext, mint=lambda: None)
    device = SimpleNamespace(synchronize=lambda: None, graph=lambda cuda_graph, pool, stream: cuda_graph.recording())
    vars(backend).update(
        _graphs={}, _outputs={}, _pool=None, _cuda_graph_runner=runner, _device_module=device, _precarve=precarve,
        _tp_group=SimpleNamespace(barrier=lambda: None), _capture_stream=None, _reuse_output_buffer=False,
        _output_buffer=None, _memory_saver_adapter=None,
    )  # fmt: skip
    torch.cuda.CUDAGraph = FakeGraph  # type: ignore[misc]

    def capture_one_shape(given: Any, num_rows: int) -> None:
        backend.capture_one(key, lambda: model(inputs_ND))

    plugin.around_capture(capture_one_shape, runner, size)

    def replay() -> None:
        inputs_ND.fill_(10)
        plugin.around_replay(lambda given: backend.replay(key, None), runner)

    return replay


def replayed(taps: LayerTaps, replay: Callable[[], None], num_rows: int) -> dict[int, list[float]]:
    """Read the layers of a replay of the graph, whose inputs are 10 instead of 0."""
    taps.open(range(L))
    replay()
    return {layer: state_ND[:, 0].tolist() for layer, state_ND in taps.take(num_rows).items()}


def plain_sums() -> dict[str, Any]:
    model = Model()
    taps = taps_of(model, graphs="cuda", decode_graph_rows=4)
    replay = record(taps, model, 4)
    eager(taps, model)
    return {"layers": taps.layers, "eager": eager(taps, model, (0, 1, 2)), "replayed": replayed(taps, replay, 3)}


def deferred_finalize() -> dict[str, Any]:
    """Let decode graphs hand on work that nobody may ask for, as MiniMax-M3's do under tensor parallelism."""
    from sglang.srt.layers.layer_boundary.output import DeferredFinalize

    class Owed(DeferredFinalize, frozen=True):  # type: ignore[misc]
        output_ND: torch.Tensor

        def complete(self) -> torch.Tensor:
            return self.output_ND

    model = Model()
    taps = taps_of(model, graphs="cuda", decode_graph_rows=4)
    record(taps, model, 4)
    model.layers[1].owe = lambda output_ND: Owed(output_ND)
    record(taps, model, 2)
    return {"layers": taps.layers, "problem": taps.problem}


def positions_of(ids: list[int]) -> list[list[int]]:
    """Return where SGLang's Qwen2.5-VL has the rows of ids: 7 begins an image, 8 is a row of it, here of 2 × 3."""
    from sglang.srt.layers.rotary_embedding.mrope_rope_index import get_rope_index

    given = {"image_token_id": 8, "video_token_id": 9, "vision_start_token_id": 7, "model_type": "qwen2_5_vl"}
    found_3BT, _ = get_rope_index(
        2, **given, tokens_per_second=1, input_ids=torch.tensor([ids]), image_grid_thw=torch.tensor([[1, 4, 6]])
    )
    positions: list[list[int]] = found_3BT[:, 0].tolist()
    return positions


def main() -> None:
    use_cpu_engine()
    torch.cuda.is_current_stream_capturing = lambda: False
    results: dict[str, Any] = {"settings": {name: settings_of(changes) for name, changes in SETTINGS.items()}}
    with torch.inference_mode():
        results |= {
            "collectives": collectives(),
            "refused": collectives(splits_attention=True),
            "owed sums": owed_sums(),
            "plain sums": plain_sums(),
            "deferred": deferred_finalize(),
            "positions": [positions_of([before, *[8] * 6, 1]) for before in (7, 1)],
        }
    targets = [target for table in (plugin._BEFORE, plugin._AFTER, plugin._AROUND) for target in table]
    results["missing"] = [target for target in targets if not callable(resolve_name(target))]
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
