"""Targets of fuzzing: everything that reads files which another program wrote, or a stranger could have.

Each writes a spoiled file, reads it, and checks what comes out. Beside the files lies one that no reader may touch.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase

from helpers.policy_batches import make
from helpers.recordings import PROMPT, SEGMENTS, data_rows
from helpers.spoiling import Choices, spoil
from torchrl_sglang_hidden import HiddenSpec, load_recording, record_hidden_states
from torchrl_sglang_hidden.errors import RecordingError
from torchrl_sglang_hidden.protocol.served_weights import INDEX, read_header, safetensors_files
from torchrl_sglang_hidden.protocol.shared_memory import discard, fetch, is_shared

SECRET = b"nobody reads this"


@functools.cache
def _place() -> Path:
    """Return a directory of this process, in memory where there is one; removed at its end."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="fuzz-", dir=base))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    (path / "secret").write_bytes(SECRET)
    return path


def _check_secret() -> None:
    assert (_place() / "secret").read_bytes() == SECRET


# --- shared memory ----------------------------------------------------------------------------------------------------

DATA_NAME = f"torchrl_sglang_hidden-{'0f' * 8}-12"
SIGN_NAME = f"torchrl_sglang_hidden-{'0f' * 8}-here"


def _file(path: Path, data: bytes, mode: int) -> None:
    path.write_bytes(data)
    path.chmod(mode)


def _sparse(path: Path) -> None:
    _file(path, b"", 0o600)
    os.truncate(path, 10**12)


_SHARED: tuple[Callable[[Path], Any], ...] = (
    lambda path: _file(path, b"good", 0o600),
    lambda path: _file(path, b"good", 0o644),
    lambda path: _file(path, b"goods", 0o600),
    lambda path: _file(path, f"torchrl_sglang_hidden-{'0f' * 8}".encode(), 0o600),
    lambda path: path.symlink_to(_place() / "secret"),
    lambda path: path.symlink_to(path),
    os.mkfifo,
    lambda path: path.mkdir(),
    _sparse,
    lambda path: None,
)


def read_shared_files(choices: Choices) -> None:
    """Read and remove files in shared memory by any name, with anything at their place."""
    directory = _place() / "shm"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name in (DATA_NAME, SIGN_NAME):
        choices.pick(_SHARED)(directory / name)
    names: list[Any] = [DATA_NAME, SIGN_NAME, "../secret", f"../shm/{DATA_NAME}", str(_place() / "secret")]
    name = choices.pick((*names, *(spoil(one, choices) for one in names)))
    size = choices.pick((4, 4, 4, 0, 17))
    for read in (lambda: fetch(name, size, directory), lambda: discard(name, directory)):
        try:
            found = read()
        except (OSError, ValueError, TypeError):  # what their one caller takes for an answer that cannot be read
            continue
        assert found is None or found == b"good"[:size]
    if isinstance(name, str) and is_shared(name, directory):
        assert name == SIGN_NAME
        assert (directory / name).read_text() == name.removesuffix("-here")
    _check_secret()


# --- checkpoints ------------------------------------------------------------------------------------------------------

_HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]},
    "b": {"dtype": "F32", "shape": [], "data_offsets": [64, 68]},
}


def read_a_checkpoint(choices: Choices) -> None:
    """Read the header of a safetensors file, and an index of several files."""
    directory = _place() / "checkpoint"
    directory.mkdir(exist_ok=True)
    header = json.dumps(spoil(_HEADER, choices), default=str).encode("utf-8", "surrogatepass")
    size = choices.pick((len(header), len(header), len(header) + 1, len(header) - 1, 0, 2**63, 10**12, 100))
    data = size.to_bytes(8, "little") + header + bytes(68)
    data = choices.pick((data, data, data[: choices.below(len(data))], data[8:]))
    (directory / "m.safetensors").write_bytes(data)
    index = json.dumps(spoil({"weight_map": {"a": "m.safetensors", "b": "n.safetensors"}}, choices), default=str)
    (directory / INDEX).write_bytes(index.encode("utf-8", "surrogatepass"))
    try:
        files = safetensors_files(directory)
    except (OSError, ValueError):
        files = []
    assert all(file.parent == directory and isinstance(file, Path) for file in files)
    try:
        tensors = read_header(directory / "m.safetensors")
    except (OSError, ValueError):
        return
    for name, (dtype, shape) in tensors.items():
        assert isinstance(name, str)
        assert isinstance(dtype, str)
        assert all(type(length) is int and length >= 0 for length in shape)


# --- recordings -------------------------------------------------------------------------------------------------------


@functools.cache
def _recording() -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the manifest and the shards of a small recording."""
    path = _place() / "good"
    policy = make("text", hidden=HiddenSpec(SEGMENTS))[0]
    record_hidden_states(policy, data_rows(4), path, prompt=PROMPT, batch_size=4, tokens=True, every=2, progress=False)
    manifest = json.loads((path / "manifest.json").read_text())
    return manifest, {shard["file"]: (path / shard["file"]).read_bytes() for shard in manifest["shards"]}


@functools.cache
def _members() -> dict[str, bytes]:
    """Return the files in the archive that a shard is."""
    with zipfile.ZipFile(io.BytesIO(next(iter(_recording()[1].values())))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _spoiled_archive(choices: Choices) -> bytes:
    """Return an archive in which one file, or its description, is another."""
    members = dict(_members())
    name = choices.pick(sorted(members))
    data = members[name]
    match choices.below(6):
        case 0:
            del members[name]
        case 1:
            members[f"../{name}"] = b"x"
        case 2:
            members["/tmp/fuzz-escaped"] = b"x"
        case 3:
            members[name] = data[: choices.below(len(data) + 1)]
        case 4:
            members[name] = b"\xff" * len(data)
        case _:
            text = json.loads(data) if name.endswith(".json") and data else None
            members[name] = json.dumps(spoil(text, choices), default=str).encode() if text is not None else data * 2
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return buffer.getvalue()


def read_a_recording(choices: Choices) -> None:
    """Read a recording that was torn, or that somebody made up, checksums and all."""
    manifest, shards = _recording()
    path = _place() / "spoiled"
    shutil.rmtree(path, ignore_errors=True)
    (path / "shards").mkdir(parents=True)
    kind = choices.below(4)
    for name, data in shards.items():
        match kind:
            case 0:
                data = _spoiled_archive(choices)
            case 1:
                data = data[: choices.below(len(data))]
        (path / name).write_bytes(data)
        if choices.below(8):
            sealed = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            manifest = {**manifest, "shards": [{**manifest["shards"][0], **sealed}]}
    changed = spoil(manifest, choices) if kind > 1 else manifest
    if isinstance(changed, dict) and "about" in changed and choices.below(8):
        changed["hash"] = hashlib.sha256(json.dumps(changed["about"], sort_keys=True, default=str).encode()).hexdigest()
    text = json.dumps(changed, default=str).encode("utf-8", "surrogatepass")
    (path / "manifest.json").write_bytes(text if choices.below(9) else text[: choices.below(len(text))])
    try:
        found = load_recording(path)
        assert isinstance(found.metadata, dict)
        assert isinstance(repr(found), str)
        assert type(len(found)) is int
        assert all(type(failure.row) is int and isinstance(failure.reason, str) for failure in found.failures)
        rows = found.tensordict
    except RecordingError:
        return
    finally:
        _check_secret()
        assert not Path("/tmp/fuzz-escaped").exists()
    assert isinstance(rows, TensorDictBase)
    assert len(rows) == len(found)
    for row in rows.unbind(0):
        for value in row.values(True, True):
            assert not isinstance(value, torch.Tensor) or value.isnan().any().item() in (True, False)


FILES: dict[str, Callable[[Choices], None]] = {
    "shared_files": read_shared_files,
    "checkpoint": read_a_checkpoint,
    "recording": read_a_recording,
}
