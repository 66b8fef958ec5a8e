"""Candidate continuations over the fake engine: what is sent, how the scores are laid out, what is refused."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.fake_engine import CONTEXT_LENGTH, RecordingEngine, abort_a_row, log_prob_of, logits_V, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.nn import InteractionType, set_interaction_type
from torchrl.data import Categorical
from torchrl.data.llm import History
from torchrl.modules import MaskedCategorical
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens

from torchrl_sglang_hidden import (
    ActionMask,
    CandidateActor,
    CapabilityError,
    ConstraintError,
    DisallowedTokens,
    HiddenSpec,
    InputError,
    InputTypeError,
    LogitsSpec,
    MissingKeyError,
    PromptLengthError,
    RequestAbortedError,
    SGLangHiddenWrapper,
    TokenIdError,
)
from torchrl_sglang_hidden.records import Request

TOKENIZER = tiny_tokenizer()
PROMPTS = [[6, 7, 8], [9, 10]]
CANDIDATES = [[11], [12, 13, 14], [15, 16]]


def make(mode: str = "tokens", **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    engine = RecordingEngine(tokenizer=TOKENIZER, **options.pop("info", {}))
    return SGLangHiddenWrapper(engine, tokenizer=TOKENIZER, input_mode=mode, **options), engine


def prompts(rows: Sequence[Sequence[int]] = PROMPTS) -> TensorDictBase:
    return lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(ids)), batch_size=()) for ids in rows])


def reduced(ids: Sequence[int], reduction: str) -> float:
    values = [log_prob_of(i) for i in ids]
    return {"sum": sum(values), "mean": sum(values) / len(values), "first": values[0]}[reduction]


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_a_prompt_goes_ahead_and_its_candidates_follow_in_one_batch() -> None:
    policy, engine = make(
        generate_kwargs={"temperature": 0.7, "max_new_tokens": 9, "stop": ["w1"], "lora_path": "one", "priority": 3},
        hidden=HiddenSpec(tokens=True),
        logits=LogitsSpec(top_k=2),
    )
    policy.score(prompts(), CANDIDATES)
    assert [len(payload["input_ids"]) for payload in engine.payloads] == [2, 6]
    for request in engine.requests:
        assert (request.hidden, request.logits, dict(request.spans), request.return_log_probs) == (
            None,
            None,
            {},
            False,
        )
        assert request.sampling == {"max_new_tokens": 1, "temperature": 0.0}
        assert (request.lora, request.priority) == ("one", 3)
    ahead, scored = engine.requests[:2], engine.requests[2:]
    assert [list(request.prompt_ids) for request in ahead] == PROMPTS
    assert not any(request.score_prompt for request in ahead)
    assert [list(request.prompt_ids) for request in scored] == [p + c for p in PROMPTS for c in CANDIDATES]
    # SGLang reads the prefix cache up to the token before the first whose log-prob is wanted.
    assert [request.score_from for request in scored] == [3, 3, 3, 2, 2, 2]
    assert engine.payloads[1]["logprob_start_len"] == [2, 2, 2, 1, 1, 1]


def test_the_first_token_alone_is_sent_where_it_alone_counts() -> None:
    policy, engine = make()
    policy.score(prompts(), CANDIDATES, reduction="first")
    assert [list(request.prompt_ids) for request in engine.requests[2:]] == [
        p + c[:1] for p in PROMPTS for c in CANDIDATES
    ]
    # However long the rest is.
    assert policy.score(prompts(), [[6], [7] * CONTEXT_LENGTH], reduction="first")["mask"].all()


def test_one_candidate_for_each_prompt_needs_nothing_ahead() -> None:
    policy, engine = make()
    policy.score(prompts(), CANDIDATES, mask=torch.tensor([[True, False, False], [False, True, False]]))
    assert [list(request.prompt_ids) for request in engine.requests] == [PROMPTS[0] + [11], PROMPTS[1] + [12, 13, 14]]
    assert all(request.score_prompt for request in engine.requests)


def test_what_the_mask_forbids_is_not_sent() -> None:
    policy, engine = make()
    mask = torch.tensor([[True, False, True], [False, True, True]])
    out = policy.score(prompts(), CANDIDATES, mask=mask)
    assert len(engine.requests) == 2 + 4
    assert torch.equal(out["mask"], mask)
    assert torch.equal(out["logits"].isneginf(), ~mask)


def test_an_aborted_prompt_brings_no_completions() -> None:
    policy, _ = make(info={"fault": abort_a_row})
    with pytest.raises(RequestAbortedError, match="row 0 ") as caught:
        policy.score(prompts(), CANDIDATES)
    assert caught.value.completions == ()


def test_a_queue_of_callers_is_not_waited_for_twice() -> None:
    policy, engine = make(min_batch_size=6, batching_timeout=1e4)
    out = policy.score(prompts(), CANDIDATES)
    assert [len(payload["input_ids"]) for payload in engine.payloads] == [2, 6]
    assert out["logits"][1].tolist() == [reduced(ids, "sum") for ids in CANDIDATES]


# --- what comes back -------------------------------------------------------------------------------------------------


@given(
    rows=st.lists(
        st.lists(st.lists(st.integers(6, 95), min_size=1, max_size=4), min_size=1, max_size=5), min_size=1, max_size=4
    ),
    reduction=st.sampled_from(["sum", "mean", "first"]),
)
def test_candidates_of_each_rows_own_are_padded_to_one_width(rows: list[list[list[int]]], reduction: Any) -> None:
    policy, _ = make()
    td = prompts([[6 + row] for row in range(len(rows))])
    out = policy.score(td, rows, reduction=reduction)
    width = max(map(len, rows))
    assert out.batch_size == (len(rows),)
    assert {name: (value.dtype, value.shape) for name, value in out.items()} == {
        "logits": (torch.float32, (len(rows), width)),
        "mask": (torch.bool, (len(rows), width)),
        "num_tokens": (torch.int64, (len(rows), width)),
    }
    for row, candidates in enumerate(rows):
        missing = width - len(candidates)
        expected = [reduced(ids, reduction) for ids in candidates] + [-math.inf] * missing
        torch.testing.assert_close(out["logits"][row], torch.tensor(expected))
        assert out["mask"][row].tolist() == [True] * len(candidates) + [False] * missing
        assert out["num_tokens"][row].tolist() == [*map(len, candidates), *[0] * missing]
    dist = MaskedCategorical(logits=out["logits"], mask=out["mask"])
    torch.testing.assert_close(dist.probs.sum(-1), torch.ones(len(rows)))


def test_strings_and_tensors_are_candidates_too() -> None:
    policy, engine = make()
    expected = policy.score(prompts(), [[6], [7, 8]])
    for candidates in (
        ["w0", "w1 w2"],
        ("w0", torch.tensor([7, 8])),
        [["w0", "w1 w2"], [[6], (7, 8)]],
        [(torch.tensor([6]), "w1 w2"), ["w0", range(7, 9)]],
    ):
        assert (policy.score(prompts(), candidates) == expected).all()
    assert [list(request.prompt_ids) for request in engine.requests[-4:]] == [
        p + c for p in PROMPTS for c in ([6], [7, 8])
    ]


def test_a_string_gets_no_special_tokens() -> None:
    tokenizer = tiny_tokenizer(bos_token="<|start|>")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 2)]
    )
    assert tokenizer("w0")["input_ids"] == [2, 6]
    engine = RecordingEngine(tokenizer=tokenizer)
    policy = SGLangHiddenWrapper(engine, tokenizer=tokenizer, input_mode="text")
    policy.score(TensorDict(text=Text(prompt=["w3"], batch_size=1), batch_size=1), ["w0"])
    assert [request.prompt_ids for request in engine.requests] == [(2, 9, 6)]


@pytest.mark.parametrize("mode", ["history", "text"])
def test_prompts_of_every_mode_are_read_as_for_generation(mode: str) -> None:
    policy, engine = make(mode)
    if mode == "history":
        chat = History.from_chats([[{"role": "user", "content": "w0"}]])
        td = TensorDict(history=ChatHistory(prompt=chat, batch_size=1), batch_size=1)
        expected = [2, 3, 6, 1, 2, 4]  # it ends with the assistant's turn
    else:
        td, expected = TensorDict(text=Text(prompt=["w0 w1"], batch_size=1), batch_size=1), [6, 7]
    policy.score(td, ["w2", "w3"])
    assert [list(request.prompt_ids) for request in engine.requests] == [expected, [*expected, 8], [*expected, 9]]


def test_any_batch_shape_and_the_input_is_as_it_was() -> None:
    policy, _ = make()
    rows = [prompts([[6 + i, 7]])[0] for i in range(6)]
    grid = lazy_stack([lazy_stack(rows[:3]), lazy_stack(rows[3:])])
    before = grid.clone()
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[..., 0] = True
    out = policy.score(grid, ["w0", "w1", "w2", "w3"], mask=mask)
    assert out.batch_size == (2, 3)
    assert torch.equal(out["mask"], mask)
    alone = policy.score(rows[4], ["w0", "w1", "w2", "w3"], mask=mask[1, 1])
    assert alone.batch_size == ()
    assert torch.equal(alone["logits"], out["logits"][1, 1])
    assert (grid == before).all()
    assert set(grid.keys(True, True)) == set(before.keys(True, True))
    own = policy.score(lazy_stack(rows[:2]), [["w0"], ["w1", "w2"]])
    assert own["mask"].tolist() == [[True, False], [True, True]]


# --- constraints -----------------------------------------------------------------------------------------------------


def constrained(prompt: Sequence[int], candidate: Sequence[int], allowed: Sequence[int]) -> float:
    """Return a candidate's log-prob where only these tokens are allowed."""
    total = 0.0
    for place, token_id in enumerate(candidate):
        row = logits_V([*prompt, *candidate[:place]])
        total += float(row[token_id] - row[list(allowed)].logsumexp(0)) if token_id in allowed else -math.inf
    return total


def test_constraints_act_on_the_candidates_tokens_and_on_nothing_else() -> None:
    allowed = [11, 12, 13, 15]
    policy, engine = make(constraints=ActionMask(allowed))
    out = policy.score(prompts(), CANDIDATES)
    assert [request.response_ranges for request in engine.requests[2:5]] == [((3, 4),), ((3, 6),), ((3, 5),)]
    # 14 and 16 are taken away.
    assert out["mask"].tolist() == [[True, False, False]] * 2
    for row, prompt in enumerate(PROMPTS):
        expected = [constrained(prompt, candidate, allowed) for candidate in CANDIDATES]
        torch.testing.assert_close(out["logits"][row], torch.tensor(expected), atol=1e-4, rtol=0)
    # The first tokens are all allowed.
    assert policy.score(prompts(), CANDIDATES, reduction="first")["mask"].all()


def test_each_rows_own_mask_acts_on_its_candidates() -> None:
    policy, _ = make(action_mask_key="allowed")
    td = prompts()
    masks = torch.zeros(2, 96, dtype=torch.bool)
    masks[0, 11], masks[1, 12:15] = True, True
    for row, mask in zip(td.unbind(0), masks, strict=True):
        row["allowed"] = mask
    out = policy.score(td, CANDIDATES)
    assert out["mask"].tolist() == [[True, False, False], [False, True, False]]
    torch.testing.assert_close(
        out["logits"][1, 1], torch.tensor(constrained(PROMPTS[1], CANDIDATES[1], range(12, 15))), atol=1e-4, rtol=0
    )


def test_constraints_that_leave_no_candidate_are_named() -> None:
    policy, _ = make(constraints=DisallowedTokens([11, 13, 16]))
    with pytest.raises(ConstraintError, match="row 0: the constraints take away all of its 3 candidates"):
        policy.score(prompts(), CANDIDATES)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "candidates", "options"),
    [
        (InputError, "candidates: an empty list", [], {}),
        (InputError, r"row 1, candidates: an empty list", [["w0"], []], {}),
        (InputError, r"candidate 1, \[\]: 0 tokens", [[6], []], {}),
        (InputError, r"row 1, candidate 0, '': 0 tokens", [["w0"], [""]], {}),
        (InputError, "3 lists of candidates for a batch of 2 rows", [["w0"]] * 3, {}),
        (InputTypeError, "candidates: a str", "w0", {}),
        (InputTypeError, "candidates: a dict", {"w0": 1}, {}),
        (InputTypeError, "candidates: a Tensor", torch.tensor([[6]]), {}),
        (InputTypeError, "row 0, candidates: 3", [3, 4], {}),
        (InputTypeError, "row 1, candidates: 'w1'", [["w0"], "w1"], {}),
        (InputTypeError, r"row 1, candidate 0, \[6.5\]", [[[6]], [[6.5]]], {}),
        (InputTypeError, r"candidate 0, \[True\]", [[True]], {}),
        (InputTypeError, r"candidate 1, b'\\t': bytes; expected a string", [[6], b"\t"], {}),
        (InputTypeError, r"candidate 0, tensor\(\[0.5", [torch.tensor([0.5])], {}),
        (TokenIdError, r"row 0, candidate 1: token id 96.*0\.\.95", [[6], [7, 96]], {}),
        (TokenIdError, r"row 1, candidate 0: token id -1", [[[6]], [[-1]]], {}),
        (
            PromptLengthError,
            rf"row 0, candidate 1: 3 prompt tokens and {CONTEXT_LENGTH} of the candidate are {CONTEXT_LENGTH + 3}.*58",
            [[6], [7] * CONTEXT_LENGTH],
            {},
        ),
        (InputError, "reduction='max': expected one of", CANDIDATES, {"reduction": "max"}),
        (InputTypeError, "mask: a list", CANDIDATES, {"mask": [[True]]}),
        (InputTypeError, "mask: a tensor of torch.float32", CANDIDATES, {"mask": torch.ones(2, 3)}),
        (InputError, r"mask: shape \(3,\); expected \(2, 3\)", CANDIDATES, {"mask": torch.ones(3).bool()}),
        (
            ConstraintError,
            "row 1: the mask leaves 0 of 3 candidates",
            CANDIDATES,
            {"mask": torch.tensor([[True] * 3, [False] * 3])},
        ),
        (
            ConstraintError,
            "row 1: the mask leaves 0 of 1 candidates",
            [["w0", "w1"], ["w2"]],
            {"mask": torch.tensor([[True, True], [False, True]])},
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    error: type[Exception], words: str, candidates: Any, options: dict[str, Any]
) -> None:
    policy, engine = make()
    with pytest.raises(error, match=words):
        policy.score(prompts(), candidates, **options)
    assert engine.requests == []


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (
            ConstraintError,
            "row 0: ActionMask and DisallowedTokens together leave 0",
            {"constraints": [ActionMask([6]), DisallowedTokens([6])]},
        ),
        (
            ConstraintError,
            "row 0: ActionMask and DisallowedTokens together leave 0 of 96 tokens for token 2",
            {"constraints": [ActionMask([6], positions=(2,)), DisallowedTokens([6])]},
        ),
        (CapabilityError, "row 0: constraints", {"constraints": ActionMask([6]), "info": {"pools_in_server": False}}),
        (InputError, "generate=False", {"generate": False}),
        (
            InputError,
            "custom_logit_processor",
            {"generate_kwargs": {"custom_logit_processor": '{"callable": "00"}'}, "info": {"takes_processors": True}},
        ),
    ],
)
def test_a_wrapper_that_cannot_score_says_so(error: type[Exception], words: str, options: dict[str, Any]) -> None:
    policy, engine = make(**options)
    with pytest.raises(error, match=words):
        policy.score(prompts(), CANDIDATES)
    assert engine.requests == []


def test_bad_prompts_are_named_by_their_row() -> None:
    policy, engine = make()
    for candidates in (CANDIDATES, [[11]]):
        with pytest.raises(PromptLengthError, match="row 1: the prompt has 0 tokens"):
            policy.score(
                lazy_stack([prompts([[6]])[0], TensorDict(tokens=Tokens(prompt=torch.tensor([]).long()))]), candidates
            )
        with pytest.raises(TokenIdError, match="row 1: token id 99"):
            policy.score(prompts([[6], [99]]), candidates)
    assert engine.requests == []


# --- choosing --------------------------------------------------------------------------------------------------------


def masked(rows: Sequence[Sequence[int]] = PROMPTS) -> TensorDictBase:
    td = prompts(rows)
    masks = [[True, False, True], [False, True, True]]
    for row, mask in zip(td.unbind(0), masks, strict=True):
        row["allowed"] = torch.tensor(mask)
    return td


def test_the_actor_chooses_among_the_allowed_candidates() -> None:
    policy, engine = make()
    actor = CandidateActor(policy, CANDIDATES, action_mask_key="allowed", spec=Categorical(3))
    assert actor.in_keys == [("tokens", "prompt"), "allowed"]
    assert actor.out_keys == ["logits", "logits_mask", "action", "action_log_prob"]
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        out = actor(masked())
        assert (out["action"].dtype, out["action"].shape) == (torch.int64, (2,))
        assert out["logits"].gather(-1, out["action"][:, None]).isfinite().all()
        expected = out["logits"].log_softmax(-1).gather(-1, out["action"][:, None])[:, 0]
        torch.testing.assert_close(out["action_log_prob"], expected)
        seen |= {(row, int(action)) for row, action in enumerate(out["action"])}
    assert seen == {(0, 0), (0, 2), (1, 1), (1, 2)}, "it samples"
    assert len(engine.requests) == 20 * (2 + 4)


def test_deterministic_exploration_takes_the_best_candidate() -> None:
    policy, _ = make()
    actor = CandidateActor(policy, CANDIDATES, reduction="mean", action_mask_key="allowed")
    with set_interaction_type(InteractionType.DETERMINISTIC):
        out = actor(masked())
    assert torch.equal(out["action"], out["logits"].argmax(-1))
    always = CandidateActor(policy, CANDIDATES, default_interaction_type=InteractionType.DETERMINISTIC)
    assert torch.equal(always(prompts())["action"], policy.score(prompts(), CANDIDATES)["logits"].argmax(-1))


def test_its_distribution_is_that_of_the_scores() -> None:
    policy, _ = make()
    actor = CandidateActor(policy, CANDIDATES, action_mask_key="allowed", return_log_prob=False)
    assert actor.out_keys == ["logits", "logits_mask", "action"]
    dist = actor.get_dist(masked())
    assert isinstance(dist, MaskedCategorical)
    scores = policy.score(prompts(), CANDIDATES, mask=lazy_stack(list(masked()))["allowed"])
    torch.testing.assert_close(dist.probs, scores["logits"].softmax(-1))
    assert dist.entropy().isfinite().all()
    td = masked().set("action", torch.tensor([2, 1]))
    torch.testing.assert_close(actor.log_prob(td), scores["logits"].log_softmax(-1)[[0, 1], [2, 1]])


def test_keys_of_the_users_own() -> None:
    policy, _ = make(action_mask_key="tokens_allowed")
    actor = CandidateActor(
        policy, CANDIDATES, logits_key=("my", "logits"), logits_mask_key=("my", "mask"), action_key=("agent", "action")
    )
    assert actor.in_keys == [("tokens", "prompt"), "tokens_allowed"]
    assert actor.out_keys == [("my", "logits"), ("my", "mask"), ("agent", "action"), ("agent", "action_log_prob")]
    td = prompts()
    for row in td.unbind(0):
        row["tokens_allowed"] = torch.arange(96) < 14
    out = actor(td)
    assert out["my", "mask"].tolist() == [[True, False, False]] * 2
    assert out["agent", "action"].tolist() == [0, 0]


def test_a_missing_mask_is_named() -> None:
    policy, engine = make()
    with pytest.raises(MissingKeyError, match="no 'allowed'"):
        CandidateActor(policy, CANDIDATES, action_mask_key="allowed")(prompts())
    assert engine.requests == []


def test_the_requests_are_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor goes to a collector's process with its candidates and its policy."""
    monkeypatch.setattr(RecordingEngine, "__reduce__", lambda self: (RecordingEngine, ()), raising=False)
    actor = pickle.loads(pickle.dumps(CandidateActor(make()[0], CANDIDATES, reduction="first")))
    out = actor(prompts())
    assert out["logits"].tolist() == [[log_prob_of(ids[0]) for ids in CANDIDATES]] * 2
    assert all(isinstance(request, Request) for request in actor[0].policy.model.requests)
