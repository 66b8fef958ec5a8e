"""Carry the logits that one step took from the device to their requests.

SGLang copies the tensors of `DeviceLogits` to the host with its other results, and `HostLogits.consume` adds them to
their requests once the tokens are committed. Knows SGLang's auxiliary outputs by attribute name, and imports nothing of
SGLang. Runs inside the scheduler, where an exception ends the server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torchrl_sglang_hidden.records import TokenLogits
from torchrl_sglang_hidden.reduce.token_logits import RequestLogits, keep_rows
from torchrl_sglang_hidden.server.token_rows import PromptPart, SamplingRow

__all__ = ["DeviceLogits", "HostLogits", "PromptLogits", "PromptPiece", "SampledLogits"]

Copy = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class SampledLogits:
    """Holds columns of several batch rows: rows that ask for the same kind and number of columns.

    Args:
        batch_rows: the R rows' indices in the batch, in increasing order.
        logits: one row for each of them, ``[R, C]``.
        entropy: whether they are entropies, ``[R, 1]``.
    """

    batch_rows: tuple[int, ...]
    logits: TokenLogits
    entropy: bool = False


@dataclass(frozen=True, slots=True)
class PromptPiece:
    """Names prompt tokens of one request, ``first … first+count-1``, whose logits one call of the head computed.

    Args:
        part: what was planned. It may be computed in several pieces, and this is one of them.
        first: the first prompt token of the piece.
        count: its tokens.
    """

    part: PromptPart
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class PromptLogits:
    """Holds what one call of the head brought for prompt tokens, N in all. With pieces alone it counts them.

    Args:
        pieces: whose tokens they are, in order.
        columns: by kind and number of columns: the pieces' places in ``pieces``, and their rows one behind another.
        scored: the places of the pieces that are scored.
        log_probs_S: float32 ``[S]``, the log-probs of the scored pieces' tokens, one behind another; None for none.
        choosable_N: bool ``[N]``, whether the constraints leave any token; None where none act.
    """

    pieces: tuple[PromptPiece, ...]
    columns: tuple[tuple[tuple[int, ...], TokenLogits], ...] = ()
    scored: tuple[int, ...] = ()
    log_probs_S: torch.Tensor | None = None
    choosable_N: torch.Tensor | None = None

    def copy_to_host(self, copy: Copy) -> PromptLogits:
        """Start the copies to the host."""
        return replace(
            self,
            columns=tuple((places, _copy_logits(logits, copy)) for places, logits in self.columns),
            log_probs_S=None if self.log_probs_S is None else copy(self.log_probs_S),
            choosable_N=None if self.choosable_N is None else copy(self.choosable_N),
        )

    def add(self) -> None:
        """Add the logits to their requests."""
        rows: dict[int, TokenLogits] = {}
        for places, logits in self.columns:
            counts = [self.pieces[place].count for place in places]
            values = _split(logits.values_NC, counts)
            ids = None if logits.token_ids_NC is None else _split(logits.token_ids_NC, counts)
            for n, place in enumerate(places):
                rows[place] = TokenLogits(values_NC=values[n], token_ids_NC=None if ids is None else ids[n])
        log_probs: dict[int, torch.Tensor] = {}
        if self.log_probs_S is not None:
            counts = [self.pieces[place].count for place in self.scored]
            split = _split(self.log_probs_S, counts)
            log_probs = dict(zip(self.scored, split, strict=True))
        choosable = None if self.choosable_N is None else self.choosable_N.tolist()
        row = 0
        for place, piece in enumerate(self.pieces):
            request = piece.part.logits
            if choosable is not None and not all(choosable[row : row + piece.count]):
                token = piece.first + choosable.index(False, row) - row
                request.fail(_nothing_left(f"token {token} of the sequence", request), None)
            row += piece.count
            request.add_prompt(piece.first, rows.get(place), log_probs.get(place), piece.count)


@dataclass(frozen=True, slots=True)
class _TakenLogits:
    """Holds the logits that one step took.

    Args:
        sampling_rows: the batch rows that sample a token.
        reqs: the batch's requests, SGLang's own objects.
        sampled: the logits of sampled tokens.
        prompts: the logits of prompt tokens.
        constrained_rows: the R batch rows that constraints acted on.
        choosable_R: bool ``[R]``, whether the constraints left any token to sample; None where none acted.
    """

    sampling_rows: tuple[SamplingRow, ...]
    reqs: tuple[Any, ...]
    sampled: tuple[SampledLogits, ...]
    prompts: tuple[PromptLogits, ...]
    constrained_rows: tuple[int, ...]
    choosable_R: torch.Tensor | None


class HostLogits(_TakenLogits):
    """Holds one step's logits on the host, SGLang's ``HostAuxiliaryOutput``."""

    __slots__ = ()

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Add the logits to their requests. ``commits[i]`` is None when batch row i committed no token."""
        for prompts in self.prompts:
            prompts.add()
        choosable: dict[int, bool] = {}
        if self.choosable_R is not None:
            choosable = dict(zip(self.constrained_rows, self.choosable_R.tolist(), strict=True))
        accepted: dict[int, RequestLogits] = {}
        for sampling in self.sampling_rows:
            row, request = sampling.row, sampling.logits
            if row >= len(batch.reqs) or batch.reqs[row] is not self.reqs[row] or commits[row] is None:
                continue
            if request.constrains_sampled and row not in choosable:
                continue  # the sampler did not pass through the hooks: the client's count finds it
            if not choosable.get(row, True):
                request.fail(_nothing_left(f"token {sampling.index} of the response", request), sampling.index)
            if commits[row].output_index == sampling.index and request.accept(sampling.index):
                accepted[row] = request
        for group in self.sampled:
            picks = [n for n, row in enumerate(group.batch_rows) if row in accepted]
            name = "_entropy" if group.entropy else "_response"
            keep_rows(group.logits, picks, [accepted[group.batch_rows[n]] for n in picks], name=name)


class DeviceLogits(_TakenLogits):
    """Holds one step's logits on the device, SGLang's ``DeviceAuxiliaryOutput``."""

    __slots__ = ()

    def copy_to_host(self, copy: Copy) -> HostLogits:
        """Start the step's copies to the host."""
        return HostLogits(
            sampling_rows=self.sampling_rows,
            reqs=self.reqs,
            sampled=tuple(replace(group, logits=_copy_logits(group.logits, copy)) for group in self.sampled),
            prompts=tuple(prompts.copy_to_host(copy) for prompts in self.prompts),
            constrained_rows=self.constrained_rows,
            choosable_R=None if self.choosable_R is None else copy(self.choosable_R),
        )


def _split(rows_N: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Copy the rows of each piece: a view would keep those of all alive."""
    return torch.ops.aten.split_with_sizes_copy(rows_N, counts)  # type: ignore[no-any-return]


def _copy_logits(logits: TokenLogits, copy: Copy) -> TokenLogits:
    ids = logits.token_ids_NC
    return TokenLogits(values_NC=copy(logits.values_NC), token_ids_NC=None if ids is None else copy(ids))


def _nothing_left(what: str, request: RequestLogits) -> str:
    names = ", ".join(dict.fromkeys(constraint.name for constraint in request.wanted.constraints))
    return (
        f"{what}: 0 tokens are left to choose from by the constraints ({names}; one that gives NaN or infinity leaves "
        "nothing) together with what SGLang applies before them (a "
        "grammar, min_new_tokens, logit_bias, a processor); loosen one of them"
    )
