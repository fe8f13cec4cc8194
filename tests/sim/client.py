"""Simulated clients: raw HTTP/1.1, streams and whole answers; some leave, some read slowly. Each judges its own answer."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec

from tests.sim import words

ROUTES = ("/v1/chat/completions", "/v1/completions", "/generate")


class Ask(msgspec.Struct):
    """One request: what is asked, how the client behaves, and what became of it. Seconds of simulated time.

    Attributes:
        leaves_s: after so long the client closes its connection; 0 for never.
        slow: reads only now and then.
        outcome: ok, lost (a clean error), shed (a 503 that says when to come again), refused (4xx), left, cut (the connection ended before
            the answer), unconnected; or wrong, with `why`.
    """

    number: int
    route: str
    prompt: tuple[int, ...]
    limit: int
    stream: bool
    leaves_s: float = 0.0
    slow: bool = False
    sent_at: float = 0.0
    ended_at: float = 0.0
    outcome: str = ""
    why: str = ""
    pieces: int = 0

    def body(self) -> dict[str, Any]:
        """What is posted."""
        text = words.text_of(self.prompt)
        if self.route == "/generate":
            return {"text": text, "stream": self.stream, "sampling_params": {"max_new_tokens": self.limit, "temperature": 0}}
        shared = {"model": words.MODEL, "stream": self.stream, "max_tokens": self.limit, "temperature": 0}
        if self.stream:
            shared["stream_options"] = {"include_usage": True}
        if self.route == "/v1/completions":
            return {**shared, "prompt": text}
        return {**shared, "messages": [{"role": "user", "content": text}]}

    def ids(self) -> tuple[int, ...]:
        """The prompt as an engine sees it."""
        if self.route != "/v1/chat/completions":
            return self.prompt
        return tuple(words.chat_ids([{"role": "user", "content": words.text_of(self.prompt)}]))

    def right(self) -> tuple[str, str, int]:
        """Text, finish reason and number of tokens of the right answer."""
        ids, finish = words.answer(self.ids(), self.limit)
        return words.text_of(ids), finish, len(ids)


def draw(chance: random.Random, number: int) -> Ask:
    """A request as people send them."""
    ask = Ask(
        number,
        chance.choice(ROUTES),
        tuple(chance.randrange(words.VOCABULARY) for _ in range(chance.choice((1, 5, 20, 90)))),
        chance.choice((1, 2, 8, 24, 60)),
        chance.random() < 0.7,
    )
    if chance.random() < 0.12:
        ask.leaves_s = chance.choice((0.0001, 0.01, 0.05, 0.3, 1.0))
    elif chance.random() < 0.1:
        ask.slow = True
    return ask


class Asker(asyncio.Protocol):
    """The connection of one request."""

    def __init__(self, ask: Ask, loop: asyncio.AbstractEventLoop, ended: asyncio.Future[None]) -> None:
        self.ask = ask
        self.loop = loop
        self.ended = ended
        self.transport: Any = None
        self._raw = b""
        self._status = 0
        self._head = b""
        self._chunked = False
        self._length = 0
        self._body = b""
        self._events = b""
        self._text = ""
        self._finish = ""
        self._usage = -1
        self._error: Any = None
        self._done = False
        self._left = False
        self._right = ask.right()[0]

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        ask = self.ask
        ask.sent_at = self.loop.time()
        body = msgspec.json.encode(ask.body())
        head = f"POST {ask.route} HTTP/1.1\r\nHost: router\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        transport.write(head.encode() + body)
        if ask.leaves_s:
            self.loop.call_later(ask.leaves_s, self._leave)

    def _leave(self) -> None:
        if not self.ended.done():
            self._left = True
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self._raw += data
        try:
            self._read()
        except (ValueError, KeyError, IndexError, TypeError, msgspec.DecodeError) as error:
            self._judge(f"what came is no answer: {type(error).__name__}: {error}")
        if self.ask.slow and not self.ended.done():
            self.transport.pause_reading()
            self.loop.call_later(0.2, self.transport.resume_reading)

    def _read(self) -> None:
        if not self._head:
            self._head, found, rest = self._raw.partition(b"\r\n\r\n")
            if not found:
                self._head = b""
                return
            self._raw = rest
            self._status = int(self._head[9:12])
            lower = self._head.lower()
            self._chunked = b"transfer-encoding: chunked" in lower
            at = lower.find(b"content-length: ")
            self._length = int(lower[at + 16 :].partition(b"\r\n")[0]) if at >= 0 else 0
        if self._chunked:
            self._read_chunks()
        elif len(self._raw) >= self._length:
            self._whole(self._raw[: self._length])

    def _read_chunks(self) -> None:
        while True:
            line, found, rest = self._raw.partition(b"\r\n")
            if not found or len(rest) < int(line, 16) + 2:
                return
            size = int(line, 16)
            self._raw = rest[size + 2 :]
            if size == 0:
                self._stream_ended()
                return
            self._events += rest[:size]
            *events, self._events = self._events.split(b"\n\n")
            for event in events:
                self._event(event)

    def _event(self, event: bytes) -> None:
        if not event.startswith(b"data: "):
            raise ValueError("an event that is none")
        if self._done or self._error is not None:
            raise ValueError("something follows the end of the stream")
        if event == b"data: [DONE]":
            self._done = True
            return
        value = msgspec.json.decode(event[6:])
        if "error" in value:
            self._error = value["error"]
            return
        self.ask.pieces += 1
        if self.ask.route == "/generate":
            self._take_native(value)
        else:
            self._take_openai(value)
        if not self._right.startswith(self._text):
            raise ValueError(f"wrong tokens: {self._text[-40:]!r} after {len(self._text)} characters")

    def _take_native(self, value: Any) -> None:
        if len(value["text"]) < len(self._text):
            raise ValueError("the text became shorter")
        self._text = value["text"]
        if words.text_of(value["output_ids"]) != self._text:
            raise ValueError("text and ids differ")
        finish = value["meta_info"]["finish_reason"]
        if finish:
            self._finish = finish["type"]
            self._usage = value["meta_info"]["completion_tokens"]

    def _take_openai(self, value: Any) -> None:
        if value.get("usage"):
            self._usage = value["usage"]["completion_tokens"]
        for choice in value["choices"]:
            self._text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            self._finish = choice["finish_reason"] or self._finish

    def _stream_ended(self) -> None:
        if self._error is not None:
            self._judge("", "lost" if isinstance(self._error.get("message"), str) else "wrong")
        elif not self._done:
            self._judge("the stream ended without [DONE] and without an error")
        else:
            self._compare()

    def _compare(self) -> None:
        right = self.ask.right()
        found = (self._text, self._finish, self._usage)
        self._judge("" if found == right else f"wrong answer: finish {found[1:]} instead of {right[1:]}, {len(found[0])}/{len(right[0])}")

    def _whole(self, body: bytes) -> None:
        value = msgspec.json.decode(body)
        if self._status != 200:
            if not isinstance(value["error"]["message"], str):
                raise TypeError("no error object")
            shed = self._status == 503 and b"retry-after" in self._head.lower()
            self._judge("", "shed" if shed else "refused" if self._status < 500 else "lost")
        elif self.ask.route == "/generate":
            self._take_native(value)
            self._compare()
        else:
            choice = value["choices"][0]
            self._text = choice["text"] if "text" in choice else choice["message"]["content"]
            self._finish = choice["finish_reason"]
            self._usage = value["usage"]["completion_tokens"]
            self._compare()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._left:
            self._judge("", "left")
        else:
            self._judge("", "cut")

    def _judge(self, why: str, outcome: str = "ok") -> None:
        if self.ended.done():
            return
        self.ask.outcome, self.ask.why = ("wrong", why) if why else (outcome, "")
        self.ask.ended_at = self.loop.time()
        self.ended.set_result(None)
        self.transport.close()


async def send(ask: Ask, loop: asyncio.AbstractEventLoop, host: str, port: int) -> None:
    """Asks, and returns when it is over."""
    ended: asyncio.Future[None] = loop.create_future()
    try:
        await loop.create_connection(lambda: Asker(ask, loop, ended), host, port)
    except OSError:
        ask.outcome, ask.sent_at, ask.ended_at = "unconnected", loop.time(), loop.time()
        return
    await ended
