"""What TorchRL's losses ask of a policy as a distribution, apart from the policy: part of `SGLangHiddenWrapper`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.utils import NestedKey, unravel_key

from torchrl_sglang_hidden.assemble import OutputKeys
from torchrl_sglang_hidden.errors import CapabilityError, InputError
from torchrl_sglang_hidden.prompts import InputMode

__all__ = ["Distributions"]


class Distributions:
    """The distribution methods of torchrl's ``LLMWrapperBase``, which it leaves to its subclasses."""

    # What the policy is, for this part of it.
    generate: bool
    input_mode: InputMode
    return_log_probs: bool
    log_probs_key: NestedKey | None
    masks_key: NestedKey | None
    _keys: OutputKeys
    __call__: Callable[..., TensorDictBase]

    def log_prob(self, data: TensorDictBase, **get_kwargs: Any) -> Any:
        """The log-probs of the responses in given sequences, with ``generate=False``.

        Args:
            data: what `forward` reads; not written to.
            **get_kwargs: as for ``TensorDict.get``: ``as_list``, ``as_padded_tensor``, ``as_nested_tensor`` …

        Returns:
            float32 ``[*batch, T]``, the log-probs where ``all_assistant_mask`` is True, those of several turns one
            behind the other. Rows of different T need one of the options above.

        Raises:
            CapabilityError: the wrapper generates.
            InputError: it returns no log-probs or no masks, or nothing says which tokens are the response.
        """
        if self.generate:
            raise CapabilityError(
                "log_prob with generate=True: this wrapper samples; get_new_version(generate=False) scores"
            )
        if self._keys.log_probs is None or self._keys.masks is None:
            raise InputError(
                f"log_prob with return_log_probs={self.return_log_probs}, log_probs_key={self.log_probs_key!r}, "
                f"masks_key={self.masks_key!r}: it needs all three; give them to get_new_version"
            )
        scored = self(data, tensordict_out=TensorDict(batch_size=data.batch_size))
        return self._responses(scored).get("response", **get_kwargs)

    def _responses(self, scored: TensorDictBase) -> TensorDictBase:
        """The log-probs of the response tokens at ``"response"``, ragged."""
        if scored.ndim:
            return lazy_stack([self._responses(row) for row in scored.unbind(0)])
        mask_N = scored.get(self.masks_key).all_assistant_mask
        if mask_N is None or not mask_N.any():
            key = unravel_key((self.masks_key, "all_assistant_mask"))
            raise InputError(
                f"log_prob with input_mode={self.input_mode!r}: a row's {key!r} is "
                f"{'None' if mask_N is None else 'False everywhere'}, so nothing says which tokens are its response; "
                "history mode takes it from the assistant's messages, tokens mode from the TensorDict"
            )
        return TensorDict(response=scored.get(self.log_probs_key).full[mask_N])

    def get_dist(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `CapabilityError`: a distribution over tokens needs logits, which this version does not return."""
        raise self._no_distribution("get_dist")

    # torchrl's losses ask for these, through _get_sft_dist, _get_rlhf_dist and _get_generic_dist.
    _get_dist_with_prompt_mask = _get_dist_with_assistant_mask = get_dist
    _get_dist_with_attention_mask = _get_dist_with_custom_mask = get_dist

    class _NoKeys(list[NestedKey]):
        """Adds nothing to a sequence's keys. A loss that has this wrapper itself as its actor asks for the first."""

        def __getitem__(self, index: Any) -> NoReturn:
            raise Distributions._no_distribution("a loss with this wrapper as its actor")

    def _no_keys(self) -> list[NestedKey]:
        """None. A sequence joins its modules' keys, and losses take those for the action's, which tokens are not."""
        return self._NoKeys()

    dist_params_keys = dist_sample_keys = log_prob_keys = property(_no_keys)

    @staticmethod
    def _no_distribution(what: str) -> CapabilityError:
        return CapabilityError(
            f"{what} needs the logits of every token, which this version does not return; for log-probs use log_prob "
            "of get_new_version(generate=False), for a loss torchrl's TransformersWrapper of the same weights as actor"
        )
