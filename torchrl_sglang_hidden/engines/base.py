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
from typing import Any, Self

from torchrl_sglang_hidden.counters import Counters, ServerCounters
from torchrl_sglang_hidden.engines.meter import Meter
from torchrl_sglang_hidden.engines.sessions import Session
from torchrl_sglang_hidden.engines.streams import AsyncStream, Stream
from torchrl_sglang_hidden.errors import CapabilityError
from torchrl_sglang_hidden.protocol import PLUGIN_ENV, image_token_in
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.sglang_api.server_info import ModelSizes
from torchrl_sglang_hidden.weights.adapters import AdapterSource
from torchrl_sglang_hidden.weights.heads import HeadSource, PushedHeads
from torchrl_sglang_hidden.weights.validation import BUCKET_BYTES, Running, Transport, Weights

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
    _meter: Meter | None = None

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
            SpanError, ConstraintError: of one response. Like an abort, it has the completions of all requests in its
                ``completions``, unless `Request.return_errors` brings it back as `Completion.error`.
            AlignmentError: the ids, log-probs and states of an answer do not agree in number.
        """

    @abstractmethod
    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        """Generate as `generate` does, without blocking the event loop."""

    def check_calls(self, count: int) -> None:
        """Check that so many calls of `agenerate` can be under way at once, beside what is under way already.

        Raises:
            InputError: this process cannot open a connection for each.
        """
        return  # an engine without connections

    async def close_event_loop(self) -> None:
        """Release what `agenerate` holds for the running event loop, such as its connections."""
        return

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

    def weight_version(self) -> str:
        """Return the version of the weights at this moment; that of `info` follows this process's own updates alone.

        Raises:
            EngineError: the engine failed, or could not be reached.
        """
        return self.info.weight_version  # an engine that nobody else updates

    @abstractmethod
    def update_weights(
        self,
        weights: Weights,
        *,
        version: str | None = None,
        transport: Transport = "auto",
        running: Running = "finish",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> str:
        """Give the engine new weights while it serves, and empty its prefix cache, so that no old state stays.

        Names, shapes and values are compared with the served checkpoint first; where they do not fit, nothing is sent.
        Each tensor is sent in its own dtype, and SGLang casts it to the served dtype. May be called while other threads
        generate; several calls of one process go one after another. Every later sample carries the new version.

        Args:
            weights: a checkpoint directory with safetensors; a state dict with Hugging Face's checkpoint names; or a
                Hugging Face model, or a wrapper with one as ``.model``, such as torchrl's ``TransformersWrapper``.
                Always the whole model. A tied ``lm_head.weight`` may be included or left out. Wrappers of
                ``torch.compile`` and data parallelism are taken off. PEFT's adapters are merged into copies, layer by
                layer, and your model stays as it is. DTensors of FSDP2 or tensor parallelism are gathered bucket by
                bucket: call this in every process of the trainer, in which all take part and of which the first talks
                to the engine; all return the version. FSDP1 and DeepSpeed ZeRO-3 are refused.
            version: the name of the weights; None counts on from the present version, "default" → "1" → "2".
            transport: ``"disk"`` writes a checkpoint to memory (tmpfs), has the engine read the files and deletes them
                afterwards; a directory of yours is read as it is. ``"network"`` uses SGLang's own update group with
                gloo, for which the server connects to this machine; ``"nccl"`` the same between GPUs, of which the
                trainer's must not be the server's (written, and not run for want of two GPUs). ``"auto"`` takes disk
                where the server is on this machine, else network.
            running: what becomes of requests that are being answered. ``"finish"``: they end with the old weights, the
                update waits for them, and every sample is of one version. ``"continue"``: the update comes at once, the
                tokens and log-probs so far stay, and the rest is sampled with the new weights from a prefix that is
                computed again; the sample says so in ``mixed_weights``. Pooled states follow the tokens: the row
                of a response token is of the weights that sampled the token, a prompt row of the weights that first
                read the prompt. If this process dies during an update, the server half ends the update and lets
                requests go on; a server without the server half stays paused until the next update.
            bucket_bytes: most bytes of weights that wait in this process's main memory for their file or their turn,
                one tensor more at most. Over the network the server takes one such bucket after another, and computes
                nothing in between; if that breaks off, the error says so, and until the next update the version ends
                in ``-incomplete`` and answers raise `IncompleteWeightsError`.

        Returns:
            The new version.

        Raises:
            WeightsError: the weights do not fit, or are not finite. The engine keeps its own.
            InputError: an option out of range, or a version that the engine already has.
            CapabilityError: which weights the engine serves is unknown, they are quantised, or the transport cannot
                reach the engine.
            EngineError: the engine failed or refused; with several servers the message names the failed ones.
        """

    async def aupdate_weights(self, weights: Weights, **options: Any) -> str:
        """Run `update_weights` in a thread, without blocking the event loop; it takes the same options."""
        return await asyncio.to_thread(self.update_weights, weights, **options)

    def load_adapter(
        self, name: str, adapter: AdapterSource, *, which: str | None = None, version: str | None = None
    ) -> str:
        """Give the engine a LoRA adapter for requests with ``lora_path=name``, in place of one of that name.

        Requests under way end first, and those that come meanwhile wait for the new adapter; a server without the
        server half refuses them while it has none. From then on every request carries the new version, with an adapter
        or without. Names, shapes and values are compared with the served model first.

        Args:
            name: what requests name as ``lora_path``.
            adapter: a model with PEFT's LoRA layers, wrapped or not; or a directory that PEFT wrote. Ranks and
                strengths that differ by layer are made one, which is all that SGLang reads. It travels as a file in
                memory (tmpfs) that is deleted then; a server on another machine needs a directory that both see.
            which: the name of one of the model's adapters; None takes the active one.
            version: as for `update_weights`.

        Returns:
            The new version.

        Raises:
            WeightsError: the adapter does not fit, is not finite, or is of a kind that SGLang does not serve (DoRA,
                whole layers, embeddings, biases): merge it with `update_weights`. The engine keeps its adapters.
            InputError: an option out of range.
            CapabilityError: the engine was started without ``enable_lora`` or for smaller ranks, or sees no files.
            EngineError: the engine failed or refused; or it is paused and has an adapter of that name.
        """
        raise CapabilityError(f"{type(self).__name__} loads no adapters; use SGLangServer, launch or SGLangOffline")

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter, when the requests that use it have ended. Later ones that name it are refused.

        Raises:
            EngineError: the engine has no adapter of that name, or failed.
        """
        raise CapabilityError(f"{type(self).__name__} loads no adapters; use SGLangServer, launch or SGLangOffline")

    def push_head(self, name: str, head: HeadSource, *, version: str | None = None) -> str:
        """Give the engine a head for requests with `HeadSpec(heads=(name,))`, in place of one of that name.

        Requests under way keep the head that they began with, and every answer names the version that scored it. The
        weights' own version stays. ``launch(restart=True)`` pushes heads again when its server has died. A client of
        several servers keeps those that it pushed in this process's memory, and gives them to a server that it lost
        before that takes rows again. Any other server that was started again has none.

        Args:
            name: up to 64 letters, digits, ``_`` and ``-``.
            head: a `Head`, or the path of a file that `Head.save` wrote; at most 64 MiB, and 64 heads of 512 MiB for
                one server. It travels in the call itself, to a server on any machine; all of several servers get it,
                or none.
            version: the name of these weights of the head; None names them by their content, so that the same head has
                the same version everywhere.

        Returns:
            The version.

        Raises:
            WeightsError: it is no head's file, does not fit the model, or is not finite. The engine keeps its heads.
            InputError: an unknown kind, or a layer that the model does not have.
            CapabilityError: the server lacks the server half, or does not give the states of the head's layer.
            EngineError: the engine failed or refused, such as for a version that it has with other weights. Of several
                servers the message names the one that failed, and the others have what they had: the head that this
                client pushed before, or none. Where that fails, it says what each of them has.
        """
        return self._pushed_heads().push(name, head, version)

    def drop_head(self, name: str) -> None:
        """Take a head from the engine. Requests under way keep it; later ones that name it are refused.

        Raises:
            CapabilityError: the server lacks the server half.
            EngineError: the engine has no head of that name, or failed. Of several servers the message names those
                that have not or failed, and the others have dropped it.
        """
        self._pushed_heads().drop(name)

    def _pushed_heads(self) -> PushedHeads:
        """Return what pushes heads to each server."""
        raise CapabilityError(f"{type(self).__name__} takes no heads; use SGLangServer, launch or SGLangOffline")

    def counters(self) -> Counters:
        """Return what this client counted since it was made, without asking the engine.

        Raises:
            CapabilityError: an engine of another class, which counts nothing.
        """
        return self._counting().tally.read()

    def server_counters(self) -> ServerCounters:
        """Ask the engine's server half what it counted since its start, for all clients; zeros without one.

        Over several servers and data-parallel ranks these are sums. A server that cannot be reached is named in a
        warning of the log, and the sums are of the others. SGLang's ``/metrics`` has the same numbers.

        Raises:
            CapabilityError: as for `counters`.
            EngineUnreachableError: no server can be reached.
            EngineError: a server answered what is no state.
        """
        return self._counting().server()

    def _counting(self) -> Meter:
        if self._meter is None:
            raise CapabilityError(f"{type(self).__name__} counts nothing; use SGLangServer, launch or SGLangOffline")
        return self._meter

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

    The vocabulary size must be known: SGLang 0.5.23 ends on an id outside the vocabulary. So must the id that stands
    for an image: where there is none for it, SGLang computes the id's embedding, hangs or answers an internal error.

    Args:
        model_path: the model's directory or hub name, as the engine knows it.

    Raises:
        CapabilityError: the configuration cannot be read from here.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise CapabilityError(
            f"the server has no torchrl_sglang_hidden server half, and its model {model_path!r} cannot be read from "
            "this machine to learn the vocabulary size; start the server with `torchrl-sglang-hidden serve`"
        ) from error
    text = config.get_text_config()
    return ModelSizes(
        text.vocab_size, text.hidden_size, text.num_hidden_layers, text.max_position_embeddings, image_token_in(config)
    )
