"""What the server half costs those who do not ask: plain generation on a server with it and on one without.

Two servers of one model stand side by side, and idle ones sleep. Round after round each generates from the same
prompts, with its prefix cache emptied before; which of them goes first changes. A ratio compares the two of one round,
and what is shown is the median over the rounds. Before that the tokens of both are compared.

    python benchmarks/idle_server_half.py --model wide --rounds 9
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from contextlib import ExitStack

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serving import new_prompts, served, settle

from torchrl_sglang_hidden import SGLangServer
from torchrl_sglang_hidden.protocol import PLUGIN_ENV
from torchrl_sglang_hidden.records import Request

WITH, WITHOUT = "with the server half", "without"


def measure(server: SGLangServer, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[tuple[int, ...]]]:
    sampling = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "temperature": 0.0}
    with httpx.Client(base_url=server.url, timeout=600) as client:
        settle(client)
    start = time.perf_counter()
    completions = server.generate([Request(tuple(ids), sampling) for ids in prompts])
    return time.perf_counter() - start, [completion.response_ids for completion in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, wide, a directory or a hub name")
    parser.add_argument("--prompts", type=int, default=8, help="rows of the batch")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens generated from each prompt")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count")
    parser.add_argument("--dtype", default="float32", help="of weights and states")
    args = parser.parse_args()
    console = Console(width=None if Console().is_terminal else 140)
    console.print((__doc__ or "").rpartition("\n\n    python")[0].strip(), highlight=False, markup=False)
    per_row = args.prompt_tokens + args.new_tokens + 64
    seconds: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    with ExitStack() as stack:
        servers = {}
        for name, switch in ((WITH, "1"), (WITHOUT, "0")):
            os.environ[PLUGIN_ENV] = switch
            sizes = {"context_length": per_row, "total_tokens": args.prompts * per_row}
            servers[name] = stack.enter_context(served(args.model, dtype=args.dtype, sleep_on_idle=True, **sizes))
        progress = stack.enter_context(Progress(console=console, transient=True))
        # The first round warms up, and does not count.
        for number in progress.track(range(args.rounds + 1), description="rounds"):
            prompts = new_prompts(servers[WITH].info, args.prompts, args.prompt_tokens, seed=number)
            names = [WITH, WITHOUT] if number % 2 else [WITHOUT, WITH]
            found = {name: measure(servers[name], prompts, args.new_tokens) for name in names}
            if found[WITH][1] != found[WITHOUT][1]:
                raise SystemExit(f"round {number}: the two generated other tokens; no ratio holds")
            if number:
                for name, (elapsed, _) in found.items():
                    seconds[name].append(elapsed)
    ratio = statistics.median(a / b for a, b in zip(seconds[WITHOUT], seconds[WITH], strict=True))
    table = Table(
        title=f"{args.model}, {args.dtype}: {args.prompts} × ({args.prompt_tokens} + {args.new_tokens}) tokens"
    )
    for heading in ("server", "s", "fastest – slowest"):
        table.add_column(heading)
    for name, times in seconds.items():
        table.add_row(name, f"{statistics.median(times):.3f}", f"{min(times):.3f} – {max(times):.3f}")
    console.print(table)
    console.print(f"Same tokens; speed with it / without: {ratio:.3f}", highlight=False)
    medians = {"with_s": statistics.median(seconds[WITH]), "without_s": statistics.median(seconds[WITHOUT])}
    print(json.dumps({"benchmark": "idle_server_half", **vars(args), **medians, "speed_of_without": ratio}))


if __name__ == "__main__":
    main()
