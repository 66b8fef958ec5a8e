"""A tokenizer of letters and pieces of words: most texts can be cut into tokens in several ways."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# As ChatML: nothing between a message and the token that ends it, so that a turn's ids begin the next turn's prompt.
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PIECES = ("us", "er", "as", "si", "st", "ab", "cd", "abc", "an", "ant", "he", "el", "lo")
VOCABULARY = ("<unk>", "<|end|>", "<|start|>", *string.ascii_lowercase, " ", "\n", "?", *PIECES)
MERGES = [("u", "s"), ("e", "r"), ("a", "s"), ("s", "i"), ("s", "t"), ("a", "b"), ("c", "d"), ("ab", "c"), ("a", "n"),
          ("an", "t"), ("h", "e"), ("e", "l"), ("l", "o")]  # fmt: skip
ID_OF = {piece: token_id for token_id, piece in enumerate(VOCABULARY)}


def letters_tokenizer(**options: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer of letters and pieces of words. It cuts a text in one way where most have several."""
    tokenizer = Tokenizer(models.BPE(ID_OF, MERGES, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    special = {
        "unk_token": "<unk>",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "bos_token": "<|start|>",
        **options,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


def letter_by_letter(text: str) -> list[int]:
    """Return the ids of the text cut into letters, which the tokenizer itself would not do."""
    ids: list[int] = []
    while text:
        special = next((piece for piece in ("<|end|>", "<|start|>") if text.startswith(piece)), text[0])
        ids.append(ID_OF[special])
        text = text[len(special) :]
    return ids
