"""``num_samples``: several responses of one prompt, for one prefill of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import httpx
import pytest
from helpers.policy_checks import POOLINGS, SEGMENTS, assert_rows, history_input, prompt_of, text_input, tokens_input

from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper, SGLangServer
from torchrl_sglang_hidden.engines import generate_samples
from torchrl_sglang_hidden.errors import CapabilityError
from torchrl_sglang_hidden.records import Request

Policy = Callable[..., SGLangHiddenWrapper]
SAMPLES = 3


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    "segments", [("prompt",), ("response",), ("full",), ("response", "full"), SEGMENTS], ids="+".join
)
def test_every_sample_equals_hugging_face(policy: Policy, smol_dir: str, segments: Sequence[str], pooling: str) -> None:
    prompts = [prompt_of(n, seed=1000 + n) for n in (1, 30, 150)]
    sampler = policy("tokens", segments, pooling, temperature=1.0, max_new_tokens=6).get_new_version(
        num_samples=SAMPLES
    )
    out = sampler(tokens_input(prompts))
    assert out.batch_size == (3, SAMPLES)
    responses = set()
    for prompt, group in zip(prompts, out.unbind(0), strict=True):
        for row in assert_rows(group, smol_dir, segments, pooling):
            assert row.prompt_ids == prompt
            responses.add(tuple(row.response_ids))
    assert len(responses) > SAMPLES, "every sample is the same"


@pytest.mark.parametrize("mode", ["history", "text"])
@pytest.mark.parametrize("pad_output", [False, True])
def test_every_mode_gives_a_dimension_of_samples(policy: Policy, mode: str, pad_output: bool) -> None:
    make_input = history_input if mode == "history" else text_input
    sampler = policy(mode, pad_output=pad_output, num_return_sequences=2, max_new_tokens=4)
    out = sampler(make_input(["What is the capital of France?", "Hi"]))
    assert out.batch_size == (2, 2)
    assert out["text"].response[0] == [out["text"].response[0][0]] * 2, "greedy samples differ"
    one = sampler(make_input(["Hi"])[0])
    assert one.batch_size == (2,)
    assert one["hidden_states"].prompt.shape == (2, 576)
    if mode == "history":
        assert [turn.role[-1] for turn in one["history"].full.unbind(0)] == ["assistant"] * 2


def test_a_prompt_is_computed_once(smol: SGLangServer, monkeypatch: pytest.MonkeyPatch) -> None:
    cached: list[int] = []
    read = _recorded(monkeypatch, cached)
    # Other runs against the same server may have left these prompts in its cache.
    httpx.post(f"{smol.url}/flush_cache", timeout=60).raise_for_status()
    prompts = [tuple(prompt_of(n, seed=2000 + n)) for n in (50, 120)]
    hidden = HiddenSpec(SEGMENTS)
    requests = [Request(ids, sampling={"max_new_tokens": 3, "temperature": 1.0}, hidden=hidden) for ids in prompts]
    completions = generate_samples(smol, requests, SAMPLES)
    assert len(completions) == 2 * SAMPLES
    # The two that go ahead find nothing; every sample finds all but the last token, which is computed to sample from.
    assert cached == [0, 0, *[49] * SAMPLES, *[119] * SAMPLES]
    assert read() == 2


def _recorded(monkeypatch: pytest.MonkeyPatch, cached: list[int]) -> Callable[[], int]:
    """Record SGLang's ``cached_tokens`` of every answer, and return how many calls there were."""
    from torchrl_sglang_hidden.engines import endpoint

    calls = 0
    original = endpoint.read_rows

    def note(requests, rows, info, **options):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        cached.extend(row["meta_info"]["cached_tokens"] for row in rows)
        return original(requests, rows, info, **options)

    monkeypatch.setattr(endpoint, "read_rows", note)
    return lambda: calls


def test_a_seed_that_the_engine_would_not_read_is_refused(policy: Policy) -> None:
    with pytest.raises(CapabilityError, match=r"row 0: sampling_seed=7.*--enable-deterministic-inference"):
        policy("tokens", temperature=1.0)(tokens_input([prompt_of(20, seed=3)]), sampling_seed=7)
