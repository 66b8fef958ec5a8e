"""One request under way: what it asked for, and what was pooled and kept of it so far.

Knows SGLang's requests as objects only, and imports nothing of SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch

from torchrl_sglang_hidden.protocol import Options
from torchrl_sglang_hidden.reduce.head_scores import RequestScores
from torchrl_sglang_hidden.reduce.pooling import Pools, RequestPools, WantedRows, rows_to_keep
from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.reduce.wanted import PromptStep
from torchrl_sglang_hidden.server.heads import ServedHead
from torchrl_sglang_hidden.server.prefix_sums import PrefixKeys
from torchrl_sglang_hidden.server.slots import DISCARDED, Slots
from torchrl_sglang_hidden.server.state_store import StatePages, StateStore
from torchrl_sglang_hidden.spec.hidden import reads_response
from torchrl_sglang_hidden.spec.spans import PromptSpan

__all__ = ["PromptSelection", "TrackedRequest"]

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class PromptSelection:
    """What one request wants of its prompt in one forward step.

    Args:
        row: the request's index in the batch.
        offset: added to a position of the request, gives its row in the step's states.
        step: what it wants.
        tracked: the request.
    """

    row: int
    offset: int
    step: PromptStep
    tracked: TrackedRequest


class TrackedRequest:
    """One request under way.

    Args:
        req: SGLang's request. Not kept alive.
        options: what it asked for.
        pools: counts what is pooled of it.
        logits: collects its logits.
        keys: the names of its tokens' beginnings.
        epoch: value of the cache-clear counter when the request started. If it has changed, this request's running
            values belong to old weights and must not be stored.
        slots: where running values of its kind are kept.
        prompt_digest: see `protocol.answer.digest_prompt`; None for a prompt without images.
        heads: the heads that score its tokens.

    Attributes:
        limit: most positions that it may take from the prefix cache; None for any number.
        base: the running value over that many first positions, where one is kept.
        spared: rows of the prompt that were not computed, since a running value over them was kept.
        closed: whether it was answered, or started over under other weights.
        refused: why no answer can be given; empty while one can.
        slot_index: where the running value over its response is; `DISCARDED` where none is wanted.
        keeps_produced: whether the rows that produce tokens are kept as they are, for token states or for spans.
        keeps_rows: whether any rows are kept so, those of the prompt included.
        scores: collects the heads' scores; None where it asked for none.
        row_dtype: in which dtype rows are kept; None for the model's.
    """

    def __init__(
        self,
        req: Any,
        options: Options,
        pools: RequestPools,
        logits: RequestLogits,
        keys: PrefixKeys,
        epoch: int,
        slots: Slots,
        prompt_digest: int | None = None,
        heads: Sequence[ServedHead] = (),
    ) -> None:
        wanted = options.wanted
        self.req = ref(req)
        self.options = options
        self.pools = pools
        self.logits = logits
        self.keys = keys
        self.epoch = epoch
        self.slots = slots
        self.prompt_digest = prompt_digest
        self.heads = tuple(heads)
        self.scores: RequestScores | None = None
        if options.scores is not None and heads:
            self.scores = RequestScores(options.scores, [head.version for head in heads], pools.num_prompt)
        self.limit: int | None = None
        self.base: tuple[int, torch.Tensor] | None = None
        self.spared = 0
        self.closed = False
        lost = options.scores is not None and not heads
        self.refused = (
            "a head was dropped before the request began; push it, and send the request again" if lost else ""
        )
        pools_response = wanted.pooling is not None and reads_response(wanted.segments)
        self._slot = slots.take() if pools_response else None
        self.slot_index = DISCARDED if self._slot is None else self._slot.index
        self._rows_to_keep = rows_to_keep(wanted)
        self.keeps_produced = self._rows_to_keep != 0
        self.keeps_rows = self.keeps_produced or wanted.prompt_rows
        # Which of the kept rows is the response's first: the prompt's last row.
        self._first_response_row = pools.num_prompt - 1 if wanted.prompt_rows else 0
        # Spans are pooled from the model's own numbers.
        self.row_dtype = wanted.row_dtype if all(isinstance(s, PromptSpan) for s in wanted.spans.values()) else None
        self._pages: StatePages | None = None
        self._store: StateStore | None = None

    @property
    def prefix_hit(self) -> dict[str, int]:
        """What the request was spared, as `ServerCounters` count it."""
        rows = self.spared
        return {"prefix_hits": 1, "prefix_rows": rows} if rows else {}

    @property
    def reads_prompt(self) -> bool:
        """Whether anything of the prompt is wanted, so that not all of it may come from the prefix cache."""
        scored = self.scores is not None and self.scores.wanted.reads_prompt
        return self.pools.reads_prompt or self.logits.wanted.prompt_from is not None or scored

    @property
    def first_needed(self) -> int | None:
        """The first position that must still be computed for logits or scores; None where there is none."""
        needed = (self.logits.first_needed, None if self.scores is None else self.scores.first_needed)
        return min((position for position in needed if position is not None), default=None)

    @property
    def has_big_answer(self) -> bool:
        """Whether making the answer may take long enough to hold up other requests."""
        wanted = self.options.wanted
        single = any(wanted.span_pooling(name) is None for name in wanted.spans)
        return self.keeps_rows or single or self.logits.wanted.spec is not None or self._pools_many_scores

    @property
    def _pools_many_scores(self) -> bool:
        """Whether scores are pooled that are as many as the prompt's tokens, or are found by the response's text."""
        scores = None if self.scores is None else self.scores.wanted
        return scores is not None and scores.pooled is not None and bool(scores.reads_prompt or scores.pooled.spans)

    def refuse(self, reason: str) -> None:
        """Give no answer but this reason, and no memory to rows that nobody will read."""
        self.refused = reason
        self.release_rows()

    def release_rows(self) -> None:
        """Give back the memory of the rows that were kept. The last step's plan may hold the request longer."""
        self._pages = None

    def restart(self) -> None:
        """Plan from what has arrived, after the request went back into the queue."""
        self.pools.restart()
        self.logits.restart()
        if self.scores is not None:
            self.scores.restart()

    def plan_prompt(self, row: int, offset: int, position: int, length: int) -> PromptSelection | None:
        """Plan what is wanted of a step that computes ``length`` positions of the request from ``position`` on.

        Args:
            row: the request's index in the batch.
            offset: added to a position, gives its row in the step's states.
            position: the first position that is computed.
            length: how many are.
        """
        if position >= self.pools.num_prompt:
            return None
        base_KD = self.base[1] if self.base is not None and self.base[0] == position else None
        if base_KD is not None and not self.pools.done:
            self.spared = position
        step = self.pools.plan_prompt(position, position + length, base_KD)
        return None if step is None else PromptSelection(row=row, offset=offset, step=step, tracked=self)

    # --- rows that are kept ------------------------------------------------------------------------------------------

    def prompt_places(self, step: PromptStep, store: StateStore) -> list[int]:
        """Return where the prompt rows of a step are kept.

        Raises:
            StateStoreFullError: there is no room for them.
        """
        assert step.rows is not None
        return self._pages_in(store).places(*step.rows)

    def produced_place(self, store: StateStore) -> int:
        """Return where the row that was counted last is kept.

        Raises:
            StateStoreFullError: there is no room for it.
        """
        return self._pages_in(store).place(self._first_response_row + self.pools.count - 1)

    def _pages_in(self, store: StateStore) -> StatePages:
        if self._pages is None:
            self._store = store
            self._pages = StatePages(store, None if self.options.wanted.prompt_rows else self._rows_to_keep)
        return self._pages

    def kept_rows(self) -> WantedRows | None:
        """Read what was kept, in the finisher's thread."""
        if self._pages is None or self._store is None:
            return None
        pools, first = self.pools, 0
        if self.options.wanted.prompt_rows:
            stop = pools.done
            if stop == pools.num_prompt and self.keeps_produced and pools.count:
                stop += pools.count - 1  # the prompt's last row produced token 0
        else:
            stop = pools.count
            first = 0 if self._rows_to_keep is None else max(stop - self._rows_to_keep, 0)
        if first >= stop:
            return None
        rows_NKD = self._store.read(self._pages.places(first, stop))
        return WantedRows(first + pools.num_prompt - 1 - self._first_response_row, rows_NKD)

    def finish(self, response_ids: Sequence[int], decode: Decode | None, response_KD: torch.Tensor | None) -> Pools:
        """Make the results."""
        return self.pools.finish(response_ids, decode, response_KD, self.kept_rows())
