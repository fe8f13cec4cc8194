"""A stream whose engine breaks goes on, over real sockets and the production router; what is no stream is asked for anew.

The engines are one function of the ids, so what a client must hear is known. How they break is set for each call: the first answer may be
cut, the second one may be silent, and so on.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog
from aiohttp import web

from disagg.model import Role
from disagg.router import owner
from disagg.router.openai import Route, parse_event
from tests.fake_engine import Behaviour, Call, FakeEngine, answer_well, until
from tests.router.conftest import Rig, running_rig
from tests.router.function_engine import FunctionEngine
from tests.router.test_lost import nothing_left
from tests.router.test_seam import CASES, PURE, VOCABULARY, Heard, body_of, body_with

pytestmark = pytest.mark.usefixtures("judged_soon")

SOON_S = 30.0
"""Much longer than it takes on a busy machine."""
PAIR = (Role.PREFILL, Role.DECODE)
TWO = (Role.PREFILL, Role.DECODE, Role.DECODE)
NEVER = 10**6
ROUTES = (Route.CHAT, Route.COMPLETIONS, Route.GENERATE)

Break = Callable[[Call], Awaitable[None]]


async def cut(call: Call) -> None:
    call.cut()


async def end_early(call: Call) -> None:
    await call.end()


async def half_an_event(call: Call) -> None:
    await call.write(b'data: {"choices": [{"in')
    call.cut()


async def garbage(call: Call) -> None:
    call.raw_write(b"zz\r\nthis is no chunk\r\n")
    await asyncio.Event().wait()


async def say_500(call: Call) -> None:
    await call.event({"error": {"message": "out of memory", "code": 500}})
    await call.done()


async def be_silent(call: Call) -> None:
    await asyncio.Event().wait()


class Stage:
    """What the decode engines say, and where they break.

    Attributes:
        breaks: for each decode call in turn: after how many events, and how; calls beyond the list answer well.
        spoken: the ids of the decode engines that spoke, in order.
    """

    def __init__(self, rig: Rig, *, with_ids: bool) -> None:
        self.rig = rig
        self.function = self._function(with_ids=with_ids)
        self.breaks: list[tuple[int, Break]] = []
        self.spoken: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.step_s = 0.0
        for engine in rig.engines:
            engine.knows = self.function.answer
            if engine.role is not Role.PREFILL:
                engine.behave = self.speak

    @staticmethod
    def _function(*, with_ids: bool) -> FunctionEngine:
        vocabulary = VOCABULARY if with_ids else PURE
        broken_of = 16 if with_ids else NEVER
        return FunctionEngine(vocabulary, with_ids=with_ids, holds_back=with_ids, by_text=not with_ids, eos_of=NEVER, broken_of=broken_of)

    def expected(self, route: Route, body: Mapping[str, Any]) -> list[bytes]:
        return self._function(with_ids=self.function.with_ids).events(route, body)

    async def speak(self, call: Call) -> None:
        number = len(self.spoken)
        self.spoken.append(call.engine.address.id)
        self.bodies.append(call.json)
        after, how = self.breaks[number] if number < len(self.breaks) else (10**6, cut)
        for i, event in enumerate(self.function.events(Route(call.path), call.json)):
            if i == after:
                await how(call)
                return
            await call.write(event)
            if self.step_s:
                await asyncio.sleep(self.step_s)
        await call.end()

    def count(self, name: str, label: str) -> int:
        found = re.search(rf'^{name}_total\{{\w+="{label}"\}} (\d+)', self.rig.metrics(), re.MULTILINE)
        return int(found[1]) if found else 0

    def requests(self, outcome: str) -> int:
        found = re.search(rf'^disagg_requests_total\{{.*outcome="{outcome}".*\}} (\d+)', self.rig.metrics(), re.MULTILINE)
        return int(found[1]) if found else 0

    @property
    def replays(self) -> int:
        return sum(int(n) for n in re.findall(r"^disagg_replays_total\{.*\} (\d+)", self.rig.metrics(), re.MULTILINE))


@asynccontextmanager
async def staged(*roles: Role, with_ids: bool = True, **settings: Any) -> AsyncIterator[Stage]:
    async with running_rig(*roles, wait=False, **{"probe_interval_s": 60, **settings}) as rig:
        for engine in rig.engines:
            engine.stream_token_ids = with_ids
        async with asyncio.timeout(SOON_S):
            await rig.router.controller.wait_settled()
            await rig.router.controller.wait_ready()
        yield Stage(rig, with_ids=with_ids)


def events_of(raw: bytes) -> list[bytes]:
    return [e + b"\n\n" for e in raw.split(b"\n\n") if e]


async def asked(stage: Stage, route: Route, body: Mapping[str, Any], **kwargs: Any) -> tuple[list[bytes], Mapping[str, str]]:
    async with asyncio.timeout(SOON_S), await stage.rig.post(dict(body), route.value, **kwargs) as response:
        assert response.status == 200, await response.text()
        return events_of(await response.read()), response.headers


def assert_whole(route: Route, events: list[bytes], stage: Stage, body: Mapping[str, Any]) -> None:
    told, wanted = Heard(route, events), Heard(route, stage.expected(route, body))
    assert (told.text, told.finish, told.ids) == (wanted.text, wanted.finish, wanted.ids)
    if stage.function.with_ids or route is Route.GENERATE:
        assert told.counts == wanted.counts


def error_of(events: list[bytes]) -> str:
    """The sentence of the error event that a stream ends with, instead of [DONE]."""
    assert b"data: [DONE]\n\n" not in events
    last = parse_event(events[-1])
    assert last is not None
    return str(last["error"]["message"])


# --- one break


@pytest.mark.parametrize("how", [cut, end_early, half_an_event, garbage, say_500])
@pytest.mark.parametrize("route", ROUTES)
async def test_a_stream_that_breaks_goes_on_on_the_other_engine(route: Route, how: Break) -> None:
    async with staged(*TWO) as stage:
        stage.breaks = [(6, how)]
        body = body_of(route)
        events, headers = await asked(stage, route, body)
        assert_whole(route, events, stage, body)
        assert len(set(stage.spoken)) == len(stage.spoken) == 2, "the engine that broke is left alone"
        assert headers["x-disagg-decode"] == stage.spoken[0], "the head was sent before anything broke"
        assert headers["x-disagg-attempts"] == "1"
        assert stage.count("disagg_resumes", "resumed") == 1
        assert stage.replays == 1
        await nothing_left(stage.rig)


@pytest.mark.parametrize("route", ROUTES)
async def test_the_next_attempt_has_a_room_and_a_rid_of_its_own(route: Route) -> None:
    async with staged(*TWO) as stage:
        stage.breaks = [(5, cut)]
        await asked(stage, route, body_of(route))
        first, second = stage.bodies
        assert first["rid"] != second["rid"]
        assert first["bootstrap_room"] != second["bootstrap_room"]
        prefill = [c.json for c in stage.rig.prefill.calls]
        assert [p["bootstrap_room"] for p in prefill] == [first["bootstrap_room"], second["bootstrap_room"]]
        key = "prompt" if route is Route.COMPLETIONS else "input_ids"
        assert prefill[1][key] == second[key], "prefill computes what decode goes on from"
        assert len(second[key]) > len(stage.function.prompt(route, body_of(route)))


@pytest.mark.parametrize("route", [Route.CHAT, Route.COMPLETIONS])
async def test_a_stream_without_ids_goes_on_in_text(route: Route) -> None:
    """SGLang's OpenAI routes: what was said is tokenized again. With a long way to the limit the text is the same up to there."""
    async with staged(*TWO, with_ids=False) as stage:
        stage.breaks = [(6, cut)]
        body = body_of(route)
        events, _ = await asked(stage, route, body)
        told, wanted = Heard(route, events), Heard(route, stage.expected(route, body))
        shorter, longer = sorted((told.text, wanted.text), key=len)
        assert len(shorter) > 10
        assert longer.startswith(shorter.rstrip("\N{REPLACEMENT CHARACTER}")), "the same, but for where the limit cuts it"
        assert all("return_token_ids" not in b for b in stage.bodies)
        await nothing_left(stage.rig)


async def test_with_one_engine_only_the_same_one_is_asked_again() -> None:
    async with staged(*PAIR) as stage:
        stage.breaks = [(4, cut)]
        body = body_of(Route.CHAT)
        events, _ = await asked(stage, Route.CHAT, body)
        assert_whole(Route.CHAT, events, stage, body)
        assert stage.spoken == ["decode-0", "decode-0"]
        await nothing_left(stage.rig)


async def test_a_stream_is_given_to_an_engine_that_refused_it_rather_than_lost() -> None:
    """A handoff that fails is often the engine's own 500. Who has heard nothing is told of it; a stream that has begun goes on."""

    async def refuse(call: Call) -> None:
        await call.json_answer({"error": {"message": "KV transfer failed", "code": 500}}, 500)

    async with staged(*PAIR) as stage:
        stage.breaks = [(4, cut), (0, refuse)]
        body = body_of(Route.CHAT)
        events, _ = await asked(stage, Route.CHAT, body)
        assert_whole(Route.CHAT, events, stage, body)
        assert stage.spoken == ["decode-0"] * 3
        stage.breaks = [(0, cut), (0, cut), (0, cut), (0, refuse)]
        async with await stage.rig.post(body) as response:
            assert response.status == 500
        await nothing_left(stage.rig)


async def test_silence_in_the_middle_goes_on_on_the_other_engine() -> None:
    async with staged(*TWO, between_tokens_timeout_s=0.3) as stage:
        stage.breaks = [(5, be_silent)]
        body = body_of(Route.CHAT)
        events, _ = await asked(stage, Route.CHAT, body)
        assert_whole(Route.CHAT, events, stage, body)
        first = next(e for e in stage.rig.engines if e.address.id == stage.spoken[0])
        assert stage.bodies[0]["rid"] in first.aborted, "the silent engine is told to stop"
        await nothing_left(stage.rig)


@pytest.mark.parametrize("route", ROUTES)
async def test_a_break_between_the_finish_reason_and_the_end_needs_no_engine(route: Route) -> None:
    body = body_of(route)
    async with staged(*TWO) as stage:
        whole = stage.expected(route, body)
        for back in range(1, 3):
            stage.breaks, stage.spoken = [(len(whole) - back, cut)], []
            events, _ = await asked(stage, route, body)
            assert_whole(route, events, stage, body)
            assert len(stage.spoken) == 1 + (route is Route.GENERATE and back == 2)
        await nothing_left(stage.rig)


async def test_a_break_after_done_is_the_end() -> None:
    async with staged(*TWO) as stage:
        body = body_of(Route.CHAT)

        async def no_last_chunk(call: Call) -> None:
            for event in stage.function.events(Route.CHAT, call.json):
                await call.write(event)
            stage.spoken.append(call.engine.address.id)
            call.cut()

        for engine in stage.rig.engines[1:]:
            engine.behave = no_last_chunk
        events, _ = await asked(stage, Route.CHAT, body)
        assert_whole(Route.CHAT, events, stage, body)
        assert len(stage.spoken) == 1
        await nothing_left(stage.rig)


# --- engines that speak on for a moment after they were told to stop


@pytest.mark.parametrize("route", ROUTES)
async def test_what_a_continuation_says_after_its_end_was_never_said(route: Route) -> None:
    """Its prefill engine dies as soon as its KV was handed over; decode's step that was under way then still comes."""
    async with staged(Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE) as stage:
        read = 0

        async def prefill(call: Call) -> None:
            nonlocal read
            read += 1
            if read == 2:
                call.cut()
            else:
                await answer_well(call)

        async def decode(call: Call) -> None:
            if len(stage.spoken) != 1:
                await stage.speak(call)
                return
            stage.spoken.append(call.engine.address.id)
            await until(lambda: bool(call.engine.aborted), SOON_S)
            for event in stage.function.events(route, call.json)[:4]:
                await call.write(event)
            await asyncio.Event().wait()

        for engine in stage.rig.engines:
            engine.behave = prefill if engine.role is Role.PREFILL else decode
            engine.abort_ends = False
        stage.breaks = [(5, cut)]
        body = body_of(route)
        events, _ = await asked(stage, route, body)
        assert_whole(route, events, stage, body)
        for engine in stage.rig.engines:
            engine.abort_ends = True


async def test_what_a_sample_says_after_it_was_given_up_was_never_said() -> None:
    """It is silent for too long, then speaks on; the engine that continues it breaks, too."""
    async with staged(Role.PREFILL, Role.DECODE, Role.DECODE, Role.DECODE, between_tokens_timeout_s=1.0) as stage:
        given_up: list[Call] = []
        continued: list[Call] = []

        async def decode(call: Call) -> None:
            events = stage.function.events(Route.CHAT, call.json)
            if not given_up:
                given_up.append(call)
                for event in events[:4]:
                    await call.write(event)
                await until(lambda: bool(call.engine.aborted), SOON_S)
                for event in events[4:6]:
                    await call.write(event)
                await asyncio.Event().wait()
            elif "input_ids" in call.json and not continued:
                continued.append(call)
                for event in events[:3]:
                    await call.write(event)
                call.cut()
            else:
                await stage.speak(call)

        for engine in stage.rig.engines[1:]:
            engine.behave, engine.abort_ends = decode, False
        body = body_of(Route.CHAT)
        events, _ = await asked(stage, Route.CHAT, {**body, "n": 2, "seed": 1})
        told = [v for e in events if (v := parse_event(e)) is not None]
        choices = [c for v in told for c in v.get("choices", ())]
        wanted = Heard(Route.CHAT, stage.expected(Route.CHAT, body)).text
        assert continued
        assert ["".join(c["delta"].get("content") or "" for c in choices if c["index"] == i) for i in range(2)] == [wanted] * 2


# --- more than one


@pytest.mark.parametrize("route", ROUTES)
async def test_a_stream_may_break_twice(route: Route) -> None:
    async with staged(*TWO, Role.DECODE) as stage:
        stage.breaks = [(5, cut), (4, say_500)]
        body = body_of(route)
        events, _ = await asked(stage, route, body)
        assert_whole(route, events, stage, body)
        assert len(set(stage.spoken)) == 3
        assert stage.count("disagg_resumes", "resumed") == 2
        await nothing_left(stage.rig)


@pytest.mark.parametrize("route", ROUTES)
async def test_a_stream_that_breaks_three_times_ends_with_an_error(route: Route) -> None:
    async with staged(*TWO, Role.DECODE, Role.DECODE) as stage:
        stage.breaks = [(5, cut), (4, cut), (4, cut)]
        body = body_of(route)
        events, _ = await asked(stage, route, body)
        assert error_of(events)
        assert len(stage.spoken) == 3
        assert stage.count("disagg_resumes", "resumed") == 2
        await nothing_left(stage.rig)


async def test_an_engine_that_says_something_else_is_not_believed() -> None:
    async with staged(*TWO) as stage:
        body = body_of(Route.GENERATE)

        async def other(call: Call) -> None:
            prompt = len(call.json["input_ids"])
            info = {"id": "x", "prompt_tokens": prompt, "completion_tokens": 1, "finish_reason": None}
            for word in ("a", "aa", "aaa"):
                await call.event({"text": word, "output_ids": [1], "meta_info": {**info, "completion_tokens": 7}})
            await call.done()

        async def first(call: Call) -> None:
            for engine in stage.rig.engines[1:]:
                engine.behave = other
            stage.breaks = [(4, cut)]
            await stage.speak(call)

        for engine in stage.rig.engines[1:]:
            engine.behave = first
        events, _ = await asked(stage, Route.GENERATE, body)
        assert "pieces" in error_of(events)
        await nothing_left(stage.rig)


# --- clients


async def test_a_client_may_read_slowly_meanwhile() -> None:
    async with staged(*TWO) as stage:
        stage.function.at_once = 2
        body = {**body_of(Route.CHAT, limit=40), "pad": "x"}
        stage.breaks = [(7, cut)]
        async with asyncio.timeout(SOON_S), await stage.rig.post(body) as response:
            raw = b""
            while data := await response.content.read(64):
                raw += data
                await asyncio.sleep(0)
        stage.function.at_once = 1
        told, wanted = Heard(Route.CHAT, events_of(raw)), Heard(Route.CHAT, stage.expected(Route.CHAT, body))
        assert (told.text, told.counts) == (wanted.text, wanted.counts)
        await nothing_left(stage.rig)


@pytest.mark.parametrize("when", ["continuation", "question"])
async def test_a_client_that_leaves_meanwhile_leaves_nothing_behind(when: str) -> None:
    async with staged(*TWO) as stage:
        stage.breaks = [(4, cut), (2, be_silent)]
        if when == "question":
            for engine in stage.rig.engines:
                engine.knows = None
            gate = asyncio.Event()

            async def never(_request: Any) -> Any:
                gate.set()
                await asyncio.Event().wait()

            for engine in stage.rig.engines:
                engine.tell = never
        response = await stage.rig.post(body_of(Route.CHAT))
        async with asyncio.timeout(SOON_S):
            await response.content.readuntil(b"\n\n")
            await (gate.wait() if when == "question" else until(lambda: len(stage.spoken) == 2, SOON_S))
        response.close()
        async with asyncio.timeout(SOON_S):
            await nothing_left(stage.rig)
            await until(lambda: "disagg_inflight 0.0" in stage.rig.metrics(), SOON_S)
        if when == "continuation":
            second = next(e for e in stage.rig.engines if e.address.id == stage.spoken[1])
            await until(lambda: stage.bodies[1]["rid"] in second.aborted, SOON_S)


async def test_one_of_two_samples_breaks() -> None:
    async with staged(*TWO) as stage:
        stage.breaks = [(4, cut)]
        body = {**body_of(Route.CHAT), "n": 2, "seed": 1}
        events, _ = await asked(stage, Route.CHAT, body)
        wanted = Heard(Route.CHAT, stage.expected(Route.CHAT, body_of(Route.CHAT)))
        values = [v for e in events if (v := parse_event(e)) is not None]
        for index in (0, 1):
            choices = [c for v in values for c in v["choices"] if c["index"] == index]
            assert "".join(c["delta"].get("content") or "" for c in choices) == wanted.text
            assert [c["finish_reason"] for c in choices if c["finish_reason"]] == [wanted.finish]
            assert sum("role" in c["delta"] for c in choices) == 1
        assert values[-1]["usage"]["completion_tokens"] == 2 * wanted.counts[1]
        assert events[-1] == b"data: [DONE]\n\n"
        assert len(stage.spoken) == 3
        await nothing_left(stage.rig)


# --- what cannot go on


@pytest.mark.parametrize(("name", "fields"), CASES[::2])
async def test_an_obstacle_ends_the_stream_with_a_sentence_that_says_why(name: str, fields: dict[str, Any]) -> None:
    async with staged(*TWO) as stage:
        route = Route.CHAT
        fields = {k: v for k, v in fields.items() if k not in {"prompt", "input_ids"}}
        stage.breaks = [(5, cut)]
        events, _ = await asked(stage, route, body_with(route, fields))
        assert name in error_of(events)
        assert stage.count("disagg_resumes", "impossible") == 1
        assert len(stage.spoken) == 1
        await nothing_left(stage.rig)


async def test_engines_that_do_not_know_the_ids_end_the_stream_with_an_error() -> None:
    async with staged(*TWO) as stage:
        for engine in stage.rig.engines:
            engine.knows = None
        stage.breaks = [(5, cut)]
        events, _ = await asked(stage, Route.CHAT, body_of(Route.CHAT))
        assert "cannot go on elsewhere" in error_of(events)
        await nothing_left(stage.rig)


# --- whole answers


async def whole_500(call: Call) -> None:
    await call.json_answer({"error": {"message": "out of memory"}}, 500)


@pytest.mark.parametrize("how", [cut, whole_500])
@pytest.mark.parametrize("fields", [{}, {"logprobs": True}, {"frequency_penalty": 1}, {"response_format": {"type": "json_object"}}])
async def test_a_whole_answer_is_asked_for_anew_on_another_engine(how: Behaviour, fields: dict[str, Any]) -> None:
    async with running_rig(*TWO, probe_interval_s=60) as rig:
        failed: list[FakeEngine] = []

        async def fail_once(call: Call) -> None:
            if failed:
                await answer_well(call)
            else:
                failed.append(call.engine)
                await how(call)

        for engine in rig.engines[1:]:
            engine.behave = fail_once
        body = {"model": "fake", "messages": [{"role": "user", "content": "a"}], **fields}
        async with asyncio.timeout(SOON_S), await rig.post(body) as response:
            assert response.status == 200
            assert (await response.json())["choices"][0]["message"]["content"] == "alpha beta gamma"
            assert response.headers["x-disagg-attempts"] == "2"
            assert response.headers["x-disagg-decode"] != failed[0].address.id
        calls = [c.json for e in rig.engines[1:] for c in e.calls]
        assert len({c["rid"] for c in calls}) == len({c["bootstrap_room"] for c in calls}) == 2
        assert len(failed[0].calls) == 1
        await nothing_left(rig)


async def test_a_lone_prefill_engine_whose_partner_died_gets_another_partner() -> None:
    """It says first that the transfer failed, before anything is known of the other."""
    async with running_rig(Role.PREFILL, Role.DECODE, Role.DECODE, probe_interval_s=60) as rig:
        failed: list[str] = []

        async def fail_once(call: Call) -> None:
            if failed:
                await answer_well(call)
            else:
                failed.append(call.json["rid"])
                await call.json_answer({"error": {"message": "KV transfer failed: the connection to decode was lost"}}, 500)

        rig.engines[0].behave = fail_once
        async with asyncio.timeout(SOON_S), await rig.post({"model": "fake", "messages": [{"role": "user", "content": "a"}]}) as response:
            assert response.status == 200
            assert response.headers["x-disagg-attempts"] == "2"
        assert [len(e.calls) for e in rig.engines] == [2, 1, 1], "not the same pair again"
        await nothing_left(rig)


@pytest.mark.parametrize("status", [400, 404, 413, 422])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_client_did_wrong_is_not_asked_again(status: int, stream: bool) -> None:
    async with running_rig(*TWO, probe_interval_s=60) as rig:

        async def refuse(call: Call) -> None:
            await call.json_answer({"error": {"message": "no"}}, status)

        for engine in rig.engines[1:]:
            engine.behave = refuse
        async with (
            asyncio.timeout(SOON_S),
            await rig.post({**body_of(Route.CHAT), "model": "fake", "stream": stream, "stream_options": None}) as response,
        ):
            assert response.status == status
        assert sum(len(e.calls) for e in rig.engines[1:]) == 1
        assert "disagg_replays_total{" not in rig.metrics()
        await nothing_left(rig)


async def test_no_more_than_a_few_requests_are_made_again_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults must not multiply the load: of twelve streams that break at once, three are made again at a time, and the others wait."""
    monkeypatch.setattr("disagg.policy.pace.FLOOR_S", 60.0)  # nobody gives the silent ones up meanwhile
    async with staged(*TWO, Role.DECODE) as stage:
        together = asyncio.Barrier(12)

        async def break_together(call: Call) -> None:
            async with asyncio.timeout(SOON_S):
                await together.wait()
            call.cut()

        stage.breaks = [*[(3, break_together)] * 12, *[(0, be_silent)] * 12]
        async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as group:
            asking = [group.create_task(stage.rig.post(body_of(Route.CHAT))) for _ in range(12)]
            responses = [await a for a in asking]
            budget = stage.rig.router.listener._owner._budget
            await until(lambda: len(stage.spoken) == 15 and budget.refused["budget"] >= 9, SOON_S)
        assert len(stage.spoken) == 15
        for response in responses:
            response.close()
        await nothing_left(stage.rig)


# --- what clients and operators are told


async def test_a_clients_deadline_is_kept_while_its_stream_is_prepared_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ids an engine is asked for them, and this one never says."""
    monkeypatch.setattr(owner, "ASK_LIMIT_S", 600.0)
    async with staged(*TWO, with_ids=False) as stage:

        async def never(_: web.Request) -> web.StreamResponse:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        for engine in stage.rig.engines:
            engine.tell = never
        stage.breaks = [(6, cut)]
        events, _ = await asked(stage, Route.CHAT, body_of(Route.CHAT), headers={"x-disagg-deadline-ms": "1500"})
        last = parse_event(events[-1])
        assert last is not None
        assert last["error"]["type"] == "deadline_exceeded"
        await nothing_left(stage.rig)


async def test_where_no_engine_is_left_the_error_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "SUSPECT_WAIT_S", 0.5)
    async with staged(*PAIR, with_ids=False, probe_interval_s=0.1, queue_timeout_s=0.5) as stage:
        stopping: list[asyncio.Future[None]] = []

        async def die(call: Call) -> None:
            stopping.append(asyncio.ensure_future(call.engine.stop()))  # noqa: TID251  # it ends this very task, too
            await asyncio.Event().wait()

        stage.breaks = [(6, die)]
        events, _ = await asked(stage, Route.CHAT, body_of(Route.CHAT))
        what, _, why = error_of(events).partition("; its stream cannot go on elsewhere: ")
        assert why
        assert what not in why
        assert "decode" in why


async def test_a_stream_that_goes_on_is_told_of_in_the_log_without_a_word_of_it() -> None:
    told = structlog.testing.CapturingLogger()
    log = structlog.wrap_logger(told, processors=[lambda _, __, event: ((), event)])
    async with staged(*TWO, log=log) as stage:
        stage.breaks = [(6, cut)]
        await asked(stage, Route.CHAT, body_of(Route.CHAT))
        (line,) = [call.kwargs for call in told.calls if call.kwargs["event"] == "a stream goes on elsewhere"]
        assert (line["engine"], line["why"]) == (stage.spoken[0], "connection_broken")
        assert set(line) == {"event", "request", "engine", "events", "why"}
