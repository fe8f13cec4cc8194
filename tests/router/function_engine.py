"""An engine that is a function: its next token is a hash of all ids so far. It renders events as SGLang and the embedded engine do.

Nothing of it is shared with the code under test: texts, stop strings and events are made here anew.
"""

from __future__ import annotations

import codecs
import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from disagg.router.openai import Route

DONE = b"data: [DONE]\n\n"
CHARACTERS = ("é", "ß", "€", "\N{REPLACEMENT CHARACTER}", "漢", "🐚", "👩")  # U+FFFD is a character like any other
WORDS = ("a", "b", "ab", "ba", " ", "st", "op", "o", "p", "stop", '"', "\\", "\n\n", "é", "漢a")
EOS_TEXT = "<eos>"


class Vocabulary:
    """Tokens are bytes: words, and the single bytes of characters, so that characters are split over tokens.

    Args:
        mixed: there are tokens that hold a whole character and the first bytes of another one.
    """

    def __init__(self, words: Sequence[str] = WORDS, *, mixed: bool = True) -> None:
        pieces = [w.encode() for w in words]
        singles = sorted({bytes([b]) for c in (*CHARACTERS, *words) for b in c.encode()})
        pieces += singles
        if mixed:
            pieces += ["€".encode()[1:] + b"a", b"b" + "🐚".encode()[:2], "🐚".encode()[2:] + "é".encode()[:1]]
        self.pieces = [b"", *dict.fromkeys(pieces)]  # the first one ends an answer
        self.eos = 0
        self.by_bytes = {p: i for i, p in enumerate(self.pieces)}
        self.longest = max(map(len, self.pieces))
        self.after = functools.lru_cache(maxsize=None)(self._after)

    def encode(self, text: str) -> list[int]:
        """The longest match first."""
        raw, ids = text.encode(), []
        while raw:
            size = next(n for n in range(self.longest, 0, -1) if n <= len(raw) and raw[:n] in self.by_bytes)
            ids.append(self.by_bytes[raw[:size]])
            raw = raw[size:]
        return ids

    def bytes_of(self, ids: Sequence[int], *, special: bool = False) -> bytes:
        return b"".join(EOS_TEXT.encode() if special and i == self.eos else self.pieces[i] for i in ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return self.bytes_of(ids, special=special).decode(errors="replace")

    def _after(self, unfinished: bytes) -> tuple[int, ...]:
        """The tokens that may come where a character has these bytes so far: such as finish it, mostly."""
        if not unfinished:
            return tuple(i for i, p in enumerate(self.pieces) if i != self.eos and (p[0] < 0x80 or p[0] >= 0xC0))
        fitting = []
        for i, piece in enumerate(self.pieces):
            try:
                codecs.getincrementaldecoder("utf-8")().decode(unfinished + piece)
            except UnicodeDecodeError:
                continue
            if piece and any(c.encode().startswith((unfinished + piece)[: len(c.encode())]) for c in CHARACTERS):
                fitting.append(i)
        return tuple(fitting) or (self.by_bytes[b"a"],)


class Asked(NamedTuple):
    """What a request asks for, the same on all routes."""

    prompt: Sequence[int]
    limit: int
    stops: Sequence[str]
    ignore_eos: bool
    special: bool
    include_usage: bool


class Step(NamedTuple):
    """What one event tells: everything so far."""

    text: str
    ids: Sequence[int]
    finish: Mapping[str, Any] | None


class FunctionEngine:
    """An engine.

    Args:
        with_ids: chunks carry ``token_ids``, and the role comes with the first token, as from the embedded engine; else as from SGLang.
        by_text: the next token depends on the text alone, not on how it was tokenized.
        holds_back: what may be the beginning of a stop string is not told until that is known.
        at_once: tokens in one event.
        context: tokens of prompt and answer together.
        eos_of: one of so many tokens ends an answer.
        broken_of: one of so many tokens breaks a character.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        with_ids: bool,
        by_text: bool = False,
        holds_back: bool = False,
        at_once: int = 1,
        context: int = 4096,
        eos_of: int = 64,
        broken_of: int = 16,
        seed: int = 0,
    ) -> None:
        self.vocabulary = vocabulary
        self.with_ids = with_ids
        self.by_text = by_text
        self.holds_back = holds_back
        self.at_once = at_once
        self.context = context
        self.eos_of = eos_of
        self.broken_of = broken_of
        self.seed = seed
        self.runs = 0
        self._known: dict[Asked, list[Step]] = {}

    # --- the function

    def next(self, ids: Sequence[int], *, ignore_eos: bool) -> int:
        vocabulary = self.vocabulary
        raw = vocabulary.bytes_of(ids[-8:])
        known = vocabulary.bytes_of(ids) if self.by_text else b",".join(b"%d" % i for i in ids)
        chance = zlib.crc32(b"%d:" % self.seed + known)
        unfinished = _unfinished(raw)
        if not unfinished and (chance >> 8) % self.eos_of == 0:
            return vocabulary.eos
        if unfinished and (chance >> 8) % self.broken_of == 0:
            return vocabulary.by_bytes[b"a"]
        fitting = vocabulary.after(unfinished)
        return fitting[(chance >> 16) % len(fitting)]

    # --- an answer

    def events(self, route: Route, body: Mapping[str, Any]) -> list[bytes]:
        """The whole answer, event by event, `[DONE]` last."""
        self.runs += 1
        asked = self._asked(route, body)
        assert len(asked.prompt) < self.context, "an engine refuses such a prompt"
        steps = self._known.get(asked) or self._known.setdefault(asked, list(self._steps(asked)))
        name = f"{route}-{self.runs}"
        if route is Route.GENERATE:
            return [_event(self._native(asked, step, name)) for step in steps] + [DONE]
        base = {"id": name, "created": 1000 + self.runs, "model": f"model-{self.runs}"}
        made = self._chat(steps) if route is Route.CHAT else self._completion(steps)
        events = [_event({**base, "choices": [choice], "usage": None}) for choice in made]
        if asked.include_usage:
            events.append(_event({**base, "choices": [], "usage": _usage(len(asked.prompt), len(steps[-1].ids))}))
        return [*events, DONE]

    def _asked(self, route: Route, body: Mapping[str, Any]) -> Asked:
        sampling = (body.get("sampling_params") or {}) if route is Route.GENERATE else body
        if route is Route.GENERATE:
            limit = sampling.get("max_new_tokens", 128)
        elif route is Route.CHAT:
            limit = body.get("max_completion_tokens") or body.get("max_tokens")
        else:
            limit = body.get("max_tokens") or 16
        prompt = self.prompt(route, body)
        stop = sampling.get("stop") or ()
        return Asked(
            tuple(prompt),
            min(limit or self.context, self.context - len(prompt)),
            (stop,) if isinstance(stop, str) else tuple(stop),
            bool(sampling.get("ignore_eos")),
            sampling.get("skip_special_tokens") is False,
            bool((body.get("stream_options") or {}).get("include_usage")),
        )

    def prompt(self, route: Route, body: Mapping[str, Any]) -> list[int]:
        """The ids that a request's prompt has."""
        if body.get("input_ids") is not None:
            return list(body["input_ids"])
        if route is Route.CHAT:
            return [self.vocabulary.eos, *self.vocabulary.encode("".join(m["content"] for m in body["messages"])), self.vocabulary.eos]
        given = body["prompt"] if route is Route.COMPLETIONS else body["text"]
        return list(given) if isinstance(given, list) else [self.vocabulary.eos, *self.vocabulary.encode(given)]

    def _steps(self, asked: Asked) -> Iterator[Step]:
        ids: list[int] = []
        text = shown = ""
        finish: dict[str, Any] | None = None
        before = asked.prompt[-5:]
        known = len(self.vocabulary.decode(before, special=asked.special))
        while finish is None:
            ids.append(self.next([*asked.prompt, *ids], ignore_eos=asked.ignore_eos))
            ended = ids[-1] == self.vocabulary.eos and not asked.ignore_eos
            visible = ids[:-1] if ended else ids
            text = self.vocabulary.decode([*before, *visible], special=asked.special)[known:]
            if found := _first_stop(text, asked.stops):
                finish, shown = {"type": "stop", "matched": found[1]}, text[: found[0]]
                if not self.holds_back and len(shown) < len(text[: found[0]]):
                    raise AssertionError
            elif ended:
                finish, shown = {"type": "stop", "matched": self.vocabulary.eos}, text
            elif len(ids) >= asked.limit:
                finish, shown = {"type": "length", "length": len(ids)}, text
            else:
                raw = self.vocabulary.bytes_of(visible, special=asked.special)
                shown = text.removesuffix("\N{REPLACEMENT CHARACTER}") if _unfinished(raw) else text
                shown = _without_begun_stop(shown, asked.stops) if self.holds_back else shown
                if len(ids) % self.at_once:
                    continue
            yield Step(shown, tuple(ids), finish)

    # --- its shapes

    def _native(self, asked: Asked, step: Step, name: str) -> dict[str, Any]:
        info = {"id": name, "finish_reason": step.finish, "prompt_tokens": len(asked.prompt), "weight_version": "default"}
        return {
            "text": step.text,
            "output_ids": list(step.ids),
            "meta_info": {**info, "completion_tokens": len(step.ids), "cached_tokens": len(asked.prompt) - 1},
        }

    def _chat(self, steps: Sequence[Step]) -> Iterator[dict[str, Any]]:
        known = {} if self.with_ids else {"reasoning_content": None}
        yield _choice({"delta": {**known, "role": "assistant", "content": ""}})
        for piece, ids in _pieces(steps):
            if self.with_ids:
                yield _choice({"delta": {"content": piece}, "token_ids": ids})
            elif piece:
                yield _choice({"delta": {**known, "content": piece}})
        finish = steps[-1].finish
        assert finish is not None
        yield _choice({"delta": known, "finish_reason": finish["type"], "matched_stop": finish.get("matched")})

    def _completion(self, steps: Sequence[Step]) -> Iterator[dict[str, Any]]:
        for step, (piece, ids) in zip(steps, _pieces(steps), strict=True):
            told = {"token_ids": ids} if self.with_ids else {}
            finish = step.finish or {}
            yield _choice({"text": piece, **told, "finish_reason": finish.get("type"), "matched_stop": finish.get("matched")})

    # --- what any engine of the model knows

    async def ask(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answers /v1/tokenize and /v1/detokenize."""
        return self.answer(path, body)

    def answer(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        vocabulary = self.vocabulary
        if path == "/v1/detokenize":
            special = not body.get("skip_special_tokens", True)
            tokens = body["tokens"]
            if not any(isinstance(t, list) for t in tokens):
                return {"text": vocabulary.decode(tokens, special=special)}
            return {"text": [vocabulary.decode(t, special=special) for t in tokens]}
        assert path == "/v1/tokenize", path
        assert ("prompt" in body) != ("messages" in body)
        if "messages" in body:
            ids = self.prompt(Route.CHAT, body)
        else:
            ids = vocabulary.encode(body["prompt"])
            ids = [vocabulary.eos, *ids] if body.get("add_special_tokens", True) else ids
        return {"tokens": ids, "count": len(ids), "max_model_len": self.context}


def _unfinished(raw: bytes) -> bytes:
    """The bytes at the end that are the beginning of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(raw)
    return decoder.getstate()[0]


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    found = [(at + len(s), -len(s), at, s) for s in stops if (at := text.find(s)) >= 0]
    if not found:
        return None
    _, _, at, stop = min(found)
    return at, stop


def _without_begun_stop(text: str, stops: Sequence[str]) -> str:
    held = max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - held]


def _pieces(steps: Sequence[Step]) -> Iterator[tuple[str, list[int]]]:
    """What is new in each step. A text that became shorter, because a stop string was found whose beginning was told, says nothing."""
    characters = ids = 0
    for step in steps:
        yield step.text[characters:], list(step.ids[ids:])
        characters, ids = max(characters, len(step.text)), len(step.ids)


def _choice(own: dict[str, Any]) -> dict[str, Any]:
    return {"index": 0, "logprobs": None, "finish_reason": None, "matched_stop": None, **own}


def _usage(prompt: int, made: int) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
    return {**counts, "prompt_tokens_details": {"cached_tokens": max(0, prompt - 1)}, "reasoning_tokens": 0}


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
