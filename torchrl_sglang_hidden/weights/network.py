"""Weights to a server that shares no file system: SGLang's own update group, gloo over TCP, this process as rank 0.

The server connects to this process, not the other way round, and the server's scheduler waits while it connects. Which
server gets weights this way is decided in `transports`.
"""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from torchrl_sglang_hidden.errors import CapabilityError, EngineError
from torchrl_sglang_hidden.weights.control import ControlCall, finish_update, running_requests, succeeded
from torchrl_sglang_hidden.weights.validation import Running

__all__ = ["NetworkPath", "broadcast", "own_address"]

# Untyped, and in part private: what SGLang uses on its side too.
dist: Any = torch.distributed
c10d: Any = torch.distributed.distributed_c10d

# torch registers process groups in a table of the process.
_GROUPS = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPath:
    """The way to a server over the network.

    Args:
        host: the server's host name or address.
        port: the server's TCP port.
        server_info: asks the server for SGLang's ``/server_info``.
        timeout_s: seconds for the update group to form, and for each tensor.
    """

    host: str
    port: int
    server_info: Callable[[], Mapping[str, Any]]
    timeout_s: float


def own_address(host: str, port: int) -> str:
    """Return the address of this machine from which packets to ``host`` leave."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # UDP: asks the routing table, sends nothing
        return str(probe.getsockname()[0])


def broadcast(
    call: ControlCall, tensors: Mapping[str, torch.Tensor], version: str, *, path: NetworkPath, running: Running
) -> None:
    """Send checked weights to one server.

    All tensors go in one call: the server loads them only when it has received every one, and needs memory for a second
    copy of the model until then.

    Args:
        call: calls one of the server's control routes.
        tensors: the weights, by Hugging Face's checkpoint names.
        version: the name of the new weights.
        path: the way to the server.
        running: what becomes of requests under way; see `Engine.update_weights`.

    Raises:
        CapabilityError: the server has data- or pipeline-parallel replicas, which SGLang's update group does not serve.
        EngineError: the server refused the weights or did not connect, and keeps its own.
    """
    server_info, address = path.server_info(), own_address(path.host, path.port)
    for name in ("dp_size", "pp_size"):
        if server_info.get(name, 1) > 1:
            raise CapabilityError(
                f"the server runs with {name}={server_info[name]}, and SGLang's weight update over the network is for "
                "1; use transport='disk' with a directory that both machines see"
            )
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    payload = {
        "names": list(values),
        "dtypes": [str(value.dtype).removeprefix("torch.") for value in values.values()],
        "shapes": [list(value.shape) for value in values.values()],
        "weight_version": version,
    }
    with (
        ThreadPoolExecutor(2, thread_name_prefix="sglang-weights") as pool,
        _group(call, pool, address, 1 + int(server_info.get("tp_size", 1)), path.timeout_s) as (group, group_name),
        running_requests(running, call),
        _session(call),
    ):
        update = pool.submit(call, "update_weights_from_distributed", {**payload, "group_name": group_name})
        sending = pool.submit(_send, group, values)
        done: list[Future[Any]] = [update, sending]
        wait(done, return_when=FIRST_COMPLETED)
        if update.done() and (update.exception() is not None or not update.result().get("success")):
            # The server gave up before it had every tensor: ending its side of the group ends the sending here.
            call("destroy_weights_update_group", {"group_name": group_name})
            wait([sending])
            error = update.exception()
            if error is not None:
                raise error
        else:
            _raise_lost(sending.exception())
        answer = update.result()
    finish_update(call, answer, version, "take the weights over the network")


def _raise_lost(error: BaseException | None) -> None:
    if error is not None:
        raise EngineError(
            f"the connection for the weights was lost ({error}); the server keeps its weights: update again"
        ) from error


def _send(group: Any, values: Mapping[str, torch.Tensor]) -> None:
    for value in values.values():
        group.broadcast(value, 0).wait()


@contextmanager
def _session(call: ControlCall) -> Iterator[None]:
    """Begin and end a weight update: SGLang takes weights over the network only in between."""
    answer = call("begin_weight_update", {})
    if not answer.get("success"):
        raise EngineError(
            f"SGLang refused to begin a weight update: {answer.get('message')}; if no other trainer is updating this "
            "server, one died while it did: call POST /end_weight_update once"
        )
    try:
        yield
    finally:
        succeeded(call("end_weight_update", {}), "end a weight update")


@contextmanager
def _group(
    call: ControlCall, pool: ThreadPoolExecutor, address: str, size: int, timeout_s: float
) -> Iterator[tuple[Any, str]]:
    """Form a process group of this process and the server's ranks, under a name of its own.

    Yields:
        The group, and its name.

    Raises:
        EngineError: the server did not connect in time.
    """
    name, timeout = f"torchrl-sglang-hidden-{uuid.uuid4().hex}", timedelta(seconds=timeout_s)
    # A listener of our own: torch's would be open on every interface, to whoever comes.
    listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
    )
    join = pool.submit(
        call,
        "init_weights_update_group",
        {
            "master_address": address, "master_port": port, "rank_offset": 1, "world_size": size, "group_name": name,
            "backend": "gloo",
        },
    )  # fmt: skip
    try:
        with _GROUPS:
            group = _join(dist.PrefixStore(name, store), name, size, timeout)
    except RuntimeError as error:
        if join.done():
            succeeded(join.result(), "join the update group")
        raise EngineError(
            f"the server did not connect to {address}:{port} within {timeout_s:g} s ({error}); can it reach this "
            "machine? Else use transport='disk' with a directory that both see"
        ) from error
    try:
        succeeded(join.result(), "join the update group")
        yield group, name
    finally:
        try:
            call("destroy_weights_update_group", {"group_name": name})
        finally:
            with _GROUPS:
                dist.destroy_process_group(group)


def _join(store: Any, name: str, size: int, timeout: timedelta) -> Any:
    """Join a process group as rank 0.

    Does what ``sglang.srt.utils.init_custom_process_group`` does on the server's side: both must use the same keys.
    """
    group, _ = c10d._new_process_group_helper(
        size, 0, [], c10d.Backend("gloo"), store, group_name=name, backend_options=None, timeout=timeout
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group
