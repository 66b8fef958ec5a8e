"""Tokenizers whose tokens begin and end within characters."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PIECES = [
    b"<t>",
    b"</t>",
    b"<t",
    b"t>",
    b"</",
    b">a",
    b"a<",
    b"ab",
    "é".encode(),
    "😀".encode()[:2],
    "😀".encode()[2:] + b"<",
    "é".encode()[1:] + "日".encode()[:1],
    "日本".encode(),
    b"t><",
]


def byte_characters() -> list[str]:
    """Return how byte-level vocabularies write each byte: printable ones as they are, others from 256 on (as GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def byte_tokenizer() -> tuple[PreTrainedTokenizerBase, list[bytes]]:
    """Return a tokenizer of all bytes and some runs of bytes, and the bytes of each of its ids."""
    tokens = [*(bytes([byte]) for byte in range(256)), *PIECES]
    characters = byte_characters()
    vocabulary = {"".join(characters[byte] for byte in token): i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer), tokens


def fallback_tokenizer() -> tuple[PreTrainedTokenizerBase, list[bytes]]:
    """Return a tokenizer of SentencePiece's kind: text outside its vocabulary becomes one token for each byte."""
    pieces = ["<t>", "</t>", "<t", "t>", "</", ">a", "a<", "ab", "日本", "t><", "a", "<"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {piece: 256 + i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokens = [*(bytes([byte]) for byte in range(256)), *(piece.encode() for piece in pieces)]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer), tokens
