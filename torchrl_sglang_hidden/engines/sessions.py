"""Conversations on one server, turn by turn, with SGLang's own sessions.

The server of a session keeps the context, so that a turn sends its new tokens only. This side keeps the ids of the
context too, and checks every answer against them. Knows nothing of how a request travels.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from torchrl_sglang_hidden.engines.meter import Meter
from torchrl_sglang_hidden.errors import (
    AlignmentError,
    EngineError,
    EngineUnreachableError,
    InputTypeError,
    PromptLengthError,
    RequestRejectedError,
)
from torchrl_sglang_hidden.records import Completion, EngineInfo, Images, Request
from torchrl_sglang_hidden.sglang_api.payload import sent_ids_of, to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses

__all__ = ["Session", "SessionHost"]

# After this time without a turn SGLang closes a session: the session of a client that died would stay for good.
IDLE_TIMEOUT_S = 3600.0


@dataclass(slots=True)
class SessionHost:
    """The one server, or in-process engine, that a session stays with.

    Args:
        info: returns the server's present `EngineInfo`.
        call: calls one of SGLang's control routes.
        ask: sends a payload of one request, and returns SGLang's answer.
        binary: see `sglang_api.payload.to_payload`.
        num_ranks: number of the server's data-parallel ranks.
        bos_id: the id that SGLang takes off the head of an appended turn; None until a turn showed it.
    """

    info: Callable[[], EngineInfo]
    call: Callable[[str, dict[str, Any]], Any]
    ask: Callable[[dict[str, Any]], Any]
    binary: bool
    num_ranks: int
    bos_id: int | None = None


class Session:
    """A conversation on one server. Each turn is generated after the whole context before it.

    A turn that fails or is aborted leaves the session as it was before. Turns from several threads run one after the
    other. Close a session, or use it in a ``with`` block; SGLang closes it after an hour without a turn.

    Args:
        host: the server.
        check: refuses bad requests, as `Engine._check` does.
        meter: counts the turns; None for an engine that counts nothing.
    """

    def __init__(
        self,
        host: SessionHost,
        check: Callable[[Sequence[Request], EngineInfo], None],
        meter: Meter | None = None,
    ) -> None:
        self._host, self._check, self._meter = host, check, meter or Meter.of_nobody()
        name = uuid.uuid4()
        self._id = name.hex
        # SGLang opens a session on all of its data-parallel ranks, and sends each turn to the next of them.
        self._rank = name.int % host.num_ranks
        self._last_rid: str | None = None
        self._ids: tuple[int, ...] = ()
        self._images: Images | None = None
        self._closed = False
        self._lock = threading.Lock()
        # SGLang requires a capacity and never reads it.
        host.call("open_session", {"session_id": self._id, "capacity_of_str_len": 0, "timeout": IDLE_TIMEOUT_S})

    @property
    def ids(self) -> tuple[int, ...]:
        """The context so far: the new ids and the response of every turn, exactly as sampled."""
        return self._ids

    def generate(self, turn: Sequence[int] | Request) -> Completion:
        """Append a turn to the context, and generate its response.

        Args:
            turn: the new ids, for SGLang's default sampling; or a `Request` whose ``prompt_ids`` are the new ids, and
                whose ``images`` are those of the turn. Positions in its ``spans`` count from the context's beginning.

        Returns:
            A `Completion` whose ``prompt_ids`` are the whole context. Log-probs, pooled states and token states are
            the same as for one request with this prompt.

        Raises:
            InputError: a turn without ids, a turn that does not fit into the context length, or what `Engine.generate`
                refuses. Nothing was sent.
            RequestRejectedError: the server does not know the session any more, or refused the turn.
            EngineError: as for `Engine.generate`; or the session was closed.
            AlignmentError: the context on the server differs from `ids`.
        """
        with self._lock:
            if self._closed:
                raise EngineError("the session was closed by close(); open a new one")
            request = turn if isinstance(turn, Request) else Request(_ids_of(turn))
            # A turn that went wrong is no part of the context, which goes on from whole turns.
            request = replace(request, return_errors=False)
            new_ids = request.prompt_ids
            if not new_ids:
                raise PromptLengthError(
                    f"the turn has 0 tokens behind a context of {len(self._ids)}; pass at least 1, such as those of "
                    "the chat template's next message"
                )
            sent_ids = sent_ids_of(request)
            data = () if request.images is None else request.images.data
            images = _joined(self._ids, self._images, new_ids, request.images)
            request = replace(request, prompt_ids=(*self._ids, *new_ids), images=images)
            self._check([request], self._host.info())
            with self._meter.watching([request]) as took:
                self._last_rid, completion = self._append(request, sent_ids, data)
                took([completion])
            self._ids = (*completion.prompt_ids, *completion.response_ids)
            self._images = None if images is None else images.followed_by(completion.response_ids)
            return completion

    def _append(self, request: Request, new_ids: tuple[int, ...], data: tuple[str, ...]) -> tuple[str, Completion]:
        appended = self._last_rid is not None
        doubled = (new_ids[0], *new_ids)
        if appended and new_ids[0] == self._host.bos_id:
            return self._send(request, doubled, data)
        try:
            return self._send(request, new_ids, data)
        except AlignmentError as error:
            # SGLang takes a BOS off the head of an appended turn, for tokenizers that put one before every text, and
            # says nowhere which id the BOS is. Sent twice, only the first of the two is taken off. A placeholder is no
            # BOS, and SGLang hangs on two of them for one image.
            if not appended or (request.images is not None and new_ids[0] == request.images.placeholder):
                raise
            with suppress(AlignmentError):
                sent = self._send(request, doubled, data)
                self._host.bos_id = new_ids[0]
                return sent
            raise error

    def _send(self, request: Request, new_ids: tuple[int, ...], data: tuple[str, ...]) -> tuple[str, Completion]:
        info, rid = self._host.info(), uuid.uuid4().hex
        payload = to_payload([request], info, binary=self._host.binary)
        payload["input_ids"], payload["rid"] = [list(new_ids)], [rid]
        if request.images is not None:
            # The images of earlier turns are in the context that the server has.
            payload["image_data"] = [list(data)]
        payload["session_params"] = {"id": self._id, "rid": self._last_rid}
        payload["routed_dp_rank"] = self._rank
        try:
            rows = self._host.ask(payload)
        except RequestRejectedError as error:
            if "session id" not in str(error):
                raise
            raise RequestRejectedError(
                f"{error}; a session ends with its server, or after {IDLE_TIMEOUT_S:.0f} s without a turn: `ids` has "
                "its context; pass them as the first turn of a new session"
            ) from error
        return rid, read_responses([request], rows, info, rids=[rid])[0]

    def close(self) -> None:
        """End the session; a second call does nothing."""
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


def _joined(
    context_ids: tuple[int, ...], context: Images | None, new_ids: tuple[int, ...], new: Images | None
) -> Images | None:
    """Return the images of a context and of the turn behind it, in the ids of both."""
    if new is None:
        return None if context is None else context.followed_by(new_ids)
    before = context or Images(context_ids, (), (), new.placeholder)
    return Images(
        (*before.sent_ids, *new.sent_ids),
        (*before.data, *new.data),
        (*before.ranges, *((start + len(context_ids), stop + len(context_ids)) for start, stop in new.ranges)),
        new.placeholder,
    )


def _ids_of(turn: object) -> tuple[Any, ...]:
    if not isinstance(turn, (list, tuple)):
        raise InputTypeError(f"a turn is {turn!r:.80}; expected a Request, or a list of token ids")
    return tuple(turn)
