"""The command line: ``torchrl-sglang-hidden demo | serve | record | report``.

Knows how arguments become a call of `run_demo`, `launch`, `record_hidden_states` or `write_report`, nothing of SGLang
or TorchRL: a command imports what it runs when it runs, so that ``--help`` appears at once.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from torchrl_sglang_hidden._version import __version__
from torchrl_sglang_hidden.errors import InputError, SGLangHiddenError, UnknownOptionError

if TYPE_CHECKING:
    from torchrl_sglang_hidden.engines.base import Engine
    from torchrl_sglang_hidden.engines.launch import LaunchedServer

__all__ = ["app", "main", "parse_server_arguments"]

API_KEY_ENV = "TORCHRL_SGLANG_HIDDEN_API_KEY"
# Of `record`; the recording has all of them.
MAX_SHOWN_FAILURES = 10

_SNIPPET = """\
from tensordict import TensorDict
from torchrl.modules.llm.policies import Text
from torchrl_sglang_hidden import SGLangHiddenWrapper{connect_import}

policy = SGLangHiddenWrapper({engine}, input_mode="text", generate_kwargs={{"max_new_tokens": 16}})
out = policy(TensorDict(text=Text(prompt=["The capital of France is"], batch_size=1), batch_size=1))
print(out["text"].response, out["hidden_states", "response"].shape)
"""


class _ErrorsAsOneLine(TyperGroup):
    """Prints this package's errors on stderr, without a traceback, unless ``--debug`` asks for it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SGLangHiddenError as error:
            if ctx.params["debug"]:
                raise
            typer.secho(f"Error: {error}", fg="red", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="torchrl-sglang-hidden",
    cls=_ErrorsAsOneLine,
    help="A TorchRL policy over SGLang that returns text, tokens, log-probs and mean-pooled hidden states.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; the entry point of the console script."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchrl-sglang-hidden {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="Directory for the picture and the TensorDict; those of an earlier run are replaced.")
    ] = Path("demo_output"),
    # prompts.MAX_NEW_TOKENS; importing it would load PyTorch for the help. A test compares.
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one response.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
) -> None:
    """Collect two dozen responses and their hidden states from a small real model; needs no GPU.

    Starts an SGLang server, drives it with a TorchRL collector, and prints a table of the responses.

    Writes a picture of the pooled hidden states, and the TensorDict. The first run downloads 93 MB.
    """
    from torchrl_sglang_hidden.demo.run import run_demo

    run_demo(output_dir=output, max_new_tokens=max_new_tokens, temperature=temperature)


_Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="The data set: an .npz with one row per step in each array, a .jsonl, or a directory that TensorDict.save "
        "or a Hugging Face data set's save_to_disk wrote.",
    ),
]
_Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="Directory of the recording; one that was begun is gone on with.")
]
_Url = Annotated[
    list[str] | None,
    typer.Option(help="Address of a running server; several, each with --url, share the rows.", show_default=False),
]
_Model = Annotated[
    str | None,
    typer.Option(help="A model to serve meanwhile: a directory, a model hub's name, or demo.", show_default=False),
]
_PromptKey = Annotated[
    str | None,
    typer.Option(help="The field with the prompts: texts, chats (lists of messages) or token ids.", show_default=False),
]
_Segments = Annotated[
    str | None,
    typer.Option(
        help="Any of prompt,response,full; by default prompt where nothing is generated, else response.",
        show_default=False,
    ),
]


@app.command()
def record(
    data: _Data,
    out: _Out,
    url: _Url = None,
    model: _Model = None,
    prompt_key: _PromptKey = None,
    prompt: Annotated[str | None, typer.Option(help='A template: "You see {obs}."', show_default=False)] = None,
    segments: _Segments = None,
    layers: Annotated[str, typer.Option(help="Layer ids, such as 7,15,-1; -1 is the last.")] = "-1",
    pooling: Annotated[str, typer.Option(help="mean, last, max or sum.")] = "mean",
    tokens: Annotated[bool, typer.Option("--tokens", help="Also record every token's states, in float16.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Most tokens to generate; 0 reads the prompts.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of one call.")] = 32,
    every: Annotated[int, typer.Option(min=1, help="One label for so many rows of an episode.")] = 1,
    api_key: Annotated[
        str | None, typer.Option(envvar=API_KEY_ENV, help="Key that the servers want.", show_default=False)
    ] = None,
) -> None:
    """Label a data set with hidden states; run it again after an interruption to go on.

    Example: torchrl-sglang-hidden record walks.npz walks --model demo --prompt "You see {text_generated}." --every 25
    """
    spec = _read_spec(segments, layers, pooling, max_new_tokens)
    source = _read_prompt(prompt, prompt_key)
    with _open_engine(url, model, api_key, spec["layers"]) as engine:
        from torchrl_sglang_hidden.policy.wrapper import SGLangHiddenWrapper
        from torchrl_sglang_hidden.rl.record import record_hidden_states
        from torchrl_sglang_hidden.spec.hidden import HiddenSpec

        policy = SGLangHiddenWrapper(
            engine,
            input_mode="text",
            hidden=HiddenSpec(**spec),
            generate_kwargs={"max_new_tokens": max_new_tokens, "temperature": 0.0},
        )
        recording = record_hidden_states(
            policy, data, out, prompt=source, batch_size=batch_size, tokens=tokens, every=every
        )
    typer.echo(f"Recorded {len(recording)} rows in {out}; {len(recording.failures)} of them have no label.")
    for failure in recording.failures[:MAX_SHOWN_FAILURES]:
        typer.echo(f"    {failure.reason}")


def _read_spec(segments: str | None, layers: str, pooling: str, max_new_tokens: int) -> dict[str, Any]:
    """Return the arguments of `HiddenSpec` that the options of ``record`` stand for."""
    if layers == "all":
        raise InputError("record --layers all: expected integers with commas between, such as 7,15,-1")
    ids = parse_layers(layers, "record") or ()
    named = segments.split(",") if segments is not None else ["response" if max_new_tokens else "prompt"]
    return {"segments": tuple(named), "layers": ids if len(ids) > 1 else ids[0], "pooling": pooling}


def _read_prompt(prompt: str | None, prompt_key: str | None) -> Any:
    """Return the prompt that the options of ``record`` stand for: a format string, or what reads a field."""
    if (prompt is None) == (prompt_key is None):
        raise InputError(
            f"record --prompt {prompt} --prompt-key {prompt_key}: expected one of the two; use --prompt for a "
            "template, --prompt-key for a field"
        )
    if prompt_key is None:
        return prompt
    from torchrl_sglang_hidden.rl.prompts import Field

    return Field(prompt_key)


@contextmanager
def _open_engine(
    url: list[str] | None, model: str | None, api_key: str | None, layers: int | tuple[int, ...]
) -> Iterator[Engine]:
    """Connect to servers, or start one that ends with the block."""
    if url and model is None:
        from torchrl_sglang_hidden.engines.http import connect

        with connect(url if len(url) > 1 else url[0], api_key=api_key) as engine:
            yield engine
    elif model is not None and not url:
        from torchrl_sglang_hidden.demo.model import demo_model
        from torchrl_sglang_hidden.engines.launch import launch

        served = demo_model() if model == "demo" else model
        with launch(served, layers=layers if isinstance(layers, tuple) else (layers,), api_key=api_key) as server:
            yield server
    else:
        raise InputError(f"record --url {url} --model {model}: expected one of the two; pass the server, or the model")


@app.command()
def report(
    recording: Annotated[Path, typer.Argument(help="Directory that record wrote.")],
    out: Annotated[Path | None, typer.Option(help="By default RECORDING.html.", show_default=False)] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="A field to probe for, such as next.reward; several, each with --target.", show_default=False
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="A recording of live states: how far they are from these.", show_default=False)
    ] = None,
) -> None:
    """Write a page on what a recording's hidden states hold, with its pictures inside."""
    from torchrl_sglang_hidden.rl.report import write_report

    page = write_report(recording, out, targets=[tuple(name.split(".")) for name in target or ()], against=against)
    typer.echo(f"Wrote {page}")


@app.command(context_settings={"ignore_unknown_options": True})
def serve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|SGLANG_ARGUMENT",
            help="First the model: a directory or a model hub's name; by default the demo model. Then any arguments of "
            "SGLang's server, such as --dtype float32 --tp-size 2.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="A device name such as cuda or cpu; auto takes the accelerator, or SGLang's CPU engine where there is "
            "none."
        ),
    ] = "auto",
    layers: Annotated[
        str,
        typer.Option(
            help="Layers that the server's CUDA graphs record, such as 7,15,-1; -1, the last, is always included. By "
            "default all where that is cheap. Without such graphs clients can ask for every layer."
        ),
    ] = "all",
    constraints: Annotated[
        str,
        typer.Option(help="Modules with your own logit constraints, such as my.module,other.", show_default=False),
    ] = "",
    host: Annotated[str, typer.Option(help="Address to bind. Any address but loopback needs --api-key.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="TCP port; by default a free one.", show_default=False)] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=API_KEY_ENV,
            help="Key that clients must send. Process listings show the option, but not the variable.",
            show_default=False,
        ),
    ] = None,
    log_file: Annotated[
        Path | None,
        typer.Option(
            help="File for the server's output; by default a new file in the user's log directory.", show_default=False
        ),
    ] = None,
) -> None:
    """Serve a model through SGLang with hidden-state pooling, until Ctrl-C or SIGTERM.

    Prints the address and the Python lines that use the server once the server generates.

    Example: torchrl-sglang-hidden serve Qwen/Qwen3-0.6B --port 30000 --layers 7,15,-1 --mem-fraction-static 0.8
    """
    model, server_args = parse_server_arguments(arguments or [])
    options = {
        "device": device,
        "layers": parse_layers(layers),
        "constraint_modules": tuple(filter(None, constraints.split(","))),
        "host": host,
        "port": port,
        "api_key": api_key,
        "log_file": log_file,
    }
    _serve_until_ended(model, options, server_args)


def _serve_until_ended(model: str | None, options: dict[str, Any], server_args: dict[str, Any]) -> None:
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        from torchrl_sglang_hidden.demo.model import demo_model
        from torchrl_sglang_hidden.engines.launch import launch

        with launch(demo_model() if model is None else model, **options, **server_args) as server:
            _announce(server, with_key=options["api_key"] is not None)
            server.wait()
    except KeyboardInterrupt:
        typer.echo("Stopped.")
    finally:
        signal.signal(signal.SIGTERM, previous)


def parse_layers(text: str, command: str = "serve") -> tuple[int, ...] | None:
    """Read the layer ids of ``--layers``: ``"7,15,-1"`` → ``(7, 15, -1)``, and ``"all"`` → None.

    Raises:
        InputError: a part is no integer.
    """
    if text == "all":
        return None
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise InputError(f"{command} --layers {text}: expected integers with commas between, such as 7,15,-1, or all")
    return tuple(int(layer) for layer in text.split(","))


def parse_server_arguments(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Split the arguments of ``serve`` into the model and keyword arguments of ``launch``.

    ``--chunked-prefill-size 64`` and ``--chunked-prefill-size=64`` become ``chunked_prefill_size="64"``, several values
    become a list, a bare flag becomes True. SGLang checks the names.

    Args:
        arguments: the command line behind ``serve``, without the options that ``serve`` reads itself.

    Returns:
        The model, None for the demo model; and SGLang's server arguments by their Python names.

    Raises:
        UnknownOptionError: a second model, or an argument that is neither a value nor ``--name``.
        InputError: a name appears twice.
    """
    rest = list(arguments)
    model = rest.pop(0) if rest and not rest[0].startswith("-") else None
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for argument in rest:
        # A negative number is a value.
        if not argument.startswith("-") or re.fullmatch(r"-[\d.]+", argument):
            if current is None:
                raise UnknownOptionError(f"serve {argument}: one model only; use --name value for server arguments")
            current.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        if not re.fullmatch(r"--[A-Za-z][\w-]*", flag):
            raise UnknownOptionError(f"serve {argument}: use --name value, or --name=value, for server arguments")
        name = flag[2:].replace("-", "_")
        if name == "model":
            raise UnknownOptionError("serve --model: pass the model first, serve MODEL --name value")
        if name in values:
            raise InputError(f"serve {flag}: given twice; give it once, with all its values")
        current = values[name] = [value] if equals else []
    return model, {name: _value(found) for name, found in values.items()}


def _value(found: list[str]) -> str | list[str] | bool:
    if not found:
        return True
    return found[0] if len(found) == 1 else found


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _announce(server: LaunchedServer, *, with_key: bool) -> None:
    engine, connect_import = f'"{server.url}"', ""
    if with_key:
        engine, connect_import = f'connect("{server.url}", api_key="…")', ", connect"
    typer.echo(f"Serving {server.info.model_path} at {server.url}")
    typer.echo(f"Log: {server.log_path}")
    typer.echo("Ctrl-C ends it. To use it, paste into Python:\n")
    typer.echo(_SNIPPET.format(engine=engine, connect_import=connect_import))
