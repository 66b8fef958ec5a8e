"""Packs tensors for the way from the server: as raw bytes, as text, or as a file in shared memory, with a checksum.

Used on both sides. Floating-point bytes and integers only: nothing received is ever unpickled. Knows nothing of
requests, nor of what a tensor means.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, assert_never

import torch

from torchrl_sglang_hidden.protocol.excerpts import as_count, excerpt
from torchrl_sglang_hidden.protocol.shared_memory import fetch
from torchrl_sglang_hidden.records import MAX_ANSWER_BYTES

__all__ = [
    "DTYPES",
    "MAX_TEXT_BYTES",
    "Share",
    "SharedMemoryFullError",
    "Way",
    "as_tensor",
    "pack_bytes",
    "pack_tensor",
    "unpack_bytes",
    "unpack_tensor",
]

# How bytes travel: raw in one process, as base64 text in JSON, or in a file of shared memory where they are many.
Way = Literal["binary", "text", "shared"]
# Writes bytes into shared memory and returns the file's name; None where they do not fit.
Share: TypeAlias = Callable[[bytes], str | None]

# Most bytes of one tensor as text, which three processes copy and parse as JSON. A file is not copied.
MAX_TEXT_BYTES = 256 * 2**20

# No tensor that travels has more.
MAX_DIMENSIONS = 3

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
}


class SharedMemoryFullError(Exception):
    """Raised for bytes that do not fit into shared memory and are too many for text."""


def pack_bytes(data: bytes, way: Way, share: Share | None = None) -> dict[str, Any]:
    """Write bytes with their checksum; where shared memory is full or not worth it, as text.

    Args:
        data: the bytes.
        way: how they travel.
        share: writes bytes into shared memory, for the way ``"shared"``.

    Raises:
        SharedMemoryFullError: they do not fit into shared memory and are over `MAX_TEXT_BYTES`.
    """
    checksum = zlib.crc32(data)
    match way:
        case "binary":
            return {"data": data, "crc32": checksum}
        case "shared":
            name = None if share is None else share(data)
            if name is not None:
                return {"shared": name, "crc32": checksum}
            if len(data) > MAX_TEXT_BYTES:
                raise SharedMemoryFullError(
                    f"{len(data) / 2**20:.0f} MiB do not fit into the server's shared memory; ask for fewer rows at a "
                    "time"
                )
            return pack_bytes(data, "text")
        case "text":
            return {"data": base64.b64encode(data).decode("ascii"), "crc32": checksum}
        case unknown:
            assert_never(unknown)


def unpack_bytes(fields: Mapping[str, Any], size: int | None = None) -> bytes:
    """Read what `pack_bytes` wrote. A file in shared memory is removed.

    Args:
        fields: what `pack_bytes` wrote.
        size: how many bytes they must be, which is checked before there is memory for them; None for what came as
            bytes or text, and is in memory already.

    Raises:
        ValueError: the bytes are not the ones that were sent.
        OSError: the file does not exist, or is not the server's own.
        KeyError: a field is missing.
        TypeError: a field is of another type.
    """
    if "shared" in fields:
        if size is None:
            raise ValueError("bytes of any number are in shared memory")
        data = fetch(fields["shared"], size)
    else:
        sent = fields["data"]
        if not isinstance(sent, (bytes, str)):
            raise TypeError(f"the data are {excerpt(sent)}, expected bytes or text")
        length = len(sent) if isinstance(sent, bytes) else len(sent) // 4 * 3 - sent[-2:].count("=")
        if size is not None and length != size:
            raise ValueError(f"{length} bytes came, expected {size}")
        data = sent if isinstance(sent, bytes) else base64.b64decode(sent, validate=True)
    if zlib.crc32(data) != fields["crc32"]:
        raise ValueError(f"checksum {zlib.crc32(data)} of {len(data)} bytes, {excerpt(fields['crc32'])} was sent")
    return data


def pack_tensor(tensor: torch.Tensor, way: Way, share: Share | None = None) -> dict[str, Any]:
    """Write a tensor that is on the CPU and has one of `DTYPES`; arguments and errors are those of `pack_bytes`."""
    tensor = tensor.contiguous()
    name = next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
    data = tensor.view(torch.uint8).numpy().tobytes()
    return {"shape": list(tensor.shape), "dtype": name, **pack_bytes(data, way, share)}


def unpack_tensor(
    fields: Mapping[str, Any], kind: Literal["floats", "ids"] | None = None, limit: int = MAX_ANSWER_BYTES
) -> torch.Tensor:
    """Read what `pack_tensor` wrote.

    Args:
        fields: what `pack_tensor` wrote.
        kind: what they must be: numbers of a floating-point dtype, or int32; None for either.
        limit: most bytes that they may be. A larger shape allocates nothing.

    Raises:
        ValueError: the bytes are not the ones that were sent, or do not have the shape.
        OSError: the file in shared memory does not exist.
        KeyError: a field is missing.
        TypeError: a field is of another type.
    """
    shape = tuple(as_count(size, "a size") for size in fields["shape"])
    dtype = DTYPES[fields["dtype"]]
    if kind is not None and dtype.is_floating_point is not (kind == "floats"):
        raise ValueError(f"numbers of {dtype}, expected {kind}")
    size = math.prod(shape) * dtype.itemsize
    if size > limit or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a shape of {excerpt(fields['shape'])}, over the {limit} bytes that were asked for")
    return as_tensor(unpack_bytes(fields, size), dtype, shape)


def as_tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Make a tensor of a copy of the bytes: a tensor over bytes themselves must not be written to."""
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)
