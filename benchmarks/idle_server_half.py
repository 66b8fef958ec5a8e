"""What the server half costs those who do not ask: plain generation on a server with it and on one without.

Two servers of one model stand side by side, and idle ones sleep. Round after round each generates from the same
prompts, with its prefix cache emptied before; which of them goes first changes. A ratio compares the two of one round,
and what is shown is the median over the rounds. Before that the tokens of both are compared.

    python benchmarks/idle_server_half.py --model wide --rounds 9
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from rounds import CONSOLE, print_record, read_arguments, same_tokens, take_turns
from serving import ask, client_of, greedy, new_prompts, response_ids, served

from torchrl_sglang_hidden.protocol import PLUGIN_ENV
from torchrl_sglang_hidden.records import Request

WITH, WITHOUT = "with the server half", "without"


def main() -> None:
    """Measure the model that the command line names."""
    args = read_arguments(
        __doc__, model="smollm2", prompts=8, prompt_tokens=128, new_tokens=32, rounds=9, dtype="float32"
    )
    per_row = args.prompt_tokens + args.new_tokens + 64
    with ExitStack() as stack:
        sides = {}
        for name, switch in ((WITH, "1"), (WITHOUT, "0")):
            os.environ[PLUGIN_ENV] = switch
            sizes = {"context_length": per_row, "total_tokens": args.prompts * per_row}
            server = stack.enter_context(served(args.model, dtype=args.dtype, sleep_on_idle=True, **sizes))
            client = stack.enter_context(client_of(server))
            sides[name] = lambda batch, server=server, client=client: ask(
                client, lambda: [Request(tuple(ids), greedy(args.new_tokens)) for ids in batch], server.info
            )
        found = take_turns(
            args.model,
            sides,
            lambda number: new_prompts(server.info, args.prompts, args.prompt_tokens, seed=number),
            rounds=args.rounds,
            compare=lambda calls: same_tokens(calls, response_ids),
        )
    title = f"{args.model}, {args.dtype}: {args.prompts} × ({args.prompt_tokens} + {args.new_tokens}) tokens"
    CONSOLE.print(found.table(title, {}))
    speed = found.speed(WITH, WITHOUT)
    CONSOLE.print(f"Same tokens; speed with it / without: {speed:.3f}", highlight=False)
    print_record("idle_server_half", args, {"sides": found.results(), "speed_of_without": speed})


if __name__ == "__main__":
    main()
