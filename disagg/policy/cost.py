"""What work costs an engine: passes over prompts, steps of a batch, transfers of KV. Fitted while the engine works. Pure.

Theory of operation. Three lines say how long things take; all their coefficients are at least 0:

    a pass over prompts      a + b·Σn + c·Σ((p+n)² - p²)      n new tokens of a prompt after p cached ones      (DistServe, OSDI'24)
    a step of a batch        a + b·B + c·ΣKV                  B running requests with ΣKV tokens between them   (DistServe; Splitwise)
    a transfer               a + b·bytes                      round trips, and the time of a byte

A `Fit` holds one line of one engine (or pair). It keeps few samples, of all sizes: the newest of each *class* of work, where a class is a
power of two in each feature, so that a thousand short prompts do not make it forget what a long one costs. Old samples count less. The
line is the non-negative least-squares fit of these samples in relative terms (an error of 10 % weighs the same at 5 ms and at 5 s), made
anew with less weight for those that lie off (Huber), so that one prompt that waited for something else does not bend it. Before there are
samples, a *prior* stands in for them: a line that was measured elsewhere, taken at some points, which count less with every real sample.
Of a prior the shape is believed, and the scale only until there is something to compare it with: engines differ fifty times in speed, and
much less in how a long prompt compares with a short one.

Robust fits are slow to believe that the engine itself has changed. So the last samples are compared with what the line said before it
knew them: when all of them lie off by more than `SHIFT` in the same direction, the engine has become slower or faster as a whole, and
what is remembered from before them is scaled by the middle one. Its shape stays until new samples say otherwise. Where samples are seldom
fewer are enough, if they lie off by more than `FEW_SHIFT` and agree with each other: five of them would take half a minute.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import combinations
from operator import mul
from statistics import median

import msgspec

Line = tuple[float, ...]
"""Coefficients: seconds, then seconds for each unit of each feature."""
Features = tuple[float, ...]
"""What a piece of work is, without the constant: (Σn, Σ((p+n)² - p²)), (B, ΣKV) or (bytes,)."""

CLASS_LIMIT = 4
"""Samples of a class; the newest stay."""
CLASSES_LIMIT = 32
"""Those that were fed last stay."""
HALF_LIFE_S = 600.0
"""After so long a sample counts half."""
LEAST_WEIGHT = 1 / 16
"""An old sample counts at least so much: after an idle night more than a prior still does."""
PRIOR_SAMPLES = 8
"""A prior counts as much as so many samples at first, half of that when there are as many real ones, and so on."""
ENOUGH = 8
"""Real samples from which on a line without a prior is believed."""
RECENT = 5
SHIFT = 1.5
"""Times as long, or as short: a line that is wrong by this much, `RECENT` times in a row and always in one direction, has changed."""
FEW = 2
FEW_S = 2.0
FEW_SHIFT = 2.0
FEW_MOST = 30.0
"""So are this many, of which the first is so many seconds older than the last, if all lie off by this much, and by no more. What went
wrong once, as a prompt that was not cached after all, mostly goes wrong for its neighbours: those that are close together count as one."""
ERRORS_LIMIT = 64
"""Predictions of which the error is known."""
CHANGED_S = 600.0
"""For so long it is told that an engine has changed; one that changed back within this time has not."""
REFIT_S = 1.0
REFIT_LIMIT_S = 10.0
"""A line of many samples is fitted anew less often: one more changes little, and what changes all is noticed without."""
_POWERS = (1, 1, 2, 2, 2)
"""Of the weight of what lies off, by round."""
_HUBER = 1.5
_LEAST_SPREAD = 0.02
_LEAST_S = 1e-6


def square(cached: int, new: int) -> int:
    """What attention does for a prompt, in tokens²: (p+n)² - p²."""
    return (cached + new) ** 2 - cached**2


def at(line: Line, features: Features) -> float:
    """What a line says, in seconds."""
    return line[0] + sum(c * x for c, x in zip(line[1:], features, strict=True))


class Prior(msgspec.Struct, frozen=True):
    """A line that was measured elsewhere.

    Attributes:
        line: its coefficients.
        points: work at which it was measured, or at least makes sense.
        origin: for people, as "4x A100, a 70B model".
        own: it is what this very engine does, or did before it was started anew.
        samples: measurements on this very process that it stands for.
    """

    line: Line
    points: tuple[Features, ...]
    origin: str
    own: bool = False
    samples: int = 0


class Trust(msgspec.Struct, frozen=True):
    """How far a line can be believed.

    Attributes:
        samples: real ones, ever.
        error: of the last predictions, the middle relative one; None before there were any.
        doubt: why it is not to be trusted at the moment; empty if it is.
        own: without enough samples it is taken from what the engine did before it was started anew.
        changed: how many times as slow it has become since `changed_at`; 1 where it has not changed.
        changed_at: when that was seen last.
    """

    samples: int
    error: float | None
    doubt: str
    own: bool = False
    changed: float = 1.0
    changed_at: float = -math.inf


class _Sample:
    __slots__ = ("at", "features", "seconds")

    def __init__(self, features: Features, seconds: float, at: float) -> None:
        self.features = features
        self.seconds = seconds
        self.at = at


class Fit:
    """One line, and what it was made of.

    Args:
        features: how many there are.
        prior: what is believed before anything was seen.

    Attributes:
        latest: the line as it was last fitted, or as it was scaled since; None as long as nothing is known.
        seen_at: when the last sample came; -inf before.
    """

    __slots__ = (
        "_changed",
        "_classes",
        "_count",
        "_errors",
        "_features",
        "_fitted_at",
        "_prior",
        "_recent",
        "_shifted",
        "_shifted_at",
        "_stale",
        "latest",
        "seen_at",
    )

    def __init__(self, features: int, prior: Prior | None = None) -> None:
        if prior is not None and {features} != {len(prior.line) - 1, *map(len, prior.points)}:
            raise ValueError(f"a prior for {features} features has {features + 1} coefficients and points of {features} numbers")
        self._features = features
        self._prior = prior
        self._classes: dict[tuple[int, ...], deque[_Sample]] = {}  # the one that was fed last stands last
        self._count = 0
        self._recent: deque[tuple[_Sample, float]] = deque(maxlen=RECENT)  # with the logarithms of seen over predicted
        self._errors: deque[float] = deque(maxlen=ERRORS_LIMIT)
        self.latest: Line | None = None if prior is None else prior.line
        self._shifted = 0.0  # the scale of the last shift; 0 for none
        self._shifted_at = -math.inf
        self._changed = 1.0  # all shifts that followed each other within CHANGED_S, together
        self.seen_at = -math.inf
        self._fitted_at = -math.inf
        self._stale = False

    # --- what happens

    def seen(self, features: Features, seconds: float, *, now: float) -> float:
        """A piece of work was done.

        Args:
            features: what it was; none of them below 0.
            seconds: how long it took. What is not above 0, or not a number, is no measurement and counts for nothing.
            now: when it was done.

        Returns:
            How many times as slow the line has become as a whole by this; 1 where it has not.
        """
        if len(features) != self._features:
            raise ValueError(f"{len(features)} features for a line of {self._features}")
        if not (math.isfinite(seconds) and seconds > 0.0 and all(math.isfinite(x) and x >= 0.0 for x in features)):
            return 1.0
        sample = _Sample(features, seconds, now)
        self.seen_at = now
        scale = self._compare(sample)
        self._count += 1
        key = tuple(int(x).bit_length() for x in features)
        kept = self._classes.pop(key, None) or deque(maxlen=CLASS_LIMIT)
        kept.append(sample)
        self._classes[key] = kept
        while len(self._classes) > CLASSES_LIMIT:
            self._classes.pop(next(iter(self._classes)))
        self._stale = True
        return scale

    def _compare(self, sample: _Sample) -> float:
        """The prediction comes before the sample: an error of what was known already says nothing. Returns the scale of a shift, or 1."""
        line = self.latest
        if line is None:
            return 1.0
        said = max(at(line, sample.features), _LEAST_S)
        self._errors.append(abs(said - sample.seconds) / sample.seconds)
        self._recent.append((sample, math.log(sample.seconds / said)))
        run = self._run()
        if not run:
            return 1.0
        scale = math.exp(median(r for _, r in run))
        self.shift(scale, since=run[0][0].at, now=sample.at)
        return scale

    def _run(self) -> list[tuple[_Sample, float]]:
        """The last samples, if they show that the engine has changed."""
        recent = list(self._recent)
        if len(recent) == RECENT and _are_off(recent, SHIFT):
            return recent
        if self._count < ENOUGH:  # what few samples made would be moved by fewer: the fit itself follows as quickly
            return []
        for first in range(len(recent) - FEW, -1, -1):
            run = recent[first:]
            if run[-1][0].at - run[0][0].at >= FEW_S:
                off = [r for _, r in run]
                is_sane = max(map(abs, off)) <= math.log(FEW_MOST)
                return run if is_sane and _are_off(run, FEW_SHIFT) and max(off) - min(off) < math.log(SHIFT) else []
        return []

    @property
    def seems_faster(self) -> bool:
        """The last sample was so quick that one more like it would show that the engine has changed."""
        return bool(self._recent) and self._count >= ENOUGH and self._recent[-1][1] <= -math.log(FEW_SHIFT)

    def shift(self, scale: float, *, since: float, now: float) -> None:
        """What it did before it changed would have taken so many times as long now; what it did since has.

        Args:
            scale: so many times.
            since: when the first sample came that showed it.
            now: when it was seen.
        """
        for kept in self._classes.values():
            for sample in kept:
                if sample.at < since or sample.at > now:  # by a clock that has jumped back since
                    sample.seconds *= scale
        self._changed = scale * (self._changed if 0.0 <= now - self._shifted_at <= CHANGED_S else 1.0)
        self._shifted = scale
        self._shifted_at = now
        self._recent.clear()
        self._errors.clear()
        self.latest = None if self.latest is None else tuple(c * scale for c in self.latest)
        self._stale = True
        self._fitted_at = -math.inf

    def believe(self, prior: Prior, *, now: float) -> None:
        """Another prior takes the place of the one that it had; its samples stay."""
        self._prior = prior
        self._recent.clear()
        self._errors.clear()
        self.latest = self._fit(now)
        self.seen_at = max(self.seen_at, now)
        self._stale = False
        self._fitted_at = now

    def forget(self) -> None:
        """It is another process, or has another role: the prior is all that is known."""
        self.__init__(self._features, self._prior)  # type: ignore[misc]  # there is nothing that must outlive it

    # --- what follows

    def line(self, *, now: float) -> Line | None:
        """The coefficients; None as long as nothing is known. Fitted anew when it is time for that: who has none reads `latest`."""
        self.refit(now=now)
        return self.latest

    def refit(self, *, now: float) -> bool:
        """Fits anew when there are new samples, every `REFIT_S` at most, then seldom. A millisecond or two; True if it was done."""
        pause_s = min(REFIT_LIMIT_S, REFIT_S * self._count / ENOUGH) if self._count > ENOUGH else 0.0
        if not self._stale or 0.0 <= now - self._fitted_at < pause_s:  # a clock that jumped back must not stop it for as long
            return False
        self.latest = self._fit(now)
        self._stale = False
        self._fitted_at = now
        return True

    def predict(self, features: Features, *, now: float) -> float | None:
        """Seconds that this work would take; None as long as nothing is known."""
        line = self.line(now=now)
        return None if line is None else at(line, features)

    @property
    def samples(self) -> int:
        """Real ones, ever, with those that its prior stands for."""
        return self._count + (0 if self._prior is None else self._prior.samples)

    @property
    def trust(self) -> Trust:
        """Whether to believe it."""
        error = median(self._errors) if self._errors else None
        own = self._prior is not None and self._prior.own and not self._prior.samples
        return Trust(self.samples, error, self._doubt(error), own, self._changed, self._shifted_at)

    @property
    def is_known(self) -> bool:
        """There is nothing to be measured on purpose: there are enough samples of it, or it was known before it was started anew."""
        return self.samples >= ENOUGH or (self._prior is not None and self._prior.own and not self._prior.samples)

    @property
    def is_own(self) -> bool:
        """It says what this engine does, by enough samples of it or by what it did before it was started anew."""
        return self.samples >= ENOUGH or (self._prior is not None and self._prior.own)

    def _doubt(self, error: float | None) -> str:
        if self._shifted and len(self._errors) < RECENT:
            times = in_words(self._shifted)
            return f"it has just become {times} than it was"
        if self.samples < ENOUGH:
            return f"{self.samples} samples so far" + ("" if self._prior is None else f"; taken from {self._prior.origin}")
        if error is not None and error > SHIFT - 1:
            return f"its predictions are off by {error:.0%}"
        return ""

    def _fit(self, now: float) -> Line | None:
        rows, seconds, weights = [], [], []
        for kept in self._classes.values():
            for sample in kept:
                rows.append((1.0, *sample.features))
                seconds.append(sample.seconds)
                weights.append(max(LEAST_WEIGHT, 0.5 ** (max(0.0, now - sample.at) / HALF_LIFE_S)))
        if self._prior is None:
            if len(rows) <= self._features:
                return self.latest
        else:
            line = self._prior.line
            # Its own word for its scale counts as one sample: two that contradict it outvote it, a single one that went wrong does not.
            times = middle(
                [1.0, *(y / max(at(line, row[1:]), _LEAST_S) for row, y in zip(rows, seconds, strict=True))],
                [1.0, *weights],
            )
            share = PRIOR_SAMPLES / (1 + self._count / PRIOR_SAMPLES) / len(self._prior.points)
            for point in self._prior.points:
                rows.append((1.0, *point))
                seconds.append(max(at(line, point) * times, _LEAST_S))
                weights.append(share)
        return robust_line(rows, seconds, weights)

    def check(self) -> None:
        """Asserts what is always true."""
        assert self.latest is None or (len(self.latest) == self._features + 1 and min(self.latest) >= 0.0)
        assert all(0 < len(kept) <= CLASS_LIMIT for kept in self._classes.values())
        assert len(self._classes) <= CLASSES_LIMIT

    def __repr__(self) -> str:
        line = "unknown" if self.latest is None else " + ".join(f"{c:.3g}" for c in self.latest)
        return f"<Fit {line} of {self._count} samples>"


def in_words(times: float) -> str:
    """How much slower, or faster, what takes so many times as long has become."""
    return f"{times:.1f} times slower" if times > 1 else f"{1 / times:.1f} times faster"


def _are_off(run: Sequence[tuple[_Sample, float]], times: float) -> bool:
    """All by so many times, in one direction."""
    off = [r for _, r in run]
    return min(off) >= math.log(times) or max(off) <= -math.log(times)


# --- least squares


def robust_line(rows: Sequence[Line], seconds: Sequence[float], weights: Sequence[float]) -> Line:
    """The line that fits best in relative terms, with no coefficient below 0; what lies far off counts little.

    Iteratively reweighted least squares over the non-negative fit of each round, with Huber's weights (P. J. Huber, 1964) in the first
    rounds and their squares in the last. Errors are relative to what the line of the round before says, not to what was seen: what took a
    twentieth of its time because it was not what it was taken for would weigh four hundredfold otherwise. The first round has no line, and
    takes what was seen, or the middle of it all where that is more.

    Args:
        rows: features with the constant 1 in front, shape (m, k); m at least 1.
        seconds: shape (m,), all above 0.
        weights: shape (m,), none below 0.

    Returns:
        k coefficients.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    usual = middle(seconds, weights)
    units = [max(y, usual) for y in seconds]
    kept = list(weights)
    line: Line = ()
    for power in _POWERS:
        line = _non_negative(columns, seconds, [w / unit**2 for w, unit in zip(kept, units, strict=True)])
        units = [
            max(said, _LEAST_S)
            for said in map(sum, zip(*([c * x for x in column] for c, column in zip(line, columns, strict=True)), strict=True))
        ]
        residuals = [abs(y / unit - 1.0) for y, unit in zip(seconds, units, strict=True)]
        limit = _HUBER * max(_LEAST_SPREAD, 1.4826 * middle(residuals, weights))
        kept = [w if r <= limit else w * (limit / r) ** power for w, r in zip(weights, residuals, strict=True)]
    return line


def middle(values: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted median."""
    half, total = sum(weights) / 2, 0.0
    pairs = sorted(zip(values, weights, strict=True))
    for value, weight in pairs:
        total += weight
        if total >= half:
            return value
    return pairs[-1][0]


def _non_negative(columns: Sequence[Sequence[float]], targets: Sequence[float], weights: Sequence[float]) -> Line:
    """The weighted fit. With three coefficients there are seven ways to set some of them to 0: the best valid one is the answer."""
    size = len(columns)
    tops = [max(column) or 1.0 for column in columns]
    weighted = [list(map(mul, column, weights)) for column in columns]
    sums = [sum(map(mul, column, targets)) / top for column, top in zip(weighted, tops, strict=True)]
    products = [[sum(map(mul, weighted[i], columns[j])) / (tops[i] * tops[j]) for j in range(size)] for i in range(size)]
    best, best_gain = (0.0,) * size, 0.0
    for count in range(size, 0, -1):
        for chosen in combinations(range(size), count):
            found = _solve([[products[i][j] for j in chosen] for i in chosen], [sums[i] for i in chosen])
            if found is None or min(found) < 0.0:
                continue
            gain = sum(x * sums[i] for x, i in zip(found, chosen, strict=True))  # by how much the squared error is less than without a line
            if gain > best_gain * (1 + 1e-12):
                best_gain = gain
                whole = [0.0] * size
                for x, i in zip(found, chosen, strict=True):
                    whole[i] = x / tops[i]
                best = tuple(whole)
    return best


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gauss's elimination with pivots; None where the samples do not tell these coefficients apart."""
    size = len(right)
    rows = [[*row, x] for row, x in zip(matrix, right, strict=True)]
    largest = max(abs(x) for row in matrix for x in row)
    for column in range(size):
        pivot = max(range(column, size), key=lambda i: abs(rows[i][column]))
        if abs(rows[pivot][column]) <= 1e-10 * largest:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for i in range(column + 1, size):
            factor = rows[i][column] / rows[column][column]
            for j in range(column, size + 1):
                rows[i][j] -= factor * rows[column][j]
    found = [0.0] * size
    for i in range(size - 1, -1, -1):
        found[i] = (rows[i][size] - sum(rows[i][j] * found[j] for j in range(i + 1, size))) / rows[i][i]
    return found
