"""The speed table: what this package does, against what there is otherwise, with the aim of each line.

Every line compares two ways to the same result in one run: they take turns, their answers are compared before a ratio
is made, and the ratio is the median over rounds. Lines of one model share one server. About 15 minutes on two cores.

    python benchmarks/speed_table.py --write
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import teacher as teachers
import torch
from client_side import Point, compare_assembly, exponents, measure_import, measure_scaling
from heads import MILLION, PARAMETERS, cpu_of_plain
from heads import compare_ways as compare_heads
from hidden_states import PLAIN, POOLED, READ, STOCK, TOKENS, compare_reading, compare_states
from hugging_face import GENERATE, compare_generate
from logits import FULL, STOCK_FLAT, STOCK_IDS, STOCK_TOP_K, TOKEN_IDS, TOP_K, compare_logits
from report import Line, to_table, write
from rollout import HIDDEN, RAW, TORCHRL, compare_policies, step_seconds
from rounds import CONSOLE, environment, print_record
from serving import served
from step_cost import measure_step
from transformers import AutoModelForCausalLM

from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.reduce.wanted import Wanted

# The wide model as it is, for what is compared with stock SGLang; and with the layers that one request wants.
WIDE, WIDER = "wide", "wide, 4 layers"
WIDE_LAYERS = 4
HF_ROWS = 16
ALL_LAYERS = (*range(WIDE_LAYERS - 1), -1)


@dataclass(frozen=True)
class Sizes:
    """How large the batches are; ``quick`` is for a test of the program, and measures nothing."""

    rows: int = 128
    prompt_tokens: int = 32
    new_tokens: int = 64
    long_prompt: int = 2048
    encoded_prompt: int = 16
    encoded_against: int = 256
    rollout_rows: int = 32
    rollout_tokens: tuple[int, int] = (64, 16)
    logits_rows: int = 16
    logits_tokens: tuple[int, int] = (32, 16)
    num_ids: int = 64
    teacher_rows: int = 8
    teacher_tokens: int = 256
    hf_tokens: tuple[int, int] = (32, 32)
    assembled: tuple[int, int] = (256, 512)
    num_sizes: int | None = None
    step_rows: int = 256
    rounds: int = 3
    few_rounds: int = 2


QUICK = Sizes(
    rows=3,
    prompt_tokens=4,
    new_tokens=3,
    long_prompt=40,
    encoded_prompt=4,
    encoded_against=8,
    rollout_rows=3,
    rollout_tokens=(8, 4),
    logits_rows=2,
    logits_tokens=(8, 3),
    teacher_rows=2,
    teacher_tokens=8,
    hf_tokens=(4, 3),
    assembled=(3, 8),
    num_sizes=2,
    step_rows=4,
    rounds=1,
    few_rounds=1,
)


@dataclass
class Run:
    """One run of the table: its sizes, and what it found so far."""

    sizes: Sizes
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scaling: dict[str, list[Point]] = field(default_factory=dict)

    def add(self, what: str, against: str, value: float, aim: float, **kinds: Any) -> None:
        """Add a line."""
        self.lines.append(Line(what, against, value, aim, **kinds))


# --- parts -----------------------------------------------------------------------------------------------------------


def pooled(run: Run, server: LaunchedServer) -> None:
    """Compare pooled states of many rows with none, for one layer and for all."""
    sizes, four = run.sizes, f"pooled, {WIDE_LAYERS} layers"
    found = compare_states(
        server,
        prompts=sizes.rows,
        prompt_tokens=sizes.prompt_tokens,
        new_tokens=sizes.new_tokens,
        rounds=sizes.rounds,
        sides=(PLAIN, POOLED),
        layers={four: ALL_LAYERS},
    )
    batch = f"{sizes.rows} rows × {sizes.new_tokens} tokens, prompt and response"
    for number, side in ((1, POOLED), (WIDE_LAYERS, four)):
        what = f"pooled states of {batch}, {number} of {WIDE_LAYERS} layers"
        run.add(what, "plain generation", found.speed(side, PLAIN), 0.98)


def step(run: Run) -> None:
    """Measure the server half's own time in a decode step."""
    rows, wanted = run.sizes.step_rows, Wanted(("response",), "mean", ALL_LAYERS)
    # D = 8: the scheduler's thread alone. An accelerator moves the data; here a core would.
    (_, host, _), (_, moving, _) = (measure_step(rows, wanted, hidden_size=size) for size in (8, 4096))
    what = f"the server half's host time in a decode step of {rows} rows, {WIDE_LAYERS} layers, data apart"
    run.add(what, "–", host * 1e3, 0.5, sense="≤", unit=" ms")
    run.notes.append(f"step: with the data moved by one core, D = 4096, it is {moving * 1e3:.1f} ms")


def every_token(run: Run, server: LaunchedServer) -> None:
    """Compare long prompts, pooled and as every token's states, with stock SGLang."""
    length = run.sizes.long_prompt
    found = compare_states(
        server,
        prompts=2,
        prompt_tokens=length,
        new_tokens=run.sizes.new_tokens,
        rounds=run.sizes.few_rounds,
        sides=(POOLED, TOKENS, STOCK),
    )
    stock, batch = "stock `return_hidden_states`", f"2 prompts of {length} tokens"
    run.add(f"pooled states, {batch}", stock, found.speed(POOLED, STOCK), 12)
    fewer = found.count(STOCK, "http_bytes") / found.count(POOLED, "http_bytes")
    run.add(f"bytes of the answer, {batch}", stock, fewer, 3000, unit="× fewer")
    run.add(f"every token's states, {batch}", stock, found.speed(TOKENS, STOCK), 5)


def encoding(run: Run, server: LaunchedServer) -> None:
    """Compare prompts that are only read with generation."""
    sizes = run.sizes
    against = f"generating {sizes.encoded_against} tokens"
    found = compare_reading(
        server,
        prompts=sizes.rows,
        prompt_tokens=sizes.encoded_prompt,
        new_tokens=sizes.encoded_against,
        rounds=sizes.few_rounds,
    )
    run.add(f"reading {sizes.rows} prompts for their states", against, found.speed(READ, POOLED), 30)


def rollout(run: Run, server: LaunchedServer) -> None:
    """Compare a rollout step with TorchRL's wrapper, and what is left in it."""
    rows, (prompt_tokens, new_tokens) = run.sizes.rollout_rows, run.sizes.rollout_tokens
    batch = {"prompts": rows, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    found = compare_policies(server, rounds=run.sizes.few_rounds, against=TORCHRL, **batch)
    run.add(f"a rollout of {rows} prompts", "TorchRL's `SGLangWrapper`", found.speed(HIDDEN, TORCHRL), 4)
    one, many = (step_seconds(server, rows=count, new_tokens=new_tokens) for count in (1, rows))
    run.notes.append(
        f"rollout: a decode step takes {one * 1e3:.0f} ms for 1 row and {many * 1e3:.0f} ms for {rows} on this "
        f"machine, so that one batch can be {rows * one / many:.1f}× as fast as one request after another"
    )


def wrapper(run: Run, server: LaunchedServer) -> None:
    """Compare the wrapper with what it calls."""
    rows, (prompt_tokens, new_tokens) = run.sizes.rollout_rows, run.sizes.rollout_tokens
    batch = {"prompts": rows, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    found = compare_policies(server, rounds=run.sizes.rounds, against=RAW, **batch)
    run.add(f"this wrapper, {rows} prompts", "SGLang's own `/generate`, one batch", found.speed(HIDDEN, RAW), 0.97)


def logits(run: Run, server: LaunchedServer) -> None:
    """Compare logits with none and with what stock SGLang has."""
    sizes, k = run.sizes, 20
    found = compare_logits(
        server,
        prompts=sizes.logits_rows,
        prompt_tokens=sizes.logits_tokens[0],
        new_tokens=sizes.logits_tokens[1],
        columns=k,
        num_ids=sizes.num_ids,
        rounds=sizes.few_rounds,
        only=(PLAIN, TOP_K, TOKEN_IDS, FULL, STOCK_TOP_K, STOCK_FLAT, STOCK_IDS),
    )
    names = {TOP_K: f"logits of the best {k}", TOKEN_IDS: f"logits of {sizes.num_ids} tokens", FULL: "all logits"}
    for side, what in names.items():
        run.add(what, "plain generation", found.speed(side, PLAIN), 0.97)
    run.add(names[TOP_K], "stock `top_logprobs_num`", found.speed(TOP_K, STOCK_TOP_K), 1)
    run.add(names[TOP_K], "the same, flat in base64", found.speed(TOP_K, STOCK_FLAT), 1)
    run.add(names[TOKEN_IDS], "stock `token_ids_logprob`", found.speed(TOKEN_IDS, STOCK_IDS), 1)


def heads(run: Run, server: LaunchedServer) -> None:
    """Compare scores of a head of a million parameters, which is a sixth of the wide model, with none."""
    sizes = run.sizes
    _scores(run, server, "a model of six million", sizes.rows, sizes.prompt_tokens, sizes.new_tokens)


def heads_smollm2(run: Run, server: LaunchedServer) -> None:
    """Compare scores of a head of a million parameters with none, of a model that answers questions."""
    _scores(run, server, "SmolLM2-135M", run.sizes.rollout_rows, *run.sizes.rollout_tokens)


def _scores(run: Run, server: LaunchedServer, model: str, rows: int, prompt_tokens: int, new_tokens: int) -> None:
    batch = {"prompts": rows, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    found = compare_heads(server, rounds=run.sizes.rounds, **batch)
    what = f"the server's processor time, a head of {PARAMETERS:,} parameters for each token, {model}, {rows} rows"
    run.add(what, "plain generation", cpu_of_plain(found, MILLION), 1.01, sense="≤")


def teacher(run: Run, server: LaunchedServer) -> None:
    """Compare a teacher's states with its best logits."""
    rows, tokens, k = run.sizes.teacher_rows, run.sizes.teacher_tokens, 64
    head = AutoModelForCausalLM.from_pretrained(server.info.model_path, dtype=torch.float32).eval()
    found = teachers.compare_ways(server, head, prompts=rows, tokens=tokens, columns=k, rounds=run.sizes.few_rounds)
    what = f"a teacher's whole distribution, as states, {rows} sequences of {tokens} tokens"
    run.add(what, f"its best {k} logits", found.speed(teachers.STATES, teachers.TOP_K), 1)
    sent = {side: found.count(side, teachers.BYTES) for side in (teachers.STATES, teachers.TOP_K)}
    run.notes.append(
        f"teacher: {sent[teachers.STATES]:,.0f} bytes a token as states, {sent[teachers.TOP_K]:,.0f} as logits"
    )


def hugging_face(run: Run, server: LaunchedServer) -> None:
    """Compare generation with states with Hugging Face on the same weights."""
    prompt_tokens, new_tokens = run.sizes.hf_tokens
    found = compare_generate(
        server, prompts=HF_ROWS, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=run.sizes.few_rounds
    )
    against = "Hugging Face `generate(output_hidden_states=True)`"
    run.add(f"pooled states of {HF_ROWS} rows", against, found.speed(HIDDEN, GENERATE), 1)


def assembling(run: Run) -> None:
    """Compare making a TensorDict of long responses with TorchRL."""
    rows, tokens = run.sizes.assembled
    found = compare_assembly(rows, tokens, run.sizes.rounds)
    what = f"assembling {rows} completions of {tokens} tokens"
    run.add(what, "TorchRL's `SGLangWrapper`", found.speed(HIDDEN, TORCHRL), 5)


def scaling(run: Run) -> None:
    """Measure time and memory of the client as batches grow."""
    run.scaling = measure_scaling(num_sizes=run.sizes.num_sizes, repeats=1 if run.sizes is QUICK else 3)
    found = exponents(run.scaling)
    for index, kind in enumerate(("time", "memory")):
        worst = max(powers[index] for powers in found.values())
        what = f"the client's {kind} as rows, prompts, responses and D grow: its power of the size"
        run.add(what, "linear", worst, 1.1, sense="≤", unit="")


def importing(run: Run) -> None:
    """Measure importing the wrapper."""
    seconds = statistics.median(measure_import(run.sizes.few_rounds))
    run.add("importing the wrapper", "`torch` and `torchrl` alone", seconds, 0.3, sense="≤", unit=" s more")


# By the server that a part shares with others; those without one first.
PARTS: dict[str, dict[str, Callable[..., None]]] = {
    "": {"importing": importing, "assembling": assembling, "scaling": scaling, "step": step},
    WIDE: {"every_token": every_token, "encoding": encoding, "heads": heads},
    WIDER: {"pooled": pooled},
    "smollm2": {
        "wrapper": wrapper,
        "rollout": rollout,
        "logits": logits,
        "heads_smollm2": heads_smollm2,
        "teacher": teacher,
        "hugging_face": hugging_face,
    },
}


def measure(sizes: Sizes, only: Sequence[str], keep: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Run the parts, and return the record: what each found and its seconds, and the seconds of the servers' starts.

    Args:
        sizes: of the batches.
        only: the parts; none for all.
        keep: gets the record after each part, so that a part that fails does not take the others with it.
    """
    record: dict[str, Any] = {"parts": {}, "starts_s": {}, "scaling": {}}
    for model, parts in PARTS.items():
        chosen = {name: part for name, part in parts.items() if not only or name in only}
        if not chosen:
            continue
        with ExitStack() as stack:
            servers = []
            if model:
                start = time.perf_counter()
                name = WIDE if model == WIDER else model
                server = served(name, dtype="float32", sleep_on_idle=True, **_room(model, sizes))
                servers = [stack.enter_context(server)]
                record["starts_s"][model] = _report(f"start of {model}", start)
            for name, part in chosen.items():
                start, run = time.perf_counter(), Run(sizes)
                part(run, *servers)
                found = {"lines": [asdict(line) for line in run.lines], "notes": run.notes}
                record["parts"][name] = {**found, "seconds": _report(name, start)}
                record["scaling"] |= {size: [asdict(point) for point in points] for size, points in run.scaling.items()}
                keep(record)
    return record


def _report(name: str, start: float) -> float:
    seconds = time.perf_counter() - start
    CONSOLE.print(f"{name}: {seconds:.0f} s", highlight=False)
    return round(seconds, 1)


def _room(model: str, sizes: Sizes) -> dict[str, int]:
    """Return how many tokens the server must hold: a page and a bit for each row beside its tokens."""
    batches = {
        WIDE: [
            (sizes.rows, sizes.encoded_prompt + sizes.encoded_against),
            (sizes.rows, sizes.prompt_tokens + sizes.new_tokens),
            (2, sizes.long_prompt + sizes.new_tokens),
        ],
        WIDER: [(sizes.rows, sizes.prompt_tokens + sizes.new_tokens)],
        "smollm2": [
            (sizes.rollout_rows, sum(sizes.rollout_tokens)),
            (sizes.logits_rows, sum(sizes.logits_tokens)),
            (sizes.teacher_rows, sizes.teacher_tokens),
            (HF_ROWS, sum(sizes.hf_tokens)),
        ],
    }[model]
    total = max(rows * (tokens + 128) for rows, tokens in batches)
    layers = WIDE_LAYERS if model == WIDER else 1
    return {"context_length": max(tokens for _, tokens in batches) + 64, "total_tokens": total, "wide_layers": layers}


def main() -> None:
    """Measure, print the table, and end in one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for parts in PARTS.values() for name in parts]
    parser.add_argument("--only", action="append", choices=names, default=[], help="this part; may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast it is")
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results and the README's table; with --only these parts"
    )
    args = parser.parse_args()
    if args.write and args.quick:
        parser.error("--write with --quick would write figures that mean nothing; leave one of them out")
    # More threads than this program needs would take the cores from the server.
    torch.set_num_threads(1)
    CONSOLE.print(f"{os.cpu_count()} cores; what else runs on them is measured too", highlight=False)
    start = time.perf_counter()

    def keep(record: Mapping[str, Any]) -> None:
        if args.write:
            write({**record, **environment()}, names, keep_others=bool(args.only))

    record = measure(QUICK if args.quick else Sizes(), args.only, keep)
    record["seconds"] = _report("all", start)
    CONSOLE.print(to_table(record))
    for part in record["parts"].values():
        for note in part["notes"]:
            CONSOLE.print(note, highlight=False)
    print_record("speed_table", None, record)


if __name__ == "__main__":
    main()
