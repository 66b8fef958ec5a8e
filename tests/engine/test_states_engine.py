"""Every segment, layer, pooling and span of small random models, on real servers, against Hugging Face; and the logits.

What a layer id means, and what a head does, is the model's own matter: so the same questions are put to four
architectures, with heads tied and not, a softcapped one, and one with a vocabulary that SGLang pads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from checks import prompt_of
from choosing import assert_choices
from states import Served, assert_completion

from torchrl_sglang_hidden import (
    ActionMask,
    DisallowedTokens,
    HiddenSpec,
    LastTokens,
    LogitsSpec,
    TokenMask,
)
from torchrl_sglang_hidden.spans import PromptSpan
from torchrl_sglang_hidden.specs import POOLINGS, SEGMENTS, STAGES, Completion, Request

GREEDY = {"max_new_tokens": 6, "temperature": 0.0}
# Below, at and above the chunk size; the first is one token, which is prompt, boundary and all.
LENGTHS = (1, 3, 17, 64, 65, 150)


def ask(served: Served, spec: HiddenSpec, prompts: list[list[int]], **fields: Any) -> list[Completion]:
    """Greedy, the same request twice: the second finds the prompt in the prefix cache. Both are checked."""
    requests = [Request(tuple(ids), GREEDY, hidden=spec) for ids in prompts]
    requests = [replace(request, **fields) for request in requests]
    for _ in range(2):
        completions = served.server.generate(requests)
        for request, completion in zip(requests, completions, strict=True):
            assert_completion(request, completion, served.model_dir, served.num_layers)
    return completions


def prompts(seed: int) -> list[list[int]]:
    return [prompt_of(length, 100 * seed + length) for length in LENGTHS]


def test_it_knows_its_layers(served: Served) -> None:
    info = served.server.info
    assert info.num_layers == served.num_layers
    assert info.layers == tuple(range(-1, served.num_layers))
    assert info.pools_in_server
    assert info.no_states_because == ""


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_layer_and_segment(served: Served, pooling: Any) -> None:
    layers = tuple(range(-1, served.num_layers))
    ask(served, HiddenSpec(SEGMENTS, pooling, layers), prompts(1))


def test_one_layer_has_no_dimension_of_layers(served: Served) -> None:
    for layer in (0, -2, served.num_layers - 1, -served.num_layers):
        [completion] = ask(served, HiddenSpec(("prompt", "full"), layers=layer), [prompt_of(20, 5)])
        assert completion.hidden["full"].vector.shape == (64,)


def test_layers_come_in_the_order_asked_for(served: Served) -> None:
    [forth] = ask(served, HiddenSpec(("full",), layers=(0, 2, -1)), [prompt_of(20, 6)])
    [back] = ask(served, HiddenSpec(("full",), layers=(-1, 2, 0)), [prompt_of(20, 6)])
    assert torch.equal(forth.hidden["full"].vector, back.hidden["full"].vector.flip(0))


@pytest.mark.parametrize("segments", [("prompt",), ("response",), ("full",), ("prompt", "response")])
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_the_states_of_every_token(served: Served, segments: Any, pooling: Any) -> None:
    ask(served, HiddenSpec(segments, pooling, layers=(1, -1), tokens=True), prompts(2))
    ask(served, HiddenSpec(segments, pooling, tokens=True), prompts(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_states_in_half_the_bytes(served: Served, dtype: torch.dtype) -> None:
    [completion] = ask(served, HiddenSpec(("full",), tokens=True, dtype=dtype), [prompt_of(30, 7)])
    assert completion.token_rows is not None
    assert completion.token_rows.rows_ND.dtype == dtype
    assert completion.hidden["full"].vector.dtype == torch.float32


@pytest.mark.parametrize("pooling", POOLINGS)
def test_spans(served: Served, pooling: Any) -> None:
    for ids in prompts(4)[2:]:
        resolved = {
            "tail": LastTokens(3),
            "all": LastTokens(6),
            "end": PromptSpan(((len(ids) - 2, len(ids)),)),
            "thirds": PromptSpan(tuple((place, place + 1) for place in range(1, len(ids), 3))),
            "middle": PromptSpan(((4, 15),)),
        }
        asked = {name: TokenMask("mask") if isinstance(span, PromptSpan) else span for name, span in resolved.items()}
        spec = HiddenSpec(("prompt", "response"), pooling, layers=(0, -1), spans=asked)
        ask(served, spec, [ids], spans=resolved)
        ask(served, replace(spec, segments=()), [ids], spans=resolved)


@pytest.mark.parametrize("stage", STAGES)
def test_logits(served: Served, stage: Any) -> None:
    """With all columns of the vocabulary and none of its padding, also where all but its end is denied."""
    vocab_size = served.server.info.vocab_size
    selections: list[dict[str, Any]] = [{"full": True}, {"top_k": 5}, {"token_ids": (vocab_size - 1, 0, 700)}]
    constraints = [(), (ActionMask((5, vocab_size - 1, vocab_size - 2)),), (DisallowedTokens(range(vocab_size - 3)),)]
    requests = [
        Request(
            tuple(ids),
            {"max_new_tokens": 6, "temperature": (1.0, 0.7, 0.0)[index % 3]},
            logits=LogitsSpec(**selection, stage=stage, segments=("full",)),
            constraints=constraints[(index + row) % 3],
        )
        for row, ids in enumerate(prompts(6))
        for index, selection in enumerate(selections)
    ]
    for _ in range(2):
        for request, completion in zip(requests, served.server.generate(requests), strict=True):
            assert_choices(request, completion, served.model_dir)


def test_a_prompt_alone(served: Served) -> None:
    for pooling in POOLINGS:
        for spec in (HiddenSpec(("prompt",), pooling), HiddenSpec(("prompt",), pooling, (1, -1), tokens=True)):
            completions = ask(served, spec, prompts(5), sampling={"max_new_tokens": 0})
            assert all(completion.response_ids == () and completion.text == "" for completion in completions)


def test_a_prompt_alone_is_one_prefill_and_always_the_same(served: Served) -> None:
    request = Request(tuple(prompt_of(40, 8)), {"max_new_tokens": 0}, hidden=HiddenSpec(("prompt",)))
    first, second = served.server.generate([request]) + served.server.generate([request])
    torch.testing.assert_close(first.hidden["prompt"].vector, second.hidden["prompt"].vector, rtol=1e-6, atol=1e-6)
