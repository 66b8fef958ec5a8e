"""Fixtures of the engine tests alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from helpers import user_constraints
from helpers.image_site import ImageSite, serve_images
from helpers.local_ray import ray_of_two_cores
from helpers.policy_checks import (
    CHUNKED_PREFILL_SIZE,
)
from helpers.vlm_models import models_to_test
from helpers.weight_changes import load_trainer, perturb, restore
from transformers import PreTrainedModel

from torchrl_sglang_hidden import (
    SGLangOffline,
    SGLangServer,
    connect,
    launch,
)

# A running server for the `trainee` fixture, started with the arguments below, whose weights tests may change.
TRAINEE_URL_ENV = "TORCHRL_SGLANG_HIDDEN_TRAINEE_URL"
IN_PROCESS_TIMEOUT_S = 500


@pytest.fixture(scope="session")
def trainee_server(smol_dir: str) -> Iterator[SGLangServer]:
    url = os.environ.get(TRAINEE_URL_ENV)
    if url is not None:
        with connect(url) as engine:
            yield engine
        return
    # A small KV cache: this server stands beside the session's other one, and beside the models of the tests.
    with launch(
        smol_dir,
        dtype="float32",
        chunked_prefill_size=CHUNKED_PREFILL_SIZE,
        context_length=2048,
        max_total_tokens=4096,
        sleep_on_idle=True,
    ) as engine:
        yield engine


@pytest.fixture
def trainee(trainee_server: SGLangServer) -> Iterator[SGLangServer]:
    """Yield a float32 server of the demo model whose weights a test may change; they are restored after the test."""
    before = trainee_server.info.weight_version
    yield trainee_server
    # Ask the server: a program under test updates it through a client of its own.
    with connect(trainee_server.url) as client:
        served = client.info.weight_version
    if served != before:
        restore(trainee_server)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the trainee's server after the last test that uses it: other tests need its 3 GiB."""
    server = getattr(item, "funcargs", {}).get("trainee_server")
    if server is not None and "trainee_server" not in getattr(nextitem, "fixturenames", ()):
        server.close()


@pytest.fixture(scope="session", params=models_to_test())
def image_site(
    request: pytest.FixtureRequest, smol_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ImageSite]:
    """Yield a server of each small model that reads images; the tests of one model run one behind another.

    pytest brings them together by the place in the list of models, not by the name: a test for some models alone names
    the first ones of `SAVERS`, in their order. Others would start servers again.
    """
    with serve_images(request.param, tmp_path_factory.mktemp("images"), smol_dir) as site:
        yield site


@pytest.fixture(scope="session")
def in_process(smol_dir: str) -> Iterator[SGLangOffline]:
    """Yield an engine in this process, for the classes named ``InProcess``, which `in_process_log` runs."""
    with SGLangOffline(
        smol_dir,
        dtype="float32",
        chunked_prefill_size=CHUNKED_PREFILL_SIZE,
        constraint_modules=(user_constraints.__name__,),
        sleep_on_idle=True,
    ) as engine:
        yield engine


@pytest.fixture(scope="session")
def in_process_log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run the classes named ``InProcess`` in a process of their own, and return pytest's output; all must pass.

    `sglang.Engine` changes the process that it runs in for good, so its tests get one of their own. Those of all files
    of this run share it: its start takes longer than they do.
    """
    files = sorted({str(item.path) for item in request.session.items if item.name == "test_in_process"})
    command = [sys.executable, "-m", "pytest", "-vv", "-o", "python_classes=InProcess", "-p", "no:cacheprovider"]
    log = tmp_path_factory.mktemp("in-process") / "log.txt"
    with log.open("w") as output:
        done = subprocess.run(
            [*command, *(f"{file}::InProcess" for file in files)],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=IN_PROCESS_TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0, log.read_text()[-6000:]
    return log.read_text()


@pytest.fixture(scope="module")
def local_ray() -> Iterator[set[int]]:
    """Yield the ids of the processes of a Ray on this machine, of which nothing is left behind the module's tests."""
    with ray_of_two_cores() as pids:
        yield pids


@pytest.fixture(scope="module")
def trainer(smol_dir: str) -> PreTrainedModel:
    """Return a model whose weights are one training step away from the served ones."""
    return perturb(load_trainer(smol_dir))


@pytest.fixture(scope="module")
def trained_dir(trainer: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("trained")
    trainer.save_pretrained(directory)
    return str(directory)
