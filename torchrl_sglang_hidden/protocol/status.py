"""Defines the protocol's name and number, and the status in which the server half describes itself.

`PROTOCOL` grows whenever an older server half would not understand a new client, such as for a new pooling. Knows
nothing of requests and their answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torchrl_sglang_hidden.errors import ProtocolError
from torchrl_sglang_hidden.protocol.excerpts import excerpt

__all__ = [
    "ALL_LAYERS",
    "CHANNEL",
    "CONSTRAINTS_ENV",
    "FALLBACK_REMEDY",
    "LAYERS_ENV",
    "PLUGIN_ENV",
    "PROTOCOL",
    "Status",
    "check_protocol",
    "image_token_in",
]

CHANNEL = "torchrl_sglang_hidden"
PROTOCOL = 10
PLUGIN_ENV = "TORCHRL_SGLANG_HIDDEN"  # "1" in a server's environment opts in to the server half
LAYERS_ENV = "TORCHRL_SGLANG_HIDDEN_LAYERS"  # the layers that a server's CUDA graphs record, such as "7,15,-1"
ALL_LAYERS = "all"  # … or this, for all where that is cheap
CONSTRAINTS_ENV = "TORCHRL_SGLANG_HIDDEN_CONSTRAINTS"  # modules with constraints of the user's own, comma-separated

FALLBACK_REMEDY = (
    "start the server with torchrl_sglang_hidden.launch or `torchrl-sglang-hidden serve`, whose server half pools "
    "without gaps"
)


@dataclass(frozen=True, slots=True)
class Status:
    """Describes the server half, inside SGLang's internal state.

    Args:
        vocab_size: V; token ids are in ``[0, V)``.
        hidden_size: D.
        num_layers: the number of the model's decoder layers.
        context_length: most tokens of prompt and response together.
        layers: canonical ids of the layers whose states it takes; None until the layers are checked, on the first
            forward step that computes two tokens or more.
        because: why it takes no states, or not those of every layer; empty where it takes them all.
        normed: whether SGLang gives the last layer's states after the final norm.
        shared: the name of a file in shared memory; a client that finds the file is on the same machine. Empty where
            there is no shared memory.
        open_pools: the number of requests with pools at this moment; 0 when nothing is running.
        prefix_bytes: bytes of the sums and maxima kept for prompts that begin alike.
        constraints: the names of the constraints whose code the server half has.
        raw_log_probs: whether the log-probs of sampled tokens leave the temperature out, as SGLang does under
            ``SGLANG_RETURN_ORIGINAL_LOGPROB=1``.
        image_token_id: the id that stands for an image in a prompt; None for a model without, or where its
            configuration does not say.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    context_length: int
    layers: tuple[int, ...] | None
    because: str
    normed: bool
    shared: str
    open_pools: int
    prefix_bytes: int
    constraints: tuple[str, ...]
    raw_log_probs: bool
    image_token_id: int | None

    def pack(self) -> dict[str, Any]:
        """Return the fields as JSON carries them."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        lists = {"layers": None if self.layers is None else list(self.layers), "constraints": list(self.constraints)}
        return {"protocol": PROTOCOL, **fields, **lists}

    @classmethod
    def unpack(cls, fields: Mapping[str, Any]) -> Status:
        """Read what `pack` wrote.

        Raises:
            ProtocolError: another protocol number, a missing field, or one of another type.
        """
        check_protocol(fields.get("protocol"), "the server half")
        try:
            values = {name: fields[name] for name in cls.__slots__}
        except KeyError as error:
            raise ProtocolError(
                f"the server half's description lacks {error}; use the same version of "
                "torchrl_sglang_hidden on both sides"
            ) from error
        layers = values["layers"]
        if not (layers is None or _all(layers, lambda layer: type(layer) is int and layer >= -1)):
            _refuse("layers", layers)
        if not _all(values["constraints"], lambda name: isinstance(name, str)):
            _refuse("constraints", values["constraints"])
        for name, kind in _KINDS.items():
            if type(values[name]) is not kind or (kind is int and values[name] < 0):
                _refuse(name, values[name])
        token_id = values["image_token_id"]
        if token_id is not None and (type(token_id) is not int or token_id < 0):
            _refuse("image_token_id", token_id)
        layers = None if layers is None else tuple(layers)
        return cls(**{**values, "layers": layers, "constraints": tuple(values["constraints"])})


def image_token_in(config: object) -> int | None:
    """Return the id that stands for an image in a prompt, as a model's Hugging Face configuration says it.

    The server half reads it for its status, and the client for a server without one.

    Returns:
        The id; None where the configuration says none.
    """
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((token_id for token_id in found if isinstance(token_id, int)), None)


_KINDS: dict[str, type] = {
    "vocab_size": int, "hidden_size": int, "num_layers": int, "context_length": int, "open_pools": int,
    "prefix_bytes": int, "because": str, "shared": str, "normed": bool, "raw_log_probs": bool,
}  # fmt: skip


def _all(values: object, holds: Callable[[Any], bool]) -> bool:
    return isinstance(values, (list, tuple)) and all(map(holds, values))


def _refuse(name: str, value: object) -> NoReturn:
    raise ProtocolError(
        f"the server half's description has {name}={excerpt(value)}; use the same version of torchrl_sglang_hidden on "
        "both sides"
    )


def check_protocol(spoken: object, who: str) -> None:
    """Raise unless both sides speak the same protocol.

    Args:
        spoken: the number that the other side sent.
        who: names the other side in the error.

    Raises:
        ProtocolError: it is another number.
    """
    if type(spoken) is not int or spoken != PROTOCOL:
        raise ProtocolError(
            f"{who} speaks protocol {excerpt(spoken)} and this client {PROTOCOL}; install the same version of "
            "torchrl_sglang_hidden on both sides"
        )
