"""Write what one request asks of the server half, and read it inside the scheduler.

Knows nothing of how it travels: SGLang carries it as ``custom_params``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, assert_never

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.protocol.status import CHANNEL, PROTOCOL
from torchrl_sglang_hidden.protocol.tensors import DTYPES, Way
from torchrl_sglang_hidden.reduce.bounded import Bounded
from torchrl_sglang_hidden.reduce.head_scores import WantedScores
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.spec.constraints import ActionMask, DisallowedTokens, LogitConstraint
from torchrl_sglang_hidden.spec.head_scores import HeadSpec
from torchrl_sglang_hidden.spec.hidden import SEGMENTS, Segment
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.places import At, Each, Every, Window
from torchrl_sglang_hidden.spec.span_base import MAX_SPAN_ROWS, POOLINGS, Pooling, SpanPooling, own_pooling
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan, ResolvedSpan

__all__ = ["MAX_CONSTRAINTS", "Options", "check_protocol", "pack_options", "read_options", "unpack_options"]

# Most constraints of one request: each is read and applied in the scheduler, while all other requests wait.
MAX_CONSTRAINTS = 64

# By their text, the masks that were read last. The limit counts their ids, about 80 MB in all.
_MASKS: Bounded[LogitConstraint] = Bounded(2**21)

_FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}


@dataclass(frozen=True, slots=True)
class Options:
    """What one request asks of the server half: states, logits, constraints and scores, and how they travel."""

    wanted: Wanted
    way: Way
    logits: WantedLogits = field(default_factory=WantedLogits)
    scores: WantedScores | None = None


def pack_options(
    wanted: Wanted, way: Way, logits: WantedLogits | None = None, scores: WantedScores | None = None
) -> dict[str, str | int]:
    """Write a request's options. SGLang carries scalars, flat lists and flat dicts here, hence one text."""
    fields: dict[str, Any] = {**_pack_wanted(wanted), "way": way}
    if logits is not None:
        fields["logits"] = _pack_logits(logits)
    if scores is not None:
        fields["scores"] = [
            scores.heads,
            scores.prompt,
            scores.response,
            None if scores.stop is None else str(scores.stop),
            None if scores.pooled is None else _pack_wanted(scores.pooled),
        ]
    return {"protocol": PROTOCOL, "options": json.dumps(fields, separators=(",", ":"))}


def check_protocol(custom_params: object) -> None:
    """Refuse options that are of another protocol, without reading them.

    Args:
        custom_params: what a request has under this name.

    Raises:
        InputError: the options are none of this protocol.
    """
    options = custom_params.get(CHANNEL) if isinstance(custom_params, dict) else None
    if options is None or isinstance(options, Options):
        return
    if not isinstance(options, dict):
        raise InputTypeError(f"custom_params[{CHANNEL!r}]={options!r:.80}: expected what this package's client sends")
    protocol, text = options.get("protocol"), options.get("options")
    if protocol != PROTOCOL or not isinstance(text, str):
        raise InputError(
            f"custom_params[{CHANNEL!r}] has protocol={protocol!r:.80} and options={text!r:.80}; this server half "
            f"reads a text of protocol {PROTOCOL}. Install the same version of torchrl_sglang_hidden on both sides"
        )


def read_options(custom_params: object) -> Options | None:
    """Read a request's options; None when there are none.

    Args:
        custom_params: what a request has under this name.

    Raises:
        InputError: they cannot be read.
    """
    check_protocol(custom_params)
    if not isinstance(custom_params, dict) or custom_params.get(CHANNEL) is None:
        return None
    options = unpack_options(custom_params)
    if options is None:
        raise InputError(
            f"custom_params[{CHANNEL!r}] cannot be read: {custom_params[CHANNEL]['options']!r:.200}; send what this "
            "package's client makes, for constraints whose code the server has"
        )
    return options


def unpack_options(custom_params: object) -> Options | None:
    """Read a request's options inside the server; None when there are none or they are not ours to read.

    Never raises: an exception in the scheduler would end the server. What is not understood is not answered, and the
    client reports that.

    Args:
        custom_params: what a request has under this name. Options that were read before stand there as they are.
    """
    options = custom_params.get(CHANNEL) if isinstance(custom_params, dict) else None
    if isinstance(options, Options):
        return options
    if not isinstance(options, dict) or options.get("protocol") != PROTOCOL:
        return None
    try:
        fields = json.loads(options["options"])
        wanted = _unpack_wanted(fields)
        logits = _unpack_logits(fields["logits"]) if "logits" in fields else WantedLogits()
        scores = _unpack_scores(*fields["scores"]) if "scores" in fields else None
        return Options(wanted, _known([fields["way"]], ("binary", "text", "shared"))[0], logits, scores)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError):
        return None


def _pack_wanted(wanted: Wanted) -> dict[str, Any]:
    return {
        "segments": wanted.segments,
        "pooling": wanted.pooling,
        "layers": wanted.layers,
        "tokens": wanted.tokens,
        "row_dtype": _name_of(wanted.row_dtype),
        "spans": {name: _pack_span(span) for name, span in wanted.spans.items()},
    }


def _unpack_wanted(fields: Mapping[str, Any]) -> Wanted:
    (pooling,) = _known([fields["pooling"]], (*POOLINGS, None))
    wanted = Wanted(
        segments=_known(fields["segments"], SEGMENTS),
        pooling=pooling,
        layers=tuple(int(layer) for layer in fields["layers"]),
        spans={str(name): _unpack_span(span, pooling) for name, span in fields["spans"].items()},
        tokens=fields["tokens"] is True,
        row_dtype=_FLOATS[fields["row_dtype"]],
    )
    if not wanted.layers or len(set(wanted.layers)) != len(wanted.layers):
        raise ValueError(f"layers={wanted.layers}: expected some, each once")
    return wanted


def _pack_logits(logits: WantedLogits) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "constraints": [constraint.to_str() for constraint in logits.constraints],
        "prompt_from": logits.prompt_from,
        "scored": logits.scored,
        "response_ranges": [position for part in logits.response_ranges for position in part],
        "response_limit": logits.response_limit,
        "entropy": logits.entropy,
    }
    if logits.spec is not None:
        spec = logits.spec
        fields["spec"] = {name: getattr(spec, name) for name in ("top_k", "token_ids", "full", "stage", "segments")}
        fields["spec"]["dtype"] = _name_of(spec.dtype)
    return fields


def _unpack_logits(fields: Mapping[str, Any]) -> WantedLogits:
    spec = fields.get("spec")
    positions = [int(position) for position in fields["response_ranges"]]
    if any(a >= b for a, b in zip(positions[::2], positions[1::2], strict=True)):
        raise ValueError(f"{positions} are no parts of a prompt")
    prompt_from = fields["prompt_from"]
    if prompt_from is not None and int(prompt_from) < 1:
        raise ValueError(f"prompt_from={prompt_from}: nothing is before the first token")
    return WantedLogits(
        spec=None if spec is None else LogitsSpec(**{**spec, "dtype": _FLOATS[spec["dtype"]]}),
        constraints=tuple(_read_constraint(str(text)) for text in _few(fields["constraints"])),
        prompt_from=None if prompt_from is None else int(prompt_from),
        scored=fields["scored"] is True,
        response_ranges=tuple(zip(positions[::2], positions[1::2], strict=True)),
        response_limit=int(fields["response_limit"]),
        entropy=fields["entropy"] is True,
    )


def _unpack_scores(heads: Any, prompt: Any, response: Any, stop: Any, pooled: Any) -> WantedScores:
    spec = HeadSpec(heads, (Segment.RESPONSE,), stop)  # checks them
    wanted = None if pooled is None else _unpack_wanted(pooled)
    if wanted is not None and (wanted.tokens or wanted.pooling is None or wanted.layers != (-1,)):
        raise ValueError("pooled scores are of no layers, and without their tokens")
    scores = WantedScores(spec.heads, prompt is True, response is True, spec.rule, wanted)
    # What is pooled may come to nothing: of spans that this prompt does not have none is sent.
    if wanted is None and not (scores.reads_prompt or scores.reads_response):
        raise ValueError("no token is to be scored")
    return scores


def _few(texts: list[Any]) -> list[Any]:
    if len(texts) > MAX_CONSTRAINTS:
        raise ValueError(f"{len(texts)} constraints, over the limit of {MAX_CONSTRAINTS}")
    return texts


def _read_constraint(text: str) -> LogitConstraint:
    """Read a constraint; masks of equal text are one object, so that what the server makes of one it makes once."""
    found = _MASKS.get(text)
    if found is not None:
        return found
    try:
        constraint = LogitConstraint.from_str(text)
        # These two alone: a user's constraint may keep something of its own request.
        match constraint:
            case ActionMask(valid_token_ids=ids) | DisallowedTokens(ids=ids) if type(constraint) in (
                ActionMask,
                DisallowedTokens,
            ):
                _MASKS.put(text, constraint, len(ids) + 1)
        return constraint
    except Exception as error:  # a constraint is anybody's code, and what it raises would end the scheduler
        raise ValueError(f"{text:.80} cannot be read: {error!r}") from error


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in _FLOATS.items() if known == dtype)


def _known(names: Any, known: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(names)) != len(names) or not set(names) <= set(known):
        raise ValueError(f"{names} are not among {known}, each once")
    return tuple(names)


def _pack_span(span: ResolvedSpan) -> list[Any]:
    return [span.pooling, *_pack_rows(span)]


def _pack_rows(span: ResolvedSpan) -> list[Any]:
    match span:
        case PromptSpan(intervals=intervals):
            return ["prompt", *(position for interval in intervals for position in interval)]
        case LastTokens(count=count, allow_fewer=allow_fewer):
            return ["last", count, allow_fewer]
        case Between(start=start, end=end, unclosed=unclosed):
            return ["between", start, end, unclosed]
        case At(marker=marker, where=where, missing=missing):
            return ["at", marker, where, missing]
        case Each(marker=marker, where=where, missing=missing):
            return ["each", marker, where, missing]
        case Window(start=first, stop=stop):
            return ["window", first, stop]
        case Every(n=n):
            return ["every", n]
        case _:
            assert_never(span)


def _unpack_span(fields: list[Any], of_spec: Pooling | None) -> ResolvedSpan:
    pooling, kind, *values = fields
    span = _unpack_rows(kind, values, pooling)
    if isinstance(span, PromptSpan) and own_pooling(pooling, of_spec) is None and span.count > MAX_SPAN_ROWS:
        raise ValueError(f"{span.count} rows of a span without a pooling, over the limit of {MAX_SPAN_ROWS}")
    return span


def _unpack_rows(kind: str, values: list[Any], pooling: SpanPooling) -> ResolvedSpan:
    if kind == "prompt":
        positions = [int(value) for value in values]
        # In order and apart, or rows would be counted twice.
        if not positions or len(positions) % 2 or positions[0] < 0 or any(a >= b for a, b in pairwise(positions)):
            raise ValueError(f"{positions} are no intervals")
        _known([pooling], (*POOLINGS, "spec", None))
        return PromptSpan(tuple(zip(positions[::2], positions[1::2], strict=True)), pooling)
    if kind == "last":
        return LastTokens(int(values[0]), allow_fewer=values[1] is True, pooling=pooling)
    if kind == "between":
        return Between(values[0], values[1], unclosed=values[2], pooling=pooling)
    if kind in ("at", "each"):
        marker, where, missing = values
        return (At if kind == "at" else Each)(marker, where, missing=missing, pooling=pooling)
    if kind == "window":
        return Window(*values, pooling=pooling)
    if kind == "every":
        return Every(*values, pooling=pooling)
    raise ValueError(f"{kind} is no kind of span")
