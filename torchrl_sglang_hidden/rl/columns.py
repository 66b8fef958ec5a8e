"""Rows as columns: how a shard holds N rows, and how they are read back.

A leaf of all rows is one of three things in a shard: a tensor ``[N, …]``, where all rows have one shape; the rows'
tensors one after the other, with their lengths; or JSON, for what is no tensor. Strings and chats are JSON too, so that
nothing in a shard is a pickle. Knows nothing of files, policies or what the leaves mean.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase, is_non_tensor, lazy_stack

from torchrl_sglang_hidden.errors import ImageError, InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.images.image_data import read_image
from torchrl_sglang_hidden.rl.prompts import leaf_keys
from torchrl_sglang_hidden.rl.rows import text_leaf

__all__ = [
    "Column",
    "Key",
    "Leaves",
    "as_texts",
    "check_row",
    "count_bytes",
    "digest_images",
    "digest_rows",
    "is_ragged",
    "join_rows",
    "leaves_of",
    "pack",
    "repeat",
    "same_row",
    "schema_of",
    "unpack",
]

Key: TypeAlias = tuple[str, ...]
# One row: tensors on the CPU, and what JSON can hold.
Leaves: TypeAlias = dict[Key, Any]
# One leaf of N rows: a tensor [N, …], or one value per row where the shapes differ or the values are no tensors.
Column: TypeAlias = torch.Tensor | list[Any]

DENSE, RAGGED, JSON = "dense", "ragged", "json"
# Those that TensorDict maps from a file: it writes others, and does not read them.
DTYPES = {
    "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
}  # fmt: skip
# A leaf is a file of its name.
MAX_NAME_BYTES = 240


def leaves_of(row: TensorDictBase) -> Leaves:
    """Return copies of the leaves of a row, a TensorDict without batch dimensions: a generator may reuse its own."""
    found: Leaves = {}
    for key in leaf_keys(row):
        value = row.get(key)
        path = key if isinstance(key, tuple) else (key,)
        found[path] = value.tolist() if is_non_tensor(value) else value.detach().cpu().clone()
    return found


def digest_images(label: str, row: Leaves, keys: Collection[Key]) -> Leaves:
    """Return a row whose images are digests where a shard does not hold them: a field's own pixels and texts stay.

    Args:
        label: names the row in errors.
        row: its leaves, as `leaves_of` returns them.
        keys: where images are; those that are not there are left out.

    Raises:
        InputTypeError: something that is no image.
    """
    images = {key: row[key] for key in keys if key in row and not isinstance(row[key], torch.Tensor)}
    return {**row, **{key: _digest(f"{label}, {'/'.join(key)!r}:", value) for key, value in images.items()}}


def _digest(name: str, value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return [_digest(name, one) for one in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()[:16]
    try:
        return read_image(name, value).digest
    except ImageError:  # the row has no label then, and says why
        return ""


def count_bytes(row: Leaves) -> int:
    """Return how many bytes the leaves of a row take, as JSON where they are no tensors."""
    return sum(
        value.nbytes if isinstance(value, torch.Tensor) else len(_to_json("a row", key, value))
        for key, value in row.items()
    )


# --- what all rows must have in common --------------------------------------------------------------------------------


def schema_of(label: str, row: Leaves) -> dict[str, str]:
    """Return what each leaf of a row is: its dtype, and its shape, of which the first dimension may differ.

    Args:
        label: names the row in errors.
        row: a row.

    Raises:
        InputTypeError: a value that JSON does not hold.
        InputError: two keys that differ in how they are nested alone; a key that no file can have.
    """
    for part in itertools.chain(*row):
        if re.search("[\x00\ud800-\udfff]", part) or len(part.encode()) > MAX_NAME_BYTES:
            raise InputError(
                f"{label}: the name {part!r:.100} cannot be that of a file; expected Unicode without NUL, at most "
                f"{MAX_NAME_BYTES} bytes: rename it"
            )
    found = {"/".join(key): _kind(label, key, value) for key, value in row.items()}
    if len(found) < len(row):
        raise InputError(f"{label}: the keys {sorted(row)} are one name twice with '/' between their parts; use others")
    return found


def _kind(label: str, key: Key, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        shape = ["*", *map(str, value.shape[1:])] if value.ndim else []
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise InputTypeError(f"{label}, {'/'.join(key)!r}: {dtype}; expected one of {sorted(DTYPES)}: convert it")
        return f"{dtype} [{', '.join(shape)}]"
    _to_json(label, key, value)
    return JSON


def check_row(label: str, row: Leaves, schema: Mapping[str, str]) -> None:
    """Refuse a row with other keys, dtypes or shapes than the first one.

    Raises:
        MissingKeyError: it lacks a key.
        InputError: it has a key more.
        InputTypeError: a leaf is something else.
    """
    found = schema_of(label, row)
    missing, more = sorted(schema.keys() - found.keys()), sorted(found.keys() - schema.keys())
    if missing:
        raise MissingKeyError(f"{label}: no {missing}, which the rows before have; add them to this row")
    if more:
        raise InputError(f"{label}: {more}, which the rows before do not have; leave them out, or add them to all rows")
    for name, kind in found.items():
        if kind != schema[name]:
            raise InputTypeError(
                f"{label}, {name!r}: {kind}, and the rows before have {schema[name]}; expected one dtype, and one "
                "shape but for the first dimension"
            )


def _to_json(label: str, key: Key, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputTypeError(
            f"{label}, {'/'.join(key)!r}: {value!r:.80} cannot be recorded ({error}); expected numbers, arrays, "
            "strings, or lists and dicts of them: leave it out, or name it in images_keys if it is an image"
        ) from error


# --- writing ----------------------------------------------------------------------------------------------------------


def pack(rows: Sequence[Leaves], ragged: Collection[Key] = ()) -> TensorDict:
    """Return N rows, which `check_row` found to be alike, as columns.

    Args:
        rows: at least one.
        ragged: the leaves whose lengths belong to the rows, also where they happen to be the same.
    """
    packed = TensorDict()
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if not isinstance(first, torch.Tensor):
            # Texts of JSON lines may have half of a surrogate pair, and json.loads takes it back.
            texts = [bytearray(_to_json("a row", key, value).encode("utf-8", "surrogatepass")) for value in values]
            _set_flat(packed, (JSON, *key), [torch.frombuffer(text, dtype=torch.uint8) for text in texts])
        elif key in ragged or len({value.shape for value in values}) > 1:
            _set_flat(packed, (RAGGED, *key), values)
        else:
            packed.set((DENSE, *key), torch.stack(values))
    return packed


def _set_flat(packed: TensorDict, key: Key, values: Sequence[torch.Tensor]) -> None:
    packed.set((*key, "values"), torch.cat(list(values)))
    packed.set((*key, "lengths"), torch.tensor([len(value) for value in values]))


# --- reading ----------------------------------------------------------------------------------------------------------


def unpack(packed: TensorDictBase) -> dict[Key, Column]:
    """Return the columns of packed rows. Tensors are views of the packed ones."""
    columns: dict[Key, Column] = {}
    for kind, *path in packed.keys(True, True):
        if kind == DENSE:
            columns[tuple(path)] = packed.get((kind, *path))
        elif path[-1] == "lengths":
            key = tuple(path[:-1])
            lengths = packed.get((kind, *path)).tolist()
            values = packed.get((kind, *key, "values")).split(lengths)
            columns[key] = [json.loads(text.numpy().tobytes()) for text in values] if kind == JSON else list(values)
    return columns


def repeat(column: Column, places: torch.Tensor) -> Column:
    """Return a column with the rows at places, int64 ``[M]``."""
    if isinstance(column, torch.Tensor):
        return column[places]
    return [column[place] for place in places.tolist()]


def join_rows(parts: Sequence[Mapping[Key, Column]]) -> TensorDictBase:
    """Return the rows of all parts as one TensorDict.

    Returns:
        Of batch size ``[N]``: dense where all rows have the same shapes; otherwise a lazy stack, whose ragged leaves
        are read with ``get(key, as_list=True)``, and which copies nothing.
    """
    columns = {key: [part[key] for part in parts] for key in parts[0]}
    num_rows = sum(len(column) for column in next(iter(columns.values())))
    if any(is_ragged(found) for found in columns.values()):
        rows = [TensorDict() for _ in range(num_rows)]
        for key, found in columns.items():
            for row, value in zip(rows, itertools.chain(*found), strict=True):
                row.set(key, value if isinstance(value, torch.Tensor) else NonTensorData(value))
        return lazy_stack(rows)
    joined = TensorDict(batch_size=num_rows)
    for key, found in columns.items():
        tensors = [part for part in found if isinstance(part, torch.Tensor)]
        if tensors:
            joined.set(key, torch.cat(tensors) if len(tensors) > 1 else tensors[0])
        else:
            joined.set(key, _non_tensors(list(itertools.chain(*found))))
    return joined


def is_ragged(parts: Iterable[Column]) -> bool:
    """Return whether the rows of a leaf have several shapes."""
    shapes = set()
    for part in parts:
        if isinstance(part, torch.Tensor):
            shapes.add(part.shape[1:])
        elif isinstance(part[0], torch.Tensor):
            return True
    return len(shapes) > 1


def _non_tensors(values: list[Any]) -> NonTensorStack | NonTensorData:
    if all(isinstance(value, str) for value in values):
        return text_leaf(values, torch.Size([len(values)]))
    return NonTensorStack(*[NonTensorData(value) for value in values])


def same_row(one: Leaves, other: Leaves) -> bool:
    """Return whether two rows hold the same bits, NaN included."""
    if one.keys() != other.keys():
        return False
    return all(_same_leaf(value, other[key]) for key, value in one.items())


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) != isinstance(other, torch.Tensor):
        return False
    if not isinstance(one, torch.Tensor):
        return json.dumps(one) == json.dumps(other)
    bits, other_bits = (value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits, other_bits)


def digest_rows(rows: Iterable[Leaves]) -> str:
    """Return what tells rows apart from others: the SHA-256 of their keys and bits, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        for key in sorted(row):
            value = row[key]
            if isinstance(value, torch.Tensor):
                kind = f"{value.dtype} {list(value.shape)}"
                data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            else:
                kind, data = JSON, _to_json("a row", key, value).encode("utf-8", "surrogatepass")
            # With its length, so that no leaf can end where another begins.
            digest.update(f"{json.dumps(key)} {kind} {len(data)}:".encode())
            digest.update(data)
        digest.update(b"\n")
    return digest.hexdigest()


def as_texts(values: Iterable[Any]) -> list[str]:
    """Return values that are no tensors as strings: as they are, or as JSON."""
    return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
