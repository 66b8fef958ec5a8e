"""Links that are slow, stall or are cut: an error of this package in time, or the right answer."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from helpers.bad_link import BadLink, bad_link
from helpers.fake_engine import RecordingServer, response_of
from helpers.sample_requests import request

from torchrl_sglang_hidden import EngineTimeoutError, EngineUnreachableError, SGLangServer

READ_TIMEOUT_S = 1.0


@pytest.fixture
def link() -> Iterator[BadLink]:
    server = RecordingServer()
    server.handle_error = lambda *of_cut: None  # type: ignore[method-assign]
    try:
        with bad_link(server.server_address[1]) as link:
            yield link
    finally:
        server.stop()


@pytest.fixture
def client(link: BadLink) -> Iterator[SGLangServer]:
    with SGLangServer(link.url, read_timeout_s=READ_TIMEOUT_S) as client:
        yield client


def assert_right(client: SGLangServer) -> None:
    one = request()
    (found,) = client.generate([one])
    assert list(found.response_ids) == list(response_of(one.prompt_ids))


def test_a_slow_link_brings_everything(link: BadLink, client: SGLangServer) -> None:
    link.bytes_per_s = 20_000
    assert_right(client)


@pytest.mark.parametrize("cut_after", [1, 100, 300])
def test_an_answer_that_is_cut(link: BadLink, client: SGLangServer, cut_after: int) -> None:
    link.cut_after = cut_after
    with pytest.raises(EngineUnreachableError, match="went away while answering"):
        client.generate([request()])
    link.cut_after = None
    assert_right(client)


def test_a_link_that_stalls(link: BadLink, client: SGLangServer) -> None:
    link.bytes_per_s = 0
    start = time.monotonic()
    with pytest.raises(EngineTimeoutError, match="raise read_timeout_s"):
        client.generate([request()])
    assert time.monotonic() - start < READ_TIMEOUT_S + 5
    link.bytes_per_s = None
    assert_right(client)
