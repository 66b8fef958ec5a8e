"""The methods of a policy that TorchRL's losses call: log-probs and distributions of scored sequences.

A part of `SGLangHiddenWrapper`. Knows nothing of engines: it scores by calling the policy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.utils import NestedKey, unravel_key
from torch.nn.utils.rnn import pad_sequence
from torchrl.modules import LLMMaskedCategorical

from torchrl_sglang_hidden.errors import CapabilityError, InputError
from torchrl_sglang_hidden.policy.attributes import Attributes

__all__ = ["Distributions"]

Side: TypeAlias = Literal["left", "right"]


class Distributions(Attributes):
    """The distribution methods of torchrl's ``LLMWrapperBase``, which it leaves to its subclasses."""

    # What the policy is, for this part of it.
    __call__: Callable[..., TensorDictBase]

    def log_prob(self, data: TensorDictBase, **get_kwargs: Any) -> Any:
        """Return the log-probs of the responses in scored sequences, with ``generate=False``.

        Args:
            data: what `forward` reads; not written to.
            **get_kwargs: as for ``TensorDict.get``: ``as_list``, ``as_padded_tensor``, ``as_nested_tensor`` …

        Returns:
            float32 ``[*batch, T]``, the log-probs where ``all_assistant_mask`` is True; several turns are
            concatenated. Rows of different T need one of the options above.

        Raises:
            CapabilityError: the wrapper generates.
            InputError: it returns no log-probs or no masks, or nothing says which tokens are the response.
        """
        if self.config.generate:
            raise CapabilityError(
                "log_prob with generate=True: this wrapper samples; use get_new_version(generate=False), which scores"
            )
        if self._keys.log_probs is None or self._keys.masks is None:
            keys = self.config.keys
            raise InputError(
                f"log_prob with return_log_probs={self.config.return_log_probs}, log_probs_key={keys.log_probs_key!r}, "
                f"masks_key={keys.masks_key!r}: it needs all three; give them to get_new_version"
            )
        scored = self(data, tensordict_out=TensorDict(batch_size=data.batch_size))
        return self._responses(scored).get("response", **get_kwargs)

    def _responses(self, scored: TensorDictBase) -> TensorDictBase:
        """Return the log-probs of the response tokens at ``"response"``, ragged."""
        if scored.ndim:
            return lazy_stack([self._responses(row) for row in scored.unbind(0)])
        mask_N = scored.get(self.config.keys.masks_key).all_assistant_mask
        if mask_N is None or not mask_N.any():
            key = unravel_key((self.config.keys.masks_key, "all_assistant_mask"))
            raise InputError(
                f"log_prob with input_mode={self.config.input_mode!r}: a row's {key!r} is "
                f"{'None' if mask_N is None else 'False everywhere'}, so nothing says which tokens are its response; "
                "history mode takes it from the assistant's messages, tokens mode from the TensorDict"
            )
        return TensorDict(response=scored.get(self.config.keys.log_probs_key).full[mask_N])

    # --- over every token ------------------------------------------------------------------------------------------

    def get_dist(
        self,
        tensordict: TensorDictBase,
        tensordict_out: None = None,
        logits_key: NestedKey | None = None,
        mask_key: NestedKey | None = None,
        as_padded_tensor: bool | None = None,
        as_nested_tensor: bool | None = None,
        padding_value: float | None = None,
        padding_side: Side = "left",
        layout: None = None,
    ) -> LLMMaskedCategorical:
        """Return the distribution that each token of scored sequences is drawn from, as TorchRL's losses need it.

        It is made of the engine's logits, so no gradient flows through it. Where the wrapper has
        ``LogitsSpec(token_ids=…)`` it is over these C tokens, and its ``log_prob`` takes indices into ``token_ids``,
        0 … C-1; otherwise it takes token ids. Under constraints it is the constrained distribution.

        Args:
            tensordict: what `forward` reads with ``generate=False``; not written to.
            tensordict_out: None, as for every argument here that TorchRL's own does not use.
            logits_key: None; it is the wrapper's.
            mask_key: a bool mask over the tokens, of the output or of the input; by default True at all but padding.
            as_padded_tensor: None or True, the only form that torch has a distribution of.
            as_nested_tensor: None or False.
            padding_value: of the logits beside shorter rows; by default 0.
            padding_side: ``"left"`` or ``"right"``.
            layout: None.

        Returns:
            Over ``[*batch, N, V]``: ``log_prob`` takes ids ``[*batch, N]`` and is 0 where the mask is False, and at a
            sequence's first token a uniform distribution's.

        Raises:
            CapabilityError: the wrapper generates.
            InputError: an argument that cannot be served.
        """
        unused = {"tensordict_out": tensordict_out, "layout": layout}
        if any(value is not None for value in unused.values()) or as_padded_tensor is False or as_nested_tensor:
            named = {**unused, "as_padded_tensor": as_padded_tensor, "as_nested_tensor": as_nested_tensor}
            raise InputError(
                f"get_dist with {', '.join(f'{name}={value!r:.40}' for name, value in named.items())}: the "
                "distribution is over padded logits and writes nothing; leave these out"
            )
        return self._masked(
            "get_dist",
            tensordict,
            lambda scored, source: self._mask(scored, source, mask_key or self._key_of("all_attention_mask")),
            padding_side,
            logits_key=logits_key,
            padding_value=padding_value or 0.0,
        )

    def _get_dist_with_prompt_mask(
        self,
        tensordict: TensorDictBase,
        tokens_key: NestedKey | None = None,
        logits_key: NestedKey | None = None,
        assistant_mask_key: NestedKey | None = None,
        attention_mask_key: NestedKey | None = None,
        padding_side: Side = "left",
    ) -> LLMMaskedCategorical:
        """Return `get_dist` over the tokens after ``tokens.prompt``; where there is no prompt, over the assistant's."""
        prompt_key = tokens_key or unravel_key((self.config.keys.tokens_key, "prompt"))
        attention_key = attention_mask_key or self._key_of("all_attention_mask")
        assistant_key = assistant_mask_key or self._key_of("all_assistant_mask")

        def mask_of(scored: TensorDictBase, source: TensorDictBase) -> torch.Tensor:
            prompt_P = source.get(prompt_key)
            if prompt_P is None:
                return self._mask(scored, source, assistant_key)
            # Padded prompts too: their pads need not stand where the scored sequence has its own.
            attention_N = source.get(attention_key)
            num_prompt = len(prompt_P) if attention_N is None else int(attention_N[: len(prompt_P)].sum())
            real_N = self._mask(scored, source, attention_key)
            return real_N & (real_N.cumsum(0) > num_prompt)

        return self._masked("_get_sft_dist", tensordict, mask_of, padding_side, logits_key=logits_key)

    def _get_dist_with_assistant_mask(
        self,
        tensordict: TensorDictBase,
        assistant_mask_key: NestedKey | None = None,
        logits_key: NestedKey | None = None,
        padding_side: Side = "left",
    ) -> LLMMaskedCategorical:
        """Return `get_dist` over the assistant's tokens, and write the scored ids to ``tokens.full``, as TorchRL."""
        key = assistant_mask_key or self._key_of("all_assistant_mask")
        return self._masked(
            "_get_rlhf_dist",
            tensordict,
            lambda scored, source: self._mask(scored, source, key),
            padding_side,
            logits_key=logits_key,
            writes_tokens=True,
        )

    def _get_dist_with_attention_mask(
        self,
        tensordict: TensorDictBase,
        attention_mask_key: NestedKey | None = None,
        logits_key: NestedKey | None = None,
        padding_side: Side = "left",
    ) -> LLMMaskedCategorical:
        """Return `get_dist` over all tokens."""
        return self.get_dist(tensordict, None, logits_key, attention_mask_key, padding_side=padding_side)

    def _get_dist_with_custom_mask(
        self,
        tensordict: TensorDictBase,
        mask: torch.Tensor,
        logits_key: NestedKey | None = None,
        padding_side: Side = "left",
    ) -> LLMMaskedCategorical:
        """Return `get_dist` over the tokens where a mask ``[*batch, N]`` is True, N the length of the longest row."""
        dist = self.get_dist(tensordict, None, logits_key, padding_side=padding_side)
        if mask.dtype != torch.bool or mask.shape != dist.batch_shape:
            raise InputError(
                f"a mask of {mask.dtype} and shape {tuple(mask.shape)}, and logits of {tuple(dist.batch_shape)} "
                "tokens; give bool, one for each"
            )
        return type(dist)(dist.logits, mask)

    # torchrl's losses ask for these.
    _get_sft_dist = _get_dist_with_prompt_mask
    _get_rlhf_dist = _get_dist_with_assistant_mask
    _get_generic_dist = _get_dist_with_attention_mask

    def _masked(
        self,
        name: str,
        tensordict: TensorDictBase,
        mask_of: Callable[[TensorDictBase, TensorDictBase], torch.Tensor],
        padding_side: Side,
        *,
        logits_key: NestedKey | None,
        padding_value: float = 0.0,
        writes_tokens: bool = False,
    ) -> LLMMaskedCategorical:
        """Return the distribution over padded rows; ``mask_of`` makes a row's mask of its output and its input row."""
        if self.config.generate:
            raise CapabilityError(
                f"{name} with generate=True: this wrapper samples; use get_new_version(generate=False), which "
                "has the distributions of scored sequences"
            )
        if None in (self.config.keys.logits_key, self._keys.masks, self._keys.tokens):
            raise InputError(
                f"{name} with logits_key={self.config.keys.logits_key!r}, masks_key={self.config.keys.masks_key!r}, "
                f"tokens_key={self.config.keys.tokens_key!r}: it needs all three; give them to get_new_version"
            )
        if logits_key not in (None, self.config.keys.logits_key):
            raise InputError(
                f"{name} with logits_key={logits_key!r}: the wrapper's is {self.config.keys.logits_key!r}; leave it out"
            )
        scored = self(tensordict, tensordict_out=_empty(tensordict.batch_size), logits_only=True)
        rows = list(zip(_flat(scored), _flat(tensordict), strict=True))
        logits = [row.get(self.config.keys.logits_key).float() for row, _ in rows]
        masks = [mask_of(row, source) for row, source in rows]
        for index, (mask_N, logits_NV) in enumerate(zip(masks, logits, strict=True)):
            if len(mask_N) != len(logits_NV):
                raise InputError(
                    f"{name}, row {index}: a mask of {len(mask_N)} tokens, and {len(logits_NV)} are scored; give both "
                    "the same"
                )
        pad = functools.partial(pad_sequence, batch_first=True, padding_side=padding_side)
        logits_RNV, mask_RN = pad(logits, padding_value=padding_value), pad(masks, padding_value=False)
        if writes_tokens:
            tensordict.update(scored, keys_to_update=[unravel_key((self.config.keys.tokens_key, "full"))])
        shape = (*tensordict.batch_size, -1)
        of_actions = self.config.logits is not None and self.config.logits.token_ids is not None
        kind = _OverActions if of_actions else LLMMaskedCategorical
        return kind(logits_RNV.reshape(*shape, logits_RNV.shape[-1]), mask_RN.reshape(shape))

    def _mask(self, scored: TensorDictBase, source: TensorDictBase, key: NestedKey) -> torch.Tensor:
        """Return a mask of the output row, or else of the input row."""
        written = scored.get(key)
        mask_N = source.get(key) if written is None else written
        if mask_N is None:
            raise InputError(
                f"there is no mask at {key!r}, with input_mode={self.config.input_mode!r}: history mode takes the "
                "assistant's from its messages, tokens mode from the TensorDict"
            )
        if not isinstance(mask_N, torch.Tensor) or mask_N.dtype != torch.bool or mask_N.ndim != 1:
            raise InputError(f"{key!r} is no mask over the tokens of a row; expected bool [N]")
        return mask_N

    def _key_of(self, mask: str) -> NestedKey:
        key: NestedKey = unravel_key((self.config.keys.masks_key, mask))
        return key

    class _NoKeys(list[NestedKey]):
        """Adds nothing to a sequence's keys. A loss that has this wrapper itself as its actor asks for the first."""

        def __getitem__(self, index: Any) -> NoReturn:
            raise CapabilityError(
                "a loss with this wrapper as its actor: it writes no action, its action is tokens; use torchrl's "
                "losses of language models, or a head over its states or logits"
            )

    def _no_keys(self) -> list[NestedKey]:
        """Return no keys: a sequence joins its modules' keys, losses read the action there, and tokens are none."""
        return self._NoKeys()

    dist_params_keys = dist_sample_keys = log_prob_keys = property(_no_keys)


class _OverActions(LLMMaskedCategorical):  # type: ignore[misc]
    """A distribution over the tokens of an action set, by their indices in it."""

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        actions = self.logits.shape[-1]
        if value.numel() and int(value.max()) >= actions:
            raise InputError(
                f"log_prob of {int(value.max())}: the distribution is over the {actions} token_ids of the wrapper's "
                "LogitsSpec, and takes places in them, not ids; use a wrapper without token_ids for "
                "a loss over tokens"
            )
        found: torch.Tensor = super().log_prob(value)
        return found


def _empty(batch_size: torch.Size) -> TensorDictBase:
    """Return a TensorDict that can hold rows of different lengths."""
    if not batch_size or 0 in batch_size:
        return TensorDict(batch_size=batch_size)
    return lazy_stack([_empty(batch_size[1:]) for _ in range(batch_size[0])])


def _flat(tensordict: TensorDictBase) -> list[TensorDictBase]:
    """Return the rows in row-major order."""
    return [row for part in tensordict.unbind(0) for row in _flat(part)] if tensordict.ndim else [tensordict]
