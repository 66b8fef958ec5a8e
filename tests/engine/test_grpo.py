"""GRPO with TorchRL's own parts around this package's policy: chat environment, collector, buffer, advantage, loss.

1. On-policy: on every response token the trainer's log-prob is the sampler's, before an update and after it; without
   the push it is not.
2. Loss and gradients, of `GRPOLoss` and the losses that TorchRL derives from it, are those of the formula, written
   down here a second time over rows without any padding: the NaN of prompts and pads reaches neither.
3. Every sample carries the version of the weights it was drawn with.
4. With ``chat="append"`` the last turn's row is the whole conversation: the log-probs of all its answers are the
   trainer's on these ids, and the loss is the formula's over all of them, whatever the template strips.
5. TorchRL's `GRPOTrainer` trains: each batch is of the weights that the last one left, whoever fills the buffer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import LOG_PROB_ATOL, QUESTIONS, history_input
from helpers.torchrl_pipelines import FOLLOW_UPS, AnswerReward, UserAsksOn, chat_env, collector
from helpers.weight_changes import load_trainer, perturb
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.collectors.llm import LLMCollector
from torchrl.data import Composite, LazyStackStorage, ReplayBuffer, Unbounded
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import DAPO, CISPOLoss, GRPOLoss, MCAdvantage
from torchrl.trainers.algorithms import GRPOTrainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torchrl_sglang_hidden import SGLangHiddenWeightSyncScheme, SGLangHiddenWrapper, SGLangServer

GROUP = 3
# Of different lengths, so that prompts are padded too; answered in many ways, so that a group hardly ever ties.
CHATS = [QUESTIONS[5], QUESTIONS[9]]
ROWS = GROUP * len(CHATS)
# Narrow: a small batch must have many tokens beyond each.
CLIP, CLIP_HIGHER = 0.05, 0.1
ENTROPY_COEFF, KL_COEFF = 0.01, 0.5
REF_KEY = ("next", "ref_log_probs")
# The demo model's own, without the system prompt that it adds: a third of the tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A step whose effect on log-probs is far over the tolerance, and far under what would break the model.
STEP_NORM = 0.03
MOVED = 20 * LOG_PROB_ATOL

padding = pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])


# --- the parts ------------------------------------------------------------------------------------------------------


def score(text: str) -> float:
    """A reward that hardly ever ties: a group of equal rewards has no gradient."""
    return zlib.crc32(text.encode()) % 1000 / 1000


class TokenReward(AnswerReward):
    """Rewards of the shape that GRPOLoss wants, ``[B, 1, 1]``: it multiplies the advantage with ``[B, T, 1]``."""

    def __init__(self) -> None:
        super().__init__(score)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        out = super()._step(tensordict, next_tensordict)
        return out.set("reward", out["reward"].unsqueeze(-1))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded(shape=(*reward_spec.shape, 1, 1))
        return reward_spec


def make_sampler(
    engine: SGLangServer, tokenizer: PreTrainedTokenizerBase, pad_output: bool, **options: object
) -> SGLangHiddenWrapper:
    """Samples at temperature 1, the distribution that the trainer scores, in responses of different lengths."""
    stops = [tokenizer.encode(word)[0] for word in (" the", " a", " is", " to", " of", " and")]
    return SGLangHiddenWrapper(
        engine,
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
        pad_output=pad_output,
        generate_kwargs={"max_new_tokens": 10, "temperature": 1.0, "stop_token_ids": stops},
        **options,  # type: ignore[arg-type]
    )


def make_trainer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pad_output: bool) -> TransformersWrapper:
    # pad_output as the sampler's: TorchRL finds the response by the width of `tokens.prompt`.
    return TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False, pad_output=pad_output)


def make_buffer(prompt_key: str = "query") -> ReplayBuffer:
    return ReplayBuffer(
        storage=LazyStackStorage(2 * ROWS),
        sampler=SamplerWithoutReplacement(),
        transform=MCAdvantage(grpo_size=GROUP, prompt_key=prompt_key),
        batch_size=ROWS,
    )


@contextmanager
def collecting(policy: SGLangHiddenWrapper, buffer: ReplayBuffer | None) -> Iterator[LLMCollector]:
    """One chat of one turn per row, each question `GROUP` times; fills the buffer once per iteration, or yields it."""
    env = chat_env(CHATS, batch_size=ROWS, repeats=GROUP, transforms=[TokenReward()])
    turns = collector(env, policy, turns_per_batch=ROWS, replay_buffer=buffer, track_policy_version=True)
    try:
        yield turns
    finally:
        turns.shutdown()


def collect(batches: Iterator[None], buffer: ReplayBuffer) -> TensorDictBase:
    """What one iteration of a collector puts into an empty buffer."""
    buffer.empty()
    next(batches)
    assert len(buffer) == ROWS
    return buffer.sample()


# --- what is true of them -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """One row without padding: P prompt ids, T response ids, what the sampler said of them, and the advantage."""

    prompt_ids: list[int]
    response_ids: list[int]
    log_probs_T: torch.Tensor
    advantage: float


def rows_of(batch: TensorDictBase) -> list[Sampled]:
    """Reads a batch by its masks, and holds its NaN against them: measured is exactly the response."""
    full, log_probs, attention, assistant = (
        batch.get(key, as_list=True)
        for key in (
            ("tokens", "full"), ("log_probs", "full"), ("masks", "all_attention_mask"), ("masks", "all_assistant_mask"),
        )
    )  # fmt: skip
    rows = []
    for row in range(len(batch)):
        assert torch.equal(log_probs[row].isnan(), ~assistant[row])
        rows.append(
            Sampled(
                prompt_ids=full[row][attention[row] & ~assistant[row]].tolist(),
                response_ids=full[row][assistant[row]].tolist(),
                log_probs_T=log_probs[row][assistant[row]],
                advantage=float(batch["advantage"][row]),
            )
        )
    assert len({len(row.response_ids) for row in rows}) > 1, "one length only: this batch shows nothing of padding"
    return rows


def normalised(rewards_G: torch.Tensor) -> torch.Tensor:
    return (rewards_G - rewards_G.mean()) / rewards_G.std().clamp_min(1e-6)


def assert_groups(batch: TensorDictBase) -> None:
    """Groups are of one question, and advantages are rewards normalised within them."""
    for question in CHATS:
        rows = [row for row in range(ROWS) if batch[row]["query"] == question]
        rewards = torch.tensor([score(batch["text"].response[row]) for row in rows])
        expected = normalised(rewards)
        assert len(rows) == GROUP
        torch.testing.assert_close(batch["advantage"][rows].flatten(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def distance(batch: TensorDictBase, trainer: TransformersWrapper) -> float:
    """The largest difference of trainer and sampler over all response tokens, as TorchRL reads the trainer."""
    scored = trainer(batch.copy()).get(("log_probs", "full"), as_list=True)
    masks = batch.get(("masks", "all_assistant_mask"), as_list=True)
    sampled = torch.cat([row.log_probs_T for row in rows_of(batch)])
    found = torch.cat([row[mask] for row, mask in zip(scored, masks, strict=True)])
    assert sampled.isfinite().all()
    assert found.isfinite().all()
    return float((found - sampled).abs().max())


def versions(batch: TensorDictBase) -> set[str]:
    return set(batch["weight_version"])


def total(losses: TensorDictBase) -> torch.Tensor:
    """What a training loop differentiates."""
    terms = [value for key, value in losses.items() if key.startswith("loss_") and value is not None]
    return torch.stack(terms).sum()


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return grads


def step(model: PreTrainedModel) -> None:
    """A step of plain SGD of a given length."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), STEP_NORM)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Objective:
    """One of TorchRL's losses, how far it clips ratios, and what it makes of the gains with and without the clip."""

    loss: type[GRPOLoss]
    clip: tuple[float, float]
    gain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def make(self, trainer: TransformersWrapper, **options: object) -> GRPOLoss:
        return self.loss(
            trainer, clip_epsilon=self.clip, entropy_coeff=ENTROPY_COEFF, kl_to_ref_coeff=KL_COEFF, **options
        )

    def gain_of(self, ratio_T: torch.Tensor, advantage: float) -> torch.Tensor:
        low, high = self.clip
        return self.gain(ratio_T * advantage, ratio_T.clamp(1 - low, 1 + high) * advantage)


GRPO = Objective(GRPOLoss, (CLIP, CLIP), torch.minimum)
OBJECTIVES = {
    "GRPO": GRPO,
    "DAPO": Objective(DAPO, (CLIP, CLIP_HIGHER), torch.minimum),
    "CISPO": Objective(CISPOLoss, (CLIP, CLIP_HIGHER), lambda whole_T, clipped_T: clipped_T),
}


def plain_loss(
    model: PreTrainedModel,
    rows: list[Sampled],
    ref_log_probs: list[torch.Tensor],
    width: int,
    objective: Objective = GRPO,
) -> dict[str, torch.Tensor]:
    """The loss of every response token, row by row.

    Args:
        ref_log_probs: the reference's, of each response.
        width: of the padded batch. TorchRL divides the penalty by all positions, prompts and pads included.
    """
    gains, entropies, penalties = [], [], []
    for row, ref_T in zip(rows, ref_log_probs, strict=True):
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        log_probs_TV = model(ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        log_probs_T = log_probs_TV.gather(-1, torch.tensor(row.response_ids)[:, None])[:, 0]
        ratio_T = (log_probs_T - row.log_probs_T).exp()
        gains.append(objective.gain_of(ratio_T, row.advantage))
        entropies.append(-(log_probs_TV.exp() * log_probs_TV).sum(-1))
        penalties.append((ref_T - log_probs_T).exp() - 1 - (ref_T - log_probs_T))
    return {
        "loss_objective": -torch.cat(gains).mean(),
        "loss_entropy": -ENTROPY_COEFF * torch.cat(entropies).mean(),
        "loss_kl_to_ref": KL_COEFF * torch.cat(penalties).sum() / (len(rows) * width),
    }


def padded_width(batch: TensorDictBase) -> int:
    return max(len(ids) for ids in batch.get(("tokens", "full"), as_list=True))


def score_reference(reference: SGLangHiddenWrapper, batch: TensorDictBase) -> None:
    """Writes the log-probs that `GRPOLoss` reads, and nothing else."""
    batch.set(REF_KEY, reference(batch, tensordict_out=TensorDict(batch_size=batch.batch_size))["log_probs"])


# --- 1, 3. the loop -------------------------------------------------------------------------------------------------


def push_by_engine(engine: SGLangServer, trainer: TransformersWrapper, turns: LLMCollector) -> str:
    version = engine.update_weights(trainer)
    turns.increment_version()
    return version


def push_by_scheme(engine: SGLangServer, trainer: TransformersWrapper, turns: LLMCollector) -> str:
    sender = SGLangHiddenWeightSyncScheme(engine).create_sender()
    sender.register_model(trainer)
    sender.register_collector(turns)
    return sender.update_weights()


@pytest.mark.parametrize(
    ("pad_output", "push"),
    [(False, push_by_engine), (True, push_by_scheme)],
    ids=["ragged, engine", "padded, scheme"],
)
def test_trainer_and_sampler_agree_before_and_after_an_update(
    pad_output: bool,
    push: Callable[[SGLangServer, TransformersWrapper, LLMCollector], str],
    trainee: SGLangServer,
    smol: SGLangServer,
    smol_dir: str,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = load_trainer(smol_dir).eval()
    trainer = make_trainer(model, tokenizer, pad_output)
    reference = make_sampler(smol, tokenizer, pad_output, hidden=False).get_new_version(
        generate=False, input_mode="tokens"
    )
    buffer = make_buffer()
    old = trainee.info.weight_version
    with collecting(make_sampler(trainee, tokenizer, pad_output), buffer) as turns:
        batches = iter(turns)
        first = collect(batches, buffer)
        assert_groups(first)
        assert distance(first, trainer) < LOG_PROB_ATOL
        score_reference(reference, first)
        losses = GRPO.make(trainer)(first)
        # On policy every ratio is 1, and the policy is the reference.
        assert float(losses.ESS) == pytest.approx(1, abs=1e-4)
        assert float(losses.kl_to_ref) == pytest.approx(0, abs=1e-6)
        assert total(losses).isfinite()
        total(losses).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        step(model)

        stale = collect(batches, buffer)
        assert distance(stale, trainer) > MOVED, "without a push the server has the old weights"
        assert versions(first) == versions(stale) == {old}

        new = push(trainee, trainer, turns)
        fresh = collect(batches, buffer)

    assert distance(fresh, trainer) < LOG_PROB_ATOL
    assert new == trainee.info.weight_version != old
    assert versions(fresh) == {new}
    assert not fresh["mixed_weights"].any()
    # TorchRL's own number, as it was after the step: the one at the root is of the step before.
    assert [set(batch["next", "policy_version"].flatten().tolist()) for batch in (first, stale, fresh)] == [
        {0},
        {0},
        {1},
    ]
    # The reference stayed behind; Hugging Face says how far.
    score_reference(reference, fresh)
    with torch.no_grad():
        found = GRPO.make(trainer, entropy_bonus=False)(fresh)
        ref = [
            hf_oracle.teacher_force(smol_dir, row.prompt_ids, row.response_ids).log_probs_T for row in rows_of(fresh)
        ]
        expected = plain_loss(model, rows_of(fresh), ref, padded_width(fresh))
    assert float(found.loss_kl_to_ref) > 1e-5
    torch.testing.assert_close(found.loss_kl_to_ref, expected["loss_kl_to_ref"], atol=1e-6, rtol=1e-2)


# --- 2. the loss ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["ragged", "padded"])
def sampled(
    request: pytest.FixtureRequest, smol: SGLangServer, tokenizer: PreTrainedTokenizerBase
) -> tuple[bool, TensorDictBase]:
    """Return whether a batch is padded, and the batch, with the log-probs of the reference."""
    policy = make_sampler(smol, tokenizer, request.param, hidden=False)
    buffer = make_buffer()
    with collecting(policy, buffer) as turns:
        batch = collect(iter(turns), buffer)
    score_reference(policy.get_new_version(generate=False, input_mode="tokens"), batch)
    return request.param, batch


@pytest.fixture(scope="module")
def moved(smol_dir: str) -> PreTrainedModel:
    """Return a model some steps away from the sampler's, so that ratios differ from 1 and some are clipped."""
    return perturb(load_trainer(smol_dir), scale=0.01).eval()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_loss_and_gradients_are_those_of_the_formula(
    objective: Objective,
    sampled: tuple[bool, TensorDictBase],
    moved: PreTrainedModel,
    smol_dir: str,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (pad_output, batch), model = sampled, moved
    trainer = make_trainer(model, tokenizer, pad_output)

    losses = objective.make(trainer)(batch)
    total(losses).backward()
    found = gradients(model)
    rows = rows_of(batch)
    ref = [hf_oracle.teacher_force(smol_dir, row.prompt_ids, row.response_ids).log_probs_T for row in rows]
    expected_losses = plain_loss(model, rows, ref, padded_width(batch), objective)
    torch.stack(list(expected_losses.values())).sum().backward()
    expected = gradients(model)

    assert 0 < float(losses.clip_fraction) < 1
    for name, value in expected_losses.items():
        assert value != 0
        torch.testing.assert_close(
            losses.get(name), value, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: name + text
        )
    for name, grad in found.items():
        assert grad.isfinite().all(), name
        assert grad.norm() > 0, name
        assert (grad - expected[name]).norm() < 0.01 * expected[name].norm(), name


def test_every_masking_strategy_trains_on_responses_alone(
    sampled: tuple[bool, TensorDictBase], moved: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    pad_output, batch = sampled
    trainer = make_trainer(moved, tokenizer, pad_output)
    with torch.no_grad():
        found = [
            GRPO.make(trainer, masking_strategy=strategy, entropy_bonus=False)(batch).loss_objective
            for strategy in ("sft", "rlhf", "generic")
        ]
    # With prompts written as zeros the last two would train on them.
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-4)


# --- groups without an environment ----------------------------------------------------------------------------------


def test_several_samples_of_one_prompt_are_a_group(
    smol: SGLangServer, smol_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy = make_sampler(smol, tokenizer, pad_output=False, hidden=False, num_samples=GROUP)
    out = policy(history_input(CHATS))
    assert out.batch_size == (len(CHATS), GROUP)
    rows = out.reshape(-1)
    # What an environment would add: the group, the reward, and that the trajectory ends.
    rows["group"] = torch.arange(len(CHATS)).repeat_interleave(GROUP)
    rewards = torch.tensor([score(text) for text in rows["text"].response])
    rows["next"] = TensorDict(
        reward=rewards[:, None, None], done=torch.ones(ROWS, 1, dtype=torch.bool), batch_size=ROWS
    )
    buffer = make_buffer(prompt_key="group")
    buffer.extend(rows)
    assert len(buffer) == ROWS
    batch = buffer.sample()
    model = load_trainer(smol_dir).eval()
    trainer = make_trainer(model, tokenizer, pad_output=False)

    assert distance(batch, trainer) < LOG_PROB_ATOL
    assert torch.unique(batch["group"], return_counts=True)[1].tolist() == [GROUP] * len(CHATS)
    for group in range(len(CHATS)):
        advantages = batch["advantage"][batch["group"] == group].flatten()
        expected = normalised(rewards.reshape(len(CHATS), GROUP)[group]).sort().values
        torch.testing.assert_close(advantages.sort().values, expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        losses = GRPOLoss(trainer, entropy_bonus=False)(batch)
    weights = torch.tensor([len(row.response_ids) for row in rows_of(batch)])
    advantages = torch.tensor([row.advantage for row in rows_of(batch)])
    # Every ratio is 1: the mean advantage of a token is left.
    expected = -(weights * advantages).sum() / weights.sum()
    torch.testing.assert_close(losses.loss_objective, expected, atol=1e-3, rtol=0)


# --- 4. conversations -----------------------------------------------------------------------------------------------

# Writes an answer otherwise than it was sampled where it begins or ends with a blank.
TRIMMING = CHAT_TEMPLATE.replace("message['content'] }}", "message['content'] | trim }}")
TURNS = 3


def converse(policy: SGLangHiddenWrapper) -> list[TensorDictBase]:
    """Return the policy's outputs, turn by turn, of two chats whose user asks on."""
    env = ChatEnv(batch_size=(len(CHATS),)).append_transform(UserAsksOn(FOLLOW_UPS))
    td, outputs = env.reset(TensorDict(query=CHATS, batch_size=len(CHATS))), []
    for _ in range(TURNS):
        td = policy(td)
        outputs.append(td.clone())
        td = env.step_mdp(env.step(td))
    return outputs


def converse_unevenly(policy: SGLangHiddenWrapper) -> list[TensorDictBase]:
    """Return the outputs of `converse`, again where the two chats happened to have sampled equally many tokens."""
    for _ in range(5):
        outputs = converse(policy)
        if len({int(row["masks"].all_assistant_mask.sum()) for row in outputs[-1].unbind(0)}) > 1:
            return outputs
    raise AssertionError("five times two chats of one length")


def conversation_loss(model: PreTrainedModel, batch: TensorDictBase) -> torch.Tensor:
    """GRPO's objective over the sampled tokens of all turns, row by row."""
    gains = []
    for row in batch.unbind(0):
        real, sampled = row["masks"].all_attention_mask, row["masks"].all_assistant_mask
        ids, sampled_N = row["tokens"].full[real], sampled[real]
        log_probs_NV = model(ids[None]).logits[0, :-1].log_softmax(-1)
        log_probs_N = log_probs_NV.gather(-1, ids[1:, None])[:, 0]
        ratio_S = (log_probs_N[sampled_N[1:]] - row["log_probs"].full[real][sampled_N]).exp()
        advantage = row["advantage"].flatten()
        gains.append(torch.minimum(ratio_S * advantage, ratio_S.clamp(1 - CLIP, 1 + CLIP) * advantage))
    return -torch.cat(gains).mean()


@padding
def test_a_whole_conversation_is_one_row_of_the_loss(
    pad_output: bool, smol: SGLangServer, smol_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy = make_sampler(smol, tokenizer, pad_output, hidden=False, chat="append", prefer_tokens="strict")
    outputs = converse_unevenly(policy.get_new_version(chat_template=TRIMMING))
    batch = lazy_stack(list(outputs[-1].unbind(0)))
    for index, last in enumerate(batch.unbind(0)):
        ids = last["tokens"].full[last["masks"].all_attention_mask].tolist()
        responses = []
        for turn in outputs:
            row = turn[index]
            whole = row["tokens"].full[row["masks"].all_attention_mask].tolist()
            assert ids[: len(whole)] == whole, "no turn changes what was there"
            responses += row["tokens"].response[: int((~row["log_probs"].response.isnan()).sum())].tolist()
        assert last["tokens"].full[last["masks"].all_assistant_mask].tolist() == responses
    batch["advantage"] = torch.tensor([1.0, -0.5])[:, None, None]

    trainer = make_trainer(load_trainer(smol_dir).eval(), tokenizer, pad_output)
    assert distance(batch, trainer) < LOG_PROB_ATOL
    # Some steps away, so that ratios differ from 1 and some are clipped.
    model = perturb(load_trainer(smol_dir), scale=0.01).eval()
    with torch.no_grad():
        loss = GRPOLoss(
            make_trainer(model, tokenizer, pad_output),
            clip_epsilon=CLIP,
            entropy_bonus=False,
            masking_strategy="rlhf",
        )(batch)
        expected = conversation_loss(model, batch)
    assert 0 < float(loss.clip_fraction) < 1
    torch.testing.assert_close(loss.loss_objective, expected, atol=1e-4, rtol=1e-3)


# --- 5. TorchRL's trainer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filled_by", ["trainer", "collector"])
def test_torchrls_trainer(
    filled_by: str, trainee: SGLangServer, smol_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_trainer(smol_dir).eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    actor, start = make_trainer(model, tokenizer, False), make_trainer(hf_oracle.load(smol_dir), tokenizer, False)
    loss_module, buffer = GRPOLoss(actor, clip_epsilon=CLIP, entropy_coeff=ENTROPY_COEFF), make_buffer()
    batches: list[TensorDictBase] = []
    distances: list[tuple[float, float]] = []

    def loss_of(batch: TensorDictBase) -> TensorDictBase:
        batches.append(batch)
        distances.append((distance(batch, actor), distance(batch, start)))
        losses = loss_module(batch)
        assert total(losses).isfinite()
        return losses

    old = trainee.info.weight_version
    sender = SGLangHiddenWeightSyncScheme(trainee).create_sender()
    sender.register_model(actor)
    policy = make_sampler(trainee, tokenizer, pad_output=False)
    with collecting(policy, buffer if filled_by == "collector" else None) as turns:
        sender.register_collector(turns)
        with pytest.warns(UserWarning, match="GRPOTrainer is an experimental"):
            trainer = GRPOTrainer(
                collector=turns,
                total_frames=2 * ROWS,
                loss_module=loss_of,
                optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
                clip_norm=STEP_NORM,
                replay_buffer=buffer,
                weight_sync_sender=sender,
                empty_replay_buffer_on_weight_update=True,
                progress_bar=False,
            )
        trainer.train()

    assert [len(batch) for batch in batches] == [ROWS, ROWS]
    assert [set(batch["next", "policy_version"].flatten().tolist()) for batch in batches] == [{0}, {1}]
    (first,), (second,) = map(versions, batches)
    assert first == old
    assert len({first, second, trainee.info.weight_version}) == 3, "weights are sent after each batch"
    for batch in batches:
        assert_groups(batch)
    (first_now, _), (second_now, second_start) = distances
    assert max(first_now, second_now) < LOG_PROB_ATOL
    assert second_start > MOVED, "the second batch is of other weights"
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
