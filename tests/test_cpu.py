"""The CPU engine's set-up. It changes a whole process, so each case runs in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchrl_sglang_hidden.server.cpu import CPU_DEFAULTS, CPU_ENGINE_ENV, STANDIN_DIR, cpu_server_args


def run(code: str, **environment: str) -> Any:
    """The JSON that a fresh interpreter prints last."""
    env = {k: v for k, v in os.environ.items() if k not in (CPU_ENGINE_ENV, "PYTHONPATH")} | environment
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


def test_importing_this_packages_half_imports_no_sglang() -> None:
    assert run(
        "import json, sys\nfrom torchrl_sglang_hidden.server.cpu import has_accelerator\nhas_accelerator()\n"
        "import torchrl_sglang_hidden.server.__main__\nprint(json.dumps('sglang' not in sys.modules))"
    )


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
