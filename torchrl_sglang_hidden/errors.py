"""Every error that this package raises, and nothing else.

    SGLangHiddenError
    ├── InputError (ValueError)                 what the user passed; nothing was sent
    │   ├── TokenIdError                        an id the model does not have
    │   ├── ChatTemplateError                   a chat that its template does not write
    │   ├── ImageError                          an image that cannot be read, or has no place in its prompt
    │   ├── PromptLengthError                   an empty prompt or batch, or one over the context length
    │   ├── WeightsError                        weights that do not fit the served model, or are not finite
    │   ├── MissingKeyError (KeyError)          the TensorDict lacks a key
    │   ├── InputTypeError (TypeError)          a value of the wrong type
    │   └── UnknownOptionError (TypeError)      an option that neither this package nor SGLang has
    ├── EngineError (RuntimeError)              the engine failed, or could not be reached
    │   ├── LaunchError                         a server that did not start
    │   ├── EngineUnreachableError (ConnectionError) nothing answers, or the engine went away
    │   │   └── ServerRestartingError           a launched server that is being started again
    │   ├── RestartError                        a launched server that does not come back, or did so without its weights
    │   ├── EngineTimeoutError (TimeoutError)   no answer in time
    │   ├── AuthenticationError                 a missing or wrong API key
    │   ├── RequestRejectedError                the engine refused the request
    │   ├── RequestAbortedError                 the engine gave up on a request midway
    │   ├── IncompleteWeightsError              an answer of weights that an update left half new
    │   ├── BatchCancelledError (CancelledError) a batch that was given up before it was sent
    │   ├── CapabilityError                     the engine lacks what the call needs
    │   └── ProtocolError                       an answer that cannot be read
    ├── AlignmentError (RuntimeError)           rows of states and tokens do not agree
    ├── SpanError (ValueError)                  a span that is empty in this batch row, or longer than its segment;
    │                                           a prompt's before anything is sent, a response's after sampling
    ├── ConstraintError (ValueError)            constraints that leave no token to choose: found before anything is
    │                                           sent, or in the server together with a grammar or penalties
    ├── DemoModelError (RuntimeError)           the demo model could not be made
    └── RecordingError (RuntimeError)           a recording of something else, or one that cannot be written or read

A message gives the value, the limit and the remedy, in that order; ``tests/test_errors.py`` checks that each says what
was expected, what to do, or where to look. Each class takes one message, so that errors pickle and cross process
boundaries unchanged.
"""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import Any

__all__ = [
    "AlignmentError",
    "AuthenticationError",
    "BatchCancelledError",
    "CapabilityError",
    "ChatTemplateError",
    "ConstraintError",
    "DemoModelError",
    "EngineError",
    "EngineTimeoutError",
    "EngineUnreachableError",
    "ImageError",
    "IncompleteWeightsError",
    "InputError",
    "InputTypeError",
    "LaunchError",
    "MissingKeyError",
    "PromptLengthError",
    "ProtocolError",
    "RecordingError",
    "RequestAbortedError",
    "RequestRejectedError",
    "RestartError",
    "SGLangHiddenError",
    "ServerRestartingError",
    "SpanError",
    "TokenIdError",
    "UnknownOptionError",
    "WeightsError",
]


class SGLangHiddenError(Exception):
    """Base of every error this package raises.

    Attributes:
        completions: where the error concerns one request of a call, after all were sent: one `Completion` for each of
            the call's requests, in order. Of those that went wrong ``error`` says why, and what was sampled before is
            there; None for a request that was not sent. Empty for every other error.
    """

    completions: tuple[Any, ...] = ()

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which would put a whole sentence in quotes.
        return Exception.__str__(self)


class InputError(SGLangHiddenError, ValueError):
    """The user passed something that cannot be served; nothing was sent to the engine."""


class TokenIdError(InputError):
    """A token id that is not an integer in ``[0, vocab_size)``."""


class ChatTemplateError(InputError):
    """A chat template that is not there, raises, or would leave a part of the chat out without a word."""


class ImageError(InputError):
    """An image that cannot be read, or an image and its place in the prompt without each other."""


class PromptLengthError(InputError):
    """A prompt without tokens, a batch without prompts, or a prompt that fills the context."""


class WeightsError(InputError):
    """Weights whose names, shapes or values do not fit the served model; the engine keeps its own weights."""


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
    """Nothing answers at the engine's address, or the engine went away while answering."""


class ServerRestartingError(EngineUnreachableError):
    """A launched server ended, is being started again, and was not back within the time that calls wait for it."""


class RestartError(EngineError):
    """A launched server ended too often to be started again, or the weights pushed before could not be brought back."""


class EngineTimeoutError(EngineError, TimeoutError):
    """The engine did not answer in time."""


class AuthenticationError(EngineError):
    """The server refused the API key, or requires one."""


class RequestRejectedError(EngineError):
    """The engine read the request and refused it."""


class RequestAbortedError(EngineError):
    """The engine dropped a request before its response was complete; ``completions`` has what was sampled."""


class IncompleteWeightsError(EngineError):
    """An update ended in the middle, and the engine answers with a mixture of old and new weights; update again."""


class BatchCancelledError(EngineError, CancelledError):
    """The queue of a `BatchingEngine` was emptied before the caller's requests were sent."""


class CapabilityError(EngineError):
    """The engine lacks what the call needs: it was started without it, or this machine does not have it."""


class ProtocolError(EngineError):
    """The engine's answer does not have the form that this version reads."""


class AlignmentError(SGLangHiddenError, RuntimeError):
    """The engine returned another number of states, log-probs or ids than there are tokens."""


class SpanError(SGLangHiddenError, ValueError):
    """A span has no tokens in a batch row, or more than its segment; a response's spans are checked after sampling."""


class ConstraintError(SGLangHiddenError, ValueError):
    """Constraints leave no token to choose, or a constraint of the user's own failed inside the server."""


class DemoModelError(SGLangHiddenError, RuntimeError):
    """The demo model could not be fetched or converted."""


class RecordingError(SGLangHiddenError, RuntimeError):
    """A recording of another policy or other data, or one that is damaged or cannot be written; it stays whole."""
