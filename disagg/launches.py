"""How the engines of this host are started: looks at the host, and turns settings into launches."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from disagg.config import Config, EngineSection
from disagg.engines import sglang
from disagg.engines.base import EngineLaunch
from disagg.engines.folder import model_hash
from disagg.errors import ConfigError, StartError
from disagg.model import MODES, EngineId, Role

DEMO_MODEL = Path(__file__).parent / "engines" / "embedded" / "demo_model"
KEY_VARIABLE = "DISAGG_ENGINE_API_KEY"
PYTHON_VARIABLE = "DISAGG_SGLANG_PYTHON"
"""What ``engine.sglang_python`` is where it is empty: an image with SGLang says with it where that is."""
EMBEDDED_KV_TOKENS, EMBEDDED_REQUESTS, EMBEDDED_CHUNK = 16384, 64, 512
FIRST_PORT, PORTS = 20000, 10000
"""Below the range from which the kernel gives ports to connections: an engine binds its own only when it has loaded its model."""
VERSION_LIMIT_S = 30.0
_SGLANG_ONLY = (
    *("sglang_python", "device", "dtype", "tp_size", "nodes", "node_rank", "dist_address", "mem_fraction", "transfer_backend", "ib_device"),
    *("kv_events", "role_switch", "bind", "i_know"),
)
"""What would do nothing for another engine."""
SOCKET_PATH_LIMIT = 100


class EngineSpec(msgspec.Struct, frozen=True):
    """One engine of this host, as configured.

    Attributes:
        gpus: those that it may see; empty means all.
        ib_device: its RDMA devices; empty means those of the ``[engine]`` section.
        numa: the NUMA nodes of its ranks.
        ports: HTTP and bootstrap; empty means free ones.
        args: handed to it as they are.
    """

    id: EngineId
    role: Role
    gpus: tuple[int, ...] = ()
    ib_device: str = ""
    numa: tuple[int, ...] = ()
    ports: tuple[int, ...] = ()
    args: tuple[str, ...] = ()


class Launches:
    """Makes launches. Its calls block for some ten milliseconds: they belong into a thread.

    Args:
        config: the sections engine and router count.
        advertise: the address of this host for the others.
        folder: below it each engine has a folder of its own.
        is_child: the engines end with this process.
        warn: told what people should know of the installed release, once.
    """

    def __init__(
        self, config: Config, advertise: str, folder: Path, *, is_child: bool, warn: Callable[[str], object] = lambda _: None
    ) -> None:
        self._config = config
        self._advertise = advertise
        self._folder = folder
        self._is_child = is_child
        self._warn = warn
        self._taken: dict[EngineId, tuple[int, int]] = {}
        self._attempts: dict[EngineId, int] = {}
        self._releases: dict[Path, sglang.Release] = {}

    def of(self, spec: EngineSpec, role: Role) -> EngineLaunch:
        """How to start an engine in a role, with a new API key.

        Raises:
            StartError: this host lacks what it needs.
            ConfigError: settings contradict each other.
        """
        folder = self._folder / spec.id
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)  # its sockets speak of prompts, and its log of settings
        except OSError as error:
            raise StartError(f"the engine {spec.id} cannot be started: {folder}: {error.strerror}") from error
        return self._sglang(spec, role, folder) if self._config.engine.engine == "sglang" else self._embedded(spec, role, folder)

    def settings(self, spec: EngineSpec, role: Role) -> tuple[str, ...]:
        """What `of` would configure now, to compare with how a running engine was started; takes no ports. Raises as `of`."""
        launch = self._sglang(spec, role, self._folder / spec.id, ports=(0, 0)) if self._config.engine.engine == "sglang" else None
        launch = launch or self._embedded(spec, role, self._folder / spec.id)
        return launch.settings or launch.argv

    def check(self, spec: EngineSpec) -> None:
        """Raises ConfigError for settings that cannot work on any host."""
        section = self._config.engine
        if section.engine == "sglang":
            sglang.check(self._wanted(spec, spec.role))
            return
        for name in _SGLANG_ONLY:
            value = getattr(section, name)
            if value != getattr(EngineSection(), name):
                raise ConfigError(
                    f'engine.{name} = {value!r} is for SGLang, and the engine is {section.engine}: set engine.engine = "sglang"'
                )

    # --- embedded

    def _embedded(self, spec: EngineSpec, role: Role, folder: Path) -> EngineLaunch:
        section = self._config.engine
        model, name = model_of(self._config)
        http, bootstrap = spec.ports or (0, 0)
        argv = [sys.executable, "-m", "disagg.engines.embedded"]
        argv += ["--model-path", model, "--served-model-name", name, "--host", self._advertise, "--port", str(http)]
        argv += ["--disaggregation-mode", MODES[role], "--disaggregation-bootstrap-port", str(bootstrap)]
        argv += ["--page-size", str(section.page_size), "--max-total-tokens", str(section.kv_pool_tokens or EMBEDDED_KV_TOKENS)]
        argv += ["--max-running-requests", str(section.max_running_requests or EMBEDDED_REQUESTS)]
        argv += ["--chunked-prefill-size", str(section.chunk_tokens or EMBEDDED_CHUNK)]
        # The second flag keeps a prefix cache on decode engines, without which they would have none after a flip to prefill.
        argv += [] if role is Role.UNIFIED else ["--enable-pd-role-switch", "--disaggregation-decode-enable-radix-cache"]
        argv += ["--ready-file", str(folder / "ready.json")]
        argv += [*(["--exit-with-parent"] if self._is_child else []), *section.engine_args, *spec.args]
        key = "" if self._is_child else _new_key()
        env = ({KEY_VARIABLE: key} if key else {}) | ({"CUDA_VISIBLE_DEVICES": ",".join(map(str, spec.gpus))} if spec.gpus else {})
        return EngineLaunch(spec.id, role, tuple(argv), env, folder / "log", folder / "ready.json", api_key=key)

    # --- SGLang

    def _sglang(self, spec: EngineSpec, role: Role, folder: Path, ports: tuple[int, int] | None = None) -> EngineLaunch:
        section = self._config.engine
        model = sglang.given((*section.engine_args, *spec.args), "--model-path") or ""
        model, name = (model, section.served_name or Path(model).name) if model else model_of(self._config)
        device = self._device(spec)
        python, shim = find_python(section.sglang_python, device, os.environ)
        known = self._release(python)
        http, bootstrap = ports or self._ports(spec, section.bind or self._advertise)
        wanted = msgspec.structs.replace(
            self._wanted(spec, role),
            python=python,
            shim=shim,
            model=model,
            served_name=name,
            port=http,
            bootstrap_port=bootstrap,
            folder=folder,
            sockets=_sockets(folder),
            api_key=_new_key(),
            device=device,
            backend=find_backend(section.transfer_backend, Path("/sys/class/infiniband")),
        )
        launch = sglang.launch(wanted, known, model_hash=_hash_of(model))
        setpriv = shutil.which("setpriv")
        if not self._is_child or setpriv is None:
            return launch
        return msgspec.structs.replace(launch, argv=(setpriv, "--pdeathsig", "KILL", "--", *launch.argv))

    def _wanted(self, spec: EngineSpec, role: Role) -> sglang.Wanted:
        """What the settings alone say of it."""
        section = self._config.engine
        return sglang.Wanted(
            id=spec.id,
            role=role,
            host=self._advertise,
            bind=section.bind,
            i_know=section.i_know,
            gpus=spec.gpus,
            numa=spec.numa,
            dtype=section.dtype,
            tp_size=section.tp_size,
            nodes=section.nodes,
            node_rank=section.node_rank,
            dist_address=section.dist_address,
            page_size=section.page_size,
            mem_fraction=section.mem_fraction,
            kv_pool_tokens=section.kv_pool_tokens,
            max_running_requests=section.max_running_requests,
            chunk_tokens=section.chunk_tokens,
            ib_device=spec.ib_device or section.ib_device,
            role_switch=section.role_switch,
            kv_events=section.kv_events,
            wait_s=self._config.router.first_token_timeout_s,
            args=(*section.engine_args, *spec.args),
            path=os.environ.get("PATH", os.defpath),
        )

    def _device(self, spec: EngineSpec) -> str:
        """Never the CPU by accident: who names GPUs has some, and then their driver is not there."""
        section = self._config.engine
        device = find_device(section.device, Path("/dev"))
        named = [name for name in ("gpus", "numa", "ib_device") if getattr(spec, name)]
        named += [name for name in ("ib_device", "mem_fraction") if getattr(section, name)]
        if device != "cpu" or section.device != "auto" or not named:
            return device
        raise StartError(
            f"the engine {spec.id} has {named[0]} set, and this host shows no GPU in /dev: check the driver with nvidia-smi, or set"
            " engine.device = cpu"
        )

    def _release(self, python: Path) -> sglang.Release:
        if python not in self._releases:
            self._releases[python] = found = sglang.release(read_version(python))
            if found.note:
                self._warn(found.note)
        return self._releases[python]

    def _ports(self, spec: EngineSpec, bind: str) -> tuple[int, int]:
        for port in filter(None, spec.ports):
            if not _is_free(bind, port):
                raise StartError(
                    f"the engine {spec.id} cannot be started: port {port} on {bind} is taken by another program; stop that, or give the"
                    " engine other `ports` in its entry of [[engines]]"
                )
        free = self._free_ports(spec.id, bind)
        try:
            http, bootstrap = (port or next(free) for port in spec.ports or (0, 0))
        except RuntimeError:  # what a StopIteration becomes in there
            raise StartError(f"the engine {spec.id} cannot be started: no port from {FIRST_PORT} on is free at {bind}") from None
        self._taken[spec.id] = http, bootstrap
        return http, bootstrap

    def _free_ports(self, engine: EngineId, bind: str) -> Iterator[int]:
        """Other ones at each start: those of the last may have been what it died of."""
        self._attempts[engine] = attempt = self._attempts.get(engine, 0) + 1
        others = {p for e, ports in self._taken.items() if e != engine for p in ports}
        first = zlib.crc32(f"{engine} {attempt}".encode()) % PORTS
        candidates = (FIRST_PORT + (first + i) % PORTS for i in range(PORTS))
        return (p for p in candidates if p not in others and _is_free(bind, p))


def _new_key() -> str:
    """Hex: a key that began with a dash would be taken for a flag where it is an argument."""
    return secrets.token_hex(24)


def model_of(config: Config) -> tuple[str, str]:
    """The model's folder, or a name that SGLang looks up, and the name under which it is served.

    Raises:
        StartError: it is no model folder.
    """
    section = config.engine
    if not section.model:
        return str(DEMO_MODEL), section.served_name or "demo"
    folder = Path(section.model)
    try:
        is_model, exists = (folder / "config.json").is_file(), folder.exists()
    except OSError as error:  # above all: a folder that is closed to the user as whom the units run
        raise _unreadable(folder, error) from error
    if is_model:
        return str(folder.absolute()), section.served_name or folder.resolve().name
    if section.engine == "sglang" and not exists and re.fullmatch(r"[\w.-]+/[\w.-]+", section.model):
        return section.model, section.served_name or folder.name
    what = "has no config.json" if exists else "is not there"
    raise StartError(f"the model folder {folder} {what}: give a Hugging Face folder with --model")


def _hash_of(model: str) -> str:
    folder = Path(model)
    try:
        return model_hash(folder) if folder.is_dir() else ""
    except StartError:
        return ""  # not in the safetensors format: SGLang reads others, too
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: OSError) -> StartError:
    return StartError(f"the model folder {folder} cannot be read: {error.strerror}; open it to the user who runs disagg")


def find_device(device: str, devices: Path) -> str:
    """What SGLang is to compute on: ``cpu``, a name, or empty for its own choice among the accelerators that are there."""
    if device != "auto":
        return device
    patterns = ("nvidia[0-9]*", "kfd", "davinci[0-9]*", "accel/accel[0-9]*")
    return "" if any(next(devices.glob(pattern), None) for pattern in patterns) else "cpu"


def find_backend(backend: str, infiniband: Path) -> str:
    """How KV caches travel: RDMA where the host has a device for it."""
    if backend != "auto":
        return backend
    return "mooncake" if infiniband.is_dir() and any(infiniband.iterdir()) else "mooncake-tcp"


def find_python(given: str, device: str, environ: Mapping[str, str]) -> tuple[Path, Path | None]:
    """The Python in which SGLang is installed, and the folder with which its CUDA build runs on a CPU, None where that is not needed.

    Args:
        given: its path, or a name to look up on the PATH; where it is empty, DISAGG_SGLANG_PYTHON says the same.
        device: as `find_device` gives it.
        environ: of this process.

    Raises:
        StartError: there is none.
    """
    name = "engine.sglang_python" if given else PYTHON_VARIABLE
    given = given or environ.get(PYTHON_VARIABLE) or ""
    if given:
        found = shutil.which(Path(given).expanduser(), path=environ.get("PATH"))
        if found is None:
            raise StartError(f"{name} = {given!r} is not a program: give the path of the Python in which SGLang is installed")
        python = Path(found).absolute()
        return python, _shim_of(python, device)
    if importlib.util.find_spec("sglang") is not None:
        return Path(sys.executable), None
    if device == "cpu":
        made = environ.get("DISAGG_SGLANG_CPU") or ""
        cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "disagg"
        for folder in [Path(made)] if made else sorted(cache.glob("sglang-cpu-*"), reverse=True):
            if (folder / ".disagg").is_file():
                return folder / "bin" / "python", _shim_of(folder / "bin" / "python", device)
    how = "run scripts/install-sglang-cpu, which makes it for a CPU" if device == "cpu" else "install it as docs/gpu.md says"
    raise StartError(f"SGLang is not installed in {sys.executable}: {how}, or set engine.sglang_python to the Python that has it")


def _shim_of(python: Path, device: str) -> Path | None:
    shim = python.parent.parent / "disagg-shim"
    return shim if device == "cpu" and shim.is_dir() else None


def read_version(python: Path) -> str:
    """The release of SGLang that is installed for a Python. Starts it, which takes some ten milliseconds; SGLang is not loaded.

    Raises:
        StartError: it has none.
    """
    program = "import importlib.metadata as m; print(m.version('sglang'))"
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=VERSION_LIMIT_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StartError(f"{python} cannot be asked for its SGLang: {error}") from error
    if done.returncode:
        raise StartError(f"SGLang is not installed for {python}: install it there, or set engine.sglang_python to the Python that has it")
    return done.stdout.strip()


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: what only waits to be forgotten is free
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _sockets(folder: Path) -> Path:
    """Where the engine's Unix sockets go: its own folder, or one with a shorter path, because the kernel takes no long ones.

    Raises:
        StartError: the shorter one belongs to somebody else.
    """
    limit = SOCKET_PATH_LIMIT - len("/kv-replay")
    if len(str(folder)) <= limit:
        return folder
    near = folder.parent.parent / "s" / f"{zlib.crc32(folder.name.encode()):08x}"  # units have a /tmp of their own each
    if len(str(near)) <= limit:
        near.mkdir(mode=0o700, parents=True, exist_ok=True)
        return near
    short = Path(f"/tmp/disagg-{os.getuid()}-{zlib.crc32(str(folder).encode()):08x}")  # noqa: S108  # made and looked at below
    with contextlib.suppress(FileExistsError):
        short.mkdir(mode=0o700)
    found = short.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o77 or not stat.S_ISDIR(found.st_mode):
        raise StartError(f"{short} is not this user's alone: remove it, or choose a --state-dir with a shorter path")
    return short
