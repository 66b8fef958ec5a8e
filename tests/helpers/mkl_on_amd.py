"""Has MKL, with which torch multiplies matrices, use all of an AMD processor.

MKL asks whether a processor is Intel's before it asks what the processor can do, and takes code of fifteen years ago
for others. It asks a function, which a library that is loaded before it may define. What it looks at next is what the
processor says of itself: nothing runs that the processor cannot compute.

Knows nothing of the package under test but where its cache is.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from torchrl_sglang_hidden.demo.cache import cached_path

__all__ = ["FUNCTION", "helps", "use_whole_processor"]

PRELOAD_ENV = "LD_PRELOAD"
FUNCTION = "mkl_serv_intel_cpu_true"


def helps() -> bool:
    """Return whether this machine has an AMD processor under Linux, and a compiler."""
    about = Path("/proc/cpuinfo")
    is_amd = platform.machine() == "x86_64" and about.exists() and "AuthenticAMD" in about.read_text()
    return is_amd and shutil.which("cc") is not None


def use_whole_processor() -> None:
    """Preload that function in all processes that this one starts, where it helps; warn where it cannot be made."""
    library, before = cached_path("mkl-on-amd.so"), os.environ.get(PRELOAD_ENV, "")
    # The loader separates names by these, and has no way to write one inside a name.
    if str(library) in before or not helps() or re.search(r"[\s:]", str(library)):
        return
    try:
        # It stays there: a process that is started without it later would say so on its stderr.
        if not library.exists():
            _make(library)
    except (OSError, subprocess.CalledProcessError) as error:  # a cache that is only read; a compiler without a linker
        said = f"\n{error.stderr}" if isinstance(error, subprocess.CalledProcessError) else ""
        warnings.warn(f"the tests take longer, without {library}: {error}{said}", stacklevel=2)
        return
    os.environ[PRELOAD_ENV] = f"{library} {before}".strip()


def _make(library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may make it at the same time.
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        made = Path(directory) / library.name
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(made)]
        source = f"int {FUNCTION}(void) {{ return 1; }}\n"
        subprocess.run(command, input=source, text=True, check=True, capture_output=True)
        made.replace(library)
