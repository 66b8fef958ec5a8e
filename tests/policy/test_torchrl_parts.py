"""What TorchRL's parts need of a policy and no other test holds, over the fake engine.

1. A collector registers with its policy, and finds the engine at ``policy.model``; a step holds what the environment
   wrote at ``"next"``, and what the policy wrote at its root.
2. An `InferenceServer` counts the updates of its weights, those of a scheme that it was given too.
3. Errors say it in the words of TorchRL's own wrappers, which its tests match, and more.
"""

from __future__ import annotations

from typing import Any

import pytest
from helpers.fake_engine import RecordingEngine, tiny_tokenizer
from helpers.policy_batches import make, row_of
from helpers.torchrl_pipelines import chat_env, collector
from tensordict import TensorDict
from torchrl.modules.inference_server import InferenceServer
from torchrl.modules.llm.policies import ChatHistory

from torchrl_sglang_hidden import SGLangHiddenWeightSyncScheme, SGLangHiddenWrapper


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


@pytest.mark.parametrize("given", [True, False], ids=["a scheme", "update_model"])
def test_an_inference_server_counts_updates(given: bool) -> None:
    policy, engine = make("text")
    scheme = SGLangHiddenWeightSyncScheme(engine)
    found = []
    with InferenceServer(policy, weight_sync=scheme if given else None) as server:
        for weights in ({"a": 1}, {"a": 2}, {"a": 3}):
            row = server.client()(row_of("text", "w1 w2"))
            found.append((int(row["policy_version"]), row["weight_version"]))
            if given:
                scheme.create_sender().update_weights(weights)
            else:
                server.update_model(lambda served, weights=weights: served.model.update_weights(weights))
    assert found == [(0, "v7"), (1, "v8"), (2, "v9")]
    assert scheme.__getstate__()["_server_ref"] is None, "a weak reference does not pickle"


# What TorchRL's test_wrapper.py matches in the errors of its wrappers: arguments, the built-in class, the words.
UPSTREAM: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"generate_kwargs": {"temperature": -0.1}}, ValueError, "Temperature must be non-negative"),
    ({"generate_kwargs": {"top_p": 1.5}}, ValueError, "top_p must be between 0 and 1"),
    ({"generate_kwargs": {"top_k": 0}}, ValueError, "top_k must be positive"),
    ({"generate_kwargs": {"repetition_penalty": 0.0}}, ValueError, "repetition_penalty must be positive"),
    (
        {"generate_kwargs": {"do_sample": False, "temperature": 0.7}},
        ValueError,
        "When do_sample=False.*temperature must be 0",
    ),
    ({"input_mode": "invalid_mode"}, ValueError, "input_mode must be one of"),
    (
        {"batching": True, "min_batch_size": 5, "max_batch_size": 2},
        ValueError,
        "min_batch_size \\(5\\) must be <= max_batch_size \\(2\\)",
    ),
    ({"generate": False, "return_log_probs": False, "hidden": None}, ValueError, "return_log_probs must be True"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), UPSTREAM)
def test_arguments_are_refused_in_torchrls_words(arguments: Any, error: type[Exception], words: str) -> None:
    mode = arguments.get("input_mode", "text")
    with pytest.raises(error, match=words):
        make(mode, **{name: value for name, value in arguments.items() if name != "input_mode"})


def test_inputs_are_refused_in_torchrls_words() -> None:
    with pytest.raises(ValueError, match="Expected 'history' key"):
        make("history", input_key="history")[0](TensorDict(batch_size=(2,)))
    with pytest.raises(TypeError, match="Expected History object"):
        make("history")[0](TensorDict(history=ChatHistory(prompt="not a history object"), batch_size=(2,)))
