"""The server half's own channel through SGLang: options in, pooled states and a status out. Used on both sides.

A request carries options in ``sampling_params["custom_params"]``; its answer comes back in
``meta_info["torchrl_sglang_hidden"]``; the server's status stands in SGLang's internal state under the same name.
Names, numbers and floating-point bytes only: nothing received is ever unpickled.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import torch

from torchrl_sglang_hidden.errors import ProtocolError, SpanError
from torchrl_sglang_hidden.pooling import Pools, Wanted, WantedRows
from torchrl_sglang_hidden.shared import discard, fetch
from torchrl_sglang_hidden.spans import Between, LastTokens, PromptSpan
from torchrl_sglang_hidden.specs import POOLINGS, SEGMENTS, ResolvedSpan, Segment

__all__ = [
    "CHANNEL",
    "FALLBACK_REMEDY",
    "LAYERS_ENV",
    "PLUGIN_ENV",
    "PROTOCOL",
    "HiddenOptions",
    "Status",
    "Way",
    "drop_shared",
    "pack_answer",
    "pack_options",
    "unpack_answer",
    "unpack_options",
]

CHANNEL = "torchrl_sglang_hidden"
PROTOCOL = 2
PLUGIN_ENV = "TORCHRL_SGLANG_HIDDEN"  # "1" in a server's environment opts in to the server half
LAYERS_ENV = "TORCHRL_SGLANG_HIDDEN_LAYERS"  # the layers whose states the server half takes, such as "7,15,-1"

FALLBACK_REMEDY = (
    "start the server with torchrl_sglang_hidden.launch or `torchrl-sglang-hidden serve`, whose server half pools "
    "without gaps"
)

# How bytes travel: raw (in-process), as base64 text (JSON), or, for many of them, in a file of shared memory.
Way = Literal["binary", "text", "shared"]

# What does not fit in here is float32, the dtype that everything is pooled in.
_ROW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class HiddenOptions:
    """What one request asks of the server half."""

    wanted: Wanted
    way: Way


@dataclass(frozen=True, slots=True)
class Status:
    """What the server half says of itself in SGLang's internal state.

    Args:
        vocab_size: ids are in ``[0, vocab_size)``.
        hidden_size: D.
        num_layers: the model's decoder layers.
        context_length: most tokens of prompt and response together.
        layers: the layers whose states it takes, by their canonical ids; None while nothing has run that would show
            whether they are what they are taken for.
        because: why it takes none, or the last layer's only; empty where it takes all that it was started for.
        normed: whether SGLang's own states of the last layer are those after the final norm.
        shared: the name of a file in shared memory by which a client knows that it is on this machine; or empty.
        open_pools: requests with pools at this moment; 0 when nothing is running.
        prefix_bytes: of the sums kept for prompts that begin alike.
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

    def pack(self) -> dict[str, Any]:
        """As JSON carries it."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {"protocol": PROTOCOL, **fields, "layers": None if self.layers is None else list(self.layers)}

    @classmethod
    def unpack(cls, fields: Mapping[str, Any]) -> Status:
        """Reads what `pack` wrote.

        Raises:
            ProtocolError: another protocol, or a field that is not there.
        """
        check_protocol(fields.get("protocol"), "the server half")
        try:
            values = {name: fields[name] for name in cls.__slots__}
        except KeyError as error:
            raise ProtocolError(f"the server half's description lacks {error}") from error
        return cls(**{**values, "layers": None if values["layers"] is None else tuple(values["layers"])})


def check_protocol(spoken: object, who: str) -> None:
    """Refuses another protocol.

    Raises:
        ProtocolError: it is one.
    """
    if spoken != PROTOCOL:
        raise ProtocolError(
            f"{who} speaks protocol {spoken!r} and this client {PROTOCOL}; install the same version of "
            "torchrl_sglang_hidden on both sides"
        )


# --- options ---------------------------------------------------------------------------------------------------------


def pack_options(wanted: Wanted, way: Way) -> dict[str, str | int]:
    """Writes a request's options. SGLang carries scalars, flat lists and flat dicts here, hence one text."""
    fields = {
        "segments": wanted.segments,
        "pooling": wanted.pooling,
        "layers": wanted.layers,
        "tokens": wanted.tokens,
        "row_dtype": next(name for name, dtype in _ROW_DTYPES.items() if dtype == wanted.row_dtype),
        "spans": {name: _pack_span(span) for name, span in wanted.spans.items()},
        "way": way,
    }
    return {"protocol": PROTOCOL, "options": json.dumps(fields, separators=(",", ":"))}


def unpack_options(custom_params: object) -> HiddenOptions | None:
    """Reads a request's options inside the server; None when there are none or they are not ours to read.

    Never raises: an exception in the scheduler would end the server. What is not understood is not answered, and the
    client reports that.
    """
    options = custom_params.get(CHANNEL) if isinstance(custom_params, dict) else None
    if not isinstance(options, dict) or options.get("protocol") != PROTOCOL:
        return None
    try:
        fields = json.loads(options["options"])
        wanted = Wanted(
            segments=_known(fields["segments"], SEGMENTS),
            pooling=_known([fields["pooling"]], (*POOLINGS, None))[0],
            layers=tuple(int(layer) for layer in fields["layers"]),
            spans={str(name): _unpack_span(span) for name, span in fields["spans"].items()},
            tokens=fields["tokens"] is True,
            row_dtype=_ROW_DTYPES[fields["row_dtype"]],
        )
        if not wanted.layers or len(set(wanted.layers)) != len(wanted.layers):
            return None
        return HiddenOptions(wanted, _known([fields["way"]], ("binary", "text", "shared"))[0])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError):
        return None


def _known(names: Any, known: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(names)) != len(names) or not set(names) <= set(known):
        raise ValueError(f"{names} are not among {known}, each once")
    return tuple(names)


def _pack_span(span: ResolvedSpan) -> list[Any]:
    if isinstance(span, PromptSpan):
        return ["prompt", *(place for interval in span.intervals for place in interval)]
    if isinstance(span, LastTokens):
        return ["last", span.count, span.allow_fewer]
    return ["between", span.start, span.end, span.unclosed]


def _unpack_span(fields: list[Any]) -> ResolvedSpan:
    kind, *values = fields
    if kind == "prompt":
        places = [int(value) for value in values]
        # In order and apart, or rows would be counted twice.
        if not places or len(places) % 2 or places[0] < 0 or any(a >= b for a, b in pairwise(places)):
            raise ValueError(f"{places} are no intervals")
        return PromptSpan(tuple(zip(places[::2], places[1::2], strict=True)))
    if kind == "last":
        return LastTokens(int(values[0]), allow_fewer=values[1] is True)
    if kind == "between":
        return Between(values[0], values[1], unclosed=values[2])
    raise ValueError(f"{kind} is no kind of span")


# --- answers ---------------------------------------------------------------------------------------------------------


def pack_answer(pools: Pools, way: Way, share: Callable[[bytes], str | None] | None = None) -> dict[str, Any]:
    """Writes a finished request's pools: counts, and the vectors that have rows, one after another.

    Args:
        pools: what came of them.
        way: how bytes travel.
        share: puts bytes into shared memory and gives the file's name, or None where there is no room.
    """
    places: list[tuple[str, str, torch.Tensor | None, int]] = [
        ("segment", name, *value) for name, value in pools.segments.items()
    ]
    places += [("span", name, *value) for name, value in pools.spans.items()]
    vectors = [vector for _, _, vector, _ in places if vector is not None]
    data = torch.stack(vectors).contiguous().numpy().tobytes() if vectors else b""
    answer: dict[str, Any] = {
        "protocol": PROTOCOL,
        "places": [[kind, name, count, vector is not None] for kind, name, vector, count in places],
        "faults": dict(pools.faults),
        **_pack_bytes(data, "binary" if way == "binary" else "text"),
    }
    if pools.rows is not None:
        rows = pools.rows.rows_NKD.contiguous()
        answer["rows"] = {
            "first": pools.rows.first,
            "shape": list(rows.shape),
            "dtype": next(name for name, dtype in _ROW_DTYPES.items() if dtype == rows.dtype),
            **_pack_bytes(rows.view(torch.uint8).numpy().tobytes(), way, share),
        }
    return answer


def unpack_answer(answer: object, row: str, hidden_size: int, *, shared: bool = True) -> Pools:
    """Reads what `pack_answer` wrote; what was in shared memory is removed there.

    Args:
        answer: as it came.
        row: names the request in errors.
        hidden_size: D.
        shared: whether it was asked for through shared memory. Otherwise a server elsewhere would get to name files
            of this machine.

    Raises:
        ProtocolError: it cannot be read, was cut short, its bytes are not those that were sent, or it is in shared
            memory unasked.
        SpanError: a span has no value.
    """
    if not isinstance(answer, list) or len(answer) != 1 or not isinstance(answer[0], dict):
        raise ProtocolError(f"{row}: expected one {CHANNEL} answer in meta_info, got {answer!r:.80}; {FALLBACK_REMEDY}")
    fields = answer[0]
    check_protocol(fields.get("protocol"), f"{row}: the server half")
    sent_rows = fields.get("rows")
    if not shared and isinstance(sent_rows, dict) and "shared" in sent_rows:
        raise ProtocolError(
            f"{row}: the server half put the states into shared memory ({sent_rows['shared']!r:.80}), unasked; install "
            "the same version of torchrl_sglang_hidden on both sides"
        )
    try:
        data = _unpack_bytes(fields)
        places = [(str(kind), str(name), int(count), filled is True) for kind, name, count, filled in fields["places"]]
        num_vectors = sum(1 for *_, filled in places if filled)
        vectors = iter(_tensor(data, torch.float32, (num_vectors, -1, hidden_size)) if num_vectors else ())
        faults = {str(name): str(fault) for name, fault in fields["faults"].items()}
        found = {(kind, name): (next(vectors) if filled else None, count) for kind, name, count, filled in places}
        rows = None if "rows" not in fields else _unpack_rows(fields["rows"], hidden_size)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, AttributeError, OverflowError) as error:
        raise ProtocolError(f"{row}: the states cannot be read ({error}); was the answer cut short?") from error
    if faults:
        name, fault = next(iter(faults.items()))
        raise SpanError(f"{row}, span {name!r}: {fault}")
    segments = {cast("Segment", name): value for (kind, name), value in found.items() if kind == "segment"}
    return Pools(segments, {name: value for (kind, name), value in found.items() if kind == "span"}, faults, rows)


def drop_shared(answer: object) -> None:
    """Removes the shared file that an answer names, if any, without reading it: its states are not wanted any more.

    Never raises: it is for when something else has failed. Only for answers that were asked for through shared memory,
    as in `unpack_answer`.
    """
    sent: Any = answer
    with suppress(KeyError, IndexError, TypeError, AttributeError, ValueError, OSError):
        discard(sent[0]["rows"]["shared"])


def _pack_bytes(data: bytes, way: Way, share: Callable[[bytes], str | None] | None = None) -> dict[str, Any]:
    check = zlib.crc32(data)
    name = share(data) if way == "shared" and share is not None else None
    if name is not None:
        return {"shared": name, "crc32": check}
    return {"data": data if way == "binary" else base64.b64encode(data).decode("ascii"), "crc32": check}


def _unpack_bytes(fields: Mapping[str, Any]) -> bytes:
    sent = fields["data"]
    return _checked(sent if isinstance(sent, bytes) else base64.b64decode(sent, validate=True), fields)


def _checked(data: bytes, fields: Mapping[str, Any]) -> bytes:
    if zlib.crc32(data) != fields["crc32"]:
        raise ValueError(f"checksum {zlib.crc32(data)} of {len(data)} bytes, {fields['crc32']} was sent")
    return data


def _unpack_rows(fields: Mapping[str, Any], hidden_size: int) -> WantedRows:
    shape = tuple(int(size) for size in fields["shape"])
    if len(shape) != 3 or shape[2] != hidden_size:
        raise ValueError(f"rows of shape {shape}, expected [N, K, {hidden_size}]")
    data = _checked(fetch(fields["shared"]), fields) if "shared" in fields else _unpack_bytes(fields)
    return WantedRows(int(fields["first"]), _tensor(data, _ROW_DTYPES[fields["dtype"]], shape))


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    # A copy: bytes are read-only, and a tensor over them must not be written to.
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
