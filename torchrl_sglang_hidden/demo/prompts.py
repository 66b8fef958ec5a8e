"""The demo's prompts: six kinds, four of each.

Chosen so that a model of 135 million parameters answers most of them sensibly within `MAX_NEW_TOKENS`, and short enough
that the table shows them whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["MAX_NEW_TOKENS", "PROMPTS", "SYSTEM_PROMPT", "Prompt"]

MAX_NEW_TOKENS = 32

# Without it the demo model answers "What is 1 + 1?" with an essay.
SYSTEM_PROMPT = "Answer in one short sentence."


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question of the demo.

    Args:
        kind: what sort of question it is; the picture colours by it.
        text: the user's message.
    """

    kind: str
    text: str


_TEXTS = MappingProxyType(
    {
        "arithmetic": ("What is 1 + 1?", "What is 9 - 5?", "What is half of 10?", "What is 10 + 10?"),
        "capitals": (
            "What is the capital of France?",
            "What is the capital of Japan?",
            "What is the capital of Egypt?",
            "What is the capital of Kenya?",
        ),
        "opposites": (
            "What is the opposite of hot?",
            "What is the opposite of big?",
            "What is the opposite of day?",
            "What is the opposite of up?",
        ),
        "rhymes": (
            "Write a rhyme about a cat.",
            "Write a rhyme about the moon.",
            "Write a rhyme about a star.",
            "Write a rhyme about the sea.",
        ),
        "code": (
            "Print hello in Python.",
            "Print 42 in Python.",
            "Write Python to import math.",
            "Write Python that adds 1 to x.",
        ),
        "animals": (
            "Where do penguins live?",
            "Where do polar bears live?",
            "Where do camels live?",
            "What do bees make?",
        ),
    }
)

PROMPTS: tuple[Prompt, ...] = tuple(Prompt(kind, text) for kind, texts in _TEXTS.items() for text in texts)
