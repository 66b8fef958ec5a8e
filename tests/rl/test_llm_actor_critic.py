"""`make_llm_actor_critic`: the language model's own choice at first, what it learns, and which requests it makes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from helpers.fake_engine import RecordingEngine, logits_V
from helpers.policy_batches import PROMPTS, TOKENIZER, make
from tensordict import TensorDictBase
from torchrl.modules import ActorValueOperator
from torchrl.objectives import A2CLoss, ClipPPOLoss

from torchrl_sglang_hidden import (
    CandidateActor,
    HeadSpec,
    HiddenSpec,
    InputError,
    InputTypeError,
    SGLangHiddenWrapper,
    ragged,
)
from torchrl_sglang_hidden.rl import make_llm_actor_critic

CANDIDATES = [" w9", " w8 w7", " w6"]
TOKENS = (20, 30, 40, 50)
STATE = ("hidden_states", "prompt")


def of_candidates(**options: Any) -> tuple[ActorValueOperator, CandidateActor, RecordingEngine]:
    policy, engine = make("text", hidden=None, **options.pop("policy", {}))
    actor = CandidateActor(policy, CANDIDATES, action_mask_key="allowed")
    return make_llm_actor_critic(actor, **options), actor, engine


def of_tokens(**options: Any) -> tuple[ActorValueOperator, RecordingEngine]:
    policy, engine = make("text", hidden=None, action_mask_key="allowed", action_token_ids=TOKENS)
    return make_llm_actor_critic(policy, **options), engine


def batch(num_actions: int = 3) -> TensorDictBase:
    allowed = torch.ones(len(PROMPTS), num_actions, dtype=torch.bool)
    allowed[0, 1] = allowed[2, 0] = False
    return ragged(text=PROMPTS, allowed=allowed)


def recorded(both: ActorValueOperator, num_actions: int) -> TensorDictBase:
    """Return a rollout's rows as losses want them: dense, with an advantage of 1 for what was chosen."""
    torch.manual_seed(0)
    with torch.no_grad():
        out = both.get_policy_operator()(batch(num_actions))
    keys = [*both.get_policy_head().in_keys, "action", "action_log_prob"]
    dense = out.select(*keys).contiguous()
    return dense.update({"advantage": torch.ones(3, 1), "value_target": torch.full((3, 1), 2.0)})


# --- sentences --------------------------------------------------------------------------------------------------------


def test_sentences_begin_as_the_candidate_actor() -> None:
    both, actor, _ = of_candidates()
    expected = actor.get_dist(batch())
    found = both.get_policy_operator().get_dist(batch())
    torch.testing.assert_close(found.probs, expected.probs)
    assert found.probs[0, 1] == found.probs[2, 0] == 0


@pytest.mark.parametrize("heads", [None, HeadSpec(("d0",), stop_when="d0 > 9")])
def test_the_encoder_writes_the_prompts_states_and_nothing_else(heads: HeadSpec | None) -> None:
    both, _, engine = of_candidates(policy={"heads": heads})
    td = batch()
    before = set(td.keys(True, True))
    out = both(td)
    written = {"action", "action_log_prob", "logits", "logits_mask", "policy_logits", "state_value", "mixed_weights"}
    found = {key if isinstance(key, str) else key[0] for key in set(out.keys(True, True)) - before}
    assert found - {"finish_reason", "weight_version"} == written | {"hidden_states"}
    policy, _ = make("text", hidden=HiddenSpec(("prompt",)), engine=RecordingEngine(tokenizer=TOKENIZER))
    torch.testing.assert_close(out[STATE], policy(batch())[STATE])
    assert out["state_value"].shape == (3, 1)
    assert engine.payloads


def test_constraints_and_layers_of_the_policy() -> None:
    spec = HiddenSpec(("response",), layers=(0, -1), pooling="last")
    policy, _ = make("text", hidden=spec, generate_kwargs={"max_new_tokens": 2, "lora_path": None})
    both = make_llm_actor_critic(CandidateActor(policy, CANDIDATES, action_mask_key="allowed"))
    reader = both[0][0]
    assert reader.config.hidden == HiddenSpec(("prompt",), layers=(0, -1), pooling="last")
    assert reader.config.generate_kwargs["max_new_tokens"] == 0
    assert both(batch())[STATE].shape == (3, 2, 8)


def test_an_encoder_of_ones_own() -> None:
    policy, engine = make("text", hidden=None)
    own = policy.get_new_version(hidden=HiddenSpec(("prompt",), pooling="last"), hidden_states_key="mine")
    both = make_llm_actor_critic(CandidateActor(policy, CANDIDATES, action_mask_key="allowed"), encoder=own)
    assert both.get_value_head().in_keys == [("mine", "prompt")]
    assert both(batch())["state_value"].shape == (3, 1)
    assert engine.payloads


# --- single tokens ----------------------------------------------------------------------------------------------------


def test_single_tokens_begin_as_the_language_model_in_one_request() -> None:
    both, engine = of_tokens()
    td = batch(len(TOKENS))
    found = both.get_policy_operator().get_dist(td.copy())
    assert len(engine.payloads) == 1
    logits = torch.stack([logits_V(TOKENIZER(prompt)["input_ids"])[list(TOKENS)] for prompt in PROMPTS])
    expected = torch.softmax(logits.masked_fill(~td["allowed"], -torch.inf), -1)
    torch.testing.assert_close(found.probs, expected)
    out = both(td)
    assert td["allowed"][torch.arange(3), out["action"]].all()
    assert out[STATE].shape == (3, 8)


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [A2CLoss, ClipPPOLoss])
@pytest.mark.parametrize("actions", ["sentences", "tokens"])
def test_losses_of_the_heads_ask_nothing_and_make_the_chosen_likelier(actions: str, kind: Any) -> None:
    both, engine = of_candidates()[::2] if actions == "sentences" else of_tokens(actor_cells=(16,))
    data = recorded(both, 3 if actions == "sentences" else 4)
    count = len(engine.payloads)
    loss = kind(both.get_policy_head(), both.get_value_head())
    head = both.get_policy_head()
    before = head.get_dist(data.copy()).log_prob(data["action"])
    torch.testing.assert_close(before, data["action_log_prob"])
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.03)
    for _ in range(5):
        terms = loss(data.copy())
        optimizer.zero_grad()
        sum(term for name, term in terms.items() if name.startswith("loss_")).backward()
        optimizer.step()
    after = head.get_dist(data.copy()).log_prob(data["action"])
    assert after.sum() > before.sum() + 0.01
    assert (both.get_value_head()(data.copy())["state_value"] > 0).any()
    assert len(engine.payloads) == count


def test_pickles() -> None:
    both, _ = of_tokens()
    head = pickle.loads(pickle.dumps(both.get_policy_head()))
    data = recorded(both, 4)
    assert torch.equal(head.get_dist(data).probs, both.get_policy_head().get_dist(data).probs)


# --- errors -----------------------------------------------------------------------------------------------------------


class Other:
    """Scores candidates and is no wrapper."""

    input_key, action_mask_key = ("text", "prompt"), None


@pytest.mark.parametrize(
    ("actor", "options", "kind", "words"),
    [
        (lambda policy: "x", {}, InputTypeError, "actor='x' is a str; expected a CandidateActor, or"),
        (lambda policy: policy, {}, InputError, "a policy without action_token_ids: .*use get_new_version"),
        (
            lambda policy: policy.get_new_version(action_mask_key="m", action_token_ids=[1, 2]),
            {"encoder": 3},
            InputError,
            "encoder, beside a policy of single tokens, .*leave it out",
        ),
        (
            lambda policy: CandidateActor(policy, [["a", "b"], ["c"]]),
            {},
            InputError,
            "differ from row to row; expected",
        ),
        (
            lambda policy: CandidateActor(Other(), ["a", "b"]),
            {},
            InputTypeError,
            "encoder=None is a NoneType; expected",
        ),
        (lambda policy: CandidateActor(policy, ["a", "b"]), {"encoder": "x"}, InputTypeError, "encoder='x' is a str"),
        (lambda policy: CandidateActor(policy, ["a"]), {"actor_cells": (0,)}, InputError, "actor_cells=.*at least 1"),
        (lambda policy: CandidateActor(policy, ["a"]), {"critic_cells": (0,)}, InputError, "num_cells=.*at least 1"),
    ],
)
def test_refuses(actor: Any, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    policy: SGLangHiddenWrapper = make("text")[0]
    with pytest.raises(kind, match=words):
        make_llm_actor_critic(actor(policy), **options)


def test_refuses_recorded_logits_of_other_actions() -> None:
    both, _ = of_tokens()
    data = recorded(both, 4)
    data["llm_logits"] = data["llm_logits"][:, :3]
    with pytest.raises(InputError, match="logits of 3 actions; expected 4: make the actor for them"):
        both.get_policy_head().get_dist(data)
