"""Imports go inward only: WORDS import nothing of ours, MIND is pure, HANDS meet in the server, nothing imports the door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import disagg

ROOT = Path(disagg.__file__).parent

# Every module has a room. A new one must be placed here, which is the moment to think about what it may import.
ROOMS: dict[str, frozenset[str]] = {
    "WORDS": frozenset({"disagg", "disagg.errors", "disagg.model"}),
    "MIND": frozenset(
        {
            "disagg.config",
            "disagg.handoff",
            "disagg.cluster.canary",
            "disagg.cluster.change",
            "disagg.cluster.detector",
            "disagg.cluster.members",
            "disagg.cluster.orphans",
            "disagg.status",
            "disagg.cluster.courier",
            "disagg.wire.codec",
            "disagg.wire.kv_events",
            "disagg.wire.messages",
            "disagg.deploy.systemd",
            "disagg.engines.base",
            "disagg.engines.diagnosis",
            "disagg.engines.folder",
            "disagg.engines.progress",
            "disagg.engines.restart",
            "disagg.engines.sglang",
            "disagg.plan.dispatch",
            "disagg.plan.flips",
            "disagg.plan.hardware",
            "disagg.plan.outcome",
            "disagg.plan.simulate",
            "disagg.plan.trace",
            "disagg.policy.ledger",
            "disagg.policy.history",
            "disagg.policy.holds",
            "disagg.policy.prefix",
            "disagg.policy.replay",
            "disagg.policy.reports",
            "disagg.policy.queue",
            "disagg.policy.ab",
            "disagg.policy.balance",
            "disagg.policy.benchmark",
            "disagg.policy.blame",
            "disagg.policy.books",
            "disagg.policy.cost",
            "disagg.policy.eject",
            "disagg.policy.forecast",
            "disagg.policy.matching",
            "disagg.policy.pace",
            "disagg.policy.route",
            "disagg.router.gate",
            "disagg.router.journal",
            "disagg.router.merge",
            "disagg.router.openai",
            "disagg.router.seam",
            "disagg.engines.embedded.answers",
            "disagg.engines.embedded.checkpoint",
            "disagg.engines.embedded.faults",
            "disagg.engines.embedded.flags",
            "disagg.engines.embedded.frames",
            "disagg.engines.embedded.pace",
            "disagg.engines.embedded.generation",
            "disagg.engines.embedded.pages",
            "disagg.engines.embedded.sampler",
            "disagg.engines.embedded.scheduler",
            "disagg.engines.embedded.shapes",
            "disagg.engines.embedded.step",
            "disagg.engines.embedded.switch",
            "disagg.engines.embedded.tokens",
        }
    ),
    "HANDS": frozenset(
        {
            "disagg.ids",
            "disagg.cluster.agent",
            "disagg.cluster.controller",
            "disagg.cluster.examiner",
            "disagg.cluster.measurer",
            "disagg.cluster.matcher",
            "disagg.cluster.follower",
            "disagg.cluster.head",
            "disagg.cluster.keeper",
            "disagg.cluster.prober",
            "disagg.cluster.reaper",
            "disagg.cluster.registrar",
            "disagg.cluster.transport",
            "disagg.deploy.install",
            "disagg.engines.process",
            "disagg.engines.embedded.engine",
            "disagg.engines.embedded.links",
            "disagg.engines.embedded.loads",
            "disagg.engines.embedded.server",
            "disagg.engines.embedded.transfer",
            "disagg.engines.embedded.transformer",
            "disagg.observe.log",
            "disagg.observe.metrics",
            "disagg.observe.notify",
            "disagg.router.admin",
            "disagg.router.admission",
            "disagg.router.app",
            "disagg.router.attempt",
            "disagg.router.client",
            "disagg.router.compose",
            "disagg.router.connection",
            "disagg.router.legs",
            "disagg.router.owner",
            "disagg.router.relay",
            "disagg.router.stream",
            "disagg.router.trial",
            "disagg.router.upstream",
            "disagg.security.keys",
            "disagg.security.registry",
            "disagg.security.state",
            "disagg.security.token",
        }
    ),
    "DOOR": frozenset(
        {
            "disagg.__main__",
            "disagg.activation",
            "disagg.ask",
            "disagg.cli",
            "disagg.engines.embedded.__main__",
            "disagg.host",
            "disagg.launches",
            "disagg.life",
            "disagg.server",
        }
    ),
}
PACKAGES = frozenset(
    {
        *(
            "disagg.cluster",
            "disagg.deploy",
            "disagg.engines",
            "disagg.engines.embedded",
            "disagg.observe",
            "disagg.plan",
            "disagg.policy",
            "disagg.router",
        ),
        "disagg.security",
        "disagg.wire",
    }
)

IMPURE = frozenset(
    {
        *("asyncio", "socket", "zmq", "aiohttp", "uvloop", "random", "secrets", "logging", "structlog"),
        *("subprocess", "threading", "multiprocessing", "time", "datetime", "os", "signal", "select", "ssl", "uuid"),
    }
)
TOLERATED = {
    "disagg.engines.embedded.generation": {"asyncio"},  # the future that its one reader waits on
    "disagg.engines.embedded.shapes": {"uuid"},  # it mints the ids of requests that bring none; they should be handed in
}
SERVICES = frozenset({"disagg.engines.base", "disagg.ids"})  # HANDS that other HANDS may use, besides `observe` and `security`
WORD_OF_A_ROOM = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_bytes())
    return found


def imports(tree: ast.AST, known: frozenset[str]) -> set[str]:
    """Every module that is imported anywhere in the file, inside of functions too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            module = node.module or ""
            inner = {f"{module}.{alias.name}" for alias in node.names} & known
            found |= inner or {module}
    return found


TREES = modules()
KNOWN = frozenset(TREES)
IMPORTS = {name: imports(tree, KNOWN) for name, tree in TREES.items()}


def types_only(tree: ast.AST) -> set[str]:
    """What is imported for annotations alone: a type is not a clock."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and isinstance(n.test, ast.Name) and n.test.id == "TYPE_CHECKING"]
    return {i for block in blocks for node in block.body for i in imports(node, KNOWN)}


ROOM_OF = {name: room for room, names in ROOMS.items() for name in names}


def ours(name: str) -> set[str]:
    return {i for i in IMPORTS[name] if i == "disagg" or i.startswith("disagg.")}


def foreign(name: str) -> set[str]:
    return {i.partition(".")[0] for i in IMPORTS[name] - ours(name) - types_only(TREES[name])}


def test_every_module_has_exactly_one_room() -> None:
    placed = [name for names in ROOMS.values() for name in names]
    assert len(placed) == len(set(placed))
    assert sorted(KNOWN - PACKAGES - set(placed)) == [], "a new module: place it in ROOMS"
    assert sorted(set(placed) - KNOWN) == [], "a module that is gone: take it out of ROOMS"


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_package_holds_nothing_but_its_docstring(name: str) -> None:
    assert [type(n).__name__ for n in TREES[name].body] == ["Expr"]


@pytest.mark.parametrize("name", sorted(ROOMS["WORDS"]))
def test_words_import_nothing_of_ours(name: str) -> None:
    assert ours(name) == set()
    assert not foreign(name) & IMPURE


@pytest.mark.parametrize("name", sorted(ROOMS["MIND"]))
def test_mind_is_pure_and_knows_only_words_and_mind(name: str) -> None:
    assert foreign(name) & IMPURE == TOLERATED.get(name, set())
    assert {i for i in ours(name) if ROOM_OF[i] not in {"WORDS", "MIND"}} == set()


@pytest.mark.parametrize("name", sorted(ROOMS["HANDS"]))
def test_hands_do_not_know_hands_of_another_room(name: str) -> None:
    room = name.rpartition(".")[0]

    def allowed(other: str) -> bool:
        if ROOM_OF[other] in {"WORDS", "MIND"} or other in SERVICES:
            return True
        return ROOM_OF[other] == "HANDS" and other.startswith((f"{room}.", "disagg.observe.", "disagg.security.")) and room != "disagg"

    assert {i for i in ours(name) if not allowed(i)} == set()


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_nothing_imports_the_command_line(name: str) -> None:
    allowed = name == "disagg.__main__"
    assert allowed or "disagg.cli" not in IMPORTS[name]
    assert allowed or name == "disagg.cli" or "typer" not in foreign(name)


@pytest.mark.parametrize("name", sorted(n for n in KNOWN if n.startswith("disagg.engines.embedded")))
def test_the_embedded_engine_knows_nothing_of_the_router(name: str) -> None:
    assert {i for i in ours(name) if i.startswith(("disagg.router", "disagg.cluster", "disagg.policy", "disagg.server"))} == set()


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_module_is_one_plain_noun(name: str) -> None:
    assert not set(name.split(".")) & WORD_OF_A_ROOM


def test_no_task_is_made_without_an_owner() -> None:
    """The linter bans `asyncio.create_task`; a loop's own one would slip past it."""
    offenders = [
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in {"create_task", "ensure_future"}
        if isinstance(node.value, ast.Name) and node.value.id in {"asyncio", "loop"}
    ]
    assert offenders == []
