"""F07: the last engine of a role is killed together with its agent, and comes back in time, or too late."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.serve.conftest import Site, is_engine, wait_for
from tests.serve.streams import Answer

pytestmark = pytest.mark.slow

BACK_S = 5.0
QUEUE_S = 3.0
REFUSED_WITHIN_S = 1.0
TOKENS = 48


def text_of(number: int) -> str:
    return f"Repeat: fox lantern river {number}"


def kill_the_role(site: Site) -> None:
    pid = site.wait_engine("d", "ready")["pid"]
    for process in (site.hosts["d"].process.pid, pid):
        os.kill(process, signal.SIGKILL)
    site.hosts["d"].process.wait()
    wait_for(lambda: not is_engine(pid) and site.engine("d")["state"] != "ready")


def test_who_runs_and_who_comes_is_served_when_the_role_is_back_after_five_seconds(pair: Site) -> None:
    right = [Answer(pair.url, text_of(number), TOKENS).whole() for number in range(4)]
    running = [Answer(pair.url, text_of(number), TOKENS) for number in range(2)]
    wait_for(lambda: all(answer.text for answer in running))
    kill_the_role(pair)
    since = time.monotonic()
    assert not any(answer.done for answer in running)
    coming = [Answer(pair.url, text_of(number), TOKENS, stream=number % 2 == 0) for number in range(2, 4)]
    wait_for(lambda: time.monotonic() - since > BACK_S)
    assert all(answer.is_alive() for answer in (*running, *coming)), [answer.error for answer in (*running, *coming)]
    pair.start_host("d", "decode")
    assert [answer.whole() for answer in (*running, *coming)] == right


def test_who_cannot_be_served_in_time_is_told_so_within_a_second_and_later_ones_are_served(site: Site) -> None:
    assert site.router is not None
    site.router.end()
    site.start_router("--queue-timeout-s", str(QUEUE_S))
    site.start_host("p", "prefill")
    site.start_host("d", "decode")
    wait_for(lambda: site.answers("/readyz"))
    kill_the_role(site)
    since = time.monotonic()
    refused = [Answer(site.url, text_of(number), TOKENS, stream=number % 2 == 0) for number in range(4)]
    for answer in refused:
        answer.join()
        assert answer.error.startswith("HTTP 503"), answer.error
        assert int(answer.headers["retry-after"]) >= 1
    assert time.monotonic() - since < QUEUE_S + REFUSED_WITHIN_S
    site.start_host("d", "decode")
    wait_for(lambda: site.answers("/readyz"))
    assert Answer(site.url, text_of(0), TOKENS).whole()
