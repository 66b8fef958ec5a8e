"""A trainer of two processes: ``python sharded_trainer.py RANK PORT MODEL_DIR URL CASE…`` updates a server's weights.

Each process prints one line of JSON per case: the version, or the error. Run by `run_trainer`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

RANKS = 2


def run_trainer(model_dir: str, url: str, *cases: str, timeout_s: float = 300) -> list[list[dict[str, str]]]:
    """Run the cases in two processes, and return what each of them said, case by case."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(port), model_dir, url, *cases],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(RANKS)
    ]
    said = []
    for process in processes:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        assert process.returncode == 0, errors[-3000:]
        said.append([json.loads(line) for line in output.splitlines()])
    return [list(both) for both in zip(*said, strict=True)]


def make(case: str, model_dir: str, mesh: Any) -> Any:
    """Return the weights of a case, sharded over the mesh."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    from helpers.weight_changes import perturb

    model = perturb(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32))
    trained: Any = model
    if "lora" in case:
        torch.manual_seed(1)
        trained = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(trained, mesh=mesh)
    if "nan" in case:
        model.model.norm.weight.to_local().data.fill_(float("nan"))
    if "compiled" in case:
        return torch.compile(trained)
    if "others" in case and torch.distributed.get_rank() == 1:
        return {name: value for name, value in trained.state_dict().items() if "layers.1." not in name}
    return trained.state_dict() if "state" in case else trained


def main() -> None:
    rank, port, model_dir, url, *cases = sys.argv[1:]
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from torchrl_sglang_hidden import SGLangHiddenError, SGLangServer

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    with SGLangServer(url) as engine:
        for case in cases:
            options: dict[str, Any] = {"transport": "network"} if "network" in case else {}
            if "buckets" in case:
                options["bucket_bytes"] = 1000
            try:
                said = {"version": engine.update_weights(make(case, model_dir, mesh), version=case, **options)}
            except SGLangHiddenError as error:
                said = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(said), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
