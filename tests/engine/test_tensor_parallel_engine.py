"""Two tensor-parallel ranks on the CPU engine, against Hugging Face on the same weights.

Each rank computes a part of every layer, and each runs the server half. No answer may show that.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from helpers import heads_oracle, held_rank, hf_oracle, user_constraints
from helpers.completion_checks import assert_completion
from helpers.logits_checks import check_choices, positioned
from helpers.policy_checks import (
    CHUNKED_PREFILL_SIZE,
    LOG_PROB_ATOL,
    QUESTIONS,
    SEGMENTS,
    STATE_RTOL,
    history_input,
    make_policy,
    prompt_of,
    relative_error,
    tokens_input,
)
from helpers.reference_pooling import pool
from helpers.user_constraints import FAR, NUM_SETTINGS, NoImmediateRepeat, Tell, TellSettings
from helpers.weight_changes import answers, assert_answered_with, load_trainer, perturb
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    ActionMask,
    Between,
    DisallowedTokens,
    Every,
    HeadSpec,
    HiddenSpec,
    LastTokens,
    LogitsSpec,
    RequestRejectedError,
    SGLangHiddenWrapper,
    TemperatureScale,
    TokenMask,
    launch,
)
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.spec.hidden import POOLINGS
from torchrl_sglang_hidden.spec.logits import STAGES
from torchrl_sglang_hidden.spec.spans import PromptSpan

Policy = Callable[..., SGLangHiddenWrapper]

NUM_LAYERS = 4
LAYERS = (0, 1, 3, -1)
# What SGLang's log says when a rank has new weights.
WEIGHTS_LOADED = "Update weights end."
GREEDY = {"max_new_tokens": 6, "temperature": 0.0}
# One token, a few, around the chunk size, and three chunks.
LENGTHS = (1, 3, 17, CHUNKED_PREFILL_SIZE, CHUNKED_PREFILL_SIZE + 1, 2 * CHUNKED_PREFILL_SIZE + 22)
TOKEN = re.compile(r"/dev/shm/torchrl_sglang_hidden-[0-9a-f]{16}")
SELECTIONS: list[dict[str, Any]] = [{"full": True}, {"top_k": 7}, {"token_ids": (5, 3, 48000, 100)}]


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a FIFO holds the second rank before it reads new weights."""
    return tmp_path_factory.mktemp("ranks") / "gate"


@pytest.fixture(scope="module")
def ranks(qwen3_dir: str, gate: Path) -> Iterator[LaunchedServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(held_rank.GATE_ENV, str(gate))
        patch.delenv("OMP_NUM_THREADS", raising=False)  # as a user's environment is: the launch divides the cores
        server = launch(
            qwen3_dir,
            tp_size=2,
            dtype="float32",
            layers=tuple(range(NUM_LAYERS)),
            constraint_modules=(user_constraints.__name__, held_rank.__name__),
            chunked_prefill_size=CHUNKED_PREFILL_SIZE,
            context_length=1024,
            max_total_tokens=4096,
            sleep_on_idle=True,
            log_file=gate.with_name("server.log"),
        )
    with server:
        yield server


@pytest.fixture
def policy(ranks: LaunchedServer, tokenizer: PreTrainedTokenizerBase) -> Policy:
    return functools.partial(make_policy, ranks, tokenizer)


def ask(
    ranks: LaunchedServer, model_dir: str, spec: HiddenSpec, prompts: list[list[int]], **fields: Any
) -> list[Completion]:
    """Send greedy requests twice and check both: the second finds the prompts in the prefix cache."""
    requests = [replace(Request(tuple(ids), GREEDY, hidden=spec), **fields) for ids in prompts]
    for _ in range(2):
        completions = ranks.generate(requests)
        for request, completion in zip(requests, completions, strict=True):
            assert_completion(request, completion, model_dir, NUM_LAYERS)
    return completions


def prompts(seed: int) -> list[list[int]]:
    return [prompt_of(length, 100 * seed + length) for length in LENGTHS]


def test_two_ranks_serve_and_the_server_half_is_whole(ranks: LaunchedServer) -> None:
    assert httpx.get(f"{ranks.url}/server_info", trust_env=False).json()["tp_size"] == 2
    log = ranks.log_path.read_text()
    assert " TP0]" in log
    assert " TP1]" in log
    assert ranks.info.pools_in_server
    assert ranks.info.no_states_because == ""
    assert ranks.info.layers == tuple(range(-1, NUM_LAYERS))


def test_the_settings_reach_the_scheduler(ranks: LaunchedServer) -> None:
    """Each rank has its share of the cores, its threads do not spin while the other works, freed memory is kept."""
    spec = LogitsSpec(token_ids=tuple(range(NUM_SETTINGS)), stage="processed")
    request = Request((5, 6, 7), {"max_new_tokens": 1}, logits=spec, constraints=(TellSettings(),))
    logits = ranks.generate([request])[0].logits
    assert logits is not None
    assert (logits.values_NC[0] + FAR).tolist() == [max(1, len(os.sched_getaffinity(0)) // 2), 1, 1, 1]


# --- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_segment_and_layer(ranks: LaunchedServer, qwen3_dir: str, pooling: Any) -> None:
    ask(ranks, qwen3_dir, HiddenSpec(SEGMENTS, pooling, LAYERS), prompts(1))
    for seed, segment in enumerate(SEGMENTS, start=2):
        ask(ranks, qwen3_dir, HiddenSpec((segment,), pooling), prompts(seed)[2:5])
        ask(ranks, qwen3_dir, HiddenSpec((segment,), pooling, layers=2), prompts(seed)[2:5])


def test_a_prompt_alone(ranks: LaunchedServer, qwen3_dir: str) -> None:
    for pooling in POOLINGS:
        completions = ask(
            ranks, qwen3_dir, HiddenSpec(("prompt",), pooling, LAYERS), prompts(5), sampling={"max_new_tokens": 0}
        )
        assert all(completion.response_ids == () for completion in completions)


@pytest.mark.parametrize("near", [True, False], ids=["shared-memory", "text"])
@pytest.mark.parametrize("segments", [("prompt",), ("response",), ("full",)])
def test_the_states_of_every_token(
    ranks: LaunchedServer, qwen3_dir: str, segments: Any, near: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ranks.info.shares_memory
    if not near:
        monkeypatch.setattr(ranks._endpoints[0], "info", replace(ranks.info, shares_memory=False))
    # The last is over the bytes from which an answer becomes a file.
    asked = [*prompts(6), prompt_of(300, 650)]
    ask(ranks, qwen3_dir, HiddenSpec(segments, "mean", LAYERS, tokens=True), asked)
    ask(ranks, qwen3_dir, HiddenSpec(segments, None, tokens=True), asked[:4])


def shared_files(ranks: LaunchedServer) -> tuple[set[str], list[Path]]:
    """Return the tokens of the server's processes that share memory, and the data files that lie there of them.

    Each such process holds a lock on its sign open, and the other servers of a test run are not looked at.
    """
    tokens = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or a file was closed
            if os.getpgid(int(process.name)) != ranks.pid:
                continue
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    found = TOKEN.match(os.readlink(descriptor))
                    tokens |= {found[0]} if found else set()
    return tokens, [path for token in tokens for path in Path("/dev/shm").glob(f"{Path(token).name}-[0-9]*")]


def test_nothing_stays_in_shared_memory(ranks: LaunchedServer, qwen3_dir: str) -> None:
    """Every rank computes all rows, and only one is asked for them: no other may write files that nobody fetches."""
    spec = HiddenSpec(("full",), None, LAYERS, tokens=True)
    ask(ranks, qwen3_dir, spec, [prompt_of(300, 660 + row) for row in range(4)])
    tokens, files = shared_files(ranks)
    assert tokens, "no process shares memory: tests nothing"
    assert files == []


@pytest.mark.parametrize("pooling", POOLINGS)
def test_spans(ranks: LaunchedServer, qwen3_dir: str, pooling: Any) -> None:
    for ids in prompts(7)[2:]:
        resolved = {
            "tail": LastTokens(3),
            "thirds": PromptSpan(tuple((place, place + 1) for place in range(1, len(ids), 3))),
            "middle": PromptSpan(((4, 15),)),
        }
        asked = {name: TokenMask("mask") if isinstance(span, PromptSpan) else span for name, span in resolved.items()}
        spec = HiddenSpec(("prompt", "response"), pooling, layers=(0, -1), spans=asked)
        ask(ranks, qwen3_dir, spec, [ids], spans=resolved)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_between_markers(policy: Policy, tokenizer: PreTrainedTokenizerBase, qwen3_dir: str, pooling: Any) -> None:
    """Of the prompt, found by the client, and of the response, found by the server half on rank 0 alone."""
    begin, end = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (" capital", "."))
    asking = policy("history", pooling=pooling).get_new_version(
        hidden=HiddenSpec(
            SEGMENTS,
            pooling,
            spans={"said": Between("user\n", "<|im_end|>", "prompt"), "inside": Between(" capital", ".")},
        ),
        # A random model would never say the markers.
        constraints=(ActionMask((begin,), positions=(1,)), ActionMask((end,), positions=(5,))),
    )
    out = asking(history_input(QUESTIONS[:3]))
    for row in range(3):
        prompt = out.get(("tokens", "prompt"), as_list=True)[row].tolist()
        response = out.get(("tokens", "response"), as_list=True)[row].tolist()
        truth = hf_oracle.teacher_force(qwen3_dir, prompt, response)
        question = tokenizer(QUESTIONS[row])["input_ids"]
        (start,) = [at for at in range(len(prompt)) if prompt[at : at + len(question)] == question]
        expected = {
            "said": truth.rows("prompt")[start : start + len(question)],
            "inside": truth.rows("response")[2:5],
        }
        for name, rows_ND in expected.items():
            assert int(out["hidden_states"].span_counts[name][row]) == len(rows_ND), name
            vector_D = pool(rows_ND.double(), pooling).float()
            assert relative_error(out["hidden_states"].spans[name][row], vector_D) < STATE_RTOL


# --- logits, constraints, scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_logits(ranks: LaunchedServer, qwen3_dir: str, stage: Any) -> None:
    """Each rank has the logits of half of the vocabulary; what comes back has all of them, the prompt's too."""
    requests = [
        Request(
            tuple(ids),
            {"max_new_tokens": 4, "temperature": (1.0, 0.7, 0.0)[index % 3]},
            logits=LogitsSpec(**selection, stage=stage, segments=segments),
            constraints=(ActionMask((5, *range(30000, 30040), 49151)),) if index % 2 else (),
        )
        for index, (ids, selection, segments) in enumerate(
            itertools.product(prompts(8)[2:], SELECTIONS, [("response",), ("full",)])
        )
    ]
    for _ in range(2):
        check_choices(ranks, requests, qwen3_dir)


def test_constraints_act_on_exactly_their_tokens(ranks: LaunchedServer, qwen3_dir: str) -> None:
    """Those of the package and a user's own, whose code runs on both ranks."""
    requests = positioned(prompts(9), 8, own=True)
    completions = check_choices(ranks, requests, qwen3_dir)
    assert {len(completion.response_ids) for completion in completions} == {8}


@pytest.mark.parametrize("stage", STAGES)
def test_scores(ranks: LaunchedServer, qwen3_dir: str, stage: Any) -> None:
    ids = tuple(prompt_of(2 * CHUNKED_PREFILL_SIZE + 12, 1000))
    whole = Request(ids, {"max_new_tokens": 0}, False, score_prompt=True)
    constraints = [
        (ActionMask([*ids[::2], 5]),),
        (DisallowedTokens(range(0, 49152, 2), positions=(0, 2, 5)), TemperatureScale([2.0, 3.0])),
        (NoImmediateRepeat(), Tell(positions=(1, 3))),
    ]
    requests = [whole, replace(whole, score_from=70, hidden=HiddenSpec(("prompt",), layers=LAYERS))]
    requests += [
        replace(
            whole,
            constraints=chosen,
            response_ranges=((20, 40), (90, 130)),
            logits=LogitsSpec(**selection, stage=stage, segments=("prompt",)),
        )
        for chosen, selection in zip(constraints, SELECTIONS, strict=True)
    ]
    for _ in range(2):
        check_choices(ranks, requests, qwen3_dir)


@pytest.fixture(scope="module")
def heads(ranks: LaunchedServer) -> Iterator[tuple[str, ...]]:
    """Heads of three layers that every rank has; `assert_completion` knows them."""
    names = heads_oracle.STORM_HEADS
    for name in names:
        ranks.push_head(name, heads_oracle.storm_head(name, ranks.info.hidden_size))
    yield names
    for name in names:
        ranks.drop_head(name)


@pytest.mark.parametrize("pooling", [None, *POOLINGS])
def test_scores_of_heads(ranks: LaunchedServer, qwen3_dir: str, heads: tuple[str, ...], pooling: Any) -> None:
    """Of every token or of whole segments, and of each third token, beside states of other layers and alone."""
    spec = HeadSpec(heads, SEGMENTS, pooling=pooling, spans={"thirds": Every(3)})
    fields: dict[str, Any] = {"heads": spec, "head_spans": spec.spans}
    ask(ranks, qwen3_dir, HiddenSpec(SEGMENTS, layers=(1, -1)), prompts(14), **fields)
    requests = [
        Request(tuple(ids), GREEDY, heads=HeadSpec((name,))) for name, ids in zip(heads, prompts(15)[2:5], strict=True)
    ]
    for request, completion in zip(requests, ranks.generate(requests), strict=True):
        assert_completion(request, completion, qwen3_dir, NUM_LAYERS)


def test_heads_that_ranks_do_not_take(ranks: LaunchedServer, heads: tuple[str, ...]) -> None:
    """What each rank refuses is refused once, and they go on together."""
    head = heads_oracle.make_head("linear", ranks.info.hidden_size)
    with pytest.raises(RequestRejectedError, match="no head 'absent'"):
        ranks.drop_head("absent")
    version = ranks.push_head("twice", head)
    with pytest.raises(RequestRejectedError, match=r"has version .* with other weights"):
        ranks.push_head("twice", heads_oracle.make_head("linear", ranks.info.hidden_size, seed=1), version=version)
    ranks.drop_head("twice")
    ruled = Request((5, 6, 7), GREEDY, heads=HeadSpec(heads, stop_when=f"{heads[0]} > 0"))
    with pytest.raises(RequestRejectedError, match=r"stop_when=.* with 2 tensor-parallel ranks"):
        ranks.generate([ruled])
    assert len(ranks.generate([Request((5, 6, 7), GREEDY, heads=HeadSpec(heads))])[0].scores) == len(heads)


def test_candidates(policy: Policy, qwen3_dir: str) -> None:
    asked, candidates = prompts(11), [prompt_of(1 + index % 4, 1150 + index) for index in range(5)]
    out = policy().score(tokens_input(asked), candidates)
    for row, prompt in enumerate(asked):
        expected = [hf_oracle.teacher_force(qwen3_dir, prompt, ids).log_probs_T.sum() for ids in candidates]
        torch.testing.assert_close(out["logits"][row], torch.stack(expected), atol=4 * LOG_PROB_ATOL, rtol=0)


# --- new weights ----------------------------------------------------------------------------------------------------


def test_an_update_waits_for_every_rank(ranks: LaunchedServer, qwen3_dir: str, gate: Path, tmp_path: Path) -> None:
    """The first rank has the weights before the second, held here, looks for their files, which exist till then."""
    trainer = perturb(load_trainer(qwen3_dir), seed=1)
    trainer.save_pretrained(tmp_path)
    loaded = f"TP0] {WEIGHTS_LOADED}"
    before = ranks.log_path.read_text().count(loaded)
    os.mkfifo(gate)
    try:
        with ThreadPoolExecutor() as pool:
            update = pool.submit(ranks.update_weights, trainer, transport="disk")
            try:
                while ranks.log_path.read_text().count(loaded) == before:
                    assert not wait([update], timeout=0.05).done
                assert not wait([update], timeout=1).done
            finally:
                # Opened when the second rank has: that lets it go on.
                with gate.open("w"):
                    gate.unlink()
            version = update.result()
        for completion in answers(ranks, prompts(13)):
            assert_answered_with(completion, str(tmp_path))
            assert completion.weight_version == version
    finally:
        ranks.update_weights(qwen3_dir)


def test_new_weights(ranks: LaunchedServer, qwen3_dir: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every rank takes its part of them, and forgets its prefix sums of the old ones: the prompts are the same."""
    trained_dir = tmp_path_factory.mktemp("trained")
    trainer = perturb(load_trainer(qwen3_dir))
    trainer.save_pretrained(trained_dir)
    asked = prompts(12)
    for completion in answers(ranks, asked):
        assert_answered_with(completion, qwen3_dir)
    try:
        version = ranks.update_weights(trainer, transport="disk")
        for completion in answers(ranks, asked) + answers(ranks, asked):
            assert_answered_with(completion, str(trained_dir))
            assert completion.weight_version == version
    finally:
        ranks.update_weights(qwen3_dir)
    for completion in answers(ranks, asked):
        assert_answered_with(completion, qwen3_dir)
