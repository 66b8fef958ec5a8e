"""`RecordingEngine`: an engine without a model, for tests of the code that calls engines and reads their answers.

It answers the payload of `payload.to_payload` as SGLang would, and `responses.read_responses` reads that answer:
every check that guards a real engine guards this one. Tokens, log-probs and states are functions of the prompt, given
here as `response_of`, `log_prob_of` and `state_D`, so that a test can say what must come out.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from helpers.fake_heads import feed, found_scores, streamed_parts, until_rule, with_parts
from helpers.fake_images import FIRST_IMAGE_ROW, images_in, joined, seen_ids
from helpers.reference_pooling import pool
from torchrl_sglang_hidden.engines import Engine
from torchrl_sglang_hidden.engines.sessions import Session, SessionHost
from torchrl_sglang_hidden.engines.streams import AsyncStream, Stream, check_stream
from torchrl_sglang_hidden.errors import RequestRejectedError
from torchrl_sglang_hidden.protocol import CHANNEL, Status, digest_prompt, pack_answer, unpack_options
from torchrl_sglang_hidden.protocol.update_lease import LeaseCall
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request, TokenLogits
from torchrl_sglang_hidden.reduce.columns import select_columns
from torchrl_sglang_hidden.reduce.constraining import constrain
from torchrl_sglang_hidden.reduce.entropy import entropy_rows
from torchrl_sglang_hidden.reduce.host_pools import HostPools
from torchrl_sglang_hidden.reduce.token_logits import NextToken, RequestLogits, keep_rows
from torchrl_sglang_hidden.reduce.wanted_logits import FoundLogits, WantedLogits
from torchrl_sglang_hidden.server.next_tokens import StepLogits
from torchrl_sglang_hidden.server.token_rows import PromptPart
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses
from torchrl_sglang_hidden.spec.constraints import known_constraints
from torchrl_sglang_hidden.spec.hidden import SEGMENTS, Pooling, Segment
from torchrl_sglang_hidden.weights.validation import next_version

# A busy machine is no fault of the code; and a failure says how to repeat itself without a database.
settings.register_profile("tests", deadline=None, database=None)
settings.load_profile("tests")

Answer = list[dict[str, Any]]
Fault = Callable[[Answer], None]

HIDDEN_SIZE = 8
NUM_LAYERS = 4
CONTEXT_LENGTH = 64
DEFAULT_NEW_TOKENS = 5

EOS_ID = PAD_ID = 1
# What the engine takes off the head of a session's later turns, as SGLang does.
BOS_ID = 2
WORDS = ("<unk>", "<|end|>", "<|start|>", "user", "assistant", "system", *(f"w{i}" for i in range(90)))
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|> {{ message.role }} {{ message.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|start|> assistant {% endif %}"
)


def tiny_tokenizer(**options: Any) -> PreTrainedTokenizerBase:
    """Return a tokenizer of 96 words. Its pad token is its EOS token, as in the demo model."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<|end|>", "pad_token": "<|end|>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special)


def bos_tokenizer(**options: Any) -> PreTrainedTokenizerBase:
    """Return the same tokenizer with a BOS, which it writes before a text."""
    tokenizer = tiny_tokenizer(**{"bos_token": "<|start|>", **options})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", BOS_ID)]
    )
    return tokenizer


def response_of(prompt_ids: Sequence[int]) -> list[int]:
    """Return 1 to 5 ids that differ from prompt to prompt. A response of fewer than 5 ends with EOS."""
    total = sum((i + 1) * token for i, token in enumerate(prompt_ids))
    length = 1 + total % DEFAULT_NEW_TOKENS
    ids = [6 + (7 * total + 11 * i) % 90 for i in range(length)]
    return ids if length == DEFAULT_NEW_TOKENS else [*ids[:-1], EOS_ID]


def log_prob_of(token_id: int) -> float:
    """Return the log-prob of a token: a multiple of 1/4, which float32 holds exactly."""
    return -0.25 * (1 + token_id % 7)


def state_D(ids: Sequence[int], position: int) -> torch.Tensor:
    """Return the last layer's state at a position: a function of the token there and of the token before it."""
    before = ids[position - 1] if position else 0
    return torch.sin(torch.arange(1, HIDDEN_SIZE + 1) * (1.0 + ids[position]) + 0.37 * before + position)


def logits_V(ids: Sequence[int]) -> torch.Tensor:
    """Return the logits from which the token after these ids is drawn."""
    return 3 * torch.sin(torch.arange(len(WORDS)) * (1.0 + ids[-1]) + 0.37 * len(ids))


def states_ND(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> torch.Tensor:
    """Return the states of every position that is computed, ``[P+T-1, D]``."""
    ids = [*prompt_ids, *response_ids]
    return torch.stack([state_D(ids, position) for position in range(len(ids) - 1)])


def pooled_D(hidden_ND: torch.Tensor, segment: Segment, pooling: Pooling, num_prompt: int) -> torch.Tensor:
    """Return what a segment pools to, in plain torch and float64."""
    rows = {"prompt": hidden_ND[:num_prompt], "response": hidden_ND[num_prompt - 1 :], "full": hidden_ND}[segment]
    return pool(rows.double(), pooling)


def make_info(**changes: Any) -> EngineInfo:
    """Return what a `RecordingEngine` says of itself."""
    fields: dict[str, Any] = {
        "model_path": "recorder",
        "tokenizer_path": "recorder",
        "vocab_size": len(WORDS),
        "hidden_size": HIDDEN_SIZE,
        "num_layers": NUM_LAYERS,
        "layers": (-1, 0, 2),
        "context_length": CONTEXT_LENGTH,
        "max_prompt_tokens": CONTEXT_LENGTH - 6,
        "weight_version": "v7",
        "pools_in_server": True,
        "returns_hidden_states": True,
        "honours_seeds": True,
        "honours_priorities": True,
        "constraints": known_constraints(),
        "max_sampling_mask": 8,
        "returns_routed_experts": True,
    }
    return EngineInfo(**{**fields, **changes})


class RecordingEngine(Engine):
    """An engine without a model; see the module's docstring.

    Args:
        tokenizer: makes the texts; without one they are the ids in words.
        binary: states travel as raw bytes, as in-process; else everything goes through JSON.
        respond: the sampled ids by prompt, before ``max_new_tokens`` cuts them.
        fault: spoils the answer before it is read; may be set and unset between calls.
        **info: fields of `EngineInfo` that differ from `make_info`.

    Attributes:
        requests: every request that was sent, in order.
        payloads: the payload of every call.
        closed: how often `close` was called.
        updates: weights, transport and running of every `update_weights`.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        binary: bool = False,
        respond: Callable[[Sequence[int]], Sequence[int]] = response_of,
        fault: Fault | None = None,
        **info: Any,
    ) -> None:
        self._info = make_info(**info)
        self._tokenizer, self._binary, self._respond = tokenizer, binary, respond
        self._lock = threading.Lock()
        self.fault = fault
        self.requests: list[Request] = []
        self.payloads: list[dict[str, Any]] = []
        self.closed = 0
        self.updates: list[tuple[Any, str, str]] = []
        self.sessions: dict[str, dict[str | None, Request]] = {}
        self._host = SessionHost(lambda: self._info, self.session_call, self.turn, binary=binary, num_ranks=2)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self._check(requests, self._info)
        return read_responses(requests, self._send(requests), self._info)

    def _send(self, requests: Sequence[Request]) -> Answer:
        payload = to_payload(requests, self._info, binary=self._binary)
        with self._lock:
            self.requests += requests
            self.payloads.append(payload)
        rows = self.answer(payload, requests)
        if self.fault is not None:
            self.fault(rows)
        return rows

    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        return self.generate(requests)

    def stream(self, request: Request) -> Stream:
        return Stream(self._growing(request), request, self._info)

    async def astream(self, request: Request) -> AsyncStream:
        async def rows() -> AsyncGenerator[Any, None]:
            for row in self._growing(request):
                yield row

        return await AsyncStream.open(rows(), request, self._info)

    def _growing(self, request: Request) -> Generator[Any, None, None]:
        """Yield what SGLang streams: the answer so far after each token, and the whole answer at the end."""
        check_stream(request, self._info, cumulative=True)
        self._check([request], self._info)
        row = self._send([request])[0]
        yield None
        parts = streamed_parts(request.heads, len(request.prompt_ids), states_ND(request.prompt_ids, row["output_ids"]))
        for count in range(1, len(row["output_ids"])):
            yield with_parts(self.so_far(row, count), parts[:count])
        # The last token's are in the answer.
        yield with_parts(row, parts[:-1])

    def so_far(self, row: dict[str, Any], count: int) -> dict[str, Any]:
        """Return a row of an answer as it was after ``count`` tokens."""
        ids = row["output_ids"][:count]
        meta = {name: value for name, value in row["meta_info"].items() if name != CHANNEL} | {"finish_reason": None}
        if "output_token_logprobs" in meta:
            meta["output_token_logprobs"] = meta["output_token_logprobs"][:count]
        return {"text": self._text(ids), "output_ids": ids, "meta_info": meta}

    def session(self) -> Session:
        return Session(self._host, self._check)

    def session_call(self, route: str, payload: dict[str, Any]) -> None:
        if route == "open_session":
            self.sessions[payload["session_id"]] = {None: Request(())}
        else:
            del self.sessions[payload["session_id"]]

    def turn(self, payload: dict[str, Any]) -> Answer:
        """Answer as SGLang's session does: the turn named by ``rid`` and its response are prepended to the new ids."""
        self.payloads.append(payload)
        session = payload["session_params"]
        turns = self.sessions.get(session["id"], {})
        if session["rid"] not in turns:
            raise RequestRejectedError("Invalid request session id")
        before, new_ids = turns[session["rid"]], payload["input_ids"][0]
        new_ids = new_ids[1:] if before.prompt_ids and new_ids[0] == BOS_ID else new_ids
        turn = joined(before, images_in(new_ids, payload.get("image_data", [[]])[0]))
        rows = self.answer(payload, [turn])
        turns[payload["rid"][0]] = joined(turn, Request(tuple(rows[0]["output_ids"])))
        if self.fault is not None:
            self.fault(rows)
        return rows

    def update_weights(
        self, weights: Any, *, version: str | None = None, transport: str = "auto", running: str = "finish"
    ) -> str:
        """Record the weights, and move the version as SGLang does."""
        version = version or next_version(self._info.weight_version)
        self.updates.append((weights, transport, running))
        self._info = dataclasses.replace(self._info, weight_version=version)
        return version

    def close(self) -> None:
        self.closed += 1

    def answer(self, payload: dict[str, Any], requests: Sequence[Request] | None = None) -> Answer:
        """Return what SGLang's ``/generate`` would answer to a payload.

        Args:
            payload: what was sent.
            requests: what it was made of, which say how its images are expanded; None for `IMAGE_ROWS` rows each.
        """
        stock = payload.get("return_hidden_states", [False] * len(payload["input_ids"]))
        starts = payload.get("logprob_start_len", [-1] * len(payload["input_ids"]))
        if requests is None:
            data = payload.get("image_data", [[]] * len(payload["input_ids"]))
            requests = [images_in(ids, uris) for ids, uris in zip(payload["input_ids"], data, strict=True)]
        columns = (requests, payload["sampling_params"], payload["return_logprob"], stock, starts)
        rows = [self._answer_row(index, *row) for index, row in enumerate(zip(*columns, strict=True))]
        for row, rid in zip(rows, payload.get("rid") or [], strict=False):
            row["meta_info"]["id"] = rid
        for row, request, mask in zip(rows, requests, payload.get("return_sampling_mask", stock), strict=True):
            ids = seen_ids(request.prompt_ids, request.images)
            row["meta_info"] |= recorded(ids, row["output_ids"], bool(mask), "return_routed_experts" in payload)
        return rows if self._binary else json.loads(json.dumps(rows))

    def _answer_row(
        self, index: int, request: Request, sampling: dict[str, Any], return_logprob: bool, stock: bool, start: int
    ) -> dict[str, Any]:
        prompt_ids = seen_ids(request.prompt_ids, request.images)
        limit = sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
        if limit == self._info.max_prompt_tokens - len(prompt_ids):
            # All the room there is: what the payload says where SGLang's default would be more, which is less here.
            limit = min(limit, DEFAULT_NEW_TOKENS)
        response_ids = list(self._respond(list(request.prompt_ids)))[:limit]
        options = unpack_options(sampling.get("custom_params"))
        logits = log_probs = None
        if options is not None and options.logits != WantedLogits():
            temperature = sampling.get("temperature", 1.0) or 1.0
            one = RequestLogits(options.logits, request.prompt_ids, image_rows=frozenset(request.image_rows))
            response_ids, log_probs, logits = choose(one, prompt_ids, response_ids, limit, temperature)
        hidden_ND, scores = states_ND(prompt_ids, response_ids), None
        if options is not None and options.scores is not None:
            count = until_rule(options.scores, hidden_ND, len(prompt_ids), len(response_ids))
            ruled, response_ids = count < len(response_ids), response_ids[:count]
            hidden_ND = hidden_ND[: len(prompt_ids) + count - 1]
            scores = found_scores(options.scores, hidden_ND, len(prompt_ids), response_ids, self._decode)
            ends_by_head = ruled or until_rule(options.scores, hidden_ND, len(prompt_ids), count + 1) == count
        stopped = response_ids[-1] == EOS_ID
        meta: dict[str, Any] = {
            "id": f"recorded-{index}",
            "prompt_tokens": len(prompt_ids),
            "weight_version": self._info.weight_version,
            "finish_reason": {"type": "stop", "matched": EOS_ID} if stopped else {"type": "length", "length": limit},
        }
        if scores is not None and ends_by_head and not stopped:
            meta["finish_reason"] = {"type": "stop", "head": str(options.scores.stop)}
        if return_logprob:
            values = log_probs or [log_prob_of(i) for i in response_ids]
            meta["output_token_logprobs"] = [[v, i, None] for v, i in zip(values, response_ids, strict=True)]
        if return_logprob and start >= 0:
            # At the rows of an image SGLang gives id 0.
            given = [0 if i >= FIRST_IMAGE_ROW else i for i in prompt_ids[start:]]
            entries = [[log_prob_of(i), i, None] for i in given[1:]]
            meta["input_token_logprobs"] = [[None, given[0], None], *entries]
        if options is not None:
            pools = HostPools(options.wanted, len(prompt_ids))
            feed(pools, torch.stack([of_layer(hidden_ND, layer) for layer in options.wanted.layers], 1))
            digest = digest_prompt(request.prompt_ids, request.image_rows) if request.images is not None else None
            found = pools.results(response_ids, self._decode)
            meta[CHANNEL] = [pack_answer(found, options.way, logits=logits, prompt_digest=digest, scores=scores)]
        if stock:
            num_prompt = len(prompt_ids)
            meta["hidden_states"] = [hidden_ND[:num_prompt].tolist(), *hidden_ND[num_prompt:].tolist()]
        return {"text": self._text(response_ids), "output_ids": response_ids, "meta_info": meta}

    def _decode(self, ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _text(self, response_ids: list[int]) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, response_ids))
        return str(self._tokenizer.decode(response_ids, skip_special_tokens=True))


def recorded(prompt_ids: list[int], response_ids: list[int], mask: bool, experts: bool) -> dict[str, Any]:
    """Return what SGLang adds for ``return_sampling_mask``, one to three tokens each, and ``return_routed_experts``."""
    found: dict[str, Any] = {}
    if mask:
        supports = [[i, *range(i + 1, i + 1 + i % 3)] for i in response_ids]
        found["output_token_sampling_mask"] = supports
        found["output_token_sampling_logprobs"] = [[-math.log(len(ids))] * len(ids) for ids in supports]
    if experts:
        chosen = experts_ND([*prompt_ids, *response_ids][:-1])
        found["routed_experts"] = base64.b64encode(chosen.numpy().tobytes()).decode()
    return found


def experts_ND(ids: Sequence[int]) -> torch.Tensor:
    """Return the experts that the positions of these tokens are routed to, int32 ``[N, L, 2]``."""
    layers = torch.arange(NUM_LAYERS * 2).view(NUM_LAYERS, 2)
    return (torch.tensor(ids)[:, None, None] + layers).int()


def choose(
    one: RequestLogits, prompt_ids: list[int], preferred: list[int], limit: int, temperature: float
) -> tuple[list[int], list[float] | None, FoundLogits]:
    """Choose tokens as a server does: the preferred ids where the constraints allow them, else the best allowed id.

    Returns the ids, their log-probs where the request has constraints or wants logits of the response, and its logits.
    """
    wanted = one.wanted
    step = one.plan_prompt(0, len(prompt_ids))
    if step is not None:
        rows_ND = torch.stack([logits_V(prompt_ids[: place + 1]) for place in range(len(prompt_ids))])
        taking = StepLogits((), (PromptPart(0, 0, *step, one),), (None,), len(WORDS), len(rows_ND))
        taking.take_prompts(rows_ND, lambda rows: rows)
        taking.taken().copy_to_host(lambda tensor: tensor).consume(None, [None])
    if not wanted.wants_sampled:
        return preferred, None, one.finish()
    ids: list[int] = []
    log_probs: list[float] = []
    while len(ids) < limit and EOS_ID not in ids:
        raw_V = logits_V([*prompt_ids, *ids])
        if len(ids) < len(preferred):
            raw_V[preferred[len(ids)]] = 20.0
        before = torch.tensor(ids, dtype=torch.int64)
        rows_1V, choosable_1 = constrain(raw_V[None], [NextToken(one, len(ids), limit, lambda before=before: before)])
        if not choosable_1.all():
            one.fail(f"token {len(ids)} of the response: 0 tokens are left", len(ids))
        processed_1V = rows_1V / temperature
        spec = wanted.spec
        row = None if spec is None else select_columns(raw_V[None] if spec.stage == "raw" else processed_1V, spec)
        one.add_response(len(ids), row if spec is not None and spec.of_response else None)
        if wanted.entropy:
            keep_rows(TokenLogits(entropy_rows(processed_1V, (0,), len(WORDS)), None), [0], [one], name="_entropy")
        ids.append(int(processed_1V[0].argmax()))
        log_probs.append(float(processed_1V[0].log_softmax(-1)[ids[-1]]))
    return ids, log_probs, one.finish()


def of_layer(hidden: torch.Tensor, layer: int) -> torch.Tensor:
    """Return the states of another layer: different numbers, which tell the layer."""
    return hidden if layer == -1 else hidden * 0.5 + layer + 1


# --- over HTTP --------------------------------------------------------------------------------------------------------

Respond = Callable[["Handler", dict[str, Any]], None]


def model_page(model_path: str) -> dict[str, Any]:
    """Return what a `RecordingEngine` answers at SGLang's ``/model_info``."""
    return {"model_path": model_path, "weight_version": "v7", "is_generation": True}


def server_page(**changes: Any) -> dict[str, Any]:
    """Return what it answers at ``/server_info``; ``changes`` are of the server half's status."""
    info = make_info()
    fields: dict[str, Any] = {
        "vocab_size": info.vocab_size,
        "hidden_size": info.hidden_size,
        "num_layers": info.num_layers,
        "context_length": info.context_length,
        "layers": info.layers,
        "because": "",
        "normed": True,
        "shared": "",
        "open_pools": 0,
        "prefix_bytes": 0,
        "constraints": known_constraints(),
        "raw_log_probs": False,
        "image_token_id": info.image_token_id,
    }
    status = Status(**{**fields, **changes}).pack()
    return {"internal_states": [{CHANNEL: status}], "max_req_input_len": info.context_length - 5}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer is two writes; the second would wait 40 ms for the client's delayed acknowledgement of the first.
    disable_nagle_algorithm = True
    server: RecordingServer

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        self.say(self.server.pages.get(self.path, (404, "Not Found")))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, dict(self.headers)))
        payload = json.loads(body)
        if self.path == "/abort_request":
            self.say((200, ""))
            self.server.aborted.append(payload["rid"])
            self.server.abort_came.release()
            return
        lease_call = LeaseCall.unpack(payload.get("name"))
        if lease_call is not None:
            self.server.lease_steps.append(lease_call.step)
            if lease_call.step == "hold":
                self.server.lease_over.wait(lease_call.hold_s)
            elif lease_call.step == "give_back":
                self.server.lease_over.set()
            self.say((200, {"success": True, "leased": self.server.leases}))
            return
        self.server.payloads.append(payload)
        self.server.respond(self, payload)

    def say(self, page: tuple[int, Any]) -> None:
        status, body = page
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class RecordingServer(ThreadingHTTPServer):
    """Serves a `RecordingEngine` as SGLang would. Set `pages` and `respond` to serve something else.

    Whoever updates its weights is told of its lease what `leases` says, and `lease_steps` has what was asked.
    """

    daemon_threads = True

    # The default of five is too few for many connections at once: the system resets the others.
    request_queue_size = 128

    def __init__(self, port: int = 0, model_path: str = "m", vocab_size: int = 96) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.pages: dict[str, tuple[int, Any]] = {
            "/model_info": (200, model_page(model_path)),
            "/server_info": (200, server_page(vocab_size=vocab_size)),
        }
        self.respond: Respond = lambda handler, payload: handler.say((200, RecordingEngine().answer(payload)))
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.payloads: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.abort_came = threading.Semaphore(0)
        self.leases, self.lease_steps, self.lease_over = True, list[str](), threading.Event()
        self.connections: list[socket.socket] = []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def sent_rows(self) -> list[list[int]]:
        return [ids for payload in self.payloads for ids in payload["input_ids"]]

    def get_request(self) -> Any:
        accepted = super().get_request()
        self.connections.append(accepted[0])
        return accepted

    def stop(self) -> None:
        self.shutdown()
        for connection in self.connections:
            with suppress(OSError):  # the other end has closed it already
                connection.shutdown(socket.SHUT_RDWR)
        # Ends the listening itself, whoever else has this socket: a client that could connect would be cut off later.
        with suppress(OSError):  # it was stopped before
            self.socket.shutdown(socket.SHUT_RDWR)
        self.server_close()


# --- faults: each spoils the first row of an answer, or the number of rows --------------------------------------------


def lose_a_state_row(rows: Answer) -> None:
    meta = rows[0]["meta_info"]
    if CHANNEL in meta:
        meta[CHANNEL][0]["places"][-1][2] -= 1
    else:
        del meta["hidden_states"][-1]


def lose_all_states(rows: Answer) -> None:
    rows[0]["meta_info"].pop(CHANNEL, None)
    rows[0]["meta_info"].pop("hidden_states", None)


def abort_a_row(rows: Answer) -> None:
    rows[0]["meta_info"]["finish_reason"] = {"type": "abort", "message": "out of memory"}


def lose_a_log_prob(rows: Answer) -> None:
    del rows[0]["meta_info"]["output_token_logprobs"][-1]


def swap_a_log_prob(rows: Answer) -> None:
    rows[0]["meta_info"]["output_token_logprobs"][0][1] += 1


def truncate_the_data(rows: Answer) -> None:
    answer = rows[0]["meta_info"][CHANNEL][0]
    answer["data"] = answer["data"][:-3]


def speak_another_protocol(rows: Answer) -> None:
    rows[0]["meta_info"][CHANNEL][0]["protocol"] = 99


def add_a_row(rows: Answer) -> None:
    rows.append(rows[-1])


def lose_a_row(rows: Answer) -> None:
    del rows[-1]


FAULTS: tuple[Fault, ...] = (
    lose_a_state_row, lose_all_states, abort_a_row, lose_a_log_prob, swap_a_log_prob, truncate_the_data,
    speak_another_protocol, add_a_row, lose_a_row,
)  # fmt: skip
ALL_SEGMENTS: tuple[Segment, ...] = SEGMENTS
