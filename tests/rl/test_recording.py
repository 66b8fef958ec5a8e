"""`Recording`: metadata, replay buffers, files of other libraries, and shards that are damaged."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from helpers.policy_batches import make
from helpers.recordings import PROMPT, SEGMENTS, TOKENIZER, data_rows, ids_of, vector_of
from safetensors.torch import load_file
from tensordict import TensorDict

from torchrl_sglang_hidden import (
    HiddenSpec,
    InputError,
    Recording,
    RecordingError,
    load_recording,
    record_hidden_states,
)
from torchrl_sglang_hidden.rl import record
from torchrl_sglang_hidden.rl.prompts import leaf_keys

ROWS = data_rows(8)


@pytest.fixture(autouse=True)
def a_shard_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "SHARD_SECONDS", 0.0)


def recorded(path: Path, **options: Any) -> Recording:
    policy = make("text", hidden=HiddenSpec(SEGMENTS, layers=(0, -1)))[0]
    options = {"prompt": PROMPT, "batch_size": 3, "progress": False, **options}
    return record_hidden_states(policy, ROWS, path, **options)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_the_metadata_says_what_was_recorded(tmp_path: Path) -> None:
    metadata = recorded(tmp_path / "r", tokens=True, every=2).metadata
    assert metadata["model"] == {"path": "recorder", "vocab_size": 96, "hidden_size": 8, "num_layers": 4}
    assert metadata["weight_version"] == "v7"
    assert metadata["segments"] == ["prompt", "response"]
    assert metadata["layers"] == [0, -1]
    assert (metadata["pooling"], metadata["tokens"], metadata["every"]) == ("mean", "torch.float16", 2)
    assert metadata["prompt"] == PROMPT
    assert metadata["chat_template"]["text"] == TOKENIZER.chat_template
    assert metadata["versions"].keys() >= {"torchrl-sglang-hidden", "torch", "torchrl", "tensordict"}
    assert metadata["fields"] == {
        "number": "int64 []", "words": "json", "obs": "float32 [*, 3]", "done": "bool []"
    }  # fmt: skip
    assert len(metadata["hash"]) == 64
    assert metadata["complete"] is True


def test_the_hash_is_of_what_was_recorded_with_what(tmp_path: Path) -> None:
    first, same = recorded(tmp_path / "a"), recorded(tmp_path / "b", batch_size=5)
    other = recorded(tmp_path / "c", every=2)
    assert first.metadata["hash"] == same.metadata["hash"] != other.metadata["hash"]


def test_shards_are_tensordicts_without_pickles(tmp_path: Path) -> None:
    recorded(tmp_path / "r", tokens=True)
    shards = sorted((tmp_path / "r" / "shards").iterdir())
    assert [shard.name for shard in shards] == ["000000.tdz", "000001.tdz", "000002.tdz"]
    shard = TensorDict.load_memmap(shards[1], allow_pickle=False)
    assert shard["rows", "dense", "number"].tolist() == [3, 4, 5]
    assert shard["labels", "dense", "hidden_states", "prompt"].shape == (3, 2, 8)


def test_a_recording_that_was_not_ended(tmp_path: Path) -> None:
    def rows() -> Any:
        yield from ROWS[:4]
        raise ValueError("the data ends here")

    policy = make("text", hidden=HiddenSpec(SEGMENTS))[0]
    with pytest.raises(ValueError, match="ends here"):
        record_hidden_states(policy, rows(), tmp_path / "r", prompt=PROMPT, batch_size=2, progress=False)
    recording = load_recording(tmp_path / "r")
    assert (len(recording), recording.metadata["complete"]) == (4, False)
    assert recording.tensordict["number"].tolist() == [0, 1, 2, 3]
    assert repr(recording) == f"Recording('{tmp_path / 'r'}', rows=4, failures=0)"


# --- damage -----------------------------------------------------------------------------------------------------------


def test_there_is_no_recording(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="has no recording; pass the directory"):
        load_recording(tmp_path)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte, "its checksum is .*the file was changed or damaged; copy it again"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), r"has \d+ bytes, and .* expected \d+: a part is mi"),
        (Path.unlink, "No such file.*; copy the whole directory"),
    ],
)
def test_a_damaged_shard(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    recorded(tmp_path / "r")
    damage(tmp_path / "r" / "shards" / "000001.tdz")
    with pytest.raises(RecordingError, match=words):
        _ = load_recording(tmp_path / "r").tensordict


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["about"].update(weight_version="v9"), "its hash is .*it was changed after it was"),
        (lambda content: content["about"].update(format=2), "has format 2, and this version reads 1; install"),
        (lambda content: content.pop("shards"), "is no manifest of this version .*; load the directory"),
    ],
)
def test_a_changed_manifest(tmp_path: Path, change: Callable[[Any], None], words: str) -> None:
    recorded(tmp_path / "r")
    manifest = tmp_path / "r" / "manifest.json"
    content = json.loads(manifest.read_text())
    change(content)
    manifest.write_text(json.dumps(content))
    with pytest.raises(RecordingError, match=words):
        load_recording(tmp_path / "r")


def shard_with(**fields: Any) -> Callable[[Any], None]:
    return lambda content: content["shards"][0].update(fields)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"x": value}
    return value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shard_with(file="../../../etc/passwd"), r"a shard's file is like"),
        (shard_with(file="/etc/passwd"), r"a shard's file is like"),
        (shard_with(file="shards/../../000000.tdz"), r"a shard's file is like"),
        (shard_with(file="shards/000000.tdz\0"), r"a shard's file is like"),
        (shard_with(file=["shards/000000.tdz"]), r"a shard's file is like"),
        (shard_with(rows="3"), "at least 1 row"),
        (shard_with(rows=-3), "at least 1 row"),
        (shard_with(rows=3.0), "at least 1 row"),
        (shard_with(nbytes=None), "a size and a checksum"),
        (shard_with(failures=[{"row": "0", "reason": "x"}]), "a row and a reason"),
        (shard_with(failures=7), "TypeError"),
        (lambda content: content.update(shards={"x": 1}), "TypeError|AttributeError"),
        (lambda content: content.update(complete=None), "complete true or false"),
        (lambda content: content["about"].pop("every"), "KeyError: 'every'"),
        (lambda content: content["about"].update(every=0), "every is at least 1"),
        (lambda content: content["about"].update(every=True), "every is at least 1"),
        (lambda content: content["about"].update(prompt=nested(400)), "nested up to 64 levels"),
    ],
)
def test_a_manifest_that_somebody_made_up(tmp_path: Path, change: Callable[[Any], None], words: str) -> None:
    """Its hash is right: whoever made it up wrote that too."""
    recorded(tmp_path / "r")
    manifest = tmp_path / "r" / "manifest.json"
    content = json.loads(manifest.read_text())
    change(content)
    content["hash"] = hashlib.sha256(json.dumps(content["about"], sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(content))
    with pytest.raises(RecordingError, match=rf"is no manifest of this version .*({words}).*; load the directory"):
        load_recording(tmp_path / "r")


def rewritten(change: Callable[[dict[str, bytes]], Any]) -> Callable[[bytes], bytes]:
    """Return what makes an archive of changed files."""

    def rewrite(data: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        change(members)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return buffer.getvalue()

    return rewrite


def halve_every_tensor(members: dict[str, bytes]) -> None:
    for name in members:
        if name.endswith(".memmap"):
            members[name] = members[name][: len(members[name]) // 2]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: b"no archive",
        lambda data: data[: len(data) // 2],
        rewritten(lambda members: members.pop("meta.json")),
        rewritten(lambda members: members.update({"meta.json": b"{"})),
        rewritten(lambda members: members.update({"meta.json": b"\xff"})),
        rewritten(lambda members: members.update({"meta.json": b"[]"})),
        rewritten(lambda members: [members.pop(name) for name in list(members) if name.startswith("labels/")]),
        rewritten(halve_every_tensor),
    ],
)
def test_a_shard_that_somebody_made_up(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    """Its checksum is right: whoever made it up wrote that too."""
    recorded(tmp_path / "r")
    manifest, shard = tmp_path / "r" / "manifest.json", tmp_path / "r" / "shards" / "000000.tdz"
    data = change(shard.read_bytes())
    shard.write_bytes(data)
    content = json.loads(manifest.read_text())
    content["shards"][0].update(nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest.write_text(json.dumps(content))
    with pytest.raises(RecordingError, match=r"it is no shard of a recording \(.*\); copy it again"):
        _ = load_recording(tmp_path / "r").tensordict


def test_a_shard_of_other_rows(tmp_path: Path) -> None:
    recorded(tmp_path / "r")
    manifest = tmp_path / "r" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["shards"][0]["rows"] += 1
    manifest.write_text(json.dumps(content))
    with pytest.raises(RecordingError, match=r"its leaves have \[3\] rows, and the manifest expected 4; copy it again"):
        _ = load_recording(tmp_path / "r").tensordict


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff\xfe\x00", b"[]", b"[" * 100_000, b'{"about": [], "shards": [], "complete": true, "hash": "a"}'],
    ids=["cut", "bytes", "list", "deep", "about"],
)
def test_a_file_that_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(RecordingError, match=r"is no manifest of this version .*; load the directory"):
        load_recording(tmp_path)


# --- replay buffers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [False, True])
def test_a_replay_buffer_samples_the_rows(tmp_path: Path, tokens: bool) -> None:
    buffer = recorded(tmp_path / "r", tokens=tokens).as_replay_buffer(batch_size=16)
    assert len(buffer) == len(ROWS)
    batch = buffer.sample()
    assert batch.batch_size == (16,)
    for row in batch.unbind(0):
        expected = ROWS[int(row["number"])]
        torch.testing.assert_close(row["hidden_states", "response"][1], vector_of(expected, "response"))
        assert row["words"] == expected["words"]


def test_a_replay_buffer_feeds_a_loss(tmp_path: Path) -> None:
    buffer = recorded(tmp_path / "r").as_replay_buffer(batch_size=4)
    batch = buffer.sample().select("obs", ("hidden_states", "prompt")).contiguous()
    assert torch.nn.Linear(16, 1)(batch["hidden_states", "prompt"].flatten(1)).shape == (4, 1)


# --- other libraries --------------------------------------------------------------------------------------------------


def read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def read_hdf5(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            found[name] = node.asstr()[:] if h5py.check_string_dtype(node.dtype) else node[:]

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def read_zarr(path: Path) -> dict[str, Any]:
    group = zarr.open_group(path, mode="r")
    return {name: node[:] for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}


def read_safetensors(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: value.float().numpy() for name, value in load_file(path).items()}
    for name in ("words", "text_generated", "finish_reason"):
        parts = np.split(found[name].astype(np.uint8), found.pop(f"{name}_lengths").astype(int).cumsum()[:-1])
        found[name] = np.array([part.tobytes().decode() for part in parts])
    return found


FORMATS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "to_npz": ("out.npz", read_npz),
    "to_hdf5": ("out.h5", read_hdf5),
    "to_zarr": ("out.zarr", read_zarr),
    "to_safetensors": ("out.safetensors", read_safetensors),
}


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_libraries_read_all_of_it(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    recording = recorded(tmp_path / "r", tokens=True, dtype=dtype)
    name, read = FORMATS[method]
    getattr(recording, method)(tmp_path / name)
    found, out = read(tmp_path / name), recording.tensordict
    keys = {"/".join(key) if isinstance(key, tuple) else key for key in leaf_keys(out)}
    ragged = {"token_hidden_states/prompt", "token_hidden_states/response", "prompt_ids", "response_ids"}
    assert set(found) == keys | {f"{key}_lengths" for key in ragged}
    assert found["number"].tolist() == [row["number"] for row in ROWS]
    assert list(found["words"]) == [row["words"] for row in ROWS]
    assert np.array_equal(found["obs"], np.stack([row["obs"] for row in ROWS]))
    assert np.array_equal(found["hidden_states/prompt"], out["hidden_states", "prompt"].numpy())
    assert found["hidden_states/prompt"].dtype == np.float32
    assert found["prompt_ids_lengths"].tolist() == [len(ids_of(row)) for row in ROWS]
    assert found["prompt_ids"].tolist() == [token for row in ROWS for token in ids_of(row)]
    states = torch.cat(out.get(("token_hidden_states", "prompt"), as_list=True)).float().numpy()
    assert np.array_equal(found["token_hidden_states/prompt"].astype(np.float32), states)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["r", name]), "nothing is left over"


@pytest.mark.parametrize("method", FORMATS)
def test_a_file_that_is_there_already(tmp_path: Path, method: str) -> None:
    recording = recorded(tmp_path / "r")
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match="mine is there already; remove it, or use another path"):
        getattr(recording, method)(tmp_path / "mine")
    with pytest.raises(RecordingError, match="cannot be written"):
        getattr(recording, method)(tmp_path / "mine" / "out")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("method", "row", "words"),
    [
        ("to_hdf5", {"text": "a\0"}, "HDF5 cannot hold 'text' .*NULL.*; use another format, or record"),
        ("to_hdf5", {"text": "\ud83d"}, "HDF5 cannot hold 'text'"),
        ("to_safetensors", {"text": "\ud83d"}, "safetensors cannot hold 'text'"),
        ("to_zarr", {"text": "\ud83d"}, "Zarr cannot hold 'text'"),
        ("to_zarr", {"..": 1}, r"Zarr cannot hold '\.\.'"),
    ],
)
def test_what_another_library_cannot_hold(tmp_path: Path, method: str, row: dict[str, Any], words: str) -> None:
    policy, _ = make("text", hidden=HiddenSpec(("prompt",)))
    recording = record_hidden_states(policy, [row], tmp_path / "r", prompt=lambda row: "w1", progress=False)
    with pytest.raises(InputError, match=words):
        getattr(recording, method)(tmp_path / "out")
    recording.to_npz(tmp_path / "out.npz")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.npz", "r"]


@pytest.mark.parametrize(("method", "library"), [("to_hdf5", "h5py"), ("to_zarr", "zarr")])
def test_a_library_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, library: str
) -> None:
    recording = recorded(tmp_path / "r")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"{library} is not installed.*pip install 'torchrl-sglang-hidden\[export\]'"):
        getattr(recording, method)(tmp_path / "out")


def test_it_pickles(tmp_path: Path) -> None:
    recording = recorded(tmp_path / "r")
    assert len(pickle.loads(pickle.dumps(recording))) == len(recording)
