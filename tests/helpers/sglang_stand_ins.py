"""Stand-ins for what SGLang's scheduler passes to the plugin, with the attributes that the plugin reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torchrl_sglang_hidden.protocol import CHANNEL, pack_options
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits


class Req:
    """SGLang's request, with the attributes that the plugin reads."""

    def __init__(self, wanted: Wanted | None = None, length: int = 200, logits: WantedLogits | None = None) -> None:
        wanted = Wanted((), None) if wanted is None and logits is not None else wanted
        custom = {CHANNEL: pack_options(wanted, "text", logits)} if wanted is not None else None
        self.sampling_params = SimpleNamespace(custom_params=custom, max_new_tokens=9)
        self.origin_input_ids = list(range(length))
        self.output_ids: list[int] = []
        self.extra_key = None
        self.session: Any = None
        self.multimodal_inputs: Any = None
        self.vocab_size = 10**6
        self.prefix_len = self.host_hit_length = 0

    def finished(self) -> bool:
        return False
