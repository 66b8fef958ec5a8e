"""Candidate scores on a real server: Hugging Face's log-probs of the same sequences, for one prefill of each prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import httpx
import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import (
    CHUNKED_PREFILL_SIZE,
    LOG_PROB_ATOL,
    QUESTIONS,
    history_input,
    make_policy,
    prompt_of,
    text_input,
    tokens_input,
)
from torchrl.modules import MaskedCategorical
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    ActionMask,
    DisallowedTokens,
    LinearSchedule,
    PromptLengthError,
    SGLangHiddenWrapper,
    SGLangServer,
    TemperatureScale,
    TokenIdError,
)

Policy = Callable[..., SGLangHiddenWrapper]

PROMPT_LENGTHS = (1, 30, CHUNKED_PREFILL_SIZE + 1, 150)


def truth(model_dir: str, prompt: Sequence[int], candidate: Sequence[int], reduction: str = "sum") -> float:
    log_probs_C = _log_probs(model_dir, tuple(prompt), tuple(candidate))
    return float({"sum": log_probs_C.sum(), "mean": log_probs_C.mean(), "first": log_probs_C[0]}[reduction])


@functools.cache
def _log_probs(model_dir: str, prompt: tuple[int, ...], candidate: tuple[int, ...]) -> torch.Tensor:
    return hf_oracle.teacher_force(model_dir, prompt, candidate).log_probs_T


def candidates_of(count: int, longest: int, seed: int) -> list[list[int]]:
    return [prompt_of(1 + index % longest, seed=seed + index) for index in range(count)]


@pytest.mark.parametrize("reduction", ["sum", "mean", "first"])
def test_scores_are_hugging_faces(policy: Policy, smol_dir: str, reduction: str) -> None:
    prompts = [prompt_of(n, seed=3000 + n) for n in PROMPT_LENGTHS]
    candidates = candidates_of(5, longest=8, seed=3100)
    scorer = policy("tokens")
    # Twice: the second finds every prompt in the prefix cache.
    for _ in range(2):
        out = scorer.score(tokens_input(prompts), candidates, reduction=reduction)  # type: ignore[arg-type]
        for row, prompt in enumerate(prompts):
            expected = torch.tensor([truth(smol_dir, prompt, one, reduction) for one in candidates])
            torch.testing.assert_close(out["logits"][row], expected, atol=LOG_PROB_ATOL, rtol=0)
        assert out["mask"].all()


def test_each_rows_own_candidates(policy: Policy, smol_dir: str) -> None:
    prompts = [prompt_of(n, seed=3200 + n) for n in (5, 70)]
    rows = [candidates_of(1, 1, seed=3300), candidates_of(4, 4, seed=3310)]
    out = policy("tokens").score(tokens_input(prompts), rows)
    assert out["mask"].tolist() == [[True, False, False, False], [True] * 4]
    for row, (prompt, candidates) in enumerate(zip(prompts, rows, strict=True)):
        expected = torch.tensor([truth(smol_dir, prompt, one) for one in candidates])
        torch.testing.assert_close(out["logits"][row, : len(candidates)], expected, atol=LOG_PROB_ATOL, rtol=0)


@pytest.mark.parametrize("mode", ["history", "text"])
def test_words_in_every_mode(policy: Policy, tokenizer: PreTrainedTokenizerBase, smol_dir: str, mode: str) -> None:
    questions, words = QUESTIONS[:3], [" Paris", "Hello there", " 4", " red, green and blue."]
    td = (history_input if mode == "history" else text_input)(questions)
    out = policy(mode).score(td, words)
    for row, question in enumerate(questions):
        chat = [{"role": "user", "content": question}]
        prompt = (
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            if mode == "history"
            else tokenizer(question)["input_ids"]
        )
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        expected = torch.tensor([truth(smol_dir, prompt, one) for one in ids])
        torch.testing.assert_close(out["logits"][row], expected, atol=LOG_PROB_ATOL, rtol=0)
        assert out["num_tokens"][row].tolist() == [len(one) for one in ids]


@torch.inference_mode()
def constrained(model_dir: str, prompt: Sequence[int], candidate: Sequence[int], allowed: set[int]) -> float:
    rows_CD = hf_oracle.teacher_force(model_dir, prompt, candidate).rows("response")
    logits_CV = hf_oracle.load(model_dir).get_output_embeddings()(rows_CD)
    denied_V = torch.ones(logits_CV.shape[-1], dtype=torch.bool)
    denied_V[list(allowed)] = False
    log_probs_CV = logits_CV.masked_fill(denied_V, -torch.inf).log_softmax(-1)
    return float(log_probs_CV.gather(-1, torch.tensor(candidate)[:, None]).sum())


def test_constraints_act_on_candidates(policy: Policy, smol_dir: str) -> None:
    prompts = [prompt_of(n, seed=3400 + n) for n in (20, 90)]
    candidates = candidates_of(6, longest=4, seed=3500)
    allowed = {token_id for one in candidates for token_id in one} | set(range(50, 90))
    denied = candidates[4][0]
    scorer = policy("tokens").get_new_version(
        constraints=(ActionMask(sorted(allowed)), DisallowedTokens([denied])), hidden=None
    )
    out = scorer.score(tokens_input(prompts), candidates)
    fine = [denied not in one for one in candidates]
    assert out["mask"].tolist() == [fine] * 2
    assert not all(fine)
    for row, prompt in enumerate(prompts):
        expected = torch.tensor([constrained(smol_dir, prompt, one, allowed - {denied}) for one in candidates])
        torch.testing.assert_close(out["logits"][row], expected, atol=LOG_PROB_ATOL, rtol=0)


@torch.inference_mode()
def test_a_temperature_that_changes_with_the_candidates_tokens(policy: Policy, smol_dir: str) -> None:
    prompt, candidate = prompt_of(40, seed=3600), prompt_of(3, seed=3601)
    scorer = policy("tokens").get_new_version(constraints=TemperatureScale(LinearSchedule(0.5, 2.0, steps=4)))
    out = scorer.score(tokens_input([prompt]), [candidate, candidate[:1]])
    rows_CD = hf_oracle.teacher_force(smol_dir, prompt, candidate).rows("response")
    logits_CV = hf_oracle.load(smol_dir).get_output_embeddings()(rows_CD) / torch.tensor([[0.5], [1.0], [1.5]])
    expected_C = logits_CV.log_softmax(-1).gather(-1, torch.tensor(candidate)[:, None])[:, 0]
    expected = torch.stack([expected_C.sum(), expected_C[0]])
    torch.testing.assert_close(out["logits"][0], expected, atol=2 * LOG_PROB_ATOL, rtol=0)


@pytest.fixture
def cached(smol: SGLangServer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record, for every answer of SGLang, the number of prompt tokens and how many were in the prefix cache."""
    from torchrl_sglang_hidden.engines import endpoint

    found: list[tuple[int, int]] = []
    original = endpoint.read_rows

    def note(requests, rows, info, **options):  # type: ignore[no-untyped-def]
        found.extend((row["meta_info"]["prompt_tokens"], row["meta_info"]["cached_tokens"]) for row in rows)
        return original(requests, rows, info, **options)

    monkeypatch.setattr(endpoint, "read_rows", note)
    # Other runs against the same server may have left these prompts in its cache.
    httpx.post(f"{smol.url}/flush_cache", timeout=60).raise_for_status()
    return found


@pytest.mark.parametrize("with_constraints", [False, True])
def test_64_candidates_cost_one_prefill_of_their_prompt(
    policy: Policy, smol_dir: str, cached: list[tuple[int, int]], with_constraints: bool
) -> None:
    num_prompt = 2 * CHUNKED_PREFILL_SIZE + 22
    prompt, candidates = prompt_of(num_prompt, seed=3700), candidates_of(64, longest=4, seed=3800)
    scorer = policy("tokens")
    if with_constraints:
        scorer = scorer.get_new_version(constraints=DisallowedTokens([7]))
    out = scorer.score(tokens_input([prompt]), candidates)
    # The one that goes ahead finds nothing. Every candidate finds all but the prompt's last token, whose logits its
    # first token is scored with.
    assert cached == [(num_prompt, 0), *((num_prompt + len(one), num_prompt - 1) for one in candidates)]
    computed = sum(prompt_tokens - cached_tokens for prompt_tokens, cached_tokens in cached)
    assert computed == num_prompt + sum(len(one) + 1 for one in candidates)
    for place in (0, 3, 63):
        expected = truth(smol_dir, prompt, candidates[place])
        assert float(out["logits"][0, place]) == pytest.approx(expected, abs=LOG_PROB_ATOL + with_constraints * 1e-3)


def test_several_servers_share_the_candidates(
    smol: SGLangServer, trainee: SGLangServer, tokenizer: PreTrainedTokenizerBase, smol_dir: str
) -> None:
    prompts = [prompt_of(n, seed=3850 + n) for n in (20, 90)]
    candidates = candidates_of(5, longest=3, seed=3860)
    with SGLangServer([smol.url, trainee.url]) as both:
        out = make_policy(both, tokenizer).score(tokens_input(prompts), candidates)
    for row, prompt in enumerate(prompts):
        expected = torch.tensor([truth(smol_dir, prompt, one) for one in candidates])
        torch.testing.assert_close(out["logits"][row], expected, atol=LOG_PROB_ATOL, rtol=0)


def test_the_distribution_over_candidates(policy: Policy, smol_dir: str) -> None:
    prompt, candidates = prompt_of(25, seed=3900), candidates_of(4, longest=2, seed=3910)
    mask = torch.tensor([[True, True, False, True]])
    scores = policy("tokens").score(tokens_input([prompt]), candidates, mask=mask)
    dist = MaskedCategorical(logits=scores["logits"], mask=scores["mask"])
    sums = torch.tensor([truth(smol_dir, prompt, one) for one in candidates]).masked_fill(~mask[0], -torch.inf)
    torch.testing.assert_close(dist.probs[0], sums.softmax(0), atol=1e-3, rtol=0)
    assert dist.probs[0, 2] == 0


def test_the_server_survives_what_is_refused(policy: Policy, smol: SGLangServer, smol_dir: str) -> None:
    scorer, prompt = policy("tokens"), prompt_of(10, seed=4000)
    with pytest.raises(TokenIdError, match="row 0, candidate 1: token id 49152"):
        scorer.score(tokens_input([prompt]), [[5], [smol.info.vocab_size]])
    too_long = smol.info.max_prompt_tokens - len(prompt) + 1
    with pytest.raises(PromptLengthError, match=f"candidate 0: 10 prompt tokens and {too_long}"):
        scorer.score(tokens_input([prompt]), [[5] * too_long])
    out = scorer.score(tokens_input([prompt]), [[5], [6]])
    assert float(out["logits"][0, 1]) == pytest.approx(truth(smol_dir, prompt, [6]), abs=LOG_PROB_ATOL)
