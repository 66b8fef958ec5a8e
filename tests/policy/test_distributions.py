"""The distribution half of torchrl's wrapper contract, over the fake engine.

1. A loss built from a sequence that holds the wrapper takes the keys of the sequence's own distribution.
2. ``get_dist`` and what TorchRL's losses call are the distributions that given tokens are drawn from, each over the
   tokens of its mask.
3. GRPO takes the wrapper as its actor.
4. ``log_prob`` gives the log-probs of the responses in given sequences, in the form that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.fake_engine import HIDDEN_SIZE, PAD_ID, WORDS, RecordingEngine, log_prob_of, logits_V, tiny_tokenizer
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.data.llm import History
from torchrl.modules import ActorValueOperator, LLMMaskedCategorical, ProbabilisticActor, ValueOperator
from torchrl.modules.llm.policies import ChatHistory, Masks, Text, Tokens
from torchrl.objectives import A2CLoss, ClipPPOLoss, LossModule
from torchrl.objectives.llm import GRPOLoss

from torchrl_sglang_hidden import ActionMask, CapabilityError, InputError, LogitsSpec, SGLangHiddenWrapper

TEMPLATE = (
    "{% for message in messages %}<|start|> {{ message.role }} {% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }} <|end|>{% endgeneration %}{% else %}{{ message.content }} <|end|>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<|start|> assistant {% endif %}"
)
TOKENIZER = tiny_tokenizer()
# The answers of each chat, as the ids that the mask covers: their words, and the end of their turn.
CHATS = [["w1 w2", "w3"], ["w4", "w5 w6 w7", "w8", "w9"]]
ANSWERS = ["w3 <|end|>", "w5 w6 w7 <|end|> w9 <|end|>"]
DISTS = (
    "get_dist", "_get_sft_dist", "_get_rlhf_dist", "_get_generic_dist", "_get_dist_with_prompt_mask",
    "_get_dist_with_assistant_mask", "_get_dist_with_attention_mask",
)  # fmt: skip
STATE = ("hidden_states", "prompt")


def make(mode: str = "history", **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    engine = RecordingEngine(tokenizer=TOKENIZER)
    options = {"chat_template": TEMPLATE, **options} if mode == "history" else options
    return SGLangHiddenWrapper(engine, tokenizer=TOKENIZER, input_mode=mode, **options), engine


def chat_of(messages: list[str]) -> History:
    roles = ("user", "assistant")
    return History.from_chats([[{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]])[0]


def chats() -> TensorDictBase:
    return lazy_stack([TensorDict(history=ChatHistory(full=chat_of(chat), batch_size=())) for chat in CHATS])


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def answers() -> list[torch.Tensor]:
    """Return what `log_prob` gives for `chats`."""
    return [torch.tensor([log_prob_of(i) for i in ids_of(text)]) for text in ANSWERS]


def operator(policy: SGLangHiddenWrapper) -> ActorValueOperator:
    actor = ProbabilisticActor(
        TensorDictModule(nn.Linear(HIDDEN_SIZE, 3), in_keys=[STATE], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=Categorical,
        return_log_prob=True,
    )
    return ActorValueOperator(policy, actor, ValueOperator(nn.Linear(HIDDEN_SIZE, 1), in_keys=[STATE]))


# --- 1. the keys of a sequence that holds the wrapper -----------------------------------------------------------------


def test_the_wrapper_adds_no_keys() -> None:
    policy, _ = make()
    actor = operator(policy).get_policy_operator()
    assert actor.log_prob_keys == ["action_log_prob"]
    assert actor.dist_sample_keys == ["action"]
    assert actor.dist_params_keys == ["logits"]
    assert (list(policy.log_prob_keys), list(policy.dist_sample_keys), list(policy.dist_params_keys)) == ([], [], [])


@pytest.mark.parametrize("kind", [A2CLoss, ClipPPOLoss])
def test_losses_built_from_an_operator(kind: type[LossModule]) -> None:
    both = operator(make()[0])
    loss = kind(both.get_policy_operator(), both.get_value_operator())
    assert (loss.tensor_keys.action, loss.tensor_keys.sample_log_prob) == ("action", "action_log_prob")
    assert {"action", ("history", "prompt")} <= set(loss.in_keys)


@pytest.mark.parametrize("kind", [A2CLoss, ClipPPOLoss])
def test_the_wrapper_is_no_actor_of_such_a_loss(kind: type[LossModule]) -> None:
    policy, _ = make()
    critic = ValueOperator(nn.Linear(HIDDEN_SIZE, 1), in_keys=[STATE])
    with pytest.raises(CapabilityError, match=r"this wrapper as its actor: it writes no action"):
        kind(policy, critic)


# --- 2. distributions ------------------------------------------------------------------------------------------------


def flat(td: TensorDictBase) -> list[TensorDictBase]:
    return [row for part in td.unbind(0) for row in flat(part)] if td.ndim else [td]


def head_NV(ids: list[int]) -> torch.Tensor:
    """Return the fake engine's logits for each token. The first token has none before it, so its row is zeros."""
    return torch.stack([torch.zeros(len(WORDS)), *(logits_V(ids[:place]) for place in range(1, len(ids)))])


def chat_ids() -> list[list[int]]:
    scored = make(generate=False)[0](chats())
    return [row["tokens"].full.tolist() for row in scored.unbind(0)]


def left(rows: list[torch.Tensor], value: Any = 0, side: str = "left") -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def chat_masks(name: str) -> list[torch.Tensor]:
    """Return what each distribution's mask must be, row by row."""
    scored = make(generate=False)[0](chats())
    if name in ("_get_sft_dist", "_get_dist_with_prompt_mask"):
        # Without tokens.prompt, the assistant's.
        name = "_get_rlhf_dist"
    field = "all_assistant_mask" if "rlhf" in name or "assistant" in name else "all_attention_mask"
    return [getattr(row["masks"], field) for row in scored.unbind(0)]


@pytest.mark.parametrize("shape", [(), (2,), (2, 1)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", DISTS)
def test_distributions(name: str, padded: bool, shape: tuple[int, ...]) -> None:
    policy, engine = make(generate=False, pad_output=padded)
    batch = chats()
    data = {(): batch[0], (2,): batch, (2, 1): lazy_stack([batch[:1], batch[1:]])}[shape]
    dist = getattr(policy, name)(data)
    size = 2 if shape else 1
    ids, masks = chat_ids()[:size], chat_masks(name)[:size]
    ids_BN, mask_BN = left([torch.tensor(row) for row in ids]), left(masks, False)
    logits_BNV = left([head_NV(row) for row in ids])
    assert isinstance(dist, LLMMaskedCategorical)
    assert dist.position_level_masking
    assert torch.equal(dist.mask, mask_BN.reshape(*shape, -1))
    assert torch.equal(dist.logits, logits_BNV.reshape(*shape, *logits_BNV.shape[1:]))
    expected_BN = logits_BNV.log_softmax(-1).gather(-1, ids_BN[..., None])[..., 0] * mask_BN
    found = dist.log_prob(ids_BN.reshape(*shape, -1))
    torch.testing.assert_close(found, expected_BN.reshape(*shape, -1), atol=1e-5, rtol=0)
    assert not dist.logits.requires_grad
    assert len(engine.payloads) == 1
    # The input is as it was, but for the ids that TorchRL's own writes there too.
    for row, row_ids in zip(flat(data), ids, strict=True):
        written = {"history", "tokens"} if name in ("_get_rlhf_dist", "_get_dist_with_assistant_mask") else {"history"}
        assert set(row.keys()) == written
        if "tokens" in written and not padded:
            assert row["tokens", "full"].tolist() == row_ids


@pytest.mark.parametrize("name", DISTS)
def test_a_wrapper_that_samples_has_no_distribution_of_what_is_given(name: str) -> None:
    policy, engine = make()
    with pytest.raises(CapabilityError, match=r"with generate=True: .*get_new_version\(generate=False\)"):
        getattr(policy, name)(chats())
    with pytest.raises(CapabilityError, match="generate=True"):
        policy._get_dist_with_custom_mask(chats(), torch.ones(2, 3).bool())
    assert engine.payloads == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_is_where_it_is_asked_for(side: str) -> None:
    dist = make(generate=False)[0].get_dist(chats(), padding_side=side, padding_value=7.0)
    rows = [torch.ones(len(ids), dtype=torch.bool) for ids in chat_ids()]
    assert torch.equal(dist.mask, left(rows, False, side))
    assert torch.equal(dist.logits, left([head_NV(ids) for ids in chat_ids()], 7.0, side))


def test_a_mask_of_ones_own() -> None:
    policy, _ = make(generate=False)
    batch = chats()
    for row, ids in zip(batch.unbind(0), chat_ids(), strict=True):
        row["mine"] = torch.arange(len(ids)) % 2 == 0
    expected = left([row["mine"] for row in batch.unbind(0)], False)
    assert torch.equal(policy.get_dist(batch, mask_key="mine").mask, expected)
    assert torch.equal(policy._get_dist_with_custom_mask(batch, expected).mask, expected)
    with pytest.raises(InputError, match=r"a mask of torch.bool and shape \(2, 3\)"):
        policy._get_dist_with_custom_mask(batch, torch.ones(2, 3).bool())
    batch[0]["mine"] = torch.ones(2).bool()
    with pytest.raises(InputError, match=rf"row 0: a mask of 2 tokens, and {len(chat_ids()[0])} are scored"):
        policy.get_dist(batch, mask_key="mine")
    with pytest.raises(InputError, match="there is no mask at 'yours'"):
        policy.get_dist(batch, mask_key="yours")


def test_the_response_is_what_stands_behind_the_prompt() -> None:
    rollout = make("tokens")[0](token_prompts())
    for padded in (False, True):
        data = make("tokens", pad_output=padded)[0](token_prompts())
        policy, _ = make("tokens", generate=False, pad_output=padded)
        dist = policy._get_sft_dist(data)
        for row, mask_N in zip(rollout.unbind(0), dist.mask, strict=True):
            assert mask_N.sum() == len(row["tokens"].response)
        tokens = data.get(("tokens", "full"), as_padded_tensor=True, padding_side="left", padding_value=PAD_ID)
        assert torch.equal(dist.mask, left([row["masks"].all_assistant_mask for row in data.unbind(0)], False))
        assert (dist.log_prob(tokens)[~dist.mask] == 0).all()


def test_tokens_without_an_assistant_mask() -> None:
    policy, _ = make("tokens", generate=False)
    data = lazy_stack([TensorDict(tokens=Tokens(full=torch.arange(6, 9), batch_size=()))])
    with pytest.raises(InputError, match=r"no mask at \('masks', 'all_assistant_mask'\), with input_mode='tokens'"):
        policy._get_rlhf_dist(data)
    assert policy._get_generic_dist(data).mask.all()


def test_under_constraints_it_is_what_log_prob_says() -> None:
    policy, _ = make(generate=False, constraints=ActionMask([1, *ids_of("w3 w5 w6 w7 w9 w8")]))
    dist = policy._get_rlhf_dist(chats())
    found_BN = dist.log_prob(left([torch.tensor(ids) for ids in chat_ids()]))
    for row_N, mask_N, expected_T in zip(found_BN, dist.mask, policy.log_prob(chats(), as_list=True), strict=True):
        torch.testing.assert_close(row_N[mask_N], expected_T, atol=1e-5, rtol=0)
    assert dist.entropy().isfinite().all()


def test_over_an_action_set_an_id_is_no_place() -> None:
    policy, _ = make(generate=False, logits=LogitsSpec(token_ids=(9, 30)))
    whole = policy.get_dist(chats())
    for dist in (whole, policy._get_dist_with_custom_mask(chats(), whole.mask)):
        with pytest.raises(InputError, match=r"log_prob of 30: .* over the 2 token_ids .* takes places in them, not"):
            dist.log_prob(torch.full(dist.batch_shape, 30))


def test_over_an_action_set_it_takes_places_in_it() -> None:
    actions = ids_of("w3 w5 <|end|>")
    policy, _ = make(generate=False, logits=LogitsSpec(token_ids=actions, dtype=torch.bfloat16))
    dist = policy.get_dist(chats()[0])
    (ids, _) = chat_ids()
    expected_NC = head_NV(ids)[:, actions].bfloat16().float().log_softmax(-1)
    assert dist.logits.dtype == torch.float32
    for place in range(len(actions)):
        found_N = dist.log_prob(torch.full((len(ids),), place))
        torch.testing.assert_close(found_N, expected_NC[:, place], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ({}, {"tensordict_out": TensorDict()}, "get_dist with tensordict_out="),
        ({}, {"layout": torch.jagged}, r"layout=torch.jagged"),
        ({}, {"as_nested_tensor": True}, "as_nested_tensor=True"),
        ({}, {"as_padded_tensor": False}, "as_padded_tensor=False"),
        ({}, {"logits_key": "other"}, "logits_key='other': the wrapper's is 'logits'"),
        ({"masks_key": None}, {}, "masks_key=None.* it needs all three"),
        ({"tokens_key": None}, {}, "tokens_key=None.* it needs all three"),
        ({"logits_key": None}, {}, "logits_key=None.* it needs all three"),
    ],
)
def test_distributions_that_cannot_be_made(options: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    policy, engine = make(generate=False, **options)
    with pytest.raises(InputError, match=words):
        policy.get_dist(chats(), **arguments)
    with pytest.raises(TypeError, match="temperature"):
        policy.get_dist(chats(), temperature=1.0)
    assert engine.payloads == []


def test_distributions_under_the_users_own_keys() -> None:
    policy, _ = make(generate=False, logits_key=("deep", "logits"), masks_key="where", tokens_key=("my", "tokens"))
    batch = chats()
    for name in DISTS:
        assert torch.equal(getattr(policy, name)(batch.clone()).mask, left(chat_masks(name), False))
    policy._get_rlhf_dist(batch)
    assert [row["my", "tokens", "full"].tolist() for row in batch.unbind(0)] == chat_ids()


# --- 3. a loss -------------------------------------------------------------------------------------------------------


def token_prompts() -> TensorDictBase:
    return lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(ids))) for ids in ([6, 7, 8], [9, 10])])


@pytest.mark.parametrize("strategy", ["sft", "rlhf", "generic"])
def test_grpo_with_the_wrapper_as_its_actor(strategy: str) -> None:
    batch = make("tokens")[0](token_prompts())
    batch["advantage"] = torch.ones(2, 1, 1)
    before = sorted(map(str, batch.keys(True, True)))
    losses = GRPOLoss(make("tokens", generate=False)[0], masking_strategy=strategy)(batch)
    rows = [(row["tokens"].full.tolist(), row["log_probs"].full) for row in batch.unbind(0)]
    # Only the response was sampled, whatever the mask: log-probs elsewhere are NaN.
    differences = [
        torch.nan_to_num(sampled_N - head_NV(ids).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0])
        for ids, sampled_N in rows
    ]
    torch.testing.assert_close(losses.kl_approx, left(differences).mean(), atol=1e-5, rtol=0)
    assert losses.loss_objective.isfinite()
    assert losses.loss_entropy.isfinite()
    assert not losses.loss_objective.requires_grad
    assert sorted(map(str, batch.keys(True, True))) == before


# --- 4. log_prob ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_log_prob_of_several_turns(padded: bool) -> None:
    policy, engine = make(generate=False, pad_output=padded)
    batch = chats()
    found = policy.log_prob(batch, as_list=True)
    assert [row.tolist() for row in found] == [row.tolist() for row in answers()]
    assert set(batch.keys()) == {"history"}
    assert len(engine.payloads) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_log_prob_padded(side: str) -> None:
    found_BT = make(generate=False)[0].log_prob(chats(), as_padded_tensor=True, padding_side=side, padding_value=7.0)
    pad_T = torch.full((4,), 7.0)
    short_T, long_T = answers()
    first_T = torch.cat([pad_T, short_T] if side == "left" else [short_T, pad_T])
    assert torch.equal(found_BT, torch.stack([first_T, long_T]))


def test_log_prob_nested_and_plain() -> None:
    policy, _ = make(generate=False)
    nested = policy.log_prob(chats(), as_nested_tensor=True)
    assert nested.is_nested
    assert torch.equal(nested.values(), torch.cat(answers()))
    assert torch.equal(policy.log_prob(chats()[1:]), answers()[1][None])
    with pytest.raises(RuntimeError, match="Failed to stack tensors"):
        policy.log_prob(chats())


@pytest.mark.parametrize("shape", [(), (2, 1)])
def test_log_prob_of_any_batch_shape(shape: tuple[int, ...]) -> None:
    batch = chats()
    data = lazy_stack([batch[:1], batch[1:]]) if shape else batch[0]
    found = make(generate=False)[0].log_prob(data, as_list=True)
    if shape:
        assert [row.tolist() for (row,) in found] == [row.tolist() for row in answers()]
    else:
        assert torch.equal(found, answers()[0])


def test_log_prob_of_ids_with_a_mask() -> None:
    policy, _ = make("tokens", generate=False)
    ids_N, mask_N = torch.arange(10, 16), torch.tensor([False, False, True, True, False, True])
    data = TensorDict(tokens=Tokens(full=ids_N, batch_size=()), masks=Masks(all_assistant_mask=mask_N, batch_size=()))
    expected = [log_prob_of(i) for i in ids_N[mask_N].tolist()]
    assert policy.log_prob(lazy_stack([data])).tolist() == [expected]


def test_log_prob_under_the_users_own_keys() -> None:
    policy, _ = make(generate=False, log_probs_key=("deep", "scores"), masks_key="where")
    assert torch.equal(policy.log_prob(chats()[0]), answers()[0])


def test_log_prob_of_a_sampling_wrapper() -> None:
    policy, engine = make()
    with pytest.raises(RuntimeError, match=r"generate=True.*get_new_version\(generate=False\)") as caught:
        policy.log_prob(chats())
    assert isinstance(caught.value, CapabilityError)
    assert engine.payloads == []


@pytest.mark.parametrize("option", [{"return_log_probs": False}, {"log_probs_key": None}, {"masks_key": None}])
def test_log_prob_without_what_it_reads(option: dict[str, Any]) -> None:
    policy, engine = make(generate=False, **option)
    with pytest.raises(InputError, match=f"{next(iter(option))}={next(iter(option.values()))}.* get_new_version"):
        policy.log_prob(chats())
    assert engine.payloads == []


@pytest.mark.parametrize(
    ("build", "data", "state"),
    [
        (lambda: make("text", generate=False), lambda: TensorDict(text=Text(full="w1 w2", batch_size=())), "None"),
        (
            lambda: make("tokens", generate=False),
            lambda: TensorDict(tokens=Tokens(full=torch.arange(9), batch_size=())),
            "None",
        ),
        (
            lambda: make(generate=False),
            lambda: TensorDict(history=ChatHistory(full=chat_of(["w1"]), batch_size=())),
            "False everywhere",
        ),
    ],
    ids=["text", "tokens", "history"],
)
def test_log_prob_where_the_response_is_not_known(
    build: Callable[[], tuple[SGLangHiddenWrapper, RecordingEngine]], data: Callable[[], TensorDictBase], state: str
) -> None:
    with pytest.raises(InputError, match=rf"all_assistant_mask'\) is {state}.*assistant's messages"):
        build()[0].log_prob(data())
