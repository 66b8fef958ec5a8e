"""Requests of every kind, 128 of them running at a time, as many users have in flight.

Some of the clients are struck in the middle of their calls, which the others do not notice.

The storm of test_qwen3_untied.py is smaller, and its server takes requests back; here the prompts come in chunks beside
all the rows that decode.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator

import httpx
import pytest
from helpers.policy_checks import CHUNKED_PREFILL_SIZE
from helpers.request_storm import resident_bytes, storm

from torchrl_sglang_hidden import launch
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.shared_memory import DIRECTORY
from torchrl_sglang_hidden.server.prefix_sums import MAX_BYTES

# The cache is nearly full when 128 are running, and SGLang takes in more where it can.
RUNNING, ADMITTED, CACHE_TOKENS = 128, 176, 5120
# A mixed step has room for all decoding rows and for a part of a prompt.
CHUNK = ADMITTED + CHUNKED_PREFILL_SIZE
CROWD = {"calls": 40, "most_rows": 24, "callers": 20}
NOISE_BYTES = 192 * 2**20
# Calls of each kind of `request_storm.STRIKES` that are struck in the middle of the second storm; 0 switches them off.
FAULTS = int(os.environ.get("TORCHRL_SGLANG_HIDDEN_STORM_FAULTS", "2"))
# SGLang looks every few seconds whether somebody still waits for a request.
IDLE_S = 30.0


@pytest.fixture(scope="module")
def crowded(qwen3_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    """The random Qwen3 on a server that runs many requests at a time."""
    with launch(
        qwen3_dir,
        dtype="float32",
        chunked_prefill_size=CHUNK,
        enable_mixed_chunk=True,
        max_total_tokens=CACHE_TOKENS,
        max_running_requests=ADMITTED,
        schedule_conservativeness=0.01,
        decode_log_interval=1,
        sleep_on_idle=True,
        log_file=tmp_path_factory.mktemp("crowded") / "server.log",
    ) as server:
        yield server


@pytest.fixture
def http(crowded: LaunchedServer) -> Iterator[httpx.Client]:
    """SGLang's own interface, without this package's client."""
    with httpx.Client(base_url=crowded.url, timeout=300, trust_env=False) as client:
        yield client


def test_every_answer_of_a_crowd_is_right(crowded: LaunchedServer, http: httpx.Client, qwen3_dir: str) -> None:
    assert storm(crowded, http, qwen3_dir, seed=0, **CROWD) > 300
    most = max(map(int, re.findall(r"#running-req: (\d+)", crowded.log_path.read_text())))
    assert most >= RUNNING, "the storm was no crowd"
    before_bytes = resident_bytes(crowded)
    assert storm(crowded, http, qwen3_dir, seed=1, faults=FAULTS, **CROWD) > 300
    limit = time.monotonic() + IDLE_S
    while http.get("/server_info").json()["internal_states"][0][CHANNEL]["open_pools"] and time.monotonic() < limit:
        pass
    # The second storm brings nothing that stays: the first one made what is kept.
    assert resident_bytes(crowded) - before_bytes < NOISE_BYTES
    after = http.get("/server_info").json()["internal_states"][0][CHANNEL]
    assert after["open_pools"] == 0
    assert 0 < after["prefix_bytes"] <= MAX_BYTES
    token = str(after["shared"]).removesuffix("-here")
    assert [path.name for path in DIRECTORY.glob(f"{token}-*")] == [after["shared"]]
