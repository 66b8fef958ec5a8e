"""The taps on decoder layers, on models of a few lines in the forms that SGLang's models have."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from torchrl_sglang_hidden.server.graph_rows import GraphRows
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


def tapped(model: Model, *recorded: int, max_rows: int = 16, dtype: torch.dtype = torch.float32) -> LayerTaps:
    """Return the taps of a server without graphs; or of one whose decode graphs record some layers."""
    taps, rows_LND = LayerTaps(), torch.full((len(recorded), max_rows, D), -7.0, dtype=dtype)
    taps.attach(model, L, graphs=GraphRows(recorded, rows_LND) if recorded else None)
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
    taps = tapped(model)
    assert (taps.checked, taps.layers) == (False, ()), "nobody can ask for what is not checked"
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

    taps = tapped(model)
    step(taps, model)
    model.model.layers[1].forward = then_overwrite
    taken = step(taps, model, (0,))
    torch.testing.assert_close(taken[0], truth()[0], rtol=1e-6, atol=1e-6)


def test_a_step_takes_what_it_was_opened_for() -> None:
    model = Model()
    taps = tapped(model)
    assert not taps.taking
    assert set(step(taps, model)) == {3}, "the check compares the last, and reads the others without keeping them"
    assert not taps.taking
    assert set(step(taps, model, (2,))) == {2}
    assert taps.taking
    assert step(taps, model) == {}
    assert set(step(taps, model, (0, 2, -1))) == {0, 2}
    assert taps.take() == {}, "a step's states are taken once"
    taps.open((-1,))
    assert not taps.taking, "what the head reads is no layer's"
    taken = step(taps, model, (0,), X[:2] * 3)
    torch.testing.assert_close(taken[0], truth(X[:2] * 3)[0])


def test_a_step_has_the_rows_of_its_tokens() -> None:
    """SGLang may compute more rows, to fill up."""
    model = Model()
    taps = tapped(model)
    step(taps, model)
    for num_rows in (3, 5):
        taps.open((1,))
        model(X.clone())
        torch.testing.assert_close(taps.take(num_rows)[1], truth()[1][:num_rows])


def test_hooks_are_there_while_somebody_asks() -> None:
    """A hook costs each call of its layer some microseconds, even one that returns at once."""
    model = Model()
    taps = tapped(model)
    assert num_hooks(model) == 2 * (L - 1), "those of the check"
    step(taps, model)
    step(taps, model, (2, -1))
    step(taps, model, (1,))
    for number in range(64):
        assert num_hooks(model) == L
        assert step(taps, model, (-1,) if number < 5 else ()) == {}
    assert num_hooks(model) == 0
    step(taps, model, (3,))
    assert num_hooks(model) == 1
    for _ in range(63):
        step(taps, model)
    step(taps, model, (3,))
    for _ in range(63):
        step(taps, model)
    assert num_hooks(model) == 1, "the steps were not in a row"
    step(taps, model)
    assert num_hooks(model) == 0
    torch.testing.assert_close(step(taps, model, (0,))[0], truth()[0])


def test_a_layer_that_nobody_asks_for_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    model = Model("stream")
    taps = tapped(model)
    step(taps, model)
    original = LayerTaps._read
    monkeypatch.setattr(
        LayerTaps, "_read", lambda self, layer, *more: read.append(layer) or original(self, layer, *more)
    )
    step(taps, model)
    assert read == []
    step(taps, model, (2,))
    assert read == [2]


def test_no_memory_for_a_layer_costs_the_step_its_layers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Stream, output_ND: torch.Tensor) -> torch.Tensor:
        if failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.value_ND + output_ND

    monkeypatch.setattr(Stream, "snapshot", full)
    model = Model("stream")
    taps = tapped(model)
    failing = True
    step(taps, model)
    assert (taps.checked, taps.problem) == (False, ""), "a full memory is no fault of the model"
    failing = False
    step(taps, model)
    assert taps.layers == (0, 1, 2, 3)
    failing = True
    assert step(taps, model, (0, 2)) == {}
    assert "no memory for the states of layer 0; " in caplog.text
    failing = False
    assert set(step(taps, model, (0, 2))) == {0, 2}
    # With tensor parallelism the other ranks wait for this one in the layer's collective.
    taps = LayerTaps()
    taps.attach(model, L, collective=True)
    step(taps, model)
    failing = True
    with pytest.raises(torch.OutOfMemoryError):
        step(taps, model, (0,))


# --- models that are not what they are taken for ----------------------------------------------------------------------


def assert_problem(taps: LayerTaps, model: Model, words: str) -> None:
    assert taps.checked
    assert words in taps.problem
    assert taps.problem.endswith("so that layer ids would not mean what they say")
    assert num_hooks(model) == 0
    assert taps.layers == ()
    # It stays: a later step that looks right does not open them.
    step(taps, model)
    assert words in taps.problem


def test_another_norm_before_the_head() -> None:
    model = Model()
    taps = tapped(model)
    head_ND = model(X) * 1.2
    taps.open(())
    model(X)
    taps.check(taps.take(), head_ND)
    assert_problem(taps, model, "the final norm of layer 3's output is 0.17 off what the head reads")


def test_a_norm_that_cannot_be_asked() -> None:
    """The check runs inside the scheduler, which an exception would end."""
    model = Model()
    taps = tapped(model)
    taps.open(())
    head_ND = model(X)
    model.model.norm.forward = lambda hidden_ND, residual: hidden_ND
    taps.check(taps.take(), head_ND)
    assert taps.checked
    assert "the final norm cannot be asked (TypeError" in taps.problem


def test_two_roundings_are_no_problem() -> None:
    model = Model().bfloat16()
    taps = tapped(model)
    step(taps, model, x_ND=X.bfloat16())
    assert (taps.checked, taps.problem) == (True, "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_no_numbers(value: float) -> None:
    model = Model()
    taps = tapped(model)
    step(taps, model, x_ND=torch.full((2, D), value))
    assert_problem(taps, model, "off what the head reads")


@pytest.mark.parametrize("form", FORMS)
def test_something_between_two_layers(form: str) -> None:
    """The others are what they say they are."""
    model = Model(form)
    model.model.between = lambda number, hidden_ND: hidden_ND + 1 if number == 2 else hidden_ND
    taps = tapped(model)
    step(taps, model)
    assert (taps.checked, taps.problem, taps.layers) == (True, "", (0, 2, 3))
    assert taps.limit == "layer 2 reads something else than what layer 1 gives"


def test_something_between_two_layers_of_which_one_is_recorded() -> None:
    model = Model()
    model.model.between = lambda number, hidden_ND: hidden_ND + 1 if number == 1 else hidden_ND
    taps, rows_LND = LayerTaps(), torch.zeros(2, 4, D)
    taps.attach(model, L, graphs=GraphRows((0, 2), rows_LND), limit="only these are recorded")
    step(taps, model)
    assert (taps.checked, taps.problem, taps.layers) == (True, "", (2,))
    assert taps.limit == "layer 1 reads something else than what layer 0 gives; only these are recorded"


def test_layers_that_return_something_else() -> None:
    """The error comes at the first step."""
    model = Model("triple")
    taps = tapped(model)
    assert step(taps, model) == {}
    assert_problem(taps, model, "layer 3 returns something else than the residual stream")


def test_layers_that_return_nothing() -> None:
    model = Model("stream")
    taps = tapped(model)
    batch = SimpleNamespace(residual_stream=Stream(X))
    taps.open((0, 3))
    hook = next(iter(model.model.layers[3]._forward_hooks.values()))
    assert hook(model.model.layers[3], (None, X, batch), {}, None) is None
    assert taps.take() == {}


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError])
def test_a_stream_that_cannot_say_what_it_holds(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's, where a layer's part is no plain sum yet."""

    def refuse(self: Stream, output_ND: torch.Tensor) -> torch.Tensor:
        raise error("deferred")

    monkeypatch.setattr(Stream, "snapshot", refuse)
    model = Model("stream")
    taps = tapped(model)
    assert step(taps, model) == {}
    assert_problem(taps, model, "layer 3 returns something else than the residual stream")


def test_one_layer_that_cannot_be_read() -> None:
    """Its states would never come, and those of the others would go missing with them."""
    model = Model("pair")
    forward = model.model.layers[1].forward

    def with_more(*args: Any, **kwargs: Any) -> Any:
        return (*forward(*args, **kwargs), torch.ones(len(X), D))

    model.model.layers[1].forward = with_more
    taps = tapped(model)
    taps.open(())
    hidden_ND, residual_ND = X.clone(), None
    for layer in model.model.layers:
        hidden_ND, residual_ND = layer(None, hidden_ND, None, residual_ND)[:2]
    head_ND = model.model.norm(hidden_ND, residual_ND)
    taps.check(taps.take(), head_ND)
    assert (taps.problem, taps.layers) == ("", (0, 2, 3))
    assert taps.limit == "layer 1 returns something else than the residual stream"


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
    taps = tapped(model)
    assert taps.checked
    assert taps.problem.startswith(f"Model has no list of {L} decoder layers")


@pytest.mark.parametrize("name", ["vision_tower", "visual", "audio"])
def test_a_tower_has_layers_too(name: str) -> None:
    model = Model()
    setattr(model, name, Inner("tensor"))
    taps = tapped(model)
    step(taps, model)
    assert (taps.checked, taps.problem) == (True, "")


@pytest.mark.parametrize("norm", [None, 7])
def test_no_final_norm(norm: Any) -> None:
    model = Model()
    del model.model.norm
    if norm is not None:
        model.model.norm = norm
    taps = tapped(model)
    assert taps.checked
    assert taps.problem.startswith("Inner has no final norm that is known")
    assert num_hooks(model) == 0


@pytest.mark.parametrize("name", ["final_layernorm", "final_norm", "norm_f", "ln_f"])
def test_other_names_of_the_final_norm(name: str) -> None:
    model = Model()
    taps = LayerTaps()
    setattr(model.model, name, model.model._modules.pop("norm"))
    taps.attach(model, L)
    taps.open(())
    for_head_ND = X
    for layer in model.model.layers:
        for_head_ND = layer(None, for_head_ND)
    taps.check(taps.take(), getattr(model.model, name)(for_head_ND))
    assert (taps.checked, taps.problem) == (True, "")


# --- when the check is made -------------------------------------------------------------------------------------------


def test_a_step_that_shows_nothing_leaves_the_check_to_another() -> None:
    """Log-probs of a few positions only, no states for the head, no rows or a single one, a replayed graph."""
    model = Model()
    taps = tapped(model)
    for head_ND in (None, model(X)[-2:]):
        taps.open(())
        assert taps.taking, "a step that could check runs without a graph"
        model(X)
        taps.check(taps.take(), head_ND)
        assert not taps.checked
    for x_ND in (X[:0], X[:1]):
        step(taps, model, x_ND=x_ND)
        assert not taps.checked
    taps.open(())
    taps.note_replay()
    taps.check(taps.take(5), model.model.norm(X) * 9)
    assert not taps.checked
    step(taps, model)
    assert (taps.checked, taps.problem) == (True, "")


def test_rows_that_are_never_the_heads_end_the_check() -> None:
    """Such as with context parallelism, whose ranks have some of the positions each."""
    model = Model()
    taps = tapped(model)
    for _ in range(16):
        assert not taps.checked
        taps.open(())
        head_ND = model(X)
        taps.check(taps.take(), torch.cat([head_ND, head_ND]))
    assert_problem(taps, model, "the layers have 5 rows where the head reads 10")
