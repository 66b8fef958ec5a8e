"""Pushes small heads to running engines, drops them, and keeps them for servers that come back without.

Knows the control route that the server half listens at, and not how it is called: the engines pass that in. A head's
file travels in the call itself, to a server on any machine.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torchrl_sglang_hidden.errors import (
    CapabilityError,
    EngineError,
    EngineTimeoutError,
    InputTypeError,
    RequestRejectedError,
    WeightsError,
)
from torchrl_sglang_hidden.protocol.head_call import HeadCall
from torchrl_sglang_hidden.records import EngineInfo
from torchrl_sglang_hidden.spec.heads import Head, check_head_name
from torchrl_sglang_hidden.spec.hidden import canonical_layer
from torchrl_sglang_hidden.weights.control import ControlCall, succeeded

__all__ = ["HeadServer", "HeadSource", "KeptHeads", "PushedHeads"]

HeadSource = str | os.PathLike[str] | Head


@dataclass(frozen=True, slots=True)
class HeadServer:
    """One server that takes heads.

    Args:
        name: its address.
        info: returns its description at this moment.
        call: calls its control routes.
    """

    name: str
    info: Callable[[], EngineInfo]
    call: ControlCall


class KeptHeads:
    """Keeps the heads that a client pushed and did not drop, for a server that comes back without them.

    Attributes:
        calls: the calls that pushed them, see `HeadCall.pack`, by the heads' names.
        lock: held while servers take a head or lose one, so that who comes back meanwhile misses nothing.
    """

    def __init__(self) -> None:
        self.calls: dict[str, str] = {}
        self.lock = threading.Lock()

    def keep(self, name: str, packed: str | None) -> None:
        """Keep the call that pushed a head in the place of an earlier one; None for a head that was dropped."""
        self.calls.pop(name, None)
        if packed is not None:
            self.calls[name] = packed

    def push_again(self, call: ControlCall) -> None:
        """Give a server that came back all that is kept.

        Raises:
            EngineError: the server refused one, or failed.
        """
        with self.lock:
            for name, packed in self.calls.items():
                _send(call, packed, f"take head {name!r} again")


class PushedHeads:
    """Gives all servers of a client the same heads.

    Args:
        servers: the servers.

    Attributes:
        kept: what the servers have of this client; empty where there is one server alone.
    """

    def __init__(self, servers: Sequence[HeadServer]) -> None:
        self._servers = tuple(servers)
        self.kept = KeptHeads()

    def push(self, name: str, source: HeadSource, version: str | None) -> str:
        """Push a head to every server, or to none; see `Engine.push_head`."""
        check_head_name(name)
        if version is not None and not (isinstance(version, str) and version.strip()):
            raise InputTypeError(f"version={version!r:.80}: expected a name such as '2', or None")
        self._check_server_half()
        if isinstance(source, Head):
            head = source
        elif isinstance(source, (str, os.PathLike)):
            head = Head.load(source)
        else:
            raise InputTypeError(f"head={source!r:.80}: expected a Head, or the path of a file that Head.save wrote")
        for server in self._servers:
            head = _fitted(name, head, server)
        data = head.to_bytes()
        version = hashlib.sha256(data).hexdigest()[:12] if version is None else version
        with self.kept.lock:
            self._push_everywhere(HeadCall(name, version, data))
        return version

    def drop(self, name: str) -> None:
        """Drop a head from every server that has it; see `Engine.drop_head`.

        One that does not, such as one that was started again, keeps none of the others from it.
        """
        self._check_server_half()
        packed, refused = HeadCall(check_head_name(name)).pack(), list[tuple[str, EngineError]]()
        with self.kept.lock:
            for server in self._servers:
                try:
                    _send(server.call, packed, f"drop head {name!r}")
                except EngineError as error:
                    refused.append((server.name, error))
            self.kept.keep(name, None)
        if refused and len(self._servers) == 1:
            raise refused[0][1]
        if refused:
            said = "; ".join(f"{url} did not drop head {name!r}: {error}" for url, error in refused)
            raise type(refused[0][1])(f"{said}; every other server has dropped it") from refused[0][1]

    def push_again(self, name: str) -> None:
        """Give the server of this name, which came back, the heads that the others have of this client.

        Raises:
            EngineError: it does not take them.
        """
        (server,) = [server for server in self._servers if server.name == name]
        if self.kept.calls:
            _check_server_half(server)
        self.kept.push_again(server.call)

    def _check_server_half(self) -> None:
        for server in self._servers:
            _check_server_half(server)

    def _push_everywhere(self, call: HeadCall) -> None:
        packed, took = call.pack(), list[HeadServer]()
        for server in self._servers:
            try:
                _send(server.call, packed, f"take head {call.name!r}")
            except BaseException as error:
                if len(self._servers) == 1:
                    raise
                said = self._put_back(call, took, server, error)
                if isinstance(error, EngineError):
                    raise type(error)(said) from error
                error.add_note(said)  # Ctrl-C
                raise
            took.append(server)
        if len(self._servers) > 1:
            self.kept.keep(call.name, packed)

    def _put_back(self, call: HeadCall, took: Sequence[HeadServer], failed: HeadServer, error: BaseException) -> str:
        """Put servers back to what they had before a push that one of them failed, and return what to say of it."""
        apart = {server.name: self._restore(server, call) for server in took}
        if isinstance(error, EngineTimeoutError) or not isinstance(error, EngineError):
            # Who hangs would hold up this call as well, and hanging is what a Ctrl-C ends.
            apart[failed.name] = f"version {call.version!r} or what it had"
        elif not isinstance(error, RequestRejectedError):  # it may have taken the head before it failed
            apart[failed.name] = self._restore(failed, call)
        before = self.kept.calls.get(call.name)
        had = "no head of that name" if before is None else f"version {HeadCall.unpack(before).version!r}"
        why = str(error) or type(error).__name__
        said = f"{failed.name} did not take head {call.name!r} of version {call.version!r}: {why}"
        if any(apart.values()):
            now = "; ".join(f"{server.name} has {apart.get(server.name) or had}" for server in self._servers)
            return f"{said}. Not all servers could be put back: {now}; push it again, or drop it"
        return f"{said}. The servers have what they had of this client, {had}; push it again when all of them take it"

    def _restore(self, server: HeadServer, call: HeadCall) -> str:
        """Give a server what it had before a call; return what it has instead, "" where that succeeded."""
        before = self.kept.calls.get(call.name)
        try:
            _send(server.call, before or HeadCall(call.name).pack(), f"go back from head {call.name!r}")
        except RequestRejectedError as error:
            # Without one before: there is no head to drop.
            return "" if before is None else f"version {call.version!r} ({error})"
        except EngineError as error:
            return f"version {call.version!r} or what it had ({error})"
        return ""


def _fitted(name: str, head: Head, server: HeadServer) -> Head:
    """Return a head whose layer is canonical, if the server can serve it."""
    info = server.info()
    if head.width != info.hidden_size:
        raise WeightsError(
            f"head {name!r} reads states of {head.width} numbers, and the model's have {info.hidden_size}; train it "
            "on this model's states"
        )
    layer = canonical_layer(head.layer, info.num_layers)
    if layer not in info.layers:
        raise CapabilityError(
            f"head {name!r} reads layer {head.layer}, and {server.name} gives the states of {list(info.layers)}; start "
            f"it for that layer, as with launch(layers=({layer},)), or use another"
        )
    return head if layer == head.layer else replace(head, layer=layer)


def _check_server_half(server: HeadServer) -> None:
    info = server.info()
    if not info.pools_in_server:
        because = f" ({info.no_states_because})" if info.no_states_because else ""
        raise CapabilityError(
            f"heads run in the server half, which {server.name} does not have{because}; start it with "
            "torchrl_sglang_hidden.launch or `torchrl-sglang-hidden serve`"
        )


def _send(call: ControlCall, packed: str, what: str) -> None:
    succeeded(call("get_weights_by_name", {"name": packed}), what)
