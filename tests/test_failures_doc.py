"""docs/failures.md is held to what there is: every row of the catalogue once, tests that exist, every obstacle to a stream that goes on."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from disagg.router.seam import OBSTACLE_NAMES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "failures.md").read_text()
ROWS = [f"F{number:02}" for number in range(1, 57)]
STATES = ("covered", "partly", "not yet")
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


class Row:
    """A row of the table: its first cell, the cell of its tests, the cell of its state."""

    def __init__(self, line: str) -> None:
        self.cells = [cell.strip() for cell in line.strip("|").split("|")]
        self.name = self.cells[0]
        self.tests = _TEST.findall(self.cells[4]) if len(self.cells) == 7 else []

    @property
    def state(self) -> str:
        found = re.match(r"\*\*([a-z ]+)\*\*", self.cells[-1])
        return found[1] if found else ""

    @property
    def rest(self) -> str:
        """What is said beside the state."""
        return self.cells[-1].partition("**:")[2].strip()


TABLE = [Row(line) for line in PAGE.splitlines() if re.match(r"\| F\d\d \|", line)]


@cache
def functions_of(path: str) -> frozenset[str]:
    """The test functions of a file, found without importing it."""
    file = ROOT / path
    if not file.is_file():
        return frozenset()
    functions = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(function.name for function in functions if function.name.startswith("test_"))


def test_every_row_of_the_catalogue_stands_there_once() -> None:
    assert Counter(row.name for row in TABLE) == Counter(ROWS)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_row_has_a_state_and_what_the_state_promises(row: Row) -> None:
    assert len(row.cells) == 7, "a bar in a cell?"
    assert row.state in STATES
    if row.state == "covered":
        assert row.tests, "covered by which test?"
        assert row.cells[5] not in {"-", "not recorded"}, "covered is what was seen to fail without the defence"
    else:
        assert row.rest, "what is missing is named"
    if row.state == "partly":
        assert row.tests


def test_every_test_that_is_named_exists() -> None:
    named = _TEST.findall(PAGE)
    assert len(named) == PAGE.count("::test_"), "one that is not written as `path::test_name`"
    assert [f"{path}::{name}" for path, name in named if name not in functions_of(path)] == []


def test_every_file_that_is_named_exists() -> None:
    files = re.findall(r"`((?:tests|scripts)/[\w/.-]+)`", PAGE)
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_obstacle_has_its_line() -> None:
    lines = PAGE.partition("## What cannot be continued")[2].splitlines()
    told = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert told[1:] == list(OBSTACLE_NAMES)
