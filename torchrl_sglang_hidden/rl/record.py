"""`record_hidden_states`: labels a data set with text and hidden states, and goes on where it was stopped.

Puts rows, labels and shards together; each of them is a module of its own.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey

from torchrl_sglang_hidden.errors import InputError, InputTypeError, RecordingError
from torchrl_sglang_hidden.policy.wrapper import SGLangHiddenWrapper
from torchrl_sglang_hidden.rl.columns import (
    Key,
    Leaves,
    check_row,
    count_bytes,
    digest_images,
    digest_rows,
    leaves_of,
    pack,
    same_row,
    schema_of,
)
from torchrl_sglang_hidden.rl.data_rows import DataRows, open_rows
from torchrl_sglang_hidden.rl.encoder import check_takes_images
from torchrl_sglang_hidden.rl.labels import IndexedRow, Label, Labeller, recorded_spec
from torchrl_sglang_hidden.rl.manifest import Failure, Manifest, describe
from torchrl_sglang_hidden.rl.prompts import PromptSource, PromptWriter, image_keys, keys_in, name_of
from torchrl_sglang_hidden.rl.recording import LABEL_ROW, LABELS, ROWS, Recording, load_recording, read_rows
from torchrl_sglang_hidden.rl.shards import ShardWriter

__all__ = ["record_hidden_states"]

# A shard ends where either is reached, after a call of the policy: what a kill may cost, and what memory holds.
SHARD_SECONDS = 20.0
SHARD_BYTES = 64 * 2**20


def record_hidden_states(
    policy: SGLangHiddenWrapper,
    data: Any,
    path: str | Path,
    *,
    prompt: PromptSource,
    batch_size: int = 32,
    tokens: bool = False,
    dtype: torch.dtype = torch.float16,
    every: int = 1,
    progress: bool = True,
    images_keys: Sequence[NestedKey] | None = None,
) -> Recording:
    """Label a data set with generated text and hidden states, in a directory that can be gone on with.

    Stopped at any moment, by a kill, a power cut or a full disk, and called again with the same arguments, it goes on
    after the last whole shard. With a greedy policy it ends with what an uninterrupted call gives, in the order of the
    data, no row lost or doubled. Data that has grown since is gone on with: with ``every``, its first new row has a
    label of its own.

    Args:
        policy: says what is recorded: segments, spans, pooling and layers of its ``hidden``, the scores of its
            ``heads``, each with the version of the head that gave it, and what is generated.
            With ``max_new_tokens=0`` the text that is there is read, and nothing generated. A policy over several
            servers shares the rows of each call among them; give it a larger ``batch_size``.
        data: a TensorDict, whose batch dimensions are gone through in row-major order; an iterable of mappings, such as
            a list, a generator, which must begin anew for each call, or a Hugging Face data set; or the path of an
            ``.npz`` with one row per step in each array, of a ``.jsonl``, of a directory that ``TensorDict.save`` or
            a data set's ``save_to_disk`` wrote, or of a folder of image files, whose rows, sorted by name, have a
            file's name at ``"path"`` and its image at ``"image"``. All rows have the same keys and dtypes.
        path: the recording's directory. It is made, must be empty, or have a recording of the same policy, prompt and
            data.
        prompt: a format string over the keys of a row, such as ``"You see {observation}."``; or a function of one row,
            a TensorDict without batch dimensions, that returns a text, a chat or token ids. See `HiddenStateTransform`.
        batch_size: most prompts of one call of the policy. These rows, and what was recorded in the last 20 seconds or
            64 MiB, are in memory.
        tokens: also record the state of every token of the segments, and the ids of prompt and response.
        dtype: of the states of tokens. Pooled states are float32.
        every: one label for n rows, which the n-1 rows after it share. A row after the end of an episode
            (``("next", "done")``, or else ``"done"``) has a label of its own, from which n is counted anew.
        progress: show a bar on stderr, with rows per second and the time left.
        images_keys: the fields that are images, such as ``["pixels"]``, in the order of the prompt's placeholders; for
            a vision-language model, see ``images_in_keys`` of `HiddenStateTransform`. Of a folder ``["image"]``. Pixels
            and texts (paths, data URIs) are recorded as they are; of other images (PIL, bytes) a digest is.

    Returns:
        The `Recording`. Rows that failed are in its ``failures``, with a warning.

    Raises:
        InputError: data, arguments or a policy that cannot be recorded.
        MissingKeyError: a row lacks a key.
        CapabilityError: images, and a model that takes text alone.
        RecordingError: the directory has a recording of something else, is full, or cannot be written; or the weights
            were updated meanwhile.
        EngineError: the engine failed. After any error, what was recorded stays whole.

    What concerns one row alone is recorded and not raised: a prompt that cannot be written, is empty or too long, a
    span that is not there, an abort, states that are not finite. Its states are NaN, with counts of 0.

    Example:
        >>> policy = SGLangHiddenWrapper(
        ...     engine, hidden=HiddenSpec(segments=("prompt",)), generate_kwargs={"max_new_tokens": 0}
        ... )
        >>> recording = record_hidden_states(policy, "walks.npz", "walks", prompt="You see {text_generated}.", every=25)
        >>> recording.tensordict["hidden_states", "prompt"].shape
        torch.Size([10000, 576])
    """
    for name, number in (("batch_size", batch_size), ("every", every)):
        if type(number) is not int:
            raise InputTypeError(f"{name}={number!r:.80}: expected an integer of at least 1")
        if number < 1:
            raise InputError(f"{name}={number}: expected an integer of at least 1")
    spec = recorded_spec(policy, tokens=tokens, dtype=dtype)
    source, path = open_rows(data), Path(path)
    given = image_keys("images_keys", source.images_keys if images_keys is None else images_keys)
    check_takes_images(policy, given)
    with ShardWriter(path) as writer:
        start = 0 if writer.manifest is None else writer.manifest.num_rows
        # What is recorded is read again, to see that the data is the same.
        rows = _read_rows(source, given)
        first = next(rows, None)
        if first is None:
            _refuse_short(source, start)
        schema = schema_of(f"row {first.place}", first.leaves)
        prompts = PromptWriter.for_row(prompt, first.row, given)
        labeller = Labeller(policy, prompts, spec, dtype=dtype)
        _check_names(first.leaves, labeller.blank)
        images = [name_of(key) for key in prompts.images_keys]
        writer.begin(describe(policy, prompt, spec, dtype=dtype, every=every, schema=schema, images=images))
        rows = itertools.chain([first], rows)
        if not _goes_on(path, writer.known, rows):
            _refuse_short(source, start)
        with _progress_bar(progress, source.total, writer.known) as show:
            for shard in _label(rows, labeller, batch_size=batch_size, every=every, show=show):
                writer.add(*shard)
        writer.finish()
    recording = load_recording(path)
    if recording.failures:
        one = recording.failures[0]
        warnings.warn(
            f"{len(recording.failures)} of {len(recording)} rows have no label; the first is {one.reason}; see "
            "Recording.failures",
            stacklevel=2,
        )
    return recording


class _Row(NamedTuple):
    """A row of the data: its place, the row, and its leaves."""

    place: int
    row: TensorDictBase
    leaves: Leaves


class _Shard(NamedTuple):
    """What `ShardWriter.add` takes."""

    content: TensorDict
    num_rows: int
    failures: list[Failure]
    rows_sha256: str


def _read_rows(source: DataRows, images_keys: Sequence[NestedKey]) -> Iterator[_Row]:
    """Yield the rows; all must be like the first of them."""
    schema = None
    for index, row in enumerate(source.read()):
        leaves = leaves_of(row)
        if images_keys:
            keys = [(key,) if isinstance(key, str) else key for key in keys_in(row, images_keys)]
            leaves = digest_images(f"row {index}", leaves, keys)
        if schema is None:
            schema = schema_of(f"row {index}", leaves)
        check_row(f"row {index}", leaves, schema)
        yield _Row(index, row, leaves)


def _check_names(row: Leaves, label: Leaves) -> None:
    # In files of other libraries nested keys have '/' between their parts: a NPZ of a recording has such names.
    clashing = sorted({key[0].split("/")[0] for key in row} & {LABEL_ROW, *(key[0] for key in label)})
    if clashing:
        raise InputError(f"the data has {clashing}, where labels are recorded; rename these fields, or leave them out")


def _refuse_short(source: DataRows, start: int) -> NoReturn:
    there = f"fewer than {max(start, 1)}" if source.total is None else str(source.total)
    raise InputError(f"data with {there} rows, and {start} are recorded; expected all of those, and at least 1")


def _goes_on(path: Path, manifest: Manifest, rows: Iterator[_Row]) -> bool:
    """Take the rows that are recorded, and return whether all of them are there; refuse others than were recorded."""
    for shard in manifest.shards:
        found = list(itertools.islice(rows, shard.rows))
        if digest_rows(row.leaves for row in found) == shard.rows_sha256:
            continue
        # They differ, or the recording is older than the digests: the shard says which row, at the cost of reading it.
        for row, recorded in zip(found, read_rows(path, shard), strict=False):
            if not same_row(row.leaves, recorded):
                raise RecordingError(
                    f"{path}: row {row.place} of the data is not the one that was recorded; go on with the same data, "
                    "in the same order, or use another path"
                )
        if len(found) < shard.rows:
            return False
    return True


# --- labels -----------------------------------------------------------------------------------------------------------


def _label(
    rows: Iterator[_Row], labeller: Labeller, *, batch_size: int, every: int, show: Callable[[int, int], None]
) -> Iterator[_Shard]:
    """Yield the shards of rows, labelled; ``show`` is told of the rows of each call and of its failures."""
    groups, pending = _groups(rows, every), _Pending(labeller.ragged)
    while batch := list(itertools.islice(groups, batch_size)):
        labels = labeller.label([IndexedRow(group[0].place, group[0].row) for group in batch])
        pending.add(batch, labels)
        show(sum(map(len, batch)), sum(label.failure is not None for label in labels))
        if pending.is_due:
            yield pending.shard()
            pending = _Pending(labeller.ragged)
    if pending.rows:
        yield pending.shard()


def _groups(rows: Iterator[_Row], every: int) -> Iterator[list[_Row]]:
    """Yield the rows that share a label, which is that of the first."""
    group: list[_Row] = []
    for one in rows:
        group.append(one)
        if len(group) == every or _ends_episode(one.row):
            yield group
            group = []
    if group:
        yield group


def _ends_episode(row: TensorDictBase) -> bool:
    done = row.get(("next", "done")) if row.get("next") is not None else None
    done = row.get("done") if done is None else done
    return isinstance(done, torch.Tensor) and bool(done.any())


@dataclass(slots=True)
class _Pending:
    """Rows with labels that are in no shard yet."""

    ragged: Collection[Key]
    rows: list[Leaves] = field(default_factory=list)
    labels: list[Leaves] = field(default_factory=list)
    label_rows: list[int] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    nbytes: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, groups: Sequence[Sequence[_Row]], labels: Sequence[Label]) -> None:
        for group, label in zip(groups, labels, strict=True):
            leaves = [one.leaves for one in group]
            self.rows += leaves
            self.labels.append(label.leaves)
            self.label_rows += [group[0].place] * len(group)
            if label.failure is not None:
                self.failures.append(Failure(group[0].place, label.failure))
            self.nbytes += sum(map(count_bytes, (label.leaves, *leaves)))

    @property
    def is_due(self) -> bool:
        return self.nbytes >= SHARD_BYTES or time.monotonic() - self.since >= SHARD_SECONDS

    def shard(self) -> _Shard:
        content = TensorDict({ROWS: pack(self.rows), LABELS: pack(self.labels, self.ragged)})
        content.set(LABEL_ROW, torch.tensor(self.label_rows))
        return _Shard(content, len(self.rows), self.failures, digest_rows(self.rows))


# --- the bar ----------------------------------------------------------------------------------------------------------


class _Rate(ProgressColumn):
    """Rows per second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} rows/s")


@contextmanager
def _progress_bar(progress: bool, total: int | None, manifest: Manifest) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that is told how many rows more are recorded, and how many of them failed."""
    console = Console(stderr=True)
    # rich's live display in a notebook needs ipywidgets, and warns in every cell without it.
    live = importlib.util.find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
    columns = (
        TextColumn("Recording"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    failed = sum(len(shard.failures) for shard in manifest.shards)
    with Progress(*columns, console=console, disable=not (progress and live)) as bar:
        task = bar.add_task("", total=total, completed=manifest.num_rows)

        def show(rows: int, failures: int) -> None:
            nonlocal failed
            failed += failures
            bar.update(task, advance=rows, description=f"{failed} failed" if failed else "")

        yield show
