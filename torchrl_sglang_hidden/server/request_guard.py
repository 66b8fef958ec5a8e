"""Refuses bad requests in SGLang's tokenizer manager, which every route and every in-process call passes through.

What it lets through, the scheduler can read and compute: there most of what is refused here would end the server. The
error is a ``ValueError`` that names the row, the value and the limit, which SGLang's routes answer with status 400.

Each request passes `around_priority` and `around_normalize` as it came, rows and all. `after_init_state` then numbers
the rows, and each row passes `around_tokenize` as it was sent, `around_validate` when its ids are known, and
`around_create` when it is what the scheduler will get. Knows SGLang's requests by attribute name; imports of SGLang are
inside functions. Knows nothing of the scheduler: what only that can find is in `request_isolation`. What is checked is
in `request_checks`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from torchrl_sglang_hidden.counters import SERVER
from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.server.request_checks import (
    MAX_SAMPLES,
    OF_BAD_REQUESTS,
    check_batch,
    check_embeddings,
    check_ids,
    check_lists,
    check_log_probs,
    check_overrides,
    check_places,
    check_prompt,
    check_sampling,
    check_wire,
    has_session,
    message_of,
    name_id,
)
from torchrl_sglang_hidden.spec.request_rules import Rule, check_option, check_prompt_ids

__all__ = ["AFTER_GUARD", "AROUND_GUARD", "BEFORE_GUARD"]

logger = logging.getLogger(__name__)

# Set on SGLang's object of each row of a batch.
_ROW = "_torchrl_sglang_hidden_row"
# What SGLang says of a grammar that leaves no token, such as ``root ::= root``.
_NO_TOKEN = "Grammar accept_token failed"
_LOGGING = {
    "log_requests_level": Rule((int,), lambda x: 0 <= x <= 3, "an integer in 0..3"),
    "log_requests_format": Rule((str,), lambda x: x in ("text", "json"), "'text' or 'json'"),
    "log_level": Rule((str,), lambda x: x.upper() in logging.getLevelNamesMapping(), "the name of a level"),
}
_HEALTH_CHECK = "HEALTH_CHECK"
_HEALTH_PATHS = frozenset({"/health", "/health_generate"})
_NUM_SAMPLES = Rule((int,), lambda x: 1 <= x <= MAX_SAMPLES, f"an integer in 1..{MAX_SAMPLES}")


@contextmanager
def refusing(row: int | None) -> Iterator[None]:
    """Turn what a bad request raises into a ``ValueError`` whose message begins with the row, where it is known."""
    try:
        yield
    except OF_BAD_REQUESTS as error:
        reason = message_of(error)
        if row is not None and not reason.startswith("row "):
            reason = f"row {row}: {reason}"
        if type(error) is ValueError and reason == str(error):
            raise
        SERVER.add(refusals=1)
        logger.info("torchrl_sglang_hidden: a request is refused: %s", reason)
        raise ValueError(reason) from error


# --- as it came -------------------------------------------------------------------------------------------------------


def around_priority(original: Callable[[Any, Any], None], manager: Any, obj: Any) -> None:
    """Refuse a priority that is no integer: SGLang compares it with its limits before it looks at anything else."""
    with refusing(None):
        if obj.priority is not None and type(obj.priority) is not int:
            raise InputTypeError(f"priority={obj.priority!r:.200}: expected an integer")
        original(manager, obj)


def around_normalize(original: Callable[[Any], None], obj: Any) -> None:
    """Refuse what cannot be split into rows, and more rows than the server has room for."""
    with refusing(None):
        options = obj.sampling_params
        several = options if isinstance(options, list) else [options]
        for row, one in enumerate(several):
            if one is not None and not isinstance(one, dict):
                raise InputTypeError(f"row {row}: sampling_params={one!r:.200}: expected an object of options")
        samples = [1 if one is None else one.get("n", 1) for one in several]
        for row, num_samples in enumerate(samples):
            check_option(f"row {row}: n", num_samples, _NUM_SAMPLES)
        if getattr(obj, "lora_id", None) is not None:
            raise InputError(f"lora_id={obj.lora_id!r:.200} is the server's own; name the adapter in lora_path")
        if getattr(obj, "http_worker_ipc", None) is not None:
            raise InputError(f"http_worker_ipc={obj.http_worker_ipc!r:.200} is the server's own; leave it out")
        check_batch(obj, max(samples, default=1))
        original(obj)
        if not obj.is_single:
            check_lists(obj)
        elif not isinstance(obj.rid, str):
            raise InputTypeError(f"rid={obj.rid!r:.200}: expected a string for one prompt")


def before_init_state(manager: Any, obj: Any, request: Any = None) -> None:
    """Refuse a request that is named as SGLang's own checks of its health are: their answers may be dropped."""
    names = obj.rid if isinstance(obj.rid, list) else [obj.rid]
    for row, name in enumerate(names):
        if isinstance(name, str) and name.startswith(_HEALTH_CHECK) and not _is_health_check(request):
            with refusing(row):
                raise InputError(f"rid={name!r:.200}: {_HEALTH_CHECK} begins the server's own; choose another")


def _is_health_check(request: Any) -> bool:
    return request is not None and request.url.path in _HEALTH_PATHS


def after_init_state(result: None, manager: Any, obj: Any, request: Any = None) -> None:
    """Write into SGLang's objects of a batch's rows, which it made just now, which row each of them is."""
    if not getattr(obj, "is_single", True):
        # The samples of row n are n, n + batch_size, …
        for index in range(len(obj.rid)):
            setattr(obj[index], _ROW, index % obj.batch_size)


# --- each row ---------------------------------------------------------------------------------------------------------


async def around_tokenize(original: Callable[..., Coroutine[Any, Any, Any]], manager: Any, obj: Any) -> Any:
    """Refuse a row whose prompt cannot be read."""
    with refusing(_row_of(obj)):
        check_prompt(manager, obj)
        return await original(manager, obj)


async def around_tokenize_batch(
    original: Callable[..., Coroutine[Any, Any, Any]], manager: Any, batch_size: int, obj: Any
) -> Any:
    """Refuse a batch of texts that has a row which cannot be read."""
    for row in range(batch_size):
        with refusing(row):
            check_prompt(manager, obj[row])
    with refusing(None):
        return await original(manager, batch_size, obj)


def around_validate(original: Callable[..., None], manager: Any, obj: Any, input_ids: Any) -> None:
    """Refuse a row without tokens, and options outside their limits: SGLang checks lengths next, and adds them up."""
    row, vocab_size = _row_of(obj), manager.model_config.vocab_size
    with refusing(row):
        # What a session said before may be the whole prompt: SGLang's scheduler looks.
        if input_ids is not None and len(input_ids) == 0 and not has_session(obj):
            check_prompt_ids(f"row {row}:", input_ids, vocab_size)
        check_sampling(f"row {row}:", obj.sampling_params or {}, vocab_size)
        check_log_probs(f"row {row}:", obj, vocab_size)
        original(manager, obj, input_ids)


def around_create(original: Callable[..., Any], manager: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse a row that the scheduler could not read, or whose ids the model does not have."""
    row = _row_of(obj)
    with refusing(row):
        try:
            tokenized = original(manager, obj, *args, **kwargs)
        except (TypeError, OverflowError):
            if obj.input_ids is not None:
                name_id(f"row {row}:", obj.input_ids, manager.model_config.vocab_size)
            raise
        check_ids(f"row {row}:", tokenized, obj, manager.model_config.vocab_size)
        check_places(tokenized)
        check_overrides(tokenized, manager.model_config.hidden_size)
        check_embeddings(tokenized, manager.model_config.hidden_size)
        check_wire(tokenized)
        return tokenized


def before_abort_reason(manager: Any, out: Any, state: Any, is_stream: bool) -> None:
    """Name the row in what the scheduler refuses."""
    reason = out["meta_info"]["finish_reason"]
    said = str(reason.get("message"))
    if said.startswith(_NO_TOKEN):
        reason["status_code"] = 400  # SGLang's 500 says that the server was at fault
    if reason.get("status_code") == 400 and not said.startswith("row "):
        reason["message"] = f"row {_row_of(state.obj)}: {said}"


def _row_of(obj: Any) -> int:
    return getattr(obj, _ROW, 0)


def before_logging(manager: Any, obj: Any) -> None:
    """Refuse settings of the log that SGLang would keep, and fail at with every later request."""
    with refusing(None):
        for name, rule in _LOGGING.items():
            value = getattr(obj, name)
            if value is not None:
                check_option(name, value, rule)


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_INPUTS = "sglang.srt.managers.io_struct"
BEFORE_GUARD: dict[str, Callable[..., Any]] = {
    f"{_MANAGER}._handle_abort_finish_reason": before_abort_reason,
    f"{_MANAGER}._init_req_state": before_init_state,
    f"{_MANAGER}.configure_logging": before_logging,
}
AFTER_GUARD: dict[str, Callable[..., Any]] = {f"{_MANAGER}._init_req_state": after_init_state}
AROUND_GUARD: dict[str, Callable[..., Any]] = {
    f"{_INPUTS}.GenerateReqInput.normalize_batch_and_arguments": around_normalize,
    f"{_INPUTS}.EmbeddingReqInput.normalize_batch_and_arguments": around_normalize,
    f"{_MANAGER}._set_default_priority": around_priority,
    f"{_MANAGER}._tokenize_one_request": around_tokenize,
    f"{_MANAGER}._batch_tokenize_and_process": around_tokenize_batch,
    f"{_MANAGER}._validate_one_request": around_validate,
    f"{_MANAGER}._create_tokenized_object": around_create,
}
