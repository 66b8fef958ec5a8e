"""Images in a request: what must not be sent, what is sent, and what is read of the rows where no token is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.fake_engine import (
    ALL_SEGMENTS,
    Answer,
    RecordingEngine,
    log_prob_of,
    make_info,
    pooled_D,
    states_ND,
)
from helpers.fake_images import IMAGE_ID, IMAGE_ROWS, images_in, seen_ids

from torchrl_sglang_hidden import ActionMask, AlignmentError, CapabilityError, HiddenSpec, LogitsSpec
from torchrl_sglang_hidden.engines.resuming import rest_of
from torchrl_sglang_hidden.engines.samples import generate_samples
from torchrl_sglang_hidden.engines.sharing import LoadSharing
from torchrl_sglang_hidden.errors import InputError, InputTypeError, PromptLengthError, SGLangHiddenError
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.records import Images, Request
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.spec.hidden import Segment

CAT, DOG = "data:image/png;base64,Y2F0", "data:image/jpeg;base64,ZG9n"
SENT = (7, IMAGE_ID, 8, 9, IMAGE_ID, 3)
TWO = images_in(SENT, (CAT, DOG))
PLAIN = Request((7, 8, 9))
READS = {"takes_images": True, "image_token_id": IMAGE_ID}
INFO = make_info(**READS)
ALL = HiddenSpec(ALL_SEGMENTS)
# The placeholder's id, but inside an image, as Pixtral's breaks are.
BREAK = 5


def images(**changes: Any) -> Request:
    assert TWO.images is not None
    return replace(TWO, images=replace(TWO.images, **changes))


def test_an_expanded_prompt_and_its_rows() -> None:
    assert TWO.prompt_ids == (7, *(IMAGE_ID,) * 3, 8, 9, *(IMAGE_ID,) * 3, 3)
    assert TWO.image_rows == (1, 2, 3, 6, 7, 8)
    assert PLAIN.image_rows == ()
    with_break = replace(TWO, prompt_ids=(7, IMAGE_ID, BREAK, IMAGE_ID, *TWO.prompt_ids[4:]))
    assert with_break.image_rows == (1, 3, 6, 7, 8)
    check_requests([TWO, with_break, PLAIN], INFO)


def test_what_is_sent() -> None:
    payload = to_payload([PLAIN, TWO], INFO, binary=False)
    assert payload["input_ids"] == [[7, 8, 9], list(SENT)]
    # SGLang takes the first entry for the kind of all.
    assert payload["image_data"] == [[], [CAT, DOG]]
    assert "image_data" not in to_payload([PLAIN], INFO, binary=False)


def test_positions_and_room_count_the_rows() -> None:
    scored = replace(TWO, score_prompt=True, score_from=6, sampling={"max_new_tokens": 0})
    assert to_payload([scored], INFO, binary=False)["logprob_start_len"] == [5]
    long = replace(images_in(SENT, (CAT, DOG), rows=25), sampling={"max_new_tokens": 9})
    assert to_payload([long], INFO, binary=False)["sampling_params"][0]["max_new_tokens"] == 58 - 54
    with pytest.raises(PromptLengthError, match="row 0: the prompt has 60 tokens, over the engine's limit of 58"):
        check_requests([images_in(SENT, (CAT, DOG), rows=28)], INFO)


WRONG: dict[str, tuple[Request, Any, type[SGLangHiddenError], str]] = {
    "a model that reads none": (
        TWO,
        make_info(),
        CapabilityError,
        r"row 1: 2 images for the model 'recorder', which reads none; serve a",
    ),
    "too many": (
        TWO,
        make_info(**READS, max_images=1),
        InputError,
        r"row 1: 2 images, over the server's limit of 1 .*--limit-mm-data-per-request",
    ),
    "an image too few": (images(data=(CAT,)), INFO, InputError, r"row 1: 2 placeholders \(id 95\).*, 1 images and 2"),
    "an image too many": (images(data=(CAT,) * 3), INFO, InputError, r"row 1: 2 placeholders .*, 3 images and 2"),
    "a range too few": (images(ranges=((1, 4),)), INFO, InputError, r"2 images and 1 ranges"),
    "a placeholder too few": (images(sent_ids=(7, 8, 9, IMAGE_ID, 3)), INFO, InputError, r"row 1: 1 placeholders"),
    "expanded ids as sent": (images(sent_ids=TWO.prompt_ids), INFO, InputError, r"row 1: 6 placeholders"),
    "no image at all": (
        replace(PLAIN, images=Images((7, 8, 9), (), (), IMAGE_ID)),
        INFO,
        InputError,
        r"row 1: 0 placeholders .*at least 1, or images=None",
    ),
    "another model's placeholder": (
        TWO,
        make_info(takes_images=True, image_token_id=94),
        InputError,
        r"row 1: the placeholder is id 95, and the model's is 94",
    ),
    "a URL": (images(data=(CAT, "https://a.b/c.png")), INFO, InputError, r"row 1, image 1: 'https://a.*data:image/png"),
    "a path": (images(data=("/etc/passwd", DOG)), INFO, InputError, r"row 1, image 0: '/etc/passwd' is no data URI"),
    "a video": (images(data=(CAT, "data:video/mp4;base64,AAAA")), INFO, InputError, r"image 1: .* is no data URI"),
    "an empty URI": (images(data=(CAT, "data:image/png;base64,")), INFO, InputError, r"image 1: .* is no data URI"),
    "bytes": (images(data=(CAT, b"png")), INFO, InputTypeError, r"row 1, image 1: a bytes; expected a data URI"),
    "a range beyond": (images(ranges=((1, 4), (6, 11))), INFO, InputError, r"image 1 has the rows 6\.\.10 of a .* 10"),
    "an empty range": (images(ranges=((1, 1), (6, 9))), INFO, InputError, r"image 0 has the rows 1\.\.0"),
    "ranges out of order": (images(ranges=((6, 9), (1, 4))), INFO, InputError, r"from position 0 to the next image"),
    "a range without rows": (images(ranges=((1, 4), (4, 6))), INFO, InputError, r"image 1 has the rows 4\.\.5"),
    "a range too short": (images(ranges=((1, 3), (6, 9))), INFO, InputError, r"from position 3 to the next image"),
    "other ids around": (images(sent_ids=(6, *SENT[1:])), INFO, InputError, r"1 ids from position 0 .* expand"),
    "other ids behind": (images(sent_ids=(*SENT, 4)), INFO, InputError, r"1 ids from position 9 .* sent one 2"),
    "a placeholder without an image": (
        replace(PLAIN, prompt_ids=(7, IMAGE_ID, 9)),
        INFO,
        InputError,
        r"row 1: position 1 of the prompt is the placeholder of an image \(id 95\), and there are 0 images; pass the",
    ),
    "a response of an image": (
        replace(TWO, score_prompt=True, constraints=(ActionMask([3]),), response_ranges=((3, 6),)),
        INFO,
        InputError,
        r"row 1: the response range \(3, 6\) has rows of an image",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_must_not_be_sent(case: str) -> None:
    bad, info, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        check_requests([PLAIN, bad], info)


def test_a_text_model_may_have_any_id() -> None:
    check_requests([replace(PLAIN, prompt_ids=(7, IMAGE_ID, 9))], make_info())
    check_requests([replace(PLAIN, prompt_ids=(7, IMAGE_ID, 9))], make_info(takes_images=True))


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_states_and_log_probs_are_of_all_rows(stock: bool, binary: bool) -> None:
    engine = RecordingEngine(**READS, binary=binary, **({"pools_in_server": False, "layers": (-1,)} if stock else {}))
    asked = [replace(one, hidden=ALL, score_prompt=True) for one in (TWO, PLAIN, images(data=(DOG, CAT)))]
    for request, found in zip(asked, engine.generate(asked), strict=True):
        seen = seen_ids(request.prompt_ids, request.images)
        assert found.prompt_ids == request.prompt_ids
        hidden_ND = states_ND(seen, found.response_ids)
        for segment, pooled in found.hidden.items():
            expected = pooled_D(hidden_ND, Segment(segment), "mean", len(seen)).float()
            torch.testing.assert_close(pooled.vector, expected)
        assert found.prompt_log_probs_P is not None
        blank = [0, *request.image_rows]
        assert found.prompt_log_probs_P.isnan().nonzero()[:, 0].tolist() == blank
        for place, token_id in enumerate(request.prompt_ids):
            assert place in blank or found.prompt_log_probs_P[place] == log_prob_of(token_id)


@pytest.mark.parametrize("first", [0, 2, 5, 6, 9])
@pytest.mark.parametrize("constrained", [False, True])
def test_scores_from_any_row_on(first: int, constrained: bool) -> None:
    request = replace(TWO, score_prompt=True, score_from=first, sampling={"max_new_tokens": 0})
    if constrained:
        request = replace(request, constraints=(ActionMask([8, 9]),), response_ranges=((4, 6),))
    [found] = RecordingEngine(**READS).generate([request])
    assert found.prompt_log_probs_P is not None
    expected = [row in (0, *TWO.image_rows) for row in range(first, 10)]
    assert found.prompt_log_probs_P.isnan().tolist() == expected


def test_an_image_at_the_very_beginning() -> None:
    request = replace(images_in((IMAGE_ID, 8), (CAT,)), score_prompt=True)
    [found] = RecordingEngine(**READS).generate([request])
    assert found.prompt_log_probs_P is not None
    assert found.prompt_log_probs_P.isnan().tolist() == [True, True, True, False]


def give_a_token(rows: Answer) -> None:
    """Answer with a token where an image was sent."""
    rows[0]["meta_info"]["input_token_logprobs"][2][1] = 9


def take_a_token(rows: Answer) -> None:
    """Answer with a row of an image where a token was sent."""
    rows[0]["meta_info"]["input_token_logprobs"][4][1] = 0


def spoil_an_image(rows: Answer) -> None:
    """What stands at the rows of an image means nothing."""
    rows[0]["meta_info"]["input_token_logprobs"][2][0] = None
    rows[0]["meta_info"]["input_token_logprobs"][3][0] = math.inf


def test_ids_that_came_back_are_those_that_were_sent() -> None:
    engine = RecordingEngine(**READS)
    request = replace(TWO, score_prompt=True)
    for fault in (give_a_token, take_a_token):
        engine.fault = fault
        with pytest.raises(AlignmentError, match="10 log-probs for 10 input tokens, or of other ids"):
            engine.generate([request])
    engine.fault = spoil_an_image
    [found] = engine.generate([request])
    assert found.prompt_log_probs_P is not None
    assert found.prompt_log_probs_P.isnan().sum() == 7


def test_an_engine_that_expands_otherwise() -> None:
    """As where the processor at hand has other sizes than the served model's."""
    engine = RecordingEngine(**READS)
    other = images_in(SENT, (CAT, DOG), rows=IMAGE_ROWS + 1)

    for took, remedy in ((10, "use the processor"), (6, "as many as without them; write around each image")):

        def shrink(rows: Answer, took: int = took) -> None:
            rows[0]["meta_info"]["prompt_tokens"] = took

        engine.fault = shrink
        with pytest.raises(AlignmentError, match=f"images make it 12 rows, and the engine took {took}; {remedy}"):
            engine.generate([other])


OTHER_IDS = images_in((7, IMAGE_ID, 9, 8, IMAGE_ID, 3), (CAT, DOG))
SCORES = {"score_prompt": True, "constraints": (ActionMask([8, 9]),), "response_ranges": ((4, 6),)}
OTHER_PLACES = images_in((7, 8, IMAGE_ID, 9, IMAGE_ID, 3), (CAT, DOG))


@pytest.mark.parametrize("computed", [OTHER_IDS, OTHER_PLACES], ids=["ids", "places"])
@pytest.mark.parametrize("asks", [{}, {"hidden": ALL}, {"logits": LogitsSpec(top_k=2)}, {"score_prompt": True}, SCORES])
def test_an_engine_that_computes_as_many_other_ids(
    monkeypatch: pytest.MonkeyPatch, computed: Request, asks: dict[str, Any]
) -> None:
    """As where SGLang writes a prompt as text and encodes it again."""
    engine = RecordingEngine(**READS)
    request = replace(TWO, **asks)
    engine.generate([request])
    answer = engine.answer
    monkeypatch.setattr(engine, "answer", lambda payload, requests: answer(payload, [replace(computed, **asks)]))
    with pytest.raises(AlignmentError, match=r"row 0.*computed other ids around the images than the 10 of"):
        engine.generate([request])


def test_an_engine_that_does_not_say_what_it_computed() -> None:
    engine = RecordingEngine(**READS)

    def forget(rows: Answer) -> None:
        del rows[0]["meta_info"][CHANNEL][0]["prompt_digest"]

    engine.fault = forget
    with pytest.raises(AlignmentError, match=r"checksums None and \d+"):
        engine.generate([TWO])


def test_logits_of_a_prompt_are_of_all_rows() -> None:
    request = replace(TWO, logits=LogitsSpec(top_k=2, segments=("prompt",)), sampling={"max_new_tokens": 0})
    [found] = RecordingEngine(**READS).generate([request])
    assert found.prompt_logits is not None
    assert found.prompt_logits.values_NC.shape == (9, 2)
    assert found.prompt_logits.values_NC.isfinite().all()


# --- whoever makes requests of requests -------------------------------------------------------------------------------


def test_samples_keep_their_images() -> None:
    engine = RecordingEngine(**READS)
    found = generate_samples(engine, [replace(TWO, hidden=ALL), replace(PLAIN, hidden=ALL)], 2)
    assert [one.prompt_ids for one in found] == [TWO.prompt_ids] * 2 + [PLAIN.prompt_ids] * 2
    assert [payload["image_data"] for payload in engine.payloads] == [
        [[CAT, DOG], []],
        [[CAT, DOG], [CAT, DOG], [], []],
    ]


def test_a_response_is_gone_on_from_with_its_images() -> None:
    engine = RecordingEngine(**READS)
    [first] = engine.generate([TWO])
    rest = rest_of(replace(TWO, sampling={"max_new_tokens": 20}), first)
    assert rest.images is not None
    assert rest.images.sent_ids == (*SENT, *first.response_ids)
    assert (rest.images.data, rest.image_rows) == ((CAT, DOG), TWO.image_rows)
    check_requests([rest], INFO)


def test_servers_tell_images_apart() -> None:
    sharing = LoadSharing(2)
    with sharing.share([TWO, images(data=(DOG, CAT))]) as shares:
        assert shares == [[0], [1]]
    with sharing.share([images(data=(DOG, CAT)), TWO]) as shares:
        assert shares == [[1], [0]]


@pytest.mark.parametrize("later", [PLAIN, images_in((5, IMAGE_ID, 6), (DOG,))], ids=["text", "image"])
@pytest.mark.parametrize("earlier", [PLAIN, TWO], ids=["text", "image"])
def test_turns_of_a_session(earlier: Request, later: Request) -> None:
    engine = RecordingEngine(**READS)
    with engine.session() as session:
        first = session.generate(earlier)
        second = session.generate(later)
    assert second.prompt_ids == (*first.prompt_ids, *first.response_ids, *later.prompt_ids)
    payload = engine.payloads[-1]
    assert payload["input_ids"] == [list(later.prompt_ids if later.images is None else later.images.sent_ids)]
    assert payload.get("image_data", [[]]) == [[] if later.images is None else [DOG]]
