"""Distillation from a teacher in a real server, against Hugging Face on the same weights, over whole logits.

1. The loss and the student's gradient are those of whole logits, of prompts that are cold, cached and longer than a
   chunk, in a batch of rows of very different lengths; the student's own ids travel, whatever a tokenizer would write.
2. TorchRL's ``DistillationLoss`` reads the log-probs that come with the states.
3. Training on it brings the student to the teacher.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import CHUNKED_PREFILL_SIZE
from helpers.weight_changes import load_trainer, perturb
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import DistillationLoss
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torchrl_sglang_hidden import SGLangHiddenWrapper
from torchrl_sglang_hidden.rl import RetrieveTeacherStates, VocabularyDistillationLoss

LENGTHS = (2, CHUNKED_PREFILL_SIZE + 30, 17, 40)
PROMPTS = (1, 60, 5, 20)


@pytest.fixture(scope="module")
def student(smol_dir: str) -> PreTrainedModel:
    return perturb(load_trainer(smol_dir), scale=0.05).eval()


def make_batch(seed: int, num_tokens: int) -> TensorDictBase:
    """Return rows of ids that no tokenizer writes; what stands behind the prompts is the student's."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length, prompt in zip(LENGTHS, PROMPTS, strict=True):
        ids = torch.randint(20, num_tokens, (length,), generator=generator)
        assistant = torch.arange(length) >= prompt
        masks = {"all_assistant_mask": assistant, "all_attention_mask": torch.ones_like(assistant)}
        rows.append(TensorDict({"tokens": {"full": ids}, "masks": masks, "next": {}}))
    return lazy_stack(rows)


def whole_logits(student: PreTrainedModel, teacher: PreTrainedModel, batch: TensorDictBase) -> torch.Tensor:
    """Return KL(student ‖ teacher) of each row, the mean of its trained tokens, with a gradient."""
    found = []
    for row, prompt in zip(batch.unbind(0), PROMPTS, strict=True):
        ids = row["tokens", "full"][None]
        own = student(ids).logits[0].double().log_softmax(-1)
        with torch.no_grad():
            other = teacher(ids).logits[0].double().log_softmax(-1)
        found.append((own.exp() * (own - other)).sum(-1)[prompt - 1 : -1].mean())
    return torch.stack(found)


def test_loss_and_gradient_over_the_whole_vocabulary(
    policy: Callable[..., SGLangHiddenWrapper],
    student: PreTrainedModel,
    smol_dir: str,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    teacher = hf_oracle.load(smol_dir)
    batch = make_batch(0, teacher.config.vocab_size)
    truth = whole_logits(student, teacher, batch)
    truth.mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    losses = VocabularyDistillationLoss(student, teacher, chunk_size=16, tolerance=1e-3)
    for run in ("cold", "cached"):
        retrieve = RetrieveTeacherStates(policy(), dtype=torch.float32, tokenizer=tokenizer)
        found = losses(retrieve(batch))
        torch.testing.assert_close(found.loss_distill.double(), truth.mean(), rtol=1e-4, atol=0, msg=run)
    found.loss_distill.backward()
    for name, parameter in student.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-3, (name, float(error))
    student.zero_grad()

    # In bfloat16, as they travel by default.
    near = VocabularyDistillationLoss(student, teacher, reduction="none")(RetrieveTeacherStates(policy())(batch))
    torch.testing.assert_close(near.loss_distill.double(), truth.detach(), rtol=0.02, atol=1e-3)

    # The same batch serves TorchRL's own loss, which sees the one token at each place.
    model = TransformersWrapper(student, tokenizer=tokenizer, input_mode="tokens", generate=False, pad_output=False)
    sampled = DistillationLoss(model)
    sampled.set_keys(history=("tokens", "full"))
    for index, (row, prompt) in enumerate(zip(batch.unbind(0), PROMPTS, strict=True)):
        ids = row["tokens", "full"]
        with torch.no_grad():
            own, other = (m(ids[None]).logits[0, :-1].log_softmax(-1) for m in (student, teacher))
        other, own = (values.gather(-1, ids[1:, None])[:, 0] for values in (other, own))
        torch.testing.assert_close(row["next", "teacher_log_probs", "full"][1:], other, atol=2e-4, rtol=0)
        ratio = (other - own)[prompt - 1 :]
        # It reads ids in place of a history where the rows of a batch are of one length.
        found = sampled(batch[index : index + 1]).kl_to_teacher
        torch.testing.assert_close(found, (ratio.exp() - 1 - ratio).mean(), rtol=1e-3, atol=1e-5)


def test_training_reaches_the_teacher(
    policy: Callable[..., SGLangHiddenWrapper], smol_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A few steps on one batch of the student's head alone, from a student whose head was changed."""
    teacher = hf_oracle.load(smol_dir)
    student = load_trainer(smol_dir).requires_grad_(False)
    student.lm_head = torch.nn.Linear(*reversed(student.lm_head.weight.shape), bias=False)
    noise = torch.randn(teacher.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        student.lm_head.weight.copy_(teacher.lm_head.weight * (1 + 0.3 * noise))
    batch = RetrieveTeacherStates(policy())(make_batch(1, teacher.config.vocab_size))
    losses = VocabularyDistillationLoss(student, teacher.get_output_embeddings(), divergence="jsd")
    optimizer = torch.optim.Adam(student.lm_head.parameters(), lr=3e-3)
    history = []
    for _ in range(6):
        loss = losses(batch).loss_distill
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.7 * history[0], history
