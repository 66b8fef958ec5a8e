"""Bad requests of every kind, sent straight to the port of a server: each is refused, and the server is as before.

On a server without the guard, 1 of these in 10 ends the whole server.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
import torch
from helpers.bad_fields import BAD_FIELDS
from helpers.bad_requests import BAD, VOCAB, Bad, to_bytes
from helpers.bad_routes import BAD_ROUTES
from helpers.policy_checks import prompt_of

from torchrl_sglang_hidden import HiddenSpec, SGLangOffline, SGLangServer
from torchrl_sglang_hidden.records import Completion, Request

ALL = {**BAD, **BAD_FIELDS, **BAD_ROUTES}
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


IN_PROCESS: dict[str, tuple[dict[str, Any], str]] = {
    "the vocabulary's size": ({"input_ids": [[5], [6, VOCAB]]}, "row 1: token id 49152 at position 1"),
    "a negative id": ({"input_ids": [-1]}, "row 0: token id -1"),
    "2**70": ({"input_ids": [2**70]}, "row 0: token id 1180591620717411303424"),
    "a bool": ({"input_ids": [5, True]}, "row 0: token id True is a bool"),
    "a float": ({"input_ids": [5, 1.5]}, r"row 0: token id 1\.5 is a float"),
    "no ids": ({"input_ids": []}, "0 tokens"),
    "an empty row": ({"input_ids": [[5], []]}, "row 1: the prompt has 0 tokens"),
    "an empty text": ({"prompt": ["a", ""]}, "row 1: the prompt has 0 tokens"),
    "half a character": ({"prompt": "\ud800"}, "row 0: the text has the lone surrogate"),
    "a text of numbers": ({"prompt": [5]}, "row 0: text=5 is a int"),
    "temperature": ({"input_ids": [5], "sampling_params": {"temperature": "x"}}, "row 0: temperature='x'"),
    "a list of options": ({"input_ids": [5], "sampling_params": [1]}, "row 0: sampling_params=1"),
    "n": ({"input_ids": [5], "sampling_params": {"n": 10**12}}, "row 0: n=1000000000000"),
    "a grammar": ({"input_ids": [5], "sampling_params": {"json_schema": {}}}, "row 0: json_schema={}"),
    "log-probs": ({"input_ids": [5], "return_logprob": True, "top_logprobs_num": VOCAB + 1}, "top_logprobs_num=49153"),
    "a priority": ({"input_ids": [5], "priority": "x"}, "priority"),
    "a name": ({"input_ids": [5], "rid": 5}, "rid=5"),
    "a session": ({"input_ids": [5], "session_params": {"id": 5}}, r"row 0: session_params\.id=5"),
}


class InProcess:
    """Collected by the process that `in_process_log` starts, and not by name in this one."""

    def test_bad_requests(self, in_process: SGLangOffline) -> None:
        engine = in_process.engine

        def generate(**arguments: Any) -> Any:
            # SGLang's own method, in the loop that `SGLangOffline` runs while calls are under way.
            return in_process._loop.run(lambda: engine.async_generate(**arguments))

        good = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
        expected = generate(**good)["output_ids"]
        for arguments, words in IN_PROCESS.values():
            with pytest.raises(ValueError, match=words):
                generate(**arguments)
        assert generate(**good)["output_ids"] == expected


def test_in_process(in_process_log: str) -> None:
    assert "test_bad_requests_engine.py::InProcess::test_bad_requests PASSED" in in_process_log
