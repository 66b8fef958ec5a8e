"""A random Qwen3 whose head is its own matrix, on a server that wants an API key and has a small KV cache."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest
from helpers.policy_checks import (
    CHUNKED_PREFILL_SIZE,
    POOLINGS,
    QUESTIONS,
    SEGMENTS,
    assert_greedy,
    assert_rows,
    history_input,
    make_policy,
    prompt_of,
    text_input,
    tokens_input,
)
from helpers.request_storm import resident_bytes, storm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    AuthenticationError,
    HiddenSpec,
    PromptLengthError,
    Request,
    SGLangHiddenWrapper,
    connect,
    launch,
)
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.shared_memory import DIRECTORY
from torchrl_sglang_hidden.server.metrics import PREFIX
from torchrl_sglang_hidden.server.prefix_sums import MAX_BYTES

Policy = Callable[..., SGLangHiddenWrapper]

# Seventeen responses that grow, or a storm of requests, do not fit: SGLang must take some back and compute them again.
CRAMPED_TOKENS = 480
NOISE_BYTES = 48 * 2**20


@pytest.fixture(scope="module")
def api_key() -> str:
    return secrets.token_hex(8)


@pytest.fixture(scope="module")
def qwen3(qwen3_dir: str, api_key: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    """The random Qwen3 on a server that wants `api_key`, and whose KV cache is too small for what it lets in."""
    with launch(
        qwen3_dir,
        dtype="float32",
        layers=(0, 1, 2, 3),
        chunked_prefill_size=CHUNKED_PREFILL_SIZE,
        enable_mixed_chunk=True,
        api_key=api_key,
        enable_metrics=True,
        max_total_tokens=CRAMPED_TOKENS,
        max_running_requests=24,
        schedule_conservativeness=0.01,  # admit all rows at once, although they will not fit
        sleep_on_idle=True,
        log_file=tmp_path_factory.mktemp("cramped") / "server.log",
    ) as server:
        yield server


def retractions(server: LaunchedServer) -> int:
    return server.log_path.read_text().count("KV cache pool is full. Retract requests")


@pytest.fixture
def qwen3_policy(qwen3: LaunchedServer, tokenizer: PreTrainedTokenizerBase) -> Policy:
    return functools.partial(make_policy, qwen3, tokenizer)


@pytest.fixture
def http(qwen3: LaunchedServer, api_key: str) -> Iterator[httpx.Client]:
    """SGLang's own interface, without this package's client."""
    headers = {"Authorization": f"Bearer {api_key}"}
    with httpx.Client(base_url=qwen3.url, headers=headers, timeout=120, trust_env=False) as client:
        yield client


def test_the_head_is_untied(qwen3_dir: str) -> None:
    """If it were tied, this file would test what test_against_hf.py tests."""
    model = AutoModelForCausalLM.from_pretrained(qwen3_dir)
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert not head.equal(embeddings)


@pytest.mark.parametrize("num_rows", [1, 2, 17])
def test_greedy_batches(qwen3_policy: Policy, qwen3_dir: str, num_rows: int) -> None:
    prompts = [prompt_of(2 + row, seed=row) for row in range(num_rows)]
    rows = assert_rows(qwen3_policy()(tokens_input(prompts)), qwen3_dir, SEGMENTS)
    for prompt, row in zip(prompts, rows, strict=True):
        assert row.prompt_ids == prompt
        assert_greedy(row, qwen3_dir, 8)


@pytest.mark.parametrize(("mode", "make_input"), [("history", history_input), ("text", text_input)])
def test_modes(qwen3_policy: Policy, qwen3_dir: str, mode: str, make_input: Callable) -> None:
    rows = assert_rows(qwen3_policy(mode)(make_input(QUESTIONS[:3])), qwen3_dir, SEGMENTS)
    for row in rows:
        assert_greedy(row, qwen3_dir, 8)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_responses(qwen3_policy: Policy, qwen3_dir: str, pooling: str, temperature: float) -> None:
    batch = tokens_input([prompt_of(5, seed=30)] * 4)
    out = qwen3_policy(pooling=pooling, temperature=temperature, max_new_tokens=16)(batch)
    rows = assert_rows(out, qwen3_dir, SEGMENTS, pooling, temperature)
    assert len({tuple(row.response_ids) for row in rows}) > 1


@pytest.mark.parametrize("pooling", POOLINGS)
def test_chunked_and_cached_prompts(qwen3_policy: Policy, qwen3_dir: str, pooling: str) -> None:
    batch = tokens_input([prompt_of(length, seed=length) for length in (3, CHUNKED_PREFILL_SIZE * 2 + 5, 40)])
    for _ in range(2):
        out = qwen3_policy(pooling=pooling, max_new_tokens=3)(batch.clone())
        assert_rows(out, qwen3_dir, SEGMENTS, pooling)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_token_responses(qwen3_policy: Policy, qwen3_dir: str, pooling: str) -> None:
    batch = tokens_input([prompt_of(1, seed=31), prompt_of(CHUNKED_PREFILL_SIZE + 1, seed=32)])
    rows = assert_rows(qwen3_policy(pooling=pooling, max_new_tokens=1)(batch), qwen3_dir, SEGMENTS, pooling)
    assert [len(row.response_ids) for row in rows] == [1, 1]


def test_rows_that_the_server_took_back_and_computed_again(
    qwen3: LaunchedServer, qwen3_policy: Policy, qwen3_dir: str
) -> None:
    before = retractions(qwen3)
    prompts = [prompt_of(12, seed=50 + row) for row in range(17)]
    assert len(prompts) * (12 + 40) > qwen3.info.max_prompt_tokens
    rows = assert_rows(qwen3_policy(max_new_tokens=40)(tokens_input(prompts)), qwen3_dir, SEGMENTS)
    assert [len(row.response_ids) for row in rows] == [40] * 17
    assert retractions(qwen3) > before, "nothing was taken back: tests nothing"


def test_longest_prompt_that_the_kv_cache_holds(qwen3: LaunchedServer, qwen3_policy: Policy, qwen3_dir: str) -> None:
    """The context has room for more; a prompt over the KV cache would wait in SGLang's queue for ever."""
    longest = qwen3.info.max_prompt_tokens
    assert longest < qwen3.info.context_length
    fits, too_long = prompt_of(longest, seed=33), prompt_of(longest + 1, seed=33)
    with pytest.raises(PromptLengthError, match=f"{longest + 1}.*{longest}"):
        qwen3_policy(max_new_tokens=1)(tokens_input([too_long]))
    assert_rows(qwen3_policy(max_new_tokens=1)(tokens_input([fits])), qwen3_dir, SEGMENTS)


# --- API key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "wrong-key"])
def test_wrong_api_key(
    qwen3: LaunchedServer,
    qwen3_policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    api_key: str,
    key: str | None,
) -> None:
    with pytest.raises(AuthenticationError) as caught:
        make_policy(connect(qwen3.url, api_key=key), tokenizer)(tokens_input([[5, 6]]))
    assert qwen3.url in str(caught.value)
    assert api_key not in str(caught.value)
    assert len(qwen3_policy()(tokens_input([[5, 6]]))) == 1


def test_without_the_key_nothing_is_said(qwen3: LaunchedServer, api_key: str) -> None:
    """SGLang alone answers the second and the third, and the last where Starlette is older than 1.0.1."""
    with httpx.Client(base_url=qwen3.url, timeout=30, trust_env=False) as stranger:
        assert stranger.get("/server_info").status_code == 401
        assert stranger.get("/metrics").status_code == 401
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        socket = stranger.get("/v1/realtime", headers={**upgrade, "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="})
        assert socket.status_code in (401, 403)  # as uvicorn has a library for WebSockets or not
        assert stranger.get("/server_info", headers={"Host": "x/health?"}).status_code in (400, 401)
        assert stranger.get("/health").status_code == 200


def test_the_key_is_not_shown_to_who_has_it(qwen3: LaunchedServer, http: httpx.Client, api_key: str) -> None:
    described = http.get("/server_info")
    assert described.json()["api_key"] == "***"
    assert api_key not in described.text
    assert api_key not in qwen3.log_path.read_text()
    leader = psutil.Process(qwen3.pid)
    for process in (leader, *leader.children(recursive=True)):
        assert api_key not in " ".join(process.cmdline())


def test_the_counters_stand_beside_sglangs(qwen3: LaunchedServer, http: httpx.Client) -> None:
    qwen3.generate([Request((5, 6, 7), {"max_new_tokens": 2}, hidden=HiddenSpec())])
    lines = http.get("/metrics").text.splitlines()
    assert any(line.startswith("sglang:") for line in lines)
    counted = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith(PREFIX)}
    found = qwen3.server_counters()
    assert counted[f"{PREFIX}rows_total"] == found.rows > 0
    assert counted[f"{PREFIX}requests_total"] == found.requests > 0
    assert counted[f"{PREFIX}step_seconds_total"] == pytest.approx(found.step_seconds, rel=0.2)


@pytest.mark.parametrize("route", ["update_weights_from_tensor", "load_lora_adapter_from_tensors"])
def test_no_pickle_is_taken_from_who_has_it(http: httpx.Client, route: str) -> None:
    refused = http.post(f"/{route}", json={})
    assert refused.status_code == 403
    assert "unpickles what it is sent" in refused.json()["error"]["message"]
    # A processor of SGLang's own is dill: refused where the server was not started for it.
    asked = {"input_ids": [5, 6], "custom_logit_processor": '{"callable": "80049500"}'}
    refused = http.post("/generate", json={**asked, "sampling_params": {"max_new_tokens": 1}})
    assert refused.status_code == 400
    assert "--enable-custom-logit-processor" in refused.text


def test_right_api_key(qwen3: LaunchedServer, tokenizer: PreTrainedTokenizerBase, api_key: str, qwen3_dir: str) -> None:
    client = connect(qwen3.url, api_key=api_key)
    assert_rows(make_policy(client, tokenizer)(tokens_input([[5, 6]])), qwen3_dir, SEGMENTS)
    assert api_key not in repr(client)


def test_the_vector_service_wants_the_key(qwen3: LaunchedServer, http: httpx.Client) -> None:
    body = {"input": [[5, 6], [7]]}
    for headers in ({}, {"Authorization": "Bearer wrong-key"}):
        refused = httpx.post(f"{qwen3.url}/v1/hidden_states", json=body, headers=headers, trust_env=False)
        assert refused.status_code == 401
    assert len(http.post("/v1/hidden_states", json=body).json()["data"]) == 2


# --- a storm ----------------------------------------------------------------------------------------------------------


def test_every_answer_of_a_storm_is_right(qwen3: LaunchedServer, http: httpx.Client, qwen3_dir: str) -> None:
    before = retractions(qwen3)
    assert storm(qwen3, http, qwen3_dir, seed=0) > 200
    assert retractions(qwen3) > before, "the storm retracted nothing"
    before_bytes = resident_bytes(qwen3)
    assert storm(qwen3, http, qwen3_dir, seed=1) > 200
    # The second storm brings nothing that stays: the first one made what is kept.
    assert resident_bytes(qwen3) - before_bytes < NOISE_BYTES
    after = http.get("/server_info").json()["internal_states"][0][CHANNEL]
    assert after["open_pools"] == 0
    assert 0 < after["prefix_bytes"] <= MAX_BYTES
    token = str(after["shared"]).removesuffix("-here")
    assert [path.name for path in DIRECTORY.glob(f"{token}-*")] == [after["shared"]]
