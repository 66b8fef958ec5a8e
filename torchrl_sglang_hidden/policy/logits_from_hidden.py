"""Logits from hidden states, for programs that hold the model's head.

Knows nothing of engines, protocols or TensorDicts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from torch.nn import functional

from torchrl_sglang_hidden.errors import AlignmentError, InputError, InputTypeError, TokenIdError, WeightsError

__all__ = ["logits_from_hidden"]

Ragged: TypeAlias = torch.Tensor | Sequence[torch.Tensor]
States = TypeVar("States", torch.Tensor, Sequence[torch.Tensor])


def logits_from_hidden(
    states: States,
    head: Any,
    *,
    tokens: Ragged | None = None,
    log_probs: Ragged | None = None,
    tolerance: float = 1e-3,
    weight_version: Any = None,
    head_version: str | None = None,
) -> States:
    """Compute the logits of a model's head from the states of its last layer, in float32.

    With a wrapper that has ``HiddenSpec(tokens=True)``, row t of the states in ``"response"`` gives the logits that
    response token t was drawn from. In ``"full"``, and of a scored sequence, row n gives the logits of token n + 1.

    Args:
        states: ``[*, N, D]`` of layer -1, or a list of such tensors, one per row, as ``td.get(key, as_list=True)``
            gives them.
        head: a Hugging Face causal language model, whose own code then scales, caps and biases the logits; or the head
            alone where it does nothing of that, a ``torch.nn.Linear`` or its weight ``[V, D]``. A model may have PEFT
            adapters: those of its head count, without their dropout. Not written to. Gradients reach it.

    Keyword Args:
        tokens: int64 ``[*, N]``, or a list of such rows: the token that was drawn from each row, for the check.
        log_probs: their log-probs as the wrapper returned them, in the same shape; NaN where none was measured.
            Sampled at temperature 1, without constraints or penalties, or scored.
        tolerance: by how much a log-prob may differ. Of a model that is served in bfloat16 allow 0.1.
        weight_version: the rollout's, ``td["weight_version"]``, one string or one per row.
        head_version: the weight version of the head.

    Returns:
        float32 ``[*, N, V]`` on the head's device, or a list of them.

    Raises:
        AlignmentError: a log-prob differs from that of these logits by more than ``tolerance``.
        WeightsError: the rollout is of another weight version than the head.
        InputError: shapes that do not fit one another, or one of two arguments that belong together.
        InputTypeError: states that are no floating tensors, or a head that is none of the above.
        TokenIdError: a token that the head does not have.

    Example:
        >>> # policy: SGLangHiddenWrapper(…, hidden=HiddenSpec(tokens=True)); model: the same weights
        >>> out = policy(td)
        >>> logits = logits_from_hidden(
        ...     out.get(("token_hidden_states", "response"), as_list=True),
        ...     model,
        ...     tokens=out.get(("tokens", "response"), as_list=True),
        ...     log_probs=out.get(("log_probs", "response"), as_list=True),
        ... )
    """
    if (tokens is None) != (log_probs is None):
        raise InputError("tokens and log_probs belong together: the check needs both; give the other one, or neither")
    if (weight_version is None) != (head_version is None):
        raise InputError(
            f"weight_version={weight_version!r:.80} and head_version={head_version!r} belong together; give the other "
            "one, or neither"
        )
    other = next((found for found in _texts(weight_version) if found != head_version), None)
    if other is not None:
        raise WeightsError(
            f"the states are of weight version {other!r} and the head of {head_version!r}; use the head of the weights "
            "that made the states"
        )
    if isinstance(states, torch.Tensor):
        return _of_row("", states, head, tokens, log_probs, tolerance)
    rows = [list(_rows(name, value, len(states))) for name, value in (("tokens", tokens), ("log_probs", log_probs))]
    return [
        _of_row(f"row {row}, ", states_ND, head, rows[0][row], rows[1][row], tolerance)
        for row, states_ND in enumerate(states)
    ]


def _texts(versions: Any) -> Iterable[str]:
    """Yield the strings in a string, a list of strings, or a TensorDict's container of strings."""
    if versions is None:
        return
    if isinstance(versions, str):
        yield versions
        return
    if not isinstance(versions, (list, tuple)):
        # tensordict's own containers of strings, one without a batch or a stack.
        versions = versions.tolist() if getattr(versions, "batch_dims", 0) else [getattr(versions, "data", versions)]
    for version in versions:
        if not isinstance(version, (str, list, tuple)):
            raise InputTypeError(f"weight_version: {version!r:.80} is a {type(version).__name__}; expected strings")
        yield from _texts(version)


def _rows(name: str, value: Any, length: int) -> Iterable[Any]:
    if value is None:
        return [None] * length
    if len(value) != length:
        raise InputError(f"{length} rows of states and {len(value)} of {name}; give one for each")
    return list(value)


def _of_row(name: str, states_ND: Any, head: Any, tokens_N: Any, log_probs_N: Any, tolerance: float) -> torch.Tensor:
    if not isinstance(states_ND, torch.Tensor) or not states_ND.is_floating_point():
        is_a = f"tensor of {states_ND.dtype}" if isinstance(states_ND, torch.Tensor) else type(states_ND).__name__
        raise InputTypeError(f"{name}states: a {is_a}; expected a floating tensor [*, N, D], or a list of them")
    # PEFT's model around the model.
    head = head.get_base_model() if hasattr(head, "peft_config") and hasattr(head, "get_base_model") else head
    linear, weight_VD = _read_head(head)
    if states_ND.ndim < 2 or states_ND.shape[-1] != weight_VD.shape[1]:
        raise InputError(
            f"{name}states: shape {tuple(states_ND.shape)}, and the head is {tuple(weight_VD.shape)}; expected [*, N, "
            f"{weight_VD.shape[1]}]"
        )
    float_ND = states_ND.to(weight_VD.device, torch.float32)
    with torch.autocast(weight_VD.device.type, enabled=False):
        if linear is head:
            logits_NV = _in_float32(linear)(float_ND)
        else:
            flat_NV = _by_model(head, float_ND.flatten(0, -2), _in_float32(linear))
            logits_NV = flat_NV.reshape(*float_ND.shape[:-1], flat_NV.shape[-1])
    if tokens_N is not None:
        _check(name, logits_NV.detach(), tokens_N, log_probs_N, tolerance)
    return logits_NV


def _read_head(head: Any) -> tuple[Any, torch.Tensor]:
    """Return what makes logits of states: a module or its weight; and that weight ``[V, D]``."""
    linear = head.get_output_embeddings() if hasattr(head, "get_output_embeddings") else head
    # PEFT puts a layer of its own around one that has an adapter, and says the weight inside.
    is_module = isinstance(linear, nn.Linear) or type(linear).__module__.startswith("peft.")
    weight = linear.weight if is_module else linear
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise InputTypeError(
            f"head: a {type(head).__name__}"
            + (f" with a {type(linear).__name__} for a head" if linear is not head else "")
            + "; expected a Hugging Face causal language model, a torch.nn.Linear or its weight [V, D], of a floating "
            "dtype"
        )
    return linear, weight


def _in_float32(linear: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a head that computes in float32; a module, also of a weight alone."""
    return (
        _twin(linear) if isinstance(linear, nn.Module) else functools.partial(functional.linear, weight=linear.float())
    )


def _twin(module: nn.Module) -> nn.Module:
    """Return a copy of a module with the same parameters, in float32 and without dropout.

    A copy, for another thread may be training the module. Dropout would be drawn anew where a loss computes logits a
    second time for its gradient, and the served weights know none.
    """
    twin: nn.Module = object.__new__(type(module))
    # Without a `forward` that a library put on the object, and without its hooks.
    own = {name: value for name, value in vars(module).items() if name != "forward"}
    twin.__dict__ = own | {name: {} for name in own if name.endswith("_hooks")} | {"training": False}
    for kind in ("_parameters", "_buffers"):
        values = vars(module)[kind]
        twin.__dict__[kind] = {
            name: one.float() if one is not None and one.is_floating_point() else one for name, one in values.items()
        }
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child) for name, child in module._modules.items()
    }
    return twin


# --- a model's own code, without its layers -------------------------------------------------------------------------
#
# Models scale and cap their logits under names that mean other things elsewhere: Granite divides by `logits_scaling`,
# HyperCLOVA X multiplies by it. So the model's own `forward` does it, with the states in the place of its decoder.


class _DecoderOutput(tuple[torch.Tensor]):
    """The output of a decoder that has states and nothing else."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Decoder(nn.Module):
    def __init__(self, real: nn.Module, states_1ND: torch.Tensor) -> None:
        super().__init__()
        self.__dict__["real"] = real
        self.states_1ND, self.called = states_1ND, False

    def __getattr__(self, name: str) -> Any:
        # Falcon-H1 keeps its multiplier of the logits here.
        return getattr(self.real, name)

    def forward(self, *args: Any, **kwargs: Any) -> _DecoderOutput:
        self.called = True
        return _DecoderOutput((self.states_1ND,))


def _by_model(model: Any, states_ND: torch.Tensor, head: Any) -> torch.Tensor:
    children = dict(model._modules)
    prefix = getattr(model, "base_model_prefix", "")
    heads = [name for name, child in children.items() if child is model.get_output_embeddings()]
    if heads and prefix in children:
        decoder = _Decoder(children[prefix], states_ND[None])
        # A copy, for another thread may be training the model. Without a `forward` that a library put on the object,
        # such as accelerate, which would run the model itself.
        twin = object.__new__(type(model))
        twin.__dict__ = {name: value for name, value in vars(model).items() if name != "forward"}
        twin.__dict__["_modules"] = children | {heads[0]: head, prefix: decoder}
        ids = torch.zeros(1, len(states_ND), dtype=torch.int64, device=states_ND.device)
        logits_NV: torch.Tensor = twin(input_ids=ids, use_cache=False).logits[0].float()
        if decoder.called:
            return logits_NV
    raise InputTypeError(
        f"head: a {type(model).__name__}, whose forward is not that of a decoder and a head; pass the causal language "
        "model inside it, or where nothing scales or caps its logits model.get_output_embeddings()"
    )


def _check(name: str, logits_NV: torch.Tensor, tokens: Any, log_probs: Any, tolerance: float) -> None:
    """Check the log-probs of tokens against the log-softmax of the logits."""
    shape, num_tokens = logits_NV.shape[:-1], logits_NV.shape[-1]
    for what, value in (("tokens", tokens), ("log_probs", log_probs)):
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        if found != tuple(shape):
            raise InputError(f"{name}{what}: {found} for states of {tuple(shape)}; give a tensor of the same shape")
    ids_N = tokens.to(logits_NV.device, torch.int64)
    outside = ids_N[(ids_N < 0) | (ids_N >= num_tokens)]
    if outside.numel():
        raise TokenIdError(f"{name}tokens: id {int(outside[0])}; the head has ids 0..{num_tokens - 1}")
    returned_N = log_probs.to(logits_NV.device, torch.float32)
    own_N = logits_NV.gather(-1, ids_N[..., None])[..., 0] - logits_NV.logsumexp(-1)
    wrong_N = ~((own_N - returned_N).abs() <= tolerance) & ~returned_N.isnan()
    if wrong_N.any():
        index = tuple(wrong_N.nonzero()[0].tolist())
        at = index[0] if len(index) == 1 else index
        raise AlignmentError(
            f"{name}token {at}, id {int(ids_N[index])}: its log-prob is {float(returned_N[index]):.4f}, and "
            f"{float(own_N[index]):.4f} by these states and this head, further apart than tolerance={tolerance}; "
            f"{int(wrong_N.sum())} of {wrong_N.numel()} are. Give the states of layer -1 that produced these tokens, "
            "the head of the same weights, and log-probs of temperature 1 without constraints; or a wider tolerance "
            "for a model that is served in a narrower dtype than float32"
        )
