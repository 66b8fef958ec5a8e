"""The distribution half of torchrl's wrapper contract, over the recorder.

1. A loss built from a sequence that holds the wrapper takes the keys of the sequence's own distribution.
2. What needs logits raises, whichever way it is asked, and sends nothing.
3. ``log_prob`` gives the log-probs of the responses in given sequences, in the form that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorder import HIDDEN_SIZE, RecordingEngine, log_prob_of, tiny_tokenizer
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.data.llm import History
from torchrl.modules import ActorValueOperator, ProbabilisticActor, ValueOperator
from torchrl.modules.llm.policies import ChatHistory, Masks, Text, Tokens
from torchrl.objectives import A2CLoss, ClipPPOLoss, LossModule
from torchrl.objectives.llm import GRPOLoss

from torchrl_sglang_hidden import CapabilityError, InputError, SGLangHiddenWrapper

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
    """What `log_prob` gives for `chats`."""
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
    with pytest.raises(CapabilityError, match=r"this wrapper as its actor needs the logits .* TransformersWrapper"):
        kind(policy, critic)


# --- 2. what needs logits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("name", DISTS)
def test_distributions_raise(name: str, generate: bool) -> None:
    policy, engine = make(generate=generate)
    batch = chats()
    before = sorted(map(str, batch.keys(True, True)))
    with pytest.raises(CapabilityError, match=r"^get_dist needs the logits .* get_new_version\(generate=False\)"):
        getattr(policy, name)(batch)
    with pytest.raises(CapabilityError, match="logits"):
        policy._get_dist_with_custom_mask(batch, torch.ones(2, 3), logits_key="logits")
    assert sorted(map(str, batch.keys(True, True))) == before
    assert engine.payloads == []


@pytest.mark.parametrize("strategy", ["sft", "rlhf", "generic"])
def test_grpo_with_the_wrapper_as_its_actor(strategy: str) -> None:
    policy, engine = make(generate=False)
    batch = make()[0](prompts())
    batch["advantage"] = torch.ones(2, 1, 1)
    with pytest.raises(CapabilityError, match="TransformersWrapper of the same weights as actor"):
        GRPOLoss(policy, masking_strategy=strategy)(batch)
    assert engine.payloads == []


def prompts() -> TensorDictBase:
    return lazy_stack([TensorDict(history=ChatHistory(prompt=chat_of(chat[:1]), batch_size=())) for chat in CHATS])


# --- 3. log_prob ------------------------------------------------------------------------------------------------------


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
    with pytest.raises(RuntimeError, match="padded tensors"):
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
