"""Several hundred requests of mixed options and lengths at once, for a server whose KV cache is far too small for them.

Requests are retracted, prompts come in chunks beside decoding rows, prefixes are shared and evicted, some are aborted.
Every answer is held against Hugging Face: no row wrong, none missing, none of another request.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import psutil
import torch

from helpers.bad_link import bad_link
from helpers.completion_checks import assert_completion
from helpers.heads_oracle import STORM_HEADS, storm_head
from helpers.policy_checks import prompt_of
from torchrl_sglang_hidden import (
    At,
    Each,
    EngineUnreachableError,
    Every,
    HeadSpec,
    HiddenSpec,
    LastTokens,
    SGLangServer,
    TokenMask,
    Window,
)
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.sglang_api.payload import sent_ids_of, to_payload
from torchrl_sglang_hidden.spec.hidden import POOLINGS, SEGMENTS
from torchrl_sglang_hidden.spec.spans import PromptSpan, Span, span_over

NUM_LAYERS = 4
ABORTS = 24

BASES = [prompt_of(length, 1000 + length) for length in (5, 64, 65, 100, 130, 190)]


def draw_request(chance: random.Random) -> Request:
    """Draw a request of any kind. Half of them share a prefix with others."""
    seed = chance.randrange(10**6)
    if chance.random() < 0.6:
        base = chance.choice(BASES)
        prompt_ids = base[: chance.choice((len(base), chance.randint(1, len(base))))]
        prompt_ids += prompt_of(chance.choice((0, 0, 3, 40)), seed)
    else:
        prompt_ids = prompt_of(chance.choice((1, 2, 7, 63, 64, 65, 128, 200)), seed)
    length = chance.choice((1, 2, 5, 12, 40))
    sampling = {
        "max_new_tokens": length,
        "min_new_tokens": chance.randint(0, length),
        "temperature": chance.choice((0.0, 1.0)),
    }
    kind = chance.random()
    if kind < 0.1:
        return Request(tuple(prompt_ids), {**sampling, "min_new_tokens": 0})
    layers: int | tuple[int, ...] = chance.choice((-1, 0, 2, (1, -1), (-2, 0, -1), tuple(range(-1, NUM_LAYERS))))
    if kind < 0.25:
        spec = HiddenSpec(("prompt",), chance.choice(POOLINGS), layers)
        return Request(tuple(prompt_ids), {"max_new_tokens": 0}, hidden=spec)
    segments = tuple(chance.sample(SEGMENTS, chance.randint(1, 3)))
    spans: dict[str, tuple[Any, Any]] = {}
    if chance.random() < 0.4:
        count = chance.randint(1, 4)
        spans["tail"] = (LastTokens(count, allow_fewer=True), LastTokens(count, allow_fewer=True))
    if chance.random() < 0.4:
        places = sorted(chance.sample(range(len(prompt_ids)), chance.randint(1, min(5, len(prompt_ids)))))
        spans["mask"] = (TokenMask("mask"), PromptSpan(_intervals(places)))
    for name, draw in (("state", draw_state), ("windows", draw_windows)):
        if chance.random() < 0.4:
            asked = draw(chance, "response")
            spans[name] = (asked, asked)
        if chance.random() < 0.2:
            asked = draw(chance, "prompt")
            positions = draw_positions(chance, asked, len(prompt_ids))
            spans[f"{name} of the prompt"] = (asked, replace(span_over(positions), pooling=asked.pooling))
    spec = HiddenSpec(
        segments,
        chance.choice(POOLINGS),
        layers,
        tokens=chance.random() < 0.25,
        dtype=chance.choice((torch.float32, torch.bfloat16)),
        spans={name: asked for name, (asked, _) in spans.items()},
    )
    heads = draw_heads(chance) if chance.random() < 0.4 else None
    if heads is not None and chance.random() < 0.3:
        return Request(tuple(prompt_ids), {**sampling, "min_new_tokens": 0}, heads=heads, head_spans=heads.spans)
    return Request(
        tuple(prompt_ids),
        sampling,
        # Below min_new_tokens SGLang takes the end of the text out of the distribution, the oracle does not.
        return_log_probs=sampling["min_new_tokens"] == 0,
        hidden=spec,
        spans={name: resolved for name, (_, resolved) in spans.items()},
        heads=heads,
        head_spans={} if heads is None else heads.spans,
    )


def draw_heads(chance: random.Random) -> HeadSpec:
    """Draw some of the storm's heads, for some tokens; some end the response, where its score says so."""
    names = tuple(chance.sample(STORM_HEADS, chance.randint(1, len(STORM_HEADS))))
    segments = tuple(chance.sample(SEGMENTS, chance.randint(1, 3)))
    rule = f"{names[0]} {chance.choice('<>')} {chance.choice((-2, -0.5, 0, 0.5, 2))}"
    stop_when = rule if segments != ("prompt",) and chance.random() < 0.25 else None
    pooling = chance.choice((None, None, *POOLINGS))
    spans: dict[str, Span] = {"third": Every(3)} if chance.random() < 0.3 else {}
    return HeadSpec(names, segments, stop_when, pooling, spans)


def draw_state(chance: random.Random, segment: Any) -> At | Each:
    """Draw a span of states at a text: one that random tokens often have, splits of a character, or one that is not."""
    kind = chance.choice((At, Each))
    marker = chance.choice((" ", "e", "in", "the ", "\u00e9", "\n", "</think>"))
    where, pooling = chance.choice(("after", "before")), chance.choice((None, "spec", *POOLINGS))
    return kind(marker, where, segment, pooling=pooling)


def draw_windows(chance: random.Random, segment: Any) -> Window | Every:
    """Draw a window, which may go past the end or begin there, or rows at a distance."""
    pooling = chance.choice((None, "spec", *POOLINGS))
    if chance.random() < 0.5:
        return Every(chance.choice((1, 3, 16, 300)), segment, pooling=pooling)
    start = chance.choice((0, 1, 5, 30))
    return Window(start, start + chance.choice((1, 4, 200)), segment, pooling=pooling)


def draw_positions(chance: random.Random, span: At | Each | Window | Every, num_prompt: int) -> list[int]:
    """Return the positions of a span of a prompt. Where a marker stands is drawn: a policy searches for it."""
    positions = range(num_prompt)
    if isinstance(span, Window):
        return list(positions[span.start : span.stop])
    if isinstance(span, Every):
        return list(positions[:: span.n])
    most = 1 if isinstance(span, At) else 5
    return sorted(chance.sample(positions, chance.randint(0, min(most, num_prompt))))


def _intervals(places: list[int]) -> tuple[tuple[int, int], ...]:
    intervals: list[tuple[int, int]] = []
    for place in places:
        if intervals and intervals[-1][1] == place:
            intervals[-1] = (intervals[-1][0], place + 1)
        else:
            intervals.append((place, place + 1))
    return tuple(intervals)


# --- clients that are struck in the middle of a call ------------------------------------------------------------------


def _without_rows(request: Request) -> Request:
    """Return a request whose answer is small: a large one that nobody fetches stays in shared memory for minutes."""
    return request if request.hidden is None else replace(request, hidden=replace(request.hidden, tokens=False))


def cut_a_connection(server: LaunchedServer, requests: list[Request], chance: random.Random) -> None:
    """Cut the link of a call at a moment: its client is told, or it was done."""
    with bad_link(httpx.URL(server.url).port or 0) as link, SGLangServer(link.url) as client:
        timer = threading.Timer(chance.uniform(0, 2), link.cut)
        timer.start()
        with suppress(EngineUnreachableError):
            client.generate(requests)
        timer.join()


def cancel_a_call(server: LaunchedServer, requests: list[Request], chance: random.Random) -> None:
    """Give a call up at a moment, as a task that is cancelled does."""

    async def run() -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(client.agenerate(requests), chance.uniform(0, 2))

    with SGLangServer(server.url) as client:
        asyncio.run(run())


def kill_a_client(server: LaunchedServer, requests: list[Request], chance: random.Random) -> None:
    """Reset the connection of a call, as the system does with those of a process that was killed."""
    body = json.dumps(to_payload(requests, server.info, binary=False)).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 0)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(head.encode() + body)
        connection.settimeout(chance.uniform(0.01, 2))
        with suppress(TimeoutError):
            connection.recv(1)


STRIKES = (cut_a_connection, cancel_a_call, kill_a_client)


def storm(
    server: LaunchedServer,
    http: httpx.Client,
    model_dir: str,
    seed: int,
    *,
    calls: int = 100,
    most_rows: int = 5,
    callers: int = 12,
    aborts: int = ABORTS,
    draw: Callable[[random.Random], Request] = draw_request,
    faults: int = 0,
) -> int:
    """Send all requests, check every answer, and return how many there were.

    Args:
        server: of the model.
        http: to the same server.
        model_dir: the model, for Hugging Face.
        seed: of the requests.
        calls: of the engine, each with ``1 … most_rows`` requests.
        most_rows: see ``calls``.
        callers: calls at the same time.
        aborts: requests that are aborted meanwhile.
        draw: draws a request.
        faults: calls of clients that are struck meanwhile, of each kind of `STRIKES`.
    """
    for head in STORM_HEADS:
        server.push_head(head, storm_head(head, server.info.hidden_size))
    chance = random.Random(seed)
    batches = [[draw(chance) for _ in range(chance.randint(1, most_rows))] for _ in range(calls)]
    doomed = [(f"doomed-{seed}-{index}", draw(chance)) for index in range(aborts)]
    done = threading.Event()

    def abort_some() -> None:
        with ThreadPoolExecutor(4) as pool:
            for rid, request in doomed:
                payload = {
                    "rid": rid,
                    "input_ids": list(sent_ids_of(request)),
                    "image_data": list(request.images.data) if request.images is not None else None,
                    "sampling_params": {"max_new_tokens": 200, "min_new_tokens": 200},
                }
                answer = pool.submit(http.post, "/generate", json=payload)
                # Asked again until it holds: the first may come before the request does.
                while not answer.done() and not done.is_set():
                    http.post("/abort_request", json={"rid": rid})
                answer.result()

    with ThreadPoolExecutor(callers) as pool:
        aborting = pool.submit(abort_some)
        striking = [
            pool.submit(
                strike,
                server,
                [_without_rows(draw(chance)) for _ in range(4)],
                random.Random(f"{seed} {strike.__name__} {number}"),
            )
            for strike in STRIKES
            for number in range(faults)
        ]
        answers = list(pool.map(server.generate, batches))
        done.set()
        aborting.result()
        for one in striking:
            one.result()
    for requests, completions in zip(batches, answers, strict=True):
        for request, completion in zip(requests, completions, strict=True):
            assert_completion(request, completion, model_dir, NUM_LAYERS)
    return sum(map(len, batches))


def resident_bytes(server: LaunchedServer) -> int:
    process = psutil.Process(server.pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
