"""Engines that are given up while somebody waits for them, and connections that never come about."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from disagg.errors import EngineError
from disagg.model import Choice, Role
from disagg.router.relay import Relay
from disagg.server import STALL_S
from tests.fake_engine import Call, answer_well, chat_chunk, until
from tests.router.conftest import CHAT, Rig, running_rig

STREAM = {**CHAT, "stream": True}
NEVER_S = 600.0
"""Longer than any test: what ends sooner was not ended by a limit."""
SOON_S = 10.0
"""Much longer than it takes: the kernel gives up a connection after two minutes, and that is not what is to be seen."""


async def forever(call: Call) -> None:
    await asyncio.Event().wait()


async def one_word(call: Call) -> None:
    if call.engine.role is Role.DECODE:
        await call.event(chat_chunk("one"))
    await asyncio.Event().wait()


@pytest.fixture
async def rig_of_two() -> AsyncIterator[Rig]:
    """A pair at which nobody looks, and connections that may take for ever."""
    async with running_rig(Role.PREFILL, Role.DECODE, probe_interval_s=60, connect_timeout_s=NEVER_S) as made:
        yield made


def relay_of(rig: Rig) -> Relay:
    return rig.router._relay


async def nothing_left(rig: Rig) -> None:
    """No engine works for anybody, and the router counts nothing."""
    books = relay_of(rig).admission.books
    await until(lambda: not any(e.live for e in rig.engines) and not any(books.in_flight.now))
    assert books.is_empty
    books.check()


async def test_what_is_handed_over_shows_that_an_engine_is_at_work(rig_of_two: Rig) -> None:
    relay = relay_of(rig_of_two)
    began = relay.clock()
    async with await rig_of_two.post(STREAM) as response:
        await response.read()
    assert relay.pace.reads_until(0, 1, began) > began
    assert relay.pace.reads_until(0, 1, relay.clock()) < began, "nothing since then"


async def test_a_router_that_stood_still_believes_no_time_across_that(rig_of_two: Rig) -> None:
    relay, matcher = relay_of(rig_of_two), rig_of_two.router.controller.matcher
    forecast = relay.admission.books.forecast
    assert matcher is not None
    told: list[float] = []
    matcher.stalled = lambda: told.append(relay.clock())  # type: ignore[method-assign]
    reading = forecast.sent(0, 100, now=relay.clock())
    time.sleep(STALL_S + 0.2)  # noqa: ASYNC251  # nothing runs meanwhile: that is what is to be seen
    await until(lambda: reading.blind and bool(told))
    forecast.left(reading, now=relay.clock())


async def test_upkeep_goes_on_though_a_part_of_it_has_failed_once(rig_of_two: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    relay, seen = relay_of(rig_of_two), asyncio.get_running_loop().create_future()
    upkeep = relay.admission.tick

    def fails_once(now: float) -> None:
        if not seen.done():
            seen.set_result(now)
            raise RuntimeError("a fault of ours")
        upkeep(now)

    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    monkeypatch.setattr(relay.admission, "tick", fails_once)
    failed_at = await seen
    await until(lambda: relay._expected_at > failed_at + 0.5)
    assert [str(error) for error in told] == ["a fault of ours"]


@contextlib.contextmanager
def hole(port: int) -> Iterator[None]:
    """Something that listens on a port and never accepts: connecting takes for ever."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        for _ in range(2):  # the queue's one place, and the one that Linux gives on top
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_an_engine_that_is_lost_before_the_first_token_is_replaced(role: Role) -> None:
    async with running_rig(Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE, probe_interval_s=60) as rig:
        for engine in rig.engines:
            engine.behave = forever
        asking = asyncio.ensure_future(rig.post(CHAT))  # noqa: TID251  # the client's own task
        await until(lambda: sum(len(e.calls) for e in rig.engines) == 2)
        first = next(e for e in rig.engines if e.role is role and e.calls)
        for engine in rig.engines:
            engine.behave = answer_well
        relay_of(rig).engine_lost(first.address.id, "it was unplugged")
        async with asyncio.timeout(SOON_S), await asking as response:
            assert response.status == 200
            assert response.headers["x-disagg-attempts"] == "2"
            assert response.headers[f"x-disagg-{role}"] != first.address.id
        await nothing_left(rig)
        assert 'disagg_replays_total{reason="engine_lost"} 1.0' in rig.metrics()


async def test_an_engine_that_was_lost_is_not_asked_again_though_it_is_the_idlest() -> None:
    """The view still calls it ready: it is the request itself that remembers."""
    async with running_rig(Role.PREFILL, Role.DECODE, Role.DECODE, probe_interval_s=60) as rig:
        for engine in rig.engines:
            engine.behave = forever
        asking = []
        for number in (1, 2):
            asking.append(asyncio.ensure_future(rig.post(CHAT)))  # noqa: TID251
            await until(lambda n=number: sum(len(e.calls) for e in rig.engines) == 2 * n)  # type: ignore[misc]
        for engine in rig.engines:
            engine.behave = answer_well
        relay_of(rig).engine_lost(rig.engine(Role.DECODE, 0).address.id, "it was unplugged")
        async with asyncio.timeout(SOON_S), await asking[0] as response:
            assert (response.status, response.headers["x-disagg-decode"]) == (200, "decode-1")
        asking[1].cancel()
        await asyncio.gather(asking[1], return_exceptions=True)
        await nothing_left(rig)


async def test_a_stream_that_has_begun_ends_with_an_error_event_when_its_engine_is_lost(rig: Rig) -> None:
    rig.decode.behave = rig.prefill.behave = one_word
    async with await rig.post(STREAM) as response:
        assert b"one" in await response.content.readuntil(b"\n\n")
        relay_of(rig).engine_lost(rig.decode.address.id, "it was unplugged")
        async with asyncio.timeout(SOON_S):
            rest = await response.text()
    assert "it was unplugged" in rest
    assert "[DONE]" not in rest
    await nothing_left(rig)


async def test_what_is_lost_elsewhere_disturbs_nobody(rig: Rig) -> None:
    rig.decode.behave = rig.prefill.behave = one_word
    async with await rig.post(STREAM) as response:
        await response.content.readuntil(b"\n\n")
        relay_of(rig).engine_lost(rig.prefill.address.id, "decode has what it needs")
        relay_of(rig).engine_lost(type(rig.decode.address.id)("decode-7"), "a stranger")
        assert len(rig.decode.live) == 1
    await nothing_left(rig)


async def test_an_engine_that_is_lost_while_it_is_being_connected_is_replaced_at_once() -> None:
    async with running_rig(Role.PREFILL, Role.DECODE, Role.DECODE, probe_interval_s=60, connect_timeout_s=NEVER_S) as rig:
        first = rig.engine(Role.DECODE, 0)
        await first.stop()
        with hole(first.port):
            asking = asyncio.ensure_future(rig.post(CHAT))  # noqa: TID251
            await until(lambda: relay_of(rig).legs_of(1) == 1)
            relay_of(rig).engine_lost(first.address.id, "it was unplugged")
            async with asyncio.timeout(SOON_S), await asking as response:
                assert (response.status, response.headers["x-disagg-decode"]) == (200, "decode-1")
        await nothing_left(rig)


async def test_a_client_that_leaves_while_one_engine_is_being_connected_leaves_no_count_behind(rig_of_two: Rig) -> None:
    """Decode's idle connection is at hand, prefill's must be made: neither is counted as busy for ever."""
    rig = rig_of_two
    async with await rig.post(CHAT) as response:
        assert response.status == 200
    await nothing_left(rig)
    await rig.prefill.stop()
    with hole(rig.prefill.port):
        with pytest.raises(TimeoutError):
            await rig.post(CHAT, timeout=aiohttp.ClientTimeout(total=0.3))
        await until(lambda: not any(relay_of(rig).admission.books.in_flight.now))
        assert min(relay_of(rig).admission.books.in_flight.now) == 0


async def test_those_who_choose_while_another_connects_see_its_engines_taken() -> None:
    async with running_rig(Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE) as rig:
        for engine in rig.engines:
            engine.behave = forever
        asking = [asyncio.ensure_future(rig.post(CHAT)) for _ in range(4)]  # noqa: TID251
        await until(lambda: sum(len(e.calls) for e in rig.engines) == 8)
        assert [len(e.calls) for e in rig.engines] == [2, 2, 2, 2]
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await nothing_left(rig)


# --- engines that leave in good health


async def test_whatever_can_go_on_elsewhere_moves_and_no_budget_for_faults_is_spent() -> None:
    """Eight at once, where three replays would be allowed for a fault; a stream that has begun and cannot go on stays."""
    async with running_rig(Role.UNIFIED, Role.UNIFIED, probe_interval_s=60) as rig:
        one, other = rig.engine(Role.UNIFIED, 0), rig.engine(Role.UNIFIED, 1)
        for engine in (one, other):
            engine.behave = speaks_if_asked_to_stream
        asking = [asyncio.ensure_future(rig.post(CHAT)) for _ in range(16)]  # noqa: TID251
        stream = await rig.post({**STREAM, "frequency_penalty": 1.0})
        await stream.content.readuntil(b"\n\n")
        await until(lambda: len(one.calls) + len(other.calls) == 17)
        leaver = one if stream.headers["x-disagg-decode"] == one.address.id else other
        for engine in (one, other):
            engine.behave = answer_well
        whole = sum(not call.json.get("stream") for call in leaver.calls)
        assert relay_of(rig).move(leaver.address.id, "its host stops") == whole > 3
        assert relay_of(rig).move(leaver.address.id, "its host stops") == 0
        assert relay_of(rig).legs_of(0 if leaver is one else 1) >= 1, "the stream that cannot move"
        assert f'disagg_replays_total{{reason="moved"}} {whole}.0' in await settled(rig, f'reason="moved"}} {whole}.0')
        staying = one if leaver is other else other
        relay_of(rig).engine_lost(staying.address.id, "enough")
        stream.close()
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await nothing_left(rig)


async def settled(rig: Rig, words: str) -> str:
    """The metrics, once these words are in them."""
    await until(lambda: words in rig.metrics())
    return rig.metrics()


async def speaks_if_asked_to_stream(call: Call) -> None:
    if call.json.get("stream"):
        await call.event(chat_chunk("one"))
    await asyncio.Event().wait()


async def test_the_routers_own_questions_never_move(rig: Rig) -> None:
    """A canary proves one very pair: asked of another it would prove nothing."""
    rig.decode.behave = rig.prefill.behave = forever
    view = rig.router.controller.view
    choice = Choice(view.engines[0], view.engines[1], "a test")
    asking = asyncio.ensure_future(relay_of(rig).ask(choice, b'{"text":"x"}'))  # noqa: TID251
    await until(lambda: bool(rig.decode.calls))
    assert relay_of(rig).move(rig.decode.address.id, "its host stops") == 0
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await nothing_left(rig)


async def test_what_is_asked_beside_ends_at_its_limit_though_nobody_accepts_the_connection(rig_of_two: Rig) -> None:
    decode = rig_of_two.router.controller.view.engines[1]
    await rig_of_two.decode.stop()
    with hole(decode.address.port):
        async with asyncio.timeout(SOON_S):
            with pytest.raises(EngineError):
                await relay_of(rig_of_two).post(decode, "/v1/tokenize", b"{}", 0.3)
