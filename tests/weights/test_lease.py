"""The client's side of an update's lease: taken in front of it, held meanwhile, given back behind it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from helpers.fake_engine import RecordingServer

from torchrl_sglang_hidden import EngineError, EngineUnreachableError, IncompleteWeightsError, SGLangServer
from torchrl_sglang_hidden.protocol.update_lease import LeaseCall
from torchrl_sglang_hidden.weights import lease
from torchrl_sglang_hidden.weights.lease import Leases, leased


class Server:
    """Answers calls about a lease."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.steps, self.over, self.held = answers, list[str](), threading.Event(), threading.Event()
        self.versions: list[str] = []
        self.named = threading.Event()

    def __call__(self, route: str, payload: dict[str, Any]) -> dict[str, Any]:
        call = LeaseCall.unpack(payload["name"])
        assert call is not None
        self.steps.append(call.step)
        answer = self.answers.get(call.step, True)
        if call.step == "hold":
            self.versions.append(call.version)
            (self.named if call.version else self.held).set()
            answer = answer.pop(0) if isinstance(answer, list) and answer else answer
            if answer is True:
                self.over.wait(call.hold_s)
        if call.step == "give_back":
            self.over.set()
        if isinstance(answer, Exception):
            raise answer
        return {"success": True, "leased": bool(answer)}


def test_a_lease_is_taken_held_and_given_back() -> None:
    servers = [Server(), Server()]
    with leased(servers, 60.0) as leases:
        assert all(server.held.wait(10) for server in servers)
        leases.name("7")
        assert [server.steps for server in servers] == [["take", "hold", "hold"]] * 2
    assert [server.steps for server in servers] == [["take", "hold", "hold", "give_back"]] * 2
    assert servers[0].versions == ["", "7"]


def test_a_lease_is_held_while_another_trainer_has_the_next_ones() -> None:
    first, second = Server(), Server()

    def waits(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        if '"take"' in payload["name"]:
            assert first.held.wait(10), "the first server hears nothing of this trainer, and gives its update up"
        return second(route, payload)

    with leased([first, waits], 60.0):
        pass


def test_later_calls_say_the_version_too() -> None:
    server = Server()
    with leased([server], 0.2) as leases:
        leases.name("7")
        while len(server.versions) < 4:
            assert leases._threads[0].is_alive()
    assert server.versions.count("") <= 1


def test_a_call_ends_in_front_of_its_timeout() -> None:
    with leased([Server()], 3.0) as leases:
        assert leases._hold_s == 1.5


def test_a_cut_connection_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RETRY_S", 0.0)
    server = Server(hold=[EngineUnreachableError("cut"), True])
    with leased([server], 60.0) as leases:
        while server.steps.count("hold") < 2:
            assert leases._threads[0].is_alive()


def test_an_update_that_the_server_gave_up_is_an_error() -> None:
    said = r"not hear of this process for 30 s, .*update again"
    server = Server(hold=False, give_back=False)
    with pytest.raises(EngineError, match=said), leased([server], 60.0):
        pass
    leases = Leases("me", 1.0)
    leases.take(server)
    with pytest.raises(EngineError, match=said):
        leases.name("7")  # before any weights are sent


def test_the_updates_own_error_is_told() -> None:
    server = Server(give_back=EngineUnreachableError("gone"))
    with pytest.raises(KeyError), leased([server], 60.0):
        raise KeyError
    assert server.steps[-1] == "give_back"


def test_a_failed_update_is_given_back_to_the_servers_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is gone, one starts again and answers nobody meanwhile; the error waits for neither."""
    monkeypatch.setattr(lease, "_ABANDON_S", 0.2)
    back = threading.Event()
    gone, restarting, left = Server(give_back=EngineUnreachableError("gone")), Server(), Server()

    def waits(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        if "give_back" in payload["name"]:
            back.wait(60)
        return restarting(route, payload)

    with pytest.raises(KeyError), leased([gone, waits, left], 60.0):
        raise KeyError
    assert left.steps[-1] == "give_back"
    assert "give_back" not in restarting.steps
    back.set()


def test_a_server_that_is_gone_at_the_end_keeps_no_other_waiting() -> None:
    gone, left = Server(give_back=EngineUnreachableError("gone")), Server()
    with pytest.raises(EngineUnreachableError, match="gone"), leased([gone, left], 60.0):
        pass
    assert left.steps[-1] == "give_back"


def test_a_server_that_leases_nothing_is_updated_all_the_same() -> None:
    server = Server(take=False)
    with leased([server], 60.0) as leases:
        leases.name("7")
    assert server.steps == ["take"]


def test_an_adapter_gives_no_mixture_another_name() -> None:
    server = RecordingServer()
    try:
        with SGLangServer(server.url) as client:
            assert client._new_version(None, whole=True) == "v8"
            _, page = server.pages["/model_info"]
            server.pages["/model_info"] = (200, {**page, "weight_version": "7-incomplete"})
            assert client._new_version(None) == "8"
            with pytest.raises(IncompleteWeightsError, match=r"\['7-incomplete'\].*call update_weights first"):
                client._new_version(None, whole=True)
    finally:
        server.stop()
