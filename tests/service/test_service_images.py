"""Images in the vector service: data URIs in messages and beside texts and ids, each vector that of its own images."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from helpers.fake_engine import RecordingEngine, model_page, server_page, tiny_tokenizer
from helpers.fake_images import IMAGE_ID
from helpers.picture_env import PLACE, picture_policy, vector_of
from helpers.word_env import TOKENIZER
from helpers.word_processor import WordProcessor, picture
from starlette.applications import Starlette
from starlette.routing import Route
from tokenizers import decoders

from torchrl_sglang_hidden import ragged
from torchrl_sglang_hidden.images.image_data import read_image
from torchrl_sglang_hidden.service.route import PATH, VectorService

CAT, DOG = (read_image("", picture(seed)).uri for seed in (1, 2))
CHAT = f"<|start|> user {PLACE} w1 <|end|> <|start|> assistant"


class Manager:
    """SGLang's tokenizer manager of a model that takes images, as much of it as is called."""

    served_model_name, model_path = "tiny", "models/tiny"

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        # As of models whose processor alone brings one.
        self.tokenizer.chat_template = None
        self.processor = WordProcessor(self.tokenizer)
        self.engine = RecordingEngine(tokenizer=TOKENIZER, binary=True)
        self.payloads: list[dict[str, Any]] = []

    async def generate_request(self, given: SimpleNamespace, http: Any) -> AsyncGenerator[Any, None]:
        self.payloads.append(vars(given))
        yield self.engine.answer(vars(given))


class Service:
    """The route over such a manager."""

    def __init__(self, *, takes_images: bool = True) -> None:
        self.manager, self.takes_images = Manager(), takes_images
        service = VectorService(self.manager, SimpleNamespace, self.model_info, self.server_info)
        self.app = Starlette(routes=[Route(PATH, service.respond, methods=["POST"])])

    async def model_info(self) -> dict[str, Any]:
        return {**model_page("models/tiny"), "has_image_understanding": self.takes_images}

    async def server_info(self) -> dict[str, Any]:
        limit = {"limit_mm_data_per_request": {"image": 3}}
        return {**server_page(image_token_id=IMAGE_ID if self.takes_images else None), **limit}

    def ask(self, **body: Any) -> httpx.Response:
        (answer,) = self.ask_at_once([body])
        return answer

    def ask_at_once(self, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
        async def call() -> list[httpx.Response]:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                return await asyncio.gather(*(client.post(PATH, json=body) for body in bodies))

        return asyncio.run(call())

    def vectors(self, **body: Any) -> torch.Tensor:
        response = self.ask(**body)
        assert response.status_code == 200, response.text
        return torch.tensor([row["hidden_states"]["prompt"] for row in response.json()["data"]])

    def refusal(self, **body: Any) -> dict[str, Any]:
        response = self.ask(**body)
        assert response.status_code == 400, response.text
        assert self.manager.payloads == []
        found: dict[str, Any] = response.json()["error"]
        return found


@pytest.fixture
def service() -> Service:
    return Service()


def message(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


WORD = {"type": "text", "text": "w1"}
OPENAI, HUGGING_FACE = {"type": "image_url", "image_url": {"url": CAT}}, {"type": "image", "image": CAT}
PARTS = {
    "openai": OPENAI,
    "openai, detail": {"type": "image_url", "image_url": {"url": CAT, "detail": "auto"}},
    "openai, flat": {"type": "image_url", "image_url": CAT},
    "hugging face": HUGGING_FACE,
}


@pytest.mark.parametrize("form", PARTS)
def test_parts_of_messages(service: Service, form: str) -> None:
    found = service.vectors(input=message(PARTS[form], WORD))
    torch.testing.assert_close(found[0], vector_of(CHAT, CAT))
    assert service.manager.payloads[0]["image_data"] == [[CAT]]


def test_rows_of_every_kind_beside_each_other(service: Service) -> None:
    """A text, ids, messages with images of their own and of the list, and rows without an image."""
    text, bare = f"{PLACE} w1 {PLACE}", {"type": "image"}
    rows = [text, TOKENIZER(f"w2 {PLACE}")["input_ids"], message(HUGGING_FACE, WORD), message(bare, WORD), "w3"]
    rows += [message(WORD), [{"role": "user", "content": "w1"}]]
    found = service.vectors(input=rows, images=[[CAT, DOG], [DOG], [], [DOG], None, [], None])
    alone = "<|start|> user w1 <|end|> <|start|> assistant"
    expected = [vector_of(text, CAT, DOG), vector_of(f"w2 {PLACE}", DOG), vector_of(CHAT, CAT), vector_of(CHAT, DOG)]
    expected += [vector_of("w3"), vector_of(alone), vector_of(alone)]
    torch.testing.assert_close(found, torch.stack(expected))
    assert service.manager.payloads[0]["image_data"] == [[CAT, DOG], [DOG], [CAT], [DOG], [], [], []]


def test_one_row_has_its_list_alone_and_counts_rows_of_images(service: Service) -> None:
    (row,) = service.ask(input=f"{PLACE} w1", images=[CAT]).json()["data"]
    assert (row["prompt_tokens"], row["counts"]["prompt"]) == (4, 4)
    assert service.vectors(input=[f"{PLACE} w1"], images=[[CAT]])[0].tolist() == row["hidden_states"]["prompt"]
    torch.testing.assert_close(service.vectors(input="w1", images=[None])[0], vector_of("w1"))


def test_messages_without_images_have_the_processors_template(service: Service) -> None:
    found = service.vectors(input=[{"role": "user", "content": "w1"}])
    torch.testing.assert_close(found[0], vector_of("<|start|> user w1 <|end|> <|start|> assistant"))


def test_the_tokens_around_an_image_are_text(service: Service) -> None:
    for tokenizer in (service.manager.tokenizer, service.manager.processor.tokenizer):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_end|>"]})
    service.vectors(input=f"{PLACE} w1", images=[CAT])
    error = service.ask(input=f"{PLACE} <|vision_end|>", images=[CAT]).json()["error"]
    assert error["type"] == "TokenIdError", "it was read, and is outside of this engine's vocabulary"


def test_expanded_ids_are_recognised(service: Service) -> None:
    ids = [IMAGE_ID] * 3 + TOKENIZER("w1")["input_ids"]
    torch.testing.assert_close(service.vectors(input=ids, images=[CAT])[0], vector_of(f"{PLACE} w1", CAT))


def test_the_vectors_are_a_policys(service: Service) -> None:
    policy, _ = picture_policy(input_mode="history")
    chat = message(OPENAI, WORD, HUGGING_FACE)
    expected = policy(ragged(history=[chat]))["hidden_states"].prompt
    torch.testing.assert_close(service.vectors(input=chat), expected)


def test_requests_at_once_have_the_processor_by_turns(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast tokenizer takes one caller at a time."""
    together = threading.Barrier(2)
    met: list[bool] = []
    call = WordProcessor.__call__

    def waiting(self: WordProcessor, *args: Any, **options: Any) -> dict[str, Any]:
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(timeout=0.5)
            met.append(True)
        return call(self, *args, **options)

    monkeypatch.setattr(WordProcessor, "__call__", waiting)
    # Of two sizes, each of which the processor is asked for once.
    images = [picture(1), picture(2, width=1, height=3)]
    answers = service.ask_at_once([{"input": PLACE, "images": [read_image("", image).uri]} for image in images])
    assert [answer.status_code for answer in answers] == [200, 200]
    assert met == []


def test_sglangs_own_processor_is_left_alone(service: Service) -> None:
    service.vectors(input=f"{PLACE} w1", images=[CAT])
    assert service.manager.processor.calls == []


BAD: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "a URL": (
        {"input": ["w1", message({"type": "image_url", "image_url": {"url": "http://a/b.png"}})]},
        "ImageError",
        ["row 1, message 0, part 0", "'http://a/b.png'", "data:image/png;base64"],
    ),
    "a path": (
        {"input": message(WORD, {"type": "image", "image": "/etc/passwd"})},
        "ImageError",
        ["row 0, message 0, part 1", "'/etc/passwd'", "no URLs or paths", "data:image/png;base64"],
    ),
    "a path beside": ({"input": PLACE, "images": ["file:///a.png"]}, "ImageError", ["row 0, image 0", "base64"]),
    "a number": ({"input": PLACE, "images": [[5]]}, "InputTypeError", ["row 0, image 0: 5", "base64"]),
    "another place": (
        {"input": message({"type": "image", "path": "/etc/passwd"})},
        "InputError",
        ["row 0, message 0, part 0", "'/etc/passwd'", "leave out"],
    ),
    "no image": (
        {"input": ["w1", PLACE], "images": [[], ["data:image/png;base64,AAAA"]]},
        "ImageError",
        ["row 1, image 0", "no image"],
    ),
    "video": ({"input": message({"type": "video", "video": CAT})}, "InputError", ["part 0", "'video'", "leave out"]),
    "detail": (
        {"input": message({"type": "image_url", "image_url": {"url": CAT, "detail": "high"}})},
        "InputError",
        ["part 0", "image_url has ['detail']", "own processor"],
    ),
    "a path in the place of a url": (
        {"input": message({"type": "image", "image": {"path": "/etc/passwd"}})},
        "InputError",
        ["part 0: image has ['path']", "a url alone"],
    ),
    "no place": ({"input": ["w1", "w2"], "images": [[], [CAT]]}, "ImageError", ["row 1", "0 placeholders", "1 images"]),
    "no image for a place": ({"input": [PLACE, PLACE], "images": [[CAT], []]}, "ImageError", ["row 1"]),
    "ids that are no integers": ({"input": [[IMAGE_ID, 5.0]], "images": [[CAT]]}, "InputTypeError", ["row 0", "5.0"]),
    "a placeholder that is none": (
        {"input": [[float(IMAGE_ID), 5]], "images": [[CAT]]},
        "InputTypeError",
        ["row 0", f"{IMAGE_ID}.0 is a float"],
    ),
    "ids that are texts": (
        {"input": [[IMAGE_ID, "w"]], "images": [[CAT]]},
        "InputTypeError",
        ["row 0", "'w' is a str"],
    ),
    "an id below 0": ({"input": [[IMAGE_ID, -5]], "images": [[CAT]]}, "TokenIdError", ["row 0", "-5 at position 3"]),
    "an id beyond every vocabulary": (
        {"input": [[IMAGE_ID, 10**30]], "images": [[CAT]]},
        "TokenIdError",
        ["row 0", "000 at position 3"],
    ),
    "no ASCII": ({"input": PLACE, "images": ["data:image/png;base64,é"]}, "ImageError", ["row 0, image 0", "base64"]),
    "a bare part": ({"input": message({"type": "image"})}, "ImageError", ["row 0, message 0, part 0", "without an"]),
    "no part": ({"input": message(WORD), "images": [CAT]}, "ImageError", ["row 0, 1 images"]),
    "too many": ({"input": PLACE, "images": [CAT] * 4}, "ImageError", ["row 0", "4 images", "takes 3"]),
    "no object": ({"input": [[*message(OPENAI), "w1"]]}, "InputTypeError", ["row 0, message 1: 'w1'"]),
    "more": ({"input": [{**message(OPENAI)[0], "name": "a"}]}, "InputTypeError", ["row 0, message 0", "and no more"]),
    "text": ({"input": message(OPENAI, {"type": "text", "text": 5})}, "InputError", ["part 1", '"text": …']),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_sent_is_refused_by_row_and_part(service: Service, case: str) -> None:
    body, kind, words = BAD[case]
    error = service.refusal(**body)
    assert error["type"] == kind, error
    assert [word for word in words if word not in error["message"]] == [], error["message"]


def test_a_model_that_takes_text_alone() -> None:
    service = Service(takes_images=False)
    error = service.refusal(input=["w1", PLACE], images=[[], [CAT]])
    assert error["type"] == "CapabilityError"
    assert "row 1: 1 images, and the model 'models/tiny' takes text alone; leave" in error["message"]
    assert "'image_url'" in service.refusal(input=message(OPENAI))["message"]


def test_ids_that_sglang_would_change_are_refused(service: Service) -> None:
    """It encodes the prompts of most models with images again; a tokenizer that joins words gives others then."""
    assert service.ask(input=[[9, IMAGE_ID, 8]], images=[[CAT]]).status_code == 200
    joins = Service()
    joins.manager.tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # before its processor is copied
    refused = joins.refusal(input=[[9, IMAGE_ID, 8]], images=[[CAT]])
    assert "row 0: SGLang encodes prompts with images of a WordProcessor again" in str(refused)
    assert joins.manager.payloads == []
