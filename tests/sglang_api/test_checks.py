"""What is refused before anything is sent: prompts, options, states and spans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fake_engine import (
    ALL_SEGMENTS,
    make_info,
)
from helpers.sample_requests import (
    RESOLVED,
    SPANS,
    STOCK,
    request,
)

from torchrl_sglang_hidden import CapabilityError, HiddenSpec
from torchrl_sglang_hidden.errors import (
    InputError,
    InputTypeError,
    PromptLengthError,
    SGLangHiddenError,
    SpanError,
    TokenIdError,
)
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan, TokenMask

# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_ids", "error", "words"),
    [
        ((), PromptLengthError, r"row 1: the prompt has 0 tokens; SGLang needs at least 1"),
        ((5, 96), TokenIdError, r"row 1: token id 96 at position 1 .*vocabulary of 96; ids are 0\.\.95.*tokenizer\?"),
        ((-3, 5), TokenIdError, r"row 1: token id -3 at position 0 "),
        ((5, 6.0), InputTypeError, r"row 1: token id 6\.0 is a float; token ids are integers"),
        ((True,), InputTypeError, r"row 1: token id True is a bool"),
        ((torch.tensor(5),), InputTypeError, r"row 1: token id tensor\(5\) is a Tensor"),
        ((5,) * 59, PromptLengthError, r"row 1: .*59 tokens, over the engine's limit of 58 .*64\); shorten"),
    ],
)
def test_prompts_that_are_not_sent(prompt_ids: Any, error: type[SGLangHiddenError], words: str) -> None:
    with pytest.raises(error, match=words):
        check_requests([request(), request(prompt_ids=prompt_ids)], make_info())


def test_prompts_at_the_limits_are_sent() -> None:
    check_requests([request(prompt_ids=(0, 95)), request(prompt_ids=(5,) * 58, max_new_tokens=6)], make_info())


@pytest.mark.parametrize("sampling", [{"stop_token_ids": [2, 96]}, {"logit_bias": {"96": 1.0}}])
def test_ids_among_the_options(sampling: dict[str, Any]) -> None:
    (name,) = sampling
    with pytest.raises(TokenIdError, match=rf"row 0: {name} has id 96, .* of 96; ids are 0\.\.95"):
        check_requests([request(**sampling)], make_info())


def test_a_seed_that_is_not_read_is_refused() -> None:
    check_requests([request(sampling_seed=3)], make_info())
    with pytest.raises(CapabilityError, match=r"row 1: sampling_seed=3, .*--enable-deterministic-inference"):
        check_requests([request(), request(sampling_seed=3)], make_info(honours_seeds=False))


# --- states that are asked for ----------------------------------------------------------------------------------------


GOOD_SPEC = HiddenSpec(ALL_SEGMENTS, layers=(0, -1, -2), spans=SPANS)


@pytest.mark.parametrize(
    ("one", "info", "error", "words"),
    [
        (
            request(),
            {**STOCK, "returns_hidden_states": False},
            CapabilityError,
            r"row 1: hidden states are asked of a server that was started without them; start the server with .*, or "
            r"pass hidden=None",
        ),
        (
            request(),
            {**STOCK, "returns_hidden_states": False, "no_states_because": "of speculation"},
            CapabilityError,
            r"without them, which gives none: of speculation; start",
        ),
        (
            request(HiddenSpec(layers=1)),
            {},
            CapabilityError,
            r"row 1: layers=1: the server gives the states of layers \[-1, 0, 2\], and not of \[1\]; start it with "
            r"launch\(layers=\(0, 1, 2\)\), or `serve --layers`",
        ),
        (request(HiddenSpec(layers=(0, -3))), {}, CapabilityError, r"layers=\(0, -3\): .*launch\(layers=\(0, 1, 2\)\)"),
        (
            request(HiddenSpec(layers=(-1, 0))),
            {"layers": (-1,), "no_states_because": "Gemma 9 is another"},
            CapabilityError,
            r"layers \[-1\], and not of \[0\] \(Gemma 9 is another\); ask for others",
        ),
        (
            request(HiddenSpec(layers=0)),
            STOCK,
            CapabilityError,
            r"layers=0: the server gives the states of layers \[-1\]",
        ),
        (request(HiddenSpec(layers=4)), {}, InputError, r"layers=4: the model has 4 layers; use 0\.\.3"),
        (request(HiddenSpec(layers=-5)), {}, InputError, r"layers=-5: the model has 4 layers"),
        (
            request(max_new_tokens=0),
            {},
            InputError,
            r"row 1: max_new_tokens=0 generates nothing, and segments=\('prompt', 'response', 'full'\), spans=\[\] "
            r"are not all of the prompt",
        ),
        (
            request(HiddenSpec((), spans={"r": LastTokens(1)}), spans={"r": LastTokens(1)}, max_new_tokens=0),
            {},
            InputError,
            r"spans=\['r'\] are not all of the prompt",
        ),
        (
            request(HiddenSpec(spans=SPANS)),
            {},
            InputError,
            r"row 1: spans \[\] are resolved, and \['mask', 'tail'\] are asked for",
        ),
        (request(HiddenSpec(), spans=RESOLVED), {}, InputError, r"spans \['mask', 'tail'\] are resolved, and \[\] are"),
        (
            request(HiddenSpec(spans={"m": TokenMask("m")}), spans={"m": PromptSpan(((0, 1), (4, 5)))}),
            {},
            SpanError,
            r"row 1, span 'm': ends at 5 in a prompt of 4 tokens",
        ),
        (
            request(HiddenSpec(spans={"m": TokenMask("m", pooling="max")}), spans={"m": PromptSpan(((0, 1),))}),
            {},
            InputError,
            r"row 1, span 'm': pooling='spec' is resolved, and pooling='max' asked for; pass PromptSpan\(…, pooling=",
        ),
        (
            request(HiddenSpec(spans={"b": Between("a", None)}), spans={"b": Between("a", None)}),
            STOCK,
            CapabilityError,
            r"row 1, span 'b': markers are found by the server half; start the server with",
        ),
    ],
)
def test_states_that_cannot_be_had(one: Request, info: Any, error: type[SGLangHiddenError], words: str) -> None:
    with pytest.raises(error, match=words):
        check_requests([request(None), one], make_info(**info))


@pytest.mark.parametrize(
    ("one", "info"),
    [
        (request(GOOD_SPEC, spans=RESOLVED), {}),
        (request(HiddenSpec(spans=SPANS), spans=RESOLVED), STOCK),
        (request(HiddenSpec(layers=(-1,))), {**STOCK, "returns_hidden_states": True}),
        (request(HiddenSpec()), {"returns_hidden_states": False}),
        (request(None), {**STOCK, "returns_hidden_states": False}),
        (request(HiddenSpec(("prompt",), tokens=True), max_new_tokens=0), {}),
        (
            request(HiddenSpec((), spans={"m": TokenMask("m")}), spans={"m": PromptSpan(((0, 4),))}, max_new_tokens=0),
            {},
        ),
        (request(HiddenSpec(spans={"b": Between("a", None)}), spans={"b": Between("a", None)}), {}),
    ],
)
def test_states_that_can_be_had(one: Request, info: Any) -> None:
    check_requests([one], make_info(**info))


def test_one_priority_for_a_batch() -> None:
    check_requests([request(priority=1), request(priority=1)], make_info())
    for other in (2, None):
        with pytest.raises(InputError, match=r"priorities .*, and SGLang takes one per batch; send them apart"):
            check_requests([request(priority=1), request(priority=other)], make_info())


def test_a_priority_that_is_not_read_is_refused() -> None:
    with pytest.raises(CapabilityError, match=r"priority=1, which this engine does not read; .*--enable-priority"):
        check_requests([request(priority=1)], make_info(honours_priorities=False))


def test_a_span_that_no_response_is_long_enough_for() -> None:
    def of(span: LastTokens, max_new_tokens: int) -> Request:
        spec = HiddenSpec(spans={"tail": span})
        return request(spec, spans={"tail": span}, max_new_tokens=max_new_tokens)

    with pytest.raises(SpanError, match=r"row 0, span 'tail': LastTokens\(9\) .* max_new_tokens=8; raise that"):
        check_requests([of(LastTokens(9), 8)], make_info())
    check_requests([of(LastTokens(8), 8), of(LastTokens(9, allow_fewer=True), 8)], make_info())


def test_a_prompt_that_is_only_read_must_leave_room_for_a_token() -> None:
    read_only = request(HiddenSpec(("prompt",)), prompt_ids=(5,) * 58, max_new_tokens=0)
    check_requests([read_only], make_info(context_length=59))
    with pytest.raises(PromptLengthError, match=r"row 0: 58 prompt tokens and max_new_tokens=1 are 59 together, over"):
        check_requests([read_only], make_info(context_length=58))


@pytest.mark.parametrize(
    "span", [LastTokens(2, "prompt"), Between("a", "b", "prompt"), TokenMask("m")], ids=lambda span: type(span).__name__
)
def test_a_span_that_is_not_resolved(span: Any) -> None:
    """If it were sent, it would be pooled over the response, with a count that fits."""
    one = Request((5, 6, 7), hidden=HiddenSpec(spans={"s": span}), spans={"s": span})
    with pytest.raises(InputTypeError, match=r"row 0, span 's': .* is not resolved; .*PromptSpan"):
        check_requests([one], make_info())


def test_one_layer_under_two_names() -> None:
    one = Request((5, 6, 7), hidden=HiddenSpec(layers=(-2, 2)))
    with pytest.raises(InputError, match=r"layers=\(-2, 2\): two of them are the same layer of 4"):
        check_requests([one], make_info())


@pytest.mark.parametrize(("near", "limit"), [(False, "256"), (True, "1024")])
def test_token_states_have_a_limit(near: bool, limit: str) -> None:
    info = make_info(hidden_size=2**17, context_length=10**6, max_prompt_tokens=10**6, shares_memory=near)

    def ask(spec: HiddenSpec, num_prompt: int) -> None:
        check_requests([Request((5,) * num_prompt, {"max_new_tokens": 8}, hidden=spec)], info)

    with pytest.raises(InputError, match=rf"row 0: tokens=True for up to 3008 positions .* limit of {limit} MiB; ask"):
        ask(HiddenSpec(("full",), tokens=True), 3000)
    ask(HiddenSpec(("response",), tokens=True), 3000)
    ask(HiddenSpec(("full",), tokens=True, dtype=torch.bfloat16), 800 if not near else 3000)
    ask(HiddenSpec(("full",)), 3000)
