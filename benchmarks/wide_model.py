"""A random Llama as wide as a real model of 7 billion parameters, and cheap in all other ways.

One layer, narrow inside, and a vocabulary of bytes: a forward pass costs next to nothing, so that what a benchmark sees
is the way of the states, D = 4096 floats for each token.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN_SIZE = 4096
CONTEXT_LENGTH = 16384
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# At Hugging Face's 0.02 the logits of so few tokens nearly tie.
INITIALIZER_RANGE = 0.05


def save_random_wide(
    directory: Path,
    layers: int = 1,
    *,
    hidden_size: int = HIDDEN_SIZE,
    initializer_range: float = INITIALIZER_RANGE,
) -> Path:
    """Write the checkpoint in float32, about 24 MB a layer, and a tokenizer with one token for each byte of text.

    Args:
        directory: is made.
        layers: decoder layers.
        hidden_size: D; a small one makes a model that is quick in every way.
        initializer_range: the spread of the weights: the narrower the model, the larger, or its logits nearly tie.

    Returns:
        ``directory``.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bytewise = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token=special[0], eos_token=special[2], pad_token=special[2]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=initializer_range,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
