"""Conversations on one server, turn by turn, with SGLang's own sessions.

A session's server keeps the context: a turn sends its new tokens only. This side keeps the ids as well, asks for what
they need, and holds every answer against them. Knows nothing of how a request travels.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from torchrl_sglang_hidden.errors import (
    AlignmentError,
    EngineError,
    EngineUnreachableError,
    InputTypeError,
    PromptLengthError,
    RequestRejectedError,
)
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses

__all__ = ["Session", "SessionHost"]

# After this time without a turn SGLang closes a session by itself: that of a client that died would stay for good.
IDLE_TIMEOUT_S = 3600.0


@dataclass(slots=True)
class SessionHost:
    """The one server, or in-process engine, that a session stays with.

    Args:
        info: what it says of itself now.
        call: one of SGLang's control calls.
        ask: sends a payload of one request, and returns SGLang's answer.
        binary: see `payload.to_payload`.
        num_ranks: its data-parallel ranks.
        bos_id: the id that SGLang takes off the head of an appended turn, once that was seen.
    """

    info: Callable[[], EngineInfo]
    call: Callable[[str, dict[str, Any]], Any]
    ask: Callable[[dict[str, Any]], Any]
    binary: bool
    num_ranks: int
    bos_id: int | None = None


class Session:
    """A conversation on one server. Each turn goes on behind everything before it.

    A turn that fails or is aborted leaves the session as it was before. Turns from several threads go one after the
    other. Close it, or use it in a ``with`` block; SGLang closes it after an hour without a turn.

    Args:
        host: where it stays.
        check: refuses bad requests, as `Engine._check`.
    """

    def __init__(self, host: SessionHost, check: Callable[[Sequence[Request], EngineInfo], None]) -> None:
        self._host, self._check = host, check
        name = uuid.uuid4()
        self._id = name.hex
        # SGLang opens a session on all of its data-parallel ranks, and sends each turn to the next of them.
        self._rank = name.int % host.num_ranks
        self._last_rid: str | None = None
        self._ids: tuple[int, ...] = ()
        self._closed = False
        self._lock = threading.Lock()
        # SGLang wants a capacity and never reads it.
        host.call("open_session", {"session_id": self._id, "capacity_of_str_len": 0, "timeout": IDLE_TIMEOUT_S})

    @property
    def ids(self) -> tuple[int, ...]:
        """The context so far: every turn's new ids and its response, exactly as sampled."""
        return self._ids

    def generate(self, turn: Sequence[int] | Request) -> Completion:
        """Generates behind the context and this turn's new ids.

        Args:
            turn: the new ids, for SGLang's default sampling; or a `Request` whose ``prompt_ids`` are the new ids.
                Positions in its ``spans`` count from the context's beginning.

        Returns:
            What came back, with the whole context as ``prompt_ids``: log-probs, pooled states and token states are
            those of a request with this prompt.

        Raises:
            InputError: a turn without ids, one that does not fit behind the context, or what `Engine.generate`
                refuses. Nothing was sent.
            RequestRejectedError: the server does not know the session any more, or refused the turn.
            EngineError: see `Engine.generate`; or the session was closed.
            AlignmentError: the server's context is not that of `ids`.
        """
        with self._lock:
            if self._closed:
                raise EngineError("the session was closed by close(); open a new one")
            request = turn if isinstance(turn, Request) else Request(_ids_of(turn))
            new_ids = request.prompt_ids
            if not new_ids:
                raise PromptLengthError(
                    f"the turn has 0 tokens behind a context of {len(self._ids)}; pass at least 1, such as those of "
                    "the chat template's next message"
                )
            request = replace(request, prompt_ids=(*self._ids, *new_ids))
            self._check([request], self._host.info())
            self._last_rid, completion = self._append(request, new_ids)
            self._ids = (*completion.prompt_ids, *completion.response_ids)
            return completion

    def _append(self, request: Request, new_ids: tuple[int, ...]) -> tuple[str, Completion]:
        appended = self._last_rid is not None
        doubled = (new_ids[0], *new_ids)
        if appended and new_ids[0] == self._host.bos_id:
            return self._send(request, doubled)
        try:
            return self._send(request, new_ids)
        except AlignmentError as error:
            # SGLang takes a BOS off the head of an appended turn, for tokenizers that put one before every text, and
            # says nowhere which id that is. In front of a second one it is only that one that goes.
            if not appended:
                raise
            with suppress(AlignmentError):
                sent = self._send(request, doubled)
                self._host.bos_id = new_ids[0]
                return sent
            raise error

    def _send(self, request: Request, new_ids: tuple[int, ...]) -> tuple[str, Completion]:
        info, rid = self._host.info(), uuid.uuid4().hex
        payload = to_payload([request], info, binary=self._host.binary)
        payload["input_ids"], payload["rid"] = [list(new_ids)], [rid]
        payload["session_params"] = {"id": self._id, "rid": self._last_rid}
        payload["routed_dp_rank"] = self._rank
        try:
            rows = self._host.ask(payload)
        except RequestRejectedError as error:
            if "session id" not in str(error):
                raise
            raise RequestRejectedError(
                f"{error}; a session ends with its server, or after {IDLE_TIMEOUT_S:.0f} s without a turn: `ids` has "
                "its context for the first turn of a new one"
            ) from error
        return rid, read_responses([request], rows, info)[0]

    def close(self) -> None:
        """Ends the session; a second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                # A server that is gone has no sessions either.
                with suppress(EngineUnreachableError):
                    self._host.call("close_session", {"session_id": self._id})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _ids_of(turn: object) -> tuple[Any, ...]:
    if not isinstance(turn, (list, tuple)):
        raise InputTypeError(f"a turn is {turn!r:.80}; expected a Request, or a list of token ids")
    return tuple(turn)
