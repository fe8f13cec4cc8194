"""What a request asks of the embedded engine."""

from __future__ import annotations

from typing import Any, cast

import pytest

from disagg.engines.embedded.shapes import Bounds, GenerateBody, read_generate
from disagg.engines.embedded.tokens import Tokenizer

NO_TEXT = cast("Tokenizer", None)
"""Where a prompt is given as ids, nothing is tokenized."""


@pytest.mark.parametrize(("limit", "tokens"), [({}, 128), ({"max_new_tokens": None}, 990), ({"max_new_tokens": 7}, 7)])
def test_an_explicit_null_is_as_much_as_fits_and_nothing_is_128(limit: dict[str, Any], tokens: int) -> None:
    """As with SGLang."""
    body = GenerateBody(input_ids=list(range(10)), sampling_params=limit)
    batch = read_generate(body, NO_TEXT, Bounds(context_length=1000, vocab_size=100))
    assert [ask.params.max_new_tokens for ask in batch.asks] == [tokens]
