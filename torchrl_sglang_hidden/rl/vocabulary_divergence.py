"""`vocabulary_divergence`: how far a student's next-token distribution is from a teacher's, over the whole vocabulary.

Knows nothing of TensorDicts or engines.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias, assert_never, get_args

import torch
from torch.utils.checkpoint import checkpoint

from torchrl_sglang_hidden.errors import AlignmentError, InputError, InputTypeError, TokenIdError
from torchrl_sglang_hidden.policy.logits_from_hidden import logits_from_hidden

__all__ = ["Divergence", "check_measure", "vocabulary_divergence"]

Divergence: TypeAlias = Literal["reverse", "forward", "jsd"]

# Logits of one chunk: 64 MiB in float32.
_CHUNK_LOGITS = 2**24


def vocabulary_divergence(
    student_states_ND: torch.Tensor,
    student_head: Any,
    teacher_states_ND: torch.Tensor,
    teacher_head: Any,
    *,
    divergence: Divergence = "reverse",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    tokens_N: torch.Tensor | None = None,
    teacher_log_probs_N: torch.Tensor | None = None,
    tolerance: float = 0.1,
) -> torch.Tensor:
    """Compute the divergence between two next-token distributions at each of N positions.

    Both models' logits are made from the states of their last layer, a chunk of positions at a time, and are made again
    for the gradient: logits ``[N, V]`` are never in memory. The gradient reaches the student's states and head alone.

    Args:
        student_states_ND: floating ``[N, D]``: the states that the student's head reads.
        student_head: see `logits_from_hidden`: a causal language model, or its head where it only multiplies.
        teacher_states_ND: floating ``[N, E]``, of the same positions.
        teacher_head: the teacher's model or head.

    Keyword Args:
        divergence: ``"reverse"`` is KL(student ‖ teacher), ``"forward"`` KL(teacher ‖ student), and ``"jsd"`` the
            generalised Jensen-Shannon divergence of Agarwal et al. 2024, "On-Policy Distillation of Language Models"
            (arXiv 2306.13649): ``beta`` · KL(teacher ‖ M) + (1 - ``beta``) · KL(student ‖ M), with the mixture
            M = ``beta`` · teacher + (1 - ``beta``) · student.
        beta: of ``"jsd"``, above 0 and below 1.
        temperature: divides both models' logits.
        vocab_size: compares the first so many tokens, each distribution normalised over them. For heads that are padded
            to different sizes behind one vocabulary.
        chunk_size: positions at a time. By default as many as make 64 MiB of logits.
        tokens_N: int64 ``[N]``: the token behind each position, for the check of ``teacher_log_probs_N``.
        teacher_log_probs_N: floating ``[N]``: what the teacher's engine said of these tokens; NaN where nothing.
        tolerance: by how much the teacher's log-probs may differ from those of its states and ``teacher_head``: in
            nats, and times the smaller of the two where that is above 1. States in bfloat16 move likely tokens by a few
            thousandths of a nat, and a token of log-prob -15 by up to a tenth.

    Returns:
        float32 ``[N]``, in nats, not below 0 but for rounding, on the device of the student's states.

    Raises:
        InputError: shapes that do not fit one another, heads of two vocabularies, numbers out of their range.
        InputTypeError: no floating tensors, or a head that is none.
        TokenIdError: a token that the teacher's head does not have.
        AlignmentError: the teacher's log-probs are not those of its states: the head is of other weights.
    """
    check_measure(divergence, beta, temperature, vocab_size, chunk_size, tolerance)
    rows = (("student_states_ND", student_states_ND), ("teacher_states_ND", teacher_states_ND))
    for name, states_ND in rows:
        if not isinstance(states_ND, torch.Tensor) or not states_ND.is_floating_point():
            raise InputTypeError(f"{name}: a {type(states_ND).__name__}; expected a floating tensor [N, D]")
        if states_ND.ndim != 2 or len(states_ND) != len(student_states_ND):
            raise InputError(
                f"{name}: shape {tuple(states_ND.shape)} beside student states of {tuple(student_states_ND.shape)}; "
                "expected one vector for each of the same N positions"
            )
    if (tokens_N is None) != (teacher_log_probs_N is None):
        raise InputError("tokens_N and teacher_log_probs_N belong together: give the other one, or neither")
    for name, values_N in (("tokens_N", tokens_N), ("teacher_log_probs_N", teacher_log_probs_N)):
        if values_N is not None and values_N.shape != student_states_ND.shape[:1]:
            raise InputError(f"{name}: shape {tuple(values_N.shape)}; expected [{len(student_states_ND)}]")
    if not len(student_states_ND):
        return student_states_ND.new_zeros(0, dtype=torch.float32)
    sizes = _check_vocabularies(student_states_ND, student_head, teacher_states_ND, teacher_head, vocab_size)
    if chunk_size is None:
        chunk_size = max(_CHUNK_LOGITS // max(sizes), 1)
    if tokens_N is not None:
        tokens_N = _check_tokens(tokens_N, sizes[1])
    measure = _Measure(divergence, beta, temperature, vocab_size)
    found = []
    for start in range(0, len(student_states_ND), chunk_size):
        part = slice(start, start + chunk_size)
        divergence_C, log_probs_C = checkpoint(
            _of_chunk,
            measure,
            student_states_ND[part],
            student_head,
            teacher_states_ND[part].detach(),
            teacher_head,
            None if tokens_N is None else tokens_N[part],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        if teacher_log_probs_N is not None and log_probs_C is not None:
            _check_teacher(log_probs_C, teacher_log_probs_N[part], tolerance, start)
        found.append(divergence_C)
    return torch.cat(found)


class _Measure(NamedTuple):
    divergence: Divergence
    beta: float
    temperature: float
    vocab_size: int | None


def check_measure(
    divergence: Any, beta: Any, temperature: Any, vocab_size: Any, chunk_size: Any, tolerance: Any
) -> None:
    """Refuse what `vocabulary_divergence` cannot compute, before it has states."""
    if divergence not in get_args(Divergence):
        raise InputError(f"divergence={divergence!r:.80}: expected one of {', '.join(map(repr, get_args(Divergence)))}")
    if not isinstance(beta, (int, float)) or not 0 < beta < 1:
        raise InputError(f"beta={beta!r:.80}: expected a number above 0 and below 1")
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise InputError(f"temperature={temperature!r:.80}: expected a finite number above 0")
    for name, size, least in (("vocab_size", vocab_size, 2), ("chunk_size", chunk_size, 1)):
        if size is not None and (type(size) is not int or size < least):
            raise InputError(f"{name}={size!r:.80}: expected an integer of at least {least}, or None")
    if not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise InputError(f"tolerance={tolerance!r:.80}: expected a number of at least 0, in nats")


def _check_vocabularies(
    student_states_ND: torch.Tensor,
    student_head: Any,
    teacher_states_ND: torch.Tensor,
    teacher_head: Any,
    vocab_size: int | None,
) -> tuple[int, int]:
    """Return how many tokens the student's head and the teacher's have; refuse two that are not compared."""
    with torch.no_grad():
        student = logits_from_hidden(student_states_ND[:1], student_head).shape[-1]
        teacher = logits_from_hidden(teacher_states_ND[:1], teacher_head).shape[-1]
    if vocab_size is None and student != teacher:
        raise InputError(
            f"the student's head has {student} tokens and the teacher's {teacher}; give the size of their vocabulary "
            "as vocab_size where both are padded behind it, and another teacher otherwise"
        )
    if vocab_size is not None and vocab_size > min(student, teacher):
        raise InputError(
            f"vocab_size={vocab_size}: the student's head has {student} tokens and the teacher's {teacher}; expected "
            f"at most {min(student, teacher)}"
        )
    return student, teacher


def _check_tokens(tokens_N: torch.Tensor, num_tokens: int) -> torch.Tensor:
    outside = tokens_N[(tokens_N < 0) | (tokens_N >= num_tokens)]
    if outside.numel():
        raise TokenIdError(f"tokens_N: id {int(outside[0])}; expected ids in 0..{num_tokens - 1}")
    return tokens_N.to(torch.int64)


def _check_teacher(own_C: torch.Tensor, returned_C: torch.Tensor, tolerance: float, start: int) -> None:
    """Hold the teacher's log-probs, as its engine returned them, against those of its states and head."""
    returned_C = returned_C.to(own_C)
    # bfloat16 rounds a state in proportion, and with it the logits: an improbable token's is moved further.
    allowed_C = tolerance * torch.minimum(own_C.abs(), returned_C.abs()).clamp(min=1.0)
    wrong_C = ~((own_C - returned_C).abs() <= allowed_C) & ~returned_C.isnan()
    if wrong_C.any():
        index = int(wrong_C.nonzero()[0])
        raise AlignmentError(
            f"position {start + index}: the teacher's engine said a log-prob of {float(returned_C[index]):.4f}, and "
            f"its states and teacher_head say {float(own_C[index]):.4f}, further apart than the "
            f"{float(allowed_C[index]):.4f} of tolerance={tolerance}; "
            "give the head of the weights that the engine serves, and states of layer -1"
        )


def _of_chunk(
    measure: _Measure,
    student_states_CD: torch.Tensor,
    student_head: Any,
    teacher_states_CD: torch.Tensor,
    teacher_head: Any,
    tokens_C: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the divergence at each position of a chunk, and the teacher's log-prob of the token behind it."""
    student_CV = logits_from_hidden(student_states_CD, student_head)
    with torch.no_grad():
        teacher_CV = logits_from_hidden(teacher_states_CD, teacher_head).to(student_CV.device)
        log_probs_C = None
        if tokens_C is not None:
            chosen_C = teacher_CV.gather(-1, tokens_C.to(teacher_CV.device)[:, None])[:, 0]
            log_probs_C = chosen_C - teacher_CV.logsumexp(-1)
        teacher_CV = (teacher_CV[:, : measure.vocab_size] / measure.temperature).log_softmax(-1)
    student_CV = (student_CV[:, : measure.vocab_size] / measure.temperature).log_softmax(-1)
    if measure.divergence == "reverse":
        found_C = _kl(student_CV, teacher_CV)
    elif measure.divergence == "forward":
        found_C = _kl(teacher_CV, student_CV)
    elif measure.divergence == "jsd":
        beta = measure.beta
        # Where a token is impossible to both it adds nothing below, and the gradient of `logaddexp` would be NaN.
        impossible_CV = torch.logical_and(student_CV == -math.inf, teacher_CV == -math.inf)
        possible_CV = student_CV.masked_fill(impossible_CV, 0.0)
        mixture_CV = torch.logaddexp(teacher_CV + math.log(beta), possible_CV + math.log1p(-beta))
        found_C = beta * _kl(teacher_CV, mixture_CV) + (1 - beta) * _kl(student_CV, mixture_CV)
    else:
        assert_never(measure.divergence)
    return found_C.to(student_states_CD.device), log_probs_C


def _kl(from_CV: torch.Tensor, to_CV: torch.Tensor) -> torch.Tensor:
    """Return KL(from ‖ to) of log-probabilities; a token that is impossible on the left adds 0."""
    impossible_CV = from_CV == -math.inf
    difference_CV = (from_CV - to_CV).masked_fill(impossible_CV, 0.0)
    return (from_CV.exp() * difference_CV).sum(-1)
