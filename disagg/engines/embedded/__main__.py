"""Start one embedded engine: ``python -m disagg.engines.embedded --model-path DIR …``."""

from __future__ import annotations

import os
import time

STARTED_AT = time.monotonic()
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # numpy reads them when it is imported, hence before everything below

# ruff: noqa: E402
import asyncio
import ctypes
import gc
import logging
import signal
import sys
from typing import TYPE_CHECKING

import msgspec
import uvloop
from aiohttp import web

from disagg.engines.embedded.checkpoint import load_checkpoint
from disagg.engines.embedded.engine import Engine, Settings
from disagg.engines.embedded.faults import parse_faults
from disagg.engines.embedded.flags import Flags, parse_flags
from disagg.engines.embedded.pace import parse_pace
from disagg.engines.embedded.server import Face, Server
from disagg.engines.embedded.tokens import Tokenizer
from disagg.engines.embedded.transfer import Limits
from disagg.engines.embedded.transformer import Transformer
from disagg.engines.folder import model_hash
from disagg.errors import DisaggError, StartError

if TYPE_CHECKING:
    from pathlib import Path

SWITCH_INTERVAL_S = 0.0005
"""How long the compute thread may keep the interpreter while the event loop waits for it."""
KEEP_ALIVE_S = 5.0
DRAIN_S = 5.0
PR_SET_PDEATHSIG = 1

log = logging.getLogger("disagg.embedded")


def main() -> int:
    """Run until a signal comes. Returns the exit code."""
    try:
        flags = parse_flags(sys.argv[1:], api_key=os.environ.get("DISAGG_ENGINE_API_KEY", ""))
        logging.basicConfig(level=flags.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
        if flags.exit_with_parent:
            _exit_with_parent()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        engine = build(flags)
        uvloop.run(serve(engine, flags))
    except DisaggError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def build(flags: Flags) -> Engine:
    """Load the model and put the engine together.

    Raises:
        StartError: the model folder cannot be used.
        ConfigError: a flag's value cannot be used.
    """
    faults = None if flags.faults is None else parse_faults(flags.faults)
    if faults is not None:
        log.warning("STARTED WITH --faults %s: THIS ENGINE BREAKS ON PURPOSE", flags.faults)
    pace = parse_pace(flags.paced) if flags.paced else None
    checkpoint = load_checkpoint(flags.model_path)
    context_length = min(flags.context_length or checkpoint.config.max_context, checkpoint.config.max_context)
    settings = Settings(
        role=flags.disaggregation_mode,
        page_size=flags.page_size,
        max_total_tokens=flags.max_total_tokens,
        max_running_requests=flags.max_running_requests,
        chunked_prefill_size=flags.chunked_prefill_size,
        context_length=min(context_length, flags.max_total_tokens),
        bootstrap_port=flags.disaggregation_bootstrap_port,
        limits=Limits(bootstrap_s=flags.bootstrap_timeout, stall_s=flags.transfer_stall_timeout),
        pace=pace,
        compute=flags.paced_compute == "on",
        faults=faults,
        role_switch=flags.enable_pd_role_switch,
        decode_cache=flags.disaggregation_decode_enable_radix_cache,
    )
    tokenizer = Tokenizer.load(flags.model_path)
    return Engine(Transformer(checkpoint), tokenizer, model_hash(flags.model_path), settings)


async def serve(engine: Engine, flags: Flags) -> None:
    """Listen, say that it is ready, serve, and after a signal finish what runs.

    Raises:
        StartError: a port is in use.
    """
    face = Face(flags.served_model_name, str(flags.model_path), flags.api_key, incremental=flags.incremental_streaming_output)
    server = Server(engine, face)
    stop = _stop_on_signals()
    try:
        async with asyncio.TaskGroup() as tasks:
            started = asyncio.Event()
            turning = tasks.create_task(engine.run(bootstrap_host=flags.host, started=started), name="embedded engine")
            await started.wait()
            runner = await _listen(server, flags)
            _say_ready(server, flags)
            gc.collect()
            gc.freeze()
            await stop.wait()
            await _drain(server)
            await runner.cleanup()
            turning.cancel()
    except* OSError as group:
        ports = f"--port {flags.port} or --disaggregation-bootstrap-port {flags.disaggregation_bootstrap_port}"
        raise StartError(f"cannot listen on {flags.host}, {ports}: {group.exceptions[0]}") from None


async def _listen(server: Server, flags: Flags) -> web.AppRunner:
    # Without handler_cancellation aiohttp lets the handlers of vanished clients run on.
    runner = web.AppRunner(server.app(), handler_cancellation=True, keepalive_timeout=KEEP_ALIVE_S, access_log=None, handle_signals=False)
    await runner.setup()
    site = web.TCPSite(runner, flags.host, flags.port, shutdown_timeout=0.5, backlog=1024)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return runner


def _say_ready(server: Server, flags: Flags) -> None:
    engine = server.engine
    ready = {
        "pid": os.getpid(),
        "url": server.url,
        "bootstrap_port": engine.bootstrap_port,
        "role": engine.role,
        "model": flags.served_model_name,
        "startup_s": round(time.monotonic() - STARTED_AT, 3),
    }
    log.info("ready: %s", " ".join(f"{name}={value}" for name, value in ready.items()))
    if flags.ready_file is not None:
        _write_whole(flags.ready_file, msgspec.json.encode(ready))


def _write_whole(path: Path, content: bytes) -> None:
    """A reader sees either no file or all of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def _stop_on_signals() -> asyncio.Event:
    """Set at the first SIGTERM or SIGINT; the second one ends the process at once."""
    stop = asyncio.Event()

    def caught() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, caught)
    return stop


async def _drain(server: Server) -> None:
    log.info("stopping: %d samples run, at most %g s are left to them", server.engine.live, DRAIN_S)
    server.draining = True
    until = time.monotonic() + DRAIN_S
    while server.engine.live and time.monotonic() < until:  # noqa: ASYNC110  an event would be set at every token
        await asyncio.sleep(0.02)


def _exit_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it is gone."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise StartError("the process that started this engine is gone already")


if __name__ == "__main__":
    sys.exit(main())
