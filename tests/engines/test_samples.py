"""`generate_samples` and ``num_samples`` over the fake engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fake_engine import RecordingEngine, abort_a_row, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Text, Tokens

from torchrl_sglang_hidden import HiddenSpec, LastTokens, SGLangHiddenWrapper
from torchrl_sglang_hidden.engines import generate_samples
from torchrl_sglang_hidden.errors import RequestAbortedError, TokenIdError
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.spec.hidden import POOLINGS, SEGMENTS, Pooling, Segment
from torchrl_sglang_hidden.spec.spans import PromptSpan

TOKENIZER = tiny_tokenizer()


SPANS: dict[str, LastTokens | PromptSpan] = {
    "head": PromptSpan(((0, 1),)), "tail": LastTokens(2, allow_fewer=True), "parts": PromptSpan(((0, 1), (2, 3))),
}  # fmt: skip


LAYERS: st.SearchStrategy[Any] = st.sampled_from([-1, 2, (0, -1), (2,)])


@st.composite
def specs(draw: st.DrawFn) -> HiddenSpec:
    segments = tuple(draw(st.lists(st.sampled_from(SEGMENTS), unique=True)))
    tokens = bool(segments) and draw(st.booleans())
    pooling = draw(st.sampled_from([*POOLINGS, *([None] if tokens else [])]))
    names = draw(st.lists(st.sampled_from(sorted(SPANS)), unique=True, min_size=0 if segments else 1))
    return HiddenSpec(
        segments,
        pooling,
        draw(LAYERS),
        tokens,
        draw(st.sampled_from([torch.float32, torch.float64])),
        # What stands for them here is not read: a request carries them resolved.
        {} if pooling is None else {name: LastTokens(1) for name in names},
    )


@given(
    prompts=st.lists(st.lists(st.integers(6, 95), min_size=3, max_size=8), min_size=1, max_size=3),
    num_samples=st.integers(1, 3),
    spec=specs(),
)
def test_samples_carry_what_single_requests_would(prompts: list[list[int]], num_samples: int, spec: HiddenSpec) -> None:
    requests = [Request(tuple(ids), hidden=spec, spans={name: SPANS[name] for name in spec.spans}) for ids in prompts]
    engine = RecordingEngine()
    completions = generate_samples(engine, requests, num_samples)
    sent = engine.requests[len(prompts) :]
    expected = engine.generate(requests)
    assert len(completions) == len(sent) == len(prompts) * num_samples
    for index, found in enumerate(completions):
        assert_same(found, expected[index // num_samples])
        assert {type(name) for name in found.hidden} <= {str}
    # No sample asks for what is the prompt's alone, nor for its rows again.
    for request in sent:
        assert not any(isinstance(span, PromptSpan) for span in request.spans.values())
        if request.hidden is not None:
            assert "prompt" not in request.hidden.segments
            assert not (request.hidden.tokens and "full" in request.hidden.segments)
            assert request.hidden.spans.keys() == request.spans.keys()


def assert_same(found: Completion, expected: Completion) -> None:
    """Compare everything; float32 sums may differ in their last bits."""
    for name in ("prompt_ids", "response_ids", "text", "finish_reason", "weight_version", "mixed_weights"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.log_probs_T is not None
    assert expected.log_probs_T is not None
    assert found.log_probs_T.equal(expected.log_probs_T)
    for pools, others in ((found.hidden, expected.hidden), (found.spans, expected.spans)):
        assert list(pools) == list(others)
        for key, other in others.items():
            assert pools[key].count == other.count  # type: ignore[index]
            torch.testing.assert_close(pools[key].vector, other.vector, rtol=1e-5, atol=1e-5)  # type: ignore[index]
    assert (found.token_rows is None) == (expected.token_rows is None)
    if found.token_rows is not None and expected.token_rows is not None:
        assert found.token_rows.first == expected.token_rows.first
        torch.testing.assert_close(found.token_rows.rows_ND, expected.token_rows.rows_ND, rtol=0, atol=0)


@given(
    prompt=st.lists(st.integers(6, 95), min_size=1, max_size=8),
    segments=st.lists(st.sampled_from(SEGMENTS), min_size=1, unique=True),
    pooling=st.sampled_from(POOLINGS),
    tokens=st.booleans(),
)
def test_stock_engines_carry_the_same(
    prompt: list[int], segments: list[Segment], pooling: Pooling, tokens: bool
) -> None:
    engine = RecordingEngine(pools_in_server=False, layers=(-1,))
    engine._warned = True
    requests = [Request(tuple(prompt), hidden=HiddenSpec(tuple(segments), pooling, tokens=tokens))]
    (found,) = generate_samples(engine, requests, 1)
    assert_same(found, engine.generate(requests)[0])


def test_the_prompt_goes_ahead_for_the_sum_that_full_needs() -> None:
    engine = RecordingEngine()
    generate_samples(engine, [Request((6, 7), hidden=HiddenSpec(("full",), layers=(0, 2)))], 2)
    ahead, *samples = [request.hidden for request in engine.requests]
    assert ahead == HiddenSpec(("prompt",), layers=(0, 2))
    assert samples == [HiddenSpec(("full",), layers=(0, 2))] * 2
    engine = RecordingEngine()
    generate_samples(engine, [Request((6, 7), hidden=HiddenSpec(("full",), "last"))], 2)
    assert engine.requests[0].hidden is None, "the last position of `full` is the response's"


def test_what_is_no_sampling_goes_with_every_request() -> None:
    engine = RecordingEngine()
    generate_samples(engine, [Request((6, 7), lora="poet", priority=3)], 2)
    assert [(request.lora, request.priority) for request in engine.requests] == [("poet", 3)] * 3


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


def test_an_aborted_prompt_brings_no_completions() -> None:
    """Its token was nobody's sample."""
    with pytest.raises(RequestAbortedError, match="row 0 ") as caught:
        generate_samples(RecordingEngine(fault=abort_a_row), [Request((6, 7)), Request((8,))], 2)
    assert caught.value.completions == ()


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
