"""A chat's `Completion` to TorchRL's ``ChatHistory``, and to the digest by which the next turn knows it.

Knows nothing of padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import lazy_stack
from tensordict.utils import NestedKey
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory

from torchrl_sglang_hidden.policy.chat_template import Message, goes_on, with_more_text
from torchrl_sglang_hidden.policy.outputs import OutputKeys
from torchrl_sglang_hidden.policy.rows import Row
from torchrl_sglang_hidden.policy.sampled_turns import digest_with_response
from torchrl_sglang_hidden.records import Completion

__all__ = ["chat_of_row"]


def chat_of_row(row: Row, prompt: History, completion: Completion, keys: OutputKeys) -> dict[NestedKey | None, Any]:
    """Return a chat with its response, and which messages the tokens then stand for."""
    messages, text = () if row.chat is None else row.chat.messages, completion.text
    values: dict[NestedKey | None, Any] = {keys.history: _chat_history(prompt, messages, text)}
    if row.turns is not None:
        ids = (*row.prompt_ids, *completion.response_ids)
        values[keys.chat_digest] = digest_with_response(row.turns.digest, messages, text, ids)
    elif row.error is not None:
        values[keys.chat_digest] = ""  # of no chat
    return values


def _chat_history(prompt: History, messages: Sequence[Message], text: str) -> ChatHistory:
    response = History(role="assistant", content=text, batch_size=())
    if goes_on(messages):
        turns = list(prompt.unbind(-1))
        # Behind it may stand what fills a chat up to the length of others.
        last = max(turn for turn, message in enumerate(turns) if message.role == "assistant")
        whole = turns[last].clone()
        whole.content, whole.is_complete = with_more_text(messages[-1], text)["content"], True
        full = lazy_stack([*turns[:last], whole, *turns[last + 1 :]])
    else:
        full = prompt.append(response, inplace=False, dim=-1)
    return ChatHistory(prompt=prompt, response=lazy_stack([response]), full=full, batch_size=())
