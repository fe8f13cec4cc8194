"""A stream that is cut anywhere, as often as one likes, and goes on: the client sees what it would have seen without.

The engine is a function of all ids so far, so an uncut answer is known, and every difference is a fault of the seam.
"""

from __future__ import annotations

import itertools
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.errors import EngineError
from disagg.router.openai import DONE_EVENT, Route, parse_event, parse_request
from disagg.router.seam import OBSTACLE_NAMES, OBSTACLES, aligned, question, token_limit, why_not
from disagg.router.stream import Ask, Stream
from disagg.router.upstream import frame
from tests.router.function_engine import WORDS, FunctionEngine, Vocabulary

CHAT, COMPLETIONS, GENERATE = Route.CHAT, Route.COMPLETIONS, Route.GENERATE
ROUTES = (CHAT, COMPLETIONS, GENERATE)
VOCABULARY = Vocabulary()
PURE = Vocabulary(words=[w for w in WORDS if w != "漢a"], mixed=False)
PROMPT = "ab é🐚 a"
CUTS = {"made": 0, "enumerations": 0}


def body_of(route: Route, *, limit: int | None = 24, stop: Any = None, prompt: str = PROMPT, **more: Any) -> dict[str, Any]:
    """A request, the same on each route."""
    sampling: dict[str, Any] = {"temperature": 0, "stop": stop, **more}
    if route is GENERATE:
        return {"text": prompt, "stream": True, "sampling_params": {**sampling, **({} if limit is None else {"max_new_tokens": limit})}}
    told = {} if limit is None else {"max_tokens": limit}
    asked = {"messages": [{"role": "user", "content": prompt}]} if route is CHAT else {"prompt": prompt}
    return {"model": "fake", **asked, **sampling, **told, "stream": True, "stream_options": {"include_usage": True}}


def ran(running: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that never waits."""
    try:
        running.send(None)
    except StopIteration as ended:
        return ended.value
    raise AssertionError("it waits")


def stream_of(route: Route, body: Mapping[str, Any], engine: FunctionEngine) -> Stream:
    request = parse_request(route, msgspec.json.encode(body))
    made = Stream(request, request.rest, lambda _seconds, _count: None, lambda *_: None)
    made.journal.on_fold = None
    made.journal.with_ids = engine.with_ids
    made._context = engine.context
    return made


def spoken(stream: Stream, events: Sequence[bytes], *, at_once: int, framed: bool) -> list[bytes]:
    """Notes events as a leg does, several in a read; what came with a seam is rewritten. Returns what the client sees of them."""
    seam, seen = stream._seam, []
    for event in events:
        if seam is None:
            seen.append(event)
        elif event != DONE_EVENT and not seam.stopped and (made := seam.rewrite(event)):
            seen.append(made)
    for i in range(0, len(seen), at_once):
        raw = b"".join(map(frame, seen[i : i + at_once]) if framed else seen[i : i + at_once])
        stream.journal.add(raw, 1.0)
    return seen


def played(
    engine: FunctionEngine, route: Route, body: Mapping[str, Any], events: Sequence[bytes], cuts: Sequence[int], ask: Ask | None = None
) -> list[bytes]:
    """What a client sees whose stream is cut after so many events of each engine in turn; the last engine is not cut."""
    CUTS["made"] += 1
    stream = stream_of(route, body, engine)
    style = {"at_once": 1 + sum(cuts) % 3, "framed": sum(cuts) % 2 == 0}
    seen = spoken(stream, events[: cuts[0]], **style)  # type: ignore[arg-type]
    for cut in [*cuts[1:], None]:
        if stream._seam is not None and stream._seam.stopped:
            break
        rest, missing = ran(stream.go_on(ask or engine.ask))
        if not rest:
            ended = [] if stream.journal.saw_done else [DONE_EVENT]
            return seen + [e + b"\n\n" for e in missing.split(b"\n\n") if e] + ended
        events = engine.events(route, msgspec.json.decode(b"{" + rest))
        seen += spoken(stream, events[:cut], **style)  # type: ignore[arg-type]
    seam = stream._seam
    assert seam is not None
    if seam.stopped:
        seen += [e + b"\n\n" for e in seam.closing().split(b"\n\n") if e]
    return [*seen, DONE_EVENT]


class Heard:
    """What a client makes of a stream, and what is wrong with it whatever it says."""

    def __init__(self, route: Route, events: Sequence[bytes]) -> None:
        assert events[-1] == DONE_EVENT
        assert events.count(DONE_EVENT) == 1
        self.text = ""
        self.finish: Any = None
        self.counts: Any = None
        self.ids: list[int] = []
        values = [parse_event(e) for e in events[:-1]]
        if route is GENERATE:
            self._natively([v for v in values if v is not None])
        else:
            self._openai(route, [v for v in values if v is not None])

    def _natively(self, values: list[dict[str, Any]]) -> None:
        for value in values:
            info = value["meta_info"]
            assert self.finish is None, "nothing comes after the end"
            self.finish = info["finish_reason"]
            assert value["text"].startswith(self.text) or self.finish is not None, "what was said is not taken back"
            assert self.text.startswith(value["text"]) or value["text"].startswith(self.text)
            self.text = value["text"]
            self.counts = (info["prompt_tokens"], info["completion_tokens"])
            self.ids = value["output_ids"]
            assert len(self.ids) == info["completion_tokens"]
            assert info["cached_tokens"] <= info["prompt_tokens"]
        assert len({v["meta_info"]["id"] for v in values}) == 1

    def _openai(self, route: Route, values: list[dict[str, Any]]) -> None:
        assert len({(v["id"], v["created"], v["model"]) for v in values}) == 1
        for i, value in enumerate(values):
            if usage := value["usage"]:
                assert value is values[-1]
                assert not value["choices"]
                assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
                assert (usage.get("prompt_tokens_details") or {"cached_tokens": 0})["cached_tokens"] <= usage["prompt_tokens"]
                self.counts = (usage["prompt_tokens"], usage["completion_tokens"])
                continue
            (choice,) = value["choices"]
            assert self.finish is None, "nothing comes after the end"
            self.finish = choice["finish_reason"]
            self.text += (choice["delta"].get("content") or "") if route is CHAT else choice["text"]
            if route is CHAT:
                assert ("role" in choice["delta"]) == (i == 0)
        assert self.finish is not None


def assert_same(
    route: Route, body: Mapping[str, Any], engine: FunctionEngine, cuts: Sequence[int], whole: Heard, events: Sequence[bytes]
) -> None:
    told = Heard(route, played(engine, route, body, events, cuts))
    where = f"cut after {cuts}"
    assert told.text == whole.text, where
    assert told.finish == whole.finish, where
    assert told.counts == whole.counts, where
    assert told.ids == whole.ids, where


def all_cuts(events: int) -> Iterator[tuple[int, ...]]:
    """After each event, and a second and a third time soon after that."""
    for i in range(1, events + 1):
        yield (i,)
        yield (i, 1 + i % 5)
        yield (i, 1 + i % 2, 1 + i % 4)


# --- engines that tell the ids: exact, whatever the tokenization


STOPS = (None, "stop", ["ab", "🐚a"], ["opst", "é", "b a"])


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("route", ROUTES)
def test_an_answer_with_ids_is_the_same_wherever_it_was_cut(route: Route, stop: Any, at_once: int) -> None:
    """The embedded engine on all routes; SGLang on the native one, which holds nothing back but speaks token by token."""
    CUTS["enumerations"] += 1
    for seed, limit in itertools.product(range(3), (1, 2, 9, 31, None if route is CHAT else 40)):
        holds_back = not (route is GENERATE and seed % 2)
        engine = FunctionEngine(
            VOCABULARY,
            with_ids=True,
            holds_back=holds_back,
            at_once=at_once if holds_back else 1,
            seed=seed,
            context=48,
            eos_of=12 + 40 * (seed % 3),
        )
        body = body_of(route, limit=min(limit, 47 - len(engine.prompt(route, body_of(route)))) if limit else None, stop=stop)
        events = engine.events(route, body)
        whole = Heard(route, events)
        for cuts in all_cuts(len(events)):
            assert_same(route, body, engine, cuts, whole, events)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("more", [{"ignore_eos": True}, {"ignore_eos": True, "skip_special_tokens": False}, {"skip_special_tokens": False}])
def test_tokens_that_end_an_answer_or_do_not(route: Route, more: dict[str, Any]) -> None:
    for seed in range(2):
        engine = FunctionEngine(VOCABULARY, with_ids=True, holds_back=True, seed=seed, eos_of=3)
        body = body_of(route, limit=30, **more)
        events = engine.events(route, body)
        whole = Heard(route, events)
        for cuts in all_cuts(len(events)):
            assert_same(route, body, engine, cuts, whole, events)


@pytest.mark.parametrize("route", ROUTES)
def test_a_long_answer_whose_end_comes_when_the_journal_was_just_folded(route: Route) -> None:
    """The finish reason and the usage come in different reads, and any of them may be the last one of a fold."""
    for limit in range(24, 72, 3) if route is COMPLETIONS else range(25, 72, 5):
        engine = FunctionEngine(VOCABULARY, with_ids=True, seed=5, eos_of=10**6)
        body = body_of(route, limit=limit)
        events = engine.events(route, body)
        whole = Heard(route, events)
        for back in range(5):
            assert_same(route, body, engine, (len(events) - back,), whole, events)
            assert_same(route, body, engine, (limit // 2, len(engine.events(route, body)) - limit // 2 - back), whole, events)


@pytest.mark.parametrize("route", ROUTES)
def test_a_long_stop_string_may_hold_back_many_tokens(route: Route) -> None:
    """Each `a` may begin it, so thirty of them are told late; the ids behind them are computed again, not guessed from the text."""
    engine = FunctionEngine(Vocabulary(["a", "aa"]), with_ids=True, holds_back=True, eos_of=10**6)
    only = tuple(engine.vocabulary.by_bytes[p] for p in (b"a", b"aa"))
    engine.vocabulary.after = lambda _unfinished: only  # type: ignore[assignment]
    body = body_of(route, limit=60, stop="a" * 30 + "b", prompt="a")
    events = engine.events(route, body)
    for cut in range(1, len(events), 4):
        assert_same(route, body, engine, (cut,), Heard(route, events), events)


def test_an_answer_that_fills_the_context_ends_there() -> None:
    engine = FunctionEngine(VOCABULARY, with_ids=True, context=40, eos_of=10**6)
    for route, body in ((CHAT, body_of(CHAT, limit=None)), (GENERATE, body_of(GENERATE, limit=None, max_new_tokens=None))):
        events = engine.events(route, body)
        for cuts in all_cuts(len(events)):
            assert_same(route, body, engine, cuts, Heard(route, events), events)


def test_usage_of_an_answer_that_a_stop_string_across_the_seam_ends() -> None:
    """A says `st`, B says `op`: the role and what is empty are no tokens."""
    engine = FunctionEngine(PURE, with_ids=False)
    stream = stream_of(CHAT, body_of(CHAT, stop="stop"), engine)
    spoken(stream, [chat_event({"role": "assistant", "content": ""}), chat_event({"content": "ast"})], at_once=1, framed=False)
    ran(stream.go_on(engine.ask))
    seam = stream._seam
    assert seam is not None
    said = [seam.rewrite(chat_event(d)) for d in ({"role": "assistant", "content": ""}, {"content": "o"}, {"content": "p"})]
    last = parse_event(said[-1])
    assert seam.stopped == "stop"
    assert last is not None
    assert (last["choices"][0]["delta"]["content"], last["choices"][0]["finish_reason"]) == ("", "stop")
    usage = parse_event(seam.closing())
    assert usage is not None
    assert usage["usage"]["completion_tokens"] == len(PURE.encode("ast")) + 2


def chat_event(delta: dict[str, Any]) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    return b"data: " + msgspec.json.encode({"id": "x", "created": 1, "model": "m", "choices": [choice]}) + b"\n\n"


def test_a_prompt_that_ends_inside_of_a_character() -> None:
    engine = FunctionEngine(VOCABULARY, with_ids=True, seed=3)
    ids = [*VOCABULARY.encode("ab"), VOCABULARY.by_bytes["é".encode()[:1]]]
    body = {"input_ids": ids, "stream": True, "sampling_params": {"max_new_tokens": 20}}
    events = engine.events(GENERATE, body)
    for cuts in all_cuts(len(events)):
        told, whole = Heard(GENERATE, played(engine, GENERATE, body, events, cuts)), Heard(GENERATE, events)
        assert (told.text, told.ids) == (whole.text, whole.ids)


words = st.lists(st.text(st.sampled_from('abé🐚漢 \n"\\\N{REPLACEMENT CHARACTER}'), min_size=1, max_size=4), min_size=1, max_size=12)
stops = st.lists(st.text(st.sampled_from("abé🐚 "), min_size=1, max_size=4), max_size=3)


@given(
    route=st.sampled_from(ROUTES),
    words=words,
    stops=stops,
    seed=st.integers(0, 10**6),
    limit=st.integers(1, 40),
    at_once=st.integers(1, 4),
    eos_of=st.sampled_from([4, 32, 10**6]),
    broken_of=st.sampled_from([2, 16, 10**6]),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
)
@settings(deadline=None, max_examples=300)
def test_any_vocabulary_any_answer_any_cuts(
    route: Route, words: list[str], stops: list[str], seed: int, limit: int, at_once: int, eos_of: int, broken_of: int, cuts: list[int]
) -> None:
    vocabulary = Vocabulary([*words, *WORDS])
    engine = FunctionEngine(vocabulary, with_ids=True, holds_back=True, at_once=at_once, seed=seed, eos_of=eos_of, broken_of=broken_of)
    body = body_of(route, limit=limit, stop=stops)
    events = engine.events(route, body)
    assert_same(route, body, engine, [min(cuts[0], len(events)), *cuts[1:]], Heard(route, events), events)


# --- engines that do not: exact in text


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_a_text_goes_on_where_it_was_cut(route: Route, stop: Any) -> None:
    """SGLang's OpenAI routes. Where the next token depends on the text alone, an answer is the same as long as no token limit ends it."""
    same = 0
    for seed in range(12):
        engine = FunctionEngine(PURE, with_ids=False, by_text=True, seed=seed, eos_of=16, broken_of=10**6)
        body = body_of(route, limit=400, stop=stop)
        events = engine.events(route, body)
        whole = Heard(route, events)
        if whole.finish != "stop" or len(events) > 60:
            continue
        for cuts in all_cuts(len(events)):
            told = Heard(route, played(engine, route, body, events, cuts))
            assert (told.text, told.finish) == (whole.text, whole.finish), f"cut after {cuts}"
            assert told.counts[0] == whole.counts[0]
            same += 1
    assert same > 100


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_no_character_of_a_text_is_lost_or_said_twice_though_the_model_goes_on_otherwise(route: Route) -> None:
    for seed, limit in itertools.product(range(3), (3, 9, 40)):
        engine = FunctionEngine(VOCABULARY, with_ids=False, seed=seed, eos_of=10**6)
        body = body_of(route, limit=limit)
        events = engine.events(route, body)
        for cut in range(1, len(events)):
            told = Heard(route, played(engine, route, body, events, [cut]))
            said = text_of(route, events[:cut])
            after = engine.vocabulary.encode(said)
            assert told.text.startswith(said)
            if whole_was_said(route, events[:cut]):
                assert told.text == said
            else:
                left = limit - len(after)
                rest = {**body, "max_tokens": left} | given_ids(route, [*engine.prompt(route, body), *after])
                more = text_of(route, engine.events(route, rest)) if left > 0 else ""
                assert told.text[len(said) :] == more, f"cut after {cut}"
                assert told.counts[0] == len(engine.prompt(route, body))


def text_of(route: Route, events: Sequence[bytes]) -> str:
    choices = [c for e in events if (v := parse_event(e)) for c in v["choices"]]
    return "".join((c["delta"].get("content") or "") if route is CHAT else c["text"] for c in choices)


def whole_was_said(route: Route, events: Sequence[bytes]) -> bool:
    return any(c["finish_reason"] for e in events if (v := parse_event(e)) for c in v["choices"])


def given_ids(route: Route, ids: Sequence[int]) -> dict[str, Any]:
    return {"input_ids": list(ids)} if route is CHAT else {"prompt": list(ids)}


def test_engines_of_both_kinds_may_follow_each_other() -> None:
    """A stream goes from an engine that tells ids to one that does not, and back."""
    for seed in range(6):
        first = FunctionEngine(PURE, with_ids=True, by_text=True, seed=seed, eos_of=20, broken_of=10**6)
        body = body_of(CHAT, limit=400)
        events = first.events(CHAT, body)
        whole = Heard(CHAT, events)
        for cut in range(1, min(len(events), 40)):
            stream = stream_of(CHAT, body, first)
            seen = spoken(stream, events[:cut], at_once=1, framed=True)
            for with_ids, count in ((False, 3), (True, 3), (False, None)):
                rest, missing = ran(stream.go_on(first.ask))
                if not rest:
                    seen += [e + b"\n\n" for e in missing.split(b"\n\n") if e]
                    break
                engine = FunctionEngine(PURE, with_ids=with_ids, by_text=True, seed=seed, eos_of=20, broken_of=10**6)
                stream.journal.with_ids = with_ids
                seen += spoken(stream, engine.events(CHAT, msgspec.json.decode(b"{" + rest))[:count], at_once=1, framed=True)
            done = [] if DONE_EVENT in seen else [DONE_EVENT]
            told = Heard(CHAT, [*seen, *done])
            assert (told.text, told.finish) == (whole.text, whole.finish), (seed, cut)


def test_there_were_enough_cuts() -> None:
    """In the great enumeration alone, where all of it ran."""
    if CUTS["enumerations"] == len(ROUTES) * len(STOPS) * 2:  # else tests were picked out
        assert CUTS["made"] >= 10_000, CUTS["made"]


# --- what the next engine is not believed


def broken_after(route: Route, count: int, *, engine: FunctionEngine) -> tuple[Stream, dict[str, Any]]:
    body = body_of(route)
    stream = stream_of(route, body, engine)
    spoken(stream, engine.events(route, body)[:count], at_once=1, framed=False)
    rest, _ = ran(stream.go_on(engine.ask))
    return stream, msgspec.json.decode(b"{" + rest)


@pytest.mark.parametrize("route", ROUTES)
def test_another_answer_than_the_one_that_broke_is_an_error(route: Route) -> None:
    """The end of what was said is said again where an id's text was passed on in part; if it is not the same, nothing can be passed on."""
    found = 0
    for seed in range(40):
        engine = FunctionEngine(VOCABULARY, with_ids=True, holds_back=True, seed=seed)
        body = body_of(route, stop=["op"])
        events = engine.events(route, body)
        for cut in range(1, len(events)):
            stream = stream_of(route, body, engine)
            spoken(stream, events[:cut], at_once=1, framed=False)
            rest, _ = ran(stream.go_on(engine.ask))
            if not rest or stream._seam is None or not stream._seam._overlap:
                continue
            found += 1
            other = FunctionEngine(Vocabulary(["漢"]), with_ids=True)
            only = other.vocabulary.by_bytes["漢".encode()]
            other.vocabulary.after = lambda _unfinished, only=only: (only,)  # type: ignore[assignment]
            with pytest.raises(EngineError, match="something else"):
                spoken(stream, other.events(route, {**msgspec.json.decode(b"{" + rest), **prompt_of(route)}), at_once=1, framed=False)
    assert found > 3


def prompt_of(route: Route) -> dict[str, Any]:
    return {"prompt": [1]} if route is COMPLETIONS else {"input_ids": [1]}


@pytest.mark.parametrize("more", [{"reasoning_content": "hm"}, {"tool_calls": [{"index": 0}]}])
def test_more_than_text_is_an_error_once_text_was_said_and_passed_on_before(more: dict[str, Any]) -> None:
    engine = FunctionEngine(VOCABULARY, with_ids=True)
    event = b"data: " + msgspec.json.encode({"id": "b", "choices": [{"index": 0, "delta": more, "finish_reason": None}]}) + b"\n\n"
    stream, _ = broken_after(CHAT, 4, engine=engine)
    assert stream._seam is not None
    with pytest.raises(EngineError, match="more than text"):
        stream._seam.rewrite(event)
    stream, _ = broken_after(CHAT, 1, engine=engine)
    assert stream._seam is not None
    made = parse_event(stream._seam.rewrite(event))
    assert made is not None
    assert made["choices"][0]["delta"] == more


def test_a_role_that_comes_with_text_is_not_told_again() -> None:
    stream, _ = broken_after(CHAT, 1, engine=FunctionEngine(VOCABULARY, with_ids=True))
    assert stream._seam is not None
    choice = {"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None}
    made = parse_event(stream._seam.rewrite(b"data: " + msgspec.json.encode({"id": "b", "choices": [choice]}) + b"\n\n"))
    assert made is not None
    assert made["choices"][0]["delta"] == {"content": "a"}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("garbage", [b"data: nonsense\n\n", b'data: {"choices": [{}]}\n\n', b'data: {"text": 3, "meta_info": {}}\n\n'])
def test_garbage_is_an_engines_error(route: Route, garbage: bytes) -> None:
    stream, _ = broken_after(route, 4, engine=FunctionEngine(VOCABULARY, with_ids=True))
    assert stream._seam is not None
    with pytest.raises(EngineError):
        stream._seam.rewrite(garbage)


def test_a_native_stream_of_pieces_is_not_taken_for_one_that_repeats_everything() -> None:
    """SGLang's --incremental-streaming-output."""
    stream, _ = broken_after(GENERATE, 4, engine=FunctionEngine(VOCABULARY, with_ids=True))
    assert stream._seam is not None
    info = {"id": "b", "prompt_tokens": 9, "completion_tokens": 2, "finish_reason": None}
    with pytest.raises(EngineError, match="pieces"):
        stream._seam.rewrite(b"data: " + msgspec.json.encode({"text": "a", "output_ids": [1], "meta_info": info}) + b"\n\n")


@pytest.mark.parametrize("answer", [{}, {"text": None}, {"text": ["a"]}, {"tokens": ["a"]}, {"tokens": None, "text": [1, 2]}])
@pytest.mark.parametrize("route", ROUTES)
def test_an_engine_that_tells_nonsense_of_texts_is_an_error_and_no_fault_of_disagg(route: Route, answer: Any) -> None:
    async def ask(_path: str, _body: Mapping[str, Any]) -> Any:
        return answer

    engine = FunctionEngine(VOCABULARY, with_ids=True)
    body = body_of(route)
    with pytest.raises(EngineError):
        played(engine, route, body, engine.events(route, body), [4], ask)


def test_what_is_complete_needs_no_engine_any_more() -> None:
    async def nobody(path: str, _body: Mapping[str, Any]) -> Any:
        raise EngineError(f"nobody answers {path}")

    engine = FunctionEngine(VOCABULARY, with_ids=True)
    for route in ROUTES:
        body = {**body_of(route), "frequency_penalty": 1} if route is not GENERATE else body_of(route)
        events = engine.events(route, body)
        for cut in (len(events) - 1, len(events)):  # only [DONE] is missing, or the end of the HTTP body
            assert played(engine, route, body, events, [cut], nobody) == events


# --- what cannot go on

TEXT = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
FEATURES: dict[str, tuple[dict[str, Any], ...]] = {
    "grammar": (
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        *({name: "x"} for name in ("regex", "ebnf", "json_schema", "structural_tag")),
    ),
    "tools": (
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function"}], "tool_choice": "auto"},
        {"messages": [{"role": "system", "content": "a", "tools": [{"type": "function"}]}]},
    ),
    "penalties": ({"frequency_penalty": 0.1}, {"presence_penalty": -1}, {"repetition_penalty": 1.1}),
    "min_tokens": ({"min_tokens": 3}, {"min_new_tokens": 3}),
    "logprobs": ({"logprobs": True}, {"logprobs": 0}, {"logprobs": 3}, {"return_logprob": True}),
    "custom processor": ({"custom_logit_processor": "x"}, {"custom_params": {"a": 1}}, {"session_params": {"id": "a"}}),
    "watermark": ({"watermark": {"key": 1}},),
    "thinking budget": ({"max_thinking_tokens": 9},),
    "stop_regex": ({"stop_regex": "a+"}, {"stop_regex": ["a"]}),
    "stop strings that are kept": ({"no_stop_trim": True}, {"include_stop_str_in_output": True}),
    "echo": ({"echo": True}, {"suffix": "x"}, {"best_of": 2}),
    "per-token returns": (
        {"return_hidden_states": "last"},
        {"sampling_logprobs_mode": "support"},
        {"return_hidden_states": True},
        {"return_routed_experts": True},
        {"return_indexer_topk": True},
        {"return_sampling_mask": True},
        {"return_entropy": True},
        {"return_token_ids": True},
        {"return_output_ids_in_sglext": True},
    ),
    "returns of the whole request": tuple(
        {name: True}
        for name in ("return_prompt_token_ids", "return_input_ids_in_sglext", "return_cached_tokens_details", "return_spec_tokens_details")
    ),
    "media": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},),
    "media data": ({"image_data": "x"}, {"audio_data": ["x"]}, {"video_data": "x"}, {"positional_embed_overrides": [1]}),
    "beam search": ({"beam_width": 2}, {"use_beam_search": True}),
}
CASES = [(name, fields) for name, all_fields in FEATURES.items() for fields in all_fields]
NEUTRAL: tuple[dict[str, Any], ...] = (
    *({name: None} for _, fields in CASES for name in fields if name != "messages"),
    {"response_format": {"type": "text"}},
    {"repetition_penalty": 1},
    {"repetition_penalty": 1.0},
    {"frequency_penalty": 0, "presence_penalty": 0.0},
    {"tools": [{"type": "function"}], "tool_choice": "none"},
    {"tools": []},
    {"min_tokens": 0},
    {"logprobs": False},
    {"echo": False, "no_stop_trim": False, "return_token_ids": False},
    {"messages": TEXT},
    {"beam_width": 1},
    {"stop_regex": []},
    {"logit_bias": {"3": 1}, "stop_token_ids": [3], "session_id": "s", "lora_path": "x", "priority": 1},
)


def test_every_obstacle_has_a_case_here_and_a_reason() -> None:
    assert tuple(FEATURES) == tuple(n for n in OBSTACLE_NAMES if n in FEATURES)
    assert set(FEATURES) == set(OBSTACLE_NAMES)
    assert len(OBSTACLES) >= 12
    assert all(o.why for o in OBSTACLES)


def body_with(route: Route, fields: Mapping[str, Any]) -> dict[str, Any]:
    body = body_of(route)
    if route is GENERATE and fields.keys() & {"frequency_penalty", "min_new_tokens", "regex", "beam_width", "no_stop_trim"}:
        return {**body, "sampling_params": {**body["sampling_params"], **fields}}
    return {**body, **fields}


@pytest.mark.parametrize(("name", "fields"), CASES)
@pytest.mark.parametrize("route", ROUTES)
def test_what_cannot_go_on_says_why_wherever_it_is_cut(route: Route, name: str, fields: dict[str, Any]) -> None:
    engine = FunctionEngine(VOCABULARY, with_ids=True)
    body = body_with(route, fields)
    events = engine.events(route, body_of(route))
    for cut in range(1, len(events) - (2 if route is not GENERATE else 1), 3):
        with pytest.raises(EngineError, match=name):
            played(engine, route, body, events, [cut])
    assert engine.runs == 1


@pytest.mark.parametrize("fields", NEUTRAL)
@pytest.mark.parametrize("route", ROUTES)
def test_a_neutral_value_is_no_obstacle(route: Route, fields: dict[str, Any]) -> None:
    stream = stream_of(route, body_of(route), FunctionEngine(VOCABULARY, with_ids=True))
    spoken(stream, FunctionEngine(VOCABULARY, with_ids=True).events(route, body_of(route))[:3], at_once=1, framed=False)
    assert not why_not(route, body_with(route, fields), stream.journal.said())


def test_reasoning_and_tool_calls_cannot_be_told_again() -> None:
    engine = FunctionEngine(VOCABULARY, with_ids=False)
    events = engine.events(CHAT, body_of(CHAT))
    for delta in ({"reasoning_content": "hm"}, {"reasoning_content": None, "tool_calls": [{"index": 0}]}):
        other = b"data: " + msgspec.json.encode({"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}) + b"\n\n"
        with pytest.raises(EngineError, match="more than text"):
            played(engine, CHAT, body_of(CHAT), [events[0], other, *events[1:]], [4])


@pytest.mark.parametrize("prompts", [["a", "b"], [[1], [2]]])
def test_several_prompts_cannot_go_on(prompts: list[Any]) -> None:
    engine = FunctionEngine(VOCABULARY, with_ids=True)
    events = engine.events(COMPLETIONS, body_of(COMPLETIONS))
    with pytest.raises(EngineError, match="several prompts"):
        played(engine, COMPLETIONS, {**body_of(COMPLETIONS), "prompt": prompts}, events, [3])


def test_a_chunk_without_choices_that_tells_no_usage_is_not_the_end() -> None:
    """SGLang tells what it has besides (`sglext`) in such a chunk, before usage."""
    engine = FunctionEngine(VOCABULARY, with_ids=True)
    body = body_of(CHAT)
    *events, usage, done = engine.events(CHAT, body)
    other = b"data: " + msgspec.json.encode({"id": "x", "created": 1001, "model": "model-1", "choices": [], "sglext": {"a": 1}}) + b"\n\n"
    seen = played(engine, CHAT, body, [*events, other, usage, done], [len(events) + 1])
    assert [v["usage"]["completion_tokens"] for e in seen if (v := parse_event(e)) and v.get("usage")] == [24]


# --- what is asked


def test_a_chats_prompt_is_asked_for_with_what_its_template_reads_and_nothing_else() -> None:
    """SGLang reads `add_generation_prompt` in /v1/tokenize, but not in a chat; and it refuses null where its schema has a default."""
    fields = {
        "model": "fake",
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function"}],
        "tool_choice": "none",
        "reasoning": {"effort": "low"},
        "reasoning_effort": "low",
        "thinking": {"type": "adaptive"},
        "task": "domain",
        "continue_final_message": True,
        "chat_template_kwargs": {"a": 1},
    }
    others = {"add_generation_prompt": False, "temperature": 0, "stream": True, "max_tokens": 3, "stop": "x"}
    assert question(CHAT, {**fields, **others}) == (None, fields)
    assert question(CHAT, {"messages": [], "continue_final_message": None, "tools": None}) == (None, {"messages": []})
    assert question(CHAT, {"messages": [], "input_ids": [3, 4]}) == ([3, 4], {})


@pytest.mark.parametrize(
    ("route", "fields", "limit"),
    [
        (CHAT, {}, None),
        (CHAT, {"max_tokens": None, "max_completion_tokens": None}, None),
        (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 7}, 7),
        (COMPLETIONS, {}, 16),
        (COMPLETIONS, {"max_tokens": 5, "max_completion_tokens": 7}, 5),
        (GENERATE, {}, 128),
        (GENERATE, {"sampling_params": None}, 128),
        (GENERATE, {"sampling_params": {}}, 128),
        (GENERATE, {"sampling_params": {"max_new_tokens": None}}, None),
        (GENERATE, {"sampling_params": {"max_new_tokens": 3}, "max_tokens": 9}, 3),
    ],
)
def test_limits_as_sglang_reads_them(route: Route, fields: dict[str, Any], limit: int | None) -> None:
    assert token_limit(route, fields) == limit


def test_the_most_ids_whose_text_was_passed_on() -> None:
    assert aligned("abc", {3: "ab", 4: "abc", 5: "abcd"}) == 4
    assert aligned("abc", {3: "ax", 4: "abcd"}) is None
