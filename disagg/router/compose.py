"""Answers that the router must write itself: n samples merged, prefill's input logprobs put in front. The slow, rare way."""

from __future__ import annotations

import asyncio

from disagg.errors import DisaggError, EngineError
from disagg.observe.metrics import RouterMetrics
from disagg.router.attempt import Attempt
from disagg.router.client import Client
from disagg.router.legs import EventLeg, WholeLeg
from disagg.router.merge import InputLogprobs, StreamMerge, merge_whole
from disagg.router.openai import DONE_EVENT, ClientRequest
from disagg.router.owner import Owner
from disagg.router.relay import Job, LegFactory
from disagg.router.stream import StepSink, Stream

LOGPROBS_WAIT_S = 5.0


class Composition:
    """One client request made of several jobs, or of one whose events must be rewritten.

    Args:
        jobs: one per sample, in the order of the samples.
    """

    def __init__(
        self, owner: Owner, metrics: RouterMetrics, on_step: StepSink, request: ClientRequest, client: Client, jobs: list[Job]
    ) -> None:
        self._owner = owner
        self._metrics = metrics
        self._request = request
        self._client = client
        self._jobs = jobs
        self._merge = StreamMerge(request)
        self._logprobs: dict[int, InputLogprobs] = {}
        self._streams = [Stream(request, job.rest, metrics.itl.observe, on_step) for job in jobs] if request.stream else []

    async def answer(self) -> None:
        """Writes the answer to the client.

        Raises:
            DisaggError: what the client is to be told; every sample was aborted.
        """
        one = self._stream_one if self._request.stream else self._whole_one
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(i, job), name=f"sample {i}") for i, job in enumerate(self._jobs)]
        except* DisaggError as errors:
            raise _first(errors) from None
        attempts = [t.result() for t in tasks]
        if self._request.stream:
            self._client.write(self._client.frame(self._merge.finish() + DONE_EVENT))
            self._client.end_stream()
            self._metrics.ttft.observe(min(s.first_token_at for s in self._streams) - self._jobs[0].record.started_at)
        else:
            self._write_whole(attempts)

    # --- whole

    async def _whole_one(self, sample: int, job: Job) -> Attempt:
        attempt = await self._owner.run(job, self._whole_leg(sample), self._client)
        await self._wait_for_logprobs(sample, attempt)
        return attempt

    def _whole_leg(self, sample: int) -> LegFactory:
        def make(attempt: Attempt, _number: int) -> WholeLeg:
            attempt.on_prefill_answer = lambda body: self._note_logprobs(sample, body)
            return WholeLeg(attempt)

        return make

    def _write_whole(self, attempts: list[Attempt]) -> None:
        bodies = []
        for sample, attempt in enumerate(attempts):
            leg = attempt.decode_leg
            assert isinstance(leg, WholeLeg)
            logprobs = self._logprobs.get(sample)
            bodies.append(logprobs.in_whole(leg.body) if logprobs is not None else leg.body)
        body = merge_whole(self._request, bodies) if self._request.samples > 1 else bodies[0]
        self._client.send_whole(200, body, choice=attempts[0].choice, attempt=max(j.attempts for j in self._jobs))

    # --- streams

    async def _stream_one(self, sample: int, job: Job) -> Attempt:
        stream = self._streams[sample]

        def make(attempt: Attempt, number: int) -> EventLeg:
            attempt.on_prefill_answer = lambda body: self._note_logprobs(sample, body)
            attempt.on_wake = lambda: self._pass_events(sample, attempt, number)
            return stream.event_leg(attempt)

        attempt = await self._owner.run(job, make, self._client, stream)
        await self._wait_for_logprobs(sample, attempt)
        self._pass_events(sample, attempt, job.attempts)
        return attempt

    def _pass_events(self, sample: int, attempt: Attempt, number: int) -> None:
        leg = attempt.decode_leg
        assert isinstance(leg, EventLeg)
        if self._lacks_logprobs(sample, attempt):
            return
        logprobs = self._logprobs.get(sample)
        out = []
        while leg.events:
            event = leg.events.popleft()
            out.append(self._merge.rewrite(sample, logprobs.in_event(event) if logprobs is not None else event))
        if payload := b"".join(out):
            self._write(attempt, self._client.frame(payload), number)

    def _write(self, attempt: Attempt, framed: bytes, number: int) -> None:
        client = self._client
        flowing = client.write(framed) if client.started else client.start_stream(attempt.choice, number, framed)
        if not flowing:
            attempt.pause()

    # --- input logprobs

    def _note_logprobs(self, sample: int, body: bytes) -> None:
        if self._request.merge_logprobs:
            self._logprobs[sample] = InputLogprobs(body)

    def _lacks_logprobs(self, sample: int, attempt: Attempt) -> bool:
        return self._request.merge_logprobs and attempt.choice.prefill is not None and sample not in self._logprobs

    async def _wait_for_logprobs(self, sample: int, attempt: Attempt) -> None:
        """Decode's answer can be complete a moment before prefill's: its input logprobs are waited for."""
        try:
            async with asyncio.timeout(LOGPROBS_WAIT_S):
                while self._lacks_logprobs(sample, attempt) and attempt.prefill_connection is not None:
                    await attempt.wait()
        except TimeoutError:
            pass
        if self._lacks_logprobs(sample, attempt):
            raise EngineError("the prefill engine did not send the input logprobs that were asked for")


def _first(errors: BaseExceptionGroup[DisaggError]) -> DisaggError:
    inner = errors.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
