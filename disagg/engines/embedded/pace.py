"""Paced steps: how long a step lasts when the engine plays one with other hardware.

``--paced a,b;c,d``: a step with n prompt tokens lasts a + b·n milliseconds, one with m decoding requests c + d·m, one with
both the sum. One pair alone counts for both. The rest of a step's time is slept, so many engines share a core.

``--paced-compute off`` leaves the arithmetic out: a *load stand-in*. The next token is then a pure function of all tokens
before it (a CRC), so answers do not depend on batching, and prompt + part of an answer continues it; the KV pages hold
zeros. Where an answer's text or a damaged page matters, keep the compute on.
"""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, NamedTuple

from disagg.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray


class Pace(NamedTuple):
    """Milliseconds of a step: ``base + each * count`` for prompt tokens and for decoding requests."""

    prefill_base_ms: float
    prefill_each_ms: float
    decode_base_ms: float
    decode_each_ms: float

    def step_s(self, prompt_tokens: int, decoding: int) -> float:
        """Seconds that a step lasts."""
        prefill_ms = self.prefill_base_ms + self.prefill_each_ms * prompt_tokens if prompt_tokens else 0.0
        decode_ms = self.decode_base_ms + self.decode_each_ms * decoding if decoding else 0.0
        return (prefill_ms + decode_ms) / 1e3


def parse_pace(spec: str) -> Pace:
    """Read ``--paced``.

    Raises:
        ConfigError: not ``a,b`` or ``a,b;c,d`` with finite numbers of at least 0.
    """
    try:
        pairs = [tuple(float(number) for number in pair.split(",")) for pair in spec.split(";")]
    except ValueError:
        pairs = []
    numbers = [number for pair in pairs for number in pair]
    if len(pairs) not in {1, 2} or any(len(pair) != 2 for pair in pairs) or not all(map(_sane, numbers)):
        raise ConfigError(f"--paced: {spec!r} is not 'a,b' or 'a,b;c,d' in milliseconds, each at least 0")
    (a, b), (c, d) = pairs[0], pairs[-1]
    return Pace(a, b, c, d)


def _sane(number: float) -> bool:
    return math.isfinite(number) and number >= 0


def stand_in_token(tokens: NDArray[np.int32], vocabulary: Sequence[int]) -> int:
    """The token that follows ``tokens`` when nothing is computed: the same for the same tokens, spread evenly."""
    return vocabulary[zlib.crc32(tokens.tobytes()) % len(vocabulary)]
