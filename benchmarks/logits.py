"""What logits and constraints cost, against plain generation and against what stock SGLang has in their place.

    plain               text, tokens and log-probs
    mask                the same under an action mask of its own for each row, half of the vocabulary
    top_k               the same as plain, and the k largest logits of every token, with their ids
    token_ids           the same, and the logits of k tokens
    full                the same, and the logits of the whole vocabulary, through memory that server and client share
    full, bf16          likewise, half the bytes
    full, HTTP          the same as full inside the answer, as from a server on another machine
    top_logprobs_num    stock SGLang: the k largest log-probs of every token, as JSON
    flat top_logprobs   the same as one array for each row in base64 (return_flat_raw_output_top_logprobs)
    token_ids_logprob   stock SGLang: the log-probs of k tokens, as JSON

All sides run in one go on one server: round after round, each side generates from the same prompts, greedily, with the
prefix cache emptied before each, and ends with tensors. A ratio compares two sides of one round, and what is shown is
the median over the rounds. Before that the sides are compared: all but the masked one must have the same tokens, the
log-softmax of the full logits must be stock's log-probs, the other selections must be columns of the full logits, and
no masked row may have a token outside its mask.

    python benchmarks/logits.py --prompts 16 --rounds 5
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rounds import CONSOLE, Call, DifferentAnswersError, Rounds, print_record, read_arguments, same_tokens, take_turns
from serving import ask, client_of, greedy, new_prompts, response_ids, served

from torchrl_sglang_hidden import ActionMask, LogitsSpec, SGLangServer
from torchrl_sglang_hidden.records import EngineInfo, Request, TokenLogits

PLAIN, MASK, FULL, FULL_BF16, FULL_HTTP = "plain", "mask", "full", "full, bf16", "full, HTTP"
TOP_K, TOKEN_IDS = "top_k", "token_ids"
STOCK_TOP_K, STOCK_FLAT, STOCK_IDS = "top_logprobs_num", "flat top_logprobs", "token_ids_logprob"
STOCK = {TOP_K: (STOCK_TOP_K, STOCK_FLAT), TOKEN_IDS: (STOCK_IDS,)}
FIRST_ID = 100
# Of float32 logits of another kernel's shape; bfloat16 keeps 8 bits.
ATOL, ATOL_BF16 = 1e-3, 0.25


@dataclass(frozen=True)
class Side:
    """One way of asking: what is asked for, what of it is SGLang's own, and how the answer is to come."""

    info: EngineInfo
    spec: LogitsSpec | None = None
    masked: bool = False
    stock: dict[str, Any] = field(default_factory=dict)


def sides_of(info: EngineInfo, k: int, num_ids: int) -> dict[str, Side]:
    """Return every way of asking that this engine has, by name."""
    ids = tuple(range(FIRST_ID, FIRST_ID + num_ids))
    flat = {"return_flat_raw_output_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
    shared = {
        FULL: Side(info, LogitsSpec(full=True)),
        FULL_BF16: Side(info, LogitsSpec(full=True, dtype=torch.bfloat16)),
    }
    return {
        PLAIN: Side(info),
        MASK: Side(info, masked=True),
        TOP_K: Side(info, LogitsSpec(top_k=k)),
        TOKEN_IDS: Side(info, LogitsSpec(token_ids=ids)),
        **(shared if info.shares_memory else {}),
        FULL_HTTP: Side(dataclasses.replace(info, shares_memory=False), LogitsSpec(full=True)),
        STOCK_TOP_K: Side(info, stock={"top_logprobs_num": k}),
        STOCK_FLAT: Side(info, stock={"top_logprobs_num": k, **flat}),
        STOCK_IDS: Side(info, stock={"token_ids_logprob": list(ids)}),
    }


def masks_of(info: EngineInfo, rows: int) -> list[ActionMask]:
    """Allow half of the vocabulary, another half for each row."""
    generator = torch.Generator().manual_seed(0)
    return [ActionMask.from_mask(torch.rand(info.vocab_size, generator=generator) < 0.5) for _ in range(rows)]


def read_stock(answer: dict[str, Any]) -> TokenLogits:
    """Turn stock SGLang's log-probs and their ids into tensors ``[T, k]``, as every other side returns tensors."""
    meta = answer["meta_info"]
    if "output_top_logprobs_val_flat_b64" in meta:
        # The server writes little-endian float32 and int32, and says so in the fields' …_dtype.
        shape = meta["output_top_logprobs_shape"]
        values, ids = (
            torch.frombuffer(bytearray(base64.b64decode(meta[f"output_top_logprobs_{name}_flat_b64"])), dtype=dtype)
            for name, dtype in (("val", torch.float32), ("idx", torch.int32))
        )
        return TokenLogits(values.view(shape), ids.view(shape).long())
    entries = meta.get("output_top_logprobs") or meta["output_token_ids_logprobs"]
    return TokenLogits(
        torch.tensor([[entry[0] for entry in token] for token in entries]),
        torch.tensor([[entry[1] for entry in token] for token in entries]),
    )


def compare_logits(
    server: SGLangServer,
    *,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    columns: int,
    num_ids: int,
    rounds: int,
    only: Sequence[str] | None = None,
) -> Rounds:
    """Let ways of asking for the logits of the same generation take turns.

    Args:
        server: serves the model.
        prompts: rows of the batch.
        prompt_tokens: of each.
        new_tokens: of each.
        columns: k of the k largest.
        num_ids: tokens of the sides that name tokens.
        rounds: that count.
        only: the sides; all by default.
    """
    info = server.info
    sides = sides_of(info, columns, num_ids)
    sides = {name: sides[name] for name in only or sides}
    masks = masks_of(info, prompts) if MASK in sides else []
    with client_of(server) as client:

        def measuring(side: Side) -> Any:
            def requests_of(batch: Sequence[Sequence[int]]) -> list[Request]:
                allowed = [(mask,) for mask in masks] if side.masked else [()] * len(batch)
                return [
                    Request(tuple(ids), greedy(new_tokens), logits=side.spec, constraints=constraints)
                    for ids, constraints in zip(batch, allowed, strict=True)
                ]

            stock: dict[str, Any] = {"stock": side.stock, "read_stock": read_stock} if side.stock else {}
            return lambda batch: ask(client, lambda: requests_of(batch), side.info, **stock)

        return take_turns(
            f"logits, {prompts} × ({prompt_tokens} + {new_tokens}) tokens",
            {name: measuring(side) for name, side in sides.items()},
            lambda number: new_prompts(info, prompts, prompt_tokens, seed=number),
            rounds=rounds,
            compare=lambda calls: largest_difference(calls, masks),
        )


def largest_difference(calls: Mapping[str, Call], masks: Sequence[ActionMask]) -> float:
    """Return how far the sides are from the values of the full logits; sides that disagree end the run."""
    for row, mask in enumerate(masks):
        if not set(response_ids(calls[MASK].found)[row]) <= set(mask.valid_token_ids):
            raise DifferentAnswersError(f"row {row}: a token outside its mask; no ratio means anything")
    same_tokens({name: call for name, call in calls.items() if name != MASK}, response_ids)
    worst = 0.0
    full = calls[FULL if FULL in calls else FULL_HTTP].found["completions"]
    for name in calls.keys() - {PLAIN, MASK}:
        found = calls[name].found
        logits = found["stock_rows"] or [completion.logits for completion in found["completions"]]
        for row, rows in enumerate(logits):
            logits_TV = full[row].logits.values_NC
            values_TC, ids_TC = rows.values_NC.float(), rows.token_ids_NC
            expected_TV = logits_TV.log_softmax(-1) if found["stock_rows"] else logits_TV
            if ids_TC is not None:
                expected_TC = expected_TV.gather(1, ids_TC)
            else:
                first = 0 if values_TC.shape == logits_TV.shape else FIRST_ID
                expected_TC = expected_TV[:, first : first + values_TC.shape[1]]
            error = float((values_TC - expected_TC).abs().max())
            if not error < (ATOL_BF16 if name == FULL_BF16 else ATOL):
                raise DifferentAnswersError(
                    f"row {row}: values of {name!r} are {error:.1e} off {FULL!r}'s; no ratio means anything"
                )
            worst = worst if name == FULL_BF16 else max(worst, error)
    return worst


def main() -> None:
    """Measure the model that the command line names."""
    args = read_arguments(
        __doc__,
        model="smollm2",
        prompts=16,
        prompt_tokens=64,
        new_tokens=32,
        columns=20,
        rounds=5,
        dtype="float32",
    )
    per_row = args.prompt_tokens + args.new_tokens + 128
    total = args.prompts * per_row
    with served(args.model, dtype=args.dtype, context_length=per_row, total_tokens=total) as server:
        sizes = {name: getattr(args, name) for name in ("prompts", "prompt_tokens", "new_tokens", "rounds", "columns")}
        found = compare_logits(server, num_ids=args.columns, **sizes)
        vocab_size = server.info.vocab_size

    def of_stock(name: str) -> str:
        return ", ".join(f"{1 / found.speed(name, stock):.2f}" for stock in STOCK.get(name, ()))

    CONSOLE.print(
        found.table(
            f"{args.model}, {args.dtype}: {args.prompts} prompts × {args.prompt_tokens} tokens, {args.new_tokens} new "
            f"tokens each, k = {args.columns}, medians of {args.rounds} rounds",
            {
                "time / plain": lambda name: f"{1 / found.speed(name, PLAIN):.2f}",
                "time / stock": of_stock,
                "HTTP MB": lambda name: f"{found.count(name, 'http_bytes') / 1e6:.2f}",
            },
            f"same tokens on all sides but the masked; values differ by at most {found.worst:.0e}",
        )
    )
    sides = found.results()
    for name, result in sides.items():
        result["time_of_plain"] = 1 / found.speed(name, PLAIN)
        for stock in STOCK.get(name, ()):
            result[f"time_of_{stock}"] = 1 / found.speed(name, stock)
    print_record("logits", args, {"vocab_size": vocab_size, "worst_difference": found.worst, "sides": sides})


if __name__ == "__main__":
    main()
