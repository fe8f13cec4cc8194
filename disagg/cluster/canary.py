"""Does a pair answer right? Every new pair, and every new unified engine, answers fixed prompts; who differs is quarantined.

A state machine. Theory of operation. An engine with the wrong weights, or a handoff that garbles KV pages, answers fluently and wrong, and
no health check notices. So each pair of ready engines that was not tried before is asked the same few prompts, greedily. What is compared
is the output ids. Where two answers part, the first answer's own margin decides: at a near tie, where the best and the second best token
are less than `NEAR_TIE` apart, two kinds of GPU may well differ in a rounding, and that is no fault; anywhere else it is one.

Which answer is right? The one that a unified engine gives, or once gave, because it hands nothing over; else the one that most pairs give;
else the first. It may change as more pairs answer, and with it who is quarantined. It is remembered when who gave it is gone, as one more
voice; but nobody new is condemned by an absent witness alone, or an upgrade of all engines would be the end of service.

Answers are compared among engines of one model: of the same name, weights (as far as their hash is known) and precision. A pair is known by
its processes: a restart of either engine, or a change of its role, makes it a new pair, to be tried again; that is the way out of a
quarantine. A canary that fails says nothing about right and wrong; it is asked again later.

One canary runs at a time, and only so many pairs are tried as there are: the engines' time is the clients'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from disagg.errors import EngineError
from disagg.model import Choice, ClusterView, EngineId, EngineState, EngineView

NEAR_TIE = 0.25
"""Nats between the best and the second best token."""
ANSWER_TOKENS = 8
RETRY_S = 5.0
RETRY_MAX_S = 60.0
HISTORY_LIMIT = 64

_WORDS = (
    "The ferry leaves the island at seven, and the baker loads her bread before the mist has gone. Two lamps burn at the pier. "
    "A dog counts the crates, a boy counts the gulls, and nobody counts the minutes until the rope is thrown. "
)
PROMPTS = ("Count: one, two, three,", _WORDS, _WORDS * 4)
"""From less than a page of KV to many, and none an exact number of pages. Nobody's prompts but ours."""


class Answer(msgspec.Struct, frozen=True):
    """What one prompt was answered with.

    Attributes:
        ids: the tokens.
        margins: at each of them, how far ahead of the second best it was; nats.
    """

    ids: tuple[int, ...]
    margins: tuple[float, ...]


Answers = tuple[Answer, ...]


def request(prompt: str, salt: str) -> bytes:
    """The body of a canary for ``POST /generate``.

    Args:
        prompt: one of `PROMPTS`.
        salt: a new one each time: the engines' prefix caches must not answer in place of the handoff.
    """
    sampling = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    body = {"text": prompt, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 2, "extra_key": salt}
    return msgspec.json.encode(body)


def read_answer(body: bytes) -> Answer:
    """Reads what ``/generate`` answered.

    Raises:
        EngineError: it is no such answer.
    """
    try:
        answer = msgspec.json.decode(body, type=dict[str, Any])
        ids = tuple(int(i) for i in answer["output_ids"])
        tops = answer["meta_info"].get("output_top_logprobs") or []
        # An engine that plays one with other hardware has no probabilities to tell: then every token counts.
        margins = tuple(float(best[0]) - float(second[0]) for best, second, *_ in tops) if all(tops) else ()
    except (msgspec.DecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"a canary's answer makes no sense: {type(error).__name__}") from error
    return Answer(ids, margins if len(margins) == len(ids) else (float("inf"),) * len(ids))


def difference(trusted: Answers, other: Answers) -> str:
    """Where two answers part although there was no near tie; empty when they agree."""
    for number, (right, seen) in enumerate(zip(trusted, other, strict=True), 1):
        at = next((i for i, (a, b) in enumerate(zip(right.ids, seen.ids, strict=False)) if a != b), None)
        if at is None and len(right.ids) != len(seen.ids):
            return f"its answer to canary {number} has {len(seen.ids)} tokens instead of {len(right.ids)}"
        if at is not None and right.margins[at] >= NEAR_TIE:
            return f"token {at + 1} of its answer to canary {number} is {seen.ids[at]} instead of {right.ids[at]}"
    return ""


class Pairing(msgspec.Struct, frozen=True):
    """Who answered: a pair, or a unified engine without a prefill engine. Processes, by their pids."""

    prefill: EngineId | None
    prefill_pid: int
    decode: EngineId
    decode_pid: int

    @property
    def names(self) -> tuple[EngineId | None, EngineId]:
        """The engines."""
        return self.prefill, self.decode

    def __str__(self) -> str:
        return f"{self.prefill} with {self.decode}" if self.prefill is not None else self.decode


def pairing(choice: Choice) -> Pairing:
    """Of the engines of a choice, as they run now."""
    prefill, decode = choice.prefill, choice.decode
    if prefill is None:
        return Pairing(None, 0, decode.id, decode.address.pid)
    return Pairing(prefill.id, prefill.address.pid, decode.id, decode.address.pid)


# --- events and commands


class ViewChanged(msgspec.Struct, frozen=True):
    """These engines are there now."""

    view: ClusterView


class Answered(msgspec.Struct, frozen=True):
    """All prompts were answered."""

    pairing: Pairing
    answers: Answers


class Failed(msgspec.Struct, frozen=True):
    """They were not."""

    pairing: Pairing
    why: str


class Tick(msgspec.Struct, frozen=True):
    """Time passed."""


class Ask(msgspec.Struct, frozen=True):
    """Have these engines answer the prompts; tell with `Answered` or `Failed`."""

    pairing: Pairing
    choice: Choice


class Judged(msgspec.Struct, frozen=True):
    """Who is quarantined has changed: look at `quarantined`. One sentence for the log."""

    sentence: str


Event = ViewChanged | Answered | Failed | Tick
Command = Ask | Judged


class _Truth(msgspec.Struct, frozen=True):
    """What was right the last time, and whether a unified engine said so."""

    answers: Answers
    of_unified: bool
    by: str


class _Case:
    """What is known of one pairing."""

    __slots__ = ("answers", "choice", "due_at", "failures", "group", "verdict")

    def __init__(self, choice: Choice, group: tuple[str, ...], now: float) -> None:
        self.choice = choice
        self.group = group
        self.answers: Answers | None = None
        self.verdict = ""
        self.due_at = now
        self.failures = 0


class Canary:
    """The machine. Times are seconds on the caller's monotonic clock.

    Attributes:
        history: what happened, oldest first: time and sentence.
    """

    def __init__(self) -> None:
        self._cases: dict[Pairing, _Case] = {}  # in the order in which they came
        self._truths: dict[tuple[str, ...], _Truth] = {}
        self._asked: Pairing | None = None
        self.history: list[tuple[float, str]] = []

    def handle(self, event: Event, *, now: float) -> list[Command]:
        """Takes an event and returns what to do about it."""
        match event:
            case ViewChanged(view=view):
                changed = self._look(view, now)
            case Answered(pairing=who, answers=answers):
                changed = self._answered(who, answers, now)
            case Failed(pairing=who):
                changed = self._failed(who, now)
            case Tick():
                changed = []
        return [*changed, *self._ask_next(now)]

    def next_deadline(self) -> float | None:
        """When it wants a `Tick`; None while it waits for something else."""
        if self._asked is not None:
            return None
        return min((case.due_at for case in self._cases.values() if case.answers is None), default=None)

    def rests(self, now: float) -> bool:
        """There is nobody to ask at the moment."""
        return self._asked is None and all(case.answers is not None or case.due_at > now for case in self._cases.values())

    @property
    def quarantined(self) -> Mapping[tuple[EngineId | None, EngineId], str]:
        """Who must not be used, with the reason: (prefill, decode), or (None, unified)."""
        return {who.names: case.verdict for who, case in self._cases.items() if case.verdict}

    @property
    def tried(self) -> int:
        """How many pairings have answered."""
        return sum(case.answers is not None for case in self._cases.values())

    def against(self, choice: Choice, answers: Answers) -> str:
        """How these answers differ from those that are trusted for such engines; empty where they do not, or none are known."""
        truth = self._truths.get(_group(choice))
        return "" if truth is None else difference(truth.answers, answers)

    def check(self) -> None:
        """Asserts what is always true."""
        assert self._asked is None or self._asked in self._cases
        assert all(not case.verdict or case.answers is not None for case in self._cases.values())
        for group in {case.group for case in self._cases.values()}:
            told = [c for c in self._cases.values() if c.group == group and c.answers is not None]
            truth = self._truths.get(group)
            assert (truth is not None) >= bool(told), "where somebody has answered, something is right"
            assert all(bool(c.verdict) >= (c.answers != truth.answers and not _near(truth, c)) for c in told if truth is not None)

    def __repr__(self) -> str:
        return f"<Canary tried={self.tried} of {len(self._cases)} quarantined={len(self.quarantined)}>"

    # --- moves

    def _look(self, view: ClusterView, now: float) -> list[Command]:
        there = {pairing(choice): choice for choice in _choices(view)}
        gone = [who for who, case in self._cases.items() if who not in there and not _may_return(view, who, case)]
        for who in gone:
            del self._cases[who]
            self._asked = None if self._asked == who else self._asked
        for who, choice in there.items():
            known = self._cases.get(who)
            if known is None:
                self._cases[who] = _Case(choice, _group(choice), now)
            else:
                known.choice = choice
        return self._judge(now) if gone else []

    def _answered(self, who: Pairing, answers: Answers, now: float) -> list[Command]:
        self._asked = None if self._asked == who else self._asked
        case = self._cases.get(who)
        if case is None:
            return []  # its engines are others by now
        case.answers = answers
        return self._judge(now)

    def _failed(self, who: Pairing, now: float) -> list[Command]:
        self._asked = None if self._asked == who else self._asked
        case = self._cases.get(who)
        if case is not None:
            case.due_at = now + min(RETRY_MAX_S, RETRY_S * 2.0**case.failures)
            case.failures = min(case.failures + 1, 8)
        return []

    def _ask_next(self, now: float) -> list[Command]:
        """Unified engines first: theirs is the answer that the others are measured with."""
        if self._asked is not None:
            return []
        due = [(who.prefill is not None, case.due_at) for who, case in self._cases.items() if case.answers is None and case.due_at <= now]
        if not due:
            return []
        first = min(due)
        who, case = next((w, c) for w, c in self._cases.items() if c.answers is None and (w.prefill is not None, c.due_at) == first)
        self._asked = who
        return [Ask(who, case.choice)]

    def _forget(self) -> None:
        """Where nobody knows which weights an engine has, those that come next may have others."""
        groups = {case.group for case in self._cases.values()}
        for group in [g for g in self._truths if g not in groups and not g[1]]:
            del self._truths[group]

    def _judge(self, now: float) -> list[Command]:
        sentences = []
        for group in {case.group: None for case in self._cases.values()}:
            members = {w: c for w, c in self._cases.items() if c.group == group and c.answers is not None}
            truth = _right(members, self._truths.get(group))
            if truth is None:
                continue
            self._truths[group] = truth
            for who, case in members.items():
                assert case.answers is not None
                wrong = difference(truth.answers, case.answers)
                verdict = f"{wrong}, which {truth.by} gave" if wrong else ""
                if verdict and not case.verdict:
                    sentences.append(f"{who} is quarantined: {verdict}")
                elif case.verdict and not verdict:
                    sentences.append(f"{who} is trusted again: most others answer as it does")
                case.verdict = verdict
        self._forget()
        self.history += [(now, sentence) for sentence in sentences]
        del self.history[:-HISTORY_LIMIT]
        return [Judged(sentence) for sentence in sentences]


def _right(members: Mapping[Pairing, _Case], known: _Truth | None) -> _Truth | None:
    """What is right now; None where nobody has ever answered."""
    if known is not None and all(difference(known.answers, case.answers or ()) for case in members.values()):
        known = _without_witness(members, known)
    camps: list[tuple[_Truth, int]] = [(known, 1)] if known is not None else []
    for who, case in members.items():
        assert case.answers is not None
        unified = who.prefill is None
        at = next((i for i, (truth, _) in enumerate(camps) if not difference(truth.answers, case.answers)), None)
        if at is None:
            camps.append((_Truth(case.answers, unified, str(who)), 1))
        else:
            truth, voices = camps[at]
            camps[at] = (msgspec.structs.replace(truth, of_unified=truth.of_unified or unified), voices + 1)
    says = {id(t): any(w.prefill is None and not difference(t.answers, c.answers or ()) for w, c in members.items()) for t, _ in camps}
    best = max(camps, key=lambda camp: (says[id(camp[0])], camp[0].of_unified, camp[1]), default=None)  # the first of equals
    return None if best is None else best[0]


def _without_witness(members: Mapping[Pairing, _Case], known: _Truth) -> _Truth | None:
    """Nobody who is there says any more what was right. It may be an upgrade of all engines: new ones that agree are believed.

    Those that were found wrong while somebody could tell stay so for as long as they live.
    """
    fresh = [case.answers for case in members.values() if not case.verdict and case.answers is not None]
    agree = bool(fresh) and not any(difference(fresh[0], answers) for answers in fresh)
    return None if agree else known


def _near(truth: _Truth, case: _Case) -> bool:
    return case.answers is not None and not difference(truth.answers, case.answers)


def _choices(view: ClusterView) -> Iterator[Choice]:
    for pool in view.proving:
        for unified in pool.unified:
            yield Choice(None, unified, "a canary")
        for part in pool.islands or (pool,):
            yield from (Choice(prefill, decode, "a canary") for prefill in part.prefill for decode in part.decode)


def _may_return(view: ClusterView, who: Pairing, case: _Case) -> bool:
    """Its engines are not ready now, but they are the same processes in the same roles: a drain changes no answer."""
    engines = {e.id: e for e in view.engines}
    return all(
        _is_same(engines.get(name), pid, known)
        for name, pid, known in ((who.prefill, who.prefill_pid, case.choice.prefill), (who.decode, who.decode_pid, case.choice.decode))
        if name is not None and known is not None
    )


def _is_same(engine: EngineView | None, pid: int, known: EngineView) -> bool:
    return (
        engine is not None
        and engine.state not in {EngineState.DEAD, EngineState.HELD, EngineState.STARTING}
        and engine.address.pid == pid
        and engine.address.role is known.address.role
        and engine.facts.model == known.facts.model
    )


def _group(choice: Choice) -> tuple[str, ...]:
    """Those whose answers must be the same."""
    engines: Sequence[EngineView] = [e for e in (choice.prefill, choice.decode) if e is not None]
    return (
        choice.decode.facts.model,
        next((e.facts.model_hash for e in engines if e.facts.model_hash), ""),
        next((e.facts.dtype for e in engines if e.facts.dtype), ""),
        next((e.facts.version for e in engines if e.facts.version), ""),
    )
