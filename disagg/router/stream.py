"""One stream to a client, over as many attempts as it takes: its journal, and what the next engine is asked for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from disagg.errors import EngineError
from disagg.router.attempt import Attempt, DecodeLeg
from disagg.router.client import Client
from disagg.router.journal import GapSink, Journal, Said
from disagg.router.legs import EventLeg, SeamLeg, StreamLeg
from disagg.router.openai import DONE_EVENT, ClientRequest, Route
from disagg.router.seam import Seam, aligned, closing, continued, decode_fields, question, sampling_of, stops_of, token_limit, why_not

LOOK_BACK = 16
"""So many of the last ids may be left off, until the text of the others is one that the client has: what an engine holds back of a
character, or of a stop string (of a long one so many more, up to four times as many)."""
PROMPT_TAIL = 5
"""So many of the prompt's ids stand before the answer's when its text is asked for, as with SGLang: a tokenizer may not know otherwise
whether a word begins with a space."""

StepSink = Callable[[int, float, int, float], None]
Ask = Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Posts JSON to a path of some engine that serves the model; raises EngineError."""


_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class _Texts(NamedTuple):
    """What the ids of an answer say.

    Attributes:
        beginnings: text by number of ids; more than one where it can be read in more than one way.
        silent: ids that have no text of their own.
    """

    beginnings: Sequence[Mapping[int, str]]
    silent: Collection[int]


class Stream:
    """A stream that can go on elsewhere.

    Args:
        request: the client's.
        rest: the body of its first attempt, without its opening brace.
        on_gap: told of the time between two events, as `Journal` tells it.
        on_step: told how fast engines are, as `Pace.token_gap` is.

    Attributes:
        journal: of all that the client was told.
    """

    def __init__(self, request: ClientRequest, rest: bytes, on_gap: GapSink, on_step: StepSink) -> None:
        self.journal = Journal(request.route, on_gap)
        self.journal.on_fold = self._paced
        self._on_step = on_step
        self._request = request
        self._rest = rest
        self._seam: Seam | None = None
        self._attempts: list[Attempt] = []
        self._context = 0

    @property
    def first_token_at(self) -> float:
        """When the first bytes of the answer came; 0 if none did."""
        return next((a.first_token_at for a in self._attempts if a.first_token_at), 0.0)

    @property
    def has_begun(self) -> bool:
        """True when the client was told something: it cannot begin anew."""
        return not self.journal.is_empty

    async def go_on(self, ask: Ask) -> tuple[bytes, bytes]:
        """Prepares the next attempt.

        Returns:
            The body for it, without its opening brace; empty where nothing is missing but the events that come second, `[DONE]` not among
            them.

        Raises:
            EngineError: it cannot go on, with the reason.
        """
        if self.journal.saw_done:
            return b"", b""
        said = self._said()
        if said.usage:
            return b"", b""  # whatever it was, it is complete
        fields = self._fields(said)
        try:
            return await self._continue(said, fields, ask)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise EngineError("an engine told of a text or of ids in a shape that nobody knows") from error

    def may_go_on(self) -> bool:
        """True when nothing that is known here keeps it from going on on another engine."""
        if not self.has_begun:
            return True
        try:
            said = self._said()
            return said.usage or bool(self._fields(said))
        except EngineError:
            return False

    def _said(self) -> Said:
        try:
            return self.journal.said()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError("what it said so far is too long or not in the shape of its route") from error

    def _fields(self, said: Said) -> Mapping[str, Any]:
        """The request's. Raises EngineError: it cannot go on."""
        request, fields = self._request, decode_fields(self._rest)
        if request.prompts is not None:
            raise EngineError("it holds the answers to several prompts")
        if request.samples > 1 and self._rest is request.rest:
            raise EngineError("it holds several samples")
        if reason := why_not(request.route, fields, said):
            raise EngineError(reason)
        return fields

    async def _continue(self, said: Said, fields: Mapping[str, Any], ask: Ask) -> tuple[bytes, bytes]:
        route, usage = self._request.route, self._request.include_usage
        if said.finish and not (usage and route is not Route.GENERATE):
            return b"", b""
        prompt, asked = question(route, fields)
        if prompt is None:
            prompt = _ids(await ask("/v1/tokenize", asked))
        if said.finish:
            made = len(said.ids if said.ids is not None else await self._tokenized(said.text, ask))
            return b"", closing(route, said, finish="", prompt=len(prompt), made=made, usage=True)
        taken, overlap, text = await self._taken(said, prompt, fields, ask)
        limit = token_limit(route, fields)
        if self._context and len(prompt) + len(taken) >= self._context:
            limit = len(taken)
        if limit is not None and limit <= len(taken):
            return b"", closing(route, said, finish="length", prompt=len(prompt), made=len(taken), usage=usage)
        self._seam = Seam(
            route,
            said,
            prompt=len(prompt),
            taken=taken,
            overlap=overlap,
            text=text,
            stops=stops_of(route, fields),
            include_usage=usage,
        )
        self.journal.go_on(taken)
        body = continued(route, fields, [*prompt, *taken], None if limit is None else limit - len(taken))
        return msgspec.json.encode(body)[1:], b""

    async def _taken(self, said: Said, prompt: Sequence[int], fields: Mapping[str, Any], ask: Ask) -> tuple[Sequence[int], str, str]:
        """The answer's ids that the next engine gets, what it will say again of the text, and the ids' text.

        Ids at the end that say nothing are left off: the token that ended the answer may be among them, and the next engine finds it again.
        """
        if said.ids is None:
            return await self._tokenized(said.text, ask), "", said.text
        held_back = max(map(len, stops_of(self._request.route, fields)), default=0)
        texts = await self._texts(said.ids, min(LOOK_BACK + held_back, 4 * LOOK_BACK), prompt, fields, ask)
        found = max(
            ((n, known) for known in texts.beginnings if (n := aligned(said.text, known)) is not None), key=itemgetter(0), default=None
        )
        if found is None:
            return await self._tokenized(said.text, ask), "", said.text
        n, known = found
        while n - 1 in known and said.ids[n - 1] in texts.silent:
            n -= 1
        return said.ids[:n], said.text[len(known[n]) :], known[n]

    async def _texts(self, ids: Sequence[int], back: int, prompt: Sequence[int], fields: Mapping[str, Any], ask: Ask) -> _Texts:
        """The texts of the answer's beginnings down to `back` ids less than all."""
        counts = range(max(0, len(ids) - back), len(ids) + 1)
        alone = sorted(set(ids[counts[0] :]))
        tail = list(prompt[-PROMPT_TAIL:])
        tokens = [tail, *([*tail, *ids[:n]] for n in counts), *([*tail, i] for i in alone)]
        shown = {"skip_special_tokens": False} if sampling_of(self._request.route, fields).get("skip_special_tokens") is False else {}
        before, *texts = (await ask("/v1/detokenize", {**self._model, **shown, "tokens": tokens}))["text"]
        starts = [len(before)]
        if before.endswith(_REPLACEMENT):  # the prompt ends inside of a character: an engine may count it to the answer
            starts.append(len(before) - 1)
        return _Texts(
            [{n: text[start:] for n, text in zip(counts, texts, strict=False)} for start in starts],
            {i for i, text in zip(alone, texts[len(counts) :], strict=True) if text == before},
        )

    async def _tokenized(self, text: str, ask: Ask) -> Sequence[int]:
        return _ids(await ask("/v1/tokenize", {**self._model, "prompt": text, "add_special_tokens": False})) if text else []

    @property
    def _model(self) -> dict[str, Any]:
        return {"model": self._request.model} if self._request.model else {}

    # --- legs

    def finish(self, client: Client, missing: bytes) -> None:
        """Says the events that were missing: to the client, which has all then, or to who rewrites them."""
        leg = self._attempts[-1].decode_leg
        if isinstance(leg, EventLeg) and not isinstance(leg, SeamLeg):
            leg.events += [event for event in missing.split(b"\n\n") if event]
        else:
            if not self.journal.saw_done:
                client.write(client.frame(missing + DONE_EVENT))
            client.end_stream()

    def leg(self, attempt: Attempt, number: int, client: Client) -> DecodeLeg:
        """What becomes of an attempt's answer: it goes to the client, at first as it is, later as the continuation that it is."""
        self._note(attempt)
        if self._seam is None:
            return StreamLeg(attempt, client, self.journal, number)
        return SeamLeg(attempt, client, self.journal, self._seam)

    def event_leg(self, attempt: Attempt) -> EventLeg:
        """The same, event by event for somebody who rewrites them."""
        self._note(attempt)
        return EventLeg(attempt, self.journal, self._seam)

    def _paced(self, seconds: float, events: int, longest_s: float) -> None:
        attempt = self._attempts[-1]
        if not attempt.was_paused:  # how fast the client reads is not the engine's pace
            self._on_step(attempt.choice.decode.slot, seconds, events, longest_s)
        attempt.was_paused = attempt.stalled

    def _note(self, attempt: Attempt) -> None:
        self.journal.fold()  # what came before is another engine's
        attempt.was_paused = bool(self._attempts)  # and so is the pause until its first token
        self._attempts.append(attempt)
        facts = attempt.choice.decode.facts
        self.journal.with_ids, self._context = facts.stream_token_ids, facts.context_tokens


def _ids(answer: Mapping[str, Any]) -> Sequence[int]:
    found = answer.get("tokens")
    if not isinstance(found, list) or not all(type(i) is int for i in found):
        raise EngineError("an engine did not tell the ids of a text that was sent to it")
    return found
