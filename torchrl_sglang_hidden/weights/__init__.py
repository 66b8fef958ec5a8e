"""New weights for a running engine: compared with the served ones first, then sent by disk or network.

Knows the names and payloads of SGLang's control routes; the engine calls them. Knows nothing of requests.
"""
