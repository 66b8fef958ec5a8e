"""Distributions, logits and action masks on a real server, against torchrl's TransformersWrapper on the same weights.

1. ``get_dist`` and what TorchRL's losses call: mask, logits and log-probs, ragged and padded.
2. ``log_prob`` of the distribution is the log-prob that scoring gives, constrained too.
3. GRPO's numbers with this wrapper as its actor are those with torchrl's.
4. A response under each row's own mask: its tokens, its logits, its log-probs, and its scores afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import LOG_PROB_ATOL, QUESTIONS
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Tokens, TransformersWrapper
from torchrl.objectives.llm import GRPOLoss
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import ActionMask, LogitsSpec, SGLangHiddenWrapper, SGLangServer

LOGITS_ATOL = 1e-3
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = [["What is the capital of France?", "Paris."], ["Hi", "Hello, how are you?", "Well.", "Good."]]
DISTS = ("_get_sft_dist", "_get_rlhf_dist", "_get_generic_dist", "get_dist")
Make = Callable[..., Any]


@pytest.fixture
def make(smol: SGLangServer, smol_dir: str, tokenizer: PreTrainedTokenizerBase) -> Make:
    """A wrapper that scores: of the server, or torchrl's of the same weights."""

    def make(kind: str, mode: str = "history", **options: Any) -> Any:
        options = {"tokenizer": tokenizer, "input_mode": mode, "generate": False, **options}
        if mode == "history":
            options["chat_template"] = TEMPLATE
        if kind == "engine":
            return SGLangHiddenWrapper(smol, hidden=None, **options)
        return TransformersWrapper(hf_oracle.load(smol_dir), **options)

    return make


def chats() -> TensorDictBase:
    rows = []
    for chat in CHATS:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(chat)]
        rows.append(TensorDict(history=ChatHistory(full=History.from_chats([messages])[0], batch_size=())))
    return lazy_stack(rows)


def prompts(chat_ids: Callable[[str], list[int]], questions: list[str]) -> TensorDictBase:
    return lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(chat_ids(text)))) for text in questions])


# --- 1. distributions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", DISTS)
@torch.no_grad()
def test_distributions_are_torchrls_own(make: Make, name: str, padded: bool) -> None:
    # torchrl's get_dist takes a mask only when it is told which; ours is that of the tokens by itself.
    told = {"mask_key": ("masks", "all_attention_mask"), "padding_side": "left"} if name == "get_dist" else {}
    ours_data, theirs_data = chats(), chats()
    if padded and name == "_get_sft_dist":
        # torchrl's reads the masks of its input there, which only a rollout or a score has.
        ours_data, theirs_data = (make("hf", pad_output=True)(data) for data in (ours_data, theirs_data))
    ours = getattr(make("engine", pad_output=padded), name)(ours_data)
    theirs = getattr(make("hf", pad_output=padded), name)(theirs_data, **told)
    assert torch.equal(ours.mask, theirs.mask)
    # Nothing is before a sequence's first token. In a padded batch torchrl has there what the model says of a pad.
    real_BN = make("engine")._get_generic_dist(chats()).mask
    judged_BN = ours.mask & (real_BN.cumsum(-1) > 1)
    assert judged_BN.any(-1).all()
    torch.testing.assert_close(ours.logits[judged_BN], theirs.logits[judged_BN], atol=LOGITS_ATOL, rtol=0)
    best_BN = theirs.logits.argmax(-1)
    found_BN, expected_BN = (dist.log_prob(best_BN)[judged_BN] for dist in (ours, theirs))
    torch.testing.assert_close(found_BN, expected_BN, atol=LOG_PROB_ATOL, rtol=0)
    assert (found_BN < -0.01).any(), "the model is certain of everything: this shows nothing"


# --- 2. log-probs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [None, "words"])
def test_the_distribution_has_the_log_probs_of_scoring(
    make: Make, tokenizer: PreTrainedTokenizerBase, allowed: str | None
) -> None:
    words = [
        token for text in ("Paris.<|im_end|>", "Hello, how are you?", "Good.") for token in tokenizer(text).input_ids
    ]
    policy = make("engine", constraints=[] if allowed is None else ActionMask(words))
    data = chats()
    dist = policy._get_rlhf_dist(data)
    ids_BN = data.get(("tokens", "full"), as_padded_tensor=True, padding_side="left", padding_value=0)
    scored = policy.log_prob(chats(), as_list=True)
    for found_N, mask_N, expected_T in zip(dist.log_prob(ids_BN), dist.mask, scored, strict=True):
        torch.testing.assert_close(found_N[mask_N], expected_T, atol=LOG_PROB_ATOL, rtol=0)
        if allowed is not None:
            assert expected_T.isfinite().all()
    if allowed is not None:
        assert (dist.logits[dist.mask] > -math.inf).sum(-1).tolist() == [len(set(words))] * int(dist.mask.sum())


# --- 3. a loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["sft", "rlhf", "generic"])
def test_grpo_with_either_actor(make: Make, chat_ids: Callable[[str], list[int]], strategy: str) -> None:
    sampler = make("engine", "tokens", generate=True, generate_kwargs={"max_new_tokens": 8, "temperature": 1.0})
    batch = sampler(prompts(chat_ids, QUESTIONS[:3]))
    batch["advantage"] = torch.tensor([0.5, -1.0, 2.0])[:, None, None]
    ours = GRPOLoss(make("engine", "tokens"), masking_strategy=strategy)(batch)
    with torch.no_grad():
        theirs = GRPOLoss(make("hf", "tokens"), masking_strategy=strategy)(batch)
    for name in ("loss_objective", "loss_entropy", "kl_approx", "ESS"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-3, rtol=1e-3, msg=name)
    assert not ours.loss_objective.requires_grad


# --- 4. action masks -------------------------------------------------------------------------------------------------


def test_each_row_chooses_among_its_own_actions(
    make: Make, smol_dir: str, chat_ids: Callable[[str], list[int]]
) -> None:
    actions = [100, 2000, 30000, 40, 5]
    masks = torch.tensor([[True, True, False, False, False], [False, False, True, True, True], [True] * 5])
    policy = make(
        "engine",
        "tokens",
        generate=True,
        action_mask_key="action_mask",
        action_token_ids=actions,
        logits=LogitsSpec(token_ids=actions, stage="processed"),
        generate_kwargs={"max_new_tokens": 4, "temperature": 0.7, "ignore_eos": True},
    )
    batch = prompts(chat_ids, QUESTIONS[:3])
    for row, mask_A in zip(batch.unbind(0), masks, strict=True):
        row["action_mask"] = mask_A
    out = policy(batch)
    ids_A = torch.tensor(actions)
    for row, mask_A in zip(out.unbind(0), masks, strict=True):
        response_T, prompt = row["tokens"].response, row["tokens"].prompt.tolist()
        assert torch.isin(response_T, ids_A[mask_A]).all()
        model = hf_oracle.load(smol_dir)
        with torch.no_grad():
            fed = torch.tensor([[*prompt, *response_T.tolist()]])
            raw_TA = model(fed).logits[0, len(prompt) - 1 : -1][:, ids_A]
        expected_TA = (raw_TA / 0.7).masked_fill(~mask_A, -math.inf)
        torch.testing.assert_close(row["logits"].response, expected_TA, atol=LOGITS_ATOL, rtol=0)
        chosen_T = (response_T[:, None] == ids_A).int().argmax(-1)
        log_probs_T = expected_TA.log_softmax(-1).gather(-1, chosen_T[:, None])[:, 0]
        torch.testing.assert_close(row["log_probs"].response, log_probs_T, atol=LOG_PROB_ATOL, rtol=0)
    # At temperature 1 scoring says what sampling said.
    warm = policy.get_new_version(generate_kwargs={"max_new_tokens": 4, "ignore_eos": True})(batch)
    said = warm.get(("log_probs", "response"), as_list=True)
    for found_T, said_T in zip(warm_scores(policy, warm), said, strict=True):
        torch.testing.assert_close(found_T, said_T, atol=LOG_PROB_ATOL, rtol=0)


def warm_scores(policy: SGLangHiddenWrapper, sampled: TensorDictBase) -> list[torch.Tensor]:
    scorer = policy.get_new_version(generate=False, logits=None)
    found: list[torch.Tensor] = scorer.log_prob(sampled, as_list=True)
    return found
