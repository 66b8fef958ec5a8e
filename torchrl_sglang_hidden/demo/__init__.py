"""The demo: a small real model without a model hub, and a run that ends in a table, a picture and a TensorDict.

Uses the public parts of the package as a user would; nothing but the command line imports it.
"""
