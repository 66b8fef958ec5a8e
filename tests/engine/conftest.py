"""Fixtures of the engine tests alone."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from checks import CHUNKED_PREFILL_SIZE
from trainee import restore

from torchrl_sglang_hidden import SGLangServer, connect, launch

# A running server for the `trainee` fixture, started with the arguments below, whose weights tests may change.
TRAINEE_URL_ENV = "TORCHRL_SGLANG_HIDDEN_TRAINEE_URL"


@pytest.fixture(scope="session")
def trainee_server(smol_dir: str) -> Iterator[SGLangServer]:
    url = os.environ.get(TRAINEE_URL_ENV)
    if url is not None:
        with connect(url) as engine:
            yield engine
        return
    # A small KV cache: this server stands beside the session's other one, and beside the models of the tests.
    with launch(
        smol_dir,
        dtype="float32",
        chunked_prefill_size=CHUNKED_PREFILL_SIZE,
        context_length=2048,
        max_total_tokens=4096,
        sleep_on_idle=True,
    ) as engine:
        yield engine


@pytest.fixture
def trainee(trainee_server: SGLangServer) -> Iterator[SGLangServer]:
    """A real server of the demo model, float32, whose weights a test may change; it gets its own back afterwards."""
    before = trainee_server.info.weight_version
    yield trainee_server
    if trainee_server.info.weight_version != before:
        restore(trainee_server)
