"""Holds the right to change the weights of servers, so that they notice when this process dies in the middle.

See `protocol.update_lease`. Knows nothing of weights or transports.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from torchrl_sglang_hidden.errors import EngineError
from torchrl_sglang_hidden.protocol.update_lease import HOLD_S, LOST_S, LeaseCall
from torchrl_sglang_hidden.weights.control import ControlCall

__all__ = ["Leases", "leased"]

_RETRY_S = 0.5
# Longest time that the error of an update waits for the servers to hear of it: one of them may be starting again.
_ABANDON_S = 5.0


@contextmanager
def leased(calls: Sequence[ControlCall], timeout_s: float) -> Iterator[Leases]:
    """Hold the right to change the weights of servers for the length of a ``with`` block.

    The block begins when no other trainer changes the weights of one of them. A server hears of this process from the
    moment at which its lease is taken: the leases of the others may take long. Name the version soon in the block.

    Args:
        calls: call a control route of each server that has the server half, in an order that all trainers share.
        timeout_s: seconds after which such a call fails by itself.

    Raises:
        EngineError: a server is gone; or it gave this update up, since it did not hear of this process for a while.
    """
    holder = uuid.uuid4().hex
    leases = Leases(holder, min(HOLD_S, timeout_s / 2))
    try:
        for call in calls:
            leases.take(call)
        yield leases
        known = leases.give_back()
    except BaseException:
        leases.abandon()
        raise
    _check_known(known)


class Leases:
    """The leases of one update; `leased` makes one.

    Args:
        holder: names the update.
        hold_s: seconds that a server holds one call.
    """

    def __init__(self, holder: str, hold_s: float) -> None:
        self._holder, self._hold_s = holder, hold_s
        self._taken: list[ControlCall] = []
        self._version = ""
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def take(self, call: ControlCall) -> None:
        """Take the lease of one server when no other trainer has it, and tell the server that this process lives.

        Raises:
            EngineError: the server cannot be reached, or another trainer had the lease until the call timed out.
        """
        answer = call("get_weights_by_name", {"name": LeaseCall("take", self._holder).pack()})
        if not answer.get("leased"):  # the server runs several processes, and cannot tell
            return
        self._taken.append(call)
        # A daemon: where the interpreter ends, so does the update.
        thread = threading.Thread(target=self._hold, args=(call,), name="sglang-lease", daemon=True)
        thread.start()
        self._threads.append(thread)

    def name(self, version: str) -> None:
        """Tell the servers how the new weights are called.

        Args:
            version: their name.

        Raises:
            EngineError: a server cannot be reached, or has given this update up.
        """
        self._version = version
        for call in self._taken:
            # The call that is held now says nothing of it until its end.
            _check_known(self._hold_once(call, 0.0))

    def _hold(self, call: ControlCall) -> None:
        while not self._over.is_set():
            try:
                if not self._hold_once(call, self._hold_s):
                    return
            except EngineError:
                # The update itself says what is wrong with the server. A connection that was cut is made anew.
                self._over.wait(_RETRY_S)

    def _hold_once(self, call: ControlCall, hold_s: float) -> bool:
        name = LeaseCall("hold", self._holder, self._version, hold_s).pack()
        return bool(call("get_weights_by_name", {"name": name}).get("leased"))

    def give_back(self) -> bool:
        """End the leases, and return whether the servers still knew them.

        Raises:
            EngineError: a server cannot be reached. `abandon` gives the leases of the others back.
        """
        self._over.set()
        known = True
        while self._taken:
            known = self._give_one_back(self._taken.pop(0)) and known
        limit = time.monotonic() + self._hold_s
        for thread in self._threads:
            thread.join(max(0.0, limit - time.monotonic()))
        return known

    def abandon(self) -> None:
        """End the leases of an update that failed, each by itself: some of the servers may be gone."""
        self._over.set()
        taken, self._taken = self._taken, []
        threads = [threading.Thread(target=self._try_give_back, args=(call,), daemon=True) for call in taken]
        for thread in threads:
            thread.start()
        limit = time.monotonic() + _ABANDON_S
        for thread in threads:
            thread.join(max(0.0, limit - time.monotonic()))

    def _try_give_back(self, call: ControlCall) -> None:
        with suppress(EngineError):
            self._give_one_back(call)

    def _give_one_back(self, call: ControlCall) -> bool:
        return bool(call("get_weights_by_name", {"name": LeaseCall("give_back", self._holder).pack()}).get("leased"))


def _check_known(known: bool) -> None:
    if not known:
        raise EngineError(
            f"the server did not hear of this process for {LOST_S:g} s, ended the update and let requests go on; "
            "update again, and see that this process is not stopped meanwhile"
        )
