"""Recordings as files of other libraries: NPZ, HDF5, safetensors, Zarr.

Every leaf becomes an array under its key, with ``/`` between the parts of a nested one. Where rows have several lengths
the array has them one after the other, and beside it ``…_lengths`` has the length of each. Knows nothing of shards.
"""

from __future__ import annotations

import importlib
import itertools
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.rl.columns import Column, Key, as_texts, is_ragged
from torchrl_sglang_hidden.rl.shards import writing

__all__ = ["write_hdf5", "write_npz", "write_safetensors", "write_zarr"]

Parts: TypeAlias = Sequence[Mapping[Key, Column]]


def write_npz(parts: Parts, path: Path) -> None:
    """Write a NPZ, one array at a time."""
    with _new(path) as new, zipfile.ZipFile(new, "w") as archive:
        for name, array in _numpy_arrays(parts):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                write_array: Any = np.lib.format.write_array  # without types in numpy
                write_array(file, np.asarray(array), allow_pickle=False)


def write_hdf5(parts: Parts, path: Path) -> None:
    """Write a HDF5 file, one data set at a time."""
    h5py = _import("h5py")
    with _new(path) as new, h5py.File(new, "w") as file:
        for name, array in _numpy_arrays(parts):
            with _held_by("HDF5", name):
                file.create_dataset(name, data=array, dtype=h5py.string_dtype() if isinstance(array, list) else None)


def write_zarr(parts: Parts, path: Path) -> None:
    """Write a directory of Zarr arrays, one at a time."""
    zarr = _import("zarr")
    with _new(path) as new:
        group = zarr.open_group(new, mode="w-")
        for name, array in _numpy_arrays(parts):
            with _held_by("Zarr", name):
                if isinstance(array, list):
                    group.create_array(name, shape=(len(array),), dtype=str)[:] = np.array(array, dtype=object)
                else:
                    group.create_array(name, data=array)


def write_safetensors(parts: Parts, path: Path) -> None:
    """Write a safetensors file, which has no strings: these are UTF-8 bytes with lengths. All of it is in memory."""
    tensors = {}
    for name, array in _arrays(parts):
        if isinstance(array, list):
            with _held_by("safetensors", name):
                texts = [torch.tensor(list(text.encode()), dtype=torch.uint8) for text in array]
            tensors[name], tensors[f"{name}_lengths"] = torch.cat(texts), _lengths(texts)
        else:
            tensors[name] = array.contiguous()
    with _new(path) as new:
        try:
            save_file(tensors, new)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _arrays(parts: Parts) -> Iterator[tuple[str, torch.Tensor | list[str]]]:
    """Yield every leaf by its name: a tensor, or the N strings of one that has no numbers."""
    for key in parts[0]:
        name, found = "/".join(key), [part[key] for part in parts]
        tensors = [part for part in found if isinstance(part, torch.Tensor)]
        if is_ragged(found):
            rows = list(itertools.chain(*found))
            yield name, torch.cat(rows)
            yield f"{name}_lengths", _lengths(rows)
        elif tensors:
            yield name, torch.cat(tensors)
        else:
            yield name, as_texts(itertools.chain(*found))


def _numpy_arrays(parts: Parts) -> Iterator[tuple[str, Any]]:
    """Yield every leaf as numpy has it: bfloat16, which it lacks, as float32."""
    for name, array in _arrays(parts):
        if isinstance(array, torch.Tensor):
            yield name, (array.float() if array.dtype == torch.bfloat16 else array).numpy()
        else:
            yield name, array


def _lengths(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([len(row) for row in rows])


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{name} is not installed, which writes this format; install it with pip install "
            "'torchrl-sglang-hidden[export]'"
        ) from error


@contextmanager
def _held_by(form: str, name: str) -> Iterator[None]:
    """Turn what a library says of a name, or of values, that its files cannot hold into an error of this package."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{form} cannot hold {name!r} ({error}); use another format, or record the data without it"
        ) from error


@contextmanager
def _new(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which takes its name once it is whole."""
    if path.exists():
        raise InputError(f"{path} is there already; remove it, or use another path")
    new = path.with_name(f"{path.name}.part")
    try:
        with writing(path):
            yield new
            new.replace(path)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        elif new.exists():
            new.unlink()
