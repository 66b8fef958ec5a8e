"""`SGLangHiddenWrapper`: a TensorDict in, engine requests, a TensorDict out.

Knows nothing of wire formats or padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from tensordict import TensorDictBase, is_non_tensor, is_tensor_collection
from tensordict.utils import NestedKey, unravel_key
from torchrl.modules.llm.policies import LLMWrapperBase
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden.assemble import OutputKeys, assemble, assemble_scores
from torchrl_sglang_hidden.distributions import Distributions
from torchrl_sglang_hidden.engines import Engine, as_engine, generate_samples
from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.options import (
    check_arguments,
    check_chat_template,
    default_key,
    make_batcher,
    out_keys,
    read_hidden,
    read_num_samples,
)
from torchrl_sglang_hidden.prompts import InputMode, PromptReader, Row, read_tokenizer
from torchrl_sglang_hidden.sampling import override, standardize, to_sglang
from torchrl_sglang_hidden.specs import Completion, HiddenSpec, Request

__all__ = ["SGLangHiddenWrapper"]


class SGLangHiddenWrapper(Distributions, LLMWrapperBase):  # type: ignore[misc]
    """A TorchRL LLM policy over SGLang that also returns mean-pooled hidden states.

    A drop-in for torchrl's ``SGLangWrapper``: it reads a prompt from the TensorDict, generates, and writes TorchRL's
    own TensorClasses, beside `HiddenStates`. The token ids that the engine gets are the ids in ``tokens.prompt``, in
    every input mode; one call is one batched request, which SGLang schedules.

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
            generation only (``generate_kwargs``, ``num_samples``, ``prefer_tokens``, segments of ``hidden``) is kept
            for `get_new_version` and has no effect: a chat is scored as the tokenizer writes it. To score a rollout
            by the ids that were sampled, use ``input_mode="tokens"``.
        generate_kwargs: generation options by TorchRL's standard names, Hugging Face's or SGLang's; see
            `torchrl_sglang_hidden.sampling.standardize`. Options passed to a call override these.
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
        hidden: which hidden states are returned: a `HiddenSpec`, True for its defaults, False or None for none.
        hidden_states_key: where `HiddenStates` is written.

    Outputs (B rows, P prompt tokens, T response tokens, D hidden size):
        - text: ``prompt``, ``response``, ``full``, one string per row. The response without special tokens and matched
          stop strings; the prompt as the template, or the decoded ids, say it.
        - tokens: int64 ``prompt`` [P], ``response`` [T], ``full`` [P+T]. A response ends with the token that ended it:
          EOS, a stop id, or the one that completed a stop string. It was sampled, so it keeps its log-prob and state.
        - masks: bool [P+T]; ``all_attention_mask``, and ``all_assistant_mask``, True on the response.
        - log_probs: float32 ``response`` [T] and ``full`` [P+T], NaN where nothing was measured; ``prompt`` is None.
        - history (history mode): ``prompt``, ``response``, ``full``, the last usable as the next prompt.
        - hidden_states: see `HiddenStates`.
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
        - hidden_states: all N positions.
        - weight_version. No ``finish_reason``, no ``mixed_weights``.
        In place, these replace what stood under their keys, the prompts and responses of a generation too, as in
        TorchRL; ``inplace=False`` or keys of its own keep both.

    Raises:
        InputError: an argument, prompt or key that cannot be served, before anything is sent.
        EngineError: the engine could not be reached, refused or aborted.
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
    ) -> None:
        super().__init__()
        check_arguments(input_mode, generate, pad_model_input, layout, inplace)
        check_chat_template(chat_template, chat_template_name)
        if prefer_tokens and tokens_key is None:
            raise InputError("prefer_tokens=True reads the tokens at tokens_key, which is None; give it a key")
        self.hidden = read_hidden(hidden)
        self.generate_kwargs = standardize(generate_kwargs)
        self.model: Engine = as_engine(model)
        self.tokenizer = read_tokenizer(tokenizer, self.model.info.tokenizer_path, self.model.info.vocab_size)
        self.input_mode = input_mode
        self.input_key: NestedKey = default_key(input_mode, generate) if input_key is None else input_key
        self.attention_mask_key = attention_mask_key
        self.generate = generate
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})
        self.pad_output = pad_output
        self.pad_model_input = pad_model_input
        # As given: the defaults of these depend on other arguments, which `get_new_version` may change.
        self._given: dict[str, Any] = {
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
        self.hidden_states_key = hidden_states_key
        self.prefer_tokens = prefer_tokens
        self._keys = OutputKeys(
            text=text_key,
            tokens=tokens_key,
            masks=masks_key,
            log_probs=log_probs_key if self.return_log_probs else None,
            history=history_key if input_mode == "history" else None,
            hidden_states=hidden_states_key if self.hidden is not None else None,
            weight_version="weight_version",
            finish_reason="finish_reason" if generate else None,
            mixed_weights="mixed_weights" if generate else None,
        )
        self.in_keys = [self.input_key]
        self.out_keys = out_keys(self._keys, self.hidden, generate)
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
            logits_only: False; this version returns no logits.
            **generate_kwargs: override those of the constructor in this call. None with ``generate=False``.

        Returns:
            See the class.
        """
        if logits_only:
            raise InputError("logits_only=True: this version returns no logits; leave it out")
        options = self._call_options(generate_kwargs)
        rows = self._reader.read(tensordict)
        samples = self.num_samples if self.generate else None
        batch_size = tensordict.batch_size if samples is None else torch.Size((*tensordict.batch_size, samples))
        target = self._target(tensordict, tensordict_out, batch_size)
        layout: dict[str, Any] = {
            "batch_size": batch_size,
            "keys": self._keys,
            "hidden": self.hidden,
            "pad_id": self.padding_value if self.pad_output else None,
            "device": self._device or tensordict.device,
        }
        if self.generate:
            out = assemble([row for row in rows for _ in range(samples or 1)], self._sample(rows, options), **layout)
        else:
            out = assemble_scores(rows, self._score(rows), **layout)
        if target is None:
            return out
        # set, not update: update would merge into a TensorClass of the previous step and keep its stale fields.
        for key in self._keys.present():
            target.set(key, out.get(key))
        return target

    def _call_options(self, generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """SGLang's sampling parameters of one call."""
        if generate_kwargs and not self.generate:
            raise InputError(
                f"generate=False scores and samples nothing; leave {', '.join(sorted(generate_kwargs))} out of the call"
            )
        options = override(self.generate_kwargs, generate_kwargs)
        if read_num_samples(self.num_samples, options) != self.num_samples:
            raise InputError(
                f"num_return_sequences={options['num_return_sequences']} in a call, and no num_samples in the wrapper, "
                "whose output would have another shape; use get_new_version(num_samples=…)"
            )
        return to_sglang(options)

    def _sample(self, rows: Sequence[Row], options: Mapping[str, Any]) -> list[Completion]:
        """The completions of every row, those of one row together."""
        requests = [
            Request(row.prompt_ids, sampling=options, return_log_probs=self.return_log_probs, hidden=self.hidden)
            for row in rows
        ]
        if self.num_samples is None:
            return self._engine.generate(requests)
        # What goes ahead waits for nobody: it would wait for a batch to fill a second time.
        return generate_samples(self._engine, requests, self.num_samples, ahead=self.model)

    def _score(self, rows: Sequence[Row]) -> list[Completion]:
        """One prefill per row: the sequence is a prompt, and the one token that SGLang must sample is dropped."""
        return self._engine.generate(
            [
                Request(
                    row.prompt_ids,
                    sampling={"max_new_tokens": 1, "temperature": 0.0},
                    return_log_probs=False,
                    hidden=None if self.hidden is None else replace(self.hidden, segments=("prompt",)),
                    score_prompt=self.return_log_probs,
                )
                for row in rows
            ]
        )

    def _target(
        self, tensordict: TensorDictBase, given: TensorDictBase | None, batch_size: torch.Size
    ) -> TensorDictBase | None:
        """What the outputs are written to, None for a new TensorDict; checked before the engine has worked for it."""
        if given is None:
            if self.inplace is False:
                return None
            given = tensordict if self.inplace is True else tensordict.empty()
        if given.is_locked:
            raise InputError("the TensorDict to write to is locked; unlock_() it, or use inplace=False")
        self._check_room(given)
        if given.batch_size != batch_size:
            raise InputError(
                f"tensordict_out has batch size {tuple(given.batch_size)} and the output has {tuple(batch_size)}; give "
                "both the same"
            )
        return given

    def cleanup_batching(self, *, flush: bool = False) -> None:
        """Empties the queue of callers that wait for a batch to fill, and returns at once.

        Args:
            flush: True has them sent now; False ends them with a ``concurrent.futures.CancelledError``.
        """
        # The base class calls this from __del__, on objects that were never finished too.
        batcher = self.__dict__.get("_batcher")
        if batcher is not None:
            batcher.cleanup(flush=flush)

    def __getstate__(self) -> dict[str, Any]:
        """All but the collector, which a copy does not belong to: torchrl holds it by a weak reference."""
        return {**self.__dict__, "_collector": None}

    def __del__(self) -> None:
        """Nothing to end: a call that waits holds its policy. The base class would end those of a shallow copy's."""

    def get_batching_state(self) -> dict[str, Any]:
        """The queue of callers: see `BatchingEngine.state`."""
        return {"batching_enabled": False} if self._batcher is None else self._batcher.state()

    def _check_room(self, target: TensorDictBase) -> None:
        """Refuses a target where a key's path leads through something that is no TensorDict."""
        while target.ndim:
            target = target[0]
        for key in self._keys.present():
            path = key if isinstance(key, tuple) else (key,)
            for length in range(1, len(path)):
                found = target.get(path[:length], None)
                if found is None:
                    break
                if not is_tensor_collection(found) or is_non_tensor(found):
                    raise InputError(
                        f"{key!r} cannot be written: there is a {type(found).__name__} at {path[:length]!r}; give the "
                        "output another key, or use inplace=False"
                    )

    # --- configuration ---------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """Every constructor argument but the model, as it is in force."""
        return {
            "tokenizer": self.tokenizer,
            "input_mode": self.input_mode,
            "input_key": self.input_key,
            "attention_mask_key": self.attention_mask_key,
            "generate": self.generate,
            "generate_kwargs": dict(self.generate_kwargs),
            "tokenizer_kwargs": dict(self.tokenizer_kwargs),
            "pad_output": self.pad_output,
            "pad_model_input": self.pad_model_input,
            "device": self._device,
            **self._given,
            "chat_template_name": self.chat_template_name,
            "chat_template": self.chat_template,
            "prefer_tokens": self.prefer_tokens,
            "return_log_probs": self.return_log_probs,
            "history_key": self.history_key,
            "text_key": self.text_key,
            "tokens_key": self.tokens_key,
            "masks_key": self.masks_key,
            "log_probs_key": self.log_probs_key,
            "hidden": self.hidden,
            "hidden_states_key": self.hidden_states_key,
        }

    def get_new_version(self, **changes: Any) -> SGLangHiddenWrapper:
        """A wrapper of the same engine with some constructor arguments changed; the others are kept, all of them."""
        config = {**self.config, **changes}
        # The default input key belongs to its mode; a key of the user's own is kept.
        if "input_key" not in changes and self.input_key == default_key(self.input_mode, self.generate):
            config["input_key"] = None
        # The number of samples has two names, and the one that is changed wins.
        if "num_samples" in changes and "generate_kwargs" not in changes:
            config["generate_kwargs"].pop("num_return_sequences", None)
        elif "num_samples" not in changes and "num_return_sequences" in standardize(config["generate_kwargs"]):
            config["num_samples"] = None
        # Whether to batch has two names too: the sizes switch it on.
        sizes = {"min_batch_size", "max_batch_size"}
        if changes.get("batching") is False:
            config |= dict.fromkeys(sizes - changes.keys())
        elif "batching" not in changes and self._batcher is None and sizes & changes.keys():
            config["batching"] = None
        return type(self)(config.pop("model", self.model), **config)
