"""Describe which hidden states a policy returns, and which rows each segment has.

Knows nothing of how states are pooled or travel. Positions are those of the tokens fed to the model, 0 … P+T-2; the
last sampled token is never fed back, so it has no state. `Segment` is the one place where these rules stand in code:

    prompt     0 … P-1        P rows
    response   P-1 … P+T-2    T rows; row t is the state that produced response token t
    full       0 … P+T-2      P+T-1 rows, no position twice

``response`` is the convention of Hugging Face ``generate(output_hidden_states=True)``: entry t, last position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.spec.span_base import POOLINGS as POOLINGS
from torchrl_sglang_hidden.spec.span_base import Pooling as Pooling
from torchrl_sglang_hidden.spec.span_base import own_pooling
from torchrl_sglang_hidden.spec.spans import Span, is_of_response

SegmentName = Literal["prompt", "response", "full"]


class Segment(StrEnum):
    """A part of prompt and response, which knows its rows. Equal to its name: ``Segment.FULL == "full"``."""

    PROMPT = "prompt"
    RESPONSE = "response"
    FULL = "full"

    def __repr__(self) -> str:
        return repr(self.value)  # as it is written in a HiddenSpec

    def positions(self, num_prompt: int, num_response: int) -> range:
        """Return the positions of the segment's rows, for P prompt and T response tokens (see the module's table)."""
        start = num_prompt - 1 if self is Segment.RESPONSE else 0
        stop = num_prompt if self is Segment.PROMPT else num_prompt + num_response - 1
        return range(start, stop)

    @property
    def reads_prompt(self) -> bool:
        """Whether the segment has rows before the prompt's last one."""
        return self is not Segment.RESPONSE

    @property
    def reads_response(self) -> bool:
        """Whether the segment has rows that produced response tokens, apart from the prompt's own."""
        return self is not Segment.PROMPT


SEGMENTS: tuple[Segment, ...] = tuple(Segment)
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def reads_prompt(segments: Iterable[str]) -> bool:
    """Return whether any of the segments has rows before the prompt's last one."""
    return any(Segment(segment).reads_prompt for segment in segments)


def reads_response(segments: Iterable[str]) -> bool:
    """Return whether any of the segments has rows that produced response tokens."""
    return any(Segment(segment).reads_response for segment in segments)


def positions_of(segments: Iterable[str], num_prompt: int, num_response: int) -> range:
    """Return the positions from the first row of any of the segments to the last; empty for no segments.

    Two segments together leave no hole: the prompt's last row is the response's first.
    """
    ranges = [Segment(segment).positions(num_prompt, num_response) for segment in segments]
    return range(min((part.start for part in ranges), default=0), max((part.stop for part in ranges), default=0))


@dataclass(frozen=True, slots=True)
class HiddenSpec:
    """Which hidden states a policy returns.

    Args:
        segments: any of ``"prompt"``, ``"response"``, ``"full"``; none where spans are enough. A policy that reads
            ``V(s)`` wants ``"prompt"``: the response is the action, not the state. Names or `Segment` members; read
            back as names.
        pooling: how the rows of a segment or span become one vector. ``"mean"`` averages them; ``"last"`` takes the
            last one; ``"max"`` takes the largest value in each dimension; ``"sum"`` adds them up; None pools nothing,
            for ``tokens=True``. Means and sums are accumulated in float32 whatever the model's dtype: over ``"full"``
            of a long chat a sum grows with the number of rows, and its rounding error with it (about 1e-7 of the sum
            of the rows' magnitudes), so that the last bits depend on how the engine cut the prompt into chunks.
            ``"max"`` is exact.
        layers: ``-1``, what the language-model head reads (after the final norm; Hugging Face ``hidden_states[-1]``);
            ``k ≥ 0``, the output of decoder layer k with the residual, before the final norm (Hugging Face
            ``hidden_states[k + 1]``; of the last layer, which Hugging Face gives after the norm only, before it);
            other negative ids count the decoder layers from the end, as in Python. One id gives vectors ``[D]``, a
            tuple of K ids ``[K, D]`` in its order. A server with CUDA graphs must record them: ``launch(layers=…)``.
        tokens: also return every token's state of the segments, unpooled.
        dtype: floating dtype of what is returned. float32 goes into ``ValueOperator`` and GAE as it is. Token states
            of a float32 model travel as bfloat16 where this says so, half the bytes.
        spans: parts of the prompt or the response to pool as well, by names of yours: `LastTokens`, `TokenMask`,
            `Turn`, `Role`, `Image`, `Between`, `At`, `Each`, `Window`, `Every`. Each has a ``pooling`` of its own:
            ``"spec"``, the default of most, is the pooling above, and None, the default of `Each` and `Every`, leaves
            the S rows of a span as they are, ``[S, D]``, at most 4096 of them.

    Raises:
        InputError: a value outside these.
        InputTypeError: a value of the wrong type.
    """

    segments: tuple[Segment | SegmentName, ...] = ("response",)
    pooling: Pooling | None = "mean"
    layers: int | tuple[int, ...] = -1
    tokens: bool = False
    dtype: torch.dtype = torch.float32
    spans: Mapping[str, Span] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # A bare string is a sequence of letters; a list is what JSON and YAML configs give.
        if isinstance(self.segments, str) or not isinstance(self.segments, (tuple, list)):
            raise InputTypeError(
                f"HiddenSpec(segments={self.segments!r}): expected a tuple of names, such as ('response',)"
            )
        object.__setattr__(self, "segments", tuple(self.segments))
        unknown = [segment for segment in self.segments if segment not in SEGMENTS]
        if unknown or len(set(self.segments)) != len(self.segments):
            raise InputError(f"HiddenSpec(segments={self.segments!r}): expected one or more of {SEGMENTS}, each once")
        # Names: keys and files made of them should not need this enum.
        object.__setattr__(self, "segments", tuple(map(str, self.segments)))
        if self.pooling not in (*POOLINGS, None):
            raise InputError(f"HiddenSpec(pooling={self.pooling!r}): expected one of {(*POOLINGS, None)}")
        if not isinstance(self.tokens, bool):
            raise InputTypeError(f"HiddenSpec(tokens={self.tokens!r}): expected True or False")
        self._check_layers()
        if not isinstance(self.dtype, torch.dtype):
            raise InputTypeError(f"HiddenSpec(dtype={self.dtype!r}): expected a torch.dtype, such as torch.float32")
        if self.dtype not in FLOAT_DTYPES:
            raise InputError(f"HiddenSpec(dtype={self.dtype}): expected one of {FLOAT_DTYPES}")
        self._check_spans()
        if "sum" in (self.pooling, *map(self.pooling_of, self.spans)) and self.dtype == torch.float16:
            raise InputError(
                "HiddenSpec(pooling='sum', dtype=torch.float16): sums of many rows pass 65504, the largest float16, "
                "and would become inf; use torch.float32 or torch.bfloat16"
            )
        if self.pooling is None and (self.spans or not self.tokens):
            raise InputError(
                f"HiddenSpec(pooling=None, tokens={self.tokens}, spans={list(self.spans)}): without pooling there are "
                "the segments' token states only; pass tokens=True and no spans, or a pooling"
            )
        if not self.segments and (self.tokens or not self.spans):
            raise InputError(
                f"HiddenSpec(segments=(), tokens={self.tokens}, spans={list(self.spans)}): expected one or more of "
                f"{SEGMENTS}; none only beside spans, and without tokens=True"
            )

    def _check_layers(self) -> None:
        layers = self.layers
        if isinstance(layers, list):
            layers = tuple(layers)
            object.__setattr__(self, "layers", layers)
        ids = layers if isinstance(layers, tuple) else (layers,)
        if any(type(layer) is not int for layer in ids):
            raise InputTypeError(f"HiddenSpec(layers={layers!r}): expected an integer, or a tuple of them")
        if not ids or len(set(ids)) != len(ids):
            raise InputError(f"HiddenSpec(layers={layers!r}): expected one or more layer ids, each once")

    def _check_spans(self) -> None:
        if not isinstance(self.spans, Mapping):
            raise InputTypeError(f"HiddenSpec(spans={self.spans!r}): expected a dict of names to spans")
        object.__setattr__(self, "spans", dict(self.spans))
        for name, span in self.spans.items():
            if not isinstance(name, str) or not name:
                raise InputTypeError(
                    f"HiddenSpec(spans={{{name!r}: …}}): expected a non-empty string for a span's name"
                )
            if not isinstance(span, Span):
                raise InputTypeError(
                    f"HiddenSpec(spans={{{name!r}: {span!r}}}): expected LastTokens, TokenMask, Turn, Role, Image, "
                    "Between, At, Each, Window or Every"
                )

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The layers as a tuple, K of them."""
        return self.layers if isinstance(self.layers, tuple) else (self.layers,)

    @property
    def needs_response(self) -> bool:
        """Whether anything of the response is wanted, so that a response must be generated."""
        return reads_response(self.segments) or any(map(is_of_response, self.spans.values()))

    def pooling_of(self, name: str) -> Pooling | None:
        """Return how a span is pooled: its own pooling, or the spec's."""
        return own_pooling(self.spans[name].pooling, self.pooling)

    @property
    def unpooled(self) -> tuple[str, ...]:
        """The names of the spans whose rows stay as they are, ``[S, D]``."""
        return tuple(name for name in self.spans if self.pooling_of(name) is None)


def canonical_layer(layer: int, num_layers: int) -> int:
    """Return a layer's one name: -1 for what the head reads, else ``0 … num_layers-1``.

    Raises:
        InputError: the model has no such layer.
    """
    if not -num_layers <= layer < num_layers:
        raise InputError(
            f"layers={layer}: the model has {num_layers} layers; use 0..{num_layers - 1}, -1 for the final norm's "
            f"output, or -2..{-num_layers} to count from the end"
        )
    return layer if layer >= -1 else num_layers + layer
