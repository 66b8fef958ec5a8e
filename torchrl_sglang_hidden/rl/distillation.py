"""`VocabularyDistillationLoss`: trains a student towards a teacher's whole next-token distribution.

Knows nothing of engines: `RetrieveTeacherStates` writes what is read here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.modules.llm.policies import LLMWrapperBase
from torchrl.objectives.common import LossModule
from torchrl.objectives.llm.distillation import DistillationLossOutput

from torchrl_sglang_hidden.errors import AlignmentError, InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.rl.teacher_states import flat_rows, teacher_keys
from torchrl_sglang_hidden.rl.vocabulary_divergence import Divergence, check_measure, vocabulary_divergence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["VocabularyDistillationLoss"]

Reduction = Literal["mean", "sum", "none"]


class VocabularyDistillationLoss(LossModule):  # type: ignore[misc]
    """Distils teachers into a student by a divergence over the whole vocabulary, at the student's own tokens.

    TorchRL's ``DistillationLoss`` sees the one token that was sampled at each position, and estimates the divergence
    from it. This loss computes it, from the states that `RetrieveTeacherStates` brought home and the teacher's head:
    on-policy distillation as in Agarwal et al. 2024 (arXiv 2306.13649). Logits are made a chunk of positions at a time;
    see `vocabulary_divergence`. The gradient reaches the student alone.

    Args:
        student: a Hugging Face causal language model, or a policy of TorchRL over one (its ``model``). A model of PEFT
            counts with its adapter.
        teacher_heads: the teacher's model or head, see `logits_from_hidden`; or a mapping of the names of several
            teachers, those of `RetrieveTeacherStates`, to theirs. Not trained, and not in the ``state_dict``.

    Keyword Args:
        divergence, beta, temperature, vocab_size, chunk_size, tolerance: see `vocabulary_divergence`. The teachers'
            log-probs are held against their states and heads in each call where the batch has them.
        teacher_weights: with several teachers, by name, the weight of each one's divergence; equal by default. They are
            divided by their sum.
        reduction: over the rows: ``"mean"``, ``"sum"`` or ``"none"``.
        normalize_by_seq_length: whether a row counts by the mean of its tokens, or by their sum.
        assistant_only: trains on the tokens in ``("masks", "all_assistant_mask")``; on all but padding otherwise. The
            first token of a row has no state before it and never counts.

    Reads, with names for `set_keys`:

    - ``tokens``: int64 ``[N]`` per row, at ``("tokens", "full")``;
    - ``assistant_mask``, ``attention_mask``: bool ``[N]`` per row, at ``("masks", "all_assistant_mask")`` and
      ``("masks", "all_attention_mask")``;
    - the teachers' states and log-probs where `RetrieveTeacherStates` writes them.

    Returns from ``forward``: TorchRL's ``DistillationLossOutput`` with ``loss_distill``, and ``kl_to_teacher``, the
    mean of the rows' divergences without a gradient.

    Raises:
        MissingKeyError: when called, a batch without one of these.
        InputError: a row without a token to train on; states that are not one per token; see `vocabulary_divergence`.
        AlignmentError: a teacher's log-probs are not those of its states and head.

    Example:
        >>> loss = VocabularyDistillationLoss(student, teacher_model.get_output_embeddings())
        >>> loss(retrieve(batch)).loss_distill.backward()
    """

    @dataclass
    class _AcceptedKeys:
        """Names of the keys that ``set_keys`` changes."""

        tokens: NestedKey = ("tokens", "full")
        assistant_mask: NestedKey = ("masks", "all_assistant_mask")
        attention_mask: NestedKey = ("masks", "all_attention_mask")

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    out_keys = ["loss_distill", "kl_to_teacher"]  # noqa: RUF012  as TorchRL's losses have them

    def __init__(
        self,
        student: nn.Module,
        teacher_heads: Any,
        *,
        divergence: Divergence = "reverse",
        beta: float = 0.5,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        chunk_size: int | None = None,
        tolerance: float = 0.1,
        teacher_weights: Mapping[str, float] | None = None,
        reduction: Reduction = "mean",
        normalize_by_seq_length: bool = True,
        assistant_only: bool = True,
    ) -> None:
        super().__init__()
        check_measure(divergence, beta, temperature, vocab_size, chunk_size, tolerance)
        if reduction not in get_args(Reduction):
            raise InputError(
                f"reduction={reduction!r:.80}: expected one of {', '.join(map(repr, get_args(Reduction)))}"
            )
        self.student = student
        self.reduction = reduction
        self.normalize_by_seq_length = normalize_by_seq_length
        self.assistant_only = assistant_only
        # In a dict, so that no teacher is among the loss's modules: it is neither trained nor saved.
        self._teachers: dict[str | None, Any] = (
            dict(teacher_heads) if isinstance(teacher_heads, Mapping) else {None: teacher_heads}
        )
        self._weights = _check_weights(self._teachers, teacher_weights)
        self._measure: dict[str, Any] = {
            "divergence": divergence,
            "beta": beta,
            "temperature": temperature,
            "vocab_size": vocab_size,
            "chunk_size": chunk_size,
            "tolerance": tolerance,
        }
        _causal_model(student)
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        """Name what is read, after `set_keys` too. The attention mask and the log-probs are optional."""
        keys = self.tensor_keys
        states = [("next", *teacher_keys(name)[0]) for name in self._teachers]
        self.in_keys = [keys.tokens, *([keys.assistant_mask] if self.assistant_only else []), *states]

    def forward(self, tensordict: TensorDictBase) -> DistillationLossOutput:
        """Compute the loss of a batch of any shape, rows ragged or padded.

        Args:
            tensordict: what `RetrieveTeacherStates` returned; not written to.

        Returns:
            ``loss_distill``, a number, or float32 ``[rows]`` with ``reduction="none"``; ``kl_to_teacher``, a number.
        """
        rows = [self._read(index, row) for index, row in enumerate(flat_rows(tensordict))]
        if not rows:
            raise InputError(f"a batch of size {tuple(tensordict.batch_size)} has no rows; expected at least 1")
        states = _student_states(self.student, [row.tokens_N for row in rows])
        found = torch.stack([self._of_row(index, row, next(states)) for index, row in enumerate(rows)])
        loss = found if self.reduction == "none" else found.mean() if self.reduction == "mean" else found.sum()
        return DistillationLossOutput(loss_distill=loss, kl_to_teacher=found.detach().mean())

    def _read(self, index: int, row: TensorDictBase) -> _Row:
        keys = self.tensor_keys
        tokens_N = _need(row, keys.tokens, "name the student's tokens with set_keys(tokens=...)")
        attended_N = row.get(keys.attention_mask, None)
        attended_N = torch.ones_like(tokens_N, dtype=torch.bool) if attended_N is None else attended_N.bool()
        trained_N = attended_N
        if self.assistant_only:
            remedy = "let the policy write its masks, or use assistant_only=False"
            trained_N = _need(row, keys.assistant_mask, remedy).bool() & attended_N
        teachers = {}
        for name in self._teachers:
            states_key, log_probs_key = teacher_keys(name)
            states_ND = _need(_after(row), states_key, "run RetrieveTeacherStates on the batch first")
            log_probs_N = _after(row).get(log_probs_key, None)
            if states_ND.shape[:-1] != tokens_N.shape:
                raise InputError(
                    f"row {index}: {states_key!r} has shape {tuple(states_ND.shape)} for {len(tokens_N)} tokens; "
                    "expected one state for each: run RetrieveTeacherStates on this batch"
                )
            teachers[name] = (states_ND[attended_N], None if log_probs_N is None else log_probs_N[attended_N])
        selected_N = trained_N[attended_N].clone()
        selected_N[:1] = False
        if not selected_N.any():
            raise InputError(
                f"row {index} has no token to train on: of its {len(selected_N)} tokens none but the first is marked "
                f"in {keys.assistant_mask!r}; leave the row out, or use assistant_only=False"
            )
        return _Row(tokens_N[attended_N], selected_N, teachers)

    def _of_row(self, index: int, row: _Row, states_ND: torch.Tensor) -> torch.Tensor:
        # State n predicts token n + 1.
        places = row.selected_N.nonzero()[:, 0].to(states_ND.device) - 1
        tokens_C = row.tokens_N.to(states_ND.device)[places + 1]
        total = states_ND.new_zeros((), dtype=torch.float32)
        for name, head in self._teachers.items():
            teacher_ND, log_probs_N = row.teachers[name]
            at = places.to(teacher_ND.device)
            log_probs_C = None if log_probs_N is None else log_probs_N[at.to(log_probs_N.device) + 1]
            try:
                found_C = vocabulary_divergence(
                    states_ND[places],
                    self.student_head,
                    teacher_ND[at],
                    head,
                    tokens_N=None if log_probs_C is None else tokens_C,
                    teacher_log_probs_N=log_probs_C,
                    **self._measure,
                )
            except AlignmentError as error:
                of_teacher = "" if name is None else f", teacher {name!r}"
                raise type(error)(f"row {index}{of_teacher}, trained {error}") from error
            total = total + self._weights[name] * (found_C.mean() if self.normalize_by_seq_length else found_C.sum())
        return total

    @property
    def student_head(self) -> PreTrainedModel:
        """The causal language model whose head makes the student's logits."""
        return _causal_model(self.student)


class _Row(NamedTuple):
    """A row without its padding: N tokens, which of them are trained on, and each teacher's states and log-probs."""

    tokens_N: torch.Tensor
    selected_N: torch.Tensor
    teachers: dict[str | None, tuple[torch.Tensor, torch.Tensor | None]]


def _check_weights(teachers: Mapping[Any, Any], weights: Mapping[str, float] | None) -> dict[Any, float]:
    """Return each teacher's share."""
    if not teachers:
        raise InputError("teacher_heads has no teacher; expected at least 1")
    if weights is not None and not isinstance(weights, Mapping):
        raise InputTypeError(
            f"teacher_weights={weights!r:.80}: expected a mapping of teachers' names to numbers, or None"
        )
    given = dict.fromkeys(teachers, 1.0) if weights is None else dict(weights)
    if set(given) != set(teachers):
        raise InputError(f"teacher_weights for {sorted(map(str, given))}; expected one for each of {list(teachers)}")
    if not all(isinstance(weight, (int, float)) for weight in given.values()):
        raise InputTypeError(f"teacher_weights={given!r:.200}: expected numbers")
    wrong = {name: weight for name, weight in given.items() if not 0 <= weight < math.inf}
    if wrong or not sum(given.values()):
        raise InputError(f"teacher_weights={given}: expected finite numbers of at least 0, not all 0")
    return {name: weight / sum(given.values()) for name, weight in given.items()}


def _after(row: TensorDictBase) -> TensorDictBase:
    """Return where `RetrieveTeacherStates` writes."""
    after: TensorDictBase | None = row.get("next", None)
    return row if after is None else after


def _need(row: TensorDictBase, key: NestedKey, remedy: str) -> torch.Tensor:
    found: torch.Tensor | None = row.get(key, None)
    if found is None:
        raise MissingKeyError(f"no {key!r} in the batch: {remedy}")
    return found


def _causal_model(student: Any) -> PreTrainedModel:
    """Return the Hugging Face model in a policy of TorchRL or in a model of PEFT."""
    # Here, as all of `rl` would take half as long again to import, in each worker of an environment too.
    from transformers import PreTrainedModel

    model = getattr(student, "model", student) if isinstance(student, LLMWrapperBase) else student
    unwrap = getattr(model, "get_base_model", None)
    found = model if unwrap is None else unwrap()
    if not isinstance(found, PreTrainedModel):
        raise InputTypeError(f"student: a {type(student).__name__}; expected a Hugging Face causal language model")
    return found


def _student_states(student: nn.Module, rows: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the states that the student's head reads, float ``[N, D]`` per row, of one pass over all rows."""
    model = _causal_model(student)
    decoder = getattr(model, model.base_model_prefix)
    device = next(model.parameters()).device
    # On the right: no token reads what stands behind it.
    ids = torch.nn.utils.rnn.pad_sequence([row.to(device) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    states = decoder(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return (found[: len(row)] for found, row in zip(states, rows, strict=True))
