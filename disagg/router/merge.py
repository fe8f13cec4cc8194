"""One answer out of several: n samples, and prefill's input logprobs. Pure.

A pair must never see ``n > 1`` (SGLang 0.5.23 gives all samples the first room, and decode hangs), so the router sends n requests of one
sample and merges what comes back. For a list of L prompts the choice of prompt p and sample s has the index ``p * n + s``, as OpenAI has
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec

from disagg.errors import EngineError
from disagg.router.openai import ClientRequest, Route, encode_event, parse_event

_Fields = dict[str, msgspec.Raw]
_BAD_SHAPE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what looking into an answer of another shape raises
_INPUT_LOGPROBS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")


def sample_bodies(request: ClientRequest) -> list[bytes]:
    """The bodies of the n single-sample requests, each without its opening brace. A seed becomes seed + i, all else stays."""
    fields = msgspec.json.decode(b"{" + request.rest, type=_Fields)
    return [msgspec.json.encode(_one_sample(request.route, fields, i))[1:] for i in range(request.samples)]


def _one_sample(route: Route, fields: _Fields, i: int) -> dict[str, Any]:
    if route is not Route.GENERATE:
        return _one_of(fields, "seed", i)
    given = msgspec.json.decode(fields["sampling_params"], type=_Fields | list[_Fields])
    one = [_one_of(g, "sampling_seed", i) for g in given] if isinstance(given, list) else _one_of(given, "sampling_seed", i)
    return {**fields, "sampling_params": one}


def _one_of(fields: _Fields, seed_key: str, i: int) -> dict[str, Any]:
    one: dict[str, Any] = {k: v for k, v in fields.items() if k != "n"}
    seed = msgspec.json.decode(one[seed_key], type=int | None) if seed_key in one else None
    return one if seed is None else {**one, seed_key: seed + i}


def merge_whole(request: ClientRequest, answers: Sequence[bytes]) -> bytes:
    """One body out of the n bodies of single-sample answers.

    Raises:
        EngineError: an answer is not what the route promises.
    """
    try:
        parsed = [msgspec.json.decode(a) for a in answers]
        merged = _merge_generate(parsed) if request.route is Route.GENERATE else _merge_openai(parsed)
    except _BAD_SHAPE as error:
        raise _misshapen() from error
    return msgspec.json.encode(merged)


def _misshapen() -> EngineError:
    return EngineError("an engine sent an answer that is not in the shape of its route")


def _merge_openai(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    n = len(answers)
    choices = [{**choice, "index": choice["index"] * n + s} for s, answer in enumerate(answers) for choice in answer["choices"]]
    merged = {**answers[0], "choices": sorted(choices, key=lambda c: int(c["index"]))}
    if answers[0].get("usage"):
        merged["usage"] = merge_usage([a["usage"] for a in answers])
    return merged


def _merge_generate(answers: Sequence[Any]) -> list[Any]:
    """SGLang answers a list, the samples of one prompt side by side."""
    lists = [a if isinstance(a, list) else [a] for a in answers]
    return [answer for samples in zip(*lists, strict=True) for answer in samples]


def merge_usage(usages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Usage of n samples: the prompt counts once, the completions all."""
    first = usages[0]
    completion = sum(int(u.get("completion_tokens") or 0) for u in usages)
    prompt = int(first.get("prompt_tokens") or 0)
    return {**first, "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class StreamMerge:
    """Merges the event streams of n samples into one: indices rewritten, one id for all, one usage chunk at the end."""

    def __init__(self, request: ClientRequest) -> None:
        self._request = request
        self._id: str | None = None
        self._usages: dict[int, dict[str, Any]] = {}
        self._last: dict[str, Any] = {}

    def rewrite(self, sample: int, event: bytes) -> bytes:
        """One event of one sample as the client is to see it; empty if it is kept for the end.

        Raises:
            EngineError: the event is not what the route promises.
        """
        value = parse_event(event)
        if value is None:
            return b""
        try:
            return self._rewrite(sample, value)
        except _BAD_SHAPE as error:
            raise _misshapen() from error

    def _rewrite(self, sample: int, value: dict[str, Any]) -> bytes:
        if self._request.route is Route.GENERATE:
            value["index"] = int(value.get("index") or 0) * self._request.samples + sample
            return encode_event(value)
        if self._id is None:
            self._id = value.get("id")
        value["id"] = self._id
        self._last = value
        if not value.get("choices") and value.get("usage"):
            self._usages[sample] = value["usage"]
            return b""
        for choice in value.get("choices", ()):
            choice["index"] = choice["index"] * self._request.samples + sample
        return encode_event(value)

    def finish(self) -> bytes:
        """The usage chunk, if the client asked for one."""
        if not self._usages:
            return b""
        usage = merge_usage([u for _, u in sorted(self._usages.items())])
        return encode_event({**self._last, "choices": [], "usage": usage})


class InputLogprobs:
    """Prefill's input logprobs of one attempt, to be put in front of decode's.

    The body is looked at when it is first needed: by then somebody waits who can be told that it is garbage.

    Args:
        prefill_body: prefill's whole answer on ``/generate``: JSON, or the event stream that it answers a stream request with.
    """

    def __init__(self, prefill_body: bytes) -> None:
        self._body = prefill_body

    @cached_property
    def _by_index(self) -> dict[int, dict[str, list[Any]]]:
        found = {}
        for index, answer in self._answers(self._body):
            info = answer.get("meta_info", {})
            found[index] = {key: list(info.get(key) or ()) for key in _INPUT_LOGPROBS if key in info}
        self._body = b""
        return found

    @staticmethod
    def _answers(body: bytes) -> list[tuple[int, dict[str, Any]]]:
        if not body.startswith(b"data:"):
            whole = msgspec.json.decode(body)
            return list(enumerate(whole if isinstance(whole, list) else [whole]))
        values = [parse_event(event) for event in body.split(b"\n\n") if event]
        return [(int(v.get("index") or 0), v) for v in values if v is not None]

    def put_in_front(self, answer: dict[str, Any], index: int) -> dict[str, Any]:
        """Merges into one answer (or one event) of decode.

        Raises:
            EngineError: what prefill or decode sent is not what the route promises.
        """
        try:
            return self._put_in_front(answer, index)
        except _BAD_SHAPE as error:
            raise _misshapen() from error

    def _put_in_front(self, answer: dict[str, Any], index: int) -> dict[str, Any]:
        info = answer.get("meta_info")
        if isinstance(info, dict):
            for key, front in self._by_index.get(index, {}).items():
                info[key] = front + list(info.get(key) or ())
        return answer

    def in_whole(self, body: bytes) -> bytes:
        """Merges into decode's whole answer.

        Raises:
            EngineError: as `put_in_front`.
        """
        try:
            whole = msgspec.json.decode(body)
        except _BAD_SHAPE as error:
            raise _misshapen() from error
        if isinstance(whole, list):
            return msgspec.json.encode([self.put_in_front(a, i) for i, a in enumerate(whole)])
        return msgspec.json.encode(self.put_in_front(whole, 0))

    def in_event(self, event: bytes) -> bytes:
        """Merges into one event of decode's stream."""
        value = parse_event(event)
        return event if value is None else encode_event(self.put_in_front(value, int(value.get("index") or 0))).removesuffix(b"\n\n")
