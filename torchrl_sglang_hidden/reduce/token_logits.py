"""Constrains logits and keeps the columns that one request asked for: pure torch, without SGLang.

Knows nothing of batches, JSON or TensorDicts. A row of logits belongs to the token that is drawn from it, as a log-prob
does. Prompt rows are planned before a forward step runs (`RequestLogits.plan_prompt`). The selected columns are added
after the step (`add_response`, `add_prompt`), in order: a row that never came leaves the count short, and the client
finds it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from torchrl_sglang_hidden.records import DEFAULT_NEW_TOKENS, MAX_ANSWER_BYTES, TokenLogits
from torchrl_sglang_hidden.spec.constraints import ConstraintStep, LogitConstraint, TemperatureScale, TokenConstraint
from torchrl_sglang_hidden.spec.logits import LogitsSpec

__all__ = ["FoundLogits", "NextToken", "RequestLogits", "WantedLogits", "constrain", "on_device", "select_columns"]


Kind = TypeVar("Kind", bound=LogitConstraint)


@dataclass(frozen=True, slots=True)
class WantedLogits:
    """Says which logits one request wants, and the constraints that change them.

    Args:
        spec: the logits that come back; None for none.
        constraints: applied in this order.
        prompt_from: the first prompt token whose logits are needed, at least 1; None for no prompt token.
        scored: whether the log-probs of the prompt tokens from ``prompt_from`` on are wanted. The request then scores
            a sequence, and its constraints act on ``response_ranges``, not on sampled tokens.
        response_ranges: the responses inside a scored prompt, each ``(start, stop)``. Constraints act on their tokens
            as if they were being sampled.
        response_limit: ``max_new_tokens`` of the response; of a scored prompt, of each response in it.
    """

    spec: LogitsSpec | None = None
    constraints: tuple[LogitConstraint, ...] = ()
    prompt_from: int | None = None
    scored: bool = False
    response_ranges: tuple[tuple[int, int], ...] = ()
    response_limit: int = DEFAULT_NEW_TOKENS

    @property
    def constrains_sampled(self) -> bool:
        """Whether constraints act on sampled tokens; in a scored prompt they act on its responses instead."""
        return bool(self.constraints) and not self.scored

    @property
    def wants_sampled(self) -> bool:
        """Whether sampled tokens are constrained, or their logits come back."""
        return self.constrains_sampled or (self.spec is not None and self.spec.of_response)


@dataclass(frozen=True, slots=True)
class FoundLogits:
    """Holds the logits and log-probs that one finished request brought.

    Args:
        response: the logits of the sampled tokens, ``[T, C]``; or None.
        prompt: the logits of the prompt tokens from `WantedLogits.prompt_from` on, ``[N, C]``; or None.
        log_probs_N: the log-probs of the same prompt tokens, float32 ``[N]``; or None.
        constrained: the number of sampled tokens that passed through the constraints.
        fault: why the constraints could not be kept; empty where they were.
        refused: why no logits come back; empty where they do.
    """

    response: TokenLogits | None = None
    prompt: TokenLogits | None = None
    log_probs_N: torch.Tensor | None = None
    constrained: int = 0
    fault: str = ""
    refused: str = ""


@dataclass(frozen=True, slots=True)
class NextToken:
    """Describes one token whose logits are constrained: the one sampled next, or one of a scored prompt.

    Args:
        request: the logits of the token's request.
        index: the token's index in its response, from 0.
        max_new_tokens: most tokens of the response.
        response_ids: makes int64 ``[index]``, the response's ids before the token, on the logits' device.
        response_start: the response's start in a scored prompt; None for a response that follows the prompt.
    """

    request: RequestLogits
    index: int
    max_new_tokens: int
    response_ids: Callable[[], torch.Tensor] = field(repr=False)
    response_start: int | None = None


class RequestLogits:
    """Collects the logits of one request while the request runs.

    Args:
        wanted: what the request wants.
        prompt_ids: the P prompt ids. A request without constraints of the user's own needs only their number.

    Attributes:
        refused: why no logits come back; empty where they do.
    """

    def __init__(self, wanted: WantedLogits, prompt_ids: Sequence[int]) -> None:
        self.wanted = wanted
        self.prompt_ids = prompt_ids
        self.refused = ""
        self._faults: list[tuple[int | None, str]] = []
        # Sorted by `apply`, not by class: a user's subclass of a mask may change logits in its own way.
        self._own: list[LogitConstraint] = []
        self._temperatures: list[TemperatureScale] = []
        self._masks: list[TokenConstraint] = []
        for constraint in wanted.constraints:
            if isinstance(constraint, TemperatureScale) and type(constraint).apply is TemperatureScale.apply:
                self._temperatures.append(constraint)
            elif isinstance(constraint, TokenConstraint) and type(constraint).apply is TokenConstraint.apply:
                self._masks.append(constraint)
            else:
                self._own.append(constraint)
        self._bytes = 0
        self._combined: dict[tuple[int, ...], torch.Tensor] = {}
        self._constrained = 0
        self._response_rows: list[TokenLogits] = []
        self._prompt_rows: list[TokenLogits] = []
        self._log_probs: list[torch.Tensor] = []
        # The next prompt token whose logits are to be added. P, so none, where no prompt token is wanted.
        self._done = len(prompt_ids) if wanted.prompt_from is None else wanted.prompt_from
        self._planned = self._done

    @property
    def reads_response(self) -> bool:
        """Whether a constraint may read the response's earlier ids."""
        return bool(self._own)

    # --- the prompt --------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Drop what was planned and has not arrived: SGLang put the request back into its queue."""
        self._planned = self._done

    @property
    def first_needed(self) -> int | None:
        """The first position that must still be computed; None where all rows of the prompt have arrived."""
        return self._done - 1 if self._done < len(self.prompt_ids) else None

    def plan_prompt(self, start: int, stop: int) -> tuple[int, int] | None:
        """Plan a forward step that computes the positions ``start … stop-1`` of the request.

        Returns:
            The prompt tokens whose logits the step brings, as ``(first, stop)``. None where the step brings no wanted
            token, or skips the next one.
        """
        last = min(stop + 1, len(self.prompt_ids))
        if start > self._planned - 1 or last <= self._planned:
            return None
        first, self._planned = self._planned, last
        return first, last

    def response_range_at(self, token: int) -> tuple[int, int] | None:
        """Find the response, ``(start, stop)``, that holds a token of a scored prompt; None where none does."""
        return next(((start, stop) for start, stop in self.wanted.response_ranges if start <= token < stop), None)

    def add_prompt(self, first: int, rows: TokenLogits | None, log_probs_N: torch.Tensor | None, count: int) -> None:
        """Add the logits and log-probs of the prompt tokens ``first … first+count-1``.

        A part that does not start at the next token is left out, so that the client's count finds the gap.
        """
        if first != self._done:
            return
        self._keep(self._prompt_rows, rows)
        if log_probs_N is not None:
            self._log_probs.append(log_probs_N)
        self._done += count

    # --- the response ------------------------------------------------------------------------------------------------

    def add_response(self, index: int, row: TokenLogits | None) -> None:
        """Add the logits that response token ``index`` was sampled from, ``[1, C]``.

        A row that is not the next one is left out, so that the client's count finds the gap.
        """
        if index != self._constrained:
            return
        self._constrained += 1
        self._keep(self._response_rows, row)

    def _keep(self, rows: list[TokenLogits], row: TokenLogits | None) -> None:
        if row is None or self.refused:
            return
        self._bytes += row.nbytes
        if self._bytes > MAX_ANSWER_BYTES:
            # This package's clients ask for less. Any other client must not fill the server's memory.
            self.refused = (
                f"the logits are over {MAX_ANSWER_BYTES // 2**20} MiB for one request; ask for fewer tokens or columns"
            )
            self._response_rows, self._prompt_rows = [], []
            return
        rows.append(row)

    # --- constraints -------------------------------------------------------------------------------------------------

    def fail(self, fault: str, index: int | None) -> None:
        """Record that the constraints could not be kept.

        Args:
            fault: the reason.
            index: the response token at which it happened; None for a token of a scored prompt. Under overlap
                scheduling SGLang samples one token more than it returns. A fault at the discarded token does not count.
        """
        self._faults.append((index, fault))

    def apply_own(self, logits_V: torch.Tensor, token: NextToken) -> torch.Tensor:
        """Apply the constraints that the user wrote, whose code may do anything."""
        acting = self._acting(self._own, token)
        if not acting:
            return logits_V
        step = ConstraintStep(
            index=token.index,
            max_new_tokens=token.max_new_tokens,
            prompt_ids=self.prompt_ids[: token.response_start],
            response_ids=token.response_ids(),
        )
        for constraint in acting:
            with self._guarded(constraint, token):
                changed_V = constraint.apply(logits_V.clone(), step)
                if not isinstance(changed_V, torch.Tensor) or changed_V.shape != logits_V.shape:
                    raise TypeError(f"expected logits of shape {tuple(logits_V.shape)}, got {changed_V!r:.80}")
                logits_V = changed_V.to(logits_V)
        return logits_V

    def _acting(self, constraints: Sequence[Kind], token: NextToken) -> list[Kind]:
        """Select the constraints that act on a token. A user's `acts_on` may do anything too."""
        acting: list[Kind] = []
        for constraint in constraints:
            with self._guarded(constraint, token):
                if constraint.acts_on(token.index):
                    acting.append(constraint)
        return acting

    @contextmanager
    def _guarded(self, constraint: LogitConstraint, token: NextToken) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  an exception here would end the scheduler, and all requests with it
            fault = f"{constraint.name} failed at token {token.index} of the response: {error!r}"
            self.fail(fault, token.index if token.response_start is None else None)

    def temperature(self, token: NextToken) -> float:
        """Multiply the temperatures of all acting `TemperatureScale`s: the number that the logits are divided by."""
        product = 1.0
        for scale in self._acting(self._temperatures, token):
            with self._guarded(scale, token):
                product *= float(scale.at(token.index, token.max_new_tokens))
        return product

    def mask(self, token: NextToken, vocab_size: int, device: torch.device) -> torch.Tensor | None:
        """Combine the acting masks: bool ``[V]``, True where all of them allow a token; None where no mask acts."""
        acting = self._acting(self._masks, token)
        if not acting:
            return None
        key = tuple(map(id, acting))
        if key not in self._combined:
            allowed_V = torch.ones(vocab_size, dtype=torch.bool)
            for mask in acting:
                with self._guarded(mask, token):
                    allowed_V &= mask.allowed(vocab_size)
            self._combined[key] = allowed_V.to(device)
        return self._combined[key]

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> FoundLogits:
        """Return what was collected."""
        return FoundLogits(
            response=_joined(self._response_rows),
            prompt=_joined(self._prompt_rows),
            log_probs_N=torch.cat(self._log_probs) if self._log_probs else None,
            constrained=self._constrained,
            # A fault behind the last returned token belongs to one that was discarded.
            fault=next((fault for index, fault in self._faults if index is None or index < self._constrained), ""),
            refused=self.refused,
        )


def select_columns(logits_NV: torch.Tensor, spec: LogitsSpec) -> TokenLogits:
    """Copy the columns that ``spec`` asks for.

    Args:
        logits_NV: float ``[N, V]``.
        spec: the columns, and the dtype.

    Returns:
        ``[N, C]`` in the spec's dtype, for ``top_k`` with the columns' token ids.
    """
    match spec:
        case LogitsSpec(top_k=int(top_k)):
            values_NC, ids_NC = logits_NV.float().topk(top_k, dim=-1)
            return TokenLogits(values_NC=values_NC.to(spec.dtype), token_ids_NC=ids_NC)
        case LogitsSpec(token_ids=tuple(token_ids)):
            columns_C = _columns(token_ids, logits_NV.device)
            return TokenLogits(values_NC=logits_NV[:, columns_C].to(spec.dtype), token_ids_NC=None)
        case LogitsSpec(full=True):
            return TokenLogits(values_NC=logits_NV.to(spec.dtype, copy=True), token_ids_NC=None)
        case _:
            raise NotImplementedError(f"{spec}: no columns are selected for this; add a case to select_columns")


def constrain(logits_NV: torch.Tensor, tokens: Sequence[NextToken]) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply each request's constraints to the logits of N tokens.

    Args:
        logits_NV: float ``[N, V]``, not written to.
        tokens: the token of each row.

    Returns:
        The constrained logits ``[N, V]``, and bool ``[N]``: whether any token is left to choose. A row where none is
        left stays as it was, because sampling from all ``-inf`` would end the scheduler.
    """
    rows = list(logits_NV)
    own = [token.request.apply_own(row_V, token) for row_V, token in zip(rows, tokens, strict=True)]
    changed_NV = torch.stack(own) if any(a is not b for a, b in zip(own, rows, strict=True)) else logits_NV
    temperatures = [token.request.temperature(token) for token in tokens]
    if any(temperature != 1 for temperature in temperatures):
        changed_NV = changed_NV / on_device(temperatures, logits_NV.device).to(logits_NV.dtype)[:, None]
    masks = [token.request.mask(token, logits_NV.shape[1], logits_NV.device) for token in tokens]
    if any(mask_V is not None for mask_V in masks):
        every_V = torch.ones(logits_NV.shape[1], dtype=torch.bool, device=logits_NV.device)
        allowed_NV = torch.stack([every_V if mask_V is None else mask_V for mask_V in masks])
        changed_NV = changed_NV.masked_fill(~allowed_NV, -math.inf)
    choosable_N = changed_NV.amax(-1).isfinite()
    return torch.where(choosable_N[:, None], changed_NV, logits_NV), choosable_N


def on_device(values: Sequence[int] | Sequence[float], device: torch.device) -> torch.Tensor:
    """Make a tensor of a few numbers without waiting for the device's queued work."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@functools.lru_cache(maxsize=256)
def _columns(token_ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(token_ids, device=device)


def _joined(rows: Sequence[TokenLogits]) -> TokenLogits | None:
    if not rows:
        return None
    ids = [row.token_ids_NC for row in rows if row.token_ids_NC is not None]
    return TokenLogits(torch.cat([row.values_NC for row in rows]), torch.cat(ids) if ids else None)
