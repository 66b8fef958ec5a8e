"""The fixtures that all tests share: one real server per session, for all the tests that can use it."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

# Before they are imported, so that their failed assertions show the values too.
pytest.register_assert_rewrite("helpers")

from helpers.mkl_on_amd import use_whole_processor  # noqa: E402

# What takes seconds to import is imported where it is used: the process that only hands tests to others reads this too.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from torchrl_sglang_hidden import SGLangHiddenWrapper, SGLangServer

# A running server for the `smol` fixture, started with the arguments below: saves its start on each run at work.
TEST_URL_ENV = "TORCHRL_SGLANG_HIDDEN_TEST_URL"
ENGINE_TESTS = Path(__file__).parent / "engine"
# The order of the engine tests, by the first that a group uses; those with servers of their own alone come last. What
# needs much memory (a trainer and its server, Ray's processes) comes before the other process has servers too, and each
# process ends its `smol` behind the last test that uses it: on full 24 GiB everything waits for the disk.
STAGES = ("trainee_server", "local_ray", "smol")
STAGE = pytest.StashKey[int]()
SMOL = pytest.StashKey[list["SGLangServer"]]()
# Inside a stage, what takes minutes, longest first: the two processes then end together, and neither begins with one of
# these when the other is done.
LONGEST = (
    "test_tutorials",
    "image_site",
    "test_states_engine",
    "in_process_log",
    "test_constraints_engine",
    "test_features_engine",
    "test_benchmarks",
    "test_qwen3_untied",
    "test_tensor_parallel_engine",
    "test_storm_engine",
    "test_offline",
    "test_started_without_weights",
    "test_stock_fallback",
)
# What is not worth doing twice where tests run in several processes.
ONCE = ("trainee_server", "in_process_log", "image_site")


# The server computes on the same cores: a second thread here would wait for them, spinning.
torch.set_num_threads(1)
# And a second thread in a server waits for a core that the other process of tests has: 33 steps of 6 rows took 7.2 s of
# wall and 6.2 s of processor time with two threads, and 4.4 s of both with one. Programs and kernels read it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# For servers, and for the processes of tests where these are several: half of the time of a prompt of 100 tokens.
use_whole_processor()
# glibc keeps what is freed for the next allocation, up to 6 GiB after the tests of weights. Beyond 1 MiB, give it back.
M_MMAP_THRESHOLD = -3
if hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook of its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the engine tests, and group them for runs in several processes (``--dist loadgroup``).

    So that no more servers stand side by side than 24 GiB hold: each takes 2.5 and more.
    """
    users: dict[str, set[str]] = {}
    for item in items:
        if ENGINE_TESTS in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
            users.setdefault(group_of(item), set()).update(getattr(item, "fixturenames", ()))

    for item in items:
        used = users.get(group_of(item), set())
        item.stash[STAGE] = next((stage for stage, name in enumerate(STAGES) if name in used), len(STAGES))
    items.sort(key=lambda item: (item.stash[STAGE], place_in_stage(item)))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the session's server behind the last test that uses it, as `STAGES` says."""
    if nextitem is not None and nextitem.stash[STAGE] == len(STAGES):
        for server in item.session.stash.get(SMOL, []):
            server.close()


def place_in_stage(item: pytest.Item) -> int:
    """Return the place of a test's group in `LONGEST`; all others come behind them, as they are."""
    group = group_of(item)
    return LONGEST.index(group) if group in LONGEST else len(LONGEST)


def group_of(item: pytest.Item) -> str:
    """Return the group of a test, whose tests run in one process: those of a file, or of a fixture in `ONCE`."""
    fixtures = getattr(item, "fixturenames", ())
    return next((name for name in ONCE if name in fixtures), item.path.stem)


@pytest.fixture(scope="session")
def smol_dir() -> str:
    from torchrl_sglang_hidden import demo_model

    return str(demo_model())


@pytest.fixture(scope="session")
def tokenizer(smol_dir: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smol_dir)


@pytest.fixture(scope="session")
def qwen3_dir(smol_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    from helpers import random_models

    return str(random_models.save_random_qwen3(tmp_path_factory.mktemp("models") / "random-qwen3", smol_dir))


@pytest.fixture(scope="session")
def smol(smol_dir: str, request: pytest.FixtureRequest) -> Iterator[SGLangServer]:
    from helpers.policy_checks import CHUNKED_PREFILL_SIZE

    from torchrl_sglang_hidden import connect, launch

    url = os.environ.get(TEST_URL_ENV)
    if url is not None:
        with connect(url) as engine:
            yield engine
        return
    # sleep_on_idle: this server outlives the modules that start others, and an idle SGLang spins on a core.
    with launch(smol_dir, dtype="float32", chunked_prefill_size=CHUNKED_PREFILL_SIZE, sleep_on_idle=True) as engine:
        request.session.stash[SMOL] = [engine]
        yield engine


@pytest.fixture
def policy(smol: SGLangServer, tokenizer: PreTrainedTokenizerBase) -> Callable[..., SGLangHiddenWrapper]:
    """Return `policy_checks.make_policy` for the session's server."""
    from helpers.policy_checks import make_policy

    return functools.partial(make_policy, smol, tokenizer)


@pytest.fixture(scope="session")
def chat_ids(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Return a function that turns a question into the ids of a chat that waits for its answer."""

    def ids(question: str) -> list[int]:
        chat = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    return ids
