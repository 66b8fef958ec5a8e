"""A rollout server that is started as verl, slime and SkyRL start theirs, on a directory with no weights in it.

1. The first update gives it weights; names and shapes are held against the model that its config describes.
2. Large models come in buckets, by disk and over the network, and requests that run meanwhile are of one version.
3. Adapters are loaded, replaced and unloaded while it serves, and every sample says by its version which it was.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_models
from helpers.policy_checks import LOG_PROB_ATOL, SEGMENTS, prompt_of
from helpers.sharded_trainer import run_trainer
from helpers.weight_changes import answers, assert_answered_with, load_trainer, perturb
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from torchrl_sglang_hidden import EngineError, HiddenSpec, SGLangServer, WeightsError, launch
from torchrl_sglang_hidden.records import Completion, Request

PROMPTS = [prompt_of(7, 1), prompt_of(12, 2)]


@pytest.fixture(scope="module")
def rollout_server(qwen3_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
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
    (after, _) = answers(rollout_server, PROMPTS, 2)
    assert after.weight_version == "mixed-incomplete"
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
