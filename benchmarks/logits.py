"""What logits and constraints cost, against plain generation and against what stock SGLang has in their place.

    plain               text, tokens and log-probs
    mask                the same under an action mask of its own for each row, half of the vocabulary
    top_k               the same as plain, and the k largest logits of every token, with their ids
    token_ids           the same, and the logits of k tokens
    full                the same, and the logits of the whole vocabulary, through memory that server and client share
    full, bf16          likewise, half the bytes
    full, HTTP          the same as full inside the answer, as from a server on another machine
    top_logprobs_num    stock SGLang: the k largest log-probs of every token, as JSON
    token_ids_logprob   stock SGLang: the log-probs of k tokens, as JSON

All sides run in one go on one server: round after round, each side generates from the same prompts, greedily, with the
prefix cache emptied before each. A ratio compares two sides of one round, and what is shown is the median over the
rounds. Before that the sides are compared: all but the masked one must have the same tokens, the log-softmax of the
full logits must be stock's log-probs, the other selections must be columns of the full logits, and no masked row may
have a token outside its mask.

    python benchmarks/logits.py --prompts 16 --rounds 5
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serving import new_prompts, served, settle

from torchrl_sglang_hidden import ActionMask, LogitsSpec, SGLangServer
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses

PLAIN, MASK, FULL, FULL_BF16, FULL_HTTP = "plain", "mask", "full", "full, bf16", "full, HTTP"
TOP_K, TOKEN_IDS, STOCK_TOP_K, STOCK_IDS = "top_k", "token_ids", "top_logprobs_num", "token_ids_logprob"
STOCK = {TOP_K: STOCK_TOP_K, TOKEN_IDS: STOCK_IDS}
# Of float32 logits of another kernel's shape; bfloat16 keeps 8 bits.
ATOL, ATOL_BF16 = 1e-3, 0.25
TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Side:
    """One way of asking: what is asked for, what of it is SGLang's own, and how the answer is to come."""

    name: str
    info: EngineInfo
    spec: LogitsSpec | None = None
    masked: bool = False
    stock: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One measured batch."""

    seconds: float
    http_bytes: int
    completions: list[Completion]
    answers: list[dict[str, Any]]


def sides_of(info: EngineInfo, k: int) -> list[Side]:
    ids = tuple(range(100, 100 + k))
    http = dataclasses.replace(info, shares_memory=False)
    return [
        Side(PLAIN, info),
        Side(MASK, info, masked=True),
        Side(TOP_K, info, LogitsSpec(top_k=k)),
        Side(TOKEN_IDS, info, LogitsSpec(token_ids=ids)),
        *([Side(FULL, info, LogitsSpec(full=True))] if info.shares_memory else []),
        *([Side(FULL_BF16, info, LogitsSpec(full=True, dtype=torch.bfloat16))] if info.shares_memory else []),
        Side(FULL_HTTP, http, LogitsSpec(full=True)),
        Side(STOCK_TOP_K, info, stock={"top_logprobs_num": k}),
        Side(STOCK_IDS, info, stock={"token_ids_logprob": list(ids)}),
    ]


def masks_of(info: EngineInfo, rows: int) -> list[ActionMask]:
    """Allow half of the vocabulary, another half for each row."""
    generator = torch.Generator().manual_seed(0)
    return [ActionMask.from_mask(torch.rand(info.vocab_size, generator=generator) < 0.5) for _ in range(rows)]


def measure(
    client: httpx.Client, side: Side, prompts: Sequence[Sequence[int]], masks: Sequence[ActionMask], new_tokens: int
) -> Call:
    """Send one batch and read its answer, as `SGLangServer.generate` does; writing and reading are part of the time."""
    sampling = {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
    settle(client)
    start = time.perf_counter()
    requests = [
        Request(tuple(ids), sampling, logits=side.spec, constraints=(mask,) if side.masked else ())
        for ids, mask in zip(prompts, masks, strict=True)
    ]
    check_requests(requests, side.info)
    response = client.post("/generate", json={**to_payload(requests, side.info, binary=False), **side.stock})
    response.raise_for_status()
    answers = response.json()
    completions = read_responses(requests, answers, side.info)
    for answer in answers if side.stock else ():
        _stock_log_probs(answer)
    return Call(time.perf_counter() - start, response.num_bytes_downloaded, completions, answers)


def _stock_log_probs(answer: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn stock SGLang's log-probs and their ids into tensors ``[T, k]``, as every other side returns tensors."""
    meta = answer["meta_info"]
    entries = meta.get("output_top_logprobs") or meta["output_token_ids_logprobs"]
    return (
        torch.tensor([[entry[0] for entry in token] for token in entries]),
        torch.tensor([[entry[1] for entry in token] for token in entries]),
    )


def check(calls: dict[str, Call], masks: Sequence[ActionMask]) -> float:
    """Return each side's distance from the values of the full logits; sides that disagree end the run."""
    worst = 0.0
    full = calls.get(FULL, calls[FULL_HTTP])
    for row, mask in enumerate(masks):
        allowed = set(mask.valid_token_ids)
        if not set(calls[MASK].completions[row].response_ids) <= allowed:
            raise SystemExit(f"row {row}: a token outside its mask; no ratio means anything")
        logits_TV = full.completions[row].logits.values_NC
        for name, call in calls.items():
            if name != MASK and call.completions[row].response_ids != full.completions[row].response_ids:
                raise SystemExit(f"row {row}: {name!r} generated other tokens than {FULL!r}; no ratio means anything")
            found = call.completions[row].logits
            if name in STOCK.values():
                values, ids = _stock_log_probs(call.answers[row])
                expected = logits_TV.log_softmax(-1).gather(1, ids)
            elif found is None:
                continue
            elif found.values_NC.shape == logits_TV.shape:
                values, expected = found.values_NC.float(), logits_TV
            elif found.token_ids_NC is not None:
                values, expected = found.values_NC, logits_TV.gather(1, found.token_ids_NC)
            else:
                values, expected = found.values_NC, logits_TV[:, 100 : 100 + found.values_NC.shape[1]]
            error = float((values - expected).abs().max())
            if not error < (ATOL_BF16 if name == FULL_BF16 else ATOL):
                raise SystemExit(
                    f"row {row}: values of {name!r} are {error:.1e} off {FULL!r}'s; no ratio means anything"
                )
            worst = worst if name == FULL_BF16 else max(worst, error)
    return worst


def compare(server: SGLangServer, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    sides = sides_of(server.info, args.columns)
    masks = masks_of(server.info, args.prompts)
    rounds: list[dict[str, Call]] = []
    worst = 0.0
    with (
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S, trust_env=False) as client,
        Progress(console=console, transient=True) as progress,
    ):
        task = progress.add_task("", total=(args.rounds + 1) * len(sides))
        # Round 0 is for what is slow once, and is not counted.
        for number in range(args.rounds + 1):
            prompts = new_prompts(server.info, args.prompts, args.prompt_tokens, seed=number)
            calls = {}
            for side in sides:
                progress.update(task, description=f"round {number} of {args.rounds}, {side.name}")
                calls[side.name] = measure(client, side, prompts, masks, args.new_tokens)
                progress.advance(task)
            worst = max(worst, check(calls, masks))
            # What was compared is let go: all rounds' logits would fill the memory.
            if number:
                rounds.append({n: dataclasses.replace(c, completions=[], answers=[]) for n, c in calls.items()})
    results = {side.name: summary(side.name, rounds) for side in sides}
    console.print(table_of(args, results, worst))
    return {"vocab_size": server.info.vocab_size, "worst_difference": worst, "sides": results}


def summary(name: str, rounds: Sequence[dict[str, Call]]) -> dict[str, float]:
    median = statistics.median
    out = {
        "seconds": median(calls[name].seconds for calls in rounds),
        "fastest_s": min(calls[name].seconds for calls in rounds),
        "slowest_s": max(calls[name].seconds for calls in rounds),
        "time_of_plain": median(calls[name].seconds / calls[PLAIN].seconds for calls in rounds),
        "http_bytes": median(calls[name].http_bytes for calls in rounds),
    }
    if name in STOCK:
        stock = STOCK[name]
        out["time_of_stock"] = median(calls[name].seconds / calls[stock].seconds for calls in rounds)
        out["http_bytes_of_stock"] = median(calls[name].http_bytes / calls[stock].http_bytes for calls in rounds)
    return out


def table_of(args: argparse.Namespace, results: dict[str, dict[str, float]], worst: float) -> Table:
    title = (
        f"{args.model}, {args.dtype}: {args.prompts} prompts × {args.prompt_tokens} tokens, {args.new_tokens} new "
        f"tokens each, k = {args.columns}, medians of {args.rounds} rounds"
    )
    table = Table(title=title, caption=f"same tokens on all sides but the masked; values differ by at most {worst:.0e}")
    table.add_column("side")
    for heading in ("s", "fastest – slowest", "time / plain", "time / stock", "HTTP MB"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['seconds']:.2f}",
            f"{result['fastest_s']:.2f} – {result['slowest_s']:.2f}",
            f"{result['time_of_plain']:.2f}",
            f"{result['time_of_stock']:.2f}" if "time_of_stock" in result else "",
            f"{result['http_bytes'] / 1e6:.2f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, wide, a directory or a hub name")
    parser.add_argument("--prompts", type=int, default=16, help="prompts in a batch")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens generated from each prompt")
    parser.add_argument("--columns", type=int, default=20, help="k: columns of top_k and token_ids")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    args = parser.parse_args()
    # Piped output has no width of its own, and rich would take 80 columns.
    console = Console(width=None if Console().is_terminal else 140)
    console.print((__doc__ or "").rpartition("\n\n    python")[0].strip(), highlight=False, markup=False)
    per_row = args.prompt_tokens + args.new_tokens + 64
    with served(
        args.model, dtype=args.dtype, context_length=per_row + 64, total_tokens=args.prompts * (per_row + 64)
    ) as server:
        results = compare(server, args, console)
    print(json.dumps({"benchmark": "logits", **vars(args), **results}))


if __name__ == "__main__":
    main()
