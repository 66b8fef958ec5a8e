"""`PolicyConfig`: every argument of `SGLangHiddenWrapper` but its model, checked.

Knows nothing of rows or requests. What needs the engine's vocabulary or tokenizer is one step,
`PolicyConfig.resolve_for`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

import torch
from tensordict.utils import NestedKey, unravel_key
from torchrl.data.llm.history import _CHAT_TEMPLATES as CHAT_TEMPLATES
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden.errors import InputError, InputTypeError, TokenIdError
from torchrl_sglang_hidden.policy.action_masks import (
    ActionMaskReader,
    option_constraints,
    read_action_ids,
    read_constraints,
    read_options,
)
from torchrl_sglang_hidden.policy.batching import BatchingConfig
from torchrl_sglang_hidden.policy.outputs import KeyConfig, OutputKeys, list_out_keys
from torchrl_sglang_hidden.policy.prompts import INPUT_MODES, InputMode, PromptReader
from torchrl_sglang_hidden.policy.returned import resolve_hidden, scored_hidden
from torchrl_sglang_hidden.policy.tokenizer import read_tokenizer
from torchrl_sglang_hidden.records import EngineInfo
from torchrl_sglang_hidden.sglang_api.sampling import standardize
from torchrl_sglang_hidden.spec.constraints import LogitConstraint
from torchrl_sglang_hidden.spec.hidden import HiddenSpec
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import TokenMask

__all__ = ["ARGUMENTS", "PolicyConfig", "resolve_num_samples"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Every argument of `SGLangHiddenWrapper` but ``model``, checked as far as is possible without an engine.

    What needs the engine waits for `resolve_for`, which the wrapper calls: the tokenizer is loaded and compared with
    the model, token ids and constraints are checked against its vocabulary, and masks among the options are read.

    The wrapper takes the fields of ``keys`` and ``queue`` as arguments of its own, under their own names. Its
    ``config`` is a `PolicyConfig`, and `SGLangHiddenWrapper.get_new_version` changes some of the arguments. The hash
    leaves out ``generate_kwargs`` and ``tokenizer_kwargs``, which are dicts.

    Args:
        tokenizer: a Hugging Face tokenizer, the name or path of one, or None for the engine's own.
        input_mode: what a prompt is. ``"history"``: a ``torchrl.data.llm.History`` of shape ``[*batch, turns]``.
            ``"text"``: one string per row. ``"tokens"``: int64 token ids, ragged, or padded on the left.
        input_key: where the prompt is read; by default ``(input_mode, "prompt")``, and ``(input_mode, "full")`` with
            ``generate=False``.
        attention_mask_key: in tokens mode, where a bool mask ``[*batch, P]`` is read if it is there. Ids where it is
            False are pads, which are never sent. Without a mask, the pad ids at the left of a row of a ``Tokens`` that
            says ``padded`` are its padding, and every other id is sent as it is.
        generate: True generates; False scores given sequences, and samples nothing. Arguments that concern generation
            alone (sampling options, ``num_samples``, ``prefer_tokens``, the segments of ``hidden`` and its spans of a
            response) are then kept for the next version and have no effect: a chat is scored as the tokenizer writes
            it. To score a rollout by the ids that were sampled, use ``input_mode="tokens"``.
        generate_kwargs: generation options by TorchRL's standard names, Hugging Face's, vLLM's or SGLang's; see
            `torchrl_sglang_hidden.sglang_api.sampling.standardize`. The options of a call override these.
            ``max_new_tokens=0`` reads the prompt and generates nothing: T is 0, and ``hidden`` must not ask for states
            of a response. Besides sampling options: ``lora_path``, the name of a LoRA adapter that the server has
            loaded; ``priority``, on a server that schedules by priority; ``return_hidden_states``, see ``hidden``.
            Constraints: ``action_mask``, an `ActionMask`, token ids, or bool ``[V]``; ``disallowed_tokens``, a
            `DisallowedTokens` or token ids; ``custom_logit_processor``, a `LogitConstraint`, its text, or a list of
            them. A native SGLang processor there, a JSON string, replaces all constraints, and a warning names those
            that it replaces.
        tokenizer_kwargs: passed to the tokenizer when text is turned into ids. Padding that it adds is removed.
        pad_output: True pads the ragged leaves to one width: prompts on the left, responses on the right; ids with the
            tokenizer's pad id (else its EOS id), log-probs with NaN, masks with False. False leaves them ragged.
        pad_model_input: None or False. Pads are never sent to an engine, so True is refused.
        inplace: True writes into the input and returns it; False returns a new TensorDict of the outputs; ``"empty"``
            returns an empty copy of the input with the outputs. By default True; with ``num_samples`` only False is
            possible, and it is the default.
        device: where the output tensors go; by default the input's device, or the CPU.
        layout: layout of the nested tensors that TorchRL's ``RetrieveLogProb`` makes of ragged log-probs:
            ``torch.strided`` (the default) or ``torch.jagged``. The outputs themselves are ragged stacks without one.
        num_samples: responses per prompt, n. The output has batch size ``[*batch, n]``. The prompt is computed once,
            except where several servers share the rows unevenly, or stock SGLang pools the prompt.
            ``generate_kwargs={"num_return_sequences": n}`` means the same.
        chat_template_name: one of torchrl's named chat templates, for history mode.
        chat_template: a Jinja chat template, for history mode. By default the tokenizer's own.
        prefer_tokens: in history mode, True sends the token ids that stand at ``(tokens_key, "prompt")`` already, such
            as those of torchrl's ``IncrementalTokenizer``, if they decode to the text that the template writes for the
            chat, or to the beginning of that text; the rest is then tokenized and sent after them. This way a response
            keeps its sampled ids in the turns that follow. Ids of another chat are not used.
        return_log_probs: whether the log-prob of every response token is returned; None means True. They belong to the
            distribution after temperature, penalties and grammar, before top-k and top-p (SGLang's definition).
            Scoring returns log-probs of the model's own distribution.
        hidden: which hidden states are returned: a `HiddenSpec`, True for its defaults, False or None for none. The
            option ``return_hidden_states`` overrides it: True turns the defaults on where this is None, False turns
            states off, and in a call it holds for that call. A row of the TensorDict may say False at
            ``"return_hidden_states"`` (one bool per row): no states are computed for it, and it has NaN with count 0,
            so that the batch stays dense. Spans of a prompt are found before anything is sent: `TokenMask` reads its
            mask from the TensorDict, `Turn` and `Role` find the words of messages in history mode.
        logits: which logits are returned: a `LogitsSpec`, or None.
        constraints: a `LogitConstraint` or several, for every token that is sampled. The constraints of the wrapper, of
            the call and of the row act together: a token can be chosen only if all of them allow it.
        action_mask_key: where each row says which tokens it allows: a bool mask ``[V]``; bool ``[A]`` over
            ``action_token_ids``; or token ids, as a ragged integer tensor or a list.
        action_token_ids: the A token ids that the columns of these masks stand for.
        keys: where the outputs are written.
        queue: whether and how concurrent callers share requests.

    Attributes:
        num_responses: responses per prompt, by either of its two names; None for one without a dimension of its own.
            Like ``writes_inplace`` it is fixed here: a change inside ``generate_kwargs`` does not change the output.
        writes_inplace: the value of ``inplace``, or its default.

    Raises:
        InputError: a value that cannot be served, or two arguments that contradict each other.
        InputTypeError: a value of the wrong type.
        UnknownOptionError: a generation option that does not exist.
        TokenIdError: a negative id among ``action_token_ids``, or one that is there twice.
    """

    tokenizer: PreTrainedTokenizerBase | str | None = None
    input_mode: InputMode = "history"
    input_key: NestedKey | None = None
    attention_mask_key: NestedKey | None = "attention_mask"
    generate: bool = True
    generate_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    pad_output: bool = False
    pad_model_input: bool | None = None
    inplace: Literal[True, False, "empty"] | None = None
    device: torch.device | None = None
    layout: torch.layout | None = None
    num_samples: int | None = None
    chat_template_name: str | None = None
    chat_template: str | None = None
    prefer_tokens: bool = False
    return_log_probs: bool = True
    hidden: HiddenSpec | None = field(default_factory=HiddenSpec)
    logits: LogitsSpec | None = None
    constraints: tuple[LogitConstraint, ...] = ()
    action_mask_key: NestedKey | None = None
    action_token_ids: tuple[int, ...] | None = None
    keys: KeyConfig = field(default_factory=KeyConfig)
    queue: BatchingConfig = field(default_factory=BatchingConfig)
    num_responses: int | None = field(init=False, repr=False, compare=False)
    writes_inplace: Literal[True, False, "empty"] = field(init=False, repr=False, compare=False)

    @classmethod
    def from_arguments(cls, **arguments: Any) -> PolicyConfig:
        """Return the configuration that arguments of the wrapper, each under its own name, describe."""
        keys, queue = KeyConfig(**_taken(arguments, KeyConfig)), BatchingConfig(**_taken(arguments, BatchingConfig))
        return cls(keys=keys, queue=queue, **arguments)

    def arguments(self) -> dict[str, Any]:
        """Return the wrapper's arguments, each under its own name, as a dict of the caller's own."""
        own = {name: getattr(self, name) for name in _names(PolicyConfig) - {"keys", "queue"}}
        own |= {name: dict(own[name]) for name in ("generate_kwargs", "tokenizer_kwargs")}
        return own | {name: getattr(part, name) for part in self.parts[1:] for name in _names(type(part))}

    @property
    def parts(self) -> tuple[PolicyConfig, KeyConfig, BatchingConfig]:
        """The records that have the arguments as fields."""
        return self, self.keys, self.queue

    def __post_init__(self) -> None:
        """Bring the values that have several forms into one, and check them."""
        self._check_choices()
        options = standardize(self.generate_kwargs)
        responses = resolve_num_samples(self.num_samples, options)
        many = self.generate and responses is not None
        if many and self.inplace not in (None, False):
            raise InputError(
                f"inplace={self.inplace!r} with num_samples={responses}: the output has another batch size than the "
                "input; leave inplace out, or set it to False"
            )
        resolved = {
            "num_responses": responses,
            "writes_inplace": not many if self.inplace is None else self.inplace,
            # The default belongs to its mode, and follows it in a new version.
            "input_key": None if self.input_key == self._default_input_key else self.input_key,
            "generate_kwargs": options,
            "tokenizer_kwargs": dict(self.tokenizer_kwargs or {}),
            "device": None if self.device is None else torch.device(self.device),
            "return_log_probs": self.return_log_probs is not False,
            "hidden": resolve_hidden(self.hidden, options.get("return_hidden_states"), self.input_mode),
            "constraints": read_constraints("constraints", self.constraints),
            "action_token_ids": _read_ids(self.action_token_ids, self.action_mask_key),
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    def _check_choices(self) -> None:
        if self.input_mode not in INPUT_MODES:
            raise InputError(f"input_mode={self.input_mode!r}: expected one of {INPUT_MODES}")
        if not isinstance(self.generate, bool):
            raise InputTypeError(f"generate={self.generate!r}: expected True or False")
        if self.pad_model_input:
            raise InputError("pad_model_input=True: pads are never sent to the engine; leave it out")
        if self.layout not in (None, torch.strided, torch.jagged):
            raise InputError(f"layout={self.layout!r}: expected torch.strided, torch.jagged or None")
        if self.inplace != "empty" and not any(self.inplace is value for value in (None, True, False)):
            raise InputError(f"inplace={self.inplace!r}: expected True, False or 'empty'")
        if self.prefer_tokens and self.keys.tokens_key is None:
            raise InputError("prefer_tokens=True reads the tokens at tokens_key, which is None; give it a key")
        if self.logits is not None and not isinstance(self.logits, LogitsSpec):
            raise InputTypeError(f"logits={self.logits!r}: expected a LogitsSpec, such as LogitsSpec(top_k=8), or None")
        name = self.chat_template_name
        if name is not None and self.chat_template is not None:
            raise InputError(f"chat_template and chat_template_name={name!r} are both given; keep one")
        if name is not None and name not in CHAT_TEMPLATES:
            raise InputError(
                f"chat_template_name={name!r}: expected one of {sorted(CHAT_TEMPLATES)}; or give chat_template"
            )

    # --- versions ----------------------------------------------------------------------------------------------------

    def changed(self, **changes: Any) -> PolicyConfig:
        """Return this configuration with some of the wrapper's arguments changed, and what depends on them.

        The number of samples has two names, and so has whether states are returned; the one that is changed wins.

        Raises:
            TypeError: an argument that the wrapper does not have.
            InputError: the result cannot be served.
        """
        if "generate_kwargs" not in changes:
            options = dict(self.generate_kwargs)
            for argument, option in (("num_samples", "num_return_sequences"), ("hidden", "return_hidden_states")):
                if argument in changes:
                    options.pop(option, None)
            changes["generate_kwargs"] = options
        elif "num_samples" not in changes and "num_return_sequences" in standardize(changes["generate_kwargs"]):
            changes["num_samples"] = None
        keys = replace(self.keys, **_taken(changes, KeyConfig))
        queue = self.queue.changed(_taken(changes, BatchingConfig))
        return replace(self, keys=keys, queue=queue, **changes)

    def resolve_for(self, info: EngineInfo) -> PolicyConfig:
        """Return this configuration checked against an engine, with its tokenizer and with token ids read.

        Raises:
            InputError: a tokenizer of another model, logits that the model does not have, or a mask of another length.
            ConstraintError: constraints that leave no token.
            TokenIdError: an id outside the vocabulary.
        """
        options = read_options(self.generate_kwargs, info.vocab_size)
        _check_logits(self.logits, info.vocab_size)
        for constraint in (*self.constraints, *option_constraints(options)):
            constraint.check(info.vocab_size)
        return replace(
            self,
            tokenizer=read_tokenizer(self.tokenizer, info.tokenizer_path, info.vocab_size),
            generate_kwargs=options,
            action_token_ids=read_action_ids(self.action_token_ids, self.action_mask_key, info.vocab_size),
        )

    @property
    def padding_value(self) -> int:
        """The id that pads: the tokenizer's pad id, else its EOS id, else 0."""
        tokenizer = self._tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return next(token_id for token_id in ids if token_id is not None)

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return cast("PreTrainedTokenizerBase", self.tokenizer)

    def make_reader(self) -> PromptReader:
        """Return the reader of the prompts. Needs the tokenizer that `resolve_for` reads."""
        return PromptReader(
            tokenizer=self._tokenizer,
            input_mode=self.input_mode,
            input_key=self.prompt_key,
            attention_mask_key=self.attention_mask_key,
            masks_key=self.keys.masks_key,
            generate=self.generate,
            tokenizer_kwargs=self.tokenizer_kwargs,
            chat_template=self.chat_template,
            chat_template_name=self.chat_template_name,
            padding_value=self.padding_value,
            prefer_tokens=unravel_key((self.keys.tokens_key, "prompt")) if self.prefer_tokens else None,
        )

    def make_mask_reader(self, vocab_size: int) -> ActionMaskReader | None:
        """Return the reader of the rows' action masks of one call, or None where there are none."""
        if self.action_mask_key is None:
            return None
        return ActionMaskReader(self.action_mask_key, vocab_size, self.action_token_ids)

    # --- what follows from several arguments -------------------------------------------------------------------------

    @property
    def _default_input_key(self) -> NestedKey:
        return (self.input_mode, "prompt" if self.generate else "full")

    @property
    def prompt_key(self) -> NestedKey:
        """Where the prompts are read: ``input_key``, or its default."""
        return self._default_input_key if self.input_key is None else self.input_key

    @property
    def nested_layout(self) -> torch.layout | None:
        """The value of ``layout``, or its default."""
        return torch.strided if self.layout is None and not self.pad_output else self.layout

    @property
    def returned_hidden(self) -> HiddenSpec | None:
        """The states that a call returns which does not say otherwise."""
        return self.hidden if self.generate else scored_hidden(self.hidden)

    def output_keys(
        self, hidden: HiddenSpec | None, logits: LogitsSpec | None, *, logits_only: bool = False
    ) -> OutputKeys:
        """Return where the outputs go of a call that returns these states and logits."""
        keys = self.keys
        return OutputKeys(
            text=keys.text_key,
            tokens=keys.tokens_key,
            masks=keys.masks_key,
            log_probs=keys.log_probs_key if self.return_log_probs and not logits_only else None,
            history=keys.history_key if self.input_mode == "history" else None,
            hidden_states=keys.hidden_states_key if hidden is not None and hidden.pooling is not None else None,
            token_hidden_states=keys.token_hidden_states_key if hidden is not None and hidden.tokens else None,
            weight_version="weight_version",
            finish_reason="finish_reason" if self.generate else None,
            mixed_weights="mixed_weights" if self.generate else None,
            logits=keys.logits_key if logits is not None else None,
        )

    @property
    def in_keys(self) -> list[NestedKey]:
        """The keys that must be there: of the prompt, of the masks of spans, and of the action masks."""
        spans = {} if self.returned_hidden is None else self.returned_hidden.spans
        masks = [span.key for span in spans.values() if isinstance(span, TokenMask)]
        actions = [] if self.action_mask_key is None else [self.action_mask_key]
        return list(dict.fromkeys([self.prompt_key, *masks, *actions]))

    @property
    def out_keys(self) -> list[NestedKey]:
        """The keys that a call writes which does not say otherwise; see `list_out_keys`."""
        keys = self.output_keys(self.returned_hidden, self.logits)
        return list_out_keys(keys, self.returned_hidden, self.logits, self.generate)


def _names(kind: Any) -> set[str]:
    return {found.name for found in fields(kind) if found.init}


# The wrapper's arguments, by name.
ARGUMENTS = (_names(PolicyConfig) - {"keys", "queue"}) | _names(KeyConfig) | _names(BatchingConfig)


def _taken(arguments: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Take the arguments that are fields of a record out of all arguments."""
    return {name: arguments.pop(name) for name in _names(kind) & arguments.keys()}


def resolve_num_samples(num_samples: int | None, options: Mapping[str, Any]) -> int | None:
    """Return the responses per prompt: ``num_samples``, or the option ``num_return_sequences``.

    Raises:
        InputError: no positive integer, or both and they differ.
    """
    if num_samples is not None and (type(num_samples) is not int or num_samples < 1):
        raise InputError(f"num_samples={num_samples!r}: expected an integer of at least 1, or None")
    option = options.get("num_return_sequences")
    if option is None:
        return num_samples
    if num_samples not in (None, option):
        raise InputError(f"num_samples={num_samples} and num_return_sequences={option} contradict each other; give one")
    # One response without a dimension of samples is what every other wrapper gives for 1.
    return num_samples if option == 1 else cast("int", option)


def _read_ids(ids: Any, key: NestedKey | None) -> tuple[int, ...] | None:
    """Read ``action_token_ids`` before the vocabulary is known; `PolicyConfig.resolve_for` compares them with it."""
    try:
        return read_action_ids(ids, key, sys.maxsize)
    except TokenIdError as error:
        raise TokenIdError(
            f"action_token_ids={ids!r:.80}: ids are 0 or more, each once; leave the others out"
        ) from error


def _check_logits(logits: LogitsSpec | None, vocab_size: int) -> None:
    if logits is None:
        return
    if logits.top_k is not None and logits.top_k > vocab_size:
        raise InputError(f"LogitsSpec(top_k={logits.top_k}): the model has {vocab_size} tokens; ask for at most these")
    if logits.token_ids is not None and max(logits.token_ids) >= vocab_size:
        raise TokenIdError(
            f"LogitsSpec(token_ids={logits.token_ids!r:.80}): id {max(logits.token_ids)} is outside the vocabulary of "
            f"{vocab_size}; ids are 0..{vocab_size - 1}"
        )
