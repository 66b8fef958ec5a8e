"""`Manifest`: what a recording is of, and which of its shards count.

A JSON file. ``about`` says everything that the recorded numbers depend on, and has a hash; a shard counts once it is
listed. Knows nothing of what is inside a shard.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from torchrl_sglang_hidden.errors import RecordingError
from torchrl_sglang_hidden.policy.wrapper import SGLangHiddenWrapper
from torchrl_sglang_hidden.rl.prompts import PromptSource
from torchrl_sglang_hidden.spec.hidden import HiddenSpec

__all__ = ["Failure", "Manifest", "Shard", "describe", "read_manifest"]

FORMAT = 1
NAME = "manifest.json"
MAX_REPR = 200
# More than a chat template's variables are. Deeper ones are none of `describe`, and would overflow the stack later.
MAX_DEPTH = 64
# The name of a shard's file.
FILE = re.compile(r"shards/[0-9]{6,12}\.tdz", re.ASCII)
_CONSTANTS = (str, bytes, int, float, type(None))
PACKAGES = ("torchrl-sglang-hidden", "torch", "torchrl", "tensordict", "transformers")


@dataclass(frozen=True, slots=True)
class Failure:
    """A row without a label.

    Args:
        row: its place in the data set.
        reason: an error's class and text.
    """

    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class Shard:
    """A file that holds consecutive rows.

    Args:
        file: its name in the recording's directory.
        rows: how many rows it has.
        nbytes: its size.
        sha256: the checksum of its bytes.
        failures: its rows without a label.
        rows_sha256: the digest of the rows of the data that it labels, see `digest_rows`; None in a recording of
            before there was one.
    """

    file: str
    rows: int
    nbytes: int
    sha256: str
    failures: tuple[Failure, ...] = ()
    rows_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of a recording's manifest.

    Args:
        about: what the recording is of: see `describe`.
        shards: the shards that count, in the order of their rows.
        complete: whether the data set was recorded to its end.
    """

    about: Mapping[str, Any]
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @property
    def num_rows(self) -> int:
        """How many rows are recorded."""
        return sum(shard.rows for shard in self.shards)

    @property
    def hash(self) -> str:
        """What two recordings have in common that are of the same policy, prompt and kind of data."""
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> bytes:
        """Return the bytes of the file."""
        shards = [asdict(shard) for shard in self.shards]
        content = {"about": self.about, "hash": self.hash, "complete": self.complete, "shards": shards}
        # A field of JSON lines may have half of a surrogate pair in its name, and json.loads takes it back.
        return f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode("utf-8", "surrogatepass")

    def check_same(self, path: Path, about: Mapping[str, Any]) -> None:
        """Refuse to go on with a recording of something else.

        Raises:
            RecordingError: a field differs.
        """
        before, now = _flat(self.about), _flat(about)
        other = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if other:
            differing = "; ".join(f"{name} {before.get(name)!r:.60}, now {now.get(name)!r:.60}" for name in other)
            raise RecordingError(
                f"{path} was recorded with another {', '.join(other)} ({differing:.400}); go on with what it was "
                "recorded with, or use another path"
            )


def read_manifest(path: Path) -> Manifest | None:
    """Read the manifest of a recording's directory; None where there is none.

    Raises:
        RecordingError: it cannot be read, or was changed by hand.
    """
    try:
        data = (path / NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RecordingError(f"{path / NAME}: {error}; allow reading it") from error
    try:
        content = json.loads(data)
        shards = tuple(_shard_of(shard) for shard in content["shards"])
        about, complete, found = content["about"], content["complete"], content["hash"]
        _check(isinstance(about, dict) and isinstance(complete, bool), "about is an object, and complete true or false")
        _check(_depth(about) <= MAX_DEPTH, f"about is nested up to {MAX_DEPTH} levels")
        manifest, written_as = Manifest(about, shards, complete), about["format"]
        if written_as == FORMAT:
            _check(type(about["every"]) is int and about["every"] >= 1, "every is at least 1")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordingError(
            f"{path / NAME} is no manifest of this version ({type(error).__name__}: {error}); load the directory that "
            "record_hidden_states wrote"
        ) from error
    if type(written_as) is not int or written_as != FORMAT:
        raise RecordingError(
            f"{path} has format {written_as!r}, and this version reads {FORMAT}; install the version "
            f"of torchrl-sglang-hidden that wrote it: {manifest.about.get('versions')}"
        )
    if manifest.hash != found:
        raise RecordingError(
            f"{path / NAME}: its hash is {found!r:.80}, and expected was {manifest.hash!r}: it was changed after "
            "it was written"
        )
    return manifest


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"expected that {what}")


def _shard_of(fields: Mapping[str, Any]) -> Shard:
    """Read one shard of a manifest, which may come from elsewhere: its file is one in the recording's directory."""
    shard = Shard(**{**fields, "failures": tuple(Failure(**one) for one in fields["failures"])})
    _check(isinstance(shard.file, str) and bool(FILE.fullmatch(shard.file)), f"a shard's file is like {FILE.pattern}")
    _check(type(shard.rows) is int and shard.rows >= 1, "a shard has at least 1 row")
    _check(type(shard.nbytes) is int and isinstance(shard.sha256, str), "a shard has a size and a checksum")
    _check(isinstance(shard.rows_sha256, str | None), "a digest of rows is a string, or null")
    for failure in shard.failures:
        _check(type(failure.row) is int and isinstance(failure.reason, str), "a failure has a row and a reason")
    return shard


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [part for parts in inside for part in parts]
    return depth


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return what is in nested dicts by names with dots."""
    if not isinstance(value, Mapping):
        return {name: value}
    parts = (_flat(part, f"{name}.{key}" if name else str(key)) for key, part in value.items())
    return {key: leaf for part in parts for key, leaf in part.items()}


# --- what a recording is of -------------------------------------------------------------------------------------------


def describe(
    policy: SGLangHiddenWrapper,
    prompt: PromptSource,
    spec: HiddenSpec,
    *,
    dtype: torch.dtype,
    every: int,
    schema: Mapping[str, str],
    images: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what the recorded numbers depend on, as JSON holds it.

    Args:
        policy: its model, weights, chat template, tokenizing and generating options.
        prompt: a format string, or a function, which is known by its name, its source and the values it holds.
        spec: the states that are recorded.
        dtype: of the states of tokens.
        every: see `record_hidden_states`.
        schema: the fields of the data, with their dtypes and shapes.
        images: the names of those that are images.
    """
    info, config = policy.model.info, policy.config
    about = {
        "format": FORMAT,
        "model": {
            "path": info.model_path,
            "vocab_size": info.vocab_size,
            "hidden_size": info.hidden_size,
            "num_layers": info.num_layers,
        },
        "weight_version": info.weight_version,
        "segments": spec.segments,
        "spans": {name: repr(span) for name, span in spec.spans.items()},
        "pooling": spec.pooling,
        "layers": spec.layers,
        "tokens": str(dtype) if spec.tokens else None,
        "every": every,
        "prompt": prompt if isinstance(prompt, str) else _describe_function(prompt),
        "chat_template": {
            "text": config.chat_template or getattr(config.tokenizer, "chat_template", None),
            "name": config.chat_template_name,
            "variables": config.chat_template_kwargs,
            "literal_content": config.literal_content,
        },
        "tokenizer_kwargs": config.tokenizer_kwargs,
        "generate_kwargs": config.generate_kwargs,
        "constraints": [repr(constraint) for constraint in config.constraints],
        "fields": dict(schema),
        # Left out without images or heads: recordings of before these are gone on with.
        **({"images": list(images)} if images else {}),
        **({} if config.heads is None else {"heads": repr(config.heads)}),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    found: dict[str, Any] = json.loads(json.dumps(about, default=repr))
    return found


def _describe_function(prompt: Any) -> dict[str, Any]:
    """Return what is known of a prompt function: its name, its source, and the values that it was made with.

    What it calls in turn is not looked at.
    """
    values: dict[str, Any] = {}
    if isinstance(prompt, functools.partial):
        args = {f"argument {place}": value for place, value in enumerate(prompt.args)}
        values, prompt = {**args, **prompt.keywords}, prompt.func
    if inspect.isfunction(prompt):
        defaults = {f"default {place}": value for place, value in enumerate(prompt.__defaults__ or ())}
        held = {**defaults, **(prompt.__kwdefaults__ or {}), **inspect.getclosurevars(prompt).nonlocals}
        # Not a list or a dict: one that the function writes to would be another one each time.
        values = {name: value for name, value in held.items() if _is_constant(value)} | values
    code = prompt if inspect.isroutine(prompt) else type(prompt)
    try:
        source = hashlib.sha256(inspect.getsource(code).encode()).hexdigest()
    except (OSError, TypeError):  # typed into an interpreter, or written in C
        source = None
    found = {"name": f"{code.__module__}.{code.__qualname__}", "repr": _plain_repr(prompt), "source": source}
    return found | ({"values": {name: _plain_repr(value) for name, value in values.items()}} if values else {})


def _is_constant(value: Any) -> bool:
    """Return whether a value stays what it is: a text, a number, None, or a tuple of such."""
    return all(map(_is_constant, value)) if isinstance(value, tuple) else isinstance(value, _CONSTANTS)


def _plain_repr(value: Any) -> str | None:
    """Return the repr of an object, which may say what it was made with; None for an address, which says nothing."""
    text = repr(value)
    if " at 0x" in text:
        return None
    return text if len(text) <= MAX_REPR else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
