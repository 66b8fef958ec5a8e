"""Which layers a server can give: the settings that rule some out, and what its decode graphs record."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from torchrl_sglang_hidden.protocol import LAYERS_ENV
from torchrl_sglang_hidden.server.layer_setup import RECORD_BYTES, attach_taps, layers_to_record
from torchrl_sglang_hidden.server.layer_taps import LayerTaps
from torchrl_sglang_hidden.server.settings import Settings

GRAPHS = {"graphs": "cuda", "decode_graph_rows": 16}
CHOSEN = "its CUDA graphs record the chosen layers alone; choose others at its start, with launch(layers=…) or `serve "


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(4))
        self.norm = nn.Identity()


def attached(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> tuple[LayerTaps, Model]:
    taps, model = LayerTaps(), Model()
    config = SimpleNamespace(num_hidden_layers=4, hidden_size=8)
    runner = SimpleNamespace(model=model, model_config=config, dtype=dtype, device="cpu")
    attach_taps(taps, runner, Settings(**settings))
    return taps, model


@pytest.fixture(autouse=True)
def _nobody_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAYERS_ENV, raising=False)


@pytest.mark.parametrize("asked", [None, "1,-1", "-1", "all", "99", "x"])
def test_without_graphs_every_layer_can_be_asked_for(asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the server was started for: nothing is recorded, and nothing is read."""
    if asked is not None:
        monkeypatch.setenv(LAYERS_ENV, asked)
    taps, model = attached()
    assert (taps.checked, taps.problem, taps.graphs, taps.limit) == (False, "", None, "")
    assert any(layer._forward_hooks for layer in model.layers), "those of the check"


def test_graphs_record_every_layer_where_nobody_chose() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        taps, _ = attached(dtype, **GRAPHS)
        assert taps.graphs is not None
        assert (taps.graphs.layers, taps.limit) == ((0, 1, 2, 3), "")
        states = taps.graphs.states(16)
        assert {(state_ND.shape, state_ND.dtype) for state_ND in states.values()} == {((16, 8), dtype)}
        assert list(states) == [0, 1, 2, 3]
        assert taps.graphs.states(17) == {}, "room for the largest graph, and no more"


@pytest.mark.parametrize(
    ("asked", "layers"), [("-2,1,1", (1, 2)), ("-1", ()), ("3", (3,)), ("0,1,2,3,-1", (0, 1, 2, 3))]
)
def test_graphs_record_the_chosen_layers(asked: str, layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By their canonical ids; and also with tensor parallelism, and where they are large."""
    monkeypatch.setenv(LAYERS_ENV, asked)
    taps, _ = attached(tensor_ranks=2, **GRAPHS)
    assert taps.graphs is not None
    assert taps.graphs.layers == layers
    assert taps.limit.startswith("" if len(layers) == 4 else CHOSEN)
    assert bool(taps.limit) is (len(layers) < 4)
    found, _ = layers_to_record(asked, 4, RECORD_BYTES, Settings())
    assert tuple(found) == layers


def test_all_layers_are_recorded_where_they_are_cheap() -> None:
    def chosen(num_layers: int, rows: int, hidden_size: int, **settings: Any) -> tuple[int, str]:
        layers, limit = layers_to_record("all", num_layers, rows * hidden_size * 2, Settings(**settings))
        return len(layers), limit

    assert chosen(36, 256, 4096) == (36, "")
    assert chosen(80, 512, 8192) == (80, "")
    assert chosen(36, 256, 4096, tensor_ranks=2) == (0, f"with tensor parallelism {CHOSEN}--layers`")
    number, limit = chosen(80, 1024, 8192)
    assert number == 0
    assert limit.startswith("recording all 80 layers would take 1280 MiB, over the limit of 1024 MiB, so that ")


@pytest.mark.parametrize(("asked", "words"), [("4", "the model has 4 layers"), ("x", "invalid literal"), ("", "")])
def test_layers_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, asked: str, words: str) -> None:
    """They come from the environment of a server that was started by hand. It serves its last layer, and says why."""
    monkeypatch.setenv(LAYERS_ENV, asked)
    taps, model = attached(**GRAPHS)
    assert (taps.layers, taps.checked) == ((), True)
    assert taps.problem.startswith(f"{LAYERS_ENV}={asked}: ")
    assert words in taps.problem
    assert all(not layer._forward_hooks for layer in model.layers)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"two_batches": True}, "--enable-two-batch-overlap runs the layers in parts; start the server without it"),
        ({"compiles": True}, "--enable-torch-compile compiles the layers, .*; start the server without it"),
        ({"splits_attention": True}, "data-parallel attention .*; start the server without --enable-dp-attention"),
        ({"graphs": "npu", "decode_graph_rows": 4}, "graphs of npu devices .*; start the server with --disable-cuda"),
    ],
)
@pytest.mark.parametrize("graphs", [{}, GRAPHS])
def test_servers_that_give_the_last_layer_alone(settings: dict[str, Any], words: str, graphs: dict[str, Any]) -> None:
    """No hook is left on the layers: a compiled model would break at it, and ranks would wait for each other."""
    taps, model = attached(**{**graphs, **settings})
    assert (taps.layers, taps.checked, taps.taking) == ((), True, False)
    assert re.search(words, taps.problem)
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in model.layers)


def test_a_compiled_model_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a break in its graph, nor anything left to compile while a CUDA graph is captured."""
    compiled: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(len(module.graph.nodes))
        return module.forward

    class Chain(Model):
        def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x_ND = layer(x_ND) + 1
            return self.norm(x_ND)

    def frames(**settings: Any) -> int:
        torch._dynamo.reset()
        compiled.clear()
        taps, model = LayerTaps(), Chain()
        config = SimpleNamespace(num_hidden_layers=4, hidden_size=8)
        runner = SimpleNamespace(model=model, model_config=config, dtype=torch.float32, device="cpu")
        attach_taps(taps, runner, Settings(**settings))
        forward = torch.compile(model.forward, backend=backend)
        for layers in ((), (1,), (0, 2)):
            taps.open(layers)
            forward(torch.ones(3, 8))
            taps.take()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            taps.start_recording(3)
            forward(torch.ones(3, 8))
        return len(compiled)

    assert frames(compiles=True) == 1
    assert frames() > 1, "with hooks it would not: this test sees breaks"
