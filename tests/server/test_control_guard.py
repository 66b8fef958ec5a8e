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


class FreezeGCReq(Base):
    """SGLang answers it by nothing either."""


class TokenizedGenerateReqInput(Base):
    """A prompt."""


@pytest.fixture(autouse=True)
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    structs = (SlowDownReqOutput, ProfileReqOutput, OpenSessionReqOutput, UpdateWeightFromDiskReqOutput, FreezeGCReq)
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
    assert dispatch(FreezeGCReq(), KeyError("a bug")) is None, "a request is no answer"
    with pytest.raises(KeyError):  # what `request_isolation` looks after
        dispatch(TokenizedGenerateReqInput(), KeyError("a bug"))


def test_half_written_weights_are_not_served() -> None:
    with pytest.raises(KeyError):
        dispatch(UpdateWeightFromDiskReqInput(load_format="auto"), KeyError("a bug"))
    answer = dispatch(UpdateWeightFromDiskReqInput(load_format="nonsense"), KeyError("it is not called"))
    with pytest.raises(ValueError, match="load_format='nonsense': expected one of"):
        ask(answer)
    assert answer.num_paused_requests == 0


WRITES = (
    "BeginWeightUpdateReqInput", "EndWeightUpdateReqInput", "UpdateWeightFromDiskReqInput",
    "UpdateWeightsFromDistributedReqInput", "UpdateWeightsFromIPCReqInput", "UpdateWeightsFromTensorReqInput",
)  # fmt: skip
PROMPTS = (
    "BatchTokenizedEmbeddingReqInput", "BatchTokenizedGenerateReqInput", "TokenizedEmbeddingReqInput",
    "TokenizedGenerateReqInput",
)  # fmt: skip


@pytest.mark.parametrize("name", [*WRITES, *PROMPTS])
def test_what_is_not_answered_ends_where_it_failed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    fields = [("load_format", str | None, None)]
    with pytest.raises(KeyError):
        dispatch(msgspec.defstruct(name, fields, bases=(Base,))(), KeyError("a bug"))
    assert (f"{name} failed" in caplog.text) == (name in WRITES), "`request_isolation` tells of prompts"


def test_answers_that_refuse_nothing() -> None:
    for rid in (None, "mine", "not: torchrl_sglang_hidden refuses: "):
        answer = OpenSessionReqOutput(rid=rid, session_id="a", success=False)
        assert ask(answer) == [answer]


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
    for directory in (tmp_path / "new" / "and below", tmp_path):
        assert dispatch(ProfileReq(output_dir=str(directory))) == "answer"
        assert directory.is_dir()


class Profiler:
    """SGLang's, in the middle of a profile whose file cannot be written."""

    profile_in_progress = profile_by_stage = True
    profiler_start_forward_ct: int | None = 5
    profiler_target_forward_ct: int | None = 7

    def __init__(self) -> None:
        self.stopped = 0
        self.torch_profiler: Any = self
        trigger = SimpleNamespace(stage_configs={"prefill": 1}, running_state="prefill")
        self._profile_manager = SimpleNamespace(stage_based_trigger=trigger)

    def stop(self) -> None:
        self.stopped += 1
        raise RuntimeError("it is not running")


def test_a_profile_that_fails_in_a_step_is_ended(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def original(profiler: Any, batch: Any) -> None:
        seen.append(batch)
        if profiler.profile_in_progress:
            raise OSError("no space left")

    profiler, seen = Profiler(), list[Any]()
    control.around_profile_step(original, profiler, "step 1")
    assert "a profile failed, and is ended" in caplog.text
    assert "no space left" in caplog.text
    assert profiler.stopped == 1
    assert profiler.torch_profiler is None
    assert not profiler.profile_by_stage
    assert profiler.profiler_start_forward_ct is None
    assert profiler.profiler_target_forward_ct is None
    assert vars(profiler._profile_manager.stage_based_trigger) == {"stage_configs": {}, "running_state": None}
    caplog.clear()
    control.around_profile_step(original, profiler, "step 2")
    assert seen == ["step 1", "step 2"]
    assert caplog.text == ""
    ranks = sys.modules["sglang.srt.runtime_context"]
    monkeypatch.setattr(ranks, "get_parallel", lambda: SimpleNamespace(tp_size=2))
    with pytest.raises(OSError, match="no space"):  # the other rank may wait for this one
        control.around_profile_step(original, Profiler(), "step 1")


def test_what_sglang_says_of_a_profile() -> None:
    with pytest.raises(ValueError, match="not in progress"):
        ask(ProfileReqOutput(success=False, message="Profiling is not in progress"))
    good = ProfileReqOutput(success=True, message="")
    assert ask(good) == [good]
