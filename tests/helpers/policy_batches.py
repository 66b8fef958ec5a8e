"""A policy over the fake engine, and batches for it in every input mode."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens

from helpers.fake_engine import (
    RecordingEngine,
    tiny_tokenizer,
)
from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper
from torchrl_sglang_hidden.spec.hidden import SEGMENTS

TOKENIZER = tiny_tokenizer()
ALL = HiddenSpec(SEGMENTS)
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]


def make(mode: str = "text", **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    engine = options.pop("engine", None) or RecordingEngine(tokenizer=TOKENIZER)
    return SGLangHiddenWrapper(engine, **{"tokenizer": TOKENIZER, "input_mode": mode, "hidden": ALL, **options}), engine


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "w9"}, {"role": "user", "content": prompt}]


def row_of(mode: str, prompt: str) -> TensorDictBase:
    values = {
        "history": lambda: ChatHistory(prompt=History.from_chats([chat(prompt)])[0], batch_size=()),
        "text": lambda: Text(prompt=prompt, batch_size=()),
        "tokens": lambda: Tokens(prompt=torch.tensor(TOKENIZER(prompt)["input_ids"]), batch_size=()),
    }
    return TensorDict({mode: values[mode]()}, batch_size=())


def stacked(rows: list[TensorDictBase], shape: tuple[int, ...]) -> TensorDictBase:
    for size in reversed(shape):
        rows = [lazy_stack(rows[start : start + size]) for start in range(0, len(rows), size)]
    return rows[0]


def batch_of(mode: str, prompts: list[str] | None = None, shape: tuple[int, ...] | None = None) -> TensorDictBase:
    prompts = PROMPTS if prompts is None else prompts
    return stacked([row_of(mode, prompt) for prompt in prompts], (len(prompts),) if shape is None else shape)


def tokens_batch(*rows: list[int], **others: Any) -> TensorDict:
    tokens = Tokens(prompt=torch.tensor(rows), batch_size=len(rows), **others.pop("of_tokens", {}))
    return TensorDict({"tokens": tokens, **others}, batch_size=len(rows))


def flat(td: TensorDictBase) -> list[TensorDictBase]:
    return [row for part in td.unbind(0) for row in flat(part)] if td.ndim else [td]


def plain(td: TensorDictBase) -> list[dict[str, Any]]:
    rows = [{str(key): row[key] for key in row.keys(True, True)} for row in flat(td)]
    return [
        {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in row.items()}
        for row in rows
    ]
