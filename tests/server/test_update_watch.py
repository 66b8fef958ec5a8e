"""The update of a trainer that is gone: the server half ends it, and calls the weights what they are."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request

from torchrl_sglang_hidden.protocol.served_weights import NOT_FLUSHED
from torchrl_sglang_hidden.protocol.update_lease import LeaseCall
from torchrl_sglang_hidden.server import update_watch
from torchrl_sglang_hidden.server.update_watch import UpdateWatch

SOON_S = 5.0


class Inputs:
    """SGLang's classes of requests, which take seconds to import."""

    def __getattr__(self, name: str) -> Any:
        return type(name, (SimpleNamespace,), {})


INPUTS = Inputs()


class Connection:
    """The HTTP request of a trainer, which may die."""

    gone = False

    async def is_disconnected(self) -> bool:
        return self.gone


class Manager:
    """SGLang's tokenizer manager, as far as updates need it, with the hooks in place."""

    def __init__(self, watch: UpdateWatch, *, paused: bool = False, workers: int = 1, flushes: bool = True) -> None:
        self.flushes, self.is_pause, self.seen = flushes, paused, list[Any]()
        self.server_args = SimpleNamespace(tokenizer_worker_num=workers)
        self._watch = watch

    def _control(self, name: str, answer: Any = (True, "")) -> Callable[[Any], Coroutine[Any, Any, Any]]:
        async def control(obj: Any) -> Any:
            self.seen.append((name, *vars(obj).values()))
            self.is_pause = {"pause": True, "continue": False}.get(name, self.is_pause)
            return answer

        return lambda obj: self._watch.noted(control(obj), obj)

    def __getattr__(self, name: str) -> Any:
        return self._control(name.removesuffix("_generation"))

    async def flush_cache(self) -> Any:
        self.seen.append(("flush",))
        return SimpleNamespace(success=self.flushes)

    async def load(self, obj: Any, answer: Any = (True, "")) -> None:
        await self._control("load", answer)(obj)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("sglang", "sglang.srt"):  # else Python would load them first
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, "sglang.srt.managers", SimpleNamespace(io_struct=INPUTS))
    for name, value in (("_POLL_S", 0.001), ("GRACE_S", 0.01), ("_remove_files", lambda: None)):
        monkeypatch.setattr(update_watch, name, value)


def part(*, last: bool) -> Any:
    return INPUTS.UpdateWeightsFromDistributedReqInput(flush_cache=last)


async def ended(watch: UpdateWatch) -> None:
    limit = time.monotonic() + SOON_S
    while watch._lease is not None:
        assert time.monotonic() < limit, "the update was not ended"
        await asyncio.sleep(0.001)


async def die_after(steps: Callable[[Manager], Coroutine[Any, Any, None]], **options: Any) -> list[Any]:
    """Return what the server half did when a trainer was gone that had done some steps."""
    watch, connection = UpdateWatch(), Connection()
    manager = Manager(watch, **options)
    assert (await watch.answer(LeaseCall("take", "me"), manager, connection))["leased"]
    hold = asyncio.ensure_future(watch.answer(LeaseCall("hold", "me", "7"), manager, connection))
    await asyncio.sleep(0.01)
    await steps(manager)
    manager.seen.clear()
    connection.gone = True
    assert not (await hold)["leased"]
    await ended(watch)
    assert not (await watch.answer(LeaseCall("give_back", "me"), manager, connection))["leased"]
    return manager.seen


async def pause(manager: Manager) -> None:
    await manager.pause_generation(INPUTS.PauseGenerationReqInput())


async def load_a_part(manager: Manager) -> None:
    await pause(manager)
    await manager.init(INPUTS.InitWeightsUpdateGroupReqInput(group_name="g"))
    await manager.begin(INPUTS.BeginWeightUpdateReqInput())
    await manager.load(part(last=False))


async def load_all(manager: Manager) -> None:
    await load_a_part(manager)
    await manager.load(part(last=True))


async def load_from_disk(manager: Manager) -> None:
    await manager.load(INPUTS.UpdateWeightFromDiskReqInput(flush_cache=True), (False, f"{NOT_FLUSHED} because", 0))


async def nothing(manager: Manager) -> None:
    pass


CLOSED = [("end_weight_update",), ("destroy_weights_update_group", "g")]


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [
        (nothing, {}, []),
        (pause, {}, [("continue", False)]),
        (pause, {"paused": True}, []),
        (load_a_part, {}, [*CLOSED, ("flush",), ("update_weight_version", "7-incomplete", False), ("continue", False)]),
        (load_a_part, {"paused": True}, [*CLOSED, ("flush",), ("update_weight_version", "7-incomplete", False)]),
        (load_all, {}, [*CLOSED, ("continue", False)]),
        (
            load_from_disk, {},
            [("pause", "retract"), ("flush",), ("update_weight_version", "7", False), ("continue", False)],
        ),
        (
            load_from_disk, {"flushes": False},
            [("pause", "retract"), ("flush",), ("update_weight_version", "7-incomplete", False), ("continue", False)],
        ),
    ],
)  # fmt: skip
def test_what_a_dead_trainer_left_is_ended(steps: Any, options: dict[str, Any], expected: list[Any]) -> None:
    assert asyncio.run(die_after(steps, **options)) == expected


def test_what_is_under_way_is_waited_for() -> None:
    """SGLang reads the files of the update: removing them now would end the scheduler."""

    async def run() -> list[str]:
        watch, connection, order, release = UpdateWatch(), Connection(), list[str](), asyncio.Event()
        manager = Manager(watch)

        async def slow() -> tuple[bool, str]:
            await release.wait()
            order.append("loaded")
            return True, ""

        await watch.answer(LeaseCall("take", "me"), manager, connection)
        load = asyncio.ensure_future(watch.noted(slow(), INPUTS.UpdateWeightFromDiskReqInput(flush_cache=True)))
        connection.gone = True
        assert not (await watch.answer(LeaseCall("hold", "me", "7"), manager, connection))["leased"]
        await asyncio.sleep(0.1)
        assert watch._lease is not None, "ended under the update"
        release.set()
        await load
        await ended(watch)
        return [*order, "ended"]

    assert asyncio.run(run()) == ["loaded", "ended"]


def test_a_silent_trainer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen, or cut off without a word: its connection stays."""
    monkeypatch.setattr(update_watch, "LOST_S", 0.05)

    async def run() -> list[Any]:
        watch = UpdateWatch()
        manager = Manager(watch)
        await watch.answer(LeaseCall("take", "me"), manager, Connection())
        await watch.answer(LeaseCall("hold", "me", "7", hold_s=0.01), manager, Connection())
        await pause(manager)
        manager.seen.clear()
        await ended(watch)
        return manager.seen

    assert asyncio.run(run()) == [("continue", False)]


def test_a_trainer_that_is_heard_of_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_watch, "LOST_S", 0.1)

    async def run() -> None:
        watch, connection = UpdateWatch(), Connection()
        manager = Manager(watch)
        await watch.answer(LeaseCall("take", "me"), manager, connection)
        for _ in range(2):
            assert (await watch.answer(LeaseCall("hold", "me", "7", hold_s=0.3), manager, connection))["leased"]
        assert (await watch.answer(LeaseCall("give_back", "me"), manager, connection))["leased"]

    asyncio.run(run())


def test_a_call_from_before_the_version_was_chosen_does_not_undo_it() -> None:
    async def run() -> str:
        watch, connection = UpdateWatch(), Connection()
        manager = Manager(watch)
        await watch.answer(LeaseCall("take", "me"), manager, connection)
        early = asyncio.ensure_future(watch.answer(LeaseCall("hold", "me"), manager, connection))
        assert (await watch.answer(LeaseCall("hold", "me", "7", hold_s=0.0), manager, connection))["leased"]
        await asyncio.sleep(0.02)  # polls of the first one
        assert watch._lease is not None
        version = watch._lease.version
        await watch.answer(LeaseCall("give_back", "me"), manager, connection)
        await early
        return version

    assert asyncio.run(run()) == "7"


def test_a_cut_connection_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_watch, "GRACE_S", SOON_S)

    async def run() -> None:
        watch, cut = UpdateWatch(), Connection()
        manager = Manager(watch)
        await watch.answer(LeaseCall("take", "me"), manager, cut)
        cut.gone = True
        assert not (await watch.answer(LeaseCall("hold", "me", "7"), manager, cut))["leased"]
        await asyncio.sleep(0.02)  # polls without it
        assert (await watch.answer(LeaseCall("hold", "me", "7", hold_s=0.01), manager, Connection()))["leased"]
        assert (await watch.answer(LeaseCall("give_back", "me"), manager, Connection()))["leased"]

    asyncio.run(run())


def test_trainers_go_one_after_another() -> None:
    async def run() -> None:
        watch = UpdateWatch()
        manager = Manager(watch)
        for _ in range(2):  # one server under two addresses
            assert (await watch.answer(LeaseCall("take", "me"), manager, Connection()))["leased"]
        impatient = Connection()
        impatient.gone = True
        assert not (await watch.answer(LeaseCall("take", "late"), manager, impatient))["leased"]
        other = asyncio.ensure_future(watch.answer(LeaseCall("take", "other"), manager, Connection()))
        for _ in range(2):
            await asyncio.sleep(0.02)
            assert not other.done()
            assert (await watch.answer(LeaseCall("give_back", "me"), manager, Connection()))["leased"]
        assert (await other)["leased"]

    asyncio.run(run())


def test_a_server_of_several_processes_leases_nothing() -> None:
    watch = UpdateWatch()
    answer = watch.answer(LeaseCall("take", "me"), Manager(watch, workers=2), Connection())
    assert not asyncio.run(answer)["leased"]


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        None,
        "torchrl_sglang_hidden:lease:{",
        pytest.param("torchrl_sglang_hidden:lease:" + "[" * 100_000, id="nested"),
        LeaseCall("take", "a").pack()[:-2],
        LeaseCall("hold", "a", hold_s=float("nan")).pack(),
        LeaseCall("hold", "a").pack().replace("10.0", '"10"'),
        LeaseCall("hold", "a").pack().replace('"a"', "[]"),
        LeaseCall("hold", "a").pack().replace('"hold"', "{}"),
    ],
)
def test_other_names_are_no_leases(name: Any) -> None:
    assert LeaseCall.unpack(name) is None


def test_what_is_packed_is_unpacked() -> None:
    call = LeaseCall("hold", "me", "step-7", 3.0)
    assert LeaseCall.unpack(call.pack()) == call
    unknown = call.pack().replace('"hold"', '"steal"')
    assert LeaseCall.unpack(unknown) is None
    assert LeaseCall.unpack(LeaseCall("hold", "me", "7", 1e9).pack()).hold_s < 60  # type: ignore[union-attr]


TRAINER = """
import http.client, json, sys
port, take, hold = sys.argv[1:]
for name in (take, hold):
    connection = http.client.HTTPConnection("127.0.0.1", int(port))
    connection.request("POST", "/", json.dumps({"name": name}), {"Content-Type": "application/json"})
    if name == take:
        assert json.loads(connection.getresponse().read())["leased"]
print("holds", flush=True)
connection.getresponse()
"""


def test_the_connection_of_a_killed_process_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the HTTP server that SGLang runs."""
    monkeypatch.setattr(update_watch, "LOST_S", 1000.0)
    app, watch = FastAPI(), UpdateWatch()
    manager = Manager(watch)

    @app.post("/")
    async def lease(asked: dict[str, str], request: Request) -> dict[str, Any]:
        call = LeaseCall.unpack(asked["name"])
        assert call is not None
        return await watch.answer(call, manager, request)

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        names = (LeaseCall("take", "me").pack(), LeaseCall("hold", "me", "7").pack())
        command = [sys.executable, "-c", TRAINER, str(listener.getsockname()[1]), *names]
        try:
            with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
                assert trainer.stdout is not None
                assert trainer.stdout.readline() == b"holds\n"
                limit = time.monotonic() + SOON_S
                while not (watch._lease and watch._lease.version):
                    assert time.monotonic() < limit
                manager.is_pause = True
                trainer.kill()
            limit = time.monotonic() + SOON_S
            while watch._lease is not None:
                assert time.monotonic() < limit, "the dead trainer has the lease"
        finally:
            server.should_exit = True
            thread.join()
    assert manager.seen == [("continue", False)]
