"""New weights for a running engine: compared with the served ones first, then sent through disk or the network.

Knows which of SGLang's control routes to call, not how they are called. Knows nothing of requests.
"""
