"""What one who starts a server knows of it and a client does not: how it ended, whether it comes back, what it keeps.

`Supervision` is that of a server that others started: it says nothing and keeps nothing. `Supervisor` in
``restarting.py`` is that of ``launch(restart=True)``.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["Supervision"]


class Supervision:
    """What a client's calls ask of whoever started the server.

    Attributes:
        keeps: whether weights that the server takes are to be kept for its next start.
        start: the number of the server's start, counted by whoever supervises it.
    """

    keeps = False
    start = 0

    def how_it_ended(self) -> str:
        """Return how the server's process ended; "" while it runs, or where that is not known."""
        return ""

    def admit(self, *, generates: bool) -> None:
        """Return when a call may be sent, at once unless the server is being started again.

        Args:
            generates: whether the call needs the served weights; one that brings new weights does not.

        Raises:
            ServerRestartingError: the server did not come back in time.
            RestartError: it does not come back, or came back without its weights.
        """

    async def aadmit(self, *, generates: bool) -> None:
        """Return as `admit` does, without blocking the event loop."""

    def keep_weights(self, directory: Path | None, version: str, start: int, *, is_users: bool) -> None:
        """Keep the weights that the server has just taken.

        Args:
            directory: their checkpoint.
            version: their name.
            start: `start` when they were sent.
            is_users: whether the directory is the user's own, which stays where it is.

        Raises:
            EngineError: the server ended right after it took them.
        """

    def keep_adapter(self, name: str, directory: Path, version: str, start: int, *, is_users: bool) -> None:
        """Keep an adapter that the server has just taken; see `keep_weights`."""

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter that the server has just unloaded."""

    def keep_head(self, name: str, packed: str | None, start: int) -> None:
        """Keep a head that the server has just taken, or forget one that it has just dropped.

        Args:
            name: the head's.
            packed: the call that pushed it, see `HeadCall.pack`; None for one that was dropped.
            start: `start` when it was sent.

        Raises:
            EngineError: the server ended right after it took the head.
        """
