"""Constraints on a real server: every token of every response, and what a user's own constraint is told.

Most of it on a random Qwen3 behind overlap scheduling, with chunks of 32, mixed chunks and a KV cache so small that
requests are retracted. What each token was drawn from is held against Hugging Face's logits, which
helpers/logits_checks.py changes.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from helpers import user_constraints
from helpers.broken_processors import refusals
from helpers.completion_checks import assert_completion
from helpers.logits_checks import SUM_ATOL, assert_choices, check_choices, logits_of, positioned, with_context
from helpers.policy_checks import SEGMENTS, assert_rows, make_policy, prompt_of, tokens_input
from helpers.user_constraints import FAR, NUM_TOLD, Fails, NoImmediateRepeat, Tell
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    ActionMask,
    ConstraintError,
    DisallowedTokens,
    HiddenSpec,
    LogitConstraint,
    LogitsSpec,
    SGLangOffline,
    TemperatureScale,
    launch,
)
from torchrl_sglang_hidden.engines import BatchingEngine, endpoint
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.server.cpu import cpu_engine_environment, has_accelerator
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.sampling import to_sglang
from torchrl_sglang_hidden.spec.constraints import LinearSchedule
from torchrl_sglang_hidden.spec.logits import STAGES

NUM_LAYERS = 4
CHUNK = 32
POOL_TOKENS = 1280


@pytest.fixture(scope="module")
def chooser(qwen3_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    with launch(
        qwen3_dir,
        dtype="float32",
        constraint_modules=(user_constraints.__name__,),
        enable_custom_logit_processor=True,
        context_length=512,
        chunked_prefill_size=CHUNK,
        enable_mixed_chunk=True,
        max_total_tokens=POOL_TOKENS,
        max_running_requests=24,
        # Admits more than there is room for, so that decoding runs out of it.
        schedule_conservativeness=0.05,
        sleep_on_idle=True,
        log_file=tmp_path_factory.mktemp("chooser") / "server.log",
    ) as server:
        yield server


def retractions(server: LaunchedServer) -> int:
    return Path(server.log_path).read_text().count("Retract requests")


def short_prompts(seed: int) -> list[list[int]]:
    return [prompt_of(1 + (7 * index) % 19, seed + index) for index in range(10)]


# --- masks ----------------------------------------------------------------------------------------------------------

MASKED, UNMASKED, LENGTH = 115, 9, 90


def test_not_one_of_ten_thousand_tokens_is_outside_its_mask(chooser: LaunchedServer, qwen3_dir: str) -> None:
    """Every row has a mask of its own, of 1 to 400 tokens without the end of the text; some rows have none."""
    chance = random.Random(0)
    vocabulary, eos_id = range(3, chooser.info.vocab_size), 2
    masks = [tuple(sorted(chance.sample(vocabulary, chance.choice((1, 2, 5, 50, 400))))) for _ in range(MASKED)]
    requests = [
        Request(
            tuple(prompt_of(1 + row % 9, 7000 + row)),
            {"max_new_tokens": LENGTH, "temperature": (1.0, 0.7, 4.0)[row % 3]},
            logits=LogitsSpec(token_ids=mask, stage="processed")
            if row % 2
            else LogitsSpec(top_k=len(mask), stage="processed"),
            constraints=(ActionMask(mask),)
            if row % 5
            else (DisallowedTokens(set(range(chooser.info.vocab_size)) - set(mask)),),
        )
        for row, mask in enumerate(masks)
    ]
    greedy = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "temperature": 0.0}
    plain = [Request(tuple(prompt_of(4 + row, 7500 + row)), greedy) for row in range(UNMASKED)]
    alone = [completion for request in plain for completion in chooser.generate([request])]
    mixed = [*requests]
    for row, request in enumerate(plain):
        mixed.insert(12 * row, request)
    completions = dict(zip(map(id, mixed), chooser.generate(mixed), strict=True))

    num_tokens = 0
    for request, mask in zip(requests, masks, strict=True):
        completion = completions[id(request)]
        num_tokens += len(completion.response_ids)
        outside = set(completion.response_ids) - set(mask)
        assert not outside, f"{len(outside)} tokens outside a mask of {len(mask)}"
        assert completion.logits is not None
        assert completion.log_probs_T is not None
        found = completion.logits
        ids_TC = torch.tensor(mask).expand(LENGTH, -1) if found.token_ids_NC is None else found.token_ids_NC
        assert (ids_TC.sort(-1).values == torch.tensor(mask)).all(), "the largest are not those of the mask"
        # Of the engine's log-prob and the logits follows what the log-probs of the mask sum to.
        places_T1 = (ids_TC == torch.tensor(completion.response_ids)[:, None]).nonzero()[:, 1:]
        chosen_T = found.values_NC.gather(1, places_T1)[:, 0]
        totals_T = (found.values_NC - chosen_T[:, None] + completion.log_probs_T[:, None]).exp().sum(-1)
        torch.testing.assert_close(totals_T, torch.ones(LENGTH), atol=SUM_ATOL, rtol=0)
        raw_TV = logits_of(qwen3_dir, (*completion.prompt_ids, *completion.response_ids))[-LENGTH - 1 : -1]
        expected_TC = (raw_TV[:, list(mask)] / request.sampling["temperature"]).log_softmax(-1)
        columns_T1 = (torch.tensor(mask) == torch.tensor(completion.response_ids)[:, None]).nonzero()[:, 1:]
        torch.testing.assert_close(completion.log_probs_T, expected_TC.gather(1, columns_T1)[:, 0], atol=1.5e-3, rtol=0)
    assert num_tokens > 10_000
    assert eos_id not in itertools.chain.from_iterable(masks)

    for request, expected in zip(plain, alone, strict=True):
        found_one = completions[id(request)]
        assert found_one.response_ids == expected.response_ids
        # A batch of another size is summed in another order.
        torch.testing.assert_close(found_one.log_probs_T, expected.log_probs_T, atol=5e-5, rtol=0)


def test_the_engines_own_log_probs_sum_to_one_over_the_mask(chooser: LaunchedServer) -> None:
    """Measured with SGLang's own ``token_ids_logprob``, which does not pass through this package."""
    masks = [(7, 8, 9), tuple(range(1000, 1200)), (40000,)]
    requests = [
        Request(
            tuple(prompt_of(8, 7600 + row)),
            {"max_new_tokens": 20, "temperature": 0.6},
            constraints=(ActionMask(mask), TemperatureScale([2.0, 1.0, 0.5])),
        )
        for row, mask in enumerate(masks)
    ]
    payload = to_payload(requests, chooser.info, binary=False)
    payload["token_ids_logprob"] = [list(mask) for mask in masks]
    rows = httpx.post(f"{chooser.url}/generate", json=payload, timeout=120).raise_for_status().json()
    for mask, row in zip(masks, rows, strict=True):
        tokens = row["meta_info"]["output_token_ids_logprobs"]
        assert len(tokens) == 20
        for token in tokens:
            assert [token_id for _, token_id, _ in token] == list(mask)
            assert abs(sum(math.exp(log_prob) for log_prob, _, _ in token) - 1) < SUM_ATOL


# --- exactly the right token ----------------------------------------------------------------------------------------


def test_every_constraint_acts_on_exactly_its_tokens(chooser: LaunchedServer, qwen3_dir: str) -> None:
    check_choices(chooser, positioned(short_prompts(8000), 9, own=True), qwen3_dir)


def test_behind_a_prompt_of_several_chunks(chooser: LaunchedServer, qwen3_dir: str) -> None:
    """Run twice: the second time the prompt is in the prefix cache."""
    prompts = [prompt_of(CHUNK * 3 + row, 8100 + row) for row in (-1, 0, 1)]
    for _ in range(2):
        check_choices(chooser, positioned(prompts, 7, own=True), qwen3_dir)


def test_with_prompts_that_come_while_others_decode(chooser: LaunchedServer, qwen3_dir: str) -> None:
    calls = [[request] for request in positioned(short_prompts(8200), 24, own=True)]
    calls += [[request] for request in positioned([prompt_of(75 + row, 8250 + row) for row in range(5)], 6, own=True)]
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = list(pool.map(chooser.generate, calls))
    for [request], [completion] in zip(calls, answers, strict=True):
        assert_choices(request, completion, qwen3_dir)


def test_after_a_retraction(chooser: LaunchedServer, qwen3_dir: str) -> None:
    """More decodes than the KV cache holds: some are thrown out in the middle, and go on where they were."""
    length = 80
    for attempt in range(5):
        before, prompts = retractions(chooser), [prompt_of(30 + row, 8300 + 20 * attempt + row) for row in range(16)]
        requests = [
            replace(request, logits=replace(request.logits, full=False, top_k=9))
            for _ in range(2)
            for request in positioned(prompts, length, own=True)
        ]
        whole = LogitsSpec(top_k=3, segments=("full",))
        requests = [replace(r, logits=whole) if row % 4 == 0 else r for row, r in enumerate(requests)]
        check_choices(chooser, requests, qwen3_dir)
        if retractions(chooser) > before:
            return
    raise AssertionError("nothing was retracted, so nothing was shown")


def test_in_the_later_turns_of_a_session(chooser: LaunchedServer, qwen3_dir: str) -> None:
    with chooser.session() as session:
        for turn, request in enumerate(positioned(short_prompts(8400), 7, own=True)):
            completion = session.generate(request)
            assert (len(completion.prompt_ids) > len(request.prompt_ids)) == (turn > 0)
            assert_choices(with_context(request, completion), completion, qwen3_dir)


def test_in_streams(chooser: LaunchedServer, qwen3_dir: str) -> None:
    requests = positioned(short_prompts(8500), 7, own=True)
    for request in requests:
        stream = chooser.stream(request)
        ids = [token_id for chunk in stream for token_id in chunk.ids]
        assert tuple(ids) == stream.completion.response_ids
        assert_choices(request, stream.completion, qwen3_dir)

    async def read(request: Request) -> Completion:
        stream = await chooser.astream(request)
        async for _ in stream:
            pass
        return stream.completion

    async def all_at_once() -> list[Completion]:
        return await asyncio.gather(*map(read, requests))

    for request, completion in zip(requests, asyncio.run(all_at_once()), strict=True):
        assert_choices(request, completion, qwen3_dir)


def test_in_calls_that_share_a_batch(chooser: LaunchedServer, qwen3_dir: str) -> None:
    requests = positioned(short_prompts(8600), 7, own=True)
    with (
        BatchingEngine(chooser, min_batch_size=len(requests), timeout_s=60) as engine,
        ThreadPoolExecutor(len(requests)) as pool,
    ):
        answers = list(pool.map(lambda request: engine.generate([request]), requests))
    for request, [completion] in zip(requests, answers, strict=True):
        assert_choices(request, completion, qwen3_dir)


class InProcess:
    """Collected by the process that `in_process_log` starts, and not by name in this one."""

    def test_constraints_act_on_exactly_their_tokens(self, in_process: SGLangOffline, smol_dir: str) -> None:
        assert "tell" in in_process.info.constraints
        for prompts in (short_prompts(8650), [prompt_of(150 + row, 8680 + row) for row in range(2)]):
            check_choices(in_process, positioned(prompts, 7, own=True), smol_dir)

    def test_in_a_session_and_in_a_stream(self, in_process: SGLangOffline, smol_dir: str) -> None:
        requests = positioned(short_prompts(8690), 6, own=True)
        with in_process.session() as session:
            for request in requests:
                completion = session.generate(request)
                assert_choices(with_context(request, completion), completion, smol_dir)
        for request in requests:
            stream = in_process.stream(request)
            assert tuple(token_id for chunk in stream for token_id in chunk.ids) == stream.completion.response_ids
            assert_choices(request, stream.completion, smol_dir)

    def test_logits_of_a_prompt_and_its_scores(self, in_process: SGLangOffline, smol_dir: str) -> None:
        ids = tuple(prompt_of(90, 8695))
        spec = LogitsSpec(full=True, segments=("full",))
        sampled = Request(ids, {"max_new_tokens": 5, "temperature": 1.0}, logits=spec)
        scored = Request(
            ids,
            {"max_new_tokens": 0},
            False,
            score_prompt=True,
            logits=replace(spec, stage="processed", segments=("prompt",)),
            constraints=(ActionMask(ids[:70]),),
            response_ranges=((50, 90),),
        )
        for _ in range(2):
            check_choices(in_process, [sampled, scored, replace(scored, score_from=60, logits=None)], smol_dir)


def test_in_process(in_process_log: str) -> None:
    assert "InProcess::test_constraints_act_on_exactly_their_tokens PASSED" in in_process_log


# --- a constraint of the user's own ---------------------------------------------------------------------------------


def test_no_token_repeats_the_one_before_it(chooser: LaunchedServer) -> None:
    """With so few allowed tokens, a constraint that saw the ids one token late would soon let a token repeat."""
    requests = [
        Request(
            tuple(prompt_of(5 + row, 8700 + row)),
            {"max_new_tokens": 100, "temperature": 1.0},
            constraints=(ActionMask(range(600, 600 + width)), NoImmediateRepeat(), TemperatureScale(50.0)),
        )
        for row, width in enumerate((2, 3, 3, 4, 2, 3))
    ]
    pairs = [pair for one in chooser.generate(requests) for pair in itertools.pairwise(one.response_ids)]
    assert len(pairs) > 500
    assert not [pair for pair in pairs if pair[0] == pair[1]]
    free = [replace(request, constraints=request.constraints[::2]) for request in requests]
    pairs = [pair for one in chooser.generate(free) for pair in itertools.pairwise(one.response_ids)]
    assert [pair for pair in pairs if pair[0] == pair[1]], "without it nothing repeats either: nothing was shown"


def test_what_it_is_told(chooser: LaunchedServer) -> None:
    request = Request(
        tuple(prompt_of(40, 8800)),
        {"max_new_tokens": 12, "min_new_tokens": 12, "temperature": 1.0},
        logits=LogitsSpec(token_ids=range(NUM_TOLD), stage="processed"),
        constraints=(Tell(),),
    )
    [completion] = chooser.generate([request])
    assert completion.logits is not None
    ids = [-1, -1, *completion.response_ids]
    for index, told in enumerate((completion.logits.values_NC + FAR).int().tolist()):
        assert told[:4] == [index, 12, 40, request.prompt_ids[-1]]
        assert told[4:7] == [index, ids[index + 1], ids[index]]
        assert told[7] == sum(completion.response_ids[:index]) % 65521


FAULTS = {
    "raises": r"fails failed at token 2 of the response: ValueError\('on purpose'\)",
    "nan": r"token 2 of the response: 0 tokens.*\(fails; one that gives NaN",
    "one nan": r"token 2 of the response: 0 tokens.*\(fails; one that gives NaN",
    "infinity": r"token 2 of the response: 0 tokens.*\(fails; one that gives NaN",
    "nothing left": r"token 2 of the response: 0 tokens.*\(fails",
    "wrong shape": r"fails failed at token 2 of the response.*\(49152,\)",
    "wrong dimensions": r"fails failed at token 2 of the response.*\(49152,\)",
    "no tensor": "fails failed at token 2 of the response.*None",
    "words": "fails failed at token 2 of the response.*please",
}


@pytest.mark.parametrize("how", FAULTS)
def test_one_that_fails_harms_nobody_else(chooser: LaunchedServer, qwen3_dir: str, how: str) -> None:
    prompts = short_prompts(8900)
    good = positioned(prompts, 6, own=True)
    bad = replace(good[0], constraints=(Fails(how, at=2),))
    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(chooser.generate, [good[1], bad])
        answers = pool.submit(chooser.generate, good)
        with pytest.raises(ConstraintError, match=FAULTS[how]) as caught:
            failing.result()
        for request, completion in zip(good, answers.result(), strict=True):
            assert_choices(request, completion, qwen3_dir)
    assert str(caught.value).startswith("row 1")
    # Where it does not act it does not fail.
    check_choices(chooser, [replace(good[0], constraints=(Fails(how, positions=(1, 4), at=2),))], qwen3_dir)


def test_one_that_fails_where_a_prompt_is_scored(chooser: LaunchedServer, qwen3_dir: str) -> None:
    ids = tuple(prompt_of(20, 9000))
    scored = Request(ids, {"max_new_tokens": 0}, False, score_prompt=True, response_ranges=((5, 20),))
    for how in FAULTS:
        with pytest.raises(ConstraintError):
            chooser.generate([replace(scored, constraints=(Fails(how, at=3),))])
    check_choices(chooser, [replace(scored, constraints=(Tell(),))], qwen3_dir)


def test_one_that_fails_for_a_token_that_is_thrown_away(chooser: LaunchedServer, qwen3_dir: str) -> None:
    """Under overlap scheduling the step after the last token begins before that token is known to be the last."""
    ids = tuple(prompt_of(12, 9050))
    [plain] = chooser.generate([Request(ids, {"max_new_tokens": 8, "min_new_tokens": 8, "temperature": 0.0})])
    last = next(n for n in range(2, 8) if plain.response_ids[n] not in plain.response_ids[:n])
    stopping = Request(ids, {"max_new_tokens": 8, "temperature": 0.0, "stop_token_ids": [plain.response_ids[last]]})
    for how in ("raises", "nan", "nothing left"):
        [completion] = check_choices(chooser, [replace(stopping, constraints=(Fails(how, at=last + 1),))], qwen3_dir)
        assert completion.response_ids == plain.response_ids[: last + 1]
        assert completion.finish_reason == "stop"
        with pytest.raises(ConstraintError, match=f"token {last} of the response"):
            chooser.generate([replace(stopping, constraints=(Fails(how, at=last),))])


# --- scoring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_scores_under_constraints(chooser: LaunchedServer, qwen3_dir: str, stage: Any) -> None:
    """Over the mask inside the responses, ``-inf`` for what it takes away there, and the model's own elsewhere."""
    requests = []
    for length, parts in [
        (2, ((1, 2),)),
        (20, ((5, 12), (12, 13), (17, 20))),
        (3 * CHUNK, ((1, 3 * CHUNK),)),
        (150, ((30, 40), (60, 100), (149, 150))),
    ]:
        ids = tuple(prompt_of(length, 9100 + length))
        # Some of what was said is allowed, and the rest is not.
        allowed = ActionMask([*ids[: length // 2], *range(300, 400)])
        for index, constraints in enumerate(
            [
                (allowed,),
                (replace(allowed, first_tokens=3), TemperatureScale(LinearSchedule(0.5, 3.0))),
                (DisallowedTokens(range(0, 49152, 2), positions=(0, 2, 5)), TemperatureScale([2.0, 3.0])),
                (NoImmediateRepeat(), Tell(positions=(1, 3))),
            ]
        ):
            selection: dict[str, Any] = [{"top_k": 4}, {"full": True}, {"token_ids": (0, 7, 301)}][index % 3]
            requests.append(
                Request(
                    ids,
                    {"max_new_tokens": 0},
                    False,
                    score_prompt=True,
                    constraints=constraints,
                    response_ranges=parts,
                    response_limit=(7, 128)[len(requests) % 2],
                    logits=LogitsSpec(**selection, stage=stage, segments=("prompt",)),
                    hidden=HiddenSpec(("prompt",)) if index == 1 else None,
                )
            )
    for _ in range(2):
        completions = check_choices(chooser, requests, qwen3_dir)
    forbidden = [bool((completion.prompt_log_probs_P == -math.inf).any()) for completion in completions]
    assert sum(forbidden) > len(forbidden) / 2, "little was forbidden, so little was shown"


def test_scores_from_a_place_on(chooser: LaunchedServer, qwen3_dir: str, cached: list[int]) -> None:
    """They equal the slice of all scores, and the tokens before come from the prefix cache."""
    ids, start = tuple(prompt_of(140, 9200)), 110
    whole = Request(ids, {"max_new_tokens": 0}, False, score_prompt=True)
    masked = replace(whole, constraints=(ActionMask([*ids[::2], 5]),), response_ranges=((start, 140),))
    httpx.post(f"{chooser.url}/flush_cache", timeout=60).raise_for_status()
    for request in (whole, masked):
        [complete] = check_choices(chooser, [request], qwen3_dir)
        for first in (0, 1, start, 139):
            cached.clear()
            [part] = check_choices(chooser, [replace(request, score_from=first)], qwen3_dir)
            # The row before the first token that is scored is computed; nothing before that.
            assert cached == [max(first - 1, 0)], f"score_from={first}"
            assert complete.prompt_log_probs_P is not None
            torch.testing.assert_close(
                part.prompt_log_probs_P, complete.prompt_log_probs_P[first:], atol=1e-4, rtol=0, equal_nan=True
            )


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """SGLang's ``cached_tokens`` of every answer that comes."""
    noted: list[int] = []
    original = endpoint.read_rows

    def note(requests: Any, rows: Any, info: Any, **where: Any) -> Any:
        noted.extend(row["meta_info"]["cached_tokens"] for row in rows)
        return original(requests, rows, info, **where)

    monkeypatch.setattr(endpoint, "read_rows", note)
    return noted


# --- everything beside everything -----------------------------------------------------------------------------------

HIDDEN: list[HiddenSpec | None] = [
    None,
    HiddenSpec(("prompt", "response", "full")),
    HiddenSpec(("full",), pooling="last", tokens=True),
]
LOGITS: list[dict[str, Any] | None] = [None, {"full": True}, {"top_k": 6}, {"token_ids": (9, 4, 30000)}]
CONSTRAINTS: list[tuple[LogitConstraint, ...]] = [
    (),
    (ActionMask(range(200, 260)),),
    (DisallowedTokens(range(0, 49152, 2), positions=(0, 3)), ActionMask(range(40000), first_tokens=2)),
    (TemperatureScale([2.0, 0.5, 4.0, 1.0]),),
    (NoImmediateRepeat(), ActionMask((500, 501, 502)), Tell(positions=(2,))),
]


def draw(chance: random.Random, hidden: HiddenSpec | None, logits: Any, constraints: Any) -> Request:
    # Half of them share a prefix with others.
    prompt_ids = tuple(prompt_of(chance.choice((1, 2, 9, 31, 32, 33, 70)), chance.choice((1, 2, *range(10000, 10002)))))
    length = chance.choice((1, 2, 6, 25))
    spec = None
    if logits is not None:
        spec = LogitsSpec(
            **logits,
            stage=chance.choice(STAGES),
            segments=chance.choice((("response",), ("full",), ("prompt",), ("prompt", "response"))),
            dtype=chance.choice((torch.float32, torch.float32, torch.bfloat16)),
        )
    return Request(
        prompt_ids,
        {
            "max_new_tokens": length,
            "min_new_tokens": chance.choice((0, length)),
            "temperature": chance.choice((0.0, 0.7, 1.0)),
        },
        hidden=hidden,
        logits=spec,
        constraints=constraints,
    )


def test_a_storm_of_every_combination(chooser: LaunchedServer, qwen3_dir: str) -> None:
    """First all in one batch; then in calls of several sizes that come at once."""
    chance = random.Random(1)
    combinations = list(itertools.product(HIDDEN, LOGITS, CONSTRAINTS))
    batch = [draw(chance, *combination) for combination in combinations]
    chance.shuffle(batch)
    calls = [batch]
    answers = [chooser.generate(batch)]
    rest = [draw(chance, *combination) for combination in combinations * 2]
    chance.shuffle(rest)
    mixed = []
    while rest:
        size = chance.randint(1, 6)
        mixed.append(rest[:size])
        del rest[:size]
    with ThreadPoolExecutor(12) as pool:
        calls += mixed
        answers += list(pool.map(chooser.generate, mixed))
    for requests, completions in zip(calls, answers, strict=True):
        for request, completion in zip(requests, completions, strict=True):
            assert_choices(request, completion, qwen3_dir)
            # The log-probs are held above, under the constraints that this check does not know.
            plain = replace(request, return_log_probs=False)
            assert_completion(plain, replace(completion, log_probs_T=None), qwen3_dir, NUM_LAYERS)
    states = httpx.get(f"{chooser.url}/server_info", timeout=30).json()["internal_states"]
    assert states[0][CHANNEL]["open_pools"] == 0


# --- SGLang's own processors ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sglangs_processor() -> str:
    """Return SGLang's own processor that bans tokens, as the string that it travels as.

    The engine is chosen before SGLang is imported, as other tests of this process choose it too, and cannot afterwards.
    """
    with cpu_engine_environment(not has_accelerator()):
        from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

        return str(DisallowedTokensLogitsProcessor.to_str())


def test_sglangs_own_processor(chooser: LaunchedServer, sglangs_processor: str, qwen3_dir: str) -> None:
    """Its string is sent unchanged, beside requests without a processor; its arguments travel as ``custom_params``."""
    assert chooser.info.takes_processors
    ids = tuple(prompt_of(9, 9300))
    greedy = {"max_new_tokens": 6, "temperature": 0.0}
    [plain] = check_choices(chooser, [Request(ids, greedy)], qwen3_dir)
    banned = sorted(set(plain.response_ids))
    native = Request(
        ids,
        {**greedy, "custom_params": {"token_ids": banned}},
        processor=sglangs_processor,
    )
    same = Request(ids, greedy, constraints=(DisallowedTokens(banned),))
    for extra in ({}, {"logits": LogitsSpec(full=True, stage="processed")}, {"hidden": HiddenSpec()}):
        first, by_sglang, by_us = chooser.generate([Request(ids, greedy), replace(native, **extra), same])
        assert first.response_ids == plain.response_ids
        assert not set(by_sglang.response_ids) & set(banned)
        assert by_sglang.response_ids == by_us.response_ids
        torch.testing.assert_close(by_sglang.log_probs_T, by_us.log_probs_T, atol=1e-4, rtol=0)


def test_sglangs_own_processor_through_a_policy(
    chooser: LaunchedServer, tokenizer: PreTrainedTokenizerBase, sglangs_processor: str, qwen3_dir: str
) -> None:
    """Given to a call it takes the place of the wrapper's own constraints, and says so."""
    batch = tokens_input([prompt_of(9, 9350), prompt_of(40, 9351)])
    policy = make_policy(chooser, tokenizer)
    [first, second] = assert_rows(policy(batch.clone()), qwen3_dir, SEGMENTS)
    banned = sorted({*first.response_ids, *second.response_ids})
    masked = policy.get_new_version(constraints=ActionMask(banned))
    assert set(masked(batch.clone())["tokens"].response[0].tolist()) <= set(banned)
    native = {
        "custom_logit_processor": sglangs_processor,
        "custom_params": {"token_ids": banned},
    }
    with pytest.warns(UserWarning, match="custom_logit_processor"):
        by_sglang = masked(batch.clone(), **native)
    by_us = policy(batch.clone(), disallowed_tokens=banned)
    for row in range(2):
        ids = [out["tokens"].response[row].tolist() for out in (by_sglang, by_us)]
        assert ids[0] == ids[1]
        assert not set(ids[0]) & set(banned)


def test_the_best_token_alone_has_the_log_prob_that_it_has_in_company(chooser: LaunchedServer, qwen3_dir: str) -> None:
    """``top_k=1`` is greedy, which SGLang divides by no temperature; in a batch with others it would."""
    greedy = to_sglang({"top_k": 1, "temperature": 0.5, "max_new_tokens": 6})
    best, other = Request(tuple(prompt_of(9, 9400)), greedy), Request((5, 6, 7), {"temperature": 0.5})
    [alone] = check_choices(chooser, [best], qwen3_dir)
    in_company, _ = check_choices(chooser, [best, other], qwen3_dir)
    assert alone.response_ids == in_company.response_ids
    torch.testing.assert_close(alone.log_probs_T, in_company.log_probs_T, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("sglangs_processor")
def test_sglangs_own_processor_that_raises(chooser: LaunchedServer, qwen3_dir: str) -> None:
    for words, (status, message) in refusals(chooser.url).items():
        assert (status, message[: len("row 1:")], words in message) == (400, "row 1:", True), message
    check_choices(chooser, [Request((5, 6, 7), {"max_new_tokens": 4, "temperature": 0.0})], qwen3_dir)
