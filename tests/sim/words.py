"""The simulated model: deterministic tokens, and a tokenizer whose inverse is exact.

The next token is a function of all ids so far, so what continues a cut answer from prompt + emitted ids has one right form.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

VOCABULARY = 50_000
END_ONE_IN = 97
MODEL = "sim"
_OWN = re.compile(r"(?:w[0-9]{1,9}(?: +|\Z))*")


def state_of(ids: Iterable[int], state: int = 0) -> int:
    """The model's state after these ids."""
    tokens = tuple(ids)
    return zlib.crc32(struct.pack(f">{len(tokens)}I", *tokens), state)


def next_token(state: int) -> int | None:
    """What follows; None for the end of the answer."""
    drawn = zlib.crc32(b"next", state)
    return None if drawn % END_ONE_IN == 0 else drawn // END_ONE_IN % VOCABULARY


def answer(prompt: Sequence[int], limit: int, *, ignore_end: bool = False) -> tuple[list[int], str]:
    """The whole right answer and its finish reason."""
    state, ids = state_of(prompt), list[int]()
    while len(ids) < limit:
        token = next_token(state)
        if token is None:
            if not ignore_end:
                return ids, "stop"
            token = VOCABULARY - 1
        ids.append(token)
        state = state_of((token,), state)
    return ids, "length"


def text_of(ids: Iterable[int]) -> str:
    """One word for each id."""
    return "".join(f"w{token} " for token in ids)


def ids_of(text: str) -> list[int]:
    """The inverse; other words have ids beyond the vocabulary."""
    if _OWN.fullmatch(text):
        return [int(digits) for digits in text.replace("w", "").split()]
    return [_id_of(word) for word in text.split()]


def _id_of(word: str) -> int:
    if _OWN.fullmatch(word):
        return int(word[1:])
    return VOCABULARY + zlib.crc32(word.encode()) % VOCABULARY


def chat_ids(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """What the chat template makes of messages."""
    ids = [1]
    for message in messages:
        ids += [2, len(str(message["role"])), *ids_of(str(message["content"])), 3]
    return ids
