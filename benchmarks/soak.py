"""Load, and a soak: many callers of one server, whose answers are those of the same requests asked one at a time.

First every request is asked alone. Then come 64 threads on one client, 4096 rows in one call, and 512 requests side by
side, with pooling, logits and constraints mixed; then, until the time is up, everything by turns: threads, policies,
streams, sessions, a queue, an event loop, and callers that give up in the middle. Between the turns nothing is under
way, and memory, descriptors and threads of the client and of all the server's processes are read. At last a server with
a queue of few requests gets more than that: each is answered, or refused by name.

The program ends with 1 when an answer is wrong, when something grows, or when something is left over.

    python benchmarks/soak.py --seconds 600
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress
from rounds import CONSOLE, environment
from soak_checks import NUM_KINDS, POOLED, Holding, Score, growth, holding, make_requests
from soak_report import to_markdown, to_table
from wide_model import save_random_wide

from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper, SGLangServer, launch, ragged
from torchrl_sglang_hidden.engines import BatchingEngine
from torchrl_sglang_hidden.errors import EngineError
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.shared_memory import DIRECTORY
from torchrl_sglang_hidden.records import Completion, Request

RESULTS = Path(__file__).parent / "results"
QUEUED, RUNNING, TOO_MANY = 8, 4, 64
SESSION_TURNS = 2


class Soak:
    """Callers of one server, and what the same requests came to alone.

    Args:
        engine: a client of the server.
        pid: the server's first process.
        requests: of all kinds, see `make_requests`.
        seed: of what the callers do.
        tokenizer: the policy's; None for the server's own.
    """

    def __init__(
        self, engine: SGLangServer, pid: int, requests: Sequence[Request], seed: int = 0, tokenizer: Any = None
    ) -> None:
        self.engine, self.pid, self.requests = engine, pid, list(requests)
        self.score, self.chance = Score(), random.Random(seed)
        self.alone: list[Completion] = []
        self.client_holds: list[Holding] = []
        self.server_holds: list[Holding] = []
        self.acts = (self.call, self.call_policy, self.stream, self.converse, self.join_queue)
        self._queue = BatchingEngine(engine, min_batch_size=4, timeout_s=0.2)
        self.policy = SGLangHiddenWrapper(
            engine,
            input_mode="tokens",
            tokenizer=tokenizer,
            hidden=HiddenSpec(("prompt", "response")),
            generate_kwargs={"temperature": 0.0, "ignore_eos": True},
            return_log_probs=True,
        )

    # --- the same requests, alone and together ----------------------------------------------------------------------

    def ask_alone(self) -> None:
        """Ask each request while nobody else asks anything."""
        self.alone = [self.engine.generate([request])[0] for request in self.requests]

    def _check(self, what: str, numbers: Sequence[int], found: Sequence[Completion]) -> None:
        if len(numbers) != len(found):
            self.score.fail(f"{what}: {len(found)} completions of {len(numbers)} requests")
            return
        for number, completion in zip(numbers, found, strict=True):
            self.score.compare(what, self.requests[number], completion, self.alone[number])

    def _draw(self, count: int, chance: random.Random | None = None) -> list[int]:
        return (chance or self.chance).choices(range(len(self.requests)), k=count)

    def one_call(self, rows: int) -> float:
        """Send so many rows in one call; return its seconds."""
        numbers = self._draw(rows)
        start = time.perf_counter()
        self._check("one call", numbers, self.engine.generate([self.requests[number] for number in numbers]))
        return time.perf_counter() - start

    def side_by_side(self, count: int) -> float:
        """Send so many requests at once from one event loop, each on a connection of its own; return the seconds."""
        numbers = self._draw(count)

        async def run() -> list[list[Completion]]:
            calls = [self.engine.agenerate([self.requests[number]]) for number in numbers]
            try:
                return await asyncio.gather(*calls)
            finally:
                await self.engine.close_event_loop()

        start = time.perf_counter()
        found = asyncio.run(run())
        self._check("side by side", numbers, [completion for (completion,) in found])
        return time.perf_counter() - start

    def threads(self, count: int, act: Callable[[random.Random], None], *, times: int = 1) -> float:
        """Let so many threads do something at the same moment, each so many times; return the seconds."""
        start_together = threading.Barrier(count)
        seeds = [self.chance.random() for _ in range(count)]

        def run(seed: float) -> None:
            chance = random.Random(seed)
            start_together.wait()
            for _ in range(times):
                act(chance)

        start = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(run, seeds))
        return time.perf_counter() - start

    # --- what a thread does -----------------------------------------------------------------------------------------

    def call(self, chance: random.Random) -> None:
        """Send a few rows."""
        numbers = self._draw(chance.randint(1, 4), chance)
        self._check("thread", numbers, self.engine.generate([self.requests[number] for number in numbers]))

    def call_policy(self, chance: random.Random) -> None:
        """Call the policy that all threads share."""
        number = chance.randrange(POOLED, len(self.requests), NUM_KINDS)
        request = self.requests[number]
        options = {"max_new_tokens": request.sampling["max_new_tokens"]}
        out = self.policy(ragged(tokens=[list(request.prompt_ids)]), **options)
        response = tuple(out.get(("tokens", "response"), as_list=True)[0].tolist())
        vectors = {"prompt": out["hidden_states"].prompt[0], "response": out["hidden_states"].response[0]}
        alone = self.alone[number]
        found = dataclasses.replace(
            alone,
            response_ids=response,
            log_probs_T=out.get(("log_probs", "response"), as_list=True)[0],
            hidden={name: dataclasses.replace(pooled, vector=vectors[name]) for name, pooled in alone.hidden.items()},
        )
        self._check("policy", [number], [found])

    def stream(self, chance: random.Random) -> None:
        """Read a stream to its end, or give it up after its first chunk."""
        number = self._draw_generating(chance)
        with self.engine.stream(self.requests[number]) as stream:
            if chance.random() < 0.3:
                next(stream)
                return
            for _ in stream:
                pass
            self._check("stream", [number], [stream.completion])

    def converse(self, chance: random.Random) -> None:
        """Take turns in a session; the first one is a request that was asked alone."""
        number = self._draw_generating(chance)
        with self.engine.session() as session:
            self._check("session", [number], [session.generate(self.requests[number])])
            for _ in range(SESSION_TURNS - 1):
                session.generate(Request(self.requests[number].prompt_ids[:4], {"max_new_tokens": 2}))

    def join_queue(self, chance: random.Random) -> None:
        """Send a row through the queue that all threads share."""
        numbers = self._draw(1, chance)
        self._check("queue", numbers, self._queue.generate([self.requests[number] for number in numbers]))

    def _draw_generating(self, chance: random.Random) -> int:
        generating = [number for number, one in enumerate(self.requests) if not one.reads_only]
        return chance.choice(generating)

    def give_up(self) -> None:
        """Cancel calls in the middle, whereupon the server drops their requests."""

        async def run() -> None:
            numbers = self._draw(16)
            tasks = [asyncio.ensure_future(self.engine.agenerate([self.requests[number]])) for number in numbers]
            try:
                await asyncio.sleep(0.02)
                for task in tasks[::2]:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
            finally:
                await self.engine.close_event_loop()
            for number, result in zip(numbers, results, strict=True):
                if isinstance(result, list):
                    self._check("beside those who gave up", [number], result)
                elif not isinstance(result, asyncio.CancelledError):
                    self.score.fail(f"beside those who gave up: {result!r}")

        asyncio.run(run())

    def everything(self, count: int) -> None:
        """Let so many threads do everything once, then an event loop, and callers that give up."""
        self.threads(count, lambda chance: chance.choice(self.acts)(chance))
        self.side_by_side(count)
        self.give_up()

    # --- what is left -----------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Read what client and server hold while nothing is under way."""
        self.client_holds.append(holding(None, with_children=False))
        self.server_holds.append(holding(self.pid, with_children=True))

    def left_over(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """Return what the server half still holds for requests, once SGLang has dropped those that were given up."""
        deadline = time.monotonic() + timeout_s
        while True:
            with httpx.Client(base_url=self.engine.url, trust_env=False, timeout=30) as client:
                status = client.get("/server_info").json()["internal_states"][0][CHANNEL]
            token = str(status["shared"]).removesuffix("-here")
            files = [path.name for path in DIRECTORY.glob(f"{token}-*") if path.name != status["shared"]]
            left = {"open_pools": status["open_pools"], "shared_files": len(files)}
            if not any(left.values()) or time.monotonic() > deadline:
                return left
            time.sleep(0.2)


def refuse_too_many(engine: SGLangServer, requests: Sequence[Request], score: Score) -> dict[str, int]:
    """Send more requests at once than the server queues; return how many were answered and how many refused."""
    counts = {"answered": 0, "refused": 0}
    lock = threading.Lock()

    def send(request: Request) -> None:
        try:
            engine.generate([request])
        except EngineError as error:
            if "queue is full" not in str(error):
                score.fail(f"back-pressure: {type(error).__name__}: {error}")
            with lock:
                counts["refused"] += 1
        else:
            with lock:
                counts["answered"] += 1

    with ThreadPoolExecutor(len(requests)) as pool:
        list(pool.map(send, requests))
    engine.generate([requests[0]])  # and it goes on
    return counts


def soak(
    engine: SGLangServer, pid: int, *, seconds: float, threads: int, rows: int, concurrent: int, kinds: int,
    most_prompt: int, most_new: int, seed: int,
) -> tuple[Soak, dict[str, Any]]:  # fmt: skip
    """Run everything but the back-pressure on one server.

    Args:
        engine: a client of the server.
        pid: the server's first process.
        seconds: for everything by turns.
        threads: threads at the same time.
        rows: rows of the one large call.
        concurrent: requests side by side.
        kinds: how many different requests.
        most_prompt: tokens of the longest prompt.
        most_new: tokens of the longest response.
        seed: of everything.

    Returns:
        The soak with its score, and its figures.
    """
    requests = make_requests(engine.info, kinds, seed, most_prompt=most_prompt, most_new=most_new)
    run = Soak(engine, pid, requests, seed)
    with Progress(console=CONSOLE, transient=True) as progress:
        task = progress.add_task("one at a time", total=seconds)
        run.ask_alone()
        progress.update(task, description=f"{threads} threads")
        figures: dict[str, Any] = {"threads_s": run.threads(threads, run.call, times=2)}
        progress.update(task, description=f"{rows} rows in one call")
        figures["rows_s"] = run.one_call(rows)
        progress.update(task, description=f"{concurrent} requests side by side")
        figures["concurrent_s"] = run.side_by_side(concurrent)
        start, turns = time.monotonic(), 0
        while time.monotonic() - start < seconds or turns < 1:
            run.everything(threads)
            turns += 1
            run.rest()
            answered = run.score.right + run.score.ties
            progress.update(task, description=f"turn {turns}, {answered} rows", completed=time.monotonic() - start)
    return run, {**figures, "turns": turns, "left_over": run.left_over()}


def summarize(run: Soak, figures: dict[str, Any], *, most_bytes: int, most_count: int) -> tuple[dict[str, Any], bool]:
    """Return the record of a soak, and whether everything held."""
    warm = min(len(run.client_holds) // 4, 5)
    limits = {"most_bytes": most_bytes, "most_count": most_count}
    sides = {
        "client": growth(run.client_holds[warm:], **limits),
        "server": growth(run.server_holds[warm:], **limits),
    }
    score = run.score
    grew = [f"{side} {name}" for side, table in sides.items() for name, row in table.items() if row["grew"]]
    record = {
        "right": score.right, "ties": score.ties, "wrong": score.wrong[:20], "num_wrong": len(score.wrong),
        "worst_state": score.worst_state, "worst_log_prob": score.worst_log_prob, **figures, "grew": grew, **sides,
    }  # fmt: skip
    return record, not score.wrong and not grew and not any(figures["left_over"].values())


def main() -> int:
    """Run the soak of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory; by default a small random model, on which the server is quick")
    parser.add_argument("--seconds", type=float, default=600.0, help="for everything by turns")
    parser.add_argument("--threads", type=int, default=64, help="threads on one client")
    parser.add_argument("--rows", type=int, default=4096, help="rows of the one large call")
    parser.add_argument("--concurrent", type=int, default=512, help="requests side by side")
    parser.add_argument("--kinds", type=int, default=96, help="different requests")
    parser.add_argument("--most-prompt", type=int, default=96, help="tokens of the longest prompt")
    parser.add_argument("--most-new", type=int, default=12, help="tokens of the longest response")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--most-mib", type=int, default=64, help="MiB that memory may differ between first and last third"
    )
    parser.add_argument("--most-count", type=int, default=4, help="by which descriptors and threads may differ")
    parser.add_argument("--write", action="store_true", help="write the record to benchmarks/results/soak.json")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in
             ("seconds", "threads", "rows", "concurrent", "kinds", "most_prompt", "most_new", "seed")}  # fmt: skip
    with ExitStack() as stack:
        model = args.model
        if model is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = str(save_random_wide(directory / "small", layers=3, hidden_size=64, initializer_range=0.3))
        with launch(model, dtype="float32", sleep_on_idle=True, max_running_requests=256) as engine:
            run, figures = soak(engine, engine.pid, **sizes)
        few = {"max_running_requests": RUNNING, "max_queued_requests": QUEUED}
        with launch(model, dtype="float32", sleep_on_idle=True, **few) as engine:
            figures["back_pressure"] = refuse_too_many(engine, run.requests[:TOO_MANY], run.score)
    record, held = summarize(run, figures, most_bytes=args.most_mib * 2**20, most_count=args.most_count)
    CONSOLE.print(to_table(record))
    for line in record["wrong"]:
        CONSOLE.print(line, highlight=False, markup=False)
    line = json.dumps({"benchmark": "soak", **sizes, "held": held, **record, **environment()})
    if args.write:
        (RESULTS / "soak.json").write_text(json.dumps(json.loads(line), indent=1) + "\n", encoding="utf-8")
        (RESULTS / "soak.md").write_text(to_markdown(json.loads(line)), encoding="utf-8")
    print(line)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
