"""The ratio of engines follows a load that swings, through real processes: nothing is lost, and every answer is what it should be."""

from __future__ import annotations

import pytest

from tests.rig.swing import PHASES, run


@pytest.mark.slow
def test_the_ratio_follows_a_load_that_swings_and_nothing_is_lost() -> None:
    prompts, answers = PHASES
    seconds = 40.0
    seen = run(2, 2, "auto", [(prompts, seconds), (answers, seconds)])
    assert seen.lost == 0, f"{seen.wrong} wrong, {seen.others}"
    assert seen.good > 1000
    there = [(at, ratio) for at, ratio, _ in seen.ratios if sum(ratio) == 4]
    assert any(ratio == (3, 1) for at, ratio in there if at < seconds + 5), f"long prompts want three who read: {seen.moves}"
    assert any(ratio in {(2, 2), (1, 3)} for at, ratio in there if at > seconds + 5), f"long answers want those who write: {seen.moves}"
    assert any(what.startswith("to prefill: prefill is at ") for what in seen.moves)
    assert any(what.startswith("to decode: prefill is at ") for what in seen.moves)
