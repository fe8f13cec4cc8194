"""Chaos: every class of faults at random, against real processes under load. Started by ``scripts/chaos``."""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
from pathlib import Path

import msgspec
import uvloop

from tests.chaos.faults import FAULTS
from tests.chaos.judge import page, report_of
from tests.chaos.load import LoadError
from tests.chaos.picture import save
from tests.chaos.run import RATE, Plan, run
from tests.chaos.town import TownError


def say(line: str) -> None:
    """Progress; the report alone goes to stdout."""
    sys.stderr.write(f"chaos: {line}\n")
    sys.stderr.flush()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="how long faults come (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of faults and load; printed; the processes' own timing is not in it")
    parser.add_argument("--storm", action="store_true", help="several faults at a time; availability is told and not judged")
    parser.add_argument("--rate", type=float, default=RATE, help="questions a second (default: %(default)s)")
    parser.add_argument("--only", action="append", default=[], choices=sorted(FAULTS), metavar="CLASS", help="this class; repeatable")
    parser.add_argument("--report", type=Path, help="the report as JSON")
    parser.add_argument("--log", type=Path, help="the whole log as JSON: every request, every fault")
    parser.add_argument("--picture", type=Path, help="a timeline; SVG, or PNG where rsvg-convert or ImageMagick is there")
    parser.add_argument("--keep", type=Path, help="an existing folder in which the processes' logs stay")
    options = parser.parse_args(arguments)
    if not 0.05 <= options.minutes <= 24 * 60 or not 0.1 <= options.rate <= 100:
        parser.error("minutes 0.05 to 1440, rate 0.1 to 100")
    return options


async def main(options: argparse.Namespace) -> int:
    """Runs, reports; 1 if something is stuck, wrong or leaked, or too little was available."""
    seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
    say(f"seed {seed}")
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    log = await run(Plan(options.minutes, seed, options.storm, options.rate, tuple(options.only), options.keep), say)
    report = report_of(log)
    for path, what in ((options.report, report), (options.log, log)):
        if path is not None:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(what)))
    if options.picture is not None:
        say(f"picture: {save(log, options.picture)}")
    sys.stdout.write(page(report))
    return 1 if report.broken else 0


def first(error: BaseException) -> BaseException:
    """The first error of a group of groups."""
    return first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def command() -> int:
    """Parses, runs, and says in one sentence why a run cannot be made."""
    options = parse(sys.argv[1:])
    try:
        return uvloop.run(main(options))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    except (TownError, LoadError, ExceptionGroup) as error:
        if not isinstance(cause := first(error), TownError | LoadError):
            raise
        say(str(cause))
        return 1


if __name__ == "__main__":
    sys.exit(command())
