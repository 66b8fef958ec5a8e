"""Capture behind prefix hits: how far a request may hit the cache, and what is kept so that it is complete.

`World` adds a prefix cache, and goes through the plugin's hooks as SGLang does.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_engine import HIDDEN_SIZE
from helpers.fake_scheduler import (
    DENIED,
    DENY,
    Req,
    Scheduler,
    Step,
    asking,
    capturing,
    choosing,
    counts,
    last,
    planned,
)
from helpers.reference_pooling import wanted_of
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sglang_hidden.reduce.wanted import BLOCK, Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.server import plugin
from torchrl_sglang_hidden.server.capture import Capture
from torchrl_sglang_hidden.server.prefix_sums import ENTRY_BYTES
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import LastTokens, PromptSpan

PROMPT = list(range(200))


def computed(capture: Capture, *lengths: int, extra_key: str | None = None, **wanted: Any) -> None:
    """Run requests that leave their sums: over a whole prompt of this length, and over all but its last token."""
    scheduler = Scheduler(capture)
    for length in lengths:
        req = asking(*PROMPT[:length], segments=("prompt",), **wanted)
        req.extra_key = extra_key
        scheduler.prefill(req)
        scheduler.assert_right(req)


def limit_of(capture: Capture, length: int = 200, extra_key: str | None = None, done: int = 0, **wanted: Any) -> int:
    req = asking(*PROMPT, **{"segments": ("prompt",), **wanted})
    req.extra_key = extra_key
    if done:
        Scheduler(capture).run(Step("EXTEND", [req], [(0, done)], [False]))
    return capture.prefix_limit(capture.open(req), length)


MASK = {"m": PromptSpan(((100, 110),))}


@pytest.mark.parametrize(
    ("wanted", "without", "with_150"),
    [
        ({}, 0, 150),
        ({"segments": ("full",)}, 0, 150),
        ({"pooling": "sum"}, 0, 150),  # a mean's sums are sums
        ({"pooling": "max"}, 0, 0),  # and no maxima
        ({"segments": ("response",)}, 200, 200),
        ({"segments": ("prompt",), "pooling": "last"}, 199, 199),
        ({"segments": ("full",), "pooling": "last"}, 200, 200),
        ({"tokens": True}, 0, 0),
        ({"segments": ("response",), "tokens": True}, 200, 200),
        ({"spans": MASK}, 0, BLOCK),
        ({"segments": (), "spans": MASK}, 100, 100),
        ({"segments": (), "spans": MASK, "pooling": "last"}, 109, 109),
        ({"segments": (), "spans": {"r": LastTokens(2)}}, 200, 200),
        ({"layers": (-1, 0)}, 0, 0),
        ({"layers": (0,)}, 0, 0),
        ({"extra_key": "lora"}, 0, 0),
        ({"length": 149}, 0, 149),
        ({"length": 148}, 0, 2 * BLOCK),
        ({"length": 2 * BLOCK - 1}, 0, BLOCK),
        ({"done": 70}, 70, 150),
        ({"done": 70, "length": 60}, 60, 60),
        ({"done": 70, "tokens": True}, 70, 70),
        ({"done": 70, "segments": (), "spans": MASK}, 100, 100),
        ({"done": 105, "segments": (), "spans": MASK}, 105, 105),
        ({"done": 110, "segments": (), "spans": MASK}, 200, 200),
        ({"done": 160}, 160, 160),
        ({"done": 200}, 200, 200),
    ],
)
def test_how_far_a_request_may_hit_the_prefix_cache(wanted: Any, without: int, with_150: int) -> None:
    """Without a kept sum, and after a prompt of 150 tokens with the same beginning was computed."""
    capture = capturing()
    assert limit_of(capture, **wanted) == without
    computed(capture, 150)
    assert limit_of(capture, **wanted) == with_150


def test_a_hit_ends_where_a_page_does() -> None:
    capture = capturing()
    computed(capture, 90)
    capture.page_size = 16
    assert limit_of(capture) == BLOCK
    computed(capture, 97)  # all but its last token are six pages
    assert limit_of(capture) == 96


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
def test_a_maximum_has_a_maximum_kept(pooling: Any) -> None:
    capture = capturing()
    computed(capture, 150, pooling=pooling)
    found = {other: limit_of(capture, pooling=other) for other in ("mean", "sum", "max")}
    assert found == {other: 150 if (other == "max") is (pooling == "max") else 0 for other in found}


def test_sums_of_other_layers_and_adapters_are_their_own() -> None:
    capture = capturing()
    computed(capture, 150, layers=(0, -1))
    computed(capture, 100, extra_key="lora")
    assert limit_of(capture) == 0
    assert limit_of(capture, layers=(0, -1)) == 150
    assert limit_of(capture, extra_key="lora") == 100


@pytest.mark.parametrize("start", [BLOCK, 149, 150])
def test_a_request_that_hits_a_kept_sum_is_complete(start: int) -> None:
    capture = capturing()
    computed(capture, 150)
    scheduler, req = Scheduler(capture), asking(*PROMPT)
    assert capture.prefix_limit(capture.open(req), start) == start
    scheduler.run(Step("EXTEND", [req], [(start, 170)], [False]))
    scheduler.run(Step("EXTEND", [req], [(170, 200)], [True]))
    scheduler.decode(req)
    scheduler.assert_right(req)


def test_a_response_is_a_beginning_too() -> None:
    """Prompt and response begin the prompt of a chat's next turn."""
    scheduler = Scheduler()
    first = asking(*PROMPT[:50], segments=("full",))
    scheduler.prefill(first)
    for _ in range(BLOCK):
        scheduler.decode(first)
    scheduler.assert_right(first)
    second = asking(*first.ids, 5, 6, segments=("prompt",))
    assert scheduler.capture.prefix_limit(scheduler.capture.open(second), len(second.ids)) == len(first.ids) - 1
    assert scheduler.capture.prefix_limit(scheduler.capture.open(second), len(first.ids) - 2) == BLOCK
    assert scheduler.capture.prefix_limit(scheduler.capture.open(second), len(first.ids) - 1) == len(first.ids) - 1
    scheduler.run(Step("EXTEND", [second], [(len(first.ids) - 1, len(second.ids))], [True]))
    scheduler.assert_right(second)


@pytest.mark.parametrize("hit", [1, 3])
def test_a_hit_without_a_sum_leaves_the_count_short(hit: int) -> None:
    scheduler, req = Scheduler(), asking(9, 8, 7, 6)
    scheduler.run(Step("EXTEND", [req], [(hit, 4)], [True]))
    assert counts(scheduler.finish(req)) == {"prompt": 0, "response": 1, "full": 0}


def test_a_hit_elsewhere_than_the_sum_that_was_looked_up_leaves_the_count_short() -> None:
    """A wrong sum would give a wrong mean with the right count."""
    capture = capturing()
    computed(capture, 150)
    scheduler, req = Scheduler(capture), asking(*PROMPT, segments=("prompt",))
    assert capture.prefix_limit(capture.open(req), 200) == 150
    scheduler.run(Step("EXTEND", [req], [(130, 200)], [True]))
    assert counts(scheduler.finish(req)) == {"prompt": 0}


def test_after_a_flush_nothing_older_is_used_or_kept() -> None:
    """The weights may be others: states from before and after do not mix."""
    capture = capturing()
    scheduler, old = Scheduler(capture), asking(*PROMPT, segments=("prompt",))
    scheduler.run(Step("EXTEND", [old], [(0, 10)], [False]))
    computed(capture, 150)
    assert capture.sums.bytes > 0
    capture.forget_sums()
    assert capture.sums.bytes == 0
    assert limit_of(capture) == 0
    scheduler.run(Step("EXTEND", [old], [(10, 100)], [False]))
    assert capture.sums.bytes == 0, "of one that began before"
    computed(capture, 150)
    assert limit_of(capture) == 150
    assert capture.prefix_limit(capture.open(old), 200) == 100, "one that began before gets none that began after"
    scheduler.run(Step("EXTEND", [old], [(100, 200)], [True]))
    before = capture.sums.bytes
    scheduler.finish(old)
    assert capture.sums.bytes == before


def test_kept_sums_are_handed_on_once() -> None:
    scheduler, req = Scheduler(), asking(*PROMPT)
    scheduler.prefill(req)
    assert scheduler.capture.opened[req].pools.sums == []
    lengths = {BLOCK, 2 * BLOCK, 3 * BLOCK, 199, 200}
    assert scheduler.capture.sums.bytes == sum(HIDDEN_SIZE * 4 + 8 * (n % BLOCK) + ENTRY_BYTES for n in lengths)


class World(Scheduler):
    """A scheduler with a prefix cache, chunks, retractions and evictions, through the plugin's hooks."""

    def __init__(self, data: st.DataObject, page_size: int) -> None:
        super().__init__()
        self.data = data
        self.tree_cache = SimpleNamespace(page_size=page_size, supports_mamba=lambda: False)
        self.cached: list[tuple[str | None, list[int]]] = []
        self.queue: list[Req] = []
        self.chunked: Req | None = None
        self.running: list[Req] = []

    def match(self, req: Req, tree_cache: Any, cow_mamba: Any) -> None:
        """Do what SGLang's own `init_next_round_input` does with the prefix."""
        limit = len(req.ids) - 1
        given = plugin.after_max_prefix_len(limit, req, len(req.ids))
        limit = limit if given is None else given
        shared = (
            next((i for i, (a, b) in enumerate(zip(ids, req.ids, strict=False)) if a != b), min(len(ids), len(req.ids)))
            for key, ids in self.cached
            if key == req.extra_key
        )
        size = self.tree_cache.page_size
        req.prefix_len = min(max(shared, default=0), limit) // size * size

    def act(self) -> None:
        what = self.data.draw(st.sampled_from(["step", "step", "step", "retract", "evict", "flush"]))
        if what == "step":
            self.step()
        elif what == "retract" and (self.running or self.chunked):
            self.settle()
            req = self.data.draw(st.sampled_from([*self.running, *([self.chunked] if self.chunked else [])]))
            self.cached.append((req.extra_key, req.ids[: req.prefix_len]))
            if req is self.chunked:
                self.chunked = None
            else:
                self.running.remove(req)
            self.queue.append(req)
        elif what == "evict" and self.cached:
            place = self.data.draw(st.integers(0, len(self.cached) - 1))
            key, ids = self.cached.pop(place)
            self.cached.append((key, ids[: self.data.draw(st.integers(0, len(ids)))]))
        elif what == "flush":
            self.cached.clear()
            plugin.after_flush_cache(True, self)

    def step(self) -> None:
        """Run one chunk, all requests that decode, or both; the results may wait for the next step."""
        if self.chunked is None and self.queue:
            self.settle()
            self.chunked = self.queue.pop(0)
            plugin.around_match_prefix(self.match, self.chunked, self.tree_cache)
        reqs, spans, commits = [], [], []
        mixed = self.data.draw(st.booleans())
        if self.chunked is not None:
            req, end = self.chunked, len(self.chunked.ids)
            stop = min(req.prefix_len + self.data.draw(st.sampled_from([5, BLOCK, 1000])), end)
            reqs, spans, commits = [req], [(req.prefix_len, stop)], [stop == end]
            req.prefix_len = stop
        if self.chunked is None or mixed:
            reqs += self.running
            spans += [last(req) for req in self.running]
            commits += [True] * len(self.running)
            for req in self.running:
                req.prefix_len = len(req.ids)
        if not reqs:
            return
        self.launch(Step("DECODE" if self.chunked is None else "MIXED" if mixed else "EXTEND", reqs, spans, commits))
        if len(self.waiting) > 1 or self.data.draw(st.booleans()):
            self.commit()
        if self.chunked is not None and commits[0]:
            self.running.append(self.chunked)
            self.chunked = None
        for req in [*self.running]:
            if len(req.output_ids) == req.target:
                self.settle()
                self.running.remove(req)
                self.cached.append((req.extra_key, req.ids[:-1]))
                if req.wanted is not None:
                    self.assert_right(req)

    def settle(self) -> None:
        while self.waiting:
            self.commit()


prompts = st.builds(
    lambda base, length, tail: [base] * length + tail,
    st.sampled_from([3, 4]),
    st.sampled_from([0, 3, BLOCK - 1, BLOCK, 2 * BLOCK + 5]),
    st.lists(st.integers(3, 5), min_size=1, max_size=4),
)


@st.composite
def chosen_of(draw: st.DrawFn, num_prompt: int) -> WantedLogits:
    """Draw anything that a client may ask of the logits of a prompt of this length."""
    columns = draw(st.sampled_from([None, {"full": True}, {"top_k": 2}, {"token_ids": (4, DENIED)}]))
    stage = draw(st.sampled_from(["raw", "processed"]))
    segments = draw(st.sampled_from([("response",), ("prompt",), ("full",)]))
    spec = None if columns is None else LogitsSpec(**columns, stage=stage, segments=segments)
    scored = num_prompt > 1 and draw(st.booleans())
    responses = ()
    if scored:
        start = draw(st.integers(1, num_prompt - 1))
        responses = ((start, draw(st.integers(start + 1, num_prompt))),)
    given = 1 if spec is not None and spec.of_prompt else draw(st.integers(1, num_prompt - 1)) if scored else None
    constraints = DENY if scored or spec is None or draw(st.booleans()) else ()
    return WantedLogits(spec, constraints, given, scored, responses)


@settings(max_examples=45)
@given(data=st.data())
def test_a_storm(data: st.DataObject) -> None:
    """Whatever the scheduler does, every request that asks comes back complete, and equal to plain torch."""
    world = World(data, data.draw(st.sampled_from([1, 16])))
    for _ in range(data.draw(st.integers(2, 5))):
        prompt = data.draw(prompts)
        wanted = data.draw(st.none() | wanted_of(len(prompt)) | st.just(Wanted(("prompt", "full"))))
        req = Req(prompt, wanted, logits=data.draw(st.none() | chosen_of(len(prompt))))
        req.extra_key = data.draw(st.sampled_from([None, None, "lora"]))
        req.target = data.draw(st.integers(1, 4))
        world.queue.append(req)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "_capture", world.capture)
        for _ in range(data.draw(st.integers(0, 25))):
            world.act()
        for _ in range(400):
            world.step()
        assert (world.queue, world.running, world.chunked) == ([], [], None)
    assert len(world.capture.opened) == 0


@pytest.mark.parametrize(
    ("wanted", "given_from", "limit"),
    [
        (None, None, 6),
        (None, 1, 0),
        (None, 4, 3),
        (None, 6, 6),  # nothing is behind the last token
        (Wanted(("response",)), 4, 3),
        (Wanted(("prompt",), "last"), 4, 3),
        (Wanted(("prompt",), "last"), 6, 5),
        (Wanted((), spans={"p": PromptSpan(((1, 3),))}), 4, 1),
        (Wanted((), spans={"p": PromptSpan(((4, 6),))}), 4, 3),
        (Wanted(("prompt",)), 4, 0),
    ],
)
def test_how_far_logits_let_a_request_hit_the_prefix_cache(wanted: Any, given_from: Any, limit: int) -> None:
    """The row of token t is at the position before it; pools may need more."""
    spec = LogitsSpec(full=True, segments=("prompt",)) if given_from == 1 else None
    scored = given_from not in (None, 1)
    capture = capturing()
    req = choosing(
        5, 4, 3, 6, 1, 7, wanted=wanted, spec=spec, constraints=DENY, prompt_from=given_from, scored=scored,
        response_ranges=((given_from, 6),) if scored and given_from < 6 else (),
    )  # fmt: skip
    one = capture.open(req)
    assert capture.prefix_limit(one, 6) == limit
    assert capture.prefix_limit(one, 0) == 0
    assert one.reads_prompt is (one.pools.reads_prompt or given_from is not None)
    scheduler = Scheduler(capture)
    if limit < 6:
        scheduler.run(Step("EXTEND", [req], [(limit, 6)], [True]))
        scheduler.decode(req)
        scheduler.assert_right(req)
        return
    assert planned(capture, Step("EXTEND", [req], [(5, 6)], [True]))[1] == []


def test_a_kept_sum_is_no_use_where_logits_need_more() -> None:
    capture = capturing()
    computed(capture, 150)
    for given_from, limit in ((140, 2 * BLOCK), (151, 150), (200, 150)):
        req = Req(PROMPT, Wanted(("prompt",)), logits=WantedLogits(None, DENY, given_from, True, ((190, 200),)))
        assert capture.prefix_limit(capture.open(req), 200) == limit
