"""A server without the server half that reads images: the model's configuration says what stands for one.

SGLang itself says nothing of it. A placeholder without an image it computes as a word, hangs, or answers 500.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_engine import HIDDEN_SIZE, RecordingEngine, RecordingServer, model_page, server_page
from helpers.fake_images import IMAGE_ID
from helpers.picture_env import PLACE
from helpers.word_env import TOKENIZER
from helpers.word_processor import WordProcessor, picture
from transformers import LlamaConfig, LlavaConfig

from torchrl_sglang_hidden import ImageError, InputError, SGLangHiddenWrapper, connect, ragged
from torchrl_sglang_hidden.records import Request

Serve = Callable[..., RecordingServer]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    servers: list[RecordingServer] = []

    def start(placeholder: int | None = IMAGE_ID) -> RecordingServer:
        """Serve a model whose configuration is saved, and says this placeholder."""
        sizes = {"vocab_size": 96, "hidden_size": HIDDEN_SIZE, "num_hidden_layers": 4, "num_attention_heads": 2}
        text = LlamaConfig(**sizes, max_position_embeddings=64)
        config = text if placeholder is None else LlavaConfig(text_config=text, image_token_index=placeholder)
        config.save_pretrained(tmp_path)
        server = RecordingServer(model_path=str(tmp_path))
        page = {**server_page(), "internal_states": [{}], "enable_return_hidden_states": True}
        server.pages["/server_info"] = (200, page)
        server.pages["/model_info"] = (200, {**model_page(str(tmp_path)), "has_image_understanding": True})
        engine = RecordingEngine(takes_images=True, image_token_id=IMAGE_ID, pools_in_server=False)
        server.respond = lambda handler, payload: handler.say((200, engine.answer(payload)))
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


def policy_of(engine: Any, mode: str) -> SGLangHiddenWrapper:
    return SGLangHiddenWrapper(
        engine, tokenizer=WordProcessor(TOKENIZER), input_mode=mode, hidden=None, generate_kwargs={"max_new_tokens": 2}
    )


def test_a_placeholder_without_an_image_is_not_sent(serve: Serve) -> None:
    server = serve()
    with connect(server.url) as engine:
        assert (engine.info.pools_in_server, engine.info.image_token_id) == (False, IMAGE_ID)
        with pytest.raises(ImageError, match=r"row 1: position 1 of the prompt is the placeholder"):
            engine.generate([Request((7, 8)), Request((7, IMAGE_ID))])
        for mode, prompt in {"text": f"w1 {PLACE}", "tokens": [7, IMAGE_ID]}.items():
            with pytest.raises(ImageError, match="position 1 of the prompt is the placeholder"):
                policy_of(engine, mode)(ragged(**{mode: [prompt]}))
        chat = [{"role": "user", "content": f"w1 {PLACE}"}]
        with pytest.raises(ImageError, match="is the placeholder"):
            policy_of(engine, "history")(ragged(history=[chat]))
    assert server.payloads == []


def test_an_image_goes_there(serve: Serve) -> None:
    server = serve()
    with connect(server.url) as engine, warnings.catch_warnings():
        warnings.simplefilter("error")
        out = policy_of(engine, "text")(ragged(text=[f"w1 {PLACE}", "w2"], images=[[picture(1)], None]))
    assert [len(ids) for ids in out["tokens"].get("prompt", as_list=True)] == [4, 1]
    (payload,) = server.payloads
    assert [len(data) for data in payload["image_data"]] == [1, 0]


def test_another_models_placeholder(serve: Serve) -> None:
    """The processor's is id 95, and the configuration says another."""
    server = serve(94)
    with connect(server.url) as engine, pytest.raises(InputError, match=r"is id 95, and the model's is 94"):
        policy_of(engine, "text")(ragged(text=[PLACE], images=[[picture(1)]]))
    assert server.payloads == []


def test_a_configuration_that_does_not_say(serve: Serve) -> None:
    """What cannot be checked is said, once for a client."""
    with (
        pytest.warns(UserWarning, match="does not say which token stands for an image") as caught,
        connect(serve(None).url) as engine,
    ):
        policy_of(engine, "tokens")(ragged(tokens=[[7, IMAGE_ID]]))
    assert engine.info.image_token_id is None
    assert len(caught) == 1
