"""New weights for a running server: what it answers afterwards, against Hugging Face on the same weights.

1. After an update every log-prob and state is of the new weights, for prompts in the prefix cache too.
2. What does not fit is refused, and the server keeps its weights.
3. Requests that run during an update either end with the old weights, or go on with the new ones and say so.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from helpers import hf_oracle
from helpers.bad_link import bad_link
from helpers.completion_checks import assert_completion
from helpers.policy_checks import (
    LOG_PROB_ATOL,
    QUESTIONS,
    SEGMENTS,
    STATE_RTOL,
    assert_row,
    make_policy,
    prompt_of,
    relative_error,
    rows_of,
    tokens_input,
)
from helpers.weight_changes import answers, assert_answered_with, restore, wrapper_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    CapabilityError,
    EngineError,
    HiddenSpec,
    InputError,
    SGLangOffline,
    SGLangServer,
    TokenMask,
    WeightsError,
    connect,
)
from torchrl_sglang_hidden.protocol import CHANNEL, unpack_answer
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.spec.spans import PromptSpan
from torchrl_sglang_hidden.weights import disk
from torchrl_sglang_hidden.weights.transports import WeightUpdate

ChatIds = Callable[[str], list[int]]


FORMS: dict[str, Callable[..., Any]] = {
    "path": lambda trainer, trained_dir, tokenizer: Path(trained_dir),
    "state dict": lambda trainer, trained_dir, tokenizer: dict(trainer.state_dict()),
    "parameters": lambda trainer, trained_dir, tokenizer: dict(trainer.named_parameters()),
    "module": lambda trainer, trained_dir, tokenizer: trainer,
    "wrapper": lambda trainer, trained_dir, tokenizer: wrapper_of(trainer, tokenizer),
}


# --- 1. the new weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "transport", "running"),
    [
        *((form, "auto", "finish") for form in FORMS),
        ("module", "disk", "continue"),
        ("module", "network", "finish"),
        ("path", "network", "finish"),
        ("state dict", "network", "continue"),
    ],
)
def test_every_answer_is_of_the_new_weights(
    form: str,
    transport: str,
    running: str,
    trainee: SGLangServer,
    trainer: PreTrainedModel,
    trained_dir: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_ids: ChatIds,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(disk, "TMPFS", tmp_path)
    prompts = tokens_input([chat_ids(question) for question in QUESTIONS[:2]])
    # Response states alone leave the prompt in the prefix cache, and read from it.
    policies = {
        segments: make_policy(trainee, tokenizer, segments=segments, max_new_tokens=4)
        for segments in (("response",), SEGMENTS)
    }
    policies[("response",)](prompts.clone())
    weights = FORMS[form](trainer, trained_dir, tokenizer)
    before = trainee.info.weight_version

    version = trainee.update_weights(weights, transport=transport, running=running)  # type: ignore[arg-type]

    assert version == trainee.info.weight_version != before
    for segments, policy in policies.items():
        for row in rows_of(policy(prompts.clone()), segments):
            truth = assert_row(row, trained_dir)
            assert row.response_ids == truth.argmax_T
            assert row.weight_version == version


def test_the_perturbation_would_be_seen(trained_dir: str, smol_dir: str, chat_ids: ChatIds) -> None:
    prompt = chat_ids(QUESTIONS[0])
    old, new = (hf_oracle.teacher_force(path, prompt, [5, 6, 7]) for path in (smol_dir, trained_dir))
    assert (old.log_probs_T - new.log_probs_T).abs().max() > 100 * LOG_PROB_ATOL
    assert relative_error(old.pooled("prompt", "mean"), new.pooled("prompt", "mean")) > 100 * STATE_RTOL


def test_versions_count_on_or_are_named(trainee: SGLangServer, trainer: PreTrainedModel) -> None:
    assert trainee.update_weights(trainer, version="step-41") == "step-41"
    assert answers(trainee, [[5, 6]], 1)[0].weight_version == "step-41"
    with pytest.raises(InputError, match="'step-41' is that of the weights already served"):
        trainee.update_weights(trainer, version="step-41")
    assert trainee.update_weights(trainer) == "step-42"


def test_another_client_counts_on_from_there_and_finds_the_model(
    trainee: SGLangServer, trainer: PreTrainedModel, smol_dir: str
) -> None:
    trainee.update_weights(trainer, version="7")
    with connect(trainee.url) as other:
        assert other.info.weight_version == "7"
        assert other.info.model_path == smol_dir, "not the checkpoint that was deleted"
        assert other.update_weights(trainer) == "8"
    assert trainee.update_weights(trainer) == "9"


def test_all_servers_get_the_weights(
    trainee: SGLangServer, trainer: PreTrainedModel, trained_dir: str, chat_ids: ChatIds
) -> None:
    with bad_link(int(trainee.url.rpartition(":")[2])) as link, SGLangServer([trainee.url, link.url]) as both:
        version = both.update_weights(trainer)
        found = answers(both, [chat_ids(question) for question in QUESTIONS[:2]])
    trainee.update_weights(trainer)
    assert [completion.weight_version for completion in found] == [version, version]
    for completion in found:
        assert_answered_with(completion, trained_dir)


def test_awaited(trainee: SGLangServer, trainer: PreTrainedModel) -> None:
    version = asyncio.run(trainee.aupdate_weights(trainer, version="awaited"))
    assert version == trainee.info.weight_version == "awaited"


# --- 2. what does not fit -------------------------------------------------------------------------------------------


def without_a_name(state: dict[str, Any]) -> None:
    del state["model.layers.3.mlp.up_proj.weight"]


def with_an_unknown_name(state: dict[str, Any]) -> None:
    state["model.layers.30.mlp.up_proj.weight"] = torch.zeros(1536, 576)


def with_a_wrong_shape(state: dict[str, Any]) -> None:
    state["model.layers.3.mlp.up_proj.weight"] = torch.zeros(2, 3)


def with_a_nan(state: dict[str, Any]) -> None:
    state["model.norm.weight"] = state["model.norm.weight"].clone().index_fill_(0, torch.tensor([7]), float("nan"))


def with_an_infinity(state: dict[str, Any]) -> None:
    state["model.norm.weight"] = state["model.norm.weight"].clone().index_fill_(0, torch.tensor([7]), float("-inf"))


def with_integers(state: dict[str, Any]) -> None:
    state["model.norm.weight"] = torch.ones(576, dtype=torch.int64)


def with_a_head_of_its_own(state: dict[str, Any]) -> None:
    state["lm_head.weight"] = state["lm_head.weight"] * 2


@pytest.mark.parametrize("transport", ["disk", "network"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_a_name, r"1 \(model.layers.3.mlp.up_proj.weight\) missing, 0 unknown, of 272"),
        (with_an_unknown_name, r"0 missing, 1 \(model.layers.30.mlp.up_proj.weight\) unknown"),
        (with_a_wrong_shape, r"model.layers.3.mlp.up_proj.weight has shape \(2, 3\), and \(1536, 576\)"),
        (with_a_nan, "model.norm.weight has values from nan"),
        (with_an_infinity, "model.norm.weight has values from -inf"),
        (with_integers, "model.norm.weight is torch.int64 on cpu, and BF16"),
        (with_a_head_of_its_own, "lm_head.weight differs from the embedding"),
    ],
)
def test_bad_weights_are_refused_and_the_server_keeps_its_own(
    spoil: Callable[[dict[str, Any]], None],
    message: str,
    transport: Any,
    trainee: SGLangServer,
    trainer: PreTrainedModel,
    smol_dir: str,
    chat_ids: ChatIds,
) -> None:
    state = dict(trainer.state_dict())
    spoil(state)
    version = trainee.info.weight_version
    with pytest.raises(WeightsError, match=message):
        trainee.update_weights(state, transport=transport)
    (after,) = answers(trainee, [chat_ids(QUESTIONS[0])], 2)
    assert_answered_with(after, smol_dir)
    assert after.weight_version == trainee.info.weight_version == version


def test_a_directory_the_server_does_not_see(trainee: SGLangServer, trained_dir: str, smol_dir: str) -> None:
    """Only SGLang can know that it cannot read the directory, and its refusal is passed on."""
    endpoint, call = trainee._endpoints[0], trainee._endpoints[0].call

    def elsewhere(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        return call(route, {**payload, **({"model_path": "/not/there"} if "model_path" in payload else {})})

    version = trainee.info.weight_version
    endpoint.call = elsewhere  # type: ignore[method-assign]
    try:
        with pytest.raises(EngineError, match=r"refused to load .*transport='network'"):
            trainee.update_weights(trained_dir)
    finally:
        del endpoint.call  # type: ignore[method-assign]
    (after,) = answers(trainee, [[5, 6, 7]], 2)
    assert_answered_with(after, smol_dir)
    assert after.weight_version == version


# --- 3. while it serves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", ["finish", "continue"])
def test_threads_generate_on_while_weights_change(
    running: Any,
    trainee: SGLangServer,
    trainer: PreTrainedModel,
    trained_dir: str,
    smol_dir: str,
    chat_ids: ChatIds,
) -> None:
    over, begun, versions = threading.Event(), threading.Barrier(4), {trainee.info.weight_version: smol_dir}

    def keep_asking(question: str) -> list[Completion]:
        found = answers(trainee, [chat_ids(question)], 6)
        begun.wait(60)
        while not over.is_set():
            found += answers(trainee, [chat_ids(question)], 6)
        return found + answers(trainee, [chat_ids(question)], 6)

    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(keep_asking, question) for question in QUESTIONS[:3]]
        begun.wait(60)
        for weights, directory in ((trainer, trained_dir), (smol_dir, smol_dir), (trainer, trained_dir)):
            versions[trainee.update_weights(weights, running=running)] = directory
        over.set()
        rows = [completion for call in asked for completion in call.result()]
    whole = [row for row in rows if not row.mixed_weights]
    assert len(versions) == 4
    assert rows == whole or running == "continue"
    # Greedy: with one version's weights there is one answer to a question. Hugging Face checks it once.
    firsts: dict[tuple[str, tuple[int, ...]], Completion] = {}
    for row in whole:
        first = firsts.setdefault((row.weight_version, row.prompt_ids), row)
        assert row.response_ids == first.response_ids
        torch.testing.assert_close(row.log_probs_T, first.log_probs_T, atol=LOG_PROB_ATOL, rtol=0)
    for row in firsts.values():
        assert_answered_with(row, versions[row.weight_version])
    assert len({version for version, _ in firsts}) > 1


def test_updates_at_once_go_one_after_another(
    trainee: SGLangServer, trainer: PreTrainedModel, trained_dir: str, smol_dir: str, chat_ids: ChatIds
) -> None:
    with ThreadPoolExecutor(2) as pool:
        calls = {
            pool.submit(trainee.update_weights, weights): path
            for weights, path in ((trainer, trained_dir), (smol_dir, smol_dir))
        }
        path_of = {call.result(): path for call, path in calls.items()}
    (after,) = answers(trainee, [chat_ids(QUESTIONS[0])])
    assert len(path_of) == 2
    assert after.weight_version == trainee.info.weight_version
    assert_answered_with(after, path_of[after.weight_version])


def raw_answer(engine: SGLangServer, prompt: list[int], num_tokens: int) -> dict[str, Any]:
    """Return SGLang's own answer to one request."""
    sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    request = Request(tuple(prompt), sampling, hidden=HiddenSpec(segments=SEGMENTS))
    payload = to_payload([request], engine.info, binary=False)
    (row,) = httpx.post(f"{engine.url}/generate", json=payload, timeout=120).json()
    return row


def wait_until_running(engine: SGLangServer, tokens: int) -> None:
    """Return once the server has generated for a while."""
    with httpx.Client(base_url=engine.url, timeout=60) as client:
        while not client.get("/server_info").json()["internal_states"][0][CHANNEL]["open_pools"]:
            pass
    answers(engine, [[5, 6]], tokens)


def test_a_trajectory_across_an_update_goes_on_with_the_new_weights_and_says_so(
    trainee: SGLangServer, trainer: PreTrainedModel, trained_dir: str, smol_dir: str, chat_ids: ChatIds
) -> None:
    prompt, num_tokens = chat_ids(QUESTIONS[3]), 90
    sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    before = trainee.info.weight_version
    with ThreadPoolExecutor(2) as pool:
        raw = pool.submit(raw_answer, trainee, prompt, num_tokens)
        read = pool.submit(trainee.generate, [Request(tuple(prompt), sampling, hidden=HiddenSpec(segments=SEGMENTS))])
        wait_until_running(trainee, 10)
        after = trainee.update_weights(trainer, running="continue")
        row, (completion,) = raw.result(), read.result()

    first, second = row["meta_info"]["weight_versions"]
    cut = first["end"]
    assert first == {"version": before, "start": 0, "end": cut}
    assert second == {"version": after, "start": cut, "end": num_tokens}
    assert 0 < cut < num_tokens
    assert row["meta_info"]["weight_version"] == after
    assert (completion.mixed_weights, completion.weight_version) == (True, after)
    assert len(completion.response_ids) == num_tokens

    # Tokens, log-probs and states up to the cut are the old model's; behind it they are the new one's, which read the
    # whole prefix again.
    ids = row["output_ids"]
    old, new = (hf_oracle.teacher_force(path, prompt, ids) for path in (smol_dir, trained_dir))
    log_probs_T = torch.tensor([entry[0] for entry in row["meta_info"]["output_token_logprobs"]])
    expected_T = torch.cat([old.log_probs_T[:cut], new.log_probs_T[cut:]])
    torch.testing.assert_close(log_probs_T, expected_T, atol=LOG_PROB_ATOL, rtol=0)
    assert ids == old.argmax_T[:cut] + new.argmax_T[cut:]

    pools = unpack_answer(row["meta_info"][CHANNEL], "row 0", trainee.info.hidden_size).pools.segments
    last = len(prompt) - 1
    produced_TD = torch.cat([old.states_SD[last : last + cut], new.states_SD[last + cut :]])
    all_SD = torch.cat([old.states_SD[: last + cut], new.states_SD[last + cut :]])
    expected = {"prompt": old.states_SD[: last + 1], "response": produced_TD, "full": all_SD}
    for segment, (vector, count) in pools.items():
        assert vector is not None
        assert count == len(expected[segment])
        assert relative_error(vector[0], expected[segment].mean(0)) < STATE_RTOL, segment


def test_a_prompt_across_an_update_is_of_one_model(
    trainee: SGLangServer, trainer: PreTrainedModel, trained_dir: str, smol_dir: str
) -> None:
    """A prompt taken out between two chunks has no token yet to tell that its first rows are of old weights."""
    prompt = tuple(prompt_of(1000, seed=77))
    spec = HiddenSpec(("prompt",), spans={"start": TokenMask("m")}, tokens=True)
    spans = {"start": PromptSpan(((0, 100),))}
    request = Request(prompt, {"max_new_tokens": 1, "temperature": 0.0}, hidden=spec, spans=spans)
    before = trainee.info.weight_version
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(trainee.generate, [request])
        with httpx.Client(base_url=trainee.url, timeout=60) as client:
            while not client.get("/server_info").json()["internal_states"][0][CHANNEL]["open_pools"]:
                assert not read.done(), "too quick for an update in the middle"
        # Of a directory, which is there already: the prompt's chunks do not wait for it to be written.
        after = trainee.update_weights(Path(trained_dir), running="continue")
        (completion,) = read.result()
    assert not completion.mixed_weights
    model_dir = {before: smol_dir, after: trained_dir}[completion.weight_version]
    assert completion.weight_version == after, "the prompt was in before the update, which then shows nothing"
    assert_completion(request, completion, model_dir, 30)


def test_an_update_waits_for_what_runs(trainee: SGLangServer, trainer: PreTrainedModel, chat_ids: ChatIds) -> None:
    before = trainee.info.weight_version
    with ThreadPoolExecutor(1) as pool:
        raw = pool.submit(raw_answer, trainee, chat_ids(QUESTIONS[3]), 60)
        wait_until_running(trainee, 5)
        trainee.update_weights(trainer)
        assert raw.done() or raw.result(timeout=5)
    assert raw.result()["meta_info"]["weight_versions"] == [{"version": before, "start": 0, "end": 60}]


def test_a_request_whose_client_hung_up_leaves_no_stale_cache(
    trainee: SGLangServer, trainer: PreTrainedModel, trained_dir: str, chat_ids: ChatIds
) -> None:
    """SGLang's update does not wait for it and cannot flush beside it."""
    prompt, routes, call = chat_ids(QUESTIONS[0]), [], trainee._endpoints[0].call

    def noted(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        routes.append(route)
        return call(route, payload)

    answers(trainee, [prompt])
    sampling = {"max_new_tokens": 200, "ignore_eos": True}
    body = {"stream": True, "input_ids": [prompt] * 4, "sampling_params": sampling}
    # Everything is read before, so that the update comes right behind the hang-up.
    endpoint, state = trainee._endpoints[0], dict(trainer.state_dict())
    endpoint.call = noted  # type: ignore[method-assign]
    try:
        with httpx.stream("POST", f"{trainee.url}/generate", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            for _ in range(5):
                next(lines)
        endpoint.load(
            "disk", WeightUpdate(tensors=state, version="hung-up", running="finish", directory=Path(trained_dir))
        )
    finally:
        del endpoint.call  # type: ignore[method-assign]
    assert routes[1:] == ["pause_generation", "flush_cache", "update_weight_version", "continue_generation"]
    (after,) = answers(trainee, [prompt])
    assert_answered_with(after, trained_dir)
    assert after.weight_version == endpoint.weight_version() == "hung-up"


DYING_TRAINER = """
import os, sys
from torchrl_sglang_hidden import connect
from torchrl_sglang_hidden.weights import network
from torchrl_sglang_hidden.weights.validation import open_weights

def send(group, values):
    for index, value in enumerate(values.values()):
        if index == 100:
            os._exit(9)
        group.broadcast(value, 0).wait()

network._send = send
weights = {name: 2 * value for name, value in open_weights(sys.argv[2]).items()}
connect(sys.argv[1]).update_weights(weights, transport="network", version="dead")
"""


def test_a_trainer_that_dies_while_it_sends(trainee: SGLangServer, smol_dir: str, chat_ids: ChatIds) -> None:
    version = trainee.info.weight_version
    command = [sys.executable, "-c", DYING_TRAINER, trainee.url, smol_dir]
    assert subprocess.run(command, timeout=120, check=False).returncode == 9
    (after,) = answers(trainee, [chat_ids(QUESTIONS[0])], 2)
    assert_answered_with(after, smol_dir)
    assert after.weight_version == version
    # What it left open, the server half has closed.
    assert trainee.update_weights(smol_dir, transport="network") == trainee.info.weight_version != version


# --- in this process ------------------------------------------------------------------------------------------------


class InProcess:
    """Collected by the process that `in_process_log` starts, and not by name in this one."""

    def test_new_weights(
        self, in_process: SGLangOffline, trainer: PreTrainedModel, trained_dir: str, smol_dir: str, chat_ids: ChatIds
    ) -> None:
        prompt = chat_ids(QUESTIONS[0])

        def assert_serves(model_dir: str, version: str) -> None:
            (completion,) = answers(in_process, [prompt])
            assert completion.weight_version == version
            assert_answered_with(completion, model_dir)

        assert_serves(smol_dir, "default")
        in_process.update_weights(trainer)
        assert_serves(trained_dir, "1")
        in_process.update_weights(smol_dir, version="named")
        assert_serves(smol_dir, "named")
        refused: list[tuple[Any, dict[str, Any], type[Exception]]] = [
            ({"model.norm.weight": torch.zeros(576)}, {}, WeightsError),
            (trainer, {"transport": "network"}, CapabilityError),
            (trainer, {"version": "named"}, InputError),
        ]
        for weights, options, expected in refused:
            with pytest.raises(expected) as caught:
                in_process.update_weights(weights, **options)
            assert type(caught.value) is expected
        assert_serves(smol_dir, "named")

        sampling = {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True}
        long = Request(tuple(prompt), sampling, hidden=HiddenSpec(segments=SEGMENTS))
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(in_process.generate, [long])
            answers(in_process, [prompt])  # beside it, so that it has some tokens by now
            in_process.update_weights(trainer, running="continue")
            (across,) = running.result()
        assert across.mixed_weights
        assert len(across.response_ids) == 60
        restore(in_process)


def test_in_process(in_process_log: str) -> None:
    assert "test_weights_engine.py::InProcess::test_new_weights PASSED" in in_process_log
