"""Writing prompts: what a row becomes, and what of a value the model reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.policy_batches import TOKENIZER, chat, make
from tensordict import NonTensorData, TensorDict
from torchrl.data.llm import History

from torchrl_sglang_hidden import HiddenSpec, HiddenStateTransform
from torchrl_sglang_hidden.rl.prompts import PromptWriter

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("source", "value", "text"),
    [
        ("You see {observation}.", torch.tensor([3]), "You see 3."),
        ("{observation}", torch.tensor([0.1, 0.25]), "[0.1, 0.25]"),
        ("{observation}", torch.tensor(0.1, dtype=BF16), "0.100097656"),
        ("{observation}", torch.tensor([0.1], dtype=torch.float64), "0.1"),
        ("{observation:.2f}", torch.tensor([0.123, 4.0]), "[0.12, 4.00]"),
        ("{observation:.1f}", torch.tensor([[0.12, 1], [2, 3]]), "[[0.1, 1.0], [2.0, 3.0]]"),
        ("{observation[1]} {observation[0]:.1f}", torch.tensor([0.123, 4.0]), "4.0 0.1"),
        ("{observation}", torch.tensor([True, False]), "[True, False]"),
        ("{{{observation}}}", torch.tensor(7), "{7}"),
        ("{observation!r}", NonTensorData("a key"), "'a key'"),
        ("{observation}", NonTensorData("a key"), "a key"),
    ],
)
def test_format_strings(source: str, value: Any, text: str) -> None:
    prompt = PromptWriter(source, ["observation"]).write("row 0", TensorDict({"observation": value}))
    assert (prompt.mode, prompt.value) == ("text", text)


def test_nested_keys_have_dots() -> None:
    row = TensorDict({"agent": {"position": torch.tensor([1, 2])}, "agent_id": torch.tensor(5)})
    writer = PromptWriter("{agent.position[1]} {agent_id}", [("agent", "position"), "agent_id"])
    assert writer.write("row 0", row).value == "2 5"


def test_a_key_with_a_dot_is_no_attribute() -> None:
    row = TensorDict({"agent": torch.tensor(3), "agent.shape": torch.tensor(4)})
    assert PromptWriter("{agent.shape} {agent}", ["agent", "agent.shape"]).write("row 0", row).value == "4 3"


CHAT = chat("w1")


@pytest.mark.parametrize(
    ("found", "mode"),
    [
        ("w1", "text"),
        ([7, 8], "tokens"),
        (torch.tensor([7, 8]), "tokens"),
        (np.array([7, 8]), "tokens"),
        (CHAT, "history"),
        (History.from_chats([CHAT])[0], "history"),
    ],
)
@pytest.mark.parametrize("policy_mode", ["text", "history", "tokens"])
@pytest.mark.parametrize("cache_size", [0, 5])
def test_functions_return_every_kind_of_prompt(found: Any, mode: str, policy_mode: str, cache_size: int) -> None:
    policy, engine = make(policy_mode, hidden=HiddenSpec(("prompt",)), generate_kwargs={"max_new_tokens": 0})
    seen = []

    def prompt(row: TensorDict) -> Any:
        seen.append(sorted(row.keys()))
        return found

    made = HiddenStateTransform(policy, prompt, in_keys=["observation"], cache_size=cache_size)
    data = TensorDict(observation=torch.zeros(2, 1), other=torch.zeros(2), batch_size=2)
    made(data)
    expected = {
        "text": lambda: TOKENIZER("w1")["input_ids"],
        "tokens": lambda: [7, 8],
        "history": lambda: TOKENIZER.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False),
    }[mode]()
    assert engine.payloads[0]["input_ids"] == [expected], "equal prompts are asked once"
    assert seen == [["observation"]] * 2, "a function is given its keys alone"
    made(data)
    assert len(engine.payloads) == (1 if cache_size else 2)
