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

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from rounds import CONSOLE, Call, DifferentAnswersError, Rounds, print_record, read_arguments, same_tokens, take_turns
from serving import ask, client_of, greedy, new_prompts, response_ids, served

from torchrl_sglang_hidden import HiddenSpec, SGLangServer
from torchrl_sglang_hidden.records import Completion, Request

PLAIN, POOLED, TOKENS, TOKENS_HTTP, STOCK = "plain", "pooled", "tokens", "tokens, HTTP", "stock"
READ = "read only"
SEGMENTS = ("prompt", "response")
STATE_RTOL = 1e-4


def compare_states(
    server: SGLangServer,
    *,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    sides: tuple[str, ...] = (PLAIN, POOLED, TOKENS, TOKENS_HTTP, STOCK),
    layers: Mapping[str, tuple[int, ...]] | None = None,
) -> Rounds:
    """Let ways of asking for the states of the same generation take turns.

    Args:
        server: serves the model.
        prompts: rows of the batch.
        prompt_tokens: of each.
        new_tokens: of each.
        rounds: that count.
        sides: the ways.
        layers: further pooled sides by name, with the layers that they ask for. The first one is the last layer.
    """
    info = server.info
    pooled = HiddenSpec(segments=SEGMENTS)
    # Both segments together are every position once.
    tokens = HiddenSpec(segments=SEGMENTS, pooling=None, tokens=True)
    ways: dict[str, tuple[HiddenSpec | None, Any]] = {
        PLAIN: (None, info),
        POOLED: (pooled, info),
        TOKENS: (tokens, info),
        TOKENS_HTTP: (tokens, dataclasses.replace(info, shares_memory=False)),
        STOCK: (pooled, dataclasses.replace(info, pools_in_server=False)),
    }
    chosen = {name: ways[name] for name in sides}
    chosen |= {name: (HiddenSpec(segments=SEGMENTS, layers=ids), info) for name, ids in (layers or {}).items()}

    with client_of(server) as client:

        def side(spec: HiddenSpec | None, way: Any) -> Any:
            def measure(batch: list[list[int]]) -> Call:
                return ask(client, lambda: [Request(tuple(ids), greedy(new_tokens), hidden=spec) for ids in batch], way)

            return measure

        return take_turns(
            f"{prompts} × ({prompt_tokens} + {new_tokens}) tokens",
            {name: side(*way) for name, way in chosen.items()},
            lambda number: new_prompts(info, prompts, prompt_tokens if number else min(16, prompt_tokens), seed=number),
            rounds=rounds,
            compare=largest_difference,
        )


def compare_reading(server: SGLangServer, *, prompts: int, prompt_tokens: int, new_tokens: int, rounds: int) -> Rounds:
    """Let reading prompts and generating from them take turns; both return the prompts' pooled states."""
    spec = HiddenSpec(segments=("prompt",))
    with client_of(server) as client:

        def side(sampling: dict[str, Any]) -> Any:
            return lambda batch: ask(
                client, lambda: [Request(tuple(ids), sampling, hidden=spec) for ids in batch], server.info
            )

        return take_turns(
            f"reading {prompts} × {prompt_tokens} tokens",
            {POOLED: side(greedy(new_tokens)), READ: side({"max_new_tokens": 0})},
            lambda number: new_prompts(server.info, prompts if number else 2, prompt_tokens, seed=number),
            rounds=rounds,
            compare=lambda calls: largest_difference(calls, tokens=False),
        )


def vectors_of(completion: Completion) -> dict[str, torch.Tensor]:
    """Return the two pooled vectors of the last layer, as they came or pooled here from every token's states."""
    if completion.token_rows is None:
        # Several layers are a dimension of their own, the last layer their last row.
        return {
            segment: pooled.vector.reshape(-1, pooled.vector.shape[-1])[-1]
            for segment, pooled in completion.hidden.items()
        }
    rows_ND = completion.token_rows.rows_ND.double()
    num_prompt = len(completion.prompt_ids)
    return {"prompt": rows_ND[:num_prompt].mean(0).float(), "response": rows_ND[num_prompt - 1 :].mean(0).float()}


def largest_difference(calls: Mapping[str, Call], *, tokens: bool = True) -> float:
    """Return each side's distance from the pooled side's vectors, relative to their length.

    Args:
        calls: of one round.
        tokens: whether the sides generated, so that other tokens end the run.
    """
    if tokens:
        same_tokens(calls, response_ids)
    worst = 0.0
    for name in calls.keys() - {PLAIN}:
        pairs = zip(calls[name].found["completions"], calls[POOLED].found["completions"], strict=True)
        for row, (found, expected) in enumerate(pairs):
            vectors = vectors_of(expected)
            for segment, vector_D in vectors_of(found).items():
                error = float((vector_D - vectors[segment]).norm() / vectors[segment].norm())
                if not error < STATE_RTOL:
                    raise DifferentAnswersError(
                        f"row {row}: {segment} vectors of {name!r} and {POOLED!r} differ by {error:.1e} relative, over "
                        f"{STATE_RTOL:.0e}; no ratio means anything"
                    )
                worst = max(worst, error)
    return worst


def main() -> None:
    """Measure the models that the command line names."""
    args = read_arguments(
        __doc__, model=("smollm2", "wide"), prompts=2, prompt_tokens=2048, new_tokens=64, rounds=5, dtype="float32"
    )
    per_row = args.prompt_tokens + args.new_tokens + 64
    models = {}
    for model in args.model:
        # A page and a bit for each row beside its tokens.
        total = args.prompts * (per_row + 64)
        with served(model, dtype=args.dtype, context_length=per_row, total_tokens=total) as server:
            sizes = {name: getattr(args, name) for name in ("prompts", "prompt_tokens", "new_tokens", "rounds")}
            found = compare_states(server, **sizes)
            hidden_size = server.info.hidden_size
        CONSOLE.print(
            found.table(
                f"{model}, D = {hidden_size}, {args.dtype}: {args.prompts} prompts × {args.prompt_tokens} tokens, "
                f"{args.new_tokens} new tokens each, medians of {args.rounds} rounds",
                {
                    "speed / plain": lambda side, found=found: f"{found.speed(side, PLAIN):.2f}",
                    "speed / stock": lambda side, found=found: f"{found.speed(side, STOCK):.1f}",
                    "HTTP MB": lambda side, found=found: f"{found.count(side, 'http_bytes') / 1e6:.2f}",
                    "shared MB": lambda side, found=found: f"{found.count(side, 'shared_bytes') / 1e6:.2f}",
                },
                f"same tokens on all sides; pooled vectors differ by at most {found.worst:.0e} relative",
            )
        )
        sides = found.results()
        for name, result in sides.items():
            result |= {"speed_of_plain": found.speed(name, PLAIN), "speed_of_stock": found.speed(name, STOCK)}
        models[model] = {"hidden_size": hidden_size, "worst_relative_difference": found.worst, "sides": sides}
    print_record("hidden_states", args, {"models": models})


if __name__ == "__main__":
    main()
