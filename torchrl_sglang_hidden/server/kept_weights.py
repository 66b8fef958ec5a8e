"""Gives a server that is started again the weights that its clients had pushed, before it answers anybody.

`launch(restart=True)` names a checkpoint in the environment. It is loaded as an update from disk would be: by the same
code, over the weights of the model's own directory. And the server writes down which version it serves, so that one
that another client pushed is not taken for one that was kept. Knows nothing of how the checkpoint came to be.
"""

from __future__ import annotations

import os
from typing import Any

from torchrl_sglang_hidden.protocol.served_weights import KEPT_ENV
from torchrl_sglang_hidden.protocol.server_files import note_shared_memory, note_version

__all__ = ["after_scheduler_start", "after_version"]


def after_scheduler_start(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Load the kept checkpoint when a scheduler is complete, and before it reads its first request.

    And write down what it has in shared memory, for whoever cleans up when the server was killed.

    Raises:
        RuntimeError: the checkpoint cannot be loaded. It ends the server: old weights must not be served.
    """
    note_shared_memory()
    directory = os.environ.get(KEPT_ENV)
    if not directory:
        return
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    request = UpdateWeightFromDiskReqInput(model_path=directory, load_format="safetensors")
    answer = scheduler.weight_updater.update_weights_from_disk(request)
    if not answer.success:
        raise RuntimeError(f"torchrl_sglang_hidden: the kept weights in {directory} cannot be loaded: {answer.message}")


def after_version(new_version: str | None = None) -> None:
    """Write down the version that the server serves from now on; None is the present one."""
    if new_version is not None:
        note_version(new_version)
