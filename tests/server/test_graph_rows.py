"""What decode graphs write of the layers: a recording that is replayed without Python stands in for CUDA's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_graphs import FakeGraph
from torch import nn

from torchrl_sglang_hidden.server import graph_rows
from torchrl_sglang_hidden.server.graph_rows import GraphRows
from torchrl_sglang_hidden.server.layer_taps import LayerTaps

D, L, MAX_ROWS = 8, 4, 6
UNWRITTEN = -7.0


class Stream:
    """SGLang's `ResidualStream` in small, with the fields that a sum without a copy is read from."""

    def __init__(self) -> None:
        self.residual: Any = None
        self.pending: Any = None

    def add(self, hidden_ND: torch.Tensor, output_ND: torch.Tensor, owed: Any) -> None:
        self.residual = hidden_ND if self.residual is None else self.residual + hidden_ND
        self.pending = SimpleNamespace(value=output_ND, owed=owed, update=SimpleNamespace(is_plain_add=True))

    def snapshot(self, output_ND: torch.Tensor) -> torch.Tensor:
        if self.pending.owed == "finalize":
            raise NotImplementedError("a finalize handoff requires main-output capture")
        assert output_ND is self.pending.value
        return self.residual + output_ND


class Layer(nn.Module):
    """Adds its number; ``form`` says how the residual travels."""

    def __init__(self, number: int, form: str) -> None:
        super().__init__()
        self.number, self.form, self.owed = number, form, None

    def forward(self, hidden_ND: torch.Tensor, residual_ND: Any, batch: Any) -> Any:
        if self.form == "tensor":
            return hidden_ND + self.number
        output_ND = torch.full_like(hidden_ND, self.number)
        if self.form == "pair":
            return output_ND, hidden_ND if residual_ND is None else hidden_ND + residual_ND
        batch.residual_stream.add(hidden_ND, output_ND, self.owed)
        return output_ND


class Model(nn.Module):
    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(number, form) for number in range(1, L + 1))
        self.norm = nn.Identity()
        # What a layer makes of its input before it begins.
        self.first: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        batch, residual_ND = SimpleNamespace(residual_stream=Stream()), None
        if self.layers[0].form != "stream":
            batch.residual_stream = None
        for index, layer in enumerate(self.layers):
            if (change := self.first.get(index)) is not None:
                hidden_ND = change(hidden_ND)
                residual_ND = None if residual_ND is None else change(residual_ND)
                if batch.residual_stream is not None:
                    batch.residual_stream.residual = change(batch.residual_stream.residual)
            hidden_ND = layer(hidden_ND, residual_ND, batch)
            if isinstance(hidden_ND, tuple):
                hidden_ND, residual_ND = hidden_ND
        residual_ND = batch.residual_stream.residual if batch.residual_stream else residual_ND
        return hidden_ND if residual_ND is None else hidden_ND + residual_ND


@pytest.fixture(autouse=True)
def _as_with_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch be asked whether it captures, which needs CUDA's driver."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch.inference_mode():
        yield


def truth(x_ND: torch.Tensor, layer: int) -> torch.Tensor:
    return x_ND + sum(range(1, layer + 2))


class Server:
    """A model with taps, and decode graphs of some sizes, captured as SGLang captures them: largest first."""

    def __init__(self, form: str = "tensor", recorded: tuple[int, ...] = (0, 2)) -> None:
        self.model, self.taps = Model(form), LayerTaps()
        self.rows_LND = torch.full((len(recorded), MAX_ROWS, D), UNWRITTEN)
        self.graphs: dict[int, FakeGraph] = {}
        self.inputs_ND = torch.zeros(MAX_ROWS, D)
        self.taps.attach(self.model, L, graphs=GraphRows(recorded, self.rows_LND))

    def capture(self, *sizes: int, captures: bool = True) -> None:
        for size in sizes:
            graph = self.graphs[size] = FakeGraph()
            self.taps.start_recording(size)
            for _ in range(2):
                self.model(self.inputs_ND[:size])
            if captures:
                graph.capture(lambda size=size: self.model(self.inputs_ND[:size]))
            self.taps.stop_recording()

    def check(self) -> None:
        """Run a prefill, which has no graph until the layers are checked."""
        self.taps.open(())
        head_ND = self.model(torch.ones(3, D))
        self.taps.check(self.taps.take(), head_ND)
        assert self.taps.checked

    def decode(self, x_ND: torch.Tensor, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
        size = min(size for size in self.graphs if size >= len(x_ND))
        self.taps.open(layers)
        self.taps.note_replay()
        self.inputs_ND[: len(x_ND)] = x_ND
        self.graphs[size].replay()
        return self.taps.take(len(x_ND))


def rows_of(seed: int, num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", ["tensor", "pair", "stream"])
@pytest.mark.parametrize("recorded", [(0, 2), (3,), (0, 1, 2, 3)])
def test_a_replay_writes_the_recorded_layers(form: str, recorded: tuple[int, ...]) -> None:
    server = Server(form, recorded)
    server.capture(6, 4, 1)
    assert (server.taps.checked, server.taps.layers) == (False, ())
    server.check()
    assert (server.taps.problem, server.taps.layers) == ("", recorded)
    for seed, num_rows in enumerate((6, 3, 4, 1, 5, 3)):
        x_ND = rows_of(seed, num_rows)
        states = server.decode(x_ND, recorded)
        assert list(states) == list(recorded)
        for layer in recorded:
            torch.testing.assert_close(states[layer], truth(x_ND, layer))
            assert states[layer].untyped_storage().data_ptr() == server.rows_LND.untyped_storage().data_ptr()


def test_a_steady_decode_makes_no_views() -> None:
    server = Server()
    server.capture(6)
    server.check()
    first = server.decode(rows_of(0, 3), (0,))
    again = server.decode(rows_of(1, 3), (0,))
    assert again is first
    assert server.decode(rows_of(1, 4), (0,)) is not first


def test_views_of_many_row_counts_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_rows, "_MAX_VIEWS", 2)
    rows = GraphRows((0,), torch.zeros(1, MAX_ROWS, D))
    for num_rows in range(1, MAX_ROWS + 1):
        assert rows.states(num_rows)[0].shape == (num_rows, D)
        assert len(rows._views) <= 2
    assert rows.states(MAX_ROWS + 1) == {}, "no graph has so many rows"


def test_an_eager_step_is_read_from_its_hooks() -> None:
    """Such as a decode of more rows than any graph has, or a prefill."""
    server = Server()
    server.capture(6)
    server.check()
    server.decode(rows_of(0, 3), (0, 2))
    x_ND = rows_of(1, 9)
    server.taps.open((2,))
    assert server.taps.taking, "a prefill's graph would record nothing"
    server.model(x_ND)
    taken = server.taps.take(9)
    assert list(taken) == [2]
    torch.testing.assert_close(taken[2], truth(x_ND, 2))
    assert server.rows_LND[:, 3:].max() < 20


def test_a_graph_of_another_kind_records_nothing() -> None:
    """A prefill's: nothing says that a recording begins."""
    server = Server()
    FakeGraph().capture(lambda: server.model(torch.ones(3, D)))
    assert (server.rows_LND == UNWRITTEN).all()
    server.capture(6)
    server.check()
    server.rows_LND.fill_(UNWRITTEN)
    FakeGraph().capture(lambda: server.model(torch.ones(3, D)))
    assert (server.rows_LND == UNWRITTEN).all()


def test_graphs_are_captured_again_while_the_server_runs() -> None:
    """SGLang does after some updates of weights."""
    server = Server()
    server.capture(6)
    server.check()
    server.capture(6, 2)
    x_ND = rows_of(5, 2)
    torch.testing.assert_close(server.decode(x_ND, (0,))[0], truth(x_ND, 0))
    assert server.taps.layers == (0, 2)


# --- graphs that do not write what would be read ----------------------------------------------------------------------


def assert_refused(server: Server, words: str) -> None:
    taps = server.taps
    assert taps.problem == f"{words}, so that layer ids would not mean what they say"
    assert (taps.checked, taps.layers) == (True, ())
    assert all(not layer._forward_hooks for layer in server.model.layers)
    # It stays, whatever graphs and steps come after.
    server.capture(4)
    assert words in taps.problem
    assert server.decode(rows_of(0, 2), (0,)) == {}


def test_a_layer_that_cannot_be_read_in_a_graph() -> None:
    """MiniMax-M3 under tensor parallelism hands a sum on that nobody may ask for: in decode graphs alone."""
    server = Server("stream")
    server.capture(6)
    server.model.layers[2].owed = "finalize"
    server.capture(4)
    assert_refused(server, "layer 2 returns something else than the residual stream in a CUDA graph")


@pytest.mark.parametrize("form", ["tensor", "pair", "stream"])
def test_a_layer_with_other_rows_in_a_graph(form: str) -> None:
    """Layers whose rows are spread over ranks have some of them each. The others would be an earlier step's."""
    server = Server(form)
    server.model.first[2] = lambda x_ND: x_ND[: len(x_ND) // 2]
    server.capture(4)
    words = "layer 2 gives [2, 8] in torch.float32 in a CUDA graph that must write [4, 8] in torch.float32"
    assert_refused(server, words)


def test_a_layer_in_another_dtype() -> None:
    server = Server()
    server.model.first[0] = torch.Tensor.double
    server.capture(4)
    words = "layer 0 gives [4, 8] in torch.float64 in a CUDA graph that must write [4, 8] in torch.float32"
    assert_refused(server, words)


def test_a_layer_that_runs_outside_of_the_graph() -> None:
    """In a break of a breakable graph the hook runs, and nothing is captured."""
    server = Server()
    server.capture(6)
    server.capture(4, captures=False)
    assert_refused(server, "the CUDA graph of 4 rows does not write layer 0")


def test_a_graph_that_leaves_one_layer_out() -> None:
    server = Server()
    server.capture(6)
    server.model.layers[2].register_forward_pre_hook(lambda module, args: server.taps._wanted.discard(2))
    server.capture(4)
    assert_refused(server, "the CUDA graph of 4 rows does not write layer 2")


def test_a_graph_larger_than_what_it_writes_to() -> None:
    server = Server()
    server.inputs_ND = torch.zeros(8, D)
    server.capture(8)
    assert_refused(server, "a CUDA graph has 8 rows, and there is room for 6")


def test_a_sum_that_ranks_owe_is_completed() -> None:
    """Then the stream itself is asked: a sum of its two parts would lack the other ranks'."""
    server = Server("stream")
    for layer in server.model.layers:
        layer.owed = "sum"
    calls: list[int] = []
    original = Stream.snapshot

    def snapshot(self: Stream, output_ND: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return original(self, output_ND) + 100

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "snapshot", snapshot)
        server.capture(4)
    assert len(calls) == 3 * 2
    assert server.taps.problem == ""
    assert server.rows_LND[0, :4].min() > 90
