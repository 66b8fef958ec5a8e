"""Fixtures of the server half's tests."""

from __future__ import annotations

import pytest

from torchrl_sglang_hidden.server import plugin
from torchrl_sglang_hidden.server.capture import Capture
from torchrl_sglang_hidden.server.output_stream import MessageGate


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """Return a capture that replaces the plugin's own for one test."""
    capture = Capture()
    monkeypatch.setattr(plugin, "_capture", capture)
    monkeypatch.setattr(plugin, "_gate", MessageGate(capture))
    return capture
