"""Completions to TensorDicts: every length, shape and padding, against a few lines of plain Python."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_engine import HIDDEN_SIZE, PAD_ID, log_prob_of
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, LogProbs, Masks, Text, Tokens

from torchrl_sglang_hidden import LastTokens
from torchrl_sglang_hidden.errors import InputError, RequestAbortedError
from torchrl_sglang_hidden.policy.assemble import assemble, assemble_scores
from torchrl_sglang_hidden.policy.outputs import HiddenStates, OutputKeys, TokenHiddenStates
from torchrl_sglang_hidden.policy.rows import Row
from torchrl_sglang_hidden.records import Completion, Pooled, TokenRows
from torchrl_sglang_hidden.spec.hidden import SEGMENTS, HiddenSpec, Segment

ALL = HiddenSpec(SEGMENTS)
NAMES: dict[str, Any] = {
    "text": "text", "tokens": "tokens", "masks": "masks", "log_probs": "log_probs", "history": "history",
    "hidden_states": "hidden_states", "token_hidden_states": "token_hidden_states", "weight_version": "weight_version",
    "finish_reason": "finish_reason", "mixed_weights": "mixed_weights",
}  # fmt: skip

EVERYTHING = HiddenSpec(SEGMENTS, layers=(0, -1), tokens=True, spans={"tail": LastTokens(1), "head": LastTokens(2)})
WRITTEN = set(NAMES) - {"history"}


def shape_of(spec: HiddenSpec) -> tuple[int, ...]:
    return (len(spec.layers), HIDDEN_SIZE) if isinstance(spec.layers, tuple) else (HIDDEN_SIZE,)


def row_at(prompt_ids: list[int], position: int, spec: HiddenSpec) -> torch.Tensor:
    """Return the state of one position: each number tells the prompt, the position and the layer."""
    return torch.arange(math.prod(shape_of(spec))).reshape(shape_of(spec)) / 8 + 100.0 * sum(prompt_ids) + position


def completion(prompt_ids: list[int], response_ids: list[int], spec: HiddenSpec | None = ALL) -> Completion:
    hidden: dict[Segment, Pooled] = {}
    spans, token_rows = {}, None
    if spec is not None:
        for index, segment in enumerate(spec.segments if spec.pooling is not None else ()):
            count = len(Segment(segment).positions(len(prompt_ids), len(response_ids)))
            hidden[segment] = Pooled(torch.full(shape_of(spec), sum(prompt_ids) + index / 4), count)
        spans = {name: Pooled(torch.full(shape_of(spec), 9.5), place + 1) for place, name in enumerate(spec.spans)}
        if spec.tokens:
            first = 0 if spec.segments != ("response",) else len(prompt_ids) - 1
            stop = len(prompt_ids) + (0 if spec.segments == ("prompt",) else len(response_ids) - 1)
            token_rows = TokenRows(first, torch.stack([row_at(prompt_ids, p, spec) for p in range(first, stop)]))
    return Completion(
        prompt_ids=tuple(prompt_ids),
        response_ids=tuple(response_ids),
        text=f"answer {response_ids}",
        log_probs_T=torch.tensor([log_prob_of(i) for i in response_ids]),
        hidden=hidden,
        finish_reason="stop" if response_ids[-1:] == [PAD_ID] else "length",
        weight_version=f"v{len(prompt_ids)}",
        spans=spans,
        token_rows=token_rows,
    )


def assembled(
    pairs: list[tuple[list[int], list[int]]],
    shape: tuple[int, ...] | None = None,
    *,
    padded: bool = False,
    spec: HiddenSpec | None = ALL,
    device: torch.device | None = None,
    wants_states: list[bool | None] | None = None,
    **keys: Any,
) -> TensorDictBase:
    wants = wants_states or [None] * len(pairs)
    return assemble(
        [
            Row(tuple(prompt), f"prompt {prompt}", wants_states=wanted)
            for (prompt, _), wanted in zip(pairs, wants, strict=True)
        ],
        [completion(prompt, response, spec) for prompt, response in pairs],
        batch_size=torch.Size((len(pairs),) if shape is None else shape),
        keys=OutputKeys(**{**NAMES, **keys}),
        hidden=spec,
        hidden_size=HIDDEN_SIZE,
        logits=None,
        pad_id=PAD_ID if padded else None,
        device=device,
    )


def flat(out: TensorDictBase) -> list[TensorDictBase]:
    return [row for part in out.unbind(0) for row in flat(part)] if out.ndim else [out]


def assert_one_block(mask: torch.Tensor) -> None:
    changes = mask.int().diff().abs().sum()
    assert mask.any()
    assert changes <= (0 if mask[0] and mask[-1] else 1 if mask[0] or mask[-1] else 2)


def assert_row(row: TensorDictBase, prompt: list[int], response: list[int], left: int = 0, right: int = 0) -> None:
    """Check one row, which has ``left`` pads before the prompt and ``right`` pads after the response."""
    tokens, masks, log_probs, text = (row[key] for key in ("tokens", "masks", "log_probs", "text"))
    assert tokens.prompt.tolist() == [PAD_ID] * left + prompt
    assert tokens.response.tolist() == response + [PAD_ID] * right
    assert tokens.full.tolist() == [PAD_ID] * left + prompt + response + [PAD_ID] * right
    assert tokens.full.dtype == torch.int64
    assert tokens.padded is masks.padded is log_probs.padded
    real = [False] * left + [True] * len(prompt + response) + [False] * right
    assert masks.all_attention_mask.tolist() == real
    assert masks.all_attention_mask.dtype == masks.all_assistant_mask.dtype == torch.bool
    assistant = [False] * (left + len(prompt)) + [True] * len(response) + [False] * right
    assert masks.all_assistant_mask.tolist() == assistant
    assert_one_block(masks.all_attention_mask)
    assert_one_block(masks.all_assistant_mask)
    measured = [log_prob_of(i) for i in response]
    assert log_probs.prompt is None
    assert log_probs.full.dtype == torch.float32
    assert log_probs.full.isnan().tolist() == [not here for here in assistant]
    assert log_probs.full[masks.all_assistant_mask].tolist() == measured
    assert log_probs.response[: len(response)].tolist() == measured
    assert all(math.isnan(value) for value in log_probs.response[len(response) :].tolist())
    assert (text.prompt, text.response) == (f"prompt {prompt}", f"answer {response}")
    assert text.full == text.prompt + text.response
    assert row["weight_version"] == f"v{len(prompt)}"
    assert row["finish_reason"] == ("stop" if response[-1] == PAD_ID else "length")
    for index, segment in enumerate(SEGMENTS):
        assert getattr(row["hidden_states"], segment).tolist() == [sum(prompt) + index / 4] * HIDDEN_SIZE
        count = getattr(row["hidden_states"], f"{segment}_count")
        assert (count.dtype, int(count)) == (torch.int64, len(Segment(segment).positions(len(prompt), len(response))))


ids = st.lists(st.integers(0, 9), min_size=1, max_size=6)  # PAD_ID among them, anywhere: a genuine EOS is data
SHAPES = [(), (1,), (3,), (2, 3), (1, 1), (2, 1, 2)]


@given(shape=st.sampled_from(SHAPES), padded=st.booleans(), data=st.data())
def test_any_lengths_shape_and_padding(shape: tuple[int, ...], padded: bool, data: st.DataObject) -> None:
    num_rows = math.prod(shape)
    pairs = data.draw(st.lists(st.tuples(ids, ids), min_size=num_rows, max_size=num_rows))
    out = assembled(pairs, shape, padded=padded)
    assert out.batch_size == torch.Size(shape)
    wide_prompt, wide_response = (max(map(len, column)) for column in zip(*pairs, strict=True))
    for row, (prompt, response) in zip(flat(out), pairs, strict=True):
        left = wide_prompt - len(prompt) if padded else 0
        right = wide_response - len(response) if padded else 0
        assert_row(row, prompt, response, left, right)
        assert row["tokens"].padded is padded
    if padded:
        assert out["tokens"].full.shape == (*shape, wide_prompt + wide_response)
    assert out["hidden_states"].response.shape == (*shape, HIDDEN_SIZE)
    assert out["hidden_states"].response_count.shape == shape


RAGGED = [([3, 4, 5], [6, PAD_ID]), ([PAD_ID, 7], [8, 9, PAD_ID, 2]), ([2], [PAD_ID])]


def test_padded_and_unpadded_hold_the_same() -> None:
    bare, padded = assembled(RAGGED), assembled(RAGGED, padded=True)
    for one, other in zip(bare.unbind(0), padded.unbind(0), strict=True):
        mask = other["masks"].all_attention_mask
        assert one["tokens"].full.tolist() == other["tokens"].full[mask].tolist()
        assert torch.equal(one["log_probs"].full.nan_to_num(7), other["log_probs"].full[mask].nan_to_num(7))
        assert one["masks"].all_assistant_mask.tolist() == other["masks"].all_assistant_mask[mask].tolist()
        assert one["hidden_states"].full.equal(other["hidden_states"].full)
        assert one["text"].full == other["text"].full


def test_the_classes_are_torchrls_own() -> None:
    out = assembled(RAGGED, padded=True)
    found = {key: type(out[key]) for key in ("text", "tokens", "masks", "log_probs", "hidden_states")}
    assert found == {
        "text": Text,
        "tokens": Tokens,
        "masks": Masks,
        "log_probs": LogProbs,
        "hidden_states": HiddenStates,
    }
    assert out["text"].response == [f"answer {response}" for _, response in RAGGED]
    assert out["finish_reason"] == ["stop", "length", "stop"]


def test_ragged_leaves_come_as_lists() -> None:
    out = assembled(RAGGED)
    for key, column in ((("tokens", "prompt"), 0), (("tokens", "response"), 1)):
        assert [leaf.tolist() for leaf in out.get(key, as_list=True)] == [pair[column] for pair in RAGGED]


@pytest.mark.parametrize("padded", [True, False])
def test_calls_of_different_lengths_stack(padded: bool) -> None:
    first, second = assembled(RAGGED, padded=padded), assembled([([5] * 9, [6] * 7)] * 3, padded=padded)
    both = lazy_stack([first, second])
    assert both.batch_size == (2, 3)
    assert both[1]["tokens"].get("full", as_list=True)[0].tolist() == [5] * 9 + [6] * 7
    assert both["hidden_states"].response.shape == (2, 3, HIDDEN_SIZE)
    assert both[0, 1]["tokens"].prompt.tolist()[-2:] == RAGGED[1][0]
    assert torch.cat([first, second])["hidden_states"].prompt.shape == (6, HIDDEN_SIZE)


@pytest.mark.parametrize("segments", [("response",), ("prompt", "full"), SEGMENTS])
def test_segments_that_were_not_asked_for_are_none(segments: Any) -> None:
    hidden = assembled(RAGGED, spec=HiddenSpec(segments))["hidden_states"]
    for segment in SEGMENTS:
        assert (getattr(hidden, segment) is not None) is (segment in segments)
        assert (getattr(hidden, f"{segment}_count") is not None) is (segment in segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_states_in_the_dtype_of_the_spec(dtype: torch.dtype) -> None:
    hidden = assembled(RAGGED, spec=HiddenSpec(SEGMENTS, dtype=dtype))["hidden_states"]
    assert {getattr(hidden, segment).dtype for segment in SEGMENTS} == {dtype}
    assert hidden.prompt_count.dtype == torch.int64


def test_a_state_that_a_narrow_dtype_cannot_hold_is_said() -> None:
    pairs = [([70000], [7])]
    hidden = assembled(pairs, spec=HiddenSpec(("prompt",)))["hidden_states"]
    assert hidden.prompt.max() > 65504, "the case is one"
    with pytest.raises(InputError, match=r"'prompt' has a state of 70000, over 65504.*torch\.float32"):
        assembled(pairs, spec=HiddenSpec(("prompt",), dtype=torch.float16))


def test_tensors_go_to_the_device() -> None:
    out = assembled(RAGGED, padded=True, device=torch.device("meta"))
    leaves = [leaf for row in out.unbind(0) for leaf in row.values(True, True) if isinstance(leaf, torch.Tensor)]
    assert len(leaves) >= 3 * 12
    assert {leaf.device.type for leaf in leaves} == {"meta"}
    assert out[0]["text"].response == "answer [6, 1]"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "history"])
def test_a_key_set_to_none_is_left_out(name: str) -> None:
    out = assembled(RAGGED, spec=EVERYTHING, **{name: None})
    assert set(out.keys()) == WRITTEN - {name}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "history"])
def test_keys_may_be_others_and_nested(name: str) -> None:
    out = assembled(RAGGED, spec=EVERYTHING, **{name: ("deep", "er", name)})
    assert set(out.keys()) == {"deep", *WRITTEN} - {name}
    assert set(out["deep", "er"].keys()) == {name}


def test_no_log_probs_no_key() -> None:
    bare = [Completion((5,), (6,), "six", None, {}, "length", "v")]
    out = assemble(
        [Row((5,), "five")],
        bare,
        batch_size=torch.Size((1,)),
        keys=OutputKeys(**NAMES),
        hidden=None,
        hidden_size=HIDDEN_SIZE,
        logits=None,
        pad_id=None,
        device=None,
    )
    assert set(out.keys()) == WRITTEN - {"log_probs", "hidden_states", "token_hidden_states"}


def test_a_chat_grows_by_the_response() -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    history = History.from_chats([chat])[0]
    out = assemble(
        [Row((5,), "five", history)],
        [completion([5], [6])],
        batch_size=torch.Size(()),
        keys=OutputKeys(**NAMES),
        hidden=ALL,
        hidden_size=HIDDEN_SIZE,
        logits=None,
        pad_id=None,
        device=None,
    )["history"]
    assert isinstance(out, ChatHistory)
    assert out.prompt.shape == (2,)
    assert (out.response.shape, out.response.role, out.response.content) == ((1,), ["assistant"], ["answer [6]"])
    assert (out.full.role, out.full.content) == (["system", "user", "assistant"], ["be brief", "hi", "answer [6]"])
    assert history.shape == (2,), "the input's history is as it was"


# --- spans and layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (1, 2)])
@pytest.mark.parametrize("layers", [-1, (2,), (0, 1, -1)])
def test_spans_stand_under_their_names(shape: tuple[int, ...], layers: Any) -> None:
    spec = HiddenSpec(("prompt",), layers=layers, dtype=torch.float64, spans=EVERYTHING.spans)
    out = assembled(RAGGED[: math.prod(shape)], shape, spec=spec)
    for place, name in enumerate(("tail", "head")):
        vectors, counts = out["hidden_states", "spans", name], out["hidden_states", "span_counts", name]
        assert (vectors.shape, vectors.dtype) == ((*shape, *shape_of(spec)), torch.float64)
        assert (vectors == 9.5).all()
        assert (counts.shape, counts.dtype) == (shape, torch.int64)
        assert (counts == place + 1).all()
    assert out["hidden_states"].prompt.shape == (*shape, *shape_of(spec))
    assert out["hidden_states"].spans["tail"].shape == (*shape, *shape_of(spec))


def test_spans_alone() -> None:
    hidden = assembled(RAGGED, spec=HiddenSpec((), spans=EVERYTHING.spans))["hidden_states"]
    assert (hidden.prompt, hidden.response, hidden.full, hidden.prompt_count) == (None, None, None, None)
    assert set(hidden.spans.keys()) == {"tail", "head"}
    assert assembled(RAGGED)["hidden_states"].spans is None


# --- every token's states ---------------------------------------------------------------------------------------------


@given(
    segments=st.lists(st.sampled_from(SEGMENTS), min_size=1, unique=True),
    padded=st.booleans(),
    layers=st.sampled_from([-1, (1, -1)]),
    pairs=st.lists(st.tuples(ids, ids), min_size=1, max_size=4),
)
def test_token_states_stand_beside_their_tokens(
    segments: Any, padded: bool, layers: Any, pairs: list[tuple[list[int], list[int]]]
) -> None:
    spec = HiddenSpec(tuple(segments), layers=layers, tokens=True, dtype=torch.float64)
    out = assembled(pairs, padded=padded, spec=spec)
    for row, (prompt, response) in zip(flat(out), pairs, strict=True):
        states, tokens, masks = row["token_hidden_states"], row["tokens"], row["masks"]
        assert isinstance(states, TokenHiddenStates)
        num_prompt, num_read = len(prompt), len(prompt) + len(response) - 1
        positions = {"prompt": (0, num_prompt), "response": (num_prompt - 1, num_read), "full": (0, num_read)}
        attention = masks.all_attention_mask
        real = {
            "prompt": attention[: len(tokens.prompt)],
            "response": masks.all_assistant_mask[len(tokens.prompt) :],
            # Of tokens that another one follows.
            "full": attention[:-1] & attention[1:],
        }
        for segment in SEGMENTS:
            found = getattr(states, segment)
            if segment not in segments:
                assert found is None
                continue
            assert (found.dtype, found.shape[1:]) == (torch.float64, shape_of(spec))
            assert len(found) == len(getattr(tokens, segment)) - (segment == "full")
            expected = torch.stack([row_at(prompt, p, spec) for p in range(*positions[segment])])
            assert found[real[segment]].equal(expected.double())
            assert (found[~real[segment]] == 0).all()


def test_states_of_tokens_only() -> None:
    out = assembled(RAGGED, spec=HiddenSpec(("response",), None, tokens=True), hidden_states=None)
    assert "hidden_states" not in out
    lengths = [len(rows) for rows in out.get(("token_hidden_states", "response"), as_list=True)]
    assert lengths == [len(response) for _, response in RAGGED]


def test_the_fields_of_tokens_do_not_share_memory() -> None:
    source = completion([3, 4], [5, 6], EVERYTHING)
    out = assemble(
        [Row((3, 4), "")] * 2,
        [source] * 2,
        batch_size=torch.Size((2,)),
        keys=OutputKeys(**NAMES),
        hidden=EVERYTHING,
        hidden_size=HIDDEN_SIZE,
        logits=None,
        pad_id=None,
        device=None,
    )
    out[0]["token_hidden_states"].full.zero_()
    assert source.token_rows is not None
    for rows in (source.token_rows.rows_ND, out[0]["token_hidden_states"].prompt, out[1]["token_hidden_states"].full):
        assert (rows != 0).any()


@pytest.mark.parametrize("padded", [True, False])
def test_rows_that_are_not_all_of_a_field_are_none_of_it(padded: bool) -> None:
    """Of a row with an error, one field may be there and another not."""
    spec = HiddenSpec(SEGMENTS, tokens=True)
    of_response = completion([3, 4, 7], [5, 6], HiddenSpec(("response",), tokens=True))
    out = assemble(
        [Row((3, 4, 7), "")],
        [replace(of_response, error=RequestAbortedError("row 0: gone"))],
        batch_size=torch.Size(()),
        keys=OutputKeys(**NAMES),
        hidden=spec,
        hidden_size=HIDDEN_SIZE,
        logits=None,
        pad_id=PAD_ID if padded else None,
        device=None,
    )
    states = out["token_hidden_states"]
    assert states.response.equal(torch.stack([row_at([3, 4, 7], position, spec) for position in (2, 3)]))
    assert [len(states.prompt), len(states.full)] == ([3, 4] if padded else [0, 0])
    assert torch.cat([states.prompt, states.full]).isnan().all()


@pytest.mark.parametrize("padded", [True, False])
def test_everything_stacks_and_goes_to_a_memory_map(padded: bool, tmp_path: Path) -> None:
    first = assembled(RAGGED, spec=EVERYTHING, padded=padded)
    second = assembled([([5] * 9, [6] * 7)] * 3, spec=EVERYTHING, padded=padded)
    both = lazy_stack([first, second])
    assert both["hidden_states", "spans", "tail"].shape == (2, 3, 2, HIDDEN_SIZE)
    assert both[1, 0]["token_hidden_states"].prompt.shape == (9, 2, HIDDEN_SIZE)
    for row in flat(both):
        kept = row.to_tensordict().memmap(str(tmp_path / str(id(row))))
        again = TensorDict.load_memmap(str(tmp_path / str(id(row))))
        for key in (("token_hidden_states", "full"), ("hidden_states", "spans", "head"), ("hidden_states", "prompt")):
            assert again[key].equal(row[key])
            assert kept[key].equal(row[key])
    if padded:
        dense = torch.stack(list(first.unbind(0)))
        assert dense["token_hidden_states"].full.shape == (3, 6, 2, HIDDEN_SIZE)
        assert torch.cat([first, first])["hidden_states", "span_counts", "head"].tolist() == [2] * 6


@pytest.mark.parametrize("padded", [True, False])
def test_rows_that_want_no_states(padded: bool) -> None:
    wants = [True, False, None]
    out = assembled(RAGGED, spec=EVERYTHING, padded=padded, wants_states=wants)
    for row, wanted, (prompt, response) in zip(flat(out), wants, RAGGED, strict=True):
        states, tokens = row["hidden_states"], row["token_hidden_states"]
        for segment in SEGMENTS:
            assert getattr(states, segment).isnan().all() == (wanted is False)
            assert (getattr(states, f"{segment}_count") == 0) == (wanted is False)
            assert getattr(states, segment).shape == shape_of(EVERYTHING)
        for name in EVERYTHING.spans:
            assert states.spans[name].isnan().all() == (wanted is False)
            assert (states.span_counts[name] == 0) == (wanted is False)
        if wanted is False:
            assert tokens.full.shape[1:] == shape_of(EVERYTHING)
            assert len(tokens.full) == (3 + 4 - 1 if padded else 0)
            assert tokens.full.isnan().all()
        else:
            assert tokens.full.isfinite().all()
            assert len(tokens.prompt) == (3 if padded else len(prompt))
            assert len(tokens.response) == (4 if padded else len(response))
    none = assembled(RAGGED, spec=EVERYTHING, padded=padded, wants_states=[False] * 3)
    assert none["hidden_states"].response.shape == (3, *shape_of(EVERYTHING))


# --- prompts that were only read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False])
def test_no_response_is_no_tokens(padded: bool) -> None:
    spec = HiddenSpec(("prompt",), tokens=True)
    history = History.from_chats([[{"role": "user", "content": "hi"}]])[0]
    out = assemble(
        [Row((3, 4), "w", history), Row((5,), "w", history)],
        [completion(ids, [], spec) for ids in ([3, 4], [5])],
        batch_size=torch.Size((2,)),
        keys=OutputKeys(**NAMES),
        hidden=spec,
        hidden_size=HIDDEN_SIZE,
        logits=None,
        pad_id=PAD_ID if padded else None,
        device=None,
    )
    for row, prompt in zip(flat(out), ([3, 4], [5]), strict=True):
        left = 2 - len(prompt) if padded else 0
        assert row["tokens"].response.shape == row["log_probs"].response.shape == (0,)
        assert row["tokens"].response.dtype == torch.int64
        assert row["tokens"].full.tolist() == row["tokens"].prompt.tolist() == [PAD_ID] * left + prompt
        assert not row["masks"].all_assistant_mask.any()
        assert row["masks"].all_attention_mask.tolist() == [False] * left + [True] * len(prompt)
        assert row["log_probs"].full.isnan().tolist() == [True] * (left + len(prompt))
        assert row["token_hidden_states"].prompt.shape == (left + len(prompt), HIDDEN_SIZE)


# --- scored sequences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False])
def test_a_scored_sequence_has_a_state_for_every_token(padded: bool) -> None:
    spec = HiddenSpec(("prompt",), layers=(0, -1), tokens=True, spans={"tail": LastTokens(1, "prompt")})
    placements = [(False, True, True, False), (True, True, True, True)]
    sequences = [[3, 4], [5, 6, 7, 8]]
    out = assemble_scores(
        [Row(tuple(ids), "", placement=place) for ids, place in zip(sequences, placements, strict=True)],
        [completion(ids, [9], spec) for ids in sequences],
        batch_size=torch.Size((2,)),
        keys=OutputKeys(**{**NAMES, "finish_reason": None, "mixed_weights": None}),
        hidden=spec,
        hidden_size=HIDDEN_SIZE,
        logits=None,
        pad_id=PAD_ID if padded else None,
        device=None,
    )
    for row, sequence, placement in zip(flat(out), sequences, placements, strict=True):
        states = row["token_hidden_states"]
        assert (states.prompt, states.response) == (None, None)
        expected = torch.stack([row_at(sequence, position, spec) for position in range(len(sequence))])
        if padded:
            real = torch.tensor(placement)
            assert (states.full[~real] == 0).all()
            assert states.full[real].equal(expected)
        else:
            assert states.full.equal(expected)
        hidden = row["hidden_states"]
        assert (hidden.full.shape, hidden.full_count) == ((2, HIDDEN_SIZE), len(sequence))
        assert hidden.spans["tail"].shape == (2, HIDDEN_SIZE)
        assert hidden.prompt is None
