"""Writes one frame of each kind of message to `tests/data/frames/MAJOR.MINOR`, for the tests of later releases.

    python -m tests.wire.make_golden

A frame that is there is never written again: it is what a release in the field sends.
"""

from __future__ import annotations

from pathlib import Path

from disagg.model import EngineFacts, EngineId, EngineLoad, EngineState, Role
from disagg.wire.codec import MAJOR, MINOR, encode
from disagg.wire.messages import (
    Ack,
    Answer,
    EngineReport,
    Goodbye,
    Heartbeat,
    Hello,
    KvDelta,
    KvResync,
    KvSnapshot,
    Message,
    Order,
    Refused,
    Register,
    Registered,
    Welcome,
)

FRAMES = Path(__file__).parent.parent / "data" / "frames"

PREFILL = EngineReport(
    id=EngineId("box-1-prefill"),
    role=Role.PREFILL,
    state=EngineState.READY,
    reason="it answers its agent",
    host="fd00::1",
    port=30000,
    bootstrap_port=8998,
    api_key="k" * 32,
    pid=4711,
    start_ticks=123456789,
    counter=2**40 + 1,
    working=True,
    facts=EngineFacts("llama", "c0ffee" * 10, 64, 131072, 32768, "0.5.3", "bfloat16", 8),
    load=EngineLoad(3, 2, 1024, 65536, 2**41),
)
LATER_FIELDS = frozenset({"leaving", "switches"})
"""Of a report; added to frames that are there already, which must go on meaning what they meant."""
DECODE = EngineReport(id=EngineId("box-1-decode"), role=Role.DECODE, state=EngineState.SWITCHING, reason="é ü 日本")

SAMPLES: tuple[Message, ...] = (
    Register("box-1", "A" * 40, (Role.PREFILL, Role.UNIFIED), "1.2.3"),
    Hello("box-1", 7, "n0nce", "1.2.3", (PREFILL, DECODE)),
    Heartbeat(7, "n0nce", 41, 40, (PREFILL, DECODE)),
    Goodbye(7, "n0nce", engines_stay=True),
    Answer(12, ok=True, sentence="it drains: 3 requests may finish"),
    Registered("box-1"),
    Welcome("r0uter", 0.5, "1.2.3"),
    Refused("a clone: box-1 incarnation 7 is alive elsewhere", final=True),
    Ack(41),
    Order(12, EngineId("box-1-decode"), "switch", Role.PREFILL, "more prompts than answers"),
    KvDelta(7, "n0nce", EngineId("box-1-prefill"), 3, 9, bytes(range(16)), bytes(range(240, 248)), cleared=True),
    KvSnapshot(7, "n0nce", EngineId("box-1-prefill"), 3, 8, 1, 2, 16, bytes(range(8)), known=False, reason="its events are gone"),
    KvResync(EngineId("box-1-prefill")),
)
"""Of each kind one, every field with a value of its own."""


def place_of(message: Message, version: str = f"{MAJOR}.{MINOR}") -> Path:
    """Where the frame of a message is kept."""
    return FRAMES / version / f"{type(message).__name__.lower()}.bin"


def main() -> None:
    """Writes the frames that are missing."""
    for message in SAMPLES:
        place = place_of(message)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.write_bytes(encode(message))


if __name__ == "__main__":
    main()
