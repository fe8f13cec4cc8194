"""From logits to a token, with SGLang's parameters and SGLang's meaning of them.

The order of work on the logits of one token is SGLang's: additive penalties, the multiplicative one, ``logit_bias``,
temperature; then top-k, top-p and min-p, each judged on the same full distribution; then one draw.

Penalties count what this request has generated, not its prompt, the repetition penalty too: so does SGLang, and so a
decode engine needs no prompt ids. (Other engines and transformers count the prompt for repetition.)

Logprobs are the log-softmax of the logits *after* penalties, bias and temperature and before top-k, top-p and min-p;
greedy requests have no temperature. That is SGLang's default (``SGLANG_RETURN_ORIGINAL_LOGPROB`` is off there), and at
OpenAI's default temperature of 1 it is what OpenAI gives.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from disagg.errors import EngineError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Floats = NDArray[np.float32]
Integers = NDArray[np.integer]

TOP_K_ALL = 1 << 30
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
_GREEDY_BELOW = 1e-6  # SGLang's: a temperature under it is greedy
_NEEDS_GRAMMAR = ("json_schema", "regex", "ebnf", "structural_tag", "stop_regex")
_IGNORED = ("spaces_between_special_tokens", "custom_params", "stream_interval")


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to choose tokens and when to stop: SGLang's ``sampling_params``, its names and its defaults.

    Attributes:
        seed: ``sampling_seed`` on the wire.
        stop: a string or several; see ``stops``.
        logit_bias: added to the logits, by token id.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = msgspec.field(default=None, name="sampling_seed")
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    n: int = 1
    logit_bias: dict[int, float] = {}

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> SamplingParams:
        """Reads a client's ``sampling_params`` object; null means the default, as in SGLang. Does not ``validate``.

        Raises:
            RequestError: an unknown name, a wrong type, or a feature that the embedded engine lacks.
        """
        given = {name: value for name, value in raw.items() if value is not None and name not in _IGNORED}
        for name in _NEEDS_GRAMMAR:
            if name in given:
                raise RequestError(f"{name} is not supported by the embedded engine; serve with SGLang", param=name)
        try:
            return msgspec.convert(given, cls, str_keys=True)
        except msgspec.ValidationError as error:
            raise RequestError(f"sampling_params: {error}", param="sampling_params") from error

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature < _GREEDY_BELOW or self.top_k == 1

    def validate(self, vocab_size: int) -> None:
        """Checks every range.

        Raises:
            RequestError: names the parameter, its value and what is allowed.
        """
        _in_range("temperature", self.temperature, 0, math.inf)
        _in_range("top_p", self.top_p, 0, 1, above=True)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _in_range("presence_penalty", self.presence_penalty, -2, 2)
        _in_range("repetition_penalty", self.repetition_penalty, 0, 2, above=True)
        _in_range("max_new_tokens", self.max_new_tokens, 1, math.inf)
        _in_range("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        _in_range("n", self.n, 1, 128)
        if self.top_k != -1:
            _in_range("top_k", self.top_k, 1, TOP_K_ALL)
        self._validate_ids(vocab_size)
        self._validate_stops()

    def _validate_ids(self, vocab_size: int) -> None:
        for token in self.stop_token_ids:
            _in_range("stop_token_ids", token, 0, vocab_size - 1)
        for token, bias in self.logit_bias.items():
            _in_range("logit_bias", token, 0, vocab_size - 1)
            _in_range("logit_bias", bias, -1e9, 1e9)

    def _validate_stops(self) -> None:
        if len(self.stops) > MAX_STOPS:
            raise RequestError(f"stop has {len(self.stops)} strings; at most {MAX_STOPS} are allowed", param="stop")
        for stop in self.stops:
            if not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise RequestError(f"stop has a string of {len(stop)} characters; 1 to {MAX_STOP_CHARS} are allowed", param="stop")
            if any("\ud800" <= char <= "\udfff" for char in stop):
                raise RequestError("stop holds half of a surrogate pair and is not valid Unicode", param="stop")


def _in_range(param: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    # Comparisons only: NaN fails each, and an integer of a thousand digits cannot become a float.
    if (low < value if above else low <= value) and value <= high and value != math.inf:
        return
    lower = f"more than {low}" if above else f"at least {low}"
    upper = "" if high == math.inf else f" and at most {high}"
    shown = "so large a number" if abs(value) >= 2**64 else value
    raise RequestError(f"{param} must be {lower}{upper}, not {shown}", param=param)


class Sampled(NamedTuple):
    """One chosen token.

    Attributes:
        logprob: see the module's docstring; NaN when the sampler was told not to compute it.
        top: the best ``top_logprobs`` tokens with their logprobs, best first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Sampler:
    """Chooses the tokens of one request, one after the other, and counts them for the penalties.

    Args:
        params: validated.
        vocab_size: length of the logits.
        eos_ids: together with ``stop_token_ids``, what must not come before ``min_new_tokens``.
        generator: where draws of a request without a seed come from.
        generated: tokens that were generated before: on a decode engine, the one that prefill made.
        start: tokens of the prompt. Seeded draws count places from the start of the sequence and not of the answer, as SGLang's do: an
            answer that is cut and asked for again, with what came of it at the end of the prompt, goes on as if it had not been cut.
        top_logprobs: how many alternatives to report; None computes no logprobs at all.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        generator: np.random.Generator,
        eos_ids: Iterable[int] = (),
        generated: Sequence[int] = (),
        start: int = 0,
        top_logprobs: int | None = 0,
    ) -> None:
        self._params = params
        self._generator = generator
        self._top_logprobs = top_logprobs
        self._start = start
        self._position = 0
        self._counts: dict[int, int] = {}
        self._ends = np.array(sorted({*eos_ids, *params.stop_token_ids}), np.intp)
        self._bias = _Bias.of(params.logit_bias)
        self._vocab_size = vocab_size
        self._penalised = (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) != (0, 0, 1)
        for token in generated:
            self.accept(token)

    def __repr__(self) -> str:
        return f"<Sampler position={self._position} greedy={self._params.greedy}>"

    @property
    def position(self) -> int:
        """How many tokens were generated so far."""
        return self._position

    @property
    def plain(self) -> bool:
        """Whether the next token is the argmax of the raw logits and no logprob is wanted: ``greedy_batch`` will do."""
        return self._params.greedy and self._top_logprobs is None and not self._touches_logits()

    def _touches_logits(self) -> bool:
        return self._penalised or self._bias is not None or self._position < self._params.min_new_tokens

    def accept(self, token: int) -> None:
        """Counts a token that was chosen elsewhere: by ``greedy_batch``, or by the prefill engine."""
        self._position += 1
        if self._penalised:
            self._counts[token] = self._counts.get(token, 0) + 1

    def sample(self, logits: Floats) -> Sampled:
        """Chooses the next token and counts it.

        Args:
            logits: (vocab,), raw; not changed.

        Raises:
            EngineError: the logits hold NaN or no finite maximum: the forward pass, or the KV cache that was received,
                is broken.
        """
        if self._touches_logits():
            logits = self._adjust(logits)
        best = int(logits.argmax())
        if not math.isfinite(logits[best]):
            raise EngineError(_BROKEN)
        if self._params.greedy:
            token = best
        else:
            logits = logits / np.float32(self._params.temperature)
            token = self._draw(logits)
        sampled = self._describe(logits, token)
        self.accept(token)
        return sampled

    def _adjust(self, logits: Floats) -> Floats:
        logits = logits.copy()
        if self._counts:
            tokens = np.fromiter(self._counts.keys(), np.intp)
            counts = np.fromiter(self._counts.values(), np.float32)
            chosen = logits[tokens] - (self._params.frequency_penalty * counts + self._params.presence_penalty)
            penalty = np.float32(self._params.repetition_penalty)
            logits[tokens] = np.where(chosen < 0, chosen * penalty, chosen / penalty)
        if self._position < self._params.min_new_tokens:
            logits[self._ends] = -np.inf
        if self._bias is not None:
            logits[self._bias.tokens] += self._bias.values
        return logits

    def _draw(self, logits: Floats) -> int:
        """Inverse transform sampling over what top-k, top-p and min-p leave."""
        tokens, weights = candidates(logits, self._params)
        edges = weights.cumsum()
        # side="right" never lands on a token of weight 0; rounding may reach the very end.
        at = int(edges.searchsorted(self._uniform() * edges[-1], side="right"))
        return int(tokens[min(at, len(tokens) - 1)])

    def _uniform(self) -> float:
        """In [0, 1). With a seed it depends on (seed, place in the sequence) only, so a request may continue on another engine."""
        if self._params.seed is None:
            return float(self._generator.random())
        return float(np.random.default_rng([self._params.seed % 2**64, self._start + self._position]).random())

    def _describe(self, logits: Floats, token: int) -> Sampled:
        if self._top_logprobs is None:
            return Sampled(token, math.nan, [])
        logprobs = log_softmax(logits)
        return Sampled(token, float(logprobs[token]), best_tokens(logprobs, self._top_logprobs))


_BROKEN = "the model's output is not a number; the KV cache that it was computed from is damaged"


class _Bias(NamedTuple):
    tokens: NDArray[np.intp]
    values: Floats

    @classmethod
    def of(cls, bias: Mapping[int, float]) -> _Bias | None:
        if not bias:
            return None
        return cls(np.fromiter(bias.keys(), np.intp), np.fromiter(bias.values(), np.float32))


def candidates(logits: Floats, params: SamplingParams) -> tuple[Integers, NDArray[np.float64]]:
    """The tokens that may be drawn and their weights (not normalised).

    Top-p is the smallest set of best tokens whose probability reaches ``top_p``; min-p keeps what has at least
    ``min_p`` of the best token's probability. Equal probabilities are ordered by id.

    Args:
        logits: (vocab,), divided by the temperature, with a finite maximum.
        params: top_k, top_p and min_p are used.
    """
    weights = np.exp(logits - logits.max(), dtype=np.float64)
    every_token = params.top_k in {-1, TOP_K_ALL} or params.top_k >= len(weights)
    if every_token and params.top_p == 1.0 and params.min_p == 0.0:
        return np.arange(len(weights)), weights
    order = _ranked(weights, len(weights) if every_token else params.top_k)
    ranked = weights[order]
    before = ranked.cumsum() - ranked
    kept = (before < params.top_p * weights.sum()) & (ranked >= params.min_p)  # the best token's weight is 1
    return order[kept], ranked[kept]


def _ranked(values: NDArray[np.floating], count: int) -> NDArray[np.intp]:
    """Where the ``count`` largest are, largest first, among equals the lowest place; sorts no more than it must."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")[:count]]


def greedy_batch(logits: Floats) -> NDArray[np.intp]:
    """The best token of each row of (sequences, vocab); among equals the lowest id.

    Raises:
        EngineError: a row holds NaN or no finite maximum; use ``Sampler.sample`` row by row to see which one.
    """
    tokens: NDArray[np.intp] = logits.argmax(axis=-1)
    if not np.isfinite(np.take_along_axis(logits, tokens[:, None], axis=-1)).all():
        raise EngineError(_BROKEN)
    return tokens


def log_softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    shifted: Floats = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def best_tokens(logprobs: Floats, count: int) -> list[tuple[int, float]]:
    """The ``count`` best (token, logprob) of (vocab,), best first; among equals the lowest id first."""
    if count <= 0:
        return []
    return [(int(token), float(logprobs[token])) for token in _ranked(logprobs, count)]


def input_logprobs(logits: Floats, targets: Integers) -> Floats:
    """Logprob of each token of a prompt given those before it.

    Args:
        logits: (n, vocab), row i computed after token i.
        targets: (n,), token i + 1.

    Raises:
        EngineError: the logits hold NaN.
    """
    logprobs = np.take_along_axis(log_softmax(logits), np.asarray(targets, np.intp)[:, None], axis=-1)[:, 0]
    if np.isnan(logprobs).any():
        raise EngineError(_BROKEN)
    return logprobs
