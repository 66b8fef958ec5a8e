"""Control requests that fail in the scheduler are answered, and the tokenizer manager raises the reason."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
from starlette.exceptions import HTTPException

from torchrl_sglang_hidden.server import control_guard as control


class Base(msgspec.Struct, kw_only=True, array_like=True):
    rid: str | None = None


class SlowDownReqInput(msgspec.Struct, kw_only=True):
    forward_sleep_time: float | None = None


class SlowDownReqOutput(msgspec.Struct, kw_only=True):
    rid: str | None = None


class ProfileReq(Base):
    profile_by_stage: bool = False
    num_steps: int | None = None
    output_dir: str | None = None


class ProfileReqOutput(Base):
    success: bool
    message: str


class OpenSessionReqInput(Base):
    session_id: str


class OpenSessionReqOutput(Base):
    session_id: str
    success: bool


class UpdateWeightFromDiskReqInput(Base):
    load_format: str | None = None


class UpdateWeightFromDiskReqOutput(Base):
    success: bool
    message: str
    num_paused_requests: int


class CloseSessionReqInput(Base):
    """SGLang answers it by nothing."""


class TokenizedGenerateReqInput(Base):
    """A prompt."""


@pytest.fixture(autouse=True)
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    structs = (SlowDownReqOutput, ProfileReqOutput, OpenSessionReqOutput, UpdateWeightFromDiskReqOutput)
    io_struct = ModuleType("io_struct")
    io_struct.__dict__.update({struct.__name__: struct for struct in structs})
    formats = ModuleType("load_config")
    formats.LoadFormat = [SimpleNamespace(value="auto")]  # type: ignore[attr-defined]
    context = ModuleType("runtime_context")
    context.get_parallel = lambda: SimpleNamespace(tp_size=1)  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.managers", "sglang.srt.configs"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["sglang.srt.managers"].io_struct = io_struct  # type: ignore[attr-defined]
    for name, module in (
        ("sglang.srt.managers.io_struct", io_struct),
        ("sglang.srt.configs.load_config", formats),
        ("sglang.srt.runtime_context", context),
    ):
        monkeypatch.setitem(sys.modules, name, module)


def dispatch(request: Any, error: Exception | None = None) -> Any:
    def original(recv_req: Any) -> str:
        if error is not None:
            raise error
        return "answer"

    scheduler = SimpleNamespace(_request_dispatcher=original)
    control.after_init_dispatcher(None, scheduler)
    return scheduler._request_dispatcher(request)


def ask(answer: Any) -> Any:
    async def original(communicator: Any, obj: Any) -> list[Any]:
        return [answer]

    return asyncio.run(control.around_control(original, "communicator", "request"))


@pytest.mark.parametrize("request_", [ProfileReq(), OpenSessionReqInput(session_id="a")])
def test_what_fails_is_answered(request_: Any) -> None:
    answer = dispatch(request_, KeyError("a bug"))
    assert answer.success is False
    assert getattr(answer, "session_id", "a") == "a", "by which SGLang finds who waits"
    with pytest.raises(ValueError, match=r"failed: KeyError\('a bug'\)") as caught:
        ask(answer)
    assert isinstance(caught.value, HTTPException), "which the routes know"
    assert caught.value.status_code == 400
    assert dispatch(request_) == "answer"


def test_what_nobody_waits_for_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    assert dispatch(CloseSessionReqInput(), KeyError("a bug")) is None
    assert "CloseSessionReqInput failed" in caplog.text
    with pytest.raises(KeyError):  # what `request_isolation` looks after
        dispatch(TokenizedGenerateReqInput(), KeyError("a bug"))


def test_half_written_weights_are_not_served() -> None:
    with pytest.raises(KeyError):
        dispatch(UpdateWeightFromDiskReqInput(load_format="auto"), KeyError("a bug"))
    answer = dispatch(UpdateWeightFromDiskReqInput(load_format="nonsense"), KeyError("it is not called"))
    with pytest.raises(ValueError, match="load_format='nonsense': expected one of"):
        ask(answer)
    assert answer.num_paused_requests == 0


@pytest.mark.parametrize("sleep_s", [60.5, 1e300, float("inf"), float("nan")])
def test_a_server_is_not_slowed_down_until_it_ends(sleep_s: float) -> None:
    """SGLang takes any number, and sleeps in a later step."""
    with pytest.raises(ValueError, match=r"forward_sleep_time=.*: expected at most 60 seconds, or null"):
        ask(dispatch(SlowDownReqInput(forward_sleep_time=sleep_s)))
    for good in (None, 0.5, 60.0):
        assert dispatch(SlowDownReqInput(forward_sleep_time=good)) == "answer"


def test_a_profile_by_stages_says_for_how_long() -> None:
    """SGLang compares with it in the next step, and ends."""
    with pytest.raises(ValueError, match="profile_by_stage=true without num_steps; pass how many"):
        ask(dispatch(ProfileReq(profile_by_stage=True)))
    assert dispatch(ProfileReq(profile_by_stage=True, num_steps=2)) == "answer"


def test_tensors_that_cannot_be_read_have_changed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def original(worker: Any, serialized: Any) -> None:
        raise EOFError("ran out of input")

    with pytest.raises(ValueError, match=r"serialized_named_tensors cannot be read \(EOFError") as caught:
        control.around_deserialize(original, None, ["AAAA"])
    answer = dispatch(UpdateWeightFromDiskReqInput(), caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        ask(answer)
    ranks = sys.modules["sglang.srt.runtime_context"]
    monkeypatch.setattr(ranks, "get_parallel", lambda: SimpleNamespace(tp_size=2))
    with pytest.raises(EOFError):  # the other rank may have read its own
        control.around_deserialize(original, None, ["AAAA"])


def test_a_profile_is_refused_before_it_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answer = dispatch(ProfileReq(output_dir=str(tmp_path / "file" / "x")))
    with pytest.raises(ValueError, match=r"output_dir='.*x' cannot be written to"):
        ask(answer)
    assert dispatch(ProfileReq(output_dir=str(tmp_path / "new"))) == "answer"


def test_what_sglang_says_of_a_profile() -> None:
    with pytest.raises(ValueError, match="not in progress"):
        ask(ProfileReqOutput(success=False, message="Profiling is not in progress"))
    good = ProfileReqOutput(success=True, message="")
    assert ask(good) == [good]
