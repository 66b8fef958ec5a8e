"""Names the forward modes of SGLang whose rows the server half reads, one row for each computed position.

Speculative verification, for one, has rows of tokens that may be rejected. A request that met such a step comes back
with too few rows, which the client refuses.
"""

__all__ = ["DECODE_MODE", "PREFILL_MODES"]

PREFILL_MODES = ("EXTEND", "MIXED")
DECODE_MODE = "DECODE"
