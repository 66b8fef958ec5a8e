"""SGLang in this process: `sglang.Engine`, without HTTP.

Knows how an ``sglang.Engine`` is started, and how its event loop runs while calls are under way. Payloads and answers
are those of `SGLangServer`, tensors as bytes instead of base64.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
from collections.abc import AsyncGenerator, Generator, Sequence
from functools import partial
from pathlib import Path
from types import AsyncGeneratorType
from typing import Any, NoReturn

from torchrl_sglang_hidden.engines.base import Engine, ask_model
from torchrl_sglang_hidden.engines.loop_thread import LoopThread
from torchrl_sglang_hidden.engines.meter import Meter
from torchrl_sglang_hidden.engines.sessions import Session, SessionHost
from torchrl_sglang_hidden.engines.streams import AsyncStream, Stream, check_stream
from torchrl_sglang_hidden.errors import CapabilityError, EngineError, InputTypeError
from torchrl_sglang_hidden.protocol import LAYERS_ENV
from torchrl_sglang_hidden.protocol.served_weights import ServedWeights
from torchrl_sglang_hidden.protocol.server_files import files_of
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request
from torchrl_sglang_hidden.server.weight_routes import list_weights
from torchrl_sglang_hidden.sglang_api.in_process import translated
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import raise_errors, read_rows
from torchrl_sglang_hidden.sglang_api.server_info import read_info, warm_up
from torchrl_sglang_hidden.weights.adapters import (
    AdapterSource,
    check_adapter,
    check_adapter_options,
    load,
    open_adapter,
    unload,
)
from torchrl_sglang_hidden.weights.heads import HeadServer, PushedHeads
from torchrl_sglang_hidden.weights.sharding import update_together
from torchrl_sglang_hidden.weights.transports import Receiver, choose_transport, open_update, send
from torchrl_sglang_hidden.weights.validation import (
    BUCKET_BYTES,
    Running,
    ShardedWeights,
    Transport,
    Weights,
    check_options,
    check_weights,
    choose_version,
    open_weights,
)

__all__ = ["SGLangOffline"]


class SGLangOffline(Engine):
    """SGLang's in-process engine. Its scheduler and detokenizer are child processes; no port is opened.

    Without an accelerator SGLang's CPU engine runs. SGLang chooses it when ``sglang`` is first imported: make a
    `SGLangOffline` before anything else imports ``sglang``. Use it under ``if __name__ == "__main__":``, since SGLang
    spawns processes.

    Args:
        model: the model's directory or hub name; or an ``sglang.Engine`` of yours, which `close` leaves running.
        layers: the layers that the engine's CUDA graphs record, as for `launch`. Not with an engine of yours.
        constraint_modules: modules with constraints of yours, as for `launch`. Not with an engine of yours.
        server_args: SGLang's own arguments, as for ``sglang.Engine``. Not with an engine of yours.

    Raises:
        InputTypeError: ``model`` is neither a path nor an engine, or other arguments come with an engine.
        CapabilityError: SGLang is not installed, or was imported before without the CPU engine that this machine needs.
        EngineError: the engine did not start.
    """

    def __init__(
        self,
        model: str | Path | Any,
        *,
        layers: int | Sequence[int] | None = None,
        constraint_modules: Sequence[str] = (),
        **server_args: Any,
    ) -> None:
        self.engine: Any
        if isinstance(model, (str, Path)):
            self.engine, self._owned = _start(model, layers, constraint_modules, server_args), True
        elif hasattr(model, "async_generate") and not server_args and layers is None and not constraint_modules:
            self.engine, self._owned = model, False
        else:
            raise InputTypeError(
                f"SGLangOffline({type(model).__name__}, {', '.join(server_args)}): expected a model directory with "
                "arguments, or an sglang.Engine without"
            )
        self._loop = LoopThread.of(self.engine.loop)
        self._info = self._loop.run(self._read_info)
        self._updating = threading.Lock()
        ranks = self.engine.tokenizer_manager.elastic_worker_count
        self._session_host = SessionHost(
            lambda: self._info, self._call, self._send_blocking, binary=True, num_ranks=ranks
        )
        self._meter: Meter = Meter("the engine in this process", self._internal_states)
        self._closed, self._pid = False, os.getpid()

    def _internal_states(self) -> list[Any]:
        self._check_open()
        return list(self._loop.run(self.engine.tokenizer_manager.get_internal_state))

    async def _read_info(self) -> EngineInfo:
        states = await self.engine.tokenizer_manager.get_internal_state()
        payload = warm_up({"internal_states": states})
        if payload is not None:
            await self.engine.async_generate(**payload)
            states = await self.engine.tokenizer_manager.get_internal_state()
        scheduler_info = self.engine._scheduler_init_result.scheduler_infos[0]
        # `sglang.Engine` has no argument for sampling masks.
        without_masks = {"sampling_mask_max_tokens": 0, "internal_states": states}
        server_info = {**self.engine.tokenizer_manager.server_args.resolved_dict(), **scheduler_info, **without_masks}
        model_info = {
            **self.engine.get_model_info(),
            # SGLang says it over HTTP only.
            "has_image_understanding": self.engine.tokenizer_manager.model_config.is_image_understandable_model,
        }
        return read_info(model_info, server_info, ask_model)

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`: read when this object was made; the weight version follows `update_weights`."""
        return self._info

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.generate`."""
        self._check_open()
        self._check(requests, self._info)
        return self._loop.run(lambda: self._generate(requests))

    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.agenerate`."""
        self._check_open()
        self._check(requests, self._info)
        return await self._loop.arun(lambda: self._generate(requests))

    async def _generate(self, requests: Sequence[Request]) -> list[Completion]:
        payload = to_payload(requests, self._info, binary=True)
        with self._meter.watching(requests) as took:
            completions = read_rows(requests, await self._send(payload), self._info)
            took(completions)
        raise_errors(requests, completions)
        return completions

    async def _send(self, payload: dict[str, Any]) -> Any:
        with translated():
            return await self.engine.async_generate(**payload)

    def _send_blocking(self, payload: dict[str, Any]) -> Any:
        self._check_open()
        return self._loop.run(lambda: self._send(payload))

    def stream(self, request: Request) -> Stream:
        """See `Engine.stream`. Returns with the first token, because nothing else starts a request in this process."""
        rows = self._rows(self._stream_payload(request))
        with self._meter.opening():
            return Stream(rows, request, self._info, self._meter)

    async def astream(self, request: Request) -> AsyncStream:
        """See `Engine.astream`. Returns with the first token."""
        rows = self._arows(self._stream_payload(request))
        with self._meter.opening():
            return await AsyncStream.open(rows, request, self._info, self._meter)

    def _stream_payload(self, request: Request) -> dict[str, Any]:
        self._check_open()
        cumulative = not self.engine.tokenizer_manager.incremental_streaming_output
        check_stream(request, self._info, cumulative=cumulative)
        self._check([request], self._info)
        return {**to_payload([request], self._info, binary=True), "stream": True}

    def _rows(self, payload: dict[str, Any]) -> Generator[Any, None, None]:
        """Yield None, then each of SGLang's answers, for `Stream`. The engine's loop runs only while one is awaited."""
        rows = self._loop.run(lambda: self._send(payload))
        try:
            row = self._loop.run(lambda: _next(rows))
            yield None
            while row is not None:
                yield row
                row = self._loop.run(lambda: _next(rows))
        finally:
            self._loop.run_later(lambda: _hang_up(rows))

    async def _arows(self, payload: dict[str, Any]) -> AsyncGenerator[Any, None]:
        rows = await self._send(payload)
        try:
            row = await self._loop.arun(lambda: _next(rows))
            yield None
            while row is not None:
                yield row
                row = await self._loop.arun(lambda: _next(rows))
        finally:
            await self._loop.arun(lambda: _hang_up(rows))

    def session(self) -> Session:
        """See `Engine.session`."""
        self._check_open()
        return Session(self._session_host, self._check, self._meter)

    def update_weights(
        self,
        weights: Weights,
        *,
        version: str | None = None,
        transport: Transport = "auto",
        running: Running = "finish",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> str:
        """See `Engine.update_weights`. The only transport is disk: no network leads to an engine in this process."""
        self._check_open()
        check_options(version, transport, running, bucket_bytes)
        opened = open_weights(weights)
        if isinstance(opened, ShardedWeights):
            update = partial(
                self.update_weights, version=version, transport=transport, running=running, bucket_bytes=bucket_bytes
            )
            return update_together(opened, update, bucket_bytes=bucket_bytes)
        receiver = self._receiver()
        chosen = choose_transport(transport, weights, receiver)
        with self._updating, self._meter.updating() as updated:
            tensors = check_weights(opened, self._served_weights())
            version = self._new_version(version)
            with open_update(
                [chosen], weights, tensors, version=version, running=running, bucket_bytes=bucket_bytes
            ) as ready:
                send(chosen, ready, receiver)
            self._info = dataclasses.replace(self._info, weight_version=version)
            return updated(version)

    def load_adapter(
        self,
        name: str,
        adapter: AdapterSource,
        *,
        which: str | None = None,
        version: str | None = None,
    ) -> str:
        """See `Engine.load_adapter`."""
        self._check_open()
        check_adapter_options(name, version)
        opened = open_adapter(adapter, which)
        manager = self.engine.tokenizer_manager
        with self._updating, self._meter.updating() as updated:
            check_adapter(opened, self._served_weights())
            version = self._new_version(version)
            load(
                self._receiver(),
                name,
                opened,
                version,
                server_info=manager.server_args.resolved_dict(),
                replace=manager.enable_lora and name in manager.lora_registry.get_all_adapters(),
            )
            self._info = dataclasses.replace(self._info, weight_version=version)
            return updated(version)

    def unload_adapter(self, name: str) -> None:
        """See `Engine.unload_adapter`."""
        self._check_open()
        check_adapter_options(name)
        unload(self._call, name)

    def _pushed_heads(self) -> PushedHeads:
        self._check_open()
        return PushedHeads([HeadServer("this engine", lambda: self._info, self._call)])

    def _receiver(self) -> Receiver:
        return Receiver(
            name="an engine in this process",
            call=self._call,
            has_server_half=self._info.pools_in_server,
            reads_local_files=True,
            network=None,
        )

    def _served_weights(self) -> ServedWeights:
        try:
            return list_weights(self.engine.tokenizer_manager)
        except (OSError, ValueError) as error:
            raise CapabilityError(
                f"the names and shapes of the served weights cannot be read from {self._info.model_path!r} "
                f"({error}), and wrong ones end SGLang; start the engine from a directory with safetensors"
            ) from error

    def _new_version(self, version: str | None) -> str:
        return choose_version(version, [str(self.engine.get_model_info()["weight_version"])])

    def _call(self, route: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Call one of SGLang's control routes, as SGLang's HTTP server does."""
        from sglang.srt.managers import io_struct

        inputs: dict[str, Any] = {
            "update_weights_from_disk": io_struct.UpdateWeightFromDiskReqInput,
            "pause_generation": io_struct.PauseGenerationReqInput,
            "continue_generation": io_struct.ContinueGenerationReqInput,
            "get_weights_by_name": io_struct.GetWeightsByNameReqInput,
            "load_lora_adapter": io_struct.LoadLoRAAdapterReqInput,
            "unload_lora_adapter": io_struct.UnloadLoRAAdapterReqInput,
            "load_lora_adapter_from_tensors": io_struct.LoadLoRAAdapterFromTensorsReqInput,
            "update_weight_version": io_struct.UpdateWeightVersionReqInput,
            "open_session": io_struct.OpenSessionReqInput,
            "close_session": io_struct.CloseSessionReqInput,
        }
        manager = self.engine.tokenizer_manager
        arguments = (inputs[route](**payload),) if route in inputs else ()
        answer = self._loop.run(lambda: getattr(manager, route)(*arguments))
        if isinstance(answer, dict):
            return answer
        if isinstance(answer, tuple):
            return {"success": answer[0], "message": answer[1]}
        message = getattr(answer, "message", None) or getattr(answer, "error_message", "")
        return {"success": getattr(answer, "success", True), "message": message}

    def close(self) -> None:
        """Shut down an engine that this object started; an engine of yours is left running."""
        if not self._closed and self._owned:
            files = files_of(getattr(self.engine, "port_args", None))
            self.engine.shutdown()
            for file in files:
                file.unlink(missing_ok=True)
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine was closed by close(); make a new one")
        if self._pid != os.getpid():
            self.__reduce__()

    def __deepcopy__(self, memo: object) -> SGLangOffline:
        self._check_open()
        return SGLangOffline(self.engine)

    def __reduce__(self) -> NoReturn:
        raise CapabilityError(
            f"an SGLangOffline serves the process that made it alone (pid {self._pid}), and no worker of a ParallelEnv "
            "or a collector; put the transform around the ParallelEnv, or use launch(…), to whose server every copy of "
            "a policy connects"
        )


def _start(
    model: str | Path,
    layers: int | Sequence[int] | None,
    constraint_modules: Sequence[str],
    server_args: dict[str, Any],
) -> Any:
    """Start ``sglang.Engine`` with the server half, on the CPU engine where there is no accelerator."""
    from torchrl_sglang_hidden.engines.server_options import (
        opted_in,
        require_sglang,
        resolve_layers,
        resolve_model,
        resolve_modules,
    )
    from torchrl_sglang_hidden.server.cpu import cpu_engine_environment, cpu_server_args, has_accelerator

    require_sglang()
    path = resolve_model(model)
    chosen = {LAYERS_ENV: resolve_layers(layers, path), **resolve_modules(constraint_modules)}
    on_cpu = server_args.get("device") == "cpu" or not has_accelerator()
    defaults = cpu_server_args(path, context_length=server_args.get("context_length")) if on_cpu else {}
    try:
        num_ranks = int(server_args.get("dp_size", 1)) * int(server_args.get("tp_size", 1))
        with opted_in(chosen), cpu_engine_environment(on_cpu, num_ranks):
            import sglang

            engine = sglang.Engine(model_path=path, **{**defaults, "enable_return_hidden_states": True, **server_args})
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise EngineError(
            f"SGLang did not start with {path!r}: {error}; read SGLang's output, and change the arguments"
        ) from error
    # SGLang takes the current event loop. In a notebook that loop is the notebook's own and always runs.
    engine.loop = asyncio.new_event_loop()
    return engine


async def _next(rows: AsyncGenerator[Any, None]) -> Any:
    """Return a copy of SGLang's next answer, or None at the end: SGLang goes on writing into the lists that it gave."""
    with translated():
        row = await anext(rows, None)
    if row is None:
        return None
    meta = {name: list(value) if isinstance(value, list) else value for name, value in row["meta_info"].items()}
    return {**row, "output_ids": list(row["output_ids"]), "meta_info": meta}


async def _hang_up(rows: AsyncGeneratorType[Any, None]) -> None:
    """End SGLang's generator, which aborts its request."""
    while rows.ag_running:  # a cancelled step is still ending
        await asyncio.sleep(0)
    await rows.aclose()
