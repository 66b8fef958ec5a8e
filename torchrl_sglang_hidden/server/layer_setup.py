"""Puts the taps on a model that SGLang has loaded, and chooses the layers that its decode graphs record.

Knows SGLang's model runner by attribute name. Knows nothing of requests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from torchrl_sglang_hidden.protocol import ALL_LAYERS, LAYERS_ENV
from torchrl_sglang_hidden.server.graph_rows import GraphRows
from torchrl_sglang_hidden.server.layer_taps import LayerTaps
from torchrl_sglang_hidden.server.settings import Settings
from torchrl_sglang_hidden.spec.hidden import canonical_layer

__all__ = ["RECORD_BYTES", "attach_taps", "layers_to_record"]

# Most device memory that recording takes where nobody chose the layers. 36 layers of D = 4096 in bfloat16 for graphs of
# 256 rows take 72 MiB, and 80 layers of D = 8192 for 512 rows 640 MiB.
RECORD_BYTES = 2**30
_CHOSEN = (
    "its CUDA graphs record the chosen layers alone; choose others at its start, with launch(layers=…) or `serve "
    "--layers`"
)


def attach_taps(taps: LayerTaps, model_runner: Any, settings: Settings) -> None:
    """Put hooks on the layers, and set memory apart for what decode graphs record.

    Args:
        taps: attached to the model; or it says why not.
        model_runner: SGLang's, with its model loaded and its KV cache not yet sized, so that the size counts the memory
            taken here.
        settings: how the server runs.
    """
    if settings.no_layers_because:
        taps.problem = settings.no_layers_because
        return
    config, num_rows = model_runner.model_config, settings.decode_graph_rows
    graphs, limit, num_layers = None, "", config.num_hidden_layers
    if num_rows:
        asked, dtype = os.environ.get(LAYERS_ENV, ALL_LAYERS), model_runner.dtype
        try:
            layers, limit = layers_to_record(
                asked, num_layers, num_rows * config.hidden_size * dtype.itemsize, settings
            )
        except ValueError as error:  # an InputError too
            taps.problem = f"{LAYERS_ENV}={asked}: {error}"
            return
        size = (len(layers), num_rows, config.hidden_size)
        graphs = GraphRows(layers, torch.zeros(size, dtype=dtype, device=model_runner.device))
    taps.attach(model_runner.model, num_layers, graphs=graphs, limit=limit, collective=settings.tensor_ranks > 1)


def layers_to_record(asked: str, num_layers: int, layer_bytes: int, settings: Settings) -> tuple[Sequence[int], str]:
    """Choose the layers that decode graphs write in each step, asked for or not.

    Args:
        asked: layer ids with commas in between, or `ALL_LAYERS` for all where that is cheap.
        num_layers: the number of the model's decoder layers.
        layer_bytes: bytes of the rows of one layer.
        settings: how the server runs.

    Returns:
        Canonical ids without -1, and why these are not all; the latter is empty where they are.

    Raises:
        ValueError: ``asked`` cannot be read, or names a layer that the model does not have.
    """
    every = range(num_layers)
    if asked != ALL_LAYERS:
        layers = sorted({canonical_layer(int(layer), num_layers) for layer in asked.split(",")} - {-1})
        return layers, "" if len(layers) == num_layers else _CHOSEN
    if settings.tensor_ranks > 1:
        # Each of them would add a collective of the ranks to every decode step, whoever asks.
        return (), f"with tensor parallelism {_CHOSEN}"
    if num_layers * layer_bytes > RECORD_BYTES:
        size = num_layers * layer_bytes / 2**20
        return (), (
            f"recording all {num_layers} layers would take {size:.0f} MiB, over the limit "
            f"of {RECORD_BYTES / 2**20:.0f} MiB, so that {_CHOSEN}"
        )
    return every, ""
