"""What an answer says: a whole one or a stream, of any route, in one shape that can be compared. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec


class Malformed(Exception):  # noqa: N818  # a finding about an answer, not a fault of ours
    """An answer that breaks the protocol; the sentence says where."""


class Said(NamedTuple):
    """What was said.

    Attributes:
        text: of the answer, as far as it came.
        finish: why it ended; empty while it has not.
        usage: prompt and answer tokens; None while they were not told.
        error: the sentence of an error event; empty if none came.
        ended: the answer came to the end that its protocol has: `[DONE]`, or the whole body.
    """

    text: str = ""
    finish: str = ""
    usage: tuple[int, int] | None = None
    error: str = ""
    ended: bool = False


def whole(route: str, raw: bytes) -> Said:
    """A whole answer with status 200.

    Raises:
        Malformed: it is none.
    """
    try:
        body = msgspec.json.decode(raw)
        if "error" in body:
            return Said(error=str(body["error"]))
        if route == "/generate":
            return _native(body, ended=True)
        choice = body["choices"][0]
        text = choice["message"]["content"] if route == "/v1/chat/completions" else choice["text"]
        return Said(text, choice["finish_reason"], _usage(body), ended=True)
    except (msgspec.DecodeError, KeyError, TypeError, IndexError) as error:
        raise Malformed(f"no answer of {route}: {error!r}") from error


def stream(route: str, raw: bytes) -> Said:
    """As much of a stream as came: an event that is not complete is left out.

    Raises:
        Malformed: what came breaks the protocol.
    """
    *events, _ = raw.split(b"\n\n")
    said, names = Said(), set[str]()
    roles = 0
    for event in events:
        if said.ended or said.error:
            raise Malformed(f"something follows the end: {event[:40]!r}")
        if not event.startswith(b"data: ") or b"\n" in event:
            raise Malformed(f"no event: {event[:40]!r}")
        if event == b"data: [DONE]":
            said = said._replace(ended=True)
            continue
        try:
            body = msgspec.json.decode(event[6:])
            if "error" in body:
                said = said._replace(error=str(body["error"]) or "an error")
                continue
            names.add(str(body["id"] if route != "/generate" else body["meta_info"]["id"]))
            said, role = _next(route, said, body)
        except (msgspec.DecodeError, KeyError, TypeError, IndexError) as error:
            raise Malformed(f"no event of {route}: {error!r}") from error
        roles += role
    if len(names) > 1:
        raise Malformed(f"one stream bears {len(names)} ids")
    if roles > 1:
        raise Malformed(f"the role is said {roles} times")
    return said


def _next(route: str, said: Said, body: dict[str, Any]) -> tuple[Said, bool]:
    """The stream so far with one event more, and whether that named the role."""
    if route == "/generate":
        now = _native(body, ended=False)
        if not now.text.startswith(said.text):
            raise Malformed("the text does not go on where it was")
        return now, False
    usage = _usage(body) or said.usage
    if not body["choices"]:
        return said._replace(usage=usage), False
    choice = body["choices"][0]
    chat = route == "/v1/chat/completions"
    more = (choice["delta"].get("content") or "") if chat else choice["text"]
    if more and said.finish:
        raise Malformed("text follows the finish reason")
    finish = choice.get("finish_reason") or ""
    if finish and said.finish:
        raise Malformed("two finish reasons")
    role = chat and bool(choice["delta"].get("role"))
    return said._replace(text=said.text + more, finish=finish or said.finish, usage=usage), role


def _native(body: dict[str, Any], *, ended: bool) -> Said:
    meta = body["meta_info"]
    finish = (meta.get("finish_reason") or {}).get("type", "")
    usage = (meta["prompt_tokens"], meta["completion_tokens"]) if finish else None
    return Said(body["text"], finish, usage, ended=ended)


def _usage(body: dict[str, Any]) -> tuple[int, int] | None:
    usage = body.get("usage")
    return None if usage is None else (usage["prompt_tokens"], usage["completion_tokens"])
