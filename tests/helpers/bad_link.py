"""A TCP proxy that makes a bad link: slow, stalled, cut at a moment or after a number of bytes.

The libraries that do this are a server of their own to install (Toxiproxy), or unmaintained since 2018.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

CHUNK_BYTES = 4096


class BadLink:
    """Passes connections on to a port of this machine; `bad_link` makes one.

    Attributes:
        port: where it listens.
        bytes_per_s: how fast answers come through; 0 stalls them, None leaves them as they are.
        cut_after: bytes of answers, over all connections, after which they are cut.
        cut_at: when that was last, of `time.monotonic`; 0 where it was not.
    """

    def __init__(self, target_port: int, port: int) -> None:
        self._target_port, self._open = target_port, set[asyncio.StreamWriter]()
        self.port, self.bytes_per_s, self.cut_after = port, None, None  # type: tuple[int, float | None, int | None]
        self.cut_at = 0.0
        self._loop = asyncio.new_event_loop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Reset every connection that is open."""
        self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        self.cut_after, self.cut_at = None, time.monotonic()
        for writer in self._open:
            writer.transport.abort()

    async def _close(self, server: asyncio.Server) -> None:
        server.close()
        self.bytes_per_s = None
        self._cut()
        # Cancelled, asyncio would report each as an error.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
        self._open |= {writer, back}
        try:
            await asyncio.gather(self._pass(reader, back, answers=False), self._pass(there, writer, answers=True))
        except OSError:
            pass  # what this is for
        finally:
            for one in (writer, back):
                one.transport.abort()
            self._open -= {writer, back}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        while data := await reader.read(CHUNK_BYTES):
            if answers and self.bytes_per_s is not None:
                while self.bytes_per_s == 0:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(len(data) / (self.bytes_per_s or 1e9))
            if answers and self.cut_after is not None:
                self.cut_after -= len(data)
                if self.cut_after <= 0:
                    self._cut()
                    return
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


@contextmanager
def bad_link(target_port: int, port: int = 0) -> Iterator[BadLink]:
    """Yield a link to a port of this machine, good until it is told to be bad; 0 takes a free one for it."""
    link = BadLink(target_port, port)
    server = link._loop.run_until_complete(asyncio.start_server(link._serve, "127.0.0.1", port))
    link.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=link._loop.run_forever, daemon=True)
    thread.start()
    try:
        yield link
    finally:
        asyncio.run_coroutine_threadsafe(link._close(server), link._loop).result()
        link._loop.call_soon_threadsafe(link._loop.stop)
        thread.join()
        link._loop.close()
