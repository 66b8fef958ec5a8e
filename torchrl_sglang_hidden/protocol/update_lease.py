"""The lease under which a trainer changes a server's weights: while it is held, the trainer is known to live.

A trainer that is killed in the middle of an update cannot let the server's requests go on. So it holds a request open
for the length of the update, and the server half ends the update itself when nobody holds it any more.

Used on both sides. Knows nothing of SGLang, nor of what an update does.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["GRACE_S", "GROUP_PREFIX", "HOLD_S", "LOST_S", "LeaseCall", "LeaseStep"]

# Begins the name of a weight that no model has, as `served_weights.DRAIN` is one.
_PREFIX = "torchrl_sglang_hidden:lease:"
# Begins the name of the process group of one update over the network.
GROUP_PREFIX = "torchrl-sglang-hidden-"
# Longest time that the server holds one request; the trainer then sends the next.
HOLD_S = 10.0
# A trainer of which nothing is heard for so long is taken for dead: it is frozen, or cut off. Its next request may be
# late where all its processors work.
LOST_S = 30.0
# So long a trainer whose connection has ended may take to come back on another.
GRACE_S = 1.0

LeaseStep = Literal["take", "hold", "give_back"]


@dataclass(frozen=True, slots=True)
class LeaseCall:
    """One call about a lease.

    Args:
        step: ``"take"`` waits until no other trainer has the lease, ``"hold"`` says that the trainer lives and is
            answered after ``hold_s``, ``"give_back"`` ends the lease.
        holder: names the update. Two takes of one holder are one lease, given back twice: a server may have two
            addresses.
        version: of the new weights; empty until it is chosen.
        hold_s: seconds until the answer to a ``"hold"``.
    """

    step: LeaseStep
    holder: str
    version: str = ""
    hold_s: float = HOLD_S

    def pack(self) -> str:
        """Write the call as the name of a weight."""
        return _PREFIX + json.dumps(asdict(self))

    @classmethod
    def unpack(cls, name: object) -> LeaseCall | None:
        """Read what `pack` wrote; None for the name of anything else, or for one that cannot be read."""
        if not isinstance(name, str) or not name.startswith(_PREFIX):
            return None
        try:
            fields = json.loads(name.removeprefix(_PREFIX))
            step, holder, version, hold_s = (fields[one] for one in ("step", "holder", "version", "hold_s"))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if step not in ("take", "hold", "give_back") or not isinstance(holder, str) or not isinstance(version, str):
            return None
        if type(hold_s) not in (int, float) or math.isnan(hold_s):
            return None
        return cls(step, holder, version, min(max(hold_s, 0.0), LOST_S / 2))
