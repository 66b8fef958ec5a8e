"""Every fault that ends a call, a process or a link, at random moments on real servers.

After each, at any moment:

1. The call raised an error of this package within its time, and its TensorDict is as it was.
2. No process, file or segment of ours is left over.
3. A server that lives gives the right answers to everybody, and no request stays running in it.
4. A server that died is launched anew, and serves the policies of before.
5. Weights are the old ones, the new ones, or called incomplete: then calls raise.

In CI each is tried once, but for what other tests try too: servers that are started again, and a link that stalls.
``make soak`` tries all of them twenty times. Moments come from ``SEED``, the fault's name and the round.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import fault_programs
from helpers.bad_link import bad_link
from helpers.fault_site import LONG, PROMPTS, READ_TIMEOUT_S, TOKENS, FaultSite, assert_same_answers
from helpers.full_disks import files_of_at_most, full_memory, small_disk
from helpers.policy_checks import prompt_of, tokens_input
from helpers.random_models import save_random_llama
from helpers.weight_changes import answers, load_trainer, perturb
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
    HiddenSpec,
    IncompleteWeightsError,
    RecordingError,
    SGLangServer,
    load_recording,
    record_hidden_states,
)
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.rl import record as record_module

ROUNDS = int(os.environ.get("TORCHRL_SGLANG_HIDDEN_FAULT_ROUNDS", "1"))
SEED = int(os.environ.get("TORCHRL_SGLANG_HIDDEN_FAULT_SEED", "0"))
# Where the record of all rounds goes, as JSON.
RECORD = os.environ.get("TORCHRL_SGLANG_HIDDEN_FAULT_RECORD")

# In one round, each transport once and each ``running`` once.
TRAINERS = (
    ("disk", "continue"), ("network", "finish"), *([("disk", "finish"), ("network", "continue")] if ROUNDS > 1 else []),
)  # fmt: skip

# Each test runs all rounds.
pytestmark = pytest.mark.timeout(600 + 120 * ROUNDS)

# A call of `LONG` takes longer, so that the moment is in its middle, or before its first token.
MOMENTS_S = (0.0, 1.0)
CUT_S = 5.0
# More than a full memory has left, and less than an answer needs.
FULL_BYTES = 300_000
# From a death to the error. A scheduler's is seen by SGLang's own watchdog.
DEATH_S = 15.0
# From a trainer's death to the moment at which the server answers again.
LET_GO_S = 15.0
MIXTURE = IncompleteWeightsError.__name__


@pytest.fixture(scope="module")
def site(
    smol_dir: str, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FaultSite]:
    directory = tmp_path_factory.mktemp("faults")
    model = save_random_llama(directory / "llama", smol_dir)
    perturb(load_trainer(model)).save_pretrained(directory / "trained")
    # In one round SGLang looks every second whether somebody still waits for a request, and not every four.
    with pytest.MonkeyPatch.context() as patch:
        if ROUNDS == 1:
            patch.setenv("SGLANG_REQUEST_STATE_WAIT_TIMEOUT", "1")
        site = FaultSite(str(model), str(directory / "trained"), tokenizer, directory)
        yield site
        site.close()
    record = {
        name: {"tried": sum(came_to.values()), "came to": dict(came_to), "longest_s": round(site.longest_s[name], 2)}
        for name, came_to in site.came_to.items()
    }
    print(f"\nseed {SEED}:", json.dumps(record, indent=2))
    if RECORD is not None:
        Path(RECORD).write_text(json.dumps(record, indent=2))


# --- the server and its link ------------------------------------------------------------------------------------------


def freeze(site: FaultSite, chance: random.Random) -> None:
    def stop() -> None:
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)

    with site.impatient() as policy:
        frozen = site.group()
        try:
            error = site.call_fails("frozen", policy, stop, chance.uniform(*MOMENTS_S), READ_TIMEOUT_S + 5)
        finally:
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)
        assert type(error) is EngineTimeoutError
        site.assert_well(engine=policy.model)
    site.assert_well()


def cut(site: FaultSite, chance: random.Random) -> None:
    """At a moment, or inside the bytes of the answer."""
    # Patient: the answer must begin, however slow this machine is.
    with bad_link(site.port) as link, SGLangServer(link.url) as engine:

        def strike() -> None:
            if inside:
                link.cut_after = chance.randrange(1, 20_000)
            else:
                link.cut()

        inside = chance.random() < 0.5
        policy, moment = site.policy_of(engine), chance.uniform(*MOMENTS_S)
        error = site.call_fails("cut", policy, strike, moment, CUT_S, since=lambda: link.cut_at)
        assert type(error) is EngineUnreachableError
        link.cut_after = None
        site.assert_well(engine=engine)
    site.assert_well()


def stall(site: FaultSite, chance: random.Random) -> None:
    def strike() -> None:
        link.bytes_per_s = 0

    with bad_link(site.port) as link, site.impatient(link.url) as policy:
        error = site.call_fails("stalled link", policy, strike, chance.uniform(*MOMENTS_S), READ_TIMEOUT_S + 8)
        assert type(error) is EngineTimeoutError
        link.bytes_per_s = None
        site.assert_well(engine=policy.model)
    site.assert_well()


def slow(site: FaultSite, chance: random.Random) -> None:
    """Every byte comes, late: nothing is wrong."""
    with bad_link(site.port) as link, SGLangServer(link.url, read_timeout_s=READ_TIMEOUT_S) as engine:
        link.bytes_per_s = chance.uniform(5_000, 100_000)
        start = time.monotonic()
        assert_same_answers(answers(engine, PROMPTS, TOKENS), site.expected)
        site.note("slow link", "the right answer", time.monotonic() - start)
    site.assert_well()


# --- full disks -------------------------------------------------------------------------------------------------------


def full_disk(site: FaultSite, chance: random.Random, directory: Path) -> None:
    place, rows = directory / f"disk-{site.rounds['disk full while recording']}", [{"n": n} for n in range(24)]

    def record(to: Path) -> Any:
        # Connected anew: a recording is of the weights that its policy knows.
        with SGLangServer(site.server.url) as engine:
            return record_hidden_states(
                site.policy_of(engine, max_new_tokens=2), rows, to, prompt=lambda row: prompt_of(5, int(row["n"])),
                batch_size=4, tokens=True, progress=False,
            )  # fmt: skip

    whole = directory / f"{place.name}-expected"
    recording = record(whole)
    assert not recording.failures
    expected = recording.tensordict
    space = sum(path.stat().st_blocks for path in whole.rglob("*")) * 512
    start = time.monotonic()
    with small_disk(place, chance.randrange(4096, space * 2 // 3)) as grow:
        with pytest.raises(RecordingError) as caught:
            record(place / "r")
        site.note("disk full while recording", type(caught.value).__name__, time.monotonic() - start)
        grow()
        if (place / "r" / "manifest.json").exists():
            load_recording(place / "r")  # what there is, is whole
        found = record(place / "r").tensordict
    for key in expected.keys(True, True):
        for one, other in zip(found.unbind(0), expected.unbind(0), strict=True):
            value, wanted = one.get(key), other.get(key)
            if isinstance(wanted, torch.Tensor):
                torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-4, equal_nan=True)
    site.assert_well()


def full_shared_memory(site: FaultSite, chance: random.Random) -> None:
    """An answer that has no room there comes as text; weights that have none are an error."""
    # Of two layers: a smaller answer is text anyway.
    hidden, greedy = HiddenSpec(("prompt",), layers=(0, -1), tokens=True), {"max_new_tokens": 2, "temperature": 0}
    requests = [Request(tuple(prompt_of(900, seed)), greedy, hidden=hidden) for seed in (1, 2)]

    def shared_bytes() -> int:
        return site.client.server_counters().shared_bytes

    before = shared_bytes()
    whole = site.client.generate(requests)
    assert shared_bytes() - before > 2 * FULL_BYTES
    before, start = shared_bytes(), time.monotonic()
    with full_memory(chance.randrange(FULL_BYTES), site.scheduler()):
        found = site.client.generate(requests)
    site.note("shared memory full, an answer", "the right answer", time.monotonic() - start)
    assert shared_bytes() == before
    for one, other in zip(found, whole, strict=True):
        assert one.token_rows is not None
        assert other.token_rows is not None
        torch.testing.assert_close(one.token_rows.rows_ND, other.token_rows.rows_ND, atol=1e-4, rtol=1e-4)
    weights = dict(load_trainer(site.trained_dir).state_dict())
    start = time.monotonic()
    with files_of_at_most(chance.randrange(10_000_000)), pytest.raises(EngineError) as caught:
        site.client.update_weights(weights, version="no room", transport="disk")
    site.note("shared memory full, weights", type(caught.value).__name__, time.monotonic() - start)
    site.assert_well()


# --- killed clients and trainers --------------------------------------------------------------------------------------


def kill_client(site: FaultSite, chance: random.Random) -> None:
    with site.victim(fault_programs.generate_endlessly, site.server.url, chance.randint(1, 6)) as client:
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(answers, site.client, PROMPTS, 60)
            time.sleep(chance.uniform(*MOMENTS_S))
            client.kill()
            killed = time.monotonic()
            other.result()
        site.assert_idle()
        site.note("client killed", "dropped", time.monotonic() - killed)
    site.assert_well()


def kill_trainer(site: FaultSite, chance: random.Random, transport: str, running: str) -> None:
    """While others generate, and with weights in one bucket or in several."""
    name, attempt = f"trainer killed, {transport}, {running}", 0
    options: dict[str, Any] = {"transport": transport, "running": running}
    options["bucket_bytes"] = chance.choice((2**18, 2**30))
    num_tokens = chance.choice((10, 300))
    kind = (transport, running, options["bucket_bytes"], num_tokens)
    if ROUNDS > 1 and kind not in site.update_s:
        with others_generate(site, num_tokens), update_of(site, {**options, "version": f"rehearsal-{kind}"}) as trainer:
            start = time.monotonic()
            trainer.wait()
            site.update_s[kind] = time.monotonic() - start
        site.restore()
    while True:
        ended: list[float] = []
        attempt += 1
        version = f"{transport}-{running}-{site.rounds[name]}-{attempt}"
        with others_generate(site, num_tokens) as other, update_of(site, {**options, "version": version}) as trainer:
            other.add_done_callback(lambda _, ended=ended: ended.append(time.monotonic()))
            time.sleep(chance.uniform(0.0, site.update_s.get(kind, 1.0)))
            with suppress(psutil.NoSuchProcess):
                trainer.kill()
                break
        site.restore()  # it was done before: again
    killed = time.monotonic()
    # Before anything has noticed, too.
    time.sleep(chance.choice((0.0, 0.0, 2.5)))
    came_to = what_is_served(site, version)
    # An update that lets others finish goes on doing so: new requests wait for those under way.
    begun = max(killed, *ended) if running == "finish" and ended else killed
    site.note(name, came_to, time.monotonic() - begun)
    assert site.longest_s[name] < LET_GO_S
    try:
        other.result()
    except IncompleteWeightsError:
        assert came_to == MIXTURE, "the mixture was served, and then not called one"
    site.assert_idle()
    assert_nothing_of_trainers(site)
    with SGLangServer(site.server.url) as later:
        later.update_weights(site.trained_dir, version=f"after-{version}", transport=chance.choice(("disk", "network")))
        assert_same_answers(answers(later, PROMPTS, TOKENS), site.expected_trained)
    site.restore()
    site.assert_well()


@contextmanager
def others_generate(site: FaultSite, num_tokens: int) -> Iterator[Future[list[Completion]]]:
    """Yield what becomes of another client's request."""
    sampling = {**LONG, "max_new_tokens": num_tokens, "temperature": 0.0}
    pool = ThreadPoolExecutor(1)
    try:
        yield pool.submit(site.client.generate, [Request(tuple(PROMPTS[0]), sampling, hidden=HiddenSpec())])
    finally:
        pool.shutdown(wait=False)  # its end says nothing of when the server lets others go on


def update_of(site: FaultSite, options: dict[str, Any]) -> AbstractContextManager[psutil.Process]:
    """Let a process begin an update."""
    return site.victim(fault_programs.update_weights, site.server.url, site.trained_dir, options)


def what_is_served(site: FaultSite, version: str) -> str:
    """Check what the server answers after a trainer's death, of whole weights or a named error, and say which."""
    while True:
        try:
            found = answers(site.client, PROMPTS, TOKENS)
        except IncompleteWeightsError:
            assert site.http.get("/model_info").json()["weight_version"] == f"{version}-incomplete"
            return MIXTURE
        served = {one.weight_version for one in found}
        if len(served) > 1 or any(one.mixed_weights for one in found):
            continue  # across an update that came to its end
        is_new = served == {version}
        assert_same_answers(found, site.expected_trained if is_new else site.expected)
        return "the new weights" if is_new else "the old weights"


def assert_nothing_of_trainers(site: FaultSite) -> None:
    limit = time.monotonic() + LET_GO_S
    while left := site.shared_names() - site.memory:
        assert time.monotonic() < limit, f"left over: {left}"
        time.sleep(0.1)


# --- deaths -----------------------------------------------------------------------------------------------------------


def kill_scheduler(site: FaultSite, chance: random.Random, *, anew: bool) -> None:
    scheduler = site.scheduler()
    with site.dies(anew=anew):
        moment = chance.uniform(*MOMENTS_S)
        site.call_fails("scheduler killed", site.policy, lambda: os.kill(scheduler, signal.SIGKILL), moment, DEATH_S)
    if anew:
        site.assert_well()


def kill_server(site: FaultSite, chance: random.Random, *, anew: bool) -> None:
    with site.dies(anew=anew):
        moment = chance.uniform(*MOMENTS_S)
        leader = psutil.Process(site.server.pid)
        error = site.call_fails("server killed", site.policy, leader.kill, moment, DEATH_S)
        assert type(error) is EngineUnreachableError
        given = tokens_input(PROMPTS)
        with pytest.raises(EngineUnreachableError):
            site.policy(given)
    if anew:
        site.assert_well()


LIVE: dict[str, Callable[[FaultSite, random.Random, Path], None]] = {
    "frozen": lambda site, chance, path: freeze(site, chance),
    "cut": lambda site, chance, path: cut(site, chance),
    "slow link": lambda site, chance, path: slow(site, chance),
    "disk full while recording": full_disk,
    "shared memory full": lambda site, chance, path: full_shared_memory(site, chance),
    "client killed": lambda site, chance, path: kill_client(site, chance),
    **{
        f"trainer killed, {transport}, {running}": (
            lambda site, chance, path, transport=transport, running=running: kill_trainer(
                site, chance, transport, running
            )
        )
        for transport, running in TRAINERS
    },
    # In one round without a server: tests/engines/test_bad_links.py.
    **({"stalled link": lambda site, chance, path: stall(site, chance)} if ROUNDS > 1 else {}),
}


def rounds_of(site: FaultSite, name: str, fault: Callable[[random.Random], None]) -> None:
    for _ in range(ROUNDS):
        one_round(site, name, fault)


def one_round(site: FaultSite, name: str, fault: Callable[[random.Random], None]) -> None:
    number = site.rounds[name]
    print(f"{name}, round {number} of seed {SEED}", flush=True)
    fault(random.Random(f"{SEED} {name} {number}"))
    site.rounds[name] += 1


@pytest.mark.parametrize("name", LIVE)
def test_a_server_lives_on(site: FaultSite, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "SHARD_SECONDS", 0.0)  # a shard for each call
    rounds_of(site, name, lambda chance: LIVE[name](site, chance, tmp_path))


def test_a_server_dies(site: FaultSite) -> None:
    deaths = [("scheduler killed", kill_scheduler)] * ROUNDS
    if ROUNDS > 1:
        deaths += [("server killed", kill_server)] * ROUNDS
    for left, (name, kill) in zip(reversed(range(len(deaths))), deaths, strict=True):
        # After the last one nothing is left to test: a start costs 20 seconds.
        one_round(site, name, functools.partial(kill, site, anew=left > 0))
