"""Track the requests that a scheduler works on: what each asked for, its pools, and its answer.

Knows SGLang's batches and auxiliary outputs by attribute name, and imports nothing of SGLang. Runs inside the
scheduler, where an exception ends the server: what does not fit is left out, and the client's count finds it.

The order within one step: `Capture.plan_step` notes which rows are wanted, on the host, before the forward pass;
`StepPlan.gather` reduces them to one float32 matrix on the device, after it; SGLang copies that with its other results;
`HostRows.consume` adds the rows to their requests' pools once the tokens are committed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torchrl_sglang_hidden.errors import SpanError
from torchrl_sglang_hidden.protocol import answer_of, unpack_options
from torchrl_sglang_hidden.protocol.shared_memory import SharedFiles
from torchrl_sglang_hidden.reduce.pooling import RequestPools
from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.server.layer_taps import LayerTaps
from torchrl_sglang_hidden.server.next_tokens import PromptPart, SamplingRow, StepLogits
from torchrl_sglang_hidden.server.prefix_sums import PrefixKeys, PrefixSums
from torchrl_sglang_hidden.server.step_rows import RowSelection, StepPlan, TrackedRequest

__all__ = ["Capture"]

# The forward modes whose rows are one per position. Speculative verification, for one, has rows of tokens that may be
# rejected; a request that met such a step comes back with too few rows, which the client refuses.
_PREFILL_MODES = ("EXTEND", "MIXED")
_DECODE_MODE = "DECODE"


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
        running: what is chosen in the step that the model computes now.
    """

    def __init__(self) -> None:
        self.on = True
        self.normed = True
        self.taps = LayerTaps()
        self.sums = PrefixSums()
        self.page_size = 1
        self.running: StepLogits | None = None
        self.opened: WeakKeyDictionary[Any, TrackedRequest] = WeakKeyDictionary()
        self._refused: WeakSet[Any] = WeakSet()
        self._epoch = 0
        self._shared: SharedFiles | None = None

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
            if options is None or req.finished() or not self._takes(options.wanted.layers):
                # Reading them again at every step would hold up everybody.
                self._refused.add(req)
                return None
            # Running values of another reducer, of other layers or under another adapter are not this request's.
            kind = f"{options.wanted.reducer.running} {options.wanted.layers} {req.extra_key or ''}"
            tracked = self.opened[req] = TrackedRequest(
                RequestPools(options.wanted, len(req.origin_input_ids)),
                options,
                RequestLogits(options.logits, list(req.origin_input_ids)),
                PrefixKeys(kind, _Tokens(req)),
                self._epoch,
            )
        return tracked

    def open_again(self, req: Any) -> TrackedRequest | None:
        """Do as `open` does for a request that starts over, without what it pooled under weights that are gone."""
        tracked = self.opened.get(req)
        # With tokens of the old weights the answer says so by itself; a prompt between two chunks has none that would.
        if tracked is not None and tracked.epoch != self._epoch and not req.output_ids:
            del self.opened[req]
        return self.open(req)

    def _takes(self, layers: Sequence[int]) -> bool:
        # A layer without states would cost the whole step's requests their rows.
        return {-1, *(() if self.taps.problem else self.taps.layers)}.issuperset(layers)

    def plan_step(self, batch: Any) -> StepPlan | None:
        """Plan which rows of the coming step are wanted; None when no request of the batch asked."""
        mode = batch.forward_mode.name
        if mode not in (*_PREFILL_MODES, _DECODE_MODE) or not self.normed:
            return None
        selections: list[RowSelection] = []
        by_row: dict[int, TrackedRequest] = {}
        first = 0
        for row, req in enumerate(batch.reqs):
            length = batch.extend_lens[row] if mode in _PREFILL_MODES else 1
            tracked = self.open(req)
            if tracked is not None:
                position = batch.prefix_lens[row] if mode in _PREFILL_MODES else tracked.pools.num_prompt
                selection = tracked.select(row, first, position, length)
                if selection.prompt is not None or selection.produced is not None:
                    selections.append(selection)
                    by_row[row] = tracked
            first += length
        if not selections:
            return None
        return StepPlan(
            selections=tuple(selections),
            num_rows=first,
            reqs=tuple(batch.reqs),
            tracked=by_row,
            opened=self.opened,
            keep_sums=self.keep_sums,
        )

    def plan_logits(self, batch: Any, vocab_size: int) -> StepLogits | None:
        """Plan which tokens the coming step chooses for requests that asked something of it; None for none.

        Args:
            batch: SGLang's, with the lengths of this step.
            vocab_size: V.
        """
        mode = batch.forward_mode.name
        if not self.opened or mode not in (*_PREFILL_MODES, _DECODE_MODE):
            return None
        sampling_rows: list[SamplingRow] = []
        prompts: list[PromptPart] = []
        first = 0
        for row, req in enumerate(batch.reqs):
            length = batch.extend_lens[row] if mode in _PREFILL_MODES else 1
            tracked = self.opened.get(req)
            spec = None if tracked is None else tracked.logits.wanted.spec
            # Columns that the model does not have would end the scheduler; no client of this package asks for them.
            if tracked is not None and (spec is None or spec.fits(vocab_size)):
                # Overlap scheduling lets the request's own ids lag by one; the lengths are those of the step.
                stop = batch.prefix_lens[row] + length if mode in _PREFILL_MODES else int(batch.seq_lens_cpu[row])
                index, wanted = stop - len(tracked.logits.prompt_ids), tracked.logits.wanted
                if index >= 0 and wanted.wants_sampled:
                    before = tuple(req.output_ids) if tracked.logits.reads_response else ()
                    sampling_rows.append(
                        SamplingRow(
                            row=row,
                            input_row=first + length - 1,
                            index=index,
                            logits=tracked.logits,
                            max_new_tokens=wanted.response_limit,
                            ids_before=before,
                        )
                    )
                tokens = tracked.logits.plan_prompt(stop - length, stop) if mode in _PREFILL_MODES else None
                if tokens is not None:
                    prompts.append(
                        PromptPart(
                            row=row,
                            offset=first - (stop - length),
                            first=tokens[0],
                            stop=tokens[1],
                            logits=tracked.logits,
                        )
                    )
            first += length
        if not sampling_rows and not prompts:
            return None
        return StepLogits(
            sampling_rows=tuple(sampling_rows),
            prompts=tuple(prompts),
            reqs=tuple(batch.reqs),
            vocab_size=vocab_size,
            num_rows=first,
        )

    # --- the prefix cache --------------------------------------------------------------------------------------------

    def prefix_limit(self, tracked: TrackedRequest, length: int) -> int:
        """Return how many of the ``length`` first positions may come from the prefix cache without leaving a gap."""
        pools, first_row = tracked.pools, tracked.logits.first_needed
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
        if tracked.epoch == self._epoch:
            for length, value_KD in tracked.pools.sums:
                self.sums.put(tracked.keys, length, value_KD)
        tracked.pools.sums.clear()

    def forget_sums(self) -> None:
        """Forget them all: the prefix cache was emptied, such as for other weights."""
        self.sums.clear()
        self._epoch += 1

    # --- answers -----------------------------------------------------------------------------------------------------

    def answer(self, req: Any) -> list[dict[str, Any]]:
        """Finish a request: return its answer as a list of one, or an empty list when it asked for none."""
        tracked = self.opened.pop(req, None) if req.finished() else None
        if tracked is None:
            return []
        if self._shared is not None:
            self._shared.tidy()
        pools = tracked.pools.finish(list(req.output_ids_through_stop), _decoder(req.tokenizer))
        self.keep_sums(tracked)
        wanted = tracked.logits.wanted
        logits = tracked.logits.finish() if wanted.wants_sampled or wanted.prompt_from is not None else None
        return [answer_of(pools, tracked.options.way, self.shared.share, logits)]


class _Tokens(Sequence[int]):
    """A request's prompt and response as one sequence, as they stand when it is read."""

    def __init__(self, req: Any) -> None:
        self._req = ref(req)  # its pools must not keep it alive

    def _parts(self) -> tuple[Sequence[int], Sequence[int]]:
        req = self._req()
        return ((), ()) if req is None else (req.origin_input_ids, req.output_ids)

    def __len__(self) -> int:
        return sum(map(len, self._parts()))

    def __getitem__(self, index: Any) -> Any:
        prompt, response = self._parts()
        start, stop, _ = index.indices(len(self))
        cut = len(prompt)
        return [*prompt[start:stop], *response[max(start - cut, 0) : max(stop - cut, 0)]]


def _decoder(tokenizer: Any) -> Callable[[Sequence[int]], str] | None:
    if tokenizer is None:
        return None

    def decode(ids: Sequence[int]) -> str:
        try:
            return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        except Exception as error:  # a tokenizer is anybody's code, and what it raises would end the scheduler
            raise SpanError(f"the server's tokenizer cannot read the response: {error!r}; look at its log") from error

    return decode
