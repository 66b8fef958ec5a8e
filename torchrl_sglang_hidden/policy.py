"""`SGLangHiddenWrapper`: a TensorDict in, engine requests, a TensorDict out.

Knows nothing of wire formats or padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.modules.llm.policies import LLMWrapperBase
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from torchrl_sglang_hidden.assemble import OutputKeys, assemble
from torchrl_sglang_hidden.engines import Engine, as_engine
from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.prompts import INPUT_MODES, InputMode, PromptReader
from torchrl_sglang_hidden.sampling import override, standardize, to_sglang
from torchrl_sglang_hidden.specs import HiddenSpec, Request

__all__ = ["SGLangHiddenWrapper"]


class SGLangHiddenWrapper(LLMWrapperBase):  # type: ignore[misc]
    """A TorchRL LLM policy over SGLang that also returns mean-pooled hidden states.

    A drop-in for torchrl's ``SGLangWrapper``: it reads a prompt from the TensorDict, generates, and writes TorchRL's
    own TensorClasses, beside `HiddenStates`. The token ids that the engine gets are the ids in ``tokens.prompt``, in
    every input mode; one call is one batched request, which SGLang schedules.

    Args:
        model: a URL or several, `SGLangServer`, `SGLangOffline`, an ``sglang.Engine``, or torchrl's ``AsyncSGLang``.

    Keyword Args:
        tokenizer: a Hugging Face tokenizer, a name or path of one, or None for the engine's own.
        input_mode: ``"history"``, ``"text"`` or ``"tokens"``.
        input_key: where the prompt is read; by default ``(input_mode, "prompt")``. History mode reads a
            ``torchrl.data.llm.History`` of shape ``[*batch, turns]``; text mode one string per row; tokens mode int64
            ids, ragged, or padded on the left.
        attention_mask_key: in tokens mode, a mask ``[*batch, P]`` read from this key when it is there: ids where it is
            False are pads, which are never sent. Without it, the pad ids at the left of a row of a ``Tokens`` that says
            ``padded`` are its padding; every other id is sent as it is.
        generate: True. Scoring is not in this version.
        generate_kwargs: generation options by TorchRL's standard names, Hugging Face's or SGLang's; see
            `torchrl_sglang_hidden.sampling.standardize`. Options passed to a call override these.
        tokenizer_kwargs: passed to the tokenizer when text is turned into ids. Padding it adds is taken off again.
        pad_output: pad the ragged leaves to one width: prompts on the left, responses on the right, ids with the
            tokenizer's pad (or EOS) id, log-probs with NaN, masks with False. False leaves them ragged.
        inplace: True (the default) writes into the input and returns it; False returns a new TensorDict of the outputs;
            ``"empty"`` returns an empty copy of the input with the outputs.
        device: where the output tensors go; by default the input's device, or the CPU.
        chat_template_name: one of torchrl's named chat templates, for history mode.
        chat_template: a Jinja chat template, for history mode. By default the tokenizer's own.
        return_log_probs: whether the log-prob of every sampled token is returned; True by default. They are those of
            the distribution after temperature, penalties and grammar, before top-k and top-p (SGLang's).
        text_key, tokens_key, masks_key, log_probs_key, history_key: where TorchRL's TensorClasses are written; None
            leaves one out.
        hidden: which hidden states are returned: a `HiddenSpec`, True for its defaults, False or None for none.
        hidden_states_key: where `HiddenStates` is written.

    Outputs (B rows, P prompt tokens, T response tokens, D hidden size):
        - text: ``prompt``, ``response``, ``full``, one string per row. Without special tokens and matched stop strings.
        - tokens: int64 ``prompt`` [P], ``response`` [T], ``full`` [P+T]. A response ends with the token that ended it:
          EOS, a stop id, or the one that completed a stop string. It was sampled, so it keeps its log-prob and state.
        - masks: bool [P+T]; ``all_attention_mask``, and ``all_assistant_mask``, True on the response.
        - log_probs: float32 ``response`` [T] and ``full`` [P+T], NaN where nothing was measured; ``prompt`` is None.
        - history (history mode): ``prompt``, ``response``, ``full``, the last usable as the next prompt.
        - hidden_states: see `HiddenStates`.
        - weight_version, finish_reason (``"stop"`` or ``"length"``): one string per row.

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
        attention_mask_key: NestedKey = "attention_mask",
        generate: bool = True,
        generate_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        pad_output: bool = False,
        inplace: Literal[True, False, "empty"] | None = None,
        device: torch.device | str | None = None,
        chat_template_name: str | None = None,
        chat_template: str | None = None,
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
        if input_mode not in INPUT_MODES:
            raise InputError(f"input_mode={input_mode!r}: expected one of {INPUT_MODES}")
        if generate is not True:
            raise InputError(f"generate={generate!r}: this version generates only; leave it out")
        if inplace != "empty" and not any(inplace is value for value in (None, True, False)):
            raise InputError(f"inplace={inplace!r}: expected True, False or 'empty'")
        self.hidden = _hidden_spec(hidden)
        self.generate_kwargs = standardize(generate_kwargs)
        self.model: Engine = as_engine(model)
        self.tokenizer = _tokenizer(tokenizer, self.model)
        self.input_mode = input_mode
        self.input_key: NestedKey = (input_mode, "prompt") if input_key is None else input_key
        self.attention_mask_key = attention_mask_key
        self.generate = generate
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})
        self.pad_output = pad_output
        self.inplace = True if inplace is None else inplace
        self._device = None if device is None else torch.device(device)
        self.chat_template_name = chat_template_name
        self.chat_template = chat_template
        self.return_log_probs = return_log_probs is not False
        self.history_key, self.text_key, self.tokens_key = history_key, text_key, tokens_key
        self.masks_key, self.log_probs_key = masks_key, log_probs_key
        self.hidden_states_key = hidden_states_key
        self._keys = OutputKeys(
            text=text_key,
            tokens=tokens_key,
            masks=masks_key,
            log_probs=log_probs_key if self.return_log_probs else None,
            history=history_key if input_mode == "history" else None,
            hidden_states=hidden_states_key if self.hidden is not None else None,
            weight_version="weight_version",
            finish_reason="finish_reason",
        )
        self.in_keys = [self.input_key]
        self.out_keys = self._keys.present()
        twice = [key for key in self.out_keys if self.out_keys.count(key) > 1]
        if twice:
            raise InputError(
                f"{twice[0]!r} is the key of {len(twice)} outputs; give each its own, or None to leave it out"
            )
        # What the base class reads. SGLang batches by itself, so that TorchRL's queue is never used.
        self._min_batch_size = self._max_batch_size = None
        self.num_samples = self.layout = None

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
    def _reader(self) -> PromptReader:
        return PromptReader(
            tokenizer=self.tokenizer,
            input_mode=self.input_mode,
            input_key=self.input_key,
            attention_mask_key=self.attention_mask_key,
            tokenizer_kwargs=self.tokenizer_kwargs,
            chat_template=self.chat_template,
            chat_template_name=self.chat_template_name,
            padding_value=self.padding_value,
        )

    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        logits_only: bool = False,
        **generate_kwargs: Any,
    ) -> TensorDictBase:
        """Generates one response per row.

        Args:
            tensordict: any batch size, none included. Written to, whole or not at all, with ``inplace=True``.

        Keyword Args:
            tensordict_out: written to instead, and returned.
            logits_only: False; this version returns no logits.
            **generate_kwargs: override those of the constructor in this call.

        Returns:
            See the class.
        """
        if logits_only:
            raise InputError("logits_only=True: this version returns no logits; leave it out")
        options = to_sglang(override(self.generate_kwargs, generate_kwargs))
        rows = self._reader.read(tensordict)
        target = self._target(tensordict, tensordict_out)
        completions = self.model.generate(
            [
                Request(row.prompt_ids, sampling=options, return_log_probs=self.return_log_probs, hidden=self.hidden)
                for row in rows
            ]
        )
        out = assemble(
            rows,
            completions,
            batch_size=tensordict.batch_size,
            keys=self._keys,
            hidden=self.hidden,
            pad_id=self.padding_value if self.pad_output else None,
            device=self._device or tensordict.device,
        )
        if target is None:
            return out
        # set, not update: update would merge into a TensorClass of the previous step and keep its stale fields.
        for key in self.out_keys:
            target.set(key, out.get(key))
        return target

    def _target(self, tensordict: TensorDictBase, given: TensorDictBase | None) -> TensorDictBase | None:
        """What the outputs are written to, None for a new TensorDict; checked before the engine has worked for it."""
        if given is None:
            if self.inplace is False:
                return None
            given = tensordict if self.inplace is True else tensordict.empty()
        if given.is_locked:
            raise InputError("the TensorDict to write to is locked; unlock_() it, or use inplace=False")
        if given.batch_size != tensordict.batch_size:
            raise InputError(
                f"tensordict_out has batch size {tuple(given.batch_size)} and the input "
                f"{tuple(tensordict.batch_size)}; give both the same"
            )
        return given

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
            "inplace": self.inplace,
            "device": self._device,
            "chat_template_name": self.chat_template_name,
            "chat_template": self.chat_template,
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
        if "input_mode" in changes and "input_key" not in changes and self.input_key == (self.input_mode, "prompt"):
            config["input_key"] = None
        return type(self)(config.pop("model", self.model), **config)


def _hidden_spec(hidden: HiddenSpec | bool | None) -> HiddenSpec | None:
    if hidden is True:
        return HiddenSpec()
    if hidden is False or hidden is None or isinstance(hidden, HiddenSpec):
        return hidden or None
    raise InputTypeError(f"hidden={hidden!r}: expected a HiddenSpec, True, False or None")


def _tokenizer(tokenizer: PreTrainedTokenizerBase | str | None, engine: Engine) -> PreTrainedTokenizerBase:
    path = engine.info.tokenizer_path if tokenizer is None else tokenizer
    if not isinstance(path, str):
        return path
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no tokenizer can be read at {path!r}; pass tokenizer=, a tokenizer or a path of one"
        ) from error
