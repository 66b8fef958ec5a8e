"""The contract of every engine, on the fake engine; and that every fault of an answer is an error."""

from __future__ import annotations

import warnings

import pytest
from helpers.engine_contract import BAD_ROWS, EngineContract, assert_all_same, ragged, request
from helpers.fake_engine import FAULTS, Fault, RecordingEngine, abort_a_row

from torchrl_sglang_hidden.errors import (
    AlignmentError,
    CapabilityError,
    ProtocolError,
    RequestAbortedError,
)


@pytest.mark.filterwarnings("ignore:the server has no torchrl_sglang_hidden server half")
class TestRecorder(EngineContract):
    @pytest.fixture(params=["base64", "raw", "stock"])
    def engine(self, request: pytest.FixtureRequest) -> RecordingEngine:
        return RecordingEngine(binary=request.param == "raw", pools_in_server=request.param != "stock")

    @pytest.fixture
    def another(self) -> RecordingEngine:
        return RecordingEngine()

    @pytest.mark.parametrize("bad", BAD_ROWS)
    def test_a_bad_row_sends_no_row(self, bad: str) -> None:
        engine, (make, error, _) = RecordingEngine(), BAD_ROWS[bad]
        with pytest.raises(error):
            engine.generate([request((5,)), make(engine)])
        assert (engine.requests, engine.payloads) == ([], [])

    def test_states_that_cannot_be_returned_are_refused(self) -> None:
        engine = RecordingEngine(pools_in_server=False, returns_hidden_states=False)
        with pytest.raises(CapabilityError, match=r"row 1.*--enable-return-hidden-states.*hidden=None"):
            engine.generate([request((5,), None), request((5,))])
        assert engine.requests == []
        assert engine.generate([request((5,), None)])[0].hidden == {}


EXPECTED_ERRORS = {
    "lose_a_state_row": AlignmentError,
    "lose_all_states": ProtocolError,
    "abort_a_row": RequestAbortedError,
    "lose_a_log_prob": AlignmentError,
    "swap_a_log_prob": AlignmentError,
    "truncate_the_data": ProtocolError,
    "speak_another_protocol": ProtocolError,
    "add_a_row": ProtocolError,
    "lose_a_row": ProtocolError,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_an_error_and_the_next_call_works(fault: Fault) -> None:
    engine = RecordingEngine()
    requests = ragged(engine)
    expected = engine.generate(requests)
    engine.fault = fault
    with pytest.raises(EXPECTED_ERRORS[fault.__name__]):
        engine.generate(requests)
    engine.fault = None
    assert_all_same(engine.generate(requests), expected)


def test_an_abort_names_the_row_and_the_reason() -> None:
    engine = RecordingEngine(fault=abort_a_row)
    with pytest.raises(RequestAbortedError, match=r"row 0 \(request recorded-0\).*'abort'.*out of memory"):
        engine.generate(ragged(engine))


def test_the_fallback_is_said_once_per_engine() -> None:
    engine = RecordingEngine(pools_in_server=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            engine.generate(ragged(engine))
    assert len(caught) == 1
    assert "return_hidden_states" in str(caught[0].message)
    assert "TORCHRL_SGLANG_HIDDEN=1" in str(caught[0].message)
