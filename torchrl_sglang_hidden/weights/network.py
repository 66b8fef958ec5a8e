"""Weights to a server that shares no file system: SGLang's own update group, this process as rank 0.

The group talks gloo over TCP, or NCCL between GPUs. The server connects to this process, not the other way round, and
the server's scheduler waits while it connects. Which server gets weights this way is decided in `transports`.
"""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed

from torchrl_sglang_hidden.errors import CapabilityError, EngineError
from torchrl_sglang_hidden.protocol.served_weights import INCOMPLETE, NOT_FLUSHED
from torchrl_sglang_hidden.protocol.update_lease import GROUP_PREFIX
from torchrl_sglang_hidden.weights.control import (
    ControlCall,
    drained,
    finish_update,
    running_requests,
    succeeded,
)
from torchrl_sglang_hidden.weights.trainers import split
from torchrl_sglang_hidden.weights.validation import BUCKET_BYTES, Running

__all__ = ["Backend", "NetworkPath", "broadcast", "check_nccl", "own_address"]

Backend = Literal["gloo", "nccl"]
TAKE = "take the weights over the network"

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


def check_nccl(path: NetworkPath) -> None:
    """Check that NCCL can reach the server: both sides need a GPU.

    Raises:
        CapabilityError: one of them has none.
    """
    device = path.server_info().get("device")
    if device != "cuda":
        raise CapabilityError(f"transport='nccl': the server runs on {device!r}, without NCCL; use transport='network'")
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise CapabilityError("transport='nccl': this process has no CUDA device; use transport='network'")


def broadcast(
    call: ControlCall,
    tensors: Mapping[str, torch.Tensor],
    version: str,
    *,
    path: NetworkPath,
    running: Running,
    backend: Backend = "gloo",
    bucket_bytes: int = BUCKET_BYTES,
    drains: bool = False,
) -> None:
    """Send checked weights to one server, in buckets.

    The server loads a bucket when it has received it, and needs memory for one more bucket than for the model. It
    computes nothing between two buckets. Weights that fit into one bucket change all or not at all.

    Args:
        call: calls one of the server's control routes.
        tensors: the weights, by Hugging Face's checkpoint names.
        version: the name of the new weights.
        path: the way to the server.
        running: what becomes of requests under way; see `Engine.update_weights`.
        backend: ``"gloo"`` sends from main memory, ``"nccl"`` from this process's current CUDA device, which must not
            be the server's.
        bucket_bytes: most bytes of a bucket, one tensor more at most.
        drains: whether the server can hold new requests back until those under way have ended.

    Raises:
        CapabilityError: the server has data- or pipeline-parallel replicas, which SGLang's update group does not serve;
            or it cannot let requests end before an update of several buckets.
        EngineError: the server refused the weights or did not connect. It keeps its own, unless the message says that
            it has a part of the new ones.
    """
    server_info, address = path.server_info(), own_address(path.host, path.port)
    for name in ("dp_size", "pp_size"):
        if server_info.get(name, 1) > 1:
            raise CapabilityError(
                f"the server runs with {name}={server_info[name]}, and SGLang's weight update over the network is for "
                "1; use transport='disk' with a directory that both machines see"
            )
    buckets = split(tensors, bucket_bytes)
    held: AbstractContextManager[bool | None] = running_requests(running, call)
    if len(buckets) > 1 and running == "finish":
        if not drains:
            raise CapabilityError(
                f"the weights are {len(buckets)} buckets of {bucket_bytes} bytes, and a server without the "
                "torchrl_sglang_hidden server half cannot let requests end before the first; use running='continue', "
                "or a larger bucket_bytes"
            )
        held = drained(call)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", torch.cuda.current_device())
    size = 1 + int(server_info.get("tp_size", 1))
    with (
        ThreadPoolExecutor(2, thread_name_prefix="sglang-weights") as pool,
        _group(call, pool, address, size, path.timeout_s, backend) as (group, group_name),
        held as was_paused,
        _session(call),
    ):
        for index, names in enumerate(buckets):
            last = index == len(buckets) - 1
            options = {"flush_cache": last, "weight_version": version if last else None, "group_name": group_name}
            begun = index > 0
            try:
                values = {name: tensors[name].detach().to(device).contiguous() for name in names}
                begun = len(buckets) > 1
                answer = _send_bucket(call, pool, group, values, options)
                if not str(answer.get("message")).startswith(NOT_FLUSHED):  # below, when requests may go on
                    succeeded(answer, TAKE)
            except EngineError as error:
                if index:
                    _name_mixture(call, version)
                    raise EngineError(
                        f"bucket {index + 1} of {len(buckets)} did not reach the server ({error}), which has the "
                        f"weights of those before, and calls them {version}{INCOMPLETE}; update again before you "
                        "generate"
                    ) from error
                raise
            except BaseException:  # Ctrl-C, or a weight that the trainer could not compute
                if begun:
                    _name_mixture(call, version)
                raise
    finish_update(call, answer, version, TAKE, stays_paused=bool(was_paused))


def _send_bucket(
    call: ControlCall,
    pool: ThreadPoolExecutor,
    group: Any,
    values: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    payload = {
        "names": list(values),
        "dtypes": [str(value.dtype).removeprefix("torch.") for value in values.values()],
        "shapes": [list(value.shape) for value in values.values()],
        **options,
    }
    update = pool.submit(call, "update_weights_from_distributed", payload)
    sending = pool.submit(_send, group, values)
    done: list[Future[Any]] = [update, sending]
    wait(done, return_when=FIRST_COMPLETED)
    if update.done() and (update.exception() is not None or not update.result().get("success")):
        # The server gave up before it had every tensor: ending its side of the group ends the sending here.
        call("destroy_weights_update_group", {"group_name": options["group_name"]})
        if any(value.is_cuda for value in values.values()):
            group.abort()  # NCCL notices nothing of the other side's end
        wait([sending])
        error = update.exception()
        if error is not None:
            raise error
    else:
        _raise_lost(sending.exception())
    return update.result()


def _name_mixture(call: ControlCall, version: str) -> None:
    """Give the mixture of old and new weights a name of its own, so that no sample of it passes for either."""
    with suppress(EngineError):  # the server may be gone, and the caller raises anyway
        call("flush_cache", {})
        call("update_weight_version", {"new_version": f"{version}{INCOMPLETE}", "abort_all_requests": False})


def _raise_lost(error: BaseException | None) -> None:
    if error is not None:
        raise EngineError(f"the connection for the weights was lost ({error}); update again") from error


def _send(group: Any, values: Mapping[str, torch.Tensor]) -> None:
    for value in values.values():
        group.broadcast(value, 0).wait()
    if any(value.is_cuda for value in values.values()):
        torch.cuda.synchronize()  # for NCCL `wait` only orders the stream


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
    call: ControlCall, pool: ThreadPoolExecutor, address: str, size: int, timeout_s: float, backend: Backend
) -> Iterator[tuple[Any, str]]:
    """Form a process group of this process and the server's ranks, under a name of its own.

    Yields:
        The group, and its name.

    Raises:
        EngineError: the server did not connect in time.
    """
    name, timeout = f"{GROUP_PREFIX}{uuid.uuid4().hex}", timedelta(seconds=timeout_s)
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
            "backend": backend,
        },
    )  # fmt: skip
    try:
        with _GROUPS:
            group = _join(dist.PrefixStore(name, store), name, size, timeout, backend)
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


def _join(store: Any, name: str, size: int, timeout: timedelta, backend: Backend) -> Any:
    """Join a process group as rank 0.

    Does what ``sglang.srt.utils.init_custom_process_group`` does on the server's side: both must use the same keys.
    """
    group, _ = c10d._new_process_group_helper(
        size, 0, [], c10d.Backend(backend), store, group_name=name, backend_options=None, timeout=timeout
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group
