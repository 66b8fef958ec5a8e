"""An update is done when every rank has it: what the ranks tell each other, and what rank 0 answers then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchrl_sglang_hidden.protocol.served_weights import NOT_FLUSHED
from torchrl_sglang_hidden.server.rank_agreement import after_adapter_load, after_weight_update


@pytest.fixture
def other_ranks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the ranks behind this one tell; this one is rank 0."""
    told: list[str] = []

    def gather(everything: list[str], mine: str, *, group: Any) -> None:
        assert group == "the ranks of one model"
        everything[:] = [mine, *told]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1 + len(told))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    return told


def update(success: bool, message: str = "") -> tuple[Any, list[str]]:
    """Return what rank 0 answers, and the versions that it records; "flushed" where it empties its prefix cache."""
    result, versions = SimpleNamespace(success=success, message=message), []
    updater = SimpleNamespace(
        tp_cpu_group="the ranks of one model",
        record_weight_version_after_update=versions.append,
        flush_cache=lambda: versions.append("flushed"),
    )
    after_weight_update(result, updater, SimpleNamespace(weight_version="step-7"))
    return result, versions


@pytest.mark.parametrize(
    ("others", "success", "message"),
    [
        ([], True, "done"),
        ([], False, "no such file"),
        (["", ""], True, "done"),
        (["", ""], False, NOT_FLUSHED + ": requests run"),
        (["no such file", "no file"], False, "no such file"),
    ],
)
def test_where_all_ranks_fared_alike_the_first_says_it(
    other_ranks: list[str], others: list[str], success: bool, message: str
) -> None:
    other_ranks += others
    result, versions = update(success, message)
    assert (result.success, result.message, versions) == (success, message, [])


@pytest.mark.parametrize("message", ["done", NOT_FLUSHED])
def test_a_rank_that_failed_fails_the_update_and_the_mixture_has_a_name(other_ranks: list[str], message: str) -> None:
    other_ranks += ["", "no such file"]
    result, versions = update(message == "done", message)
    assert not result.success
    assert result.message.startswith("rank 2 of 3 failed: no such file; the others have the new weights")
    # The ranks that have the weights have emptied theirs, and ranks whose caches differ wait for each other for ever.
    assert versions == ["flushed", "step-7-incomplete"]


def test_the_first_rank_may_be_the_one_that_failed(other_ranks: list[str]) -> None:
    other_ranks += [""]
    result, versions = update(False, "no memory")
    assert result.message.startswith("rank 0 of 2 failed: no memory; ")
    assert versions == ["flushed", "step-7-incomplete"]


@pytest.mark.parametrize("first", [True, False])
def test_an_adapter_is_loaded_when_every_rank_has_it(other_ranks: list[str], first: bool) -> None:
    other_ranks += ["no such file" if first else ""]
    loaded = {"other": "/o", **({"a": "/a"} if first else {})}
    result = SimpleNamespace(success=first, error_message=None if first else "no such file", loaded_adapters=loaded)
    scheduler = SimpleNamespace(tp_group=SimpleNamespace(cpu_group="the ranks of one model"))
    after_adapter_load(result, scheduler, SimpleNamespace(lora_name="a", lora_path="/a"))
    assert not result.success
    # SGLang's tokenizer manager lets an adapter be unloaded that this names.
    assert result.loaded_adapters == {"other": "/o", "a": "/a"}
    assert result.error_message == (
        f"rank {int(first)} of 2 failed: no such file; the others have the adapter; unload it, and load it again"
    )
