"""Counts and vectors when the engine computes a prompt in pieces, or not at all because it is in the prefix cache.

Every count equals its token count whatever was cached or chunked, and every vector equals Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.policy_checks import CHUNKED_PREFILL_SIZE, POOLINGS, SEGMENTS, assert_rows, prompt_of, tokens_input
from tensordict import TensorDict

from torchrl_sglang_hidden import SGLangHiddenWrapper

Policy = Callable[..., SGLangHiddenWrapper]
SEGMENT_CHOICES = [*[(name,) for name in SEGMENTS], SEGMENTS]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_prompts_around_and_over_the_chunk_size(policy: Policy, smol_dir: str, pooling: str) -> None:
    chunk = CHUNKED_PREFILL_SIZE
    lengths = [chunk - 1, chunk, chunk + 1, 2 * chunk, 3 * chunk + 8]
    prompts = [prompt_of(length, seed=10 + length) for length in lengths]
    for prompt in prompts:
        out = policy(pooling=pooling, max_new_tokens=4)(tokens_input([prompt]))
        assert_rows(out, smol_dir, SEGMENTS, pooling)


@pytest.mark.parametrize("segments", SEGMENT_CHOICES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_short_and_chunked_prompts_in_one_batch(
    policy: Policy, smol_dir: str, pooling: str, segments: tuple[str, ...]
) -> None:
    prompts = [prompt_of(length, seed=50 + length) for length in (5, 2 * CHUNKED_PREFILL_SIZE + 9, 11, 70)]
    out = policy(segments=segments, pooling=pooling, max_new_tokens=4)(tokens_input(prompts))
    assert_rows(out, smol_dir, segments, pooling)


@pytest.mark.parametrize("segments", SEGMENT_CHOICES)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("num_tokens", [24, CHUNKED_PREFILL_SIZE + 40])
def test_the_same_prompt_twice(
    policy: Policy, smol_dir: str, num_tokens: int, pooling: str, segments: tuple[str, ...]
) -> None:
    twice = policy(segments=segments, pooling=pooling, max_new_tokens=4)
    seed = 1000 * SEGMENTS.index(segments[0]) + 100 * len(segments) + num_tokens + POOLINGS.index(pooling)
    prompt = prompt_of(num_tokens, seed)
    (first,) = assert_rows(twice(tokens_input([prompt])), smol_dir, segments, pooling)
    (second,) = assert_rows(twice(tokens_input([prompt])), smol_dir, segments, pooling)
    assert first.response_ids == second.response_ids
    assert first.counts == second.counts


@pytest.mark.parametrize("segments", SEGMENT_CHOICES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_cache_filled_by_others(policy: Policy, smol_dir: str, pooling: str, segments: tuple[str, ...]) -> None:
    """A request that asked for nothing left its whole prompt in the cache; the next one must still see every row."""
    prompt = prompt_of(CHUNKED_PREFILL_SIZE + 20, seed=6)
    policy(segments=("response",))(tokens_input([prompt]))
    out = policy(segments=segments, pooling=pooling, max_new_tokens=4)(tokens_input([prompt]))
    assert_rows(out, smol_dir, segments, pooling)


@pytest.mark.parametrize("segments", SEGMENT_CHOICES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_long_shared_prefixes(policy: Policy, smol_dir: str, pooling: str, segments: tuple[str, ...]) -> None:
    shared = prompt_of(40, seed=7)
    batch = tokens_input([shared + prompt_of(tail, seed=70 + tail) for tail in (1, 3, 30)])
    sharing = policy(segments=segments, pooling=pooling, max_new_tokens=4)
    for _ in range(2):
        assert_rows(sharing(batch.clone()), smol_dir, segments, pooling)


def test_a_conversation_that_grows(policy: Policy, smol_dir: str) -> None:
    """Each turn's prompt is the last turn's prompt and response: all but the new tokens are in the cache."""
    prompt = prompt_of(20, seed=8)
    for turn in range(3):
        (row,) = assert_rows(policy(max_new_tokens=6)(tokens_input([prompt])), smol_dir, SEGMENTS)
        prompt = row.full_ids + prompt_of(5, seed=80 + turn)


def test_rows_that_ask_for_different_things_in_one_server_batch(policy: Policy, smol_dir: str) -> None:
    """All kinds of pooling, and nothing at all, run side by side; none sees another's rows."""
    asked = [
        (("response",), "mean"),
        (SEGMENTS, "mean"),
        (SEGMENTS, "last"),
        (("prompt",), "last"),
        (SEGMENTS, "max"),
        (("full",), "sum"),
    ]
    prompts = [[prompt_of(length, seed=900 + length + 7 * job) for length in (6, 90)] for job in range(len(asked))]

    def call(job: int) -> TensorDict:
        segments, pooling = asked[job]
        return policy(segments=segments, pooling=pooling, max_new_tokens=12)(tokens_input(prompts[job]))

    with ThreadPoolExecutor(len(asked)) as pool:
        outs = list(pool.map(call, range(len(asked))))
    for (segments, pooling), out, job_prompts in zip(asked, outs, prompts, strict=True):
        rows = assert_rows(out, smol_dir, segments, pooling)
        assert [row.prompt_ids for row in rows] == job_prompts
