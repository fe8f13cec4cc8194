"""A stand-in for an agent: starts an embedded engine, keeps its record, and waits to be killed.

``python -m tests.engines_process.starter FOLDER`` with FOLDER/launch.json; writes FOLDER/record.json.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import uvloop

from disagg.engines.base import EngineLaunch, decode_kept, encode_kept
from disagg.engines.process import EngineProcess


async def main(folder: Path) -> None:
    launch = decode_kept((folder / "launch.json").read_bytes(), EngineLaunch)
    os.set_inheritable(os.open(folder / "secret", os.O_RDWR | os.O_CREAT, 0o600), True)  # a careless library's
    engine = await EngineProcess.start(launch)
    await engine.wait_ready(30)
    (folder / "partial").write_bytes(encode_kept(engine.record()))
    (folder / "partial").rename(folder / "record.json")
    await engine.wait()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1])))
