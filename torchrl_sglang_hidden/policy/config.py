"""`PolicyConfig`: every argument of `SGLangHiddenWrapper` but its model, checked.

Knows nothing of rows or requests. What needs the engine's vocabulary or tokenizer is one step,
`PolicyConfig.resolve_for`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from tensordict.utils import NestedKey

from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.images.expansion import NO_IMAGES, ImageProcessor, is_processor, tokenizer_of
from torchrl_sglang_hidden.policy import argument_checks
from torchrl_sglang_hidden.policy.action_masks import (
    option_constraints,
    read_action_ids,
    read_constraints,
    read_options,
)
from torchrl_sglang_hidden.policy.argument_checks import field_names, take_fields
from torchrl_sglang_hidden.policy.batching import BatchingConfig
from torchrl_sglang_hidden.policy.chat_template import read_variables, select_template
from torchrl_sglang_hidden.policy.outcomes import OutcomeConfig
from torchrl_sglang_hidden.policy.outputs import KeyConfig, OutputKeys, list_out_keys
from torchrl_sglang_hidden.policy.prompts import INPUT_MODES, InputMode
from torchrl_sglang_hidden.policy.returned import (
    check_head_spec,
    resolve_hidden,
    resolve_records,
    returned_keys,
    scored_heads,
    scored_hidden,
)
from torchrl_sglang_hidden.policy.sampled_turns import DIGEST_KEY, ChatMode
from torchrl_sglang_hidden.policy.tokenizer import OwnTokenizer, read_tokenizer
from torchrl_sglang_hidden.records import EngineInfo, SamplingRecords
from torchrl_sglang_hidden.sglang_api.sampling import standardize
from torchrl_sglang_hidden.spec.constraints import LogitConstraint
from torchrl_sglang_hidden.spec.head_scores import HeadSpec
from torchrl_sglang_hidden.spec.hidden import HiddenSpec
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import TokenMask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ARGUMENTS", "PolicyConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Every argument of `SGLangHiddenWrapper` but ``model``, checked as far as is possible without an engine.

    What needs the engine waits for `resolve_for`, which the wrapper calls: the tokenizer is loaded and compared with
    the model, token ids and constraints are checked against its vocabulary, and masks among the options are read.

    The wrapper takes the fields of ``keys``, ``queue`` and ``outcomes`` as arguments of its own, under their names. Its
    ``config`` is a `PolicyConfig`, and `SGLangHiddenWrapper.get_new_version` changes some of the arguments. The hash
    leaves out the arguments that are dicts.

    Args:
        tokenizer: a Hugging Face tokenizer, the name or path of one, or None for the engine's own. The policy uses a
            copy, which a trainer's truncation does not reach; a chat template or tokens that are set later do. Of a
            vision-language model it may be the processor; else the engine's is loaded when the first image comes.
        input_mode: what a prompt is. ``"history"``: a ``torchrl.data.llm.History`` of shape ``[*batch, turns]``.
            ``"text"``: one string per row. ``"tokens"``: int64 token ids, ragged, or padded on the left.
        input_key: where the prompt is read; by default ``(input_mode, "prompt")``, and ``(input_mode, "full")`` with
            ``generate=False``.
        attention_mask_key: in tokens mode, where a bool mask ``[*batch, P]`` is read if it is there. Ids where it is
            False are pads, which are never sent. Without a mask, the pad ids at the left of a row of a ``Tokens`` that
            says ``padded`` are its padding, and every other id is sent as it is.
        images_key: where each row's images are read, if they are there: one image or a list, in any form that
            `torchrl_sglang_hidden.images.image_data.read_image` takes. In text and tokens mode the prompt has one
            placeholder for each, such as ``<|image_pad|>``, between the tokens that the model wants around it (ids
            that are expanded already are taken too); in history mode they are those of parts ``{"type": "image"}`` that
            bring none of their own.
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
            Truncation cuts on the tokenizer's ``truncation_side``, and ``text.prompt`` says what is left; in history
            mode, where it would cut the generation prompt, it is refused.
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
        chat_template_name: for history mode, one of the tokenizer's chat templates where it has several, or one of
            torchrl's named ones.
        chat_template: a Jinja chat template, for history mode. By default the tokenizer's own; of several its
            ``"tool_use"`` where there are tools, else its ``"default"``. A tokenizer without one, as base models have
            it, raises: no template is guessed.
        chat_template_kwargs: for history mode, variables of the chat template by name, such as ``tools``,
            ``enable_thinking``, ``documents`` or ``date_string``. Those of a call are over these, and those of a row
            (a dict at ``"chat_template_kwargs"`` in the TensorDict) over both. One that the template does not read
            raises. ``strftime_now`` gives all rows of a call the same time.
        prefer_tokens: in history mode, True sends the token ids of the turns before as they were sampled, where they
            stand for the text that the template writes for the chat, or for the beginning of that text; the rest is
            then tokenized and sent after them. The ids are those at ``(tokens_key, "full")`` and ``(tokens_key,
            "prompt")``, where torchrl's ``IncrementalTokenizer`` writes them; those of another chat are not used. Where
            the template rewrites an answer they cannot be kept: one warning says where, and ``"strict"`` raises.
        chat: in history mode, how the next prompt of a chat is made. ``"render"``: the template writes it anew.
            ``"append"``: it begins with exactly the ids of the turn before, prompt and response, and the template
            writes only what follows. ``all_assistant_mask`` is then True on the sampled tokens of every turn, and
            ``log_probs.full`` has their log-probs. The turn before is read where this policy wrote it; a chat that does
            not go on from it is rendered whole.
        literal_content: in history mode, whether what messages say is encoded apart from the template's frame, so that
            a user's ``<|im_end|>`` is plain text and no special token. The assistant's messages are left as they are.
        mark_end_of_turn: in scoring in history mode, whether ``all_assistant_mask`` has the token that ends each of the
            assistant's turns, so that a loss trains it too. A template with ``{% generation %}`` says so itself.
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
        heads: which scores of small heads are returned, and the score that ends a response: a `HeadSpec`, or None.
        constraints: a `LogitConstraint` or several, for every token that is sampled. The constraints of the wrapper, of
            the call and of the row act together: a token can be chosen only if all of them allow it.
        action_mask_key: where each row says which tokens it allows: a bool mask ``[V]``; bool ``[A]`` over
            ``action_token_ids``; or token ids, as a ragged integer tensor or a list.
        action_token_ids: the A token ids that the columns of these masks stand for.
        keys: where the outputs are written.
        queue: whether and how concurrent callers share requests.
        outcomes: what becomes of rows that go wrong, and of samples that take too long.

    Attributes:
        num_responses: responses per prompt, by either of its two names; None for one without a dimension of its own.
            Like ``writes_inplace`` it is fixed here: a change inside ``generate_kwargs`` does not change the output.
        writes_inplace: the value of ``inplace``, or its default.
        own_tokenizer: the copies of the tokenizer that the policy tokenizes with; None before `resolve_for`.
        processor: says which ids an image becomes; refuses images before `resolve_for`.
        said: what was warned of once.

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
    images_key: NestedKey | None = "images"
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
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    prefer_tokens: bool | Literal["strict"] = False
    chat: ChatMode = "render"
    literal_content: bool = False
    mark_end_of_turn: bool = False
    return_log_probs: bool = True
    hidden: HiddenSpec | None = field(default_factory=HiddenSpec)
    logits: LogitsSpec | None = None
    heads: HeadSpec | None = None
    constraints: tuple[LogitConstraint, ...] = ()
    action_mask_key: NestedKey | None = None
    action_token_ids: tuple[int, ...] | None = None
    keys: KeyConfig = field(default_factory=KeyConfig)
    queue: BatchingConfig = field(default_factory=BatchingConfig)
    outcomes: OutcomeConfig = field(default_factory=OutcomeConfig)
    num_responses: int | None = field(init=False, repr=False, compare=False)
    writes_inplace: Literal[True, False, "empty"] = field(init=False, repr=False, compare=False)
    own_tokenizer: OwnTokenizer = field(init=False, repr=False, compare=False, default=cast("OwnTokenizer", None))
    processor: ImageProcessor = field(init=False, repr=False, compare=False, default=NO_IMAGES)
    said: set[str] = field(init=False, repr=False, compare=False, default_factory=set)

    @classmethod
    def from_arguments(cls, **arguments: Any) -> PolicyConfig:
        """Return the configuration that arguments of the wrapper, each under its own name, describe."""
        return cls(**{name: kind(**take_fields(arguments, kind)) for name, kind in PARTS.items()}, **arguments)

    def arguments(self) -> dict[str, Any]:
        """Return the wrapper's arguments, each under its own name, as a dict of the caller's own."""
        own = {name: getattr(self, name) for name in field_names(PolicyConfig) - PARTS.keys()}
        own |= {name: dict(value) for name, value in own.items() if isinstance(value, dict)}
        return own | {name: getattr(part, name) for part in self.parts[1:] for name in field_names(type(part))}

    @property
    def parts(self) -> tuple[PolicyConfig, KeyConfig, BatchingConfig, OutcomeConfig]:
        """The records that have the arguments as fields."""
        return self, self.keys, self.queue, self.outcomes

    def __post_init__(self) -> None:
        """Bring the values that have several forms into one, and check them."""
        if self.input_mode not in INPUT_MODES:
            raise InputError(f"input_mode={self.input_mode!r}: input_mode must be one of {INPUT_MODES}")
        argument_checks.check_choices(self)
        check_head_spec(self.heads, self.input_mode)
        options = standardize(self.generate_kwargs)
        responses = argument_checks.resolve_num_samples(self.num_samples, options)
        many = argument_checks.check_samples(self.generate, responses, self.inplace, self.outcomes.extra_samples)
        resolved = {
            "num_responses": responses,
            "writes_inplace": not many if self.inplace is None else self.inplace,
            # The default belongs to its mode, and follows it in a new version.
            "input_key": None if self.input_key == self._default_input_key else self.input_key,
            "generate_kwargs": options,
            "tokenizer_kwargs": dict(self.tokenizer_kwargs or {}),
            "chat_template_kwargs": read_variables("chat_template_kwargs", self.chat_template_kwargs),
            "device": None if self.device is None else torch.device(self.device),
            "return_log_probs": self.return_log_probs is not False,
            "hidden": resolve_hidden(self.hidden, options.get("return_hidden_states"), self.input_mode),
            "constraints": read_constraints("constraints", self.constraints),
            "action_token_ids": argument_checks.read_action_ids_early(self.action_token_ids, self.action_mask_key),
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

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
        keys = replace(self.keys, **take_fields(changes, KeyConfig))
        queue = self.queue.changed(take_fields(changes, BatchingConfig))
        own = replace(self.outcomes, **take_fields(changes, OutcomeConfig))
        return replace(self, keys=keys, queue=queue, outcomes=own, **changes)

    def resolve_for(self, info: EngineInfo) -> PolicyConfig:
        """Return this configuration checked against an engine, with its tokenizer and with token ids read.

        Raises:
            InputError: a tokenizer of another model, logits that the model does not have, or a mask of another length.
            ConstraintError: constraints that leave no token.
            TokenIdError: an id outside the vocabulary.
        """
        options = read_options(self.generate_kwargs, info.vocab_size)
        argument_checks.check_logits(self.logits, info.vocab_size)
        for constraint in (*self.constraints, *option_constraints(options)):
            constraint.check(info.vocab_size)
        given = self.tokenizer if is_processor(self.tokenizer) else None
        tokenizer = read_tokenizer(tokenizer_of(self.tokenizer), info.tokenizer_path, info.vocab_size)
        processor = ImageProcessor(
            given, info.tokenizer_path, takes_images=info.takes_images, max_images=info.max_images
        )
        if self.keys.pixel_values_key is not None and not info.takes_images:
            raise InputError(
                f"pixel_values_key={self.keys.pixel_values_key!r}: the model {info.model_path!r} takes text alone, and "
                "has no pixel values; leave it out, or serve a vision-language model"
            )
        if self.chat_template_name is not None:
            select_template(tokenizer, None, self.chat_template_name, tools=False)
        resolved = replace(
            self,
            tokenizer=tokenizer if given is None else given,
            generate_kwargs=options,
            action_token_ids=read_action_ids(self.action_token_ids, self.action_mask_key, info.vocab_size),
        )
        object.__setattr__(resolved, "own_tokenizer", OwnTokenizer(tokenizer, self.tokenizer_kwargs))
        object.__setattr__(resolved, "processor", processor)
        return resolved

    @property
    def padding_value(self) -> int:
        """The id that pads: the tokenizer's pad id, else its EOS id, else 0."""
        tokenizer = self._tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return next(token_id for token_id in ids if token_id is not None)

    @property
    def _follows_turns(self) -> bool:
        """Whether prompts keep what was sampled in the turns before."""
        return self.generate and self.input_mode == "history" and bool(self.prefer_tokens or self.chat == "append")

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return cast("PreTrainedTokenizerBase", tokenizer_of(self.tokenizer))

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

    @property
    def returned_heads(self) -> HeadSpec | None:
        """The scores of heads that a call returns; without a key those of a rule alone, which nobody else would see."""
        heads = self.heads if self.generate else scored_heads(self.heads)
        seen = self.keys.head_scores_key is not None or (heads is not None and heads.stop_when is not None)
        return heads if seen else None

    @property
    def records(self) -> SamplingRecords:
        """What a call records of the sampling which does not say otherwise."""
        return resolve_records(self.generate_kwargs) if self.generate else SamplingRecords()

    def output_keys(
        self,
        hidden: HiddenSpec | None,
        logits: LogitsSpec | None,
        records: SamplingRecords,
        *,
        logits_only: bool = False,
        errors: bool = False,
    ) -> OutputKeys:
        """Return where the outputs go of a call that returns these states, logits, records, and errors of rows."""
        heads = self.returned_heads
        keys = returned_keys(
            self.keys, hidden, logits, records, None if logits_only else heads, generate=self.generate, errors=errors
        )
        return replace(
            keys,
            log_probs=keys.log_probs if self.return_log_probs and not logits_only else None,
            history=keys.history if self.input_mode == "history" else None,
            chat_digest=DIGEST_KEY if self._follows_turns else None,
            images=self.keys.prompt_images_key if self.processor.takes_images else None,
            pixel_values=self.keys.pixel_values_key,
        )

    @property
    def default_keys(self) -> OutputKeys:
        """Where the outputs go of a call that does not say otherwise."""
        return self.output_keys(self.returned_hidden, self.logits, self.records, errors=self.outcomes.keeps_errors)

    @property
    def in_keys(self) -> list[NestedKey]:
        """The keys that must be there: of the prompt, of the masks of spans, and of the action masks."""
        specs = (self.returned_hidden, self.returned_heads)
        spans = [span for spec in specs if spec is not None for span in spec.spans.values()]
        masks = [span.key for span in spans if isinstance(span, TokenMask)]
        actions = [] if self.action_mask_key is None else [self.action_mask_key]
        return list(dict.fromkeys([self.prompt_key, *masks, *actions]))

    @property
    def out_keys(self) -> list[NestedKey]:
        """The keys that a call writes which does not say otherwise; see `list_out_keys`."""
        return list_out_keys(self.default_keys, self.returned_hidden, self.logits, self.generate, self.returned_heads)


# The records inside `PolicyConfig`, and the wrapper's arguments, by name.
PARTS: dict[str, Any] = {"keys": KeyConfig, "queue": BatchingConfig, "outcomes": OutcomeConfig}
ARGUMENTS = (field_names(PolicyConfig) - PARTS.keys()).union(*map(field_names, PARTS.values()))
