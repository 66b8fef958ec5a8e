"""One small tokenizer of every kind that people bring, built here: no file and no network.

`ZOO` names the kinds. Each is built anew by `zoo_tokenizer`, so that a test may change what it gets. The vocabularies
come from a corpus of a few lines and are the same each time; they have a few hundred tokens.

What differs between kinds, and breaks code that was written for one of them:

- whether every text survives ``decode(encode(text))`` (`Kind.lossless`);
- what the tokenizer adds to a text by itself: a BOS before it (`Kind.adds_before`), an EOS after it
  (`Kind.adds_after`), a blank before its first word (`Kind.prefix_blank`);
- which special tokens there are, and which share an id (`Kind.special`): BOS, EOS and PAD may be one token, and each of
  them may be missing;
- added tokens: behind the end of the vocabulary, not special, or taking the blanks beside them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = ["CHATML", "ZOO", "Kind", "zoo_tokenizer"]

# What a chat's frame is made of in most templates. Every kind that has special tokens at all has these two.
FRAME = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "The capital of France is Paris. Is the answer yes or no? yes, the answer is yes; no, the answer is no.",
    "user: say hello, please.\nassistant: hello! how are you today?\nsystem: you are a helpful assistant.",
    "go north, go south, go to the kitchen, open the fridge, take the bread and put it on the table.",
    "one two three four five six seven eight nine ten, 10 20 30 1999 2024, and so on and so forth.",
    "question: what is it? answer: it is what it is. q: yes a: no\n\n\tdef f(x):\n        return x + 1\n",
)
LETTERS = sorted({letter for line in CORPUS for letter in line if not letter.isspace()})
WORDS = sorted({word for line in CORPUS for word in re.findall(r"[a-z]{2,}", line)})


@dataclass(frozen=True)
class Kind:
    """One kind of tokenizer.

    Args:
        build: makes the backend.
        like: models whose tokenizers are of this kind.
        special: the special tokens that transformers knows by role, such as ``{"eos_token": "</s>"}``.
        added: further special tokens.
        adds_before: the special token that the tokenizer writes before a text by itself, or None.
        adds_after: the one that it writes after it, or None.
        prefix_blank: whether it writes a blank before a text that has none.
        lossless: whether every text is what its ids decode to. Where ``prefix_blank`` is set: except for a blank before
            it.
    """

    build: Callable[[], Tokenizer]
    like: str
    special: Mapping[str, str] = field(default_factory=dict)
    added: tuple[str | AddedToken, ...] = FRAME
    adds_before: str | None = None
    adds_after: str | None = None
    prefix_blank: bool = False
    lossless: bool = True


def zoo_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Return a new tokenizer of a kind.

    Args:
        name: a key of `ZOO`.
        **options: of transformers, such as ``chat_template=CHATML``; without it the tokenizer has no template.
    """
    kind = ZOO[name]
    # A copy: the tokenizers of one kind would share their added tokens, truncation and padding.
    backend = Tokenizer.from_str(_trained(name))
    backend.add_special_tokens([token for token in kind.added if isinstance(token, str)])
    # `add_special_tokens` marks what it gets as special.
    backend.add_tokens([token for token in kind.added if isinstance(token, AddedToken)])
    if kind.adds_before or kind.adds_after:
        ids = {token: backend.token_to_id(token) for token in (kind.adds_before, kind.adds_after) if token}
        parts = [part for part in (kind.adds_before, "$A", kind.adds_after) if part]
        backend.post_processor = processors.TemplateProcessing(single=parts, special_tokens=list(ids.items()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**kind.special, **options})


@functools.cache
def _trained(name: str) -> str:
    """Return the backend of a kind as JSON, with the special tokens that have a role at the head of the vocabulary."""
    return str(ZOO[name].build().to_str())


# --- backends --------------------------------------------------------------------------------------------------------


def _byte_level(*special: str, split: str | None = None) -> Tokenizer:
    """Bytes and their merges, as GPT-2; with ``split``, words are cut by a pattern first, as Llama 3 and Qwen do."""
    backend = Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is None:
        backend.pre_tokenizer = bytes_of
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), bytes_of])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train(backend, trainers.BpeTrainer(
        vocab_size=480, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def _sentencepiece(*, prefix: str) -> Tokenizer:
    """Pieces with ``▁`` for a blank, and bytes for what has no piece.

    Args:
        prefix: ``"prepend"`` puts a blank before every stretch between special tokens (Llama 2); ``"first"`` before the
            text alone (Mistral); ``"never"`` before none (Gemma).
    """
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # As SentencePiece trains: a piece has no blank but at its beginning.
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False, max_token_length=8
    )
    # The bytes were named as special tokens to have their ids; they are plain pieces.
    backend = _without_added(_train(backend, trainer), keep=("<unk>", "<s>", "</s>"))
    replace = normalizers.Replace(" ", "▁")
    strip = [decoders.Strip(" ", 1, 0)]
    if prefix == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        backend.normalizer, strip = replace, []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _without_added(backend: Tokenizer, keep: tuple[str, ...]) -> Tokenizer:
    """Return a bare backend with the same model and only some of its added tokens."""
    other = Tokenizer(backend.model)
    other.add_special_tokens(list(keep))
    return other


def _unigram() -> Tokenizer:
    """Pieces by their probabilities, as T5 and XLNet; what has no piece is unknown.

    Not trained, nor is `_word_piece`: their trainers give another vocabulary each time.
    """
    pieces = [("▁", -4.0), *((letter, -8.0) for letter in LETTERS)]
    pieces += [(f"▁{word}", -5.0 - rank / 100) for rank, word in enumerate(WORDS)]
    backend = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    return backend


def _word_piece() -> Tokenizer:
    """Words in lower case and their endings, as BERT; blanks and what has no piece are lost."""
    words = [*LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(word.lower() for word in words)]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _word_level() -> Tokenizer:
    """Whole words between blanks; every other word is unknown."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _train(backend, trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>", "<pad>"], show_progress=False))


def _train(backend: Tokenizer, trainer: Any) -> Tokenizer:
    backend.train_from_iterator(CORPUS, trainer)
    return backend


# --- the kinds -------------------------------------------------------------------------------------------------------

_END = "<|endoftext|>"
_LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>", "pad_token": _END}
_SENTENCEPIECE = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}

ZOO: dict[str, Kind] = {
    "byte_level": Kind(
        functools.partial(_byte_level, _END, split=QWEN),
        "Qwen 2 and 3, SmolLM: no BOS, EOS ends a turn",
        {"eos_token": "<|im_end|>", "pad_token": _END},
    ),
    "byte_level_bos": Kind(
        functools.partial(_byte_level, "<|begin_of_text|>", _END, split=QWEN),
        "Llama 3: a post-processor that writes BOS",
        _LLAMA3,
        adds_before="<|begin_of_text|>",
    ),
    "one_special": Kind(
        functools.partial(_byte_level, _END),
        "GPT-2, Pythia: BOS, EOS and PAD are one token",
        {"bos_token": _END, "eos_token": _END, "pad_token": _END},
    ),
    "no_pad": Kind(
        functools.partial(_byte_level, "<s>", "</s>"),
        "base models: no PAD",
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "no_special": Kind(functools.partial(_byte_level), "home-made: no special token at all", added=()),
    "added_behind": Kind(
        functools.partial(_byte_level, _END, split=QWEN),
        "Qwen 3, DeepSeek-R1: added tokens behind the vocabulary's end, some of them not special",
        {"eos_token": "<|im_end|>", "pad_token": _END},
        (*FRAME, AddedToken("<think>", special=False), AddedToken("</think>", special=False)),
    ),
    "blanks_taken": Kind(
        functools.partial(_sentencepiece, prefix="first"),
        "Phi-3: special tokens that take the blanks and line ends behind them",
        {**_SENTENCEPIECE, "eos_token": "<|im_end|>"},
        (
            AddedToken("<|im_start|>", special=True, rstrip=True, normalized=False),
            AddedToken("<|im_end|>", special=True, rstrip=True, normalized=False),
        ),
        adds_before="<s>",
        prefix_blank=True,
        lossless=False,
    ),
    "sentencepiece_prepend": Kind(
        functools.partial(_sentencepiece, prefix="prepend"),
        "Llama 2: a blank before every stretch between special tokens",
        _SENTENCEPIECE,
        adds_before="<s>",
        prefix_blank=True,
        lossless=False,
    ),
    "sentencepiece_first": Kind(
        functools.partial(_sentencepiece, prefix="first"),
        "Mistral: a blank before the text",
        _SENTENCEPIECE,
        adds_before="<s>",
        prefix_blank=True,
    ),
    "sentencepiece_never": Kind(
        functools.partial(_sentencepiece, prefix="never"),
        "Gemma: no blank before the text, and a BOS",
        {**_SENTENCEPIECE, "pad_token": "<unk>"},
        adds_before="<s>",
    ),
    "unigram": Kind(
        _unigram,
        "T5, XLM-R: probabilities, unknown characters, an EOS after every text",
        {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"},
        adds_after="</s>",
        prefix_blank=True,
        lossless=False,
    ),
    "word_piece": Kind(
        _word_piece,
        "BERT: lower case, [CLS] before and [SEP] after",
        {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        adds_before="[CLS]",
        adds_after="[SEP]",
        lossless=False,
    ),
    "word_level": Kind(
        _word_level,
        "toys: words between blanks",
        {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"},
        lossless=False,
    ),
}
