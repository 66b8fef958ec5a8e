"""What an engine is, read from what its server says of itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from torchrl_sglang_hidden import CapabilityError, ProtocolError
from torchrl_sglang_hidden.protocol import CHANNEL, PROTOCOL, Status
from torchrl_sglang_hidden.protocol.shared_memory import SharedFiles, is_shared
from torchrl_sglang_hidden.sglang_api import server_info as server_info_module
from torchrl_sglang_hidden.sglang_api.server_info import ModelSizes, read_info, warm_up

MODEL_INFO = {"model_path": "m", "tokenizer_path": "t", "weight_version": "default", "is_generation": True}
STATUS = Status(
    vocab_size=96, hidden_size=8, num_layers=4, context_length=64, layers=(-1,), because="", normed=True, shared="",
    open_pools=0, prefix_bytes=0, constraints=("action_mask",), raw_log_probs=False,
    image_token_id=None,
).pack()  # fmt: skip


def server_info(*statuses: Any, **changes: Any) -> dict[str, Any]:
    states = [{} if status is None else {CHANNEL: status} for status in statuses]
    return {"internal_states": states, "max_req_input_len": 60, "enable_return_hidden_states": True, **changes}


def never(path: str) -> ModelSizes:
    raise AssertionError(f"asked for the model at {path}")


def sizes_of(path: str) -> ModelSizes:
    return {"m": ModelSizes(vocab_size=50, hidden_size=4, num_layers=3, context_length=32)}[path]


def info_of(*statuses: Any, **changes: Any) -> Any:
    return read_info(MODEL_INFO, server_info(*statuses, **changes), sizes_of)


def test_a_server_with_the_server_half() -> None:
    info = read_info(MODEL_INFO, server_info({**STATUS, "layers": [0, 2, -1]}), never)
    assert (info.model_path, info.tokenizer_path, info.weight_version) == ("m", "t", "default")
    assert (info.vocab_size, info.hidden_size, info.num_layers, info.context_length) == (96, 8, 4, 64)
    assert (info.max_prompt_tokens, info.layers, info.no_states_because) == (59, (-1, 0, 2), "")
    assert (info.pools_in_server, info.returns_hidden_states, info.shares_memory) == (True, True, False)


@pytest.mark.parametrize("info", [server_info(None), server_info(), {**server_info(), "internal_states": None}])
def test_a_stock_server_is_asked_for_its_model(info: Any) -> None:
    found = read_info(MODEL_INFO, info, sizes_of)
    assert (found.vocab_size, found.hidden_size, found.num_layers, found.context_length) == (50, 4, 3, 32)
    assert (found.max_prompt_tokens, found.pools_in_server, found.layers) == (31, False, (-1,))
    assert (found.returns_hidden_states, found.no_states_because, found.shares_memory) == (True, "", False)


@pytest.mark.parametrize(
    ("layers", "pools", "found"),
    [
        ([[0, -1], [0, -1]], True, (-1, 0)),
        ([[0, 2, -1], [-1, 1, 2]], True, (-1, 2)),
        ([[0, -1], [-1]], True, (-1,)),
        ([[0, -1], []], False, (-1,)),
        ([[], []], False, (-1,)),
        ([[0, -1], None], True, (-1,)),
        ([None, None], True, (-1,)),
    ],
)
def test_every_scheduler_must_have_a_layer(layers: list[Any], pools: bool, found: tuple[int, ...]) -> None:
    """Any data-parallel scheduler may get a request. One that has not run yet offers only its last layer."""
    info = info_of(*({**STATUS, "layers": one} for one in layers))
    assert (info.pools_in_server, info.layers) == (pools, found)


def test_every_scheduler_must_have_the_server_half() -> None:
    assert info_of(STATUS, STATUS).pools_in_server
    for statuses in ((STATUS, None), (None, STATUS)):
        info = info_of(*statuses)
        assert (info.pools_in_server, info.layers, info.shares_memory) == (False, (-1,), False)


def test_a_server_says_why_it_gives_no_states() -> None:
    info = info_of({**STATUS, "layers": []}, {**STATUS, "layers": [], "because": "--enable-pdmux splits"})
    assert (info.pools_in_server, info.returns_hidden_states) == (False, True)
    assert info.no_states_because == "--enable-pdmux splits"
    only_last = info_of({**STATUS, "because": "Gemma 9 has no list of layers"})
    assert (only_last.pools_in_server, only_last.layers) == (True, (-1,))
    assert only_last.no_states_because == "Gemma 9 has no list of layers"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculative_algorithm": "NGRAM"}, r"speculative decoding \('NGRAM'\) gives rows of rejected tokens"),
        ({"pp_size": 2}, r"between pipeline stages \(pp_size=2\)"),
        ({"enable_return_aux_hidden_states": True}, "--enable-return-aux-hidden-states packs other layers' states"),
    ],
)
def test_stock_states_that_cannot_be_trusted(changes: Any, words: str) -> None:
    info = info_of(None, **changes)
    assert not info.returns_hidden_states
    assert re.search(words, info.no_states_because)


@pytest.mark.parametrize("changes", [{"speculative_algorithm": None}, {"pp_size": 1}, {"pp_size": None}])
def test_stock_states_that_can(changes: Any) -> None:
    assert info_of(None, **changes).returns_hidden_states
    assert not info_of(None, **changes, enable_return_hidden_states=False).returns_hidden_states


@pytest.mark.parametrize(
    ("flag", "mode", "returns"),
    [(True, None, True), (False, None, False), (False, "full", True), (True, "full", True), (True, "last", False)],
)
def test_the_mode_of_stock_states(flag: bool, mode: str | None, returns: bool) -> None:
    """SGLang reads the mode first. With "last" a request may ask for one position's states alone."""
    changes = {"enable_return_hidden_states": flag, "return_hidden_states_mode": mode}
    assert info_of(None, **changes).returns_hidden_states is returns


def test_states_before_the_norm_are_not_returned() -> None:
    info = info_of({**STATUS, "normed": False, "layers": []})
    assert (info.pools_in_server, info.returns_hidden_states) == (False, False)


def test_memory_is_shared_with_a_server_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_info_module, "is_shared", lambda sign: is_shared(sign, tmp_path))
    here, there = {**STATUS, "shared": SharedFiles(tmp_path).sign}, {**STATUS, "shared": "elsewhere"}
    assert info_of(here).shares_memory
    assert info_of(here, here).shares_memory
    assert not info_of(here, there).shares_memory
    assert not info_of(here, {**here, "layers": []}).shares_memory


@pytest.mark.parametrize(
    ("statuses", "num_prompts"),
    [
        ([STATUS], None),
        ([None], None),
        ([], None),
        ([{**STATUS, "layers": []}], None),
        ([{**STATUS, "layers": None}], 1),
        ([{**STATUS, "layers": None}, {**STATUS, "layers": None}], 2),
        ([STATUS, {**STATUS, "layers": None}], 2),
        ([{"protocol": 1}], None),
    ],
)
def test_an_engine_that_has_not_run_yet_is_warmed_up(statuses: list[Any], num_prompts: int | None) -> None:
    payload = warm_up(server_info(*statuses))
    if num_prompts is None:
        assert payload is None
    else:
        assert payload == {
            "input_ids": [[0, 1, 2, 3, 4, 5, 6, 7]] * num_prompts,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        }


def test_a_warm_up_of_a_small_vocabulary() -> None:
    payload = warm_up(server_info({**STATUS, "layers": None, "vocab_size": 3}))
    assert payload is not None
    assert payload["input_ids"] == [[0, 1, 2, 0, 1, 2, 0, 1]], "an id that the model lacks would end the server"


def test_a_shorter_context_of_the_server_counts() -> None:
    info = read_info(MODEL_INFO, server_info(STATUS, context_length=40), never)
    assert (info.context_length, info.max_prompt_tokens) == (40, 39)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, "10"])
def test_another_protocol(protocol: Any) -> None:
    with pytest.raises(ProtocolError, match=rf"{re.escape(repr(protocol))}.*this client {PROTOCOL}; install the same"):
        read_info(MODEL_INFO, server_info({**STATUS, "protocol": protocol}), never)


@pytest.mark.parametrize(
    ("model_info", "info"),
    [
        ({**MODEL_INFO, "is_generation": False}, server_info(STATUS)),
        (MODEL_INFO, server_info(STATUS, skip_tokenizer_init=True)),
    ],
)
def test_a_server_that_does_not_write_text(model_info: Any, info: Any) -> None:
    with pytest.raises(CapabilityError, match=r"'m' does not generate text; .*causal language model"):
        read_info(model_info, info, never)


@pytest.mark.parametrize("missing", ["model_path", "weight_version"])
def test_a_description_of_another_version(missing: str) -> None:
    model_info = {name: value for name, value in MODEL_INFO.items() if name != missing}
    with pytest.raises(ProtocolError, match=rf"lacks '{missing}'.*0\.5\.23"):
        read_info(model_info, server_info(STATUS), never)


def test_the_constraints_of_all_schedulers_are_those_that_all_have() -> None:
    assert info_of(STATUS).constraints == ("action_mask",)
    several = {**STATUS, "constraints": ["b", "a", "c"]}
    assert info_of(several, {**several, "constraints": ["c", "b"]}).constraints == ("b", "c")
    assert info_of(several, {**several, "constraints": []}).constraints == ()
    assert info_of(None).constraints == info_of({**several, "layers": []}).constraints == ()
    assert info_of(STATUS).takes_processors is False
    assert info_of(STATUS, enable_custom_logit_processor=True).takes_processors


def test_what_a_server_records_of_its_sampling() -> None:
    info = info_of(STATUS, sampling_mask_max_tokens=4096, enable_return_routed_experts=True)
    assert (info.max_sampling_mask, info.returns_routed_experts, info.raw_log_probs) == (4096, True, False)
    info = info_of(STATUS, {**STATUS, "raw_log_probs": True})
    assert (info.max_sampling_mask, info.returns_routed_experts, info.raw_log_probs) == (0, False, True)


@pytest.mark.parametrize(
    ("model", "server"),
    [
        ({"model_path": 7}, {}), ({"model_path": None}, {}), ({"tokenizer_path": ["t"]}, {}),
        ({"weight_version": 1}, {}),
        ({}, {"internal_states": 7}), ({}, {"internal_states": [7]}), ({}, {"internal_states": "x"}),
        ({}, {"internal_states": [{CHANNEL: 7}]}), ({}, {"internal_states": {"x": {}}}), ({}, {"context_length": "64"}),
        ({}, {"context_length": 10**12}), ({}, {"max_req_input_len": None}), ({}, {"max_req_input_len": {}}),
        ({}, {"max_req_input_len": -1}), ({}, {"sampling_mask_max_tokens": "8"}), ({}, {"pp_size": "2"}),
        ({}, {"pp_size": [2]}), ({}, {"limit_mm_data_per_request": 7}),
        ({}, {"limit_mm_data_per_request": {"image": "4"}}),
        ({}, {"internal_states": [{CHANNEL: {**STATUS, "hidden_size": 10**12}}]}),
        ({}, {"internal_states": [{CHANNEL: {**STATUS, "vocab_size": 0}}]}),
        ({}, {"internal_states": [{CHANNEL: {**STATUS, "layers": [0, 4, -1]}}]}),
    ],
)  # fmt: skip
def test_a_description_of_other_types(model: Any, server: Any) -> None:
    """A size is bounded too: the client makes rows of it for requests that failed."""
    with pytest.raises(ProtocolError, match=r"server's (description is wrong,|internal_states are) .*(use|is that)"):
        read_info({**MODEL_INFO, **model}, {**server_info(STATUS), **server}, sizes_of)


@pytest.mark.parametrize("size", [0, -1, "96", None, 9.0])
def test_a_warm_up_with_a_size_that_is_none(size: Any) -> None:
    payload = warm_up(server_info({**STATUS, "layers": None, "vocab_size": size}))
    assert payload is not None
    assert payload["input_ids"] == [[0] * 8]


@pytest.mark.parametrize("states", [7, "x", [7], [{CHANNEL: 7}]])
def test_a_warm_up_of_no_server(states: Any) -> None:
    with pytest.raises(ProtocolError, match=r"internal_states are .*; is that an SGLang server"):
        warm_up({"internal_states": states})
