"""One step of a rollout through two TorchRL policies on the same server, both greedy, from the same prompts.

    torchrl    torchrl's own SGLangWrapper: text, tokens and log-probs, one blocking request after another
    hidden     SGLangHiddenWrapper: the same and pooled states of prompt and response, one request for the batch

Round after round the two take turns, the prefix cache emptied before each. Both must have generated the same tokens;
otherwise no ratio is shown. A ratio compares the two sides of one round, and what is shown is the median of the rounds.

    python benchmarks/rollout.py --prompts 32 --rounds 3
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import httpx
import torch
from rounds import CONSOLE, Call, Rounds, print_record, read_arguments, same_tokens, take_turns
from serving import client_of, greedy, new_prompts, served, settle
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.modules.llm.backends.sglang import AsyncSGLang
from torchrl.modules.llm.policies import SGLangWrapper, Tokens
from transformers import AutoTokenizer

from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper, SGLangServer

TORCHRL, HIDDEN, RAW = "torchrl", "hidden", "SGLang's /generate"


def batch_of(prompts: Sequence[Sequence[int]]) -> TensorDictBase:
    """Return the prompts as a policy reads them."""
    return lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(ids)), batch_size=()) for ids in prompts])


def responses_of(out: TensorDictBase) -> list[list[int]]:
    """Return the tokens that a policy wrote."""
    return [ids.tolist() for ids in out.get(("tokens", "response"), as_list=True)]


def calling(policy: Any, client: httpx.Client) -> Any:
    """Return a side that calls a policy."""

    def measure(prompts: Sequence[Sequence[int]]) -> Call:
        batch = batch_of(prompts)
        settle(client)
        start = time.perf_counter()
        out = policy(batch)
        seconds = time.perf_counter() - start
        found = responses_of(out)
        return Call(seconds, found, {"new_tokens": sum(map(len, found))})

    return measure


def posting(client: httpx.Client, sampling: dict[str, Any]) -> Any:
    """Return a side that posts the batch to SGLang's own route, and reads the JSON of the answer."""

    def measure(prompts: Sequence[Sequence[int]]) -> Call:
        settle(client)
        start = time.perf_counter()
        payload = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}
        answers = client.post("/generate", json=payload).raise_for_status().json()
        seconds = time.perf_counter() - start
        found = [answer["output_ids"] for answer in answers]
        return Call(seconds, found, {"new_tokens": sum(map(len, found))})

    return measure


def compare_policies(
    server: SGLangServer, *, prompts: int, prompt_tokens: int, new_tokens: int, rounds: int, against: str
) -> Rounds:
    """Let this package's policy and another way take turns.

    Args:
        server: serves the model.
        prompts: rows of the batch.
        prompt_tokens: of each.
        new_tokens: of each; at most, for TorchRL's wrapper does not pass ``ignore_eos`` on.
        rounds: that count.
        against: `TORCHRL`; or `RAW`, where both return tokens and log-probs and no states.
    """
    sampling = {"max_new_tokens": new_tokens, "temperature": 0.0} if against == TORCHRL else greedy(new_tokens)
    shared: dict[str, Any] = {
        "tokenizer": AutoTokenizer.from_pretrained(server.info.tokenizer_path),
        "input_mode": "tokens",
        "generate_kwargs": sampling,
    }
    hidden = HiddenSpec(segments=("prompt", "response")) if against == TORCHRL else None
    with client_of(server) as client:
        if against == TORCHRL:
            # torchrl logs every connection and the first request.
            logging.getLogger("torchrl").setLevel(logging.WARNING)
            other = calling(SGLangWrapper(AsyncSGLang.connect(server.url), **shared), client)
        else:
            other = posting(client, sampling)
        return take_turns(
            f"{against}, {prompts} × ({prompt_tokens} + {new_tokens}) tokens",
            {against: other, HIDDEN: calling(SGLangHiddenWrapper(server, hidden=hidden, **shared), client)},
            lambda number: new_prompts(server.info, prompts if number else 2, prompt_tokens, seed=number),
            rounds=rounds,
            compare=lambda calls: same_tokens(calls, list),
        )


def step_seconds(server: SGLangServer, *, rows: int, new_tokens: int) -> float:
    """Return the time of one decode step of so many rows: what further tokens cost, divided by their number."""
    with client_of(server) as client:
        prompts = new_prompts(server.info, rows, 8, seed=0)
        few, many = (posting(client, greedy(count))(prompts).seconds for count in (2, 2 + new_tokens))
    return (many - few) / new_tokens


def main() -> None:
    """Measure the model that the command line names."""
    args = read_arguments(
        __doc__, model="smollm2", prompts=32, prompt_tokens=64, new_tokens=32, rounds=3, dtype="float32"
    )
    per_row = args.prompt_tokens + args.new_tokens + 64
    with served(args.model, dtype=args.dtype, context_length=per_row, total_tokens=args.prompts * per_row) as server:
        sizes = {name: getattr(args, name) for name in ("prompts", "prompt_tokens", "new_tokens", "rounds")}
        found = compare_policies(server, against=TORCHRL, **sizes)
    new_tokens, speed = round(found.count(HIDDEN, "new_tokens")), found.speed(HIDDEN, TORCHRL)
    title = f"{args.model}, {args.dtype}: {args.prompts} prompts × {args.prompt_tokens} tokens, {args.rounds} rounds"
    CONSOLE.print(found.table(title, {}))
    CONSOLE.print(
        f"Same tokens on both sides, {new_tokens} a round; hidden is {speed:.1f} times as fast.", highlight=False
    )
    print_record(
        "rollout", args, {"sides": found.results(), "new_tokens_a_round": new_tokens, "speed_of_torchrl": speed}
    )


if __name__ == "__main__":
    main()
