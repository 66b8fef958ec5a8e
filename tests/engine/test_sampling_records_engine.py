"""What is recorded of each sampled token beside its log-prob, on a random mixture of experts.

The server runs as RL stacks start theirs: with SGLANG_RETURN_ORIGINAL_LOGPROB=1, whose log-probs leave the temperature
out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import hf_oracle, random_models
from helpers.policy_checks import LOG_PROB_ATOL, assert_rows, make_policy, prompt_of, tokens_input
from tensordict import TensorDictBase
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import ActionMask, CapabilityError, LogitsSpec, TemperatureScale, launch
from torchrl_sglang_hidden.engines.launch import LaunchedServer

TEMPERATURE = 0.5
ENTROPY_ATOL = 1e-3
TOP_K, TOP_P = 5, 0.9
NUM_LAYERS, NUM_CHOSEN = 4, 2


@pytest.fixture(scope="module")
def moe_dir(smol_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("moe") / "random-qwen3-moe"
    return str(random_models.save_random_qwen3_moe(directory, smol_dir, vocab_less=0))


@pytest.fixture(scope="module")
def moe(moe_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
        engine = launch(
            moe_dir,
            dtype="float32",
            context_length=512,
            max_total_tokens=2048,
            chunked_prefill_size=32,
            enable_return_routed_experts=True,
            sleep_on_idle=True,
            log_file=tmp_path_factory.mktemp("moe-log") / "server.log",
        )
    with engine:
        yield engine


# --- log-probs without the temperature --------------------------------------------------------------------------------


def test_log_probs_without_the_temperature_are_refused(moe: LaunchedServer, tokenizer: PreTrainedTokenizerBase) -> None:
    assert moe.info.raw_log_probs
    policy, batch = make_policy(moe, tokenizer), tokens_input([prompt_of(5, seed=1)])
    with pytest.raises(CapabilityError, match=r"row 0: .*temperature=0\.5 .*SGLANG_RETURN_ORIGINAL_LOGPROB=1"):
        policy(batch.clone(), temperature=TEMPERATURE)
    out = policy.get_new_version(return_log_probs=False)(batch.clone(), temperature=TEMPERATURE)
    assert ("log_probs", "response") not in out.keys(True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probs_that_the_temperature_leaves_alone(
    moe: LaunchedServer, tokenizer: PreTrainedTokenizerBase, moe_dir: str, temperature: float
) -> None:
    out = make_policy(moe, tokenizer, temperature=temperature)(tokens_input([prompt_of(5, seed=2)] * 2))
    assert_rows(out, moe_dir, ("prompt", "response", "full"))


def test_a_temperature_scale_is_in_the_log_probs(
    moe: LaunchedServer, tokenizer: PreTrainedTokenizerBase, moe_dir: str
) -> None:
    """What the refusal names as the way out gives the log-probs of the tokens' own distribution."""
    policy = make_policy(moe, tokenizer, temperature=1.0).get_new_version(
        constraints=TemperatureScale(TEMPERATURE), logits=LogitsSpec(full=True, stage="processed")
    )
    out = policy(tokens_input([prompt_of(5, seed=3)] * 2))
    rows = assert_rows(out, moe_dir, ("response",), temperature=TEMPERATURE)
    for row, logits_TV in zip(rows, out.get(("logits", "response"), as_list=True), strict=True):
        own_T = torch.log_softmax(logits_TV, -1).gather(-1, torch.tensor(row.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(row.log_probs_T, own_T, atol=LOG_PROB_ATOL, rtol=0)


# --- entropies, supports and experts ----------------------------------------------------------------------------------


def logits_of(model_dir: str, out: TensorDictBase, row: int) -> torch.Tensor:
    """Return Hugging Face's logits ``[T, V]`` that a row's response was drawn from, before any temperature."""
    prompt, response = (out.get(("tokens", name), as_list=True)[row].tolist() for name in ("prompt", "response"))
    truth = hf_oracle.teacher_force(model_dir, prompt, response)
    with torch.inference_mode():
        logits_TV: torch.Tensor = hf_oracle.head(hf_oracle.load(model_dir), truth.rows("response"))
    return logits_TV


def entropy_of(logits_TV: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits_TV.double()).entropy().float()


def test_entropies_are_hugging_faces(moe: LaunchedServer, tokenizer: PreTrainedTokenizerBase, moe_dir: str) -> None:
    """Of the distribution that the tokens are drawn from: before top-k, and at temperature 0 as the log-probs are."""
    policy = make_policy(moe, tokenizer, return_entropy=True, max_new_tokens=4)
    batch = tokens_input([prompt_of(length, seed=length) for length in (3, 40)])
    sampled = policy.get_new_version(return_log_probs=False)
    cases = [
        (policy(batch.clone()), 1.0),
        (policy(batch.clone(), temperature=1.0, top_k=3), 1.0),
        (sampled(batch.clone(), temperature=TEMPERATURE, top_p=0.5), TEMPERATURE),
    ]
    for out, temperature in cases:
        assert "sampling" in policy.out_keys
        for row, entropy_T in enumerate(out.get(("sampling", "entropy"), as_list=True)):
            expected_T = entropy_of(logits_of(moe_dir, out, row) / temperature)
            assert entropy_T.dtype == torch.float32
            torch.testing.assert_close(entropy_T, expected_T, atol=ENTROPY_ATOL, rtol=0)


def test_entropies_under_constraints(moe: LaunchedServer, tokenizer: PreTrainedTokenizerBase, moe_dir: str) -> None:
    """A token that is taken away adds nothing; rows with and without constraints stand in one batch."""
    allowed = (7, 8, 9, 500)
    policy = make_policy(moe, tokenizer, return_entropy=True, max_new_tokens=3, temperature=1.0)
    masked = policy.get_new_version(constraints=(ActionMask(allowed), TemperatureScale(2.0)), pad_output=True)
    out = masked(tokens_input([prompt_of(5, seed=60), prompt_of(5, seed=61)]))
    for row in range(2):
        logits_TV = logits_of(moe_dir, out, row)[:, list(allowed)] / 2.0
        torch.testing.assert_close(out["sampling"].entropy[row], entropy_of(logits_TV), atol=ENTROPY_ATOL, rtol=0)
    single = masked.get_new_version(constraints=ActionMask((7,)))(tokens_input([prompt_of(5, seed=62)]))
    assert single["sampling"].entropy.tolist() == [[0.0] * 3]


def test_what_top_k_and_top_p_leave(moe: LaunchedServer, tokenizer: PreTrainedTokenizerBase, moe_dir: str) -> None:
    policy = make_policy(moe, tokenizer, return_sampling_mask=True, temperature=1.0, top_k=TOP_K, top_p=TOP_P)
    out = policy(tokens_input([prompt_of(length, seed=70 + length) for length in (3, 9)]))
    fields = {name: out.get(("sampling", name), as_list=True) for name in ("token_ids", "token_log_probs", "log_probs")}
    assert out["sampling"].entropy is None
    for row, response_T in enumerate(out.get(("tokens", "response"), as_list=True)):
        log_probs_TV = torch.log_softmax(logits_of(moe_dir, out, row), -1)
        ids_TS, found_TS, own_T = (fields[name][row] for name in ("token_ids", "token_log_probs", "log_probs"))
        for token, (ids_S, found_S) in enumerate(zip(ids_TS, found_TS, strict=True)):
            kept = ids_S[ids_S >= 0]
            # The fewest of the best tokens that have TOP_P together, and at most TOP_K.
            best = log_probs_TV[token].topk(TOP_K)
            before = best.values.exp().cumsum(0) - best.values.exp()
            assert kept.tolist() == best.indices[before <= TOP_P].tolist()
            expected = torch.log_softmax(log_probs_TV[token, kept], -1)
            torch.testing.assert_close(found_S[: len(kept)], expected, atol=LOG_PROB_ATOL, rtol=0)
            assert found_S[len(kept) :].isneginf().all()
            assert own_T[token] == found_S[(ids_S == response_T[token]).nonzero()[0, 0]]


def test_a_greedy_token_is_drawn_from_itself(moe: LaunchedServer, tokenizer: PreTrainedTokenizerBase) -> None:
    policy = make_policy(moe, tokenizer, return_sampling_mask=True, pad_output=True)
    out = policy(tokens_input([prompt_of(4, seed=80)]))
    assert out["sampling"].token_ids[..., 0].tolist() == out["tokens"].response.tolist()
    assert out["sampling"].log_probs.tolist() == [[0.0] * 8]


@torch.inference_mode()
def experts_of(model_dir: str, ids: list[int]) -> torch.Tensor:
    """Return the experts that Hugging Face routes each position to, in increasing order, ``[N, L, k]``."""
    found = hf_oracle.load(model_dir)(torch.tensor([ids]), output_router_logits=True).router_logits
    return torch.stack([layer_NE.topk(NUM_CHOSEN, dim=-1).indices.sort(-1).values for layer_NE in found], 1)


def test_routed_experts_are_those_of_each_position(
    moe: LaunchedServer, tokenizer: PreTrainedTokenizerBase, moe_dir: str
) -> None:
    """In chunks and from the prefix cache too; aligned as token states are."""
    policy = make_policy(moe, tokenizer, return_routed_experts=True, max_new_tokens=3)
    batch = tokens_input([prompt_of(length, seed=90 + length) for length in (3, 70)])
    for _ in range(2):
        out = policy(batch.clone())
        experts = {name: out.get(("routed_experts", name), as_list=True) for name in ("prompt", "response", "full")}
        for row, ids in enumerate(out.get(("tokens", "full"), as_list=True)):
            expected = experts_of(moe_dir, ids.tolist()[:-1])
            num_prompt = len(ids) - 3
            assert experts["full"][row].dtype == torch.int32
            assert experts["full"][row].sort(-1).values.equal(expected.int())
            assert experts["prompt"][row].equal(experts["full"][row][:num_prompt])
            assert experts["response"][row].equal(experts["full"][row][num_prompt - 1 :])


def test_records_of_several_samples(moe: LaunchedServer, tokenizer: PreTrainedTokenizerBase) -> None:
    policy = make_policy(
        moe, tokenizer, return_entropy=True, return_sampling_mask=True, return_routed_experts=True, max_new_tokens=2,
        temperature=1.0, top_k=TOP_K,
    ).get_new_version(num_samples=2, inplace=False, pad_output=True)  # fmt: skip
    out = policy(tokens_input([prompt_of(4, seed=100), prompt_of(7, seed=101)]))
    assert out["sampling"].entropy.shape == (2, 2, 2)
    assert out["sampling"].token_ids.shape == (2, 2, 2, TOP_K)
    assert out["routed_experts"].full.shape == (2, 2, 7 + 2 - 1, NUM_LAYERS, NUM_CHOSEN)
    assert (out["routed_experts"].full[0, 0, :3] == -1).all()
