"""Runs SGLang's server with the server half switched on, on any device: ``python -m torchrl_sglang_hidden.server``.

Takes every argument of SGLang's own server and passes it on. Adds the plugin's opt-in, stock ``return_hidden_states``
as the fallback, and the CPU engine where there is no accelerator. For ``launch`` it also takes keys that no process
listing shows, and ends together with its parent. ``--device`` is read from the command line only, not from a
``--config`` file. An address that other machines reach needs a key.

Knows nothing of TorchRL or of requests.
"""

from __future__ import annotations

import argparse
import gc
import ipaddress
import json
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Nothing that imports torch: libraries that come with it read the environment that `main` sets, when they are loaded.
from torchrl_sglang_hidden.errors import CapabilityError
from torchrl_sglang_hidden.server.cpu import cpu_server_args, has_accelerator, library_environment, use_cpu_engine

__all__ = [
    "API_KEY_ENV",
    "PARENT_PID_ENV",
    "SECRETS_ENV",
    "SECRET_ARGUMENTS",
    "check_tokenizer_processes",
    "command_line",
    "is_loopback",
    "main",
    "watch_parent",
]

# Set by launch. Every user of the machine can read a command line, and only its owner a process's environment.
API_KEY_ENV = "TORCHRL_SGLANG_HIDDEN_API_KEY"
SECRETS_ENV = "TORCHRL_SGLANG_HIDDEN_SECRETS"  # the others among SGLang's arguments, as JSON by their Python names
SECRET_ARGUMENTS = ("api_key", "admin_api_key", "ssl_keyfile_password")
PARENT_PID_ENV = "TORCHRL_SGLANG_HIDDEN_PARENT_PID"
TITLE_ENV = "SPT_NOENV"  # setproctitle's

_POLL_INTERVAL_S = 1.0


def main(arguments: Sequence[str]) -> None:
    """Serve until the process is stopped.

    Args:
        arguments: SGLang server arguments, as on the command line. They override every default set here.
    """
    _keep_room_for_titles()
    watch = _end_with_parent()
    secrets = _take_secrets()
    # Imports drop little, and each collection looks at all that they made before: a fifth of the time until a start.
    gc.disable()
    on_cpu = _choose_device(_peek(arguments))
    harmless = frozenset() if watch is None or watch.native_id is None else frozenset({watch.native_id})
    _run_server(list(arguments), secrets, on_cpu=on_cpu, harmless=harmless)


def command_line(server_args: Mapping[str, Any]) -> list[str]:
    """Write SGLang server arguments as a command line: ``chunked_prefill_size=64`` → its flag and ``"64"``.

    ``True`` gives the bare flag. ``None`` and ``False`` leave the argument out, since SGLang's switches can only be
    set. A list or tuple gives one flag with several values. A mapping is written as JSON.
    """
    rendered: list[str] = []
    for name, value in server_args.items():
        if value is None or value is False:
            continue
        rendered.append("--" + name.replace("_", "-"))
        if isinstance(value, (list, tuple)):
            rendered.extend(str(item) for item in value)
        elif isinstance(value, Mapping):
            rendered.append(json.dumps(dict(value)))
        elif value is not True:
            rendered.append(str(value))
    return rendered


def check_tokenizer_processes(number: object) -> None:
    """Refuse several tokenizer processes: SGLang gives them no plugins, and no check of API keys.

    Args:
        number: SGLang's ``tokenizer_worker_num``; None for its default, 1.

    Raises:
        CapabilityError: more than one.
    """
    if number not in (None, 1, "1"):
        raise CapabilityError(
            f"tokenizer_worker_num={number!r:.80}: SGLang's several tokenizer processes have neither the route "
            "/v1/hidden_states nor a check of API keys; use 1, and more servers where one tokenizer is too slow"
        )


def is_loopback(host: str) -> bool:
    """Return whether an address is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def watch_parent(parent_pid: int, pipe_fd: int, on_end: Callable[[], None]) -> None:
    """Block until the parent is gone, then call ``on_end``.

    Args:
        parent_pid: the parent's process id, as the parent passed it on: it may end before this process first looks.
        pipe_fd: read end of a pipe that the parent holds open and never writes to.
        on_end: called once, after the parent ended.
    """
    while os.getppid() == parent_pid:
        # The pipe closes at once. getppid also finds the end where a fork of the parent keeps the pipe open.
        readable, _, _ = select.select([pipe_fd], [], [], _POLL_INTERVAL_S)
        if readable and not os.read(pipe_fd, 1):
            break
    on_end()


def _keep_room_for_titles() -> None:
    """Find where this process's title stands in memory, for the names that SGLang gives to the forks of it.

    ``setproctitle`` finds the place by the environment's first variable. Once that is changed or taken away, nothing
    is found, and names are dropped without a word.
    """
    # Else the names take the place of what /proc shows of this process's environment, which is gone at once.
    os.environ.setdefault(TITLE_ENV, "1")
    # A client alone, which is imported with this module, does without what comes with SGLang.
    import setproctitle

    setproctitle.getproctitle()


def _take_secrets() -> dict[str, str]:
    """Return SGLang's arguments that came through the environment, where no process started from here finds them."""
    secrets: dict[str, str] = json.loads(os.environ.pop(SECRETS_ENV, "{}"))
    api_key = os.environ.pop(API_KEY_ENV, None)
    return secrets if api_key is None else {**secrets, "api_key": api_key}


def _end_with_parent() -> threading.Thread | None:
    parent_pid = os.environ.pop(PARENT_PID_ENV, None)
    # A server started by hand must go on when its shell closes stdin.
    if parent_pid is None:
        return None
    if os.getpgrp() != os.getpid():
        raise SystemExit(
            f"{PARENT_PID_ENV}={parent_pid}: this process (pid {os.getpid()}) shares the process group {os.getpgrp()}, "
            "and ending with the parent ends the group; unset the variable, or start it in a session of its own"
        )
    # SIGKILL, as nobody is left to wait for a slow end. The whole group, as SGLang's own processes are in it.
    watch = threading.Thread(
        target=watch_parent,
        args=(int(parent_pid), sys.stdin.fileno(), partial(_end_group, int(parent_pid))),
        name="watch-parent",
        daemon=True,
    )
    watch.start()
    return watch


def _end_group(parent_pid: int) -> None:
    """Remove what this server and its parent leave, which nobody else is left to do, and end all of its processes."""
    try:
        from torchrl_sglang_hidden.protocol.server_files import FILES_ENV, remove_files, sweep

        if directory := os.environ.get(FILES_ENV):
            remove_files(Path(directory), session=os.getpgrp())
            sweep(Path(directory).parent, ended=parent_pid)
    finally:
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _choose_device(chosen: argparse.Namespace) -> bool:
    """Set the CPU engine up where it is to serve, and return whether it is."""
    num_ranks = chosen.data_parallel_size * chosen.tensor_parallel_size
    if chosen.device is None:
        # Only torch knows, and it brings libraries that read their variables now or never.
        with library_environment(num_ranks):
            on_cpu = not has_accelerator()
    else:
        on_cpu = chosen.device == "cpu"
    if on_cpu:
        use_cpu_engine(num_ranks)
    return on_cpu


def _peek(arguments: Sequence[str]) -> argparse.Namespace:
    # The device must be known before SGLang is imported, and SGLang's own parser is there only after the import.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--context-length", type=int)
    parser.add_argument("--data-parallel-size", "--dp-size", "--dp", type=int, default=1)
    parser.add_argument("--tensor-parallel-size", "--tp-size", "--tp", type=int, default=1)
    return parser.parse_known_args(arguments)[0]


def _run_server(arguments: list[str], secrets: Mapping[str, str], *, on_cpu: bool, harmless: frozenset[int]) -> None:
    from torchrl_sglang_hidden.protocol import PLUGIN_ENV
    from torchrl_sglang_hidden.protocol.server_files import FILES_ENV, ServerFiles
    from torchrl_sglang_hidden.protocol.shared_memory import remove_leftovers
    from torchrl_sglang_hidden.server.forking import fork_children
    from torchrl_sglang_hidden.server.model_files import offer_model

    os.environ.setdefault(PLUGIN_ENV, "1")  # an explicit "0" serves stock SGLang
    if on_cpu:
        # SGLang tries to import it on every device: 2 s, for kernels of NVIDIA's alone.
        sys.modules.setdefault("flashinfer", None)  # type: ignore[arg-type]
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    # Whoever launches a server owns its files. One that is started by hand owns them itself.
    own_files = None if FILES_ENV in os.environ else ServerFiles()
    if own_files is not None:
        os.environ[FILES_ENV] = str(own_files.directory)
    if on_cpu:
        fork_children(harmless)
    arguments = _merge_config_file(arguments)
    chosen = _peek(arguments)
    defaults: dict[str, Any] = {"enable_return_hidden_states": True}
    if on_cpu and chosen.model_path is not None:
        offer_model(chosen.model_path)
        defaults |= cpu_server_args(chosen.model_path, context_length=chosen.context_length)
    # Defaults first: argparse keeps the last value of an argument, which is then the user's.
    server_args = prepare_server_args(command_line(defaults) + arguments)
    if os.environ[PLUGIN_ENV] == "1":
        check_tokenizer_processes(server_args.tokenizer_worker_num)
    for name, secret in secrets.items():
        # Not through the command line: SGLang keeps the command line, and shows it in /server_info.
        setattr(server_args, name, secret)
    _keep_out_of_logs(filter(None, (getattr(server_args, name, None) for name in SECRET_ARGUMENTS)))
    if not is_loopback(server_args.host) and not server_args.api_key:
        raise SystemExit(
            f"--host {server_args.host}: reachable from other machines, and no API key; set {API_KEY_ENV}=…, or keep "
            "to --host 127.0.0.1"
        )
    # What the imports made stays for good: nor do later collections look at it.
    gc.freeze()
    gc.enable()
    try:
        run_server(server_args)
    finally:
        _stop_watchdog()
        kill_process_tree(os.getpid(), include_parent=False)
        remove_leftovers()
        if own_files is not None:
            own_files.remove()


def _stop_watchdog() -> None:
    # SGLang's watchdog looks once a second, and would report processes ended on purpose as crashed.
    from sglang.srt.entrypoints.http_server import get_global_state

    state = get_global_state()
    if state is not None and state.tokenizer_manager._subprocess_watchdog is not None:
        state.tokenizer_manager._subprocess_watchdog.stop()


def _merge_config_file(arguments: list[str]) -> list[str]:
    # SGLang puts a config file's values in front of the command line, so that our defaults would override them.
    if "--config" not in arguments:
        return arguments
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    merged: list[str] = ConfigArgumentMerger(parser).merge_config_with_args(arguments)
    return merged


def _keep_out_of_logs(secrets: Iterable[str]) -> None:
    # SGLang logs all its server arguments at start, the API key among them in plain text.
    hidden = tuple(secrets)
    make_record = logging.getLogRecordFactory()

    def make_redacted_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        shown = f"{record.msg}{record.args}"
        if any(secret in shown for secret in hidden):
            text = record.getMessage()
            for secret in hidden:
                text = text.replace(secret, "***")
            record.msg, record.args = text, None
        return record

    if hidden:
        logging.setLogRecordFactory(make_redacted_record)


if __name__ == "__main__":
    main(sys.argv[1:])
