"""One step of a rollout through two TorchRL policies on the same server, both greedy, from the same prompts.

    torchrl    torchrl's own SGLangWrapper: text, tokens and log-probs, one blocking request after another
    hidden     SGLangHiddenWrapper: the same and pooled states of prompt and response, one request for the batch

Round after round the two take turns, the prefix cache emptied before each. Both must have generated the same tokens;
otherwise no ratio is shown. A ratio compares the two sides of one round, and what is shown is the median of the rounds.

    python benchmarks/rollout.py --prompts 32 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serving import new_prompts, served, settle
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.modules.llm.backends.sglang import AsyncSGLang
from torchrl.modules.llm.policies import SGLangWrapper, Tokens
from transformers import AutoTokenizer

from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper, SGLangServer

TORCHRL, HIDDEN = "torchrl", "hidden"


def batch_of(prompts: Sequence[Sequence[int]]) -> TensorDictBase:
    return lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(ids)), batch_size=()) for ids in prompts])


def policies_of(server: SGLangServer, new_tokens: int) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "tokenizer": AutoTokenizer.from_pretrained(server.info.tokenizer_path),
        "input_mode": "tokens",
        "generate_kwargs": {"max_new_tokens": new_tokens, "temperature": 0.0},
    }
    return {
        TORCHRL: SGLangWrapper(AsyncSGLang.connect(server.url), **shared),
        HIDDEN: SGLangHiddenWrapper(server, hidden=HiddenSpec(segments=("prompt", "response")), **shared),
    }


def responses_of(out: TensorDictBase) -> list[list[int]]:
    return [ids.tolist() for ids in out.get(("tokens", "response"), as_list=True)]


def run(server: SGLangServer, args: argparse.Namespace, console: Console) -> tuple[dict[str, list[float]], int]:
    """Seconds of each side and round, and the new tokens of a round."""
    policies = policies_of(server, args.new_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    counts = []
    with (
        httpx.Client(base_url=server.url, trust_env=False, timeout=60.0) as client,
        Progress(console=console, transient=True) as progress,
    ):
        task = progress.add_task("", total=(args.rounds + 1) * len(policies))
        # Round 0 is for what is slow once, and is not counted.
        for number in range(args.rounds + 1):
            prompts = new_prompts(server.info, args.prompts if number else 2, args.prompt_tokens, seed=number)
            found = {}
            for name, policy in policies.items():
                progress.update(task, description=f"round {number} of {args.rounds}, {name}")
                batch = batch_of(prompts)
                settle(client)
                start = time.perf_counter()
                out = policy(batch)
                if number:
                    seconds[name].append(time.perf_counter() - start)
                found[name] = responses_of(out)
                progress.advance(task)
            if found[TORCHRL] != found[HIDDEN]:
                wrong = [row for row in range(len(prompts)) if found[TORCHRL][row] != found[HIDDEN][row]]
                raise SystemExit(f"round {number}: the two generated other tokens in rows {wrong}; no ratio holds")
            if number:
                counts.append(sum(map(len, found[HIDDEN])))
    return seconds, round(statistics.mean(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, wide, a directory or a hub name")
    parser.add_argument("--prompts", type=int, default=32, help="rows of the batch")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="at most, for each prompt")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--dtype", default="float32", help="of weights and states")
    args = parser.parse_args()
    # torchrl logs every connection and the first request.
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    # Piped output has no width of its own, and rich would take 80 columns.
    console = Console(width=None if Console().is_terminal else 140)
    console.print((__doc__ or "").rpartition("\n\n    python")[0].strip(), highlight=False, markup=False)
    per_row = args.prompt_tokens + args.new_tokens + 64
    with served(args.model, dtype=args.dtype, context_length=per_row, total_tokens=args.prompts * per_row) as server:
        seconds, new_tokens = run(server, args, console)
    ratio = statistics.median(a / b for a, b in zip(seconds[TORCHRL], seconds[HIDDEN], strict=True))
    title = f"{args.model}, {args.dtype}: {args.prompts} prompts × {args.prompt_tokens} tokens, {args.rounds} rounds"
    table = Table(title=title)
    table.add_column("side")
    for heading in ("s", "fastest – slowest", "new tokens/s"):
        table.add_column(heading, justify="right")
    for name, times in seconds.items():
        middle = statistics.median(times)
        table.add_row(name, f"{middle:.2f}", f"{min(times):.2f} – {max(times):.2f}", f"{new_tokens / middle:.1f}")
    console.print(table)
    console.print(
        f"Same tokens on both sides, {new_tokens} a round; hidden is {ratio:.1f} times as fast.", highlight=False
    )
    medians = {f"{name}_s": statistics.median(times) for name, times in seconds.items()}
    results = {**medians, "new_tokens_a_round": new_tokens, "speed_of_torchrl": ratio}
    print(json.dumps({"benchmark": "rollout", **vars(args), **results}))


if __name__ == "__main__":
    main()
