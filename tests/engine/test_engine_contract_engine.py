"""The contract of ../test_engine_contract.py on real engines: HTTP here, in-process in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checks import CHUNKED_PREFILL_SIZE
from test_engine_contract import EngineContract

from torchrl_sglang_hidden import SGLangOffline, SGLangServer, connect

TIMEOUT_S = 300


class TestServer(EngineContract):
    @pytest.fixture
    def engine(self, smol: SGLangServer) -> SGLangServer:
        return smol

    @pytest.fixture
    def another(self, smol: SGLangServer) -> SGLangServer:
        return connect(smol.url)


class InProcess(EngineContract):
    """Collected by the process that `test_in_process` starts, and not by name in this one."""

    @pytest.fixture(scope="class")
    def engine(self, smol_dir: str) -> Iterator[SGLangOffline]:
        arguments = {"dtype": "float32", "chunked_prefill_size": CHUNKED_PREFILL_SIZE}
        with SGLangOffline(smol_dir, **arguments) as engine:
            yield engine

    @pytest.fixture
    def another(self, engine: SGLangOffline) -> SGLangOffline:
        return SGLangOffline(engine.engine)


def test_in_process(tmp_path: Path) -> None:
    """`sglang.Engine` changes the process that it runs in for good, so its tests get one of their own."""
    command = [sys.executable, "-m", "pytest", "-vv", "-o", "python_classes=InProcess"]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", f"{__file__}::InProcess"],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0, log.read_text()[-6000:]
    assert "InProcess::test_many_threads_get_their_own_rows PASSED" in log.read_text()
