"""Keeps what one request asked of logits, and applies its constraints to one token: pure torch, without SGLang.

Knows nothing of batches, JSON or TensorDicts. A row of logits belongs to the token that is drawn from it, as a log-prob
does. Prompt rows are planned before a forward step runs (`RequestLogits.plan_prompt`). The selected columns are added
after the step (`add_response`, `add_prompt`), in order: a row that never came leaves the count short, and the client
finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from torchrl_sglang_hidden.records import MAX_ANSWER_BYTES, TokenLogits
from torchrl_sglang_hidden.reduce.columns import Columns, columns_of
from torchrl_sglang_hidden.reduce.ids_on_device import IdsOnDevice
from torchrl_sglang_hidden.reduce.masks_on_device import MaskKey, serial_of
from torchrl_sglang_hidden.reduce.one_constraint import always_acts, apply_checked, fixed_temperature
from torchrl_sglang_hidden.reduce.row_store import StoredRows, store_of
from torchrl_sglang_hidden.reduce.wanted_logits import FoundLogits, WantedLogits
from torchrl_sglang_hidden.spec.constraints import ConstraintStep, LogitConstraint, TemperatureScale, TokenConstraint

__all__ = ["NextToken", "RequestLogits", "keep_rows"]

Kind = TypeVar("Kind", bound=LogitConstraint)


@dataclass(slots=True)
class NextToken:
    """Describes one token whose logits are constrained: the one sampled next, or one of a scored prompt.

    Args:
        request: the logits of the token's request.
        index: the token's index in its response, from 0.
        max_new_tokens: most tokens of the response.
        response_ids: makes int64 ``[index]``, the response's ids before the token, on the logits' device. None where
            the request has no constraints of the user's own, which alone read them.
        response_start: the response's start in a scored prompt; None for a response that follows the prompt.
    """

    request: RequestLogits
    index: int
    max_new_tokens: int
    response_ids: Callable[[], torch.Tensor] | None
    response_start: int | None = None


class RequestLogits:
    """Collects the logits of one request while the request runs.

    Args:
        wanted: what the request wants.
        prompt_ids: the P prompt ids. A request without constraints of the user's own needs only their number.
        image_rows: the prompt's positions where a row of an image stands and no token. The log-prob is NaN there, and
            nothing is constrained.
        kept: whether logits are kept here. Where not, tokens are constrained and counted all the same.

    Attributes:
        refused: why no logits come back; empty where they do.
    """

    def __init__(
        self,
        wanted: WantedLogits,
        prompt_ids: Sequence[int],
        *,
        image_rows: frozenset[int] = frozenset(),
        kept: bool = True,
    ) -> None:
        self.wanted = wanted
        self.prompt_ids = prompt_ids
        self.image_rows = image_rows
        self.kept = kept
        self.refused = ""
        # What every step asks of every request: read once.
        self.constrains_sampled = wanted.constrains_sampled
        self.columns: Columns | None = None if wanted.spec is None else columns_of(wanted.spec)
        self.wants_prompt_columns = wanted.spec is not None and wanted.spec.of_prompt
        self.wants_response_columns = kept and wanted.spec is not None and wanted.spec.of_response
        self.wants_entropy = kept and wanted.entropy
        self.wants_sampled = self.constrains_sampled or self.wants_response_columns or self.wants_entropy
        self._fits_vocab: dict[int, bool] = {}
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
        self._serials = {id(mask): serial_of(mask) for mask in self._masks}
        # For most requests the same masks and the same temperature act on every token.
        self._fixed_key = self._mask_key(self._masks) if all(map(always_acts, self._masks)) else None
        self._fixed_temperature = fixed_temperature(self._temperatures)
        self._bytes = 0
        self.ids = IdsOnDevice()
        self._allowed: dict[MaskKey, tuple[torch.Tensor, bool]] = {}
        self._prompt_before: tuple[int | None, tuple[int, ...]] | None = None
        self._constrained = 0
        self._response: StoredRows | None = None
        self._entropy: StoredRows | None = None
        self._prompt_rows: list[TokenLogits] = []
        self._log_probs: list[torch.Tensor] = []
        # The next prompt token whose logits are to be added. P, so none, where no prompt token is wanted.
        self._done = len(prompt_ids) if wanted.prompt_from is None else wanted.prompt_from
        self._planned = self._done

    @property
    def reads_response(self) -> bool:
        """Whether a constraint may read the response's earlier ids."""
        return bool(self._own)

    def fits(self, vocab_size: int) -> bool:
        """Return whether a model of V tokens has the columns that are asked for."""
        if vocab_size not in self._fits_vocab:
            spec = self.wanted.spec
            self._fits_vocab[vocab_size] = spec is None or spec.fits(vocab_size)
        return self._fits_vocab[vocab_size]

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

    def add_prompt(self, first: int, rows: TokenLogits | None, log_probs_N: torch.Tensor | None, count: int) -> None:
        """Add the logits and log-probs of the prompt tokens ``first … first+count-1``.

        A part that does not start at the next token is left out, so that the client's count finds the gap.
        """
        if first != self._done:
            return
        if rows is not None and self._fits(rows.nbytes):
            self._prompt_rows.append(rows)
        if log_probs_N is not None:
            self._log_probs.append(log_probs_N)
        self._done += count

    # --- the response ------------------------------------------------------------------------------------------------

    def accept(self, index: int) -> bool:
        """Count response token ``index``; False where it is not the next one, so that the client's count finds it."""
        if index != self._constrained:
            return False
        self._constrained += 1
        return True

    def add_response(self, index: int, row: TokenLogits | None) -> None:
        """Add the logits that response token ``index`` was sampled from, ``[1, C]``.

        A row that is not the next one is left out, so that the client's count finds the gap.
        """
        if self.accept(index) and row is not None:
            keep_rows(row, [0], [self])

    def _fits(self, num_bytes: int) -> bool:
        """Count the bytes of rows to keep; drop all where there are too many."""
        if self.refused:
            return False
        self._bytes += num_bytes
        if self._bytes > MAX_ANSWER_BYTES:
            # This package's clients ask for less. Any other client must not fill the server's memory.
            self.refuse(
                f"the logits are over {MAX_ANSWER_BYTES // 2**20} MiB for one request; ask for fewer tokens or columns"
            )
        return not self.refused

    def refuse(self, reason: str) -> None:
        """Give no logits back, for a reason that the client tells; the first reason stays."""
        self.refused = self.refused or reason
        self._response, self._entropy, self._prompt_rows = None, None, []

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
        assert token.response_ids is not None
        step = ConstraintStep(
            index=token.index,
            max_new_tokens=token.max_new_tokens,
            prompt_ids=self._ids_before(token.response_start),
            response_ids=token.response_ids(),
        )
        for constraint in acting:
            with self._guarded(constraint, token):
                logits_V = apply_checked(constraint, logits_V, step)
        return logits_V

    def _ids_before(self, response_start: int | None) -> tuple[int, ...]:
        # Not once for each token: a scored prompt would be copied as often as it has tokens.
        if self._prompt_before is None or self._prompt_before[0] != response_start:
            self._prompt_before = response_start, tuple(self.prompt_ids[:response_start])
        return self._prompt_before[1]

    def _acting(self, constraints: Sequence[Kind], token: NextToken) -> list[Kind]:
        """Select the constraints that act on a token. A user's `acts_on` may do anything too."""
        acting: list[Kind] = []
        for constraint in constraints:
            if type(constraint).acts_on is LogitConstraint.acts_on:  # cannot fail; a guard costs as much as all else
                if constraint.acts_on(token.index):
                    acting.append(constraint)
                continue
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
        if self._fixed_temperature is not None:
            return self._fixed_temperature
        product = 1.0
        for scale in self._acting(self._temperatures, token):
            if type(scale).at is TemperatureScale.at:
                product *= scale.at(token.index, token.max_new_tokens)
                continue
            with self._guarded(scale, token):
                product *= float(scale.at(token.index, token.max_new_tokens))
        return product

    def mask_key(self, token: NextToken) -> MaskKey:
        """Name the masks that act on a token; empty where none act."""
        return self._mask_key(self._acting(self._masks, token)) if self._fixed_key is None else self._fixed_key

    def _mask_key(self, masks: Sequence[TokenConstraint]) -> MaskKey:
        return tuple(self._serials[id(mask)] for mask in masks)

    def mask_of(self, token: NextToken, key: MaskKey, vocab_size: int) -> Callable[[], tuple[torch.Tensor, bool]]:
        """Return what makes bool ``[V]``, True where all masks of a key allow a token, and says whether none failed."""
        return partial(self._combine, token, key, vocab_size)

    def _combine(self, token: NextToken, key: MaskKey, vocab_size: int) -> tuple[torch.Tensor, bool]:
        if key not in self._allowed:
            allowed_V, num_faults = torch.ones(vocab_size, dtype=torch.bool), len(self._faults)
            for mask in self._masks:
                if self._serials[id(mask)] in key:
                    with self._guarded(mask, token):
                        allowed_V &= mask.allowed(vocab_size)
            found = allowed_V, len(self._faults) == num_faults
            if found[1]:
                return found
            # Only what failed is kept here, so that it is asked once.
            self._allowed[key] = found
        return self._allowed[key]

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> FoundLogits:
        """Return what was collected."""
        return FoundLogits(
            response=self._joined_response(),
            prompt=_joined(self._prompt_rows),
            log_probs_N=torch.cat(self._log_probs) if self._log_probs else None,
            constrained=self._constrained,
            # A fault behind the last returned token belongs to one that was discarded.
            fault=next((fault for index, fault in self._faults if index is None or index < self._constrained), ""),
            refused=self.refused,
            entropy_T=None if self._entropy is None else self._entropy.join()[0][:, 0],
        )

    def _joined_response(self) -> TokenLogits | None:
        if self._response is None:
            return None
        values_NC, *ids = self._response.join()
        return TokenLogits(values_NC=values_NC, token_ids_NC=ids[0] if ids else None)


def keep_rows(
    block: TokenLogits, picks: Sequence[int], requests: Sequence[RequestLogits], *, name: str = "_response"
) -> None:
    """Add a row of a step's logits, or entropies as ``name`` says, to each of some requests: one copy for all.

    Args:
        block: ``[R, C]``.
        picks: each request's row, in increasing order.
        name: the attribute that keeps them.
        requests: what the rows are added to, after `RequestLogits.accept` said that they are next.
    """
    row_bytes = block.nbytes // max(len(block.values_NC), 1)
    kept = [(pick, request) for pick, request in zip(picks, requests, strict=True) if request._fits(row_bytes)]
    if not kept:
        return
    tensors = [tensor for tensor in (block.values_NC, block.token_ids_NC) if tensor is not None]
    store = store_of(tensors)
    owners = []
    for _, request in kept:
        if getattr(request, name) is None:
            setattr(request, name, StoredRows(store))
        owners.append(getattr(request, name))
    store.append(tensors, [pick for pick, _ in kept], owners)


def _joined(rows: Sequence[TokenLogits]) -> TokenLogits | None:
    if not rows:
        return None
    ids = [row.token_ids_NC for row in rows if row.token_ids_NC is not None]
    return TokenLogits(torch.cat([row.values_NC for row in rows]), torch.cat(ids) if ids else None)
