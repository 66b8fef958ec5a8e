"""Rows of images in the server half: no token stands there, whatever number SGLang keeps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_scheduler import HIDDEN_SIZE, Req
from helpers.user_constraints import FAR, Tell
from stand_ins import answer_of

from torchrl_sglang_hidden import ActionMask, LogitsSpec
from torchrl_sglang_hidden.protocol import digest_prompt, unpack_answer
from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.server import plugin
from torchrl_sglang_hidden.server.capture import Capture
from torchrl_sglang_hidden.server.images import (
    EMBEDDINGS_MODULE,
    around_clear_preprocessed,
    around_pad_value,
    around_retracted_positions,
    image_token_of,
    tokens_of_prompt,
)
from torchrl_sglang_hidden.server.prompt_logits import prompt_logits_of
from torchrl_sglang_hidden.server.taken_logits import PromptPiece
from torchrl_sglang_hidden.server.token_rows import PromptPart

VOCAB, IMAGE = 96, 95
# What SGLang keeps at the rows of an image.
PAD = 3_170_495_106_366_524_576
PADDED = [7, PAD, PAD, 8, 9]
WRITTEN = [7, IMAGE, IMAGE, 8, 9]


def image_request(written: list[int] = WRITTEN, **wanted: Any) -> Any:
    req = Req(list(PADDED), logits=WantedLogits(**wanted) if wanted else None)
    req.origin_input_ids_unpadded = written
    req.multimodal_inputs = SimpleNamespace(mrope_positions=None)
    req.vocab_size = VOCAB
    return req


def test_what_a_prompt_says() -> None:
    assert tokens_of_prompt(Req([7, 8])) == ([7, 8], frozenset())
    assert tokens_of_prompt(image_request()) == (WRITTEN, {1, 2})
    # Where SGLang expands an image by itself.
    assert tokens_of_prompt(image_request([7, IMAGE, 8, 9])) == ([7, 0, 0, 8, 9], {1, 2})


@pytest.mark.parametrize("written", [WRITTEN, [7, IMAGE, 8, 9]])
def test_the_answer_says_which_prompt_was_computed(written: list[int]) -> None:
    """Those of two ways to expand an image alike, and of no other tokens."""
    capture = Capture()
    req, plain = image_request(written, entropy=True), Req([7, 8], logits=WantedLogits(entropy=True))
    for one in (req, plain):
        capture.open(one)
        one.is_finished = True
    found, none = (unpack_answer(answer_of(capture, one), "row 0", HIDDEN_SIZE).prompt_digest for one in (req, plain))
    assert none is None
    assert found == digest_prompt(WRITTEN, {1, 2}) == digest_prompt([7, 0, 5, 8, 9], {1, 2})
    others = [([7, IMAGE, IMAGE, 9, 8], {1, 2}), (WRITTEN, {2, 3}), (WRITTEN[:-1], {1, 2}), (WRITTEN, set())]
    assert found not in [digest_prompt(*other) for other in others]


@pytest.mark.parametrize(
    ("config", "reads", "found"),
    [
        ({"image_token_id": 95}, True, 95),
        ({"image_token_index": 94}, True, 94),
        ({"image_token_id": None, "image_token_index": 94}, True, 94),
        ({}, True, None),
        ({"image_token_id": 95}, False, None),
    ],
)
def test_the_placeholder_of_a_model(config: dict[str, Any], reads: bool, found: int | None) -> None:
    model = SimpleNamespace(is_image_understandable_model=reads, hf_config=SimpleNamespace(**config))
    assert image_token_of(model) == found


def scored(first: int, count: int, **wanted: Any) -> tuple[RequestLogits, PromptPiece]:
    """Return the logits of a scored prompt as the capture tracks them, and some of its tokens."""
    capture = Capture()
    req = image_request(prompt_from=1, scored=True, **wanted)
    one = capture.open(req)
    assert one is not None
    part = PromptPart(row=0, offset=0, first=1, stop=5, logits=one.logits)
    return one.logits, PromptPiece(part, first, count)


@pytest.mark.parametrize(("first", "count"), [(1, 4), (1, 1), (2, 2), (3, 2)])
def test_a_log_prob_is_nan_where_no_token_is(first: int, count: int) -> None:
    """A gather at what SGLang keeps there would end the scheduler."""
    constraints = (ActionMask([8, 9]),)
    _, piece = scored(first, count, constraints=constraints, response_ranges=((1, 4),))
    logits_NV = torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(first))
    found = prompt_logits_of((piece,), logits_NV)
    assert found.log_probs_S is not None
    for row, place in enumerate(range(first, first + count)):
        if place in (1, 2):
            assert found.log_probs_S[row].isnan()
            continue
        # The constraints act on token 3 alone, the last of the response.
        row_V = logits_NV[row]
        expected = (row_V[[8, 9]] if place == 3 else row_V).log_softmax(-1)[0 if place == 3 else 9]
        torch.testing.assert_close(found.log_probs_S[row], expected)


def test_two_prompts_in_one_call_of_the_head() -> None:
    _, piece = scored(1, 4, constraints=(ActionMask([8, 9]),), response_ranges=((3, 5),))
    found = prompt_logits_of((piece, piece), torch.randn(8, VOCAB))
    assert found.log_probs_S is not None
    assert found.log_probs_S.isnan().tolist() == [True, True, False, False] * 2


def test_nothing_is_constrained_where_no_token_is() -> None:
    _, piece = scored(1, 4, constraints=(ActionMask([8]),), response_ranges=((1, 4),))
    logits_NV = torch.zeros(4, VOCAB)
    logits_NV[:2, 8] = -torch.inf  # else the mask would leave nothing there
    found = prompt_logits_of((piece,), logits_NV)
    assert found.choosable_N is not None
    assert found.choosable_N.all()
    assert found.log_probs_S is not None
    assert found.log_probs_S[2] == 0


def test_logits_are_of_every_row() -> None:
    _, piece = scored(1, 4, spec=LogitsSpec(top_k=1, segments=("prompt",)))
    logits_NV = torch.randn(4, VOCAB)
    [(_, columns)] = prompt_logits_of((piece,), logits_NV).columns
    torch.testing.assert_close(columns.values_NC[:, 0], logits_NV.amax(-1))


def test_constraints_see_placeholders() -> None:
    logits, piece = scored(3, 2, constraints=(Tell(),), response_ranges=((3, 5),))
    assert logits.prompt_ids == WRITTEN
    found = prompt_logits_of((piece,), torch.zeros(2, VOCAB))
    assert found.log_probs_S is not None
    # The prompt before the response ends with a row of an image.
    told = (torch.tensor([0, 128, 3, IMAGE, 0, -1, -1, 0]) - FAR).float()
    row_V = torch.cat([told, torch.zeros(VOCAB - 8)])
    torch.testing.assert_close(found.log_probs_S[0], row_V.log_softmax(-1)[8])


def test_a_processor_around_another_empties_its_cache() -> None:
    cleared: list[Any] = []
    plain = SimpleNamespace(mm_preprocess_cache={})
    for processor in (plain, SimpleNamespace(inner=plain)):
        around_clear_preprocessed(cleared.append, processor)
    assert cleared == [plain, plain]


def extend(positions: torch.Tensor, num_output: int) -> torch.Tensor:
    """Append positions as SGLang does, from the first axis of the last row on."""
    if num_output <= 0:
        return positions
    start = int(positions[0, -1]) + 1
    return torch.cat([positions, torch.arange(start, start + num_output).expand(3, -1)], dim=1)


@pytest.mark.parametrize("text", [0, 2])
def test_a_retracted_response_goes_on_behind_the_image(text: int) -> None:
    """One row of text, and an image of two lines of three: a response is at 4 and on, or behind the text behind it."""
    image = torch.tensor([[1] * 6, [1, 1, 1, 2, 2, 2], [1, 2, 3, 1, 2, 3]])
    positions = torch.cat([torch.zeros(3, 1, dtype=torch.int64), image, torch.arange(4, 4 + text).expand(3, -1)], 1)
    kept = positions.clone()
    once = around_retracted_positions(extend, positions, 2)
    assert once[:, 7 + text :].tolist() == [[4 + text, 5 + text]] * 3
    # SGLang appends at every match, to what is there.
    twice = around_retracted_positions(extend, once, 3)
    assert twice[:, 7:].tolist() == [list(range(4, 9 + text))] * 3
    assert torch.equal(twice[:, : 7 + text], kept)
    assert torch.equal(positions, kept)
    assert around_retracted_positions(extend, positions, 0) is positions


class Item:
    """SGLang's image, as far as its hash goes: one of the pixels without their shape."""

    def __init__(self, pixels: torch.Tensor, **specific: Any) -> None:
        self.feature, self.model_specific_data = pixels, specific
        self.hash: int | None = None
        self.pad_value: int | None = None

    def set_hash(self, value: int) -> None:
        self.hash, self.pad_value = value, 10**6 + value % 2**62

    def set_pad_value(self) -> None:
        if self.pad_value is None:
            self.set_hash(int(self.feature.sum()))


def padded(pixels: torch.Tensor, **specific: Any) -> Item:
    item = Item(pixels, **specific)
    for _ in range(2):  # SGLang sets it at several places
        around_pad_value(Item.set_pad_value, item)
    return item


def test_images_of_other_shapes_are_other_images() -> None:
    one = torch.ones(8, 3)
    grids = [torch.tensor([[1, 2, 4]]), torch.tensor([[1, 4, 2]])]
    lying, standing, again = (padded(one, image_grid_thw=grid) for grid in (*grids, grids[0]))
    assert lying.pad_value == again.pad_value != standing.pad_value
    assert padded(one.reshape(3, 8)).pad_value != padded(one).pad_value
    assert 0 <= (lying.hash or -1) < 2**64
    # A hash that the caller gave is the caller's to answer for.
    given = Item(one, image_grid_thw=grids[0])
    given.set_hash(5)
    around_pad_value(Item.set_pad_value, given)
    assert given.hash == 5


@pytest.mark.parametrize(
    ("event", "left"),
    [
        (lambda: plugin.after_weight_version(None, None, new_version="v2"), 0),
        (lambda: plugin.after_flush_cache(True, None), 0),
        (lambda: plugin.after_flush_cache(False, None), 1),
    ],
    ids=["weights", "flushed", "refused"],
)
def test_what_the_tower_made_of_images_goes_with_its_weights(
    event: Callable[[], None], left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang keeps it by the image's hash, and would give the old tower's rows to the new weights."""
    monkeypatch.setattr(plugin, "_capture", Capture())
    cache = {7: "rows"}
    monkeypatch.setitem(sys.modules, EMBEDDINGS_MODULE, SimpleNamespace(embedding_cache=cache))
    event()
    assert len(cache) == left
    monkeypatch.setitem(sys.modules, EMBEDDINGS_MODULE, SimpleNamespace(embedding_cache=None))
    event()
    monkeypatch.delitem(sys.modules, EMBEDDINGS_MODULE)
    event()
