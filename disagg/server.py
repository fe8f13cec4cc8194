"""The composition root: builds the parts out of a config, owns the tasks, the signals and the order of going down."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import structlog
import uvloop
from aiohttp import web

from disagg import __version__
from disagg.cluster.controller import Controller
from disagg.config import Config, engine_addresses, parse_listen
from disagg.engines.base import EngineLaunch, ReadyFile
from disagg.engines.process import EngineProcess
from disagg.errors import StartError
from disagg.handoff import Limits
from disagg.ids import Ids
from disagg.model import EngineAddress, EngineId, Role
from disagg.observe.log import make_logger
from disagg.observe.metrics import RouterMetrics
from disagg.router.app import PublicListener, admin_app
from disagg.router.relay import Relay

ENGINE_START_LIMIT_S = 120.0
ENGINE_STOP_LIMIT_S = 5.0
DRAIN_POLL_S = 0.02
DEMO_MODEL = Path(__file__).parent / "engines" / "embedded" / "demo_model"

Say = Callable[[str], None]


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a coroutine to its end on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


class Stop:
    """The two-stage stop: the first signal drains, the second one ends at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop, say: Say) -> None:
        self.asked = asyncio.Event()
        self.urgent = asyncio.Event()
        self._say = say
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if not self.asked.is_set():
            self._say("Stopping: running requests may finish; once more stops at once.")
            self.asked.set()
        else:
            self.urgent.set()


# --- the router


class Router:
    """A running router. Made by `router_running`."""

    def __init__(self, config: Config, controller: Controller, listener: PublicListener, metrics: RouterMetrics) -> None:
        self.config = config
        self.controller = controller
        self.listener = listener
        self.metrics = metrics

    async def drain(self, stop: Stop) -> None:
        """Takes no new requests and waits for the running ones, at most ``drain_timeout_s``, or until the second signal."""
        self.listener.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.router.drain_timeout_s):
                while self.metrics.inflight and not stop.urgent.is_set():  # noqa: ASYNC110  # the hot path sets no event
                    await asyncio.sleep(DRAIN_POLL_S)


@contextlib.asynccontextmanager
async def router_running(
    config: Config, addresses: Sequence[EngineAddress], log: structlog.typing.FilteringBoundLogger
) -> AsyncIterator[Router]:
    """Runs a router as long as the context is open.

    Raises:
        StartError: an address to listen on is not free.
    """
    loop = asyncio.get_running_loop()
    section = config.router
    async with contextlib.AsyncExitStack() as stack:
        controller = Controller(addresses, probe_interval_s=section.probe_interval_s, probe_timeout_s=section.probe_timeout_s, log=log)
        metrics = RouterMetrics(lambda: controller.view)
        ids = Ids()
        group = await stack.enter_async_context(_owned_tasks())
        relay = Relay(
            view=lambda: controller.view,
            limits=_limits(config),
            whole_answer_s=section.whole_answer_timeout_s,
            metrics=metrics,
            random_room=ids.room,
            spawn=lambda work, name: group.create_task(_supervised(work, name, log), name=name),
            on_refused=controller.refused,
            loop=loop,
            clock=time.monotonic,
        )
        stack.callback(relay.close)
        listener = PublicListener(
            relay=relay,
            view=lambda: controller.view,
            metrics=metrics,
            ids=ids,
            body_limit=section.body_limit_mib * 1024 * 1024,
            started_at=int(time.clock_gettime(time.CLOCK_REALTIME)),
            log=log,
        )
        await _listen_admin(stack, config, admin_app(view=lambda: controller.view, relay=relay, metrics=metrics))
        await _listen_public(stack, config, listener)
        group.create_task(controller.run(), name="controller")
        relay.start()
        yield Router(config, controller, listener, metrics)


@contextlib.asynccontextmanager
async def _owned_tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose tasks end with the context. What the body raises comes out as it is, not in a group."""
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            try:
                yield group
            except BaseException as error:  # noqa: BLE001  # raised again below
                failure = error
            raise _Over  # noqa: TRY301  # leaving a group with an exception is how its tasks are cancelled
    except* _Over:
        pass
    if failure is not None:
        raise failure


class _Over(Exception):  # noqa: N818  # not an error
    """The context is over."""


async def _supervised(work: Coroutine[Any, Any, None], name: str, log: structlog.typing.FilteringBoundLogger) -> None:
    try:
        await work
    except Exception:  # one failed background task must not end the router
        log.exception("a background task failed", task=name)


def _limits(config: Config) -> Limits:
    section = config.router
    return Limits(
        connect_s=section.connect_timeout_s,
        first_token_s=section.first_token_timeout_s,
        between_tokens_s=section.between_tokens_timeout_s,
    )


async def _listen_public(stack: contextlib.AsyncExitStack, config: Config, listener: PublicListener) -> None:
    host, port = parse_listen("router.http", config.router.http)
    factory = listener.server()
    try:
        server = await asyncio.get_running_loop().create_server(factory, host, port, backlog=1024)
    except OSError as error:
        raise _cannot_listen("--http", config.router.http, error) from error
    stack.push_async_callback(factory.shutdown, 1.0)
    stack.callback(server.close)


async def _listen_admin(stack: contextlib.AsyncExitStack, config: Config, app: web.Application) -> None:
    host, port = parse_listen("router.admin", config.router.admin)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise _cannot_listen("--admin", config.router.admin, error) from error


def _cannot_listen(flag: str, address: str, error: OSError) -> StartError:
    why = "another program listens there" if error.errno == 98 else (error.strerror or str(error))
    return StartError(f"cannot listen on {address}: {why}; stop that program or choose another address with {flag}")


def _settle_memory() -> None:
    """What lives now lives as long as the process: the collector need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def serve_router(config: Config, say: Say) -> None:
    """``disagg serve --role router``: a router for engines that run already."""
    began = time.monotonic()
    log = make_logger(config.observe.log_level, config.observe.log_format)
    stop = Stop(asyncio.get_running_loop(), say)
    _raise_file_limit()
    addresses = engine_addresses(config.router)
    async with router_running(config, addresses, log) as router:
        say(f"disagg {__version__} router")
        for address in addresses:
            say(f"  {address.id:<12} {address.url}" + (f"  bootstrap port {address.bootstrap_port}" if address.bootstrap_port else ""))
        if not addresses:
            say("  no engines are given: name them with --prefill and --decode, or --unified; until then requests get 503")
        _say_listeners(config, say)
        _warn_if_wide(config, log)
        say(f"Started in {time.monotonic() - began:.1f} s.")
        _settle_memory()
        await stop.asked.wait()
        await router.drain(stop)


def _say_listeners(config: Config, say: Say) -> None:
    say(f"  clients      http://{config.router.http}")
    say(f"  admin        http://{config.router.admin}")


def _warn_if_wide(config: Config, log: structlog.typing.FilteringBoundLogger) -> None:
    host, _ = parse_listen("router.http", config.router.http)
    if host not in {"127.0.0.1", "::1", "localhost"}:
        log.warning("the public listener is open to the network without keys and without TLS", http=config.router.http)


# --- a cluster on this machine


async def run_up(config: Config, counts: dict[Role, int], say: Say) -> None:
    """``disagg up``: engines and a router on this machine, until a signal.

    Raises:
        StartError: an engine or the router cannot start.
    """
    began = time.monotonic()
    log = make_logger(config.observe.log_level, config.observe.log_format)
    stop = Stop(asyncio.get_running_loop(), say)
    _raise_file_limit()
    model, name = _model(config)
    run_dir = Path(tempfile.mkdtemp(prefix="disagg-up-"))
    say(f"disagg {__version__} on this machine: {config.engine.engine} engine, model {name} ({model})")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        engines = [_embedded(config, role, i, model, name, run_dir) for role, n in counts.items() for i in range(n)]
        processes, ready = await _start_engines(stack, engines)
        for launch, file in zip(engines, ready, strict=True):
            _say_engine(launch, file, say)
        addresses = [file.address(launch) for launch, file in zip(engines, ready, strict=True)]
        router = await stack.enter_async_context(router_running(config, addresses, log))
        group = await stack.enter_async_context(_owned_tasks())
        for process in processes:
            group.create_task(_report_exit(process, router.controller, say), name=f"wait {process.id}")
        await _wait_ready(router, stop)
        _say_listeners(config, say)
        _warn_if_wide(config, log)
        say(f"Ready in {time.monotonic() - began:.1f} s. Logs of the engines: {run_dir}")
        _settle_memory()
        await stop.asked.wait()
        await router.drain(stop)


async def _wait_ready(router: Router, stop: Stop) -> None:
    async with asyncio.TaskGroup() as group:
        ready = group.create_task(router.controller.wait_ready(), name="wait until ready")
        stopped = group.create_task(stop.asked.wait(), name="wait for a signal")
        await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        stopped.cancel()


def _model(config: Config) -> tuple[Path, str]:
    if not config.engine.model:
        return DEMO_MODEL, config.engine.served_name or "demo"
    folder = Path(config.engine.model)
    if not (folder / "config.json").is_file():
        raise StartError(f"the model folder {folder} has no config.json: give a Hugging Face folder with --model")
    return folder, config.engine.served_name or folder.resolve().name


_MODES = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.UNIFIED: "null"}


def _embedded(config: Config, role: Role, number: int, model: Path, name: str, run_dir: Path) -> EngineLaunch:
    section = config.engine
    ready_file = run_dir / f"{role}-{number}.json"
    argv = [sys.executable, "-m", "disagg.engines.embedded"]
    argv += ["--model-path", str(model), "--served-model-name", name, "--host", "127.0.0.1", "--port", "0"]
    argv += ["--disaggregation-mode", _MODES[role], "--disaggregation-bootstrap-port", "0"]
    argv += ["--page-size", str(section.page_size), "--max-total-tokens", str(section.kv_pool_tokens)]
    argv += ["--max-running-requests", str(section.max_running_requests), "--chunked-prefill-size", str(section.chunk_tokens)]
    argv += ["--ready-file", str(ready_file), "--exit-with-parent", *section.engine_args]
    return EngineLaunch(EngineId(f"{role}-{number}"), role, tuple(argv), {}, ready_file, run_dir / f"{role}-{number}.log")


async def _start_engines(stack: contextlib.AsyncExitStack, launches: Sequence[EngineLaunch]) -> tuple[list[EngineProcess], list[ReadyFile]]:
    processes = []
    for launch in launches:
        process = await EngineProcess.start(launch)
        stack.push_async_callback(process.stop, ENGINE_STOP_LIMIT_S)
        processes.append(process)
    try:
        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(p.wait_ready(ENGINE_START_LIMIT_S), name=f"start {p.id}") for p in processes]
    except* StartError as errors:
        raise StartError(str(errors.exceptions[0])) from None
    return processes, [w.result() for w in waits]


def _say_engine(launch: EngineLaunch, ready: ReadyFile, say: Say) -> None:
    bootstrap = f"  bootstrap port {ready.bootstrap_port}" if launch.role is Role.PREFILL else ""
    say(f"  {launch.id:<12} {ready.url}{bootstrap}  pid {ready.pid}  ready in {ready.startup_s:.1f} s")


async def _report_exit(process: EngineProcess, controller: Controller, say: Say) -> None:
    code = await process.wait()
    assert code is not None  # it was started here
    say(f"{process.id} (pid {process.pid}) ended with code {code}: {process.log_tail()}")
    await controller.exited(process.id, code)
