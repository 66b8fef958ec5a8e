"""Constrains the next tokens of a forward step, and takes the logits that they are sampled from.

Knows SGLang's batches and samplers by attribute name, and imports nothing of SGLang. Runs inside the scheduler, where
an exception ends the server.

The order within one step: before the forward pass, `plan_logits` notes which response token each request samples. While
the head computes, `StepLogits.take_prompts` takes logits of prompt tokens. `StepLogits.take_raw` runs before SGLang
changes the logits for sampling, and `StepLogits.constrain` after. What was taken leaves with `StepLogits.taken`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from torchrl_sglang_hidden.counters import timed
from torchrl_sglang_hidden.records import TokenLogits
from torchrl_sglang_hidden.reduce.columns import select_rows
from torchrl_sglang_hidden.reduce.constraining import constrain
from torchrl_sglang_hidden.reduce.device import on_device
from torchrl_sglang_hidden.reduce.entropy import entropy_rows
from torchrl_sglang_hidden.reduce.token_logits import NextToken, RequestLogits
from torchrl_sglang_hidden.server.prompt_logits import piece_rows, prompt_logits_of, split_parts
from torchrl_sglang_hidden.server.taken_logits import DeviceLogits, PromptLogits, PromptPiece, SampledLogits
from torchrl_sglang_hidden.server.token_rows import PromptPart, SamplingRow, plan_tokens
from torchrl_sglang_hidden.spec.logits import Stage

__all__ = ["StepLogits", "plan_logits"]

_NO_MEMORY = (
    "the server's accelerator had no memory left for {}; ask for fewer tokens, columns or constraints at once, or "
    "start the server with a lower mem_fraction_static"
)


@dataclass(slots=True)
class StepLogits:
    """Takes and constrains the logits of one forward step, for the requests that asked for it.

    Args:
        sampling_rows: the batch rows that sample a token.
        prompts: the prompt tokens whose logits the step computes.
        reqs: the batch's requests, SGLang's own objects.
        vocab_size: V; the head may have more columns, as padding.
        num_rows: the step's positions.

    Attributes:
        collective: whether other ranks sample the same tokens from the same logits.
        input_ids: the step's input ids. For a decoding request that is the id sampled last, which the device has even
            where the host does not have it yet.
    """

    sampling_rows: tuple[SamplingRow, ...]
    prompts: tuple[PromptPart, ...]
    reqs: tuple[Any, ...]
    vocab_size: int
    num_rows: int
    collective: bool = False
    input_ids: torch.Tensor | None = None
    _sampled: list[SampledLogits] = field(default_factory=list)
    _prompt_logits: list[PromptLogits] = field(default_factory=list)
    _constrained_rows: tuple[int, ...] = ()
    _choosable_R: torch.Tensor | None = None

    @timed
    def take_raw(self, logits_BV: torch.Tensor) -> None:
        """Take the logits as the head gave them, before SGLang changes them for sampling."""
        self._take(logits_BV, "raw")

    @timed
    def constrain(self, logits_BV: torch.Tensor, temperatures_B1: torch.Tensor | None) -> None:
        """Apply the constraints in place, after all that SGLang does to the logits but before its temperature.

        Rows of requests without constraints are not written to.

        Args:
            logits_BV: the step's logits, ``[B, ≥V]``.
            temperatures_B1: SGLang divides the logits by these next; None where it does not divide.
        """
        acting = [sampling for sampling in self.sampling_rows if sampling.logits.constrains_sampled]
        if acting:
            choosable = self._constrain(logits_BV, acting)
            self._constrained_rows = tuple(sampling.row for sampling in acting)
            self._choosable_R = torch.cat(choosable) if len(choosable) > 1 else choosable[0]
        self._take(logits_BV, "processed", temperatures_B1)
        self._take_entropies(logits_BV, temperatures_B1)

    def _constrain(self, logits_BV: torch.Tensor, acting: Sequence[SamplingRow]) -> list[torch.Tensor]:
        """Constrain some rows in place; in halves where there is no memory for all at once."""
        try:
            return [self._constrain_together(logits_BV, acting)]
        except torch.OutOfMemoryError:
            if len(acting) == 1 and self.collective:
                raise  # the other ranks constrain this token, and would go on with another one
        # Behind the handler nothing of what was tried is in memory any more.
        if len(acting) == 1:
            # The token is sampled as if nothing constrained it, and the request comes back as an error.
            acting[0].logits.fail(_NO_MEMORY.format("its constraints"), acting[0].index)
            return [torch.ones(1, dtype=torch.bool, device=logits_BV.device)]
        half = len(acting) // 2
        return self._constrain(logits_BV, acting[:half]) + self._constrain(logits_BV, acting[half:])

    def _constrain_together(self, logits_BV: torch.Tensor, acting: Sequence[SamplingRow]) -> torch.Tensor:
        """Constrain some rows in place; return which of them have a token left, bool ``[len(acting)]``."""
        rows = [sampling.row for sampling in acting]
        rows_R = None if len(rows) == len(logits_BV) else on_device(rows, logits_BV.device)
        before_RV = logits_BV[:, : self.vocab_size] if rows_R is None else logits_BV[rows_R, : self.vocab_size]
        changed_RV, choosable_R = constrain(before_RV, [self._next_token(sampling) for sampling in acting])
        if rows_R is None:
            logits_BV[:, : self.vocab_size] = changed_RV
            logits_BV[:, self.vocab_size :] = float("-inf")
        else:
            logits_BV[rows_R, : self.vocab_size] = changed_RV
            if logits_BV.shape[1] > self.vocab_size:
                logits_BV[rows_R, self.vocab_size :] = float("-inf")
        return choosable_R

    def take_prompts(
        self, states_ND: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], *, collective: bool = False
    ) -> None:
        """Take the planned logits of prompt tokens, which SGLang itself does not compute.

        The rows of all requests go through the head together: the number of calls depends on the rows alone.

        Args:
            states_ND: the states that the head reads, one row for each position of the step.
            head: computes logits ``[N, ≥V]`` of states ``[N, D]``.
            collective: whether other ranks compute a part of the head's logits. Then all ranks must call it as often,
                whatever becomes of the logits on one of them.
        """
        if not self.prompts or states_ND.dim() != 2 or states_ND.shape[0] < self.num_rows:
            return  # nothing is wanted; or not one row for each position: the client's count finds it
        # A token's logits come from the position before it.
        rows = np.concatenate([np.arange(part.first, part.stop) + (part.offset - 1) for part in self.prompts])
        together = int(rows[-1]) - int(rows[0]) == len(rows) - 1
        rows_M = None if together else on_device(rows, states_ND.device)
        start = 0
        for pieces in split_parts(self.prompts, piece_rows(self.vocab_size)):
            stop = start + sum(piece.count for piece in pieces)
            try:
                if rows_M is None:
                    piece_ND = states_ND[int(rows[0]) + start : int(rows[0]) + stop]
                else:
                    piece_ND = states_ND[rows_M[start:stop]]
                logits_NV = head(piece_ND)
            except torch.OutOfMemoryError:
                if collective:
                    raise  # the other ranks wait in a call that this one did not make
                self._refuse_piece(pieces)
            else:
                self._take_piece(pieces, logits_NV)
            start = stop

    def _take_piece(self, pieces: tuple[PromptPiece, ...], logits_NV: torch.Tensor) -> None:
        if not any(piece.part.logits.kept for piece in pieces):
            self._prompt_logits.append(PromptLogits(pieces))
            return
        try:
            self._prompt_logits.append(prompt_logits_of(pieces, logits_NV[:, : self.vocab_size].float()))
        except torch.OutOfMemoryError:
            self._refuse_piece(pieces)

    def _refuse_piece(self, pieces: tuple[PromptPiece, ...]) -> None:
        for piece in pieces:
            piece.part.logits.refuse(_NO_MEMORY.format("the logits of its prompt"))
        # Counted as on the other ranks: all must give the prefix cache the same limits.
        self._prompt_logits.append(PromptLogits(pieces))

    @timed
    def taken(self) -> DeviceLogits:
        """Hand over what was taken, for SGLang to copy with its other results.

        Nothing of it stays: SGLang keeps this object for two more steps, which would keep the device's memory too.
        """
        taken = DeviceLogits(
            sampling_rows=self.sampling_rows,
            reqs=self.reqs,
            sampled=tuple(self._sampled),
            prompts=tuple(self._prompt_logits),
            constrained_rows=self._constrained_rows,
            choosable_R=self._choosable_R,
        )
        self._sampled, self._prompt_logits = [], []
        self._constrained_rows, self._choosable_R, self.input_ids = (), None, None
        return taken

    def _take(self, logits_BV: torch.Tensor, stage: Stage, temperatures_B1: torch.Tensor | None = None) -> None:
        # Few kernels however many requests there are: requests that want the same kind of columns are served together.
        groups: dict[object, list[SamplingRow]] = {}
        for sampling in self.sampling_rows:
            columns = sampling.logits.columns
            if columns is not None and columns.stage == stage and sampling.logits.wants_response_columns:
                groups.setdefault(columns.group, []).append(sampling)
        for group in groups.values():
            rows = tuple(sampling.row for sampling in group)
            asked = [sampling.logits.columns for sampling in group if sampling.logits.columns is not None]
            try:
                logits = select_rows(logits_BV, rows, asked, self.vocab_size, temperatures_B1)
            except torch.OutOfMemoryError:
                for sampling in group:
                    sampling.logits.refuse(_NO_MEMORY.format("the logits of its tokens"))
                continue
            self._sampled.append(SampledLogits(batch_rows=rows, logits=logits))

    def _take_entropies(self, logits_BV: torch.Tensor, temperatures_B1: torch.Tensor | None) -> None:
        group = [sampling for sampling in self.sampling_rows if sampling.logits.wants_entropy]
        if not group:
            return
        rows = tuple(sampling.row for sampling in group)
        try:
            entropy_R1 = entropy_rows(logits_BV, rows, self.vocab_size, temperatures_B1)
        except torch.OutOfMemoryError:
            for sampling in group:
                sampling.logits.refuse(_NO_MEMORY.format("the entropies of its tokens"))
            return
        self._sampled.append(SampledLogits(batch_rows=rows, logits=TokenLogits(entropy_R1, None), entropy=True))

    def _next_token(self, sampling: SamplingRow) -> NextToken:
        request = sampling.logits
        ids_of = partial(self._response_ids, sampling) if request.reads_response else None
        return NextToken(request, sampling.index, sampling.max_new_tokens, ids_of)

    def _response_ids(self, sampling: SamplingRow) -> torch.Tensor:
        row, ids = sampling.input_row, self.input_ids
        return sampling.logits.ids.of_response(
            sampling.index, sampling.ids_before, None if ids is None else ids[row : row + 1]
        )


def plan_logits(batch: Any, requests: Mapping[Any, RequestLogits], vocab_size: int) -> StepLogits | None:
    """Plan what the coming step does to logits, and takes of them; None where no request of the step asks for any.

    Args:
        batch: SGLang's, with the lengths of this step.
        requests: those that want logits or constrain them, by SGLang's own objects. Empty, the step costs nothing.
        vocab_size: V.
    """
    planned = plan_tokens(batch, requests, vocab_size) if requests else None
    if planned is None:
        return None
    sampling_rows, prompts, num_rows = planned
    return StepLogits(
        sampling_rows=sampling_rows,
        prompts=prompts,
        reqs=tuple(batch.reqs),
        vocab_size=vocab_size,
        num_rows=num_rows,
    )
