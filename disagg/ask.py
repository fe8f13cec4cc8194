"""What the commands say to a router's admin listener. Blocking: a command has nothing else to do."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from disagg.config import parse_listen
from disagg.errors import OrderError, StartError

PATIENCE_S = 15.0
FOLLOW_S = 0.2
OVER = frozenset({"done", "failed"})


def quoted(name: str) -> str:
    """A name as a part of a path."""
    return quote(name, safe="")


def get(admin: str, path: str) -> dict[str, Any]:
    """What stands at a path.

    Raises:
        StartError: nobody answers there.
        OrderError: the answer is an error, with its sentence.
    """
    return _ask(admin, "GET", path, None)


def post(admin: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """What becomes of an order. Raises as `get`."""
    return _ask(admin, "POST", path, json.dumps(body))


def follow(admin: str, answer: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Says what a change does, step by step, until it is over.

    Raises:
        OrderError: it failed, with the reason.
    """
    say(f"{answer['will']} ({answer['why']})")
    said = 0
    while True:
        change = get(admin, f"/admin/changes/{answer['change']}")
        for step in change["steps"][said:]:
            say(f"  {step['after_s']:7.2f} s  {step['what']}")
        said = len(change["steps"])
        if change["phase"] in OVER:
            break
        time.sleep(FOLLOW_S)
    if change["phase"] == "failed":
        raise OrderError(f"{change['verb']} of {change['engine']} failed: {change['steps'][-1]['what']}")


def _ask(admin: str, method: str, path: str, body: str | None) -> dict[str, Any]:
    host, port = parse_listen("--admin", admin)
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body is not None else {})
        response = connection.getresponse()
        status, text = response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise StartError(f"no router answers at {admin} ({why}): start one, or name its admin address with --admin") from error
    finally:
        connection.close()
    return _checked(admin, status, text)


def _checked(admin: str, status: int, text: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise OrderError(f"what answers at {admin} is no router's admin listener (HTTP {status})", status) from error
    if status >= 400 or not isinstance(answer, dict):
        error_object = answer.get("error") if isinstance(answer, dict) else None
        sentence = error_object.get("message") if isinstance(error_object, dict) else f"HTTP {status}"
        raise OrderError(str(sentence), status)
    return answer
