"""Tensors on their way from the server: raw bytes, text, or a file in shared memory, each with a checksum.

Used on both sides. Floating-point bytes and integers only: nothing received is ever unpickled.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch

from torchrl_sglang_hidden.protocol.shared_memory import fetch

__all__ = [
    "DTYPES",
    "MAX_TEXT_BYTES",
    "NoRoomError",
    "Share",
    "Way",
    "as_tensor",
    "pack_bytes",
    "pack_tensor",
    "unpack_bytes",
    "unpack_tensor",
]

# How bytes travel: raw (in-process), as base64 text (JSON), or, for many of them, in a file of shared memory.
Way = Literal["binary", "text", "shared"]
# Puts bytes into shared memory and gives the file's name, or None where there is no room.
Share: TypeAlias = Callable[[bytes], str | None]

# Of one block: as text it is copied by three processes and parsed as JSON, in a file by nobody.
MAX_TEXT_BYTES = 256 * 2**20

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
}


class NoRoomError(Exception):
    """Bytes that are too many for text, and found no room in shared memory."""


def pack_bytes(data: bytes, way: Way, share: Share | None = None) -> dict[str, Any]:
    """Writes bytes; those that find no room in shared memory as text.

    Raises:
        NoRoomError: they are too many for that.
    """
    check = zlib.crc32(data)
    name = share(data) if way == "shared" and share is not None else None
    if name is not None:
        return {"shared": name, "crc32": check}
    if way == "shared" and len(data) > MAX_TEXT_BYTES:
        raise NoRoomError(
            f"{len(data) / 2**20:.0f} MiB found no room in the server's shared memory; ask for fewer rows at a time"
        )
    return {"data": data if way == "binary" else base64.b64encode(data).decode("ascii"), "crc32": check}


def unpack_bytes(fields: Mapping[str, Any]) -> bytes:
    """Reads what `pack_bytes` wrote; what was in shared memory is removed there.

    Raises:
        ValueError: other bytes than were sent.
        OSError: the file is not there.
        KeyError: a field is not there.
    """
    if "shared" in fields:
        data = fetch(fields["shared"])
    else:
        sent = fields["data"]
        data = sent if isinstance(sent, bytes) else base64.b64decode(sent, validate=True)
    if zlib.crc32(data) != fields["crc32"]:
        raise ValueError(f"checksum {zlib.crc32(data)} of {len(data)} bytes, {fields['crc32']} was sent")
    return data


def pack_tensor(tensor: torch.Tensor, way: Way, share: Share | None = None) -> dict[str, Any]:
    """Writes a tensor on the CPU, of one of `DTYPES`."""
    tensor = tensor.contiguous()
    name = next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
    data = tensor.view(torch.uint8).numpy().tobytes()
    return {"shape": list(tensor.shape), "dtype": name, **pack_bytes(data, way, share)}


def unpack_tensor(fields: Mapping[str, Any]) -> torch.Tensor:
    """Reads what `pack_tensor` wrote; raises as `unpack_bytes`, and RuntimeError for another shape."""
    shape = tuple(int(size) for size in fields["shape"])
    return as_tensor(unpack_bytes(fields), DTYPES[fields["dtype"]], shape)


def as_tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over a copy: bytes are read-only, and a tensor over them must not be written to."""
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
