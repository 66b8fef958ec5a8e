"""The plain model's weights out of a trainer's module: compiled, data-parallel, sharded, with adapters.

Knows the wrappers of torch, PEFT, DeepSpeed and TorchRL by their parts, and imports none of them. Knows nothing of
servers, nor of processes that hold one model together: see `sharding`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from torchrl_sglang_hidden.errors import WeightsError

__all__ = ["LazyWeights", "inner_model", "named_weights", "plain_names", "size_of", "split", "to_checkpoint"]

# Parts that wrappers put into the names of a model's parameters: torch.compile, activation checkpointing, FSDP.
PARTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
DATA_PARALLEL = "module."
# bitsandbytes' classes of parameters, as in QLoRA.
PACKED = frozenset({"Params4bit", "Int8Params"})
BASE, SAVED, ORIGINAL = "base_layer", "modules_to_save", "original_module"
# Where PEFT's trainable_token_indices puts the layer that has the tokens, inside of the one that it takes the place of.
TOKENS = ".token_adapter"


class LazyWeights(Mapping[str, torch.Tensor]):
    """Weights by name, of which some are computed each time they are read, so that no second model stands in memory.

    Args:
        like: a tensor of each weight's shape and dtype; the weight itself where `compute` has none of the name.
        compute: makes the weight, by name.
    """

    def __init__(
        self, like: Mapping[str, torch.Tensor], compute: Mapping[str, Callable[[], torch.Tensor]] | None = None
    ) -> None:
        self.like, self._compute = like, compute or {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._compute[name]() if name in self._compute else self.like[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)

    def renamed(self, given: Mapping[str, str]) -> LazyWeights:
        """Return the weights whose given names stand in a dictionary, by its keys."""
        compute = {name: self._compute[old] for name, old in given.items() if old in self._compute}
        return LazyWeights({name: self.like[old] for name, old in given.items()}, compute)


def size_of(weights: Mapping[str, torch.Tensor], name: str) -> int:
    """Return the bytes of a weight, without computing it; of the whole one where this process holds a shard."""
    like = weights.like[name] if isinstance(weights, LazyWeights) else weights[name]
    return like.numel() * like.element_size()


def split(tensors: Mapping[str, torch.Tensor], bucket_bytes: int) -> list[list[str]]:
    """Return the names of the tensors in groups that each fill a bucket; an empty group where there are none."""
    buckets: list[list[str]] = [[]]
    size = 0
    for name in tensors:
        if size >= bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(name)
        size += size_of(tensors, name)
    return buckets


def plain_names(weights: Mapping[str, Any]) -> dict[str, str]:
    """Return the given name for each name without what wrappers added, such as ``_orig_mod.`` and ``module.``.

    Raises:
        WeightsError: two names that differ in wrappers alone.
    """
    plain: dict[str, str] = {}
    for name in weights:
        short = ".".join(part for part in name.split(".") if part not in PARTS)
        if short in plain:
            raise WeightsError(f"{plain[short]} and {name} are the same weight, {short}; pass one of the two")
        plain[short] = name
    # DataParallel wraps the whole model, or nothing of it: a model may have a part of that name.
    while plain and all(name.startswith(DATA_PARALLEL) for name in plain):
        plain = {name.removeprefix(DATA_PARALLEL): given for name, given in plain.items()}
    return plain


def inner_model(module: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside compiled, data-parallel, PEFT and TorchRL wrappers, in whatever order they are nested.

    Raises:
        WeightsError: a kind of trainer whose modules do not hold the model's weights.
    """
    _refuse(module)
    parts = module._modules
    # A compiled or PEFT model answers for the attributes of the model inside: ask for parts, and ask the class.
    if (compiled := parts.get("_orig_mod")) is not None:
        return inner_model(compiled)
    if (adapted := parts.get("base_model")) is not None and hasattr(module, "peft_config"):
        return inner_model(adapted)
    if _is_hugging_face(module):
        return module
    wrapped = parts["module"] if parts.get("module") is not None else parts.get("model")
    if wrapped is None:
        return module
    inner = inner_model(wrapped)
    # What is no wrapper may have a part of that name too, beside its head.
    return inner if _is_hugging_face(inner) or len(parts) == 1 else module


def _is_hugging_face(module: torch.nn.Module) -> bool:
    return hasattr(type(module), "save_pretrained")


def _refuse(module: torch.nn.Module) -> None:
    """Raise for trainers whose modules do not hold the model's weights."""
    name = type(module).__name__
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        raise WeightsError(
            f"weights is a {name} with FSDP1's flat parameters, which carry no weight's name; shard with FSDP2's "
            "torch.distributed.fsdp.fully_shard, or pass the whole state dict of FSDP.state_dict_type(…)"
        )
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        raise WeightsError(
            f"weights is a {name} whose parameters DeepSpeed ZeRO-3 keeps in parts; gather them with "
            "deepspeed.zero.GatheredParameters and pass a state dict"
        )
    configs = getattr(module, "peft_config", None)
    if isinstance(configs, Mapping) and any(getattr(c, "is_prompt_learning", False) for c in configs.values()):
        raise WeightsError(
            f"weights is a {name} that learns a prompt, which no weight of the served model holds; train LoRA instead"
        )


def named_weights(model: torch.nn.Module) -> LazyWeights:
    """Return a model's weights by the names that they have in it, adapters merged; the model is left as it is.

    PEFT's own ``merge`` runs on a copy of one layer at a time, each time its weight is read.

    Raises:
        WeightsError: the trainer keeps weights quantised.
    """
    packed = {type(value).__name__ for value in model.parameters()} & PACKED
    if packed:
        raise WeightsError(
            f"the trainer keeps its weights quantised ({', '.join(sorted(packed))}), and the server wants whole ones; "
            "give its adapter alone to load_adapter, or pass a copy after model.dequantize()"
        )
    state = model.state_dict()
    parts: dict[str, Any] = dict(model.named_modules())
    layers = {name: part for name, part in parts.items() if hasattr(part, "merge") and BASE in part._modules}
    saved = {name: part for name, part in parts.items() if SAVED in part._modules}
    found: dict[str, torch.Tensor] = {}
    compute: dict[str, Callable[[], torch.Tensor]] = {}
    for name, value in state.items():
        owner = next((prefix for prefix in _prefixes(name) if prefix in layers or prefix in saved), None)
        if owner is None:
            found[name] = value
            continue
        first, *rest = name.removeprefix(f"{owner}.").split(".")
        own = ".".join([owner.removesuffix(TOKENS), *rest])
        if first == BASE:  # what else an adapted layer holds is the adapter's own
            found[own] = value
            compute[own] = partial(_merged, layers[owner], rest)
        elif first == ORIGINAL:
            # As PEFT's AuxiliaryTrainingWrapper chooses: an active adapter need not have this layer.
            wrapper = saved[owner]
            own_copy = wrapper.active_adapters and set(wrapper.active_adapters) <= wrapper.modules_to_save.keys()
            used = f"{SAVED}.{wrapper.active_adapters[0]}" if own_copy and not wrapper.disable_adapters else ORIGINAL
            found[own] = state[".".join([owner, used, *rest])]
    return LazyWeights(found, compute).renamed(plain_names(found))


def _prefixes(name: str) -> Iterator[str]:
    """Yield the modules that a weight's name goes through, from the outermost."""
    parts = name.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts)))


@torch.no_grad()
def _merged(layer: Any, path: list[str]) -> torch.Tensor:
    """Return one weight of an adapted layer as the layer computes with it now."""
    layer = copy.deepcopy(layer)
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()
    elif set(layer.active_adapters) - set(layer.merged_adapters):
        try:
            layer.merge()
        except NotImplementedError as error:
            raise WeightsError(f"the trainer's adapter cannot be merged: {error}; train a plain LoRA one") from error
    value: Any = layer.get_base_layer()
    for part in path:
        value = getattr(value, part)
    tensor: torch.Tensor = value.detach()
    return tensor


def to_checkpoint(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Rename weights as Hugging Face's checkpoints do: transformers 5 fuses the experts of some models.

    Args:
        model: the model, as `inner_model` returns it.
        weights: its weights, or some of them, as `named_weights` returns them.
    """
    if not _is_hugging_face(model):
        return weights
    from transformers.core_model_loading import revert_weight_conversion

    # An empty list is "nothing to do", and yet transformers would read and copy every weight.
    if getattr(model, "_weight_conversions", None) == []:
        return weights
    converted: Mapping[str, torch.Tensor] = revert_weight_conversion(model, weights)
    return converted
