"""SGLang in this process: `sglang.Engine`, without HTTP.

Knows how an ``sglang.Engine`` is started, and how its event loop runs while calls are under way. Payloads and answers
are those of `SGLangServer`, tensors as bytes instead of base64.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import AsyncGeneratorType
from typing import Any, ClassVar, TypeVar
from weakref import WeakValueDictionary

from torchrl_sglang_hidden.engines.base import Engine, ask_model
from torchrl_sglang_hidden.engines.sessions import Session, SessionHost
from torchrl_sglang_hidden.engines.streams import AsyncStream, Stream, check_stream
from torchrl_sglang_hidden.errors import (
    CapabilityError,
    EngineError,
    InputError,
    InputTypeError,
    RequestAbortedError,
    RequestRejectedError,
)
from torchrl_sglang_hidden.protocol import LAYERS_ENV, PLUGIN_ENV
from torchrl_sglang_hidden.protocol.served_weights import served_weights
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses
from torchrl_sglang_hidden.sglang_api.server_info import read_info, warm_up
from torchrl_sglang_hidden.weights.transports import Receiver, choose_transport, open_update, send
from torchrl_sglang_hidden.weights.validation import (
    Running,
    Transport,
    Weights,
    check_options,
    check_weights,
    next_version,
    open_weights,
)

__all__ = ["SGLangOffline"]

T = TypeVar("T")


class SGLangOffline(Engine):
    """SGLang's in-process engine. Its scheduler and detokenizer are child processes; no port is opened.

    Without an accelerator SGLang's CPU engine runs. SGLang chooses it when ``sglang`` is first imported: make a
    `SGLangOffline` before anything else imports ``sglang``. Use it under ``if __name__ == "__main__":``, since SGLang
    spawns processes.

    Args:
        model: the model's directory or hub name; or an ``sglang.Engine`` of yours, which `close` leaves running.
        layers: the layers whose states can be asked for, as for `launch`. Not with an engine of yours.
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
            chosen = (-1,) if layers is None else layers
            self.engine, self._owned = _start(model, chosen, constraint_modules, server_args), True
        elif hasattr(model, "async_generate") and not server_args and layers is None and not constraint_modules:
            self.engine, self._owned = model, False
        else:
            raise InputTypeError(
                f"SGLangOffline({type(model).__name__}, {', '.join(server_args)}): expected a model directory with "
                "arguments, or an sglang.Engine without"
            )
        self._loop = _LoopThread.of(self.engine.loop)
        self._info = self._loop.run(self._read_info)
        self._updating = threading.Lock()
        ranks = self.engine.tokenizer_manager.elastic_worker_count
        self._session_host = SessionHost(
            lambda: self._info, self._call, self._send_blocking, binary=True, num_ranks=ranks
        )
        self._closed = False

    async def _read_info(self) -> EngineInfo:
        states = await self.engine.tokenizer_manager.get_internal_state()
        payload = warm_up({"internal_states": states})
        if payload is not None:
            await self.engine.async_generate(**payload)
            states = await self.engine.tokenizer_manager.get_internal_state()
        scheduler_info = self.engine._scheduler_init_result.scheduler_infos[0]
        server_info = {**self.engine.tokenizer_manager.server_args.resolved_dict(), **scheduler_info}
        return read_info(self.engine.get_model_info(), {**server_info, "internal_states": states}, ask_model)

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
        return read_responses(requests, await self._send(payload), self._info)

    async def _send(self, payload: dict[str, Any]) -> Any:
        with _translated():
            return await self.engine.async_generate(**payload)

    def _send_blocking(self, payload: dict[str, Any]) -> Any:
        self._check_open()
        return self._loop.run(lambda: self._send(payload))

    def stream(self, request: Request) -> Stream:
        """See `Engine.stream`. Returns with the first token, because nothing else starts a request in this process."""
        return Stream(self._rows(self._stream_payload(request)), request, self._info)

    async def astream(self, request: Request) -> AsyncStream:
        """See `Engine.astream`. Returns with the first token."""
        return await AsyncStream.open(self._arows(self._stream_payload(request)), request, self._info)

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
        return Session(self._session_host, self._check)

    def update_weights(
        self,
        weights: Weights,
        *,
        version: str | None = None,
        transport: Transport = "auto",
        running: Running = "finish",
    ) -> str:
        """See `Engine.update_weights`. The only transport is disk: no network leads to an engine in this process."""
        self._check_open()
        check_options(version, transport, running)
        receiver = Receiver(
            name="an engine in this process",
            call=self._call,
            has_server_half=self._info.pools_in_server,
            reads_local_files=True,
            network=None,
        )
        chosen = choose_transport(transport, weights, receiver)
        with self._updating:
            try:
                served = served_weights(self._info.model_path)
            except (OSError, ValueError) as error:
                raise CapabilityError(
                    f"the names and shapes of the served weights cannot be read from {self._info.model_path!r} "
                    f"({error}), and wrong ones end SGLang; start the engine from a directory with safetensors"
                ) from error
            tensors = check_weights(open_weights(weights), served)
            before = str(self.engine.get_model_info()["weight_version"])
            version = next_version(before) if version is None else version
            if version == before:
                raise InputError(f"version={version!r} is that of the weights already served; pass another, or None")
            with open_update([chosen], weights, tensors, version=version, running=running) as update:
                send(chosen, update, receiver)
            self._info = dataclasses.replace(self._info, weight_version=version)
        return version

    def _call(self, route: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Call one of SGLang's control routes, as SGLang's HTTP server does."""
        from sglang.srt.managers import io_struct

        inputs: dict[str, Any] = {
            "update_weights_from_disk": io_struct.UpdateWeightFromDiskReqInput,
            "pause_generation": io_struct.PauseGenerationReqInput,
            "continue_generation": io_struct.ContinueGenerationReqInput,
            "update_weight_version": io_struct.UpdateWeightVersionReqInput,
            "open_session": io_struct.OpenSessionReqInput,
            "close_session": io_struct.CloseSessionReqInput,
        }
        manager = self.engine.tokenizer_manager
        arguments = (inputs[route](**payload),) if route in inputs else ()
        answer = self._loop.run(lambda: getattr(manager, route)(*arguments))
        if isinstance(answer, tuple):
            return {"success": answer[0], "message": answer[1]}
        return {"success": getattr(answer, "success", True), "message": getattr(answer, "message", "")}

    def close(self) -> None:
        """Shut down an engine that this object started; an engine of yours is left running."""
        if not self._closed and self._owned:
            self.engine.shutdown()
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine was closed by close(); make a new one")


def _start(
    model: str | Path, layers: int | Sequence[int], constraint_modules: Sequence[str], server_args: dict[str, Any]
) -> Any:
    """Start ``sglang.Engine`` with the server half, on the CPU engine where there is no accelerator."""
    from torchrl_sglang_hidden.engines.server_options import (
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
        with _opted_in(chosen), cpu_engine_environment(on_cpu):
            import sglang

            engine = sglang.Engine(model_path=path, **{**defaults, "enable_return_hidden_states": True, **server_args})
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise EngineError(
            f"SGLang did not start with {path!r}: {error}; read SGLang's output, and change the arguments"
        ) from error
    # SGLang takes the current event loop. In a notebook that loop is the notebook's own and always runs.
    engine.loop = asyncio.new_event_loop()
    return engine


@contextmanager
def _opted_in(options: Mapping[str, str]) -> Iterator[None]:
    """Set the variables that switch the server half on, while SGLang starts its processes."""
    chosen = {PLUGIN_ENV: "1", **options}
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _translated() -> Iterator[None]:
    """Turn SGLang's exceptions into this package's."""
    from starlette.exceptions import HTTPException  # what SGLang raises for an abort, in-process too

    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestRejectedError(f"the engine refused the batch: {error}; change the requests") from error
    except HTTPException as error:
        raise RequestAbortedError(
            f"the engine aborted the batch: {error.detail}; generate again, or read SGLang's output"
        ) from error


async def _next(rows: AsyncGenerator[Any, None]) -> Any:
    """Return a copy of SGLang's next answer, or None at the end: SGLang goes on writing into the lists that it gave."""
    with _translated():
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


class _LoopThread:
    """Runs an engine's event loop in a thread while calls are under way, so that several threads may call at once.

    Between calls the loop stands still, and the engine's own blocking methods work as before. There is one object per
    loop: several `SGLangOffline`s of one engine share it.
    """

    _all: ClassVar[WeakValueDictionary[asyncio.AbstractEventLoop, _LoopThread]] = WeakValueDictionary()
    _all_lock = threading.Lock()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _LoopThread:
        with cls._all_lock:
            return cls._all.setdefault(loop, cls(loop))

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._calls = 0
        self._thread: threading.Thread | None = None

    def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with self._running():
            future = asyncio.run_coroutine_threadsafe(call(), self._loop)
            try:
                return future.result()
            finally:
                future.cancel()  # an interrupt must not leave the call running

    async def arun(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if asyncio.get_running_loop() is self._loop:
            return await call()
        with self._running():
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call(), self._loop))

    def run_later(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Run a call in a new thread without waiting for it, so that the loop's own thread may ask for it too.

        The garbage collector closes an abandoned stream in whichever thread it runs.
        """
        with suppress(RuntimeError):  # the interpreter ends, and the engine with it
            threading.Thread(target=self.run, args=(call,), daemon=True).start()

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self._lock:
            if self._calls == 0:
                if self._loop.is_running():
                    raise EngineError(
                        "the sglang.Engine's event loop is already running here, so that a blocking call would wait "
                        "for itself; await agenerate(), or let SGLangOffline(model_path) make the engine"
                    )
                self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-engine-loop", daemon=True)
                self._thread.start()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if self._calls == 0 and self._thread is not None:
                    self._loop.call_soon_threadsafe(self._loop.stop)
                    self._thread.join()
