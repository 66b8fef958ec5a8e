"""States, logits and constraints beside what a serving engine does behind one's back: each right, or refused.

docs/engine_features.md lists these tests, one for each feature.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from helpers import random_models
from helpers.completion_checks import assert_completion
from helpers.logits_checks import SUM_ATOL, check_choices, positioned
from helpers.policy_checks import make_policy, prompt_of, relative_error, tokens_input
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import ActionMask, EngineUnreachableError, HiddenSpec, LastTokens, LogitsSpec, launch
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.errors import EngineError, PromptLengthError
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.records import Completion, Request

NUM_LAYERS = 4
SPEC = HiddenSpec(("prompt", "response", "full"), layers=(1, -1), spans={"tail": LastTokens(2)})
SPANS = {"tail": LastTokens(2)}


@contextmanager
def serving(model_dir: str, log: Path, **server_args: Any) -> Iterator[LaunchedServer]:
    arguments = {"dtype": "float32", "layers": -1, "context_length": 512, "max_total_tokens": 2048, **server_args}
    with launch(model_dir, log_file=log / "server.log", sleep_on_idle=True, **arguments) as server:
        yield server


def request_of(ids: list[int], max_new_tokens: int = 8, spec: HiddenSpec | None = SPEC, **fields: Any) -> Request:
    sampling = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "temperature": 0.0}
    spans = SPANS if spec is SPEC else {}
    return Request(tuple(ids), sampling, return_log_probs=False, hidden=spec, spans=spans, **fields)


def check(server: LaunchedServer, requests: list[Request], model_dir: str) -> list[Completion]:
    completions = server.generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        assert_completion(request, completion, model_dir, NUM_LAYERS)
    return completions


def check_at_once(server: LaunchedServer, calls: list[list[Request]], model_dir: str) -> None:
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = list(pool.map(server.generate, calls))
    for requests, completions in zip(calls, answers, strict=True):
        for request, completion in zip(requests, completions, strict=True):
            assert_completion(request, completion, model_dir, NUM_LAYERS)


def choices_of(seed: int, **fields: Any) -> list[Request]:
    """Constraints at certain tokens, and logits of prompts and responses, on ragged prompts."""
    requests = positioned(ragged(seed, 10), 7, own=False)
    whole = [LogitsSpec(top_k=3, segments=("full",)), LogitsSpec(token_ids=(8, 3), segments=("full",))]
    requests += [replace(request, logits=spec) for request in requests[1::2] for spec in whole]
    return [replace(request, **fields) for request in requests]


def log_of(server: LaunchedServer) -> str:
    return Path(server.log_path).read_text()


def status(server: LaunchedServer, part: int = 0) -> dict[str, Any]:
    states = httpx.get(f"{server.url}/server_info", timeout=30).json()["internal_states"]
    found: dict[str, Any] = states[part][CHANNEL]
    return found


def ragged(seed: int, count: int = 6) -> list[list[int]]:
    return [prompt_of(1 + (37 * index + seed) % 150, 5000 + 100 * seed + index) for index in range(count)]


# --- one server under pressure: chunks, mixed chunks, retraction, priorities, aborts --------------------------------


@pytest.fixture(scope="module")
def pressed(qwen3_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    with serving(
        qwen3_dir,
        tmp_path_factory.mktemp("pressed"),
        chunked_prefill_size=32,
        enable_mixed_chunk=True,
        enable_priority_scheduling=True,
        priority_scheduling_preemption_threshold=1,
        max_total_tokens=512,
        max_running_requests=4,
        schedule_conservativeness=0.05,
    ) as server:
        yield server


def test_chunked_prefill(pressed: LaunchedServer, qwen3_dir: str) -> None:
    check(pressed, [request_of(ids) for ids in (prompt_of(31, 1), prompt_of(32, 2), prompt_of(33, 3))], qwen3_dir)
    check(pressed, [request_of(prompt_of(130, 4))], qwen3_dir)


def test_mixed_chunks(pressed: LaunchedServer, qwen3_dir: str) -> None:
    """Prompts come in while others decode, so that one step has rows of both kinds."""
    calls = [[request_of(ids, max_new_tokens=30)] for ids in ragged(1, 3)] + [
        [request_of(prompt_of(100, 600 + index))] for index in range(6)
    ]
    check_at_once(pressed, calls, qwen3_dir)


def test_retraction(pressed: LaunchedServer, qwen3_dir: str) -> None:
    """More decodes than the KV cache holds: some are thrown out in the middle, and computed again."""
    for attempt in range(5):
        calls = [[request_of(prompt_of(60, 700 + 10 * attempt + index), 110)] for index in range(4)]
        check_at_once(pressed, calls, qwen3_dir)
        if "Retract requests" in log_of(pressed):
            return
    raise AssertionError("nothing was retracted, so nothing was shown")


def test_priorities(pressed: LaunchedServer, qwen3_dir: str) -> None:
    """An urgent request throws a running one out, which is computed again later."""
    slow = [[request_of(prompt_of(40, 800 + index), 60, priority=0)] for index in range(6)]
    urgent = [[request_of(prompt_of(30, 900 + index), priority=10)] for index in range(4)]
    check_at_once(pressed, slow + urgent, qwen3_dir)
    calls = [[replace(r, priority=0)] for r in positioned(ragged(9), 50, own=False)] + [choices_of(10, priority=10)]
    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(lambda requests: check_choices(pressed, requests, qwen3_dir), calls))


def test_a_trajectory_that_filled_the_context_can_be_scored(pressed: LaunchedServer) -> None:
    """The response ends where prompt and response can be scored, and no token before."""
    info = pressed.info
    prompt_ids = tuple(prompt_of(info.max_prompt_tokens - 6, 1003))
    sampling = {"max_new_tokens": info.context_length - len(prompt_ids), "ignore_eos": True, "temperature": 0.0}
    (whole,) = pressed.generate([Request(prompt_ids, sampling)])
    ids = (*whole.prompt_ids, *whole.response_ids)
    assert len(ids) == info.max_prompt_tokens
    (scored,) = pressed.generate(
        [Request(ids, {"max_new_tokens": 0}, score_prompt=True, hidden=HiddenSpec(("prompt",)))]
    )
    assert scored.prompt_log_probs_P is not None
    assert whole.log_probs_T is not None
    torch.testing.assert_close(scored.prompt_log_probs_P[len(prompt_ids) :], whole.log_probs_T, atol=1e-3, rtol=0)
    # One token more is an error, before it is sent.
    with pytest.raises(PromptLengthError, match=f"over the engine's limit of {info.max_prompt_tokens}"):
        pressed.generate([Request((*ids, 5), {"max_new_tokens": 0}, score_prompt=True)])


def test_an_abort_leaves_nothing_and_nobody_else_is_touched(pressed: LaunchedServer, qwen3_dir: str) -> None:
    answers: list[dict[str, Any]] = []

    def doomed() -> None:
        payload = {
            "rid": "doomed",
            "input_ids": prompt_of(50, 1001),
            "sampling_params": {"max_new_tokens": 400, "min_new_tokens": 400},
        }
        answers.append(httpx.post(f"{pressed.url}/generate", json=payload, timeout=120).json())

    thread = threading.Thread(target=doomed)
    thread.start()
    while thread.is_alive():
        httpx.post(f"{pressed.url}/abort_request", json={"rid": "doomed"})
        check(pressed, [request_of(prompt_of(20, 1002))], qwen3_dir)
    assert answers[0]["meta_info"]["finish_reason"]["type"] == "abort"
    assert status(pressed)["open_pools"] == 0


def test_a_server_that_dies_in_the_middle_of_a_call(
    pressed: LaunchedServer, tokenizer: PreTrainedTokenizerBase
) -> None:
    """This must be the last test of its server."""
    policy = make_policy(pressed, tokenizer, max_new_tokens=400, min_new_tokens=400)
    batch = tokens_input([prompt_of(8, seed=9)])
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(policy, batch)
        while status(pressed)["open_pools"] == 0:
            assert not call.done(), "too quick to be killed in the middle"
        os.killpg(pressed.pid, signal.SIGKILL)
        with pytest.raises(EngineUnreachableError, match=pressed.url):
            call.result(timeout=10)
    assert list(batch[0].keys(True, True)) == [("tokens", "prompt")]
    # Until it has ended, its socket may still take a connection.
    with pytest.raises(EngineError, match="signal 9"):
        pressed.wait()
    with pytest.raises(EngineUnreachableError, match="nothing answers"):
        policy(batch)


# --- servers of their own -------------------------------------------------------------------------------------------


def test_without_overlap_radix_cache_and_chunks(qwen3_dir: str, tmp_path: Path) -> None:
    with serving(
        qwen3_dir, tmp_path, disable_overlap_schedule=True, disable_radix_cache=True, chunked_prefill_size=-1
    ) as server:
        for _ in range(2):
            check(server, [request_of(ids) for ids in ragged(2)], qwen3_dir)
        choices = choices_of(2)
        penalties = {"frequency_penalty": 0.8, "presence_penalty": 0.5}
        choices += [replace(request, sampling={**request.sampling, **penalties}) for request in choices]
        check_choices(server, choices, qwen3_dir, overlap=False)


def test_data_parallel(qwen3_dir: str, tmp_path: Path) -> None:
    """Two schedulers, each with pools and sums of its own."""
    with serving(qwen3_dir, tmp_path, dp_size=2, chunked_prefill_size=64) as server:
        assert server.info.layers == (-1, 0, 1, 2, 3), "without graphs it gives them all, whatever it was started for"
        for _ in range(2):
            calls = [[request_of(ids)] for ids in ragged(4, 8)] + [[request_of(ids) for ids in ragged(5)]]
            check_at_once(server, calls, qwen3_dir)
        assert min(status(server, part)["prefix_bytes"] for part in range(2)) > 0, "one of them did nothing"
        check_choices(server, choices_of(4), qwen3_dir)


def test_bfloat16(smol_dir: str, tmp_path: Path) -> None:
    """The tolerance is bfloat16's own: the states that were pooled have eight bits of mantissa."""
    with launch(
        smol_dir, dtype="bfloat16", context_length=512, sleep_on_idle=True, log_file=tmp_path / "server.log"
    ) as server:
        spec = HiddenSpec(("prompt", "response"), layers=(15, -1), tokens=True)
        requests = [Request(tuple(ids), {"max_new_tokens": 6}, False, spec) for ids in ragged(6)]
        for request, completion in zip(requests, server.generate(requests), strict=True):
            assert_completion(request, completion, smol_dir, server.info.num_layers, rtol=0.05)
        mask = ActionMask(range(100, 140))
        spec, sampling = LogitsSpec(top_k=40, stage="processed"), {"max_new_tokens": 6, "temperature": 0.7}
        chosen = [Request(tuple(ids), sampling, logits=spec, constraints=(mask,)) for ids in ragged(7)]
        for completion in server.generate(chosen):
            assert set(completion.response_ids) <= set(mask.valid_token_ids)
            assert completion.logits is not None
            log_probs_TC = completion.logits.values_NC.log_softmax(-1)
            places_TC = completion.logits.token_ids_NC == torch.tensor(completion.response_ids)[:, None]
            torch.testing.assert_close(log_probs_TC[places_TC], completion.log_probs_T, atol=SUM_ATOL, rtol=0)


# --- one server with pages and adapters ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter_dir(qwen3_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_models.save_random_lora(tmp_path_factory.mktemp("lora") / "adapter", qwen3_dir))


@pytest.fixture(scope="module")
def paged(qwen3_dir: str, adapter_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    with serving(
        qwen3_dir,
        tmp_path_factory.mktemp("paged"),
        page_size=16,
        chunked_prefill_size=64,
        enable_lora=True,
        lora_paths=[f"mine={adapter_dir}"],
        max_lora_rank=random_models.LORA_RANK,
        lora_backend="torch_native",
    ) as server:
        yield server


def test_pages_of_the_kv_cache(paged: LaunchedServer, qwen3_dir: str) -> None:
    """The prefix cache then hits whole pages only, where no sum may be kept."""
    for _ in range(3):
        check(paged, [request_of(ids) for ids in ragged(3)], qwen3_dir)
    shared = prompt_of(90, 1100)
    check(paged, [request_of(shared[: 50 + 7 * index] + prompt_of(9, index)) for index in range(5)], qwen3_dir)
    for _ in range(2):
        check_choices(paged, choices_of(3), qwen3_dir)


def test_lora(paged: LaunchedServer, qwen3_dir: str, adapter_dir: str, tmp_path: Path) -> None:
    """Rows of one batch under different adapters: each has the states of its own model."""
    merged_dir = str(random_models.save_merged(tmp_path / "merged", qwen3_dir, adapter_dir))
    ids = prompt_of(70, 1200)
    requests = [request_of(ids), request_of(ids, lora="mine"), request_of(prompt_of(9, 1201), lora="mine")]
    for _ in range(2):
        plain, adapted, short = paged.generate(requests)
        assert_completion(requests[0], plain, qwen3_dir, NUM_LAYERS)
        assert_completion(requests[1], adapted, merged_dir, NUM_LAYERS)
        assert_completion(requests[2], short, merged_dir, NUM_LAYERS)
    apart = relative_error(adapted.hidden["prompt"].vector, plain.hidden["prompt"].vector)
    assert apart > 0.01, "the adapter changes nothing, so nothing was shown"
    check_choices(paged, choices_of(6, lora="mine"), merged_dir)
