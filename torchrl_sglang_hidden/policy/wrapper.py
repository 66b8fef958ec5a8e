"""`SGLangHiddenWrapper`: a TensorDict in, engine requests, a TensorDict out.

Knows nothing of wire formats or padding. Its arguments are documented and checked in `PolicyConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torchrl.modules.llm.policies import LLMWrapperBase

from torchrl_sglang_hidden.engines import Engine, as_engine
from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.policy.assemble import assemble, assemble_scores
from torchrl_sglang_hidden.policy.candidates import Candidates, Normalization, Reduction, score_candidates
from torchrl_sglang_hidden.policy.config import ARGUMENTS, PolicyConfig
from torchrl_sglang_hidden.policy.distributions import Distributions
from torchrl_sglang_hidden.policy.outcomes import OnError
from torchrl_sglang_hidden.policy.outputs import list_out_keys
from torchrl_sglang_hidden.policy.partial import resume_rows
from torchrl_sglang_hidden.policy.prompts import InputMode
from torchrl_sglang_hidden.policy.reading import make_mask_reader, make_reader
from torchrl_sglang_hidden.policy.requests import check_responses, read_call, read_scoring, to_requests
from torchrl_sglang_hidden.policy.sampled_turns import ChatMode
from torchrl_sglang_hidden.policy.sending import layout_of, send
from torchrl_sglang_hidden.policy.writing import resolve_target, write
from torchrl_sglang_hidden.spec.constraints import LogitConstraint
from torchrl_sglang_hidden.spec.head_scores import HeadSpec
from torchrl_sglang_hidden.spec.hidden import HiddenSpec
from torchrl_sglang_hidden.spec.logits import LogitsSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SGLangHiddenWrapper"]


class SGLangHiddenWrapper(Distributions, LLMWrapperBase):  # type: ignore[misc]
    """A TorchRL policy over SGLang that also returns hidden states and logits, and chooses among given actions.

    It takes the place of torchrl's ``SGLangWrapper``: a call reads prompts from a TensorDict, sends them to the engine
    as one batch, and writes the responses as TorchRL's own TensorClasses, with `HiddenStates` beside them. The token
    ids in ``tokens.prompt`` are exactly the ids that the engine got.

    Args:
        model: a URL or several, `SGLangServer`, `SGLangOffline`, an ``sglang.Engine``, or torchrl's ``AsyncSGLang``.
        **arguments: see `PolicyConfig`. Most programs set ``input_mode``, ``generate_kwargs`` and ``hidden``.

    What goes in (``input_mode``): chats at ``("history", "prompt")``, strings at ``("text", "prompt")``, or token ids
    at ``("tokens", "prompt")``, for a batch of any shape.

    What comes out, for P prompt tokens, T response tokens and hidden size D:
        - text: ``prompt``, ``response``, ``full``, one string per row.
        - tokens: int64 ``prompt`` [P], ``response`` [T], ``full`` [P+T].
        - masks: bool [P+T]; ``all_attention_mask``, and ``all_assistant_mask``, True on the response.
        - log_probs: float32 ``response`` [T], ``full`` [P+T].
        - history, in history mode: ``prompt``, ``response``, ``full``, which can be the next prompt.
        - hidden_states: pooled, [D] for each segment; see `HiddenStates`.
        - token_hidden_states, logits, head_scores, sampling and routed_experts, if asked for: see
          `TokenHiddenStates`, `Logits`, `HeadScores`, `Sampling`, `RoutedExperts`.
        - weight_version and finish_reason (one string per row), mixed_weights (bool); with ``on_error="nan"`` error.
        - prompt_images of a vision-language model; pixel_values on request. P then counts the rows of the images.

    `forward` says what each of them holds, what scoring (``generate=False``) writes, and which errors are raised.
    `score` returns the log-probs of candidates, `log_prob` and `get_dist` serve TorchRL's losses, `get_new_version`
    changes arguments.

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

    # Every argument but the model is a field of the configuration by the same name: a test holds the two together.
    def __init__(
        self,
        model: Any,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        input_mode: InputMode = "history",
        input_key: NestedKey | None = None,
        attention_mask_key: NestedKey | None = "attention_mask",
        images_key: NestedKey | None = "images",
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
        chat_template_kwargs: Mapping[str, Any] | None = None,
        prefer_tokens: bool | Literal["strict"] = False,
        chat: ChatMode = "render",
        literal_content: bool = False,
        mark_end_of_turn: bool = False,
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
        heads: HeadSpec | None = None,
        head_scores_key: NestedKey | None = "head_scores",
        sampling_key: NestedKey | None = "sampling",
        routed_experts_key: NestedKey | None = "routed_experts",
        prompt_images_key: NestedKey | None = "prompt_images",
        pixel_values_key: NestedKey | None = None,
        constraints: LogitConstraint | Sequence[LogitConstraint] = (),
        action_mask_key: NestedKey | None = None,
        action_token_ids: Sequence[int] | None = None,
        on_error: OnError = "raise",
        extra_samples: int = 0,
    ) -> None:
        config = PolicyConfig.from_arguments(**{name: value for name, value in locals().items() if name in ARGUMENTS})
        super().__init__()
        self.model: Engine = as_engine(model)
        self._config = config.resolve_for(self.model.info)
        self.in_keys, self.out_keys, self._keys = self.config.in_keys, self.config.out_keys, self.config.default_keys
        self._batcher = self.config.queue.make_queue(self.model)
        self._min_batch_size = None if self._batcher is None else self._batcher.min_batch_size
        self._max_batch_size, self._batching_timeout = max_batch_size, batching_timeout

    # --- the wrapper itself: its versions, copies, queue -------------------------------------------------------------

    def get_new_version(self, **changes: Any) -> Self:
        """Return a wrapper of the same engine with some arguments changed; every other argument is kept.

        What depends on a changed argument follows it: the default ``input_key`` its mode, ``num_samples`` and the
        option ``num_return_sequences`` each other, ``hidden`` and ``return_hidden_states``, ``batching`` and its sizes.

        Raises:
            TypeError: an argument that the wrapper does not have.
            InputError: the arguments cannot be served together.
        """
        model = changes.pop("model", self.model)
        return type(self)(model, **self.config.changed(**changes).arguments())

    def cleanup_batching(self, *, flush: bool = False) -> None:
        """Empty the queue of callers that wait for a batch to fill, and return at once.

        Args:
            flush: True has them sent now; False ends them with a ``concurrent.futures.CancelledError``.
        """
        # The base class calls this from __del__, on objects that were never finished too.
        batcher = self.__dict__.get("_batcher")
        if batcher is not None:
            batcher.cleanup(flush=flush)

    def get_batching_state(self) -> dict[str, Any]:
        """Return the state of the queue of callers: see `BatchingEngine.state`."""
        return {"batching_enabled": False} if self._batcher is None else self._batcher.state()

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the collector, which a copy does not belong to: torchrl holds it by a weak reference."""
        return {**self.__dict__, "_collector": None}

    def __del__(self) -> None:
        """Do nothing: a call that waits holds its policy. The base class would end the waits of a shallow copy."""

    # --- calls -------------------------------------------------------------------------------------------------------

    @property
    def _engine(self) -> Engine:
        """The engine that calls go to: with batching not the user's own, but the queue in front of it."""
        return self.model if self._batcher is None else self._batcher

    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        logits_only: bool = False,
        on_error: OnError | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> TensorDictBase:
        """Generate one response per row, or `num_samples`; or score one sequence per row.

        Args:
            tensordict: prompts, or sequences to score; any batch size, none included. With ``inplace=True`` it is
                written to, whole or not at all.

        Keyword Args:
            tensordict_out: written to instead, and returned.
            logits_only: with ``generate=False``, as in TorchRL: at ``logits_key`` one tensor ``[*batch, N, V]``, or
                the columns of ``LogitsSpec(token_ids=…)``, whose log-softmax has the log-probs; neither log-probs nor
                hidden states. Row n is what token n is drawn from, the first is zeros.
            chat_template_kwargs: variables of the chat template, over the constructor's in this call.
            on_error: as in the constructor, for this call.
            **generate_kwargs: override those of the constructor in this call. With ``generate=False`` only
                ``return_hidden_states``, ``lora_path``, ``priority``, and constraints of this package.

        Returns:
            The TensorDict that was written to. Generating writes, for each row:

            - text: the response without special tokens and matched stop strings; the prompt as the template, or the
              decoded ids, say it.
            - tokens: a response ends with the token that ended it: EOS, a stop id, or the token that completed a stop
              string. It was sampled, so it keeps its log-prob and state.
            - masks: ``all_attention_mask`` and ``all_assistant_mask``, with ``chat="append"`` over all turns.
            - log_probs: NaN where nothing was measured; ``prompt`` is None. ``full`` has the earlier turns' under
              ``chat="append"``.
            - hidden_states, token_hidden_states, logits, head_scores, sampling, routed_experts: see their classes.
            - weight_version; finish_reason, ``"stop"``, ``"length"`` or ``"head"``; chat_digest, where earlier turns
              are followed.
            - error, with ``on_error="nan"``: what went wrong with this row alone, and ``""`` in every other row. A row
              that was not sent has no response. An aborted response has what was sampled before, with
              ``finish_reason`` ``"abort"``, and is not in ``all_assistant_mask``, so that no loss trains on it.
            - mixed_weights: True where the weights were updated in the middle of the response, so that its first tokens
              are of an older version than ``weight_version``; with ``num_samples`` also where the prompt's states are.

            Scoring writes one segment, ``full``, of the N tokens of each sequence:

            - text, tokens, history: the sequence as it was read. Ids that came as one padded tensor keep their places
              under ``pad_output``; other ids are padded on the left.
            - masks: ``all_assistant_mask`` in history mode from the chat template (a template with ``{% generation %}``
              marks the end-of-turn token too), in tokens mode as it was read under ``masks_key``; else None.
            - log_probs: float32 [N], each token given the tokens before it, without temperature; 0 for the first, as in
              TorchRL. Constraints act on the tokens in ``all_assistant_mask`` as if they were being sampled, each run
              from its first token and with ``max_new_tokens`` of the options; a token that they take away has -inf.
            - hidden_states: all N positions, and the spans except those of a response; all else N.
            - weight_version; neither finish_reason nor mixed_weights.

            In place, these replace what stood under their keys, the prompts and responses of a generation too, as in
            TorchRL; ``inplace=False`` or keys of its own keep both.

        Raises:
            InputError: an option, prompt or key that cannot be served, before anything is sent.
            EngineError: the engine could not be reached, refused or aborted.
            SpanError: a span has no tokens in a row. A span of a prompt raises before anything is sent.
            ConstraintError: the constraints of a row leave no token.
            AlignmentError: the engine returned another number of states than of tokens.

        After an error the input TensorDict is as it was.
        """
        config, info = self.config, self.model.info
        outcomes = config.outcomes if on_error is None else replace(config.outcomes, on_error=on_error)
        errors = outcomes.keeps_errors
        call = read_call(config, generate_kwargs, vocab_size=info.vocab_size, logits_only=logits_only)
        keys = config.output_keys(call.hidden, call.logits, call.records, logits_only=logits_only, errors=errors)
        if logits_only or (call.hidden, call.records) != (config.returned_hidden, config.records):
            list_out_keys(keys, call.hidden, call.logits, config.generate, call.heads)  # refuses keys that clash
        rows = replace(
            make_reader(config, chat_template_kwargs),
            spans={} if call.hidden is None else call.hidden.spans,
            head_spans={} if call.heads is None else call.heads.spans,
            action_masks=make_mask_reader(config, info.vocab_size) if call.reads_masks else None,
            keeps_errors=errors,
        ).read(tensordict)
        requests = to_requests(rows, call, return_log_probs=config.return_log_probs, return_errors=errors)
        samples = config.num_responses if config.generate else None
        batch_size = tensordict.batch_size if samples is None else torch.Size((*tensordict.batch_size, samples))
        target = resolve_target(tensordict, tensordict_out, config.writes_inplace, keys.present(), batch_size)
        layout = layout_of(config, call, keys, info, batch_size=batch_size, device=tensordict.device)
        completions = send(
            rows, requests, engine=self._engine, ahead=self.model, num_samples=samples, outcomes=outcomes
        )
        if config.generate:
            check_responses(rows, completions, config.own_tokenizer.plain, num_samples=samples or 1)
            drawn = [row for row in rows for _ in range(samples or 1)]
            out = assemble(drawn, completions, records=call.records, **layout)
        else:
            out = assemble_scores(rows, completions, logits_only=logits_only, **layout)
        return out if target is None else write(target, out, keys.present(), self._keys.present(), config.nested_layout)

    def resume(self, tensordict: TensorDictBase, **generate_kwargs: Any) -> TensorDictBase:
        """Go on from the aborted responses of an output of this policy, such as after an update of the weights.

        The prompt and the tokens so far are sent as they are, the rest is sampled, and both parts are joined: tokens,
        text, log-probs, token states, scores and logits one after another, pooled states and scores over the rows of
        both. Those of a prompt stay the first part's. A span of the response is joined where all of its rows are in the
        second part, and is else NaN with count 0 and an ``error``. A row that cannot be gone on from, because it fills
        the context or a stop string stands across both parts, ends with ``finish_reason`` ``"error"``; so has a sample
        that was aborted midway after the request that was to bring its prompt's states, which is not gone on from.

        Args:
            tensordict: what a call with ``on_error="nan"`` returned, of any batch size, not padded; not written to.
            **generate_kwargs: override those of the constructor. ``max_new_tokens`` counts the whole response.

        Returns:
            The TensorDict with every aborted row replaced by the joined one, which may be aborted again; itself where
            none is aborted. ``weight_versions`` has the versions of both parts.

        Raises:
            InputError: a padded output, a grammar, a ``stop_regex``, penalties or constraints that count tokens, or a
                policy that raises row errors or scores.
            MissingKeyError: an output that the join reads is not there.
            EngineError: what concerns the whole call.

        Example:
            >>> out = policy(td)  # somebody aborts, to update the weights
            >>> while "abort" in out["finish_reason"]:
            ...     out = policy.resume(out)
        """
        if not (self.config.generate and self.config.outcomes.keeps_errors):
            raise InputError(
                f"resume with generate={self.config.generate} and on_error={self.config.outcomes.on_error!r}: it goes "
                "on from outputs with aborted rows; use get_new_version(generate=True, on_error='nan')"
            )
        call = read_call(self.config, generate_kwargs, vocab_size=self.model.info.vocab_size)
        return resume_rows(tensordict, config=self.config, call=call, engine=self._engine, ahead=self.model)

    def score(
        self,
        tensordict: TensorDictBase,
        candidates: Candidates,
        *,
        reduction: Reduction = "sum",
        normalize: Normalization | None = None,
        mask: torch.Tensor | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> TensorDict:
        """Return the log-probs of candidate continuations of each prompt: logits over A actions, for a distribution.

        Each prompt is computed once, ahead of its candidates, which find it in the server's prefix cache; where several
        servers or data-parallel workers share the candidates, once in each.

        Args:
            tensordict: prompts, as for generation, of any batch size; not written to.
            candidates: A strings or lists of token ids, the same for all rows; or such a list for each row, in
                row-major order of the batch, of any lengths. A string is tokenized together with the end of its prompt:
                begin it as the text continues there, such as with a space. Where the two together have other tokens
                than the prompt at their beginning, it is tokenized by itself, and a warning names it. Where one
                candidate is the beginning of another, end both with the end-of-sequence token; otherwise the shorter
                one always has the higher log-prob.

        Keyword Args:
            reduction: ``"sum"``, the log-prob of the whole candidate; ``"mean"``, the mean over its tokens;
                ``"first"``, of its first token, and no more than that is computed. Candidates that begin with the same
                token warn then, for it cannot tell them apart.
            normalize: what the sum is divided by, as in TWOSOME (arXiv 2401.14151): ``"token"``, its tokens, which is
                ``reduction="mean"``; ``"word"``, its words, separated by blanks; None, nothing.
            mask: bool ``[*batch, A]``, True at the candidates to score, such as an environment's ``action_mask``.
            chat_template_kwargs: as in `forward`.

        Returns:
            A TensorDict of the batch's size:

            - logits: float32 ``[*batch, A]``, the log-probs, ``-inf`` where ``mask`` is False. Of the model's own
              distribution, without temperature or penalties; under the wrapper's constraints and its rows'
              ``action_mask_key``, which act on a candidate's tokens as if they were being sampled.
            - mask: bool ``[*batch, A]``, False where ``mask`` was, where a row has fewer candidates than others, and
              where a constraint takes one of the tokens away.
            - num_tokens: int64 ``[*batch, A]``, each candidate's tokens, 0 where there is none.

        Raises:
            InputError: candidates, a mask or prompts that cannot be served, or a wrapper with ``generate=False``.
            ConstraintError: a row without a candidate that it may choose.
            EngineError: the engine could not be reached, refused or aborted.

        Example:
            >>> scores = policy.score(td, [" yes", " no"])
            >>> action = MaskedCategorical(logits=scores["logits"], mask=scores["mask"]).sample()
        """
        if not self.config.generate:
            raise InputError(
                "score with generate=False: this wrapper reads whole sequences, and candidates follow prompts; use "
                "get_new_version(generate=True)"
            )
        vocab_size = self.model.info.vocab_size
        call = read_scoring(self.config, {}, vocab_size=vocab_size)
        reader = make_reader(self.config, chat_template_kwargs)
        scores = score_candidates(
            replace(reader, action_masks=make_mask_reader(self.config, vocab_size)).read(tensordict),
            candidates,
            call=call,
            reduction=reduction,
            normalize=normalize,
            mask=mask,
            batch_size=tensordict.batch_size,
            own=self.config.own_tokenizer,
            processor=self.config.processor,
            engine=self._engine,
            ahead=self.model,
        )
        return scores.to(self.config.device or tensordict.device or "cpu")
