"""The contract of engines on real engines: HTTP here, in-process in a process of its own."""

from __future__ import annotations

import pytest
from helpers.engine_contract import EngineContract

from torchrl_sglang_hidden import SGLangOffline, SGLangServer, connect


class TestServer(EngineContract):
    @pytest.fixture
    def engine(self, smol: SGLangServer) -> SGLangServer:
        return smol

    @pytest.fixture
    def another(self, smol: SGLangServer) -> SGLangServer:
        return connect(smol.url)


class InProcess(EngineContract):
    """Collected by the process that `in_process_log` starts, and not by name in this one."""

    @pytest.fixture
    def engine(self, in_process: SGLangOffline) -> SGLangOffline:
        return in_process

    @pytest.fixture
    def another(self, engine: SGLangOffline) -> SGLangOffline:
        return SGLangOffline(engine.engine)


def test_in_process(in_process_log: str) -> None:
    assert "test_engine_contract_engine.py::InProcess::test_many_threads_get_their_own_rows PASSED" in in_process_log
