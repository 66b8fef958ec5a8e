"""A program that makes an in-process engine itself, as a user may: `sglang.Engine` changes its process for good.

    python user_engine_program.py JOB.json RESULT.json

Run by test_offline.py, which compares what this finds against the oracle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from helpers.offline_images import CHECKS
from helpers.policy_checks import make_policy, rows_of, tokens_input
from torchrl_sglang_hidden import InputError, SGLangOffline
from torchrl_sglang_hidden.server.cpu import has_accelerator, use_cpu_engine


def jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def holds_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(holds_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(holds_bytes(item) for item in value)
    return isinstance(value, bytes)


@contextmanager
def spied(engine: Any) -> Iterator[list[bool]]:
    """Record for every answer of ``engine`` whether it carried raw bytes."""
    carried: list[bool] = []
    plain = engine.async_generate

    async def async_generate(*args: Any, **kwargs: Any) -> Any:
        answer = await plain(*args, **kwargs)
        carried.append(holds_bytes(answer))
        return answer

    engine.async_generate = async_generate
    yield carried
    del engine.async_generate


def run_cases(model: Any, sglang_engine: Any, tokenizer: Any, cases: list[dict[str, Any]]) -> dict[str, Any]:
    def run(case: dict[str, Any]) -> list[Any]:
        policy = make_policy(model, tokenizer, "tokens", case["segments"], case["pooling"], **case["generate"])
        return [jsonable(row) for row in rows_of(policy(tokens_input(case["prompts"])), case["segments"])]

    # An engine that nobody used yet is asked for one token first, so that its layers are known; that carries no vector.
    make_policy(model, tokenizer)(tokens_input([[5]]))
    with spied(sglang_engine) as carried_bytes:
        results = [run(case) for case in cases]
        try:
            make_policy(model, tokenizer)(tokens_input([[5], [tokenizer.vocab_size + 10**6]]))
        except InputError as error:
            refused = type(error).__name__
        with ThreadPoolExecutor(2) as pool:
            again = [outcome(future) for future in [pool.submit(run, case) for case in cases]]
    return {"results": results, "refused": refused, "from_threads": again, "carried_bytes": carried_bytes}


def outcome(future: Future[list[Any]]) -> list[Any] | str:
    """Return the rows, or what went wrong, so that the other cases are still reported."""
    error = future.exception()
    return future.result() if error is None else f"{type(error).__name__}: {error}"


def failures(checks: dict[str, Callable[[SGLangOffline, str], None]], engine: Any, model_dir: str) -> dict[str, str]:
    """Return what each check failed with, "" where it passed, so that all are reported."""
    found = {}
    with ThreadPoolExecutor(1) as pool, SGLangOffline(engine) as wrapped:
        for name, check in checks.items():
            error = pool.submit(check, wrapped, model_dir).exception()
            found[name] = "" if error is None else "".join(traceback.format_exception(error))
    return found


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    tokenizer = AutoTokenizer.from_pretrained(job["model_dir"])
    # What a user does who makes the engine by hand, on a machine like this one.
    os.environ["TORCHRL_SGLANG_HIDDEN"] = "1"
    by_hand = {"enable_return_hidden_states": True, "max_total_tokens": 4096, **job["server_args"]}
    if not has_accelerator():
        use_cpu_engine()
        by_hand["device"] = "cpu"
    import sglang

    engine = sglang.Engine(model_path=job["model_dir"], **by_hand)
    # Every policy wraps the engine anew, those of two threads at once too.
    found = run_cases(engine, engine, tokenizer, job["cases"])
    found["image_failures"] = failures(CHECKS, engine, job["model_dir"])
    SGLangOffline(engine).close()
    alive = engine.generate(input_ids=[5, 6], sampling_params={"max_new_tokens": 2})
    found["alive_after_close"] = alive["meta_info"]["completion_tokens"] == 2
    engine.shutdown()
    Path(result_path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
