"""A policy's constructor arguments, versions and copies, apart from the policy: part of `SGLangHiddenWrapper`."""

from __future__ import annotations

from typing import Any, Self

from tensordict.utils import NestedKey

from torchrl_sglang_hidden.engines import BatchingEngine, Engine
from torchrl_sglang_hidden.policy.config import changed_config, default_key
from torchrl_sglang_hidden.policy.prompts import InputMode

__all__ = ["Configured"]

# Arguments that the wrapper keeps under their names as they are in force.
_KEPT = (
    "tokenizer", "input_mode", "input_key", "attention_mask_key", "generate", "pad_output", "pad_model_input", "device",
    "chat_template_name", "chat_template", "prefer_tokens", "return_log_probs", "history_key", "text_key",
    "tokens_key", "masks_key", "log_probs_key", "hidden", "hidden_states_key", "token_hidden_states_key", "logits",
    "logits_key", "constraints", "action_mask_key", "action_token_ids",
)  # fmt: skip


class Configured:
    """What of torchrl's ``LLMWrapperBase`` is about the wrapper itself: its versions, its copies, its queue."""

    # What the policy is, for this part of it.
    model: Engine
    input_mode: InputMode
    input_key: NestedKey
    generate: bool
    generate_kwargs: dict[str, Any]
    tokenizer_kwargs: dict[str, Any]
    # As given: the defaults of these depend on other arguments, which `get_new_version` may change.
    _given: dict[str, Any]
    _batcher: BatchingEngine | None

    @property
    def config(self) -> dict[str, Any]:
        """Every constructor argument but the model, as it is in force."""
        kept = {name: getattr(self, name) for name in _KEPT}
        options = {"generate_kwargs": dict(self.generate_kwargs), "tokenizer_kwargs": dict(self.tokenizer_kwargs)}
        return {**kept, **options, **self._given}

    def get_new_version(self, **changes: Any) -> Self:
        """A wrapper of the same engine with some constructor arguments changed; the others are kept, all of them."""
        own_key = default_key(self.input_mode, self.generate)
        config = changed_config(
            self.config, changes, default_input_key=self.input_key == own_key, batched=self._batcher is not None
        )
        kind: Any = type(self)
        new: Self = kind(config.pop("model", self.model), **config)
        return new

    def cleanup_batching(self, *, flush: bool = False) -> None:
        """Empties the queue of callers that wait for a batch to fill, and returns at once.

        Args:
            flush: True has them sent now; False ends them with a ``concurrent.futures.CancelledError``.
        """
        # The base class calls this from __del__, on objects that were never finished too.
        batcher = self.__dict__.get("_batcher")
        if batcher is not None:
            batcher.cleanup(flush=flush)

    def __getstate__(self) -> dict[str, Any]:
        """All but the collector, which a copy does not belong to: torchrl holds it by a weak reference."""
        return {**self.__dict__, "_collector": None}

    def __del__(self) -> None:
        """Nothing to end: a call that waits holds its policy. The base class would end those of a shallow copy's."""

    def get_batching_state(self) -> dict[str, Any]:
        """The queue of callers: see `BatchingEngine.state`."""
        return {"batching_enabled": False} if self._batcher is None else self._batcher.state()
