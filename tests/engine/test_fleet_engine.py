"""Two real servers: by their addresses, by SGLang's router's, by a `RayLLMCollector`, and when one of them is killed.

Small heads, which both are to have, are in the middle.

The session's server is one of the two; the other is this file's own, and the last test kills it.
"""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from helpers import heads_oracle
from helpers.bad_link import bad_link
from helpers.local_ray import reachable_from_outside
from helpers.policy_checks import (
    CHUNKED_PREFILL_SIZE,
    LOG_PROB_ATOL,
    STATE_RTOL,
    history_input,
    prompt_of,
    relative_error,
)
from helpers.torchrl_pipelines import chat_env, flat
from torchrl.collectors.llm import RayLLMCollector
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import Head, HeadSpec, HiddenSpec, SGLangHiddenWrapper, SGLangServer, connect, launch
from torchrl_sglang_hidden.engines import fleet as fleet_module
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.errors import EngineUnreachableError, RequestRejectedError
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload

START_TIMEOUT_S = 120.0
# Of the demo model's last state and of a layer in the middle.
HEADS = {
    "linear": heads_oracle.make_head("linear", 576, seed=81, normalize="rms"),
    "mlp": heads_oracle.make_head("mlp", 576, seed=82, layer=4, normalize="layer", scale=2),
}
NEW, OTHERS = (heads_oracle.make_head("linear", 576, seed=seed, normalize="rms") for seed in (83, 84))


@pytest.fixture(scope="module")
def other(smol_dir: str, smol: SGLangServer) -> Iterator[LaunchedServer]:
    with launch(smol_dir, dtype="float32", chunked_prefill_size=CHUNKED_PREFILL_SIZE, sleep_on_idle=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def fleet(smol: SGLangServer, other: LaunchedServer) -> Iterator[SGLangServer]:
    with connect([smol.url, other.url]) as engine:
        yield engine


def requests_of(count: int, new_tokens: int, **options: bool) -> list[Request]:
    sampling = {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
    spec = HiddenSpec(("prompt", "response"))
    return [
        Request(tuple(prompt_of(5 + row, seed=row)), sampling, return_log_probs=True, hidden=spec, **options)
        for row in range(count)
    ]


def assert_same(found: Completion, expected: Completion) -> None:
    assert found.prompt_ids == expected.prompt_ids
    assert found.response_ids == expected.response_ids
    assert found.log_probs_T is not None
    assert expected.log_probs_T is not None
    assert float((found.log_probs_T - expected.log_probs_T).abs().max()) < LOG_PROB_ATOL
    for name, pooled in expected.hidden.items():
        assert found.hidden[name].count == pooled.count
        assert relative_error(found.hidden[name].vector, pooled.vector) < STATE_RTOL


def scored(count: int, spec: HeadSpec, new_tokens: int = 8) -> list[Request]:
    sampling = {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
    return [Request(tuple(prompt_of(5 + row, seed=900 + row)), sampling, heads=spec) for row in range(count)]


def assert_scored(one: Completion, heads: dict[str, Head], versions: dict[str, str], model_dir: str) -> None:
    """Check the scores of prompt and response against the heads in float64 on Hugging Face's states."""
    assert one.scores.keys() == heads.keys()
    layers = tuple(sorted({head.layer % 30 for head in HEADS.values()}))
    for name, scores in one.scores.items():
        truth = heads_oracle.expected(heads[name], model_dir, one.prompt_ids, one.response_ids, layers)
        assert scores.version == versions[name]
        assert scores.prompt_P is not None
        assert scores.response_T is not None
        heads_oracle.assert_scores(scores.prompt_P, truth["prompt"], name)
        heads_oracle.assert_scores(scores.response_T, truth["response"], name)


def prefills(server: LaunchedServer) -> int:
    """Return how many batches of prompts the server has taken in."""
    return server.log_path.read_text().count("Prefill batch")


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def router(smol: SGLangServer, other: LaunchedServer) -> Iterator[str]:
    """The address of SGLang's own router before the two servers."""
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        port, metrics = one.getsockname()[1], two.getsockname()[1]
    command = [sys.executable, "-m", "sglang_router.launch_router", "--policy", "round_robin"]
    listen = ["--host", "127.0.0.1", "--port", str(port)]
    listen += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
    process = subprocess.Popen([*command, *listen, "--worker-urls", smol.url, other.url], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def has_both() -> bool:
        assert process.poll() is None
        with suppress(httpx.TransportError):
            workers = httpx.get(f"{url}/workers", trust_env=False).json()["workers"]
            return sum(worker["is_healthy"] for worker in workers) == 2
        return False

    try:
        wait_until(has_both, START_TIMEOUT_S)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def test_rows_are_spread_and_right(smol: SGLangServer, other: LaunchedServer, fleet: SGLangServer) -> None:
    requests, before = requests_of(6, 3), prefills(other)
    expected = [smol.generate([request])[0] for request in requests]
    for found, alone in zip(fleet.generate(requests), expected, strict=True):
        assert_same(found, alone)
    assert prefills(other) > before


def test_the_routers_address_stands_for_both(smol: SGLangServer, other: LaunchedServer, router: str) -> None:
    requests = requests_of(4, 2)
    with connect(router) as engine:
        assert sorted(engine.urls) == sorted([smol.url, other.url])
        for found, expected in zip(engine.generate(requests), smol.generate(requests), strict=True):
            assert_same(found, expected)


def test_what_the_router_itself_does_with_a_request(smol: SGLangServer, router: str) -> None:
    """docs/serving.md says all of this. Where a newer router passes more on, it may stand between."""
    payload = to_payload(requests_of(1, 1), smol.info, binary=False)
    assert CHANNEL in payload["sampling_params"][0]["custom_params"]
    with httpx.Client(base_url=router, trust_env=False, timeout=60) as client:
        refused = client.post("/generate", json=payload)
        assert (refused.status_code, "sampling_params" in refused.text) == (422, True)
        single = {name: value[0] for name, value in payload.items()}
        meta = client.post("/generate", json=single).raise_for_status().json()["meta_info"]
        assert CHANNEL not in meta, "the states that were asked for do not come back, and nobody says so"
        for path in ("/server_info", "/model_info"):
            assert client.get(path).status_code == 404
        for path in ("/v1/hidden_states", "/open_session", "/abort_request", "/update_weights_from_disk"):
            assert client.post(path, json={}).status_code == 404


def test_a_ray_collector_spreads_its_rows_and_outlives_a_server(
    smol: SGLangServer,
    other: LaunchedServer,
    fleet: SGLangServer,
    smol_dir: str,
    tokenizer: PreTrainedTokenizerBase,
    local_ray: set[int],
) -> None:
    """The collector's process has a client of its own, made of the policy's pickle; the trainer's client is here."""
    questions = ["Hi", "2+2=", "Name a planet.", "Is the earth flat?"]
    with ExitStack() as stack:
        way = stack.enter_context(ExitStack())
        link = way.enter_context(bad_link(urlsplit(other.url).port or 0))
        engine = stack.enter_context(connect([smol.url, link.url]))
        options = {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True}
        policy = SGLangHiddenWrapper(engine, tokenizer=tokenizer, generate_kwargs=options, on_error="nan")
        alone = policy.get_new_version(model=smol)(history_input(questions))
        expected = dict(zip(questions, flat(alone), strict=True))
        collector = RayLLMCollector(
            functools.partial(chat_env, questions, batch_size=4),
            policy=policy,
            dialog_turns_per_batch=4,
            remote_config={"num_cpus": 0},
        )
        stack.callback(collector.shutdown)
        batches = iter(collector)

        def collect() -> tuple[set[str], list[str], tuple[int, int]]:
            """Return the weight versions and errors of four rows, and how many of them each server answered."""
            before = [server.server_counters().requests for server in (smol, other)]
            rows = flat(next(batches))
            assert sorted(row["query"] for row in rows) == sorted(questions)
            for row in rows:
                if not row["error"]:
                    assert row["tokens"].response.tolist() == expected[row["query"]]["tokens"].response.tolist()
                    found_D, expected_D = (one["hidden_states"].response for one in (row, expected[row["query"]]))
                    assert relative_error(found_D, expected_D) < STATE_RTOL
            one, two = (
                server.server_counters().requests - count for server, count in zip((smol, other), before, strict=True)
            )
            versions = {row["weight_version"] for row in rows if not row["error"]}
            return versions, [row["error"] for row in rows if row["error"]], (one, two)

        assert collect() == ({smol.info.weight_version}, [], (2, 2))
        assert reachable_from_outside(local_ray) == []
        version = engine.update_weights(smol_dir, transport="disk", version="of-both")
        stack.callback(fleet.update_weights, smol_dir, transport="disk", version=fleet.info.weight_version)
        assert collect() == ({version}, [], (2, 2)), "the weights reached both"

        taken, answered = prefills(other), other.server_counters().requests
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(collect)
            wait_until(lambda: prefills(other) > taken)
            way.close()
            versions, lost, _ = call.result(120)
        # Behind the link that was cut they end too, in their own time.
        wait_until(lambda: other.server_counters().requests == answered + 2)
        assert (versions, len(lost)) == ({version}, 2)
        assert all(f"{link.url} went away while answering" in error for error in lost)
        assert collect() == ({version}, [], (4, 0))
        with pytest.raises(EngineUnreachableError, match=link.url):
            engine.update_weights(smol_dir, transport="disk", version="of-none")
        assert collect() == ({version}, [], (4, 0)), "all of the servers or none"


def test_both_score_with_the_heads_that_were_pushed(
    smol: SGLangServer, other: LaunchedServer, fleet: SGLangServer, smol_dir: str
) -> None:
    """Scores of every row, a rule that ends responses, and after the drop neither has the heads."""
    versions = {name: fleet.push_head(name, head) for name, head in HEADS.items()}
    asked = HeadSpec(tuple(HEADS), ("prompt", "response"))
    before = [server.server_counters().requests for server in (smol, other)]
    free = fleet.generate(scored(6, asked))
    taken = [server.server_counters().requests - count for server, count in zip((smol, other), before, strict=True)]
    assert taken == [3, 3]
    for one in free:
        assert_scored(one, HEADS, versions, smol_dir)
    rules = [heads_oracle.rule_that_ends_at(one.scores["linear"].response_T, 2) for one in free]
    stopping = [
        replace(request, heads=replace(asked, stop_when=f"linear {rule}"))
        for request, (rule, _) in zip(scored(6, asked), rules, strict=True)
    ]
    for one, whole, (_, last) in zip(fleet.generate(stopping), free, rules, strict=True):
        assert (one.finish_reason, one.response_ids) == ("head", whole.response_ids[: last + 1])
        assert_scored(one, HEADS, versions, smol_dir)
    for name in HEADS:
        fleet.drop_head(name)
    for server in (smol, other):
        with pytest.raises(RequestRejectedError, match="the server has no head 'linear'"):
            server.generate(scored(1, asked))


def test_a_head_that_one_of_the_two_refuses(
    smol: SGLangServer, other: LaunchedServer, fleet: SGLangServer, smol_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The other is put back; and rows that two versions score are told of."""
    asked = HeadSpec(("linear",), ("prompt", "response"))
    # Another client's head, of the name and the version that this one is about to push.
    other.push_head("linear", OTHERS, version="2")
    words = rf"{other.url} did not take head 'linear' of version '2': .* has version '2' with other weights"
    with pytest.raises(RequestRejectedError, match=rf"{words}.*what they had of this client, no head of that name"):
        fleet.push_head("linear", NEW, version="2")
    with pytest.raises(RequestRejectedError, match="the server has no head 'linear'"):
        smol.generate(scored(1, asked))
    fleet.push_head("linear", HEADS["linear"], version="1")
    for one in fleet.generate(scored(4, asked)):
        assert_scored(one, {"linear": HEADS["linear"]}, {"linear": "1"}, smol_dir)
    other.push_head("linear", OTHERS, version="2")
    with pytest.raises(RequestRejectedError, match=rf"{words}.*what they had of this client, version '1'"):
        fleet.push_head("linear", NEW, version="2")
    for _ in range(2):
        completions = fleet.generate(scored(4, asked))
        assert {one.scores["linear"].version for one in completions} == {"1", "2"}
        for one in completions:
            head = {"1": HEADS["linear"], "2": OTHERS}[version := one.scores["linear"].version]
            assert_scored(one, {"linear": head}, {"linear": version}, smol_dir)
    told = [message for message in caplog.messages if "scored by different versions of head 'linear'" in message]
    assert len(told) == 1
    fleet.push_head("linear", NEW, version="3")
    for one in fleet.generate(scored(4, asked)):
        assert_scored(one, {"linear": NEW}, {"linear": "3"}, smol_dir)
    fleet.drop_head("linear")


def test_a_server_that_is_back_has_the_head_again(
    smol: SGLangServer,
    other: LaunchedServer,
    smol_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Behind a link that is gone for a while, in which the server loses the head as one that is started again does."""
    monkeypatch.setattr(fleet_module, "AWAY_S", 0.0)
    asked, port = HeadSpec(("linear",), ("prompt", "response")), urlsplit(other.url).port or 0
    with ExitStack() as stack:
        way = stack.enter_context(ExitStack())
        link = way.enter_context(bad_link(port))
        engine = stack.enter_context(connect([smol.url, link.url]))
        version = engine.push_head("linear", HEADS["linear"])

        def taken_by_other() -> int:
            before = other.server_counters().requests
            for one in engine.generate(scored(4, asked)):
                assert_scored(one, {"linear": HEADS["linear"]}, {"linear": version}, smol_dir)
            return other.server_counters().requests - before

        assert taken_by_other() == 2
        way.close()
        assert taken_by_other() == 0
        other.drop_head("linear")
        other.push_head("linear", OTHERS, version=version)
        stack.enter_context(bad_link(port, link.port))
        assert [taken_by_other(), taken_by_other()] == [0, 0], "it has a head of that version with other weights"
        words = f"{link.url} is back and does not take the heads that the others have"
        told = [message for message in caplog.messages if message.startswith(words)]
        assert len(told) == 1
        assert "with other weights" in told[0]
        other.drop_head("linear")
        with pytest.raises(RequestRejectedError, match="the server has no head 'linear'"):
            other.generate(scored(1, asked))
        assert taken_by_other() == 2
        engine.drop_head("linear")


def test_one_of_the_two_is_killed(
    smol: SGLangServer, other: LaunchedServer, fleet: SGLangServer, smol_dir: str
) -> None:
    sessions = [fleet.session(), fleet.session()]
    for session in sessions:
        session.generate(Request(tuple(prompt_of(4, seed=1)), {"max_new_tokens": 1}))
    requests, before = requests_of(4, 48, return_errors=True), prefills(other)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(fleet.generate, requests)
        wait_until(lambda: prefills(other) > before)
        for process in [*psutil.Process(other.pid).children(recursive=True), psutil.Process(other.pid)]:
            with suppress(psutil.NoSuchProcess):  # the others end with the first
                process.kill()
        completions = call.result(120)
    lost = [one for one in completions if one.error is not None]
    assert len(lost) == 2
    for row, one in enumerate(completions):
        assert one.prompt_ids == requests[row].prompt_ids
        if one.error is None:
            assert_same(one, smol.generate([requests[row]])[0])
        else:
            assert isinstance(one.error, EngineUnreachableError)
            assert str(one.error).startswith(f"row {row}: {other.url} went away while answering")
            assert (one.response_ids, one.hidden) == ((), {})
    requests = requests_of(6, 2)
    for found, expected in zip(fleet.generate(requests), smol.generate(requests), strict=True):
        assert_same(found, expected)
    goes_on = []
    for session in sessions:
        with suppress(EngineUnreachableError):
            goes_on.append(session.generate(Request((7, 8), {"max_new_tokens": 1})))
        session.close()
    assert len(goes_on) == 1, "a session stays with its server"
    version = smol.info.weight_version
    with pytest.raises(EngineUnreachableError, match=other.url):
        fleet.update_weights(smol_dir, transport="disk")
    with connect(smol.url) as again:
        assert again.info.weight_version == version, "all of the servers or none"
