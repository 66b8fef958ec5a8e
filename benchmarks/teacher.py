"""What a teacher's next-token distributions cost to bring home: one state per token, or the logits of its best tokens.

    log-probs      the student's tokens are scored, and nothing else comes home
    top-k logits   the k best tokens of each position, and what they weigh
    states         the state of each position in bfloat16, of which the teacher's head makes all logits

All sides score the same sequences; before each the prefix cache is emptied. The logits that the head makes of the
states are compared with the top-k ones of the server before a ratio is shown.

    python benchmarks/teacher.py --model smollm2 --prompts 32 --prompt-tokens 512
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from rounds import CONSOLE, Call, DifferentAnswersError, Rounds, print_record, read_arguments, take_turns
from serving import client_of, new_prompts, served, settle
from transformers import AutoModelForCausalLM

from torchrl_sglang_hidden import HiddenSpec, LogitsSpec, SGLangHiddenWrapper, logits_from_hidden, ragged
from torchrl_sglang_hidden.engines.launch import LaunchedServer

LOG_PROBS, TOP_K, STATES = "log-probs", "top-k logits", "states"
BYTES = "bytes_per_token"
# What bfloat16 states may do to a logit.
LOGITS_ATOL = 0.5
COMPARED = 64


def compare_ways(server: LaunchedServer, head: Any, *, prompts: int, tokens: int, columns: int, rounds: int) -> Rounds:
    """Let the ways take turns.

    Args:
        server: the teacher's.
        head: the teacher's model.
        prompts: sequences in a batch.
        tokens: of each.
        columns: k.
        rounds: that count.
    """
    make = {"input_mode": "tokens", "generate": False, "inplace": False}
    states = HiddenSpec(segments=("full",), pooling=None, tokens=True, dtype=torch.bfloat16)
    policies = {
        LOG_PROBS: SGLangHiddenWrapper(server, hidden=None, **make),
        TOP_K: SGLangHiddenWrapper(server, hidden=None, logits=LogitsSpec(top_k=columns), **make),
        STATES: SGLangHiddenWrapper(server, hidden=states, **make),
    }
    with client_of(server) as client:

        def side(name: str) -> Any:
            def measure(sequences: list[list[int]]) -> Call:
                settle(client)
                asked = ragged(tokens=sequences, full=True)
                before = server.server_counters()
                start = time.perf_counter()
                found = policies[name](asked)
                seconds = time.perf_counter() - start
                after = server.server_counters()
                sent = after.answer_bytes - before.answer_bytes
                return Call(seconds, found, {BYTES: sent / (prompts * tokens)})

            return measure

        def compare(calls: Mapping[str, Call]) -> float:
            row = calls[STATES].found[0]["token_hidden_states", "full"][:COMPARED]
            logits = logits_from_hidden(row.detach(), head).detach()[:-1]
            # Row n has the logits of token n, which the state before it makes.
            top = calls[TOP_K].found[0]["logits"]
            found = logits.gather(-1, top.full_token_ids[1:COMPARED])
            error = float((found - top.full[1:COMPARED].float()).abs().max())
            if not error < LOGITS_ATOL:
                raise DifferentAnswersError(f"logits of {STATES!r} are {error:.2f} from the server's; expected none")
            return error

        return take_turns(
            f"{prompts} × {tokens} tokens",
            {name: side(name) for name in policies},
            lambda number: new_prompts(server.info, prompts, tokens, seed=number),
            rounds=rounds,
            compare=compare,
        )


def main() -> None:
    """Measure the model that the command line names."""
    args = read_arguments(
        __doc__, model="smollm2", prompts=32, prompt_tokens=512, columns=64, rounds=3, dtype="float32"
    )
    room = {"context_length": args.prompt_tokens + 64, "total_tokens": args.prompts * (args.prompt_tokens + 64)}
    with served(args.model, dtype=args.dtype, **room) as server:
        head = AutoModelForCausalLM.from_pretrained(server.info.model_path, dtype=torch.float32).eval()
        found = compare_ways(
            server,
            head,
            prompts=args.prompts,
            tokens=args.prompt_tokens,
            columns=args.columns,
            rounds=args.rounds,
        )
        sizes = f"D = {server.info.hidden_size}, V = {server.info.vocab_size:,}, {args.dtype}"
    CONSOLE.print(
        found.table(
            f"{args.model}, {sizes}: {args.prompts} sequences of {args.prompt_tokens} tokens, k = {args.columns}",
            {
                "bytes a token": lambda side: f"{found.count(side, BYTES):,.0f}",
                "speed of log-probs": lambda side: f"{found.speed(side, LOG_PROBS):.2f}",
            },
            f"logits of the states are at most {found.worst:.3f} from the server's",
        )
    )
    print_record("teacher", args, {"sides": found.results(), "worst_logit": found.worst})


if __name__ == "__main__":
    main()
