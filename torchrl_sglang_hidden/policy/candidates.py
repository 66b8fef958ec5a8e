"""Candidate continuations of a prompt: their log-probs, and an actor that chooses among them.

Knows nothing of wire formats, nor of how a candidate's text becomes ids: see ``candidate_ids.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, cast, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase
from tensordict.utils import NestedKey
from torchrl.data import TensorSpec
from torchrl.modules import MaskedCategorical, ProbabilisticActor

from torchrl_sglang_hidden.engines import Engine, generate_ahead
from torchrl_sglang_hidden.errors import (
    ConstraintError,
    InputError,
    InputTypeError,
    MissingKeyError,
    PromptLengthError,
    TokenIdError,
)
from torchrl_sglang_hidden.images.expansion import ImageProcessor
from torchrl_sglang_hidden.policy.candidate_ids import (
    CandidateIds,
    Candidates,
    Ids,
    read_candidates,
    warn_of_equal_beginnings,
)
from torchrl_sglang_hidden.policy.requests import CallOptions
from torchrl_sglang_hidden.policy.rows import Row
from torchrl_sglang_hidden.policy.tokenizer import OwnTokenizer
from torchrl_sglang_hidden.records import READING, EngineInfo, Request
from torchrl_sglang_hidden.spec.constraints import check_constraints

__all__ = ["CandidateActor", "Candidates", "Normalization", "Reduction", "score_candidates"]

Reduction = Literal["sum", "mean", "first"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
Normalization = Literal["token", "word"]
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)


class Scorer(Protocol):
    """What `CandidateActor` needs of a policy; `SGLangHiddenWrapper` has it."""

    @property
    def input_key(self) -> NestedKey:
        """Where the prompts are read."""

    @property
    def action_mask_key(self) -> NestedKey | None:
        """Where the rows' token masks are read, or None."""

    def score(
        self,
        tensordict: TensorDictBase,
        candidates: Candidates,
        *,
        reduction: Reduction = "sum",
        normalize: Normalization | None = None,
        mask: torch.Tensor | None = None,
    ) -> TensorDict:
        """Score candidates: see `SGLangHiddenWrapper.score`."""


def score_candidates(
    prompts: Sequence[Row],
    candidates: Candidates,
    *,
    call: CallOptions,
    reduction: Reduction,
    normalize: Normalization | None,
    mask: torch.Tensor | None,
    batch_size: torch.Size,
    own: OwnTokenizer,
    processor: ImageProcessor,
    engine: Engine,
    ahead: Engine,
) -> TensorDict:
    """Score candidate continuations of each prompt row; see `SGLangHiddenWrapper.score`.

    Args:
        prompts: R rows, in row-major order of ``batch_size``.
        candidates: A for all rows, or as many lists as rows.
        call: what `read_scoring` returned.
        reduction: how the log-probs of a candidate's tokens become one number.
        normalize: what the sum is divided by, or None.
        mask: bool ``[*batch, A]``, True at the candidates to score; None for all.
        batch_size: of the prompts.
        own: the policy's copies of its tokenizer.
        processor: says which ids the engine keeps behind images.
        engine: where the candidates are sent.
        ahead: the engine that computes each prompt first, so that its candidates find it in the prefix cache. Not a
            queue, which would wait for other callers twice.

    Returns:
        ``logits``, ``mask`` and ``num_tokens``, each ``[*batch, A]``, on the CPU.

    Raises:
        InputError, ConstraintError: see `SGLangHiddenWrapper.score`.
    """
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction={reduction!r}: expected one of {REDUCTIONS}")
    if normalize not in (None, *NORMALIZATIONS):
        raise InputError(f"normalize={normalize!r}: expected one of {NORMALIZATIONS}, or None")
    if normalize is not None and reduction != "sum":
        raise InputError(
            f"normalize={normalize!r} with reduction={reduction!r}: it divides the sum over a candidate's tokens; "
            "leave one of the two out"
        )
    read = read_candidates(candidates, prompts, own)
    rows = [[candidate.ids for candidate in row] for row in read]
    wanted_RA = _read_mask(mask, rows, batch_size)
    if reduction == "first":
        warn_of_equal_beginnings(read, _places(wanted_RA), own)
    words_RA = _num_words(read, wanted_RA, own) if normalize == "word" else 1
    requests = [_prompt_request(prompt, call) for prompt in prompts]
    num_sent = 1 if reduction == "first" else None
    _check(rows, requests, ahead.info, num_sent)
    _check_kept(rows, prompts, wanted_RA, processor, num_sent)
    logits_RA = _log_probs(requests, rows, wanted_RA, "mean" if normalize == "token" else reduction, engine, ahead)
    logits_RA = logits_RA / words_RA
    # A NaN stays, for the distribution to refuse.
    mask_RA = wanted_RA & ~logits_RA.isneginf()
    for row, any_left in enumerate(mask_RA.any(-1).tolist()):
        if not any_left:
            raise ConstraintError(
                f"row {row}: the constraints take away all of its {int(wanted_RA[row].sum())} candidates; allow "
                "the tokens of one"
            )
    num_tokens_RA = _padded([[len(ids) for ids in row] for row in rows])
    scores = {"logits": logits_RA, "mask": mask_RA, "num_tokens": num_tokens_RA}
    return TensorDict({name: value.reshape(*batch_size, -1) for name, value in scores.items()}, batch_size=batch_size)


def _log_probs(
    requests: Sequence[Request],
    rows: Sequence[Sequence[Ids]],
    wanted_RA: torch.Tensor,
    reduction: Reduction,
    engine: Engine,
    ahead: Engine,
) -> torch.Tensor:
    """Return the reduced log-probs of the wanted candidates, ``[R, A]``, and -inf for the others."""
    wanted = _places(wanted_RA)
    sequences = [
        _candidate_request(requests[row], rows[row][column][:1] if reduction == "first" else rows[row][column])
        for row, column in wanted
    ]
    if len(sequences) > len(requests):
        # SGLang computes a prompt again for each of several requests that arrive together.
        generate_ahead(ahead, requests)
    logits_RA = torch.full(wanted_RA.shape, -math.inf)
    for (row, column), completion in zip(wanted, engine.generate(sequences), strict=True):
        log_probs_C = cast("torch.Tensor", completion.prompt_log_probs_P)
        logits_RA[row, column] = log_probs_C.mean() if reduction == "mean" else log_probs_C.sum()
    return logits_RA


def _places(wanted_RA: torch.Tensor) -> list[tuple[int, int]]:
    """Return row and column of each True."""
    return [(int(row), int(column)) for row, column in wanted_RA.nonzero()]


def _num_words(rows: Sequence[Sequence[CandidateIds]], wanted_RA: torch.Tensor, own: OwnTokenizer) -> torch.Tensor:
    """Return the words of the wanted candidates, ``[R, A]``, and 1 for the others."""
    words_RA = torch.ones(wanted_RA.shape)
    for row, column in _places(wanted_RA):
        words_RA[row, column] = rows[row][column].num_words(f"row {row}, candidate {column}", own)
    return words_RA


def _prompt_request(prompt: Row, call: CallOptions) -> Request:
    """Return the request that computes a prompt, and samples one token.

    It has the constraints, so that a server that cannot serve them says so before the candidates are sent.
    """
    return Request(
        prompt.prompt_ids,
        images=prompt.placed,
        sampling=READING,
        return_log_probs=False,
        lora=call.lora,
        priority=call.priority,
        response_limit=call.response_limit,
        constraints=(*call.constraints, *(() if prompt.action_mask is None else (prompt.action_mask,))),
    )


def _candidate_request(request: Request, ids: Ids) -> Request:
    """Return the request that scores the ids of a candidate after the prompt of a request."""
    start, stop = len(request.prompt_ids), len(request.prompt_ids) + len(ids)
    return replace(
        request,
        prompt_ids=request.prompt_ids + ids,
        images=None if request.images is None else request.images.followed_by(ids),
        score_prompt=True,
        score_from=start,
        response_ranges=((start, stop),) if request.constraints else (),
    )


# --- checks ----------------------------------------------------------------------------------------------------------


def _padded(values_RA: Sequence[Sequence[int]]) -> torch.Tensor:
    width = max(map(len, values_RA))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in values_RA])


def _read_mask(mask: Any, rows: Sequence[Sequence[Ids]], batch_size: torch.Size) -> torch.Tensor:
    """Return a bool mask ``[R, A]``, True at the candidates that are there and wanted."""
    there_RA = _padded([[1] * len(row) for row in rows]).bool()
    if mask is None:
        return there_RA
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        is_a = f"tensor of {mask.dtype}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InputTypeError(f"mask: a {is_a}; expected a tensor of torch.bool")
    expected = (*batch_size, there_RA.shape[1])
    if mask.shape != expected:
        raise InputError(
            f"mask: shape {tuple(mask.shape)}; expected {expected}, the batch and its {expected[-1]} candidates"
        )
    wanted_RA = there_RA & mask.reshape(there_RA.shape).cpu()
    for row, any_wanted in enumerate(wanted_RA.any(-1).tolist()):
        if not any_wanted:
            raise ConstraintError(f"row {row}: the mask leaves 0 of {len(rows[row])} candidates; leave at least 1")
    return wanted_RA


def _check(rows: Sequence[Sequence[Ids]], requests: Sequence[Request], info: EngineInfo, num_sent: int | None) -> None:
    """Refuse what the engine's own check would name by another row, because it sees one row for each candidate.

    ``num_sent`` is how many of a candidate's tokens are sent; None for all.
    """
    for row, (request, candidates) in enumerate(zip(requests, rows, strict=True)):
        num_prompt = len(request.prompt_ids)
        if not num_prompt:
            raise PromptLengthError(f"row {row}: the prompt has 0 tokens; SGLang needs at least 1")
        try:
            check_constraints(request.constraints, info.vocab_size, num_sent or max(map(len, candidates)))
        except (TokenIdError, ConstraintError) as error:
            raise type(error)(f"row {row}: {error}") from error
        for column, ids in enumerate(candidates):
            name = f"row {row}, candidate {column}:"
            for extreme in (min(ids), max(ids)):
                if not 0 <= extreme < info.vocab_size:
                    raise TokenIdError(
                        f"{name} token id {extreme} is outside the vocabulary of {info.vocab_size}; ids are "
                        f"0..{info.vocab_size - 1}. Was it made by another model's tokenizer?"
                    )
            length = num_sent or len(ids)
            if num_prompt + length > info.max_prompt_tokens:
                raise PromptLengthError(
                    f"{name} {num_prompt} prompt tokens and {length} of the candidate are {num_prompt + length}, "
                    f"over the engine's limit of {info.max_prompt_tokens} (context length {info.context_length}); "
                    "shorten one of them, or start the server with a larger context or KV cache"
                )


def _check_kept(
    rows: Sequence[Sequence[Ids]],
    prompts: Sequence[Row],
    wanted_RA: torch.Tensor,
    processor: ImageProcessor,
    num_sent: int | None,
) -> None:
    """Refuse candidates behind images that the engine would score as other ids."""
    for row, column in _places(wanted_RA):
        if prompts[row].images is not None:
            sent_ids = (*prompts[row].sent_ids, *rows[row][column][:num_sent])
            processor.check_sent(f"row {row}, candidate {column}:", sent_ids, remedy="give another candidate")


# --- choosing --------------------------------------------------------------------------------------------------------


class _CandidateLogits(TensorDictModuleBase):  # type: ignore[misc]
    def __init__(
        self,
        policy: Scorer,
        candidates: Candidates,
        options: Mapping[str, Any],
        mask_key: NestedKey | None,
        out_keys: tuple[NestedKey, NestedKey],
    ) -> None:
        super().__init__()
        self.policy, self.candidates, self.options, self.mask_key = policy, candidates, dict(options), mask_key
        keys = (policy.input_key, policy.action_mask_key, mask_key)
        self.in_keys = list(dict.fromkeys(key for key in keys if key is not None))
        self.out_keys = list(out_keys)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        mask = None
        if self.mask_key is not None:
            mask = tensordict.get(self.mask_key)
            if mask is None:
                raise MissingKeyError(
                    f"the TensorDict has no {self.mask_key!r}, which the actor reads its mask from; add one, or make "
                    "the actor without mask_key"
                )
        scores = self.policy.score(tensordict, self.candidates, mask=mask, **self.options)
        for key, name in zip(self.out_keys, ("logits", "mask"), strict=True):
            tensordict.set(key, scores[name])
        return tensordict


class CandidateActor(ProbabilisticActor):  # type: ignore[misc]
    """A TorchRL actor whose actions are candidate texts: the language model's log-probs of them are its logits.

    It reads an observation as the wrapper reads its prompt, and chooses through torchrl's ``MaskedCategorical``. The
    parameters are the server's: ``get_dist`` asks it again, and no gradient reaches them.

    Args:
        policy: an `SGLangHiddenWrapper` that generates.
        candidates: see `SGLangHiddenWrapper.score`: a list of A for every row, where action a is candidate a.

    Keyword Args:
        reduction, normalize: see `SGLangHiddenWrapper.score`. TWOSOME's policy is ``normalize="word"`` or ``"token"``.
        action_mask_key: where the environment says which of the A candidates it allows now, bool ``[*batch, A]``. The
            others are not scored. None allows all.
        logits_key: where the candidates' log-probs are written, float32 ``[*batch, A]``.
        logits_mask_key: where it is written which of them may be chosen, bool ``[*batch, A]``.
        action_key: where the action is written, int64 ``[*batch]``, an index into the candidates; its log-prob beside
            it where tensordict puts it, ``"action_log_prob"`` or ``"sample_log_prob"``.
        default_interaction_type: what to do outside ``set_exploration_type``: sample, unless told otherwise.
            Deterministic is the most likely candidate.
        return_log_prob: whether the action's log-prob is written.
        spec: the action's spec, such as ``env.action_spec``.

    Raises:
        InputError: what `SGLangHiddenWrapper.score` refuses, when it is called.
        MissingKeyError: the mask is not there.

    Example:
        >>> actor = CandidateActor(policy, ["go north", "go south", "wait"], action_mask_key="action_mask")
        >>> rollout = env.rollout(100, actor)  # env writes the prompt that policy reads, and takes an action 0, 1 or 2
    """

    def __init__(
        self,
        policy: Scorer,
        candidates: Candidates,
        *,
        reduction: Reduction = "sum",
        normalize: Normalization | None = None,
        action_mask_key: NestedKey | None = None,
        logits_key: NestedKey = "logits",
        logits_mask_key: NestedKey = "logits_mask",
        action_key: NestedKey = "action",
        default_interaction_type: InteractionType = InteractionType.RANDOM,
        return_log_prob: bool = True,
        spec: TensorSpec | None = None,
    ) -> None:
        # A policy that stands in for the wrapper need not know what is not asked for.
        options = {"reduction": reduction} | ({} if normalize is None else {"normalize": normalize})
        super().__init__(
            _CandidateLogits(policy, candidates, options, action_mask_key, (logits_key, logits_mask_key)),
            in_keys={"logits": logits_key, "mask": logits_mask_key},
            out_keys=[action_key],
            spec=spec,
            distribution_class=MaskedCategorical,
            default_interaction_type=default_interaction_type,
            return_log_prob=return_log_prob,
        )
