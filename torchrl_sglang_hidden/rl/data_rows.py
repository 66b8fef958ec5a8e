"""`open_rows`: the rows of a data set, one at a time, from any row on.

Reads a TensorDict, mappings (lists, generators, Hugging Face data sets), NPZ and JSON-lines files, directories that
TensorDict or Hugging Face saved, and folders of image files. Knows nothing of prompts; of a file or a large TensorDict
few rows are in memory.
"""

from __future__ import annotations

import itertools
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, is_tensor_collection

from torchrl_sglang_hidden.errors import InputError, InputTypeError

__all__ = ["DataRows", "open_rows"]

# Without types in numpy.
NPY: Any = np.lib.format
# What of an NPZ is read at a time: so many rows, or fewer where rows are as large as images are.
NPZ_ROWS = 256
NPZ_BYTES = 2**25
FILES = (
    "an .npz or .jsonl file, a directory that TensorDict.save or a Hugging Face data set's save_to_disk wrote, or a "
    "folder of image files"
)
# Of the files in a folder that are rows: of each kind that `read_image` reads.
IMAGE_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2",
    ".avif",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DataRows:
    """The rows of a data set.

    Args:
        read: yields the rows, each a TensorDict without batch dimensions. Called once.
        total: how many rows there are; None where only the end will tell.
        images_keys: the fields that are images, of data that consists of them.
    """

    read: Callable[[], Iterator[TensorDictBase]]
    total: int | None
    images_keys: tuple[str, ...] = ()


def open_rows(data: Any) -> DataRows:
    """Return the rows of a data set.

    Args:
        data: a TensorDict, whose batch dimensions are gone through in row-major order; an iterable of mappings or of
            TensorDicts without batch dimensions, such as a Hugging Face data set; or the path of one of `FILES`.

    Raises:
        InputTypeError: data of another type, or a row that is no mapping.
        InputError: a path that is not there or is something else; arrays of other lengths.
    """
    if isinstance(data, (str, Path)):
        return _open_path(Path(data))
    if is_tensor_collection(data):
        return _of_tensordict(data)
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise InputTypeError(
            f"data={data!r:.80} is a {type(data).__name__}; expected a TensorDict, an iterable of rows (mappings), or "
            "the path of a data set: make a TensorDict of a mapping of arrays"
        )
    return _of_iterable(data)


def _open_path(path: Path) -> DataRows:
    if path.suffix == ".npz" and path.is_file():
        return _of_npz(path)
    if path.suffix == ".jsonl" and path.is_file():
        return DataRows(lambda: _rows(_lines(path)), None)
    if "_type" in _read_object(path / "meta.json"):
        return _of_tensordict(TensorDict.load_memmap(path, allow_pickle=False))
    if "_data_files" in _read_object(path / "state.json"):
        return _of_iterable(_load_hugging_face(path))
    images = _images_in(path) if path.is_dir() else []
    if images:
        return _of_images(path, images)
    raise InputError(f"{path} is no data set that can be read; expected {FILES}")


def _read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is none, as among anybody's images."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _load_hugging_face(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{path} is a Hugging Face data set, and 'datasets' is not installed; install it") from error
    return datasets.load_from_disk(str(path))


# --- TensorDicts and iterables ----------------------------------------------------------------------------------------


def _of_tensordict(data: TensorDictBase) -> DataRows:
    shape = data.batch_size
    if not shape:
        raise InputError("data is a TensorDict of batch size (); expected at least one dimension of rows, [N]")
    total = math.prod(shape)

    def read() -> Iterator[TensorDictBase]:
        # Not unbind: a million rows would be a million TensorDicts at once.
        for row in range(total):
            yield data[tuple(int(place) for place in np.unravel_index(row, tuple(shape)))]

    return DataRows(read, total)


def _of_iterable(data: Any) -> DataRows:
    total = len(data) if hasattr(data, "__len__") else None
    if total is not None and hasattr(data, "__getitem__"):
        return DataRows(lambda: _rows(data[row] for row in range(total)), total)
    return DataRows(lambda: _rows(iter(data)), total)


def _rows(values: Iterable[Any]) -> Iterator[TensorDictBase]:
    for index, value in enumerate(values):
        if is_tensor_collection(value) and not value.batch_size:
            yield value
        elif isinstance(value, Mapping):
            yield _to_row(value)
        else:
            raise InputTypeError(
                f"row {index}: {value!r:.80} is a {type(value).__name__}; expected a mapping of names to values, or a "
                "TensorDict without batch dimensions"
            )


def _to_row(values: Mapping[Any, Any]) -> TensorDict:
    return TensorDict({str(name): _to_leaf(value) for name, value in values.items()})


def _to_leaf(value: Any) -> Any:
    """Return a value as a tensor where it is numbers, as a TensorDict where it is a mapping, or as it is."""
    if isinstance(value, Mapping):
        return NonTensorData(dict(value)) if _is_encoded(value) else _to_row(value)
    if isinstance(value, torch.Tensor) or is_tensor_collection(value):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in "biuf":
            return NonTensorData(value.tolist())
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    if _is_number(value) or (isinstance(value, (list, tuple)) and value and _is_number(_first(value))):
        try:
            return torch.tensor(value)
        except (ValueError, TypeError, RuntimeError):  # lists of other lengths, numbers and None, over 64 bits
            return NonTensorData(value)
    return NonTensorData(value)


def _is_encoded(value: Mapping[Any, Any]) -> bool:
    """Return whether a value is a file in a row of a Hugging Face data set that does not decode it."""
    return value.keys() == {"bytes", "path"} and isinstance(value["bytes"], bytes | None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _first(value: Any) -> Any:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value


# --- files ------------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[Any]:
    # Bytes, so that one that is no UTF-8 has the number of its line.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: {error}; expected one JSON object on each line") from error


def _images_in(folder: Path) -> list[str]:
    """Return the image files in a folder and in those inside it, by their names from there, sorted."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _of_images(folder: Path, names: list[str]) -> DataRows:
    """Return rows of a file's name and its bytes, which are read when their turn comes."""

    def read() -> Iterator[TensorDictBase]:
        for name in names:
            try:
                data = (folder / name).read_bytes()
            except OSError as error:
                raise InputError(f"{folder / name}: {error}; leave the folder as it is while it is recorded") from error
            yield TensorDict({"path": NonTensorData(name), "image": NonTensorData(data)})

    return DataRows(read, len(names), ("image",))


def _of_npz(path: Path) -> DataRows:
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {}
            for name in archive.namelist():
                with archive.open(name) as file:
                    shapes[name.removesuffix(".npy")] = _read_header(path, name, file)[0]
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: {error}; expected what numpy.savez writes") from error
    lengths = {name: shape[0] if shape else None for name, shape in shapes.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise InputError(
            f"{path}: the arrays have {lengths} rows; expected one number for all, [N, …]: write a row for each step"
        )
    (total,) = set(lengths.values())

    def read() -> Iterator[TensorDictBase]:
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(path))
            columns = {}
            with _damage(path):
                for name in shapes:
                    columns[name] = _NpzArray(path, name, stack.enter_context(archive.open(f"{name}.npy")))
            row_bytes = sum(column.row_bytes for column in columns.values())
            at_once = max(1, min(NPZ_ROWS, NPZ_BYTES // max(row_bytes, 1)))
            for first in range(0, int(total or 0), at_once):
                count = min(at_once, int(total or 0) - first)
                with _damage(path):
                    blocks = {name: column.take(count) for name, column in columns.items()}
                for row in range(count):
                    yield _to_row({name: block[row] for name, block in blocks.items()})

    return DataRows(read, total)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what is found of a damaged file while it is read into an error of this package."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: {error}: the file is damaged; copy it again") from error


def _read_header(path: Path, name: str, file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether it is in Fortran's order, and dtype of the array that a file in an NPZ begins with."""
    try:
        version = NPY.read_magic(file)
        read = NPY.read_array_header_1_0 if version == (1, 0) else NPY.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    except ValueError as error:
        raise InputError(f"{path}, {name}: {error}; expected an array that numpy.savez wrote") from error
    if dtype.kind not in "biufU":
        raise InputError(
            f"{path}, {name}: an array of {dtype}; expected numbers or strings: save texts as "
            "np.array(texts, dtype=str)"
        )
    return shape, is_fortran, dtype


class _NpzArray:
    """Reads one array of an NPZ from its first row to its last."""

    def __init__(self, path: Path, name: str, file: Any) -> None:
        shape, is_fortran, self._dtype = _read_header(path, name, file)
        self._shape, self._file = shape[1:], file
        self._whole: Iterator[Any] | None = None
        if is_fortran and len(shape) > 1:  # its rows are scattered all over the file
            with np.load(path, allow_pickle=False) as arrays:
                self._whole = iter(arrays[name])

    @property
    def row_bytes(self) -> int:
        return math.prod(self._shape) * int(self._dtype.itemsize)

    def take(self, count: int) -> Any:
        """Return the next rows, an array or a list."""
        if self._whole is not None:
            return list(itertools.islice(self._whole, count))
        data = self._file.read(count * self.row_bytes)
        return np.frombuffer(data, self._dtype).reshape(count, *self._shape)
