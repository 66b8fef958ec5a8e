"""`PromptEncoder`: prompts to pooled hidden states, by one call of a policy, with a cache in front of it.

Knows nothing of environments: a row is a TensorDict without batch dimensions, with a label that names it in errors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import NonTensorData, TensorDictBase
from tensordict.utils import NestedKey, unravel_key

from torchrl_sglang_hidden.errors import CapabilityError, EngineError, InputError, InputTypeError, SGLangHiddenError
from torchrl_sglang_hidden.policy.prompts import InputMode
from torchrl_sglang_hidden.policy.ragged import ragged
from torchrl_sglang_hidden.policy.rows import unbind_rows
from torchrl_sglang_hidden.policy.wrapper import SGLangHiddenWrapper
from torchrl_sglang_hidden.rl.prompt_cache import CacheInfo, PromptCache
from torchrl_sglang_hidden.rl.prompts import Prompt, PromptWriter, value_of

__all__ = [
    "Encoding",
    "LabelledPrompt",
    "PromptEncoder",
    "check_answers_once",
    "check_takes_images",
    "images_key_of",
    "mode_of",
    "pooled_keys",
    "to_input",
    "vector_shape",
    "with_labels",
]


# Beside the version of a response's last token, where its first ones were sampled with other weights.
MIXED = "mixed"


class LabelledPrompt(NamedTuple):
    """A prompt, and the name that its row has in errors."""

    label: str
    prompt: Prompt


class Encoding(NamedTuple):
    """What a prompt became: float32 ``[D]`` or ``[K, D]`` on the CPU, and the generated text, empty without one."""

    vector: torch.Tensor
    text: str


class PromptEncoder:
    """Writes and encodes prompts. Copies and pickles keep the arguments, and begin with an empty cache.

    Args:
        policy: pools exactly one segment or span.
        writer: writes the prompts.
        keep_text: whether the generated texts are wanted.
        cache_size: most prompts whose encodings are kept. With a cache, a prompt that stands in several rows of a call
            is asked once.

    Raises:
        InputTypeError: a policy of another class, or a ``cache_size`` that is no integer.
        InputError: a policy that returns no pooled states or those of several segments, or several responses per
            prompt, or scores; or a negative ``cache_size``.
    """

    def __init__(self, policy: SGLangHiddenWrapper, writer: PromptWriter, *, keep_text: bool, cache_size: int) -> None:
        if not isinstance(policy, SGLangHiddenWrapper):
            raise InputTypeError(f"policy={policy!r:.80} is a {type(policy).__name__}; expected a SGLangHiddenWrapper")
        if type(cache_size) is not int:
            raise InputTypeError(f"cache_size={cache_size!r:.80}: expected an integer of at least 0")
        if cache_size < 0:
            raise InputError(f"cache_size={cache_size}: expected an integer of at least 0; 0 keeps nothing")
        self.policy, self.writer, self.keep_text, self.cache_size = policy, writer, keep_text, cache_size
        self._hidden_key = _hidden_key(policy)
        check_takes_images(policy, writer.images_keys)
        if keep_text and policy.config.keys.text_key is None:
            raise InputError("text_key, and a policy with text_key=None, which returns no text; give the policy one")
        self._start()

    def _start(self) -> None:
        self._cache: PromptCache[Encoding] = PromptCache(self.cache_size)
        self._askers: dict[InputMode, SGLangHiddenWrapper] = {}
        self._told: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_cache", "_askers", "_told")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def shape(self) -> torch.Size:
        """The shape of a vector, ``[D]`` or ``[K, D]``."""
        return vector_shape(self.policy)

    @property
    def cache_info(self) -> CacheInfo:
        """How the cache was used."""
        return self._cache.info

    def write(self, rows: Iterable[tuple[str, TensorDictBase]]) -> list[LabelledPrompt]:
        """Write the prompts of rows, each with the label that names it in errors.

        Raises:
            InputError, InputTypeError, MissingKeyError: see `PromptWriter.write`.
        """
        return [LabelledPrompt(label, self.writer.write(label, row)) for label, row in rows]

    def encode(self, prompts: Sequence[LabelledPrompt], *, once: bool = False) -> list[Encoding]:
        """Encode prompts, in one call of the policy.

        Args:
            prompts: none is no call.
            once: ask equal prompts once, without a cache too.

        Raises:
            InputError: a prompt that cannot be sent.
            EngineError: the engine failed, or its states are not finite.
        """
        keys: list[Hashable] = [one.prompt.key if once or self.cache_size else row for row, one in enumerate(prompts)]
        wanted: dict[Hashable, LabelledPrompt] = {}
        for key, one in zip(keys, prompts, strict=True):
            wanted.setdefault(key, one)
        found = self._find(wanted, Counter(keys))
        return [found[key] for key in keys]

    def _find(
        self, wanted: Mapping[Hashable, LabelledPrompt], counts: Mapping[Hashable, int]
    ) -> dict[Hashable, Encoding]:
        """Return the encodings of prompts, from the cache or the engine."""

        def ask(keys: list[Hashable]) -> tuple[dict[Hashable, Encoding], set[str]]:
            answers, versions = self._ask([wanted[key] for key in keys])
            return dict(zip(keys, answers, strict=True)), versions

        told = self.policy.model.info.weight_version
        if told != self._told:
            # This process updated the weights. In another one the engine's info stays as it was.
            self._told = told
            self._cache.use_version(told)
        known = self._cache.look_up(counts)
        answers, versions = ask([key for key in wanted if key not in known])
        if known and not answers:
            versions = {self.policy.model.weight_version()}
        if known and versions != {self._cache.version}:
            # Somebody else updated the weights: what was kept is of older ones.
            again, newer = ask(list(known))
            answers, versions, known = {**answers, **again}, versions | newer, {}
        if answers:
            # Where the weights were updated in between, which answer is of which version would have to be kept, too.
            self._cache.use_version(versions.pop() if len(versions) == 1 else None)
            self._cache.keep(answers if self._cache.version is not None else {})
        return {**known, **answers}

    def _ask(self, prompts: Sequence[LabelledPrompt]) -> tuple[list[Encoding], set[str]]:
        """Return the encodings of prompts, and the versions of the weights that they are of."""
        if not prompts:
            return [], set()
        mode = mode_of(prompts)
        try:
            asker = self._asker(mode)
            out = asker(to_input([one.prompt for one in prompts], asker))
        except SGLangHiddenError as error:
            told = with_labels(error, [one.label for one in prompts])
            raise told from error
        rows = list(unbind_rows(out))
        vectors = [_read_finite(row, self._hidden_key, one) for row, one in zip(rows, prompts, strict=True)]
        texts = [self._text(row) if self.keep_text else "" for row in rows]
        versions = {str(value_of(row.get("weight_version"))) for row in rows}
        if any(bool(row.get("mixed_weights")) for row in rows):
            versions.add(MIXED)
        return [Encoding(*pair) for pair in zip(vectors, texts, strict=True)], versions

    def _asker(self, mode: InputMode) -> SGLangHiddenWrapper:
        """Return the policy that reads a kind of prompt."""
        if mode not in self._askers:
            changes: dict[str, Any] = {"inplace": False, "images_key": images_key_of(self.policy)}
            if mode != self.policy.config.input_mode or self.policy.config.input_key is not None:
                changes |= {"input_mode": mode, "input_key": None}
            self._askers[mode] = self.policy.get_new_version(**changes)
        return self._askers[mode]

    def _text(self, row: TensorDictBase) -> str:
        text = row.get(unravel_key((self.policy.config.keys.text_key, "response")))
        return "" if text is None else str(value_of(text))


def to_input(prompts: Sequence[Prompt], policy: SGLangHiddenWrapper) -> TensorDictBase:
    """Return prompts of one kind as the batch that a policy reads, with the images of each row."""
    values: dict[str, Any] = {prompts[0].mode: [prompt.value for prompt in prompts]}
    batch = ragged(**values)
    if any(prompt.images for prompt in prompts):
        for row, prompt in zip(unbind_rows(batch), prompts, strict=True):
            row.set(images_key_of(policy), NonTensorData(list(prompt.images)))
    return batch


def images_key_of(policy: SGLangHiddenWrapper) -> NestedKey:
    """Return where a version of a policy that is asked here reads images: where the policy does, if it does."""
    return "images" if policy.config.images_key is None else policy.config.images_key


def check_takes_images(policy: SGLangHiddenWrapper, keys: Sequence[NestedKey]) -> None:
    """Refuse keys of images where the policy sends none.

    Raises:
        CapabilityError: the engine's model takes text alone.
        InputError: a key is there twice.
    """
    if not keys:
        return
    names = ", ".join(map(repr, keys))
    if not policy.model.info.takes_images:
        raise CapabilityError(
            f"images at {names}, and the model {policy.model.info.model_path!r} takes text alone; serve a "
            "vision-language model, or leave the keys out"
        )
    if len(set(keys)) < len(keys):
        raise InputError(f"images at {names}: a key is there twice; name each once")


def vector_shape(policy: SGLangHiddenWrapper) -> torch.Size:
    """Return the shape of a vector that a policy pools, ``[D]`` or ``[K, D]``."""
    hidden, size = policy.config.hidden, policy.model.info.hidden_size
    layers = hidden.layers if hidden is not None else -1
    return torch.Size((len(layers), size) if isinstance(layers, tuple) else (size,))


def pooled_keys(policy: SGLangHiddenWrapper) -> list[NestedKey]:
    """Return the keys of the pooled vectors that a policy returns: spans without a pooling are none.

    Raises:
        InputError: it returns none.
    """
    config = policy.config
    spec, key = config.hidden, config.keys.hidden_states_key
    if spec is None or spec.pooling is None or key is None:
        raise InputError(
            f"a policy with hidden={spec} and hidden_states_key={key!r} returns no pooled states; use "
            "policy.get_new_version(hidden=HiddenSpec(segments=('prompt',)))"
        )
    # Scoring knows one segment, whatever is asked of generation.
    leaves: list[NestedKey] = [(key, segment) for segment in (spec.segments if config.generate else ("full",))]
    leaves += [(key, "spans", name) for name in spec.spans if name not in spec.unpooled]
    return [unravel_key(leaf) for leaf in leaves]


def _hidden_key(policy: SGLangHiddenWrapper) -> NestedKey:
    """Return the key of the only pooled vector that a policy returns."""
    leaves = pooled_keys(policy)
    if policy.config.hidden is not None and policy.config.hidden.unpooled:
        name = policy.config.hidden.unpooled[0]
        raise InputError(
            f"the span {name!r}, {policy.config.hidden.spans[name]!r}, has any number of rows, and one vector is read; "
            "give it a pooling, such as pooling='last'"
        )
    if len(leaves) != 1:
        raise InputError(
            f"a policy that pools {leaves} returns {len(leaves)} vectors; expected one segment or one span, such as "
            "HiddenSpec(segments=('prompt',))"
        )
    heads = policy.config.heads
    # Those of a rule are read to end responses.
    if heads is not None and heads.stop_when is None:
        raise InputError(
            f"a policy with heads={heads!r:.200}, whose scores nothing reads here; use policy.get_new_version("
            "heads=None), and Head.score for the score of a vector"
        )
    check_answers_once(policy)
    return leaves[0]


def check_answers_once(policy: SGLangHiddenWrapper) -> None:
    """Refuse a policy that scores, or that returns several responses for each prompt."""
    if not policy.config.generate:
        raise InputError(
            "a policy with generate=False scores sequences; use get_new_version(generate=True, generate_kwargs="
            "{'max_new_tokens': 0}), which reads the prompt alone"
        )
    if policy.config.num_responses is not None:
        raise InputError(
            f"a policy with num_samples={policy.config.num_responses} returns several vectors for each prompt; use "
            "get_new_version(num_samples=None)"
        )


def mode_of(prompts: Sequence[LabelledPrompt]) -> InputMode:
    """Return how a policy reads prompts, at least one, which must be of one kind."""
    modes = {one.prompt.mode: one.label for one in prompts}
    if len(modes) > 1:
        raise InputTypeError(
            f"the prompt function returned {' and '.join(f'{mode} for {label}' for mode, label in modes.items())}; "
            "expected one kind for all rows"
        )
    (mode,) = modes
    return mode


def _read_finite(row: TensorDictBase, key: NestedKey, asked: LabelledPrompt) -> torch.Tensor:
    """Return the vector of a row; refuse one that is not finite, and a row that failed under ``on_error="nan"``."""
    vector: torch.Tensor = row.get(key).float().cpu()
    bad = int((~vector.isfinite()).sum())
    error = value_of(row.get("error"))
    if bad or error:
        said = error or f"{bad} of {vector.numel()} values of its hidden state are NaN or infinite"
        raise EngineError(
            f"{asked.label}: {said}; expected a finite vector for the prompt {asked.prompt.value!r:.200}: change the "
            "prompt, or look at the server's log"
        )
    return vector


def with_labels(error: SGLangHiddenError, labels: list[str]) -> SGLangHiddenError:
    """Return an error of a policy, whose rows are counted as they were sent, with the names of these rows."""
    # Of 128 rows the one that failed is said, and not the first few.
    said = sorted({int(row) for row in re.findall(r"\brow (\d+)", str(error))} & set(range(len(labels))))
    names = "; ".join(f"row {row} is {labels[row]}" for row in said or range(len(labels)))
    told = type(error)(f"{error} ({names:.400})")
    told.completions = error.completions
    return told
