"""F07: the last engine of a role is killed together with its agent, and comes back in time, or too late."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.serve.conftest import Site, is_engine, wait_for
from tests.serve.streams import Answer
from tests.serve.test_leaving import PACED

pytestmark = pytest.mark.slow

BACK_S = 5.0
LONG_QUEUE_S = 60.0
"""A host may take long to start on a busy machine."""
QUEUE_S = 3.0
REFUSED_WITHIN_S = 1.0
TOKENS = 150
"""3 s with engines as slow as `PACED` ones."""


def text_of(number: int) -> str:
    return f"Repeat: fox lantern river {number}"


def serve_with(site: Site, queue_s: float, *decode: str) -> None:
    """A prefill and a decode host, and a router in whose queue requests wait for so long."""
    assert site.router is not None
    site.router.end()
    site.start_router("--queue-timeout-s", str(queue_s))
    site.start_host("p", "prefill")
    site.start_host("d", "decode", *decode)
    wait_for(lambda: site.answers("/readyz"))


def kill_the_role(site: Site) -> None:
    pid = site.wait_engine("d", "ready")["pid"]
    for process in (site.hosts["d"].process.pid, pid):
        os.kill(process, signal.SIGKILL)
    site.hosts["d"].process.wait()
    wait_for(lambda: not is_engine(pid) and site.engine("d")["state"] != "ready")


def test_who_runs_and_who_comes_is_served_when_the_role_is_back_after_five_seconds(site: Site) -> None:
    serve_with(site, LONG_QUEUE_S, *PACED)
    asked = [Answer(site.url, text_of(number), TOKENS) for number in range(4)]
    right = [answer.whole() for answer in asked]
    running = [Answer(site.url, text_of(number), TOKENS) for number in range(2)]
    wait_for(lambda: all(answer.text for answer in running))
    kill_the_role(site)
    since = time.monotonic()
    assert all(answer.is_alive() for answer in running), "they were through before it was killed"
    coming = [Answer(site.url, text_of(number), TOKENS, stream=number % 2 == 0) for number in range(2, 4)]
    wait_for(lambda: time.monotonic() - since > BACK_S)
    assert all(answer.is_alive() for answer in (*running, *coming)), [answer.error for answer in (*running, *coming)]
    site.start_host("d", "decode", *PACED)
    assert [answer.whole() for answer in (*running, *coming)] == right


def test_who_cannot_be_served_in_time_is_told_so_within_a_second_and_later_ones_are_served(site: Site) -> None:
    serve_with(site, QUEUE_S)
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
