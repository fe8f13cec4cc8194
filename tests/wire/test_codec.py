"""Messages become frames and frames messages; what is no frame is refused in one sentence, quickly and for little memory."""

from __future__ import annotations

import contextlib
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from disagg.wire import codec
from disagg.wire.codec import (
    DEPTH_LIMIT,
    FRAME_LIMIT,
    MAJOR,
    MINOR,
    VALUES_LIMIT,
    FrameError,
    FrameTooComplexError,
    FrameTooDeepError,
    FrameTooLargeError,
    Reader,
    UnknownKindError,
    VersionError,
    depth,
    encode,
    minor_of,
    to_host,
    to_router,
)
from disagg.wire.messages import Ack, Goodbye, Heartbeat, Hello, Message, ToHost, ToRouter
from tests.wire.make_golden import DECODE, FRAMES, LATER_FIELDS, PREFILL, SAMPLES

HEADER = b"dsg" + bytes((MAJOR, MINOR))
BY_KIND = {type(message).__name__.lower(): message for message in SAMPLES}
SECRET = "hunter2"  # what no sentence may repeat


def reader_of(message: Message) -> Reader[Any]:
    return to_router if isinstance(message, ToRouter) else to_host


def frame(**fields: Any) -> bytes:
    return HEADER + msgspec.msgpack.encode(fields)


def refused(found: bytes, reader: Reader[Any] = to_router) -> FrameError:
    with pytest.raises(FrameError) as caught:
        reader.decode(found)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None, "a traceback in the log would quote the frame"
    assert len(str(caught.value)) < 300
    return caught.value


# --- there and back


def test_there_is_a_sample_of_every_kind_with_every_field_set() -> None:
    assert {type(m) for m in SAMPLES} == {*ToRouter.__args__, *ToHost.__args__}
    for message in (*SAMPLES, PREFILL):
        defaults = {f.name: f.default for f in msgspec.structs.fields(message) if f.name not in LATER_FIELDS}
        assert all(getattr(message, name) != default for name, default in defaults.items()), message


@pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert reader_of(message).decode(encode(message)) == message


@pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_never_goes_the_other_way(message: Message) -> None:
    wrong = to_host if reader_of(message) is to_router else to_router
    error = refused(encode(message), wrong)
    assert "only the other side may send" in str(error)
    assert type(error) is FrameError


@pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)
def test_fields_of_later_releases_are_tolerated_wherever_they_stand(message: Message) -> None:
    fields = msgspec.msgpack.decode(encode(message)[5:])

    def grow(value: Any) -> Any:
        if isinstance(value, dict):
            return {"first": [{}], **{k: grow(v) for k, v in value.items()}, "later": {"a": [1, None, 2.5, b"x"]}}
        return [grow(v) for v in value] if isinstance(value, list) else value

    assert reader_of(message).decode(frame(**grow(fields))) == message


def test_a_field_that_came_later_travels_and_is_false_where_an_older_agent_says_nothing_of_it() -> None:
    leaving = Heartbeat(7, "n0nce", 41, 40, (msgspec.structs.replace(PREFILL, leaving=True, switches=2),))
    assert to_router.decode(encode(leaving)) == leaving
    for place in FRAMES.glob("*/heartbeat.bin"):
        older = to_router.decode(place.read_bytes())
        assert isinstance(older, Heartbeat)
        assert not any(report.leaving or report.switches for report in older.engines)


def test_secrets_are_not_shown() -> None:
    assert PREFILL.api_key not in repr(BY_KIND["heartbeat"])
    assert repr(PREFILL) == f"<EngineReport box-1-prefill prefill ready pid=4711 counter={2**40 + 1}>"


# --- frames of the past

OLD_FRAMES = sorted(FRAMES.glob("*/*.bin"))


@pytest.mark.parametrize("place", OLD_FRAMES, ids=lambda p: f"{p.parent.name} {p.stem}")
def test_a_golden_frame_still_means_what_it_meant(place: Path) -> None:
    message = BY_KIND[place.stem]
    assert reader_of(message).decode(place.read_bytes()) == message
    assert f"{MAJOR}.{minor_of(place.read_bytes())}" == place.parent.name


@pytest.mark.parametrize("place", OLD_FRAMES, ids=lambda p: f"{p.parent.name} {p.stem}")
def test_an_old_reader_finds_everything_it_knows_in_a_frame_of_today(place: Path) -> None:
    message, old = BY_KIND[place.stem], place.read_bytes()
    new = encode(message)
    assert new[:4] == old[:4], "another major version"
    assert_holds(msgspec.msgpack.decode(new[5:]), msgspec.msgpack.decode(old[5:]))


def assert_holds(new: Any, old: Any) -> None:
    if isinstance(old, dict):
        for name, value in old.items():
            assert_holds(new[name], value)
    elif isinstance(old, list):
        assert len(new) == len(old)
        for ours, theirs in zip(new, old, strict=True):
            assert_holds(ours, theirs)
    else:
        assert (type(new), new) == (type(old), old)


def test_a_frame_is_kept_for_every_kind_of_every_version() -> None:
    assert {p.name for p in FRAMES.iterdir()} == {f"{MAJOR}.{minor}" for minor in range(MINOR + 1)}
    assert {p.stem for p in (FRAMES / f"{MAJOR}.{MINOR}").iterdir()} == set(BY_KIND)


# --- versions and kinds


@pytest.mark.parametrize("theirs", [(MAJOR + 1, 0), (MAJOR - 1, 7), (255, 255)])
def test_another_major_version_is_refused_with_both_in_the_sentence(theirs: tuple[int, int]) -> None:
    error = refused(b"dsg" + bytes(theirs) + b"\xc1 of which nothing is read")
    assert isinstance(error, VersionError)
    assert f"version {theirs[0]}.{theirs[1]} " in str(error)
    assert f"this one {MAJOR}.{MINOR}" in str(error)


@pytest.mark.parametrize("minor", [0, 1, 200, 255])
def test_another_minor_version_is_accepted(minor: int) -> None:
    assert to_host.decode(b"dsg" + bytes((MAJOR, minor)) + encode(Ack(3))[5:]) == Ack(3)


def test_an_unknown_kind_is_an_error_of_its_own() -> None:
    error = refused(frame(kind=SECRET, seq=1))
    assert isinstance(error, UnknownKindError)
    assert error.why == "unknown_kind"


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (b"", "does not begin"),
        (b"dsg\x01", "does not begin"),
        (b"GET / HTTP/1.1\r\n", "does not begin"),
        (HEADER, "not valid msgpack"),
        (HEADER + b"\xc1", "not valid msgpack"),
        (HEADER + b"\xc0", "no kind"),
        (HEADER + b"\x93\x01\x02\x03", "no kind"),
        (frame(), "no kind"),
        (frame(kind=7), "no kind"),
        (frame(kind=None, name=SECRET), "no kind"),
        (HEADER + b"\x81\xa4kind\xa2\xff\xfe", "not valid msgpack"),
        (frame(kind="goodbye"), "missing required field `incarnation`"),
        (frame(kind="goodbye", incarnation="x", nonce="n"), "Expected `int`, got `str` - at `$.incarnation`"),
        (frame(kind="goodbye", incarnation=-1, nonce="n"), "`int` >= 0"),
        (frame(kind="goodbye", incarnation=1, nonce=SECRET * 100), "length <= 128"),
        (frame(kind="register", name="a", public_key="b", roles=[SECRET]), "a value that this release does not know - at `$.roles[0]`"),
        (encode(Goodbye(1, "n")) + b"\x00", "not valid msgpack"),
        (encode(Goodbye(1, "n"))[:-1], "not valid msgpack"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_is_no_message_is_garbage_and_the_sentence_says_why(found: bytes, says: str) -> None:
    error = refused(found)
    assert (type(error), error.why) == (FrameError, "garbage")
    assert says in str(error)


@pytest.mark.parametrize(
    "field",
    [
        {"id": "two words"},
        {"id": "line\r\nbreak"},
        {"id": ""},
        {"id": "x" * 129},
        {"id": "prefill\n"},
        {"host": "user@evil/path"},
        {"host": "a b"},
        {"host": "10.0.0.1\n"},
        {"port": 65536},
        {"port": -1},
        {"bootstrap_port": 70000},
        {"api_key": "a\r\nHost: b"},
        {"pid": -1},
    ],
    ids=str,
)
def test_what_could_break_a_url_or_a_header_does_not_come_in(field: dict[str, Any]) -> None:
    report = msgspec.to_builtins(PREFILL) | field
    error = refused(frame(kind="heartbeat", incarnation=1, nonce="n", seq=1, acked=0, engines=[report]))
    assert f"`$.engines[0].{next(iter(field))}`" in str(error)


# --- size and depth


def test_a_frame_over_a_mebibyte_is_refused_on_both_sides() -> None:
    big = msgspec.structs.replace(DECODE, reason="x" * FRAME_LIMIT)
    with pytest.raises(FrameTooLargeError, match=r"a Heartbeat of \d+ bytes is over the limit of 1048576"):
        encode(Heartbeat(1, "n", 1, 0, (big,)))
    assert isinstance(refused(b"\0" * (FRAME_LIMIT + 1)), FrameTooLargeError)
    just = frame(kind="goodbye", incarnation=1, nonce="n", later=b"")
    room = FRAME_LIMIT - len(just) - 3
    assert to_router.decode(frame(kind="goodbye", incarnation=1, nonce="n", later=b"\x91" * room)[:FRAME_LIMIT]) == Goodbye(1, "n")


def test_a_number_of_more_than_64_bits_cannot_be_sent() -> None:
    with pytest.raises(FrameTooLargeError, match="a Ack holds a number of more than 64 bits"):
        encode(Ack(2**64))


def nested(levels: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value] if kind == "array" else {"k": value}
    return value


@pytest.mark.parametrize("kind", ["array", "map"])
def test_depth_is_limited_inside_unknown_fields_too(kind: str) -> None:
    fields = {"kind": "goodbye", "incarnation": 1, "nonce": "n"}
    filler: list[Any] = [[]] * (DEPTH_LIMIT + 1)  # so that the cheap check is not enough
    assert to_router.decode(frame(**fields, later=nested(DEPTH_LIMIT - 1, kind), more=filler)) == Goodbye(1, "n")
    error = refused(frame(**fields, later=nested(DEPTH_LIMIT, kind)))
    assert isinstance(error, FrameTooDeepError)
    assert f"more than {DEPTH_LIMIT} deep" in str(error)


START = b"\x84" + msgspec.msgpack.encode("kind") + msgspec.msgpack.encode("goodbye") + msgspec.msgpack.encode("later")
BOMBS = {
    "arrays": b"\x91" * 100_000,
    "arrays of two": b"\x92\xc0" * 100_000,
    "maps": b"\x81\xa1k" * 100_000,
    "map keys": b"\x81" * 100_000,
    "counted arrays": b"\xdd\0\0\0\1" * 100_000,
    "counted maps": b"\xdf\0\0\0\1" * 100_000,
    "a lying array": b"\xdd\xff\xff\xff\xff",
    "a lying short array": b"\xdc\xff\xff",
    "a lying map": b"\xdf\xff\xff\xff\xff\xc0",
    "lying arrays": b"\xdd\x0f\xff\xff\xff" * 16,
    "a lying string": b"\xdb\xff\xff\xff\xff",
    "lying bytes": b"\xc6\xff\xff\xff\xffx",
    "a lying extension": b"\xc9\xff\xff\xff\xff\x01",
    "a wide array of nothing": b"\xdd" + (900_000).to_bytes(4, "big") + b"\xc0" * 900_000,
    "a wide array of arrays": b"\xdd" + (900_000).to_bytes(4, "big") + b"\x90" * 900_000,
    "a wide map": b"\xdf" + (400_000).to_bytes(4, "big") + b"\xa0\xc0" * 400_000,
    "wide short arrays": (b"\xdc\xff\xff" + b"\xc0" * 0xFFFF) * 14,
    "engines": msgspec.msgpack.encode("engines") + b"\xdd\x07\xff\xff\xff",
}


@pytest.mark.parametrize("before", [b"", START], ids=["bare", "in an unknown field"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_at_once_and_cost_no_memory(bomb: str, before: bytes) -> None:
    found = (HEADER + before + BOMBS[bomb])[:FRAME_LIMIT]
    tracemalloc.start()
    began = time.process_time()
    try:
        refused(found)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 0.5, "it blocks the router's loop"
    assert peak < 4 * FRAME_LIMIT


def test_a_list_of_engines_that_lies_about_its_length_is_refused_before_it_is_made() -> None:
    fields = {"kind": "hello", "name": "a", "incarnation": 1, "nonce": "n", "engines": []}
    for count in (b"\xdd\x07\xff\xff\xff", b"\xdc\xff\xff"):
        assert isinstance(refused(frame(**fields)[:-1] + count), FrameError)


def test_values_are_limited_and_64_engines_need_half_of_that() -> None:
    many = Heartbeat(1, "n", 1, 0, (PREFILL,) * 64)
    assert to_router.decode(encode(many)) == many
    fields = {"kind": "goodbye", "incarnation": 1, "nonce": "n"}
    assert to_router.decode(frame(**fields, later=[[]] * (VALUES_LIMIT - 9))) == Goodbye(1, "n")
    error = refused(frame(**fields, later=[[]] * VALUES_LIMIT))
    assert isinstance(error, FrameTooComplexError)
    far_more = Heartbeat(1, "n", 1, 0, (PREFILL,) * 256)
    with pytest.raises(FrameTooComplexError):
        to_router.decode(encode(far_more))


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=40) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=5), inner, max_size=20),
    max_leaves=40,
)


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth_of, inner)) if inner else 0


@given(JSONISH)
def test_depth_is_what_it_says(value: Any) -> None:
    assert depth(msgspec.msgpack.encode(value)) == depth_of(value)


# --- anything at all


def never_anything_else(found: bytes) -> None:
    for reader in (to_router, to_host):
        with contextlib.suppress(FrameError):
            assert isinstance(reader.decode(found), Message)


@given(st.binary(max_size=2000))
@example(b"")
def test_any_bytes_at_all(found: bytes) -> None:
    never_anything_else(found)
    never_anything_else(HEADER + found)


@given(JSONISH, st.sampled_from([*BY_KIND, "later"]), JSONISH)
def test_any_value_at_all(value: Any, kind: str, other: Any) -> None:
    never_anything_else(HEADER + msgspec.msgpack.encode(value))
    never_anything_else(frame(kind=kind, incarnation=value, engines=other, nonce=other, seq=value, roles=other, name=value))


@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=5), st.integers(-30, 30))
def test_frames_that_were_damaged_on_the_way(message: Message, damage: list[tuple[int, int]], length: int) -> None:
    found = bytearray(encode(message))
    for at, byte in damage:
        found[at % len(found)] = byte
    never_anything_else(bytes(found[:length] if length < 0 else found + b"\x91" * length))


def test_twenty_thousand_damaged_heartbeats_never_raise_anything_else() -> None:
    chance = random.Random(3)
    whole = encode(BY_KIND["heartbeat"])
    read = 0
    for _ in range(20_000):
        found = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            found[chance.randrange(5, len(found))] = chance.choice((0x00, 0x81, 0x91, 0xC1, 0xDB, 0xDD, 0xDF, 0xFF, chance.randrange(256)))
        try:
            to_router.decode(bytes(found))
        except FrameError:
            continue
        read += 1
    assert 0 < read < 20_000


def test_the_cheap_check_lets_usual_heartbeats_through() -> None:
    usual = Heartbeat(7, "n0nce", 41, 40, (msgspec.structs.replace(PREFILL, counter=1), DECODE))
    assert not codec._needs_a_look(encode(usual)[5:])
    assert isinstance(to_router.decode(encode(Hello("box", 1, "n", "", (DECODE,)))), Hello)
