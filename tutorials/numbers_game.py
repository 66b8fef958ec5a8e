"""A game for a very small language model: "even 12" asks for even numbers of at least 12, and those are rewarded.

The model has 32 numbers and knows nothing at first. How hard a question is stands in it: every other number is
even or odd, and few are at least 28.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tensordict import TensorDictBase
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torchrl.data import Unbounded
from torchrl.envs import Transform
from torchrl.modules.llm.policies import Text
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

NUMBERS = 32
KINDS = ("even", "odd")
# For the largest numbers there is one answer.
QUESTIONS = [f"{kind} {least}" for kind in KINDS for least in range(NUMBERS - 2)]
_FRAME = ("<start>", "<end>", "<pad>")
_WORDS = (*(str(number) for number in range(NUMBERS)), *KINDS, "user", "assistant", "<unknown>")
_TEMPLATE = (
    "{% for message in messages %}<start> {{ message.role }} {{ message.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with a token for each number and for each word of a question."""
    words = {word: index for index, word in enumerate((*_WORDS, *_FRAME))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in _FRAME])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unknown>", eos_token="<end>", pad_token="<pad>", chat_template=_TEMPLATE
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """Return a Llama of two layers and 64 dimensions that has learned nothing yet."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # eval: no dropout, so that the trainer's log-probs are the sampler's.
    return LlamaForCausalLM(config).eval()


def save_model(directory: Path) -> None:
    """Write the model and its tokenizer as a checkpoint that a server loads."""
    make_model(0).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)


def share_right(question: str, answer: str, words: int) -> float:
    """Return which part of an answer's words are numbers that the question asks for."""
    kind, least = question.split()
    numbers = [int(word) for word in answer.split() if word.isdigit()]
    return sum(number >= int(least) and number % 2 == KINDS.index(kind) for number in numbers) / words


class RightNumbers(Transform):
    """Rewards the share of right numbers, ``[B, 1, 1]`` as GRPOLoss wants it.

    Args:
        words: of an answer.
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = words

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        text: Text = tensordict["text"]
        rows = zip(tensordict["query"], text.response, strict=True)
        rewards = [share_right(question, answer, self.words) for question, answer in rows]
        return next_tensordict.set("reward", torch.tensor(rewards).reshape(-1, 1, 1))

    def transform_reward_spec(self, reward_spec: Unbounded) -> Unbounded:
        reward_spec["reward"] = Unbounded((*reward_spec.shape, 1, 1))
        return reward_spec
