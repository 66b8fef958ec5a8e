"""Weights that two processes of a trainer hold together (FSDP2 with gloo), given to a server by the first."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_engine import Handler, RecordingServer
from helpers.sharded_trainer import run_trainer
from helpers.weight_changes import load_trainer, perturb
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from torchrl_sglang_hidden.errors import EngineError
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.served_weights import served_weights
from torchrl_sglang_hidden.weights import sharding
from torchrl_sglang_hidden.weights.trainers import LazyWeights
from torchrl_sglang_hidden.weights.validation import ShardedWeights, open_weights

SIZES = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 24, "head_dim": 4,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mixture": Qwen3MoeConfig(**SIZES, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1),
}


class Loaded(RecordingServer):
    """A server that keeps what it was told to load, by version, and how many files it came in."""

    def __init__(self, model_dir: str) -> None:
        super().__init__(model_path=model_dir)
        self.model_dir = model_dir
        self.loaded: dict[str, dict[str, torch.Tensor]] = {}
        self.files: dict[str, int] = {}
        self.respond = self.answer_control

    def answer_control(self, handler: Handler, payload: dict[str, Any]) -> None:
        if payload.get("name") == CHANNEL:
            return handler.say((200, served_weights(self.model_dir).pack()))
        if handler.path != "/update_weights_from_disk":
            return handler.say((404, "Not Found"))
        path, version = Path(payload["model_path"]), payload["weight_version"]
        self.files[version] = len(list(path.glob("*.safetensors")))
        self.loaded[version] = {name: value.clone() for name, value in open_weights(path).items()}  # type: ignore[union-attr]
        if "refused" in version:
            return handler.say((400, {"success": False, "message": "no room"}))
        return handler.say((200, {"success": True, "message": ""}))


def expected(model_dir: Path, case: str) -> dict[str, torch.Tensor]:
    model: Any = perturb(load_trainer(model_dir))
    if "lora" in case:
        torch.manual_seed(1)
        adapted = get_peft_model(
            copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
        model = adapted.merge_and_unload()
    return dict(open_weights(model))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        (
            "llama",
            ["plain", "plain buckets", "lora", "state", "compiled lora buckets", "refused", "nan", "others", "again"],
        ),
        ("tied", ["plain", "state buckets"]),
        ("mixture", ["plain", "lora buckets"]),
    ],
)
def test_what_two_processes_hold_arrives_whole(name: str, cases: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    server = Loaded(str(tmp_path))
    try:
        said = dict(zip(cases, run_trainer(str(tmp_path), server.url, *cases), strict=True))
    finally:
        server.stop()
    served = served_weights(str(tmp_path))
    wrong = {"refused", "nan", "others"}
    for case in cases:
        if case in wrong:
            continue
        assert said[case] == [{"version": case}] * 2, case
        found, whole = server.loaded[case], expected(tmp_path, case)
        assert served.tensors.keys() <= found.keys()
        for weight in served.tensors:
            torch.testing.assert_close(found[weight], whole[weight], rtol=1e-6, atol=1e-6)
        assert (server.files[case] > 2) == ("buckets" in case)
    if name != "llama":
        return
    first, second = said["refused"]
    assert "no room" in first["error"]
    assert first["error"].startswith("RequestRejectedError: ")
    assert "process 0 of the trainer failed with RequestRejectedError" in second["error"]
    first, second = said["nan"]
    assert first["error"].startswith("WeightsError: model.norm.weight has values from nan")
    assert "process 0 of the trainer failed with WeightsError: model.norm.weight" in second["error"]
    assert all("the trainer's processes hold different weights" in line["error"] for line in said["others"])


class Part:
    """A shard of a weight, which notes what every process must take part in."""

    shape = (2,)

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def numel(self) -> int:
        return 2

    def element_size(self) -> int:
        return 4

    def to_local(self) -> torch.Tensor:
        return torch.ones(1)

    def full_tensor(self) -> torch.Tensor:
        self.seen.append(f"gather {self.name}")
        if "lost" in self.name:
            raise RuntimeError("the connection was lost")
        return torch.ones(2)


def collectives(monkeypatch: pytest.MonkeyPatch, rank: int, names: list[str], error: type[BaseException]) -> list[str]:
    """Return what one process takes part in, where the first cannot take the weight "b"."""
    seen: list[str] = []

    def tell_all(text: str, device: torch.device) -> list[str]:
        seen.append("tell")
        return [text or f"{error.__name__}: no room for b"] * 2 if len(seen) > 2 + len(names) else [text] * 2

    def convert(weights: Any) -> Any:
        if rank == 0 and "b" in weights:
            raise error("no room for b")
        return weights

    monkeypatch.setattr(sharding.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(sharding, "_tell_all", tell_all)
    parts: Any = {name: Part(name, seen) for name in names}
    with pytest.raises(error if rank == 0 else EngineError, match=r"no room for b|was lost"):
        sharding.update_together(ShardedWeights(LazyWeights(parts), convert), lambda _: "1", bucket_bytes=2**20)
    return seen


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_failure_inside_a_bucket_leaves_the_processes_level(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the other processes wait in the gathering of a weight that the failed one never comes to."""
    expected = ["tell", "tell", "gather a", "gather b", "gather c", "tell"]
    for rank in (0, 1):
        assert collectives(monkeypatch, rank, ["a", "b", "c"], error) == expected


def test_a_process_that_fails_in_the_gathering_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = collectives(monkeypatch, 0, ["a", "lost", "c"], RuntimeError)
    assert seen == ["tell", "tell", "gather a", "gather lost"]
