"""Images in prompts, on random Qwen2.5-VL, Qwen3-VL and Pixtral, against Hugging Face's own processors and models.

Each model has one server for the whole session, with a KV cache so small that two dozen requests do not fit, and
prompts that come in chunks of fewer rows than an image has.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from helpers.bad_link import bad_link
from helpers.completion_checks import assert_completion
from helpers.engine_contract import assert_same
from helpers.image_site import CACHE_TOKENS, END, EVERYTHING, GREEDY, MOST_IMAGES, START, ImageSite
from helpers.logits_checks import assert_choices
from helpers.request_storm import draw_request, storm
from helpers.user_constraints import Tell
from helpers.vlm_models import NUM_LAYERS, image_of
from PIL import Image as PILImage

from torchrl_sglang_hidden import (
    ActionMask,
    AlignmentError,
    EngineInfo,
    HiddenSpec,
    ImageError,
    InputError,
    LogitsSpec,
    RequestRejectedError,
    connect,
)
from torchrl_sglang_hidden.engines import endpoint
from torchrl_sglang_hidden.engines.batching import BatchingEngine
from torchrl_sglang_hidden.engines.resuming import join_completions, rest_of
from torchrl_sglang_hidden.engines.samples import generate_samples
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.sglang_api.server_info import read_info
from torchrl_sglang_hidden.spec.hidden import Pooling

STORM_CALLS = 8
UNUSED = itertools.count(20000)


@pytest.fixture
def cold(image_site: ImageSite) -> ImageSite:
    """The same, for prompts that begin as none did before."""
    return replace(image_site, first_ids=(next(UNUSED),))


def mixed(site: ImageSite, **fields: Any) -> list[Request]:
    """Return requests with 0, 1 and 2 images, of several sizes, of which the largest needs two chunks."""
    picture = site.writer.picture
    return [
        site.request("Hello there", **fields),
        site.request(picture(1), "What is this?", **fields),
        site.request("A", picture(2), "or B", picture(3, 2, 2), "?", **fields),
        site.request(picture(4, 8, 6), "Large.", **fields),
        site.request("No image here, but a longer text, which says nothing.", **fields),
        site.request(picture(5, 1, 1), picture(6, 5, 3), **fields),
    ]


def test_what_the_server_says(image_site: ImageSite) -> None:
    info = image_site.server.info
    assert (info.takes_images, info.max_images, info.image_token_id) == (
        True,
        MOST_IMAGES,
        image_site.writer.placeholder,
    )
    assert info.layers == (-1, 0, 1, 2, 3)


def test_prompts_are_those_of_the_processor(image_site: ImageSite) -> None:
    """Else the rest of this file would compare Hugging Face with itself."""
    one, two = image_site.writer.picture(1), image_site.writer.picture(2, 4, 3)
    for parts in (["Hello"], ["Hi", one, "there"], [one, two], [two, "and", one, "?"]):
        images = [part for part in parts if isinstance(part, PILImage.Image)] or None
        text = image_site.writer.text(START, *parts, END)
        made = image_site.writer.processor(text=[text], images=images)["input_ids"][0]
        assert image_site.request(*parts).prompt_ids == tuple(map(int, made))


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_states_tokens_and_log_probs(cold: ImageSite, pooling: Pooling) -> None:
    """Of every segment and layer, by token and pooled, cold and cached."""
    requests = mixed(cold, hidden=replace(EVERYTHING, pooling=pooling))
    for _ in range(2):
        cold.check(requests, cold.server.generate(requests))


def test_an_image_says_something(image_site: ImageSite) -> None:
    """Else the tests of this file would hold with the images left out, or mixed up."""
    requests = [
        image_site.request(image_site.writer.picture(seed), "?", hidden=HiddenSpec(("prompt",), "last"))
        for seed in (1, 2)
    ]
    one, other = (found.hidden["prompt"].vector for found in image_site.server.generate(requests))
    assert (one - other).norm() / one.norm() > 0.01


@pytest.mark.parametrize("first", [0, 5, 9, 20])
def test_scores(cold: ImageSite, first: int) -> None:
    requests = mixed(cold, hidden=None, score_prompt=True, score_from=first, sampling={"max_new_tokens": 0})
    requests = [request for request in requests if first < len(request.prompt_ids)]
    for _ in range(2):
        for request, found in zip(requests, cold.server.generate(requests), strict=True):
            assert_choices(request, found, cold.model_dir)
            assert found.prompt_log_probs_P is not None
            assert found.prompt_log_probs_P.isnan().sum() == sum(row >= first for row in {0, *request.image_rows})


def test_scores_under_constraints(cold: ImageSite) -> None:
    """A gather at what SGLang keeps at the rows of images would end the server."""
    ids = cold.writer.ids_of("It is a cat, and nothing else.")
    constraints = [(ActionMask([*ids, 5]),), (Tell(), ActionMask(range(40000)))]
    requests = [
        replace(
            request,
            prompt_ids=(*request.prompt_ids, *ids),
            images=None if request.images is None else request.images.followed_by(ids),
            constraints=constraints[index % 2],
            response_ranges=((len(request.prompt_ids), len(request.prompt_ids) + len(ids)),),
        )
        for index, request in enumerate(mixed(cold, hidden=None, score_prompt=True, sampling={"max_new_tokens": 0}))
    ]
    for request, found in zip(requests, cold.server.generate(requests), strict=True):
        assert_choices(request, found, cold.model_dir)


def test_constraints_on_what_is_sampled(image_site: ImageSite) -> None:
    spec = LogitsSpec(full=True, stage="processed")
    for request in mixed(
        image_site, hidden=HiddenSpec(), constraints=(Tell(), ActionMask(range(300, 400))), logits=spec
    )[:3]:
        [found] = image_site.server.generate([request])
        assert_choices(request, found, image_site.model_dir)


@pytest.mark.parametrize("spec", [LogitsSpec(full=True, segments=("prompt",)), LogitsSpec(top_k=5)], ids=["full", "k"])
def test_logits(cold: ImageSite, spec: LogitsSpec) -> None:
    requests = mixed(cold, logits=replace(spec, segments=("prompt", "response")), hidden=HiddenSpec())[:4]
    for request, found in zip(requests, cold.server.generate(requests), strict=True):
        assert_choices(request, found, cold.model_dir)


# --- the prefix cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_what_the_next_request_costs(cold: ImageSite, pooling: Pooling) -> None:
    """As much as without states: the same images again cost a token, another image what is behind it."""
    spec = HiddenSpec(("prompt", "full"), pooling, layers=(0, -1))
    picture = cold.writer.picture
    first = cold.request(picture(1), "What is this?", hidden=spec)
    assert first.images is not None
    (image_start, _), total = first.images.ranges[0], len(first.prompt_ids)

    def cached(request: Request) -> int:
        return cold.send([request])[1][0]

    assert cached(first) == 0
    assert cached(first) == total - 1
    other = cold.request(picture(2), "What is this?", hidden=spec)
    assert cached(other) <= image_start, "the same text around another image"
    assert cached(other) == total - 1
    # A group of samples.
    sampled = replace(first, sampling={"max_new_tokens": 3, "temperature": 1.0})
    assert cold.send([sampled] * 4)[1] == [total - 1] * 4
    # The next turn, with another image in it.
    [answer] = cold.send([first])[0]
    ids = (*first.images.sent_ids, *answer.response_ids)
    parts = cold.writer.request("<|im_end|>\n" + START, picture(3), "And this?", END)
    assert parts.images is not None
    shift = total + len(answer.response_ids)
    joined = replace(
        first,
        prompt_ids=(*first.prompt_ids, *answer.response_ids, *parts.prompt_ids),
        images=replace(
            first.images,
            sent_ids=(*ids, *parts.images.sent_ids),
            data=(*first.images.data, *parts.images.data),
            ranges=(*first.images.ranges, *((start + shift, stop + shift) for start, stop in parts.images.ranges)),
        ),
    )
    assert cached(joined) == total + len(answer.response_ids) - 1
    # One image of two is the same: what is before the second one.
    pair = cold.request(picture(1), picture(4), hidden=spec)
    swapped = cold.request(picture(1), picture(5), hidden=spec)
    cached(pair)
    assert swapped.images is not None
    assert 0 <= cached(swapped) <= swapped.images.ranges[1][0]


# --- the engine's ways ------------------------------------------------------------------------------------------------


def test_samples(image_site: ImageSite) -> None:
    request = image_site.request(image_site.writer.picture(1), "?", sampling={"max_new_tokens": 4, "temperature": 1.0})
    plain = image_site.request("What?", sampling={"max_new_tokens": 4, "temperature": 1.0})
    found = generate_samples(image_site.server, [request, plain], 3)
    image_site.check([request] * 3 + [plain] * 3, found)


def test_streams(image_site: ImageSite) -> None:
    request = image_site.request(image_site.writer.picture(1), "?", hidden=HiddenSpec(("full",)))
    [expected] = image_site.server.generate([request])
    stream = image_site.server.stream(request)
    assert sum((chunk.ids for chunk in stream), ()) == expected.response_ids
    assert_same(stream.completion, expected)

    async def streamed() -> Completion:
        async with await image_site.server.astream(request) as stream:
            async for _ in stream:
                pass
            return stream.completion

    assert_same(asyncio.run(streamed()), expected)


def test_sessions(image_site: ImageSite) -> None:
    """Turns with and without images, one behind the other."""
    picture = image_site.writer.picture
    turns = [[picture(1), "What?"], ["And now?"], [picture(2, 2, 2), picture(1), "?"], ["Bye."]]
    data: tuple[str, ...] = ()
    with image_site.server.session() as session:
        for parts in turns:
            request = image_site.request(*parts, hidden=EVERYTHING, score_prompt=True)
            found = session.generate(request)
            data += () if request.images is None else request.images.data
            whole = replace(request, prompt_ids=found.prompt_ids)
            truth = assert_turn(image_site, whole, found, data)
            assert list(found.response_ids) == truth


def assert_turn(site: ImageSite, whole: Request, found: Completion, data: tuple[str, ...]) -> list[int]:
    """Hold a turn against Hugging Face on the whole context; return the tokens that are best there."""
    ranges, writer = [], site.writer
    place = 0
    for uri in data:
        rows = writer.rows(uri)
        place = next(at for at in range(place, len(whole.prompt_ids)) if whole.prompt_ids[at : at + len(rows)] == rows)
        ranges.append((place, place + len(rows)))
        place += len(rows)
    sent: list[int] = []
    last = 0
    for start, stop in ranges:
        sent += [*whole.prompt_ids[last:start], writer.placeholder]
        last = stop
    images = replace(
        writer.request(image_of(data[0])).images,
        sent_ids=(*sent, *whole.prompt_ids[last:]),
        data=data,
        ranges=tuple(ranges),
    )
    request = replace(whole, images=images)
    truth = assert_completion(request, found, site.model_dir, NUM_LAYERS)
    assert_choices(replace(request, hidden=None), found, site.model_dir)
    return truth.argmax_T


def test_a_queue_and_two_servers(image_site: ImageSite) -> None:
    requests = mixed(image_site, hidden=HiddenSpec(("full",)))
    with BatchingEngine(image_site.server, max_batch_size=4) as queue:
        image_site.check(requests, queue.generate(requests))
    # One server by two addresses, which a client cannot know.
    port = urlsplit(image_site.server.url).port or 0
    with bad_link(port) as link, connect([image_site.server.url, link.url]) as both:
        image_site.check(requests, both.generate(requests))


def test_a_response_in_two_parts(image_site: ImageSite) -> None:
    request = image_site.request(image_site.writer.picture(1), "?", hidden=HiddenSpec(("full", "response")))
    [first] = image_site.server.generate([replace(request, sampling={**GREEDY, "max_new_tokens": 2})])
    [rest] = image_site.server.generate([rest_of(request, first)])
    image_site.check([request], [join_completions(request, first, rest)])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_the_server_refuses(image_site: ImageSite) -> None:
    """What only the server can find is a named error too, and the server lives."""
    good = image_site.request(image_site.writer.picture(1), "?")
    assert good.images is not None
    whole = good.images.data[0]
    for uri in (whole[: len(whole) // 2], "data:image/png;base64,AAAA"):
        with pytest.raises(RequestRejectedError, match=r"\w"):
            image_site.server.generate([replace(good, images=replace(good.images, data=(uri,)))])
    image_site.check([good], image_site.server.generate([good]))


def ends_with_image(site: ImageSite, *parts: Any, **fields: Any) -> Request:
    """Return a request whose last row is one of an image: without the token that closes it."""
    whole = site.writer.request(site.first_ids, START, *parts, **fields)
    behind = len(site.writer.ids_of(site.writer.around[1]))
    assert whole.images is not None
    images = replace(whole.images, sent_ids=whole.images.sent_ids[: len(whole.images.sent_ids) - behind])
    return replace(whole, prompt_ids=whole.prompt_ids[: len(whole.prompt_ids) - behind], images=images)


def test_a_prompt_that_ends_with_an_image(image_site: ImageSite) -> None:
    """Is right; of Qwen2.5-VL it is an error, for SGLang sees no image there."""
    request = ends_with_image(image_site, image_site.writer.picture(1), sampling=GREEDY, hidden=EVERYTHING)
    if image_site.writer.kind in ("pixtral", "qwen3_vl"):
        image_site.check([request], image_site.server.generate([request]))
        return
    with pytest.raises(AlignmentError, match="as many as without them; write around each image"):
        image_site.server.generate([request])


def test_what_is_not_sent(image_site: ImageSite) -> None:
    good = image_site.request(image_site.writer.picture(1), "?")
    assert good.images is not None
    with pytest.raises(InputError, match=f"5 images, over the server's limit of {MOST_IMAGES}"):
        image_site.server.generate([image_site.request(*[image_site.writer.picture(1)] * 5)])
    with pytest.raises(InputError, match=r"1 placeholders .* 2 images"):
        image_site.server.generate([replace(good, images=replace(good.images, data=good.images.data * 2))])
    with pytest.raises(InputError, match="is the placeholder of an image"):
        image_site.server.generate([replace(good, images=None)])


def test_a_client_that_sees_no_server_half(image_site: ImageSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """States are right of stock SGLang too, and what stands for an image is known from the model."""

    def stock_info(model: Any, server: Any, *args: Any) -> EngineInfo:
        return read_info(model, {**server, "internal_states": [{}]}, *args)

    monkeypatch.setattr(endpoint, "read_info", stock_info)
    spec = HiddenSpec(("prompt", "response", "full"), tokens=True)
    asked = [image_site.request(image_site.writer.picture(1), "Hi", hidden=spec), image_site.request("Hi", hidden=spec)]
    with connect(image_site.server.url) as stock:
        assert (stock.info.pools_in_server, stock.info.image_token_id) == (False, image_site.writer.placeholder)
        with pytest.warns(UserWarning, match="falling back to SGLang's own"):
            image_site.check(asked, stock.generate(asked))
        with pytest.raises(ImageError, match="is the placeholder of an image"):
            stock.generate([replace(asked[0], images=None)])
        assert asked[0].images is not None
        with pytest.raises(ImageError, match="is the placeholder of an image"):
            stock.generate([replace(asked[0], images=None, prompt_ids=asked[0].images.sent_ids)])


# --- a full cache -----------------------------------------------------------------------------------------------------


def retractions(site: ImageSite) -> int:
    return site.server.log_path.read_text().count("KV cache pool is full. Retract requests")


def test_rows_that_the_server_took_back_and_computed_again(image_site: ImageSite) -> None:
    """Their positions grow with every match of the prefix cache, in SGLang."""
    before = retractions(image_site)
    sampling = {"max_new_tokens": 64, "min_new_tokens": 64, "temperature": 1.0}
    # Hugging Face takes a sampled placeholder for one more image.
    sampling["logit_bias"] = {str(image_site.writer.placeholder): -100.0}
    spec = HiddenSpec(("prompt", "response", "full"), layers=(0, -1))
    writer, fields = image_site.writer, {"sampling": sampling, "hidden": spec, "return_log_probs": False}
    write: Callable[..., Request] = image_site.request
    if writer.kind == "qwen3_vl":
        # SGLang counts a response that it took back from the first axis of the last row, which is an image's here. It
        # takes few requests back, and none of those if others are among them.
        write = functools.partial(ends_with_image, image_site)
    requests = [write(f"{row}?", writer.picture(row % 3, 2, 4), **fields) for row in range(24)]
    assert sum(64 for _ in requests) > CACHE_TOKENS
    image_site.check(requests, image_site.server.generate(requests))
    assert retractions(image_site) > before, "nothing was taken back: tests nothing"


def split_otherwise(site: ImageSite) -> tuple[list[int], list[int]]:
    """Return the ids of a text as the tokenizer makes them, and as many others that are the same text."""
    tokenizer = site.writer.processor.tokenizer
    for word in (" Kenyan", " zookeepers", " blackboards", " xylophone", " quizzical", " flashlights", " yodeling"):
        ids = site.writer.ids_of(word)
        for place in range(2, len(word) - 1):
            others = [*site.writer.ids_of(word[:place]), *site.writer.ids_of(word[place:])]
            if len(others) == len(ids) and others != ids and tokenizer.decode(others) == word:
                return ids, others
    raise AssertionError("each word has one way to be written with so many ids")


@pytest.mark.parametrize("asks", [{"hidden": None}, {}], ids=["nothing", "states"])
def test_ids_that_sglang_would_change(image_site: ImageSite, asks: dict[str, Any]) -> None:
    """Qwen's ids stay as they are. Other models' prompts with images SGLang writes as text, and encodes again."""
    picture = image_site.writer.picture(5)
    ids, others = split_otherwise(image_site)
    good, odd = (image_site.request(picture, "See", tokens, **asks) for tokens in (ids, others))
    image_site.check([good], image_site.server.generate([good]))
    if "qwen" in image_site.model_dir:
        image_site.check([odd], image_site.server.generate([odd]))
        return
    with pytest.raises(AlignmentError, match="computed other ids around the images"):
        image_site.server.generate([odd])


def as_words(site: ImageSite, prompt_ids: Sequence[int]) -> list[int]:
    """Return a word for each id; equal ones for equal ids."""
    words = site.writer.ids_of(" red green blue old new big small one two three")
    assert len(words) == 10
    return [words[token_id % 10] for token_id in prompt_ids]


def test_every_answer_of_a_storm_is_right(image_site: ImageSite) -> None:
    """More than half of its requests have images, at the head of shared prompts or behind them."""
    writer = image_site.writer

    def draw(chance: random.Random) -> Request:
        request = draw_request(chance)
        if chance.random() < 0.4:
            return request
        if "pixtral" in image_site.model_dir:
            # SGLang writes its prompts with images as text and encodes them again: random ids would come out as others.
            request = replace(request, prompt_ids=tuple(as_words(image_site, request.prompt_ids)))
        sizes = ((1, 1), (3, 2), (8, 6))
        images = [writer.picture(chance.randrange(3), *chance.choice(sizes)) for _ in range(chance.randint(1, 2))]
        # Positions of a span count from the beginning.
        leads = "mask" not in request.spans and chance.random() < 0.5
        made = (
            writer.request(*images, request.prompt_ids) if leads else writer.request(request.prompt_ids, *images, "?")
        )
        return replace(request, prompt_ids=made.prompt_ids, images=made.images)

    # SGLang ends where running requests fill the cache and a prompt has but some of its chunks: few at once.
    size = {"calls": STORM_CALLS, "aborts": 4, "callers": 3, "most_rows": 2}
    assert storm(image_site.server, image_site.http, image_site.model_dir, seed=3, draw=draw, **size) > STORM_CALLS
    status = image_site.http.get("/server_info").json()["internal_states"][0][CHANNEL]
    assert status["open_pools"] == 0
