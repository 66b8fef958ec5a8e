"""A scheduler of a few lines with batches and requests of SGLang's shape, for the tests of capture.

`Scheduler` drives what SGLang drives: it plans, "runs" the model, copies, commits and consumes, in that order. The
states are those of fake_engine.py, so a pool that got a wrong row has a wrong value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from stand_ins import answer_of

from helpers.fake_engine import HIDDEN_SIZE, of_layer
from helpers.reference_pooling import Case, assert_pools, decode
from torchrl_sglang_hidden.protocol import CHANNEL, pack_options, unpack_answer
from torchrl_sglang_hidden.reduce.columns import select_columns
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.server.capture import Capture
from torchrl_sglang_hidden.server.next_tokens import StepLogits, plan_logits
from torchrl_sglang_hidden.server.step_rows import HostRows
from torchrl_sglang_hidden.server.taken_logits import HostLogits
from torchrl_sglang_hidden.spec.constraints import DisallowedTokens
from torchrl_sglang_hidden.spec.hidden import SEGMENTS

POISON = 1e4  # the value of rows that belong to nobody
LAYERS = (-1, 0, 1, 2)
VOCAB = 9
HEAD_DV = torch.randn(HIDDEN_SIZE, VOCAB, generator=torch.Generator().manual_seed(0))
TOKENIZER = SimpleNamespace(
    decode=lambda ids, *, skip_special_tokens, clean_up_tokenization_spaces: (
        decode(ids) if not (skip_special_tokens or clean_up_tokenization_spaces) else "?"
    )
)


def states_of(ids: list[int], layers: tuple[int, ...] = LAYERS) -> torch.Tensor:
    """Return `fake_engine.state_D` of every position, ``[N, K, D]``."""
    ids_N = torch.tensor(ids)
    before_N = torch.cat([torch.zeros(1, dtype=torch.int64), ids_N[:-1]])
    angles_ND = torch.arange(1, HIDDEN_SIZE + 1) * (1.0 + ids_N)[:, None]
    last_ND = torch.sin(angles_ND + (0.37 * before_N + torch.arange(len(ids)))[:, None])
    return torch.stack([of_layer(last_ND, layer) for layer in layers], 1)


def capturing() -> Capture:
    """Return the capture of a server that was started for all layers."""
    capture = Capture()
    capture.taps.layers = LAYERS[1:]
    return capture


class Req:
    """A request as the scheduler holds it."""

    def __init__(
        self,
        prompt_ids: list[int],
        wanted: Wanted | None = None,
        custom: Any = None,
        way: Any = "binary",
        logits: WantedLogits | None = None,
    ) -> None:
        self.wanted = Wanted((), None) if wanted is None and logits is not None else wanted
        self.logits = logits
        if self.wanted is not None:
            custom = {CHANNEL: pack_options(self.wanted, way, logits)}
        self.origin_input_ids = prompt_ids
        self.output_ids: list[int] = []
        self.sampling_params = SimpleNamespace(custom_params=custom, max_new_tokens=9)
        self.extra_key: str | None = None
        self.session: Any = None
        self.multimodal_inputs: Any = None
        self.tokenizer = TOKENIZER
        self.is_finished = self.stream = False
        self.prefix_len = self.host_hit_length = 0

    @property
    def ids(self) -> list[int]:
        return self.origin_input_ids + self.output_ids

    @property
    def output_ids_through_stop(self) -> list[int]:
        return self.output_ids

    def finished(self) -> bool:
        return self.is_finished


@dataclass
class Step:
    """One forward step: which positions of each request are computed, and whether each commits a token."""

    mode: str
    reqs: list[Req]
    spans: list[tuple[int, int]]
    commits: list[bool]
    padding: int = 0

    def batch(self) -> Any:
        extends = self.mode != "DECODE"
        return SimpleNamespace(
            forward_mode=SimpleNamespace(name=self.mode),
            reqs=list(self.reqs),
            extend_lens=[stop - start for start, stop in self.spans] if extends else None,
            prefix_lens=[start for start, _ in self.spans] if extends else None,
            seq_lens_cpu=torch.tensor([stop for _, stop in self.spans]),
        )


@dataclass
class Scheduler:
    capture: Capture = field(default_factory=capturing)
    dtype: torch.dtype = torch.float32
    waiting: list[tuple[list[HostRows | HostLogits], Any, list[Any]]] = field(default_factory=list)

    def run(self, step: Step) -> None:
        self.launch(step)
        self.commit()

    def launch(self, step: Step) -> None:
        """Run the forward pass and copy. The device's buffers are overwritten at once, as a CUDA graph's are."""
        batch = step.batch()
        plan = self.capture.plan_step(batch)
        step_logits = plan_logits(batch, self.capture.logits, VOCAB)
        parts = [states_of([*req.ids, 0])[start:stop] for req, (start, stop) in zip(step.reqs, step.spans, strict=True)]
        parts.append(torch.full((step.padding, len(LAYERS), HIDDEN_SIZE), POISON))
        states = {
            layer: rows.to(self.dtype).clone() for layer, rows in zip(LAYERS, torch.cat(parts).unbind(1), strict=True)
        }
        devices = [plan.gather(states) if plan is not None else None]
        if step_logits is not None:
            devices.append(self.choose(step, step_logits, states[-1]))
        for state_ND in states.values():
            state_ND.fill_(POISON)
        hosts = [device.copy_to_host(torch.clone) for device in devices if device is not None]
        commits: list[Any] = []
        for req, commits_one in zip(step.reqs, step.commits, strict=True):
            commits.append(SimpleNamespace(output_index=len(req.output_ids)) if commits_one else None)
            if commits_one:
                req.output_ids.append((len(req.ids) + req.ids[-1]) % 3)
        self.waiting.append((hosts, batch, commits))

    def choose(self, step: Step, step_logits: StepLogits, last_ND: torch.Tensor) -> Any:
        """Do what the model's head and the sampler do in a step."""
        ends = torch.tensor([stop - start for start, stop in step.spans]).cumsum(0) - 1
        ids = [i for req, (start, stop) in zip(step.reqs, step.spans, strict=True) for i in [*req.ids, 0][start:stop]]
        step_logits.input_ids = torch.tensor(ids + [77] * step.padding)
        step_logits.take_prompts(last_ND, head)
        next_BV = head(last_ND[ends])
        step_logits.take_raw(next_BV)
        step_logits.constrain(next_BV, torch.ones(len(step.reqs), 1))
        device = step_logits.taken()
        next_BV.fill_(POISON)
        return device

    def commit(self) -> None:
        hosts, batch, commits = self.waiting.pop(0)
        for host in hosts:
            host.consume(batch, commits)

    def prefill(self, *reqs: Req, mode: str = "EXTEND") -> None:
        self.run(Step(mode, list(reqs), [(0, len(req.ids)) for req in reqs], [True] * len(reqs)))

    def decode(self, *reqs: Req, commits: list[bool] | None = None, padding: int = 0) -> None:
        self.run(Step("DECODE", list(reqs), [last(req) for req in reqs], commits or [True] * len(reqs), padding))

    def finish(self, req: Req) -> list[dict[str, Any]]:
        req.is_finished = True
        return answer_of(self.capture, req)

    def assert_right(self, req: Req) -> None:
        """Finish the request, and compare its answer with plain torch."""
        wanted = req.wanted
        assert wanted is not None
        case = Case(
            wanted,
            len(req.origin_input_ids),
            tuple(req.output_ids),
            states_of(req.ids[:-1], wanted.layers).to(self.dtype),
        )
        answer = self.finish(req)
        missing = [name for name in wanted.spans if case.rows(name) is None]
        if missing:
            assert list(unpack_answer(answer, "row 0", HIDDEN_SIZE).pools.faults) == missing
        else:
            found = unpack_answer(answer, "row 0", HIDDEN_SIZE)
            assert_pools(case, found.pools)
            if req.logits is None:
                assert found.logits is None
            else:
                states_ND = states_of(req.ids[:-1], (-1,))[:, 0].to(self.dtype)
                assert_logits(req, head(states_ND), found.logits)


def head(states_ND: torch.Tensor) -> torch.Tensor:
    return states_ND.float() @ HEAD_DV


DENIED = 1


def assert_logits(req: Req, raw_NV: torch.Tensor, found: Any) -> None:
    """Check that all logits that were wanted are there. Of constraints, it knows `DisallowedTokens` of one token."""
    wanted, num_prompt = req.logits, len(req.origin_input_ids)
    assert wanted is not None
    processed_NV = raw_NV.clone()
    denied = range(num_prompt - 1, len(raw_NV)) if wanted.constrains_sampled else ()
    if wanted.scored:
        denied = [token - 1 for start, stop in wanted.response_ranges for token in range(start, stop)]
    if wanted.constraints:
        processed_NV[list(denied), DENIED] = -torch.inf
    assert found.constrained == (len(req.output_ids) if wanted.wants_sampled else 0)
    first = num_prompt if wanted.prompt_from is None else wanted.prompt_from
    if wanted.scored and first < num_prompt:
        ids = torch.tensor(req.origin_input_ids[first:])[:, None]
        log_probs_N = processed_NV[first - 1 : num_prompt - 1].log_softmax(-1).gather(1, ids)[:, 0]
        torch.testing.assert_close(found.log_probs_N, log_probs_N)
    else:
        assert found.log_probs_N is None
    spec = wanted.spec
    for rows, places, asked in (
        (found.response, slice(num_prompt - 1, None), spec is not None and spec.of_response),
        (found.prompt, slice(first - 1, num_prompt - 1), spec is not None and spec.of_prompt and first < num_prompt),
    ):
        assert (rows is not None) is asked
        if rows is not None:
            expected = select_columns((raw_NV if spec.stage == "raw" else processed_NV)[places], spec)
            torch.testing.assert_close(rows.values_NC, expected.values_NC)
            assert spec.top_k is None or torch.equal(rows.token_ids_NC, expected.token_ids_NC)


def last(req: Req) -> tuple[int, int]:
    return len(req.ids) - 1, len(req.ids)


def asking(*prompt_ids: int, pooling: Any = "mean", segments: Any = SEGMENTS, **more: Any) -> Req:
    return Req(list(prompt_ids), Wanted(segments, pooling, **more))


DENY = (DisallowedTokens((DENIED,)),)


def choosing(*prompt_ids: int, wanted: Wanted | None = None, **logits: Any) -> Req:
    return Req(list(prompt_ids), wanted, logits=WantedLogits(**logits))


def counts(answer: Any) -> dict[str, int]:
    found = unpack_answer(answer, "row 0", HIDDEN_SIZE).pools
    return {segment: count for segment, (_, count) in found.segments.items()}


def planned(capture: Capture, step: Step) -> tuple[list[Any], list[Any]]:
    """Return row, input row and index of each sampled token; row, offset, first and stop of each part of a prompt."""
    capture.plan_step(step.batch())
    found = plan_logits(step.batch(), capture.logits, VOCAB)
    if found is None:
        return [], []
    assert (found.reqs, found.vocab_size) == (tuple(step.reqs), VOCAB)
    assert found.num_rows == sum(stop - start for start, stop in step.spans)
    assert all(row.max_new_tokens == 128 for row in found.sampling_rows), "as asked; SGLang lowered its own to 9"
    return (
        [(row.row, row.input_row, row.index) for row in found.sampling_rows],
        [(part.row, part.offset, part.first, part.stop) for part in found.prompts],
    )
