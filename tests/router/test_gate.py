"""How many connections, and how slow: the decisions alone."""

from __future__ import annotations

import random

import pytest

from disagg.router.gate import BODY_GRACE_S, BODY_LIMIT_S, BODY_RATE, Gate, body_due_s


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", ""])
def test_loopback_may_have_any_number(address: str) -> None:
    gate = Gate(per_address=2, file_limit=1000)
    assert [gate.enter(address, 10) for _ in range(50)] == [""] * 50


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ("10.0.0.1", "10.0.0.1", "10.0.0.2"),
        ("10.0.0.1", "::ffff:10.0.0.1", "::ffff:10.0.0.2"),
        ("2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:1::1"),
        ("fe80::1%eth0", "fe80::2%eth1", "2001:db8::1"),
    ],
)
def test_an_address_has_its_number_and_others_have_theirs(one: str, same: str, other: str) -> None:
    gate = Gate(per_address=2, file_limit=1000)
    assert [gate.enter(a, 10) for a in (one, same, one, same)] == ["", "", "address", "address"]
    assert gate.enter(other, 10) == ""
    gate.leave(same)
    assert [gate.enter(one, 10), gate.enter(one, 10)] == ["", "address"]
    assert gate.refused == {"address": 3}


def test_files_are_counted_by_their_numbers() -> None:
    gate = Gate(per_address=2, file_limit=256)
    assert [gate.enter("127.0.0.1", file) for file in (203, 204, 205)] == ["", "files", "files"]
    assert gate.farewells + gate.files < 256 * 0.9
    assert Gate(per_address=1, file_limit=1 << 20).farewells == 64


def test_nothing_is_kept_of_those_who_left() -> None:
    gate, chance = Gate(per_address=3, file_limit=100), random.Random(1)
    inside: list[str] = []
    for _ in range(10_000):
        if inside and chance.random() < 0.5:
            gate.leave(inside.pop(chance.randrange(len(inside))))
        else:
            address = f"10.0.0.{chance.randrange(20)}"
            if not gate.enter(address, chance.randrange(100)):
                inside.append(address)
        assert max((inside.count(a) for a in inside), default=0) <= 3
    for address in inside:
        gate.leave(address)
    assert not gate._open


def test_a_body_has_a_grace_then_a_rate_then_an_end() -> None:
    assert body_due_s(0) == body_due_s(1000) == BODY_GRACE_S
    assert body_due_s(int(10 * BODY_RATE)) == 10
    assert body_due_s(1 << 24) == BODY_LIMIT_S
