"""The CPU engine's set-up. It changes a whole process, so each case runs in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchrl_sglang_hidden.server.cpu import (
    BIND_ENV,
    CPU_DEFAULTS,
    CPU_ENGINE_ENV,
    MALLOC_ENV,
    NCCL_ENV,
    NO_NCCL,
    STANDIN_DIR,
    THREADS_ENV,
    bind_threads,
    cpu_server_args,
)


def run(code: str, **environment: str) -> Any:
    """Return the JSON that a fresh interpreter prints last."""
    unset = (CPU_ENGINE_ENV, NCCL_ENV, "PYTHONPATH", *MALLOC_ENV)
    env = {name: value for name, value in os.environ.items() if name not in unset} | environment
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_standin_gives_names_that_refuse_when_called() -> None:
    found = run(
        "import json; from torchrl_sglang_hidden.server.cpu import use_cpu_engine; use_cpu_engine()\n"
        "import sgl_kernel; from sgl_kernel import fused_add_rmsnorm\n"
        "try:\n    fused_add_rmsnorm(1)\nexcept NotImplementedError as error:\n    message = str(error)\n"
        "print(json.dumps([sgl_kernel.__file__, message, hasattr(sgl_kernel, '__wrapped__')]))"
    )
    assert Path(found[0]).is_relative_to(STANDIN_DIR)
    assert found[1].startswith("sgl_kernel.fused_add_rmsnorm: this is a stand-in")
    assert found[2] is False


def test_the_standin_has_the_operators_that_image_processors_import() -> None:
    """And not the one that SGLang takes for a sign of AMX kernels."""
    found = run(
        "import json, torch; from torchrl_sglang_hidden.server.cpu import use_cpu_engine; use_cpu_engine()\n"
        "import sgl_kernel\nops = torch.ops.sgl_kernel\n"
        "try:\n    ops.fused_sigmoid_mul_cpu(1)\nexcept NotImplementedError as error:\n    message = str(error)\n"
        "names = ['fused_qk_gemma_rmsnorm_cpu', 'fused_qk_gemma_rmsnorm_with_gate_cpu',\n"
        "         'fused_qkvzba_split_reshape_cat_contiguous_cpu', 'convert_weight_packed']\n"
        "print(json.dumps([message, *(hasattr(ops, name) for name in names)]))"
    )
    assert found[0].startswith("sgl_kernel.fused_sigmoid_mul_cpu: this is a stand-in")
    assert found[1:] == [True, True, True, False]


def test_spawned_children_find_the_standin_and_the_users_path_behind_it() -> None:
    child = "import json, os, sgl_kernel; print(json.dumps([sgl_kernel.__file__, os.environ['PYTHONPATH']]))"
    found = run(
        "import subprocess, sys\nfrom torchrl_sglang_hidden.server.cpu import use_cpu_engine\n"
        "use_cpu_engine(); use_cpu_engine()\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)",
        PYTHONPATH="users-own",
    )
    assert Path(found[0]).is_relative_to(STANDIN_DIR)
    assert found[1] == os.pathsep.join([str(STANDIN_DIR), "users-own"])


@pytest.mark.parametrize("pythonpath", [None, "users-own"])
def test_the_environment_is_restored_after_an_engine_start(pythonpath: str | None) -> None:
    during, after, sglang_loaded = run(
        "import json, os, sys\nfrom torchrl_sglang_hidden.server.cpu import cpu_engine_environment\n"
        "with cpu_engine_environment():\n    during = os.environ['PYTHONPATH']\n"
        "print(json.dumps([during, os.environ.get('PYTHONPATH'), 'sglang' in sys.modules]))",
        **({} if pythonpath is None else {"PYTHONPATH": pythonpath}),
    )
    assert during.startswith(str(STANDIN_DIR))
    assert after == pythonpath
    assert sglang_loaded is False


def test_an_engine_on_an_accelerator_changes_nothing() -> None:
    assert run(
        "import json, os, sys\nfrom torchrl_sglang_hidden.server.cpu import cpu_engine_environment\n"
        "before = dict(os.environ), list(sys.path)\n"
        "with cpu_engine_environment(False):\n    print(json.dumps(before == (dict(os.environ), sys.path)))"
    )


def test_choosing_the_cpu_engine_after_sglang_was_imported_raises_and_changes_nothing() -> None:
    message, unchanged = run(
        "import json, os, sys, types\nfrom torchrl_sglang_hidden import errors\n"
        "from torchrl_sglang_hidden.server.cpu import cpu_engine_environment\n"
        "sys.modules['sglang'] = types.ModuleType('sglang'); before = dict(os.environ), list(sys.path)\n"
        "try:\n    cpu_engine_environment().__enter__()\n"
        "except errors.CapabilityError as error:\n    message = str(error)\n"
        "print(json.dumps([message, before == (dict(os.environ), sys.path)]))"
    )
    assert f"{CPU_ENGINE_ENV}=1 before the first import of sglang" in message
    assert unchanged


@pytest.fixture
def unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the division of the cores from the environment, and restore it after the test."""
    for name in (BIND_ENV, THREADS_ENV):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 4, 6, 5})


@pytest.mark.usefixtures("unbound")
@pytest.mark.parametrize(
    ("num_ranks", "bound", "threads"),
    [(1, None, None), (2, "4,6|5,7", "2"), (3, "4,7|5|6", "1"), (5, "4|5|6|7|4", "1")],
)
def test_several_schedulers_have_cores_of_their_own(num_ranks: int, bound: str | None, threads: str | None) -> None:
    bind_threads(num_ranks)
    assert (os.environ.get(BIND_ENV), os.environ.get(THREADS_ENV)) == (bound, threads)


@pytest.mark.usefixtures("unbound")
@pytest.mark.parametrize("name", [BIND_ENV, THREADS_ENV])
def test_cores_that_the_user_chose_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0-1|2-3")
    bind_threads(2)
    assert os.environ[name] == "0-1|2-3"
    assert {BIND_ENV, THREADS_ENV} <= os.environ.keys()


@pytest.mark.parametrize("chosen", [None, "/opt/nccl/libnccl.so.2"])
def test_ranks_do_without_nccl_unless_the_user_names_one(chosen: str | None) -> None:
    found = run(
        "import json, os; from torchrl_sglang_hidden.server.cpu import use_cpu_engine; use_cpu_engine()\n"
        f"print(json.dumps(os.environ[{NCCL_ENV!r}]))",
        **({} if chosen is None else {NCCL_ENV: chosen}),
    )
    assert found == (chosen or NO_NCCL)
    assert not Path(NO_NCCL).exists()


def test_freed_memory_is_kept_for_the_next_prefill_unless_the_user_says_otherwise() -> None:
    mapped, trimmed = MALLOC_ENV
    found = run(
        "import json, os; from torchrl_sglang_hidden.server.cpu import use_cpu_engine; use_cpu_engine()\n"
        f"print(json.dumps([os.environ[name] for name in {list(MALLOC_ENV)!r}]))",
        **{trimmed: "7"},
    )
    assert found == [str(MALLOC_ENV[mapped]), "7"]


@pytest.fixture(scope="module")
def with_torch() -> Any:
    """Return what a process that has imported torch finds. The import takes seconds, so several tests share it."""
    return run(
        "import json, sys\nfrom torchrl_sglang_hidden.server.cpu import has_accelerator, ignore_pinning\n"
        "has_accelerator()\nimport torchrl_sglang_hidden.server.__main__\nsglang_loaded = 'sglang' in sys.modules\n"
        "import torch\nignore_pinning(); ignore_pinning(); pinned = dict(pin_memory=True)\n"
        "made = [torch.tensor([0], **pinned), torch.empty(1, **pinned), torch.zeros(1, **pinned),\n"
        "    torch.ones(1, **pinned), torch.full((1,), 2, **pinned), torch.arange(1, **pinned)]\n"
        "found = [made[4].tolist(), made[0].pin_memory() is made[0], torch.zeros(2).tolist()]\n"
        "print(json.dumps(dict(sglang_loaded=sglang_loaded, pinned=found)))"
    )


def test_pinning_is_ignored_where_it_would_be_refused(with_torch: Any) -> None:
    assert with_torch["pinned"] == [[2], True, [0.0, 0.0]]


def test_importing_this_packages_half_imports_no_sglang(with_torch: Any) -> None:
    assert with_torch["sglang_loaded"] is False


def test_the_standin_is_no_part_of_the_packages_import_tree() -> None:
    assert not (STANDIN_DIR / "__init__.py").exists()


@pytest.mark.parametrize(
    ("config", "context_length", "pool_tokens"),
    [
        ({"max_position_embeddings": 8192}, None, CPU_DEFAULTS["max_total_tokens"]),
        ({"max_position_embeddings": 40960}, None, 40960 + 64),
        ({"text_config": {"max_position_embeddings": 40960}}, None, 40960 + 64),
        ({"max_position_embeddings": 40960}, 2048, CPU_DEFAULTS["max_total_tokens"]),
        (None, None, CPU_DEFAULTS["max_total_tokens"]),
    ],
)
def test_the_kv_pool_holds_a_prompt_of_the_models_full_context(
    config: dict[str, Any] | None, context_length: int | None, pool_tokens: int, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = cpu_server_args(str(tmp_path), context_length=context_length)
    assert arguments == {**CPU_DEFAULTS, "max_total_tokens": pool_tokens}
