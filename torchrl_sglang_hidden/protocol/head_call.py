"""Writes and reads the calls that push a head to a server half, or drop one.

They travel as the name of a weight that no model has, as other calls of the server half do: SGLang hands it to every
scheduler. Knows nothing of how a head is computed.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass

from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.protocol.excerpts import excerpt
from torchrl_sglang_hidden.protocol.status import PROTOCOL, check_protocol
from torchrl_sglang_hidden.spec.heads import check_head_name

__all__ = ["HeadCall"]

_PREFIX = "torchrl_sglang_hidden:head:"


@dataclass(frozen=True, slots=True)
class HeadCall:
    """One call about a head.

    Args:
        name: the head's.
        version: the new head's; empty where one is dropped.
        data: the new head's file; empty where one is dropped.
    """

    name: str
    version: str = ""
    data: bytes = b""

    def pack(self) -> str:
        """Return the name of a weight that stands for the call."""
        data = base64.b64encode(self.data).decode("ascii")
        fields = {"protocol": PROTOCOL, "name": self.name, "version": self.version, "data": data}
        return _PREFIX + json.dumps(fields, separators=(",", ":"))

    @staticmethod
    def is_packed(name: object) -> bool:
        """Return whether the name of a weight stands for a call about a head."""
        return isinstance(name, str) and name.startswith(_PREFIX)

    @classmethod
    def unpack(cls, name: str) -> HeadCall:
        """Read what `pack` wrote.

        Raises:
            InputError: it cannot be read.
            ProtocolError: it is of another protocol.
        """
        try:
            fields = json.loads(name.removeprefix(_PREFIX))
            check_protocol(fields["protocol"], "the client that pushes a head")
            version, data = fields["version"], base64.b64decode(fields["data"], validate=True)
            if not isinstance(version, str):
                raise TypeError(f"the version is {excerpt(version)}")
            if data and not version:
                raise ValueError("a head without a version, which is what a row has that no head scored")
            return cls(check_head_name(fields["name"]), version, data)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, binascii.Error) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"a call about a head cannot be read ({error!r:.200}); use Engine.push_head") from error
