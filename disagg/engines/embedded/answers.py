"""What clients get: SGLang's and OpenAI's answers, whole and in pieces. Pure: generations in, bytes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from disagg.engines.embedded.generation import InputLogprob
from disagg.engines.embedded.scheduler import Leg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg.engines.embedded.generation import Generation
    from disagg.engines.embedded.sampler import Sampled
    from disagg.engines.embedded.scheduler import Finish
    from disagg.engines.embedded.shapes import Batch
    from disagg.engines.embedded.tokens import Tokenizer

DONE = b"data: [DONE]\n\n"

_ENCODER = msgspec.json.Encoder()
encode = _ENCODER.encode


def event(payload: Any) -> bytes:
    """One server-sent event. JSON escapes every line end, so text cannot break out of it."""
    return b"data: " + encode(payload) + b"\n\n"


def finish_reason(finish: Finish, made: int) -> dict[str, Any]:
    """SGLang's ``finish_reason`` object."""
    if finish.kind == "length":
        return {"type": "length", "length": made}
    if finish.kind == "stop":
        return {"type": "stop", "matched": finish.matched}
    return {"type": "abort", "message": finish.sentence, "status_code": finish.status or None, "err_type": None}


def v1_error(sentence: str, status: int, kind: str | None = None) -> dict[str, Any]:
    """SGLang's error object of the /v1 endpoints."""
    kind = kind or ("BadRequestError" if status < 500 else "InternalServerError")
    return {"object": "error", "message": sentence, "type": kind, "param": None, "code": status}


def generate_error(sentence: str, status: int) -> dict[str, Any]:
    """SGLang's error object of /generate, and its status: in a stream, whose head said 200, nothing else tells whose fault it was."""
    return {"error": {"message": sentence, "code": status}}


def usage(generations: Sequence[Generation], n: int) -> dict[str, Any]:
    """OpenAI's usage; each prompt counts once, however many samples it has."""
    prompts = generations[::n]
    prompt_tokens = sum(len(generation.ask.prompt) for generation in prompts)
    made = sum(len(generation.ids) for generation in generations)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": sum(generation.cached_tokens for generation in prompts)},
        "reasoning_tokens": 0,
    }


class Shape(Protocol):
    """One endpoint's way to answer."""

    late_head: bool
    """Whether a stream's 200 is sent with the first token only, so that earlier errors have a status of their own."""

    def whole(self, generations: Sequence[Generation]) -> bytes:
        """The answer of finished generations."""

    def head(self, generations: Sequence[Generation]) -> bytes:
        """What a stream begins with."""

    def piece(self, generation: Generation) -> bytes:
        """What is new since the last call; b"" if nothing that is shown."""

    def tail(self, generations: Sequence[Generation]) -> bytes:
        """What a stream ends with, before ``[DONE]``."""

    def error(self, sentence: str, status: int) -> dict[str, Any]:
        """The error object, as a whole answer or in a stream."""


class GenerateShape:
    """/generate. Streams repeat text, ids and logprobs from the start in each event, as SGLang does by default."""

    late_head = False

    def __init__(self, batch: Batch, tokenizer: Tokenizer, *, incremental: bool = False) -> None:
        self._batch = batch
        self._incremental = incremental
        self._shown: dict[int, tuple[int, int]] = {}  # characters and tokens of each generation

    def whole(self, generations: Sequence[Generation]) -> bytes:
        """An object, or a list of them."""
        objects = [self._object(generation, 0, 0) for generation in generations]
        return encode(objects[0] if self._batch.single else objects)

    def head(self, generations: Sequence[Generation]) -> bytes:
        """Nothing: the first event comes with the first token."""
        return b""

    def piece(self, generation: Generation) -> bytes:
        """One event."""
        characters, tokens = self._shown.get(generation.index, (0, 0)) if self._incremental else (0, 0)
        self._shown[generation.index] = len(generation.text), len(generation.ids)
        made = self._object(generation, characters, tokens)
        return event(made if self._batch.single else {"index": generation.index, **made})

    def tail(self, generations: Sequence[Generation]) -> bytes:
        """Nothing."""
        return b""

    def error(self, sentence: str, status: int) -> dict[str, Any]:
        """SGLang's error object of /generate."""
        return generate_error(sentence, status)

    def _object(self, generation: Generation, characters: int, tokens: int) -> dict[str, Any]:
        return {
            "text": generation.text[characters:],
            "output_ids": generation.ids[tokens:],
            "meta_info": meta_info(generation, tokens),
        }


def meta_info(generation: Generation, since: int = 0) -> dict[str, Any]:
    """SGLang's ``meta_info``; logprobs from the answer's token ``since`` on."""
    finish, ask, job = generation.finish, generation.ask, generation.job
    meta: dict[str, Any] = {
        "id": ask.rid,
        "finish_reason": None if finish is None else finish_reason(finish, len(generation.ids)),
        "prompt_tokens": len(ask.prompt),
        "weight_version": "default",
        "num_retractions": 0 if job is None else job.retractions,
        "reasoning_tokens": 0,
        "completion_tokens": len(generation.ids),
        "cached_tokens": generation.cached_tokens,
    }
    if ask.top_logprobs is not None:
        meta |= _meta_logprobs(generation, since)
    if generation.ended_at is not None:
        meta["e2e_latency"] = generation.ended_at - generation.began_at
    return meta


def _meta_logprobs(generation: Generation, since: int) -> dict[str, Any]:
    sampled, inputs = generation.sampled[since:], prompt_logprobs(generation)
    meta: dict[str, Any] = {
        "input_token_logprobs": [(one.logprob, one.token, None) for one in inputs],
        "output_token_logprobs": [(one.logprob, one.token, None) for one in sampled],
    }
    if generation.ask.top_logprobs:
        meta["input_top_logprobs"] = [_top(one.top) if one.logprob is not None else None for one in inputs]
        meta["output_top_logprobs"] = [_top(one.top) for one in sampled]
    return meta


def _top(top: Sequence[tuple[int, float]]) -> list[tuple[float, int, None]]:
    return [(logprob, token, None) for token, logprob in top]


def prompt_logprobs(generation: Generation) -> list[InputLogprob]:
    """The prompt's logprobs; the very first token has none, for nothing came before it.

    A decode engine has computed none of them: they stand in prefill's answer.
    """
    first = generation.ask.logprobs_from
    if first is None or (generation.job is not None and generation.job.leg is Leg.DECODE):
        return []
    found = generation.input_logprobs
    return [InputLogprob(int(generation.ask.prompt[0]), None, []), *found] if first == 0 else found


class _New(NamedTuple):
    """What has come since the last event. ``ids`` are kept only if the client wants them."""

    text: str
    ids: list[int]
    sampled: list[Sampled]


class _OpenAIShape:
    late_head = True
    kind = ""
    chunk_kind = ""

    def __init__(self, batch: Batch, tokenizer: Tokenizer, *, model: str, created: int) -> None:
        self._batch = batch
        self._tokenizer = tokenizer
        self._base = {"id": batch.rid, "created": created, "model": model}
        self._shown: dict[int, tuple[int, int, int]] = {}  # characters, tokens and logprobs of each generation

    def whole(self, generations: Sequence[Generation]) -> bytes:
        choices = [self._choice(generation) for generation in generations]
        return encode({**self._base, "object": self.kind, "choices": choices, "usage": usage(generations, self._batch.n)})

    def tail(self, generations: Sequence[Generation]) -> bytes:
        if not self._batch.include_usage:
            return b""
        made = usage(generations, self._batch.n)
        return event({**self._base, "object": self.chunk_kind, "choices": [], "usage": made})

    def error(self, sentence: str, status: int) -> dict[str, Any]:
        return v1_error(sentence, status)

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return event({**self._base, "object": self.chunk_kind, "choices": [choice], "usage": None})

    def _new(self, generation: Generation) -> _New:
        characters, tokens, logprobs = self._shown.get(generation.index, (0, 0, 0))
        self._shown[generation.index] = len(generation.text), len(generation.ids), len(generation.sampled)
        ids = generation.ids[tokens:] if self._batch.token_ids else []
        return _New(generation.text[characters:], ids, generation.sampled[logprobs:])

    def _ids(self, ids: Sequence[int]) -> dict[str, Any]:
        """A choice's ``token_ids``, if the client wants them: also of tokens whose text is held back or not shown at all."""
        return {"token_ids": ids} if self._batch.token_ids else {}

    def _choice(self, generation: Generation) -> dict[str, Any]:
        raise NotImplementedError


def _ending(generation: Generation) -> dict[str, Any]:
    finish = generation.finish
    return {
        "finish_reason": None if finish is None else finish.kind,
        "matched_stop": None if finish is None else finish.matched,
    }


class ChatShape(_OpenAIShape):
    """/v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def head(self, generations: Sequence[Generation]) -> bytes:
        """The role, once per choice."""
        return b"".join(self._chunk(_delta(generation.index, {"role": "assistant", "content": ""})) for generation in generations)

    def piece(self, generation: Generation) -> bytes:
        """New text, if any, and the end, if it is there: one event each."""
        new = self._new(generation)
        made = b""
        if any(new):
            delta = _delta(generation.index, {"content": new.text}, self._logprobs(generation, new.sampled))
            made = self._chunk(delta | self._ids(new.ids))
        if generation.finish is not None:
            made += self._chunk(_delta(generation.index, {}, None) | _ending(generation))
        return made

    def _choice(self, generation: Generation) -> dict[str, Any]:
        return {
            "index": generation.index,
            "message": {
                "role": "assistant",
                "content": generation.text,
                "reasoning_content": None,
                "tool_calls": None,
            },
            "logprobs": self._logprobs(generation, generation.sampled),
            **_ending(generation),
            **self._ids(generation.ids),
        }

    def _logprobs(self, generation: Generation, sampled: Sequence[Sampled]) -> dict[str, Any] | None:
        if generation.ask.top_logprobs is None:
            return None
        return {
            "content": [
                {
                    **self._token(one.token, one.logprob),
                    "top_logprobs": [self._token(token, logprob) for token, logprob in one.top],
                }
                for one in sampled
            ]
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        content = self._tokenizer.token_bytes(token)
        return {"token": self._tokenizer.token_text(token), "bytes": list(content), "logprob": logprob}


def _delta(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None, "matched_stop": None}


class CompletionShape(_OpenAIShape):
    """/v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def head(self, generations: Sequence[Generation]) -> bytes:
        """With ``echo``: the prompts."""
        if not self._batch.echo:
            return b""
        return b"".join(
            self._chunk(
                {
                    "index": generation.index,
                    "text": self._prompt(generation),
                    "logprobs": self._logprobs(generation, [], with_prompt=True),
                    **_ending(generation),
                    "finish_reason": None,
                }
            )
            for generation in generations
        )

    def piece(self, generation: Generation) -> bytes:
        """One event with what is new."""
        new = self._new(generation)
        if not any(new) and generation.finish is None:
            return b""
        logprobs = self._logprobs(generation, new.sampled, with_prompt=False)
        choice = {"index": generation.index, "text": new.text, "logprobs": logprobs, **_ending(generation)}
        return self._chunk(choice | self._ids(new.ids))

    def _choice(self, generation: Generation) -> dict[str, Any]:
        prompt = self._prompt(generation) if self._batch.echo else ""
        logprobs = self._logprobs(generation, generation.sampled, with_prompt=self._batch.echo)
        return {
            "index": generation.index,
            "text": prompt + generation.text,
            "logprobs": logprobs,
            **_ending(generation),
            **self._ids(generation.ids),
        }

    def _prompt(self, generation: Generation) -> str:
        return self._tokenizer.decode([int(token) for token in generation.ask.prompt])

    def _logprobs(self, generation: Generation, sampled: Sequence[Sampled], *, with_prompt: bool) -> dict[str, Any] | None:
        if generation.ask.top_logprobs is None:
            return None
        prompt = prompt_logprobs(generation) if with_prompt else []
        lines = [
            *((one.token, one.logprob, one.top) for one in prompt),
            *((one.token, one.logprob, one.top) for one in sampled),
        ]
        text = self._tokenizer.token_text
        return {
            "text_offset": [],
            "token_logprobs": [logprob for _, logprob, _ in lines],
            "tokens": [text(token) for token, _, _ in lines],
            "top_logprobs": [{text(token): value for token, value in top} if logprob is not None else None for _, logprob, top in lines],
        }
