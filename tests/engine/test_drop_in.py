"""Scripts written for torchrl's ``SGLangWrapper`` run with the class's name changed, against one real server.

1. In every mode, padded and not, of one row and of two: what torchrl's class writes is written here too, with the same
   values. Where they differ, `DIFFERENCES` names the fault; where a fault no longer shows, the table is out of date.
2. What torchrl's class does not do as told, `CALLS`, this class does.
3. A collector's script gives the same dialogue.

Each fault is a row of docs/faults.md. Both classes are given the same chat template: torchrl picks one by the
tokenizer's name otherwise.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import requests
import torch
from helpers import hf_oracle
from helpers.doc_tables import rows_of
from helpers.policy_checks import LOG_PROB_ATOL, QUESTIONS, history_input, text_input, tokens_input
from helpers.torchrl_pipelines import FOLLOW_UPS, chat_env, collector
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tokenizers import models
from torchrl.data.llm import History
from torchrl.modules.llm.backends.sglang import AsyncSGLang
from torchrl.modules.llm.policies import SGLangWrapper, Tokens
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import SGLangHiddenWrapper, SGLangServer

Make = Callable[..., Any]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Greedy answers without near ties, raw and as a chat; the first is ended by the script's stop string, at once or later.
PROMPTS = ["The capital of France is", "The days of the week are Monday, Tuesday,"]
LEAVES = {
    "text": ("prompt", "response", "full"),
    "tokens": ("prompt", "response", "full", "padded"),
    "masks": ("all_attention_mask", "all_assistant_mask", "padded"),
    "log_probs": ("prompt", "response", "full", "padded"),
    "history": ("prompt", "response", "full"),
}


@dataclass(frozen=True)
class Case:
    """One run of the script."""

    mode: str
    pad_output: bool
    num_rows: int

    def __str__(self) -> str:
        return f"{self.mode}-{'padded' if self.pad_output else 'ragged'}-{self.num_rows}"


CASES = [
    Case(mode, padded, rows) for mode in ("history", "text", "tokens") for padded in (False, True) for rows in (1, 2)
]


@dataclass(frozen=True)
class Difference:
    """A fault, the leaves that differ by it, and the cases where they do."""

    fault: str
    leaves: frozenset[tuple[str, str]]
    shows: Callable[[Case], bool]


NOT_MEASURED = "writes log-probs that nobody measured, of prompts and of pads, as 0.0"
DIFFERENCES = [
    Difference(NOT_MEASURED, frozenset({("log_probs", "full")}), lambda case: case.mode != "text"),
    Difference(
        NOT_MEASURED, frozenset({("log_probs", "response")}), lambda case: case.pad_output and case.num_rows > 1
    ),
    Difference(
        "pads prompts on the right, so that the mask has a hole",
        frozenset({("tokens", "prompt"), ("tokens", "full"), ("masks", "all_attention_mask")}),
        lambda case: case.pad_output and case.num_rows > 1 and case.mode != "text",
    ),
    Difference(
        "leaves masks, and prompt and full tokens, None in text mode",
        frozenset(
            {
                ("tokens", "prompt"),
                ("tokens", "full"),
                ("masks", "all_attention_mask"),
                ("masks", "all_assistant_mask"),
                ("log_probs", "full"),
            }
        ),
        lambda case: case.mode == "text",
    ),
]


@pytest.fixture(scope="module")
def backend(smol: SGLangServer) -> AsyncSGLang:
    """TorchRL's own client, which both classes take; to make it takes a second."""
    return AsyncSGLang.connect(smol.url)


def prompts_of(case: Case, tokenizer: PreTrainedTokenizerBase) -> TensorDictBase:
    prompts = PROMPTS[: case.num_rows]
    if case.mode == "history":
        return history_input(prompts)
    if case.mode == "text":
        return text_input(prompts)
    return tokens_input([tokenizer(prompt)["input_ids"] for prompt in prompts])


def script(wrapper: type, model: Any, tokenizer: PreTrainedTokenizerBase, case: Case, **options: Any) -> TensorDictBase:
    """As users of torchrl's class write it."""
    policy = wrapper(
        model,
        tokenizer=tokenizer,
        input_mode=case.mode,
        generate=True,
        return_log_probs=True,
        pad_output=case.pad_output,
        chat_template=TEMPLATE,
        generate_kwargs={
            "max_new_tokens": 8,
            "temperature": 0.0,
            "top_p": 0.9,
            "frequency_penalty": 0.01,
            "stop_sequences": [" Paris", "\n\n"],
        },
        **options,
    )
    data = prompts_of(case, tokenizer).set("query", torch.arange(case.num_rows))
    return policy(data)


def read(out: TensorDictBase, key: str, leaf: str) -> list[Any] | None:
    """The leaf of each row as plain values."""
    if leaf == "padded" or key in ("text", "history"):
        value = getattr(out.get(key), leaf)
    else:
        value = out.get((key, leaf), None, as_list=True)
    if isinstance(value, History):
        # One row's messages, whether their dimension is there or not.
        return [_messages(chat) for chat in value.unbind(0)]
    if value is None or isinstance(value, bool):
        return value if value is None else [value] * len(out)
    return [row.tolist() if isinstance(row, torch.Tensor) else row for row in value]


def _messages(chat: History) -> list[tuple[str, str]]:
    if chat.ndim == 0:
        return [(chat.role, chat.content)]
    return list(zip(chat.role, chat.content, strict=True))


def equal(found: Any, expected: Any) -> bool:
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(equal, found, expected))
    if isinstance(found, float) and isinstance(expected, float):
        return found == pytest.approx(expected, abs=LOG_PROB_ATOL, nan_ok=True)
    return type(found) is type(expected) and found == expected


# --- 1. key by key ------------------------------------------------------------------------------------------------


def test_each_fault_is_one_that_is_listed() -> None:
    listed = {what for what, _, _ in rows_of("faults.md")}
    assert {difference.fault for difference in DIFFERENCES} | CALLS.keys() <= listed


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_script_writes_the_same(backend: AsyncSGLang, tokenizer: PreTrainedTokenizerBase, case: Case) -> None:
    theirs = script(SGLangWrapper, backend, tokenizer, case)
    ours = script(SGLangHiddenWrapper, backend, tokenizer, case)

    assert ours.batch_size == theirs.batch_size
    assert set(theirs.keys()) <= set(ours.keys())
    assert torch.equal(ours["query"], theirs["query"])
    differing = {
        (key, leaf)
        for key, leaves in LEAVES.items()
        if key in theirs
        for leaf in leaves
        if not equal(read(ours, key, leaf), read(theirs, key, leaf))
    }
    assert differing == frozenset().union(*(each.leaves for each in DIFFERENCES if each.shows(case)))
    # No comparison of nothing: a stop string ended one answer, and the other went on.
    assert ours["finish_reason"] == ["stop", "length"][: case.num_rows]


@pytest.mark.parametrize("inplace", [True, False, "empty", None])
def test_where_the_script_finds_its_outputs(
    smol: SGLangServer, tokenizer: PreTrainedTokenizerBase, inplace: bool | str | None
) -> None:
    case = Case("text", False, 2)
    theirs = script(SGLangWrapper, smol.url, tokenizer, case, inplace=inplace)
    ours = script(SGLangHiddenWrapper, smol.url, tokenizer, case, inplace=inplace)
    assert set(theirs.keys()) <= set(ours.keys())
    assert ("query" in ours) == ("query" in theirs) == (inplace in (True, None))
    assert equal(read(ours, "text", "full"), read(theirs, "text", "full"))


# --- 2. call by call ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What a call is tried with."""

    wrapper: type
    model: Any
    tokenizer: PreTrainedTokenizerBase
    model_dir: str

    def make(self, mode: str = "tokens", **options: Any) -> Any:
        options = {
            "tokenizer": self.tokenizer,
            "chat_template": TEMPLATE,
            "generate_kwargs": {"max_new_tokens": 4, "temperature": 0.0},
            **options,
        }
        return self.wrapper(self.model, input_mode=mode, **options)

    def ids(self, prompt: str = PROMPTS[0]) -> list[int]:
        return list(self.tokenizer(prompt)["input_ids"])

    def measured(self, row: TensorDictBase) -> bool:
        """Whether a row's log-probs are those of its recorded ids."""
        prompt, response = row["tokens"].prompt.tolist(), row["tokens"].response.tolist()
        expected_T = hf_oracle.teacher_force(self.model_dir, prompt, response).log_probs_T
        return torch.allclose(row["log_probs"].response, expected_T, atol=LOG_PROB_ATOL, rtol=0)


def samples_nothing(bench: Bench) -> bool:
    out = bench.make(generate=False)(
        TensorDict(tokens=Tokens(full=torch.tensor([bench.ids()]), batch_size=1), batch_size=1)
    )
    return out["tokens"].response is None and out.get(("log_probs", "full"), as_list=True)[0].shape == (
        len(bench.ids()),
    )


def gives_samples(bench: Bench) -> bool:
    return bench.make(num_samples=2)(tokens_input([bench.ids()])).batch_size == (1, 2)


def heeds_the_call(bench: Bench) -> bool:
    out = bench.make()(tokens_input([bench.ids()]), max_new_tokens=2)
    return out.get(("tokens", "response"), as_list=True)[0].shape == (2,)


def sends_no_pads(bench: Bench) -> bool:
    ids = torch.tensor(bench.ids())
    padded = torch.cat([torch.full((5,), bench.tokenizer.pad_token_id), ids])
    data = TensorDict(tokens=Tokens(prompt=padded[None], padded=True, batch_size=1), batch_size=1)
    alone = bench.make()(tokens_input([bench.ids()]))[0]
    return torch.allclose(
        bench.make()(data)[0]["log_probs"].response, alone["log_probs"].response, atol=LOG_PROB_ATOL, rtol=0
    )


def heeds_every_option(bench: Bench) -> bool:
    # Greedily the answer to this is EOS; and an option without a meaning is told.
    options = {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    out = bench.make(generate_kwargs=options)(tokens_input([bench.ids(QUESTIONS[0])]))
    try:
        bench.make(generate_kwargs={"max_tokens_new": 4})
    except ValueError:
        return out.get(("tokens", "response"), as_list=True)[0].shape == (4,)
    return False


def copies_everything(bench: Bench) -> bool:
    policy = bench.make(
        "text",
        generate_kwargs={"max_new_tokens": 8, "temperature": 0.0, "stop_sequences": [" Paris"]},
        input_key="question",
        batching=True,
        max_batch_size=4,
    )
    again = policy.get_new_version()
    stopped = again.generate_kwargs == policy.generate_kwargs
    return bool(stopped and again.input_key == "question" and again.batching == policy.batching)


def writes_where_told(bench: Bench) -> bool:
    data, target = tokens_input([bench.ids()])[0], TensorDict()
    return bench.make()(data, tensordict_out=target) is target and "tokens" in target


def says_why_it_ended(bench: Bench) -> bool:
    return bench.make()(tokens_input([bench.ids()]))["finish_reason"] == ["length"]


def sends_one_request(bench: Bench) -> bool:
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        for client in (httpx.Client, requests.Session):
            patch.setattr(client, "send", _counted(client.send, sent))  # type: ignore[attr-defined]
        bench.make()(tokens_input([bench.ids(prompt) for prompt in PROMPTS]))
    return len(sent) == 1


def _counted(send: Callable[..., Any], sent: list[str]) -> Callable[..., Any]:
    def counted(client: Any, request: Any, **options: Any) -> Any:
        if str(request.url).endswith("/generate"):
            sent.append(str(request.url))
        return send(client, request, **options)

    return counted


def heeds_the_device(bench: Bench) -> bool:
    out = bench.make(device="meta")(tokens_input([bench.ids()]))
    return out.get(("tokens", "response"), as_list=True)[0].device.type == "meta"


def records_what_it_sent(bench: Bench) -> bool:
    # A tokenizer that cuts every text into letters: of the server's vocabulary, and not what the server would write.
    letters = copy.deepcopy(bench.tokenizer)
    letters.backend_tokenizer.model = models.BPE(vocab=bench.tokenizer.get_vocab(), merges=[])
    out = bench.make("history", tokenizer=letters)(history_input(["Hi"]))[0]
    assert out["tokens"].prompt.tolist() != bench.make("history")(history_input(["Hi"]))[0]["tokens"].prompt.tolist()
    return bench.measured(out)


def prefers_ragged_tokens(bench: Bench) -> bool:
    rows = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = bench.tokenizer.apply_chat_template(
            chat, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False
        )
        row = history_input([prompt])[0]
        rows.append(row.set("tokens", Tokens(prompt=torch.tensor(ids), batch_size=())))
    out = bench.make("history", prefer_tokens=True)(lazy_stack(rows))
    return all(map(bench.measured, out.unbind(0)))


def sends_the_second_turn(bench: Bench) -> bool:
    env = chat_env(QUESTIONS[:1], turns=2)
    first, second = env.rollout(2, bench.make("history", prefer_tokens=True))[0].unbind(0)
    asked_on = FOLLOW_UPS[0] in bench.tokenizer.decode(second["tokens"].prompt.tolist())
    return first["text"].response in second["text"].prompt and asked_on


def pickles_with_its_queue(bench: Bench) -> bool:
    policy = pickle.loads(pickle.dumps(bench.make(batching=True)))
    return policy(tokens_input([bench.ids()])).get(("tokens", "response"), as_list=True)[0].shape == (4,)


@dataclass(frozen=True)
class Call:
    """What is asked for, and what torchrl's class raises; None where it just does something else."""

    does: Callable[[Bench], bool]
    raises: type[Exception] | None = None


CALLS = {
    "samples with `generate=False` too": Call(samples_nothing),
    "ignores `num_samples`": Call(gives_samples),
    "ignores the options of a call": Call(heeds_the_call),
    "sends padded token prompts with their pads": Call(sends_no_pads),
    "drops sampling options that it does not know (`n`, `seed`, `min_p`, `ignore_eos`, `stop_token_ids` …)": Call(
        heeds_every_option
    ),
    "loses stop strings, `input_key`, `tokenizer_kwargs` and batching in `get_new_version`": Call(copies_everything),
    "ignores `tensordict_out` for some shapes": Call(writes_where_told),
    "ignores the reason that a response ended for": Call(says_why_it_ended, KeyError),
    "sends one blocking request per prompt, one after the other": Call(sends_one_request),
    "ignores `device`": Call(heeds_the_device),
    "tokenizes chats a second time, so that the ids it records can differ from those that were used": Call(
        records_what_it_sent
    ),
    "`prefer_tokens`: raises on a ragged batch": Call(prefers_ragged_tokens, RuntimeError),
    "`prefer_tokens`: sends the first turn's prompt again in the second turn of a plain `ChatEnv`": Call(
        sends_the_second_turn
    ),
    "batching: its lock does not pickle": Call(pickles_with_its_queue, TypeError),
}


@pytest.mark.parametrize("fault", CALLS)
def test_a_call_does_as_it_is_told(
    backend: AsyncSGLang, tokenizer: PreTrainedTokenizerBase, smol_dir: str, fault: str
) -> None:
    call = CALLS[fault]
    ours, theirs = (Bench(wrapper, backend, tokenizer, smol_dir) for wrapper in (SGLangHiddenWrapper, SGLangWrapper))
    assert call.does(ours)
    if call.raises is None:
        assert not call.does(theirs)
        return
    with pytest.raises(call.raises):
        call.does(theirs)


# --- 3. a collector's script --------------------------------------------------------------------------------------


def test_the_same_dialogue_is_collected(smol: SGLangServer, tokenizer: PreTrainedTokenizerBase) -> None:
    def turns(wrapper: type) -> Iterator[TensorDictBase]:
        policy = wrapper(
            smol.url,
            tokenizer=tokenizer,
            input_mode="history",
            chat_template=TEMPLATE,
            generate_kwargs={"max_new_tokens": 4, "temperature": 0.0},
        )
        batches = collector(chat_env(QUESTIONS[:1], turns=2), policy, turns_per_batch=2, total_turns=2)
        for batch in batches:
            yield from batch[0].unbind(0)
        batches.shutdown()

    theirs, ours = list(turns(SGLangWrapper)), list(turns(SGLangHiddenWrapper))
    assert len(ours) == len(theirs) == 2
    for found, expected in zip(ours, theirs, strict=True):
        for key in ("prompt", "response", "full"):
            assert getattr(found["text"], key) == getattr(expected["text"], key)
        assert _messages(found["next", "history"].prompt) == _messages(expected["next", "history"].prompt)
        assert torch.equal(found["tokens"].full, expected["tokens"].full)
        response_T = found["log_probs"].response
        torch.testing.assert_close(response_T, expected["log_probs"].response, atol=LOG_PROB_ATOL, rtol=0)
