"""A keeper and real processes that behave as SGLang does while it starts: it speaks in its log and in nothing else."""

from __future__ import annotations

import asyncio
import stat
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from disagg.cluster.keeper import EngineKeeper
from disagg.cluster.prober import Prober
from disagg.engines.base import EngineLaunch
from disagg.engines.process import ChildLauncher
from disagg.engines.restart import EngineLife, Limits
from disagg.model import EngineId, EngineState, Role
from disagg.observe.log import make_logger
from disagg.wire.messages import EngineReport
from tests.ports import free_port

LIMIT_S = 10.0
KEY = "a-key-of-thirty-two-characters-xx"
TAKEN = "[Errno 98] error while attempting to bind on address ('127.0.0.1', 30000): address already in use"


@asynccontextmanager
async def kept(folder: Path, program: str, **fields: Any) -> AsyncIterator[EngineKeeper]:
    """A keeper whose engine is this program; it is ended with the test."""
    launch = EngineLaunch(
        EngineId("e"),
        Role.PREFILL,
        argv=(sys.executable, "-u", "-c", program),
        env={},
        log_file=folder / "e" / "log",
        url=f"http://127.0.0.1:{free_port()}",
        api_key=KEY,
        **fields,
    )
    (folder / "e").mkdir()
    prober = Prober(1.0)
    async with asyncio.TaskGroup() as tasks:

        def spawn(work: Coroutine[Any, Any, None], name: str) -> None:
            tasks.create_task(work, name=name)

        keeper = EngineKeeper(
            EngineId("e"),
            Role.PREFILL,
            host="h",
            launch_for=lambda _: launch,
            settings_for=lambda _: launch.argv,
            launcher=ChildLauncher(),
            folder=folder,
            life=EngineLife(Limits(backoff_first_s=0.01)),
            prober=prober,
            spawn=spawn,
            on_change=lambda: None,
            log=make_logger("critical", "text"),
        )
        await keeper.begin()
        keeper.start()
        run = tasks.create_task(keeper.run())
        try:
            yield keeper
        finally:
            run.cancel()
            await keeper.stop(1.0)
            await prober.close()


async def report(keeper: EngineKeeper, is_so: Callable[[EngineReport], bool]) -> EngineReport:
    """Its report once that is so."""
    async with asyncio.timeout(LIMIT_S):
        while not is_so(keeper.report()):  # noqa: ASYNC110  # a keeper has no event for that
            await asyncio.sleep(0.01)
    return keeper.report()


async def test_a_start_says_how_far_it_is(tmp_path: Path) -> None:
    program = "import time; print('[x] Load weight begin. avail mem=1 GB'); time.sleep(600)"
    async with kept(tmp_path, program) as keeper:
        found = await report(keeper, lambda r: "loads the weights" in r.reason)
        assert found.state is EngineState.STARTING
        assert keeper.progress == "it loads the weights"


async def test_a_start_that_cannot_succeed_is_ended_although_the_engine_would_wait_for_ever(tmp_path: Path) -> None:
    program = f"import time; print({TAKEN!r}); time.sleep(600)"
    async with kept(tmp_path, program) as keeper:
        found = await report(keeper, lambda r: r.state in {EngineState.DEAD, EngineState.HELD} and "taken" in r.reason)
        assert "port 30000 on 127.0.0.1 is taken by another program" in found.reason


async def test_two_ends_whose_cause_stays_hold_it(tmp_path: Path) -> None:
    program = "import sys; sys.exit('sglang serve: error: unrecognized arguments: --nonsense')"
    async with kept(tmp_path, program) as keeper:
        found = await report(keeper, lambda r: r.state is EngineState.HELD)
        assert "2 starts that ended alike" in found.reason
        assert "it does not know the arguments --nonsense" in found.reason


async def test_other_ends_are_tried_five_times(tmp_path: Path) -> None:
    async with kept(tmp_path, "import sys; sys.exit('RuntimeError: the moon')") as keeper:
        found = await report(keeper, lambda r: r.state is EngineState.HELD)
        assert "5 deaths" in found.reason
        assert "RuntimeError: the moon" in found.reason


async def test_its_key_is_on_disk_for_itself_alone_and_overwritten_in_its_log(tmp_path: Path) -> None:
    secret = tmp_path / "e" / "key.yaml"
    program = f"import time; print('server_args={{api_key: {KEY}}}'); time.sleep(600)"
    async with kept(tmp_path, program, secret_files=((secret, f"api-key: {KEY}\n"),)) as keeper:
        await report(keeper, lambda r: "reads its settings" in r.reason)
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert secret.read_text() == f"api-key: {KEY}\n"
        assert KEY not in (tmp_path / "e" / "log").read_text()


async def test_an_engine_over_several_hosts_keeps_its_role(tmp_path: Path) -> None:
    async with kept(tmp_path, "import time; print('Init parallel begin'); time.sleep(600)", parts=2) as keeper:
        await report(keeper, lambda r: "sets up its ranks" in r.reason)
        done, why = await keeper.restart(Role.DECODE, "a test")
        assert not done
        assert "over several hosts keeps its role" in why
