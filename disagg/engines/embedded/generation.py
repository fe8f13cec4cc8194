"""One answer in the making: its tokens, its text, and how the HTTP handler learns of them.

The engine appends, a handler reads whatever is new when it gets to it. There is no queue of chunks: a slow client's handler
simply finds more at once, and memory stays bounded by the answer itself.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from disagg.engines.embedded.tokens import IncrementalDecoder, StopFinder, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from disagg.engines.embedded.sampler import Sampled, SamplingParams
    from disagg.engines.embedded.scheduler import Finish, Job


class Room(NamedTuple):
    """Where the other leg of a handoff is to be met: SGLang's ``bootstrap_*`` fields."""

    host: str
    port: int
    number: int


class Ask(NamedTuple):
    """One sample that a client wants.

    Attributes:
        rid: the client's or our id; several asks may share it.
        prompt: int32 ids, at least one.
        params: validated; ``max_new_tokens`` fits the context.
        top_logprobs: None: no logprobs; else how many alternatives per token.
        logprobs_from: first prompt position whose logprob is wanted, or None.
        room: of a handoff, or None.
    """

    rid: str
    prompt: NDArray[np.int32]
    params: SamplingParams
    top_logprobs: int | None = None
    logprobs_from: int | None = None
    room: Room | None = None


class InputLogprob(NamedTuple):
    """One prompt token's logprob given those before it, and the best alternatives. None for the very first token."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


class Inbox:
    """What one HTTP handler waits on: which of its generations have news."""

    def __init__(self) -> None:
        self._news: dict[int, None] = {}
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int) -> None:
        """Generation ``index`` has news."""
        self._news[index] = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[int]:
        """Wait for news; returns the indexes, each once, in the order in which they came up."""
        while not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        news = list(self._news)
        self._news.clear()
        return news


class Text:
    """Token ids in, visible text out; knows the stop strings."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt: NDArray[np.int32]) -> None:
        self.shown = ""
        self._keep_stop = params.no_stop_trim
        self._decoder = IncrementalDecoder(
            tokenizer, skip_special=params.skip_special_tokens, prompt_tail=[int(token) for token in prompt[-5:]]
        )
        self._finder = StopFinder(params.stops, include=params.no_stop_trim) if params.stops else None

    def accept(self, token: int) -> str | None:
        """The next token. Returns the stop string that it completes, if any."""
        return self._show(self._decoder.feed([token]))

    def _show(self, text: str) -> str | None:
        if self._finder is None:
            self.shown += text
            return None
        if self._finder.matched is not None:
            return None
        safe, matched = self._finder.feed(text)
        self.shown += safe
        return matched

    def end(self, stop_token: int | None) -> None:
        """No more tokens come: what was held back is text after all. ``stop_token``: the one that ended the answer."""
        if self._finder is not None and self._finder.matched is not None:
            return
        if stop_token is not None and self._keep_stop:
            self.accept(stop_token)
        self._show(self._decoder.flush())
        if self._finder is not None and self._finder.matched is None:
            self.shown += self._finder.flush()


class Generation:
    """One sample: what was asked, what has come.

    Attributes:
        index: which of the handler's generations this is.
        ids: the answer's tokens.
        sampled: the same with logprobs, kept only if logprobs were asked for.
        input_logprobs: of the prompt, from ``ask.logprobs_from`` on, complete with the first token.
        finish: why it ended, or None while it lives.
        began_at, first_at, ended_at: monotonic seconds.
    """

    def __init__(self, ask: Ask, text: Text, inbox: Inbox, index: int, *, now: float) -> None:
        self.ask = ask
        self.index = index
        self.ids: list[int] = []
        self.sampled: list[Sampled] = []
        self.input_logprobs: list[InputLogprob] = []
        self.finish: Finish | None = None
        self.job: Job | None = None
        self.began_at = now
        self.first_at: float | None = None
        self.ended_at: float | None = None
        self._text = text
        self._inbox = inbox

    @property
    def text(self) -> str:
        """The answer so far, without what may be the beginning of a stop string."""
        return self._text.shown

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return self.job.cached if self.job is not None else 0

    def take(self, sampled: Sampled, *, now: float) -> None:
        """A token has come; its text is in ``text`` already, through the stop check."""
        if self.first_at is None:
            self.first_at = now
        self.ids.append(sampled.token)
        if self.ask.top_logprobs is not None:
            self.sampled.append(sampled)
        self._inbox.put(self.index)

    def take_input_logprobs(self, found: Sequence[InputLogprob]) -> None:
        """Logprobs of the next prompt tokens."""
        self.input_logprobs.extend(found)

    def end(self, finish: Finish, *, now: float) -> None:
        """It is over."""
        if self.finish is not None:
            return
        stopped_by = finish.matched if finish.kind == "stop" and isinstance(finish.matched, int) else None
        self._text.end(stopped_by)
        self.finish = finish
        self.ended_at = now
        self._inbox.put(self.index)

    def __repr__(self) -> str:
        return f"<Generation {self.ask.rid}[{self.index}] {len(self.ids)} tokens, {self.finish or 'alive'}>"
