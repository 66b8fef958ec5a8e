"""Reads the description of an engine when a client connects: its sizes, and what it can return.

Knows nothing of requests, nor of how a payload travels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torchrl_sglang_hidden.errors import CapabilityError, ProtocolError
from torchrl_sglang_hidden.protocol import CHANNEL, Status
from torchrl_sglang_hidden.protocol.shared_memory import is_shared
from torchrl_sglang_hidden.records import READING, EngineInfo

__all__ = ["ModelSizes", "read_info", "warm_up"]


_WARM_UP_TOKENS = 8


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
    states = [state.get(CHANNEL) for state in server_info.get("internal_states") or [{}]]
    if all(state is None or state.get("layers", ()) is not None for state in states):
        return None
    # One prompt for each data-parallel rank of the engine. The first token's states are alike whatever the model gets
    # wrong, and the check needs more than them.
    vocab_size = min((state["vocab_size"] for state in states if state and "vocab_size" in state), default=1)
    prompt = [index % vocab_size for index in range(_WARM_UP_TOKENS)]
    return {"input_ids": [prompt] * len(states), "sampling_params": dict(READING)}


def _stock_refusal(server_info: Mapping[str, Any]) -> str:
    """Return why stock hidden states cannot be trusted on this server; empty where they can."""
    if server_info.get("speculative_algorithm"):
        return f"speculative decoding ({server_info['speculative_algorithm']}) gives rows of rejected tokens"
    if server_info.get("enable_return_aux_hidden_states"):
        return "--enable-return-aux-hidden-states packs other layers' states"
    if (server_info.get("pp_size") or 1) > 1:
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
        ProtocolError: the server half speaks another protocol, or a field is missing.
        CapabilityError: the server does not generate text.
    """
    if not model_info.get("is_generation", True) or server_info.get("skip_tokenizer_init"):
        raise CapabilityError(
            f"the server at model {model_info.get('model_path')!r} does not generate text; start it with a causal "
            "language model and without --skip-tokenizer-init"
        )
    states = [state.get(CHANNEL) for state in server_info.get("internal_states") or [{}]]
    statuses = [Status.unpack(state) for state in states if state is not None]
    everywhere = len(statuses) == len(states)
    try:
        if statuses:
            first = statuses[0]
            sizes = ModelSizes(*(getattr(first, name) for name in ModelSizes._fields))
        else:
            sizes = ask_model(model_info["model_path"])
        context_length = server_info.get("context_length") or sizes.context_length
        pools = everywhere and all(status.layers != () for status in statuses)
        because = next((status.because for status in statuses if status.because), _stock_refusal(server_info))
        # The last layer needs no check, and is there before the first forward step.
        layers = [status.layers or (-1,) for status in statuses] if pools else [(-1,)]
        return EngineInfo(
            model_path=model_info["model_path"],
            tokenizer_path=model_info.get("tokenizer_path") or model_info["model_path"],
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            num_layers=sizes.num_layers,
            layers=tuple(sorted(set(layers[0]).intersection(*layers))),
            context_length=context_length,
            # SGLang refuses a prompt that fills the context or the KV cache: one token must fit behind it.
            max_prompt_tokens=min(context_length, server_info["max_req_input_len"]) - 1,
            weight_version=str(model_info["weight_version"]),
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
            max_sampling_mask=server_info.get("sampling_mask_max_tokens") or 0,
            returns_routed_experts=bool(server_info.get("enable_return_routed_experts")),
            takes_images=_takes_images(model_info, server_info, sizes),
            max_images=(server_info.get("limit_mm_data_per_request") or {}).get("image"),
            image_token_id=sizes.image_token_id,
        )
    except KeyError as error:
        raise ProtocolError(
            f"the server's description lacks {error}; use SGLang 0.5.23, which this client is written for"
        ) from error
