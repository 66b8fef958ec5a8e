"""Reads SGLang's own fields of one answer: its ids, its text, and why it ended.

Knows nothing of states and logits, nor of what was asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torchrl_sglang_hidden.errors import (
    IncompleteWeightsError,
    ProtocolError,
    RequestAbortedError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.protocol import excerpt
from torchrl_sglang_hidden.protocol.answer import ENDED_BY_HEAD
from torchrl_sglang_hidden.protocol.excerpts import as_count
from torchrl_sglang_hidden.protocol.served_weights import INCOMPLETE
from torchrl_sglang_hidden.records import EngineInfo

__all__ = ["AnswerFields", "read_fields", "read_ids"]


class AnswerFields(NamedTuple):
    """Holds SGLang's own fields of one answer. ``error`` says why they are not what was asked for."""

    name: str
    text: str
    response_ids: tuple[int, ...]
    finish_type: str
    num_prompt: int | None
    weight_version: str
    versions: tuple[tuple[str, int], ...]
    meta: Mapping[str, Any]
    error: SGLangHiddenError | None


def read_ids(ids: Any, vocab_size: int) -> tuple[int, ...]:
    """Read the ids of a response.

    Raises:
        TypeError: something else than a list of integers.
        ValueError: an id that the model does not have.
    """
    if not isinstance(ids, (list, tuple)) or any(type(token_id) is not int for token_id in ids):
        raise TypeError(f"output_ids is {excerpt(ids)}, expected a list of integers")
    wrong = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"output_ids has {excerpt(wrong)}, and the model's ids are 0..{vocab_size - 1}")
    return tuple(ids)


def read_fields(number: int, row: Any, info: EngineInfo, rid: str | None = None) -> AnswerFields:
    """Read SGLang's own fields of one answer.

    Args:
        number: where the request stands in the batch, for errors.
        row: the answer.
        info: the engine's.
        rid: the request's name on the server; None where the server gave it one.

    Raises:
        ProtocolError: a field is missing, or of another type; or it is the answer to another request.
    """
    try:
        meta, text, response_ids = row["meta_info"], row["text"], read_ids(row["output_ids"], info.vocab_size)
        request_id, finish_type = meta["id"], _finish_type(meta["finish_reason"])
        name = f"row {number} (request {request_id if isinstance(request_id, str) else excerpt(request_id)})"
        _text("text", text)
        if rid is not None and request_id != rid:
            raise ValueError(f"it answers {excerpt(request_id)}, and {rid!r} was sent")
        error: SGLangHiddenError | None = None
        _text("finish_reason's type", finish_type)
        if finish_type not in ("stop", "length", "head"):
            message = meta["finish_reason"].get("message", "")
            error = RequestAbortedError(
                f"{name}: finished with {finish_type!r:.80} after {len(response_ids)} tokens: "
                f"{message if isinstance(message, str) else excerpt(message)}; send it again, or look at the server's "
                "log"
            )
            # SGLang leaves fields out of a request that it aborts in its queue.
            meta = {"weight_version": info.weight_version, "prompt_tokens": None, **meta}
            finish_type = "abort"
        version = _text("weight_version", meta["weight_version"])
        num_prompt = None if meta["prompt_tokens"] is None else as_count(meta["prompt_tokens"], "prompt_tokens")
        versions = _read_versions(meta.get("weight_versions"), version, len(response_ids))
        error = _find_mixture(name, (*versions, (version, 1))) or error
        return AnswerFields(name, text, response_ids, finish_type, num_prompt, version, versions, meta, error)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as fault:
        wrong = f"lacks {fault}" if isinstance(fault, KeyError) else f"is wrong, {fault}"
        raise ProtocolError(
            f"row {number}: the answer {wrong}: {excerpt(row, 200)}; is that an SGLang server?"
        ) from fault


def _finish_type(finish: Any) -> Any:
    """Return why a response ended; ``"head"`` for what SGLang's other clients read as a ``"stop"``."""
    return "head" if finish["type"] == "stop" and ENDED_BY_HEAD in finish else finish["type"]


def _find_mixture(name: str, versions: Iterable[tuple[str, int]]) -> IncompleteWeightsError | None:
    """Return an error where some tokens are of weights that an update left half new, even if others came since."""
    for version, num_tokens in versions:
        if num_tokens and version.endswith(INCOMPLETE):
            return IncompleteWeightsError(
                f"{name}: weight_version={excerpt(version)} is a mixture of old and new weights, left by an update "
                "that ended in the middle; update the weights again, and send it again"
            )
    return None


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {excerpt(value)}, expected a string")
    return value


def _read_versions(spans: Any, version: str, num_response: int) -> tuple[tuple[str, int], ...]:
    """Read which weights sampled which tokens; all of them the last ones where SGLang does not say."""
    if not spans:
        return ((version, num_response),)
    versions, before = [], 0
    for span in spans:
        start, end = (as_count(span[name], f"weight_versions' {name}", num_response) for name in ("start", "end"))
        if not before <= start <= end:
            raise ValueError(f"weight_versions has the tokens {start}..{end} behind {before}")
        versions.append((_text("weight_versions' version", span["version"]), end - start))
        before = end
    return tuple(versions)
