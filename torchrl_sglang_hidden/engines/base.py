"""What every engine is: `Request`s in, `Completion`s out, checked on both sides.

Not neutral: an `Engine` is always an SGLang, over HTTP, in this process or launched, or a test double of one. A
`Request` carries SGLang's sampling parameters, token ids and priorities; payloads, sessions, control routes and answers
are SGLang's; hidden states come from the server half that runs inside SGLang. Another inference engine would need
records and a contract of its own. Knows nothing of TensorDicts, tokenizers or policies.
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
    """An SGLang that generates: over HTTP, in this process, or launched on this machine.

    `generate` and `agenerate` send one batch, let SGLang schedule its requests, and return one `Completion` per
    `Request`, in order. Every method may be called from several threads at once. A ``with`` block closes the engine.
    """

    _warned = False

    def _check(self, requests: Sequence[Request], info: EngineInfo) -> None:
        """Refuse bad requests, and warn once per engine that hidden states fall back to stock SGLang's."""
        check_requests(requests, info)
        if not self._warned and not info.pools_in_server and any(request.hidden is not None for request in requests):
            self._warned = True
            warnings.warn(FALLBACK_WARNING, stacklevel=2)

    @property
    @abstractmethod
    def info(self) -> EngineInfo:
        """Model, sizes, limits and weight version of the engine."""

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Generate one completion per request.

        Args:
            requests: any number of requests, sent as one batch.

        Returns:
            One `Completion` per request, in the order of the requests.

        Raises:
            InputError: a request that must not be sent; no request was sent.
            EngineError: the engine failed, refused or aborted a request, or went away.
            AlignmentError: the ids, log-probs and states of an answer do not agree in number.
        """

    @abstractmethod
    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        """Generate as `generate` does, without blocking the event loop."""

    @abstractmethod
    def stream(self, request: Request) -> Stream:
        """Generate one completion, and yield its tokens as they come.

        Returns:
            An iterator of `StreamChunk`s, under way already. After the last chunk its ``completion`` is the whole
            `Completion`, with the pooled states.

        Raises:
            InputError: a request that must not be sent, generates nothing, or asks for the prompt's log-probs.
            CapabilityError: hidden states of an engine without the server half.
            EngineError: as for `generate`; reading the stream may raise it too.
            AlignmentError: as for `generate`; reading the stream may raise it too.
        """

    @abstractmethod
    async def astream(self, request: Request) -> AsyncStream:
        """Generate as `stream` does, for ``async for``."""

    @abstractmethod
    def session(self) -> Session:
        """Open a conversation that stays on one server, which keeps the context from turn to turn.

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
        """Give the engine new weights while it serves, and empty its prefix cache, so that no old state stays.

        Names, shapes and values are compared with the served checkpoint first; where they do not fit, nothing is sent.
        Each tensor is sent in its own dtype, and SGLang casts it to the served dtype. May be called while other threads
        generate; several calls of one process go one after another. Every later sample carries the new version.

        Args:
            weights: a checkpoint directory with safetensors; a state dict with Hugging Face's checkpoint names; or a
                Hugging Face model, or a wrapper with one as ``.model``, such as torchrl's ``TransformersWrapper``.
                Always the whole model. A tied ``lm_head.weight`` may be included or left out.
            version: the name of the weights; None counts on from the present version, "default" → "1" → "2".
            transport: ``"disk"`` writes a checkpoint to memory (tmpfs), has the engine read the files and deletes them
                afterwards; a directory of yours is read as it is. ``"network"`` uses SGLang's own update group with
                gloo, for which the server connects to this machine. ``"auto"`` takes disk where the server is on this
                machine, else network.
            running: what becomes of requests that are being answered. ``"finish"``: they end with the old weights, the
                update waits for them, and every sample is of one version. ``"continue"``: the update comes at once, the
                tokens and log-probs so far stay, and the rest is sampled with the new weights from a prefix that is
                computed again; the sample says so in ``mixed_weights``. Pooled states follow the tokens: the row
                of a response token is of the weights that sampled the token, a prompt row of the weights that first
                read the prompt. If this process dies during such an update, the server stays paused until the next one.

        Returns:
            The new version.

        Raises:
            WeightsError: the weights do not fit, or are not finite. The engine keeps its own.
            InputError: an option out of range, or a version that the engine already has.
            CapabilityError: which weights the engine serves is unknown, or the transport cannot reach the engine.
            EngineError: the engine failed or refused; with several servers the message names the failed ones.
        """

    async def aupdate_weights(
        self,
        weights: Weights,
        *,
        version: str | None = None,
        transport: Transport = "auto",
        running: Running = "finish",
    ) -> str:
        """Run `update_weights` in a thread, without blocking the event loop."""
        return await asyncio.to_thread(
            self.update_weights, weights, version=version, transport=transport, running=running
        )

    @abstractmethod
    def close(self) -> None:
        """Release connections and processes of the engine; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ask_model(model_path: str) -> ModelSizes:
    """Read the model's sizes from its configuration, for engines without the server half, which do not tell them.

    The vocabulary size must be known: SGLang 0.5.23 ends on an id outside the vocabulary.

    Args:
        model_path: the model's directory or hub name, as the engine knows it.

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
