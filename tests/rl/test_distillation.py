"""A student and a teacher: their divergence over the whole vocabulary, against float64, and the loss that it is."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.fake_engine import RecordingEngine, log_prob_of, states_ND, tiny_tokenizer
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.modules.llm import TransformersWrapper
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from torchrl_sglang_hidden import HeadSpec, SGLangHiddenWrapper
from torchrl_sglang_hidden.errors import (
    AlignmentError,
    InputError,
    InputTypeError,
    MissingKeyError,
    PromptLengthError,
    TokenIdError,
)
from torchrl_sglang_hidden.rl import RetrieveTeacherStates, VocabularyDistillationLoss, vocabulary_divergence

VOCAB = 96
LENGTHS, PROMPTS = (9, 4, 6), (3, 1, 2)


def make_model(seed: int, size: int = 16, vocab: int = VOCAB) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=vocab,
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    return model


STUDENT, TEACHER = make_model(0), make_model(1, size=24)


def states_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids[None], output_hidden_states=True).hidden_states[-1][0]


def rows_of(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in LENGTHS]


def make_batch(*, padded: bool = False, dtype: torch.dtype = torch.float32, after: bool = True) -> TensorDictBase:
    """Return rows with the teacher's states as `RetrieveTeacherStates` writes them, prompts on the left."""
    rows = []
    width = max(LENGTHS)
    for ids, prompt in zip(rows_of(), PROMPTS, strict=True):
        with torch.no_grad():
            states = states_of(TEACHER, ids)
            log_probs = TEACHER(ids[None]).logits[0].log_softmax(-1)
        chosen = torch.cat([torch.zeros(1), log_probs[:-1].gather(-1, ids[1:, None])[:, 0]])
        assistant = torch.arange(len(ids)) >= prompt
        attention = torch.ones(len(ids), dtype=torch.bool)
        if padded:
            # Somewhere on both sides, as padded rollouts have it.
            left = (width - len(ids)) // 2
            sides = (left, width - len(ids) - left)
            ids, assistant, attention, chosen = (
                torch.nn.functional.pad(values, sides) for values in (ids, assistant, attention, chosen)
            )
            states = torch.nn.functional.pad(states, (0, 0, *sides))
        teacher = {"teacher_states": {"full": states.to(dtype)}, "teacher_log_probs": {"full": chosen}}
        masks = {"all_assistant_mask": assistant, "all_attention_mask": attention}
        row = {"tokens": {"full": ids}, "masks": masks, **({"next": teacher} if after else teacher)}
        rows.append(TensorDict(row, batch_size=[]))
    return torch.stack(rows) if padded else lazy_stack(rows)


def true_rows(
    divergence: str, beta: float, temperature: float = 1.0, assistant_only: bool = True
) -> list[torch.Tensor]:
    """Return the divergence at each trained token of each row, from whole logits in float64."""
    found = []
    for ids, prompt in zip(rows_of(), PROMPTS, strict=True):
        both = []
        for model in (STUDENT, TEACHER):
            double = copy.deepcopy(model).double()
            with torch.no_grad():
                both.append((double(ids[None]).logits[0] / temperature).log_softmax(-1))
        student, teacher = both
        mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
        reverse = (student.exp() * (student - teacher)).sum(-1)
        forward = (teacher.exp() * (teacher - student)).sum(-1)
        jsd = beta * (teacher.exp() * (teacher - mixture)).sum(-1)
        jsd = jsd + (1 - beta) * (student.exp() * (student - mixture)).sum(-1)
        values = {"reverse": reverse, "forward": forward, "jsd": jsd}[divergence]
        found.append(values[(prompt if assistant_only else 1) - 1 : -1])
    return found


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize(("divergence", "beta"), [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_the_loss_is_that_of_the_whole_vocabulary(
    padded: bool, divergence: Any, beta: float, chunk_size: int | None
) -> None:
    options = {"divergence": divergence, "beta": beta, "chunk_size": chunk_size}
    loss = VocabularyDistillationLoss(STUDENT, TEACHER, **options, reduction="none")
    truth = true_rows(divergence, beta)
    found = loss(make_batch(padded=padded))
    expected = torch.stack([values.mean() for values in truth])
    torch.testing.assert_close(found.loss_distill.double(), expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(found.kl_to_teacher.double(), expected.mean(), rtol=2e-5, atol=1e-6)


def test_reductions_temperature_and_all_tokens() -> None:
    batch = make_batch(after=False)
    truth = true_rows("reverse", 0.5, 2.0, assistant_only=False)
    options = {"temperature": 2.0, "assistant_only": False}
    for reduction, reduce in (("mean", torch.mean), ("sum", torch.sum)):
        for normal, per_row in ((True, torch.mean), (False, torch.sum)):
            loss = VocabularyDistillationLoss(
                STUDENT, TEACHER, **options, reduction=reduction, normalize_by_seq_length=normal
            )
            expected = reduce(torch.stack([per_row(values) for values in truth]))
            torch.testing.assert_close(loss(batch).loss_distill.double(), expected, rtol=2e-5, atol=1e-6)


def test_the_gradient_is_the_students_and_right() -> None:
    """Of every parameter of the student, through chunks, against one pass over whole logits in float64."""
    student = copy.deepcopy(STUDENT)
    VocabularyDistillationLoss(student, TEACHER, chunk_size=2)(make_batch()).loss_distill.backward()
    double, teacher = copy.deepcopy(STUDENT).double(), copy.deepcopy(TEACHER).double()
    rows = []
    for ids, prompt in zip(rows_of(), PROMPTS, strict=True):
        own = double(ids[None]).logits[0].log_softmax(-1)
        with torch.no_grad():
            other = teacher(ids[None]).logits[0].log_softmax(-1)
        rows.append((own.exp() * (own - other)).sum(-1)[prompt - 1 : -1].mean())
    torch.stack(rows).mean().backward()
    for (name, found), truth in zip(student.named_parameters(), double.parameters(), strict=True):
        assert found.grad is not None, name
        assert truth.grad is not None, name
        torch.testing.assert_close(found.grad.double(), truth.grad, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in TEACHER.parameters())


def test_the_teacher_is_neither_trained_nor_saved() -> None:
    loss = VocabularyDistillationLoss(STUDENT, TEACHER)
    assert {id(parameter) for parameter in loss.parameters()} == {id(p) for p in STUDENT.parameters()}
    assert len(loss.state_dict()) == len(STUDENT.state_dict())


def test_a_student_in_a_policy_of_torchrl() -> None:
    wrapper = TransformersWrapper(STUDENT, tokenizer=tiny_tokenizer(), input_mode="tokens", generate=False)
    found = VocabularyDistillationLoss(wrapper, TEACHER)(make_batch())
    torch.testing.assert_close(
        found.loss_distill, VocabularyDistillationLoss(STUDENT, TEACHER)(make_batch()).loss_distill
    )


def test_several_teachers() -> None:
    other = make_model(2)
    batch = make_batch()
    after = batch.get("next")
    for row, ids in zip(after.unbind(0), rows_of(), strict=True):
        states = row.get(("teacher_states", "full"))
        with torch.no_grad():
            second = states_of(other, ids)
        row.set("teacher_states", TensorDict({"a": {"full": states}, "b": {"full": second}}))
        row.set("teacher_log_probs", TensorDict({}))
    heads = {"a": TEACHER.get_output_embeddings(), "b": other}
    single = [
        VocabularyDistillationLoss(STUDENT, {name: head})(batch).loss_distill.detach() for name, head in heads.items()
    ]
    both = VocabularyDistillationLoss(STUDENT, heads)(batch).loss_distill
    torch.testing.assert_close(both.detach(), (single[0] + single[1]) / 2)
    uneven = VocabularyDistillationLoss(STUDENT, heads, teacher_weights={"a": 3.0, "b": 1.0})(batch).loss_distill
    torch.testing.assert_close(uneven.detach(), 0.75 * single[0] + 0.25 * single[1])


def test_states_in_bfloat16_are_near() -> None:
    found = VocabularyDistillationLoss(STUDENT, TEACHER, reduction="none")(make_batch(dtype=torch.bfloat16))
    expected = torch.stack([values.mean() for values in true_rows("reverse", 0.5)])
    torch.testing.assert_close(found.loss_distill.double(), expected, rtol=0.02, atol=0.02)


# --- memory -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor of the vocabulary's width that an operation makes."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[-1] == self.vocab:
                self.rows = max(self.rows, value.numel() // self.vocab)
        return result


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_logits_of_all_positions_are_never_in_memory(divergence: Any) -> None:
    """Not in the gradient either: no tensor of the vocabulary's width has more rows than a chunk."""
    torch.manual_seed(0)
    student = torch.randn(500, 8, requires_grad=True)
    head, teacher_head = torch.nn.Linear(8, 1000, bias=False), torch.nn.Linear(6, 1000, bias=False)
    with Largest(1000) as largest:
        found = vocabulary_divergence(
            student, head, torch.randn(500, 6), teacher_head, divergence=divergence, chunk_size=32
        )
        found.sum().backward()
    assert found.shape == (500,)
    assert 1 < largest.rows <= 32


def test_the_default_chunk_has_64_mib_of_logits() -> None:
    head = torch.randn(2**20, 2)
    with Largest(2**20) as largest, torch.no_grad():
        vocabulary_divergence(torch.randn(40, 2), head, torch.randn(40, 2), head)
    assert largest.rows == 16


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_head_of_other_weights_is_found() -> None:
    other = make_model(7, size=24)
    with pytest.raises(AlignmentError, match=r"^row 0, trained position 0: the teacher's engine said .* tolerance=0.1"):
        VocabularyDistillationLoss(STUDENT, other)(make_batch())
    batch = make_batch()
    where = batch[1]["next", "teacher_log_probs", "full"]
    where[-1] -= 9
    with pytest.raises(AlignmentError, match=r"^row 1, trained position 2: "):
        VocabularyDistillationLoss(STUDENT, TEACHER)(batch)
    # Without log-probs nothing tells.
    batch = make_batch()
    for row in batch.unbind(0):
        del row["next", "teacher_log_probs"]
    VocabularyDistillationLoss(STUDENT, other)(batch)


@pytest.mark.parametrize(
    ("chance", "moved", "refused"), [(-1, 0.09, False), (-1, 0.11, True), (-15, 1.4, False), (-15, 1.6, True)]
)
def test_the_tolerance_grows_with_how_improbable_a_token_is(chance: float, moved: float, refused: bool) -> None:
    """A state rounded to bfloat16 was found 0.11 off at a token of log-prob -15, where the head was the right one."""
    states, head = torch.ones(1, 1), torch.tensor([[math.log1p(-math.exp(chance))], [float(chance)]])
    said = {"tokens_N": torch.tensor([1]), "teacher_log_probs_N": torch.tensor([chance - moved])}
    with pytest.raises(AlignmentError, match=r"of tolerance=0\.1") if refused else nullcontext():
        vocabulary_divergence(states, head, states, head, **said)


def test_a_teacher_of_another_vocabulary() -> None:
    student, teacher = torch.randn(3, 4), torch.randn(3, 5)
    heads = torch.randn(10, 4), torch.randn(12, 5)
    with pytest.raises(InputError, match="head has 10 tokens and the teacher's 12; give the size"):
        vocabulary_divergence(student, heads[0], teacher, heads[1])
    with pytest.raises(InputError, match=r"vocab_size=11: .* expected at most 10"):
        vocabulary_divergence(student, heads[0], teacher, heads[1], vocab_size=11)
    # A token that only the larger head has is no teacher's where that is the smaller one.
    said = {"tokens_N": torch.full((3,), 11), "teacher_log_probs_N": torch.zeros(3)}
    with pytest.raises(TokenIdError, match=r"id 11; expected ids in 0\.\.9"):
        vocabulary_divergence(teacher, heads[1], student, heads[0], vocab_size=9, **said)
    found = vocabulary_divergence(student, heads[0], teacher, heads[1], vocab_size=9)
    torch.testing.assert_close(found, vocabulary_divergence(student, heads[0][:9], teacher, heads[1][:9]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"divergence": "kl"}, InputError, "divergence='kl': expected one of 'reverse', 'forward', 'jsd'"),
        ({"beta": 1.0}, InputError, "beta=1.0: expected a number above 0 and below 1"),
        ({"temperature": 0.0}, InputError, "temperature=0.0: expected a finite number above 0"),
        ({"temperature": math.nan}, InputError, "temperature=nan"),
        ({"chunk_size": 0}, InputError, "chunk_size=0: expected an integer of at least 1"),
        ({"tolerance": -0.1}, InputError, "tolerance=-0.1: expected a number of at least 0, in nats"),
        ({"tolerance": math.nan}, InputError, "tolerance=nan"),
        ({"vocab_size": 1}, InputError, "vocab_size=1: expected an integer of at least 2"),
        ({"tokens_N": torch.zeros(3).long()}, InputError, "belong together"),
        ({"tokens_N": torch.zeros(2).long(), "teacher_log_probs_N": torch.zeros(2)}, InputError, r"expected \[3\]"),
        (
            {"tokens_N": torch.full((3,), 10), "teacher_log_probs_N": torch.zeros(3)},
            TokenIdError,
            r"id 10; expected ids in 0\.\.9",
        ),
        ({"teacher_states_ND": torch.zeros(2, 5)}, InputError, "the same N positions"),
        ({"teacher_states_ND": torch.zeros(3, 5).long()}, InputTypeError, "expected a floating tensor"),
        ({"student_states_ND": torch.zeros(4)}, InputError, "the same N positions"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "student_states_ND": torch.randn(3, 4),
        "student_head": torch.randn(10, 4),
        "teacher_states_ND": torch.randn(3, 5),
        "teacher_head": torch.randn(10, 5),
    }
    with pytest.raises(error, match=message):
        vocabulary_divergence(**{**arguments, **changes})


def test_no_positions_have_no_divergence() -> None:
    head = torch.randn(10, 4)
    assert vocabulary_divergence(torch.zeros(0, 4), head, torch.zeros(0, 4), head).shape == (0,)


def test_a_token_that_the_student_cannot_sample_adds_nothing() -> None:
    """A head with a bias of -inf, as models mask what they never say."""
    head = torch.nn.Linear(4, 10)
    with torch.no_grad():
        head.bias[3] = -math.inf
    states = torch.randn(5, 4)
    found = vocabulary_divergence(states, head, states, head)
    torch.testing.assert_close(found.detach(), torch.zeros(5))
    assert vocabulary_divergence(states, head, states, head, divergence="jsd").isfinite().all()


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_a_token_that_neither_can_sample_leaves_the_gradient_alone(divergence: Any) -> None:
    """The same as without the token in the vocabulary."""
    states, teacher_states = torch.randn(5, 4), torch.randn(5, 3)
    heads = [torch.nn.Linear(size, 10) for size in (4, 3)]
    shorter = [torch.nn.Linear(size, 9) for size in (4, 3)]
    kept = torch.arange(10) != 3
    with torch.no_grad():
        for head, short in zip(heads, shorter, strict=True):
            head.bias[3] = -math.inf
            short.weight.copy_(head.weight[kept])
            short.bias.copy_(head.bias[kept])
    found = []
    for own, other in (heads, shorter):
        own_states = states.clone().requires_grad_()
        values = vocabulary_divergence(own_states, own, teacher_states, other, divergence=divergence)
        values.sum().backward()
        found.append((values.detach(), own_states.grad))
    torch.testing.assert_close(found[0], found[1])


def test_what_a_batch_lacks() -> None:
    loss = VocabularyDistillationLoss(STUDENT, TEACHER)
    for key, message in (
        (("tokens", "full"), r"no \('tokens', 'full'\) in the batch: name"),
        (("masks", "all_assistant_mask"), "assistant_only=False"),
        (("next", "teacher_states", "full"), "run RetrieveTeacherStates on the batch first"),
    ):
        batch = make_batch(padded=True)
        del batch[key]
        with pytest.raises(MissingKeyError, match=message):
            loss(batch)
    batch = make_batch(padded=True)
    batch["masks", "all_assistant_mask"][1] = False
    with pytest.raises(InputError, match="row 1 has no token to train on: of its 4 tokens"):
        loss(batch)
    batch = make_batch(padded=True)
    batch["next", "teacher_states", "full"] = batch["next", "teacher_states", "full"][:, :-1]
    with pytest.raises(InputError, match=r"row 0: .* for 9 tokens; expected one state for each"):
        loss(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction='max': expected one of"),
        ({"teacher_weights": {"a": 1.0}}, "teacher_weights for"),
        ({"divergence": "tv"}, "divergence='tv'"),
    ],
)
def test_bad_losses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VocabularyDistillationLoss(STUDENT, TEACHER, **options)


def test_bad_teachers_and_students() -> None:
    with pytest.raises(InputError, match="teacher_heads has no teacher"):
        VocabularyDistillationLoss(STUDENT, {})
    with pytest.raises(InputError, match="expected finite numbers of at least 0, not all 0"):
        VocabularyDistillationLoss(STUDENT, {"a": TEACHER}, teacher_weights={"a": 0.0})
    for wrong, said in (({"a": "1"}, r"teacher_weights=\{'a': '1'\}: expected numbers"), ([1.0], "expected a mapping")):
        with pytest.raises(InputTypeError, match=said):
            VocabularyDistillationLoss(STUDENT, {"a": TEACHER}, teacher_weights=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="student: a Linear; expected a Hugging Face causal language model"):
        VocabularyDistillationLoss(torch.nn.Linear(2, 2), TEACHER)


# --- the teacher's states ---------------------------------------------------------------------------------------------


def make_retrieve(**options: Any) -> tuple[RetrieveTeacherStates, RecordingEngine]:
    engine = RecordingEngine(tokenizer=tiny_tokenizer())
    teacher = SGLangHiddenWrapper(engine, tokenizer=tiny_tokenizer(), generate_kwargs={"max_new_tokens": 9})
    return RetrieveTeacherStates(teacher, **options), engine


@pytest.mark.parametrize("padded", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("after", [False, True])
def test_states_and_log_probs_of_the_same_ids(padded: bool, after: bool) -> None:
    retrieve, engine = make_retrieve(dtype=torch.float32)
    batch = make_batch(padded=padded, after=after)
    ids = [row.get(("tokens", "full"))[row.get(("masks", "all_attention_mask"))].tolist() for row in batch.unbind(0)]
    ids = [[6 + token % 80 for token in row] for row in ids]
    for row, known in zip(batch.unbind(0), ids, strict=True):
        row.get(("tokens", "full"))[row.get(("masks", "all_attention_mask"))] = torch.tensor(known)
    assert retrieve(batch) is batch
    assert [list(request.prompt_ids) for request in engine.requests] == ids
    where = batch["next"] if after else batch
    for row, source, known in zip(where.unbind(0), batch.unbind(0), ids, strict=True):
        real = source.get(("masks", "all_attention_mask"))
        torch.testing.assert_close(row.get(("teacher_states", "full"))[real], states_ND(known, [0]))
        expected = [0.0, *(log_prob_of(token) for token in known[1:])]
        torch.testing.assert_close(row.get(("teacher_log_probs", "full"))[real], torch.tensor(expected))
        assert not row.get(("teacher_states", "full"))[~real].any()


def test_masks_of_integers_are_masks() -> None:
    """As tokenizers write them: rows are not indexed by their 0 and 1."""
    found = []
    for dtype in (torch.bool, torch.int64):
        retrieve, engine = make_retrieve(dtype=torch.float32)
        batch = make_batch(padded=True, after=False)
        batch["tokens", "full"].clamp_(6, 90)
        batch["masks", "all_attention_mask"] = batch["masks", "all_attention_mask"].to(dtype)
        retrieve(batch)
        ids = [request.prompt_ids for request in engine.requests]
        found.append((ids, batch["teacher_states", "full"], batch["teacher_log_probs", "full"]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(first, second) for first, second in zip(found[0][1:], found[1][1:], strict=True))
    batch["masks", "all_attention_mask"] = batch["masks", "all_attention_mask"][:, 1:]
    with pytest.raises(InputError, match=r"row 0: .* has shape \(8,\) for tokens of shape \(9,\); .* with mask_key"):
        make_retrieve()[0](batch)


def test_what_a_teachers_own_policy_asks_for_is_not_asked_here() -> None:
    """A policy for something else, whose rows with errors would be NaN, is a teacher all the same."""
    engine = RecordingEngine(tokenizer=tiny_tokenizer())
    teacher = SGLangHiddenWrapper(
        engine,
        tokenizer=tiny_tokenizer(),
        heads=HeadSpec(("d0",)),
        action_mask_key="mask",
        action_token_ids=(7, 8),
        on_error="nan",
    )
    batch = make_batch(after=False)
    for row in batch.unbind(0):
        row.get(("tokens", "full")).clamp_(6, 90)
    RetrieveTeacherStates(teacher)(batch)
    assert all(request.heads is None for request in engine.requests)
    too_long = lazy_stack([TensorDict(tokens=TensorDict(full=torch.full((length,), 7))) for length in (3, 10**4)])
    with pytest.raises(PromptLengthError, match="row 1"):
        RetrieveTeacherStates(teacher)(too_long)


def test_names_dtypes_and_tokenizers() -> None:
    retrieve, _ = make_retrieve(name="math", tokenizer=tiny_tokenizer())
    batch = make_batch(after=False)
    for row in batch.unbind(0):
        row.get(("tokens", "full")).clamp_(6, 90)
    found = retrieve(batch)[0].get(("teacher_states", "math", "full"))
    assert (found.dtype, retrieve.out_keys[1]) == (torch.bfloat16, ("teacher_log_probs", "math", "full"))

    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(InputError, match=r"tokenizer: token '<new>' has id .*, and None in the teacher's"):
        make_retrieve(tokenizer=other)
    with pytest.raises(InputTypeError, match="teacher: a str; expected an SGLangHiddenWrapper"):
        RetrieveTeacherStates("http://127.0.0.1:30000")  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="name=3: expected a word"):
        make_retrieve(name=3)
    with pytest.raises(MissingKeyError, match="name the student's tokens with tokens_key"):
        make_retrieve(tokens_key="ids")[0](make_batch())
