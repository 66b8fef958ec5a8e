"""`SGLangHiddenWrapper`: a TensorDict in, engine requests, a TensorDict out.

Knows nothing of wire formats or padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torchrl.modules.llm.policies import LLMWrapperBase
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden.engines import Engine, as_engine, generate_samples
from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.policy.action_masks import (
    ActionMaskReader,
    option_constraints,
    read_action_ids,
    read_constraints,
    read_options,
)
from torchrl_sglang_hidden.policy.assemble import assemble, assemble_scores
from torchrl_sglang_hidden.policy.candidates import CandidateScoring
from torchrl_sglang_hidden.policy.config import (
    check_arguments,
    check_chat_template,
    default_key,
    in_keys,
    make_batcher,
    of_given,
    out_keys,
    read_hidden,
    read_logits,
    read_num_samples,
    read_tokenizer,
)
from torchrl_sglang_hidden.policy.configured import Configured
from torchrl_sglang_hidden.policy.distributions import Distributions
from torchrl_sglang_hidden.policy.outputs import OutputKeys
from torchrl_sglang_hidden.policy.prompts import InputMode, PromptReader
from torchrl_sglang_hidden.policy.requests import check_responses, read_call, read_target, to_requests, write
from torchrl_sglang_hidden.sglang_api.sampling import standardize
from torchrl_sglang_hidden.spec.constraints import LogitConstraint
from torchrl_sglang_hidden.spec.hidden import HiddenSpec
from torchrl_sglang_hidden.spec.logits import LogitsSpec

__all__ = ["SGLangHiddenWrapper"]


class SGLangHiddenWrapper(CandidateScoring, Configured, Distributions, LLMWrapperBase):  # type: ignore[misc]
    """A TorchRL LLM policy over SGLang that also returns hidden states and logits, and chooses among given tokens.

    A drop-in for torchrl's ``SGLangWrapper``: it reads a prompt from the TensorDict, generates, and writes TorchRL's
    own TensorClasses, beside `HiddenStates` and `TokenHiddenStates`. The token ids that the engine gets are the ids in
    ``tokens.prompt``, in every input mode; one call is one batched request, which SGLang schedules.

    Args:
        model: a URL or several, `SGLangServer`, `SGLangOffline`, an ``sglang.Engine``, or torchrl's ``AsyncSGLang``.

    Keyword Args:
        tokenizer: a Hugging Face tokenizer, a name or path of one, or None for the engine's own.
        input_mode: ``"history"``, ``"text"`` or ``"tokens"``.
        input_key: where the prompt is read; by default ``(input_mode, "prompt")``, and ``(input_mode, "full")`` for
            scoring. History mode reads a
            ``torchrl.data.llm.History`` of shape ``[*batch, turns]``; text mode one string per row; tokens mode int64
            ids, ragged, or padded on the left.
        attention_mask_key: in tokens mode, a mask ``[*batch, P]`` read from this key when it is there: ids where it is
            False are pads, which are never sent. Without it, the pad ids at the left of a row of a ``Tokens`` that says
            ``padded`` are its padding; every other id is sent as it is.
        generate: True generates; False scores a given sequence, without sampling: see Scoring below. What is of
            generation only (sampling options, ``num_samples``, ``prefer_tokens``, segments of ``hidden`` and its spans
            of a response) is kept for `get_new_version` and has no effect: a chat is scored as the tokenizer writes it.
            To score a rollout by the ids that were sampled, use ``input_mode="tokens"``.
        generate_kwargs: generation options by TorchRL's standard names, Hugging Face's or SGLang's; see
            `torchrl_sglang_hidden.sglang_api.sampling.standardize`. Options passed to a call override these.
            ``max_new_tokens=0`` reads the prompt and generates nothing: T is 0, and ``hidden`` asks for nothing of a
            response. Beside sampling: ``lora_path``, the name of a LoRA adapter that the server has loaded;
            ``priority``, where the server schedules by it; ``return_hidden_states``, see ``hidden``. Constraints:
            ``action_mask``, an `ActionMask`, ids, or bool ``[V]``; ``disallowed_tokens``, a `DisallowedTokens` or ids;
            ``custom_logit_processor``, a `LogitConstraint`, its text, or a list of them. SGLang's own string there is
            used alone, with a warning that says what it leaves out.
        tokenizer_kwargs: passed to the tokenizer when text is turned into ids. Padding it adds is taken off again.
        pad_output: pad the ragged leaves to one width: prompts on the left, responses on the right, ids with the
            tokenizer's pad (or EOS) id, log-probs with NaN, masks with False. False leaves them ragged.
        pad_model_input: None or False. Pads are never sent to an engine, so that True raises.
        inplace: True (the default) writes into the input and returns it; False returns a new TensorDict of the outputs;
            ``"empty"`` returns an empty copy of the input with the outputs. With ``num_samples`` only False, which is
            then the default.
        device: where the output tensors go; by default the input's device, or the CPU.
        layout: of the nested tensors that TorchRL's ``RetrieveLogProb`` makes of this wrapper's ragged log-probs,
            ``torch.strided`` (the default) or ``torch.jagged``. The outputs themselves are ragged stacks, without one.
        num_samples: responses per prompt, n. The output has batch size ``[*batch, n]``. The prompt is computed once,
            but where several servers share the rows unevenly, or stock SGLang pools the prompt.
            ``generate_kwargs={"num_return_sequences": n}`` says the same.
        batching: whether concurrent callers share requests. SGLang batches what runs at the same time by itself, and
            this is only for those who want few and large requests. Sizes alone turn it on too.
        min_batch_size: rows to wait for before a request is sent; 1 by default.
        max_batch_size: most rows of one request.
        batching_timeout: seconds that a caller waits at most for others.
        chat_template_name: one of torchrl's named chat templates, for history mode.
        chat_template: a Jinja chat template, for history mode. By default the tokenizer's own.
        prefer_tokens: in history mode, send the ids that are at ``(tokens_key, "prompt")`` already, such as those of
            torchrl's ``IncrementalTokenizer``, where they stand for the chat: they decode to what the template writes
            for it, or to its beginning, and then the rest is tokenized and sent after them. So a response stays as it
            was sampled in the turns that follow. Ids of any other chat are not used.
        return_log_probs: whether the log-prob of every sampled token is returned; True by default. They are those of
            the distribution after temperature, penalties and grammar, before top-k and top-p (SGLang's). Scoring gives
            those of the model's own distribution.
        text_key, tokens_key, masks_key, log_probs_key, history_key: where TorchRL's TensorClasses are written; None
            leaves one out.
        hidden: which hidden states are returned: a `HiddenSpec`, True for its defaults, False or None for none. The
            option ``return_hidden_states`` says it too, and wins: True turns the defaults on where this is None, False
            turns states off, in a call for that call. A row of the TensorDict may say False at
            ``"return_hidden_states"``, one bool per row: its states are not asked for, and stand as NaN with count 0,
            so that the batch stays dense. Spans of a prompt are found before anything is sent: `TokenMask` reads its
            mask from the TensorDict, `Turn` and `Role` find the words of messages in history mode.
        hidden_states_key: where `HiddenStates` is written.
        token_hidden_states_key: where `TokenHiddenStates` is written, with ``HiddenSpec(tokens=True)``.
        logits: which logits are returned: a `LogitsSpec`, or None.
        logits_key: where `Logits` is written.
        constraints: on every token that is sampled: a `LogitConstraint` or several. Those of the wrapper, of the call
            and of the row act together: a token is left where all masks leave it.
        action_mask_key: where each row says which tokens it allows: a bool mask ``[V]``; bool ``[A]`` over
            ``action_token_ids``; or token ids, as a ragged integer tensor or a list.
        action_token_ids: the A ids that the columns of these masks stand for.

    Outputs (B rows, P prompt tokens, T response tokens, D hidden size):
        - text: ``prompt``, ``response``, ``full``, one string per row. The response without special tokens and matched
          stop strings; the prompt as the template, or the decoded ids, say it.
        - tokens: int64 ``prompt`` [P], ``response`` [T], ``full`` [P+T]. A response ends with the token that ended it:
          EOS, a stop id, or the one that completed a stop string. It was sampled, so it keeps its log-prob and state.
        - masks: bool [P+T]; ``all_attention_mask``, and ``all_assistant_mask``, True on the response.
        - log_probs: float32 ``response`` [T] and ``full`` [P+T], NaN where nothing was measured; ``prompt`` is None.
        - history (history mode): ``prompt``, ``response``, ``full``, the last usable as the next prompt.
        - hidden_states: see `HiddenStates`; not there with ``pooling=None``.
        - token_hidden_states: see `TokenHiddenStates`.
        - logits: see `Logits`.
        - weight_version, finish_reason (``"stop"`` or ``"length"``): one string per row.
        - mixed_weights: bool ``[*batch]``, True where an update of the weights came in the middle of the response: its
          first tokens are of an older version than ``weight_version``; with ``num_samples`` also where the prompt's
          states are.

    Scoring (``generate=False``; N tokens of the given sequence) writes one segment, ``full``:
        - text, tokens [N], history: the sequence as it was read. Ids given as one padded tensor keep their places under
          ``pad_output``; others are padded on the left.
        - masks: ``all_assistant_mask`` in history mode from the chat template (those that say ``{% generation %}`` mark
          the end-of-turn token too), in tokens mode as it was given under ``masks_key``; else None.
        - log_probs: float32 [N], each token given those before it, without temperature; 0 for the first, as in TorchRL.
          Constraints act on the tokens in ``all_assistant_mask`` as if these were being sampled, each run of them
          from its first token and with ``max_new_tokens`` of the options; a token that they take away has -inf.
        - hidden_states: all N positions, and the spans but those of a response. token_hidden_states: all N. logits: N.
        - weight_version. No ``finish_reason``, no ``mixed_weights``.
        In place, these replace what stood under their keys, the prompts and responses of a generation too, as in
        TorchRL; ``inplace=False`` or keys of its own keep both.

    Raises:
        InputError: an argument, prompt or key that cannot be served, before anything is sent.
        EngineError: the engine could not be reached, refused or aborted.
        SpanError: a span has no tokens in a row. One of a prompt raises before anything is sent.
        ConstraintError: the constraints of a row leave no token; by themselves before anything is sent.
        AlignmentError: the engine returned another number of states than of tokens.

    In every case of an error the input TensorDict is as it was.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.modules.llm.policies import Text
        >>> from torchrl_sglang_hidden import SGLangHiddenWrapper, demo_model, launch
        >>> with launch(demo_model()) as engine:
        ...     policy = SGLangHiddenWrapper(engine, input_mode="text", generate_kwargs={"max_new_tokens": 16})
        ...     out = policy(TensorDict(text=Text(prompt=["The capital of France is"], batch_size=1), batch_size=1))
        >>> out["hidden_states", "response"].shape
        torch.Size([1, 576])
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        input_mode: InputMode = "history",
        input_key: NestedKey | None = None,
        attention_mask_key: NestedKey | None = "attention_mask",
        generate: bool = True,
        generate_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        pad_output: bool = False,
        pad_model_input: bool | None = None,
        inplace: Literal[True, False, "empty"] | None = None,
        device: torch.device | str | None = None,
        layout: torch.layout | None = None,
        num_samples: int | None = None,
        chat_template_name: str | None = None,
        chat_template: str | None = None,
        prefer_tokens: bool = False,
        batching: bool | None = None,
        min_batch_size: int | None = None,
        max_batch_size: int | None = None,
        batching_timeout: float = 10.0,
        return_log_probs: bool | None = None,
        history_key: NestedKey | None = "history",
        text_key: NestedKey | None = "text",
        tokens_key: NestedKey | None = "tokens",
        masks_key: NestedKey | None = "masks",
        log_probs_key: NestedKey | None = "log_probs",
        hidden: HiddenSpec | bool | None = True,
        hidden_states_key: NestedKey | None = "hidden_states",
        token_hidden_states_key: NestedKey | None = "token_hidden_states",
        logits: LogitsSpec | None = None,
        logits_key: NestedKey | None = "logits",
        constraints: LogitConstraint | Sequence[LogitConstraint] = (),
        action_mask_key: NestedKey | None = None,
        action_token_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_arguments(input_mode, generate, pad_model_input, layout, inplace)
        check_chat_template(chat_template, chat_template_name)
        if prefer_tokens and tokens_key is None:
            raise InputError("prefer_tokens=True reads the tokens at tokens_key, which is None; give it a key")
        options = standardize(generate_kwargs)
        self.hidden = read_hidden(hidden, options.get("return_hidden_states"), input_mode)
        self.model: Engine = as_engine(model)
        vocab_size = self.model.info.vocab_size
        self.generate_kwargs = read_options(options, vocab_size)
        self.logits, self.logits_key = read_logits(logits, vocab_size), logits_key
        self.constraints = read_constraints("constraints", constraints)
        for constraint in (*self.constraints, *option_constraints(self.generate_kwargs)):
            constraint.check(vocab_size)
        self.action_mask_key = action_mask_key
        self.action_token_ids = read_action_ids(action_token_ids, action_mask_key, vocab_size)
        self.tokenizer = read_tokenizer(tokenizer, self.model.info.tokenizer_path, self.model.info.vocab_size)
        self.input_mode = input_mode
        self.input_key: NestedKey = default_key(input_mode, generate) if input_key is None else input_key
        self.attention_mask_key = attention_mask_key
        self.generate = generate
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})
        self.pad_output = pad_output
        self.pad_model_input = pad_model_input
        self._given = {
            "inplace": inplace,
            "layout": layout,
            "num_samples": num_samples,
            "batching": batching,
            "min_batch_size": min_batch_size,
            "max_batch_size": max_batch_size,
            "batching_timeout": batching_timeout,
        }
        self.num_samples = read_num_samples(num_samples, self.generate_kwargs)
        many = generate and self.num_samples is not None
        if many and inplace not in (None, False):
            raise InputError(
                f"inplace={inplace!r} with num_samples={self.num_samples}: the output has another batch size than the "
                "input; leave inplace out, or set it to False"
            )
        self.inplace = not many if inplace is None else inplace
        self.layout = torch.strided if layout is None and not pad_output else layout
        self._device = None if device is None else torch.device(device)
        self.chat_template_name = chat_template_name
        self.chat_template = chat_template
        self.return_log_probs = return_log_probs is not False
        self.history_key, self.text_key, self.tokens_key = history_key, text_key, tokens_key
        self.masks_key, self.log_probs_key = masks_key, log_probs_key
        self.hidden_states_key, self.token_hidden_states_key = hidden_states_key, token_hidden_states_key
        self.prefer_tokens = prefer_tokens
        self._states = self.hidden if generate else of_given(self.hidden)
        self._keys = self._output_keys(self._states, self.logits)
        self.in_keys = in_keys(self.input_key, self._states, action_mask_key)
        self.out_keys = out_keys(self._keys, self._states, self.logits, generate)
        self._batcher = make_batcher(self.model, batching, min_batch_size, max_batch_size, batching_timeout)
        # What the base class reads.
        self._min_batch_size = None if self._batcher is None else self._batcher.min_batch_size
        self._max_batch_size = max_batch_size
        self._batching_timeout = batching_timeout

    @property
    def device(self) -> torch.device | None:
        """Where the output tensors go; None follows the input."""
        return self._device

    @property
    def padding_value(self) -> int:
        """The id that pads: the tokenizer's pad id, else its EOS id, else 0."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token_id for token_id in ids if token_id is not None)

    def _output_keys(
        self, states: HiddenSpec | None, logits: LogitsSpec | None, logits_only: bool = False
    ) -> OutputKeys:
        """Where the outputs go of a call that returns these states and logits."""
        return OutputKeys(
            text=self.text_key,
            tokens=self.tokens_key,
            masks=self.masks_key,
            log_probs=self.log_probs_key if self.return_log_probs and not logits_only else None,
            history=self.history_key if self.input_mode == "history" else None,
            hidden_states=self.hidden_states_key if states is not None and states.pooling is not None else None,
            token_hidden_states=self.token_hidden_states_key if states is not None and states.tokens else None,
            weight_version="weight_version",
            finish_reason="finish_reason" if self.generate else None,
            mixed_weights="mixed_weights" if self.generate else None,
            logits=self.logits_key if logits is not None else None,
        )

    @property
    def _engine(self) -> Engine:
        """The engine that calls go to: with batching not the user's own, but the queue in front of it."""
        return self.model if self._batcher is None else self._batcher

    @property
    def _reader(self) -> PromptReader:
        return PromptReader(
            tokenizer=self.tokenizer,
            input_mode=self.input_mode,
            input_key=self.input_key,
            attention_mask_key=self.attention_mask_key,
            masks_key=self.masks_key,
            generate=self.generate,
            tokenizer_kwargs=self.tokenizer_kwargs,
            chat_template=self.chat_template,
            chat_template_name=self.chat_template_name,
            padding_value=self.padding_value,
            prefer_tokens=unravel_key((self.tokens_key, "prompt")) if self.prefer_tokens else None,
        )

    def _mask_reader(self) -> ActionMaskReader | None:
        """Reads the rows' action masks of one call."""
        if self.action_mask_key is None:
            return None
        return ActionMaskReader(self.action_mask_key, self.model.info.vocab_size, self.action_token_ids)

    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        logits_only: bool = False,
        **generate_kwargs: Any,
    ) -> TensorDictBase:
        """Generates one response per row, or `num_samples`; or scores one sequence per row.

        Args:
            tensordict: any batch size, none included. Written to, whole or not at all, with ``inplace=True``.

        Keyword Args:
            tensordict_out: written to instead, and returned.
            logits_only: with ``generate=False``, as in TorchRL: at ``logits_key`` one tensor ``[*batch, N, V]``, or
                the columns of ``LogitsSpec(token_ids=…)``, whose log-softmax has the log-probs; neither log-probs nor
                hidden states. Row n is what token n is drawn from, the first is zeros.
            **generate_kwargs: override those of the constructor in this call. With ``generate=False`` only
                ``return_hidden_states``, ``lora_path``, ``priority``, and constraints of this package.

        Returns:
            See the class.
        """
        call = read_call(
            self.generate_kwargs,
            generate_kwargs,
            hidden=self.hidden,
            # Nobody would get to see them.
            logits=self.logits if self.logits_key is not None else None,
            logits_only=logits_only,
            constraints=self.constraints,
            action_mask_key=self.action_mask_key,
            generate=self.generate,
            input_mode=self.input_mode,
            num_samples=self.num_samples,
            vocab_size=self.model.info.vocab_size,
        )
        keys = self._output_keys(call.hidden, call.logits, logits_only)
        if logits_only or call.hidden != self._states:
            out_keys(keys, call.hidden, call.logits, self.generate)  # refuses keys that clash
        rows = replace(
            self._reader,
            spans={} if call.hidden is None else call.hidden.spans,
            action_masks=self._mask_reader() if call.reads_masks else None,
        ).read(tensordict)
        requests = to_requests(rows, call, return_log_probs=self.return_log_probs)
        samples = self.num_samples if self.generate else None
        batch_size = tensordict.batch_size if samples is None else torch.Size((*tensordict.batch_size, samples))
        target = read_target(tensordict, tensordict_out, self.inplace, keys.present(), batch_size)
        layout: dict[str, Any] = {
            "batch_size": batch_size,
            "keys": keys,
            "hidden": call.hidden,
            "hidden_size": self.model.info.hidden_size,
            "logits": call.logits,
            "pad_id": self.padding_value if self.pad_output else None,
            "device": self._device or tensordict.device,
        }
        if samples is None:
            completions = self._engine.generate(requests)
        else:
            # What goes ahead waits for nobody: it would wait for a batch to fill a second time.
            completions = generate_samples(self._engine, requests, samples, ahead=self.model)
        if self.generate:
            check_responses(completions, call.hidden, self.tokenizer, num_samples=samples or 1)
            out = assemble([row for row in rows for _ in range(samples or 1)], completions, **layout)
        else:
            out = assemble_scores(rows, completions, logits_only=logits_only, **layout)
        return out if target is None else write(target, out, keys.present(), self._keys.present(), self.layout)
