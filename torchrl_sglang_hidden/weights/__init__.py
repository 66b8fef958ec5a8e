"""New weights for a running server: held against the served ones first, then sent through memory or the network.

Knows SGLang's control routes, not how they are called; nothing of requests.
"""
