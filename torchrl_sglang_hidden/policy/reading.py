"""Makes the readers of one call from the policy's configuration.

Knows nothing of rows.
"""

from __future__ import annotations

from typing import Any

from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.policy.action_masks import ActionMaskReader
from torchrl_sglang_hidden.policy.chat_template import read_variables
from torchrl_sglang_hidden.policy.config import PolicyConfig
from torchrl_sglang_hidden.policy.prompts import PromptReader

__all__ = ["make_mask_reader", "make_reader"]


def make_reader(config: PolicyConfig, chat_template_kwargs: Any = None) -> PromptReader:
    """Return the reader of the prompts of one call.

    Args:
        config: the policy's, after `PolicyConfig.resolve_for`, which reads the tokenizer.
        chat_template_kwargs: the call's variables of the chat template, over these.

    Raises:
        InputError: variables of a chat template in another mode than history, or that cannot be given.
    """
    of_call = read_variables("chat_template_kwargs", chat_template_kwargs)
    if of_call and config.input_mode != "history":
        raise InputError(
            f"chat_template_kwargs={of_call!r:.80} with input_mode={config.input_mode!r}: only history mode has a "
            "chat template; leave it out"
        )
    return PromptReader(
        own=config.own_tokenizer,
        input_mode=config.input_mode,
        input_key=config.prompt_key,
        attention_mask_key=config.attention_mask_key,
        tokens_key=config.keys.tokens_key,
        masks_key=config.keys.masks_key,
        generate=config.generate,
        tokenizer_kwargs=config.tokenizer_kwargs,
        chat_template=config.chat_template,
        chat_template_name=config.chat_template_name,
        chat_template_kwargs={**config.chat_template_kwargs, **of_call},
        padding_value=config.padding_value,
        log_probs_key=config.keys.log_probs_key,
        prefer_tokens=config.prefer_tokens,
        chat=config.chat,
        literal_content=config.literal_content,
        mark_end_of_turn=config.mark_end_of_turn,
        said=config.said,
        images_key=config.images_key,
        processor=config.processor,
    )


def make_mask_reader(config: PolicyConfig, vocab_size: int) -> ActionMaskReader | None:
    """Return the reader of the rows' action masks of one call, or None where there are none."""
    if config.action_mask_key is None:
        return None
    return ActionMaskReader(config.action_mask_key, vocab_size, config.action_token_ids)
