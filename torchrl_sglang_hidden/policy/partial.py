"""Goes on from aborted responses: rows of an earlier output to requests for the rest, and both parts to one row.

Knows what `assemble` writes, and reads it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDictBase, lazy_stack
from tensordict.utils import NestedKey, unravel_key
from torchrl.modules.llm.policies import LogProbs

from torchrl_sglang_hidden.engines import Engine, join_completions, rest_of
from torchrl_sglang_hidden.errors import ImageError, InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.images.messages import hide_images
from torchrl_sglang_hidden.policy.assemble import assemble
from torchrl_sglang_hidden.policy.chat_template import goes_on, messages_of
from torchrl_sglang_hidden.policy.chat_text import Chat, decode_all
from torchrl_sglang_hidden.policy.config import PolicyConfig
from torchrl_sglang_hidden.policy.images import read_images
from torchrl_sglang_hidden.policy.outputs import OutputKeys
from torchrl_sglang_hidden.policy.prompts import PromptReader
from torchrl_sglang_hidden.policy.reading import make_mask_reader, make_reader
from torchrl_sglang_hidden.policy.requests import CallOptions, to_requests
from torchrl_sglang_hidden.policy.row_fields import keys_of, read_template_variables
from torchrl_sglang_hidden.policy.rows import Row, expand_row
from torchrl_sglang_hidden.policy.sampled_turns import TurnsPrompt
from torchrl_sglang_hidden.policy.sending import layout_of, send
from torchrl_sglang_hidden.policy.writing import write
from torchrl_sglang_hidden.records import (
    DEFAULT_NEW_TOKENS,
    NO_RECORDS,
    Completion,
    EngineInfo,
    Pooled,
    Request,
    Scores,
    TokenLogits,
    TokenRows,
)
from torchrl_sglang_hidden.spec.head_scores import HeadSpec
from torchrl_sglang_hidden.spec.hidden import HiddenSpec, Segment, reads_prompt
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import PromptSpan, Span, TokenMask, is_of_response, may_be_empty

__all__ = ["resume_rows"]


def resume_rows(
    tensordict: TensorDictBase, *, config: PolicyConfig, call: CallOptions, engine: Engine, ahead: Engine
) -> TensorDictBase:
    """Go on from the aborted rows of an output; see `SGLangHiddenWrapper.resume`.

    Args:
        tensordict: the output.
        config: the policy's, with ``on_error="nan"``.
        call: the options of the call, those of the whole response.
        engine: generates.
        ahead: see `send`.
    """
    keys, info = config.output_keys(call.hidden, call.logits, call.records, errors=True), ahead.info
    if call.records != NO_RECORDS:
        raise InputError(
            f"resume with {call.records}: what was recorded of the sampling is not joined; leave it out of the options"
        )
    td_rows = _flat(tensordict)
    aborted = [index for index, row in enumerate(td_rows) if _finish_reason(row, keys) == "abort"]
    if not aborted:
        return tensordict
    reader = replace(
        make_reader(config),
        spans={} if call.hidden is None else call.hidden.spans,
        head_spans={} if call.heads is None else call.heads.spans,
        action_masks=make_mask_reader(config, info.vocab_size) if call.reads_masks else None,
    )
    # What is joined comes from the engine, and is on the CPU.
    outputs = [td_rows[index].cpu() for index in aborted]
    firsts = [
        _read_completion(f"row {index}:", output, keys, call) for index, output in zip(aborted, outputs, strict=True)
    ]
    rows = [
        _read_row(index, output, first, reader, keys)
        for index, output, first in zip(aborted, outputs, firsts, strict=True)
    ]
    requests = to_requests(rows, call, return_log_probs=config.return_log_probs, return_errors=True)
    sent = [
        rest_of(_within(request, info), first) if first.response_ids else request
        for request, first in zip(requests, firsts, strict=True)
    ]
    rests = send(rows, sent, engine=engine, ahead=ahead, num_samples=None, outcomes=config.outcomes)
    for index, row, request, first, rest in zip(aborted, rows, requests, firsts, rests, strict=True):
        whole = rest
        if first.response_ids:
            whole = replace(join_completions(request, first, rest), text=_text(config, call, first, rest))
            missed = _missed_stop(reader, request, first, rest)
            if missed is not None:
                error = InputError(
                    f"row {index}: the stop string {missed!r} began in the first part of the response, where SGLang "
                    "does not look for it, and what stands behind it should not be there; send the prompt again"
                )
                whole = replace(whole, finish_reason="error", error=error)
        layout = layout_of(config, call, keys, info, batch_size=torch.Size(()), device=td_rows[index].device)
        out = assemble([row], [whole], **layout)
        td_rows[index] = write(td_rows[index].copy(), out, keys.present(), (), None)
    return _stack(td_rows, tensordict.batch_size)


def _within(request: Request, info: EngineInfo) -> Request:
    """Return a request that names the limit of its response where it named none: the room that the context leaves.

    The rest of a default that the first call was not held to would be refused.
    """
    room = max(info.max_prompt_tokens - len(request.prompt_ids), 1)
    return replace(request, sampling={"max_new_tokens": min(DEFAULT_NEW_TOKENS, room), **request.sampling})


def _text(config: PolicyConfig, call: CallOptions, first: Completion, rest: Completion) -> str:
    """Return the text of both parts, decoded together: the border may be inside a character, or eat a blank."""
    tokenizer = config.own_tokenizer.plain
    skip = call.sampling.get("skip_special_tokens", True)

    def decode(ids: tuple[int, ...]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=skip))

    whole, second = decode((*first.response_ids, *rest.response_ids)), decode(rest.response_ids)
    # What the engine left out of the second part's text is a stop string, at its end.
    left_out = len(second) - len(rest.text) if second.startswith(rest.text) else 0
    return whole[: len(whole) - left_out]


def _missed_stop(reader: PromptReader, request: Request, first: Completion, rest: Completion) -> str | None:
    """Return a stop string of the whole response that the second part alone does not have, or has later."""
    stops = request.sampling.get("stop") or ()
    # SGLang looks for them in the text with special tokens.
    whole = decode_all(reader.tokenizer, (*first.response_ids, *rest.response_ids))
    second = decode_all(reader.tokenizer, rest.response_ids)
    for stop in [stops] if isinstance(stops, str) else stops:
        # Counted from the end: at its beginning the second part may lack a blank, or half a character.
        found, seen = whole.find(stop), second.find(stop)
        if found >= 0 and (seen < 0 or len(whole) - found != len(second) - seen):
            return str(stop)
    return None


def _flat(tensordict: TensorDictBase) -> list[TensorDictBase]:
    return [row for part in tensordict.unbind(0) for row in _flat(part)] if tensordict.ndim else [tensordict]


def _stack(rows: list[TensorDictBase], batch_size: torch.Size) -> TensorDictBase:
    for size in reversed(batch_size):
        rows = [lazy_stack(rows[start : start + size]) for start in range(0, len(rows), size)]
    return rows[0]


def _get(row: TensorDictBase, key: NestedKey | None, what: str) -> Any:
    value = None if key is None else row.get(key)
    if value is None:
        raise MissingKeyError(
            f"no {what} at {key!r}, which resume reads; the row has {keys_of(row)}: pass the output of this policy as "
            "it was, and give every output its key"
        )
    return getattr(value, "data", value) if isinstance(getattr(value, "data", None), (str, tuple)) else value


def _finish_reason(row: TensorDictBase, keys: OutputKeys) -> Any:
    return _get(row, keys.finish_reason, "finish_reason")


def _read_completion(name: str, row: TensorDictBase, keys: OutputKeys, call: CallOptions) -> Completion:
    """Read the aborted part of a response back from an output."""
    tokens = _get(row, keys.tokens, "tokens")
    if tokens.padded:
        raise InputError(f"{name} the output is padded, and resume goes on from ragged rows; use pad_output=False")
    # A call that scores in place leaves the whole sequence alone.
    prompt_ids, response_ids = (
        tuple(_get(row, unravel_key((keys.tokens, part)), f"{part} tokens").tolist()) for part in ("prompt", "response")
    )
    text = row.get(keys.text) if keys.text is not None else None
    history = row.get(keys.history) if keys.history is not None else None
    response = text.response if text is not None else "" if history is None else history.response.content[0]
    spec = call.hidden
    pooled = None if keys.hidden_states is None else _get(row, keys.hidden_states, "hidden states")
    return Completion(
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        text=response,
        log_probs_T=None if keys.log_probs is None else _response_log_probs(name, row, keys),
        hidden={}
        if pooled is None or spec is None
        else _pools({str(one): (getattr(pooled, one), getattr(pooled, f"{one}_count")) for one in spec.segments}),
        finish_reason="abort",
        weight_version=_get(row, keys.weight_version, "weight_version"),
        mixed_weights=bool(_get(row, keys.mixed_weights, "mixed_weights")),
        spans={} if pooled is None or spec is None else _spans(spec, pooled),
        token_rows=None
        if keys.token_hidden_states is None or spec is None
        else _token_rows(spec, _get(row, keys.token_hidden_states, "token states"), len(prompt_ids)),
        versions=tuple(_get(row, keys.weight_versions, "weight_versions")),
        scores={}
        if call.heads is None or keys.head_scores is None or not response_ids
        else _scores(call.heads, _get(row, keys.head_scores, "scores of heads"), len(prompt_ids), len(response_ids)),
        **_logits(call.logits, None if keys.logits is None else _get(row, keys.logits, "logits"), len(prompt_ids)),
    )


def _response_log_probs(name: str, row: TensorDictBase, keys: OutputKeys) -> torch.Tensor:
    there = _get(row, keys.log_probs, "log-probs")
    if not isinstance(there, LogProbs):
        raise InputTypeError(
            f"{name} {keys.log_probs!r} holds a {type(there).__name__}; expected torchrl's LogProbs, as it was written"
        )
    response: torch.Tensor = _get(row, unravel_key((keys.log_probs, "response")), "log-probs")
    return response


def _read_row(index: int, row: TensorDictBase, first: Completion, reader: PromptReader, keys: OutputKeys) -> Row:
    """Read a prompt back from an output as it was sent, whatever its chat or text would become now."""
    text = None if keys.text is None else _get(row, keys.text, "text")
    name = f"row {index}, {keys.images!r}:"
    images = reader.processor.row_images(name, read_images(f"row {index},", row, keys.images))
    short = first.prompt_ids
    error: ImageError | None = None
    if images is not None:
        short = images.short_of(name, first.prompt_ids)
        try:
            reader.processor.check_sent(name, (*short, *first.response_ids), remedy="send the prompt again")
        except ImageError as refused:
            error = refused
    elif reader.processor.takes_images and (keys.images is None or row.get(keys.images) is None):
        _check_without_images(name, first, reader)
    found = Row(short, decode_all(reader.tokenizer, short) if text is None else text.prompt, images=images, error=error)
    found = expand_row(name, found)
    if reader.input_mode == "history":
        found = _with_chat(row, found, reader, keys)
    begun = bool(first.response_ids)
    spans, known = _spans_to_find(reader.spans, begun=begun)
    head_spans, known_by_heads = _spans_to_find(reader.head_spans, begun=begun)
    wanted = (*spans.values(), *head_spans.values())
    if reader.input_mode == "tokens" and any(isinstance(span, TokenMask) for span in wanted):
        given = reader.read_prompt(index, row, None)  # may be padded, as the masks are
        if given.prompt_ids != first.prompt_ids:
            raise InputError(f"row {index}, {reader.input_key!r}: not the prompt that was sent; give back what it was")
        found = replace(found, placement=given.placement, short_placement=given.short_placement)
    found = replace(reader, spans=spans, head_spans=head_spans).read_fields(index, row, found)
    found = replace(found, head_spans={**found.head_spans, **known_by_heads})
    return found if found.wants_states is False else replace(found, spans={**found.spans, **known})


def _spans_to_find(spans: Mapping[str, Span], *, begun: bool) -> tuple[dict[str, Span], dict[str, PromptSpan]]:
    """Return the spans to find, and what stands for those that are known.

    Of a response that has begun what was asked of the prompt is there, and nothing is searched for in it.
    """
    if not begun:
        return dict(spans), {}
    to_find = {name: span for name, span in spans.items() if is_of_response(span)}
    return to_find, {name: PromptSpan(()) for name in spans.keys() - to_find.keys()}


def _check_without_images(name: str, first: Completion, reader: PromptReader) -> None:
    """Refuse an output without its key of images if its prompt has images."""
    if reader.processor.placeholder_id in first.prompt_ids:
        raise MissingKeyError(
            f"{name} no images, which resume sends again, and the prompt has the rows of some; give the output its "
            "images, with prompt_images_key, and pass it as it was"
        )


def _with_chat(row: TensorDictBase, found: Row, reader: PromptReader, keys: OutputKeys) -> Row:
    """Add the chat of a prompt, and what is known of its earlier turns."""
    # What was sent, and else what is there to be sent.
    known = None if keys.history is None else _get(row, keys.history, "history").prompt
    history = _get(row, reader.input_key, "chat") if known is None else known
    given = () if found.images is None else found.images.images
    messages, chats = hide_images(messages_of(history), given), reader.make_chats()
    # Renders only where a span is searched for, and says so where it does not write what was sent.
    template = chats.make_template({**chats.variables, **read_template_variables(row)})
    turns = None
    if keys.chat_digest is not None:
        num_prompt, words = len(found.prompt_ids), str(_get(row, keys.chat_digest, "digest of the chat")).split()
        masks = None if keys.masks is None else _get(row, keys.masks, "masks")
        log_probs = None if keys.log_probs is None else _get(row, keys.log_probs, "log-probs")
        turns = TurnsPrompt(
            found.prompt_ids,
            found.prompt_text,
            # The last words are the response's and the ids'. A message that is gone on from has no other word than the
            # response's.
            " ".join(words[:-1] if goes_on(messages) else words[:-2]),
            None if masks is None else tuple(masks.all_assistant_mask[:num_prompt].tolist()),
            None if log_probs is None else log_probs.full[:num_prompt],
        )
    chat = Chat(messages, found.prompt_text, template, add_generation_prompt=True)
    return replace(found, history=history, chat=chat, turns=turns)


def _pools(found: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Pooled]:
    return {name: Pooled(vector.float(), int(count)) for name, (vector, count) in found.items() if int(count)}


def _spans(spec: HiddenSpec, found: Any) -> dict[str, Pooled]:
    """Read the spans back that are there: one of a prompt may be empty, one of a response is then missing."""
    spans = {}
    for name, span in spec.spans.items():
        count = int(found.span_counts[name])
        if count or (may_be_empty(span) and not is_of_response(span)):
            places = tuple(found.span_places[name].tolist()) if name in spec.unpooled else None
            spans[name] = Pooled(found.spans[name].float(), count, places)
    return spans


def _token_rows(spec: HiddenSpec, states: Any, num_prompt: int) -> TokenRows | None:
    if Segment.FULL in spec.segments:
        return TokenRows(0, states.full)
    if reads_prompt(spec.segments):
        rows_ND = states.prompt
        if Segment.RESPONSE in spec.segments and len(states.response):
            rows_ND = torch.cat([rows_ND, states.response[1:]])
        return TokenRows(0, rows_ND)
    return TokenRows(num_prompt - 1, states.response)


def _scores(spec: HeadSpec, found: Any, num_prompt: int, num_response: int) -> dict[str, Scores]:
    """Read the scores back: of tokens or segments, and of the prompt's spans."""
    scores = {}
    for name in spec.heads:
        version = found.versions[name]
        if not version:
            continue
        parts = {segment: getattr(found, segment)[name] for segment in map(str, spec.segments)}
        spans = {
            span: _scored_span(spec, span, found, name) for span, at in spec.spans.items() if not is_of_response(at)
        }
        if spec.pooling is not None:
            counts = {segment: len(Segment(segment).positions(num_prompt, num_response)) for segment in parts}
            pooled = {segment: Pooled(score.float(), counts[segment]) for segment, score in parts.items()}
            scores[name] = Scores(None, None, version, pooled, spans)
            continue
        if Segment.FULL in parts:
            full = parts[Segment.FULL]
            parts |= {str(Segment.PROMPT): full[:num_prompt], str(Segment.RESPONSE): full[num_prompt - 1 :]}
        scores[name] = Scores(parts.get("prompt"), parts.get("response"), version, spans=spans)
    return scores


def _scored_span(spec: HeadSpec, span: str, found: Any, head: str) -> Pooled:
    """Read a span's scores back. Of how many rows one number is, the output does not say, and the join does not ask."""
    places = tuple(found.span_places[span].tolist()) if span in spec.unpooled else None
    return Pooled(found.spans[span][head], 0 if places is None else len(places), places)


def _logits(spec: LogitsSpec | None, logits: Any, num_prompt: int) -> dict[str, Any]:
    if spec is None or logits is None:
        return {}

    def part(segment: str, ids: str, rows: slice) -> TokenLogits:
        ids_NC = getattr(logits, ids)
        return TokenLogits(getattr(logits, segment)[rows], None if ids_NC is None else ids_NC[rows])

    found: dict[str, TokenLogits] = {}
    # Nothing is before the prompt's first token: its row is no logits.
    if Segment.FULL in spec.segments:
        found["prompt_logits"] = part("full", "full_token_ids", slice(1, num_prompt))
        found["logits"] = part("full", "full_token_ids", slice(num_prompt, None))
    if Segment.PROMPT in spec.segments:
        found["prompt_logits"] = part("prompt", "prompt_token_ids", slice(1, None))
    if Segment.RESPONSE in spec.segments:
        found["logits"] = part("response", "token_ids", slice(None))
    return found
