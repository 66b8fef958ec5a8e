"""What the engine should have said: Hugging Face on the same weights, float32, on the CPU, by teacher forcing.

Knows nothing of SGLang or of the package under test: the segments are written down here a second time, on purpose.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Truth:
    """One prompt of P and one response of T tokens.

    ``states_SD`` holds the states of positions 0 … P+T-2 after the final norm; ``log_probs_T`` and ``argmax_T`` are
    those of the T positions that produced the response; ``gap_T`` is how far the best logit was ahead of the second.
    """

    num_prompt: int
    states_SD: torch.Tensor
    log_probs_T: torch.Tensor
    argmax_T: list[int]
    gap_T: torch.Tensor

    def rows(self, segment: str) -> torch.Tensor:
        return {
            "prompt": self.states_SD[: self.num_prompt],
            "response": self.states_SD[self.num_prompt - 1 :],
            "full": self.states_SD,
        }[segment]

    def pooled(self, segment: str, pooling: str) -> torch.Tensor:
        rows = self.rows(segment)
        return rows.double().mean(0).float() if pooling == "mean" else rows[-1]


@functools.lru_cache(maxsize=2)
def load(model_dir: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@torch.inference_mode()
def teacher_force(
    model_dir: str, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float = 1.0
) -> Truth:
    """One forward pass over the prompt and all but the last response token, which no step ever reads."""
    model = load(model_dir)
    fed = torch.tensor([[*prompt_ids, *response_ids[:-1]]])
    states_SD = model(fed, output_hidden_states=True, logits_to_keep=1).hidden_states[-1][0]
    logits_TV = model.get_output_embeddings()(states_SD[len(prompt_ids) - 1 :])
    log_probs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    best_two_T2 = logits_TV.topk(2, dim=-1).values
    return Truth(
        num_prompt=len(prompt_ids),
        states_SD=states_SD,
        log_probs_T=log_probs_TV.gather(-1, torch.tensor(response_ids)[:, None])[:, 0],
        argmax_T=logits_TV.argmax(-1).tolist(),
        gap_T=best_two_T2[:, 0] - best_two_T2[:, 1],
    )


@functools.cache
@torch.inference_mode()
def greedy(model_dir: str, prompt_ids: tuple[int, ...], max_new_tokens: int, eos_id: int | None = None) -> list[int]:
    """The greedy response, up to and with ``eos_id``."""
    model = load(model_dir)
    fed, cache, response = torch.tensor([list(prompt_ids)]), None, []
    while len(response) < max_new_tokens and (not response or response[-1] != eos_id):
        out = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        response.append(int(out.logits[0, -1].argmax()))
        fed = torch.tensor([[response[-1]]])
    return response
