"""Takes the hidden states of decoder layers from the model itself, and checks once that they are the right ones.

Forward hooks on the decoder layers read the residual stream: SGLang's own `ResidualStream` where a model keeps one,
otherwise the sum of what the layer returns. SGLang's capture for draft models is not used, because it exists for some
architectures only and differs between them: on Gemma 3 it leaves the residual out.

The check runs on the first step. Each layer's output must be the next layer's input, unchanged, and the final norm of
the last layer's output must be what the language-model head reads. A model that fails gives its last layer only.

Knows nothing of requests, batches or pooling, and imports nothing of SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["LayerTaps"]

# Relative. Our final norm and the model's may differ by two roundings to bfloat16. A wrong stream is off by about 1.
_TOLERANCE = 0.05
_NORM_NAMES = ("norm", "final_layernorm", "final_norm", "norm_f", "ln_f")


class LayerTaps:
    """Takes the states of some decoder layers through forward hooks.

    Attributes:
        layers: the canonical ids ``0 …`` of the layers whose states are taken; empty without hooks.
        problem: why the layers' states cannot be trusted; empty while nothing was found.
        checked: whether the check is over, with or without a problem.
    """

    def __init__(self) -> None:
        self.layers: tuple[int, ...] = ()
        self.problem = ""
        self.checked = True
        self._open: frozenset[int] = frozenset()
        self._taken: dict[int, torch.Tensor] = {}
        self._ran = False
        # CUDA graphs write the states here when they are replayed: a replay runs no hook.
        self._graph_rows: dict[int, torch.Tensor] = {}
        self._max_rows = 0
        self._norm: nn.Module | None = None
        # By layer: whether the next layer read exactly what the layer returned.
        self._joined: dict[int, bool] = {}
        self._outputs: dict[int, tuple[Any, ...]] = {}
        self._check_hooks: list[Any] = []
        self._last = 0

    def attach(self, model: nn.Module, layers: Iterable[int], num_layers: int, max_rows: int) -> None:
        """Put the hooks on the model's decoder layers.

        Args:
            model: the served model.
            layers: canonical ids, ``0 … num_layers-1``; empty for no hooks.
            num_layers: the number of the model's decoder layers.
            max_rows: most rows that one forward step of a CUDA graph may have.
        """
        self.layers, self._max_rows, self._last = tuple(layers), max_rows, num_layers - 1
        if not self.layers:
            return
        self.checked = False
        found = _decoder(model, num_layers)
        if found is None:
            self._fail(f"{type(model).__name__} has no list of {num_layers} decoder layers")
            return
        parent, decoder = found
        self._norm = next((getattr(parent, name) for name in _NORM_NAMES if hasattr(parent, name)), None)
        if not isinstance(self._norm, nn.Module):
            self._fail(f"{type(parent).__name__} has no final norm that is known")
            return
        for layer in {*self.layers, self._last}:
            decoder[layer].register_forward_hook(self._tap(layer), with_kwargs=True)
        for layer in self.layers:
            if layer < self._last:
                self._joined[layer] = False
                self._check_hooks.append(decoder[layer].register_forward_hook(self._leave(layer)))
                self._check_hooks.append(
                    decoder[layer + 1].register_forward_pre_hook(self._enter(layer), with_kwargs=True)
                )

    def open(self, layers: Iterable[int]) -> None:
        """Set the layers whose states the coming step must take."""
        self._open = frozenset(layers) if self.checked else frozenset((*self.layers, self._last))
        self._taken, self._ran = {}, False

    def take(self) -> dict[int, torch.Tensor]:
        """Return the step's states by layer, each ``[N, D]``: valid until the next step, not to be written to."""
        taken, self._taken = self._taken, {}
        return taken if self._ran else dict(self._graph_rows)

    def check(self, states: Mapping[int, torch.Tensor], head_ND: torch.Tensor | None) -> None:
        """Compare a step's states with what the head read; only the first complete step is compared.

        Args:
            states: what `take` returned.
            head_ND: the head's input, one row for each position.
        """
        if self.checked or not self._ran or head_ND is None or self._norm is None:
            return
        missing = [layer for layer in (*self.layers, self._last) if layer not in states]
        if missing:
            self._fail(f"layer {missing[0]} returns something else than the residual stream")
            return
        last_ND = states[self._last]
        if last_ND.shape != head_ND.shape or not len(head_ND):
            return  # not one row for each position: check on a later step
        try:
            with torch.inference_mode():
                normed_ND = self._norm(last_ND.clone())
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            # A model's code may raise anything, and an exception here would end the scheduler.
            self._fail(f"the final norm cannot be asked ({error!r})")
            return
        apart_by = float((normed_ND.float() - head_ND.float()).norm() / head_ND.float().norm())
        apart = [layer for layer, joined in self._joined.items() if not joined]
        if not apart_by < _TOLERANCE:
            self._fail(f"the final norm of layer {self._last}'s output is {apart_by:.2g} off what the head reads")
        elif apart:
            self._fail(f"layer {apart[0] + 1} reads something else than what layer {apart[0]} gives")
        else:
            self._finish_check()

    def _fail(self, problem: str) -> None:
        self.problem = f"{problem}, so that layer ids would not mean what they say"
        self._finish_check()

    def _finish_check(self) -> None:
        self.checked = True
        for hook in self._check_hooks:
            hook.remove()
        self._check_hooks, self._outputs = [], {}

    # --- hooks -----------------------------------------------------------------------------------------------------

    def _tap(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            self._ran = True
            graph = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            if layer not in self._open and not (graph and layer in self.layers):
                return
            value_ND = _stream((*args, *kwargs.values()), output)
            if value_ND is None:
                return
            if not graph:
                self._taken[layer] = value_ND
                return
            rows_ND = self._graph_rows.get(layer)
            if rows_ND is None:
                size = max(self._max_rows, value_ND.shape[0])
                rows_ND = self._graph_rows[layer] = value_ND.new_zeros(size, value_ND.shape[1])
            rows_ND[: value_ND.shape[0]].copy_(value_ND)

        return hook

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


def _stream(inputs: Iterable[Any], output: Any) -> torch.Tensor | None:
    """Copy the residual stream after a layer, ``[N, D]``: later layers write over their inputs."""
    kept = next((stream for value in inputs if (stream := getattr(value, "residual_stream", None)) is not None), None)
    parts = _parts(output)
    if kept is not None and parts:
        try:
            snapshot_ND: torch.Tensor = kept.snapshot(parts[0])
        except (TypeError, AttributeError, RuntimeError):  # a model whose residual is not a plain sum
            return None
        return snapshot_ND
    tensors = [part for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point()]
    if not 1 <= len(tensors) <= 2 or any(part.dim() != 2 or part.shape != tensors[0].shape for part in tensors):
        return None
    return tensors[0].clone() if len(tensors) == 1 else tensors[0] + tensors[1]


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
