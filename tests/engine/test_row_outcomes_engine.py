"""Rows that went wrong, on a real server: they go on later, and TorchRL's collector, buffer and loss go on too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import STATE_RTOL, assert_rows, prompt_of, relative_error, tokens_input
from helpers.torchrl_pipelines import AnswerReward, chat_env, collector
from helpers.weight_changes import load_trainer
from tensordict import TensorDictBase
from torchrl.data import Composite, LazyStackStorage, ReplayBuffer, Unbounded
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss, MCAdvantage
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import Between, HiddenSpec, SGLangHiddenWrapper, SGLangServer
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.spec.hidden import SEGMENTS

GREEDY = {"temperature": 0.0, "max_new_tokens": 400, "ignore_eos": True}


@pytest.fixture
def abort_soon(smol: SGLangServer) -> Iterator[Callable[[int], None]]:
    """Yield a function that has everything aborted once the scheduler works on a number of requests for states."""
    threads: list[threading.Thread] = []

    def watch(count: int) -> None:
        with httpx.Client(base_url=smol.url, timeout=60, trust_env=False) as client:
            while client.get("/server_info").json()["internal_states"][0][CHANNEL]["open_pools"] < count:
                pass
            client.post("/abort_request", json={"abort_all": True}).raise_for_status()

    def start(count: int) -> None:
        threads.append(threading.Thread(target=watch, args=(count,), daemon=True))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_an_aborted_response_is_gone_on_from(
    smol: SGLangServer,
    smol_dir: str,
    tokenizer: PreTrainedTokenizerBase,
    abort_soon: Callable[[int], None],
    pooling: Any,
) -> None:
    """Tokens, log-probs and states of both parts are Hugging Face's over the whole response."""
    policy = SGLangHiddenWrapper(
        smol, tokenizer=tokenizer, input_mode="tokens", hidden=HiddenSpec(SEGMENTS, pooling, tokens=True),
        generate_kwargs=GREEDY, on_error="nan",
    )  # fmt: skip
    prompts = [prompt_of(70, seed=1), prompt_of(9, seed=2)]
    abort_soon(2)
    first = policy(tokens_input(prompts))
    assert first["finish_reason"] == ["abort"] * 2
    done = [len(row) for row in first["tokens"].get("response", as_list=True)]
    assert all(done)
    out = policy.resume(first, max_new_tokens=max(done) + 4)
    assert out["finish_reason"] == ["length"] * 2
    rows = assert_rows(out, smol_dir, SEGMENTS, pooling)
    for row, before, states_ND in zip(
        rows,
        first["tokens"].get("response", as_list=True),
        out["token_hidden_states"].get("full", as_list=True),
        strict=True,
    ):
        assert len(row.response_ids) == max(done) + 4
        assert row.response_ids[: len(before)] == before.tolist()
        truth = hf_oracle.teacher_force(smol_dir, row.prompt_ids, row.response_ids)
        assert relative_error(states_ND, truth.states_SD) < STATE_RTOL
    assert out["error"] == ["", ""]
    assert [versions[0][1] for versions in out["weight_versions"]] == [max(done) + 4] * 2


class TokenReward(AnswerReward):
    """Rewards of the shape that GRPOLoss wants, ``[B, 1, 1]``; answers that are not there get none."""

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        out = super()._step(tensordict, next_tensordict)
        return out.set("reward", out["reward"].unsqueeze(-1))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded(shape=(*reward_spec.shape, 1, 1))
        return reward_spec


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
def test_collector_buffer_and_loss_go_on(
    smol: SGLangServer, smol_dir: str, tokenizer: PreTrainedTokenizerBase, pad_output: bool
) -> None:
    """Half of the chats lack a span of the prompt and are not sent; the other half of the answers lack a marker."""
    spec = HiddenSpec(
        ("prompt", "response"),
        spans={"topic": Between("capital", None, segment="prompt"), "thought": Between("<think>", None)},
    )
    policy = SGLangHiddenWrapper(
        smol, tokenizer=tokenizer, hidden=spec, on_error="nan", pad_output=pad_output,
        generate_kwargs={"max_new_tokens": 6, "temperature": 1.0},
    )  # fmt: skip
    buffer = ReplayBuffer(
        storage=LazyStackStorage(8),
        sampler=SamplerWithoutReplacement(),
        transform=MCAdvantage(grpo_size=2, prompt_key="query"),
        batch_size=4,
    )
    env = chat_env(["What is the capital of France?", "Hi"], batch_size=4, repeats=2, transforms=[TokenReward()])
    turns = collector(env, policy, turns_per_batch=4, replay_buffer=buffer)
    try:
        next(iter(turns))
    finally:
        turns.shutdown()
    batch = buffer.sample()
    kinds = sorted(error.split(":")[0] + error.split("'")[1] for error in batch["error"])
    assert kinds == ["SpanErrorthought"] * 2 + ["SpanErrortopic"] * 2
    assert sorted(batch["finish_reason"])[:2] == ["error", "error"]
    sent = torch.tensor([reason != "error" for reason in batch["finish_reason"]])
    states = batch["hidden_states"]
    assert states.response.isfinite().all(-1).tolist() == sent.tolist()
    assert states.span_counts["thought"].tolist() == [0] * 4
    assert (states.span_counts["topic"] > 0).tolist() == sent.tolist()
    model = load_trainer(smol_dir)
    trainer = TransformersWrapper(
        model, tokenizer=tokenizer, input_mode="tokens", generate=False, pad_output=pad_output
    )
    losses = GRPOLoss(trainer)(batch)
    loss = losses.loss_objective + losses.loss_entropy
    loss.backward()
    assert loss.isfinite()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())
