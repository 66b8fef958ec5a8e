"""Processors of SGLang's own kind that a server must survive. SGLang is imported inside, as its tests import it."""

from __future__ import annotations

from typing import Any

import httpx


def broken_processors() -> dict[str, str]:
    """Return processors as the strings that they travel as, by the words that refuse each."""
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    class Raises(CustomLogitProcessor):
        def __call__(self, logits: Any, custom_param_list: Any = None) -> Any:
            raise KeyError("on purpose")

    class Narrows(CustomLogitProcessor):
        def __call__(self, logits: Any, custom_param_list: Any = None) -> Any:
            return logits[:, :1]

    return {
        "its custom_logit_processor raised KeyError('on purpose')": str(Raises.to_str()),
        "its custom_logit_processor raised": str(Narrows.to_str()),
        "custom_logit_processor='garbage' cannot be read": "garbage",
        "cannot be read (": '{"callable": "00"}',
    }


def refusals(url: str) -> dict[str, tuple[int, str]]:
    """Send a batch with each broken processor in row 1; return status and answer by the words that are expected."""
    found = {}
    for words, processor in broken_processors().items():
        payload = {
            "input_ids": [[5, 6, 7], [8, 9]],
            "sampling_params": {"max_new_tokens": 4, "temperature": 0},
            "custom_logit_processor": [None, processor],
        }
        answer = httpx.post(f"{url}/generate", json=payload, timeout=120)
        found[words] = answer.status_code, answer.json()["error"]["message"]
    return found
