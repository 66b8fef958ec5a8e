"""Constrains the next tokens of a forward step, and takes the logits that they are sampled from.

Knows SGLang's batches, samplers and auxiliary outputs by attribute name, and imports nothing of SGLang. Runs inside the
scheduler, where an exception ends the server.

The order within one step: before the forward pass, `Capture.plan_logits` notes which response token each request
samples. While the head computes, `StepLogits.take_prompts` takes logits of prompt tokens. `StepLogits.take_raw` runs
before SGLang changes the logits for sampling, and `StepLogits.constrain` after. SGLang copies the selected columns to
the host with its other results, and `HostLogits.consume` adds them to their requests once the tokens are committed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchrl_sglang_hidden.records import TokenLogits
from torchrl_sglang_hidden.reduce.token_logits import NextToken, RequestLogits, constrain, on_device, select_columns
from torchrl_sglang_hidden.spec.logits import LogitsSpec, Stage

__all__ = ["DeviceLogits", "HostLogits", "PromptPart", "SamplingRow", "StepLogits"]

# Prompt rows whose logits exist at the same time: with 150 000 tokens, 77 MB in float32.
PIECE = 128


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """Describes a batch row that samples a token in this step, for a request that constrains it or wants its logits.

    Args:
        row: the request's index in the batch, and in the step's logits.
        input_row: the row of the step's inputs that the token is computed from.
        index: the token's index in its response.
        logits: collects the request's logits.
        max_new_tokens: most tokens of the response.
        ids_before: the response's earlier ids that the host has; under overlap scheduling the last one may be missing.
    """

    row: int
    input_row: int
    index: int
    logits: RequestLogits
    max_new_tokens: int
    ids_before: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Describes the prompt tokens ``first … stop-1``, whose logits this step computes for one request.

    Args:
        row: the request's index in the batch.
        offset: added to a position of the request, gives its row in the step's states.
        first: the first prompt token.
        stop: one past the last prompt token.
        logits: collects the request's logits.
    """

    row: int
    offset: int
    first: int
    stop: int
    logits: RequestLogits


@dataclass(frozen=True, slots=True)
class SampledLogits:
    """Holds the same columns of several batch rows.

    Args:
        batch_rows: the R rows' indices in the batch.
        logits: one row for each of them, ``[R, C]``.
    """

    batch_rows: tuple[int, ...]
    logits: TokenLogits


@dataclass(frozen=True, slots=True)
class PromptLogits:
    """Holds what the step brought for ``count`` prompt tokens of one request.

    Args:
        part: what was planned. A long part is computed in several pieces, and this is one of them.
        first: the first prompt token of the piece.
        count: N, the piece's tokens.
        logits: ``[N, C]``; None where the request wants no logits of its prompt.
        log_probs_N: float32 ``[N]``; None where the request is not scored.
        choosable_N: bool ``[N]``, whether the constraints leave any token; None where none act.
    """

    part: PromptPart
    first: int
    count: int
    logits: TokenLogits | None
    log_probs_N: torch.Tensor | None
    choosable_N: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class HostLogits:
    """Holds one step's logits on the host, SGLang's ``HostAuxiliaryOutput``.

    Args:
        step: the step.
        sampled: the logits of sampled tokens.
        prompts: the logits of prompt tokens.
        choosable: by batch row, whether the constraints left any token to sample: a bool tensor without axes.
    """

    step: StepLogits
    sampled: tuple[SampledLogits, ...]
    prompts: tuple[PromptLogits, ...]
    choosable: Mapping[int, torch.Tensor]

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Add the logits to their requests. ``commits[i]`` is None when batch row i committed no token."""
        for piece in self.prompts:
            request = piece.part.logits
            if piece.choosable_N is not None and not piece.choosable_N.all():
                token = piece.first + int((~piece.choosable_N).nonzero()[0])
                request.fail(_nothing_left(f"token {token} of the sequence", request), None)
            request.add_prompt(piece.first, piece.logits, piece.log_probs_N, piece.count)
        found = {row: (group.logits, n) for group in self.sampled for n, row in enumerate(group.batch_rows)}
        for sampling in self.step.sampling_rows:
            row, request = sampling.row, sampling.logits
            if row >= len(batch.reqs) or batch.reqs[row] is not self.step.reqs[row] or commits[row] is None:
                continue
            if row not in self.choosable and request.wanted.constrains_sampled:
                continue  # the sampler did not pass through the hooks: the client's count finds it
            if not self.choosable.get(row, True):
                request.fail(_nothing_left(f"token {sampling.index} of the response", request), sampling.index)
            if commits[row].output_index == sampling.index:
                request.add_response(sampling.index, _row_of(*found[row]) if row in found else None)


@dataclass(frozen=True, slots=True)
class DeviceLogits:
    """Holds one step's logits on the device, SGLang's ``DeviceAuxiliaryOutput``.

    Args:
        step: the step.
        sampled: the logits of sampled tokens.
        prompts: the logits of prompt tokens.
        constrained_rows: the R batch rows that constraints acted on.
        choosable_R: bool ``[R]``, whether the constraints left any token to sample; None where none acted.
    """

    step: StepLogits
    sampled: tuple[SampledLogits, ...]
    prompts: tuple[PromptLogits, ...]
    constrained_rows: tuple[int, ...]
    choosable_R: torch.Tensor | None

    def copy_to_host(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> HostLogits:
        """Start the step's copies to the host."""

        def copy_if_any(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else copy(tensor)

        def copy_logits(logits: TokenLogits) -> TokenLogits:
            return TokenLogits(values_NC=copy(logits.values_NC), token_ids_NC=copy_if_any(logits.token_ids_NC))

        return HostLogits(
            step=self.step,
            sampled=tuple(
                SampledLogits(batch_rows=group.batch_rows, logits=copy_logits(group.logits)) for group in self.sampled
            ),
            prompts=tuple(
                PromptLogits(
                    part=piece.part,
                    first=piece.first,
                    count=piece.count,
                    logits=None if piece.logits is None else copy_logits(piece.logits),
                    log_probs_N=copy_if_any(piece.log_probs_N),
                    choosable_N=copy_if_any(piece.choosable_N),
                )
                for piece in self.prompts
            ),
            choosable=(
                {}
                if self.choosable_R is None
                else dict(zip(self.constrained_rows, copy(self.choosable_R), strict=True))
            ),
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
        input_ids: the step's input ids. For a decoding request that is the id sampled last, which the device has even
            where the host does not have it yet.
    """

    sampling_rows: tuple[SamplingRow, ...]
    prompts: tuple[PromptPart, ...]
    reqs: tuple[Any, ...]
    vocab_size: int
    num_rows: int
    input_ids: torch.Tensor | None = None
    _sampled: list[SampledLogits] = field(default_factory=list)
    _prompt_logits: list[PromptLogits] = field(default_factory=list)
    _constrained_rows: tuple[int, ...] = ()
    _choosable_R: torch.Tensor | None = None

    def take_raw(self, logits_BV: torch.Tensor) -> None:
        """Take the logits as the head gave them, before SGLang changes them for sampling."""
        self._take(logits_BV, "raw")

    def constrain(self, logits_BV: torch.Tensor, temperatures_B1: torch.Tensor | None) -> None:
        """Apply the constraints in place, after all that SGLang does to the logits but before its temperature.

        Rows of requests without constraints are not written to.

        Args:
            logits_BV: the step's logits, ``[B, ≥V]``.
            temperatures_B1: SGLang divides the logits by these next; None where it does not divide.
        """
        acting = [sampling for sampling in self.sampling_rows if sampling.logits.wanted.constrains_sampled]
        if acting:
            rows_R = on_device([sampling.row for sampling in acting], logits_BV.device)
            tokens = [self._next_token(sampling) for sampling in acting]
            changed_RV, choosable_R = constrain(logits_BV[rows_R, : self.vocab_size], tokens)
            logits_BV[rows_R, : self.vocab_size] = changed_RV
            if logits_BV.shape[1] > self.vocab_size:
                logits_BV[rows_R, self.vocab_size :] = float("-inf")
            self._constrained_rows, self._choosable_R = tuple(sampling.row for sampling in acting), choosable_R
        if any(sampling.logits.wanted.spec is not None for sampling in self.sampling_rows):
            self._take(logits_BV, "processed", temperatures_B1)

    def take_prompts(self, states_ND: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take the planned logits of prompt tokens, which SGLang itself does not compute.

        Args:
            states_ND: the states that the head reads, one row for each position of the step.
            head: computes logits ``[N, ≥V]`` of states ``[N, D]``.
        """
        if states_ND.dim() != 2 or states_ND.shape[0] < self.num_rows:
            return  # not one row for each position: the client's count finds it
        for part in self.prompts:
            for first in range(part.first, part.stop, PIECE):
                stop = min(first + PIECE, part.stop)
                # A token's logits come from the position before it.
                rows = slice(first - 1 + part.offset, stop - 1 + part.offset)
                logits_NV = head(states_ND[rows])[:, : self.vocab_size].float()
                self._prompt_logits.append(_prompt_logits(part, first, logits_NV))

    def taken(self) -> DeviceLogits:
        """Return what was taken, for SGLang to copy with its other results."""
        return DeviceLogits(
            step=self,
            sampled=tuple(self._sampled),
            prompts=tuple(self._prompt_logits),
            constrained_rows=self._constrained_rows,
            choosable_R=self._choosable_R,
        )

    def _take(self, logits_BV: torch.Tensor, stage: Stage, temperatures_B1: torch.Tensor | None = None) -> None:
        # Few kernels however many requests there are: requests that want the same columns are served together.
        groups: dict[LogitsSpec, list[int]] = {}
        for sampling in self.sampling_rows:
            spec = sampling.logits.wanted.spec
            if spec is not None and spec.of_response and spec.stage == stage:
                groups.setdefault(spec, []).append(sampling.row)
        for spec, batch_rows in groups.items():
            rows_R = on_device(batch_rows, logits_BV.device)
            logits_RV = logits_BV[rows_R, : self.vocab_size].float()
            if temperatures_B1 is not None:
                logits_RV = logits_RV / temperatures_B1[rows_R]
            self._sampled.append(SampledLogits(batch_rows=tuple(batch_rows), logits=select_columns(logits_RV, spec)))

    def _next_token(self, sampling: SamplingRow) -> NextToken:
        def response_ids() -> torch.Tensor:
            device = None if self.input_ids is None else self.input_ids.device
            known = torch.tensor(sampling.ids_before[: sampling.index], dtype=torch.int64, device=device)
            if self.input_ids is None or len(known) == sampling.index:
                return known
            # Under overlap scheduling the host does not have the last id yet, and the device does.
            return torch.cat([known, self.input_ids[sampling.input_row : sampling.input_row + 1].long()])

        return NextToken(
            request=sampling.logits,
            index=sampling.index,
            max_new_tokens=sampling.max_new_tokens,
            response_ids=response_ids,
        )


def _prompt_logits(part: PromptPart, first: int, logits_NV: torch.Tensor) -> PromptLogits:
    """Constrain and select the logits of the prompt tokens ``first … first+N-1``."""
    wanted, ids = part.logits.wanted, part.logits.prompt_ids
    raw_NV = logits_NV
    choosable_N = None
    if wanted.constraints:
        logits_NV, choosable_N = _constrain_responses(part.logits, first, logits_NV)
    log_probs_N = None
    if wanted.scored:
        tokens_N1 = on_device(ids[first : first + len(logits_NV)], logits_NV.device)[:, None]
        log_probs_N = logits_NV.log_softmax(-1).gather(1, tokens_N1)[:, 0]
    logits = None
    if wanted.spec is not None and wanted.spec.of_prompt:
        by_stage: dict[Stage, torch.Tensor] = {"raw": raw_NV, "processed": logits_NV}
        logits = select_columns(by_stage[wanted.spec.stage], wanted.spec)
    return PromptLogits(
        part=part,
        first=first,
        count=len(logits_NV),
        logits=logits,
        log_probs_N=log_probs_N,
        choosable_N=choosable_N,
    )


def _constrain_responses(
    request: RequestLogits, first: int, logits_NV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Constrain the tokens of a scored prompt that are inside one of its responses; leave the others as they are.

    Returns:
        The logits, and bool ``[N]``, whether any token is left to choose; None where no token is inside a response.
    """
    ids, tokens, inside = request.prompt_ids, [], []
    for n in range(len(logits_NV)):
        response = request.response_range_at(first + n)
        if response is None:
            continue
        inside.append(n)
        tokens.append(
            NextToken(
                request=request,
                index=first + n - response[0],
                max_new_tokens=request.wanted.response_limit,
                response_ids=_ids_between(ids, response[0], first + n, logits_NV.device),
                response_start=response[0],
            )
        )
    if not inside:
        return logits_NV, None
    rows_R = on_device(inside, logits_NV.device)
    changed_RV, choosable_R = constrain(logits_NV[rows_R], tokens)
    all_true_N = torch.ones(len(logits_NV), dtype=torch.bool, device=logits_NV.device)
    return logits_NV.index_copy(0, rows_R, changed_RV), all_true_N.index_copy(0, rows_R, choosable_R)


def _ids_between(ids: Sequence[int], start: int, stop: int, device: torch.device) -> Callable[[], torch.Tensor]:
    return lambda: torch.tensor(ids[start:stop], dtype=torch.int64, device=device)


def _row_of(logits: TokenLogits, n: int) -> TokenLogits:
    """Copy row ``n``: a view would keep the whole step's buffer alive."""
    ids = logits.token_ids_NC
    row = slice(n, n + 1)
    return TokenLogits(values_NC=logits.values_NC[row].clone(), token_ids_NC=None if ids is None else ids[row].clone())


def _nothing_left(what: str, request: RequestLogits) -> str:
    names = ", ".join(dict.fromkeys(constraint.name for constraint in request.wanted.constraints))
    return (
        f"{what}: 0 tokens are left to choose from by the constraints ({names}; one that gives NaN or infinity leaves "
        "nothing) together with what SGLang applies before them (a "
        "grammar, min_new_tokens, logit_bias, a processor); loosen one of them"
    )
