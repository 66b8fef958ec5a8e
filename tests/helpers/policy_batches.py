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
from torchrl_sglang_hidden import DisallowedTokens, HeadSpec, HiddenSpec, LogitsSpec, SGLangHiddenWrapper
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


# Every argument of the wrapper with a value that is not its default, wherever one can stand beside the others.
FULL_CONFIG: dict[str, Any] = {
    "tokenizer": TOKENIZER, "input_mode": "tokens", "input_key": ("my", "ids"), "attention_mask_key": ("my", "mask"),
    "generate": True, "generate_kwargs": {"max_new_tokens": 3, "stop_sequences": ["w1"]},
    "tokenizer_kwargs": {"padding": True}, "pad_output": True, "pad_model_input": False, "inplace": False,
    "device": torch.device("cpu"), "layout": torch.jagged, "num_samples": 2, "prefer_tokens": "strict",
    "chat": "append", "mark_end_of_turn": True, "literal_content": True,
    "chat_template_name": "chatml_format", "chat_template": None, "chat_template_kwargs": {"x": 1},
    "return_log_probs": False, "history_key": "h",
"batching": True, "min_batch_size": 1,
    "max_batch_size": 8, "batching_timeout": 2.5,
    "text_key": None, "tokens_key": ("a", "b"), "masks_key": "m", "log_probs_key": None, "hidden": ALL,
    "hidden_states_key": "s", "token_hidden_states_key": ("t", "s"), "logits": LogitsSpec(top_k=3, stage="processed"),
    "logits_key": ("l", "g"), "images_key": ("my", "images"), "prompt_images_key": "i", "pixel_values_key": ("p", "v"),
    "heads": HeadSpec(("d1",), ("full",)), "head_scores_key": ("e", "h"), "sampling_key": ("d", "r"),
    "routed_experts_key": "r",
    "constraints": (DisallowedTokens([7]),), "action_mask_key": ("my", "actions"),
    "action_token_ids": (9, 8, 1), "on_error": "nan", "extra_samples": 1,
}  # fmt: skip
