"""How a stream that broke goes on: whether it can, what another engine is asked for, and how two streams become one. Pure.

Theory of operation. A stream of which the client has heard something cannot be begun anew. Its journal holds what was said; the ids of
the prompt and of what was said make a new, longer prompt, and another pair answers that with what is left of the token limit:

    prompt ids P ── engine A says E (text: what the client has) ──X
    prompt ids P + E ──────────────────────────────── engine B says the rest ──► rewritten: A's id, no second role, usage of both

Where the engine tells the ids of its tokens (the native route; the embedded engine on all routes) E is exactly what A computed, and a
greedy or position-seeded answer is the one that an uncut run gives. Where it does not (SGLang on the OpenAI routes) E is the text
tokenized again: no character is lost or said twice, but a model that had chosen another tokenization of the same text may go on
differently.

E never ends inside of a character, nor behind what the client has seen: its text is a beginning of the text that was passed on, and what B
says again of that text is `overlap`, which is not passed on a second time. A stop string that begins in A's text and ends in B's is looked
for here, because B sees A's text as a prompt.

What cannot be continued is a table below, with the reasons. Whole answers need none of this: they are asked for anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from disagg.errors import EngineError
from disagg.router.journal import Said
from disagg.router.openai import DEFAULT_TOKENS, Route, encode_event, parse_event

_TOKENIZED = (
    "messages",
    "tools",
    "tool_choice",
    "reasoning",
    "reasoning_effort",
    "thinking",
    "task",
    "continue_final_message",
    "chat_template_kwargs",
)
"""What the ids of a chat depend on. `add_generation_prompt` is none of them: a chat does not know it, /v1/tokenize does."""
_NEUTRAL = {
    "repetition_penalty": (None, 1, 1.0),
    "response_format": (None, {"type": "text"}),
    "beam_width": (None, 1),
}

Fields = Mapping[str, Any]


class Obstacle(NamedTuple):
    """A feature whose state another engine cannot take over."""

    name: str
    why: str
    is_there: Callable[[Fields], bool]


def _any_of(*names: str) -> Callable[[Fields], bool]:
    return lambda fields: any(fields.get(n) not in _NEUTRAL.get(n, (None, 0, False, "", [], {})) for n in names)


def _messages(fields: Fields) -> list[Fields]:
    return [m for m in fields.get("messages") or () if isinstance(m, dict)]


def _tools(fields: Fields) -> bool:
    offered = fields.get("tools") or any(m.get("tools") for m in _messages(fields))
    return bool(offered) and fields.get("tool_choice") != "none"


def _logprobs(fields: Fields) -> bool:
    asked = fields.get("logprobs")  # 0 of a completion asks for those of the tokens themselves
    return (asked is not None and asked is not False) or _any_of("return_logprob")(fields)


def _media(fields: Fields) -> bool:
    contents = [m.get("content") for m in _messages(fields)]
    parts = [part for c in contents if isinstance(c, list) for part in c]
    return any(not isinstance(p, dict) or p.get("type") != "text" for p in parts)


OBSTACLES = (
    Obstacle(
        "grammar",
        "a constraint on the whole answer would begin anew in its middle",
        _any_of("response_format", "regex", "ebnf", "json_schema", "structural_tag"),
    ),
    Obstacle("tools", "a tool call may be half parsed", _tools),
    Obstacle(
        "penalties",
        "they count the tokens of the answer, which would be part of the prompt then",
        _any_of("frequency_penalty", "presence_penalty", "repetition_penalty"),
    ),
    Obstacle("min_tokens", "it counts from the answer's beginning", _any_of("min_tokens", "min_new_tokens")),
    Obstacle(
        "logprobs",
        "they were told for tokens that are computed again, or at positions that would shift",
        _logprobs,
    ),
    Obstacle("custom processor", "it may hold state", _any_of("custom_logit_processor", "custom_params", "session_params")),
    Obstacle("watermark", "it is drawn from the tokens of the answer", _any_of("watermark")),
    Obstacle("thinking budget", "it counts from the answer's beginning", _any_of("max_thinking_tokens")),
    Obstacle("stop_regex", "a match may begin before the seam", _any_of("stop_regex")),
    Obstacle(
        "stop strings that are kept",
        "what is told of them depends on where they begin",
        _any_of("no_stop_trim", "include_stop_str_in_output"),
    ),
    Obstacle("echo", "the prompt would be told again", _any_of("echo", "suffix", "best_of")),
    Obstacle(
        "per-token returns",
        "they were told for tokens that are computed again",
        _any_of(
            "return_hidden_states",
            "return_routed_experts",
            "return_indexer_topk",
            "return_sampling_mask",
            "sampling_logprobs_mode",
            "return_entropy",
            "return_token_ids",
            "return_output_ids_in_sglext",
        ),
    ),
    Obstacle(
        "returns of the whole request",
        "they would tell of the continuation alone",
        _any_of("return_prompt_token_ids", "return_input_ids_in_sglext", "return_cached_tokens_details", "return_spec_tokens_details"),
    ),
    Obstacle("media", "only text can be tokenized again", _media),
    Obstacle(
        "media data",
        "only text can be tokenized again",
        _any_of("image_data", "audio_data", "video_data", "positional_embed_overrides"),
    ),
    Obstacle("beam search", "its candidates are gone", _any_of("beam_width", "use_beam_search")),
)
"""What keeps a stream from going on; a stream of several prompts, or one that holds tool calls or reasoning, cannot either."""


OBSTACLE_NAMES = tuple(o.name for o in OBSTACLES)
"""For the documentation: each of them is told to the client in the sentence of the error event."""


def sampling_of(route: Route, fields: Fields) -> Fields:
    """Where the sampling parameters stand: in the body, or in an object of their own on the native route."""
    return (fields.get("sampling_params") or {}) if route is Route.GENERATE else fields


def why_not(route: Route, fields: Fields, said: Said) -> str:
    """What keeps this stream from going on, one clause; empty when nothing does."""
    if said.opaque:
        return "it held more than text"
    if route is Route.GENERATE:
        fields = {**fields, **sampling_of(route, fields)}
    found = next((o for o in OBSTACLES if o.is_there(fields)), None)
    return "" if found is None else f"it uses {found.name} ({found.why})"


def question(route: Route, fields: Fields) -> tuple[Sequence[int] | None, dict[str, Any]]:
    """The prompt's ids where the client sent them, else what ``/v1/tokenize`` is asked for them."""
    given = fields.get("prompt") if route is Route.COMPLETIONS else fields.get("input_ids")
    if isinstance(given, list):
        return given, {}
    model = {"model": fields["model"]} if fields.get("model") else {}
    if route is Route.CHAT:
        return None, {**model, **{k: fields[k] for k in _TOKENIZED if fields.get(k) is not None}}
    return None, {**model, "prompt": given if route is Route.COMPLETIONS else fields["text"]}


def token_limit(route: Route, fields: Fields) -> int | None:
    """How many tokens the whole answer may have; None for as many as fit.

    Of a chat's two limits SGLang takes `max_completion_tokens`; an explicit null on the native route means as many as fit.
    """
    if route is Route.GENERATE:
        sampling = sampling_of(route, fields)
        return sampling["max_new_tokens"] if "max_new_tokens" in sampling else DEFAULT_TOKENS[route]
    found = (fields.get("max_completion_tokens") if route is Route.CHAT else None) or fields.get("max_tokens")
    return found or DEFAULT_TOKENS[route]


def stops_of(route: Route, fields: Fields) -> tuple[str, ...]:
    """The stop strings."""
    found = sampling_of(route, fields).get("stop") or ()
    return (found,) if isinstance(found, str) else tuple(str(s) for s in found)


def continued(route: Route, fields: Fields, ids: Sequence[int], left: int | None) -> dict[str, Any]:
    """The body for the engine that goes on.

    Args:
        route: where the client's request came in.
        fields: of its body.
        ids: of the prompt and of what was said.
        left: tokens that the answer may still have; None for as many as fit.
    """
    body = dict(fields)
    if route is Route.GENERATE:
        body.pop("text", None)
        return {**body, "input_ids": list(ids), "sampling_params": {**sampling_of(route, fields), "max_new_tokens": left}}
    if route is Route.COMPLETIONS:
        return {**body, "prompt": list(ids), "max_tokens": left}
    body.pop("max_completion_tokens", None)
    body.pop("max_tokens", None)
    return {**body, "input_ids": list(ids)} | ({} if left is None else {"max_completion_tokens": left})


def aligned(text: str, prefixes: Mapping[int, str]) -> int | None:
    """How many ids can be taken over: the most whose text is a beginning of what was passed on.

    Args:
        text: what was passed on.
        prefixes: numbers of ids, with the text of so many.
    """
    return max((n for n, prefix in prefixes.items() if text.startswith(prefix)), default=None)


class Seam:
    """Two streams made one: what engine B says, as if A had said it.

    Args:
        said: what A said.
        prompt: how many ids the client's prompt has.
        taken: how many ids of the answer B was given.
        overlap: the end of A's text that B will say again.
        text: of the ids that B was given; native route only.
        stops: the stop strings.
        include_usage: the client asked for a usage chunk.

    Attributes:
        stopped: a stop string was found across the seam: B is to be aborted, and `closing` ends the answer.
    """

    def __init__(
        self,
        route: Route,
        said: Said,
        *,
        prompt: int,
        taken: Sequence[int],
        overlap: str = "",
        text: str = "",
        stops: Sequence[str] = (),
        include_usage: bool = False,
    ) -> None:
        self.stopped = ""
        self._route = route
        self._said = said
        self._prompt = prompt
        self._taken = list(taken)
        self._overlap = overlap
        self._text = text
        self._stops = stops
        self._include_usage = include_usage
        self._reach = max((len(s) for s in stops), default=1) - 1
        before = said.text[: len(said.text) - len(overlap)] if overlap else said.text
        self._tail = before[-self._reach :] if self._reach else ""
        self._seen = ""
        self._made = 0

    def rewrite(self, event: bytes) -> bytes:
        """One event of B as the client is to see it; empty when there is nothing to be passed on.

        Raises:
            EngineError: it is not what the route promises.
        """
        value = parse_event(event)
        if value is None:
            return b""
        try:
            made = self._natively(value) if self._route is Route.GENERATE else self._openai(value)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise EngineError("the engine that went on sent an event that is not in the shape of its route") from error
        return b"" if made is None else encode_event(made)

    # --- the native route: each event repeats everything

    def _natively(self, value: dict[str, Any]) -> dict[str, Any] | None:
        info = value["meta_info"]
        taken = len(self._taken)
        whole = self._text + value["text"]
        self._made = info["completion_tokens"]
        if len(value["output_ids"]) != self._made:
            raise EngineError("the engine that went on sends pieces of its answer, where the whole of it is known to come")
        if whole[: len(self._said.text)] != self._said.text[: len(whole)]:
            raise _other_words()
        value["output_ids"] = self._taken + value["output_ids"]
        info["id"] = self._said.first["meta_info"]["id"]
        info["prompt_tokens"] -= taken
        info["completion_tokens"] += taken
        if "cached_tokens" in info:
            info["cached_tokens"] = min(info["cached_tokens"], info["prompt_tokens"])
        finish = info.get("finish_reason")
        if isinstance(finish, dict) and "length" in finish:
            finish["length"] += taken
        self._seen = value["text"]
        if (at := self._stop_across()) is not None:
            whole = self._text[: len(self._text) - len(self._tail) + at]
            info["finish_reason"] = {"type": "stop", "matched": self.stopped}
        value["text"] = whole
        if len(whole) < len(self._said.text) and info.get("finish_reason") is None:
            return None  # the client has seen more than that
        return value

    # --- OpenAI's routes: each event holds what is new

    def _openai(self, value: dict[str, Any]) -> dict[str, Any] | None:
        first = self._said.first
        value |= {k: first[k] for k in ("id", "created", "model") if k in first}
        if usage := value.get("usage"):
            taken = len(self._taken)
            usage["prompt_tokens"] -= taken
            usage["completion_tokens"] += taken
            if details := usage.get("prompt_tokens_details"):
                details["cached_tokens"] = min(details.get("cached_tokens") or 0, usage["prompt_tokens"])
        if not value["choices"]:
            return value
        choice = value["choices"][0]
        holder, key = (choice["delta"], "content") if self._route is Route.CHAT else (choice, "text")
        piece = (holder.get(key) if self._route is Route.CHAT else holder[key]) or ""
        ids = choice.get("token_ids")
        self._made += len(ids) if ids is not None else bool(piece)
        more = self._route is Route.CHAT and any(holder.get(k) for k in holder.keys() - {"role", "content"})
        if more and self._said.text:
            raise EngineError("the engine that went on said more than text")
        if piece:
            piece = holder[key] = self._new(piece)
            if self.stopped:
                choice["finish_reason"], choice["matched_stop"] = "stop", self.stopped
        holder.pop("role", None)
        return value if piece or ids or more or choice.get("finish_reason") else None

    def _new(self, piece: str) -> str:
        """What of B's text the client has not seen."""
        if len(self._seen) < self._reach:
            self._seen += piece
            if self._stop_across() is not None:
                return ""  # as from an engine that finds the string whole: its beginning was passed on long ago
        if self._overlap:
            known = min(len(self._overlap), len(piece))
            if not self._overlap.startswith(piece[:known]):
                raise _other_words()
            self._overlap, piece = self._overlap[known:], piece[known:]
        return piece

    def _stop_across(self) -> int | None:
        """Where a stop string begins that begins in A's text and ends in B's, counted in the tail of A's text; None without one."""
        window = self._tail + self._seen[: self._reach]
        found = [(at, s) for s in self._stops if 0 <= (at := window.find(s)) < len(self._tail)]
        if not found:
            return None
        at, self.stopped = min(found)
        return at

    # --- the end

    def closing(self) -> bytes:
        """What is missing after the last text: the finish reason where none was told, usage where it was asked for. Without `[DONE]`."""
        return closing(
            self._route, self._said, finish="", prompt=self._prompt, made=len(self._taken) + self._made, usage=self._include_usage
        )


def _other_words() -> EngineError:
    return EngineError("the engine that went on said something else than the one that broke")


def closing(route: Route, said: Said, *, finish: str, prompt: int, made: int, usage: bool) -> bytes:
    """The events that end an answer whose text is complete. Without `[DONE]`.

    Args:
        route: of the stream.
        said: what it said.
        finish: why it ended, where the client was not told yet; else empty.
        prompt: tokens of the prompt.
        made: tokens of the answer.
        usage: the client asked for a usage chunk, and has none yet.
    """
    if route is Route.GENERATE:
        if not finish:
            return b""
        info = {**said.first["meta_info"], "finish_reason": {"type": finish, "length": made}}
        return encode_event({**said.first, "meta_info": info})
    events = b""
    first = {**said.first, "usage": None}
    if finish:
        empty: dict[str, Any] = {"delta": {}} if route is Route.CHAT else {"text": ""}
        events = encode_event(
            {**first, "choices": [{"index": 0, **empty, "logprobs": None, "finish_reason": finish, "matched_stop": None}]}
        )
    if usage:
        counts = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        events += encode_event({**first, "choices": [], "usage": counts})
    return events


def decode_fields(rest: bytes) -> dict[str, Any]:
    """A body without its opening brace, as a dict."""
    return msgspec.json.decode(b"{" + rest, type=dict[str, Any])
