"""What a head's scores must come to: its formula in numpy in float64, written down here a second time, on purpose.

Knows nothing of the package under test but the fields of a `Head`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from helpers import hf_oracle
from torchrl_sglang_hidden import Head

# The scores of the heads below are of the order of 1.
SCORE_ATOL = 1e-4


def make_head(kind: str, width: int, *, seed: int = 0, hidden: int = 24, scale: float = 1.0, **options: Any) -> Head:
    """Return a random head whose scores of normalised states are of the order of 1."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, fan_in: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator) / math.sqrt(fan_in)

    tensors = {"bias": drawn(1, fan_in=1), "weight": drawn(width, fan_in=width)}
    if kind != "linear":
        wide = {"mlp": ("hidden",), "gated": ("gate", "up")}[kind]
        tensors = {f"{part}.weight": drawn(hidden, width, fan_in=width) for part in wide}
        tensors |= {f"{part}.bias": drawn(hidden, fan_in=1) for part in wide}
        tensors |= {"output.weight": drawn(hidden, fan_in=hidden), "output.bias": drawn(1, fan_in=1)}
    if options.get("normalize") == "standard":
        tensors |= {"mean": drawn(width, fan_in=1), "std": 1 + drawn(width, fan_in=1).abs()}
    return Head(kind, tensors, **options)  # type: ignore[arg-type]


STORM_HEADS, STORM_LAYERS = ("linear", "mlp", "gated"), (0, 2)


@functools.cache
def storm_head(name: str, width: int) -> Head:
    """Return one of the heads that storms ask for, of layers that every model of the tests has."""
    options: dict[str, Any] = {"seed": 77, "normalize": "rms", "layer": {"linear": -1, "mlp": 0, "gated": 2}[name]}
    return make_head(name, width, **options, scale=1 if name == "linear" else 2)


def score(head: Head, states_ND: torch.Tensor) -> np.ndarray:
    """Return the score of each state, float64 ``[N]``."""
    weights = {name: tensor.double().numpy() for name, tensor in head.tensors.items()}
    x = states_ND.double().numpy()
    if head.normalize == "layer":
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    elif head.normalize == "rms":
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    elif head.normalize == "standard":
        x = (x - weights["mean"]) / weights["std"]

    def wide(part: str) -> np.ndarray:
        return x @ weights[f"{part}.weight"].T + weights.get(f"{part}.bias", 0.0)

    def act(values: np.ndarray) -> np.ndarray:
        match head.activation:
            case "relu":
                return np.maximum(values, 0)
            case "tanh":
                return np.tanh(values)
            case "silu":
                return values / (1 + np.exp(-values))
        return values * 0.5 * (1 + np.vectorize(math.erf)(values / math.sqrt(2)))

    match head.kind:
        case "linear":
            scores = x @ weights["weight"] + weights.get("bias", 0.0)
        case "mlp":
            scores = act(wide("hidden")) @ weights["output.weight"] + weights.get("output.bias", 0.0)
        case _:
            scores = act(wide("gate")) * wide("up") @ weights["output.weight"] + weights.get("output.bias", 0.0)
    return 1 / (1 + np.exp(-scores)) if head.output == "sigmoid" else scores


def expected(
    head: Head,
    model_dir: str,
    prompt: Sequence[int],
    response: Sequence[int],
    layers: Sequence[int],
    images: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Return the scores of prompt, response and full by Hugging Face's float32 states on the same weights.

    ``layers`` are those of all heads of a test, so that one forward pass does for them; ``images`` are the
    prompt's, data URIs.
    """
    truth = hf_oracle.teacher_force(model_dir, prompt, response, layers=layers, images=images)
    full = score(head, truth.states(head.layer))
    return {"prompt": full[: len(prompt)], "response": full[len(prompt) - 1 :], "full": full}


def assert_scores(found: torch.Tensor, expected_N: np.ndarray, what: str) -> None:
    assert found.dtype == torch.float32, what
    assert found.shape == expected_N.shape, f"{what}: {tuple(found.shape)} and {expected_N.shape}"
    apart = float(np.abs(found.double().numpy() - expected_N).max(initial=0))
    assert apart < SCORE_ATOL, f"{what}: {apart:.2e} off"


def rule_that_ends_at(scores_T: torch.Tensor, least: int) -> tuple[str, int]:
    """Return a rule that a score fulfils first at a token, from ``least`` on if there is one; and that token."""
    if not least:
        return "> -1e8", 0
    scores = scores_T.tolist()
    for token in (*range(least, len(scores)), *range(least - 1, 0, -1)):
        highest, lowest = max(scores[:token]), min(scores[:token])
        if scores[token] > highest + 1e-3:
            return f"> {(scores[token] + highest) / 2!r}", token
        if scores[token] < lowest - 1e-3:
            return f"<= {(scores[token] + lowest) / 2!r}", token
    raise AssertionError("all scores are alike: choose another prompt")
