"""disagg.toml and the flags, read once into frozen structs. Pure: the caller reads the file.

Every setting stands once, as a field with its default and one sentence. The flags of the command line, the texts of ``--help``, the checks
and ``disagg check`` are made from these fields. Units are in the names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
import tomli

from disagg.errors import ConfigError
from disagg.model import EngineAddress, EngineId, Role


def _doc(text: str, *, flag: str | None = None, **limits: Any) -> msgspec.Meta:
    return msgspec.Meta(description=text, extra={"flag": flag}, **limits)


_Where = Callable[[str, str], str]  # section, key -> where it was written, for errors
_HOST = re.compile(r"[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(%\w+)?|[\w-]{1,63}(\.[\w-]{1,63})*\.?", re.ASCII)  # IPv6, or names and IPv4
HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_MANY = 1_000_000_000

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class ClusterSection(msgspec.Struct, frozen=True):
    """How this host takes part in the cluster."""

    join: Annotated[str, _doc("The router's control address, HOST:PORT; for every host but the router.")] = ""
    name: Annotated[str, _doc("This host's name, unique in the cluster; empty means the machine's name and the role.")] = ""
    advertise: Annotated[
        str, _doc("The address at which other hosts reach this one's engines; empty means that of the route to the router.")
    ] = ""
    heartbeat_interval_s: Annotated[float, _doc("How often hosts report; the router tells them.", ge=0.05, le=0.4)] = 0.25
    drain_timeout_s: Annotated[
        _Seconds, _doc("After SIGTERM, a drain or before a flip: how long requests may take to finish; then they go on on other engines.")
    ] = 30.0


class RouterSection(msgspec.Struct, frozen=True):
    """The router."""

    http: Annotated[str, _doc("Where clients are served, HOST:PORT.")] = "127.0.0.1:8000"
    admin: Annotated[str, _doc("Where metrics and the admin API are served, HOST:PORT; keep it on loopback.")] = "127.0.0.1:8001"
    control: Annotated[str, _doc("Where hosts join, HOST:PORT; encrypted and authenticated always.")] = "0.0.0.0:7400"
    prefill: Annotated[tuple[str, ...], _doc("A prefill engine that runs already: URL,BOOTSTRAP_PORT. Repeatable.")] = ()
    decode: Annotated[tuple[str, ...], _doc("A decode engine that runs already: URL. Repeatable.")] = ()
    unified: Annotated[tuple[str, ...], _doc("A unified engine that runs already: URL. Repeatable.")] = ()
    body_limit_mib: Annotated[int, _doc("Largest request body; more is a 413.", ge=1, le=1024)] = 16
    queue_timeout_s: Annotated[_Seconds, _doc("How long a request waits for engines before it is refused.")] = 10.0
    connections_per_address: Annotated[
        int, _doc("Connections that one client address (of IPv6 one /64 network) may have; loopback may have any number.", ge=1, le=_MANY)
    ] = 256
    connect_timeout_s: Annotated[_Seconds, _doc("How long connecting to an engine may take.")] = 2.0
    first_token_timeout_s: Annotated[_Seconds, _doc("How long a stream may take to begin.")] = 60.0
    whole_answer_timeout_s: Annotated[_Seconds, _doc("How long an answer that is no stream may take to be complete.")] = 600.0
    between_tokens_timeout_s: Annotated[_Seconds, _doc("How long a stream may pause.")] = 60.0
    probe_interval_s: Annotated[_Seconds, _doc("How often a ready engine is looked at.")] = 1.0
    probe_timeout_s: Annotated[_Seconds, _doc("How long an engine may take to answer such a look.")] = 2.0


class EngineSection(msgspec.Struct, frozen=True):
    """Defaults of the engines that are started on this host."""

    engine: Annotated[str, _doc("Which engine: embedded (comes with disagg) or sglang.", pattern=r"^(embedded|sglang)\Z")] = "embedded"
    model: Annotated[
        str, _doc("A Hugging Face folder, or with sglang a name that it looks up; empty means the demo model that comes with disagg.")
    ] = ""
    served_name: Annotated[str, _doc("The model's name for clients; empty means `demo`, or the folder's name.")] = ""
    page_size: Annotated[int, _doc("Tokens in a page of the KV pool; at least 16 where KV events are on.", ge=1, le=1024)] = 16
    kv_pool_tokens: Annotated[
        int, _doc("Size of an engine's KV pool, in tokens; 0 means 16384 on a CPU, else what its memory holds.", ge=0, le=_MANY)
    ] = 0
    max_running_requests: Annotated[
        int, _doc("Requests that an engine decodes at once; 0 means 64 for embedded, else the engine's choice.", ge=0, le=_MANY)
    ] = 0
    chunk_tokens: Annotated[
        int, _doc("Prompt tokens that an engine reads in one step; 0 means 512 for embedded, else the engine's choice.", ge=0, le=_MANY)
    ] = 0
    sglang_python: Annotated[
        str,
        _doc(
            "The Python that has SGLang; empty means DISAGG_SGLANG_PYTHON, disagg's own, or that of scripts/install-sglang-cpu.",
            flag="--sglang-python",
        ),
    ] = ""
    device: Annotated[
        str, _doc("auto, or what SGLang's --device takes; auto means cpu on a host without an accelerator.", pattern=r"^[a-z]+\Z")
    ] = "auto"
    dtype: Annotated[str, _doc("Precision of weights and KV; empty means the model's own, float32 on a CPU.", pattern=r"^\w*\Z")] = ""
    tp_size: Annotated[int, _doc("Tensor parallelism: GPUs of one engine, over all of its hosts.", ge=1, le=1024)] = 1
    nodes: Annotated[int, _doc("Hosts of one engine; each runs its part under the same settings but node_rank.", ge=1, le=256)] = 1
    node_rank: Annotated[int, _doc("Which of them this host is; 0 is the one that serves.", ge=0, le=255)] = 0
    dist_address: Annotated[str, _doc("HOST:PORT on the first of them, where they meet.")] = ""
    mem_fraction: Annotated[float, _doc("Share of GPU memory for weights and KV pool; 0 means the engine's choice.", ge=0, lt=1)] = 0.0
    transfer_backend: Annotated[
        str,
        _doc(
            "How KV caches travel: mooncake (RDMA), mooncake-tcp, nixl or mori; auto is mooncake where there is RDMA, else -tcp.",
            pattern=r"^(auto|mooncake|mooncake-tcp|nixl|mori)\Z",
        ),
    ] = "auto"
    ib_device: Annotated[str, _doc("RDMA devices for the KV transfer, for example mlx5_0,mlx5_1; empty means the engine's choice.")] = ""
    kv_events: Annotated[bool, _doc("Engines tell what their prefix cache holds.")] = True
    role_switch: Annotated[bool, _doc("Engines are started so that a flip need not restart them, where the release can.")] = True
    bind: Annotated[str, _doc("Where engines listen; empty means the advertised address.")] = ""
    i_know: Annotated[
        bool, _doc("Allows engines to listen on every address, although their bootstrap and transfer ports ask nobody who they are.")
    ] = False
    engine_args: Annotated[tuple[str, ...], _doc("Handed to the engine as it is. Repeatable.", flag="--engine-arg")] = ()
    attach: Annotated[str, _doc("Watch an engine that runs already, URL or URL,BOOTSTRAP_PORT, instead of starting one.")] = ""
    supervise: Annotated[
        str,
        _doc(
            "child: engines are processes of the agent, which outlive only its death; systemd: units of their own, which outlive its stop.",
            pattern=r"^(child|systemd)\Z",
        ),
    ] = "child"
    start_timeout_s: Annotated[_Seconds, _doc("How long an engine may take to start.")] = 600.0
    stop_timeout_s: Annotated[_Seconds, _doc("How long an engine may take to end after SIGTERM.")] = 10.0
    hang_kill_s: Annotated[
        _Seconds, _doc("An engine that makes no progress under work for so long, and fails a probe, is killed and started anew.")
    ] = 60.0


class EngineEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine of a host with several: an entry of ``[[engines]]``.

    Attributes:
        name: its id is the host's name, a dash, and this.
        role: empty means the host's.
        gpus: the GPUs that it may see; empty means all.
        ib_device: instead of that of ``[engine]``.
        numa: the NUMA node of each of its GPUs; SGLang only.
        ports: its HTTP port and its bootstrap port; empty means free ones.
        engine_args: after those of ``[engine]``.
    """

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")]
    role: Role | None = None
    gpus: tuple[Annotated[int, msgspec.Meta(ge=0, le=255)], ...] = ()
    ib_device: str = ""
    numa: tuple[Annotated[int, msgspec.Meta(ge=0, le=255)], ...] = ()
    ports: tuple[Annotated[int, msgspec.Meta(ge=0, le=65535)], ...] = ()
    engine_args: tuple[str, ...] = ()


class SloSection(msgspec.Struct, frozen=True):
    """What is promised to clients."""

    ttft_s: Annotated[
        _Seconds, _doc("Who would wait longer than this for a first token, because of those before it, is sent away at once.")
    ] = 10.0
    itl_s: Annotated[_Seconds, _doc("How long a step of a decode engine may take; says how many answers one can write at once.")] = 0.1


class PolicySection(msgspec.Struct, frozen=True):
    """Which engines do what."""

    flips: Annotated[
        str,
        _doc(
            "auto: engines are moved between prefill and decode as the load changes; advise: it is only said; off: never.",
            pattern=r"^(auto|advise|off)\Z",
        ),
    ] = "auto"
    speed: Annotated[
        float,
        _doc("How many times as fast the load is watched and engines are moved; for trials.", flag="--policy-speed", ge=0.1, le=1000),
    ] = 1.0
    measure_at_start: Annotated[
        bool, _doc("Engines that are idle when they come read and write a little of their own, so that it is known how fast they are.")
    ] = True
    unified_share: Annotated[
        float, _doc("Share of requests that go to unified engines where pairs are there, too, to compare them.", ge=0.0, le=1.0)
    ] = 0.0


class SecuritySection(msgspec.Struct, frozen=True):
    """Keys and tokens."""

    state_dir: Annotated[str, _doc("Where keys, tokens and registrations are kept; empty means DISAGG_STATE_DIR or the usual place.")] = ""
    key_file: Annotated[
        str, _doc("A file that holds this router's or host's key pair; without it, or with an empty one, that of the state directory.")
    ] = ""
    token_file: Annotated[str, _doc("A file that holds the token to join with; an empty one, or one that is gone, is no token.")] = ""


class ObserveSection(msgspec.Struct, frozen=True):
    """Logs."""

    log_level: Annotated[str, _doc("debug, info, warning or error.", pattern=r"^(debug|info|warning|error)\Z")] = "info"
    log_format: Annotated[str, _doc("text, json, or auto: text on a terminal.", pattern=r"^(auto|text|json)\Z")] = "auto"


class Config(msgspec.Struct, frozen=True):
    """Everything that can be set."""

    cluster: ClusterSection = ClusterSection()
    router: RouterSection = RouterSection()
    engine: EngineSection = EngineSection()
    engines: tuple[EngineEntry, ...] = ()
    slo: SloSection = SloSection()
    policy: PolicySection = PolicySection()
    security: SecuritySection = SecuritySection()
    observe: ObserveSection = ObserveSection()


class Setting(msgspec.Struct, frozen=True):
    """One setting, as flags and ``disagg check`` need it."""

    section: str
    key: str
    type: Any
    default: Any
    text: str
    flag: str


def settings(*sections: str) -> list[Setting]:
    """The settings of these sections, in the order of the file."""
    return [s for name in sections for s in _settings_of(name, _SECTIONS[name])]


def _settings_of(section: str, kind: type[msgspec.Struct]) -> list[Setting]:
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in msgspec.structs.fields(kind):
        metas = [m for m in get_args(hints[field.name])[1:] if isinstance(m, msgspec.Meta)]
        doc = next(m for m in metas if m.description)
        flag = (doc.extra or {}).get("flag") or "--" + field.name.replace("_", "-")
        found.append(Setting(section, field.name, hints[field.name], field.default, doc.description or "", flag))
    return found


_SECTIONS: dict[str, type[msgspec.Struct]] = {
    name: hint for name, hint in get_type_hints(Config).items() if isinstance(hint, type) and issubclass(hint, msgspec.Struct)
}


def parse_config(text: str, *, file: str, flags: Mapping[str, Mapping[str, Any]] | None = None) -> Config:
    """Makes a config out of the text of a file and of flags, which win.

    Args:
        text: TOML; empty for no file.
        file: its name, for errors.
        flags: section -> key -> value.

    Raises:
        ConfigError: one sentence with file, key, value, what is allowed, and the nearest valid name.
    """
    try:
        given = tomli.loads(text)
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: endless integers and endless nesting are these
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    sections: dict[str, msgspec.Struct] = {}
    engines = _engine_entries(given.pop(_LIST, []), f"{_where(file, text, _LIST)}: [[{_LIST}]]")
    for name, values in given.items():
        if name not in _SECTIONS:
            raise ConfigError(f"{_where(file, text, name)}: there is no section [{_name(name)}]; {_nearest(name, _NAMES)}")
        if not isinstance(values, dict):
            raise ConfigError(
                f"{_where(file, text, name)}: {name} = {_value(values)} stands outside a section; {name} is a section, write [{name}]"
            )

    def in_file(section: str, key: str) -> str:
        return f"{_where(file, text, key, section)}: {section}.{_name(key)}"

    flags = flags or {}
    for name, kind in _SECTIONS.items():
        from_file = _checked(name, given.get(name, {}), in_file)
        from_flags = _checked(name, flags.get(name, {}), _flag_of)
        sections[name] = kind(**(from_file | from_flags))
    config = Config(**sections, engines=engines)  # type: ignore[arg-type]
    _check_addresses(config, lambda s, key: (_flag_of if key in flags.get(s, {}) else in_file)(s, key))
    return config


_LIST = "engines"
_NAMES = Config.__struct_fields__


def _engine_entries(given: Any, where: str) -> tuple[EngineEntry, ...]:
    try:
        entries = msgspec.convert(given, tuple[EngineEntry, ...])
    except msgspec.ValidationError as error:
        known = ", ".join(EngineEntry.__struct_fields__)
        raise ConfigError(f"{where} is not allowed: {_plain(error)} (an entry may have {known})") from error
    names = [entry.name for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where} is not allowed: the name {twice!r} stands there twice")
    wrong = next((e.name for e in entries if len(e.ports) not in {0, 2}), None)
    if wrong is not None:
        raise ConfigError(f"{where} is not allowed: {wrong!r} needs two ports, for HTTP and for bootstrap, or none")
    for what, numbers in (("port", [p for e in entries for p in e.ports if p]), ("GPU", [g for e in entries for g in e.gpus])):
        again = next((n for n in numbers if numbers.count(n) > 1), None)
        if again is not None:
            raise ConfigError(f"{where} is not allowed: {what} {again} stands there twice")
    return entries


def _checked(section: str, values: Mapping[str, Any], where: _Where) -> dict[str, Any]:
    known = {s.key: s for s in settings(section)}
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{where(section, key)} = {_value(value)} is not a setting; {_nearest(key, known)}")
        try:
            checked[key] = msgspec.convert(value, known[key].type)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where(section, key)} = {_value(value)} is not allowed: {_plain(error)} ({known[key].text})") from error
    return checked


def _name(key: str) -> str:
    return key if key.isprintable() else repr(key)


def _value(value: object) -> str:
    """A value as a part of one line, whatever somebody wrote."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return "an endless number"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _plain(error: msgspec.ValidationError) -> str:
    sentence = str(error).replace("`", "")
    return sentence[:1].lower() + sentence[1:]


def _flag_of(section: str, key: str) -> str:
    return next((s.flag for s in settings(section) if s.key == key), f"--{key}")


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there is {', '.join(known)}"


def _where(file: str, text: str, key: str, section: str = "") -> str:
    """``file:line`` of a key, as far as a look at the text finds it."""
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("["):
            current = stripped.strip("[] ")
            if not section and current == key:
                return f"{file}:{number}"
        elif current == section and stripped.partition("=")[0].strip().strip("\"'") == key:
            return f"{file}:{number}"
    return file


def _check_addresses(config: Config, where: _Where) -> None:
    parse_listen(where("router", "http"), config.router.http)
    parse_listen(where("router", "admin"), config.router.admin)
    parse_listen(where("router", "control"), config.router.control)
    if config.cluster.join:
        parse_join(where("cluster", "join"), config.cluster.join)
    if config.cluster.name and not HOST_NAME.fullmatch(config.cluster.name):
        allowed = "1 to 63 letters, digits, '.', '_' or '-', a letter or digit first"
        raise ConfigError(f"{where('cluster', 'name')} = {_value(config.cluster.name)} is not allowed: write {allowed}")
    check_advertise(where("cluster", "advertise"), config.cluster.advertise)
    if config.engine.attach:
        parse_attach(where("engine", "attach"), config.engine.attach)
        if config.engines:
            raise ConfigError(
                f"{where('engine', 'attach')} is for one engine that runs already, and [[engines]] for engines to start: give one of them"
            )
    engine_addresses(config.router, where)


def parse_listen(name: str, value: str) -> tuple[str, int]:
    """Splits HOST:PORT; IPv6 hosts stand in brackets.

    Raises:
        ConfigError: it is something else.
    """
    found = _host_and_port(value)
    if found is None:
        raise ConfigError(f"{name} = {_value(value)} is not allowed: write HOST:PORT, for example 127.0.0.1:8000")
    return found


def parse_join(name: str, value: str) -> tuple[str, int]:
    """Splits the router's control address.

    Raises:
        ConfigError: it is something else, or no address that can be connected to.
    """
    found = _host_and_port(value)
    if found is None or not found[1] or not found[0]:
        raise ConfigError(f"{name} = {_value(value)} is not allowed: write the router's HOST:PORT, for example 10.0.0.1:7400")
    return found


def check_advertise(name: str, value: str) -> None:
    """Raises ConfigError for what other hosts cannot connect to; empty is allowed."""
    if value and (not _HOST.fullmatch(value) or value in {"0.0.0.0", "::", "127.0.1.1"}):
        raise ConfigError(f"{name} = {_value(value)} is not allowed: write the address at which other hosts reach this one, without a port")


def parse_attach(name: str, value: str) -> tuple[str, int, int]:
    """Splits URL or URL,BOOTSTRAP_PORT into host, port and bootstrap port, 0 where it is not given.

    Raises:
        ConfigError: it is something else.
    """
    url, comma, bootstrap = value.partition(",")
    scheme, _, rest = url.rstrip("/").partition("://")
    found = _host_and_port(rest)
    meeting = _port(bootstrap) or 0
    if scheme != "http" or found is None or not found[1] or bool(comma) != bool(meeting):
        raise ConfigError(f"{name} = {_value(value)} is not allowed: write http://HOST:PORT or http://HOST:PORT,BOOTSTRAP_PORT")
    return (*found, meeting)


def engine_addresses(section: RouterSection, where: _Where = "{}.{}".format) -> list[EngineAddress]:
    """The engines given by URL. Their ids are role and number.

    Raises:
        ConfigError: a URL is wrong, or a prefill engine lacks its bootstrap port.
    """
    given = {Role.PREFILL: section.prefill, Role.DECODE: section.decode, Role.UNIFIED: section.unified}
    return [_address(role, i, text, where) for role, texts in given.items() for i, text in enumerate(texts)]


def _address(role: Role, number: int, text: str, where: _Where) -> EngineAddress:
    url, comma, bootstrap = text.partition(",")
    scheme, _, rest = url.rstrip("/").partition("://")
    found = _host_and_port(rest)
    meeting = _port(bootstrap) or 0
    right = bool(comma) == (role is Role.PREFILL) and bool(meeting) == bool(comma)
    if scheme != "http" or found is None or not found[1] or not right:
        example = "http://10.0.0.1:30000,8998" if role is Role.PREFILL else "http://10.0.0.1:30000"
        raise ConfigError(f"{where('router', role)} = {_value(text)} is not allowed: write {example}")
    return EngineAddress(EngineId(f"{role}-{number}"), role, *found, meeting)


def _host_and_port(text: str) -> tuple[str, int] | None:
    host, _, port_text = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    port = _port(port_text)
    return None if port is None or not _HOST.fullmatch(host) else (host, port)


def _port(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535 else None


def default_toml() -> str:
    """The commented example: every setting with its default."""
    lines = ["# disagg.toml: every setting with its default. Unknown keys are errors; `disagg check` says what a file means.", ""]
    for name, kind in _SECTIONS.items():
        lines += [f"# {(kind.__doc__ or '').strip()}", f"[{name}]"]
        for setting in settings(name):
            lines += [f"# {setting.text}", f"{setting.key} = {_toml(setting.default)}"]
        lines.append("")
        if name == "engine":
            lines += [*_ENGINES_EXAMPLE.splitlines(), ""]
    return "\n".join(lines)


_ENGINES_EXAMPLE = """\
# A host with several engines has one entry for each; what is left out is as in [engine].
# [[engines]]
# name = "a"                # its id is the host's name, a dash, and this
# role = "prefill"          # else the host's role
# gpus = [0, 1]             # the GPUs that it may see
# ib_device = "mlx5_0"      # its RDMA device; else that of [engine]
# numa = [0, 0]             # the NUMA node of each of its GPUs
# ports = [30000, 8998]     # HTTP and bootstrap; else free ones
# engine_args = []          # after those of [engine]"""


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return msgspec.json.encode(value).decode()


def is_repeatable(setting: Setting) -> bool:
    """True for a setting that is a list: its flag can be given several times."""
    kind = get_args(setting.type)[0] if get_origin(setting.type) is Annotated else setting.type
    return get_origin(kind) is tuple
