"""What TorchRL's parts need of a policy and no other test holds, over the fake engine.

1. A collector registers with its policy, and finds the engine at ``policy.model``; a step holds what the environment
   wrote at ``"next"``, and what the policy wrote at its root.
"""

from __future__ import annotations

import pytest
from helpers.fake_engine import RecordingEngine, tiny_tokenizer
from helpers.torchrl_pipelines import chat_env, collector

from torchrl_sglang_hidden import SGLangHiddenWrapper


@pytest.mark.parametrize("batching", [None, True])
def test_a_collector_and_its_policy_know_each_other(batching: bool | None) -> None:
    tokenizer = tiny_tokenizer()
    engine = RecordingEngine(tokenizer=tokenizer)
    policy = SGLangHiddenWrapper(engine, tokenizer=tokenizer, batching=batching)
    batches = collector(chat_env(["w1 w2"], turns=2), policy, turns_per_batch=2, total_turns=2)
    try:
        assert policy.collector is batches
        assert batches.policy is policy
        assert policy.model is engine
        (batch,) = batches
    finally:
        batches.shutdown()
    written = {key if isinstance(key, str) else key[0] for key in policy.out_keys}
    for turn in batch[0].unbind(0):
        assert written | {"query", "done"} <= set(turn.keys())
        assert written & set(turn["next"].keys()) == {"history"}
        assert turn["next", "history"].response is None, "the environment's own, the next prompt alone"
