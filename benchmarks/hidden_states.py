"""What hidden states cost: five ways of asking one server for the same generation.

    plain          text, tokens and log-probs, no states
    pooled         the same, and two vectors a row: the means over prompt and response, pooled inside the server
    tokens         the same, and the state of every token, through memory that server and client share
    tokens, HTTP   the same, inside the answer, as from a server on another machine
    stock          the same by SGLang's own return_hidden_states: every token's state as JSON numbers; the client pools

All sides run in one go on one server: round after round, each side generates from the same prompts, with the prefix
cache emptied before each. Every round has prompts of its own. A ratio compares the two sides of one round, and what is
shown is the median over the rounds. Before that, tokens and pooled vectors of all sides are compared: sides that
computed other things are not compared in time.

Stock states have gaps where a prompt is computed in chunks, so that chunked prefill is off here, for all sides. They
also need memory: some 3 GB for each prompt of 2048 tokens on the wide model, in the server and here together.

    python benchmarks/hidden_states.py --model wide --prompts 2 --rounds 5
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serving import new_prompts, served, settle

from torchrl_sglang_hidden import HiddenSpec, SGLangServer
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses
from torchrl_sglang_hidden.spec.hidden import Segment

PLAIN, POOLED, TOKENS, TOKENS_HTTP, STOCK = "plain", "pooled", "tokens", "tokens, HTTP", "stock"
SEGMENTS: tuple[Segment, ...] = ("prompt", "response")
STATE_RTOL = 1e-4
TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Side:
    """One way of asking: what is asked for, and how the answer is to come."""

    name: str
    spec: HiddenSpec | None
    info: EngineInfo


@dataclass(frozen=True)
class Call:
    """One measured batch."""

    seconds: float
    http_bytes: int
    shared_bytes: int
    new_tokens: int
    completions: list[Completion]


def sides_of(info: EngineInfo) -> list[Side]:
    pooled = HiddenSpec(segments=SEGMENTS)
    # Both segments together are every position once.
    tokens = HiddenSpec(segments=SEGMENTS, pooling=None, tokens=True)
    stock = dataclasses.replace(info, pools_in_server=False)
    return [
        Side(PLAIN, None, info),
        Side(POOLED, pooled, info),
        *([Side(TOKENS, tokens, info)] if info.shares_memory else []),
        Side(TOKENS_HTTP, tokens, dataclasses.replace(info, shares_memory=False)),
        Side(STOCK, pooled, stock),
    ]


def measure(client: httpx.Client, side: Side, prompts: Sequence[Sequence[int]], new_tokens: int) -> Call:
    """Send one batch and read its answer, as `SGLangServer.generate` does; reading is part of the time."""
    sampling = {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
    requests = [Request(tuple(ids), sampling, hidden=side.spec) for ids in prompts]
    check_requests(requests, side.info)
    settle(client)
    start = time.perf_counter()
    response = client.post("/generate", json=to_payload(requests, side.info, binary=False))
    response.raise_for_status()
    answers = response.json()
    completions = read_responses(requests, answers, side.info)
    seconds = time.perf_counter() - start
    return Call(
        seconds=seconds,
        http_bytes=response.num_bytes_downloaded,
        shared_bytes=sum(map(shared_bytes_of, answers, completions)),
        new_tokens=sum(len(completion.response_ids) for completion in completions),
        completions=completions,
    )


def shared_bytes_of(answer: dict[str, Any], completion: Completion) -> int:
    """Count the bytes that came through shared memory: HTTP counts only the few that stay in the answer."""
    rows = completion.token_rows
    return rows.rows_ND.nbytes if rows is not None and "shared" in answer["meta_info"][CHANNEL][0]["rows"] else 0


def vectors_of(completion: Completion) -> dict[Segment, torch.Tensor]:
    """Return the two pooled vectors, as they came or pooled here from every token's states."""
    if completion.token_rows is None:
        return {segment: pooled.vector for segment, pooled in completion.hidden.items()}
    rows_ND = completion.token_rows.rows_ND.double()
    num_prompt = len(completion.prompt_ids)
    return {"prompt": rows_ND[:num_prompt].mean(0).float(), "response": rows_ND[num_prompt - 1 :].mean(0).float()}


def largest_difference(calls: dict[str, Call]) -> float:
    """Return each side's distance from the pooled side's vectors, relative to their length; other ids end the run."""
    worst = 0.0
    for name, call in calls.items():
        for row, (found, expected) in enumerate(zip(call.completions, calls[POOLED].completions, strict=True)):
            if found.response_ids != expected.response_ids:
                raise SystemExit(f"row {row}: {name!r} generated other tokens than {POOLED!r}; no ratio means anything")
            vectors = vectors_of(expected)
            for segment, vector_D in vectors_of(found).items() if name != PLAIN else ():
                error = float((vector_D - vectors[segment]).norm() / vectors[segment].norm())
                if not error < STATE_RTOL:
                    raise SystemExit(
                        f"row {row}: {segment} vectors of {name!r} and {POOLED!r} differ by {error:.1e} relative, over "
                        f"{STATE_RTOL:.0e}; no ratio means anything"
                    )
                worst = max(worst, error)
    return worst


def compare(server: SGLangServer, model: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    sides = sides_of(server.info)
    rounds: list[dict[str, Call]] = []
    worst = 0.0
    with (
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S, trust_env=False) as client,
        Progress(console=console, transient=True) as progress,
    ):
        task = progress.add_task(model, total=(args.rounds + 1) * len(sides))
        # Round 0 is for what is slow once, and is not counted.
        for number in range(args.rounds + 1):
            length = args.prompt_tokens if number else 16
            prompts = new_prompts(server.info, args.prompts, length, seed=number)
            calls = {}
            for side in sides:
                progress.update(task, description=f"{model}: round {number} of {args.rounds}, {side.name}")
                calls[side.name] = measure(client, side, prompts, args.new_tokens)
                progress.advance(task)
            worst = max(worst, largest_difference(calls))
            # What was compared is let go: all rounds' token states would fill the memory.
            if number:
                rounds.append({name: dataclasses.replace(call, completions=[]) for name, call in calls.items()})
    results = {side.name: summary(side.name, rounds) for side in sides}
    console.print(table_of(server, model, args, results, worst))
    return {"hidden_size": server.info.hidden_size, "worst_relative_difference": worst, "sides": results}


def summary(name: str, rounds: Sequence[dict[str, Call]]) -> dict[str, float]:
    median = statistics.median
    return {
        "seconds": median(calls[name].seconds for calls in rounds),
        "fastest_s": min(calls[name].seconds for calls in rounds),
        "slowest_s": max(calls[name].seconds for calls in rounds),
        "new_tokens_per_s": median(calls[name].new_tokens / calls[name].seconds for calls in rounds),
        "speed_of_plain": median(calls[PLAIN].seconds / calls[name].seconds for calls in rounds),
        "http_bytes": median(calls[name].http_bytes for calls in rounds),
        "shared_memory_bytes": median(calls[name].shared_bytes for calls in rounds),
        "speed_of_stock": median(calls[STOCK].seconds / calls[name].seconds for calls in rounds),
        "http_bytes_of_stock": median(calls[name].http_bytes / calls[STOCK].http_bytes for calls in rounds),
    }


def table_of(
    server: SGLangServer, model: str, args: argparse.Namespace, results: dict[str, dict[str, float]], worst: float
) -> Table:
    title = (
        f"{model}, D = {server.info.hidden_size}, {args.dtype}: {args.prompts} prompts × {args.prompt_tokens} tokens, "
        f"{args.new_tokens} new tokens each, medians of {args.rounds} rounds"
    )
    caption = f"same tokens on all sides; pooled vectors differ by at most {worst:.0e} relative"
    table = Table(title=title, caption=caption)
    table.add_column("side")
    headings = ("s", "fastest – slowest", "new tokens/s", "speed / plain", "speed / stock", "HTTP MB", "shared MB")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['seconds']:.2f}",
            f"{result['fastest_s']:.2f} – {result['slowest_s']:.2f}",
            f"{result['new_tokens_per_s']:.1f}",
            f"{result['speed_of_plain']:.2f}",
            f"{result['speed_of_stock']:.1f}",
            f"{result['http_bytes'] / 1e6:.2f}",
            f"{result['shared_memory_bytes'] / 1e6:.2f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", help="smollm2, wide, a directory or a hub name; may be repeated; default both"
    )
    parser.add_argument("--prompts", type=int, default=2, help="prompts in a batch")
    parser.add_argument("--prompt-tokens", type=int, default=2048, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens generated from each prompt")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--dtype", default="float32", help="of weights and states")
    args = parser.parse_args()
    # Piped output has no width of its own, and rich would take 80 columns.
    console = Console(width=None if Console().is_terminal else 140)
    console.print((__doc__ or "").rpartition("\n\n    python")[0].strip(), highlight=False, markup=False)
    per_row = args.prompt_tokens + args.new_tokens
    results = {}
    for model in args.model or ("smollm2", "wide"):
        # A page and a bit for each row beside its tokens.
        total = args.prompts * (per_row + 64)
        with served(model, dtype=args.dtype, context_length=per_row + 64, total_tokens=total) as server:
            results[model] = compare(server, model, args, console)
    setting = {key: value for key, value in vars(args).items() if key != "model"}
    print(json.dumps({"benchmark": "hidden_states", **setting, "models": results}))


if __name__ == "__main__":
    main()
