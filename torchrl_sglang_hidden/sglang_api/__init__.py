"""SGLang's names and JSON, the client's side: generation options, payloads, what must not be sent, answers.

Past it there are records, no dicts. Knows nothing of how a payload travels, nor of TensorDicts.
"""
