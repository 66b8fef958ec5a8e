"""LoRA adapters before they reach an engine: what SGLang computes from them is what PEFT computes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from torchrl_sglang_hidden import CapabilityError, EngineError, InputTypeError, WeightsError
from torchrl_sglang_hidden.protocol.served_weights import DRAIN, WAS_PAUSED, ServedWeights, served_weights
from torchrl_sglang_hidden.weights.adapters import (
    Adapter,
    adapter_tensors,
    check_adapter,
    check_adapter_options,
    load,
    open_adapter,
)
from torchrl_sglang_hidden.weights.network import NetworkPath
from torchrl_sglang_hidden.weights.transports import Receiver

SIZES = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 24, "head_dim": 4,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "strengths": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"layers.0.self_attn.q_proj": 16}},
    "ranks": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}},
}


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))


def adapted(**options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(tiny(), LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **options))


def unfrozen(model: PeftModel) -> PeftModel:
    """Train the norms beside the adapter, as LongLoRA does."""
    for name, value in model.named_parameters():
        value.requires_grad_(value.requires_grad or "norm" in name)
    return model


def initialised(how: Any) -> PeftModel:
    return get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=how))


def from_gradients() -> PeftModel:
    """Begin as LoRA-GA does, from gradients that PEFT's ``preprocess_loraga`` leaves on the layers."""
    model = tiny()
    for name, part in model.named_modules():
        if name.endswith("q_proj"):
            part._peft_loraga_grad = torch.randn_like(part.weight)
    options = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **options))
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    assert not torch.equal(layer.base_layer.weight, tiny().model.layers[0].self_attn.q_proj.weight)
    return adapted


def served(tmp_path: Path) -> ServedWeights:
    tiny().save_pretrained(tmp_path / "base")
    return served_weights(str(tmp_path / "base"))


def as_sglang_computes(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return each layer's change as SGLang 0.5.23 computes it: ``lora_alpha / r`` is all the configuration it reads."""
    names = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name
    }
    pairs = {name: [tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA"] for name in names}
    return {name: config["lora_alpha"] / config["r"] * b @ a for name, (b, a) in pairs.items()}


@pytest.mark.parametrize("source", ["model", "compiled", "directory"])
@pytest.mark.parametrize("kind", KINDS)
def test_sglang_computes_what_peft_computes(kind: str, source: str, tmp_path: Path) -> None:
    model = adapted(**KINDS[kind])
    if source == "directory":
        model.save_pretrained(tmp_path / "adapter")
    given: Any = {"model": model, "compiled": torch.compile(model), "directory": tmp_path / "adapter"}[source]
    adapter = open_adapter(given)
    check_adapter(adapter, served(tmp_path))
    tensors, config = adapter_tensors(adapter)
    found = as_sglang_computes(tensors, config)
    layers = {name: part for name, part in model.get_base_model().named_modules() if hasattr(part, "get_delta_weight")}
    assert found.keys() == layers.keys()
    for name, part in layers.items():
        torch.testing.assert_close(found[name], part.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-6)
    assert {value.shape[0] for name, value in tensors.items() if "lora_A" in name} == {config["r"]}


def test_one_of_several_adapters() -> None:
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    assert {name.rpartition(".")[2] for name in open_adapter(model).layers} == {"q_proj"}
    assert {name.rpartition(".")[2] for name in open_adapter(model, "other").layers} == {"v_proj"}
    with pytest.raises(WeightsError, match=r"no adapter 'third'; name one of default, other"):
        open_adapter(model, "third")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(WeightsError, match=r"2 adapters are active \(default, other\).*pass which= with"):
        open_adapter(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny, "without LoRA layers"),
        (lambda: adapted(target_modules=["q_proj"], use_dora=True), r"DoraLinearVariant.*update_weights"),
        (lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]), r"modules_to_save.*update_weights"),
        (lambda: adapted(target_modules=["embed_tokens"]), r"changes the embedding model.embed_tokens"),
        (lambda: adapted(target_modules=["q_proj"], trainable_token_indices=[1]), r"trainable_tokens_delta.*update_w"),
        (lambda: unfrozen(adapted(target_modules=["q_proj"])), r"5 weights beside its adapters, such as .*norm.*leave"),
        (lambda: initialised("pissa"), r"init_lora_weights='pissa', which also changes.*update_weights.*convert"),
        (lambda: initialised("olora"), r"init_lora_weights='olora', which also changes.*update_weights.*convert"),
        (from_gradients, r"init_lora_weights='lora_ga', which also changes.*update_weights.*convert"),
    ],
)
def test_what_sglang_would_leave_out_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        open_adapter(make())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_a_directory_with_more_than_lora_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    adapted(target_modules=["q_proj"], **options).save_pretrained(tmp_path)
    with pytest.raises(
        WeightsError, match=r"is DoRA; SGLang serves LoRA; merge it|'base_model.model.lm_head.weight', which is no"
    ):
        open_adapter(tmp_path)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [(0, 1)] * 2}, "layer_replication"),
    ],
)
def test_what_only_the_configuration_says_is_refused(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Names and shapes are a plain adapter's: aLoRA acts behind some tokens, and replicated layers are others."""
    model = adapted(target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=rf"adapter='.*' has {name}.*, which SGLang would leave out"):
        open_adapter(tmp_path)
    with pytest.raises(WeightsError, match="which SGLang would leave out"):
        open_adapter(model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda config: [config], r"adapter_config.json holds a list, not an object; pass a directory"),
        (lambda config: config.pop("lora_alpha") and config, r"no strength: lora_alpha=None.*save the adapter again"),
        (lambda config: {**config, "lora_alpha": "much"}, r"no strength: lora_alpha='much'.*save the adapter again"),
        (lambda config: {**config, "alpha_pattern": {"(": 1}}, r"alpha_pattern=.*save the adapter again"),
    ],
)
def test_a_configuration_that_cannot_be_read(spoil: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    adapted(target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(spoil(json.loads(file.read_text()))))
    with pytest.raises(WeightsError, match=message):
        open_adapter(tmp_path)


@pytest.mark.parametrize("how", ["gaussian", "eva", "orthogonal"])
def test_a_beginning_that_leaves_the_weights_below_is_served(how: str, tmp_path: Path) -> None:
    model = initialised(how)
    assert len(open_adapter(model).layers) == 2
    model.save_pretrained(tmp_path)
    assert len(open_adapter(tmp_path).layers) == 2


def test_a_directory_whose_adapter_belongs_to_other_weights_is_refused(tmp_path: Path) -> None:
    model = initialised("pissa")
    model.peft_config["default"].init_lora_weights = True  # what PEFT's own conversion wants to begin from
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(WeightsError, match=r"raw' was made with init_lora_weights='pissa'.*merge it"):
        open_adapter(tmp_path / "raw")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    adapter = open_adapter(tmp_path / "converted")
    for name, (a, b, factor) in adapter.layers.items():
        expected = model.get_base_model().get_submodule(name)
        change = expected.base_layer.weight + expected.get_delta_weight("default") - tiny().get_submodule(name).weight
        torch.testing.assert_close(factor * b @ a, change.detach(), rtol=1e-4, atol=1e-5)


def test_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"adapter_config.json.*pass a directory"):
        open_adapter(tmp_path)
    with pytest.raises(InputTypeError, match="adapter is a dict; expected a model"):
        open_adapter({})  # type: ignore[arg-type]


def test_an_adapter_that_does_not_fit(tmp_path: Path) -> None:
    base, adapter = served(tmp_path), open_adapter(adapted(target_modules=["q_proj"]))
    name, (a, b, factor) = next(iter(adapter.layers.items()))
    for layers, message in (
        ({"model.layers.9.self_attn.q_proj": (a, b, factor)}, "changes model.layers.9.self_attn.q_proj, which"),
        ({name: (a[:, :3], b, factor)}, r"do not make \(8, 8\)"),
        ({name: (a, b[:, :1], factor)}, r"do not make \(8, 8\)"),
        ({name: (a * float("nan"), b, factor)}, "not finite"),
    ):
        with pytest.raises(WeightsError, match=message):
            check_adapter(Adapter(layers), base)


@pytest.mark.parametrize("options", [("",), (3,), (" ",), ("a", 3)])
def test_options_that_mean_nothing(options: tuple[Any, ...]) -> None:
    with pytest.raises(InputTypeError, match="expected"):
        check_adapter_options(*options)


# --- the calls ------------------------------------------------------------------------------------------------------

INFO = {"enable_lora": True, "max_lora_rank": 8}


class Server:
    """SGLang's control routes: notes the calls, and refuses those it is told to."""

    def __init__(self, *refused: str, paused: bool = False) -> None:
        self.refused, self.paused = refused, paused
        self.seen: list[str] = []
        self.paths: list[str] = []

    def __call__(self, route: str, payload: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(payload.get("name", route))
        if "lora_path" in payload:
            self.paths.append(payload["lora_path"])
            assert (Path(payload["lora_path"]) / "adapter_model.safetensors").is_file()
        return {"success": route not in self.refused, "error_message": "no room", WAS_PAUSED: self.paused}


def give(
    server: Server,
    info: dict[str, Any] = INFO,
    *,
    replace: bool = False,
    half: bool = True,
    source: Any = None,
    **where: Any,
) -> None:
    settings = {"name": "x", "call": server, "has_server_half": half, "reads_local_files": True, "network": None}
    receiver = Receiver(**{**settings, **where})  # type: ignore[arg-type]
    adapter = open_adapter(adapted(target_modules=["q_proj"]) if source is None else source)
    load(receiver, "mine", adapter, "7", server_info=info, replace=replace)


def test_the_order_of_the_calls() -> None:
    held, on = [DRAIN, "pause_generation"], ["update_weight_version", "continue_generation"]
    for options, between in (
        ({}, ["load_lora_adapter"]),
        ({"replace": True}, ["unload_lora_adapter", "load_lora_adapter"]),
    ):
        server = Server()
        give(server, **options)  # type: ignore[arg-type]
        assert server.seen == [*held, *between, *on]
    stock = Server()
    give(stock, half=False)
    assert stock.seen == ["load_lora_adapter", "update_weight_version"]


def test_an_adapter_is_not_replaced_in_a_paused_engine() -> None:
    """SGLang would wait for the requests that use it, which stand still until somebody lets the engine go on."""
    server = Server(paused=True)
    with pytest.raises(EngineError, match=r"x is paused, .*adapter 'mine'.*call continue_generation"):
        give(server, replace=True)
    assert server.seen == [DRAIN]
    give(server)
    assert server.seen == [DRAIN, DRAIN, "load_lora_adapter", "update_weight_version"]


def test_a_server_on_another_machine_reads_a_directory_that_both_see(tmp_path: Path) -> None:
    away = {"reads_local_files": False, "network": NetworkPath(host="x", port=1, server_info=dict, timeout_s=1.0)}
    alike, other = (tmp_path / name for name in ("alike", "other"))
    adapted(target_modules=["q_proj"]).save_pretrained(alike)
    adapted(**KINDS["strengths"]).save_pretrained(other)
    server = Server()
    give(server, source=alike, **away)
    assert server.paths == [str(alike)]
    for source in (other, None):
        with pytest.raises(CapabilityError, match=r"one rank and one strength, to a directory that both"):
            give(server, source=source, **away)
    assert server.paths == [str(alike)]


def test_a_refused_adapter_moves_no_version() -> None:
    server = Server("load_lora_adapter")
    with pytest.raises(EngineError, match=r"refused to load adapter 'mine' from .*: no room"):
        give(server)
    with pytest.raises(EngineError, match=r"no room.*'mine' of before is unloaded already: load one again"):
        give(server, replace=True)
    assert "update_weight_version" not in server.seen
    assert server.seen[-1] == "continue_generation"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_lora": False}, r"was started without LoRA; start it with enable_lora=True"),
        ({"max_lora_rank": 1}, r"has rank 2, and x was started with max_lora_rank=1"),
        ({"dp_size": 2}, r"runs with dp_size=2"),
    ],
)
def test_a_server_that_takes_no_such_adapter(changes: dict[str, Any], message: str) -> None:
    server = Server()
    with pytest.raises(CapabilityError, match=message):
        give(server, {**INFO, **changes})
    assert server.seen == []


def test_the_model_is_left_as_it_is() -> None:
    model = adapted(target_modules=["q_proj"])
    before = copy.deepcopy(model.state_dict())
    adapter_tensors(open_adapter(nn.ModuleDict({"model": model})))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
