"""HTTP by hand: bytes in, answers out, nothing in between that would mend what a client must not send."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec

from tests.router.conftest import CHAT

BODY = msgspec.json.encode(CHAT)
LIMIT_S = 10.0


class Answer(msgspec.Struct):
    status: int
    head: bytes
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return dict(msgspec.json.decode(self.body)["error"])


def post(body: bytes = BODY, *lines: str, path: str = "/v1/chat/completions") -> bytes:
    """A POST; its length is right unless one of the lines says something else."""
    given = [line.encode("latin-1") for line in lines]
    if not any(line.lower().startswith((b"content-length", b"transfer-encoding")) for line in given):
        given.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([b"POST %s HTTP/1.1" % path.encode(), b"Host: x", *given, b"", b""]) + body


def answers(data: bytes) -> list[Answer]:
    """What came back on one connection, cut into answers; each of ours says its length or comes in chunks."""
    found = []
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        assert end, data
        assert head.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")), data
        status = int(head.split()[1])
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
        if length is None:
            body, end, rest = rest.partition(b"0\r\n\r\n")
        else:
            body, rest = rest[:length], rest[length:]
        found.append(Answer(status, head, body))
        data = rest
    return found


async def exchange(url: str, *data: bytes, limit_s: float = LIMIT_S) -> bytes:
    """Sends bytes, piece by piece, and reads until the router closes."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    got: list[bytes] = []

    async def read() -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                got.append(piece)

    try:
        async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
            group.create_task(read())
            with contextlib.suppress(ConnectionError):
                for piece in data:
                    writer.write(piece)
                    await writer.drain()
    finally:
        writer.transport.abort()
    return b"".join(got)
