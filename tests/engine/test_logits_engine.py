"""Logits of real servers, every selection, stage and segment, against Hugging Face on the same weights.

Of the session's server: a trained Llama with a tied head, prompts in chunks of 64. Random models with other heads are
in test_states_engine.py; retraction, mixed chunks and the like in test_features_engine.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.logits_checks import Grammar, assert_choices, check_choices
from helpers.policy_checks import CHUNKED_PREFILL_SIZE, prompt_of
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    ActionMask,
    DisallowedTokens,
    HiddenSpec,
    LogitsSpec,
    SGLangServer,
    TemperatureScale,
)
from torchrl_sglang_hidden.engines import generate_samples
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.spec.logits import STAGES

SELECTIONS: dict[str, dict[str, Any]] = {
    "full": {"full": True},
    "top_k": {"top_k": 7},
    "token_ids": {"token_ids": (5, 3, 48000, 100)},
}
SEGMENTS = [("response",), ("prompt",), ("full",), ("prompt", "response")]
LENGTHS = (1, 20, CHUNKED_PREFILL_SIZE + 1, 2 * CHUNKED_PREFILL_SIZE + 22)
DIGITS = 5


def test_every_selection_stage_and_segment(smol: SGLangServer, smol_dir: str) -> None:
    """Three times: fresh, with every prompt in the prefix cache, and with the responses as part of the prompts."""
    prompts = [tuple(prompt_of(length, seed=5000 + length)) for length in LENGTHS]
    combinations = itertools.product(SEGMENTS, STAGES, SELECTIONS)
    requests = [
        Request(
            prompts[index % 4],
            {"max_new_tokens": 4, "temperature": 0.0},
            logits=LogitsSpec(**SELECTIONS[selection], stage=stage, segments=segments),
        )
        for index, (segments, stage, selection) in enumerate(combinations)
    ]
    for _ in range(2):
        completions = check_choices(smol, requests, smol_dir)
    longer = [
        replace(request, prompt_ids=(*completion.prompt_ids, *completion.response_ids, *prompt_of(9, seed=5100)))
        for request, completion in zip(requests[-9:], completions[-9:], strict=True)
    ]
    check_choices(smol, longer, smol_dir)


def test_in_half_the_bytes(smol: SGLangServer, smol_dir: str) -> None:
    """The same numbers in bfloat16: equal to the bit, except where two runs differ in their last bit."""
    whole = [
        LogitsSpec(**selection, stage=stage, segments=("full",))
        for selection in SELECTIONS.values()
        for stage in STAGES
    ]
    ids = tuple(prompt_of(12, seed=5200))
    requests = [Request(ids, {"max_new_tokens": 4, "temperature": 0.0}, logits=spec) for spec in whole]
    halved = [replace(request, logits=replace(request.logits, dtype=torch.bfloat16)) for request in requests]
    completions = check_choices(smol, requests + halved, smol_dir)
    for exact, rounded in zip(completions[: len(whole)], completions[len(whole) :], strict=True):
        for one, other in ((exact.logits, rounded.logits), (exact.prompt_logits, rounded.prompt_logits)):
            assert one is not None
            assert other is not None
            assert (one.values_NC.bfloat16() == other.values_NC).float().mean() > 0.99


def test_a_prompt_alone(smol: SGLangServer, smol_dir: str) -> None:
    prompts = [tuple(prompt_of(length, seed=5300 + length)) for length in LENGTHS]
    specs = [LogitsSpec(**SELECTIONS[selection], segments=("prompt",)) for selection in ("token_ids", "top_k")]
    check_choices(
        smol, [Request(ids, {"max_new_tokens": 0}, logits=spec) for ids in prompts for spec in specs], smol_dir
    )


def test_every_sample_has_its_own_and_the_prompts(smol: SGLangServer, smol_dir: str) -> None:
    """`generate_samples` takes a prompt's logits from the one request that computes it."""
    sampling = {"max_new_tokens": 5, "temperature": 1.0}
    requests = [
        Request(tuple(prompt_of(70, seed=5400)), sampling, logits=LogitsSpec(top_k=5, segments=("full",))),
        Request(
            tuple(prompt_of(9, seed=5401)),
            sampling,
            logits=LogitsSpec(full=True, stage="processed"),
            constraints=(ActionMask(range(200, 400)),),
            hidden=HiddenSpec(("prompt", "full")),
        ),
        Request(tuple(prompt_of(30, seed=5402)), sampling, logits=LogitsSpec(token_ids=(9,), segments=("prompt",))),
    ]
    completions = generate_samples(smol, requests, 3)
    for index, completion in enumerate(completions):
        assert_choices(requests[index // 3], completion, smol_dir)
    assert len({completion.response_ids for completion in completions}) > 6, "the samples of a prompt are the same"


# --- what is done to them before they are sampled from --------------------------------------------------------------

ADDED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a temperature": {"temperature": 0.7},
    "logit bias": {"logit_bias": {"11": 5.0, "42": -3.0, "0": 2.0}, "temperature": 0.7},
    "min_new_tokens": {"min_new_tokens": 5, "logit_bias": {"2": 30.0}},
    "the best only": {"temperature": 0.0, "logit_bias": {"11": 5.0}},
    "a grammar": {"regex": f"[0-9]{{{DIGITS}}}"},
    "a grammar and the rest": {"regex": f"[0-9]{{{DIGITS}}}", "temperature": 0.7, "logit_bias": {"34": 2.0}},
}
PENALTIES: list[dict[str, Any]] = [
    {"frequency_penalty": 0.8, "presence_penalty": 0.5},
    {"frequency_penalty": 1.5, "temperature": 1.3},
    {"repetition_penalty": 1.4, "temperature": 0.7},
    {"repetition_penalty": 0.7, "min_new_tokens": 5, "logit_bias": {"2": 30.0}},
]
CONSTRAINED = {
    "without": (),
    "a mask": (ActionMask([*range(0, 40), *range(300, 350)]),),
    "all kinds": (
        DisallowedTokens(range(30, 34), first_tokens=3),
        TemperatureScale([2.0, 0.5, 3.0]),
        ActionMask(range(0, 49000), positions=(1, 2, 4)),
    ),
}


@pytest.fixture(scope="module")
def digits(tokenizer: PreTrainedTokenizerBase) -> Grammar:
    """Return what ``[0-9]{5}`` allows: this tokenizer has a token for each digit."""
    texts = tokenizer.batch_decode([[token_id] for token_id in range(len(tokenizer))])
    single_V = torch.tensor([text.isascii() and text.isdigit() for text in texts])
    assert {len(texts[token_id]) for token_id in single_V.nonzero().flatten()} == {1}
    end_V = torch.zeros(len(tokenizer), dtype=torch.bool)
    end_V[tokenizer.eos_token_id] = True
    return lambda before: single_V if len(before) < DIGITS else end_V


@pytest.mark.parametrize("constraints", CONSTRAINED)
def test_beside_all_that_sglang_does_to_logits(
    smol: SGLangServer, smol_dir: str, digits: Grammar, constraints: str
) -> None:
    """Raw logits are taken before SGLang changes them. The softmax of processed logits gives the returned log-prob."""
    # Behind its digits this grammar leaves the end of the text alone, which the mask denies.
    length = DIGITS if CONSTRAINED[constraints] else DIGITS + 2
    requests = [
        Request(
            tuple(prompt_of(10 + index, seed=5500)),
            {"max_new_tokens": length, "temperature": 1.0, **sampling},
            logits=spec,
            constraints=CONSTRAINED[constraints],
        )
        for index, sampling in enumerate(ADDED.values())
        for spec in (LogitsSpec(**SELECTIONS[list(SELECTIONS)[index % 3]]), LogitsSpec(full=True, stage="processed"))
    ]
    for request, completion in zip(requests, smol.generate(requests), strict=True):
        grammar = digits if "regex" in request.sampling else None
        assert_choices(request, completion, smol_dir, grammar=grammar)


@pytest.mark.parametrize("stage", STAGES)
def test_beside_sglangs_penalties(smol: SGLangServer, smol_dir: str, stage: Any) -> None:
    for index, penalties in enumerate(PENALTIES):
        request = Request(
            tuple(prompt_of(10, seed=5550 + index)),
            {"max_new_tokens": 8, "temperature": 1.0, **penalties},
            logits=LogitsSpec(full=True, stage=stage),
            constraints=CONSTRAINED["all kinds" if index % 2 else "a mask"],
        )
        check_choices(smol, [request], smol_dir)
