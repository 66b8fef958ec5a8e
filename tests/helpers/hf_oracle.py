"""What the engine should have answered: Hugging Face on the same weights, float32, on the CPU, by teacher forcing.

Knows nothing of SGLang or of the package under test: the segments are written down here a second time, on purpose.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from helpers.reference_pooling import pool
from helpers.vlm_models import image_of, processor_of

FINAL = -1  # the layer id of what the head reads: the last layer's output after the final norm


@dataclass(frozen=True)
class Truth:
    """One prompt of P and one response of T tokens.

    ``states_SD`` holds the states of positions 0 … P+T-2 after the final norm, ``layer_states`` those of the decoder
    layers asked for, as they leave the layer; ``log_probs_T`` and ``argmax_T`` are those of the T positions that
    produced the response; ``gap_T`` is how far the best logit was ahead of the second.
    """

    num_prompt: int
    states_SD: torch.Tensor
    log_probs_T: torch.Tensor
    argmax_T: list[int]
    gap_T: torch.Tensor
    layer_states: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def states(self, layer: int = FINAL) -> torch.Tensor:
        """Return ``[S, D]`` of a decoder layer, with its residual and before the final norm; -1 is after the norm."""
        return self.states_SD if layer == FINAL else self.layer_states[layer]

    def rows(self, segment: str, layer: int = FINAL) -> torch.Tensor:
        states_SD = self.states(layer)
        return {
            "prompt": states_SD[: self.num_prompt],
            "response": states_SD[self.num_prompt - 1 :],
            "full": states_SD,
        }[segment]

    def pooled(self, segment: str, pooling: str, layer: int = FINAL) -> torch.Tensor:
        rows = self.rows(segment, layer)
        return pool(rows.double(), pooling).float()


@functools.lru_cache(maxsize=2)
def load(model_dir: str) -> PreTrainedModel:
    reads_images = hasattr(AutoConfig.from_pretrained(model_dir), "vision_config")
    kind = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    return kind.from_pretrained(model_dir, dtype=torch.float32).eval()


def last_states(model: PreTrainedModel, ids: Sequence[int], images: Sequence[str] = ()) -> torch.Tensor:
    """Return the states after the final norm, ``[S, D]``, of expanded ids with these images (data URIs) in them."""
    fed = torch.tensor([list(ids)])
    if not hasattr(model.config, "vision_config"):
        return model.get_decoder()(fed, use_cache=False).last_hidden_state[0]
    inputs = {}
    if images:
        pictures = [image_of(uri) for uri in images]
        inputs = dict(processor_of(model.name_or_path).image_processor(images=pictures, return_tensors="pt"))
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (fed == model.config.image_token_id).int()
    return model.model(input_ids=fed, use_cache=False, **inputs).last_hidden_state[0]


@contextmanager
def _recorded(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Yield what the decoder layers return in the forward pass inside the block, ``[S, D]`` each.

    By hooks: the tuple of ``output_hidden_states=True`` has the last layer's output only after the final norm.
    """
    outputs: dict[int, torch.Tensor] = {}

    def hook(layer: int, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        outputs[layer] = (output[0] if isinstance(output, tuple) else output)[0]

    decoders = model.get_decoder().layers
    handles = [
        decoders[layer].register_forward_hook(lambda module, args, output, layer=layer: hook(layer, output))
        for layer in set(layers) - {FINAL}
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def head(model: PreTrainedModel, states_ND: torch.Tensor) -> torch.Tensor:
    """Return the logits ``[N, V]`` of states after the final norm, scaled and softcapped where the model does that."""
    logits_NV = model.get_output_embeddings()(states_ND) / getattr(model.config, "logits_scaling", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)


def teacher_force(
    model_dir: str,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    temperature: float = 1.0,
    layers: Sequence[int] = (),
    images: Sequence[str] = (),
) -> Truth:
    """Run one forward pass over the prompt and all response tokens but the last, which no step ever reads.

    ``layers`` are those that `Truth.states` is asked for, beside -1, which is always there. ``images`` are data URIs.
    """
    return _teacher_force(model_dir, tuple(prompt_ids), tuple(response_ids), temperature, tuple(layers), tuple(images))


@functools.lru_cache(maxsize=32)
@torch.inference_mode()
def _teacher_force(
    model_dir: str,
    prompt_ids: tuple[int, ...],
    response_ids: tuple[int, ...],
    temperature: float,
    layers: tuple[int, ...],
    images: tuple[str, ...],
) -> Truth:
    model = load(model_dir)
    with _recorded(model, layers) as layer_states:
        states_SD = last_states(model, [*prompt_ids, *response_ids[:-1]], images)
    logits_TV = head(model, states_SD[len(prompt_ids) - 1 :])
    log_probs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    best_two_T2 = logits_TV.topk(2, dim=-1).values
    return Truth(
        num_prompt=len(prompt_ids),
        states_SD=states_SD,
        log_probs_T=log_probs_TV.gather(-1, torch.tensor(response_ids)[:, None])[:, 0],
        argmax_T=logits_TV.argmax(-1).tolist(),
        gap_T=best_two_T2[:, 0] - best_two_T2[:, 1],
        layer_states=layer_states,
    )
