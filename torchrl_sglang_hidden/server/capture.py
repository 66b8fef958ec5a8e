"""Track the requests that a scheduler works on: what each asked for, its pools, and its answer.

Knows SGLang's batches and auxiliary outputs by attribute name, and imports nothing of SGLang. Runs inside the
scheduler, where an exception ends the server: what does not fit is left out, and the client's count finds it.

The order within one step: `Capture.plan_step` notes which rows are wanted, on the host, before the forward pass;
`StepPlan.gather` takes them on the device, after it; SGLang copies what is wanted on the host with its other results;
`HostRows.consume` counts the rows once the tokens are committed, and folds them into their requests' slots on the
device. `Capture.answers` brings the slots home when requests finish.

Each rank of a tensor-parallel server has a `Capture`. All count alike, because all must give the prefix cache the same
limits; only the rank that answers holds states and logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from torchrl_sglang_hidden.counters import timed
from torchrl_sglang_hidden.protocol import Options, digest_prompt, unpack_options
from torchrl_sglang_hidden.protocol.shared_memory import SharedFiles
from torchrl_sglang_hidden.reduce.bags import separate
from torchrl_sglang_hidden.reduce.pooling import NO_VALUE, RequestPools
from torchrl_sglang_hidden.reduce.reducers import Reducer, reducer_of
from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.server.answers import Unfinished, decoder_of
from torchrl_sglang_hidden.server.finisher import Finisher
from torchrl_sglang_hidden.server.forward_modes import DECODE_MODE, PREFILL_MODES
from torchrl_sglang_hidden.server.head_steps import ScoredPlan, with_scores
from torchrl_sglang_hidden.server.heads import ServedHeads
from torchrl_sglang_hidden.server.images import tokens_of_prompt
from torchrl_sglang_hidden.server.layer_taps import LayerTaps
from torchrl_sglang_hidden.server.next_tokens import StepLogits
from torchrl_sglang_hidden.server.prefix_sums import PrefixKeys, PrefixSums, TokensOf
from torchrl_sglang_hidden.server.side_stream import Landing
from torchrl_sglang_hidden.server.slots import DISCARDED, Slots
from torchrl_sglang_hidden.server.state_store import StateBudget, StateStore
from torchrl_sglang_hidden.server.step_rows import OUT_OF_MEMORY, LayerGroup, StepPlan
from torchrl_sglang_hidden.server.tracked_request import TrackedRequest

__all__ = ["Capture"]


class Capture:
    """The pools of the requests that a scheduler is working on.

    Attributes:
        opened: by request, weakly: what SGLang forgets (finished, aborted) is forgotten here.
        on: whether this SGLang can carry the rows at all.
        normed: whether the model hands over its states after the final norm. SGLang prefers those before it where a
            model gives both.
        taps: the hooks on other layers than the last.
        sums: running values kept for prompts that begin alike: sums, or maxima.
        page_size: SGLang's prefix cache matches multiples of it.
        logits: by request, weakly, what a request that asks for logits or constrains them collects.
        heads: what clients pushed.
        scored: by request, weakly, those that heads score.
        running: what is chosen in the step that the model computes now.
        sends: whether this rank answers. One that does not holds no states and no logits.
        ranks: how many ranks compute each layer together, and must give the prefix cache the same limits.
        hidden_size: D, once a step was seen.
    """

    def __init__(self) -> None:
        self.on = True
        self.normed = True
        self.taps = LayerTaps()
        self.sums = PrefixSums()
        self.page_size = 1
        self.running: StepLogits | None = None
        self.sends = True
        self.ranks = 1
        self.hidden_size = 0
        self.opened: WeakKeyDictionary[Any, TrackedRequest] = WeakKeyDictionary()
        self.logits: WeakKeyDictionary[Any, RequestLogits] = WeakKeyDictionary()
        self.scored: WeakKeyDictionary[Any, TrackedRequest] = WeakKeyDictionary()
        self.heads = ServedHeads(self.takes)
        self._refused: WeakSet[Any] = WeakSet()
        self._epoch = 0
        self._shared: SharedFiles | None = None
        self._slots: dict[tuple[tuple[int, ...], str], Slots] = {}
        self._stores: dict[tuple[int, int, torch.dtype], StateStore] = {}
        self._state_budget: StateBudget | None = None
        self._finisher = Finisher()
        # The last decode step's plan: it holds for the next one of the same requests. The ids are those of the objects.
        self._last_plan: tuple[list[int], StepPlan | ScoredPlan | None] | None = None
        # Running values over prompt and response that are on their way to the host, with the response's rows.
        self._landing: list[tuple[Landing | None, list[tuple[TrackedRequest, int]]]] = []

    @property
    def shared(self) -> SharedFiles:
        """The shared files, made when first used: every process of SGLang loads this, and one needs them."""
        if self._shared is None:
            self._shared = SharedFiles()
        return self._shared

    def open(self, req: Any) -> TrackedRequest | None:
        """Return the tracked request, made when it is first seen; None when it did not ask."""
        tracked = self.opened.get(req)
        if tracked is None and req not in self._refused:
            options = unpack_options(req.sampling_params.custom_params) if self.on else None
            if options is None or req.finished() or not self.takes(options.wanted.layers):
                # Reading them again at every step would hold up everybody.
                self._refused.add(req)
                return None
            tracked = self.opened[req] = self._track(req, options)
            if tracked.logits.wanted.wants_any:
                self.logits[req] = tracked.logits
            if tracked.scores is not None:
                self.scored[req] = tracked
            self._last_plan = None
        return tracked

    def _track(self, req: Any, options: Options) -> TrackedRequest:
        reducer = options.wanted.reducer
        # Running values of another reducer, of other layers or under another adapter are not this request's.
        kind = f"{reducer.running} {options.wanted.layers} {req.extra_key or ''}"
        prompt_ids, image_rows = tokens_of_prompt(req)
        return TrackedRequest(
            req=req,
            options=options,
            pools=RequestPools(options.wanted, len(prompt_ids)),
            logits=RequestLogits(options.logits, prompt_ids, image_rows=image_rows, kept=self.sends),
            keys=PrefixKeys(kind, TokensOf(req)),
            epoch=self._epoch,
            slots=self.slots_of(options.wanted.layers, reducer),
            prompt_digest=digest_prompt(prompt_ids, image_rows) if req.multimodal_inputs is not None else None,
            heads=self.heads.of(options.scores),
        )

    def give_up(self, requests: Sequence[Any], reason: str) -> None:
        """Answer some requests with a reason alone: what is counted of them can no longer be relied on.

        Args:
            requests: SGLang's own, those among them that asked for nothing too.
            reason: what happened.
        """
        self._last_plan = None
        for req in requests:
            tracked = self.opened.get(req)
            if tracked is not None:
                tracked.refuse(reason)
                tracked.logits.refuse(reason)

    def slots_of(self, layers: tuple[int, ...], reducer: Reducer) -> Slots:
        """Return the slots of requests that want these layers pooled in this way."""
        key = (layers, reducer.running)
        if key not in self._slots:
            # Whoever tries one set of layers after another must not fill the device with matrices that nobody uses.
            self._slots = {key: slots for key, slots in self._slots.items() if not slots.is_idle}
            self._slots[key] = Slots(layers, reducer)
        return self._slots[key]

    def reserve(self, hidden_size: int, device: torch.device, num_requests: int) -> None:
        """Make room for the running values of that many requests for the last layer, what most of them ask for.

        Args:
            hidden_size: D.
            device: of the model.
            num_requests: how many are pooled at the same time.
        """
        self.slots_of((-1,), reducer_of("mean")).reserve(hidden_size, device, num_requests)

    def open_again(self, req: Any) -> TrackedRequest | None:
        """Do as `open` does for a request that starts over, without what it pooled under weights that are gone."""
        tracked = self.opened.get(req)
        # With tokens of the old weights the answer says so by itself; a prompt between two chunks has none that would.
        if tracked is not None and tracked.epoch != self._epoch and not req.output_ids:
            tracked.closed = True
            self._last_plan = None
            del self.opened[req]
            self._forget(req)
        return self.open(req)

    def _forget(self, req: Any) -> None:
        self.logits.pop(req, None)
        self.scored.pop(req, None)

    def takes(self, layers: Sequence[int]) -> bool:
        """Return whether the states of these layers can be had."""
        # A layer without states would cost the whole step's requests their rows.
        return {-1, *(() if self.taps.problem else self.taps.layers)}.issuperset(layers)

    @timed
    def plan_step(self, batch: Any) -> StepPlan | ScoredPlan | None:
        """Plan which rows of the coming step are wanted; None when no request of the batch asked."""
        mode = batch.forward_mode.name
        if not self.normed:
            return None
        if mode == DECODE_MODE:
            ids = list(map(id, batch.reqs))
            if self._last_plan is None or self._last_plan[0] != ids:
                # Opening a request forgets the last plan, so that the plan is noted behind it.
                plan = self._with_scores(self._plan_decode(batch), batch)
                self._last_plan = ids, plan
            return self._last_plan[1]
        return self._with_scores(self._plan_prefill(batch), batch) if mode in PREFILL_MODES else None

    def _with_scores(self, plan: StepPlan | None, batch: Any) -> StepPlan | ScoredPlan | None:
        return with_scores(plan, batch, self.scored, sends=self.sends) if self.scored else plan

    def _plan_decode(self, batch: Any) -> StepPlan | None:
        groups: dict[Slots, LayerGroup] = {}
        for row, req in enumerate(batch.reqs):
            tracked = self.open(req)
            if tracked is not None and tracked.options.wanted.produced:
                _add_produced(groups, row, row, tracked)
        return StepPlan(tuple(groups.values()), len(batch.reqs), self) if groups else None

    def _plan_prefill(self, batch: Any) -> StepPlan | None:
        groups: dict[Slots, LayerGroup] = {}
        first = 0
        for row, req in enumerate(batch.reqs):
            position, length = batch.prefix_lens[row], batch.extend_lens[row]
            tracked = self.open(req)
            if tracked is not None:
                selection = tracked.plan_prompt(row, first - position, position, length)
                if selection is not None:
                    groups.setdefault(tracked.slots, LayerGroup(tracked.slots)).prompts.append(selection)
                # The row that produces a token is that of the prompt's last position, or a later one. The end of a
                # middle chunk of the prompt produces nothing.
                ends = position + length >= tracked.pools.num_prompt
                if ends and tracked.options.wanted.produced:
                    _add_produced(groups, row, first + length - 1, tracked)
            first += length
        return StepPlan(tuple(groups.values()), first, self) if groups else None

    # --- the prefix cache --------------------------------------------------------------------------------------------

    def prefix_limit(self, tracked: TrackedRequest, length: int) -> int:
        """Return how many of the ``length`` first positions may come from the prefix cache without leaving a gap."""
        pools, first_row = tracked.pools, tracked.first_needed
        if first_row is not None:
            length = min(length, first_row)
        if length <= pools.done or pools.done >= pools.num_prompt:
            return length
        needed = max(min(length, pools.first_needed()), pools.done)
        if not pools.wanted.pools_prefix:
            return needed
        tracked.base = self.sums.longest(tracked.keys, needed, self.page_size) if tracked.epoch == self._epoch else None
        if tracked.base is not None and tracked.base[0] > pools.done:
            return tracked.base[0]
        return pools.done

    def keep_sums(self, tracked: TrackedRequest) -> None:
        """Store the running values over prompt beginnings that a request came by."""
        if tracked.epoch == self._epoch and tracked.pools.sums:
            num_bytes = len(tracked.options.wanted.layers) * self.hidden_size * torch.float32.itemsize
            for length, value_KD in tracked.pools.sums:
                # What was lost was never kept, so that it is computed again; but other ranks count on it.
                if value_KD.numel() or self.ranks > 1:
                    self.sums.put(tracked.keys, length, value_KD, num_bytes)
        tracked.pools.sums.clear()

    def forget_sums(self) -> None:
        """Forget them all: the prefix cache was emptied, such as for other weights."""
        self.sums.clear()
        self._landing.clear()
        self._epoch += 1

    # --- what steps bring --------------------------------------------------------------------------------------------

    def store(self, rows_MKD: torch.Tensor) -> StateStore:
        """Return the store for rows of that depth, width and dtype."""
        key = (rows_MKD.shape[1], rows_MKD.shape[2], rows_MKD.dtype)
        if key not in self._stores:
            self._state_budget = self._state_budget or StateBudget()
            self._stores[key] = StateStore(*key, self._state_budget)
        return self._stores[key]

    def later(self, job: Callable[[], None], num_bytes: int = 0) -> None:
        """Do something in the finisher's thread, behind what it was given before.

        Args:
            job: what to do.
            num_bytes: what it keeps in memory until it is done.
        """
        self._finisher.add(job, num_bytes)

    def land(self, landing: Landing | None, due: list[tuple[TrackedRequest, int]]) -> None:
        """Note running values over responses that are on their way to the host.

        Args:
            landing: float32 ``[len(due), K, D]``; None where they are not held here, or were lost.
            due: their requests, with the response's rows that they stand for.
        """
        self._landing.append((landing, due))

    def land_all(self) -> None:
        """Keep those that arrived: as running values over prompt and response, for prompts that go on from there."""
        waiting, self._landing = self._landing, []
        for landing, due in waiting:
            for (tracked, count), full_KD in zip(due, _full_values(landing, due), strict=True):
                tracked.pools.keep_full(count, full_KD)
                self.keep_sums(tracked)

    # --- answers -----------------------------------------------------------------------------------------------------

    def has_big_answer(self, req: Any) -> bool:
        """Return whether a request's answer is made in another thread."""
        tracked = self.opened.get(req)
        return tracked is not None and tracked.has_big_answer

    def answers(self, reqs: Sequence[Any]) -> list[Unfinished | None]:
        """Finish requests.

        Returns:
            What makes each one's answer; None for those that are not finished or asked for nothing, and on a rank that
            does not answer.
        """
        finished = [(n, self.opened.pop(req)) for n, req in enumerate(reqs) if req.finished() and req in self.opened]
        if not finished:
            return [None] * len(reqs)
        self.land_all()
        # It would keep these requests, and ids of objects that are gone are used again.
        self._last_plan = None
        if self._shared is not None:
            self._shared.tidy()
        unfinished: list[Unfinished | None] = [None] * len(reqs)
        values = self._response_values([tracked for _, tracked in finished])
        for (n, tracked), value in zip(finished, values, strict=True):
            req = reqs[n]
            tracked.closed = True
            self._forget(req)
            if tracked.pools.pools_full:
                tracked.pools.keep_end(value())
            self.keep_sums(tracked)
            if self.sends:
                ids = list(req.output_ids_through_stop)
                unfinished[n] = Unfinished(tracked, ids, decoder_of(req.tokenizer), value, self.shared)
        return unfinished

    def _response_values(self, finished: Sequence[TrackedRequest]) -> list[Callable[[], torch.Tensor | None]]:
        """Start the copies of running values over responses; what is returned waits for them.

        A value is None before any row, and `NO_VALUE` where it is not held here or was lost.
        """
        values: list[Callable[[], torch.Tensor | None]] = []
        held: dict[Slots, list[int]] = {}
        for n, tracked in enumerate(finished):
            none_KD = NO_VALUE if tracked.slot_index != DISCARDED and tracked.pools.count else None
            values.append(lambda none_KD=none_KD: none_KD)  # type: ignore[misc]
            if none_KD is not None and self.sends and not tracked.refused:
                held.setdefault(tracked.slots, []).append(n)
        for slots, numbers in held.items():
            try:
                landing = slots.read([finished[n].slot_index for n in numbers])
            except torch.OutOfMemoryError:
                for n in numbers:
                    finished[n].refuse(OUT_OF_MEMORY)
                continue
            for place, n in enumerate(numbers):
                values[n] = _row_of(landing, place)
        return values


def _full_values(landing: Landing | None, due: Sequence[tuple[TrackedRequest, int]]) -> Sequence[torch.Tensor]:
    """Merge running values over responses to those over what is before them; all of one kind."""
    if landing is None:
        return [NO_VALUE] * len(due)
    before = [tracked.pools.value_before_response for tracked, _ in due]
    values = separate(landing.wait())
    # A prompt of one token has nothing before its response.
    merged = {n: before_KD for n, before_KD in enumerate(before) if before_KD is not None and before_KD.numel()}
    if merged:
        responses = torch.stack([values[n] for n in merged])
        full_NKD = due[0][0].slots.reducer.merge(torch.stack(list(merged.values())), responses)
        for n, full_KD in zip(merged, separate(full_NKD), strict=True):
            values[n] = full_KD
    lost = [tracked.refused or (before[n] is not None and n not in merged) for n, (tracked, _) in enumerate(due)]
    return [NO_VALUE if is_lost else value_KD for is_lost, value_KD in zip(lost, values, strict=True)]


def _row_of(landing: Landing, n: int) -> Callable[[], torch.Tensor | None]:
    return lambda: landing.wait()[n]


def _add_produced(groups: dict[Slots, LayerGroup], row: int, source: int, tracked: TrackedRequest) -> None:
    group = groups.setdefault(tracked.slots, LayerGroup(tracked.slots))
    group.rows.append(row)
    group.sources.append(source)
    group.tracked.append(tracked)
