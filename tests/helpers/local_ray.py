"""A Ray on this machine that nothing outside can reach, and of which nothing is left in the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest
import ray

from helpers.process_watch import still_running, watched

# Without clusters Ray's node is 127.0.0.1, and its processes listen there alone. With them it takes 127.0.0.1 for a
# mistake, and at any other address, 127.0.0.2 too, they listen on every address of the machine.
CLUSTERS_ENV = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
EXIT_TIMEOUT_S = 30.0


@contextmanager
def ray_of_two_cores() -> Iterator[set[int]]:
    """Run Ray, and yield the ids of its processes."""
    # One for all of this process, which stays: not Ray's, though a test beside it may be the first to need it.
    resource_tracker.ensure_running()
    before = children()
    # A short path: Ray's sockets lie in it, and a socket's path has at most 107 bytes.
    directory = tempfile.mkdtemp(prefix="ray-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CLUSTERS_ENV, "0")
        # Ray has read the variable when it was imported, which another test may have done.
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        # Ray ends its workers when the machine's memory runs low, whoever uses it.
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        try:
            ray.init(
                num_cpus=2, num_gpus=0, object_store_memory=80 * 1024**2, include_dashboard=False,
                _temp_dir=directory, log_to_driver=False, configure_logging=False,
            )  # fmt: skip
            yield children() - before
        finally:
            started = children() - before
            with watched(started) as handles:
                ray.shutdown()
                left = [" ".join(psutil.Process(pid).cmdline()) for pid in still_running(handles, EXIT_TIMEOUT_S)]
            shutil.rmtree(directory, ignore_errors=True)
    assert started
    assert left == []


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def reachable_from_outside(pids: set[int]) -> list[tuple[str, int]]:
    """Return what processes, and those that they started, listen on beside loopback: addresses and ports."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    processes += [child for one in list(processes) for child in one.children(recursive=True)]
    listening = [
        one.laddr
        for process in set(processes)
        for one in process.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    ]
    assert listening
    # "::ffff:127.0.0.2" is loopback, written as IPv6.
    hosts = [(ip_address(str(address.ip).removeprefix("::ffff:")), address.port) for address in listening]
    return [(str(host), port) for host, port in hosts if not host.is_loopback]
