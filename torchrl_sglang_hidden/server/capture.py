"""Takes hidden rows from a forward step on the device, and pools them per request on the host.

Knows SGLang's batches and auxiliary outputs by their shape only, and imports nothing of SGLang. Runs inside the
scheduler, where an exception ends the server: what does not fit is left out, and the client's count finds it.

One step's way: `plan_step` notes which rows are wanted, on the host, before the forward pass; `StepPlan.gather` reduces
them to one float32 matrix on the device, after it; SGLang copies that with its other results; `HostRows.consume` adds
the rows to their requests' pools once the tokens are committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch

from torchrl_sglang_hidden.errors import SpanError
from torchrl_sglang_hidden.protocol import Options, answer_of, unpack_options
from torchrl_sglang_hidden.protocol.shared_memory import SharedFiles
from torchrl_sglang_hidden.reduce.pooling import PromptStep, RequestPools, sum_rows
from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.server.layer_taps import LayerTaps
from torchrl_sglang_hidden.server.next_tokens import PromptPart, SamplingRow, StepLogits
from torchrl_sglang_hidden.server.prefix_sums import PrefixKeys, PrefixSums

__all__ = ["Capture", "DeviceRows", "HostRows", "Open", "StepPlan"]

# The forward modes whose rows are one per position. Speculative verification, for one, has rows of tokens that may be
# rejected; a request that met such a step comes back with too few rows, which the client refuses.
_PREFILL_MODES = ("EXTEND", "MIXED")
_DECODE_MODE = "DECODE"


@dataclass(slots=True)
class Open:
    """One request under way.

    Args:
        pools: what it pools.
        options: what it asked for.
        logits: what it wants of the logits.
        keys: the names of its tokens' beginnings.
        epoch: how often the sums had been cleared when it began: its own would be of older weights later.
        limit: most positions that it may take from the prefix cache; None for any number.
        base: the sum over that many first positions, where one is kept.
    """

    pools: RequestPools
    options: Options
    logits: RequestLogits
    keys: PrefixKeys
    epoch: int
    limit: int | None = None
    base: tuple[int, torch.Tensor] | None = None

    @property
    def reads_prompt(self) -> bool:
        """Whether anything of the prompt is wanted, so that not all of it may come from the prefix cache."""
        return self.pools.reads_prompt or self.logits.wanted.prompt_from is not None

    def restart(self) -> None:
        """Plans from what has arrived, after the request went back into the queue."""
        self.pools.restart()
        self.logits.restart()


@dataclass(frozen=True, slots=True)
class Take:
    """What one request wants of one forward step.

    Args:
        row: its index in the batch.
        offset: the row of the step's states that position 0 would have.
        prompt: of the prompt, or None.
        produced: the row of the step's states that produces its next token, or None.
    """

    row: int
    offset: int
    prompt: PromptStep | None
    produced: int | None


@dataclass(frozen=True, slots=True)
class HostRows:
    """One step's reduced rows on the host, SGLang's ``HostAuxiliaryOutput``.

    Args:
        sums_MD: float32, each vector of the plan for each layer of its request, in order.
        rows_ND: the rows wanted as they are, likewise, in the model's dtype; or None.
        plan: what was planned.
    """

    sums_MD: torch.Tensor
    rows_ND: torch.Tensor | None
    plan: StepPlan

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Adds the rows to the pools of their requests. ``commits[i]`` is None when row i committed no token."""
        vectors, rows = iter(self.sums_MD), 0
        for take in self.plan.takes:
            req = self.plan.reqs[take.row]
            one = self.plan.opened[take.row]
            depth = len(one.options.wanted.layers)
            groups = [] if take.prompt is None else take.prompt.groups
            sums = [_stack(vectors, depth) for _ in groups]
            produced_KD = _stack(vectors, depth) if take.produced is not None else None
            length = _num_rows(take.prompt)
            rows_NKD = None
            if self.rows_ND is not None and length:
                # A clone: a view would keep the whole step's buffer alive in the pools of one request.
                part_MD = self.rows_ND[rows : rows + length * depth]
                rows_NKD = part_MD.reshape(depth, length, -1).transpose(0, 1).clone()
                rows += length * depth
            capture = self.plan.capture
            if capture.opened.get(req) is not one or take.row >= len(batch.reqs) or batch.reqs[take.row] is not req:
                continue
            if take.prompt is not None:
                one.pools.add_prompt(take.prompt, sums, rows_NKD)
            if produced_KD is not None and commits[take.row] is not None:
                one.pools.add_produced(produced_KD, commits[take.row].output_index)
            capture.keep_sums(one)


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """One step's reduced rows on the device, SGLang's ``DeviceAuxiliaryOutput``."""

    sums_MD: torch.Tensor
    rows_ND: torch.Tensor | None
    plan: StepPlan

    def copy_to_host(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> HostRows:
        """Starts the step's copies."""
        return HostRows(copy(self.sums_MD), None if self.rows_ND is None else copy(self.rows_ND), self.plan)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to take from one forward step, noted before it ran.

    Args:
        takes: the rows wanted.
        num_rows: all rows of the step, wanted or not.
        reqs: the batch's requests.
        opened: likewise, those of them that asked.
        capture: whose pools the rows are for.
    """

    takes: tuple[Take, ...]
    num_rows: int
    reqs: tuple[Any, ...]
    opened: Mapping[int, Open]
    capture: Capture

    @property
    def layers(self) -> set[int]:
        """The layers that anybody wants."""
        return {layer for one in self.opened.values() for layer in one.options.wanted.layers}

    def gather(self, states: Mapping[int, torch.Tensor]) -> DeviceRows | None:
        """Reduces the planned rows of the step's states, on the device.

        Args:
            states: by layer, each ``[N, D]``.
        """
        layers = self.layers
        found = {layer: states.get(layer) for layer in layers}
        if any(state is None or state.dim() != 2 or state.shape[0] < self.num_rows for state in found.values()):
            return None
        singles = all(take.prompt is None for take in self.takes)
        vectors: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        for take in self.takes:
            wanted = [states[layer] for layer in self.opened[take.row].options.wanted.layers]
            if take.prompt is not None:
                for ranges in take.prompt.groups:
                    moved = tuple((start + take.offset, stop + take.offset) for start, stop in ranges)
                    vectors += [sum_rows(state_ND, moved) for state_ND in wanted]
                if take.prompt.rows is not None:
                    start, stop = take.prompt.rows
                    rows += [state_ND[start + take.offset : stop + take.offset] for state_ND in wanted]
            if take.produced is not None:
                last = [state_ND[take.produced : take.produced + 1] for state_ND in wanted]
                vectors += last if singles else [row[0].float() for row in last]
        # Two kernels however many requests decode. cat and stack copy: the rows may be a CUDA graph's buffer, which the
        # next step overwrites.
        sums_MD = torch.cat(vectors).float() if singles else torch.stack(vectors) if vectors else torch.empty(0, 0)
        return DeviceRows(sums_MD, torch.cat(rows) if rows else None, self)


class Capture:
    """The pools of the requests that a scheduler is working on.

    Attributes:
        opened: by request, weakly: what SGLang forgets (finished, aborted) is forgotten here.
        on: whether this SGLang can carry the rows at all.
        normed: whether the model hands over its states after the final norm. SGLang prefers those before it where a
            model gives both.
        taps: the hooks on other layers than the last.
        sums: kept for prompts that begin alike.
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
        self.opened: WeakKeyDictionary[Any, Open] = WeakKeyDictionary()
        self._refused: WeakSet[Any] = WeakSet()
        self._epoch = 0
        self._shared: SharedFiles | None = None

    @property
    def shared(self) -> SharedFiles:
        """Made when it is first used: every process of SGLang loads this, and one needs it."""
        if self._shared is None:
            self._shared = SharedFiles()
        return self._shared

    def open(self, req: Any) -> Open | None:
        """The request's pools, made when it is first seen; None when it did not ask."""
        one = self.opened.get(req)
        if one is None and req not in self._refused:
            options = unpack_options(req.sampling_params.custom_params) if self.on else None
            if options is None or req.finished() or not self._takes(options.wanted.layers):
                # Reading them again at every step would hold up everybody.
                self._refused.add(req)
                return None
            kind = f"{options.wanted.layers} {req.extra_key or ''}"
            one = self.opened[req] = Open(
                RequestPools(options.wanted, len(req.origin_input_ids)),
                options,
                RequestLogits(options.logits, list(req.origin_input_ids)),
                PrefixKeys(kind, _Tokens(req)),
                self._epoch,
            )
        return one

    def open_again(self, req: Any) -> Open | None:
        """As `open`, for a request that starts over: without what it pooled under weights that are gone."""
        one = self.opened.get(req)
        # With tokens of the old weights the answer says so by itself; a prompt between two chunks has none that would.
        if one is not None and one.epoch != self._epoch and not req.output_ids:
            del self.opened[req]
        return self.open(req)

    def _takes(self, layers: Sequence[int]) -> bool:
        # A layer without states would cost the whole step's requests their rows.
        return {-1, *(() if self.taps.problem else self.taps.layers)}.issuperset(layers)

    def plan_step(self, batch: Any) -> StepPlan | None:
        """Notes which rows of the coming step are wanted; None when no request of the batch asked."""
        mode = batch.forward_mode.name
        if mode not in (*_PREFILL_MODES, _DECODE_MODE) or not self.normed:
            return None
        takes: list[Take] = []
        opened: dict[int, Open] = {}
        first = 0
        for row, req in enumerate(batch.reqs):
            length = batch.extend_lens[row] if mode in _PREFILL_MODES else 1
            one = self.open(req)
            if one is not None:
                position = batch.prefix_lens[row] if mode in _PREFILL_MODES else one.pools.num_prompt
                take = _take(one, row, first, position, length)
                if take.prompt is not None or take.produced is not None:
                    takes.append(take)
                    opened[row] = one
            first += length
        return StepPlan(tuple(takes), first, tuple(batch.reqs), opened, self) if takes else None

    def plan_logits(self, batch: Any, vocab_size: int) -> StepLogits | None:
        """Notes which tokens the coming step chooses for requests that asked something of it; None for none.

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
            one = self.opened.get(req)
            spec = None if one is None else one.logits.wanted.spec
            # Columns that the model does not have would end the scheduler; no client of this package asks for them.
            if one is not None and (spec is None or spec.fits(vocab_size)):
                # Overlap scheduling lets the request's own ids lag by one; the lengths are those of the step.
                stop = batch.prefix_lens[row] + length if mode in _PREFILL_MODES else int(batch.seq_lens_cpu[row])
                index, wanted = stop - len(one.logits.prompt_ids), one.logits.wanted
                if index >= 0 and wanted.wants_sampled:
                    before = tuple(req.output_ids) if one.logits.reads_response else ()
                    sampling_rows.append(
                        SamplingRow(
                            row=row,
                            input_row=first + length - 1,
                            index=index,
                            logits=one.logits,
                            max_new_tokens=wanted.response_limit,
                            ids_before=before,
                        )
                    )
                tokens = one.logits.plan_prompt(stop - length, stop) if mode in _PREFILL_MODES else None
                if tokens is not None:
                    prompts.append(
                        PromptPart(
                            row=row,
                            offset=first - (stop - length),
                            first=tokens[0],
                            stop=tokens[1],
                            logits=one.logits,
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

    def prefix_limit(self, one: Open, length: int) -> int:
        """How many of the ``length`` first positions may come from the prefix cache without leaving a gap."""
        pools, first_row = one.pools, one.logits.first_needed
        if first_row is not None:
            length = min(length, first_row)
        if length <= pools.done or pools.done >= pools.num_prompt:
            return length
        needed = max(min(length, pools.first_needed()), pools.done)
        if not pools.wanted.sums_prefix:
            return needed
        one.base = self.sums.longest(one.keys, needed, self.page_size) if one.epoch == self._epoch else None
        if one.base is not None and one.base[0] > pools.done:
            return one.base[0]
        return pools.done

    def keep_sums(self, one: Open) -> None:
        """Keeps what sums a request came by."""
        if one.epoch == self._epoch:
            for length, sum_KD in one.pools.sums:
                self.sums.put(one.keys, length, sum_KD)
        one.pools.sums.clear()

    def forget_sums(self) -> None:
        """The prefix cache was emptied, such as for other weights."""
        self.sums.clear()
        self._epoch += 1

    # --- answers -----------------------------------------------------------------------------------------------------

    def answer(self, req: Any) -> list[dict[str, Any]]:
        """The finished request's answer as a list of one, and its pools' end; an empty list when there is none."""
        one = self.opened.pop(req, None) if req.finished() else None
        if one is None:
            return []
        if self._shared is not None:
            self._shared.tidy()
        pools = one.pools.finish(list(req.output_ids_through_stop), _decoder(req.tokenizer))
        self.keep_sums(one)
        wanted = one.logits.wanted
        logits = one.logits.finish() if wanted.wants_sampled or wanted.prompt_from is not None else None
        return [answer_of(pools, one.options.way, self.shared.share, logits)]


class _Tokens(Sequence[int]):
    """A request's prompt and response as one sequence, as they stand when it is read."""

    def __init__(self, req: Any) -> None:
        self._req = ref(req)  # its pools must not keep it alive

    def _parts(self) -> tuple[Sequence[int], Sequence[int]]:
        req = self._req()
        return ((), ()) if req is None else (req.origin_input_ids, req.output_ids)

    def __len__(self) -> int:
        return sum(map(len, self._parts()))

    def __getitem__(self, places: Any) -> Any:
        prompt, response = self._parts()
        start, stop, _ = places.indices(len(self))
        cut = len(prompt)
        return [*prompt[start:stop], *response[max(start - cut, 0) : max(stop - cut, 0)]]


def _take(one: Open, row: int, first: int, position: int, length: int) -> Take:
    """What a request wants of a step in which its ``length`` rows start at row ``first``, at ``position``."""
    base = one.base[1] if one.base is not None and one.base[0] == position else None
    last = position + length - 1
    # The row that produces a token is that of the prompt's last position, or one behind it. The end of a middle chunk
    # of the prompt produces nothing.
    produces = last >= one.pools.num_prompt - 1 and one.options.wanted.produced
    return Take(
        row,
        first - position,
        one.pools.plan_prompt(position, position + length, base) if position < one.pools.num_prompt else None,
        first + length - 1 if produces else None,
    )


def _num_rows(step: PromptStep | None) -> int:
    return 0 if step is None or step.rows is None else step.rows[1] - step.rows[0]


def _stack(vectors: Iterator[torch.Tensor], depth: int) -> torch.Tensor:
    return torch.stack([next(vectors) for _ in range(depth)])


def _decoder(tokenizer: Any) -> Callable[[Sequence[int]], str] | None:
    if tokenizer is None:
        return None

    def decode(ids: Sequence[int]) -> str:
        try:
            return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        except Exception as error:  # a tokenizer is anybody's code, and what it raises would end the scheduler
            raise SpanError(f"the server's tokenizer cannot read the response: {error!r}") from error

    return decode
