"""Sends the server half's answers with SGLang's outputs; those that take long are finished and sent by another thread.

SGLang's scheduler sends what a step brought in one message. A request that finishes with a big answer gets a message of
its own, which SGLang writes as always, and which is held back until the answer is there. Nobody else waits for it.

Knows SGLang's output streamer by attribute name; imports of SGLang are inside functions.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torchrl_sglang_hidden.protocol import CHANNEL, PROTOCOL
from torchrl_sglang_hidden.protocol.answer import STREAMED
from torchrl_sglang_hidden.server.answers import Answer, Unfinished
from torchrl_sglang_hidden.server.capture import Capture

__all__ = ["MessageGate", "make_streamer_class"]

logger = logging.getLogger(__name__)


class MessageGate:
    """Lets messages through to SGLang's detokenizer, one thread at a time, and holds some back.

    Args:
        capture: runs what is held back in its finisher's thread.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        # A socket may be used by several threads where never two do so at the same time.
        self._lock = threading.Lock()
        self._held: list[Unfinished | None] = []

    def hold_next(self, unfinished: list[Unfinished | None]) -> None:
        """Hold the next message back, until its requests' answers are made."""
        self._held = unfinished

    def send(self, send: Callable[[Any], None], message: Any) -> None:
        """Send a message, or have it sent later.

        Args:
            send: sends one.
            message: SGLang's.
        """
        held, self._held = self._held, []
        if not held:
            with self._lock:
                send(message)
            return

        def finish_and_send() -> None:
            try:
                add_answers(message, [[] if one is None else one.finish() for one in held])
            except Exception as error:
                # The client would wait for ever.
                logger.exception("torchrl_sglang_hidden: answers could not be put into a message")
                refused = {"protocol": PROTOCOL, "refused": f"the answer could not be sent ({error!r}); see the log"}
                add_answers(message, [[] if one is None else [refused] for one in held])
            with self._lock:
                send(message)

        self._capture.later(finish_and_send)


def add_answers(message: Any, answers: Sequence[Answer]) -> None:
    """Put answers into a message that SGLang has written."""
    from sglang.srt.managers.io_struct import unwrap_from_pickle, wrap_as_pickle

    info = unwrap_from_pickle(message.customized_info) or {}
    message.customized_info = wrap_as_pickle({**info, CHANNEL: list(answers)})


def streamed_scores(capture: Capture, req: Any) -> Answer:
    """Return what a part of a stream says of its tokens' scores, as a list of one; an empty list for nothing."""
    tracked = capture.scored.get(req) if capture.scored and req.stream else None
    if tracked is None or tracked.scores is None or not tracked.scores.wanted.response:
        return []
    return [{STREAMED: tracked.scores.next_of_stream()}]


def make_streamer_class(base: type, capture: Capture, gate: MessageGate) -> type:
    """Make an output streamer that sends the server half's answers.

    Args:
        base: SGLang's.
        capture: has the answers.
        gate: all messages go through it.
    """

    class PooledOutputStreamer(base):  # type: ignore[misc]
        has_additional_customized_info = True
        later = False

        def __post_init__(self) -> None:
            super().__post_init__()
            # Ranks above 0 write the same messages and have no socket to send them through.
            capture.sends = self.send_to_detokenizer.socket is not None

        def stream_output(self, reqs: list[Any], return_logprob: bool, skip_req: Any = None) -> None:
            if not capture.opened:
                super().stream_output(reqs, return_logprob, skip_req)
                return
            big = {
                id(req)
                for req in reqs
                if req is not skip_req and req.finished() and not req.finished_output and capture.has_big_answer(req)
            }
            if not big:
                super().stream_output(reqs, return_logprob, skip_req)
                return
            small = [req for req in reqs if id(req) not in big]
            if small:
                super().stream_output(small, return_logprob, skip_req)
            self.later = True
            try:
                # One message for each: none of them waits for another's answer.
                for req in reqs:
                    if id(req) in big:
                        super().stream_output([req], return_logprob, skip_req)
            finally:
                self.later = False

        def is_request_level_customized_info_key(self, key: str) -> bool:
            return key == CHANNEL or super().is_request_level_customized_info_key(key)

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
            info: dict[str, list[Any]] = super().build_additional_customized_info(reqs)
            if not capture.opened:
                return info
            asked = [req in capture.opened for req in reqs]
            try:
                unfinished = capture.answers(reqs)
            except Exception as error:  # a bug of ours, whichever: it costs these requests
                logger.exception("torchrl_sglang_hidden: answers could not be made")
                refused = {"protocol": PROTOCOL, "refused": f"the answer could not be made ({error!r}); see the log"}
                finished = [is_asked and req.finished() for is_asked, req in zip(asked, reqs, strict=True)]
                return {**info, CHANNEL: [[refused] if is_finished else [] for is_finished in finished]}
            if self.later and any(unfinished):
                gate.hold_next(unfinished)
                return info
            parts = [streamed_scores(capture, req) for req in reqs]
            if not any(unfinished) and not any(parts):
                return info
            answers = [part if one is None else one.finish() for one, part in zip(unfinished, parts, strict=True)]
            return {**info, CHANNEL: answers}

    return PooledOutputStreamer
