"""Prompts of a wanted length in tokens, made of the demo model's own words."""

from __future__ import annotations

import functools
import random

from disagg.engines.embedded.tokens import Tokenizer
from disagg.launches import DEMO_MODEL


@functools.cache
def _words() -> tuple[int, ...]:
    """Ids of the tokens that are a whole word with its leading space."""
    tokenizer = Tokenizer.load(DEMO_MODEL)
    return tuple(i for i in range(1024) if (text := _text(tokenizer, i)).startswith(" ") and text[1:].isalpha() and len(text) > 3)


def _text(tokenizer: Tokenizer, token: int) -> str:
    try:
        return tokenizer.decode([token])
    except Exception:  # noqa: BLE001  # an id beyond the vocabulary
        return ""


def prompt_ids(length: int, seed: int) -> list[int]:
    """A prompt of `length` tokens; no two seeds give the same."""
    chance = random.Random(seed)
    return [chance.choice(_words()) for _ in range(length)]
