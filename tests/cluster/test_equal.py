"""The same prompt through a pair, through a unified engine and through transformers gives the same tokens."""

from __future__ import annotations

import os
from typing import Any

import aiohttp
import pytest

from disagg.launches import DEMO_MODEL
from tests.cluster.conftest import Cluster
from tests.cluster.prompts import prompt_ids
from tests.cluster.test_trace import EXCUSED_GAP, generate

LENGTHS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 300, 400, 500, 511, 512, 513, 600, 700, 800]
LENGTHS += [900, 1000, 1023, 1024, 1025, 1100, 1200, 1300, 1400, 1500, 1600, 1700, 1800, 1900, 2000, 2200, 2400, 2600, 2800, 2999, 3000]
ANSWER_TOKENS = 16


@pytest.fixture(scope="module")
def reference() -> Any:
    if os.environ.get("DISAGG_SKIP_REFERENCE") == "1":
        pytest.skip("DISAGG_SKIP_REFERENCE=1")
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(str(DEMO_MODEL), dtype=torch.float32).eval()


def reference_ids(model: Any, prompt: list[int], got: list[int]) -> tuple[list[int], bool]:
    """Greedy ids of transformers, teacher-forced on `got`: the first token that differs ends the comparison.

    Returns:
        The ids, and whether the first difference is a near tie.
    """
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([prompt + got[:-1]])).logits[0, len(prompt) - 1 :]
    best = torch.topk(logits, 2, dim=-1)
    ids = [int(i) for i in best.indices[:, 0]]
    for i, (ours, theirs) in enumerate(zip(got, ids, strict=True)):
        if ours != theirs:
            return ids, bool(best.values[i, 0] - best.values[i, 1] < EXCUSED_GAP)
    return ids, False


@pytest.mark.reference
@pytest.mark.slow
async def test_fifty_prompts(session: aiohttp.ClientSession, pair: Cluster, collocated: Cluster, reference: Any) -> None:
    assert len(LENGTHS) == 50
    excused = 0
    for seed, length in enumerate(LENGTHS):
        prompt = prompt_ids(length, 10_000 + seed)
        through_pair = (await generate(session, pair.url, prompt, ANSWER_TOKENS))["output_ids"]
        unified = (await generate(session, collocated.url, prompt, ANSWER_TOKENS))["output_ids"]
        wanted, near_tie = reference_ids(reference, prompt, unified)
        if near_tie:
            excused += 1
            continue
        assert unified == wanted, f"prompt of {length} tokens: unified engine against transformers"
        assert through_pair == unified, f"prompt of {length} tokens: pair against unified engine"
    assert excused == 0, "1 % of 50 prompts is none"
