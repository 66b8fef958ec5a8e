"""The policy: a TensorDict in, engine requests, a TensorDict out.

Knows nothing of how a request travels, nor of SGLang's payloads.
"""
