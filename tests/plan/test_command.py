"""`disagg replay` as a person meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from disagg.plan.simulate import Outcome
from tests.plan.swing import DATA

TRACE = str(DATA / "azure_llm_2023_conv_300.csv")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "disagg", "replay", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_it_says_what_clients_would_see() -> None:
    result = run(TRACE, "--prefill", "1", "--decode", "1", "--flips", "auto")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("300 requests in 0:01:24 on 1 prefill, 1 decode and 0 unified engines; placement cache\n")
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == ["goodput", "TTFT", "ITL", "busy", "flips"]


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, second, other = (run(TRACE, "--json", "--policy", "random", "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == second != other
    assert set(json.loads(first)) == set(Outcome.__struct_fields__)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("/no/such.csv",), 1, "/no/such.csv cannot be read"),
        ((str(Path(__file__)),), 1, "line 1: this is neither a JSON object"),
        ((TRACE, "--prefill", "0"), 2, "a cluster needs a prefill and a decode engine, or a unified one"),
        ((TRACE, "--rate", "0"), 2, "--rate 0 is not allowed"),
        ((TRACE, "--read", "1,2"), 2, "--read '1,2' is not allowed: write three numbers"),
        ((TRACE, "--minutes", "-1"), 2, "--minutes -1 is not allowed"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments: tuple[str, ...], code: int, sentence: str) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert sentence in " ".join(result.stderr.split())
