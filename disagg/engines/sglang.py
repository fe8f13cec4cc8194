"""How a SGLang engine is started: from settings to its command and its environment. Pure; the process is somebody else's business.

What disagg passes is kept to what it must decide: where the engine listens, its role, how KV caches travel, how its prefix cache is
published, and the timeouts that have to agree with the router's. Everything else is SGLang's own default, or the operator's
``engine_args``, which stand last and win.

A live role switch (``/pd_role_switch``) works where every engine is started for both roles: ``--disaggregation-decode-enable-radix-cache``
stands on prefill engines too. Without it an engine that was switched to decode ends at its next idle check with "pool memory leak
detected" (seen with 0.5.23). Where the operator asks for what cannot be switched (`_NOT_SWITCHABLE`), the engine is started without the
feature and a flip restarts it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from disagg.engines.base import EngineLaunch, KvSource
from disagg.errors import ConfigError
from disagg.model import MODES, EngineId, Role

NEWEST_TRIED = (0, 5, 23)
_ZEROS = re.compile(r"0[x0]*(\.0[x0]*){0,3}")
"""``0`` and ``0.0`` are ways to write 0.0.0.0."""
MIN_EVENT_PAGE = 16
"""Smaller blocks make an event for every few tokens: the stream then costs more than what it is good for."""
CPU_KV_TOKENS = 16384
HEARTBEAT_S = 2
HEARTBEAT_FAILURES = 2
DEFERRED_RELEASE_S = 30
"""How long a decode engine keeps pages that a prefill engine, now dead, may still be writing into."""


class Release(msgspec.Struct, frozen=True):
    """What a release of SGLang can do.

    Attributes:
        version: as the package says it, for people.
        role_switch: it has ``/pd_role_switch``.
        decode_cache: it has ``--disaggregation-decode-enable-radix-cache``.
        kv_events: it publishes them in the form that disagg reads: maps with a ``type``.
        retraction: it has ``--disaggregation-decode-retraction-backup``.
        note: what people should know before they rely on it; empty for nothing.
    """

    version: str
    role_switch: bool
    decode_cache: bool
    kv_events: bool
    retraction: bool
    note: str = ""


OLDEST = (0, 5, 8)
"""The first with ``/v1/loads``, by which disagg sees whether an engine gets on."""
_SINCE: Mapping[str, tuple[int, ...]] = {
    "decode_cache": (0, 5, 11),
    "retraction": (0, 5, 18),
    "kv_events": (0, 5, 20),
    "role_switch": (0, 5, 21),
}
"""From which release on; found by reading the releases' sources. Only 0.5.23 was run."""


def release(version: str) -> Release:
    """What a release can do. An unknown newer one is taken for the newest that was tried, with a note.

    Args:
        version: as ``importlib.metadata`` gives it, for example ``0.5.23`` or ``0.5.24.post1``.

    Raises:
        ConfigError: it is older than what disagg can drive.
    """
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if number < OLDEST:
        raise ConfigError(f"SGLang {version} is too old: disagg drives {_text(OLDEST)} and newer, {_text(NEWEST_TRIED)} was tried")
    note = f"SGLang {version} is newer than {_text(NEWEST_TRIED)}, the newest that disagg was tried with" if number > NEWEST_TRIED else ""
    return Release(version, note=note, **{name: number >= since for name, since in _SINCE.items()})


def _text(number: Sequence[int]) -> str:
    return ".".join(map(str, number))


class Wanted(msgspec.Struct, frozen=True):
    """One engine, as it is wanted. Sizes in tokens, times in seconds; zeros and empty strings leave the choice to SGLang.

    Attributes:
        host: where the other hosts reach it; and `bind`, where it listens, empty for the same.
        python: of the environment in which SGLang is installed.
        model: a folder, or a name that SGLang looks up itself.
        i_know: a wildcard bind is allowed.
        folder: the engine's own, for its key and its log; and `sockets`, a short one that only this user may look into.
        shim: a folder that must come first on PYTHONPATH; None for none.
        device: ``cpu``, or what SGLang's ``--device`` takes; empty for its own choice.
        nodes, node_rank, dist_address: of an engine over several hosts; `dist_address` is HOST:PORT of the first one.
        backend: ``mooncake``, ``mooncake-tcp``, ``nixl`` or ``mori``.
        path: the host's PATH; compilers that SGLang calls lie beside its Python.
        wait_s: how long a request may wait for its peer: as long as the router does.
        args: the operator's, which win.
    """

    id: EngineId
    role: Role
    host: str
    python: Path = Path("python3")
    model: str = ""
    served_name: str = ""
    port: int = 0
    bootstrap_port: int = 0
    folder: Path = Path()
    sockets: Path = Path()
    api_key: str = ""
    bind: str = ""
    i_know: bool = False
    shim: Path | None = None
    device: str = ""
    gpus: tuple[int, ...] = ()
    numa: tuple[int, ...] = ()
    dtype: str = ""
    tp_size: int = 1
    nodes: int = 1
    node_rank: int = 0
    dist_address: str = ""
    page_size: int = 16
    mem_fraction: float = 0.0
    kv_pool_tokens: int = 0
    max_running_requests: int = 0
    chunk_tokens: int = 0
    backend: str = "mooncake"
    ib_device: str = ""
    role_switch: bool = True
    kv_events: bool = True
    wait_s: float = 60.0
    path: str = ""
    args: tuple[str, ...] = ()

    @property
    def on_cpu(self) -> bool:
        """No accelerator computes."""
        return self.device == "cpu"


def launch(wanted: Wanted, known: Release, model_hash: str = "") -> EngineLaunch:
    """How to start it.

    Raises:
        ConfigError: settings contradict each other, or ask for what is not safe.
    """
    check(wanted)
    wanted = _as_given(wanted)
    source = _kv_source(wanted, known)
    hide = bool(wanted.api_key) and not given(wanted.args, "--config")  # it takes only one such file
    key_path = wanted.folder / "key.yaml"
    key_args = _flag("--config", str(key_path)) if hide else _flag("--api-key", wanted.api_key)
    settings = (*_settings(wanted, known), *_events_args(source))
    places = (*_flag("--port", wanted.port), *(() if wanted.role is Role.UNIFIED else _flag(_BOOTSTRAP, wanted.bootstrap_port)))
    command = (str(wanted.python), "-m", "sglang.launch_server")
    env = _environment(wanted)
    return EngineLaunch(
        wanted.id,
        wanted.role,
        argv=(*command, *settings, *places, *key_args, *wanted.args),
        env=env,
        log_file=wanted.folder / "log",
        url=f"http://{f'[{wanted.host}]' if ':' in wanted.host else wanted.host}:{wanted.port}",
        bootstrap_port=0 if wanted.role is Role.UNIFIED else wanted.bootstrap_port,
        api_key=wanted.api_key,
        secret_files=((key_path, f"api-key: {wanted.api_key}\n"),) if hide else (),
        settings=(*(f"{name}={value}" for name, value in env.items() if name != "PATH"), *command, *settings, *wanted.args),
        kv_events=source,
        model_hash=model_hash,
        part=wanted.node_rank,
        parts=wanted.nodes,
    )


_BOOTSTRAP = "--disaggregation-bootstrap-port"


def _as_given(wanted: Wanted) -> Wanted:
    """With what ``engine_args`` say of where the engine is: they win, and others must find it there."""
    host = given(wanted.args, "--host") or ""
    return msgspec.structs.replace(
        wanted,
        host=wanted.host if not host or is_wildcard(host) else host,
        bind=host or wanted.bind,
        port=_number(wanted, "--port", wanted.port),
        bootstrap_port=_number(wanted, _BOOTSTRAP, wanted.bootstrap_port),
        api_key=given(wanted.args, "--api-key") or wanted.api_key,
    )


def _number(wanted: Wanted, flag: str, otherwise: int) -> int:
    text = given(wanted.args, flag)
    if text is None:
        return otherwise
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ConfigError(f"the engine_args of {wanted.id} say {flag} {text or 'without a number'}: write a port")
    return int(text)


def check(wanted: Wanted) -> None:
    """Raises ConfigError for settings that contradict each other, or ask for what is not safe."""
    short = next((f"{word}: write {flag}" for word in wanted.args if (flag := _abbreviates(word))), "")
    if short:
        raise ConfigError(f"the engine_args of {wanted.id} hold {short}, which disagg must be able to read")
    listens = given(wanted.args, "--host") or wanted.bind or wanted.host
    if is_wildcard(listens) and not wanted.i_know:
        raise ConfigError(
            f"the engine {wanted.id} would listen on every address ({listens or 'empty'}): its bootstrap and transfer ports ask nobody who"
            " they are, so bind it to the cluster's address, or say engine.i_know = true"
        )
    page = given(wanted.args, "--page-size") or str(wanted.page_size)
    if wanted.kv_events and page.isdecimal() and int(page) < MIN_EVENT_PAGE:
        raise ConfigError(
            f"engine.page_size = {page} is too small for KV events: write {MIN_EVENT_PAGE} or more, or engine.kv_events = false"
        )
    if wanted.gpus and wanted.tp_size > len(wanted.gpus) * wanted.nodes:
        raise ConfigError(
            f"the engine {wanted.id} has tp_size = {wanted.tp_size} but sees {len(wanted.gpus)} GPUs on {wanted.nodes} host"
            f"{'s' * (wanted.nodes > 1)}: give it as many GPUs as ranks"
        )
    if wanted.gpus and wanted.numa and len(wanted.gpus) != len(wanted.numa):
        raise ConfigError(
            f"the engine {wanted.id} has {len(wanted.gpus)} GPUs and {len(wanted.numa)} NUMA nodes: give one node for each GPU"
        )
    if wanted.nodes > 1 and not wanted.dist_address:
        raise ConfigError(f"the engine {wanted.id} spans {wanted.nodes} hosts: engine.dist_address must say HOST:PORT of its first one")
    if wanted.node_rank >= wanted.nodes:
        ranks = f"{wanted.nodes} hosts have the ranks 0 to {wanted.nodes - 1}" if wanted.nodes > 1 else "an engine on one host has rank 0"
        raise ConfigError(f"engine.node_rank = {wanted.node_rank} is not allowed: {ranks}")


_OURS = frozenset(
    {"--host", "--port", "--disaggregation-bootstrap-port", "--disaggregation-mode", "--api-key", "--model-path", "--nnodes", "--node-rank"}
)
"""What disagg must know of an engine. It reads them out of ``engine_args``, too, but only where they are written in full."""
_SHORTEST = 5


def _abbreviates(word: str) -> str:
    """The flag of `_OURS` of which this is a beginning: SGLang's parser takes that for the flag. Empty for none."""
    name = word.partition("=")[0]
    if len(name) < _SHORTEST or name in _OURS or not name.startswith("--"):
        return ""
    return next((flag for flag in sorted(_OURS) if flag.startswith(name) and name != "--model"), "")


def is_wildcard(address: str) -> bool:
    """Whether who binds there listens on every address, in any of the ways to write that."""
    bare = address.strip().removeprefix("[").removesuffix("]")
    if bare in {"", "*"} or _ZEROS.fullmatch(bare.lower()):
        return True
    try:
        found = ipaddress.ip_address(bare)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return found.is_unspecified or (mapped is not None and mapped.is_unspecified)


def _settings(wanted: Wanted, known: Release) -> tuple[str, ...]:
    return (
        *("--model-path", wanted.model, "--served-model-name", wanted.served_name, "--host", wanted.bind or wanted.host),
        *("--page-size", str(wanted.page_size), "--log-level-http", "warning"),  # else a line for each look at it, four a second
        *_flag("--dtype", wanted.dtype or ("float32" if wanted.on_cpu else "")),
        *_flag("--mem-fraction-static", wanted.mem_fraction),
        *_flag("--max-total-tokens", wanted.kv_pool_tokens or (CPU_KV_TOKENS if wanted.on_cpu else 0)),
        *_flag("--max-running-requests", wanted.max_running_requests),
        *_flag("--chunked-prefill-size", wanted.chunk_tokens),
        *_flag("--tp-size", wanted.tp_size if wanted.tp_size > 1 else 0),
        *(("--numa-node", *map(str, wanted.numa)) if wanted.numa else ()),  # node 0 alone is a choice, too
        *(_flag("--device", wanted.device)),
        *(_CPU_ARGS if wanted.on_cpu else ()),
        *_several_hosts(wanted),
        *_roles(wanted, known),
    )


_CPU_ARGS = (
    *("--attention-backend", "torch_native", "--sleep-on-idle"),  # asleep an idle engine costs nothing
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
)


def _several_hosts(wanted: Wanted) -> tuple[str, ...]:
    if wanted.nodes == 1:
        return ()
    return ("--nnodes", str(wanted.nodes), "--node-rank", str(wanted.node_rank), "--dist-init-addr", wanted.dist_address)


def _roles(wanted: Wanted, known: Release) -> tuple[str, ...]:
    if wanted.role is Role.UNIFIED:
        return ()
    cached = known.decode_cache and not any(_demands(wanted.args, *flag) for flag in _NO_DECODE_CACHE)
    return (
        *("--disaggregation-mode", MODES[wanted.role], "--disaggregation-transfer-backend", wanted.backend.partition("-")[0]),
        *_flag("--disaggregation-ib-device", wanted.ib_device),
        *(("--disaggregation-decode-retraction-backup", "cpu_tensor") if wanted.on_cpu and known.retraction else ()),
        *(("--disaggregation-decode-enable-radix-cache",) if cached else ()),
        *(("--enable-pd-role-switch",) if can_switch(wanted, known) else ()),
    )


def can_switch(wanted: Wanted, known: Release) -> bool:
    """Whether the engine is started so that its role can be switched while it runs."""
    asked = wanted.role_switch and known.role_switch and wanted.role is not Role.UNIFIED and wanted.nodes == 1
    backend = given(wanted.args, "--disaggregation-transfer-backend") or wanted.backend
    return asked and backend in _SWITCHABLE_BACKENDS and not any(_demands(wanted.args, *flag) for flag in _NOT_SWITCHABLE)


_SWITCHABLE_BACKENDS = frozenset({"mooncake", "mooncake-tcp", "mooncake_tcp", "mori"})
_NO_DECODE_CACHE: tuple[tuple[str, str], ...] = (
    ("--disable-radix-cache", ""),
    ("--enable-hisparse", ""),
    ("--speculative-algorithm", ""),
    ("--disaggregation-decode-allocation-policy", "early"),
)
"""With these a decode engine refuses a prefix cache, or may."""
_NOT_SWITCHABLE: tuple[tuple[str, str], ...] = (
    ("--ep-size", "1"),
    ("--ep", "1"),
    ("--expert-parallel-size", "1"),
    ("--moe-a2a-backend", "none"),
    ("--pp-size", "1"),
    ("--pipeline-parallel-size", "1"),
    ("--dcp-size", "1"),
    ("--decode-context-parallel-size", "1"),
    ("--speculative-algorithm", ""),
    ("--enable-dp-attention-local-control-broadcast", ""),
    ("--enable-hisparse", ""),
    ("--disaggregation-decode-host-receive-threshold", "1.0"),
    ("--disaggregation-decode-allocation-policy", "early"),
)
"""Flags with which SGLang refuses to start for live switches, each with the value that is no demand."""


def _demands(args: Sequence[str], flag: str, harmless: str) -> bool:
    value = given(args, flag)
    return value is not None and (not harmless or value != harmless)


def given(args: Sequence[str], flag: str) -> str | None:
    """The last value of a flag in an engine's arguments; empty for one without a value, None where it does not stand there."""
    found = None
    for i, word in enumerate(args):
        name, equals, value = word.partition("=")
        if name == flag:
            following = args[i + 1] if i + 1 < len(args) else ""
            found = value if equals else "" if following.startswith("--") else following
    return found


def _kv_source(wanted: Wanted, known: Release) -> KvSource | None:
    """Over Unix sockets: the events hold the prompts' tokens, and only this user may read there."""
    ranks = given(wanted.args, "--dp-size") or given(wanted.args, "--dp") or given(wanted.args, "--data-parallel-size") or "1"
    taken = given(wanted.args, "--kv-events-config") is not None
    if not wanted.kv_events or not known.kv_events or ranks != "1" or taken or wanted.node_rank:
        return None  # a Unix socket has no number that SGLang could add a data-parallel rank to
    return KvSource(f"ipc://{wanted.sockets / 'kv'}", f"ipc://{wanted.sockets / 'kv-replay'}")


def _events_args(source: KvSource | None) -> tuple[str, ...]:
    if source is None:
        return ()
    config = {"publisher": "zmq", "topic": "", "endpoint": source.events, "replay_endpoint": source.replay}
    return ("--kv-events-config", msgspec.json.encode(config).decode())


def _environment(wanted: Wanted) -> dict[str, str]:
    """SGLang's own timeouts are 300 s: a request whose peer died would hold its pages for that long after the router gave it up."""
    wait = str(max(1, round(wanted.wait_s)))
    env = {
        "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": wait,
        "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": wait,
        "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": str(HEARTBEAT_S),
        "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": str(HEARTBEAT_FAILURES),
        "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE": "1",
        "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT": str(DEFERRED_RELEASE_S),
        "SGL_FORCE_SHUTDOWN": "1",  # SIGTERM: the agent has drained it, and its own drain has no limit
        "SGLANG_HOST_IP": wanted.host,  # else Mooncake announces the address of whatever interface it finds first
        "PATH": f"{wanted.python.parent}:{wanted.path}",
        "PYTHONUNBUFFERED": "1",
    }
    if wanted.backend == "mooncake-tcp":
        env["MC_FORCE_TCP"] = "1"
    if wanted.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, wanted.gpus))
    if wanted.on_cpu:
        env["SGLANG_USE_CPU_ENGINE"] = "1"
    if wanted.shim is not None:
        env["PYTHONPATH"] = str(wanted.shim)
    return env


def _flag(name: str, *values: object) -> tuple[str, ...]:
    """A flag with its values; nothing where all of them are empty or zero."""
    return (name, *map(str, values)) if any(values) else ()
