"""The messages of the control plane. Frozen, tagged by `kind`, one msgpack map each.

    host ──► router    Register · Hello · Heartbeat · Goodbye · Answer · KvSnapshot · KvDelta
    router ──► host    Registered · Welcome · Refused · Ack · Order · KvResync

A host that has a token connects with the token's one-time key and says `Register`; from then on it connects with its own key. It says
`Hello` until it hears `Welcome`, and then a `Heartbeat` every interval, and at once when an engine changed. Each heartbeat tells the whole
truth about the host's engines, so that a lost one costs nothing. The router acknowledges each; the host repeats the last acknowledgement,
so that both know that both directions work: over TCP, a cut in one direction is otherwise not noticed for minutes.

What the prefix caches of its engines hold, a host says in snapshots and deltas (`disagg.policy.prefix`), but only to a router whose frames
are of minor version 1 or later.

New fields need a default and raise the minor version; a field that goes, or means something else, raises the major one. Both versions stand
in the header of every frame (`disagg.wire.codec`). Seconds, tokens and bytes, as the names say.

Names, places and keys end up in URLs, HTTP headers and tables of the router, so their length and their letters are limited here, where they
come in.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from disagg.model import EngineFacts, EngineId, EngineLoad, EngineState, Role

Count = Annotated[int, msgspec.Meta(ge=0)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Word = Annotated[str, msgspec.Meta(max_length=128)]
EngineName = Annotated[EngineId, msgspec.Meta(pattern=r"\A[!-~]{1,128}\Z")]
Place = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Za-z.:%_\[\]-]{0,255}\Z")]
Hashes = Annotated[bytes, msgspec.Meta(max_length=480_000)]
"""Packed by `disagg.policy.prefix.pack`; 60,000 of them at most."""
Secret = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{0,512}\Z")]


class Message(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower):
    """What every message is."""


class EngineReport(msgspec.Struct, frozen=True):
    """What an agent says about one of its engines.

    Attributes:
        id: unique in the cluster.
        state: starting, ready, draining (its host is stopping), switching, dead or held; the router adds its own judgement.
        reason: why, one sentence.
        host: where the engine is reached, as the other hosts can reach it.
        pid: of its process; 0 where there is none, or the agent does not know it (attached, not adopted yet): that is no news.
        start_ticks: when its process began, clock ticks since the machine started; with `pid` this names the process.
        counter: the sum of what an engine's own counters count; it grows as long as the engine makes progress.
        working: the engine has work that does not merely wait for a peer.
        leaving: it ends soon: what runs on it should go on elsewhere. A router that does not know this lets it be cut.
        switches: how often its process has changed its role since its start.

    An agent names the process of an engine that it started, and of no other.
    """

    id: EngineName
    role: Role
    state: EngineState
    reason: str = ""
    host: Place = ""
    port: Port = 0
    bootstrap_port: Port = 0
    api_key: Secret = ""
    pid: Count = 0
    start_ticks: Count = 0
    counter: int = 0
    working: bool = False
    facts: EngineFacts = EngineFacts()
    load: EngineLoad = EngineLoad()
    leaving: bool = False
    switches: Count = 0

    @property
    def owned(self) -> bool:
        """Its agent started it, so that all its work comes from the router: not so of one that was attached."""
        return bool(self.pid and self.start_ticks)

    def __repr__(self) -> str:
        return f"<EngineReport {self.id} {self.role} {self.state} pid={self.pid} counter={self.counter}>"  # without the key


class Register(Message, frozen=True):
    """Said with a token's one-time key: let this key of mine be known under this name.

    Attributes:
        public_key: the host's own key, Z85, 40 characters.
        roles: those of its engines; the token must cover them.
        release: of disagg, for people.
    """

    name: Word
    public_key: Word
    roles: tuple[Role, ...]
    release: str = ""


class Hello(Message, frozen=True):
    """Said with the host's own key when it has connected, until it is answered.

    Attributes:
        incarnation: counts the starts of this host's agent; kept in its state directory.
        nonce: random, one per start: tells a clone of that directory from the original.
    """

    name: Word
    incarnation: Count
    nonce: Word
    release: str = ""
    engines: tuple[EngineReport, ...] = ()


class Heartbeat(Message, frozen=True):
    """The host lives, and this is how its engines are.

    Attributes:
        seq: counts the heartbeats of this incarnation, from 1; over new connections too, so that the newest is known as such.
        acked: the `seq` of the last `Ack` that arrived; 0 before the first.
    """

    incarnation: Count
    nonce: Word
    seq: Count
    acked: Count
    engines: tuple[EngineReport, ...] = ()


class Goodbye(Message, frozen=True):
    """The agent ends. Its engines end with it, unless `engines_stay`."""

    incarnation: Count
    nonce: Word
    engines_stay: bool = False


class Answer(Message, frozen=True):
    """What became of an `Order`."""

    order: int
    ok: bool
    sentence: str


class KvDelta(Message, frozen=True):
    """What changed in an engine's prefix cache: all went if `cleared`, then `removed` went, then `stored` came.

    Attributes:
        epoch: counts the processes of this engine that this incarnation followed.
        seq: counts the snapshots and deltas of an epoch, from 1.
    """

    incarnation: Count
    nonce: Word
    engine: EngineName
    epoch: Count
    seq: Count
    stored: Hashes = b""
    removed: Hashes = b""
    cleared: bool = False


class KvSnapshot(Message, frozen=True):
    """A part of all that an engine's prefix cache holds.

    Attributes:
        epoch, seq: see `KvDelta`; all parts have the same.
        part, parts: which one, from 0, and how many there are.
        block_size: tokens in a block; 0 where none was ever stored.
        known: False when the host cannot know; there are no blocks then.
        reason: why, one sentence.
    """

    incarnation: Count
    nonce: Word
    engine: EngineName
    epoch: Count
    seq: Count
    part: Count = 0
    parts: Count = 1
    block_size: Count = 0
    blocks: Hashes = b""
    known: bool = True
    reason: Annotated[str, msgspec.Meta(max_length=400)] = ""


class Registered(Message, frozen=True):
    """The key is known now; the token is spent."""

    name: str


class Welcome(Message, frozen=True):
    """The host belongs to the cluster.

    Attributes:
        router: random, one per start of the router: a host that hears another one knows that orders it waits for are void.
    """

    router: str
    heartbeat_interval_s: float = 0.25
    release: str = ""


class Refused(Message, frozen=True):
    """Not like this. `final`: trying again cannot help, a person must do something."""

    reason: str
    final: bool = False


class Ack(Message, frozen=True):
    """Heartbeat `seq` arrived."""

    seq: int


class Order(Message, frozen=True):
    """Do this to an engine, and answer.

    Attributes:
        action: ``switch`` (its role, live), ``restart`` (in this role), ``drain``, ``undrain``.
        role: for switch and restart.
        cause: who wants it and why, for the host's log.
    """

    id: int
    engine: EngineId
    action: str
    role: Role | None = None
    cause: str = ""


class KvResync(Message, frozen=True):
    """Something that the host said of this engine's cache was missed: send a snapshot."""

    engine: EngineId


ToRouter = Register | Hello | Heartbeat | Goodbye | Answer | KvDelta | KvSnapshot
ToHost = Registered | Welcome | Refused | Ack | Order | KvResync
