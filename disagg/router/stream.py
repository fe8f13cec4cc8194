"""One stream to a client, over as many attempts as it takes: its journal, and what the next engine is asked for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from disagg.errors import EngineError
from disagg.router.attempt import Attempt, DecodeLeg
from disagg.router.client import Client
from disagg.router.journal import GapSink, Journal, Said
from disagg.router.legs import EventLeg, SeamLeg, StreamLeg
from disagg.router.openai import DONE_EVENT, ClientRequest, Route
from disagg.router.seam import Seam, aligned, closing, continued, decode_fields, question, stops_of, token_limit, why_not

LOOK_BACK = 16
"""So many of the last ids may be left off, until the text of the others is one that the client has: what an engine holds back of a
character, or of a stop string."""

Ask = Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Posts JSON to a path of some engine that serves the model; raises EngineError."""


class Stream:
    """A stream that can go on elsewhere.

    Args:
        request: the client's.
        rest: the body of its first attempt, without its opening brace.

    Attributes:
        journal: of all that the client was told.
    """

    def __init__(self, request: ClientRequest, rest: bytes, on_gap: GapSink) -> None:
        self.journal = Journal(request.route, on_gap)
        self._request = request
        self._rest = rest
        self._seam: Seam | None = None
        self._attempts: list[Attempt] = []

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
        said, fields = self._what_was_said()
        return await self._continue(said, fields, ask)

    def may_go_on(self) -> bool:
        """True when nothing that is known here keeps it from going on on another engine."""
        try:
            return not self.has_begun or bool(self._what_was_said())
        except EngineError:
            return False

    def _what_was_said(self) -> tuple[Said, Mapping[str, Any]]:
        """Raises EngineError: it cannot go on."""
        try:
            said = self.journal.said()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError("what it said so far is too long or not in the shape of its route") from error
        request, fields = self._request, decode_fields(self._rest)
        if request.prompts is not None:
            raise EngineError("it holds the answers to several prompts")
        if request.samples > 1 and self._rest is request.rest:
            raise EngineError("it holds several samples")
        if reason := why_not(request.route, fields, said):
            raise EngineError(reason)
        return said, fields

    async def _continue(self, said: Said, fields: Mapping[str, Any], ask: Ask) -> tuple[bytes, bytes]:
        route, usage = self._request.route, self._request.include_usage
        prompt, asked = question(route, fields)
        if prompt is None:
            prompt = _ids(await ask("/v1/tokenize", asked))
        if said.finish:
            made = len(said.ids if said.ids is not None else await self._tokenized(said.text, ask))
            return b"", closing(route, said, finish="", prompt=len(prompt), made=made, usage=usage and not said.usage)
        taken, overlap, text = await self._taken(said, ask)
        limit = token_limit(route, fields)
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

    async def _taken(self, said: Said, ask: Ask) -> tuple[Sequence[int], str, str]:
        """The answer's ids that the next engine gets, what it will say again of the text, and the ids' text."""
        if said.ids:
            for fewest in (len(said.ids), max(0, len(said.ids) - LOOK_BACK)):
                counts = range(fewest, len(said.ids) + 1)
                texts = await ask("/v1/detokenize", {**self._model, "tokens": [list(said.ids[:n]) for n in counts if n]})
                known = dict(zip([n for n in counts if n], texts["text"], strict=True)) | ({0: ""} if fewest == 0 else {})
                n = aligned(said.text, known)
                if n is not None:
                    return said.ids[:n], said.text[len(known[n]) :], known[n]
        elif self._request.route is Route.GENERATE and not said.text:
            return [], "", ""
        return await self._tokenized(said.text, ask), "", said.text

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

    def _note(self, attempt: Attempt) -> None:
        self._attempts.append(attempt)
        self.journal.with_ids = attempt.choice.decode.facts.stream_token_ids


def _ids(answer: Mapping[str, Any]) -> Sequence[int]:
    found = answer.get("tokens")
    if not isinstance(found, list) or not all(type(i) is int for i in found):
        raise EngineError("an engine did not tell the ids of a text that was sent to it")
    return found
