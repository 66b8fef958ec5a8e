"""The attributes of a policy: its arguments by their own names, and what follows from them, for reading alone.

A part of `SGLangHiddenWrapper`, which programs written for TorchRL's wrappers read. Knows nothing of engines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from tensordict.utils import NestedKey

from torchrl_sglang_hidden.images.expansion import tokenizer_of
from torchrl_sglang_hidden.policy.config import ARGUMENTS, PolicyConfig
from torchrl_sglang_hidden.policy.outputs import OutputKeys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Attributes"]


def _written(name: str) -> property:
    def read(self: Attributes) -> bool:
        return getattr(self._keys, name) is not None

    read.__doc__ = f"Whether {name} is written."
    return property(read)


class Attributes:
    """Every argument of the policy as an attribute, and those that follow from several arguments."""

    # What the policy is, for this part of it.
    _config: PolicyConfig
    _keys: OutputKeys

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to change an argument in place: others follow from it, and would keep its old value."""
        if name in ARGUMENTS or name == "config":
            argument = "num_samples" if name == "config" else name
            raise AttributeError(f"{name} is read-only, as every argument is; use get_new_version({argument}=…)")
        super().__setattr__(name, value)

    @property
    def config(self) -> PolicyConfig:
        """The arguments, as they are in effect."""
        return self._config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the argument names, that of a processor, or the engine's own."""
        return cast("PreTrainedTokenizerBase", tokenizer_of(self.config.tokenizer))

    @property
    def input_key(self) -> NestedKey:
        """Where the prompts are read."""
        return self.config.prompt_key

    @property
    def inplace(self) -> Literal[True, False, "empty"]:
        """Whether outputs are written into the input."""
        return self.config.writes_inplace

    @property
    def layout(self) -> torch.layout | None:
        """Layout of the nested tensors that ragged outputs become."""
        return self.config.nested_layout

    @property
    def num_samples(self) -> int | None:
        """Responses per prompt; None for one without a dimension of its own."""
        return self.config.num_responses

    @property
    def padding_value(self) -> int:
        """The id that pads: the tokenizer's pad id, else its EOS id, else 0."""
        return self.config.padding_value

    return_text, return_tokens, return_masks, return_history = map(_written, ("text", "tokens", "masks", "history"))


def _argument(name: str) -> property:
    def read(self: Attributes) -> Any:
        return getattr(next(part for part in self.config.parts if hasattr(part, name)), name)

    read.__doc__ = f"The argument ``{name}``; see `PolicyConfig`."
    return property(read)


# The arguments by name, as TorchRL's wrappers have them. Of ``batching`` the base class says whether it is in effect.
for _name in ARGUMENTS - {"batching"} - vars(Attributes).keys():
    setattr(Attributes, _name, _argument(_name))
