"""Translates between this package's records and SGLang's names and JSON, on the client's side.

Generation options, payloads, the checks before sending, and responses are here. Policies see records only, and engines
pass the payloads on. Knows nothing of how a payload travels, nor of TensorDicts.
"""
