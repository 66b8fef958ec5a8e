"""`HiddenStateTransform` while the weights change: no vector of older weights is given as one of the present ones."""

from __future__ import annotations

from typing import Any

import torch
from helpers.fake_engine import RecordingEngine
from helpers.policy_batches import make
from helpers.word_env import PROMPT, ids_of, vectors_of
from tensordict import TensorDict

from torchrl_sglang_hidden import HiddenSpec, HiddenStateTransform


def transform(**options: Any) -> tuple[HiddenStateTransform, RecordingEngine]:
    policy = {"hidden": HiddenSpec(("prompt",)), "generate_kwargs": {"max_new_tokens": 0}, **options.pop("policy", {})}
    made, engine = make("text", **policy)
    return HiddenStateTransform(made, PROMPT, in_keys=["observation"], **options), engine


def rows_of(*numbers: int) -> TensorDict:
    return TensorDict(observation=torch.tensor(numbers)[:, None], batch_size=len(numbers))


def asked(engine: RecordingEngine) -> list[list[int]]:
    return [[ids[1] - ids_of(0)[1] for ids in payload["input_ids"]] for payload in engine.payloads]


def test_new_weights_empty_the_cache() -> None:
    made, engine = transform(cache_size=9)
    data = rows_of(1, 2)
    made(data)
    engine.update_weights(None, version="v8")
    made(data)
    assert asked(engine) == [[1, 2], [1, 2]]


def test_weights_that_somebody_else_updated_are_noticed_with_the_next_prompt() -> None:
    made, engine = transform(cache_size=9)
    made(rows_of(1, 2))

    def newer(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["meta_info"]["weight_version"] = "v9"

    engine.fault = newer
    made(rows_of(1, 3))
    assert asked(engine) == [[1, 2], [3], [1]]
    engine.weight_version = lambda: "v9"  # type: ignore[method-assign]
    made(rows_of(1, 3))
    assert len(engine.payloads) == 3, "the engine's info is as it was, and the cache serves the new weights"


def test_weights_that_somebody_else_updated_are_noticed_where_every_prompt_is_in_the_cache() -> None:
    made, engine = transform(cache_size=9)
    data = rows_of(1, 2)
    made(data)
    old = data["hidden_state"].clone()
    version = "v7"
    engine.weight_version = lambda: version  # type: ignore[method-assign]

    def update(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["meta_info"]["weight_version"] = version

    engine.fault = update
    made(data)
    assert len(engine.payloads) == 1
    version = "v8"
    for _ in range(2):
        made(data)
        assert asked(engine) == [[1, 2], [1, 2]], "the new weights are asked once, and kept"
    assert torch.equal(data["hidden_state"], old), "the fake engine computes as before"


def test_answers_of_several_weights_are_given_and_not_kept() -> None:
    """An update in the middle of a call: which answer is of which weights would have to be kept, too."""
    made, engine = transform(cache_size=9)
    data = rows_of(1, 2, 4)

    def update(rows: list[dict[str, Any]]) -> None:
        rows[-1]["meta_info"]["weight_version"] = "v8"

    engine.fault = update
    made(data)
    torch.testing.assert_close(data["hidden_state"], vectors_of(data["observation"]))
    assert made.cache_info.size == 0
    engine.fault = None
    made(data)
    assert asked(engine) == [[1, 2, 4]] * 2
    assert made.cache_info.size == 3


def test_one_prompt_whose_weights_changed_as_it_was_answered_is_not_kept() -> None:
    policy = {"hidden": HiddenSpec(("response",)), "generate_kwargs": {"max_new_tokens": 2}}
    made, engine = transform(cache_size=9, policy=policy)

    def update(rows: list[dict[str, Any]]) -> None:
        spans = [{"version": f"v{7 + end}", "start": end, "end": end + 1} for end in (0, 1)]
        rows[0]["meta_info"].update(weight_version="v8", weight_versions=spans)

    engine.fault = update
    made(rows_of(4))
    assert made.cache_info.size == 0
