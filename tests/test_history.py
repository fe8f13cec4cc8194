"""Who was given which prompt: what the router takes prefix caches to hold."""

from __future__ import annotations

import random

import pytest

from disagg.policy.history import BLOCK, PrefixHistory, names_of


def history(*limits: int) -> PrefixHistory:
    made = PrefixHistory()
    made.grow(len(limits))
    for slot, limit in enumerate(limits):
        made.resize(slot, limit)
    return made


def prompt(*blocks: str) -> bytes:
    return b"".join(block.encode() * BLOCK for block in blocks)


def test_prompts_share_names_as_far_as_they_begin_alike() -> None:
    one, other = names_of(prompt("a", "b", "c")), names_of(prompt("a", "b", "d"))
    assert len(one) == 3
    assert one[:2] == other[:2]
    assert one[2] != other[2]
    assert names_of(prompt("b", "b"))[1] != one[1], "the same block after another one is another block"
    assert not set(names_of(prompt("a", "b"), salt=1)) & set(one)


@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_an_incomplete_block_has_no_name(length: int) -> None:
    assert len(names_of(b"x" * length)) == length // BLOCK
    assert names_of(memoryview(b"x" * length)) == names_of(b"x" * length)


def test_each_engine_holds_what_it_was_sent() -> None:
    made = history(10, 10, 10)
    made.sent(0, names_of(prompt("a", "b", "c")))
    made.sent(2, names_of(prompt("a", "x")))
    assert made.leading(names_of(prompt("a", "b", "c", "d"))) == {0: 3, 2: 1}
    assert made.leading(names_of(prompt("a", "x", "y"))) == {0: 1, 2: 2}
    assert made.leading(names_of(prompt("b"))) == {}
    assert made.leading([]) == {}
    made.check()


def test_the_next_turn_of_a_conversation_finds_the_one_before() -> None:
    made = history(1000, 1000)
    turn = prompt("s", "a")
    made.sent(1, names_of(turn))
    for number in range(10):
        turn += prompt(str(number))
        assert made.leading(names_of(turn)) == {1: number + 2}
        made.sent(1, names_of(turn))


def test_what_was_used_least_recently_goes_first_and_ends_before_beginnings() -> None:
    made = history(4)
    old, new = names_of(prompt("o", "p", "q")), names_of(prompt("n", "m"))
    made.sent(0, old)
    made.sent(0, new)
    assert made.leading(old) == {0: 2}
    assert made.leading(new) == {0: 2}
    made.sent(0, old[:2])
    made.sent(0, names_of(prompt("z")))
    assert made.leading(new) == {0: 1}, "its end is gone; of the old one nothing is, for it was used since"
    assert made.leading(old) == {0: 2}
    made.check()


def test_a_prompt_that_is_larger_than_the_cache_leaves_its_beginning() -> None:
    made = history(3)
    names = names_of(prompt(*"abcdefgh"))
    made.sent(0, names)
    assert made.leading(names) == {0: 3}
    made.check()


def test_an_engine_that_is_another_process_holds_nothing_and_others_keep_theirs() -> None:
    made = history(10, 10)
    names = names_of(prompt("a", "b"))
    made.sent(0, names)
    made.sent(1, names)
    made.forget(0)
    made.forget(7)
    assert made.leading(names) == {1: 2}
    assert (made.blocks(0), made.blocks(1), made.blocks(7)) == (0, 2, 0)
    made.resize(1, 1)
    assert made.leading(names) == {1: 1}
    made.resize(1, -5)
    assert made.leading(names) == {}
    made.check()
    assert repr(made) == "<PrefixHistory engines=2 blocks=0>"


@pytest.mark.parametrize("seed", range(5))
def test_a_random_walk_agrees_with_lists(seed: int) -> None:
    """The same by hand: for each engine the order of use, and prompts compared block by block."""
    chance = random.Random(seed)
    limits = [chance.randrange(1, 40) for _ in range(4)]
    made, lists = history(*limits), [list[int]() for _ in limits]
    for _ in range(2000):
        names = names_of(prompt(*(chance.choice("ab") for _ in range(chance.randrange(1, 9)))))
        slot = chance.randrange(4)
        if chance.random() < 0.02:
            made.forget(slot)
            lists[slot] = []
        elif chance.random() < 0.6:
            made.sent(slot, names)
            lists[slot] = [n for n in lists[slot] if n not in names] + names[::-1]
            lists[slot] = lists[slot][-limits[slot] :]
        wanted = {}
        for each, held in enumerate(lists):
            count = next((i for i, name in enumerate(names) if name not in held), len(names))
            if count:
                wanted[each] = count
        assert made.leading(names) == wanted
    made.check()
