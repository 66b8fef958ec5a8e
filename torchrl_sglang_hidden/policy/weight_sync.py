"""TorchRL's weight synchronisation, by way of `Engine.update_weights`.

TorchRL 0.14.1's own ``SGLangWeightSyncScheme`` does not reach an SGLang 0.5.23 server: it needs CUDA, asks a route that
is gone (``/get_load``), opens no update session, and leaves the old weights' states in the prefix cache.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

from torchrl_sglang_hidden.engines import Engine, as_engine, check_options
from torchrl_sglang_hidden.errors import InputError

__all__ = ["SGLangHiddenWeightSender", "SGLangHiddenWeightSyncScheme"]


class SGLangHiddenWeightSyncScheme(WeightSyncScheme):  # type: ignore[misc]
    """Sends a trainer's weights to SGLang; replaces torchrl's ``SGLangWeightSyncScheme``.

    With an ``LLMCollector``, which takes no schemes in TorchRL 0.14.1, use the sender::

        sender = SGLangHiddenWeightSyncScheme(engine).create_sender()
        sender.register_model(trainer)
        sender.register_collector(collector)
        ...
        sender.update_weights()

    Collectors that take ``weight_sync_schemes={"policy": scheme}`` send with
    ``collector.update_policy_weights_(trainer)``. Workers receive nothing: they generate with the same engine.

    ``InferenceServer(policy, weight_sync=scheme)`` counts its ``policy_version`` by what this scheme and its senders
    send.

    Args:
        engine: an `Engine`, a URL or several, or whatever else `SGLangHiddenWrapper` takes as its model.
        transport, running: see `Engine.update_weights`.
    """

    def __init__(self, engine: Any, *, transport: str = "auto", running: str = "finish") -> None:
        super().__init__()
        check_options(None, transport, running)
        self.engine: Engine = as_engine(engine)
        self.transport, self.running = transport, running
        self._server_ref: weakref.ReferenceType[Any] | None = None

    def push(self, weights: Any) -> str:
        """Send weights, and return their version.

        Args:
            weights: what `Engine.update_weights` takes, or a TensorDict of parameters as torchrl extracts it.

        Raises:
            WeightsError, EngineError: see `Engine.update_weights`.
        """
        if isinstance(weights, TensorDictBase):
            weights = weights.flatten_keys(".").to_dict()
        version = self.engine.update_weights(
            weights,
            transport=self.transport,  # type: ignore[arg-type]
            running=self.running,  # type: ignore[arg-type]
        )
        server = None if self._server_ref is None else self._server_ref()
        if server is not None:
            server.update_policy_weights_(model_id=self.model_id)
        return version

    def create_sender(self) -> SGLangHiddenWeightSender:
        """Return the trainer's side, with the interface of torchrl's ``SGLangWeightSender``."""
        return SGLangHiddenWeightSender(self)

    def create_receiver(self, *args: Any, **kwargs: Any) -> None:
        """Return None: the engine receives by itself. Any arguments are accepted, as by torchrl's scheme for SGLang."""

    def create_transport(self, **kwargs: Any) -> _EngineTransport:
        """Return the transport that torchrl's generic ``send`` uses."""
        return _EngineTransport(self)

    def send(self, weights: Any = None, worker_ids: int | list[int] | None = None) -> None:
        """Send weights; None sends those of the model that the sender was initialised with.

        Raises:
            InputError: no weights and no model, or only some workers, which all share the engine.
        """
        if worker_ids is not None:
            raise InputError(f"worker_ids={worker_ids!r}: all workers generate with one engine; leave it out")
        super().send(weights)

    def prepare_weights(self, weights: Any, model_id: str, strategy: Any, context: Any = None) -> Any:
        """Return the weights unchanged. A collector could find only the policy's own weights, and it has none."""
        if weights is None:
            weights = self._model_ref() if self._model_ref is not None else None
        if weights is None:
            raise InputError("no weights given, and the policy is an engine without any; pass the trainer's model")
        return weights

    def _init_on_sender_impl(
        self, *, model_id: str = "policy", context: Any = None, model: Any = None, **kwargs: Any
    ) -> None:
        self.model_id, self.context = model_id, context
        self._model_ref = None if model is None else weakref.ref(model)
        self._register_worker_sender(worker_idx=0)

    def _init_on_receiver_impl(self, *, model_id: str, context: Any = None, **kwargs: Any) -> None:
        # An InferenceServer passes no context: it has set itself as the scheme's before, and wants to hear of updates.
        self._server_ref = self._context_ref if context is None else None
        self.model_id, self.context = model_id, context

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the server, which a weak reference points to."""
        return {**super().__getstate__(), "_server_ref": None}


class SGLangHiddenWeightSender:
    """See `SGLangHiddenWeightSyncScheme.create_sender`."""

    def __init__(self, scheme: SGLangHiddenWeightSyncScheme) -> None:
        self._scheme = scheme
        self._model_ref: weakref.ReferenceType[torch.nn.Module] | None = None
        self._collectors: list[Any] = []

    def register_model(self, model: torch.nn.Module) -> None:
        """Set the model whose weights `update_weights` sends, held by a weak reference."""
        self._model_ref = weakref.ref(model)

    def register_collector(self, collector: Any) -> None:
        """Add a collector whose ``increment_version`` is called after each update."""
        self._collectors.append(collector)

    def init_all_workers_group(self, model_metadata: Any = None) -> None:
        """Do nothing, for programs written for torchrl's scheme: each update that needs a group makes one."""

    def update_weights(self, weights: Any = None) -> str:
        """Send weights, and return their version; None sends the weights of the registered model.

        Raises:
            InputError: there are none.
            WeightsError, EngineError: see `Engine.update_weights`; no collector's version moved.
        """
        if weights is None:
            weights = self._model_ref() if self._model_ref is not None else None
        if weights is None:
            raise InputError("no weights given and no living model registered; call register_model(model) first")
        version = self._scheme.push(weights)
        for collector in self._collectors:
            collector.increment_version()
        return version

    def flush_cache(self) -> bool:
        """Return True: every update has emptied the prefix cache already."""
        return True

    def shutdown(self) -> None:
        """Forget the collectors and the model. The caller closes the engine."""
        self._collectors.clear()
        self._model_ref = None


class _EngineTransport:
    """torchrl's transport protocol over the scheme's engine."""

    def __init__(self, scheme: SGLangHiddenWeightSyncScheme) -> None:
        self._push = scheme.push

    def send_weights(self, weights: Any) -> None:
        self._push(weights)

    def receive_weights(self, timeout: float | None = None, **kwargs: Any) -> None:
        """Do nothing: no weights arrive here."""

    def setup_connection_and_weights_on_sender(self) -> None:
        """Do nothing: the engine has weights, and the trainer says when it sends the first of its own."""
