"""A client leaves, wherever its request is: within a second both engines are idle and hold no KV."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.sglang.conftest import Cluster, text_of, until

FREE_WITHIN_S = 1.0
LONG = {"temperature": 0, "max_new_tokens": 4000, "ignore_eos": True}


@contextlib.contextmanager
def asking(cluster: Cluster, tokens: int, *, stream: bool, seed: int) -> Iterator[Callable[[], None]]:
    """A request that would take minutes. What it gives ends the client's connection, as a client does that goes away."""
    body = json.dumps({"input_ids": text_of(tokens, seed), "sampling_params": LONG, "stream": stream}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", cluster.http)) as client:
        client.sendall(head.encode() + body)
        yield client.close


def running(cluster: Cluster, engine: str) -> int:
    found: int = cluster.loads(engine)["num_running_reqs"]
    return found


def queued(cluster: Cluster, engine: str) -> dict[str, Any]:
    return {k: v for k, v in cluster.held(engine).items() if k.endswith("_queue_reqs")}


@pytest.fixture
def pair(cluster: Cluster) -> Iterator[Cluster]:
    with cluster.without("u"):
        yield cluster


def leave(cluster: Cluster, close: Callable[[], None]) -> None:
    """Closes the connection and measures."""
    close()
    took = until(lambda: not cluster.held("p") and not cluster.held("d"), 10.0)
    assert took <= FREE_WITHIN_S


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_in_decode(pair: Cluster, stream: bool) -> None:
    with asking(pair, 40, stream=stream, seed=100 + stream) as close:
        until(lambda: running(pair, "d") == 1, 20.0)
        leave(pair, close)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_in_prefill_or_transfer(pair: Cluster, stream: bool) -> None:
    """3,500 tokens are many seconds of prefill for these engines: decode waits in its transfer queue meanwhile."""
    with asking(pair, 3500, stream=stream, seed=200 + stream) as close:
        until(lambda: bool(queued(pair, "d")), 20.0)
        leave(pair, close)


def test_in_the_queue(pair: Cluster) -> None:
    """Prefill reads one prompt at a time: the second one waits for the first."""
    with asking(pair, 3500, stream=True, seed=300) as close_first, asking(pair, 3500, stream=True, seed=301) as close_second:
        until(lambda: sum(queued(pair, "d").values()) == 2, 20.0)
        close_second()
        until(lambda: sum(queued(pair, "d").values()) <= 1, FREE_WITHIN_S + 3.0)
        leave(pair, close_first)


def test_many_leave_at_random_moments(pair: Cluster) -> None:
    for number in range(8):
        with asking(pair, 300, stream=number % 2 == 0, seed=400 + number) as close:
            until(lambda: bool(pair.held("p") or pair.held("d")), 20.0)
            time.sleep(0.05 * number)  # not a wait for anything: the moment is what is varied
            close()
    until(lambda: not pair.held("p") and not pair.held("d"), 5.0)
