"""From the log of a run to its verdict. Pure: the same log gives the same report.

Each request has one outcome:

    right       the answer that a quiet cluster gives, complete
    left        the client went away on purpose, and what it had until then was right
    lost        no answer, an error, or a stream that ends with an error event or too early; what had come of it was right
    shed        refused with 429 or 503; lost, too, for who counts availability
    wrong       it looks like an answer and is not the right one, or a part of it is not
    stuck       no end within the limit
    excused     lost or shed, but the router itself was away
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from tests.chaos.answers import Malformed, Said, stream, whole
from tests.quantile import quantile

AVAILABLE = 0.999
"""Of the requests whose clients stayed, while one thing is broken at a time."""
SPARE_FDS = 8
"""Descriptors by which a router may have more than before: idle connections to engines are kept."""
OUTCOMES = ("right", "left", "excused", "shed", "lost", "wrong", "stuck")


class Heard(NamedTuple):
    """What a client got.

    Attributes:
        status: of the answer; 0 if there was none.
        raw: of its body, as far as it came.
        end: "end" of the body, "left" by the client, "stuck" at its limit, or the name of the transport's error.
    """

    status: int
    raw: bytes
    end: str


class Entry(msgspec.Struct, frozen=True):
    """One request in the log; times in seconds since the run began."""

    began: float
    ended: float
    route: str
    stream: bool
    outcome: str
    detail: str = ""
    first_s: float | None = None
    attempts: int = 1
    request_id: str = ""


class Mark(msgspec.Struct, frozen=True):
    """One fault: its class, whom it met, from when to when."""

    name: str
    target: str
    began: float
    ended: float


class Away(msgspec.Struct, frozen=True):
    """The router was away. With ``killed`` what was in flight when it began is excused too: nobody could have finished that."""

    began: float
    ended: float
    killed: bool

    def excuses(self, began: float, ended: float) -> bool:
        return began <= self.ended and (ended >= self.began if self.killed else began >= self.began)


class After(msgspec.Struct, frozen=True):
    """What is left when everything has rested.

    Attributes:
        used_tokens: KV tokens by engine that are neither free nor in quarantine; -1: the engine does not answer.
        live: requests that the router still holds something for.
        fds: of the router before the load, and after the rest; it may be another process by then.
        rss_mb: likewise.
        not_ready: engines that are not back in service, with the reason.
    """

    used_tokens: dict[str, int]
    live: int
    fds: tuple[int, int]
    rss_mb: tuple[float, float]
    not_ready: dict[str, str]

    def leaks(self) -> list[str]:
        found = [f"{name} holds {tokens} KV tokens" for name, tokens in self.used_tokens.items() if tokens > 0]
        found += [f"{name} does not tell what it holds" for name, tokens in self.used_tokens.items() if tokens < 0]
        if self.live:
            found.append(f"the router holds entries for {self.live} legs")
        if self.fds[1] > self.fds[0] + SPARE_FDS:
            found.append(f"the router has {self.fds[1]} descriptors, {self.fds[0]} before")
        return found


class Log(msgspec.Struct):
    """Everything that a run saw; counts are of the routers' own metrics."""

    seed: int
    storm: bool
    seconds: float = 0.0
    entries: list[Entry] = []
    marks: list[Mark] = []
    away: list[Away] = []
    resumes: dict[str, float] = {}
    replays: dict[str, float] = {}
    after: After | None = None
    notes: list[str] = []
    load_average: tuple[float, float] = (0.0, 0.0)


class Report(msgspec.Struct, frozen=True):
    """The verdict; ``broken`` says in sentences what must not be, and is empty after a good run."""

    seed: int
    storm: bool
    seconds: float
    faults: dict[str, int]
    requests: int
    outcomes: dict[str, int]
    availability: float
    ttft_p50_s: float
    ttft_p99_s: float
    resumes: dict[str, float]
    replays: dict[str, float]
    more_than_one_attempt: int
    after: After | None
    not_right: list[Entry]
    notes: list[str]
    load_average: tuple[float, float]
    broken: list[str]


def outcome_of(route: str, streamed: bool, heard: Heard, right: Said) -> tuple[str, str]:
    """The outcome of one request, but for excuses, and what there is to say of it."""
    if heard.end == "stuck":
        return "stuck", "no end within the limit"
    if heard.status and heard.status != 200:
        return _refused(heard)
    try:
        return _compared(route, streamed, heard, right)
    except Malformed as error:
        return "wrong", str(error)


def _refused(heard: Heard) -> tuple[str, str]:
    try:
        sentence = str(msgspec.json.decode(heard.raw)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return ("left", "") if heard.end == "left" else ("wrong", f"{heard.status} without an error object")
    return "shed" if heard.status in {429, 503} else "lost", f"{heard.status}: {sentence}"


def _compared(route: str, streamed: bool, heard: Heard, right: Said) -> tuple[str, str]:
    complete = heard.end == "end"
    if not streamed and not (complete and heard.status):
        return ("left" if heard.end == "left" else "lost"), heard.end
    said = stream(route, heard.raw) if streamed else whole(route, heard.raw)
    of = f"{len(said.text)} of {len(right.text)} characters"
    if not right.text.startswith(said.text):
        return "wrong", f"{of}, the text departs from the right one at the {_departs(said.text, right.text)}th"
    if said.ended:
        return ("right", "") if said == right else ("wrong", f"{of}, and {said[1:]} is not {right[1:]}")
    if heard.end == "left":
        return "left", ""
    return "lost", f"an error event after {of}: {said.error}" if said.error else f"cut off after {of}: {heard.end}"


def _departs(text: str, right: str) -> int:
    pairs = enumerate(zip(text, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), len(right))


def report_of(log: Log) -> Report:
    """The verdict on a run."""
    entries = [excused(entry, log.away) for entry in log.entries]
    outcomes = Counter(entry.outcome for entry in entries)
    counted = sum(outcomes[name] for name in ("right", "shed", "lost", "wrong", "stuck"))
    availability = outcomes["right"] / counted if counted else 0.0
    first = [entry.first_s for entry in entries if entry.first_s is not None and entry.outcome == "right"]
    return Report(
        seed=log.seed,
        storm=log.storm,
        seconds=log.seconds,
        faults=dict(sorted(Counter(mark.name for mark in log.marks).items())),
        requests=len(entries),
        outcomes={name: outcomes[name] for name in OUTCOMES},
        availability=availability,
        ttft_p50_s=quantile(first, 0.5),
        ttft_p99_s=quantile(first, 0.99),
        resumes=log.resumes,
        replays=log.replays,
        more_than_one_attempt=sum(entry.attempts > 1 for entry in entries),
        after=log.after,
        not_right=[entry for entry in entries if entry.outcome not in {"right", "left", "excused"}],
        notes=log.notes,
        load_average=log.load_average,
        broken=_broken(log, outcomes, counted, availability),
    )


def excused(entry: Entry, away: Sequence[Away]) -> Entry:
    """The entry, with its outcome changed where the router was away."""
    lost = entry.outcome in {"lost", "shed"}
    if lost and any(window.excuses(entry.began, entry.ended) for window in away):
        return msgspec.structs.replace(entry, outcome="excused")
    return entry


def _broken(log: Log, outcomes: Mapping[str, int], counted: int, availability: float) -> list[str]:
    found = [f"{outcomes[name]} requests are {name}" for name in ("stuck", "wrong") if outcomes[name]]
    if not counted:
        found.append("nobody asked anything: this proves nothing")
    elif not log.storm and availability < AVAILABLE:
        found.append(f"availability {100 * availability:.3f} % is under {100 * AVAILABLE:g} %")
    if not log.marks:
        found.append("nothing was broken: this proves nothing")
    found += ["nobody looked for leaks"] if log.after is None else log.after.leaks()
    return found


def page(report: Report) -> str:
    """The report for people."""
    lines = [
        f"seed {report.seed}{', storm' if report.storm else ''}: {report.seconds:.0f} s, {sum(report.faults.values())} faults",
        f"load average {report.load_average[0]:.1f} before, {report.load_average[1]:.1f} after",
        "",
        "faults",
        *(f"  {count:4}  {name}" for name, count in report.faults.items()),
        "",
        f"requests      {report.requests}",
        *(f"  {name:<11} {count}" for name, count in report.outcomes.items()),
        f"availability  {100 * report.availability:.3f} %",
        f"TTFT          p50 {1000 * report.ttft_p50_s:.0f} ms, p99 {1000 * report.ttft_p99_s:.0f} ms (streams)",
        f"resumes       {_counts(report.resumes)}",
        f"replays       {_counts(report.replays)}",
        f"attempts      {report.more_than_one_attempt} answers took more than one (by their header: before the first byte)",
    ]
    if (after := report.after) is not None:
        held = {name: tokens for name, tokens in after.used_tokens.items() if tokens}
        lines += [
            f"KV held       {held or 'nothing'} on {len(after.used_tokens)} engines",
            f"router        {after.live} legs live; descriptors {after.fds[0]} → {after.fds[1]}",
            f"RSS           {after.rss_mb[0]:.0f} → {after.rss_mb[1]:.0f} MB",
            *(f"not ready     {name}: {reason}" for name, reason in after.not_ready.items()),
        ]
    lines += [f"note          {note}" for note in report.notes]
    lines += [
        f"{entry.outcome:<8} {entry.began:6.1f}-{entry.ended:.1f} s  {entry.route}{' stream' if entry.stream else ''} "
        f"{entry.request_id or '-'}  {entry.detail}"
        for entry in report.not_right[:50]
    ]
    lines += ["", *(f"BROKEN: {sentence}" for sentence in report.broken)] if report.broken else ["", "nothing stuck, wrong or leaked"]
    return "\n".join(lines) + "\n"


def _counts(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {count:g}" for name, count in sorted(counts.items())) or "none"
