"""The server half's own channel through SGLang: options in, states, logits and a status out. Used on both sides.

A request carries options in ``sampling_params["custom_params"]``; its answer comes back in
``meta_info["torchrl_sglang_hidden"]``; the server's status stands in SGLang's internal state under the same name.
Names, numbers and floating-point bytes only: nothing received is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch

from torchrl_sglang_hidden.blocks import (
    DTYPES,
    NoRoomError,
    Share,
    Way,
    as_tensor,
    pack_bytes,
    pack_tensor,
    unpack_bytes,
    unpack_tensor,
)
from torchrl_sglang_hidden.constraints import LogitConstraint
from torchrl_sglang_hidden.errors import CapabilityError, ConstraintError, ProtocolError, SpanError
from torchrl_sglang_hidden.logits import FoundLogits, WantedLogits
from torchrl_sglang_hidden.pooling import Pools, Wanted, WantedRows
from torchrl_sglang_hidden.shared import discard
from torchrl_sglang_hidden.spans import Between, LastTokens, PromptSpan
from torchrl_sglang_hidden.specs import POOLINGS, SEGMENTS, LogitsSpec, ResolvedSpan, Segment, TokenLogits

__all__ = [
    "CHANNEL",
    "CONSTRAINTS_ENV",
    "FALLBACK_REMEDY",
    "LAYERS_ENV",
    "MAX_CONSTRAINTS",
    "PLUGIN_ENV",
    "PROTOCOL",
    "Options",
    "Status",
    "Way",
    "answer_of",
    "drop_shared",
    "pack_answer",
    "pack_options",
    "unpack_answer",
    "unpack_options",
]

CHANNEL = "torchrl_sglang_hidden"
PROTOCOL = 3
PLUGIN_ENV = "TORCHRL_SGLANG_HIDDEN"  # "1" in a server's environment opts in to the server half
LAYERS_ENV = "TORCHRL_SGLANG_HIDDEN_LAYERS"  # the layers whose states the server half takes, such as "7,15,-1"
# Of one request: each is read and applied in the scheduler, while everybody waits.
MAX_CONSTRAINTS = 64
CONSTRAINTS_ENV = "TORCHRL_SGLANG_HIDDEN_CONSTRAINTS"  # modules with constraints of the user's own, comma-separated

FALLBACK_REMEDY = (
    "start the server with torchrl_sglang_hidden.launch or `torchrl-sglang-hidden serve`, whose server half pools "
    "without gaps"
)

_FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}


@dataclass(frozen=True, slots=True)
class Options:
    """What one request asks of the server half: states, logits and constraints, and how they travel."""

    wanted: Wanted
    way: Way
    logits: WantedLogits = field(default_factory=WantedLogits)


@dataclass(frozen=True, slots=True)
class Status:
    """What the server half says of itself in SGLang's internal state.

    Args:
        vocab_size: ids are in ``[0, vocab_size)``.
        hidden_size: D.
        num_layers: the model's decoder layers.
        context_length: most tokens of prompt and response together.
        layers: the layers whose states it takes, by their canonical ids; None while nothing has run that would show
            whether they are what they are taken for.
        because: why it takes none, or the last layer's only; empty where it takes all that it was started for.
        normed: whether SGLang's own states of the last layer are those after the final norm.
        shared: the name of a file in shared memory by which a client knows that it is on this machine; or empty.
        open_pools: requests with pools at this moment; 0 when nothing is running.
        prefix_bytes: of the sums kept for prompts that begin alike.
        constraints: the names of those that it has the code of.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    context_length: int
    layers: tuple[int, ...] | None
    because: str
    normed: bool
    shared: str
    open_pools: int
    prefix_bytes: int
    constraints: tuple[str, ...]

    def pack(self) -> dict[str, Any]:
        """As JSON carries it."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        lists = {"layers": None if self.layers is None else list(self.layers), "constraints": list(self.constraints)}
        return {"protocol": PROTOCOL, **fields, **lists}

    @classmethod
    def unpack(cls, fields: Mapping[str, Any]) -> Status:
        """Reads what `pack` wrote.

        Raises:
            ProtocolError: another protocol, or a field that is not there.
        """
        check_protocol(fields.get("protocol"), "the server half")
        try:
            values = {name: fields[name] for name in cls.__slots__}
        except KeyError as error:
            raise ProtocolError(f"the server half's description lacks {error}") from error
        layers = None if values["layers"] is None else tuple(values["layers"])
        return cls(**{**values, "layers": layers, "constraints": tuple(values["constraints"])})


def check_protocol(spoken: object, who: str) -> None:
    """Refuses another protocol.

    Raises:
        ProtocolError: it is one.
    """
    if spoken != PROTOCOL:
        raise ProtocolError(
            f"{who} speaks protocol {spoken!r} and this client {PROTOCOL}; install the same version of "
            "torchrl_sglang_hidden on both sides"
        )


# --- options ---------------------------------------------------------------------------------------------------------


def pack_options(wanted: Wanted, way: Way, logits: WantedLogits | None = None) -> dict[str, str | int]:
    """Writes a request's options. SGLang carries scalars, flat lists and flat dicts here, hence one text."""
    fields: dict[str, Any] = {
        "segments": wanted.segments,
        "pooling": wanted.pooling,
        "layers": wanted.layers,
        "tokens": wanted.tokens,
        "row_dtype": _name_of(wanted.row_dtype),
        "spans": {name: _pack_span(span) for name, span in wanted.spans.items()},
        "way": way,
    }
    if logits is not None:
        fields["logits"] = _pack_logits(logits)
    return {"protocol": PROTOCOL, "options": json.dumps(fields, separators=(",", ":"))}


def unpack_options(custom_params: object) -> Options | None:
    """Reads a request's options inside the server; None when there are none or they are not ours to read.

    Never raises: an exception in the scheduler would end the server. What is not understood is not answered, and the
    client reports that.
    """
    options = custom_params.get(CHANNEL) if isinstance(custom_params, dict) else None
    if not isinstance(options, dict) or options.get("protocol") != PROTOCOL:
        return None
    try:
        fields = json.loads(options["options"])
        wanted = Wanted(
            segments=_known(fields["segments"], SEGMENTS),
            pooling=_known([fields["pooling"]], (*POOLINGS, None))[0],
            layers=tuple(int(layer) for layer in fields["layers"]),
            spans={str(name): _unpack_span(span) for name, span in fields["spans"].items()},
            tokens=fields["tokens"] is True,
            row_dtype=_FLOATS[fields["row_dtype"]],
        )
        if not wanted.layers or len(set(wanted.layers)) != len(wanted.layers):
            return None
        logits = _unpack_logits(fields["logits"]) if "logits" in fields else WantedLogits()
        return Options(wanted, _known([fields["way"]], ("binary", "text", "shared"))[0], logits)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError):
        return None


def _pack_logits(logits: WantedLogits) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "constraints": [constraint.to_str() for constraint in logits.constraints],
        "given": logits.given,
        "scored": logits.scored,
        "responses": [place for part in logits.responses for place in part],
        "response_limit": logits.response_limit,
    }
    if logits.spec is not None:
        spec = logits.spec
        fields["spec"] = {name: getattr(spec, name) for name in ("top_k", "token_ids", "full", "stage", "segments")}
        fields["spec"]["dtype"] = _name_of(spec.dtype)
    return fields


def _unpack_logits(fields: Mapping[str, Any]) -> WantedLogits:
    spec = fields.get("spec")
    places = [int(place) for place in fields["responses"]]
    if any(a >= b for a, b in zip(places[::2], places[1::2], strict=True)):
        raise ValueError(f"{places} are no parts of a prompt")
    given = fields["given"]
    if given is not None and int(given) < 1:
        raise ValueError(f"given={given}: nothing is before the first token")
    return WantedLogits(
        spec=None if spec is None else LogitsSpec(**{**spec, "dtype": _FLOATS[spec["dtype"]]}),
        constraints=tuple(_read_constraint(str(text)) for text in _few(fields["constraints"])),
        given=None if given is None else int(given),
        scored=fields["scored"] is True,
        responses=tuple(zip(places[::2], places[1::2], strict=True)),
        response_limit=int(fields["response_limit"]),
    )


def _few(texts: list[Any]) -> list[Any]:
    if len(texts) > MAX_CONSTRAINTS:
        raise ValueError(f"{len(texts)} constraints, over the limit of {MAX_CONSTRAINTS}")
    return texts


def _read_constraint(text: str) -> LogitConstraint:
    try:
        return LogitConstraint.from_str(text)
    except Exception as error:  # a constraint is anybody's code, and what it raises would end the scheduler
        raise ValueError(f"{text:.80} cannot be read: {error!r}") from error


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in _FLOATS.items() if known == dtype)


def _known(names: Any, known: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(names)) != len(names) or not set(names) <= set(known):
        raise ValueError(f"{names} are not among {known}, each once")
    return tuple(names)


def _pack_span(span: ResolvedSpan) -> list[Any]:
    if isinstance(span, PromptSpan):
        return ["prompt", *(place for interval in span.intervals for place in interval)]
    if isinstance(span, LastTokens):
        return ["last", span.count, span.allow_fewer]
    return ["between", span.start, span.end, span.unclosed]


def _unpack_span(fields: list[Any]) -> ResolvedSpan:
    kind, *values = fields
    if kind == "prompt":
        places = [int(value) for value in values]
        # In order and apart, or rows would be counted twice.
        if not places or len(places) % 2 or places[0] < 0 or any(a >= b for a, b in pairwise(places)):
            raise ValueError(f"{places} are no intervals")
        return PromptSpan(tuple(zip(places[::2], places[1::2], strict=True)))
    if kind == "last":
        return LastTokens(int(values[0]), allow_fewer=values[1] is True)
    if kind == "between":
        return Between(values[0], values[1], unclosed=values[2])
    raise ValueError(f"{kind} is no kind of span")


# --- answers ---------------------------------------------------------------------------------------------------------


def answer_of(pools: Pools, way: Way, share: Share, logits: FoundLogits | None) -> dict[str, Any]:
    """As `pack_answer`; where there is no room for it, an answer that says so."""
    shared: list[str] = []

    def noted(data: bytes) -> str | None:
        name = share(data)
        shared.extend([name] if name is not None else [])
        return name

    try:
        return pack_answer(pools, way, noted, logits)
    except NoRoomError as error:
        for name in shared:
            discard(name)
        return {"protocol": PROTOCOL, "refused": str(error)}


def pack_answer(
    pools: Pools,
    way: Way,
    share: Share | None = None,
    logits: FoundLogits | None = None,
) -> dict[str, Any]:
    """Writes a finished request's pools: counts, and the vectors that have rows, one after another; and its logits.

    Args:
        pools: what came of them.
        way: how bytes travel.
        share: puts bytes into shared memory and gives the file's name, or None where there is no room.
        logits: what came of them, where anything of the kind was asked for.
    """
    places: list[tuple[str, str, torch.Tensor | None, int]] = [
        ("segment", name, *value) for name, value in pools.segments.items()
    ]
    places += [("span", name, *value) for name, value in pools.spans.items()]
    vectors = [vector for _, _, vector, _ in places if vector is not None]
    data = torch.stack(vectors).contiguous().numpy().tobytes() if vectors else b""
    answer: dict[str, Any] = {
        "protocol": PROTOCOL,
        "places": [[kind, name, count, vector is not None] for kind, name, vector, count in places],
        "faults": dict(pools.faults),
        **pack_bytes(data, "binary" if way == "binary" else "text"),
    }
    if pools.rows is not None:
        answer["rows"] = {"first": pools.rows.first, **pack_tensor(pools.rows.rows_NKD, way, share)}
    if logits is not None:
        answer |= {"constrained": logits.constrained, "fault": logits.fault, "refused": logits.refused}
        for name, rows in (("logits", logits.response), ("prompt_logits", logits.given)):
            if rows is not None:
                answer[name] = pack_tensor(rows.values_NC, way, share)
                if rows.token_ids_NC is not None:
                    ids = rows.token_ids_NC.to(torch.int32)
                    answer[f"{name}_ids"] = pack_tensor(ids, way, share)
        if logits.log_probs_N is not None:
            answer["log_probs"] = pack_tensor(logits.log_probs_N, "binary" if way == "binary" else "text")
    return answer


# What of an answer may be in shared memory.
_BLOCKS = ("rows", "logits", "logits_ids", "prompt_logits", "prompt_logits_ids", "log_probs")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server half answered."""

    pools: Pools
    logits: FoundLogits | None


def unpack_answer(answer: object, row: str, hidden_size: int, *, shared: bool = True) -> Answer:
    """Reads what `pack_answer` wrote; what was in shared memory is removed there.

    Args:
        answer: as it came.
        row: names the request in errors.
        hidden_size: D.
        shared: whether it was asked for through shared memory. Otherwise a server elsewhere would get to name files
            of this machine.

    Raises:
        ProtocolError: it cannot be read, was cut short, its bytes are not those that were sent, or it is in shared
            memory unasked.
        SpanError: a span has no value.
        ConstraintError: the constraints could not be kept.
        CapabilityError: this server cannot give these logits.
    """
    if not isinstance(answer, list) or len(answer) != 1 or not isinstance(answer[0], dict):
        raise ProtocolError(f"{row}: expected one {CHANNEL} answer in meta_info, got {answer!r:.80}; {FALLBACK_REMEDY}")
    fields = answer[0]
    check_protocol(fields.get("protocol"), f"{row}: the server half")
    if fields.get("refused"):
        raise CapabilityError(f"{row}: {fields['refused']}")
    sent = [block for block in map(fields.get, _BLOCKS) if isinstance(block, dict) and "shared" in block]
    if not shared and sent:
        raise ProtocolError(
            f"{row}: the server half put the states into shared memory ({sent[0]['shared']!r:.80}), unasked; install "
            "the same version of torchrl_sglang_hidden on both sides"
        )
    try:
        data = unpack_bytes({name: fields[name] for name in ("data", "crc32")})  # vectors are never shared
        places = [(str(kind), str(name), int(count), filled is True) for kind, name, count, filled in fields["places"]]
        num_vectors = sum(1 for *_, filled in places if filled)
        vectors = iter(as_tensor(data, torch.float32, (num_vectors, -1, hidden_size)) if num_vectors else ())
        faults = {str(name): str(fault) for name, fault in fields["faults"].items()}
        found = {(kind, name): (next(vectors) if filled else None, count) for kind, name, count, filled in places}
        rows = None if "rows" not in fields else _unpack_rows(fields["rows"], hidden_size)
        logits = None if "constrained" not in fields else _unpack_found(fields)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, AttributeError, OverflowError) as error:
        raise ProtocolError(f"{row}: the states cannot be read ({error}); was the answer cut short?") from error
    if faults:
        name, fault = next(iter(faults.items()))
        raise SpanError(f"{row}, span {name!r}: {fault}")
    if logits is not None and logits.fault:
        raise ConstraintError(f"{row}: {logits.fault}")
    segments = {cast("Segment", name): value for (kind, name), value in found.items() if kind == "segment"}
    spans = {name: value for (kind, name), value in found.items() if kind == "span"}
    return Answer(Pools(segments, spans, faults, rows), logits)


def drop_shared(answer: object) -> None:
    """Removes the shared files that an answer names, if any, without reading them: they are not wanted any more.

    Never raises: it is for when something else has failed. Only for answers that were asked for through shared memory,
    as in `unpack_answer`.
    """
    sent: Any = answer
    for name in _BLOCKS:
        with suppress(KeyError, IndexError, TypeError, AttributeError, ValueError, OSError):
            discard(sent[0][name]["shared"])


def _unpack_rows(fields: Mapping[str, Any], hidden_size: int) -> WantedRows:
    rows = unpack_tensor(fields)
    if rows.ndim != 3 or rows.shape[2] != hidden_size:
        raise ValueError(f"rows of shape {tuple(rows.shape)}, expected [N, K, {hidden_size}]")
    return WantedRows(int(fields["first"]), rows)


def _unpack_found(fields: Mapping[str, Any]) -> FoundLogits:
    found = {}
    for name in ("logits", "prompt_logits"):
        if name in fields:
            values = unpack_tensor(fields[name])
            ids = unpack_tensor(fields[f"{name}_ids"]).long() if f"{name}_ids" in fields else None
            if values.ndim != 2 or (ids is not None and ids.shape != values.shape):
                raise ValueError(f"{name} of shape {tuple(values.shape)}, ids of {None if ids is None else ids.shape}")
            found[name] = TokenLogits(values, ids)
    log_probs_N = unpack_tensor(fields["log_probs"]) if "log_probs" in fields else None
    if log_probs_N is not None and log_probs_N.ndim != 1:
        raise ValueError(f"log-probs of shape {tuple(log_probs_N.shape)}, expected [N]")
    return FoundLogits(
        response=found.get("logits"),
        given=found.get("prompt_logits"),
        log_probs_N=log_probs_N,
        constrained=int(fields["constrained"]),
        fault=str(fields["fault"]),
    )
