"""The taps on decoder layers, on models of a few lines in the forms that SGLang's models have."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from torchrl_sglang_hidden.server.layer_taps import LayerTaps

D, L = 8, 4


class Norm(nn.Module):
    """An RMS norm with a weight that is not 1; with a residual it adds that first, as SGLang's do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, D))

    def forward(self, x_ND: torch.Tensor, residual_ND: torch.Tensor | None = None) -> torch.Tensor:
        x_ND = x_ND if residual_ND is None else x_ND + residual_ND
        return x_ND * x_ND.pow(2).mean(-1, keepdim=True).rsqrt() * self.weight


class Stream:
    """SGLang's `ResidualStream` in small: what the layers have added up so far, without what the last one returned."""

    def __init__(self, value_ND: torch.Tensor) -> None:
        self.value_ND = value_ND

    def snapshot(self, output_ND: torch.Tensor) -> torch.Tensor:
        return self.value_ND + output_ND


class Layer(nn.Module):
    """Adds a function of the residual stream to it. ``form`` is how it takes and gives that stream."""

    def __init__(self, number: int, form: str) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D, bias=False)
        self.linear.weight.data.copy_(torch.randn(D, D, generator=torch.Generator().manual_seed(number)))
        self.form = form

    def forward(self, positions: Any, hidden_ND: torch.Tensor, forward_batch: Any = None, residual: Any = None) -> Any:
        if self.form == "stream":
            stream = forward_batch.residual_stream
            stream.value_ND += hidden_ND  # in place: what was taken before must not move
            return self.linear(stream.value_ND).tanh()
        if self.form == "pair":
            residual = hidden_ND if residual is None else residual.add_(hidden_ND)
            return self.linear(residual).tanh(), residual
        value_ND = hidden_ND + self.linear(hidden_ND).tanh()
        return {"tensor": value_ND, "alone": (value_ND, None), "triple": (value_ND, value_ND, value_ND)}[self.form]


class Inner(nn.Module):
    def __init__(self, form: str, num_layers: int = L) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(number, form) for number in range(num_layers))
        self.norm = Norm()
        self.between: Callable[[int, Any], Any] = lambda layer, given: given
        self.keywords = False

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        form = self.layers[0].form
        batch = SimpleNamespace(residual_stream=Stream(torch.zeros_like(x_ND)) if form == "stream" else None)
        hidden_ND, residual = x_ND, None
        for number, layer in enumerate(self.layers):
            hidden_ND = self.between(number, hidden_ND)
            if self.keywords:
                given = layer(positions=None, hidden_ND=hidden_ND, forward_batch=batch, residual=residual)
            else:
                given = layer(None, hidden_ND, batch, residual)
            hidden_ND, residual = given if form in ("pair", "alone") else (given, None)
            hidden_ND = hidden_ND[0] if form == "triple" else hidden_ND
        if form == "stream":
            return self.norm(hidden_ND, batch.residual_stream.value_ND)
        return self.norm(hidden_ND, residual)


class Model(nn.Module):
    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.model = Inner(form)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.model(x_ND)


FORMS = ["tensor", "alone", "pair", "stream"]
X = torch.randn(5, D, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.inference_mode():
        yield


def truth(x_ND: torch.Tensor = X) -> list[torch.Tensor]:
    """Return the residual stream after each layer."""
    states = []
    for layer in Model().model.layers:
        x_ND = x_ND + layer.linear(x_ND).tanh()
        states.append(x_ND)
    return states


def tapped(model: Model, *layers: int, max_rows: int = 16) -> LayerTaps:
    taps = LayerTaps()
    taps.attach(model, layers, L, max_rows)
    return taps


def step(
    taps: LayerTaps, model: Model, layers: tuple[int, ...] = (), x_ND: torch.Tensor = X
) -> dict[int, torch.Tensor]:
    """Run one forward step as plugin.py does."""
    taps.open(layers)
    head_ND = model(x_ND.clone())
    taken = taps.take()
    taps.check({**taken, -1: head_ND}, head_ND)
    return taken


def num_hooks(model: Model) -> int:
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.model.layers)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keywords", [False, True])
def test_the_stream_behind_each_layer_is_taken(form: str, keywords: bool) -> None:
    model = Model(form)
    model.model.keywords = keywords
    taps = tapped(model, *range(L))
    assert not taps.checked
    step(taps, model)
    assert (taps.checked, taps.problem, taps.layers) == (True, "", (0, 1, 2, 3))
    taken = step(taps, model, (0, 1, 2, 3))
    assert set(taken) == {0, 1, 2, 3}
    for layer, state_ND in enumerate(truth()):
        torch.testing.assert_close(taken[layer], state_ND, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_taken_is_of_its_own(form: str) -> None:
    """Later layers, and whoever else holds the tensor, overwrite what they were given."""
    model = Model(form)
    original = model.model.layers[1].forward

    def then_overwrite(*args: Any, **kwargs: Any) -> Any:
        given = original(*args, **kwargs)
        args[1].fill_(1e4)  # what layer 0 returned
        return given

    taps = tapped(model, 0)
    step(taps, model)
    model.model.layers[1].forward = then_overwrite
    taken = step(taps, model, (0,))
    torch.testing.assert_close(taken[0], truth()[0], rtol=1e-6, atol=1e-6)


def test_a_step_takes_what_it_was_opened_for() -> None:
    model = Model()
    taps = tapped(model, 0, 2)
    assert set(step(taps, model)) == {0, 2, 3}, "all of them and the last until they are checked"
    assert set(step(taps, model, (2,))) == {2}
    assert step(taps, model) == {}
    assert set(step(taps, model, (0, 2, -1))) == {0, 2}
    assert taps.take() == {}, "a step's states are taken once"
    taken = step(taps, model, (0,), X[:2] * 3)
    torch.testing.assert_close(taken[0], truth(X[:2] * 3)[0])


def test_the_hooks_of_the_check_go_when_it_is_done() -> None:
    model = Model()
    taps = tapped(model, 0, 2)
    assert num_hooks(model) == 3 + 4
    step(taps, model)
    assert num_hooks(model) == 3


def test_no_layers_no_hooks() -> None:
    model = Model()
    taps = tapped(model)
    assert (num_hooks(model), taps.checked, taps.problem, taps.layers) == (0, True, "", ())
    assert step(taps, model) == {}


# --- models that are not what they are taken for ----------------------------------------------------------------------


def assert_problem(taps: LayerTaps, model: Model, words: str) -> None:
    assert taps.checked
    assert words in taps.problem
    assert taps.problem.endswith("so that layer ids would not mean what they say")
    assert all(not layer._forward_pre_hooks for layer in model.model.layers)
    # It stays: a later step that looks right does not open them.
    step(taps, model)
    assert words in taps.problem


def test_another_norm_before_the_head() -> None:
    model = Model()
    taps = tapped(model, 1)
    head_ND = model(X) * 1.2
    taps.open(())
    model(X)
    taps.check(taps.take(), head_ND)
    assert_problem(taps, model, "the final norm of layer 3's output is 0.17 off what the head reads")


def test_a_norm_that_cannot_be_asked() -> None:
    """The check runs inside the scheduler, which an exception would end."""
    model = Model()
    taps = tapped(model, 1)
    taps.open(())
    head_ND = model(X)
    model.model.norm.forward = lambda hidden_ND, residual: hidden_ND
    taps.check(taps.take(), head_ND)
    assert taps.checked
    assert "the final norm cannot be asked (TypeError" in taps.problem


def test_two_roundings_are_no_problem() -> None:
    model = Model().bfloat16()
    taps = tapped(model, 1)
    step(taps, model, x_ND=X.bfloat16())
    assert (taps.checked, taps.problem) == (True, "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_no_numbers(value: float) -> None:
    model = Model()
    taps = tapped(model, 1)
    step(taps, model, x_ND=torch.full((2, D), value))
    assert_problem(taps, model, "off what the head reads")


@pytest.mark.parametrize("form", FORMS)
def test_something_between_two_layers(form: str) -> None:
    model = Model(form)
    model.model.between = lambda number, hidden_ND: hidden_ND + 1 if number == 2 else hidden_ND
    taps = tapped(model, 0, 1)
    step(taps, model)
    assert_problem(taps, model, "layer 2 reads something else than what layer 1 gives")


def test_something_between_layers_that_nobody_asked_for() -> None:
    model = Model()
    model.model.between = lambda number, hidden_ND: hidden_ND + 1 if number == 1 else hidden_ND
    taps = tapped(model, 2)
    step(taps, model)
    assert (taps.checked, taps.problem) == (True, "")


def test_layers_that_return_something_else() -> None:
    """The error comes at the first step."""
    model = Model("triple")
    taps = tapped(model, 0)
    assert step(taps, model) == {}
    assert_problem(taps, model, "layer 0 returns something else than the residual stream")


def test_layers_that_return_nothing() -> None:
    model = Model("stream")
    taps = tapped(model, 0)
    hook = next(iter(model.model.layers[0]._forward_hooks.values()))
    batch = SimpleNamespace(residual_stream=Stream(X))
    taps.open((0, 3))
    assert hook(model.model.layers[0], (None, X, batch), {}, None) is None
    assert taps.take() == {}


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError])
def test_a_stream_that_cannot_say_what_it_holds(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's, where a layer's part is no plain sum yet."""

    def refuse(self: Stream, output_ND: torch.Tensor) -> torch.Tensor:
        raise error("deferred")

    monkeypatch.setattr(Stream, "snapshot", refuse)
    model = Model("stream")
    taps = tapped(model, 0)
    assert step(taps, model) == {}
    assert_problem(taps, model, "layer 0 returns something else than the residual stream")


def test_one_layer_that_cannot_be_read() -> None:
    """The others would look right, and its states would never come."""
    model = Model("stream")
    taps = tapped(model, 0, 1)
    taps.open(())
    head_ND = model(X)
    taken = taps.take()
    del taken[1]
    taps.check(taken, head_ND)
    assert_problem(taps, model, "layer 1 returns something else than the residual stream")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: setattr(model, "other", nn.Module()) or setattr(model.other, "layers", model.model.layers[:]),
        lambda model: setattr(model.model, "layers", model.model.layers[: L - 1]),
        lambda model: setattr(model.model, "bones", model.model._modules.pop("layers")),
    ],
    ids=["two lists", "another number", "another name"],
)
def test_no_one_list_of_layers(spoil: Callable[[Model], Any]) -> None:
    model = Model()
    spoil(model)
    taps = tapped(model, 0)
    assert taps.checked
    assert taps.problem.startswith(f"Model has no list of {L} decoder layers")


@pytest.mark.parametrize("name", ["vision_tower", "visual", "audio"])
def test_a_tower_has_layers_too(name: str) -> None:
    model = Model()
    setattr(model, name, Inner("tensor"))
    taps = tapped(model, 0)
    step(taps, model)
    assert (taps.checked, taps.problem) == (True, "")


@pytest.mark.parametrize("norm", [None, 7])
def test_no_final_norm(norm: Any) -> None:
    model = Model()
    del model.model.norm
    if norm is not None:
        model.model.norm = norm
    taps = tapped(model, 0)
    assert taps.checked
    assert taps.problem.startswith("Inner has no final norm that is known")
    assert num_hooks(model) == 0


@pytest.mark.parametrize("name", ["final_layernorm", "final_norm", "norm_f", "ln_f"])
def test_other_names_of_the_final_norm(name: str) -> None:
    model = Model()
    taps = LayerTaps()
    setattr(model.model, name, model.model._modules.pop("norm"))
    taps.attach(model, (0,), L, 16)
    taps.open(())
    for_head_ND = X
    for layer in model.model.layers:
        for_head_ND = layer(None, for_head_ND)
    taps.check(taps.take(), getattr(model.model, name)(for_head_ND))
    assert (taps.checked, taps.problem) == (True, "")


# --- when the check is made -------------------------------------------------------------------------------------------


def test_a_step_that_shows_nothing_leaves_the_check_to_another() -> None:
    """Log-probs of a few positions only, no states for the head, no rows at all, a replayed graph."""
    model = Model()
    taps = tapped(model, 0)
    for head_ND in (None, model(X)[-1:]):
        taps.open(())
        model(X)
        taps.check(taps.take(), head_ND)
        assert not taps.checked
    step(taps, model, x_ND=X[:0])
    assert not taps.checked
    taps.open(())
    taps.check(taps.take(), model.model.norm(X) * 9)
    assert not taps.checked
    step(taps, model)
    assert (taps.checked, taps.problem) == (True, "")


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def capturing(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: on)


def test_a_graph_writes_where_its_replay_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks run while a graph is captured, and not when it is replayed: what they did then, it does again."""
    model = Model()
    taps = tapped(model, 0, 2, max_rows=3)
    capturing(monkeypatch, True)
    for x_ND in (X, X[:2]):  # graphs of several sizes share what they write to; the largest comes first
        model(x_ND)
    capturing(monkeypatch, False)
    taps.open(())
    replayed = taps.take()
    assert set(replayed) == {0, 2}, "and not the last, which nobody asked for"
    assert all(state_ND.shape == (5, D) for state_ND in replayed.values())
    for layer in (0, 2):
        torch.testing.assert_close(replayed[layer][:2], truth(X[:2])[layer])
        torch.testing.assert_close(replayed[layer][2:], truth()[layer][2:])
    # A step that runs the layers is that step, whatever graphs wrote before.
    taken = step(taps, model, (0,), X * 2)
    torch.testing.assert_close(taken[0], truth(X * 2)[0])
    assert taps.checked
    taps.open((0,))
    torch.testing.assert_close(taps.take()[0][:2], truth(X[:2])[0])


def test_a_graphs_rows_have_room_for_the_largest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    taps = tapped(model, 0, max_rows=32)
    capturing(monkeypatch, True)
    model(X)
    taps.open(())
    capturing(monkeypatch, False)
    assert taps.take()[0].shape == (32, D)
