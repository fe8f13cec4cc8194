"""Request ids, rooms and engine-side ids."""

from __future__ import annotations

import itertools
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.ids import Ids, engine_rid


class Tape:
    """Entropy that is known, and how often it was asked for."""

    def __init__(self, byte: int | None = None) -> None:
        self.asked = 0
        self._next = itertools.count()
        self._byte = byte

    def __call__(self, size: int) -> bytes:
        self.asked += 1
        return bytes(self._byte if self._byte is not None else next(self._next) % 251 for _ in range(size))


def test_request_ids_are_32_hex_digits_and_never_repeat_over_many_batches() -> None:
    ids = Ids()
    made = [ids.request_id() for _ in range(5000)]
    assert all(re.fullmatch(r"[0-9a-f]{32}", i) for i in made)
    assert len(set(made)) == len(made)


def test_rooms_are_63_bits_and_use_all_of_them() -> None:
    ids = Ids()
    rooms = [ids.room() for _ in range(5000)]
    assert all(0 < room < 2**63 for room in rooms)
    assert len(set(rooms)) == len(rooms)
    assert max(rooms) > 2**62
    union = 0
    for room in rooms:
        union |= room
    assert union == 2**63 - 1


def test_a_room_is_never_zero_which_is_the_engines_own_probe() -> None:
    assert Ids(Tape(0)).room() == 1
    assert Ids(Tape(255)).room() == 2**63 - 1


def test_no_byte_of_entropy_is_used_twice() -> None:
    tape = Tape()
    ids = Ids(tape)
    assert [ids.request_id()[:4] for _ in range(3)] == ["0001", "1011", "2021"]
    assert ids.room() == int.from_bytes(bytes(range(48, 56)), "big") >> 1
    assert tape.asked == 1


@given(st.lists(st.booleans(), max_size=600))
@settings(deadline=None, max_examples=20)
def test_any_order_of_asking_takes_fresh_bytes(order: list[bool]) -> None:
    taken = []

    def entropy(size: int) -> bytes:
        taken.append(size)
        return bytes(size)

    ids = Ids(entropy)
    for is_room in order:
        (ids.room if is_room else ids.request_id)()
    assert sum(taken) >= sum(8 if is_room else 16 for is_room in order)


def test_engine_rids_have_one_width_and_begin_like_the_request() -> None:
    request = "0123456789abcdef0123456789abcdef"
    rids = [engine_rid(request, serial) for serial in (0, 1, 15, 16, 65535, 2**32 - 1)]
    assert {len(r) for r in rids} == {32}
    assert len(set(rids)) == len(rids)
    assert all(r.startswith(request[:24]) for r in rids)
    assert rids[1] == "0123456789abcdef0123456700000001"
