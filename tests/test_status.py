"""What `disagg status` prints of what the admin listener says."""

from __future__ import annotations

from typing import Any

import pytest

from disagg.status import hosts_table, table


def engine(**other: Any) -> dict[str, Any]:
    load = {"running": 3, "waiting": 1, "kv_used_tokens": 250, "kv_total_tokens": 1000}
    known = {
        "id": "e",
        "host": "h",
        "role": "decode",
        "state": "ready",
        "model": "m",
        "url": "http://h:1",
        "load": load,
        "reason": "it answers",
    }
    return {**known, **other}


def cluster(*engines: dict[str, Any], ready: bool = True, reason: str = "") -> dict[str, Any]:
    host = {"id": "h", "state": "online", "reason": "it joined", "release": "1.0", "incarnation": 4}
    return {"hosts": [host, {"id": "10.0.0.9"}], "engines": list(engines), "ready": ready, "reason": reason}


def test_what_is_well_needs_no_reason() -> None:
    text = table(cluster(engine()))
    assert "it answers" not in text
    assert "it joined" not in text
    assert "e       h     decode  ready  3    1     25 %  m      http://h:1" in text
    assert text.endswith("Requests can be served.")


def test_what_is_not_well_says_why() -> None:
    text = table(cluster(engine(state="suspect", reason="it refused a connection"), ready=False, reason="no ready decode engine"))
    assert "it refused a connection" in text
    assert text.endswith("No request can be served: no ready decode engine.")


@pytest.mark.parametrize("state", ["dead", "held"])
def test_of_an_engine_that_is_gone_no_load_is_shown(state: str) -> None:
    assert f"decode  {state}" in table(cluster(engine(state=state)))
    assert "-    -     -   m" in table(cluster(engine(state=state)))


def test_an_engine_that_is_measured_works_for_nobody_and_says_so() -> None:
    assert table(cluster(engine(measuring=True))).count("it is being measured") == 1
    assert "measured" not in table(cluster(engine()))


def test_who_waits_and_who_was_sent_away_is_counted() -> None:
    shown = {**cluster(engine()), "requests": {"inflight": 9, "waiting": 2, "sent_away": 40}}
    assert table(shown).endswith("Requests can be served. 2 of 9 wait for room. 40 were sent away since the router started.")
    calm = {**cluster(engine()), "requests": {"inflight": 9, "waiting": 0, "sent_away": 0}}
    assert table(calm).endswith("Requests can be served.")


def test_an_engine_that_is_ready_but_never_paired_says_why() -> None:
    assert "page size" in table(cluster(engine(reason="it answers, but is never paired with p: page size 32 against 16")))


def test_an_engine_whose_prefix_cache_is_not_known_says_why() -> None:
    known = {"known": True, "blocks": 3, "block_size": 16, "reason": ""}
    assert "prefix cache" not in table(cluster(engine(cache=known)))
    lost = {**known, "known": False, "reason": "batches 1 to 4 of its events are gone"}
    assert "prefix cache unknown, routing guesses what it holds: batches 1 to 4 of its events are gone" in table(
        cluster(engine(cache=lost))
    )


def test_a_slow_engine_and_a_cut_pair_say_why() -> None:
    shown = {**cluster(engine(weight=4.0)), "cut": [{"prefill": "p", "decode": "d", "reason": "until a probe passes: a deadline passed"}]}
    text = table(shown)
    assert "it is 4 times as slow as the median of its pool, and gets that much less work" in text
    assert "p with d  until a probe passes: a deadline passed" in text
    assert "times as slow" not in table(cluster(engine(weight=1.0)))


def test_a_refused_clone_is_seen_beside_its_original() -> None:
    row = {"name": "h", "roles": ["decode"], "state": "online", "key": "K", "reason": "it joined"}
    assert "it joined" not in hosts_table([row])
    assert "a clone" in hosts_table([{**row, "reason": "it joined; 2 s ago an agent of this name was refused: a clone"}])


def test_no_host_says_how_to_make_one() -> None:
    assert "disagg token create" in hosts_table([])


def test_what_a_host_says_of_itself_cannot_move_the_cursor() -> None:
    assert "\x1b" not in table(cluster(engine(state="dead", reason="\x1b[2J gone", model="\x07")))


def test_kv_that_an_idle_engine_keeps_from_use_is_shown() -> None:
    load = {"running": 0, "waiting": 0, "kv_used_tokens": 512, "kv_total_tokens": 1000, "kv_quarantined_tokens": 512}
    assert "512 tokens of its KV pool are kept from use: a peer that is gone might still write into them" in table(
        cluster(engine(load=load))
    )


def test_a_quarantined_pair_is_named_with_the_reason() -> None:
    shown = cluster(engine()) | {
        "quarantined": [{"prefill": "p", "decode": "d", "reason": "it errs"}, {"prefill": None, "decode": "u", "reason": "so does it"}]
    }
    lines = [" ".join(line.split()) for line in table(shown).splitlines()]
    assert "p with d it errs" in lines
    assert "u so does it" in lines
