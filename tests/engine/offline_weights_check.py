"""New weights for an in-process engine, in a process of its own: `python offline_weights_check.py JOB.json FOUND.json`.

Run by test_weights.py, which compares what this finds against the oracle.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from checks import CHUNKED_PREFILL_SIZE, SEGMENTS
from trainee import load_trainer

from torchrl_sglang_hidden import EngineError, HiddenSpec, InputError, SGLangOffline
from torchrl_sglang_hidden.specs import Request


def main(job_path: str, found_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    hidden = HiddenSpec(segments=SEGMENTS)
    trainer = load_trainer(job["trained_dir"])
    with SGLangOffline(job["model_dir"], dtype="float32", chunked_prefill_size=CHUNKED_PREFILL_SIZE) as engine:

        def step() -> dict[str, Any]:
            request = Request(tuple(job["prompt"]), {"max_new_tokens": 8, "temperature": 0}, hidden=hidden)
            (completion,) = engine.generate([request])
            assert completion.log_probs_T is not None
            return {
                "version": completion.weight_version,
                "response_ids": completion.response_ids,
                "log_probs": completion.log_probs_T.tolist(),
                "prompt": completion.hidden["prompt"].vector.tolist(),
            }

        steps = [step()]
        engine.update_weights(trainer)
        steps.append(step())
        engine.update_weights(job["model_dir"], version="named")
        steps.append(step())
        refused = []
        for weights, options in (
            ({"model.norm.weight": torch.zeros(576)}, {}),
            (trainer, {"transport": "network"}),
            (trainer, {"version": "named"}),
        ):
            try:
                engine.update_weights(weights, **options)
            except (InputError, EngineError) as error:
                refused.append(type(error).__name__)
        steps.append(step())

        long = Request(
            tuple(job["prompt"]), {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True}, hidden=hidden
        )
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(engine.generate, [long])
            step()  # beside it, so that it has some tokens by now
            engine.update_weights(trainer, running="continue")
            (across,) = running.result()
    found = {
        "steps": steps,
        "refused": refused,
        "across": {"mixed_weights": across.mixed_weights, "num_tokens": len(across.response_ids)},
    }
    Path(found_path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
