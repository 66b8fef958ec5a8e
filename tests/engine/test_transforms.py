"""TorchRL's LLM transforms and its SFT loss over this wrapper: numbers, against one Hugging Face forward pass.

1. ``RetrieveLogProb`` gives every token's log-prob, or the assistant's alone, 0 elsewhere.
2. ``RetrieveKL`` and ``KLComputation`` give ``log p - log q`` per token, with this wrapper on either side or on both.
   The NaN of pads and of unmeasured prompts counts as no divergence.
3. ``RetrieveKL`` makes its generator of a collector's policy.
4. ``SFTLoss`` is the assistant's mean negative log-prob, with this wrapper as the model or as the reference;
   ``DistillationLoss`` takes it as the teacher.
5. ``AddThinkingPrompt`` changes the next prompt, and nothing of the turn that was.
6. ``PolicyVersion`` counts with the weights of the generator, while the reference stays.

Every side is given the same chat template: torchrl picks one by the tokenizer's name otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import LOG_PROB_ATOL, QUESTIONS, tokens_input
from helpers.torchrl_pipelines import AnswerReward, chat_env, chat_of, collector
from helpers.weight_changes import load_trainer, perturb
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data import Composite, Unbounded
from torchrl.data.llm import History
from torchrl.envs import Transform
from torchrl.envs.llm.transforms import (
    AddThinkingPrompt,
    KLComputation,
    KLRewardTransform,
    PolicyVersion,
    RetrieveKL,
    RetrieveLogProb,
)
from torchrl.modules.llm.policies import ChatHistory, TransformersWrapper
from torchrl.objectives.llm import DistillationLoss, SFTLoss
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torchrl_sglang_hidden import SGLangHiddenWrapper, SGLangServer

Scorer = Callable[..., Any]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [["What is the capital of France?", "Paris."], ["Hi", "Hello, how are you?", "Well.", "Good."]]
CHATS = [
    [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turns)] for turns in TURNS
]
LOG_PROBS, GEN, REF = ("log_probs", "full"), ("gen_log_probs", "full"), ("ref_log_probs", "full")
# Far from nothing, and from the tolerance of a log-prob: a divergence that is not computed would be seen.
SEEN = 20 * LOG_PROB_ATOL


class Scored(NamedTuple):
    """What Hugging Face says of one chat: ids, log-probs with 0 for the first, and which the assistant wrote."""

    ids: list[int]
    log_probs_N: torch.Tensor
    assistant_N: torch.Tensor

    def masked(self, assistant_only: bool) -> torch.Tensor:
        return self.log_probs_N.masked_fill(~self.assistant_N, 0.0) if assistant_only else self.log_probs_N


@torch.inference_mode()
def log_probs_of(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    logits_NV = model(torch.tensor([list(ids)])).logits[0, :-1]
    return torch.cat([torch.zeros(1), logits_NV.log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]])


def truth(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> Scored:
    encoded = tokenizer.apply_chat_template(
        chat,
        chat_template=TEMPLATE,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = encoded["input_ids"]
    return Scored(ids, log_probs_of(model, ids), torch.tensor(encoded["assistant_masks"]).bool())


def padded_left(rows: Sequence[torch.Tensor], value: float) -> list[torch.Tensor]:
    width = max(map(len, rows))
    return [torch.nn.functional.pad(row, (width - len(row), 0), value=value) for row in rows]


def assert_rows_close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for found_N, expected_N in zip(found, expected, strict=True):
        torch.testing.assert_close(found_N, expected_N, atol=LOG_PROB_ATOL, rtol=0, equal_nan=True)


def chats(reward: float | None = None) -> TensorDictBase:
    """The chats to score; with a reward ``[B, 1, 1]``, in the shape of a step of an environment."""
    rows = []
    for chat in CHATS:
        row = TensorDict(history=ChatHistory(full=History.from_chats([chat])[0], batch_size=()))
        rows.append(row if reward is None else row.set("next", TensorDict(reward=torch.full((1, 1), reward))))
    return lazy_stack(rows)


@pytest.fixture(scope="module")
def other(smol_dir: str) -> PreTrainedModel:
    """A model with other weights than the server's. One parameter asks for gradients: enough to see that they come."""
    model = perturb(load_trainer(smol_dir), scale=0.05).eval().requires_grad_(False)
    model.get_decoder().norm.weight.requires_grad_(True)
    return model


@pytest.fixture
def scorer(smol: SGLangServer, smol_dir: str, tokenizer: PreTrainedTokenizerBase, other: PreTrainedModel) -> Scorer:
    """A wrapper that scores: of the server, or of Hugging Face's model with other weights."""

    def make(kind: str = "engine", mode: str = "history", **options: Any) -> Any:
        options = {"tokenizer": tokenizer, "input_mode": mode, "generate": False, **options}
        if mode == "history":
            options["chat_template"] = TEMPLATE
        if kind == "engine":
            return SGLangHiddenWrapper(smol, **options)
        return TransformersWrapper(other, **options)

    return make


@pytest.fixture(scope="module")
def truths(smol_dir: str, tokenizer: PreTrainedTokenizerBase, other: PreTrainedModel) -> dict[str, list[Scored]]:
    models = {"engine": hf_oracle.load(smol_dir), "other": other}
    return {kind: [truth(model, tokenizer, chat) for chat in CHATS] for kind, model in models.items()}


# --- 1. RetrieveLogProb -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assistant_only", "pad_output", "layout"),
    [(True, False, None), (True, False, torch.jagged), (True, True, None), (False, False, None), (False, True, None)],
)
def test_retrieve_log_prob_of_chats(
    scorer: Scorer,
    truths: dict[str, list[Scored]],
    tokenizer: PreTrainedTokenizerBase,
    assistant_only: bool,
    pad_output: bool,
    layout: torch.layout | None,
) -> None:
    transform = RetrieveLogProb(
        scorer(pad_output=pad_output, layout=layout),
        log_probs_full_key=REF,
        assistant_only=assistant_only,
        tokenizer=tokenizer,
    )
    expected = [row.masked(assistant_only) for row in truths["engine"]]
    if pad_output:
        expected = padded_left(expected, 0.0 if assistant_only else float("nan"))
    assert_rows_close(transform(chats()).get(REF, as_list=True), expected)
    step = transform(chats(reward=1.0))
    assert_rows_close(step["next"].get(REF, as_list=True), expected)
    assert REF not in step.keys(True), "of the next step alone"


@pytest.mark.parametrize("pad_output", [False, True])
@pytest.mark.parametrize("mode", ["tokens", "text"])
def test_retrieve_log_prob_of_ids_and_text(
    scorer: Scorer,
    truths: dict[str, list[Scored]],
    tokenizer: PreTrainedTokenizerBase,
    mode: str,
    pad_output: bool,
) -> None:
    def row(ids: list[int]) -> TensorDict:
        full = torch.tensor(ids) if mode == "tokens" else tokenizer.decode(ids)
        return TensorDict({(mode, "full"): full})

    model = scorer(mode=mode, pad_output=pad_output)
    with pytest.raises(ValueError, match="must have `input_mode='history'`"):
        RetrieveLogProb(model)
    transform = RetrieveLogProb(model, log_probs_full_key=REF, assistant_only=False)
    out = transform(lazy_stack([row(scored.ids) for scored in truths["engine"]]))
    expected = [scored.log_probs_N for scored in truths["engine"]]
    assert_rows_close(out.get(REF, as_list=True), padded_left(expected, float("nan")) if pad_output else expected)


# --- 2. RetrieveKL, KLComputation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_output", [False, True])
@pytest.mark.parametrize("assistant_only", [True, False])
@pytest.mark.parametrize(("gen", "ref"), [("engine", "other"), ("other", "engine")])
def test_retrieve_kl_of_two_models(
    scorer: Scorer,
    truths: dict[str, list[Scored]],
    tokenizer: PreTrainedTokenizerBase,
    gen: str,
    ref: str,
    assistant_only: bool,
    pad_output: bool,
) -> None:
    transform = RetrieveKL(
        scorer(gen, pad_output=pad_output, log_probs_key=GEN[0]),
        scorer(ref, pad_output=pad_output, log_probs_key=REF[0]),
        gen_log_probs_full_key=GEN,
        ref_log_probs_full_key=REF,
        assistant_only=assistant_only,
        tokenizer=tokenizer,
        coeff=0.5,
    )
    step = transform(chats(reward=2.0))["next"]
    pairs = zip(truths[gen], truths[ref], strict=True)
    expected = [p.masked(assistant_only) - q.masked(assistant_only) for p, q in pairs]
    assert all(kl_N.abs().max() > SEEN for kl_N in expected)
    if pad_output:
        expected = padded_left(expected, 0.0)
    assert_rows_close(step.get("kl_penalty", as_list=True), expected)
    assert_rows_close([row[:, 0] for row in step.get("reward", as_list=True)], [2 - 0.5 * kl_N for kl_N in expected])


@pytest.mark.parametrize("pad_output", [False, True])
def test_kl_of_what_was_sampled_is_measured_on_the_response_alone(
    policy: Callable[..., SGLangHiddenWrapper],
    scorer: Scorer,
    smol_dir: str,
    other: PreTrainedModel,
    chat_ids: Callable[[str], list[int]],
    pad_output: bool,
) -> None:
    prompts = [chat_ids(question) for question in QUESTIONS[:2]]
    # The first word of the first answer ends it: rows of differing lengths on both sides.
    sampler = policy("tokens", pad_output=pad_output, max_new_tokens=6, stop_token_ids=[504])
    out = sampler(tokens_input(prompts))
    assert [int(row["masks"].all_assistant_mask.sum()) for row in out.unbind(0)] == [1, 6]
    scored = scorer("other", mode="tokens", pad_output=pad_output, inplace=False)(out)
    step = lazy_stack(
        [
            TensorDict(log_probs=sampled["log_probs"], ref_log_probs=reference["log_probs"])
            for sampled, reference in zip(out.unbind(0), scored.unbind(0), strict=True)
        ]
    )
    kl = KLComputation(add_to_reward=False)(step).get("kl_penalty", as_list=True)

    for row, kl_N in zip(out.unbind(0), kl, strict=True):
        real_N, response_N = row["masks"].all_attention_mask, row["masks"].all_assistant_mask
        ids = row["tokens"].full[real_N].tolist()
        diff_N = log_probs_of(hf_oracle.load(smol_dir), ids) - log_probs_of(other, ids)
        assert diff_N.abs().max() > SEEN
        torch.testing.assert_close(kl_N[response_N], diff_N[response_N[real_N]], atol=LOG_PROB_ATOL, rtol=0)
        assert not kl_N[~response_N].any(), "what nobody measured does not diverge"


# --- 3. in an environment -----------------------------------------------------------------------------------------


def generator(engine: SGLangServer, tokenizer: PreTrainedTokenizerBase, **options: Any) -> SGLangHiddenWrapper:
    return SGLangHiddenWrapper(
        engine,
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
        generate_kwargs={"max_new_tokens": 5, "temperature": 0.0},
        **options,
    )


def kl_of(
    gen: PreTrainedModel, ref: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turn: TensorDictBase
) -> torch.Tensor:
    """What the divergence is on the assistant's tokens of a turn's whole chat, 0 elsewhere."""
    p, q = (truth(model, tokenizer, chat_of(turn["history"].full)) for model in (gen, ref))
    return p.masked(True) - q.masked(True)


class PerTokenReward(Transform):
    """A reward ``[B, 1, 1]``, the shape that a divergence per token is added to.

    Registers keys too: torchrl's RetrieveLogProb does not register its own, and an environment without them cannot say
    what it observes (``Transform.transform_output_spec``, a KeyError).
    """

    def __init__(self, *written: tuple[str, str]) -> None:
        super().__init__()
        self.written = written

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict.set("reward", torch.full((*next_tensordict.batch_size, 1, 1), 3.0))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded(shape=(*reward_spec.shape, 1, 1))
        return reward_spec

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        for key in self.written:
            observation_spec[key] = Unbounded(shape=(*observation_spec.shape, -1))
        return observation_spec


def test_torchrls_own_environments_do_not_take_the_transform(scorer: Scorer) -> None:
    env = chat_env(QUESTIONS[:1], transforms=[RetrieveLogProb(scorer(), log_probs_full_key=REF)])
    with pytest.raises(KeyError, match=r"'ref_log_probs', 'full'.* is unaccounted for"):
        env.observation_spec  # noqa: B018


@pytest.mark.parametrize("pad_output", [False, True])
@pytest.mark.parametrize("ref", ["engine", "other"])
def test_retrieve_kl_with_the_collectors_policy(
    smol: SGLangServer,
    scorer: Scorer,
    smol_dir: str,
    other: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ref: str,
    pad_output: bool,
) -> None:
    transform = RetrieveKL(
        "from_collector",
        scorer(ref, pad_output=pad_output, log_probs_key=REF[0]),
        tokenizer=tokenizer,
        add_to_reward=ref == "other",
    )
    env = chat_env(QUESTIONS[:2], batch_size=2, transforms=[PerTokenReward(LOG_PROBS, REF)])
    batches = collector(env, generator(smol, tokenizer, pad_output=pad_output), turns_per_batch=2, total_turns=2)
    # Not in the environment from the start: the collector asks it for its keys before it says that it is there.
    batches.env.append_transform(transform)
    (batch,) = batches
    batches.shutdown()

    model = hf_oracle.load(smol_dir)
    turns = [row[0] for row in batch.unbind(0)]
    scored = [truth(model, tokenizer, chat_of(turn["history"].full)).masked(True) for turn in turns]
    kl = [kl_of(model, other if ref == "other" else model, tokenizer, turn) for turn in turns]
    assert all((kl_N.abs().max() > SEEN) == (ref == "other") for kl_N in kl)
    if pad_output:
        scored, kl = padded_left(scored, 0.0), padded_left(kl, 0.0)
    # The default keys: the generator's score goes where what was sampled is, but to the next step.
    assert_rows_close([turn["next", *LOG_PROBS] for turn in turns], scored)
    assert_rows_close([turn["next", "kl_penalty"] for turn in turns], kl)
    rewards = [turn["next", "reward"][..., 0] for turn in turns]
    assert_rows_close(rewards, [3.0 - kl_N for kl_N in kl] if ref == "other" else [torch.full((1,), 3.0)] * 2)
    for turn in turns:
        assert torch.equal(turn["log_probs"].full.isnan(), ~turn["masks"].all_assistant_mask), "as it was sampled"


def test_the_version_and_the_divergence_move_with_the_generators_weights(
    trainee: SGLangServer,
    scorer: Scorer,
    smol_dir: str,
    other: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    version = PolicyVersion(version_type="int")
    kl = RetrieveKL("from_collector", scorer(log_probs_key=REF[0]), tokenizer=tokenizer, add_to_reward=False)
    env = chat_env(QUESTIONS[:1], transforms=[PerTokenReward(LOG_PROBS, REF)])
    batches = collector(
        env, generator(trainee, tokenizer), turns_per_batch=1, total_turns=2, track_policy_version=version
    )
    batches.env.append_transform(kl)
    before = trainee.info.weight_version
    weights, turns = [hf_oracle.load(smol_dir), other], []
    for batch in batches:
        turns.append(batch[0, 0])
        if len(turns) == 1:
            trainee.update_weights(other)
            batches.increment_version()
    batches.shutdown()

    assert [int(turn["next", "policy_version"]) for turn in turns] == [0, 1]
    assert [turn["weight_version"] for turn in turns] == [before, trainee.info.weight_version]
    assert before != trainee.info.weight_version
    for turn, gen in zip(turns, weights, strict=True):
        expected_N = kl_of(gen, weights[0], tokenizer, turn)
        assert (expected_N.abs().max() > SEEN) == (gen is other)
        torch.testing.assert_close(turn["next", "kl_penalty"], expected_N, atol=LOG_PROB_ATOL, rtol=0)


@pytest.mark.parametrize(
    ("gen", "ref", "version_type"),
    [("engine", "engine", "int"), ("engine", "other", "uuid"), ("other", "engine", "int")],
)
def test_policy_version_beside_any_generator_and_reference(
    smol: SGLangServer,
    scorer: Scorer,
    smol_dir: str,
    other: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    gen: str,
    ref: str,
    version_type: str,
) -> None:
    version = PolicyVersion(version_type=version_type)  # type: ignore[arg-type]
    reference = RetrieveLogProb(scorer(ref, log_probs_key=REF[0]), tokenizer=tokenizer)
    env = chat_env(QUESTIONS[:1], transforms=[PerTokenReward(REF), reference])
    policy: Any = generator(smol, tokenizer)
    if gen == "other":
        policy = TransformersWrapper(
            other, tokenizer=tokenizer, chat_template=TEMPLATE, generate_kwargs={"max_new_tokens": 5}
        )
    batches = collector(
        env, policy, turns_per_batch=1, total_turns=2, track_policy_version=version, reset_at_each_iter=True
    )
    versions = []
    for batch in batches:
        turn = batch[0, 0]
        versions.append(turn["next", "policy_version"])
        assert turn["policy_version"] == versions[-1] == batches.policy_version
        model = other if ref == "other" else hf_oracle.load(smol_dir)
        expected_N = truth(model, tokenizer, chat_of(turn["history"].full)).masked(True)
        torch.testing.assert_close(turn["next", *REF], expected_N, atol=LOG_PROB_ATOL, rtol=0)
        batches.increment_version()
    batches.shutdown()
    assert versions == [0, 1] if version_type == "int" else versions[0] != versions[1]


# --- 4. SFTLoss ---------------------------------------------------------------------------------------------------


def negative_log_probs(rows: Sequence[Scored], normalize: bool) -> torch.Tensor:
    """Each chat's loss: of the assistant's tokens, their mean or their sum."""
    return torch.stack([-row.masked(True).sum() / (row.assistant_N.sum() if normalize else 1) for row in rows])


@pytest.mark.parametrize("pad_output", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_sft_loss_of_the_served_model(
    scorer: Scorer,
    truths: dict[str, list[Scored]],
    tokenizer: PreTrainedTokenizerBase,
    normalize: bool,
    pad_output: bool,
) -> None:
    model = scorer(pad_output=pad_output)
    # The loss makes ragged masks of its own; those of padded log-probs are the ones that scoring writes.
    data = model(chats()) if pad_output else chats()
    loss = SFTLoss(
        model,
        tokenizer,
        tokenizer_kwargs={"chat_template": TEMPLATE},
        reduction="none",
        normalize_by_seq_length=normalize,
    )(data)
    expected = negative_log_probs(truths["engine"], normalize)
    torch.testing.assert_close(loss.loss_sft, expected, atol=30 * LOG_PROB_ATOL if not normalize else 1e-3, rtol=0)


@pytest.mark.parametrize("pad_output", [False, True])
@pytest.mark.parametrize("loss_function", ["sft", "minor_sft"])
def test_sft_loss_with_the_served_model_as_reference(
    scorer: Scorer,
    truths: dict[str, list[Scored]],
    other: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loss_function: str,
    pad_output: bool,
) -> None:
    reference = RetrieveLogProb(scorer(pad_output=pad_output), log_probs_full_key=REF, tokenizer=tokenizer)
    actor = scorer("other", pad_output=pad_output)
    data = reference(chats(reward=0.0))
    if pad_output:
        data.set("masks", scorer(pad_output=True, inplace=False)(chats())["masks"])
    kl_coeff = 0.1 if loss_function == "sft" else None
    loss = SFTLoss(
        actor,
        tokenizer,
        tokenizer_kwargs={"chat_template": TEMPLATE},
        loss_function=loss_function,  # type: ignore[arg-type]
        kl_to_ref_coeff=kl_coeff,
        beta=2.0,
    )(data)
    current = negative_log_probs(truths["other"], True)
    if loss_function == "sft":
        # k3 of Schulman's estimators, over every place of the batch: 0 at what the assistant did not write.
        rows = list(zip(truths["engine"], truths["other"], strict=True))
        diffs = [ref.masked(True) - cur.masked(True) for ref, cur in rows]
        diff = torch.cat(padded_left(diffs, 0.0) if pad_output else diffs)
        expected_kl = (diff.expm1() - diff).mean()
        assert expected_kl > SEEN / 10
        torch.testing.assert_close(loss.kl_to_ref, expected_kl, atol=10 * LOG_PROB_ATOL, rtol=LOG_PROB_ATOL)
        expected = current.mean()
    else:
        ref = negative_log_probs(truths["engine"], True)
        expected = -torch.nn.functional.logsigmoid(2.0 * (ref - current)).mean()
    torch.testing.assert_close(loss.loss_sft.detach(), expected, atol=LOG_PROB_ATOL, rtol=0)
    weight = other.get_decoder().norm.weight
    (grad,) = torch.autograd.grad(loss.sum(reduce=True), [weight])
    assert grad.abs().max() > 0


@pytest.mark.parametrize("pad_output", [False, True])
def test_distillation_from_the_served_model(
    scorer: Scorer, truths: dict[str, list[Scored]], tokenizer: PreTrainedTokenizerBase, pad_output: bool
) -> None:
    key = ("teacher_log_probs", "full")
    # Of every token: the teacher's NaN at pads must not get through.
    teacher = RetrieveLogProb(
        scorer(pad_output=pad_output), log_probs_full_key=key, assistant_only=False, tokenizer=tokenizer
    )
    data = teacher(chats(reward=0.0))
    if pad_output:
        data.set("masks", scorer(pad_output=True, inplace=False)(chats())["masks"])
    loss = DistillationLoss(
        scorer("other", pad_output=pad_output),
        tokenizer,
        tokenizer_kwargs={"chat_template": TEMPLATE},
        assistant_only=False,
        reduction="none",
    )(data)
    diffs = [p.log_probs_N - q.log_probs_N for p, q in zip(truths["engine"], truths["other"], strict=True)]
    expected = torch.stack([(diff.expm1() - diff).mean() for diff in diffs])
    torch.testing.assert_close(loss.loss_distill.detach(), expected, atol=LOG_PROB_ATOL, rtol=5 * LOG_PROB_ATOL)


# --- 5. AddThinkingPrompt -----------------------------------------------------------------------------------------


class Ends(Transform):
    """Ends every dialogue at once; a thinking prompt undoes it."""

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        done = torch.ones_like(next_tensordict["done"])
        return next_tensordict.set("done", done).set("terminated", done.clone())


@pytest.mark.parametrize("role", ["assistant", "user"])
def test_a_thinking_prompt_is_what_the_next_turn_answers(
    smol: SGLangServer, smol_dir: str, tokenizer: PreTrainedTokenizerBase, role: str
) -> None:
    def first_answer(td: TensorDictBase) -> bool:
        return list(td["history"].prompt.role).count("assistant") == 1

    thinking = AddThinkingPrompt(first_answer, prompt="Wait!", role=role, edit_last_turn=role == "assistant")  # type: ignore[arg-type]
    env = chat_env(QUESTIONS[:2], batch_size=2, transforms=[AnswerReward(), Ends(), thinking])
    first, second = env.rollout(2, generator(smol, tokenizer), break_when_any_done=False).unbind(1)

    assert first["next", "done"].logical_not().all()
    assert second["next", "done"].all()
    assert bool(first["next", "reward"].any()) == (role == "user"), "an edited answer earns nothing"
    for row, question in enumerate(QUESTIONS[:2]):
        answer = first["text"].response[row]
        asked = {"role": "user", "content": question}
        answered = {"role": "assistant", "content": answer}
        assert chat_of(first[row]["history"].full) == [asked, answered], "as it was sampled"
        if role == "assistant":
            messages = [asked, {**answered, "content": answer.rstrip() + "\n\nWait!"}]
        else:
            messages = [asked, answered, {"role": "user", "content": "Wait!"}]
        prompt_ids = tokenizer.apply_chat_template(
            messages, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False
        )
        turn = second[row]
        assert turn["tokens"].prompt.tolist() == prompt_ids
        expected = hf_oracle.teacher_force(smol_dir, prompt_ids, turn["tokens"].response.tolist())
        torch.testing.assert_close(turn["log_probs"].response, expected.log_probs_T, atol=LOG_PROB_ATOL, rtol=0)


# --- the older transform ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ref", ["engine", "other"])
def test_the_legacy_kl_reward_of_padded_turns(
    smol: SGLangServer,
    scorer: Scorer,
    smol_dir: str,
    other: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ref: str,
) -> None:
    def rollout(pad_output: bool) -> TensorDictBase:
        transform = KLRewardTransform(scorer(ref, mode="tokens", pad_output=pad_output), coef=0.5)
        env = chat_env(QUESTIONS[:2], batch_size=2, transforms=[PerTokenReward(), transform])
        return env.rollout(1, generator(smol, tokenizer, pad_output=pad_output))[:, 0]

    out = rollout(pad_output=True)
    model = other if ref == "other" else hf_oracle.load(smol_dir)
    for turn in out.unbind(0):
        real_N, response_N = turn["masks"].all_attention_mask, turn["masks"].all_assistant_mask
        ids = turn["tokens"].full[real_N].tolist()
        kl_N = torch.zeros(real_N.shape)
        kl_N[real_N] = log_probs_of(hf_oracle.load(smol_dir), ids) - log_probs_of(model, ids)
        kl_N = kl_N.masked_fill(~response_N, 0.0)
        assert (kl_N.abs().max() > SEEN) == (ref == "other")
        torch.testing.assert_close(turn["next", "kl_penalty"][:, 0], kl_N, atol=LOG_PROB_ATOL, rtol=0)
        torch.testing.assert_close(turn["next", "reward"][:, 0], 3.0 - 0.5 * kl_N, atol=LOG_PROB_ATOL, rtol=0)
    # What it cannot read, from any wrapper: RetrieveKL can.
    with pytest.raises(RuntimeError, match="Failed to stack tensors"):
        rollout(pad_output=False)
