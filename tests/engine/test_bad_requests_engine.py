"""Bad requests of every kind, sent straight to the port of a server: each is refused, and the server is as before.

On a server without the guard, 1 of these in 10 ends the whole server.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import psutil
import pytest
import torch
from helpers.bad_requests import BAD, Bad, to_bytes
from helpers.bad_routes import BAD_ROUTES
from helpers.policy_checks import prompt_of

from torchrl_sglang_hidden import HiddenSpec, SGLangServer
from torchrl_sglang_hidden.records import Completion, Request

ALL = {**BAD, **BAD_ROUTES}
GOOD = Request(
    tuple(prompt_of(9, 1600)), {"max_new_tokens": 6, "temperature": 0.0}, hidden=HiddenSpec(segments=("response",))
)


@pytest.fixture(scope="module")
def client(smol: SGLangServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=smol.url, timeout=60, trust_env=False) as client:
        yield client


def processes_of(server: SGLangServer) -> set[int]:
    """Return the processes of a server: its HTTP server's, its scheduler's and its detokenizer's."""
    port = httpx.URL(server.url).port
    (main,) = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    return {main, *(child.pid for child in psutil.Process(main).children(recursive=True))}


@pytest.fixture(scope="module")
def before(smol: SGLangServer) -> tuple[set[int], Completion]:
    """Return the server's processes and its answer to a good request, before any bad one."""
    return processes_of(smol), smol.generate([GOOD])[0]


def send(client: httpx.Client, bad: Bad) -> httpx.Response:
    return client.post(bad.path, content=to_bytes(bad.body), headers={"content-type": "application/json"})


def is_refused(answer: httpx.Response) -> bool:
    # SGLang begins a stream before it looks at the request.
    in_stream = answer.status_code == 200 and answer.text.startswith('data: {"error"') and '"code":400' in answer.text
    return 400 <= answer.status_code < 500 or in_stream


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.usefixtures("before")
def test_a_bad_request(client: httpx.Client, kind: str) -> None:
    bad = ALL[kind]
    answer = send(client, bad)
    if bad.words is None:
        assert answer.status_code == 200, answer.text[:500]
        assert '"abort"' not in answer.text
        return
    assert is_refused(answer), (answer.status_code, answer.text[:500])
    assert bad.words in answer.text.replace('\\"', '"').replace("\\\\", "\\"), answer.text[:800]


def test_the_server_is_as_before(smol: SGLangServer, before: tuple[set[int], Completion]) -> None:
    """Behind all the others: the same processes, and the same tokens and states."""
    processes, expected = before
    assert processes <= processes_of(smol)
    (found,) = smol.generate([GOOD])
    assert found.response_ids == expected.response_ids
    states, expected_states = found.hidden["response"], expected.hidden["response"]
    assert states.count == expected_states.count == 6
    torch.testing.assert_close(states.vector, expected_states.vector, rtol=1e-5, atol=1e-6)
