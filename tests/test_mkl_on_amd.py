"""What the tests start computes with all of the processor."""

from __future__ import annotations

import subprocess
import sys

from helpers.mkl_on_amd import FUNCTION, helps

ASK = f"import ctypes; print(ctypes.CDLL(None).{FUNCTION}())"


def test_mkl_takes_an_amd_processor_for_one_that_it_knows() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=False)
    assert (done.stdout == "1\n") is helps(), done.stderr
