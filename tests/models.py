"""Small random checkpoints that SGLang serves, for what the demo model cannot show.

The demo model ties its head to its embeddings; a capture that read the wrong tensor could still look right there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

# Wide enough that the two best of 49152 random logits lie far apart (about 0.5 on average): greedy is never a tie.
INITIALIZER_RANGE = 0.3


def save_random_qwen3(directory: Path, tokenizer_dir: str) -> Path:
    """A Qwen3 of three layers and D=64 whose head is its own matrix, with the tokenizer of ``tokenizer_dir``."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
