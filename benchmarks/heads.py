"""What small heads cost: scores of a head for each token, beside the same generation without.

    plain      text, tokens and log-probs
    linear     the same, and a number for each response token by a linear head: what the bookkeeping costs
    million    the same by a two-layer head of a million parameters
    tokens     the same as plain, and the state of each response token, of which a client could make the score itself

The scores are compared with those that the head makes here of the states before a ratio is shown. Beside the time of a
call stands the processor time of the server's processes, which other programs on the machine disturb less. The wide
model has six million parameters a layer, where a model of its width has two hundred: with one layer it is a model
against which a head of a million is not small.

    python benchmarks/heads.py --model wide --wide-layers 32 --prompts 128 --prompt-tokens 64 --new-tokens 32
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rounds import CONSOLE, Call, DifferentAnswersError, Rounds, print_record, read_arguments, same_tokens, take_turns
from serving import ask, client_of, greedy, new_prompts, response_ids, served

from torchrl_sglang_hidden import Head, HeadSpec, HiddenSpec
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.records import Request

PLAIN, LINEAR, MILLION, TOKENS = "plain", "linear", "million", "tokens"
CPU = "server_cpu_s"
PARAMETERS = 10**6
SCORE_ATOL = 1e-3


def make_head(hidden_size: int, parameters: int = PARAMETERS) -> Head:
    """Make a random two-layer head of about so many parameters, whose scores are of the order of 1."""
    width = max(parameters // (hidden_size + 2), 1)
    drawn = torch.Generator().manual_seed(0)
    tensors = {
        "hidden.weight": torch.randn(width, hidden_size, generator=drawn) / math.sqrt(hidden_size),
        "hidden.bias": torch.zeros(width),
        "output.weight": torch.randn(width, generator=drawn) / math.sqrt(width),
    }
    return Head("mlp", tensors, normalize="rms")


def compare_ways(server: LaunchedServer, *, prompts: int, prompt_tokens: int, new_tokens: int, rounds: int) -> Rounds:
    """Let the ways take turns.

    Args:
        server: serves the model.
        prompts: rows of the batch.
        prompt_tokens: of each.
        new_tokens: of each.
        rounds: that count.
    """
    head = make_head(server.info.hidden_size)
    server.push_head(MILLION, head)
    drawn = torch.randn(server.info.hidden_size, generator=torch.Generator().manual_seed(0))
    server.push_head(LINEAR, Head("linear", {"weight": drawn / math.sqrt(len(drawn))}, normalize="rms"))
    ways: dict[str, dict[str, Any]] = {
        PLAIN: {},
        LINEAR: {"heads": HeadSpec((LINEAR,))},
        MILLION: {"heads": HeadSpec((MILLION,))},
        TOKENS: {"hidden": HiddenSpec(pooling=None, tokens=True)},
    }

    def compare(calls: Mapping[str, Call]) -> float:
        same_tokens(calls, response_ids)
        worst = 0.0
        pairs = zip(calls[MILLION].found["completions"], calls[TOKENS].found["completions"], strict=True)
        for row, (scored, with_states) in enumerate(pairs):
            here = head.score(with_states.token_rows.rows_ND)
            error = float((scored.scores[MILLION].response_T - here).abs().max())
            if not error < SCORE_ATOL:
                raise DifferentAnswersError(f"row {row}: scores differ by {error:.1e}; no ratio means anything")
            worst = max(worst, error)
        return worst

    with client_of(server) as client:

        def side(fields: dict[str, Any]) -> Any:
            def measure(batch: list[list[int]]) -> Call:
                requests = lambda: [Request(tuple(ids), greedy(new_tokens), **fields) for ids in batch]  # noqa: E731
                before = _cpu_seconds(server.pid)
                call = ask(client, requests, server.info)
                return replace(call, counts={**call.counts, CPU: _cpu_seconds(server.pid) - before})

            return measure

        return take_turns(
            f"{prompts} × ({prompt_tokens} + {new_tokens}) tokens",
            {name: side(fields) for name, fields in ways.items()},
            lambda number: new_prompts(server.info, prompts, prompt_tokens, seed=number),
            rounds=rounds,
            compare=compare,
        )


def _cpu_seconds(pid: int) -> float:
    """Return the processor time that a server's processes took so far, to the nanosecond and not to the hundredth."""
    root, nanoseconds = psutil.Process(pid), 0
    for process in (root, *root.children(recursive=True)):
        for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            with suppress(FileNotFoundError):  # a thread that has ended
                nanoseconds += int(path.read_text().split()[0])
    return nanoseconds / 1e9


def cpu_of_plain(found: Rounds, side: str) -> float:
    """Return the server's processor time by that of plain generation, the median of the rounds' ratios."""
    return statistics.median(calls[side].counts[CPU] / calls[PLAIN].counts[CPU] for calls in found.calls)


def main() -> None:
    """Measure the models that the command line names."""
    args = read_arguments(
        __doc__,
        model=("smollm2", "wide"),
        wide_layers=1,
        prompts=16,
        prompt_tokens=64,
        new_tokens=64,
        rounds=9,
        dtype="float32",
    )
    per_row = args.prompt_tokens + args.new_tokens + 64
    models = {}
    for model in args.model:
        with served(
            model,
            dtype=args.dtype,
            context_length=per_row,
            total_tokens=args.prompts * (per_row + 64),
            sleep_on_idle=True,
            wide_layers=args.wide_layers,
        ) as server:
            sizes = {name: getattr(args, name) for name in ("prompts", "prompt_tokens", "new_tokens", "rounds")}
            found = compare_ways(server, **sizes)
        CONSOLE.print(
            found.table(
                f"{model}, {args.dtype}: {args.prompts} prompts × {args.prompt_tokens} tokens, {args.new_tokens} new "
                f"tokens each, a head of {PARAMETERS:,} parameters, medians of {args.rounds} rounds",
                {
                    "speed / plain": lambda side, found=found: f"{found.speed(side, PLAIN):.3f}",
                    "server CPU s": lambda side, found=found: f"{found.count(side, CPU):.2f}",
                    "CPU / plain": lambda side, found=found: f"{cpu_of_plain(found, side):.3f}",
                    "HTTP MB": lambda side, found=found: f"{found.count(side, 'http_bytes') / 1e6:.3f}",
                },
                f"same tokens on all sides; scores differ by at most {found.worst:.0e}",
            )
        )
        sides = found.results()
        for name, result in sides.items():
            result["speed_of_plain"] = found.speed(name, PLAIN)
            result["cpu_of_plain"] = cpu_of_plain(found, name)
        models[model] = {"worst_difference": found.worst, "sides": sides}
    print_record("heads", args, {"models": models})


if __name__ == "__main__":
    main()
