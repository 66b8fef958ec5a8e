"""`logits_from_hidden` on states that a real server returned: Hugging Face's logits of the same tokens.

Of a tied head, of one of its own, and of models that cap or scale what the head gives.
"""

from __future__ import annotations

from typing import NamedTuple

import oracle
import pytest
import torch
from checks import CHUNKED_PREFILL_SIZE, make_policy, prompt_of, tokens_input
from states import Served
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.modules.llm.policies import Tokens
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    AlignmentError,
    HiddenSpec,
    SGLangHiddenWrapper,
    WeightsError,
    logits_from_hidden,
)

LOGITS_ATOL = 1e-3
# A tied head that is scaled, one of its own, one that is capped.
pytestmark = pytest.mark.parametrize("served", ["granite", "qwen3", "gemma3"], indirect=True)


class Case(NamedTuple):
    policy: SGLangHiddenWrapper
    model_dir: str


@pytest.fixture
def case(served: Served, tokenizer: PreTrainedTokenizerBase) -> Case:
    policy = make_policy(served.server, tokenizer, temperature=1.0, max_new_tokens=12)
    states = HiddenSpec(("prompt", "response", "full"), tokens=True)
    return Case(policy.get_new_version(hidden=states), served.model_dir)


@torch.inference_mode()
def hugging_face(model_dir: str, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = oracle.load(model_dir)(torch.tensor([ids])).logits[0]
    return logits


def generated(case: Case) -> TensorDictBase:
    return case.policy(tokens_input([prompt_of(n, seed=5000 + n) for n in (1, 20, CHUNKED_PREFILL_SIZE + 9)]))


def of(out: TensorDictBase, name: str, segment: str) -> list[torch.Tensor]:
    found: list[torch.Tensor] = out.get((name, segment), as_list=True)
    return found


@torch.no_grad()
def test_logits_of_every_segment_are_hugging_faces(case: Case) -> None:
    out = generated(case)
    model = oracle.load(case.model_dir)
    logits = {
        segment: logits_from_hidden(of(out, "token_hidden_states", segment), model)
        for segment in ("prompt", "response", "full")
    }
    for row, ids in enumerate(of(out, "tokens", "full")):
        expected_NV = hugging_face(case.model_dir, ids.tolist())[:-1]
        num_prompt = len(of(out, "tokens", "prompt")[row])
        for segment, rows_NV in (
            ("full", expected_NV),
            ("prompt", expected_NV[:num_prompt]),
            ("response", expected_NV[num_prompt - 1 :]),
        ):
            assert logits[segment][row].dtype == torch.float32
            torch.testing.assert_close(logits[segment][row], rows_NV, atol=LOGITS_ATOL, rtol=0)


@torch.no_grad()
def test_the_sampled_log_probs_agree(case: Case) -> None:
    out = generated(case)
    model = oracle.load(case.model_dir)
    tokens, log_probs = of(out, "tokens", "response"), of(out, "log_probs", "response")
    states = of(out, "token_hidden_states", "response")
    version = case.policy.model.info.weight_version
    logits = logits_from_hidden(
        states, model, tokens=tokens, log_probs=log_probs, weight_version=out["weight_version"], head_version=version
    )
    assert [row.shape[0] for row in logits] == [len(row) for row in tokens]
    # The same of the whole sequence, where only the response's log-probs were measured.
    logits_from_hidden(
        of(out, "token_hidden_states", "full"),
        model,
        tokens=[row[1:] for row in of(out, "tokens", "full")],
        log_probs=[row[1:] for row in of(out, "log_probs", "full")],
    )
    # Off by one token, and of another temperature.
    with pytest.raises(AlignmentError, match="row 0, token "):
        logits_from_hidden(states, model, tokens=tokens, log_probs=[row.roll(1) for row in log_probs])
    cooler = case.policy(tokens_input([prompt_of(20, seed=5020)]), temperature=0.5)
    with pytest.raises(AlignmentError, match="row 0, token "):
        logits_from_hidden(
            of(cooler, "token_hidden_states", "response"),
            model,
            tokens=of(cooler, "tokens", "response"),
            log_probs=of(cooler, "log_probs", "response"),
        )
    with pytest.raises(WeightsError, match=f"weight version '{version}' and the head of 'next'"):
        logits_from_hidden(states, model, weight_version=out["weight_version"], head_version="next")


@torch.no_grad()
def test_a_scored_sequence_agrees(case: Case) -> None:
    ids = prompt_of(CHUNKED_PREFILL_SIZE + 5, seed=5100)
    scorer = case.policy.get_new_version(generate=False)
    scored = scorer(lazy_stack([TensorDict(tokens=Tokens(full=torch.tensor(ids)), batch_size=())]))[0]
    logits = logits_from_hidden(
        scored["token_hidden_states"].full[:-1],
        oracle.load(case.model_dir),
        tokens=scored["tokens"].full[1:],
        log_probs=scored["log_probs"].full[1:],
    )
    torch.testing.assert_close(logits, hugging_face(case.model_dir, ids)[:-1], atol=LOGITS_ATOL, rtol=0)


@torch.no_grad()
def test_the_head_alone_does_where_nothing_follows_it(case: Case) -> None:
    """And of the others it does not, which the check finds: else these tests would not see a cap or a scale."""
    out = generated(case)
    model = oracle.load(case.model_dir)
    head = model.get_output_embeddings()
    check = {"tokens": of(out, "tokens", "response"), "log_probs": of(out, "log_probs", "response")}
    states = of(out, "token_hidden_states", "response")
    if {"final_logit_softcapping", "logits_scaling"} & model.config.to_dict().keys():
        with pytest.raises(AlignmentError):
            logits_from_hidden(states, head, **check)
    else:
        logits_from_hidden(states, head, **check)
        logits_from_hidden(states, head.weight, **check)
