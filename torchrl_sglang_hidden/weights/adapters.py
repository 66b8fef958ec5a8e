"""LoRA adapters of their own: read from a trainer or a directory, checked, and given to a running engine.

Knows PEFT's names and attributes, and imports nothing of it. SGLang 0.5.23 takes one rank and one strength per adapter
and ignores the rest of PEFT's configuration: what it would ignore is folded into the tensors, or refused.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchrl_sglang_hidden.errors import CapabilityError, EngineError, InputTypeError, WeightsError
from torchrl_sglang_hidden.protocol.served_weights import ServedWeights
from torchrl_sglang_hidden.weights.control import ControlCall, drained, succeeded
from torchrl_sglang_hidden.weights.disk import checkpoint_directory
from torchrl_sglang_hidden.weights.trainers import inner_model, plain_names
from torchrl_sglang_hidden.weights.transports import Receiver
from torchrl_sglang_hidden.weights.validation import check_options

__all__ = [
    "Adapter",
    "AdapterSource",
    "adapter_tensors",
    "check_adapter",
    "check_adapter_options",
    "load",
    "open_adapter",
    "unload",
]

AdapterSource = str | os.PathLike[str] | torch.nn.Module
PREFIX = "base_model.model."
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PART = re.compile(rf"^{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight$")
# PEFT's init_lora_weights by name that leave the weights below the adapter as they are. Others, such as "pissa" and
# "lora_ga", take the adapter's beginning out of them, and new ones may.
KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
# What a configuration may say of an adapter whose tensors are those of another one: where it acts, or on which layers.
UNLIKE_LORA = ("alora_invocation_tokens", "arrow_config", "layer_replication")


@dataclass(frozen=True, slots=True)
class Adapter:
    """The low-rank change of some of a model's layers.

    Args:
        layers: by the layer's name in the model: A ``[r, in]``, B ``[out, r]``, and the factor of their product.
        directory: the directory that it was read from, if any.
    """

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]
    directory: Path | None = None


def check_adapter_options(name: object, version: object = None) -> None:
    """Check the options of `Engine.load_adapter`.

    Raises:
        InputTypeError: ``name`` or ``version`` is no name.
    """
    if not (isinstance(name, str) and name.strip()):
        raise InputTypeError(f"name={name!r}: expected the name that requests give in lora_path, such as 'policy'")
    check_options(version, "auto", "finish")


def open_adapter(source: AdapterSource, adapter: str | None = None) -> Adapter:
    """Read an adapter.

    Args:
        source: a model with LoRA layers, in any wrapper that `inner_model` takes off; or a directory that PEFT wrote.
        adapter: the name of one of the model's adapters; None takes the active one.

    Raises:
        InputTypeError: ``source`` is neither.
        WeightsError: no LoRA adapter, or one of a kind that SGLang does not serve.
    """
    if isinstance(source, torch.nn.Module):
        return _of_model(source, adapter)
    if isinstance(source, (str, os.PathLike)):
        return _of_directory(Path(source).expanduser().absolute())
    raise InputTypeError(
        f"adapter is a {type(source).__name__}; expected a model with LoRA layers or a directory that PEFT wrote"
    )


def _of_model(module: torch.nn.Module, adapter: str | None) -> Adapter:
    model = inner_model(module)
    parts: dict[str, Any] = dict(model.named_modules())
    tuned = {name: part for name, part in parts.items() if hasattr(part, "lora_A") and "base_layer" in part._modules}
    if not tuned:
        raise WeightsError(f"adapter is a {type(module).__name__} without LoRA layers; pass a model that PEFT adapted")
    if adapter is None:
        active = {name for part in tuned.values() for name in part.active_adapters}
        if len(active) != 1:
            raise WeightsError(
                f"{len(active)} adapters are active ({', '.join(sorted(active))}), and SGLang serves one at a time; "
                "pass which= with the name of one"
            )
        (adapter,) = active
    _check_nothing_else(model, parts, adapter)
    layers: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
    names = {given: short for short, given in plain_names(tuned).items()}
    for name, part in tuned.items():
        if adapter in getattr(part, "lora_embedding_A", ()):
            raise WeightsError(f"adapter {adapter!r} changes the embedding {name}, which is not supported; merge it")
        if adapter not in part.lora_A:
            continue
        more = [type(part.lora_variant[adapter]).__name__] if adapter in getattr(part, "lora_variant", ()) else []
        more += ["a bias"] if part.lora_B[adapter].bias is not None else []
        if more:
            raise WeightsError(
                f"adapter {adapter!r} is more than a low-rank change at {name} ({', '.join(more)}), which SGLang would "
                "leave out; pass the model to update_weights, which merges it"
            )
        pair = (_whole(part.lora_A[adapter].weight), _whole(part.lora_B[adapter].weight))
        layers[names[name]] = (*pair, float(part.scaling[adapter]))
    if not layers:
        known = sorted({name for part in tuned.values() for name in part.lora_A})
        raise WeightsError(f"the model has no adapter {adapter!r}; name one of {', '.join(known)}")
    return Adapter(layers)


def _check_nothing_else(model: Any, parts: Mapping[str, Any], adapter: str) -> None:
    """Refuse a model whose training changes more than an adapter's low-rank product: SGLang would leave the rest out.

    Raises:
        WeightsError: whole layers, tokens, biases or other weights are trained, or the weights below the adapter are
            not those that it was made for.
    """
    remedy = "pass the model to update_weights, which merges it"
    for owner in ("modules_to_save", "trainable_tokens_delta"):
        if any(adapter in getattr(part, owner, ()) for part in parts.values()):
            raise WeightsError(
                f"adapter {adapter!r} trains whole layers or tokens ({owner}), which SGLang would leave out; {remedy}"
            )
    config = getattr(model, "peft_config", {}).get(adapter)
    _check_config(f"adapter {adapter!r}", {} if config is None else config.to_dict(), remedy)
    marks = (".lora_", ".modules_to_save.", ".trainable_tokens_delta.")
    others = [
        name
        for name, value in model.named_parameters()
        if value.requires_grad and not any(mark in name for mark in marks)
    ]
    if others:
        raise WeightsError(
            f"the model trains {len(others)} weights beside its adapters, such as {others[0]}, which SGLang would "
            f"leave out; {remedy}; if they are still the served ones, freeze them with requires_grad_(False)"
        )


def _check_config(name: str, config: Mapping[str, Any], remedy: str) -> None:
    """Refuse an adapter of which its configuration alone says that it is not what SGLang would make of it.

    Raises:
        WeightsError: it does not act on all tokens, or on the layers of its name; or its initialisation moved a part of
            the weights below it into it.
    """
    for option in UNLIKE_LORA:
        if config.get(option):
            raise WeightsError(
                f"{name} has {option}={config[option]!r:.60}, which SGLang would leave out; train a plain LoRA adapter"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in KEEPS_BASE:
        raise WeightsError(
            f"{name} was made with init_lora_weights={init!r}, which also changes the weights below it, and the served "
            f"ones have not changed; {remedy}, or convert it with PEFT's "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…) and pass the directory"
        )


def _whole(weight: torch.Tensor) -> torch.Tensor:
    if hasattr(weight, "full_tensor"):
        raise WeightsError(
            "the adapter is held in shards by several processes; gather it, such as with "
            "peft.get_peft_model_state_dict, save it, and pass the directory"
        )
    return weight.detach()


def _of_directory(directory: Path) -> Adapter:
    from safetensors.torch import load_file

    try:
        config = json.loads((directory / CONFIG).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds a {type(config).__name__}, not an object")
        tensors = load_file(directory / FILE)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"adapter={str(directory)!r}: {error}; pass a directory with {CONFIG} and {FILE}, as PEFT's "
            "save_pretrained writes it"
        ) from error
    kind = str(config.get("peft_type")).upper()
    if kind != "LORA" or config.get("use_dora"):
        raise WeightsError(
            f"adapter={str(directory)!r} is {'DoRA' if kind == 'LORA' else kind}; SGLang serves LoRA; merge it"
        )
    name = f"adapter={str(directory)!r}"
    _check_config(name, config, "merge it, and pass the model to update_weights")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        match = _PART.fullmatch(name)
        if match is None:
            raise WeightsError(
                f"adapter={str(directory)!r} has {name!r}, which is no layer's lora_A or lora_B, and which SGLang "
                "would leave out; merge the adapter, and pass the model to update_weights"
            )
        pairs.setdefault(match[1], {})[match[2]] = value
    layers: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
    for name, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise WeightsError(f"adapter={str(directory)!r} has one of lora_A and lora_B at {name}; save it again")
        layers[name] = (pair["A"], pair["B"], _strength(config, name, pair["A"].shape[0]))
    return Adapter(layers, directory)


def _strength(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return the factor that PEFT gives a layer's product: see ``LoraLayer.update_layer``."""
    patterns = config.get("alpha_pattern") or {}
    try:
        key = next((key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", layer)), None)
        alpha = float(config["lora_alpha"] if key is None else patterns[key])
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise WeightsError(
            f"{CONFIG} gives {layer} no strength: lora_alpha={config.get('lora_alpha')!r:.60}, "
            f"alpha_pattern={patterns!r:.60} ({type(error).__name__}: {error}); save the adapter again with PEFT's "
            "save_pretrained"
        ) from error
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_adapter(adapter: Adapter, served: ServedWeights) -> None:
    """Check that each layer is one of the served model's, of its shape, with finite values.

    Raises:
        WeightsError: one is not.
    """
    for name, (a, b, factor) in adapter.layers.items():
        if f"{name}.weight" not in served.tensors:
            raise WeightsError(
                f"the adapter changes {name}, which the served model does not have; train on its checkpoint"
            )
        shape = served.tensors[f"{name}.weight"][1]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != shape:
            raise WeightsError(
                f"the adapter's lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} at {name} do not make {shape}, "
                "which the served model has; train on its checkpoint"
            )
        if not (math.isfinite(factor) and a.isfinite().all() and b.isfinite().all()):
            raise WeightsError(f"the adapter has values at {name} that are not finite; look at the trainer's last step")


def adapter_tensors(adapter: Adapter) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the configuration that SGLang computes the same change from.

    Ranks that differ are filled up with zeros. Strengths that differ are multiplied into lora_B, in float32.
    """
    rank = max(a.shape[0] for a, _, _ in adapter.layers.values())
    factors = {factor for _, _, factor in adapter.layers.values()}
    common = factors.pop() if len(factors) == 1 else None
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b, factor) in adapter.layers.items():
        missing = rank - a.shape[0]
        b = b if common is not None else b.float() * factor
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank * (1.0 if common is None else common),
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in adapter.layers}),
    }
    return tensors, config


def load(
    receiver: Receiver,
    name: str,
    adapter: Adapter,
    version: str,
    *,
    server_info: Mapping[str, Any],
    replace: bool,
    taken: Callable[[Path], None] | None = None,
) -> None:
    """Load a checked adapter into an engine under a name, and move the version of its weights.

    Args:
        receiver: the engine.
        name: the name that requests give in ``lora_path``.
        adapter: the adapter.
        version: the new version.
        server_info: SGLang's ``/server_info``.
        replace: whether the engine has an adapter of that name, which is unloaded first.
        taken: called with the adapter's directory when the engine has it, before the directory is deleted.

    Raises:
        CapabilityError: the engine serves no adapters, or none of this rank; or it is not known to read this machine's
            files, and the adapter has no directory that SGLang could read as it is.
        EngineError: the engine refused. A replaced adapter is unloaded then, and the message says so. Or somebody has
            paused the engine, where no adapter can be replaced; then it keeps its own.
    """
    tensors, config = adapter_tensors(adapter)
    _check_server(receiver.name, server_info, config["r"])
    call = receiver.call
    held: AbstractContextManager[bool] = drained(call) if receiver.has_server_half else nullcontext(False)
    with _directory(receiver, adapter, tensors, config) as directory, held as was_paused:
        if replace and was_paused:
            raise EngineError(
                f"{receiver.name} is paused, and SGLang unloads adapter {name!r} only when the requests that use it "
                "have ended, which stand still; call continue_generation, and load the adapter again"
            )
        if replace:
            unload(call, name)
        try:
            answer = call("load_lora_adapter", {"lora_name": name, "lora_path": str(directory)})
            succeeded(answer, f"load adapter {name!r} from {directory}")
        except EngineError as error:
            if not replace:
                raise
            raise EngineError(f"{error}; the adapter {name!r} of before is unloaded already: load one again") from error
        call("update_weight_version", {"new_version": version, "abort_all_requests": False})
        if taken is not None:
            taken(directory)


@contextmanager
def _directory(
    receiver: Receiver, adapter: Adapter, tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> Iterator[Path]:
    """Write an adapter to memory (tmpfs) for an engine on this machine; another must see its own directory."""
    if receiver.reads_local_files or receiver.network is None:
        from safetensors.torch import save_file

        with checkpoint_directory(sum(value.numel() * value.element_size() for value in tensors.values())) as directory:
            save_file(tensors, directory / FILE, metadata={"format": "pt"})
            (directory / CONFIG).write_text(json.dumps(config))
            yield directory
        return
    if adapter.directory is None or not _reads_alike(adapter):
        raise CapabilityError(
            f"{receiver.name} is not known to read this machine's files; save the adapter, of one rank and one "
            "strength, to a directory that both machines see under one path, and pass that path"
        )
    yield adapter.directory


def _reads_alike(adapter: Adapter) -> bool:
    """Return whether SGLang reads the same adapter from its own directory."""
    assert adapter.directory is not None
    config = json.loads((adapter.directory / CONFIG).read_text())
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), (int, float)):
        return False  # SGLang reads both
    rank, strength = config["r"], config["lora_alpha"] / config["r"]
    return all(a.shape[0] == rank and math.isclose(factor, strength) for a, _, factor in adapter.layers.values())


def _check_server(name: str, server_info: Mapping[str, Any], rank: int) -> None:
    if not server_info.get("enable_lora"):
        raise CapabilityError(
            f"{name} was started without LoRA; start it with enable_lora=True, max_lora_rank=…, lora_target_modules=…"
        )
    if (server_info.get("dp_size") or 1) > 1:
        raise CapabilityError(
            f"{name} runs with dp_size={server_info['dp_size']}, and SGLang loads adapters into servers of dp_size=1 "
            "alone; start several servers"
        )
    most = server_info.get("max_lora_rank")
    if most is not None and rank > most:
        raise CapabilityError(
            f"the adapter has rank {rank}, and {name} was started with max_lora_rank={most}; start it with more"
        )


def unload(call: ControlCall, name: str) -> None:
    """Unload an adapter from an engine, which waits for the requests that use it.

    Raises:
        EngineError: the engine has no such adapter.
    """
    succeeded(call("unload_lora_adapter", {"lora_name": name}), f"unload adapter {name!r}")
