"""Requests that two parsers could read in two ways: each is refused, or is exactly one request for whoever reads on."""

from __future__ import annotations

import re

import pytest

from disagg.model import Role
from tests.router.conftest import Rig, running_rig
from tests.router.raw import BODY, answers, exchange, post

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
CANARY = b"GET /canary HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
N = len(BODY)

WAIT_S = 2.0
TE = "Transfer-Encoding: chunked"
REFUSED: dict[str, bytes] = {
    # two lengths
    **{f"CL and {te!r}": post(CHUNKED, f"Content-Length: {n}", te) for te in (TE, "transfer-encoding: Chunked") for n in (0, N, 6)},
    **{f"{te!r} and CL": post(CHUNKED, te, f"Content-Length: {n}") for te in (TE, "TRANSFER-ENCODING: CHUNKED") for n in (0, N, 6)},
    **{f"CL {a} and CL {b}": post(BODY, f"Content-Length: {a}", f"Content-Length: {b}") for a, b in ((N, N), (0, N), (N, 0), (N, N + 5))},
    **{f"CL list {v}": post(BODY, f"Content-Length: {v}") for v in (f"{N}, {N}", f"{N},{N + 1}", f"0, {N}", f"{N};0")},
    # lengths that are none
    **{
        f"CL {v!r}": post(BODY, f"Content-Length: {v}")
        for v in (
            f"+{N}",
            f"-{N}",
            hex(N),
            f"{N}.0",
            f"{N}e0",
            f"{N} 0",
            "",
            " ",
            "9" * 30,
            "\xb2",
            f"{N}\x0b",
            f"\x0c{N}",
            "1_0",
            "NaN",
            f'"{N}"',
        )
    },
    # encodings that are none, or not the last
    **{
        f"TE {v!r}": post(CHUNKED, f"Transfer-Encoding: {v}")
        for v in (
            "chunked, identity",
            "identity",
            "xchunked",
            "chunkedx",
            "chunked, gzip",
            "chunked;q=1",
            "\x0bchunked",
            '"chunked"',
            "chunked\x00",
            "gzip",
        )
    },
    **{f"two TE {v}": post(CHUNKED, TE, f"Transfer-Encoding: {v}") for v in ("identity", "x")},
    # hosts
    "no Host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "two equal Hosts": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n",
    # header lines
    "obs-fold": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A: 1\r\n folded\r\n\r\n",
    "obs-fold by tab": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A: 1\r\n\tfolded\r\n\r\n",
    "obs-fold of TE": post(CHUNKED, "Transfer-Encoding:\r\n chunked"),
    "obs-fold first": b"GET /v1/models HTTP/1.1\r\n Host: x\r\n\r\n",
    **{
        f"bare {name} in a header": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A: 1" + sep + b"X-B: 2\r\n\r\n"
        for name, sep in (("LF", b"\n"), ("CR", b"\r"), ("NUL", b"\x00"), ("CR CR LF", b"\r\r\n"))
    },
    **{
        f"a header named with {c!r}": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX%sA: 1\r\n\r\n" % c
        for c in (b" ", b"\x00", b"\x7f", b"\xff", b"(", b"@", b"\t", b"\x0b")
    },
    **{
        f"blank before the colon of {n}": post(BODY, f"{n} : {v}")
        for n, v in (("Content-Length", N), ("Transfer-Encoding", "chunked"), ("X-A", 1))
    },
    "no colon": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A\r\n\r\n",
    "no name": b"GET /v1/models HTTP/1.1\r\nHost: x\r\n: 1\r\n\r\n",
    # request lines
    "HTTP/0.9": b"GET /v1/models\r\n\r\n",
    **{
        f"version {v!r}": b"GET /v1/models %s\r\nHost: x\r\n\r\n" % v
        for v in (b"HTTP/9.9", b"HTTP/1.10", b"HTTP/1", b"HTP/1.1", b"http/1.1", b"HTTP/1.1 x", b"HTTP/-1.1", b"HTTP/01.1")
    },
    **{
        f"target {t!r}": b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % t
        for t in (b"/a b", b"/a\x00b", b"/a\tb", b"v1/models", b"\\v1", b"/a\x7f", b"")
    },
    **{f"method {m!r}": b"%s /v1/models HTTP/1.1\r\nHost: x\r\n\r\n" % m for m in (b"GE T", b"get", b"G\x00T", b"BREW9", b"\xc7ET", b"")},
    "bare LF after the request line": b"GET /v1/models HTTP/1.1\nHost: x\r\n\r\n",
    "bare LF everywhere": b"GET /v1/models HTTP/1.1\nHost: x\n\n",
    # chunks
    **{
        f"chunk size {s!r}": post(b"%s\r\n%s\r\n0\r\n\r\n" % (s, BODY), TE)
        for s in (
            b"-%x" % N,
            b"+%x" % N,
            b"0x%x" % N,
            b" %x" % N,
            b"%x " % N,
            b"f" * 20,
            b"g",
            b"",
            b"%x\x00" % N,
            b"%x;a=\x00" % N,
            b"%x,1" % N,
        )
    },
    "chunk size ends with LF": post(b"%x\n%s\r\n0\r\n\r\n" % (N, BODY), TE),
    "chunk ends with LF": post(b"%x\r\n%s\n0\r\n\r\n" % (N, BODY), TE),
    "chunk is longer than it says": post(b"%x\r\n%s\r\n0\r\n\r\n" % (N - 2, BODY), TE),
    "chunk extension with LF": post(b"%x;a\nb\r\n%s\r\n0\r\n\r\n" % (N, BODY), TE),
}
"""None of these is a request."""

ONE: dict[str, bytes] = {
    "plain": post(),
    "chunked": post(CHUNKED, TE),
    "chunked in capitals": post(CHUNKED, "TRANSFER-ENCODING: CHUNKED"),
    "leading zeros": post(BODY, f"Content-Length: 000{N}"),
    "blanks around the length": post(BODY, f"Content-Length: \t {N} \t"),
    **{
        f"header {n}": post(BODY, f"{n}: 7")
        for n in ("Content_Length", "Transfer_Encoding", "X-Content-Length", "Content-Length-", "_", "x-forwarded-for", "Te", "Trailer")
    },
    "chunk extension": post(b"%x;a=b\r\n%s\r\n0\r\n\r\n" % (N, BODY), TE),
    "quoted chunk extension": post(b'%x;a="b;c"\r\n%s\r\n0\r\n\r\n' % (N, BODY), TE),
    "trailers": post(b"%x\r\n%s\r\n0\r\nContent-Length: 5\r\nX-A: 1\r\n\r\n" % (N, BODY), TE),
    "leading zeros in a chunk size": post(b"000%x\r\n%s\r\n0\r\n\r\n" % (N, BODY), TE),
    "absolute form": b"GET http://elsewhere/v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    "a query": b"GET /v1/models?a=%0d%0aX HTTP/1.1\r\nHost: x\r\n\r\n",
    "a fragment": b"GET /v1/models#a HTTP/1.1\r\nHost: x\r\n\r\n",
    "an odd path": b"GET //[ HTTP/1.1\r\nHost: x\r\n\r\n",
    "options *": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "a body on GET": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    "a body that is nobody's": post(SMUGGLED, path="/nothing"),
    "a body that is a request": post(SMUGGLED),
    "a chunk that is a request": post(b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED), TE),
    "empty lines first": b"\r\n\r\n" + post(),
    "method override": post(BODY, "X-HTTP-Method-Override: DELETE"),
    "two equal headers": post(BODY, "X-A: 1", "X-A: 2"),
    "a byte beyond ascii": post(BODY, "X-A: \xff"),
    "expects 100": post(BODY, "Expect: 100-continue"),
}
"""Each is one request, or none; whatever it is, the next one is the next one."""


@pytest.fixture(scope="module", autouse=True)
def _enough() -> None:
    assert len(REFUSED) + len(ONE) >= 100


async def seen(rig: Rig, raw: bytes) -> list[bytes]:
    """What the router made of it and of a request behind it: the statuses, and the path of what it did not know."""
    try:
        data = await exchange(rig.url, raw + CANARY, limit_s=WAIT_S)
    except TimeoutError:
        return [b"it waits"]
    found = answers(data.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""))
    assert b"smuggled" not in b"".join(a.body for a in found), data
    assert not any(a.status >= 500 for a in found), data
    return [b"canary" if b"'/canary'" in a.body else b"%d" % a.status for a in found]


async def test_what_could_be_read_in_two_ways_is_refused_and_ends_the_connection() -> None:
    async with running_rig(Role.PREFILL, Role.DECODE) as rig:
        wrong = {}
        for name, raw in REFUSED.items():
            calls = len(rig.decode.calls)
            got = await seen(rig, raw)
            if got != [b"400"] or len(rig.decode.calls) != calls:
                wrong[name] = got
        assert wrong == {}


async def test_whatever_a_request_is_the_next_one_is_the_next_one() -> None:
    async with running_rig(Role.PREFILL, Role.DECODE) as rig:
        wrong = {}
        for name, raw in ONE.items():
            got = await seen(rig, raw)
            if got not in ([b"200", b"canary"], [b"400", b"canary"], [b"404", b"canary"], [b"405", b"canary"], [b"400"]):
                wrong[name] = got
        assert wrong == {}
        plain = await seen(rig, ONE["plain"])
        assert plain == [b"200", b"canary"], "the defence is not that nothing is served"


@pytest.mark.parametrize("to", ["h2c", "websocket", "TLS/1.0", "x"])
async def test_a_request_that_wants_another_protocol_is_the_last_one(to: str) -> None:
    """aiohttp drops what is behind it in the same read: the rest of a request, in the next read, would look like one of its own."""
    async with running_rig(Role.PREFILL, Role.DECODE) as rig:
        assert await seen(rig, post(BODY, "Connection: Upgrade", f"Upgrade: {to}")) == [b"200"]
    async with running_rig(Role.PREFILL, Role.DECODE) as rig:
        assert await seen(rig, b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n") == [b"404"]


async def test_nothing_of_a_clients_head_reaches_an_engine() -> None:
    async with running_rig(Role.PREFILL, Role.DECODE) as rig:
        evil = [
            "Authorization: Bearer mine",
            "X-Evil: 1",
            "Cookie: a=b",
            "X-Forwarded-For: 1.2.3.4",
            "Content_Length: 0",
            "x-request-id: evil",
        ]
        await exchange(rig.url, post(BODY, *evil, "Connection: close", "Content-Type: text/evil"))
        for engine in rig.engines:
            sent = engine.calls[-1]._request
            assert {name.lower() for name in sent.headers} == {"host", "content-type", "content-length"}
            assert not re.search("evil|mine", str(sent.headers))
