"""Write what the server half answers to one request, and read it on the client.

Knows pools, logits and bytes; nothing of SGLang's own fields, nor of tokens to count rows against.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from zlib import crc32

import torch

from torchrl_sglang_hidden.errors import CapabilityError, ProtocolError
from torchrl_sglang_hidden.protocol.excerpts import as_count, excerpt
from torchrl_sglang_hidden.protocol.shared_memory import discard
from torchrl_sglang_hidden.protocol.status import CHANNEL, FALLBACK_REMEDY, PROTOCOL, check_protocol
from torchrl_sglang_hidden.protocol.tensors import (
    MAX_TEXT_BYTES,
    Share,
    SharedMemoryFullError,
    Way,
    as_tensor,
    pack_bytes,
    pack_tensor,
    unpack_bytes,
    unpack_tensor,
)
from torchrl_sglang_hidden.records import MAX_ANSWER_BYTES, TokenLogits
from torchrl_sglang_hidden.reduce.head_scores import FoundScores
from torchrl_sglang_hidden.reduce.pooling import Pools, WantedRows
from torchrl_sglang_hidden.reduce.wanted_logits import FoundLogits

# Under this name a stream's parts have the scores of their tokens, before the answer itself comes with the last part.
STREAMED = "streamed"
# Under this name SGLang's ``finish_reason`` of the type "stop" has the rule on a head's score that ended the response.
ENDED_BY_HEAD = "head"

__all__ = ["Answer", "answer_of", "digest_prompt", "drop_shared", "pack_answer", "unpack_answer"]


def digest_prompt(ids: Sequence[int], image_rows: Collection[int]) -> int:
    """Return a checksum of a prompt with images as a server computes it: its tokens, and where the images' rows are.

    Args:
        ids: the expanded prompt; what stands at the rows of images does not count.
        image_rows: their positions.
    """
    rows = [-1 if position in image_rows else token_id for position, token_id in enumerate(ids)]
    return crc32(torch.tensor(rows, dtype=torch.int64).numpy().tobytes())


def answer_of(
    pools: Pools,
    way: Way,
    share: Share,
    logits: FoundLogits | None,
    prompt_digest: int | None = None,
    scores: FoundScores | None = None,
) -> dict[str, Any]:
    """Write an answer as `pack_answer` does; where shared memory is full, write one that says so."""
    shared: list[str] = []

    def noted(data: bytes) -> str | None:
        name = share(data)
        shared.extend([name] if name is not None else [])
        return name

    try:
        return pack_answer(pools, way, noted, logits, prompt_digest, scores)
    except SharedMemoryFullError as error:
        for name in shared:
            discard(name)
        return {"protocol": PROTOCOL, "refused": str(error)}


def pack_answer(
    pools: Pools,
    way: Way,
    share: Share | None = None,
    logits: FoundLogits | None = None,
    prompt_digest: int | None = None,
    scores: FoundScores | None = None,
) -> dict[str, Any]:
    """Write a finished request's pools: counts, and the vectors that have rows, one after another; logits and scores.

    Args:
        pools: the results of its pools.
        way: how bytes travel.
        share: puts bytes into shared memory and returns the file's name, or None where they do not fit.
        logits: its logits and what its constraints came to; None where it asked for neither.
        prompt_digest: see `digest_prompt`; None for a prompt without images.
        scores: its heads' scores; None where it asked for none.
    """
    pooled: list[tuple[str, str, torch.Tensor | None, int]] = [
        ("segment", name, *value) for name, value in pools.segments.items()
    ]
    pooled += [("span", name, *value) for name, value in pools.spans.items()]
    vectors = [vector if vector.ndim == 3 else vector[None] for _, _, vector, _ in pooled if vector is not None]
    data = torch.cat(vectors).contiguous().numpy().tobytes() if vectors else b""
    if way != "binary" and len(data) > MAX_TEXT_BYTES:
        raise SharedMemoryFullError(
            f"the pooled states and the rows of spans are {len(data) / 2**20:.0f} MiB, over the limit of "
            f"{MAX_TEXT_BYTES / 2**20:.0f} MiB; pool more of the spans, or ask for fewer layers"
        )
    answer: dict[str, Any] = {
        "protocol": PROTOCOL,
        # Whether there is a vector, or how many there are of a span whose rows are as they are.
        "places": [
            [kind, name, count, len(vector) if vector is not None and vector.ndim == 3 else vector is not None]
            for kind, name, vector, count in pooled
        ],
        "rows_of_spans": {name: list(rows) for name, rows in pools.places.items()},
        "faults": dict(pools.faults),
        **pack_bytes(data, "binary" if way == "binary" else "text"),
    }
    if pools.rows is not None:
        answer["rows"] = {"first": pools.rows.first, **pack_tensor(pools.rows.rows_NKD, way, share)}
    if prompt_digest is not None:
        answer["prompt_digest"] = prompt_digest
    if logits is not None:
        answer |= {"constrained": logits.constrained, "fault": logits.fault, "refused": logits.refused}
        for name, rows in (("logits", logits.response), ("prompt_logits", logits.prompt)):
            if rows is not None:
                answer[name] = pack_tensor(rows.values_NC, way, share)
                if rows.token_ids_NC is not None:
                    ids = rows.token_ids_NC.to(torch.int32)
                    answer[f"{name}_ids"] = pack_tensor(ids, way, share)
        for name, values in (("log_probs", logits.log_probs_N), ("entropy", logits.entropy_T)):
            if values is not None:
                answer[name] = pack_tensor(values, "binary" if way == "binary" else "text")
    if scores is not None:
        of_segments = {"prompt": scores.prompt_HP, "response": scores.response_HT}
        packed = {
            name: pack_tensor(values, "binary" if way == "binary" else "text")
            for name, values in of_segments.items()
            if values is not None
        }
        if scores.pools is not None:
            packed["pools"] = pack_answer(scores.pools, "binary" if way == "binary" else "text")
        answer["scores"] = {"versions": list(scores.versions), **packed}
    return answer


# What of an answer may be in shared memory.
_BLOCKS = ("rows", "logits", "logits_ids", "prompt_logits", "prompt_logits_ids", "log_probs", "entropy")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server half answered.

    Args:
        pools: the pooled states; ``faults`` says of a span why it has no value.
        logits: the logits; ``fault`` says why the constraints could not be kept, empty where they were.
        prompt_digest: see `digest_prompt`; None for a prompt without images.
        scores: the heads' scores; None where none came.
    """

    pools: Pools
    logits: FoundLogits | None
    prompt_digest: int | None = None
    scores: FoundScores | None = None


def unpack_answer(
    answer: object, row: str, hidden_size: int, *, shared: bool = True, limit: int = MAX_ANSWER_BYTES
) -> Answer:
    """Read what `pack_answer` wrote; what was in shared memory is removed there.

    Args:
        answer: as it came.
        row: names the request in errors.
        hidden_size: D.
        shared: whether it was asked for through shared memory. Otherwise a server elsewhere would get to name files
            of this machine.
        limit: most bytes that any of its tensors may have: as many as were asked for.

    Raises:
        ProtocolError: it cannot be read, was cut short, its bytes are not those that were sent, or it is in shared
            memory unasked.
        CapabilityError: this server cannot give these logits.
    """
    if not isinstance(answer, list) or len(answer) != 1 or not isinstance(answer[0], dict):
        raise ProtocolError(
            f"{row}: expected one {CHANNEL} answer in meta_info, got {excerpt(answer)}; {FALLBACK_REMEDY}"
        )
    fields = answer[0]
    check_protocol(fields.get("protocol"), f"{row}: the server half")
    if fields.get("refused"):
        refused = fields["refused"]
        raise CapabilityError(f"{row}: {refused if isinstance(refused, str) else excerpt(refused)}")
    sent = [block for block in map(fields.get, _BLOCKS) if isinstance(block, dict) and "shared" in block]
    if not shared and sent:
        raise ProtocolError(
            f"{row}: the server half put the states into shared memory ({excerpt(sent[0]['shared'])}), unasked; "
            "install the same version of torchrl_sglang_hidden on both sides"
        )
    try:
        data = unpack_bytes({name: fields[name] for name in ("data", "crc32")})  # vectors are never shared
        pooled = [_read_place(place) for place in fields["places"]]
        num_vectors = sum(int(filled) for *_, filled in pooled)
        if num_vectors and not data:
            raise ValueError(f"0 bytes for {num_vectors} vectors")
        vectors = as_tensor(data, torch.float32, (num_vectors, -1, hidden_size)) if num_vectors else torch.empty(0)
        faults = {name: _text(fault) for name, fault in fields["faults"].items()}
        found, first = {}, 0
        for kind, name, count, filled in pooled:
            own = vectors[first] if filled is True else vectors[first : first + filled] if filled else None
            found[kind, name], first = (own, count), first + int(filled)
        span_rows = {_text(name): _read_rows(rows) for name, rows in fields["rows_of_spans"].items()}
        rows = None if "rows" not in fields else _unpack_rows(fields["rows"], hidden_size, limit)
        logits = None if "constrained" not in fields else _unpack_found(fields, limit)
        scores = None if "scores" not in fields else _unpack_scores(fields["scores"], row, limit)
        prompt_digest = fields.get("prompt_digest")
        if prompt_digest is not None:
            as_count(prompt_digest, "prompt_digest", 2**32 - 1)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, AttributeError, OverflowError) as error:
        raise ProtocolError(f"{row}: the states cannot be read ({error}); was the answer cut short?") from error
    segments = {name: value for (kind, name), value in found.items() if kind == "segment"}
    spans = {name: value for (kind, name), value in found.items() if kind == "span"}
    return Answer(Pools(segments, spans, faults, rows, span_rows), logits, prompt_digest, scores)


def drop_shared(answer: object) -> None:
    """Remove the shared files that an answer names, if any, without reading them: they are not wanted any more.

    Never raises: it is for when something else has failed. Only for answers that were asked for through shared memory,
    as in `unpack_answer`.
    """
    sent: Any = answer
    for name in _BLOCKS:
        with suppress(KeyError, IndexError, TypeError, AttributeError, ValueError, OSError):
            discard(sent[0][name]["shared"])


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{excerpt(value)} stands where a text is expected")
    return value


def _read_rows(rows: object) -> tuple[int, ...]:
    """Read which rows of the response a span has."""
    if not isinstance(rows, list):
        raise TypeError(f"{excerpt(rows)} stands where a list of rows is expected")
    found = tuple(as_count(row, "a row") for row in rows)
    if any(one >= other for one, other in pairwise(found)):
        raise ValueError(f"the rows {excerpt(rows)} are not in order")
    return found


def _read_place(place: Any) -> tuple[str, str, int, bool | int]:
    """Read what one pooled value is of, how many rows it stands for, and whether it is there, or how many rows are."""
    kind, name, count, filled = place
    if not isinstance(filled, bool):
        as_count(filled, "how many rows a span has")
    if type(count) is not int:
        raise TypeError(f"{excerpt(count)} stands where a number of rows is expected")
    return _text(kind), _text(name), count, filled


def _unpack_rows(fields: Mapping[str, Any], hidden_size: int, limit: int) -> WantedRows:
    rows = unpack_tensor(fields, "floats", limit)
    if rows.ndim != 3 or rows.shape[2] != hidden_size:
        raise ValueError(f"rows of shape {tuple(rows.shape)}, expected [N, K, {hidden_size}]")
    return WantedRows(as_count(fields["first"], "the first row's position"), rows)


def _unpack_scores(fields: Mapping[str, Any], row: str, limit: int) -> FoundScores:
    versions = tuple(map(_text, fields["versions"]))
    found = {name: unpack_tensor(fields[name], "floats", limit) for name in ("prompt", "response") if name in fields}
    for name, values in found.items():
        if values.ndim != 2 or len(values) != len(versions) or values.dtype != torch.float32:
            raise ValueError(
                f"{name} scores of shape {tuple(values.shape)} and {values.dtype}, of {len(versions)} heads"
            )
    pools = None
    if "pools" in fields:
        pooled = fields["pools"]
        if "scores" in pooled:
            raise ValueError("pooled scores have scores of their own")
        pools = unpack_answer([pooled], f"{row}, scores", len(versions), shared=False, limit=limit).pools
    return FoundScores(versions, found.get("prompt"), found.get("response"), pools)


def _unpack_found(fields: Mapping[str, Any], limit: int) -> FoundLogits:
    found = {}
    for name in ("logits", "prompt_logits"):
        if name in fields:
            values = unpack_tensor(fields[name], "floats", limit)
            ids = unpack_tensor(fields[f"{name}_ids"], "ids", limit).long() if f"{name}_ids" in fields else None
            if values.ndim != 2 or (ids is not None and ids.shape != values.shape):
                raise ValueError(f"{name} of shape {tuple(values.shape)}, ids of {None if ids is None else ids.shape}")
            found[name] = TokenLogits(values, ids)
    lists = {name: unpack_tensor(fields[name], "floats", limit) for name in ("log_probs", "entropy") if name in fields}
    for name, values in lists.items():
        if values.ndim != 1 or values.dtype != torch.float32:
            raise ValueError(f"{name} of shape {tuple(values.shape)} and {values.dtype}, expected float32 [N]")
    return FoundLogits(
        response=found.get("logits"),
        prompt=found.get("prompt_logits"),
        log_probs_N=lists.get("log_probs"),
        entropy_T=lists.get("entropy"),
        constrained=as_count(fields["constrained"], "constrained"),
        fault=_text(fields["fault"]),
    )
