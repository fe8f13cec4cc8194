"""disagg.toml and the flags, read once into frozen structs. Pure: the caller reads the file.

Every setting stands once, as a field with its default and one sentence. The flags of the command line, the texts of ``--help``, the checks
and ``disagg check`` are made from these fields. Units are in the names.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
import tomli

from disagg.errors import ConfigError
from disagg.model import EngineAddress, EngineId, Role


def _doc(text: str, *, flag: str | None = None, **limits: Any) -> msgspec.Meta:
    return msgspec.Meta(description=text, extra={"flag": flag}, **limits)


_Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class RouterSection(msgspec.Struct, frozen=True):
    """The router."""

    http: Annotated[str, _doc("Where clients are served, HOST:PORT.")] = "127.0.0.1:8000"
    admin: Annotated[str, _doc("Where metrics and the admin API are served, HOST:PORT; keep it on loopback.")] = "127.0.0.1:8001"
    prefill: Annotated[tuple[str, ...], _doc("A prefill engine that runs already: URL,BOOTSTRAP_PORT. Repeatable.")] = ()
    decode: Annotated[tuple[str, ...], _doc("A decode engine that runs already: URL. Repeatable.")] = ()
    unified: Annotated[tuple[str, ...], _doc("A unified engine that runs already: URL. Repeatable.")] = ()
    body_limit_mib: Annotated[int, _doc("Largest request body; more is a 413.", ge=1, le=1024)] = 16
    connect_timeout_s: Annotated[_Seconds, _doc("How long connecting to an engine may take.")] = 2.0
    first_token_timeout_s: Annotated[_Seconds, _doc("How long an answer may take to begin (a whole answer: to be complete).")] = 60.0
    between_tokens_timeout_s: Annotated[_Seconds, _doc("How long a stream may pause.")] = 60.0
    probe_interval_s: Annotated[_Seconds, _doc("How often a ready engine is looked at.")] = 1.0
    probe_timeout_s: Annotated[_Seconds, _doc("How long an engine may take to answer such a look.")] = 2.0
    drain_timeout_s: Annotated[_Seconds, _doc("After SIGTERM: how long running requests may take to finish.")] = 30.0


class EngineSection(msgspec.Struct, frozen=True):
    """Defaults of the engines that are started on this host."""

    engine: Annotated[str, _doc("Which engine: embedded.", pattern="^embedded$")] = "embedded"
    model: Annotated[str, _doc("A Hugging Face folder; empty means the demo model that comes with disagg.")] = ""
    served_name: Annotated[str, _doc("The model's name for clients; empty means `demo`, or the folder's name.")] = ""
    page_size: Annotated[int, _doc("Tokens in a page of the KV pool.", ge=1, le=1024)] = 16
    kv_pool_tokens: Annotated[int, _doc("Size of an engine's KV pool, in tokens.", ge=64)] = 16384
    max_running_requests: Annotated[int, _doc("Requests that an engine decodes at once.", ge=1)] = 64
    chunk_tokens: Annotated[int, _doc("Prompt tokens that an engine reads in one step.", ge=1)] = 512
    engine_args: Annotated[tuple[str, ...], _doc("Handed to the engine as it is. Repeatable.", flag="--engine-arg")] = ()


class ObserveSection(msgspec.Struct, frozen=True):
    """Logs."""

    log_level: Annotated[str, _doc("debug, info, warning or error.", pattern="^(debug|info|warning|error)$")] = "info"
    log_format: Annotated[str, _doc("text, json, or auto: text on a terminal.", pattern="^(auto|text|json)$")] = "auto"


class Config(msgspec.Struct, frozen=True):
    """Everything that can be set."""

    router: RouterSection = RouterSection()
    engine: EngineSection = EngineSection()
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
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    sections: dict[str, msgspec.Struct] = {}
    for name, values in given.items():
        if name not in _SECTIONS:
            raise ConfigError(f"{_where(file, text, name)}: there is no section [{name}]; {_nearest(name, _SECTIONS)}")
        if not isinstance(values, dict):
            raise ConfigError(
                f"{_where(file, text, name)}: {name} = {values!r} stands outside a section; {name} is a section, write [{name}]"
            )
    for name, kind in _SECTIONS.items():
        from_file = _checked(name, given.get(name, {}), lambda key, _n=name: f"{_where(file, text, key, _n)}: {_n}.{key}")
        from_flags = _checked(name, (flags or {}).get(name, {}), lambda key, _n=name: f"{_flag_of(_n, key)}")
        sections[name] = kind(**(from_file | from_flags))
    config = Config(**sections)  # type: ignore[arg-type]
    _check_addresses(config)
    return config


def _checked(section: str, values: Mapping[str, Any], where: Any) -> dict[str, Any]:
    known = {s.key: s for s in settings(section)}
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{where(key)} = {value!r} is not a setting; {_nearest(key, known)}")
        try:
            checked[key] = msgspec.convert(value, known[key].type)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where(key)} = {value!r} is not allowed: {_plain(error)} ({known[key].text})") from error
    return checked


def _plain(error: msgspec.ValidationError) -> str:
    sentence = str(error).replace("`", "")
    return sentence[:1].lower() + sentence[1:]


def _flag_of(section: str, key: str) -> str:
    return next((s.flag for s in settings(section) if s.key == key), f"--{key}")


def _nearest(name: str, known: Mapping[str, Any]) -> str:
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


def _check_addresses(config: Config) -> None:
    parse_listen("router.http", config.router.http)
    parse_listen("router.admin", config.router.admin)
    engine_addresses(config.router)


def parse_listen(name: str, value: str) -> tuple[str, int]:
    """Splits HOST:PORT; IPv6 hosts stand in brackets.

    Raises:
        ConfigError: it is something else.
    """
    host, colon, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{name} = {value!r} is not allowed: write HOST:PORT, for example 127.0.0.1:8000")
    return host, int(port)


def engine_addresses(section: RouterSection) -> list[EngineAddress]:
    """The engines given by URL. Their ids are role and number.

    Raises:
        ConfigError: a URL is wrong, or a prefill engine lacks its bootstrap port.
    """
    given = {Role.PREFILL: section.prefill, Role.DECODE: section.decode, Role.UNIFIED: section.unified}
    return [_address(role, i, text) for role, texts in given.items() for i, text in enumerate(texts)]


def _address(role: Role, number: int, text: str) -> EngineAddress:
    example = "http://10.0.0.1:30000,8998" if role is Role.PREFILL else "http://10.0.0.1:30000"
    wrong = ConfigError(f"router.{role} = {text!r} is not allowed: write {example}")
    url, comma, bootstrap = text.partition(",")
    scheme, _, rest = url.rstrip("/").partition("://")
    host, colon, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if scheme != "http" or not colon or not host or not port.isdigit() or "/" in rest:
        raise wrong
    if bool(comma) != (role is Role.PREFILL) or (comma and not bootstrap.isdigit()):
        raise wrong
    return EngineAddress(EngineId(f"{role}-{number}"), role, host, int(port), int(bootstrap) if comma else 0)


def default_toml() -> str:
    """The commented example: every setting with its default."""
    lines = ["# disagg.toml: every setting with its default. Unknown keys are errors; `disagg check` says what a file means.", ""]
    for name, kind in _SECTIONS.items():
        lines += [f"# {(kind.__doc__ or '').strip()}", f"[{name}]"]
        for setting in settings(name):
            lines += [f"# {setting.text}", f"{setting.key} = {_toml(setting.default)}"]
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return msgspec.json.encode(value).decode()


def is_repeatable(setting: Setting) -> bool:
    """True for a setting that is a list: its flag can be given several times."""
    kind = get_args(setting.type)[0] if get_origin(setting.type) is Annotated else setting.type
    return get_origin(kind) is tuple
