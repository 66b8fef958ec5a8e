"""Reads the description of an engine when a client connects: its sizes, and what it can return.

Knows nothing of requests, nor of how a payload travels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torchrl_sglang_hidden.errors import CapabilityError, ProtocolError
from torchrl_sglang_hidden.protocol import CHANNEL, Status, excerpt
from torchrl_sglang_hidden.protocol.excerpts import as_count
from torchrl_sglang_hidden.protocol.shared_memory import is_shared
from torchrl_sglang_hidden.records import READING, EngineInfo

__all__ = ["ModelSizes", "read_info", "warm_up"]


_WARM_UP_TOKENS = 8
# More than any model has. What is made for each token or row is of these sizes: a wrong one would fill the memory.
_LIMITS = {"vocab_size": 2**24, "hidden_size": 2**20, "num_layers": 2**14, "context_length": 2**31 - 1}


class ModelSizes(NamedTuple):
    """Holds what a model's configuration says: V, D, decoder layers, tokens of context, the id in an image's place."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    context_length: int
    image_token_id: int | None = None


def warm_up(server_info: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a payload to send before `read_info`; None where none is needed.

    The server half checks its layers on the first forward step of some tokens, and only then knows which it gives.
    SGLang makes such a step before it says that it is ready, unless it was started with ``--skip-server-warmup``.
    """
    states = _states_of(server_info)
    if all(state is None or state.get("layers", ()) is not None for state in states):
        return None
    # One prompt for each data-parallel rank of the engine. The first token's states are alike whatever the model gets
    # wrong, and the check needs more than them.
    sizes = [state["vocab_size"] for state in states if state and "vocab_size" in state]
    # `read_info` says what is wrong with a size that is none.
    vocab_size = min((size for size in sizes if type(size) is int and size > 0), default=1)
    prompt = [index % vocab_size for index in range(_WARM_UP_TOKENS)]
    return {"input_ids": [prompt] * len(states), "sampling_params": dict(READING)}


def _states_of(server_info: Mapping[str, Any]) -> list[Mapping[str, Any] | None]:
    """Return what the server half says of itself on each rank; None where there is none.

    Raises:
        ProtocolError: it is something else than what a server half writes.
    """
    ranks = server_info.get("internal_states") or [{}]
    if isinstance(ranks, list) and all(isinstance(rank, Mapping) for rank in ranks):
        states = [rank.get(CHANNEL) for rank in ranks]
        if all(state is None or isinstance(state, Mapping) for state in states):
            return states
    raise ProtocolError(
        f"the server's internal_states are {excerpt(ranks, 200)}, expected an object for each rank; is that an SGLang "
        "server?"
    )


def _stock_refusal(server_info: Mapping[str, Any]) -> str:
    """Return why stock hidden states cannot be trusted on this server; empty where they can."""
    if server_info.get("speculative_algorithm"):
        return f"speculative decoding ({excerpt(server_info['speculative_algorithm'])}) gives rows of rejected tokens"
    if server_info.get("enable_return_aux_hidden_states"):
        return "--enable-return-aux-hidden-states packs other layers' states"
    if (_count(server_info, "pp_size") or 1) > 1:
        return f"SGLang loses hidden states between pipeline stages (pp_size={server_info['pp_size']})"
    return ""


def _full_states(server_info: Mapping[str, Any]) -> bool:
    """Return whether a request may ask for stock hidden states of all its positions."""
    mode = server_info.get("return_hidden_states_mode")
    return mode == "full" or (mode is None and bool(server_info.get("enable_return_hidden_states")))


def _takes_images(model_info: Mapping[str, Any], server_info: Mapping[str, Any], sizes: ModelSizes) -> bool:
    """Return whether a model reads images; warn where nobody knows what stands for one."""
    if not model_info.get("has_image_understanding") or server_info.get("language_model_only"):
        return False
    if sizes.image_token_id is None:
        warnings.warn(
            f"the configuration of {model_info['model_path']!r} does not say which token stands for an image, so that "
            "ids with one and without an image are sent as they are; SGLang may hang or answer 500 then: give an image "
            "for each",
            stacklevel=3,
        )
    return True


def read_info(
    model_info: Mapping[str, Any],
    server_info: Mapping[str, Any],
    ask_model: Callable[[str], ModelSizes],
) -> EngineInfo:
    """Read the description of an engine.

    Args:
        model_info: SGLang's ``/model_info``.
        server_info: SGLang's ``/server_info``.
        ask_model: returns the sizes of the model at a path, for an engine without the server half.

    Warns, where the model reads images and its configuration does not say which token stands for one.

    Raises:
        ProtocolError: the server half speaks another protocol, or a field is missing or of another type.
        CapabilityError: the server does not generate text.
    """
    if not model_info.get("is_generation", True) or server_info.get("skip_tokenizer_init"):
        raise CapabilityError(
            f"the server at model {model_info.get('model_path')!r} does not generate text; start it with a causal "
            "language model and without --skip-tokenizer-init"
        )
    states = _states_of(server_info)
    statuses = [Status.unpack(state) for state in states if state is not None]
    everywhere = len(statuses) == len(states)
    try:
        sizes = _sizes_of(statuses[0]) if statuses else ask_model(_text(model_info, "model_path"))
        _check_sizes(sizes)
        context_length = _count(server_info, "context_length", _LIMITS["context_length"]) or sizes.context_length
        pools = everywhere and all(status.layers != () for status in statuses)
        because = next((status.because for status in statuses if status.because), _stock_refusal(server_info))
        # The last layer needs no check, and is there before the first forward step.
        layers = [status.layers or (-1,) for status in statuses] if pools else [(-1,)]
        if max(layers[0], default=-1) >= sizes.num_layers:
            raise ValueError(f"layers are {excerpt(layers[0])}, and the model has {sizes.num_layers}")
        max_input = as_count(server_info["max_req_input_len"], "max_req_input_len")
        return EngineInfo(
            model_path=_text(model_info, "model_path"),
            tokenizer_path=_text(model_info, "tokenizer_path" if model_info.get("tokenizer_path") else "model_path"),
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            num_layers=sizes.num_layers,
            layers=tuple(sorted(set(layers[0]).intersection(*layers))),
            context_length=context_length,
            # SGLang refuses a prompt that fills the context or the KV cache: one token must fit behind it.
            max_prompt_tokens=min(context_length, max_input) - 1,
            weight_version=_text(model_info, "weight_version"),
            pools_in_server=pools,
            returns_hidden_states=_full_states(server_info)
            and not _stock_refusal(server_info)
            and all(status.normed for status in statuses),
            honours_seeds=bool(server_info.get("enable_deterministic_inference")),
            honours_priorities=bool(server_info.get("enable_priority_scheduling")),
            no_states_because=because,
            shares_memory=pools and all(is_shared(status.shared) for status in statuses),
            constraints=tuple(sorted(set.intersection(*(set(status.constraints) for status in statuses))))
            if pools
            else (),
            takes_processors=bool(server_info.get("enable_custom_logit_processor")),
            raw_log_probs=any(status.raw_log_probs for status in statuses),
            max_sampling_mask=_count(server_info, "sampling_mask_max_tokens") or 0,
            returns_routed_experts=bool(server_info.get("enable_return_routed_experts")),
            takes_images=_takes_images(model_info, server_info, sizes),
            max_images=_count(server_info.get("limit_mm_data_per_request") or {}, "image"),
            image_token_id=sizes.image_token_id,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        wrong = f"lacks {error}" if isinstance(error, KeyError) else f"is wrong, {error}"
        raise ProtocolError(
            f"the server's description {wrong}; use SGLang 0.5.23, which this client is written for"
        ) from error


def _sizes_of(status: Status) -> ModelSizes:
    return ModelSizes(*(getattr(status, name) for name in ModelSizes._fields))


def _check_sizes(sizes: ModelSizes) -> None:
    for name, limit in _LIMITS.items():
        if as_count(getattr(sizes, name), name, limit) < 1:
            raise ValueError(f"{name} is 0, expected at least 1")


def _text(page: Mapping[str, Any], name: str) -> str:
    if not isinstance(page[name], str):
        raise TypeError(f"{name} is {excerpt(page[name])}, expected a string")
    return str(page[name])


def _count(page: Mapping[str, Any], name: str, limit: int | None = None) -> int | None:
    return None if page.get(name) is None else as_count(page[name], name, limit)
