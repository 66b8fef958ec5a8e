"""Which weights a server takes: what it says of them, and the headers of a checkpoint, broken and made up too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchrl_sglang_hidden.errors import ProtocolError
from torchrl_sglang_hidden.protocol.served_weights import INDEX, ServedWeights, read_header, safetensors_files

GOOD = {"tensors": {"a": ["BF16", [4, 8]], "b": ["F32", []]}, "tied": True, "quantization": ""}


def test_what_is_packed_is_read() -> None:
    found = ServedWeights.unpack(json.loads(json.dumps(GOOD)))
    assert found == ServedWeights({"a": ("BF16", (4, 8)), "b": ("F32", ())}, True, "")
    assert ServedWeights.unpack(found.pack()) == found


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": None}, {"tensors": []}, {"tensors": {"a": None}}, {"tensors": {"a": ["BF16"]}},
        {"tensors": {"a": ["BF16", [4], 1]}}, {"tensors": {"a": ["BF16", "48"]}}, {"tensors": {"a": ["BF16", [4.5]]}},
        {"tensors": {"a": ["BF16", [-1]]}}, {"tensors": {"a": ["BF16", [True]]}}, {"tensors": {"a": [16, [4]]}},
        {"tied": "no"}, {"tied": None}, {"quantization": None}, {"quantization": ["fp8"]},
    ],
)  # fmt: skip
def test_weights_of_other_types(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match=r"does not say which weights it serves \(.*\); use the same version"):
        ServedWeights.unpack({**GOOD, **changes})


@pytest.mark.parametrize("gone", GOOD)
def test_weights_that_lack_something(gone: str) -> None:
    with pytest.raises(ProtocolError, match=rf"which weights it serves \('{gone}'\)"):
        ServedWeights.unpack({name: value for name, value in GOOD.items() if name != gone})


@pytest.mark.parametrize(
    "names",
    [["../m.safetensors"], ["/etc/passwd"], ["sub/m.safetensors"], [".."], [""], [7], [None], [["m"]], "m.safetensors"],
)
def test_an_index_names_files_beside_it_alone(tmp_path: Path, names: Any) -> None:
    weight_map = dict(enumerate(names)) if isinstance(names, list) else names
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="names no safetensors"):
        safetensors_files(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "m.safetensors"}}))
    assert safetensors_files(tmp_path) == [tmp_path / "m.safetensors"]


@pytest.mark.parametrize("index", [b"", b"[]", b"{}", b"\xff", b"[" * 5000])
def test_an_index_that_cannot_be_read(tmp_path: Path, index: bytes) -> None:
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(ValueError, match="names no safetensors"):
        safetensors_files(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [[], 7, {"a": None}, {"a": {}}, {"a": {**ENTRY, "shape": 2}}, {"a": {**ENTRY, "shape": [2.0]}},
     {"a": {**ENTRY, "shape": [-2]}}, {"a": {**ENTRY, "dtype": None}}],
)  # fmt: skip
def test_a_header_of_other_types(tmp_path: Path, header: Any) -> None:
    write(tmp_path / "m", {"a": ENTRY})
    assert read_header(tmp_path / "m") == {"a": ("F32", (2,))}
    write(tmp_path / "m", header)
    with pytest.raises(ValueError, match="is no safetensors file"):
        read_header(tmp_path / "m")


@pytest.mark.parametrize(
    "data", [b"", b"\1", b"\xff" * 8, (9).to_bytes(8, "little"), bytes(8), b"\4" + bytes(7) + b"[[[["]
)
def test_a_header_that_cannot_be_read(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(ValueError, match="is no safetensors file"):
        read_header(tmp_path / "m")


def write(path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
