"""TorchRL's weight synchronisation schemes on a real server: this package's, and where TorchRL's own stops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import QUESTIONS, assert_row, make_policy, tokens_input
from helpers.torchrl_pipelines import unpadded
from helpers.weight_changes import answers, assert_answered_with, wrapper_of
from tensordict import TensorDict
from torchrl.modules.inference_server import InferenceServer
from torchrl.weight_update.llm import SGLangWeightSyncScheme
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    InputError,
    SGLangHiddenWeightSyncScheme,
    SGLangServer,
    WeightsError,
)

ChatIds = Callable[[str], list[int]]


class Collector:
    """What a sender wants of a collector."""

    def __init__(self) -> None:
        self.version = 0

    def increment_version(self) -> None:
        self.version += 1


def test_the_sender_of_the_scheme(
    trainee: SGLangServer,
    trainer: PreTrainedModel,
    trained_dir: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_ids: ChatIds,
) -> None:
    sender, collector = SGLangHiddenWeightSyncScheme(trainee).create_sender(), Collector()
    with pytest.raises(InputError, match="register_model"):
        sender.update_weights()
    model = wrapper_of(trainer, tokenizer)
    sender.register_model(model)
    sender.register_collector(collector)
    sender.init_all_workers_group({name: (value.dtype, value.shape) for name, value in trainer.state_dict().items()})
    version = sender.update_weights()
    (after,) = answers(trainee, [chat_ids(QUESTIONS[0])])
    assert_answered_with(after, trained_dir)
    assert after.weight_version == version
    with pytest.raises(WeightsError):
        sender.update_weights({"model.norm.weight": torch.zeros(576)})
    assert collector.version == 1


def test_the_scheme_as_torchrl_uses_it(
    trainee: SGLangServer, trainer: PreTrainedModel, trained_dir: str, smol_dir: str, chat_ids: ChatIds
) -> None:
    scheme = SGLangHiddenWeightSyncScheme(trainee.url)
    scheme.init_on_sender(model_id="policy", model=trainer)
    scheme.connect()
    scheme.send()
    (after,) = answers(trainee, [chat_ids(QUESTIONS[0])])
    assert_answered_with(after, trained_dir)
    scheme.send(TensorDict.from_module(hf_oracle.load(smol_dir)))
    (after,) = answers(trainee, [chat_ids(QUESTIONS[0])])
    assert_answered_with(after, smol_dir)
    with pytest.raises(InputError, match="worker_ids=1"):
        scheme.send(trainer, worker_ids=1)
    # Its own client moved the version; the fixture's must see that to put the weights back.
    trainee.update_weights(trainer)


def test_an_inference_servers_weights(
    trainee: SGLangServer,
    trainer: PreTrainedModel,
    trained_dir: str,
    smol_dir: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_ids: ChatIds,
) -> None:
    scheme = SGLangHiddenWeightSyncScheme(trainee)
    sender, old = scheme.create_sender(), trainee.info.weight_version
    sender.register_model(trainer)
    with InferenceServer(make_policy(trainee, tokenizer, max_new_tokens=4), weight_sync=scheme) as server:
        rows = []
        for _ in range(2):
            rows.append(server.client()(tokens_input([chat_ids(QUESTIONS[0])])[0]))
            new = sender.update_weights()
    assert [int(row["policy_version"]) for row in rows] == [0, 1]
    assert rows[0]["weight_version"] == old
    assert len({old, rows[1]["weight_version"], new}) == 3
    for row, directory in zip(rows, (smol_dir, trained_dir), strict=True):
        assert_row(unpadded(row), directory)


def test_where_torchrls_own_scheme_stops(
    trainee: SGLangServer, trainer: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TorchRL's group needs CUDA, then it calls a route that SGLang 0.5.23 lacks, then it updates outside a session.

    The test lets each step pass to see the next.
    """
    version, state = trainee.info.weight_version, dict(trainer.state_dict())
    scheme = SGLangWeightSyncScheme(trainee.url, master_address="127.0.0.1")
    transport = scheme.create_transport()
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
            transport.init_all_workers_group({})

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    transport._comm_group, transport._group_name = object(), "no-group"
    transport._model_metadata = {name: (value.dtype, value.shape) for name, value in state.items()}
    with pytest.raises(RuntimeError, match=r"load query while pausing generation .*Not Found"):
        transport.send_weights("policy", state)

    monkeypatch.setattr(transport, "_wait_for_generation_pause", lambda model_id: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src, group: None)
    with pytest.raises(Exception, match="400 Client Error") as refused:
        transport.send_weights("policy", state)
    assert "must run between begin_weight_update() and end_weight_update()" in refused.value.response.text
    monkeypatch.undo()
    transport._comm_group = None
    transport.shutdown()
    # It paused the server, and let it go on in spite of both failures.
    assert answers(trainee, [[5, 6]], 2)[0].weight_version == version
