"""Takes the hidden states of decoder layers from the model itself, and checks once that they are the right ones.

Forward hooks on the decoder layers read the residual stream: SGLang's own `ResidualStream` where a model keeps one,
otherwise the sum of what the layer returns. SGLang's capture for draft models is not used, because it exists for some
architectures only and differs between them: on Gemma 3 it leaves the residual out.

A layer has a hook from the first step that wants it until none has wanted any for a while: even a hook that returns at
once makes torch call the layer the slow way, 5 µs for each of them in every step. Decode graphs record some layers, see
`GraphRows`. Graphs of prefills record none: a prefill that wants a layer runs without a graph.

The check runs on the first eager step of two rows or more. Each layer's output must be the next layer's input,
unchanged; one that is not cannot be asked for. The final norm of the last layer's output must be what the
language-model head reads; a model whose is not gives what the head reads only.

Knows nothing of requests, batches or pooling, and imports nothing of SGLang.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from torchrl_sglang_hidden.server.graph_rows import GraphRows

__all__ = ["LayerTaps"]

logger = logging.getLogger(__name__)

# Relative. Our final norm and the model's may differ by two roundings to bfloat16. A wrong stream is off by about 1.
_TOLERANCE = 0.05
_NORM_NAMES = ("norm", "final_layernorm", "final_norm", "norm_f", "ln_f")
# Steps in a row that want no layer, after which the hooks are removed.
_IDLE_STEPS = 64
# After so many eager steps whose rows are not the head's, they are taken never to be.
_MAX_CHECKS = 16


class LayerTaps:
    """Takes the states of decoder layers through forward hooks.

    Attributes:
        layers: the canonical ids ``0 …`` of the layers that can be asked for: all, or those that the CUDA graphs
            record. Empty until the check is over, and with a problem.
        graphs: what decode graphs write; None where no graphs run.
        problem: why the layers' states cannot be trusted; empty while nothing was found.
        limit: why not every layer can be asked for; empty where every one can.
        checked: whether the check is over, with or without a problem.
    """

    def __init__(self) -> None:
        self.layers: tuple[int, ...] = ()
        self.graphs: GraphRows | None = None
        self.problem = ""
        self.limit = ""
        self.checked = True
        # One set for good, which the hooks look into: the layers that the step wants.
        self._wanted: set[int] = set()
        self._taken: dict[int, torch.Tensor] = {}
        self._replayed = False
        self._collective = False
        self._norm: nn.Module | None = None
        # By layer: whether the next layer read exactly what the layer returned.
        self._joined: dict[int, bool] = {}
        self._outputs: dict[int, tuple[Any, ...]] = {}
        # Whether the step to check ran the hooks, and of which layers they read something.
        self._ran = False
        self._readable: set[int] = set()
        self._num_checks = 0
        # By layer: why its id would not mean what it says.
        self._doubts: dict[int, str] = {}
        self._decoder: list[nn.Module] = []
        self._hooks: dict[int, Any] = {}
        self._num_idle = 0
        self._check_hooks: list[Any] = []
        self._last = -1

    @property
    def taking(self) -> bool:
        """Whether the coming step takes layers, or is to check them."""
        return bool(self._wanted)

    @property
    def offered(self) -> tuple[int, ...] | None:
        """The layers that can be asked for, -1 with them; None until the check is over."""
        return None if not self.checked else (-1,) if self.problem else (*self.layers, -1)

    def attach(
        self,
        model: nn.Module,
        num_layers: int,
        *,
        graphs: GraphRows | None = None,
        limit: str = "",
        collective: bool = False,
    ) -> None:
        """Find the model's decoder layers, and put the hooks of the check on them.

        Args:
            model: the served model.
            num_layers: the number of the model's decoder layers.
            graphs: what decode graphs must write; None where no graphs run.
            limit: why that is not every layer.
            collective: whether reading a layer needs the other ranks of the server.
        """
        self.checked, self._last = False, num_layers - 1
        found = _decoder(model, num_layers)
        if found is None:
            self._fail(f"{type(model).__name__} has no list of {num_layers} decoder layers")
            return
        parent, decoder = found
        self._norm = next((getattr(parent, name) for name in _NORM_NAMES if hasattr(parent, name)), None)
        if not isinstance(self._norm, nn.Module):
            self._fail(f"{type(parent).__name__} has no final norm that is known")
            return
        self.graphs, self.limit, self._collective = graphs, limit, collective
        self._decoder = list(decoder)
        for layer, (module, following) in enumerate(pairwise(decoder)):
            self._joined[layer] = False
            self._check_hooks.append(module.register_forward_hook(self._leave(layer)))
            self._check_hooks.append(following.register_forward_pre_hook(self._enter(layer), with_kwargs=True))

    def open(self, layers: Iterable[int]) -> None:
        """Set the layers whose states the coming step must take; until the check is over, none can be asked for."""
        self._replayed = False
        if self._taken:
            self._taken = {}
        if not self.checked:
            self._readable, self._ran = set(), False
            self._want(range(self._last + 1))
        elif wanted := [layer for layer in layers if 0 <= layer < len(self._decoder)]:
            self._want(wanted)
        elif self._hooks:
            self._wanted.clear()
            self._num_idle += 1
            if self._num_idle == _IDLE_STEPS:
                self._remove_hooks()

    def _want(self, layers: Iterable[int]) -> None:
        self._wanted.clear()
        self._wanted.update(layers)
        self._num_idle = 0
        for layer in self._wanted - self._hooks.keys():
            self._hooks[layer] = self._decoder[layer].register_forward_hook(self._tap(layer), with_kwargs=True)

    def _remove_hooks(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}

    def take(self, num_rows: int | None = None) -> dict[int, torch.Tensor]:
        """Return the step's states by layer, ``[N, D]`` each: valid until the next step, not to be written to.

        Args:
            num_rows: the rows of the step's tokens, N. SGLang may have computed more, to fill a graph. None for all
                rows of an eager step.
        """
        if self._replayed:
            return {} if self.graphs is None or num_rows is None else self.graphs.states(num_rows)
        taken, self._taken = self._taken, {}
        if num_rows is None:
            return taken
        return {
            layer: state_ND if len(state_ND) == num_rows else state_ND[:num_rows] for layer, state_ND in taken.items()
        }

    def check(self, states: Mapping[int, torch.Tensor], head_ND: torch.Tensor | None) -> None:
        """Compare a step's states with what the head read; only the first complete step is compared.

        Args:
            states: what `take` returned for all rows.
            head_ND: the head's input, one row for each position.
        """
        if self.checked or not self._ran or head_ND is None or len(head_ND) < 2 or self._norm is None:
            return
        if self._last not in self._readable:
            self._fail(f"layer {self._last} returns something else than the residual stream")
            return
        last_ND = states[self._last]
        if last_ND.shape != head_ND.shape:  # not one row for each position: check on a later step
            self._num_checks += 1
            if self._num_checks == _MAX_CHECKS:
                self._fail(f"the layers have {len(last_ND)} rows where the head reads {len(head_ND)}")
            return
        try:
            with torch.inference_mode():
                normed_ND = self._norm(last_ND.clone())
        except torch.OutOfMemoryError:
            if self._collective:  # the ranks must finish the check in one step
                raise
            return
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            # A model's code may raise anything, and an exception here would end the scheduler.
            self._fail(f"the final norm cannot be asked ({error!r})")
            return
        apart_by = float((normed_ND.float() - head_ND.float()).norm() / head_ND.float().norm())
        if not apart_by < _TOLERANCE:
            self._fail(f"the final norm of layer {self._last}'s output is {apart_by:.2g} off what the head reads")
            return
        for layer, joined in self._joined.items():
            if layer not in self._readable:
                self._doubts[layer] = f"layer {layer} returns something else than the residual stream"
            elif not joined:
                self._doubts[layer] = f"layer {layer + 1} reads something else than what layer {layer} gives"
        self._finish_check()

    def _fail(self, problem: str) -> None:
        self.problem = f"{problem}, so that layer ids would not mean what they say"
        self._finish_check()

    def _finish_check(self) -> None:
        self.checked = True
        offered = range(self._last + 1) if self.graphs is None else self.graphs.layers
        self.layers = tuple(layer for layer in offered if layer not in self._doubts)
        self.limit = "; ".join(filter(None, (next(iter(self._doubts.values()), ""), self.limit)))
        self._wanted.clear()
        for hook in self._check_hooks:
            hook.remove()
        self._check_hooks, self._outputs, self._readable = [], {}, set()
        if self.problem:
            self.layers, self.graphs, self._decoder, self._taken = (), None, [], {}
            self._remove_hooks()

    # --- CUDA graphs -------------------------------------------------------------------------------------------------

    def start_recording(self, num_rows: int) -> None:
        """Have the recorded layers write their rows, until `stop_recording`.

        Args:
            num_rows: tokens of the graph that is captured now, padding included.
        """
        if self.graphs is not None:
            self.graphs.start(num_rows)
            self._want(self.graphs.layers)

    def stop_recording(self) -> None:
        """Hold the captured graph to what it must write."""
        if self.graphs is not None:
            self._wanted.clear()
            if problem := self.graphs.stop():
                self._fail(problem)

    def note_replay(self) -> None:
        """Note that the step is a decode graph's replay: no hook runs, and the graph writes the recorded layers."""
        self._replayed = True

    # --- hooks -------------------------------------------------------------------------------------------------------

    def _tap(self, layer: int) -> Callable[..., None]:
        wanted = self._wanted

        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            if layer in wanted:
                self._read(layer, (*args, *kwargs.values()), output)

        return hook

    def _read(self, layer: int, inputs: tuple[Any, ...], output: Any) -> None:
        if self.graphs is not None and self.graphs.recording:
            if problem := self.graphs.write(layer, lambda rows_ND: _stream(inputs, output, rows_ND)):
                self._fail(problem)
            return
        self._ran = True
        try:
            value_ND = _stream(inputs, output)
        except torch.OutOfMemoryError:
            # The other ranks wait in the layer's collective, and nothing of this server would be right after that.
            if self._collective:
                raise
            logger.warning(
                "torchrl_sglang_hidden: no memory for the states of layer %d; the step's requests get none, and their "
                "clients raise; lower --chunked-prefill-size or --mem-fraction-static",
                layer,
            )
            self._wanted.clear()
            self._taken, self._ran = {}, False
            return
        if value_ND is None:
            return
        if not self.checked:
            self._readable.add(layer)
        if self.checked or layer == self._last:
            self._taken[layer] = value_ND

    def _leave(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._outputs[layer] = _parts(output)

        return hook

    def _enter(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            inputs = (*args, *kwargs.values())
            returned = self._outputs.pop(layer, ())
            self._joined[layer] = bool(returned) and all(any(part is value for value in inputs) for part in returned)

        return hook


def _parts(output: Any) -> tuple[Any, ...]:
    """List what a layer returned, without the Nones."""
    parts = output if isinstance(output, tuple) else (output,)
    return tuple(part for part in parts if part is not None)


def _stream(inputs: Iterable[Any], output: Any, rows_ND: torch.Tensor | None = None) -> torch.Tensor | None:
    """Copy the residual stream after a layer, ``[N, D]``: later layers write over their inputs.

    Args:
        inputs: what the layer was called with.
        output: what it returned.
        rows_ND: returned with the stream written to it where that saves a copy.
    """
    kept = next((stream for value in inputs if (stream := getattr(value, "residual_stream", None)) is not None), None)
    parts = _parts(output)
    if kept is not None and parts:
        pair = None if rows_ND is None else _plain_pair(kept, parts[0])
        if rows_ND is not None and pair is not None and all(_fits(part, rows_ND) for part in pair):
            return torch.add(*pair, out=rows_ND)
        try:
            snapshot_ND: torch.Tensor = kept.snapshot(parts[0])
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AttributeError, RuntimeError):  # a model whose residual is not a plain sum
            return None
        return snapshot_ND
    tensors = [part for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point()]
    if not 1 <= len(tensors) <= 2 or any(part.dim() != 2 or part.shape != tensors[0].shape for part in tensors):
        return None
    if rows_ND is not None and all(_fits(part, rows_ND) for part in tensors):
        return rows_ND.copy_(tensors[0]) if len(tensors) == 1 else torch.add(*tensors, out=rows_ND)
    return tensors[0].clone() if len(tensors) == 1 else tensors[0] + tensors[1]


def _plain_pair(kept: Any, output: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the two tensors whose sum `snapshot` of SGLang's stream would make without a collective; else None."""
    pending, residual_ND = getattr(kept, "pending", None), getattr(kept, "residual", None)
    if pending is None or residual_ND is None or pending.owed is not None or pending.value is not output:
        return None
    return (output, residual_ND) if pending.update.is_plain_add else None


def _fits(part_ND: torch.Tensor, rows_ND: torch.Tensor) -> bool:
    return (part_ND.shape, part_ND.dtype) == (rows_ND.shape, rows_ND.dtype)


def _decoder(model: nn.Module, num_layers: int) -> tuple[nn.Module, nn.ModuleList] | None:
    """Find the decoder layers and the module that holds them; None unless exactly one list fits.

    A vision tower has layers too, and is told apart by its name or by the number of its layers.
    """
    found = [
        (parent, child)
        for name, parent in model.named_modules()
        for key, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers and key in ("layers", "h", "blocks")
        if not any(word in name for word in ("vision", "visual", "audio"))
    ]
    return found[0] if len(found) == 1 else None
