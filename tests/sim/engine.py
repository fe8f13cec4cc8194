"""A simulated SGLang engine: HTTP, rooms, a paged pool whose pages know their owner, deterministic tokens, and faults.

A request of a pair, as SGLang does it. Both legs are posted at once; decode connects to prefill's bootstrap port and names the room.

    prefill: waiting ─► computing ─► inflight ──(KV on its way)──► done: answers, frees its pages
    decode:  prealloc ─► transfer ──────────(KV arrived)─────────► running ─► done

A leg whose peer is gone waits: prefill for `WAIT_S`, decode until its heartbeat has failed. An abort ends a leg at once, but no transfer:
decode keeps the pages of a broken one for `RELEASE_S`, because the peer may still be writing into them, and prefill until it has written.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from tests.sim import words
from tests.sim.loop import Process, SimLoop
from tests.sim.net import Network, Question

PAGE = 16
WAIT_S = 60.0
HEARTBEAT_LOST_S = 4.0
RELEASE_S = 5.0
LINGER_S = 5.0
"""How long a transfer that was broken here may still be written by the peer."""
KEEPALIVE_S = 5.0
BYTES_PER_TOKEN = 100_000
STREAM_GONE_S = 0.05
WHOLE_GONE_S = 2.35
RESERVED = 64

_json = msgspec.json.encode


class Strike:
    """A fault that strikes when an answer has so many tokens, and only so often; engines may share one.

    Args:
        at: tokens that get out first.
        left: how often it may still strike.
    """

    def __init__(self, at: int = 0, left: int = 0) -> None:
        self.at = at
        self.left = left

    def strikes(self, made: int) -> bool:
        """Asked with each token."""
        if not self.left or made <= self.at:
            return False
        self.left -= 1
        return True


class Knobs:
    """What is wrong with an engine.

    Attributes:
        slow: all computing takes so many times as long.
        hung: the scheduler stands still; HTTP is answered.
        refuse: new requests get this status.
        garbage: decode sends nonsense in place of an event.
        early_end: streams end without a word after so many tokens.
        ignore_abort: aborts are answered and ignored.
        leak: pages of finished requests are kept.
        wrong: every so-many-th token is another one.
        cut: the connection of a request ends in the middle of its answer.
        die: the process does.
    """

    def __init__(self) -> None:
        self.slow = 1.0
        self.hung = False
        self.refuse = 0
        self.garbage = False
        self.early_end = 0
        self.ignore_abort = False
        self.leak = False
        self.wrong = 0
        self.cut = Strike()
        self.die = Strike()


class Leg:
    """One request on one engine."""

    def __init__(self, call: Call, body: dict[str, Any], prompt: list[int]) -> None:
        sampling = body.get("sampling_params") or body
        self.call = call
        self.rid = str(body.get("rid", ""))
        self.prompt = prompt
        self.limit = int(sampling.get("max_new_tokens") or sampling.get("max_completion_tokens") or sampling.get("max_tokens") or 16)
        self.ignore_end = bool(sampling.get("ignore_eos"))
        self.stream = bool(body.get("stream"))
        self.usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self.room = int(body.get("bootstrap_room") or 0)
        self.place = (str(body.get("bootstrap_host") or "").rpartition("@")[2], int(body.get("bootstrap_port") or 0))
        self.state = words.state_of(prompt)
        self.ids: list[int] = []
        self.finish = ""
        self.phase = "waiting"
        self.pages = 0
        self.over = False
        self.peer: Peer | None = None
        self.waits: asyncio.TimerHandle | None = None


class Call(asyncio.Protocol):
    """A connection of a client of the engine: HTTP/1.1, one exchange after the other."""

    def __init__(self, engine: SimEngine) -> None:
        self.engine = engine
        self.transport: Any = None
        self.idle_since = 0.0
        self.leg: Leg | None = None
        self.path = ""
        self._data = b""
        self._streaming = False
        self._legs_wanted: list[Leg] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.idle_since = self.engine.loop.time()
        self.engine.calls[self] = None

    def data_received(self, data: bytes) -> None:
        self._data += data
        while self.leg is None and self._data:
            head, found, rest = self._data.partition(b"\r\n\r\n")
            if not found:
                return
            at = head.lower().find(b"content-length: ")
            length = int(head[at + 16 :].partition(b"\r\n")[0]) if at >= 0 else 0
            if len(rest) < length:
                return
            method, target, _ = head.partition(b"\r\n")[0].decode().split(" ")
            self._data = rest[length:]
            self.path = target
            self.engine.handle(self, method, target.partition("?")[0], rest[:length])

    def connection_lost(self, exc: Exception | None) -> None:
        self.engine.calls.pop(self, None)
        leg = self.leg
        if leg is not None and not leg.over:
            wait_s = STREAM_GONE_S if leg.stream else WHOLE_GONE_S
            self.engine.loop.call_later(wait_s, self.engine.abort_leg, leg)

    # --- answers

    def answer(self, status: int, value: Any = None, *, body: bytes | None = None) -> None:
        """A whole answer."""
        body = (b"" if value is None else _json(value)) if body is None else body
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)
        self._ended()

    def events(self, payload: bytes) -> None:
        """A part of a stream."""
        head = b""
        if not self._streaming:
            self._streaming = True
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.transport.write(head + b"%x\r\n%s\r\n" % (len(payload), payload))

    @property
    def streaming(self) -> bool:
        return self._streaming

    def end(self) -> None:
        """The end of a stream."""
        self.transport.write(b"0\r\n\r\n")
        self._ended()

    def _ended(self) -> None:
        self.leg = None
        self._streaming = False
        self.idle_since = self.engine.loop.time()
        if self._data:
            self.engine.loop.call_soon(self.data_received, b"")


class Asked(Call):
    """A prober's question."""

    def __init__(self, question: Question) -> None:
        self._question = question

    def answer(self, status: int, value: Any = None, *, body: bytes | None = None) -> None:
        self._question.reply(status, (b"" if value is None else _json(value)) if body is None else body)


class Peer(asyncio.Protocol):
    """A connection of one room between a decode engine, which makes it, and a prefill engine. Lines of JSON."""

    def __init__(self, engine: SimEngine, leg: Leg | None = None) -> None:
        self.engine = engine
        self.leg = leg
        self.room = 0
        self.transport: Any = None
        self._data = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.engine.peers[self] = None

    def say(self, **message: Any) -> None:
        self.transport.write(_json(message) + b"\n")

    def data_received(self, data: bytes) -> None:
        *lines, self._data = (self._data + data).split(b"\n")
        for line in lines:
            self.engine.peer_says(self, msgspec.json.decode(line))

    def connection_lost(self, exc: Exception | None) -> None:
        self.engine.peers.pop(self, None)
        self.engine.peer_lost(self)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


class SimEngine:
    """One engine process.

    Args:
        mode: prefill, decode or null, as SGLang says it.
        tokens: size of the KV pool.
    """

    def __init__(
        self, process: Process, loop: SimLoop, network: Network, *, name: str, mode: str, tokens: int, http: int, bootstrap: int
    ) -> None:
        self.process = process
        self.loop = loop
        self.name = name
        self.mode = mode
        self.knobs = Knobs()
        self.pages_total = tokens // PAGE
        self.pool: dict[str, int] = {}
        self.quarantine: dict[str, int] = {}
        self.calls: dict[Call, None] = {}
        self.peers: dict[Peer, None] = {}
        self.legs: dict[Leg, None] = {}
        self.rooms: dict[int, Leg] = {}
        self.early: dict[int, Peer] = {}  # decode was faster than prefill's request
        self.late_writes = 0
        self.ran_after_abort = 0
        self.http, self.bootstrap = http, bootstrap
        self.steps = self.generated = self.prefilled = self.transferred = 0
        self.prefill_s, self.step_s = 0.0002, 0.02
        self._queue: deque[Leg] = deque()
        self._computing: Leg | None = None
        self._stepping = False
        self._network = network
        self.on_end: Callable[[], None] = lambda: None

    def serve(self) -> None:
        """Listens; runs in the engine's process."""
        listener = self._network.listen(lambda: Call(self), self.process.ip, self.http)
        listener.answers = lambda question, method, path, body: self.handle(Asked(question), method, path.partition("?")[0], body)
        self._network.listen(lambda: Peer(self), self.process.ip, self.bootstrap)
        self._sweep()

    def _sweep(self) -> None:
        if self.process.dead:
            return
        now = self.loop.time()
        for call in [c for c in self.calls if c.leg is None and now - c.idle_since > KEEPALIVE_S]:
            call.transport.close()
        self.loop.call_later(1.0, self._sweep)

    # --- what the oracle asks

    @property
    def pages_used(self) -> int:
        return sum(self.pool.values()) + sum(self.quarantine.values())

    def held(self) -> str:
        """What is not free; empty for nothing."""
        if self.pages_used or self.rooms or self.legs:
            return f"{self.name} holds {self.pool}, quarantine {self.quarantine}, rooms {len(self.rooms)}, legs {len(self.legs)}"
        return ""

    # --- HTTP

    def handle(self, call: Call, method: str, path: str, body: bytes) -> None:
        if path in {"/generate", "/v1/chat/completions", "/v1/completions"}:
            self._generate(call, path, msgspec.json.decode(body))
            return
        if path == "/v1/loads":
            call.answer(200, {"loads": [self._loads()]})
        elif path == "/server_info":
            call.answer(200, self._info())
        elif path == "/v1/models":
            call.answer(200, {"object": "list", "data": [{"id": words.MODEL, "max_model_len": 8192}]})
        elif path in {"/ready", "/health", "/health_generate"}:
            if path != "/health_generate" or not self.knobs.hung:  # a probe of a hung scheduler is never answered
                call.answer(200)
        elif path == "/abort_request":
            self._abort(str(msgspec.json.decode(body).get("rid", "")))
            call.answer(200)
        elif path == "/v1/tokenize":
            self._tokenize(call, msgspec.json.decode(body))
        elif path == "/v1/detokenize":
            tokens = msgspec.json.decode(body)["tokens"]
            many = tokens and isinstance(tokens[0], list)
            call.answer(200, {"text": [words.text_of(one) for one in tokens] if many else words.text_of(tokens)})
        elif path == "/pd_role_switch":
            self._switch(call, msgspec.json.decode(body))
        else:
            call.answer(404, {"error": {"message": f"nothing at {path}"}})

    def _loads(self) -> dict[str, Any]:
        phases = [leg.phase for leg in self.legs]
        running = phases.count("computing") + phases.count("running")
        prealloc, transfer = phases.count("prealloc"), phases.count("transfer")
        inflight, bootstrap = phases.count("inflight"), phases.count("bootstrap")
        waiting = phases.count("waiting")
        return {
            "num_running_reqs": running,
            "num_waiting_reqs": waiting + prealloc + transfer + bootstrap,
            "num_used_tokens": self.pages_used * PAGE,
            "max_total_num_tokens": self.pages_total * PAGE,
            "total_steps": self.steps,
            "total_generated_tokens": self.generated,
            "total_prefill_uncached_tokens": self.prefilled,
            "queues": {"waiting": waiting},
            "disaggregation": {
                "prefill_bootstrap_queue_reqs": bootstrap,
                "prefill_inflight_queue_reqs": inflight,
                "decode_prealloc_queue_reqs": prealloc,
                "decode_transfer_queue_reqs": transfer,
                "kv_transfer_bytes_total": self.transferred,
            },
        }

    def _info(self) -> dict[str, Any]:
        return {
            "disaggregation_mode": self.mode,
            "internal_states": [{"disaggregation_mode": self.mode}],
            "page_size": PAGE,
            "model_hash": "5ed5ed",
            "version": "0.5.23",
            "disaggregation_bootstrap_port": self.bootstrap,
        }

    def _tokenize(self, call: Call, body: dict[str, Any]) -> None:
        if body.get("messages") is not None:
            tokens = words.chat_ids(body["messages"])
        elif isinstance(body.get("prompt"), str):
            tokens = words.ids_of(body["prompt"])
        else:
            tokens = [words.ids_of(p) for p in body["prompt"]]  # type: ignore[misc]
        call.answer(200, {"tokens": tokens, "count": len(tokens), "max_model_len": 8192})

    def _switch(self, call: Call, body: dict[str, Any]) -> None:
        was = self.mode
        if self.legs or self.pages_used:
            message = "the engine is not idle; drain all requests before switching"
            call.answer(400, {"success": False, "message": message, "old_role": was, "new_role": was, "safe_to_restore": True})
            return
        self.mode = str(body["new_role"])
        call.answer(200, {"success": True, "message": "", "old_role": was, "new_role": self.mode, "safe_to_restore": False})

    # --- generation

    def _generate(self, call: Call, path: str, body: dict[str, Any]) -> None:
        if self.knobs.refuse:
            call.answer(self.knobs.refuse, {"error": {"message": "refused by a fault", "code": self.knobs.refuse}})
            return
        leg = Leg(call, body, self._prompt(path, body))
        call.leg = leg
        self.legs[leg] = None
        if leg.room and self.mode == "decode":
            self._begin_decode(leg)
        elif leg.room and self.mode == "prefill":
            self._begin_prefill(leg)
        else:
            self._fail(leg, 400, f"a {self.mode} engine does not do this")

    def _prompt(self, path: str, body: dict[str, Any]) -> list[int]:
        if body.get("input_ids") is not None:
            return list(body["input_ids"])
        if path == "/v1/chat/completions":
            return words.chat_ids(body["messages"])
        given = body["text"] if path == "/generate" else body["prompt"]
        return words.ids_of(given) if isinstance(given, str) else list(given)

    def _take(self, leg: Leg, tokens: int) -> bool:
        pages = -(-tokens // PAGE)
        if self.pages_used + pages > self.pages_total:
            return False
        leg.pages = pages
        self.pool[leg.rid] = self.pool.get(leg.rid, 0) + pages
        return True

    def _free(self, leg: Leg, *, keep_s: float = 0.0) -> None:
        pages, leg.pages = leg.pages, 0
        if not pages or self.knobs.leak:
            return
        left = self.pool.pop(leg.rid) - pages
        if left:
            self.pool[leg.rid] = left
        if keep_s:
            self.quarantine[leg.rid] = pages
            self.loop.call_later(keep_s, self.quarantine.pop, leg.rid, None)

    # --- prefill

    def _begin_prefill(self, leg: Leg) -> None:
        if leg.room in self.rooms:
            raise AssertionError(f"the room {leg.room} is in use twice on {self.name}")
        self.rooms[leg.room] = leg
        leg.phase = "bootstrap"
        leg.waits = self.loop.call_later(WAIT_S, self._fail, leg, 500, "decode did not come to the room in time")
        peer = self.early.pop(leg.room, None)
        if peer is not None:
            self._meet(leg, peer)

    def _meet(self, leg: Leg, peer: Peer) -> None:
        leg.peer, peer.leg = peer, leg
        leg.phase = "waiting"
        self._queue.append(leg)
        self._prefill_next()

    def _prefill_next(self) -> None:
        while self._computing is None and self._queue:
            leg = self._queue[0]
            if leg.over:
                self._queue.popleft()
                continue
            if not self._take(leg, len(leg.prompt)):
                return
            self._queue.popleft()
            self._computing = leg
            leg.phase = "computing"
            took_s = (0.003 + self.prefill_s * len(leg.prompt)) * self.knobs.slow
            self.loop.call_later(took_s, self._computed, leg)

    def _computed(self, leg: Leg) -> None:
        if self.process.dead:
            return
        if self.knobs.hung:
            self.loop.call_later(0.1, self._computed, leg)
            return
        self._computing = None
        self.steps += 1
        self.prefilled += len(leg.prompt)
        if not leg.over:
            leg.phase = "inflight"
            size = len(leg.prompt) * BYTES_PER_TOKEN
            self.loop.call_later(size / 1e9 * self.knobs.slow, self._transferred, leg, size)
        self._prefill_next()

    def _transferred(self, leg: Leg, size: int) -> None:
        """Also for a leg that was aborted meanwhile: nobody calls back what is on its way."""
        if self.process.dead:
            return
        if self.knobs.hung:
            self.loop.call_later(0.1, self._transferred, leg, size)
            return
        assert leg.peer is not None
        self.transferred += size
        self.quarantine.pop(leg.rid, None)
        leg.peer.say(kv=size)

    # --- decode

    def _begin_decode(self, leg: Leg) -> None:
        leg.phase = "prealloc"
        leg.waits = self.loop.call_later(WAIT_S, self._fail, leg, 500, "the KV cache did not come in time")
        self._preallocate(leg)

    def _preallocate(self, leg: Leg) -> None:
        if leg.over or self.process.dead:
            return
        if self.knobs.hung or not self._take(leg, len(leg.prompt) + min(leg.limit, RESERVED)):
            self.loop.call_later(0.05, self._preallocate, leg)
            return
        leg.phase = "transfer"
        self.loop.create_task(self._connect(leg), name=f"room of {self.name}")

    async def _connect(self, leg: Leg) -> None:
        peer = Peer(self, leg)
        try:
            async with asyncio.timeout(WAIT_S):
                await self.loop.create_connection(lambda: peer, *leg.place)
        except OSError:  # a refused one, or a timeout
            self._fail(leg, 500, "the prefill engine cannot be connected")
            return
        leg.peer = peer
        if leg.over:
            peer.close()
        else:
            peer.say(room=leg.room)

    # --- peers

    def peer_says(self, peer: Peer, message: dict[str, Any]) -> None:
        if "room" in message:
            peer.room = message["room"]
            leg = self.rooms.get(peer.room)
            if leg is not None and leg.peer is None:
                self._meet(leg, peer)
            else:
                self.early[peer.room] = peer
            return
        leg = peer.leg
        if "kv" in message and leg is not None:
            if leg.over:
                self.late_writes += leg.rid not in self.quarantine
            else:
                self.transferred += message["kv"]
                peer.say(took=True)
                self._arrived(leg)
        elif "took" in message and leg is not None and not leg.over:
            self._prefill_done(leg)

    def peer_lost(self, peer: Peer) -> None:
        self.early.pop(peer.room, None)
        leg = peer.leg
        if leg is None or leg.over or leg.phase == "running":
            return
        if self.mode == "decode" or leg.phase == "transfer":
            self.loop.call_later(HEARTBEAT_LOST_S, self._fail, leg, 500, "the prefill engine is gone")
        # Prefill notices nothing of its own, as a real one: it waits until its time is over.

    def _prefill_done(self, leg: Leg) -> None:
        first = words.next_token(leg.state)
        ids = [] if first is None else [first]
        meta = {"id": leg.rid, "finish_reason": {"type": "length", "length": 1}, "prompt_tokens": len(leg.prompt), "completion_tokens": 1}
        self._end(leg)
        if leg.stream:
            leg.call.events(b"data: " + _json({"text": words.text_of(ids), "output_ids": ids, "meta_info": meta}) + b"\n\n")
            leg.call.events(b"data: [DONE]\n\n")
            leg.call.end()
        else:
            leg.call.answer(200, {"text": words.text_of(ids), "output_ids": ids, "meta_info": meta})

    def _arrived(self, leg: Leg) -> None:
        leg.phase = "running"
        if leg.waits is not None:
            leg.waits.cancel()
        if leg.peer is not None:
            leg.peer.close()
        if not self._stepping:
            self._stepping = True
            self.loop.call_later(0.001, self._step)

    def _step(self) -> None:
        if self.process.dead:
            return
        if self.knobs.hung:
            self.loop.call_later(0.1, self._step)
            return
        self.steps += 1
        for leg in [x for x in self.legs if x.phase == "running"]:
            if not self.process.dead:
                self._make_token(leg)
        if any(leg.phase == "running" for leg in self.legs):
            self.loop.call_later(self.step_s * self.knobs.slow, self._step)
        else:
            self._stepping = False

    def _make_token(self, leg: Leg) -> None:
        token = words.next_token(leg.state)
        if token is None and leg.ignore_end:
            token = words.VOCABULARY - 1
        if token is None:
            leg.finish = "stop"
        else:
            leg.state = words.state_of((token,), leg.state)
            if self.knobs.wrong and len(leg.ids) % self.knobs.wrong == self.knobs.wrong - 1:
                token = (token + 1) % words.VOCABULARY
            leg.ids.append(token)
            self.generated += 1
            if len(leg.ids) >= leg.limit:
                leg.finish = "length"
        if self.knobs.die.strikes(len(leg.ids)):
            self.loop.call_soon(self.on_end)
        elif self.knobs.cut.strikes(len(leg.ids)):
            self._end(leg)
            leg.call.leg = None
            leg.call.transport.abort()
        elif leg.stream:
            self._stream_token(leg, token)
        elif leg.finish:
            self._end(leg)
            leg.call.answer(200, body=b"{nonsense" if self.knobs.garbage else _json(SHAPES[leg.call.path.partition("?")[0]][0](leg)))

    def _stream_token(self, leg: Leg, token: int | None) -> None:
        call = leg.call
        if self.knobs.early_end and len(leg.ids) > self.knobs.early_end:
            self._end(leg)
            call.end()
            return
        if self.knobs.garbage:
            call.events(b"data: {nonsense\n\n")
            return
        call.events(SHAPES[call.path.partition("?")[0]][1](leg, token))
        if leg.finish:
            self._end(leg)
            call.events(b"data: [DONE]\n\n")
            call.end()

    # --- ends

    def _abort(self, rid: str) -> None:
        if self.knobs.ignore_abort or self.knobs.hung:
            return
        for leg in [x for x in self.legs if x.rid == rid]:
            self.abort_leg(leg)

    def abort_leg(self, leg: Leg) -> None:
        """Asked for, or its client is gone."""
        self._fail(leg, 500, "Abort in the middle of generation", aborted=True)

    def _fail(self, leg: Leg, status: int, sentence: str, *, aborted: bool = False) -> None:
        if leg.over or self.process.dead:
            return
        if leg.waits is not None:
            leg.waits.cancel()
        broken = leg.phase in {"transfer", "inflight"} and leg.peer is not None
        self._end(leg, keep_s=RELEASE_S if broken else 0.0)
        if leg.peer is not None and not broken:
            leg.peer.close()
        elif leg.peer is not None:
            self.loop.call_later(LINGER_S, leg.peer.close)
        call = leg.call
        if call.transport.is_closing():
            return
        error = {"error": {"message": sentence, "type": "abort" if aborted else "engine_error", "code": status}}
        if call.streaming:
            call.events(b"data: " + _json(error) + b"\n\ndata: [DONE]\n\n")
            call.end()
        else:
            call.answer(status, error)

    def _end(self, leg: Leg, *, keep_s: float = 0.0) -> None:
        leg.over = True
        if leg.waits is not None:
            leg.waits.cancel()
        self.legs.pop(leg, None)
        if self.rooms.get(leg.room) is leg:
            del self.rooms[leg.room]
        self._free(leg, keep_s=keep_s)
        self.loop.call_soon(self._prefill_next)

    def __repr__(self) -> str:
        return f"<SimEngine {self.name} {self.mode} legs={len(self.legs)} used={self.pages_used}/{self.pages_total}>"


# --- the shapes of answers


def _usage(leg: Leg) -> dict[str, int]:
    return {"prompt_tokens": len(leg.prompt), "completion_tokens": len(leg.ids), "total_tokens": len(leg.prompt) + len(leg.ids)}


def _finish(leg: Leg) -> dict[str, Any] | None:
    if not leg.finish:
        return None
    return {"type": "length", "length": len(leg.ids)} if leg.finish == "length" else {"type": "stop", "matched": 0}


def _whole_native(leg: Leg) -> dict[str, Any]:
    meta = {"id": leg.rid, "finish_reason": _finish(leg), "prompt_tokens": len(leg.prompt), "completion_tokens": len(leg.ids)}
    return {"text": words.text_of(leg.ids), "output_ids": leg.ids, "meta_info": meta}


def _event(value: Any) -> bytes:
    return b"data: " + _json(value) + b"\n\n"


def _piece_native(leg: Leg, token: int | None) -> bytes:
    return _event(_whole_native(leg))


def _whole_chat(leg: Leg) -> dict[str, Any]:
    message = {"role": "assistant", "content": words.text_of(leg.ids), "reasoning_content": None, "tool_calls": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": leg.finish, "matched_stop": None}
    return {"id": leg.rid, "created": 1, "model": words.MODEL, "object": "chat.completion", "choices": [choice], "usage": _usage(leg)}


def _piece_chat(leg: Leg, token: int | None) -> bytes:
    base = {"id": leg.rid, "created": 1, "model": words.MODEL, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "matched_stop": None}
        return _event({**base, "choices": [choice], "usage": None})

    made = b""
    if not leg.call.streaming:
        made = chunk({"role": "assistant", "content": ""})
    if token is not None:
        made += chunk({"content": words.text_of((token,))})
    if leg.finish:
        made += chunk({}, leg.finish)
        if leg.usage:
            made += _event({**base, "choices": [], "usage": _usage(leg)})
    return made


def _whole_completion(leg: Leg) -> dict[str, Any]:
    choice = {"index": 0, "text": words.text_of(leg.ids), "logprobs": None, "finish_reason": leg.finish, "matched_stop": None}
    return {"id": leg.rid, "created": 1, "model": words.MODEL, "object": "text_completion", "choices": [choice], "usage": _usage(leg)}


def _piece_completion(leg: Leg, token: int | None) -> bytes:
    text = words.text_of(() if token is None else (token,))
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": leg.finish or None, "matched_stop": None}
    base = {"id": leg.rid, "created": 1, "model": words.MODEL, "object": "text_completion"}
    made = _event({**base, "choices": [choice], "usage": None})
    if leg.finish and leg.usage:
        made += _event({**base, "choices": [], "usage": _usage(leg)})
    return made


SHAPES: dict[str, tuple[Callable[[Leg], dict[str, Any]], Callable[[Leg, int | None], bytes]]] = {
    "/generate": (_whole_native, _piece_native),
    "/v1/chat/completions": (_whole_chat, _piece_chat),
    "/v1/completions": (_whole_completion, _piece_completion),
}
_Ids = Sequence[int]
