"""Defines what client and server half say to each other through SGLang. Used on both sides.

A request carries its options in ``sampling_params["custom_params"]``. Its answer, with states and logits, comes back in
``meta_info["torchrl_sglang_hidden"]``. The server's status is in SGLang's internal state under the same name. Names,
numbers and floating-point bytes only: nothing received is ever unpickled. Knows nothing of TensorDicts, and imports no
SGLang.
"""

from __future__ import annotations

from torchrl_sglang_hidden.protocol.answer import (
    Answer,
    answer_of,
    digest_prompt,
    drop_shared,
    pack_answer,
    unpack_answer,
)
from torchrl_sglang_hidden.protocol.excerpts import excerpt
from torchrl_sglang_hidden.protocol.request_options import (
    MAX_CONSTRAINTS,
    Options,
    check_protocol,
    pack_options,
    read_options,
    unpack_options,
)
from torchrl_sglang_hidden.protocol.status import (
    ALL_LAYERS,
    CHANNEL,
    CONSTRAINTS_ENV,
    FALLBACK_REMEDY,
    LAYERS_ENV,
    PLUGIN_ENV,
    PROTOCOL,
    Status,
    image_token_in,
)
from torchrl_sglang_hidden.protocol.tensors import Way

__all__ = [
    "ALL_LAYERS",
    "CHANNEL",
    "CONSTRAINTS_ENV",
    "FALLBACK_REMEDY",
    "LAYERS_ENV",
    "MAX_CONSTRAINTS",
    "PLUGIN_ENV",
    "PROTOCOL",
    "Answer",
    "Options",
    "Status",
    "Way",
    "answer_of",
    "check_protocol",
    "digest_prompt",
    "drop_shared",
    "excerpt",
    "image_token_in",
    "pack_answer",
    "pack_options",
    "read_options",
    "unpack_answer",
    "unpack_options",
]
