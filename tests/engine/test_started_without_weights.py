"""A rollout server that is started as verl, slime and SkyRL start theirs, on a directory with no weights in it.

1. The first update gives it weights; names and shapes are held against the model that its config describes.
2. Large models come in buckets, by disk and over the network, and requests that run meanwhile are of one version.
3. Adapters are loaded, replaced and unloaded while it serves, and every sample says by its version which it was.
4. A server that dies in the middle of a rollout comes back with all that it was given, and leaves nothing behind: each
   call has its right result or a named error. `make kills` kills it 20 times.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import heads_oracle, random_models
from helpers.policy_checks import LOG_PROB_ATOL, SEGMENTS, assert_row, make_policy, prompt_of
from helpers.process_watch import still_running, watched
from helpers.rollout import SHARED_MEMORY, Rollout, family_of, scheduler_of, traces_of
from helpers.sharded_trainer import run_trainer
from helpers.weight_changes import answers, assert_answered_with, load_trainer, perturb
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    EngineError,
    Head,
    HeadSpec,
    HiddenSpec,
    IncompleteWeightsError,
    Restart,
    SGLangHiddenError,
    SGLangServer,
    WeightsError,
    connect,
    launch,
)
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.records import Completion, Request

PROMPTS = [prompt_of(7, 1), prompt_of(12, 2)]
KILLS = int(os.environ.get("TORCHRL_SGLANG_HIDDEN_KILLS", "1"))
# Most seconds from one answer of the rollout's server to the next kill.
LONGEST_LIFE_S = 4.0
BACK_S = 240.0


@pytest.fixture(scope="module")
def rollout_server(qwen3_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    directory = tmp_path_factory.mktemp("models") / "no-weights"
    shutil.copytree(qwen3_dir, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    with launch(
        directory,
        load_format="dummy",
        dtype="float32",
        max_total_tokens=4096,
        enable_lora=True,
        max_lora_rank=random_models.LORA_RANK,
        lora_target_modules=list(random_models.LORA_TARGETS),
        lora_backend="torch_native",
        sleep_on_idle=True,
        restart=Restart(limit=KILLS, window_s=3600, backoff_s=0.1, max_backoff_s=0.5, wait_s=BACK_S),
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def trained(qwen3_dir: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, str]:
    """Return a model other than the checkpoint's, and a directory with its weights."""
    model = perturb(load_trainer(qwen3_dir))
    directory = tmp_path_factory.mktemp("models") / "trained"
    model.save_pretrained(directory)
    return model, str(directory)


@pytest.mark.parametrize(
    "options",
    [{}, {"bucket_bytes": 1 << 20}, {"transport": "network"}, {"transport": "network", "bucket_bytes": 1 << 20}],
    ids=str,
)
def test_the_first_update_gives_it_weights(
    options: dict[str, Any], rollout_server: SGLangServer, trained: tuple[PreTrainedModel, str], qwen3_dir: str
) -> None:
    for weights, directory in ((qwen3_dir, qwen3_dir), (trained[0], trained[1])):
        version = rollout_server.update_weights(weights, **options)
        for completion in answers(rollout_server, PROMPTS, 4):
            assert completion.weight_version == version
            assert_answered_with(completion, directory)


def test_what_does_not_fit_its_model_is_refused(
    rollout_server: SGLangServer, trained: tuple[PreTrainedModel, str]
) -> None:
    state = dict(trained[0].state_dict())
    version = rollout_server.update_weights(state)
    name = "model.layers.0.mlp.up_proj.weight"
    for spoilt, message in (
        ({**state, name: torch.zeros(2, 3)}, r"up_proj.weight has shape \(2, 3\)"),
        (
            {key: value for key, value in state.items() if key != name},
            r"1 \(model.layers.0.mlp.up_proj.weight\) missing",
        ),
    ):
        with pytest.raises(WeightsError, match=message):
            rollout_server.update_weights(spoilt)
    (after, _) = answers(rollout_server, PROMPTS, 2)
    assert after.weight_version == version
    assert_answered_with(after, trained[1])


def test_requests_beside_an_update_in_buckets_are_of_one_version(
    rollout_server: SGLangServer, trained: tuple[PreTrainedModel, str], qwen3_dir: str
) -> None:
    versions = {rollout_server.update_weights(qwen3_dir): qwen3_dir}
    with ThreadPoolExecutor(1) as pool:
        update = pool.submit(rollout_server.update_weights, trained[0], transport="network", bucket_bytes=1 << 18)
        rows = answers(rollout_server, PROMPTS, 20)
        while not update.done():
            rows += answers(rollout_server, PROMPTS, 20)
        versions[update.result()] = trained[1]
    rows += answers(rollout_server, PROMPTS, 20)
    assert not any(row.mixed_weights for row in rows)
    assert {row.weight_version for row in rows} == versions.keys()
    for version, directory in versions.items():
        assert_answered_with(next(row for row in rows if row.weight_version == version), directory)
    # Greedy: one answer per prompt and version.
    firsts: dict[Any, Any] = {}
    for row in rows:
        first = firsts.setdefault((row.weight_version, row.prompt_ids), row)
        assert row.response_ids == first.response_ids
        torch.testing.assert_close(row.log_probs_T, first.log_probs_T, atol=LOG_PROB_ATOL, rtol=0)


def test_an_update_that_breaks_off_between_buckets_says_so(
    rollout_server: SGLangServer, trained: tuple[PreTrainedModel, str], qwen3_dir: str
) -> None:
    rollout_server.update_weights(qwen3_dir)
    endpoint, call, taken = rollout_server._endpoints[0], rollout_server._endpoints[0].call, []

    def breaks(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        if route == "update_weights_from_distributed":
            taken.append(route)
            if len(taken) == 3:
                return {"success": False, "message": "out of memory"}
        return call(route, payload)

    endpoint.call = breaks  # type: ignore[method-assign]
    try:
        with pytest.raises(
            EngineError, match=r"bucket 3 of \d+ did not reach .*out of memory.*calls them mixed-incomplete"
        ):
            rollout_server.update_weights(trained[0], version="mixed", transport="network", bucket_bytes=1 << 20)
    finally:
        del endpoint.call  # type: ignore[method-assign]
    with pytest.raises(IncompleteWeightsError, match="weight_version='mixed-incomplete' is a mixture"):
        answers(rollout_server, PROMPTS, 2)
    rollout_server.update_weights(qwen3_dir, version="whole")
    (after, _) = answers(rollout_server, PROMPTS, 2)
    assert after.weight_version == "whole"
    assert_answered_with(after, qwen3_dir)


# --- adapters -------------------------------------------------------------------------------------------------------


def lora(qwen3_dir: str, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    options = {"target_modules": list(random_models.LORA_TARGETS), "r": 4, "lora_alpha": 8, **options}
    return get_peft_model(load_trainer(qwen3_dir), LoraConfig(init_lora_weights=False, **options))


def saved(model: Any, directory: Path) -> str:
    copy.deepcopy(model).merge_and_unload().save_pretrained(directory)
    return str(directory)


def under(engine: SGLangServer, name: str | None, num_tokens: int = 4) -> list[Completion]:
    sampling, spec = {"max_new_tokens": num_tokens, "temperature": 0}, HiddenSpec(segments=SEGMENTS)
    return engine.generate([Request(tuple(ids), sampling, hidden=spec, lora=name) for ids in PROMPTS])


def test_adapters_come_and_go_while_it_serves(rollout_server: SGLangServer, qwen3_dir: str, tmp_path: Path) -> None:
    before = rollout_server.update_weights(qwen3_dir)
    first, second = lora(qwen3_dir, 1), lora(qwen3_dir, 2, alpha_pattern={"q_proj": 3}, rank_pattern={"v_proj": 2})
    second.save_pretrained(tmp_path / "second")
    steps = ((first, saved(first, tmp_path / "a")), (tmp_path / "second", saved(second, tmp_path / "b")))
    versions = [before]
    for adapter, merged_dir in steps:
        versions.append(rollout_server.load_adapter("mine", adapter))
        for completion in under(rollout_server, "mine"):
            assert completion.weight_version == versions[-1] == rollout_server.info.weight_version
            assert_answered_with(completion, merged_dir)
        for completion in under(rollout_server, None):
            assert_answered_with(completion, qwen3_dir)
    assert len(set(versions)) == 3
    rollout_server.unload_adapter("mine")
    with pytest.raises(EngineError):
        under(rollout_server, "mine")
    with pytest.raises(EngineError, match=r"refused to unload adapter 'mine'"):
        rollout_server.unload_adapter("mine")
    (after, _) = under(rollout_server, None)
    assert_answered_with(after, qwen3_dir)


def test_requests_beside_a_replacement_have_one_adapter(
    rollout_server: SGLangServer, qwen3_dir: str, tmp_path: Path
) -> None:
    rollout_server.update_weights(qwen3_dir)
    adapters = [lora(qwen3_dir, seed) for seed in (3, 4)]
    directories = [saved(model, tmp_path / str(index)) for index, model in enumerate(adapters)]
    versions = {rollout_server.load_adapter("beside", adapters[0]): directories[0]}
    with ThreadPoolExecutor(1) as pool:
        replaced = pool.submit(rollout_server.load_adapter, "beside", adapters[1])
        rows = under(rollout_server, "beside", 20)
        while not replaced.done():
            rows += under(rollout_server, "beside", 20)
        versions[replaced.result()] = directories[1]
    rows += under(rollout_server, "beside", 20)
    assert not any(row.mixed_weights for row in rows)
    for row in rows:
        assert_answered_with(row, versions[row.weight_version])
    rollout_server.unload_adapter("beside")


def test_an_adapted_model_is_merged_on_the_way(rollout_server: SGLangServer, qwen3_dir: str, tmp_path: Path) -> None:
    model = lora(qwen3_dir, 5)
    merged_dir = saved(model, tmp_path / "merged")
    rollout_server.update_weights(torch.compile(model))
    for completion in answers(rollout_server, PROMPTS, 4):
        assert_answered_with(completion, merged_dir)


def test_two_processes_of_a_trainer_update_it(rollout_server: SGLangServer, qwen3_dir: str, tmp_path: Path) -> None:
    """FSDP2 over gloo: both call `update_weights`, and the first talks to the server."""
    perturb(load_trainer(qwen3_dir)).save_pretrained(tmp_path)
    cases = ("plain buckets", "compiled network buckets")
    assert run_trainer(qwen3_dir, rollout_server.url, *cases) == [[{"version": case}] * 2 for case in cases]
    for completion in answers(rollout_server, PROMPTS, 4):
        assert completion.weight_version == cases[-1]
        assert_answered_with(completion, str(tmp_path))


# --- deaths: last in this file, since nothing is left of the server then ---------------------------------------------


def test_a_rollout_goes_on_over_deaths_of_its_server(
    rollout_server: LaunchedServer,
    tokenizer: PreTrainedTokenizerBase,
    trained: tuple[PreTrainedModel, str],
    qwen3_dir: str,
    tmp_path: Path,
) -> None:
    server, (trainer, trained_dir) = rollout_server, trained
    server.update_weights(trainer)
    adapter = lora(qwen3_dir, 6)
    version = server.load_adapter("step", adapter)
    adapter.load_state_dict(trainer_under(adapter, trainer))
    merged_dir = saved(adapter, tmp_path / "merged")
    head = heads_oracle.make_head("mlp", server.info.hidden_size, normalize="rms")
    of_head = server.push_head("kept", head)

    rollout, chance = Rollout(make_policy(server, tokenizer)), random.Random(KILLS)
    traces: set[Path] = set()
    down_s, killed = [], Counter[str]()
    with rollout.running(callers=3):
        for restarts in range(1, KILLS + 1):
            leader = psutil.Process(server.pid)
            traces |= traces_of(leader)
            threading.Event().wait(chance.uniform(0, LONGEST_LIFE_S))
            whole = chance.random() < 0.5
            killed["server" if whole else "scheduler"] += 1
            with watched([process.pid for process in family_of(leader)]) as handles:
                begun = time.monotonic()
                os.kill(leader.pid if whole else scheduler_of(leader), signal.SIGKILL)
                assert still_running(handles, timeout_s=60) == []
            (completion,) = patiently(server)
            down_s.append(time.monotonic() - begun)
            assert (server.restarts, completion.weight_version) == (restarts, version)
            assert_answered_with(completion, trained_dir)
            assert_scored(server, head, of_head, trained_dir)

    print(
        f"\n{KILLS} kills {dict(killed)}: {rollout.calls} calls, {len(rollout.rows)} rows, "
        f"{dict(Counter(type(error).__name__ for error in rollout.errors))}, "
        f"down for {min(down_s):.1f} to {max(down_s):.1f} s, {server.retried} retries"
    )
    assert [error for error in rollout.errors if not isinstance(error, SGLangHiddenError)] == []
    assert len(rollout.rows) == 2 * (rollout.calls - len(rollout.errors)) > 0
    for prompt, row in rollout.rows:
        assert (row.prompt_ids, row.weight_version) == (prompt, version)
        assert_row(row, trained_dir)
    with connect(server.url) as other:
        assert other.info.weight_version == server.info.weight_version == version
        for name, directory in ((None, trained_dir), ("step", merged_dir)):
            for completion in under(other, name):
                assert_answered_with(completion, directory)

    leader = psutil.Process(server.pid)
    traces |= traces_of(leader)
    assert any(path.name.startswith("sglang_loads_") for path in traces)
    assert sum("-kept-" in path.name for path in traces) == 2, "the weights and the adapter"
    with watched([process.pid for process in family_of(leader)]) as handles:
        server.close()
        assert still_running(handles, timeout_s=10) == []
    assert [path for path in traces if path.exists()] == []
    assert list(SHARED_MEMORY.glob(f"torchrl-sglang-hidden-weights-{os.getpid()}-*")) == []
    assert not [child for child in psutil.Process().children() if "torchrl_sglang_hidden.server" in child.cmdline()]


def trainer_under(adapter: Any, trainer: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return an adapted model's state with a trainer's weights under the adapter."""
    state = dict(adapter.state_dict())
    for name, value in trainer.state_dict().items():
        path, _, last = f"base_model.model.{name}".rpartition(".")
        state[f"{path}.{last}" if f"{path}.{last}" in state else f"{path}.base_layer.{last}"] = value
    return state


def assert_scored(server: LaunchedServer, head: Head, version: str, model_dir: str) -> None:
    """Check that the server has a head again, and scores by it."""
    request = Request(tuple(PROMPTS[0]), {"temperature": 0, "max_new_tokens": 3}, heads=HeadSpec(("kept",)))
    (completion,) = server.generate([request])
    scores = completion.scores["kept"]
    truth = heads_oracle.expected(head, model_dir, PROMPTS[0], completion.response_ids, ())["response"]
    assert scores.version == version
    assert scores.response_T is not None
    heads_oracle.assert_scores(scores.response_T, truth, "kept")


def patiently(server: LaunchedServer) -> list[Completion]:
    """Call until the server answers: a call that begins in the moment before its death is noticed may fail."""
    deadline = time.monotonic() + BACK_S
    while True:
        try:
            return answers(server, PROMPTS[:1], 4)
        except SGLangHiddenError:
            if time.monotonic() > deadline:
                raise
