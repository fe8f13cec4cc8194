"""Faults on purpose: what an engine started with ``--faults`` does wrong, and where.

    --faults none                      nothing yet; POST /faults may set some later
    --faults 'die@token:12,slow:x5'    several, separated by commas

    die@WHERE       SIGKILL to oneself               WHERE: accept        a request was read
    hang@WHERE      steps stop, HTTP goes on                prefill:50%   so much of a prompt is computed
    stall@transfer:BYTES     prefill sends no more          transfer:BYTES  so many KV bytes were sent or received
    stall@head      the answer's head is sent, no more      token:N       N tokens of an answer went out
    stall@token:N   no more of the answer is sent; its connection stays open, steps and other requests go on
    corrupt@transfer:BYTES   one page's sum is wrong
    garbage@token:N          what follows is no JSON
    early-end@token:N        the answer ends without an end
    slow:xK         steps last K times as long
    refuse:STATUS   requests are answered with this status
    late-write      prefill goes on writing after CANCEL, then says STOPPED
    ignore-abort    /abort_request answers 200 and does nothing
    ignore-gone     requests of clients that left run on, as SGLang's whole answers do for seconds
    lie-health      /health, /ready and /health_generate always answer 200
    leak            pages of requests that end are never free again, nor those in quarantine
    refuse-switch   /pd_role_switch answers 400 with safe_to_restore false, as after a switch that broke; the role stays

Only for tests and chaos. An engine that hangs does not hear /abort_request and does not answer /pd_role_switch: its scheduler would
have to. Counts are per request; everything but ``die`` and ``hang`` applies to each request again.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from disagg.errors import ConfigError

PLACES = {
    "die": ("accept", "prefill", "transfer", "token"),
    "hang": ("accept", "prefill", "transfer", "token"),
    "stall": ("transfer", "head", "token"),
    "corrupt": ("transfer",),
    "garbage": ("token",),
    "early-end": ("token",),
}
SWITCHES = ("late-write", "ignore-abort", "ignore-gone", "lie-health", "leak", "refuse-switch")
BARE_PLACES = ("accept", "head")
"""Places without a number."""
GRAMMAR = "'none', or a list of die@accept, die@prefill:50%, die@transfer:65536, die@token:12 (hang likewise), \
stall@transfer:N, stall@head, stall@token:N, corrupt@transfer:N, garbage@token:N, early-end@token:N, slow:x5, refuse:503, \
late-write, ignore-abort, ignore-gone, lie-health, leak, refuse-switch"

_AT = re.compile(r"([a-z-]+)@([a-z]+)(?::(\d{1,12})(%?))?")
_SLOW = re.compile(r"slow:x(\d{1,4}(?:\.\d{1,3})?)")
_REFUSE = re.compile(r"refuse:(\d{3})")


class Point(NamedTuple):
    """Where a fault strikes: ``amount`` is a percentage, bytes or tokens, as ``place`` says; 0 for ``accept`` and ``head``."""

    place: str
    amount: int = 0


class Faults(NamedTuple):
    """What goes wrong. The default: nothing."""

    die: Point | None = None
    hang: Point | None = None
    stall: Point | None = None
    corrupt: Point | None = None
    garbage: Point | None = None
    early_end: Point | None = None
    slow: float = 1.0
    refuse: int = 0
    late_write: bool = False
    ignore_abort: bool = False
    lie_health: bool = False
    leak: bool = False
    refuse_switch: bool = False
    ignore_gone: bool = False

    def strikes(self, name: str, place: str, amount: float = 0) -> bool:
        """Whether the fault ``name`` is set for this place and ``amount`` has reached it."""
        point: Point | None = getattr(self, name)
        return point is not None and point.place == place and amount >= point.amount


def parse_faults(spec: str) -> Faults:
    """Read ``--faults``.

    Raises:
        ConfigError: one sentence with the word at fault and what is allowed.
    """
    if spec.strip() in {"", "none"}:
        return Faults()
    found: dict[str, object] = {}
    for word in (word.strip() for word in spec.split(",")):
        name, value = _parse_word(word)
        if name in found:
            raise ConfigError(f"--faults: {name.replace('_', '-')} is given twice")
        found[name] = value
    return Faults(**found)  # type: ignore[arg-type]  # names and types come from _parse_word


def _parse_word(word: str) -> tuple[str, object]:
    if word in SWITCHES:
        return word.replace("-", "_"), True
    if match := _SLOW.fullmatch(word):
        return "slow", _at_least(float(match[1]), 1, word)
    if match := _REFUSE.fullmatch(word):
        return "refuse", _status(int(match[1]), word)
    match = _AT.fullmatch(word)
    if match is None or match[2] not in PLACES.get(match[1], ()):
        raise ConfigError(f"--faults: {word!r} is not known; allowed: {GRAMMAR}")
    return match[1].replace("-", "_"), _point(match[2], match[3], match[4], word)


def _point(place: str, digits: str | None, percent: str, word: str) -> Point:
    if place in BARE_PLACES:
        if digits is not None:
            raise ConfigError(f"--faults: {word!r}: {place} takes no number")
        return Point(place)
    if digits is None:
        raise ConfigError(f"--faults: {word!r} needs a number, as in {place}:{'50%' if place == 'prefill' else '12'}")
    if (percent == "%") != (place == "prefill") or (percent and int(digits) > 100):
        raise ConfigError(f"--faults: {word!r}: prefill takes 0% to 100%, the other places a plain number")
    return Point(place, int(digits))


def _at_least(value: float, least: float, word: str) -> float:
    if value < least:
        raise ConfigError(f"--faults: {word!r}: the factor must be at least {least}")
    return value


def _status(status: int, word: str) -> int:
    if not 400 <= status <= 599:
        raise ConfigError(f"--faults: {word!r}: the status must be 400 to 599")
    return status
