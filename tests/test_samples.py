"""`generate_samples` and ``num_samples`` over the recorder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorder import RecordingEngine, pooled_D, response_of, states_ND, tiny_tokenizer
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Text, Tokens

from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper
from torchrl_sglang_hidden.engines import generate_samples
from torchrl_sglang_hidden.errors import TokenIdError
from torchrl_sglang_hidden.specs import POOLINGS, SEGMENTS, Pooling, Request, Segment, rows_expected

TOKENIZER = tiny_tokenizer()


@given(
    prompts=st.lists(st.lists(st.integers(6, 95), min_size=1, max_size=8), min_size=1, max_size=3),
    num_samples=st.integers(1, 3),
    segments=st.lists(st.sampled_from(SEGMENTS), min_size=1, unique=True),
    pooling=st.sampled_from(POOLINGS),
)
def test_samples_carry_what_single_requests_would(
    prompts: list[list[int]], num_samples: int, segments: list[Segment], pooling: Pooling
) -> None:
    spec = HiddenSpec(tuple(segments), pooling)
    requests = [Request(tuple(ids), hidden=spec) for ids in prompts]
    engine = RecordingEngine()
    completions = generate_samples(engine, requests, num_samples)
    assert len(completions) == len(prompts) * num_samples
    for index, completion in enumerate(completions):
        ids = prompts[index // num_samples]
        response = response_of(ids)
        assert completion.prompt_ids == tuple(ids)
        assert completion.response_ids == tuple(response)
        assert completion.log_probs_T is not None
        assert list(completion.hidden) == segments
        for segment in segments:
            pooled = completion.hidden[segment]
            assert pooled.count == rows_expected(segment, len(ids), len(response))
            expected = pooled_D(states_ND(ids, response), segment, pooling, len(ids)).float()
            torch.testing.assert_close(pooled.vector_D, expected, rtol=1e-5, atol=1e-5)
    # No sample pools the whole prompt, which would compute it again.
    assert not any(request.hidden and request.hidden.reads_whole_prompt for request in engine.requests[len(prompts) :])


def test_each_prompt_goes_ahead_once_for_one_token() -> None:
    engine = RecordingEngine()
    options = {"temperature": 0.9, "max_new_tokens": 4, "sampling_seed": 5}
    generate_samples(engine, [Request((6, 7), sampling=options), Request((8,), sampling=options)], 3)
    ahead, samples = engine.requests[:2], engine.requests[2:]
    assert [request.prompt_ids for request in ahead] == [(6, 7), (8,)]
    assert all(request.sampling["max_new_tokens"] == 1 and not request.return_log_probs for request in ahead)
    assert [request.prompt_ids for request in samples] == [(6, 7)] * 3 + [(8,)] * 3
    assert [request.sampling["sampling_seed"] for request in samples] == [5, 6, 7] * 2
    assert all({**request.sampling, "sampling_seed": 5} == options for request in samples)


def test_seeds_stay_in_64_bits() -> None:
    engine = RecordingEngine()
    generate_samples(engine, [Request((6,), sampling={"sampling_seed": 2**63 - 1})], 2)
    assert [request.sampling["sampling_seed"] for request in engine.requests[1:]] == [2**63 - 1, -(2**63)]


def test_prompts_go_ahead_of_a_queue() -> None:
    policy = make("tokens", num_samples=2, min_batch_size=2, batching_timeout=3600.0)
    out = policy(TensorDict(tokens=Tokens(prompt=torch.tensor([6, 7]), batch_size=()), batch_size=()))
    assert out.batch_size == (2,), "one prompt alone would have waited for a second"


def test_a_bad_request_costs_no_call() -> None:
    engine = RecordingEngine()
    # Fine for the one token that goes ahead; refused for what follows.
    with pytest.raises(TokenIdError, match="stop_token_ids has id 96"):
        generate_samples(engine, [Request((6,), sampling={"stop_token_ids": [96]})], 2)
    assert engine.requests == []


@pytest.mark.parametrize("hidden", [HiddenSpec(("prompt",)), HiddenSpec(("response",))])
def test_an_update_between_prompt_and_samples_is_told(hidden: HiddenSpec) -> None:
    engine = RecordingEngine()
    versions = iter(["1", "1", "2", "2"])
    engine.fault = lambda rows: [row["meta_info"].update(weight_version=next(versions)) for row in rows] and None
    (same,) = generate_samples(engine, [Request((6, 7), hidden=hidden)], 1)
    assert not same.mixed_weights
    versions = iter(["1", "2"])
    (other,) = generate_samples(engine, [Request((6, 7), hidden=hidden)], 1)
    assert other.weight_version == "2"
    # A response's own states are of one version; only with the prompt's are there two.
    assert other.mixed_weights == ("prompt" in hidden.segments)


def make(mode: str, **options: Any) -> SGLangHiddenWrapper:
    return SGLangHiddenWrapper(RecordingEngine(tokenizer=TOKENIZER), tokenizer=TOKENIZER, input_mode=mode, **options)


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("shape", [(), (2,), (2, 1)])
def test_the_output_has_a_dimension_of_samples(shape: tuple[int, ...], num_samples: int) -> None:
    rows: list[Any] = [TensorDict(tokens=Tokens(prompt=torch.tensor(ids)), batch_size=()) for ids in ([6, 7], [8])]
    for size in reversed(shape):
        rows = [lazy_stack(rows[start : start + size]) for start in range(0, len(rows), size)]
    td = rows[0]
    out = make("tokens", num_samples=num_samples)(td)
    assert out.batch_size == (*shape, num_samples)
    assert out["hidden_states"].response.shape[:-1] == (*shape, num_samples)
    assert "tokens" in td
    assert set(td["tokens"].keys()) == {"prompt"}, "the input was written to"
    target = TensorDict(batch_size=(*shape, num_samples))
    assert make("tokens", num_samples=num_samples)(td, tensordict_out=target) is target


def test_samples_of_one_prompt_stand_together() -> None:
    out = make("text", num_samples=2)(TensorDict(text=Text(prompt=["w1 w2", "w3"], batch_size=2), batch_size=2))
    assert out["text"].prompt == [["w1 w2", "w1 w2"], ["w3", "w3"]]
