"""Serves pooled hidden states to programs of any language: ``POST /v1/hidden_states`` on SGLang's own port.

Runs in the process of SGLang's HTTP server, as a client of the engine behind it: requests are checked, written and read
by `sglang_api`, as any other client's are. Knows nothing of TorchRL, TensorDicts or policies.
"""
