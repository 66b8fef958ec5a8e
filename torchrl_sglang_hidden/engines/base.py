"""What every engine is: `Request`s in, `Completion`s out, checked on both sides.

Knows nothing of TensorDicts, tokenizers or policies.
"""

from __future__ import annotations

import asyncio
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from torchrl_sglang_hidden.engines.sessions import Session
from torchrl_sglang_hidden.engines.streams import AsyncStream, Stream
from torchrl_sglang_hidden.errors import CapabilityError
from torchrl_sglang_hidden.protocol import PLUGIN_ENV
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.sglang_api.server_info import ModelSizes
from torchrl_sglang_hidden.weights.validation import Running, Transport, Weights

FALLBACK_WARNING = (
    "the server has no torchrl_sglang_hidden server half: falling back to SGLang's own return_hidden_states, the same "
    f"numbers as JSON, much slower; start SGLang with {PLUGIN_ENV}=1 in its environment, or use launch or `serve`"
)


class Engine(ABC):
    """An engine that generates.

    Both calls send one batch, let SGLang schedule its rows, and return one `Completion` per `Request`, in order. They
    may be made from several threads at once. Usable as a context manager, which closes it.
    """

    _warned = False

    def _check(self, requests: Sequence[Request], info: EngineInfo) -> None:
        """Refuses bad requests, and says once per engine that it falls back to stock hidden states."""
        check_requests(requests, info)
        if not self._warned and not info.pools_in_server and any(request.hidden is not None for request in requests):
            self._warned = True
            warnings.warn(FALLBACK_WARNING, stacklevel=2)

    @property
    @abstractmethod
    def info(self) -> EngineInfo:
        """What the engine says of itself."""

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Generates one completion per request.

        Raises:
            InputError: a request that must not be sent; nothing was.
            EngineError: the engine failed, refused or aborted a request, or went away.
            AlignmentError: ids, log-probs and states of an answer do not agree in number.
        """

    @abstractmethod
    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        """As `generate`, awaited."""

    @abstractmethod
    def stream(self, request: Request) -> Stream:
        """Generates one completion, and gives its tokens as they come.

        Returns:
            An iterator of `StreamChunk`s, under way already. At its end it has the `Completion`, pooled states and all.

        Raises:
            InputError: a request that must not be sent, generates nothing, or asks for the prompt's log-probs.
            CapabilityError: hidden states of an engine without the server half.
            EngineError: see `generate`; while it is read, too.
            AlignmentError: likewise.
        """

    @abstractmethod
    async def astream(self, request: Request) -> AsyncStream:
        """As `stream`, for ``async for``."""

    @abstractmethod
    def session(self) -> Session:
        """Opens a conversation that stays on one server, which keeps its context from turn to turn.

        Raises:
            EngineError: the engine failed, or could not be reached.
        """

    @abstractmethod
    def update_weights(
        self,
        weights: Weights,
        *,
        version: str | None = None,
        transport: Transport = "auto",
        running: Running = "finish",
    ) -> str:
        """Gives the engine new weights while it serves, and empties its prefix cache: no state of the old ones stays.

        Names, shapes and values are held against the served checkpoint first; where they do not fit, nothing is sent.
        Each tensor travels in its own dtype and SGLang casts it to the one it serves. May be called while other threads
        generate; several calls of this process go one after another. From then on every sample carries the new version.

        Args:
            weights: a checkpoint directory with safetensors; a state dict with Hugging Face's checkpoint names; or a
                Hugging Face model, or a wrapper with one as ``.model``, such as torchrl's ``TransformersWrapper``.
                Always the whole model. A tied ``lm_head.weight`` may be there or not.
            version: what the engine calls the weights; None counts on from its present version, "default" → "1" → "2".
            transport: ``"disk"``, a checkpoint in memory (tmpfs) that the engine reads and that is deleted afterwards,
                or your directory itself; ``"network"``, SGLang's own update group with gloo, for which the server
                connects to this machine; ``"auto"``, disk where the server is on this machine, else network.
            running: what becomes of requests that are being answered. ``"finish"``, they end with the old weights, the
                update waits for them, and every sample is of one version. ``"continue"``, the update comes at once:
                their tokens and log-probs so far stay, the rest is sampled with the new weights from a prefix that is
                computed again, and the sample says so. Pooled states follow the tokens: each row is of the weights that
                sampled its token, the prompt's rows of those that first read it. If this process dies in between, the
                server stays paused until the next such update.

        Returns:
            The new version.

        Raises:
            WeightsError: the weights do not fit, or are not finite. The engine keeps its own.
            InputError: an option out of range, or a version that the engine already has.
            CapabilityError: nothing tells which weights the engine serves, or the transport cannot serve it.
            EngineError: the engine failed or refused; with several servers it names those that have the new weights.
        """

    async def aupdate_weights(
        self,
        weights: Weights,
        *,
        version: str | None = None,
        transport: Transport = "auto",
        running: Running = "finish",
    ) -> str:
        """As `update_weights`, awaited: it runs in a thread."""
        return await asyncio.to_thread(
            self.update_weights, weights, version=version, transport=transport, running=running
        )

    @abstractmethod
    def close(self) -> None:
        """Lets go of what the engine holds; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ask_model(model_path: str) -> ModelSizes:
    """The model's sizes from its own configuration.

    For engines without the server half, which tell none of these. The vocabulary size must be known: SGLang 0.5.23 ends
    on an id outside it.

    Raises:
        CapabilityError: the configuration cannot be read from here.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_path).get_text_config()
    except (OSError, ValueError) as error:
        raise CapabilityError(
            f"the server has no torchrl_sglang_hidden server half, and its model {model_path!r} cannot be read from "
            "this machine to learn the vocabulary size; start the server with `torchrl-sglang-hidden serve`"
        ) from error
    return ModelSizes(config.vocab_size, config.hidden_size, config.num_hidden_layers, config.max_position_embeddings)
