"""The requests of one call: their names on the server, the open files that they take, and what another attempt sends.

Knows SGLang's names of requests, and nothing of connections.
"""

from __future__ import annotations

import os
import resource
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from torchrl_sglang_hidden.errors import InputError

__all__ = ["Attempts", "check_open_files", "new_request_ids"]


class Attempts:
    """What is sent of one payload, attempt by attempt.

    Args:
        payload: for SGLang's ``/generate``, with a name for each request in ``rid``.

    Attributes:
        rids: the names that were sent last, which an answer must have.
        may_run: whether requests of the attempt before may still be on the server.
    """

    def __init__(self, payload: dict[str, Any]) -> None:
        self._payload = payload
        self._count = 0
        self.rids: list[str] = payload["rid"]
        self.may_run = False

    @contextmanager
    def sending(self) -> Iterator[dict[str, Any]]:
        """Yield the payload of the next attempt, which is sent inside the block.

        SGLang refuses a name that it still knows from the attempt before. The name of a session's turn stays: the next
        turn refers to it.
        """
        self._count += 1
        payload = self._payload
        if self._count > 1 and "session_params" not in payload:
            # Behind the name, so that an abort by the name, which SGLang takes for a beginning, means every attempt.
            self.rids = [f"{rid}-{self._count}" for rid in payload["rid"]]
            payload = {**payload, "rid": self.rids}
        self.may_run = True
        try:
            yield payload
        except httpx.ConnectError:
            self.may_run = False
            raise


def new_request_ids(count: int) -> list[str]:
    """Return names for the requests of one batch. None is the beginning of another: SGLang aborts by beginnings."""
    batch = uuid.uuid4().hex
    return [f"{batch}-{index:08d}" for index in range(count)]


def check_open_files(count: int) -> None:
    """Check that this process can open so many connections more.

    Raises:
        InputError: its limit of open files is too low.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = limit - len(os.listdir("/dev/fd"))
    if limit != resource.RLIM_INFINITY and count > free:
        raise InputError(
            f"{count} requests side by side, each on a connection of its own: this process can open {max(free, 0)} "
            f"files more (its limit is {limit}); raise the limit (ulimit -n), or send fewer prompts or samples at once"
        )
