"""Tensors between client and server half: what is packed comes back, or is refused."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang_hidden.protocol import tensors
from torchrl_sglang_hidden.protocol.shared_memory import MIN_BYTES, SharedFiles, fetch
from torchrl_sglang_hidden.protocol.tensors import (
    DTYPES,
    SharedMemoryFullError,
    Way,
    as_tensor,
    pack_bytes,
    pack_tensor,
    unpack_bytes,
    unpack_tensor,
)

WAYS: tuple[Way, ...] = ("binary", "text", "shared")


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (100 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def sent(fields: dict[str, Any], way: Way) -> dict[str, Any]:
    return fields if way == "binary" else json.loads(json.dumps(fields))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 4)])
def test_a_tensor_comes_back(way: Way, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Few bytes find no room in shared memory, and go as text."""
    tensor = numbers(*shape, dtype=dtype)
    fields = pack_tensor(tensor, way, lambda data: None)
    assert type(fields["data"]) is (bytes if way == "binary" else str)
    found = unpack_tensor(sent(fields, way))
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert torch.equal(found, tensor)
    found.add_(1)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -0.0, 1e-45])
def test_every_bit_comes_back(value: float) -> None:
    """Logits have ``-inf`` where a token was taken away, and JSON has no such number."""
    tensor = torch.tensor([value, 1.0])
    found = unpack_tensor(sent(pack_tensor(tensor, "text"), "text"))
    assert torch.equal(found.view(torch.int32), tensor.view(torch.int32))


def test_a_tensor_that_is_no_block_of_memory() -> None:
    tensor = numbers(4, 6)
    for view in (tensor.T, tensor[:, ::2], tensor[1:3, 2:4], tensor[:1].expand(3, 6)):
        assert torch.equal(unpack_tensor(pack_tensor(view, "binary")), view)


@given(data=st.binary(max_size=200), way=st.sampled_from(WAYS))
def test_bytes_come_back(data: bytes, way: Way) -> None:
    assert unpack_bytes(sent(pack_bytes(data, way), way)) == data


def test_many_bytes_go_through_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "fetch", functools.partial(fetch, directory=tmp_path))
    files, tensor = SharedFiles(tmp_path), numbers(MIN_BYTES // 4)
    fields = sent(pack_tensor(tensor, "shared", files.share), "shared")
    assert len(json.dumps(fields)) < 500
    assert {path.name for path in tmp_path.iterdir()} == {files.sign, fields["shared"]}
    assert torch.equal(unpack_tensor(fields), tensor)
    assert [path.name for path in tmp_path.iterdir()] == [files.sign]
    with pytest.raises(OSError, match=fields["shared"]):
        unpack_tensor(fields)


def test_bytes_that_are_too_many_for_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit holds only where shared memory was asked for: who asks for text or raw bytes has counted the bytes."""
    assert tensors.MAX_TEXT_BYTES == 2**28
    monkeypatch.setattr(tensors, "MAX_TEXT_BYTES", 3 * 2**20)
    most = bytes(3 * 2**20)
    assert unpack_bytes(pack_bytes(most, "shared", lambda data: None)) == most
    for share in (None, lambda data: None):
        with pytest.raises(
            SharedMemoryFullError, match=r"^4 MiB do not fit into the server's shared memory; ask for fewer row"
        ):
            pack_bytes(bytes(2**22), "shared", share)
    with pytest.raises(SharedMemoryFullError):
        pack_tensor(torch.zeros(2**20), "shared", lambda data: None)
    assert pack_bytes(bytes(2**22), "shared", lambda data: "a file")["shared"] == "a file"
    for way in ("binary", "text"):
        assert unpack_bytes(pack_bytes(bytes(2**22), way)) == bytes(2**22)


@pytest.mark.parametrize("way", ["binary", "text"])
def test_nothing_is_shared_unasked(way: Way) -> None:
    def never(data: bytes) -> str:
        raise AssertionError("shared")

    assert "data" in pack_tensor(numbers(3), way, never)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda f: f.update(crc32=f["crc32"] ^ 1), r"checksum \d+ of 24 bytes, \d+ was sent"),
        (lambda f: f.update(data=base64.b64encode(bytes(24)).decode()), r"checksum .* of 24 bytes"),
        (lambda f: f.update(data=f["data"][:-4]), "21 bytes came, expected 24"),
        (lambda f: f.update(data=f["data"][:-2]), "21 bytes came, expected 24"),
        (lambda f: f.update(data="%" * 32), "base64"),
        (lambda f: f.pop("data"), "data"),
        (lambda f: f.pop("crc32"), "crc32"),
        (lambda f: f.pop("shape"), "shape"),
        (lambda f: f.pop("dtype"), "dtype"),
        (lambda f: f.update(dtype="int64"), "int64"),
        (lambda f: f.update(shape=[7]), "24 bytes came, expected 28"),
        (lambda f: f.update(dtype="float16"), "24 bytes came, expected 12"),
        (lambda f: f.update(shape=[10**12, 10**12]), "over the 2147483648 bytes"),
        (lambda f: f.update(shape=[1] * 500 + [6]), "over the"),
        (lambda f: f.update(shape=[2.0, 3]), "a size is 2.0, expected an integer"),
        (lambda f: f.update(shape=[True, 6]), "a size is True, expected an integer"),
        (lambda f: f.update(shape=[-1, 3]), r"a size is -1, expected 0\.\."),
        (lambda f: f.update(data=[1]), r"data are \[1\], expected bytes or text"),
        (lambda f: f.update(crc32=None), "None was sent"),
    ],
)
def test_what_did_not_come_whole(spoil: Callable[[dict[str, Any]], Any], error: str) -> None:
    fields = sent(pack_tensor(numbers(2, 3), "text"), "text")
    unpack_tensor(fields)
    spoil(fields)
    with pytest.raises((ValueError, KeyError, RuntimeError, TypeError), match=error):
        unpack_tensor(fields)


def test_a_tensor_is_a_copy_of_its_bytes() -> None:
    data = numbers(3).numpy().tobytes()
    found = as_tensor(data, torch.float32, (3,))
    found.fill_(0)
    assert as_tensor(data, torch.float32, (3,)).tolist() == numbers(3).tolist()


def test_a_way_that_no_case_handles_is_refused() -> None:
    with pytest.raises(AssertionError, match="pigeon"):
        pack_bytes(b"abc", "pigeon")  # type: ignore[arg-type]
