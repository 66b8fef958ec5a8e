"""A trainer for rollouts with images: Hugging Face's model as TorchRL's losses read it, from outputs alone."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.modules.distributions.discrete import LLMMaskedCategorical
from transformers import PreTrainedModel

from helpers.policy_batches import flat


class ImageTrainer(TensorDictModuleBase):
    """Reads ``tokens.full``, the masks, and at ``"pixels"`` what `SGLangHiddenWrapper(pixel_values_key=…)` wrote."""

    in_keys, out_keys = [("tokens", "full")], [("log_probs", "full")]

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def logits_NV(self, row: TensorDictBase) -> torch.Tensor:
        """Return what each token of a row without pads is drawn from; zeros for the first."""
        extra = dict(row["pixels"].items())
        if "mm_token_type_ids" in extra:
            extra["mm_token_type_ids"] = extra["mm_token_type_ids"][None]
        logits_NV = self.model(input_ids=row["tokens"].full[None], **extra).logits[0]
        return torch.cat([torch.zeros_like(logits_NV[:1]), logits_NV[:-1]])

    def log_probs_N(self, row: TensorDictBase) -> torch.Tensor:
        """Return the log-prob of each token of a row; 0 for the first."""
        ids_N = row["tokens"].full
        log_probs_N = self.logits_NV(row).log_softmax(-1).gather(-1, ids_N[:, None])[:, 0]
        return torch.cat([log_probs_N.new_zeros(1), log_probs_N[1:]])

    def _get_sft_dist(self, tensordict: TensorDictBase) -> LLMMaskedCategorical:
        """Return the distribution of every assistant's token; TorchRL pads its rows on the left."""
        rows = flat(tensordict)
        width = max(len(row["tokens"].full) for row in rows)
        logits, masks = [], []
        for row in rows:
            left = width - len(row["tokens"].full)
            logits.append(torch.nn.functional.pad(self.logits_NV(row), (0, 0, left, 0)))
            masks.append(torch.nn.functional.pad(row["masks"].all_assistant_mask, (left, 0)))
        return LLMMaskedCategorical(logits=torch.stack(logits), mask=torch.stack(masks))

    get_dist = _get_sft_dist
