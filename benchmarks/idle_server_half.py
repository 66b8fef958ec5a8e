"""What the server half costs those who do not ask: plain generation on servers with it and on servers without.

Two servers of each kind stand side by side, and idle ones sleep. Round after round each generates from the same
prompts, with its prefix cache emptied before; which of them goes first changes. A ratio compares two of one round, and
what is shown is the median over the rounds. Before that the tokens of all are compared.

Two of each kind, because two processes of the same program differ by a percent, however many rounds they run: where
their memory lies is settled when they start. So the ratio of the kinds is a mean over their four pairs, and the ratio
of two servers of one kind, which is 1 but for that, says how much of it may be chance.

    python benchmarks/idle_server_half.py --model wide --rounds 200
"""

from __future__ import annotations

import itertools
import math
import os
from contextlib import ExitStack

from rounds import CONSOLE, print_record, read_arguments, same_tokens, take_turns
from serving import ask, client_of, greedy, new_prompts, response_ids, served

from torchrl_sglang_hidden.protocol import PLUGIN_ENV
from torchrl_sglang_hidden.records import Request

WITH, WITHOUT = ("with the server half", "with it, again"), ("without", "without, again")


def main() -> None:
    """Measure the model that the command line names."""
    args = read_arguments(
        __doc__, model="smollm2", prompts=8, prompt_tokens=128, new_tokens=32, rounds=9, dtype="float32"
    )
    per_row = args.prompt_tokens + args.new_tokens + 64
    with ExitStack() as stack:
        sides = {}
        # Neither kind is started before the other.
        for name, switch in ((WITH[0], "1"), (WITHOUT[0], "0"), (WITHOUT[1], "0"), (WITH[1], "1")):
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
    speed = math.prod(found.speed(*pair) for pair in itertools.product(WITH, WITHOUT)) ** (1 / 4)
    same = {names[0]: found.speed(*names) for names in (WITH, WITHOUT)}
    CONSOLE.print(f"Same tokens; speed with it / without: {speed:.3f}", highlight=False)
    CONSOLE.print(
        "Two servers of one kind: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in same.items()), highlight=False
    )
    print_record("idle_server_half", args, {"sides": found.results(), "speed_of_without": speed, "same_kind": same})


if __name__ == "__main__":
    main()
