"""What this package costs the client, without a server: answers are made up, and the wrapper's own code reads them.

    assembling   the answers of a batch become a TensorDict, here and in torchrl's SGLangWrapper: the same answers, as
                 parsed JSON, and the same tokens and log-probs must come out
    scaling      time and memory from the JSON of a batch to the TensorDict, as rows, prompts, responses and D grow
    import       what importing the wrapper takes in a fresh interpreter that has imported torch and torchrl

Times are of the processor, which other programs on the machine disturb less.
Memory is what Python allocated at most, and the tensors that came out.

    python benchmarks/client_side.py
"""

from __future__ import annotations

import gc
import json
import math
import random
import statistics
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import torch
from rich.table import Table
from rollout import HIDDEN, TORCHRL, batch_of
from rounds import CONSOLE, Call, DifferentAnswersError, Rounds, print_record, read_arguments, take_turns
from serving import greedy
from torchrl.modules.llm.backends.sglang import AsyncSGLang
from torchrl.modules.llm.policies import SGLangWrapper
from transformers import AutoTokenizer

from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper, demo_model
from torchrl_sglang_hidden.engines import Engine
from torchrl_sglang_hidden.protocol import CHANNEL, pack_answer
from torchrl_sglang_hidden.records import EngineInfo, Request
from torchrl_sglang_hidden.reduce.pooling import Pools
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses

VOCAB_SIZE = 49152
IMPORTING = """
import time, torch, torchrl.modules.llm.policies
start = time.process_time()
from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper, SGLangServer, launch
print(time.process_time() - start)
"""


@dataclass(frozen=True)
class Sizes:
    """What a made-up batch is like: its rows, the tokens of each prompt and response, and the hidden size."""

    rows: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 64
    hidden_size: int = 4096


# Each size grows while the others stay.
GROWING: dict[str, tuple[Sizes, tuple[int, ...]]] = {
    "rows": (Sizes(), (1, 4, 16, 64, 256, 1024)),
    "prompt_tokens": (Sizes(), (64, 256, 1024, 4096)),
    "new_tokens": (Sizes(), (16, 64, 256, 1024)),
    "hidden_size": (Sizes(rows=64), (512, 2048, 8192)),
}


def make_answers(sizes: Sizes, *, states: bool, seed: int = 0) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Make up prompts, and what SGLang with the server half answers to them."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(20, VOCAB_SIZE) for _ in range(sizes.prompt_tokens)] for _ in range(sizes.rows)]
    answers = []
    for row in range(sizes.rows):
        ids = [draw.randrange(20, VOCAB_SIZE) for _ in range(sizes.new_tokens)]
        meta: dict[str, Any] = {
            "id": str(row),
            "prompt_tokens": sizes.prompt_tokens,
            "weight_version": "default",
            "finish_reason": {"type": "length", "length": sizes.new_tokens},
            "output_token_logprobs": [[-5 * draw.random(), token_id, None] for token_id in ids],
        }
        if states:
            counts = {"prompt": sizes.prompt_tokens, "response": sizes.new_tokens}
            segments = {name: (torch.rand(1, sizes.hidden_size), count) for name, count in counts.items()}
            meta[CHANNEL] = [pack_answer(Pools(segments, {}, {}, None), "text")]
        answers.append({"text": " word" * sizes.new_tokens, "output_ids": ids, "meta_info": meta})
    return prompts, answers


def engine_of(sizes: Sizes, answers_of: Callable[[], Any]) -> Engine:
    """Return an engine that checks requests and reads the made-up answers as real engines do."""
    path, most = str(demo_model()), sizes.prompt_tokens + sizes.new_tokens
    info = EngineInfo(
        model_path=path,
        tokenizer_path=path,
        vocab_size=VOCAB_SIZE,
        hidden_size=sizes.hidden_size,
        num_layers=30,
        layers=(-1,),
        context_length=most,
        max_prompt_tokens=most,
        weight_version="default",
        pools_in_server=True,
        returns_hidden_states=True,
        honours_seeds=False,
    )

    def generate(requests: Sequence[Request]) -> Any:
        check_requests(requests, info)
        to_payload(requests, info, binary=False)
        return read_responses(requests, answers_of(), info)

    engine: Engine = create_autospec(Engine, instance=True, info=info)
    engine.generate.side_effect = generate  # type: ignore[attr-defined]
    return engine


def compare_assembly(rows: int, new_tokens: int, rounds: int) -> Rounds:
    """Let this package's wrapper and TorchRL's take turns at making a TensorDict of the same answers."""
    sizes = Sizes(rows=rows, new_tokens=new_tokens)
    prompts, answers = make_answers(sizes, states=False)
    shared: dict[str, Any] = {
        "tokenizer": AutoTokenizer.from_pretrained(demo_model()),
        "input_mode": "tokens",
        "generate_kwargs": greedy(new_tokens),
    }
    backend = create_autospec(AsyncSGLang, instance=True)
    backend.generate.return_value = answers
    engine = engine_of(sizes, lambda: answers)

    def calling(policy: Any) -> Callable[[int], Call]:
        def measure(_: int) -> Call:
            batch = batch_of(prompts)
            start = time.process_time()
            out = policy(batch)
            seconds = time.process_time() - start
            keys = (("tokens", "response"), ("tokens", "full"), ("log_probs", "response"))
            return Call(seconds, [out.get(key, as_list=True) for key in keys])

        return measure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, of the nested tensors that torchrl makes
        return take_turns(
            f"assembling {rows} × {new_tokens} tokens",
            {
                TORCHRL: calling(SGLangWrapper(backend, **shared)),
                HIDDEN: calling(SGLangHiddenWrapper(engine, hidden=None, **shared)),
            },
            lambda number: number,
            rounds=rounds,
            compare=_same_outputs,
        )


def _same_outputs(calls: Mapping[str, Call]) -> float:
    for found, expected in zip(calls[HIDDEN].found, calls[TORCHRL].found, strict=True):
        for row, (a, b) in enumerate(zip(found, expected, strict=True)):
            if not torch.equal(a, b):
                raise DifferentAnswersError(f"row {row}: the two made other tensors of one answer; no ratio holds")
    return 0.0


# --- scaling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One size, and what the client needs for it."""

    size: int
    seconds: float
    peak_bytes: int


def measure_scaling(*, num_sizes: int | None = None, repeats: int = 3) -> dict[str, list[Point]]:
    """Measure the way from the JSON of a batch to the TensorDict as each size grows.

    Args:
        num_sizes: how many of the sizes, from the smallest; all by default.
        repeats: calls at each size, of which the fastest counts.
    """
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    found: dict[str, list[Point]] = {}
    for name, (base, values) in GROWING.items():
        grown = {value: Sizes(**{**vars(base), name: value}) for value in values[:num_sizes]}
        found[name] = [_measure_size(sizes, value, tokenizer, repeats) for value, sizes in grown.items()]
    return found


def _measure_size(sizes: Sizes, size: int, tokenizer: Any, repeats: int) -> Point:
    prompts, answers = make_answers(sizes, states=True)
    text = json.dumps(answers)
    answers.clear()
    policy = SGLangHiddenWrapper(
        engine_of(sizes, lambda: json.loads(text)),
        tokenizer=tokenizer,
        input_mode="tokens",
        hidden=HiddenSpec(segments=("prompt", "response")),
        generate_kwargs=greedy(sizes.new_tokens),
    )
    batch = batch_of(prompts)
    seconds = []
    for _ in range(repeats):
        gc.collect()
        start = time.process_time()
        out = policy(batch.copy())
        seconds.append(time.process_time() - start)
        shape = tuple(out.get(("hidden_states", "response")).shape)
        if shape != (sizes.rows, sizes.hidden_size):
            raise DifferentAnswersError(f"states of shape {shape} came out; no time means anything")
        del out
    tracemalloc.start()
    out = policy(batch)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    leaves = [value for row in out.unbind(0) for value in row.values(True, True) if isinstance(value, torch.Tensor)]
    return Point(size, min(seconds), peak_bytes + sum(value.nbytes for value in leaves))


def exponent(points: Sequence[Point], value: Callable[[Point], float]) -> float:
    """Return the power of the size with which a value grows over the larger sizes: 1 is linear."""
    first, last = points[len(points) // 2 - 1], points[-1]
    return math.log(max(value(last), 1e-9) / max(value(first), 1e-9)) / math.log(last.size / first.size)


def exponents(found: Mapping[str, Sequence[Point]]) -> dict[str, tuple[float, float]]:
    """Return the exponents of time and memory for each size that grows."""
    return {
        name: (exponent(points, lambda point: point.seconds), exponent(points, lambda point: point.peak_bytes))
        for name, points in found.items()
    }


# --- import ----------------------------------------------------------------------------------------------------------


def measure_import(rounds: int) -> list[float]:
    """Return the seconds that importing the wrapper takes beyond torch and torchrl, in fresh interpreters."""
    root = Path(__file__).parents[1]
    runs = [
        subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True, cwd=root)
        for _ in range(rounds + 1)
    ]
    # The first one fills the file cache.
    return [float(run.stdout) for run in runs[1:]]


def main() -> None:
    """Measure all three."""
    args = read_arguments(__doc__, rounds=5)
    torch.set_num_threads(1)
    assembly = compare_assembly(256, 512, args.rounds)
    CONSOLE.print(assembly.table("256 × (64 + 512) tokens", {}))
    scaling = measure_scaling()
    table = Table(title="from the JSON of a batch to the TensorDict")
    for heading in ("size", "", "s", "MB at most"):
        table.add_column(heading, justify="right")
    for name, points in scaling.items():
        for point in points:
            table.add_row(name, f"{point.size}", f"{point.seconds:.4f}", f"{point.peak_bytes / 1e6:.1f}")
    CONSOLE.print(table)
    imports = measure_import(args.rounds)
    CONSOLE.print(f"import: {statistics.median(imports):.3f} s beyond torch and torchrl", highlight=False)
    results = {
        "assembling": assembly.results(),
        "speed_of_torchrl": assembly.speed(HIDDEN, TORCHRL),
        "scaling": {name: [vars(point) for point in points] for name, points in scaling.items()},
        "exponents": exponents(scaling),
        "import_s": imports,
    }
    print_record("client_side", args, results)


if __name__ == "__main__":
    main()
