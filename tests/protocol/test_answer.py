"""The answer of the server half: what goes in comes out, and what did not come out whole is refused."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bad_options import (
    INFINITY,
    anything,
)
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang_hidden.errors import CapabilityError, ProtocolError
from torchrl_sglang_hidden.protocol import (
    CHANNEL,
    Way,
    answer_of,
    drop_shared,
    pack_answer,
    tensors,
    unpack_answer,
)
from torchrl_sglang_hidden.protocol import answer as answer_module
from torchrl_sglang_hidden.protocol.shared_memory import MIN_BYTES, SharedFiles, discard, fetch
from torchrl_sglang_hidden.protocol.tensors import pack_tensor
from torchrl_sglang_hidden.records import TokenLogits
from torchrl_sglang_hidden.reduce.pooling import Pools, WantedRows
from torchrl_sglang_hidden.reduce.wanted_logits import FoundLogits

D = 8
WAYS: tuple[Way, ...] = ("binary", "text", "shared")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pools_of(num_layers: int = 2, num_rows: int | None = 5, dtype: torch.dtype = torch.float32) -> Pools:
    return Pools(
        segments={"response": (numbers(num_layers, D, seed=1), 3), "prompt": (None, 0)},
        spans={
            "tail": (numbers(num_layers, D, seed=2), 2),
            "each": (numbers(3, num_layers, D, seed=9), 3),
            "none": (None, 0),
            "prompt": (numbers(num_layers, D, seed=3), 1),
        },
        faults={},
        rows=None if num_rows is None else WantedRows(2, numbers(num_rows, num_layers, D, seed=4, dtype=dtype)),
        places={"each": (0, 4, 5), "none": ()},
    )


def found_logits(num_response: int = 3, num_given: int = 4, dtype: torch.dtype = torch.float32) -> FoundLogits:
    """Return logits of which some are ``-inf``, which JSON cannot write."""
    response_NC = numbers(num_response, 2, seed=5, dtype=dtype)
    response_NC[0, 0] = -INFINITY
    return FoundLogits(
        response=TokenLogits(response_NC, torch.arange(num_response * 2).reshape(num_response, 2) + 10**5),
        prompt=TokenLogits(numbers(num_given, 3, seed=6, dtype=dtype), None),
        log_probs_N=numbers(num_given, seed=7),
        entropy_T=numbers(num_given, seed=8),
        constrained=num_response,
    )


def sent(
    pools: Pools,
    way: Way,
    share: Callable[[bytes], str | None] | None = None,
    logits: FoundLogits | None = None,
) -> list[Any]:
    answer = [pack_answer(pools, way, share, logits)]
    return answer if way == "binary" else json.loads(json.dumps(answer))


def assert_same(found: Pools, expected: Pools) -> None:
    assert (found.faults, found.segments.keys(), found.spans.keys()) == (
        {},
        expected.segments.keys(),
        expected.spans.keys(),
    )
    for ours, theirs in ((found.segments, expected.segments), (found.spans, expected.spans)):
        for name, (value, count) in theirs.items():
            assert ours[name][1] == count
            assert (ours[name][0] is None) is (value is None)
            assert value is None or torch.equal(ours[name][0], value)
    assert (found.rows is None) is (expected.rows is None)
    if found.rows is not None and expected.rows is not None:
        assert (found.rows.first, found.rows.rows_NKD.dtype) == (expected.rows.first, expected.rows.rows_NKD.dtype)
        assert torch.equal(found.rows.rows_NKD, expected.rows.rows_NKD)


def assert_same_logits(found: FoundLogits | None, expected: FoundLogits) -> None:
    assert found is not None
    assert (found.constrained, found.fault) == (expected.constrained, expected.fault)
    pairs = [(found.log_probs_N, expected.log_probs_N), (found.entropy_T, expected.entropy_T)]
    for ours, theirs in ((found.response, expected.response), (found.prompt, expected.prompt)):
        assert (ours is None) is (theirs is None)
        if ours is not None and theirs is not None:
            pairs += [(ours.values_NC, theirs.values_NC), (ours.token_ids_NC, theirs.token_ids_NC)]
    for one, other in pairs:
        assert (one is None) is (other is None)
        assert one is None or other is None or (torch.equal(one, other) and one.dtype == other.dtype)


@pytest.mark.parametrize("digest", [None, 0, 2**32 - 1])
def test_what_was_computed_of_a_prompt_with_images(digest: int | None) -> None:
    answer = pack_answer(Pools({}, {}, {}, None), "text", prompt_digest=digest)
    assert unpack_answer([answer], "row 0", D).prompt_digest == digest
    assert ("prompt_digest" in answer) is (digest is not None)
    answer["prompt_digest"] = "none"
    with pytest.raises(ProtocolError, match="row 4: the states cannot be read"):
        unpack_answer([answer], "row 4", D)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gone", [None, "response", "prompt", "log_probs_N", "entropy_T"])
def test_logits_round_trip(way: Way, dtype: torch.dtype, gone: str | None) -> None:
    logits = found_logits(dtype=dtype)
    if gone is not None:
        logits = dataclasses.replace(logits, **{gone: None})
    found = unpack_answer(sent(pools_of(), way, lambda data: None, logits), "row 0", D)
    assert_same(found.pools, pools_of())
    assert_same_logits(found.logits, logits)


def test_an_answer_without_logits_has_none() -> None:
    (answer,) = sent(pools_of(), "text")
    assert answer.keys() == {"protocol", "places", "rows_of_spans", "faults", "data", "crc32", "rows"}
    assert unpack_answer([answer], "row 0", D).logits is None
    assert unpack_answer(sent(Pools({}, {}, {}, None), "text", None, FoundLogits()), "row 0", D).logits == FoundLogits()


def test_many_logits_go_through_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-probs, one number for each token, do not."""
    monkeypatch.setattr(tensors, "fetch", functools.partial(fetch, directory=tmp_path))
    monkeypatch.setattr(answer_module, "discard", functools.partial(discard, directory=tmp_path))
    files, logits = SharedFiles(tmp_path), found_logits(MIN_BYTES // 8, MIN_BYTES // 12 + 1)
    logits = dataclasses.replace(logits, log_probs_N=numbers(MIN_BYTES // 4))
    answer, dropped = (sent(pools_of(), "shared", files.share, logits) for _ in range(2))
    names = {name for name, block in answer[0].items() if isinstance(block, dict) and "shared" in block}
    assert names == {"logits", "logits_ids", "prompt_logits"}
    with pytest.raises(ProtocolError, match=r"row 7: .* into shared memory .*, unasked"):
        unpack_answer(answer, "row 7", D, shared=False)
    assert len([*tmp_path.iterdir()]) == 1 + 2 * 3
    assert_same_logits(unpack_answer(answer, "row 0", D).logits, logits)
    drop_shared(dropped)
    assert [path.name for path in tmp_path.iterdir()] == [files.sign]


def test_an_answer_without_room_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the answer stays in shared memory."""
    monkeypatch.setattr(tensors, "fetch", functools.partial(fetch, directory=tmp_path))
    monkeypatch.setattr(answer_module, "discard", functools.partial(discard, directory=tmp_path))
    monkeypatch.setattr(tensors, "MAX_TEXT_BYTES", 4 * MIN_BYTES - 1)
    logits = found_logits(MIN_BYTES // 2, MIN_BYTES // 12 + 1)  # four times MIN_BYTES, their ids as many
    wide, tight = SharedFiles(tmp_path), SharedFiles(tmp_path, max_bytes=5 * MIN_BYTES)
    signs = {wide.sign, tight.sign}
    written: list[str | None] = []

    def share(data: bytes) -> str | None:
        written.append(tight.share(data))
        return written[-1]

    for pools in (pools_of(), Pools({}, {}, {}, None)):
        good = answer_of(pools, "shared", wide.share, logits)
        assert {"logits", "logits_ids", "prompt_logits"} <= good.keys()
        assert_same_logits(unpack_answer([good], "row 0", D).logits, logits)
        written.clear()
        answer = answer_of(pools, "shared", share, logits)
        assert [name is not None for name in written] == [False] * (pools.rows is not None) + [True, False]
        assert answer.keys() == {"protocol", "refused"}
        assert {path.name for path in tmp_path.iterdir()} == signs
        with pytest.raises(CapabilityError, match=r"^row 4: 1 MiB do not fit into the server's shared memory; ask for"):
            unpack_answer(json.loads(json.dumps([answer])), "row 4", D)
    for way in ("binary", "text"):
        assert (
            answer_of(pools_of(), way, tight.share, logits).keys() == pack_answer(pools_of(), way, None, logits).keys()
        )


def test_rows_of_spans_that_are_too_many_bytes_for_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_module, "MAX_TEXT_BYTES", 64)
    pools = Pools({}, {"each": (numbers(3, 1, D), 3)}, {}, None, {"each": (0, 1, 2)})
    assert "data" in answer_of(pools, "binary", lambda _: None, None)
    refused = answer_of(pools, "text", lambda _: None, None)
    with pytest.raises(CapabilityError, match=r"^row 2: .* rows of spans are 0 MiB, over the limit of 0 MiB"):
        unpack_answer([refused], "row 2", D)


def test_logits_that_were_refused() -> None:
    """A refusal is reported before a fault: what was refused was not looked at."""
    logits = FoundLogits(
        constrained=3, fault="token 1", refused="the logits are over 2048 MiB for one request; ask for"
    )
    for way in WAYS:
        with pytest.raises(CapabilityError, match=r"^row 3: the logits are over 2048 MiB for one request; ask for$"):
            unpack_answer(sent(pools_of(), way, None, logits), "row 3", D)
    assert unpack_answer(sent(pools_of(), "text", None, found_logits()), "row 3", D).logits is not None


def test_constraints_that_could_not_be_kept() -> None:
    logits = dataclasses.replace(found_logits(), fault="token 3 of the response: 0 tokens are left")
    found = unpack_answer(sent(pools_of(), "text", None, logits), "row 3", D).logits
    assert found is not None
    assert found.fault == "token 3 of the response: 0 tokens are left"


SPOILED_LOGITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a count of words": lambda a: a.update(constrained="three"),
    "a count of null": lambda a: a.update(constrained=None),
    "an infinite count": lambda a: a.update(constrained=INFINITY),
    "no fault": lambda a: a.pop("fault"),
    "logits of null": lambda a: a.update(logits=None),
    "logits without data": lambda a: a["logits"].pop("data"),
    "cut logits": lambda a: a["logits"].update(data=cut(a["logits"]["data"])),
    "a flipped bit": lambda a: a["prompt_logits"].update(data=flip(a["prompt_logits"]["data"])),
    "a flipped bit of the ids": lambda a: a["logits_ids"].update(data=flip(a["logits_ids"]["data"])),
    "logits of one axis": lambda a: a["logits"].update(shape=[6]),
    "logits of three axes": lambda a: a["prompt_logits"].update(shape=[2, 2, 3]),
    "more logits than data": lambda a: a["logits"].update(shape=[4, 2]),
    "ids of another shape": lambda a: a["logits_ids"].update(shape=[2, 3]),
    "ids of other logits": lambda a: a.update(prompt_logits_ids=a["logits_ids"]),
    "logits of an unknown dtype": lambda a: a["logits"].update(dtype="int8"),
    "log-probs of two axes": lambda a: a["log_probs"].update(shape=[2, 2]),
    "log-probs of no axis": lambda a: a.update(log_probs={**pack_tensor(numbers(1), "text"), "shape": []}),
    "log-probs that are none": lambda a: a.update(log_probs=[0.5]),
}


@pytest.mark.parametrize("case", SPOILED_LOGITS)
def test_logits_that_did_not_come_whole(case: str) -> None:
    answer = sent(pools_of(), "text", None, found_logits())
    unpack_answer(answer, "row 5", D)
    SPOILED_LOGITS[case](answer[0])
    with pytest.raises(ProtocolError, match=r"(?s)^row 5: the states cannot be read \(.*was the answer cut short\?"):
        unpack_answer(answer, "row 5", D)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(
    ("num_rows", "dtype"), [(None, torch.float32), (5, torch.float32), (5, torch.bfloat16), (1, torch.float16)]
)
def test_an_answer_round_trip(way: Way, num_layers: int, num_rows: int | None, dtype: torch.dtype) -> None:
    """A shared answer of few bytes goes as text."""
    pools = pools_of(num_layers, num_rows, dtype)
    assert_same(unpack_answer(sent(pools, way, lambda data: None), "row 0", D).pools, pools)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_go_through_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(tensors, "fetch", functools.partial(fetch, directory=tmp_path))
    files, pools = SharedFiles(tmp_path), pools_of(2, MIN_BYTES // (2 * D), dtype)
    answer = sent(pools, "shared", files.share)
    assert len(json.dumps(answer)) < 2000
    assert len([*tmp_path.iterdir()]) == 2
    assert_same(unpack_answer(answer, "row 0", D).pools, pools)
    assert [path.name for path in tmp_path.iterdir()] == [files.sign]


def test_a_shared_file_that_is_gone_or_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "fetch", functools.partial(fetch, directory=tmp_path))
    files, pools = SharedFiles(tmp_path), pools_of(2, MIN_BYTES // (2 * D))
    for spoil in (
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.write_bytes(b""),
    ):
        answer = sent(pools, "shared", files.share)
        spoil(tmp_path / answer[0]["rows"]["shared"])
        with pytest.raises(ProtocolError, match=r"row 7: the states cannot be read"):
            unpack_answer(answer, "row 7", D)
    answer = sent(pools, "shared", files.share)
    answer[0]["rows"]["shared"] = "../../etc/passwd"
    with pytest.raises(ProtocolError, match=r"row 7: .*is no file of shared states"):
        unpack_answer(answer, "row 7", D)


def test_shared_states_that_were_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on another machine must not name files of this machine."""
    monkeypatch.setattr(tensors, "fetch", functools.partial(fetch, directory=tmp_path))
    files, pools = SharedFiles(tmp_path), pools_of(2, MIN_BYTES // (2 * D))
    answer = sent(pools, "shared", files.share)
    name = answer[0]["rows"]["shared"]
    with pytest.raises(ProtocolError, match=rf"^row 7: .*'{name}'.*unasked; install the same version"):
        unpack_answer(answer, "row 7", D, shared=False)
    assert {path.name for path in tmp_path.iterdir()} == {files.sign, name}
    assert_same(unpack_answer(answer, "row 7", D, shared=True).pools, pools)
    assert_same(unpack_answer(sent(pools, "text"), "row 7", D, shared=False).pools, pools)


@pytest.mark.parametrize("shared", [True, False])
def test_vectors_are_never_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    monkeypatch.setattr(tensors, "fetch", functools.partial(fetch, directory=tmp_path))
    files, answer = SharedFiles(tmp_path), sent(pools_of(), "text")
    vectors = base64.b64decode(answer[0].pop("data"))
    name = files.share(vectors + bytes(MIN_BYTES))
    (tmp_path / name).write_bytes(vectors)
    answer[0]["shared"] = name
    with pytest.raises(ProtocolError, match=r"^row 7: the states cannot be read \('data'\)"):
        unpack_answer(answer, "row 7", D, shared=shared)
    assert (tmp_path / name).exists()


def test_shared_states_that_are_not_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_module, "discard", functools.partial(discard, directory=tmp_path))
    files, pools = SharedFiles(tmp_path), pools_of(2, MIN_BYTES // (2 * D))
    answer, other = (sent(pools, "shared", files.share) for _ in range(2))
    for _ in range(2):
        drop_shared(answer)
        assert {path.name for path in tmp_path.iterdir()} == {files.sign, other[0]["rows"]["shared"]}
    drop_shared(sent(pools, "text"))
    other[0]["rows"]["shared"] = files.sign
    drop_shared(other)
    assert len([*tmp_path.iterdir()]) == 2


@given(
    answer=anything
    | st.lists(anything, min_size=1)
    | anything.map(lambda rows: [{"rows": rows}])
    | anything.map(lambda name: [{"rows": {"shared": name}, "logits": {"shared": name}, "log_probs": name}])
)
def test_no_answer_is_too_bad_to_drop(answer: Any) -> None:
    drop_shared(answer)


def test_what_cannot_be_removed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_module, "discard", functools.partial(discard, directory=tmp_path))
    name = f"torchrl_sglang_hidden-{'0' * 16}-1"
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=name):
        discard(name, tmp_path)
    drop_shared([{"rows": {"shared": name}}])


def test_what_is_read_can_be_written_to() -> None:
    found = unpack_answer(sent(pools_of(), "binary"), "row 0", D).pools
    found.segments["response"][0].add_(1)
    found.rows.rows_NKD.add_(1)


def test_an_answer_without_any_rows() -> None:
    pools = Pools({"prompt": (None, 0), "response": (None, 2)}, {}, {}, None)
    for way in WAYS:
        assert unpack_answer(sent(pools, way), "row 0", D).pools == pools


def test_rows_that_are_no_block_of_memory() -> None:
    """For example a transposed view."""
    rows_NKD = numbers(2, 5, D).transpose(0, 1)
    found = unpack_answer(sent(Pools({}, {}, {}, WantedRows(0, rows_NKD)), "text"), "row 0", D).pools
    assert torch.equal(found.rows.rows_NKD, rows_NKD)


def test_a_fault_says_which_span() -> None:
    pools = Pools({}, {}, {"tail": "the response has 2 tokens"}, None)
    assert unpack_answer(sent(pools, "text"), "row 3", D).pools.faults == {"tail": "the response has 2 tokens"}


def cut(text: str) -> str:
    return text[:-4]


def flip(text: str) -> str:
    data = bytearray(base64.b64decode(text))
    data[5] ^= 1
    return base64.b64encode(data).decode()


def resend(fields: dict[str, Any], data: bytes) -> None:
    fields.update(data=base64.b64encode(data).decode(), crc32=zlib.crc32(data))


SPOILED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no data": lambda a: a.pop("data"),
    "no base64": lambda a: a.update(data="%%%%"),
    "half a base64": lambda a: a.update(data=a["data"][:-3]),
    "cut data": lambda a: a.update(data=cut(a["data"])),
    "a flipped bit": lambda a: a.update(data=flip(a["data"])),
    "data of numbers": lambda a: a.update(data=7),
    "another checksum": lambda a: a.update(crc32=a["crc32"] ^ 1),
    "no checksum": lambda a: a.pop("crc32"),
    "fewer vectors than places": lambda a: resend(a, bytes(4 * D)),
    "vectors of half a number": lambda a: resend(a, bytes(4 * D + 1)),
    "no vectors at all": lambda a: resend(a, b""),
    "no places": lambda a: a.pop("places"),
    "places of null": lambda a: a.update(places=None),
    "places of numbers": lambda a: a.update(places=[1, 2]),
    "short places": lambda a: a["places"][0].pop(),
    "counts of words": lambda a: a["places"][0].__setitem__(2, "three"),
    "counts of infinity": lambda a: a["places"][0].__setitem__(2, float("inf")),
    "rows of spans that are none": lambda a: a.pop("rows_of_spans"),
    "rows of spans of null": lambda a: a.update(rows_of_spans=None),
    "rows of a span in disorder": lambda a: a["rows_of_spans"].update(each=[4, 0, 5]),
    "rows of a span twice": lambda a: a["rows_of_spans"].update(each=[0, 4, 4]),
    "rows of a span before the first": lambda a: a["rows_of_spans"].update(each=[-1, 4, 5]),
    "rows of a span of words": lambda a: a["rows_of_spans"].update(each=["0", 4, 5]),
    "more rows of a span than there are": lambda a: a["places"][3].__setitem__(3, 4),
    "fewer rows of a span than there are": lambda a: a["places"][3].__setitem__(3, 2),
    "rows before the first": lambda a: a["places"][3].__setitem__(3, -1),
    "a huge number of rows": lambda a: a["places"][3].__setitem__(3, 10**30),
    "counts of nothing": lambda a: a["places"][0].__setitem__(2, None),
    "no faults": lambda a: a.pop("faults"),
    "faults of a list": lambda a: a.update(faults=["x"]),
    "rows of null": lambda a: a.update(rows=None),
    "rows without data": lambda a: a["rows"].pop("data"),
    "cut rows": lambda a: a["rows"].update(data=cut(a["rows"]["data"])),
    "a flipped bit in the rows": lambda a: a["rows"].update(data=flip(a["rows"]["data"])),
    "rows without a place": lambda a: a["rows"].pop("first"),
    "rows at infinity": lambda a: a["rows"].update(first=float("inf")),
    "rows without a shape": lambda a: a["rows"].pop("shape"),
    "rows of one axis": lambda a: a["rows"].update(shape=[5 * 2 * D]),
    "more rows than data": lambda a: a["rows"].update(shape=[6, 2, D]),
    "rows of two unknown axes": lambda a: a["rows"].update(shape=[-1, -1, D]),
    "rows of another size": lambda a: a["rows"].update(shape=[10, 2, D // 2]),
    "more rows than there are numbers": lambda a: a["rows"].update(shape=[10**30, 2, D]),
    "rows of an unknown dtype": lambda a: a["rows"].update(dtype="int8"),
    "rows of a wider dtype": lambda a: a["rows"].update(dtype="float64"),
    "rows of a narrower dtype": lambda a: a["rows"].update(dtype="bfloat16"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_an_answer_that_did_not_come_whole(case: str) -> None:
    answer = sent(pools_of(), "text")
    unpack_answer(answer, "row 5", D)
    SPOILED[case](answer[0])
    with pytest.raises(ProtocolError, match=r"(?s)^row 5: the states cannot be read \(.*was the answer cut short\?"):
        unpack_answer(answer, "row 5", D)


@pytest.mark.parametrize("protocol", [None, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, "10"])
def test_an_answer_of_another_protocol(protocol: Any) -> None:
    answer = sent(pools_of(), "text")
    answer[0]["protocol"] = protocol
    with pytest.raises(ProtocolError, match=rf"row 5: the server half speaks protocol {protocol!r} and this client"):
        unpack_answer(answer, "row 5", D)


@pytest.mark.parametrize("answer", [None, [], {}, "text", [1], [{}, {}], [None]])
def test_an_answer_of_another_form(answer: Any) -> None:
    with pytest.raises(ProtocolError, match=rf"row 5: expected one {CHANNEL} answer in meta_info.*start the server"):
        unpack_answer(answer, "row 5", D)


@given(data=st.data())
def test_no_answer_is_read_wrongly(data: st.DataObject) -> None:
    """Whatever a field is replaced with, the states are those that were sent, or an error of this package is raised."""
    pools, logits = pools_of(), found_logits()
    answer = sent(pools, "text", None, logits)
    parts = [value for value in answer[0].values() if isinstance(value, dict) and "shape" in value]
    fields = data.draw(st.sampled_from([answer[0], *parts]))
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(anything)
    try:
        read = unpack_answer(answer, "row 5", D)
    except (ProtocolError, CapabilityError):
        return
    found = read.pools
    for name in ("response", "prompt") if read.logits is not None else ():
        ours, theirs = getattr(read.logits, name), getattr(logits, name)
        assert ours is None or torch.equal(ours.values_NC.flatten(), theirs.values_NC.flatten())
        assert ours is None or ours.token_ids_NC is None or torch.equal(ours.token_ids_NC, theirs.token_ids_NC)
    values = {name: value for name, (value, _) in {**found.segments, **found.spans}.items()}
    sent_values = [value for value, _ in (*pools.segments.values(), *pools.spans.values())]
    for value in values.values():
        assert value is None or any(torch.equal(value, one) for one in sent_values if one is not None)
    if found.rows is not None:
        assert torch.equal(found.rows.rows_NKD.flatten(), pools.rows.rows_NKD.flatten())
