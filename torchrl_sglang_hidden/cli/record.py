"""``record``: how its options become a policy and a call of `record_hidden_states`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from torchrl_sglang_hidden.cli.options import API_KEY_ENV, ModelOption, UrlOption, open_engine, parse_layers
from torchrl_sglang_hidden.errors import InputError

__all__ = ["record"]

# The recording has all of them.
MAX_SHOWN_FAILURES = 10

_Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="The data set: an .npz with one row per step in each array, a .jsonl, a directory that TensorDict.save "
        "or a Hugging Face data set's save_to_disk wrote, or a folder of image files.",
    ),
]
_Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="Directory of the recording; one that was begun is gone on with.")
]
_PromptKey = Annotated[
    str | None,
    typer.Option(help="The field with the prompts: texts, chats (lists of messages) or token ids.", show_default=False),
]
_ImageKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--image-key",
        help="A field with images, for a vision-language model; repeat it for several, in the prompt's order.",
        show_default=False,
    ),
]
_Segments = Annotated[
    str | None,
    typer.Option(
        help="Any of prompt,response,full; by default prompt where nothing is generated, else response.",
        show_default=False,
    ),
]


def record(
    data: _Data,
    out: _Out,
    url: UrlOption = None,
    model: ModelOption = None,
    prompt_key: _PromptKey = None,
    prompt: Annotated[str | None, typer.Option(help='A template: "You see {obs}."', show_default=False)] = None,
    image_key: _ImageKeys = None,
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
    with open_engine("record", url, model, api_key, spec["layers"]) as engine:
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
            policy,
            data,
            out,
            prompt=source,
            batch_size=batch_size,
            tokens=tokens,
            every=every,
            images_keys=image_key or None,
        )
    typer.echo(f"Recorded {len(recording)} rows in {out}; {len(recording.failures)} of them have no label.")
    for failure in recording.failures[:MAX_SHOWN_FAILURES]:
        typer.echo(f"    {failure.reason}")


def _read_spec(segments: str | None, layers: str, pooling: str, max_new_tokens: int) -> dict[str, Any]:
    """Return the arguments of `HiddenSpec` that the options of ``record`` stand for."""
    ids = parse_layers(layers, "record")
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
