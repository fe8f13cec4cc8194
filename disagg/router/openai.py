"""The shapes of the public listener: requests checked and prepared, errors and events written. Pure.

A request body is parsed once, typed, and only as far as the router must understand it: prompts stay raw bytes. The router's own keys are
spliced in front of the client's bytes, so that unknown fields and the client's number formats reach the engine untouched. Only when a
client sent one of the router's keys itself (``rid``, ``bootstrap_*``) is the body encoded anew.

Sources: OpenAI API reference; SGLang 0.5.23 ``entrypoints/openai/protocol.py`` and ``managers/io_struct.py`` for the native route.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import accumulate
from typing import Annotated, Any

import msgspec

from disagg.errors import DisaggError, EngineError, EngineRefusedError, RequestError
from disagg.policy.history import names_of
from disagg.policy.prefix import IDS_NAMED, Ids

MAX_DEPTH = 64
MAX_SAMPLES = 64
MAX_PROMPTS = 1024
MAX_NESTED = 65_536
"""Lists and objects in one body: a prompt of any length has few of them, and each one costs an engine a Python object."""
MAX_MEMBERS = 16_384
"""Members of objects in a body that must be encoded anew, because it has keys of the router's or asks for several samples."""

DONE_EVENT = b"data: [DONE]\n\n"

_Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_SAMPLES)]
_Tokens = Annotated[int, msgspec.Meta(ge=1)]
_Probability = Annotated[float, msgspec.Meta(gt=0, le=1)]
_EMPTY = msgspec.Raw(b"")
_NULL = re.compile(rb"null")
_LIST_OF_PROMPTS = re.compile(rb'\[\s*["\[\]]')
_LIST_OF_STRINGS = re.compile(rb"\[,*+\]")  # these two look at a list without blanks, strings and digits
_OTHER_ROOTS = (b'"cache_salt"', b'"extra_key"', b'"lora_path"')
"""With one of these an engine keeps equal tokens apart, and what it holds of others is none of this prompt."""
_OPENING_BRACKET = ord("[")
_IDS_BYTES = 8 * IDS_NAMED
_REST_OF_IDS = re.compile(rb"[0-9,\s]*\]\s*")
_TOKEN_IDS = msgspec.json.Decoder(list[int])
_LIST_OF_IDS = re.compile(rb"\[\[,*+\](?:,\[,*+\])*+\]")


class Route(StrEnum):
    """The generation routes, named by their path."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    GENERATE = "/generate"


DEFAULT_TOKENS: Mapping[Route, int | None] = {Route.CHAT: None, Route.COMPLETIONS: 16, Route.GENERATE: 128}
"""How long an answer may be when the client does not say: SGLang 0.5.23's defaults; None is what the context holds."""


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _OwnKeys(msgspec.Struct):
    """Keys that only the router may set; a client's values are dropped."""

    rid: msgspec.Raw = _EMPTY
    bootstrap_host: msgspec.Raw = _EMPTY
    bootstrap_port: msgspec.Raw = _EMPTY
    bootstrap_room: msgspec.Raw = _EMPTY
    bootstrap_pair_key: msgspec.Raw = _EMPTY
    disagg_prefill_dp_rank: msgspec.Raw = _EMPTY


_OWN_KEYS = tuple(_OwnKeys.__struct_fields__)  # a subclass has them first, too
_NO_OWN_KEYS = (_EMPTY,) * len(_OWN_KEYS)


class _OpenAiFields(_OwnKeys):
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: _Count | None = None
    seed: int | None = None
    max_tokens: _Tokens | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: _Probability | None = None


class _ChatFields(_OpenAiFields):
    messages: msgspec.Raw = _EMPTY
    input_ids: msgspec.Raw = _EMPTY
    max_completion_tokens: _Tokens | None = None


class _CompletionFields(_OpenAiFields):
    prompt: msgspec.Raw = _EMPTY


class _GenerateFields(_OwnKeys):
    model: str | None = None
    text: msgspec.Raw = _EMPTY
    input_ids: msgspec.Raw = _EMPTY
    input_embeds: msgspec.Raw = _EMPTY
    stream: bool | None = None
    sampling_params: msgspec.Raw = _EMPTY
    return_logprob: bool | list[bool] | None = None


class _SamplingFields(msgspec.Struct):
    n: _Count | None = None
    max_new_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = DEFAULT_TOKENS[Route.GENERATE]  # null: as many as fit
    sampling_seed: int | None = None


_DECODERS: Mapping[Route, msgspec.json.Decoder[Any]] = {
    Route.CHAT: msgspec.json.Decoder(_ChatFields),
    Route.COMPLETIONS: msgspec.json.Decoder(_CompletionFields),
    Route.GENERATE: msgspec.json.Decoder(_GenerateFields),
}
_PATHS = {route: route.value for route in Route}
_SAMPLING = msgspec.json.Decoder(_SamplingFields)


class ClientRequest:
    """A checked request.

    Attributes:
        route, path: where it came in; the engines get it at the same path.
        model: the model asked for, empty if the client named none.
        rest: the client's JSON object without its opening brace, ready to have the router's keys put in front.
        stream: whether the answer is an event stream.
        samples: ``n``, answers wanted for each prompt.
        prompts: None for one prompt, else the length of the prompt list (then rooms and rids are lists of that length too).
        include_usage: whether the stream ends with a usage chunk.
        merge_logprobs: whether prefill's input logprobs belong in front of decode's.
        max_tokens: how long one answer may become; None if the client leaves it open.
        names: of the blocks of its prompt, see `disagg.policy.history`; empty where nobody asked for them, or for a list of prompts.
        ids: of its prompt, where the client sent token ids and somebody asked for them.
        prompt_bytes: of its prompt; 0 for a list of prompts.
        tokens: of its prompt, where the client sent these; 0 where they are not known.
    """

    __slots__ = (
        "ids",
        "include_usage",
        "max_tokens",
        "merge_logprobs",
        "model",
        "names",
        "path",
        "prompt_bytes",
        "prompts",
        "rest",
        "route",
        "samples",
        "stream",
        "tokens",
    )

    def __init__(self, route: Route, model: str, rest: bytes, *, stream: bool) -> None:
        self.route = route
        self.path = _PATHS[route]
        self.model = model
        self.rest = rest
        self.stream = stream
        self.samples = 1
        self.prompts: int | None = None
        self.include_usage = False
        self.merge_logprobs = False
        self.max_tokens: int | None = None
        self.names: Sequence[int] = ()
        self.ids: Ids | None = None
        self.prompt_bytes = 0
        self.tokens = 0


def parse_request(route: Route, body: bytes, *, named: bool = False, with_ids: bool = False) -> ClientRequest:
    """Checks a body and takes from it what the router must know.

    Args:
        route: where it came in.
        body: as it came.
        named: the blocks of its prompt are to be named.
        with_ids: and its token ids to be read, if it has some.

    Raises:
        RequestError: the body is not JSON, not an object, too deep, or a field has a wrong type or value.
    """
    try:
        fields = _DECODERS[route].decode(body)
        if not body.isascii():
            _check_utf8(body)  # msgspec skips the inside of raw strings: a wrong byte in a prompt is found here
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        code = "invalid_value" if isinstance(error, msgspec.ValidationError) else "invalid_json"
        raise RequestError(_why_undecodable(error), code=code, param=_param_of(error)) from error
    _check_nesting(body)
    rest = _without_own_keys(fields, body)
    request = ClientRequest(route, fields.model or "", rest, stream=bool(fields.stream))
    prompt = _note_generate(request, fields) if route is Route.GENERATE else _note_openai(request, fields)
    if request.prompts is None:
        text = memoryview(prompt)
        request.prompt_bytes = len(text)
        shared = (named or with_ids) and not any(key in body for key in _OTHER_ROOTS)
        if named and shared:
            request.names = names_of(text)
        if route is not Route.CHAT and text[0] == _OPENING_BRACKET:
            ids = bytes(text)
            request.tokens = ids.count(b",") + 1
            if with_ids and shared:
                request.ids = _ids_of(ids)
    if request.prompts is not None and not 1 <= request.prompts <= MAX_PROMPTS:
        raise RequestError(f"a prompt list holds 1 to {MAX_PROMPTS} prompts, this one {_at_least(request.prompts)}", param="prompt")
    if request.samples > 1:
        _check_members(body)
    return request


def _ids_of(text: bytes) -> Ids | None:
    """The token ids of a prompt; None where they are none: that is the engine's to refuse."""
    if len(text) > _IDS_BYTES and not _REST_OF_IDS.fullmatch(text, _IDS_BYTES):
        return None
    count = text.count(b",") + 1
    if len(text) > _IDS_BYTES:
        text = text[: max(0, text.rfind(b",", 0, _IDS_BYTES))] + b"]"
    try:
        tokens = _TOKEN_IDS.decode(text)
        return Ids(tokens, count) if tokens else None
    except (msgspec.DecodeError, OverflowError):
        return None


def _at_least(prompts: int) -> str:
    return f"{MAX_PROMPTS + 1} or more" if prompts > MAX_PROMPTS else str(prompts)


def _why_undecodable(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"the body is nested deeper than {MAX_DEPTH} levels"
    if isinstance(error, msgspec.ValidationError):
        return f"the body has a field of the wrong type or range: {error}"
    if isinstance(error, UnicodeDecodeError):
        return f"the body is not valid UTF-8 (byte {error.start})"
    return f"the body is not valid JSON: {error}"


def _param_of(error: Exception) -> str | None:
    _, at, path = str(error).rpartition("`$.")
    return path.rstrip("`") if at and isinstance(error, msgspec.ValidationError) else None


# --- looks at large bodies. They run in a thread, which needs the interpreter's lock for one piece at a time.

_SMALL = 1024  # bytes.count looks at each byte, bytes.find at 16 or more at once, but costs a call for each bracket
_PIECE = 64 * 1024
_ALL = bytes(range(256))
_NO_BRACKETS = bytes(sorted({*_ALL} - {*b'[]{}"'}))
_NO_COLONS = bytes(sorted({*_ALL} - {*b':"'}))
_BLANKS = b" \t\r\n"
_STEPS = tuple({**dict.fromkeys(b"[{", 1), **dict.fromkeys(b"]}", -1)}.get(byte, 0) for byte in range(256))


def _check_utf8(body: bytes) -> None:
    """Raises UnicodeDecodeError. Not the whole body at once: text takes up to four times the memory of its bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, len(body), _PIECE):
        try:
            decoder.decode(body[at : at + _PIECE], final=at + _PIECE >= len(body))
        except UnicodeDecodeError as error:
            start = at + error.start - (len(error.object) - len(body[at : at + _PIECE]))  # it kept the beginning of a cut character
            raise UnicodeDecodeError("utf-8", error.object, max(0, start), max(0, start) + 1, error.reason) from error


def _outside_strings(text: bytes, drop: bytes) -> Iterator[bytes]:
    """What stands outside of strings, in pieces, without the bytes in `drop`; `text` is JSON whose syntax was checked.

    Removing two quotes side by side never moves a byte into a string or out of one, so most strings are gone before any is looked at.
    """
    inside, carry = 0, b""
    for at in range(0, len(text), _PIECE):
        piece = carry + text[at : at + _PIECE]
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"")
            carry = b"\\" if piece.endswith(b"\\") else b""
            piece = piece[: len(piece) - len(carry)].replace(b'\\"', b"")
        parts = piece.translate(None, drop).replace(b'""', b"").split(b'"')
        yield b"".join(parts[inside::2])
        inside ^= ~len(parts) & 1


def _check_nesting(body: bytes) -> None:
    """Refuses deep nesting. Fewer than ``MAX_DEPTH`` opening brackets cannot be deep, which settles most bodies by a few memchr."""
    if _fewer_than(MAX_DEPTH, body, b"[") and _fewer_than(MAX_DEPTH, body, b"{"):
        return
    depth = nested = 0
    for brackets in _outside_strings(body, _NO_BRACKETS):
        depths = [depth, *accumulate(map(_STEPS.__getitem__, brackets), initial=depth)]
        depth = depths[-1]
        nested += len(brackets)
        if max(depths) > MAX_DEPTH:
            raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")
        if nested > 2 * MAX_NESTED:
            raise RequestError(f"the body holds more than {MAX_NESTED} lists and objects", code="invalid_json")


def _fewer_than(limit: int, body: bytes, byte: bytes) -> bool:
    if len(body) < _SMALL:
        return body.count(byte) < limit // 2
    at = -1
    for _ in range(limit // 2):
        at = body.find(byte, at + 1)
        if at < 0:
            return True
    return False


def _check_members(body: bytes) -> None:
    """Refuses what would take long to encode anew."""
    if body.count(b":") <= MAX_MEMBERS:
        return
    members = 0
    for colons in _outside_strings(body, _NO_COLONS):
        members += len(colons)
        if members > MAX_MEMBERS:
            raise RequestError(
                f"a body with `rid`, `bootstrap_…` or `n` may have {MAX_MEMBERS} fields, inner ones included", code="invalid_json"
            )


def _without_own_keys(fields: _OwnKeys, body: bytes) -> bytes:
    if msgspec.structs.astuple(fields)[: len(_OWN_KEYS)] != _NO_OWN_KEYS:
        _check_members(body)
        kept = {k: v for k, v in msgspec.json.decode(body, type=dict[str, msgspec.Raw]).items() if k not in _OWN_KEYS}
        body = msgspec.json.encode(kept)
    rest = body[1:] if body[:1] == b"{" else body.lstrip()[1:]
    return rest.lstrip() if rest[:_MANY_BLANKS].isspace() else rest  # else each attempt would look for the first field among them


_MANY_BLANKS = 64


def _note_openai(request: ClientRequest, fields: Any) -> msgspec.Raw:
    """Takes what the router must know; returns the prompt."""
    request.samples = fields.n or 1
    request.include_usage = bool(fields.stream_options and fields.stream_options.include_usage)
    if request.route is Route.COMPLETIONS:
        if not _given(fields.prompt):
            raise RequestError("`prompt` is missing: send a string, a list of strings or token ids", param="prompt")
        _check_start(fields.prompt, b'"[', "prompt")
        request.prompts = _list_length(fields.prompt)
        request.max_tokens = fields.max_tokens or DEFAULT_TOKENS[Route.COMPLETIONS]
        return fields.prompt  # type: ignore[no-any-return]
    if not _given(fields.messages):
        raise RequestError("`messages` is missing: send a list of {role, content} objects", param="messages")
    _check_start(fields.messages, b"[", "messages")
    request.max_tokens = fields.max_completion_tokens or fields.max_tokens
    return fields.messages  # type: ignore[no-any-return]


def _check_start(raw: msgspec.Raw, allowed: bytes, field: str) -> None:
    if memoryview(raw)[0] not in allowed:
        raise RequestError(f"`{field}` takes a list{' or a string' if len(allowed) > 1 else ''}", param=field)


def _given(raw: msgspec.Raw) -> bool:
    """True for a field that was sent and is not null."""
    return raw is not _EMPTY and not _NULL.fullmatch(memoryview(raw))  # a `Raw` never equals bytes


def _note_generate(request: ClientRequest, fields: _GenerateFields) -> msgspec.Raw:
    """Takes what the router must know; returns the prompt."""
    if _given(fields.input_embeds):
        raise RequestError("`input_embeds` cannot be handed over between engines: send text or input_ids", param="input_embeds")
    given = [raw for raw in (fields.text, fields.input_ids) if _given(raw)]
    if len(given) != 1:
        raise RequestError("send exactly one of `text` and `input_ids`", param="text")
    _check_start(given[0], b'"[', "text" if _given(fields.text) else "input_ids")
    request.prompts = _list_length(given[0])
    sampling = _sampling_fields(fields.sampling_params) or [_SamplingFields()]
    counts = {one.n or 1 for one in sampling}
    limits = {one.max_new_tokens for one in sampling}
    request.max_tokens = None if None in limits else max(filter(None, limits))
    if len(counts) > 1:
        raise RequestError("`n` must be the same in all of `sampling_params`", param="sampling_params")
    request.samples = counts.pop()
    logprob = fields.return_logprob
    request.merge_logprobs = any(logprob) if isinstance(logprob, list) else bool(logprob)
    return given[0]


def _sampling_fields(raw: msgspec.Raw) -> list[_SamplingFields]:
    if not _given(raw):
        return []
    try:
        if bytes(raw).lstrip()[:1] == b"[":
            return msgspec.json.decode(raw, type=list[_SamplingFields])
        return [_SAMPLING.decode(raw)]
    except msgspec.DecodeError as error:
        raise RequestError(f"`sampling_params` has a field of the wrong type or range: {error}", param="sampling_params") from error


def _list_length(raw: msgspec.Raw) -> int | None:
    """Length of a list of prompts; None for one prompt (a string, or a flat list of token ids). Not counted beyond ``MAX_PROMPTS``."""
    head = _LIST_OF_PROMPTS.match(memoryview(raw))
    if head is None:
        return None
    text = bytes(raw)
    shape = text.translate(None, b"0123456789-" + _BLANKS) if head[0].endswith(b"[") else _shape_of_strings(text)
    if _LIST_OF_IDS.fullmatch(shape) is not None:
        return shape.count(b"[") - 1
    if _LIST_OF_STRINGS.fullmatch(shape) is None:
        raise RequestError("a prompt list holds strings, or lists of token ids", param="prompt")
    return shape.count(b",") + 1 if head[0].endswith(b'"') else 0


def _shape_of_strings(text: bytes) -> bytes:
    shape = b""
    for piece in _outside_strings(text, _BLANKS):
        shape += piece
        if len(shape) > MAX_PROMPTS + 1:
            return b"[%s]" % (b"," * MAX_PROMPTS) if not shape.strip(b"[,]") else shape
    return shape


def key_prefix(keys: Mapping[str, Any], rest: bytes) -> bytes:
    """The router's keys with the opening brace, to be put in front of the client's fields.

    Args:
        keys: what the router adds.
        rest: a JSON object without its opening brace, as ``ClientRequest.rest``; it is only looked at.
    """
    head = msgspec.json.encode(keys)[:-1]
    empty = rest[:1] == b"}" or (rest[:1].isspace() and rest.lstrip()[:1] == b"}")
    return head if empty else head + b","


# --- answers


def error_object(sentence: str, *, kind: str, param: str | None = None, code: str | int | None = None) -> dict[str, Any]:
    """The OpenAI error object."""
    return {"error": {"message": sentence, "type": kind, "param": param, "code": code}}


def error_body(error: DisaggError) -> bytes:
    """The JSON body that tells a client about an error."""
    if isinstance(error, EngineRefusedError) and (passed := _engine_error(error)):
        return msgspec.json.encode(passed)
    return msgspec.json.encode(
        error_object(str(error), kind=error.kind, param=getattr(error, "param", None), code=getattr(error, "code", None))
    )


def _engine_error(error: EngineRefusedError) -> dict[str, Any] | None:
    """An engine's own error, brought into OpenAI's shape.

    SGLang answers ``{"object": "error", "message", "type", "param", "code"}`` on /v1 and ``{"error": {"message"}}`` on /generate.
    """
    try:
        answer = msgspec.json.decode(error.body, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return None
    inner = answer.get("error", answer)
    if not isinstance(inner, dict) or not isinstance(inner.get("message"), str):
        return None
    kind = inner.get("type")
    kind = error.kind if not isinstance(kind, str) or kind in {"BadRequestError", "BadRequest"} else kind
    code = inner.get("code")
    return error_object(inner["message"], kind=kind, param=inner.get("param"), code=None if code == error.status else code)


# What an engine puts into a stream when it fails: an error object, or on SGLang's native route an answer that was aborted. Inside of JSON
# strings quotes are escaped, so model text cannot look like either.
FAILURES = (b'data: {"error"', b':"abort"')


def may_hold_failure(events: bytes) -> bool:
    """A quick look whether an event may report a failure; `split_failure` says for certain."""
    return FAILURES[0] in events or FAILURES[1] in events


def split_failure(events: bytes) -> tuple[bytes, EngineRefusedError | None]:
    """Cuts whole events before the first one that reports a failure.

    Returns:
        What stands before it, and the failure with the status that the engine gave (400 where it gave none, 500 for an abort).
    """
    at = 0
    while at < len(events):
        end = events.find(b"\n\n", at) + 2 or len(events)
        event = events[at:end]
        if may_hold_failure(event) and (error := _failure(event)) is not None:
            return events[:at], error
        at = end
    return events, None


def is_json(text: bytes) -> bool:
    """True for well-formed JSON; its values are not built."""
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def split_garbage(events: bytes) -> tuple[bytes, bool]:
    """Cuts whole events before the first one whose data is not JSON, and says whether there is one."""
    at = 0
    while at < len(events):
        end = events.find(b"\n\n", at) + 2 or len(events)
        if events.startswith(b"data:", at):
            data = events[at + 5 : end].strip()
            if data != b"[DONE]" and not is_json(data):
                return events[:at], True
        at = end
    return events, False


def _failure(event: bytes) -> EngineRefusedError | None:
    try:
        value = parse_event(event)
    except EngineError:
        return EngineRefusedError("the engine reported an error that is not JSON", status=502)
    if value is None:
        return None
    if isinstance(error := value.get("error"), dict):
        code = error.get("code")
        status = code if isinstance(code, int) and 400 <= code <= 599 else 400
        return EngineRefusedError(str(error.get("message")), status=status, body=msgspec.json.encode({"error": error}))
    if isinstance(error, str) and error:
        return EngineRefusedError(error, status=502, body=msgspec.json.encode({"error": {"message": error}}))
    return _abort(value)


def _abort(value: dict[str, Any]) -> EngineRefusedError | None:
    """SGLang ends what it aborts like a good answer, but for the reason."""
    choices = value.get("choices")
    if isinstance(choices, list) and any(isinstance(c, dict) and c.get("finish_reason") == "abort" for c in choices):
        return EngineRefusedError("the engine aborted the request", status=500)
    info = value.get("meta_info")
    finish = info.get("finish_reason") if isinstance(info, dict) else None
    if not isinstance(finish, dict) or finish.get("type") != "abort":
        return None
    sentence = str(finish.get("message") or "the engine aborted the request")
    code = finish.get("status_code")
    status = code if isinstance(code, int) and 400 <= code <= 599 else 500
    return EngineRefusedError(sentence, status=status, body=msgspec.json.encode({"error": {"message": sentence}}))


def error_event(error: DisaggError) -> bytes:
    """The one event that ends a broken stream. ``[DONE]`` never follows it."""
    return b"data: " + _one_line(error_body(error)) + b"\n\n"


def _one_line(text: bytes) -> bytes:
    """JSON in which nothing ends a line for any reader. JSON itself escapes CR and LF; some readers of events cut at these three, too."""
    if text.isascii():
        return text
    return text.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029").replace(b"\xc2\x85", b"\\u0085")


def parse_event(event: bytes) -> dict[str, Any] | None:
    """The JSON object of one server-sent event; None for ``[DONE]``, comments and what is not an object.

    Raises:
        EngineError: its data is not JSON.
    """
    if not event.startswith(b"data:"):
        return None
    payload = event[5:].strip()
    if payload == b"[DONE]":
        return None
    try:
        value = msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError) as error:
        raise EngineError("an engine sent an event that is not JSON") from error
    return value if isinstance(value, dict) else None


def encode_event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _one_line(msgspec.json.encode(value)) + b"\n\n"


def models_body(models: Mapping[str, int], *, created: int) -> bytes:
    """The answer of ``GET /v1/models``.

    Args:
        models: served model name -> context length in tokens (0: unknown).
        created: Unix seconds.
    """
    data = [
        {"id": name, "object": "model", "created": created, "owned_by": "disagg"} | ({"max_model_len": context} if context else {})
        for name, context in sorted(models.items())
    ]
    return msgspec.json.encode({"object": "list", "data": data})
