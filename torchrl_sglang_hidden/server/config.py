"""What a model's own configuration says, before SGLang has read it.

Knows nothing of TorchRL, and imports no SGLang.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchrl_sglang_hidden.errors import InputTypeError

__all__ = ["check_layers", "text_config"]


def text_config(model: str) -> dict[str, Any]:
    """The language model's configuration; empty where none can be read: saying what is wrong is SGLang's part.

    Args:
        model: directory or hub name, as for ``--model-path``.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError):
        return {}
    # Multimodal models keep the language model's numbers one level down.
    return {**config, **(config.get("text_config") or {})}


def check_layers(layers: int | Sequence[int], model: str) -> str:
    """The layers to start a server for, as the server half reads them from its environment.

    Args:
        layers: ids as in `HiddenSpec`. The last layer's states are always there.
        model: directory or hub name.

    Raises:
        InputTypeError: no integer, or no sequence of them.
        InputError: an id that the model does not have, where its configuration can be read from here.
    """
    from torchrl_sglang_hidden.specs import canonical_layer  # imports torch, which the server's start does not wait for

    ids = [layers] if isinstance(layers, int) else layers
    if isinstance(ids, str) or not isinstance(ids, Sequence) or any(type(layer) is not int for layer in ids):
        raise InputTypeError(f"layers={layers!r}: expected an integer or a tuple of them, such as (7, 15, -1)")
    num_layers = text_config(model).get("num_hidden_layers")
    if num_layers is not None:
        ids = [canonical_layer(layer, int(num_layers)) for layer in ids]
    return ",".join(str(layer) for layer in dict.fromkeys((*ids, -1)))
