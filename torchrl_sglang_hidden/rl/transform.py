"""`HiddenStateTransform`: an LLM as the state encoder of an ordinary environment.

Knows nothing of how prompts are asked: it says which rows are encoded when, and where the vectors go. What a step
needs of the step before stands in the TensorDict, so that partial resets, copies in workers and replays are right.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torchrl.data import Composite, NonTensor, TensorSpec, Unbounded
from torchrl.envs.transforms import Transform

from torchrl_sglang_hidden.errors import InputError, MissingKeyError
from torchrl_sglang_hidden.policy.rows import unbind_rows
from torchrl_sglang_hidden.policy.wrapper import SGLangHiddenWrapper
from torchrl_sglang_hidden.rl.ablations import Ablation, Shuffler, check_ablation
from torchrl_sglang_hidden.rl.background import Background
from torchrl_sglang_hidden.rl.encoder import LabelledPrompt, PromptEncoder
from torchrl_sglang_hidden.rl.projection import make_projection
from torchrl_sglang_hidden.rl.prompt_cache import CacheInfo
from torchrl_sglang_hidden.rl.prompts import PromptSource, PromptWriter, image_keys, value_of
from torchrl_sglang_hidden.rl.rows import (
    refuse_lost,
    reset_rows,
    stepped_rows,
    text_leaf,
    trajectory_sources,
    transforms_behind,
)
from torchrl_sglang_hidden.rl.schedule import make_schedule

__all__ = ["HiddenStateTransform"]


class _Rows(NamedTuple):
    """Encoded rows: vectors ``[N, *shape]`` as they are given, and N texts."""

    vectors: torch.Tensor
    texts: list[str]


class HiddenStateTransform(Transform):  # type: ignore[misc]
    """Writes pooled hidden states of an LLM beside the observations of any TorchRL environment.

    At a reset and at each step a prompt is made of each environment's observation, all prompts are sent as one
    batched request, and the pooled vectors appear in the TensorDict, with their spec. A partial reset encodes the
    environments that were reset.

    Args:
        policy: says what is pooled: one segment or span of its ``hidden``. With ``max_new_tokens=0`` the prompt alone,
            which is fast; otherwise a response is generated first. Its ``input_mode`` is set to what the prompts are.
        prompt: a format string over ``in_keys``, sent as text: ``"You see {observation}."``. A tensor is written as its
            numbers, ``{observation:.2f}`` formats each, ``{observation[0]}`` takes one, and the field of the nested key
            ``("agent", "position")`` is ``{agent.position}``. Or a function of one row, a TensorDict of ``in_keys``
            without batch dimensions, that returns a text, a chat (messages or a ``History``) or a list of token ids.
        in_keys: the observations that the prompt reads.
        images_in_keys: the observations that are images, such as ``["pixels"]``: uint8 ``[*batch, H, W, C]`` or
            ``[*batch, C, H, W]``, for a vision-language model. A row's images are, in the order of these keys, those of
            the placeholders in a text (``"<|vision_start|><|image_pad|><|vision_end|> You see {x}."`` for a Qwen-VL) or
            in token ids, or of a chat's parts ``{"type": "image"}`` that bring none of their own. The cache tells
            images apart by their content.
        out_key: where the vectors go.
        text_key: where the generated texts go; by default they are dropped.
        every: encode the observation of the reset and each ``every``-th after it; steps in between keep the vector.
            Each environment of a batch counts by itself.
        age_key: where the number of steps goes since the observation was seen that the vector is of. By default no
            key, or ``out_key`` with ``_age`` behind it where vectors are kept from step to step.
        late: encode an observation while the environment takes the next step, and give its vector after that step:
            one step late, for the time of the longer of the two. The observation of a reset is given at once.
        cache_size: most prompts whose vectors are kept in this process; see `cache_info`. Prompts that stand in
            several rows are then asked once. New weights empty the cache, also those that another process sends to
            the server, which is asked for their version where all prompts are in the cache. Of generated texts the
            cache gives the same sample again.
        project: d, to multiply every vector with the same random Gaussian matrix ``[D, d]`` in the buffer
            ``projection``, which keeps distances (Johnson and Lindenstrauss). The same seed in every process.
        ablate: a control in place of the vectors. ``"zero"``: zeros, nothing is asked. ``"shuffle"``: the vectors of
            other rows and steps. ``"frozen"``: the vector of the episode's reset for all its steps.

    Writes, for a batch of any shape:
        - ``out_key``: float32 ``[*batch, D]``; ``[*batch, K, D]`` for a tuple of K layers; d in place of D.
        - ``text_key``: one string per environment.
        - ``age_key``: int64 ``[*batch, 1]``, as TorchRL's ``step_count``.

    Where it stands: outside a ``SerialEnv`` or ``ParallelEnv`` one request has the prompts of all environments; inside,
    each worker sends its own to the same server. It pickles with its policy, so that collectors and workers share the
    server; caches are per process. An error in a worker ends it, and TorchRL raises a ``RuntimeError`` some time later.
    A policy over `SGLangOffline` stays in its process, and the transform outside of the workers. With ``every``,
    ``late`` or ``"frozen"`` a step reads what the step before wrote: pass on the TensorDict that ``reset`` or
    ``step_mdp`` returned, and give transforms behind this one ``out_keys`` of their own.

    Raises:
        InputError: arguments, prompts or environments that cannot be served.
        InputTypeError: an argument or prompt of the wrong type.
        CapabilityError: ``images_in_keys``, and a model that takes text alone.
        MissingKeyError: a TensorDict without ``in_keys``, or without what the step before wrote.
        EngineError: the engine failed, or a state is not finite. After an error nothing of the step was written.

    Example:
        >>> policy = SGLangHiddenWrapper(
        ...     engine, hidden=HiddenSpec(segments=("prompt",)), generate_kwargs={"max_new_tokens": 0}
        ... )
        >>> encode = HiddenStateTransform(policy, "You see {observation}.", in_keys=["observation"], every=25)
        >>> norm = VecNormV2(in_keys=["hidden_state"], out_keys=["hidden_state_norm"])
        >>> env = TransformedEnv(ParallelEnv(8, make_env), Compose(encode, norm))
        >>> env.rollout(100)["hidden_state_norm"].shape
        torch.Size([8, 100, 576])
        >>> frozen = norm.freeze()  # for evaluation; norm.state_dict() has the statistics

        ``VecNormV2`` is TorchRL's.
    """

    def __init__(
        self,
        policy: SGLangHiddenWrapper,
        prompt: PromptSource,
        *,
        in_keys: Sequence[NestedKey] = (),
        images_in_keys: Sequence[NestedKey] | None = None,
        out_key: NestedKey = "hidden_state",
        text_key: NestedKey | None = None,
        every: int = 1,
        age_key: NestedKey | None = None,
        late: bool = False,
        cache_size: int = 0,
        project: int | None = None,
        ablate: Ablation | None = None,
    ) -> None:
        check_ablation(ablate)
        schedule = make_schedule(every, late, frozen=ablate == "frozen")
        if schedule.reuses and age_key is None:
            age_key = f"{out_key}_age" if isinstance(out_key, str) else (*out_key[:-1], f"{out_key[-1]}_age")
        images = image_keys("images_in_keys", images_in_keys)
        read = list(dict.fromkeys((*map(unravel_key, in_keys), *images)))
        super().__init__(in_keys=read, out_keys=[key for key in (out_key, text_key, age_key) if key is not None])
        if len(set(self.out_keys)) < len(self.out_keys):
            raise InputError(f"out_key, text_key and age_key are {self.out_keys}; give each a key of its own")
        self._out_key, self._text_key, self._age_key = unravel_key(out_key), text_key, age_key
        self._schedule, self._ablate = schedule, ablate
        writer = PromptWriter(prompt, tuple(map(unravel_key, in_keys)), images)
        self._encoder = PromptEncoder(policy, writer, keep_text=text_key is not None, cache_size=cache_size)
        self.register_buffer("projection", make_projection(self._encoder.shape[-1], project))
        self._start()

    def _start(self) -> None:
        """Set what a copy has of its own."""
        self._shuffler = Shuffler()
        # What is encoded while the environment steps, and where those rows are due.
        self._late: Background[tuple[torch.Tensor, _Rows]] = Background()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_shuffler": Shuffler()}

    def clone(self) -> Self:
        """Return a copy without a parent, with a cache of its own."""
        cloned: Self = super().clone()
        cloned._encoder = copy.copy(self._encoder)
        cloned._start()
        return cloned

    def close(self) -> None:
        """End the thread that ``late=True`` uses."""
        self._late.close()

    @property
    def cache_info(self) -> CacheInfo:
        """Hits, misses, size and hit rate of this process's cache."""
        return self._encoder.cache_info

    @property
    def shape(self) -> torch.Size:
        """The shape of one vector: ``[D]`` or ``[K, D]``, after the projection."""
        *layers, size = self._encoder.shape
        return torch.Size((*layers, size if self.projection is None else self.projection.shape[-1]))

    # --- specs -------------------------------------------------------------------------------------------------------

    def transform_observation_spec(self, observation_spec: TensorSpec) -> TensorSpec:
        """Add the specs of what is written.

        Raises:
            MissingKeyError: the environment has no such observation.
            InputError: it has one under a key of ours.
        """
        there = set(observation_spec.keys(True, True))
        if missing := [key for key in self.in_keys if key not in there]:
            raise MissingKeyError(
                f"in_keys {missing}: the environment has no such observations; it has {sorted(map(str, there))}: "
                "change in_keys or images_in_keys"
            )
        if taken := [key for key in self.out_keys if key in there]:
            raise InputError(f"{taken}: the environment has observations there; give out_key, text_key or age_key")
        for key, spec in self._specs(observation_spec):
            observation_spec[key] = spec
        return observation_spec

    def transform_state_spec(self, state_spec: TensorSpec) -> TensorSpec:
        """Add what a step reads of the step before, so that workers and partial resets are given it."""
        if not self._schedule.reuses:
            return state_spec
        self._check_kept()
        observations = self.parent.full_observation_spec
        if state_spec is None:
            state_spec = Composite(shape=observations.shape, device=observations.device)
        for key, spec in self._specs(observations):
            state_spec[key] = spec
        if self._schedule.late:
            for key in self.in_keys:
                state_spec[key] = observations[key].clone()
        return state_spec

    def _check_kept(self) -> None:
        """Refuse a transform behind this one that would change what the next step reads."""
        read = {*self.out_keys, *(self.in_keys if self._schedule.late else ())}
        for transform in transforms_behind(self):
            if written := read.intersection(transform.out_keys):
                raise InputError(
                    f"{type(transform).__name__} writes {sorted(map(str, written))}, which the next step reads again; "
                    "give it out_keys of its own"
                )

    def _specs(self, root: TensorSpec) -> Iterator[tuple[NestedKey, TensorSpec]]:
        batch, device = root.shape, root.device
        yield self._out_key, Unbounded((*batch, *self.shape), dtype=torch.float32, device=device)
        if self._text_key is not None:
            yield self._text_key, NonTensor(shape=batch, example_data="", device=device)
        if self._age_key is not None:
            yield self._age_key, Unbounded((*batch, 1), dtype=torch.int64, device=device)

    # --- in an environment -------------------------------------------------------------------------------------------

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        """Encode the environments that were reset; the others keep what they had."""
        self._late.settle()
        reset = reset_rows(tensordict, tensordict_reset.batch_size.numel())
        rows = self._encode(tensordict_reset, reset)
        # Without an old value TorchRL itself puts back what the environments had that were not reset.
        known = self._age_key is not None and tensordict.get(self._age_key) is not None
        age = self._read_age(tensordict) if known else torch.zeros(len(reset), dtype=torch.int64)
        self._write(tensordict_reset, reset, rows, tensordict, torch.where(reset, 0, age), strict=False)
        return tensordict_reset

    def _reset_on_native_autoreset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        """Encode the environments that reset themselves during the step."""
        return self._reset(tensordict, tensordict_reset)

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Begin to encode the observation before a step, with ``late=True``. Not in a replay buffer's ``extend``."""
        if self._schedule.late and self._is_in_environment:
            due = self._schedule.is_due(self._read_age(tensordict)) & stepped_rows(
                tensordict, tensordict.batch_size.numel()
            )
            # Written here: an error is raised before the environment steps, and its observations may be overwritten.
            prompts = self._prompts(tensordict, due)
            self._late.start(lambda: (due, self._vectors(prompts)))
        return tensordict

    @property
    def _is_in_environment(self) -> bool:
        try:
            return self.container is not None
        except ValueError:  # what torchrl raises in a replay buffer
            return False

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        """Encode the environments that are due; the others keep the vector of the step before."""
        num_rows = next_tensordict.batch_size.numel()
        stepped = stepped_rows(tensordict, num_rows)
        age = self._read_age(tensordict) if self._schedule.reuses else torch.zeros(num_rows, dtype=torch.int64)
        if self._schedule.late:
            due, rows = self._collect(num_rows)
        else:
            # A row that is skipped keeps its vector, if it has one.
            keeps = self._schedule.reuses or tensordict.get(self._out_key) is not None
            due = self._schedule.is_due(age) & (stepped | (not keeps))
            rows = self._encode(next_tensordict, due)
        age = torch.where(stepped, self._schedule.age_after(age, due), age)
        self._write(next_tensordict, due, rows, tensordict, age)
        return next_tensordict

    def _collect(self, num_rows: int) -> tuple[torch.Tensor, _Rows]:
        """Return what was encoded while the environment stepped."""
        found = self._late.take()
        if found is None or len(found[0]) != num_rows:
            raise InputError(
                f"late=True, and a step of {num_rows} rows that did not begin with as many; use late=False where an "
                "environment steps a part of its batch"
            )
        return found

    # --- data that is there already ----------------------------------------------------------------------------------

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Label data: a TensorDict of any shape, or samples of the replay buffer that this transform is appended to.

        Its rows are encoded, and those at ``"next"`` if it has ``in_keys``, in one call; equal prompts are asked once.
        With ``every``, ``late`` or ``ablate="frozen"`` the last dimension must be time, as in a rollout: the rows get
        the vectors that an environment would have given them. The first row of each trajectory counts as a reset.

        Args:
            tensordict: data with ``in_keys``; written to, whole or not at all.

        Returns:
            The TensorDict.

        Raises:
            MissingKeyError: no ``in_keys``; or, with ``every``, no ``("next", "done")``.
            InputError: a last dimension that is not time, with ``every``; or what a prompt raises.
        """
        self._late.settle()
        num_rows = tensordict.batch_size.numel()
        targets = {"": tensordict}
        nxt = tensordict.get("next")
        if nxt is not None and all(nxt.get(key) is not None for key in self.in_keys):
            targets[", 'next'"] = nxt
        # Rows 0 … N-1 are the data's, N … 2N-1 those at "next".
        rows = [(f"row {n}{where}", row) for where, td in targets.items() for n, row in enumerate(unbind_rows(td))]
        sources, ages = torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.int64)
        if self._schedule.reuses:
            sources, ages = (part[: len(rows)] for part in trajectory_sources(tensordict, self._schedule))
        needed = sorted(set(sources.tolist()))
        places = torch.searchsorted(torch.tensor(needed, dtype=torch.int64), sources)
        found = self._vectors(self._encoder.write(rows[index] for index in needed), once=True)
        texts = [found.texts[place] for place in places.tolist()]
        everything = torch.ones(num_rows, dtype=torch.bool)
        for number, target in enumerate(targets.values()):
            part = slice(number * num_rows, (number + 1) * num_rows)
            self._write(target, everything, _Rows(found.vectors[places[part]], texts[part]), target, ages[part])
        return tensordict

    # --- both --------------------------------------------------------------------------------------------------------

    def _prompts(self, tensordict: TensorDictBase, due: torch.Tensor) -> list[LabelledPrompt]:
        if not due.any():  # unbinding a large batch would take most of a step that keeps its vectors
            return []
        rows = enumerate(unbind_rows(tensordict))
        return self._encoder.write((f"environment {index}", row) for index, row in rows if due[index])

    def _encode(self, tensordict: TensorDictBase, due: torch.Tensor) -> _Rows:
        return self._vectors(self._prompts(tensordict, due))

    def _vectors(self, prompts: list[LabelledPrompt], *, once: bool = False) -> _Rows:
        """Return the vectors of prompts as they are given: projected, and ablated."""
        if self._ablate == "zero" or not prompts:
            return _Rows(torch.zeros((len(prompts), *self.shape)), [""] * len(prompts))
        encodings = self._encoder.encode(prompts, once=once)
        vectors = torch.stack([encoding.vector for encoding in encodings])
        if self.projection is not None:
            vectors = vectors @ self.projection.to(vectors)
        if self._ablate == "shuffle":
            vectors = self._shuffler.shuffle(vectors)
        return _Rows(vectors, [encoding.text for encoding in encodings])

    def _read_age(self, tensordict: TensorDictBase) -> torch.Tensor:
        """Return the ages ``[N]`` that the step before wrote."""
        age = None if self._age_key is None else tensordict.get(self._age_key)
        if age is None:
            refuse_lost(self._age_key)
        return torch.as_tensor(age).reshape(-1).cpu()

    def _write(
        self,
        target: TensorDictBase,
        new: torch.Tensor,
        rows: _Rows,
        before: TensorDictBase,
        age: torch.Tensor,
        *,
        strict: bool = True,
    ) -> None:
        """Write vectors, texts and ages: ``rows`` where ``new``, bool ``[N]``, and elsewhere what ``before`` has.

        With ``strict`` it must have them.
        """
        vectors = torch.zeros((len(new), *self.shape))
        texts = [""] * len(new)
        if not new.all():
            old = before.get(self._out_key)
            if old is not None:
                vectors = old.reshape(vectors.shape).to("cpu", torch.float32, copy=True)
            elif strict:
                refuse_lost(self._out_key)
            if self._text_key is not None and old is not None:
                texts = [str(value_of(row.get(self._text_key))) for row in unbind_rows(before)]
        vectors[new] = rows.vectors.to(vectors)
        for index, text in zip(new.nonzero().flatten().tolist(), rows.texts, strict=True):
            texts[index] = text
        batch, device = target.batch_size, target.device or "cpu"
        target.set(self._out_key, vectors.reshape(*batch, *self.shape).to(device))
        if self._text_key is not None:
            target.set(self._text_key, text_leaf(texts, batch))
        if self._age_key is not None:
            target.set(self._age_key, age.reshape(*batch, 1).to(device))
