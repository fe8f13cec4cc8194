"""What clients send: SGLang's and OpenAI's bodies, read strictly, turned into asks.

Unknown fields are ignored, as the engines of the field do; a known field of a wrong type is a 400 that names it. Pure.
"""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from disagg.engines.embedded.generation import Ask, Room
from disagg.engines.embedded.sampler import SamplingParams
from disagg.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from disagg.engines.embedded.tokens import Tokenizer

Body = TypeVar("Body")

MAX_DEPTH = 64
MAX_SAMPLES = 1024
MAX_TOP_LOGPROBS = 64
REST_OF_CONTEXT = 1 << 30
"""``max_new_tokens`` of a request that names none where SGLang's default is as much as fits."""

_NO_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[^][{}"]+', re.DOTALL)


class Bounds(NamedTuple):
    """What this engine can hold.

    Attributes:
        context_length: prompt and answer together, tokens.
        vocab_size: token ids are below it.
    """

    context_length: int
    vocab_size: int


class Batch(NamedTuple):
    """One HTTP request: its samples, prompt by prompt, ``n`` of each.

    Attributes:
        single: the client sent one prompt and wants one object back, not a list.
        n: samples per prompt.
        echo: the prompt is part of the answer's text.
        token_ids: choices carry their token ids.
    """

    asks: list[Ask]
    rid: str
    stream: bool
    single: bool = True
    n: int = 1
    echo: bool = False
    include_usage: bool = False
    token_ids: bool = False
    model: str = ""


class _Bootstrap(msgspec.Struct):
    rid: str | list[str] | None = None
    bootstrap_host: str | list[str] | None = None
    bootstrap_port: int | list[int | None] | None = None
    bootstrap_room: int | list[int] | None = None


class GenerateBody(_Bootstrap):
    """POST /generate."""

    text: str | list[str] | None = None
    input_ids: list[Any] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    stream: bool | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None


class StreamOptions(msgspec.Struct):
    """OpenAI's ``stream_options``."""

    include_usage: bool | None = None


class _OpenAI(_Bootstrap):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    no_stop_trim: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    return_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    stop_regex: Any = None

    def params(self, max_tokens: int) -> SamplingParams:
        """The sampling parameters under SGLang's names."""
        self._refuse_grammar()
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        same = (
            *("n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty"),
            *("repetition_penalty", "stop", "stop_token_ids", "ignore_eos", "no_stop_trim", "skip_special_tokens"),
            *("logit_bias", "json_schema", "regex", "ebnf", "stop_regex"),
        )
        raw = {name: getattr(self, name) for name in same}
        raw |= {"max_new_tokens": max_tokens, "min_new_tokens": self.min_tokens, "sampling_seed": self.seed}
        return SamplingParams.parse(raw)

    def _refuse_grammar(self) -> None:
        kind = (self.response_format or {}).get("type", "text")
        if kind != "text":
            raise RequestError(
                f"response_format {kind!r} needs a grammar, which the embedded engine does not have; serve with SGLang",
                param="response_format",
            )


class CompletionBody(_OpenAI):
    """POST /v1/completions."""

    prompt: str | list[Any] | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ChatBody(_OpenAI):
    """POST /v1/chat/completions."""

    messages: list[Any] | None = None
    input_ids: list[int] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None


class TokenizeBody(msgspec.Struct):
    """POST /v1/tokenize. A chat's body reads as its prompt.

    Attributes:
        add_special_tokens: true where it is not said, but not for messages, whose template writes them.
        add_generation_prompt: of messages; true where it is not said.
    """

    model: str | None = None
    prompt: str | list[str] | None = None
    messages: list[Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeBody(msgspec.Struct):
    """POST /v1/detokenize."""

    tokens: list[Any]
    model: str | None = None
    skip_special_tokens: bool = True


class AbortBody(msgspec.Struct):
    """POST /abort_request."""

    rid: str = ""
    abort_all: bool = False


def decode(raw: bytes, kind: type[Body]) -> Body:
    """Read a body.

    Raises:
        RequestError: it is not JSON of this shape.
    """
    try:
        body = msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise RequestError(f"the body has a field that cannot be used: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if _too_deep(raw):
        raise RequestError(f"the body is nested more than {MAX_DEPTH} levels deep")
    return body


def _too_deep(raw: bytes) -> bool:
    """Whether the brackets of valid JSON nest too deep. Innermost pairs are struck out level by level, at C's speed."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return False
    brackets = _NO_BRACKETS.sub(b"", raw)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return brackets != b""


def _native_params(raw: Mapping[str, Any]) -> SamplingParams:
    """Of the native route: there an explicit null of ``max_new_tokens`` is as much as fits, and no word of it is 128."""
    has_null = "max_new_tokens" in raw and raw["max_new_tokens"] is None
    return SamplingParams.parse({**raw, "max_new_tokens": REST_OF_CONTEXT} if has_null else raw)


def read_generate(body: GenerateBody, tokenizer: Tokenizer, bounds: Bounds) -> Batch:
    """What /generate asks for.

    Raises:
        RequestError: it cannot be served.
    """
    prompts, single = _generate_prompts(body, tokenizer)
    count = len(prompts)
    raw = _spread(body.sampling_params, count, "sampling_params") or [{}] * count
    params = [_native_params(one) for one in raw]
    if len({one.n for one in params}) > 1:
        raise RequestError("sampling_params.n must be the same for all prompts of a request", param="sampling_params")
    wants = _spread(body.return_logprob, count, "return_logprob")
    starts = _spread(body.logprob_start_len, count, "logprob_start_len")
    tops = _spread(body.top_logprobs_num, count, "top_logprobs_num")
    logprobs = [
        _logprobs(wants[at], tops[at] if tops else 0, starts[at] if starts else -1) if wants else (None, None) for at in range(count)
    ]
    n = params[0].n
    asks = _asks(body, prompts, params, logprobs, bounds)
    return Batch(asks, _first_rid(asks), bool(body.stream), single=single and n == 1, n=n)


def _generate_prompts(body: GenerateBody, tokenizer: Tokenizer) -> tuple[list[list[int]], bool]:
    if (body.text is None) == (body.input_ids is None):
        raise RequestError("exactly one of text and input_ids is needed", param="text")
    return _prompts(body.text if body.text is not None else body.input_ids, tokenizer, "input_ids")


def read_completion(body: CompletionBody, tokenizer: Tokenizer, bounds: Bounds) -> Batch:
    """What /v1/completions asks for.

    Raises:
        RequestError: it cannot be served.
    """
    if body.prompt is None:
        raise RequestError("prompt is missing", param="prompt")
    prompts, _ = _prompts(body.prompt, tokenizer, "prompt")
    params = body.params(16 if body.max_tokens is None else body.max_tokens)
    echo = bool(body.echo)
    logprobs = _logprobs(body.logprobs is not None, body.logprobs or 0, 0 if echo else -1)
    asks = _asks(body, prompts, [params] * len(prompts), [logprobs] * len(prompts), bounds)
    return _openai_batch(body, asks, params.n, echo=echo)


def read_chat(body: ChatBody, tokenizer: Tokenizer, bounds: Bounds) -> Batch:
    """What /v1/chat/completions asks for.

    Raises:
        RequestError: it cannot be served.
    """
    prompt = body.input_ids
    if prompt is None:
        if body.messages is None:
            raise RequestError("messages is missing", param="messages")
        prompt = chat_prompt(tokenizer, body)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = body.params(REST_OF_CONTEXT if asked is None else asked)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    asks = _asks(body, [prompt], [params], [_logprobs(body.logprobs, body.top_logprobs or 0, -1)], bounds)
    return _openai_batch(body, asks, params.n)


def chat_prompt(tokenizer: Tokenizer, body: ChatBody | TokenizeBody) -> list[int]:
    """The ids of a conversation; tools are shown to the model unless the client chose ``none``.

    With ``continue_final_message`` the ids of an assistant's last words stand behind the beginning of its turn, as with SGLang.

    Raises:
        RequestError: the messages cannot be rendered.
    """
    opened, special = True, False
    if isinstance(body, TokenizeBody) and body.add_generation_prompt is not None:
        opened, special = body.add_generation_prompt, bool(body.add_special_tokens)
    messages, begun = list(body.messages or ()), ""
    if body.continue_final_message:
        if not opened:
            raise RequestError("continue_final_message needs add_generation_prompt: true", param="add_generation_prompt")
        messages, begun = _begun(messages)
    text = tokenizer.render_chat(
        messages,
        tools=body.tools if body.tool_choice != "none" else None,
        add_generation_prompt=opened,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    return tokenizer.encode(text, add_special_tokens=special) + tokenizer.encode(begun, add_special_tokens=False)


def _begun(messages: list[Any]) -> tuple[list[Any], str]:
    """The messages without an assistant's last words, and those; a message in parts stays, as with SGLang."""
    last = messages[-1] if messages else None
    if isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), str):
        return messages[:-1], last["content"]
    return messages, ""


def read_tokenize(body: TokenizeBody, tokenizer: Tokenizer) -> list[int] | list[list[int]]:
    """The ids of a conversation or of a text, or of each of several texts.

    Raises:
        RequestError: it has none of them or more than one, or one that cannot be read.
    """
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("exactly one of prompt and messages is needed", param="prompt")
    special = body.add_special_tokens is not False
    if body.messages is not None:
        return chat_prompt(tokenizer, body)
    if isinstance(body.prompt, str):
        return tokenizer.encode(body.prompt, add_special_tokens=special)
    return [tokenizer.encode(prompt, add_special_tokens=special) for prompt in body.prompt or ()]


def read_detokenize(body: DetokenizeBody, tokenizer: Tokenizer, bounds: Bounds) -> str | list[str]:
    """The text of a list of ids, or of each of several lists.

    Raises:
        RequestError: tokens is no such list, or an id is not of this model.
    """
    several = bool(body.tokens) and all(isinstance(one, list) for one in body.tokens)
    lists = body.tokens if several else [body.tokens]
    if not all(_is_id(token, bounds) for one in lists for token in one):
        raise RequestError(
            f"tokens must be a list of integers from 0 to {bounds.vocab_size - 1}, or a list of such lists",
            param="tokens",
        )
    texts = [tokenizer.decode(one, skip_special=body.skip_special_tokens) for one in lists]
    return texts if several else texts[0]


def _openai_batch(body: _OpenAI, asks: list[Ask], n: int, *, echo: bool = False) -> Batch:
    return Batch(
        asks,
        _first_rid(asks),
        bool(body.stream),
        n=n,
        echo=echo,
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        token_ids=bool(body.return_token_ids),
        model=body.model or "",
    )


def _first_rid(asks: Sequence[Ask]) -> str:
    return asks[0].rid


def _asks(
    body: _Bootstrap,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    logprobs: Sequence[tuple[int | None, int | None]],
    bounds: Bounds,
) -> list[Ask]:
    if not 1 <= len(prompts) * params[0].n <= MAX_SAMPLES:
        raise RequestError(f"a request makes 1 to {MAX_SAMPLES} samples, not {len(prompts) * params[0].n}")
    rooms, rids = _rooms(body, len(prompts)), _rids(body, len(prompts))
    asks: list[Ask] = []
    for at, prompt in enumerate(prompts):
        ids = _token_ids(prompt, bounds)
        own = _fitted(params[at], len(ids), bounds)
        own.validate(bounds.vocab_size)
        if rooms[at] is not None and own.n > 1:
            raise RequestError("n must be 1 in a request with a bootstrap room: send one request per sample", param="n")
        top, start = logprobs[at]
        for sample in range(own.n):
            seeded = own if own.seed is None else msgspec.structs.replace(own, seed=own.seed + sample)
            asks.append(Ask(rids[at], ids, seeded, top, start, rooms[at]))
    return asks


def _token_ids(prompt: list[int], bounds: Bounds) -> NDArray[np.int32]:
    if not prompt:
        raise RequestError("the prompt is empty: at least one token is needed", param="prompt")
    if len(prompt) >= bounds.context_length:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens; the context of {bounds.context_length} tokens leaves no room for an answer",
            param="prompt",
            code="context_length_exceeded",
        )
    if not all(_is_id(token, bounds) for token in prompt):
        raise RequestError(f"token ids must be integers from 0 to {bounds.vocab_size - 1}", param="input_ids")
    return np.array(prompt, np.int32)


def _is_id(token: Any, bounds: Bounds) -> bool:
    return type(token) is int and 0 <= token < bounds.vocab_size


def _fitted(params: SamplingParams, prompt_tokens: int, bounds: Bounds) -> SamplingParams:
    room = bounds.context_length - prompt_tokens
    if params.max_new_tokens == REST_OF_CONTEXT:
        return msgspec.structs.replace(params, max_new_tokens=room)
    if params.max_new_tokens > room:
        raise RequestError(
            f"{prompt_tokens} prompt tokens and {params.max_new_tokens} new ones are more than the context of"
            f" {bounds.context_length} tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return params


def _prompts(given: Any, tokenizer: Tokenizer, param: str) -> tuple[list[list[int]], bool]:
    """Prompts as ids, and whether one was sent bare: a string, or a flat list of ids."""
    if isinstance(given, str):
        return [tokenizer.encode(given)], True
    if not given:
        raise RequestError(f"{param} is empty", param=param)
    if all(isinstance(one, str) for one in given):
        return [tokenizer.encode(one) for one in given], False
    if all(isinstance(one, list) for one in given):
        return list(given), False
    return [given], True


def _spread(given: Any, count: int, param: str) -> list[Any]:
    """One value for each prompt: a list as it is, a single value for all. Empty if nothing was given."""
    if given is None:
        return []
    if not isinstance(given, list):
        return [given] * count
    if len(given) != count:
        raise RequestError(f"{param} has {len(given)} entries for {count} prompts", param=param)
    return given


def _logprobs(wanted: bool | None, top: int, start: int) -> tuple[int | None, int | None]:
    if not wanted:
        return None, None
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        raise RequestError(f"at most {MAX_TOP_LOGPROBS} alternatives per token can be returned, not {top}")
    if start < -1:
        raise RequestError("logprob_start_len must be at least -1", param="logprob_start_len")
    return top, None if start < 0 else start


def _rids(body: _Bootstrap, count: int) -> list[str]:
    given = body.rid
    if given is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(given, str):
        return [given] if count == 1 else [f"{given}_{at}" for at in range(count)]
    rids: list[str] = _spread(given, count, "rid")
    if len(set(rids)) != count:
        raise RequestError("rid has the same id twice", param="rid")
    return rids


def _rooms(body: _Bootstrap, count: int) -> list[Room | None]:
    given = body.bootstrap_room
    if given is None:
        return [None] * count
    numbers = given if isinstance(given, list) else [given + at for at in range(count)]
    hosts = _spread(body.bootstrap_host, count, "bootstrap_host")
    ports = _spread(body.bootstrap_port, count, "bootstrap_port") or [None] * count
    if len(numbers) != count or not hosts:
        raise RequestError(
            "bootstrap_host, bootstrap_port and bootstrap_room are needed together, one per prompt",
            param="bootstrap_room",
        )
    return [_room(*one) for one in zip(hosts, ports, numbers, strict=True)]


def _room(host: str, port: int | None, number: int) -> Room:
    port = 8998 if port is None else port  # SGLang's default
    host = host.rpartition("@")[2]  # as in a URL: what stands before it is not part of the place
    if not host or not 0 < port < 1 << 16:
        raise RequestError("bootstrap_host or bootstrap_port is no address", param="bootstrap_host")
    if not 0 <= number < 1 << 63:
        raise RequestError("bootstrap_room must be an integer of 63 bits", param="bootstrap_room")
    return Room(host, port, number)
