"""Define small heads, and what they compute of a state.

A head is data and never code: a kind by name, a few tensors, and how they are applied. Knows nothing of servers,
requests or TensorDicts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, assert_never, get_args

import torch
from torch.nn import functional

from torchrl_sglang_hidden.errors import InputError, InputTypeError, WeightsError

__all__ = ["HEAD_NAME", "MAX_HEADS", "MAX_HEAD_BYTES", "Head", "check_head_name"]

HeadKind = Literal["linear", "mlp", "gated"]
Activation = Literal["relu", "gelu", "silu", "tanh"]
Normalization = Literal["none", "layer", "rms", "standard"]
HeadOutput = Literal["raw", "sigmoid"]

# Most bytes of a head's file: 16 million numbers in float32. It travels as one text, which the scheduler reads.
MAX_HEAD_BYTES = 64 * 2**20
# Most heads of one request, and of one server.
MAX_HEADS = 64
_METADATA = "torchrl_sglang_hidden.head"
_EPSILON = 1e-6
HEAD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
# By kind: the tensors that it needs, each with its shape, and those that it may have. H is the head's own width.
_TENSORS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "linear": ({"weight": "D"}, {"bias": "1"}),
    "mlp": ({"hidden.weight": "HD", "output.weight": "H"}, {"hidden.bias": "H", "output.bias": "1"}),
    "gated": (
        {"gate.weight": "HD", "up.weight": "HD", "output.weight": "H"},
        {"gate.bias": "H", "up.bias": "H", "output.bias": "1"},
    ),
}
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu, "tanh": torch.tanh,
}  # fmt: skip


def check_head_name(name: object) -> str:
    """Check a head's name, and return it.

    Raises:
        InputTypeError: it is no string.
        InputError: it has other characters than letters, digits, ``_`` and ``-``, or more than 64.
    """
    if not isinstance(name, str):
        raise InputTypeError(f"head name {name!r:.80}: expected a string, such as 'confident'")
    if not HEAD_NAME.fullmatch(name):
        raise InputError(
            f"head name {name!r:.80}: expected up to 64 letters, digits, '_' and '-', beginning with a letter or '_'"
        )
    return name


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A small network that makes one number, a score, of one hidden state.

    ``"linear"`` is ``w·x + b`` with the tensors ``weight`` [D] and ``bias`` [1]. ``"mlp"`` is ``v·act(Wx + c) + b``
    with ``hidden.weight`` [H, D], ``hidden.bias`` [H], ``output.weight`` [H] and ``output.bias`` [1]. ``"gated"`` is
    ``v·(act(Gx + g) ⊙ (Ux + u)) + b`` with ``gate.weight`` and ``up.weight`` [H, D], their biases [H], and the same
    output. Biases may be left out. Computed in float32.

    Args:
        kind: ``"linear"``, ``"mlp"`` (two layers) or ``"gated"``.
        tensors: by these names. A leading dimension of 1, as ``torch.nn.Linear(…, 1)`` has it, is taken off.
        layer: the layer whose states it reads, as in `HiddenSpec.layers`.
        activation: ``"relu"``, ``"gelu"`` (exact), ``"silu"`` or ``"tanh"``; a linear head has none.
        normalize: what is done to a state first. ``"layer"`` and ``"rms"`` normalise it over its D dimensions without
            weights (epsilon 1e-6); ``"standard"`` takes off the tensor ``mean`` [D] and divides by ``std`` [D], as
            probes do.
        output: ``"raw"``, or ``"sigmoid"`` for a score between 0 and 1.

    Raises:
        InputError: an unknown kind, activation, normalisation or output.
        InputTypeError: a value of the wrong type.
        WeightsError: a tensor that is missing, unknown, of another shape, or not finite; or over 64 MiB of them.

    Example:
        >>> head = Head("linear", {"weight": torch.ones(576), "bias": torch.zeros(1)}, output="sigmoid")
        >>> head.save("confident.safetensors")
        >>> engine.push_head("confident", "confident.safetensors")
    """

    kind: HeadKind
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    layer: int = -1
    activation: Activation = "silu"
    normalize: Normalization = "none"
    output: HeadOutput = "raw"

    def __post_init__(self) -> None:
        for name, known in (
            ("kind", get_args(HeadKind)),
            ("activation", get_args(Activation)),
            ("normalize", get_args(Normalization)),
            ("output", get_args(HeadOutput)),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"Head({name}={getattr(self, name)!r:.80}): expected one of {known}")
        if type(self.layer) is not int:
            raise InputTypeError(f"Head(layer={self.layer!r:.80}): expected a layer id, as in HiddenSpec(layers=…)")
        if not isinstance(self.tensors, Mapping):
            raise InputTypeError(f"Head(tensors={self.tensors!r:.80}): expected a dict of names to tensors")
        object.__setattr__(self, "tensors", self._checked())

    def _checked(self) -> dict[str, torch.Tensor]:
        needed, optional = _TENSORS[self.kind]
        if self.normalize == "standard":
            needed = {**needed, "mean": "D", "std": "D"}
        shapes, sizes = {**needed, **optional}, {"1": 1}
        missing, unknown = needed.keys() - self.tensors.keys(), self.tensors.keys() - shapes.keys()
        if missing or unknown:
            raise WeightsError(
                f"a {self.kind!r} head has the tensors {sorted(map(str, self.tensors))!s:.300}: expected "
                f"{sorted(needed)}, and perhaps {sorted(optional)}"
            )
        checked: dict[str, torch.Tensor] = {}
        for name in shapes:
            if name not in self.tensors:
                continue
            tensor = self.tensors[name]
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                raise InputTypeError(
                    f"the head's {name!r} is {tensor!r:.80}: expected a tensor of floating-point numbers"
                )
            axes = shapes[name]
            if len(axes) == 1 and tensor.ndim == 2 and tensor.shape[0] == 1:
                tensor = tensor[0]
            if axes == "1" and tensor.ndim == 0:
                tensor = tensor[None]
            fits = tensor.ndim == len(axes) and tensor.numel() > 0
            if not fits or any(
                sizes.setdefault(axis, size) != size for axis, size in zip(axes, tensor.shape, strict=True)
            ):
                raise WeightsError(
                    f"the head's {name!r} has the shape {tuple(tensor.shape)}: expected [{', '.join(axes)}] with "
                    f"{', '.join(f'{axis}={size}' for axis, size in sizes.items() if axis != '1') or 'any sizes'}"
                )
            checked[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        size = sum(tensor.nbytes for tensor in checked.values())
        if size > MAX_HEAD_BYTES:
            raise WeightsError(
                f"the head has {size / 2**20:.0f} MiB of float32, over the limit of {MAX_HEAD_BYTES // 2**20} MiB; use "
                "a smaller one"
            )
        for name, tensor in checked.items():
            if not bool(tensor.isfinite().all()):
                raise WeightsError(f"the head's {name!r} has values that are not finite; look at what trained it")
        if "std" in checked and not bool((checked["std"] > 0).all()):
            raise WeightsError("the head's 'std' has values of 0 or below: expected numbers to divide by")
        return checked

    @property
    def width(self) -> int:
        """D, the size of the states that it reads."""
        return self.tensors["weight" if self.kind == "linear" else self.wide_names[0]].shape[-1]

    @property
    def wide_names(self) -> tuple[str, ...]:
        """The names of its matrices ``[H, D]``; none of a linear head."""
        return tuple(name for name, axes in _TENSORS[self.kind][0].items() if axes == "HD")

    @torch.no_grad()
    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Return the score of each state.

        Args:
            states: ``[…, D]``, on the CPU.

        Returns:
            float32 ``[…]``.

        Raises:
            InputError: states of another size.
            InputTypeError: no tensor.
        """
        if not isinstance(states, torch.Tensor):
            raise InputTypeError(f"states: a {type(states).__name__}; expected a tensor [..., {self.width}]")
        if states.shape[-1:] != (self.width,):
            raise InputError(
                f"states of shape {tuple(states.shape)}: expected [..., {self.width}], what the head reads"
            )
        return self.compute(states, self.tensors)

    def compute(self, states: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return scores with the head's tensors on the device of the states."""
        x = states.float()
        match self.normalize:
            case "none":
                pass
            case "layer":
                x = functional.layer_norm(x, x.shape[-1:], eps=_EPSILON)
            case "rms":
                x = functional.rms_norm(x, x.shape[-1:], eps=_EPSILON)
            case "standard":
                x = (x - tensors["mean"]) / tensors["std"]
            case unknown:
                assert_never(unknown)
        act = _ACTIVATIONS[self.activation]
        match self.kind:
            case "linear":
                score = _dot(x, tensors, "")
            case "mlp":
                score = _dot(act(_wide(x, tensors, "hidden")), tensors, "output.")
            case "gated":
                score = _dot(act(_wide(x, tensors, "gate")) * _wide(x, tensors, "up"), tensors, "output.")
            case other:
                assert_never(other)
        return score.sigmoid() if self.output == "sigmoid" else score

    # --- files -------------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Return the head as a safetensors file, whose metadata describe it."""
        from safetensors.torch import save

        description = {name: getattr(self, name) for name in ("kind", "layer", "activation", "normalize", "output")}
        return save(dict(self.tensors), metadata={_METADATA: json.dumps(description, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Head:
        """Read what `to_bytes` wrote. Nothing in it is run.

        Raises:
            WeightsError: it is no safetensors file, over 64 MiB, not described as a head, or its tensors do not fit.
            InputError: an unknown kind, activation, normalisation or output.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        if len(data) > MAX_HEAD_BYTES:
            raise WeightsError(
                f"the head's file has {len(data) / 2**20:.0f} MiB, over the limit of {MAX_HEAD_BYTES // 2**20} MiB; "
                "use a smaller head"
            )
        try:
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            described = json.loads(header["__metadata__"][_METADATA])
            fields = {name: described[name] for name in ("kind", "layer", "activation", "normalize", "output")}
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WeightsError(
                f"the head's {len(data)} bytes are no safetensors file that describes a head "
                f"({type(error).__name__}: {error!s:.200}); write it with Head(…).save(path)"
            ) from error
        if any(not isinstance(value, str) for name, value in fields.items() if name != "layer"):
            raise InputTypeError(
                f"the head's file describes it as {fields!r:.300}: expected names; write it with Head.save"
            )
        return cls(tensors=tensors, **fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the head to a safetensors file."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Head:
        """Read a head's file.

        Raises:
            WeightsError, InputError: as for `from_bytes`; or the file cannot be read.
        """
        try:
            # A longer file is refused before it fills the memory.
            with Path(path).open("rb") as file:
                data = file.read(MAX_HEAD_BYTES + 1)
        except OSError as error:
            raise WeightsError(
                f"head={str(path)!r} cannot be read ({error}); pass a file that Head.save wrote"
            ) from error
        return cls.from_bytes(data)


def _wide(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], part: str) -> torch.Tensor:
    return functional.linear(x, tensors[f"{part}.weight"], tensors.get(f"{part}.bias"))


def _dot(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], part: str) -> torch.Tensor:
    return functional.linear(x, tensors[f"{part}weight"][None], tensors.get(f"{part}bias"))[..., 0]
