"""Holds what CUDA graphs write of decoder layers, and refuses graphs that do not write all of it.

A replayed graph runs no hook: what a hook did while the graph was captured, the graph does again. So the hooks of the
recorded layers write to one buffer during a capture, and a replayed step's states are read from it. A graph that does
not write every recorded layer, or not one row for each token, would leave the rows of an earlier step there.

Knows nothing of models, hooks or requests, and imports nothing of SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["GraphRows"]

# Row counts whose views are kept: a steady decode has one row count, a batch that runs empty has some.
_MAX_VIEWS = 64


class GraphRows:
    """The rows of some layers that decode graphs write.

    Args:
        layers: canonical ids of the recorded layers.
        rows_LND: what the graphs write to, ``[len(layers), N, D]`` for graphs of at most N tokens.
    """

    def __init__(self, layers: Sequence[int], rows_LND: torch.Tensor) -> None:
        self.layers = tuple(layers)
        self._rows_LND = rows_LND
        self._index = {layer: index for index, layer in enumerate(self.layers)}
        self._views: dict[int, dict[int, torch.Tensor]] = {}
        # While a graph is captured: how many rows it must write, and the layers that it wrote.
        self._num_rows: int | None = None
        self._written: set[int] = set()

    @property
    def recording(self) -> bool:
        """Whether a graph is captured now."""
        return self._num_rows is not None

    def start(self, num_rows: int) -> None:
        """Begin with a graph of ``num_rows`` tokens, padding included."""
        self._num_rows, self._written = num_rows, set()

    def write(self, layer: int, read: Callable[[torch.Tensor], torch.Tensor | None]) -> str:
        """Write a layer's rows, in a warm-up or in the capture itself.

        Args:
            layer: a recorded layer.
            read: returns the layer's states, ``[N, D]`` or None; may write them to the rows that it is given, and
                return those.

        Returns:
            Why the graph cannot be trusted; empty where it can.
        """
        num_rows, most = self._num_rows or 0, self._rows_LND.shape[1]
        if num_rows > most:
            return f"a CUDA graph has {num_rows} rows, and there is room for {most}"
        rows_ND = self._rows_LND[self._index[layer], :num_rows]
        value_ND = read(rows_ND)
        if value_ND is None:
            return f"layer {layer} returns something else than the residual stream in a CUDA graph"
        if (value_ND.shape, value_ND.dtype) != (rows_ND.shape, rows_ND.dtype):
            given, expected = (f"{list(one.shape)} in {one.dtype}" for one in (value_ND, rows_ND))
            return f"layer {layer} gives {given} in a CUDA graph that must write {expected}"
        if value_ND is not rows_ND:
            rows_ND.copy_(value_ND)
        # Not in a warm-up, nor where the graph breaks and Python runs at every replay.
        if torch.cuda.is_current_stream_capturing():
            self._written.add(layer)
        return ""

    def stop(self) -> str:
        """Finish the graph, and return why it cannot be trusted; empty where it can."""
        num_rows, self._num_rows = self._num_rows, None
        missing = [layer for layer in self.layers if layer not in self._written]
        return f"the CUDA graph of {num_rows} rows does not write layer {missing[0]}" if missing else ""

    def states(self, num_rows: int) -> dict[int, torch.Tensor]:
        """Return the first rows of every recorded layer, ``[num_rows, D]`` each, as the last replayed graph wrote them.

        They are valid until the next step.
        """
        if num_rows > self._rows_LND.shape[1]:
            return {}
        states = self._views.get(num_rows)
        if states is None:
            if len(self._views) == _MAX_VIEWS:
                self._views.clear()
            states = dict(zip(self.layers, self._rows_LND[:, :num_rows].unbind(0), strict=True))
            self._views[num_rows] = states
        return states
