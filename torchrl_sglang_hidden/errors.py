"""Every error this package raises.

    SGLangHiddenError
    ├── InputError (ValueError)                 what the caller passed; nothing was sent
    │   ├── TokenIdError                        an id the model does not have
    │   ├── PromptLengthError                   an empty prompt or batch, or one over the context length
    │   ├── WeightsError                        weights that do not fit the served model, or are not finite
    │   ├── MissingKeyError (KeyError)          the TensorDict lacks a key
    │   ├── InputTypeError (TypeError)          a value of the wrong type
    │   └── UnknownOptionError (TypeError)      an option nobody knows
    ├── EngineError (RuntimeError)              the engine, or the way to it
    │   ├── LaunchError                         a server that did not start
    │   ├── EngineUnreachableError (ConnectionError)
    │   ├── EngineTimeoutError (TimeoutError)
    │   ├── AuthenticationError                 a missing or wrong API key
    │   ├── RequestRejectedError                the engine refused the request
    │   ├── RequestAbortedError                 the engine gave up on a request midway
    │   ├── BatchCancelledError (CancelledError) a batch that was given up before it was sent
    │   ├── CapabilityError                     the server was started without what this needs
    │   └── ProtocolError                       an answer that cannot be read
    ├── AlignmentError (RuntimeError)           rows of states and tokens do not agree
    ├── SpanError (ValueError)                  a span that is empty in this row, or longer than its segment: of a
    │                                           prompt before anything is sent, of a response once it was sampled
    ├── ConstraintError (ValueError)            constraints that leave no token to choose: by themselves before
    │                                           anything is sent; together with a grammar or penalties once they met
    └── DemoModelError (RuntimeError)           the demo model could not be made

Messages give the value, the limit and the remedy, in that order. Each class takes one message, so that errors pickle
and cross process boundaries unchanged.
"""

from __future__ import annotations

from concurrent.futures import CancelledError

__all__ = [
    "AlignmentError",
    "AuthenticationError",
    "BatchCancelledError",
    "CapabilityError",
    "ConstraintError",
    "DemoModelError",
    "EngineError",
    "EngineTimeoutError",
    "EngineUnreachableError",
    "InputError",
    "InputTypeError",
    "LaunchError",
    "MissingKeyError",
    "PromptLengthError",
    "ProtocolError",
    "RequestAbortedError",
    "RequestRejectedError",
    "SGLangHiddenError",
    "SpanError",
    "TokenIdError",
    "UnknownOptionError",
    "WeightsError",
]


class SGLangHiddenError(Exception):
    """Base of every error this package raises."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which would put a whole sentence in quotes.
        return Exception.__str__(self)


class InputError(SGLangHiddenError, ValueError):
    """The caller passed something that cannot be served; it was not sent to the engine."""


class TokenIdError(InputError):
    """A token id that is not an integer in ``[0, vocab_size)``."""


class PromptLengthError(InputError):
    """A prompt without tokens, a batch without prompts, or a prompt that fills the context."""


class WeightsError(InputError):
    """Weights whose names, shapes or values do not fit the model that is served; the engine keeps its own."""


class MissingKeyError(InputError, KeyError):
    """The TensorDict lacks a key that the policy reads."""


class InputTypeError(InputError, TypeError):
    """A value of the wrong type."""


class UnknownOptionError(InputError, TypeError):
    """An option that neither this package nor SGLang knows."""


class EngineError(SGLangHiddenError, RuntimeError):
    """The engine failed, or could not be reached."""


class LaunchError(EngineError):
    """A managed server did not become ready; the message ends with the last lines of its log."""


class EngineUnreachableError(EngineError, ConnectionError):
    """Nothing answers at the engine's address, or it went away while answering."""


class EngineTimeoutError(EngineError, TimeoutError):
    """The engine did not answer in time."""


class AuthenticationError(EngineError):
    """The server refused the API key, or wants one."""


class RequestRejectedError(EngineError):
    """The engine read the request and refused it."""


class RequestAbortedError(EngineError):
    """The engine dropped a request before it was done."""


class BatchCancelledError(EngineError, CancelledError):
    """A caller waited for its batch to fill when the queue was emptied; its rows were not sent."""


class CapabilityError(EngineError):
    """The server was started without what this call needs."""


class ProtocolError(EngineError):
    """The engine's answer does not have the form this version reads."""


class AlignmentError(SGLangHiddenError, RuntimeError):
    """The engine returned another number of states, log-probs or ids than there are tokens."""


class SpanError(SGLangHiddenError, ValueError):
    """A span has no tokens in a row, or wants more than there are; one of a response shows when it was sampled."""


class ConstraintError(SGLangHiddenError, ValueError):
    """Constraints leave no token to choose; or one of your own failed inside the server."""


class DemoModelError(SGLangHiddenError, RuntimeError):
    """The demo model could not be fetched or converted."""
