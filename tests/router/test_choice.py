"""Which engines a request gets: those that hold its prefix; the arm that it was drawn for; none, when it would come too late."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from disagg.config import PolicySection, SloSection
from disagg.model import Role
from disagg.policy.books import Books
from disagg.policy.cost import Fit
from disagg.policy.history import PrefixHistory
from disagg.policy.ledger import BYTES_PER_TOKEN
from tests.fake_engine import Call, answer_well, chat_chunk, until
from tests.router.conftest import CHAT, Rig, running_rig
from tests.router.test_lost import nothing_left, relay_of

P, D, U = Role.PREFILL, Role.DECODE, Role.UNIFIED
STREAM = {**CHAT, "stream": True}


def books_of(rig: Rig) -> Books:
    return relay_of(rig).admission.books


class Talk:
    """A conversation: each turn says again what was said before."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self._rig = rig
        self._chance = random.Random(seed)
        self._said = [{"role": "system", "content": self._words(3000)}]

    def _words(self, size: int) -> str:
        return "".join(self._chance.choice("abcdefgh ") for _ in range(size))

    async def turn(self, **more: Any) -> str:
        """Returns the prefill engine."""
        self._said.append({"role": "user", "content": self._words(1500)})
        async with await self._rig.post({**CHAT, "messages": self._said, **more}) as response:
            await response.read()
            assert response.status == 200
            self._said.append({"role": "assistant", "content": self._words(300)})
            return response.headers["x-disagg-prefill"]


@pytest.fixture
def slow_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are taken to read as fast as a GPU does, though these read nothing."""
    monkeypatch.setattr(Fit, "seen", lambda *_, **__: 1.0)


@pytest.mark.usefixtures("slow_readers")
async def test_a_conversation_keeps_its_engine_and_others_get_others() -> None:
    async with running_rig(P, P, P, D) as rig:
        talks = [Talk(rig, seed) for seed in range(3)]
        first = [await talk.turn() for talk in talks]
        assert len(set(first)) == 3, "nobody holds anything yet: they take turns"
        for turn in range(4):
            assert [await talk.turn(stream=bool(turn % 2)) for talk in talks] == first
        (hit,) = [line for line in rig.metrics().splitlines() if line.startswith("disagg_prefix_hit_tokens_total")]
        assert float(hit.split()[1]) > 4_000
        await nothing_left(rig)


@pytest.mark.usefixtures("slow_readers")
async def test_without_the_history_a_conversation_wanders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixHistory, "leading", lambda _self, _names: {})
    async with running_rig(P, P, P, D) as rig:
        talk = Talk(rig, 1)
        assert len({await talk.turn() for _ in range(4)}) > 1


@pytest.mark.usefixtures("slow_readers")
async def test_the_engine_that_holds_a_prefix_is_not_waited_for_longer_than_reading_it_anew_takes() -> None:
    async with running_rig(P, P, D) as rig:
        talk = Talk(rig, 1)
        first = await talk.turn()
        slot = next(e.slot for e in rig.router.controller.view.engines if e.id == first)
        books = books_of(rig)
        ahead = [books.forecast.sent(slot, 20_000, now=relay_of(rig).clock()) for _ in range(3)]
        assert await talk.turn() != first
        for reading in ahead:
            books.forecast.left(reading, now=relay_of(rig).clock())


async def test_names_are_made_only_where_they_decide_something() -> None:
    async with running_rig(P, D) as rig:
        await Talk(rig, 1).turn()
        assert books_of(rig).history.blocks(0) == 0
    async with running_rig(P, P, D) as rig:
        await Talk(rig, 1).turn()
        assert books_of(rig).history.blocks(0) + books_of(rig).history.blocks(1) == 4


@pytest.mark.usefixtures("slow_readers")
async def test_the_reason_of_a_choice_is_in_the_waterfall() -> None:
    async with running_rig(P, P, D) as rig:
        talk = Talk(rig, 1)
        await talk.turn()
        await talk.turn()
        async with rig.session.get(rig.admin + "/admin/requests") as response:
            newest = (await response.json())["requests"][0]["id"]
        async with rig.session.get(f"{rig.admin}/admin/requests/{newest}") as response:
            (attempt,) = (await response.json())["attempts"]
    assert "gives the first token in" in attempt["reason"]
    assert "it should hold" in attempt["reason"], "no engine says so"


# --- who would come too late


def taught(rig: Rig, slot: int, seconds: float) -> None:
    """The engine in this slot is known to take so long for any prompt."""
    forecast = books_of(rig).forecast
    at = relay_of(rig).clock() - 1000
    for number in range(12):
        reading = forecast.sent(slot, 100 + number, now=at + number * 20)
        for half in range(2 * 20):  # who is not called for a second has stood still
            if half == int(2 * seconds):
                forecast.read(reading, None, now=at + number * 20 + seconds)
            forecast.tick(at + number * 20 + (half + 1) / 2)
    assert not forecast.doubt(slot)


async def test_who_would_come_too_late_is_sent_away_at_once_and_told_when_to_come_again() -> None:
    async with running_rig(P, D, slo=SloSection(ttft_s=3.0)) as rig:
        taught(rig, 0, 1.0)
        forecast, now = books_of(rig).forecast, relay_of(rig).clock()
        ahead = [forecast.sent(0, 100, now=now) for _ in range(7)]
        async with await rig.post(CHAT) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] in {"4", "5"}, "seven seconds of waiting, one of its own, three are allowed"
            error = (await response.json())["error"]
        assert "after the limit of 3 s" in error["message"]
        assert 'disagg_shed_total{reason="late"} 1.0' in rig.metrics()
        assert not rig.prefill.calls
        async with await rig.post(CHAT, headers={"x-disagg-priority": "1"}) as response:
            assert response.status == 503, "who is more important may wait twice as long, and eight seconds are more"
        for reading in ahead[3:]:
            forecast.left(reading, now=now)
        async with await rig.post(CHAT) as response:
            assert response.status == 503
        async with await rig.post(CHAT, headers={"x-disagg-priority": "1"}) as response:
            assert response.status == 200
        for reading in ahead[:3]:
            forecast.left(reading, now=now)
        async with await rig.post(CHAT) as response:
            assert response.status == 200
        await nothing_left(rig)


async def test_nobody_is_sent_away_for_what_is_not_known_well_or_for_their_own_prompt() -> None:
    async with running_rig(P, D, slo=SloSection(ttft_s=0.5)) as rig:
        forecast, now = books_of(rig).forecast, relay_of(rig).clock()
        ahead = [forecast.sent(0, 100_000, now=now) for _ in range(3)]
        async with await rig.post(CHAT) as response:
            assert response.status == 200, "that it takes long is what another machine does"
        for reading in ahead:
            forecast.left(reading, now=now)
        taught(rig, 0, 5.0)
        async with await rig.post(CHAT) as response:
            assert response.status == 200, "it is alone: sooner is not to be had"


# --- pairs against unified engines


async def speak(call: Call) -> None:
    if call.engine.role is P:
        return await answer_well(call)
    for word in ("a", " b", " c"):
        await call.event(chat_chunk(word))
    await call.event(chat_chunk("", finish="stop"))
    await call.done()
    return None


async def test_a_share_of_the_traffic_goes_to_unified_engines_and_both_are_compared() -> None:
    async with running_rig(P, D, U, behave=speak, policy=PolicySection(unified_share=0.3)) as rig:
        alone = 0
        for _ in range(100):
            async with await rig.post(STREAM) as response:
                await response.read()
                alone += response.headers["x-disagg-decode"].startswith("unified")
        assert 10 <= alone <= 55
        async with rig.session.get(rig.admin + "/admin/ab") as response:
            compared = await response.json()
    assert [(arm["arm"], arm["streams"]) for arm in compared["arms"]] == [("pairs", 100 - alone), ("unified", alone)]
    assert all(arm["good"] == arm["streams"] and arm["ttft_p50_s"] > 0 for arm in compared["arms"])
    assert compared["arms"][0]["engine_hours"] == pytest.approx(2 * compared["arms"][1]["engine_hours"], rel=0.05)


async def test_an_arm_that_is_gone_costs_nobody_an_answer_and_is_not_compared_by_the_others() -> None:
    async with running_rig(P, D, U, behave=speak, policy=PolicySection(unified_share=1.0), probe_interval_s=60) as rig:
        await rig.engine(U).stop()
        async with await rig.post(STREAM) as response:
            assert (response.status, response.headers["x-disagg-decode"]) == (200, "decode-0")
            await response.read()
        await nothing_left(rig)
        async with rig.session.get(rig.admin + "/admin/ab") as response:
            compared = await response.json()
    assert [arm["streams"] for arm in compared["arms"]] == [0, 0], "it was drawn for the other arm"


@pytest.mark.usefixtures("slow_readers")
async def test_the_status_tells_what_goes_to_a_unified_engine() -> None:
    async with running_rig(P, D, U) as rig:
        books = books_of(rig)

        async def longest() -> int:
            async with rig.session.get(rig.admin + "/admin/cluster") as response:
                found: int = (await response.json())["unified_up_to_tokens"]["fake"]
                return found

        for _ in range(40):
            books.in_flight.start(1)
        assert await longest() == 1 << 17, "the decode engine is busy, and the unified one is not"
        few: list[int] = []
        many: list[int] = []
        for found, writing in ((few, 2), (many, 8)):
            for _ in range(writing):
                books.forecast.began(2, 1000)
            found.append(await longest())
            for _ in range(writing):
                books.forecast.ended(2, 1000)
        for _ in range(40):
            books.in_flight.end(1)
    assert 1 << 17 > few[0] > many[0] > 0, "reading pauses the answers that a unified engine writes"


# --- what is learnt of answers that are no streams


async def first_read_then_written(call: Call) -> None:
    """Prefill takes 30 ms; decode answers when it is through, or at once."""
    if call.engine.role is P:
        await asyncio.sleep(0.03)
        return await answer_well(call)
    await asyncio.sleep(0.06)
    return await answer_well(call)


async def first_written_then_read(call: Call) -> None:
    await asyncio.sleep(0.06 if call.engine.role is P else 0.03)
    return await answer_well(call)


async def test_whole_answers_tell_how_long_their_prompts_took() -> None:
    async with running_rig(P, D, behave=first_read_then_written) as rig:
        for _ in range(12):
            async with await rig.post(CHAT) as response:
                assert response.status == 200
        forecast = books_of(rig).forecast
        await until(lambda: forecast.samples(0)[0] >= 10)
        assert 0.03 <= forecast.pass_s(0, 20) < 0.06, "not what the whole answer took"
        await nothing_left(rig)


async def test_a_whole_answer_that_comes_before_its_prefill_engine_has_ended_tells_nothing() -> None:
    async with running_rig(P, D, behave=first_written_then_read) as rig:
        for _ in range(12):
            async with await rig.post(CHAT) as response:
                assert response.status == 200
        assert books_of(rig).forecast.samples(0)[0] == 0
        await nothing_left(rig)


async def test_samples_of_one_request_are_not_in_each_others_way() -> None:
    """Each waits for those before it, and all of them together longer than anybody may."""
    async with running_rig(P, D, slo=SloSection(ttft_s=3.0)) as rig:
        taught(rig, 0, 1.0)
        async with await rig.post({**CHAT, "n": 16}) as response:
            assert response.status == 200
            assert len((await response.json())["choices"]) == 16
        await nothing_left(rig)


async def test_the_first_answer_may_be_empty() -> None:
    async with running_rig(U, U) as rig:
        forecast = books_of(rig).forecast
        forecast.answered(0)
        assert forecast.best_batch(0, limit_s=0.1, kv_tokens=1000) >= 1


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_a_prompt_of_token_ids_is_as_long_as_it_is(path: str) -> None:
    """Of text it is estimated from its bytes; ids take more of them, or fewer, and say nothing of text."""
    ids = list(range(100_000, 100_400))
    body = {"input_ids": ids, "stream": True} if path == "/generate" else {"model": "fake", "prompt": ids, "stream": True}
    read: list[int] = []

    async def behave(call: Call) -> None:
        read.extend(reading.new for reading in books.forecast._queue[0])
        await answer_well(call)

    async with running_rig(P, P, D, behave=behave) as rig:
        books = books_of(rig)
        async with await rig.post(body, path) as response:
            await response.read()
        assert set(read) == {400}
        async with await rig.post({**body, "stream": False}, path) as response:
            await response.read()
        assert books.ledger.bytes_per_token("fake") == BYTES_PER_TOKEN, "digits are no text"
