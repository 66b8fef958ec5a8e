"""When a call over HTTP is made again: only where nothing was generated, or reading once more changes nothing.

tenacity counts and waits. Knows httpx's exceptions and SGLang's words for a full queue, and nothing of servers.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import tenacity

from torchrl_sglang_hidden.engines.http_answers import text_of
from torchrl_sglang_hidden.errors import InputError

__all__ = ["RETRIES", "Retries"]

logger = logging.getLogger(__name__)

RETRIES = 3
# Waits of 0.1, 0.2, 0.4 … seconds, and up to a tenth more by chance, so that many callers do not come back at once.
_WAIT = tenacity.wait_exponential_jitter(multiplier=0.1, max=5.0, jitter=0.1)
# SGLang refuses with these words what it has not begun. Its other 503s, such as a running request that took too long,
# may come after tokens.
_NOT_BEGUN = ("queue is full", "higher priority")


class Retries:
    """Makes calls of one server again, a bounded number of times, with growing waits.

    A connection that was refused is tried again for every call. A 503 that says that nothing was begun is, too. An
    answer that broke off is asked for again where the call only reads: what it is asked for twice it answers alike.

    Args:
        limit: most times that one call is made again; 0 never makes one again.
        counted: called each time that a call is made again.

    Raises:
        InputError: ``limit`` is no whole number, or negative.
    """

    def __init__(self, limit: int = RETRIES, counted: Callable[[], object] = lambda: None) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise InputError(f"retries={limit!r}: expected a whole number, or 0 to make no call again")
        self._limit, self._counted = limit, counted

    def run(self, attempt: Callable[[], httpx.Response], *, what: str, reads: bool) -> httpx.Response:
        """Make a call, and make it again where that is right.

        Args:
            attempt: makes the call once.
            what: names the call in the log.
            reads: whether the call only reads, so that asking twice is asking once.

        Raises:
            httpx.HTTPError: of the last attempt.
        """
        retrying = tenacity.Retrying(**self._policy(what, reads))
        return retrying(attempt)

    async def arun(self, attempt: Callable[[], Awaitable[httpx.Response]], *, what: str, reads: bool) -> httpx.Response:
        """Make a call as `run` does, without blocking the event loop."""
        retrying = tenacity.AsyncRetrying(**self._policy(what, reads))
        return await retrying(attempt)

    def _policy(self, what: str, reads: bool) -> dict[str, Any]:
        def is_safe(error: BaseException) -> bool:
            return isinstance(error, httpx.ConnectError) or (reads and isinstance(error, _BROKEN_OFF))

        def note(state: tenacity.RetryCallState) -> None:
            self._counted()
            outcome, action = state.outcome, state.next_action
            assert outcome is not None
            assert action is not None
            error = outcome.exception()
            reason = f"status {outcome.result().status_code}" if error is None else error
            logger.warning(
                "%s: %s; retry %d of %d in %.1f s", what, reason, state.attempt_number, self._limit, action.sleep
            )

        return {
            "stop": tenacity.stop_after_attempt(self._limit + 1),
            "wait": _WAIT,
            "retry": tenacity.retry_if_exception(is_safe) | tenacity.retry_if_result(_was_not_begun),
            "before_sleep": note,
            # The last answer or error, as if it had been the only one.
            "retry_error_callback": lambda state: state.outcome.result(),
        }


# Not a timeout: its time is up already.
_BROKEN_OFF = (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)


def _was_not_begun(response: httpx.Response) -> bool:
    if response.status_code != 503:
        return False
    # The body of a stream is not there yet, and SGLang refuses one inside the stream.
    if not response.is_stream_consumed:
        return False
    text = text_of(response)
    return not text or any(words in text for words in _NOT_BEGUN)
