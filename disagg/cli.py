"""The `disagg` command: parse, call, print."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from disagg import __version__
from disagg.config import Config, Setting, default_toml, is_repeatable, parse_config, settings
from disagg.deploy.systemd import CONFIG_FILE as SYSTEM_CONFIG_FILE
from disagg.deploy.systemd import USER, Site, unit_files
from disagg.errors import ConfigError, DisaggError, InstallError, TraceError
from disagg.model import Role

CONFIG_FILE = "disagg.toml"

app = typer.Typer(
    name="disagg",
    help="Serve large language models with prefill and decode on separate machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

token_app = typer.Typer(help="Tokens with which hosts join.", no_args_is_help=True)
app.add_typer(token_app, name="token")
hosts_app = typer.Typer(help="The hosts that may connect to the router.", no_args_is_help=True)
app.add_typer(hosts_app, name="hosts")
kv_app = typer.Typer(help="Who holds KV pages on which engine.", no_args_is_help=True)
app.add_typer(kv_app, name="kv")
engine_app = typer.Typer(help="One engine of this host.", no_args_is_help=True)
app.add_typer(engine_app, name="engine", hidden=True)

StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        metavar="DIR",
        help="Where keys, tokens and registrations are kept; else DISAGG_STATE_DIR, as root /var/lib/disagg, else $XDG_STATE_HOME/disagg.",
    ),
]
TTL_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LONGEST_TTL_S = 7 * 86400

ConfigOption = Annotated[Path | None, typer.Option("--config", help=f"The config file; without it ./{CONFIG_FILE} if there is one.")]


AdminOption = Annotated[str, typer.Option("--admin", metavar="HOST:PORT", help="The router's admin address.")]
ADMIN = "127.0.0.1:8001"
CauseOption = Annotated[str, typer.Option("--cause", help="Why; it is shown and logged.")]
CAUSE = "ordered on the command line"


NOT_OF_UP = ("join", "name", "advertise", "prefill", "decode", "unified", "control", "attach", "supervise")


class ServeRole(StrEnum):
    """What a host can be."""

    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


def _flag(setting: Setting) -> inspect.Parameter:
    """A setting as a parameter that typer understands. None means that the flag was not given."""
    kind = get_args(setting.type)[0] if get_origin(setting.type) is Annotated else setting.type
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    annotation = list[str] | None if is_repeatable(setting) else kind | None
    shown = "" if is_repeatable(setting) else f"  [default: {setting.default if setting.default != '' else 'empty'}]"
    flag = f"{setting.flag}/--no-{setting.flag[2:]}" if kind is bool else setting.flag
    option = typer.Option(flag, help=setting.text + shown, show_default=False)
    return inspect.Parameter(setting.key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option])


def with_settings(*sections: str, leave_out: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command a flag for each setting of these sections; it gets their values as ``flags``, section -> key -> value."""
    chosen = [s for s in settings(*sections) if s.key not in leave_out]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]

        def wrapped(**given: Any) -> None:
            flags: dict[str, dict[str, Any]] = {}
            for setting in chosen:
                value = given.pop(setting.key)
                if value is not None:
                    flags.setdefault(setting.section, {})[setting.key] = value
            command(**given, flags=flags)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + [_flag(s) for s in chosen]
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        return wrapped

    return decorate


def _load(path: Path | None, flags: dict[str, dict[str, Any]] | None = None) -> Config:
    file = path or Path(CONFIG_FILE)
    if path is None and not file.exists():
        return parse_config("", file=CONFIG_FILE, flags=flags)
    return parse_config(_text_of(file, ConfigError), file=str(file), flags=flags)


def _text_of(file: Path, kind: type[DisaggError]) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        why = "it is no text in UTF-8"
    except OSError as error:
        why = error.strerror or type(error).__name__
    raise kind(f"{file} cannot be read: {why}")


def _say(line: str) -> None:
    print(line, flush=True)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Serve large language models with prefill and decode on separate machines."""
    if version:
        _say(f"disagg {__version__}")
        raise typer.Exit


@app.command()
@with_settings("cluster", "router", "engine", "slo", "policy", "security", "observe")
def serve(
    *,
    role: Annotated[ServeRole, typer.Option(help="What this host does.")],
    token: Annotated[str, typer.Option(help="The token to join with, once; from then on this host's own key is enough.")] = "",
    config: ConfigOption = None,
    flags: dict[str, dict[str, Any]],
) -> None:
    """Run one host's part of a cluster: the router, or a host whose engines join it."""
    loaded = _load(config, flags)
    if role is ServeRole.ROUTER:
        from disagg import life, server  # noqa: PLC0415  # as in `up`: `--version`, `--help` and `check` need not wait for aiohttp

        with life.people() as say:
            life.run(lambda: server.serve_router(loaded, say))
    else:
        from disagg import host, life  # noqa: PLC0415

        with life.people() as say:
            life.run(lambda: host.serve_host(loaded, Role(role), token, say))


@app.command()
@with_settings("cluster", "router", "engine", "slo", "policy", "observe", leave_out=NOT_OF_UP)
def up(
    *,
    prefill: Annotated[int | None, typer.Option(min=0, help="How many prefill engines.  [default: 1]")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="How many decode engines.  [default: 1]")] = None,
    unified: Annotated[int, typer.Option(min=0, help="How many unified engines.  [default: 0]", show_default=False)] = 0,
    config: ConfigOption = None,
    flags: dict[str, dict[str, Any]],
) -> None:
    """Run a whole cluster on this machine: engines and a router. Ctrl-C stops all of it."""
    loaded = _load(config, flags)
    counts = {
        Role.PREFILL: 1 if prefill is None else prefill,
        Role.DECODE: 1 if decode is None else decode,
        Role.UNIFIED: unified,
    }
    if not unified and not (counts[Role.PREFILL] and counts[Role.DECODE]):
        raise typer.BadParameter("a cluster needs a prefill and a decode engine, or a unified one")
    from disagg import life, server  # noqa: PLC0415

    with life.people() as say:
        life.run(lambda: server.run_up(loaded, counts, say))


@app.command()
def check(
    *,
    config: ConfigOption = None,
    default: Annotated[bool, typer.Option("--default", help="Print the commented default file instead.")] = False,
) -> None:
    """Validate the config file and print what it means: every setting, those that differ from the default marked."""
    if default:
        _say(default_toml().rstrip())
        return
    loaded = _load(config)
    for setting in settings("cluster", "router", "engine", "slo", "policy", "security", "observe"):
        value = getattr(getattr(loaded, setting.section), setting.key)
        mark = "*" if value != setting.default else " "
        _say(f"{mark} {setting.section}.{setting.key:<26} {value!r:<24} {setting.text}")
    for entry in loaded.engines:
        _say(f"* engines: {entry}")
    _say("The config is valid. (* differs from the default)")


class HostRole(StrEnum):
    """What a host can be."""

    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


@app.command()
def systemd(
    role: Annotated[HostRole, typer.Argument(help="What this host does.")],
    *,
    install: Annotated[bool, typer.Option("--install", help="Install the units instead of printing them; needs root.")] = False,
    config: Annotated[Path, typer.Option(help="The config file that the service reads.")] = Path(SYSTEM_CONFIG_FILE),
    user: Annotated[str, typer.Option(help="The system user that everything runs as; made if missing.")] = USER,
    root: Annotated[Path, typer.Option("--root", help="Install into this folder as if it were /.")] = Path("/"),
) -> None:
    """Print the systemd units of a host, or install them.

    A hardened service with a watchdog, each engine in a unit of its own, and for the router a socket that outlives its restarts: clients
    wait and are not refused. A router that is started by hand refuses them while it restarts.
    """
    known = _load(config) if config.is_file() else Config()
    reads = (sys.prefix, sys.base_prefix, str(Path(__file__).parent))
    site = Site(_own_executable(), _absolute(config), user, reads, known.router.http)
    if install:
        from disagg.deploy.install import Installer  # noqa: PLC0415  # only this command needs it

        Installer(site, root=root.absolute(), say=_say).install(role.value)
        return
    for path, text in unit_files(role.value, site).items():
        _say(f"# {path}\n{text}")


def _own_executable() -> str:
    """The `disagg` that runs now, as an absolute path. A link stays a link: upgrades move what it points to."""
    called, beside = Path(sys.argv[0]), Path(sys.executable).with_name("disagg")
    found = called if called.name == "disagg" and called.is_file() else beside if beside.is_file() else shutil.which("disagg")
    if not found:
        raise InstallError("there is no `disagg` on the PATH that a unit could execute: install disagg, then say this again")
    return _absolute(found)


def _absolute(path: Path | str) -> str:
    return os.path.abspath(path)  # noqa: PTH100  # `resolve` would follow links


def _ttl_s(text: str) -> int:
    """Seconds of a time like 15m."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text, re.ASCII)
    seconds = int(match[1]) * TTL_UNITS_S[match[2]] if match else 0
    if not 0 < seconds <= LONGEST_TTL_S:
        raise typer.BadParameter(f"--ttl {text!r} is not allowed: write a time like 90s, 15m, 2h or 1d, at most 7d")
    return seconds


@app.command()
def keygen(*, state_dir: StateOption = None) -> None:
    """Make the router's key. A key that exists already stays as it is."""
    from disagg.security import keys, state  # noqa: PLC0415  # as in `serve`

    path = state.router_key_path(state.state_root(state_dir, os.environ))
    key, made = keys.load_or_make_key(path)
    _say("Made the router's key." if made else "The router's key exists already; it stays as it is.")
    _say(f"  file        {path}")
    _say(f"  public key  {key.public}")


@token_app.command("create")
def token_create(
    *,
    role: Annotated[list[Role], typer.Option(help="What the host may be. Repeatable.")],
    ttl: Annotated[str, typer.Option(help="How long a host may join with it: 90s, 15m, 2h, 1d; at most 7d.")] = "15m",
    state_dir: StateOption = None,
) -> None:
    """Make a token with which one host joins, once. Standard output is the token alone."""
    ttl_s = _ttl_s(ttl)
    from disagg.security import keys, state, token  # noqa: PLC0415  # as in `serve`

    state_root = state.state_root(state_dir, os.environ)
    path = state.router_key_path(state_root)
    router_key = keys.load_published_key(state.router_public_path(state_root))  # of a router whose key is kept elsewhere
    if router_key is None:
        key, made = keys.load_or_make_key(path)
        router_key = key.public
        if made:
            print(f"Made the router's key, {path}: the router must run with this state directory.", file=sys.stderr)
    store = token.TokenStore(state.router_tokens_path(state_root))
    now_wall = time.clock_gettime(time.CLOCK_REALTIME)  # when a token expires is a matter of the calendar
    store.sweep(now_wall)
    created = store.create(role, ttl_s, now_wall=now_wall, router_key=router_key)
    words = " or ".join(created.roles)
    print(f"One host may join with this token, once, within {ttl}, as {words}. Keep it secret until then.", file=sys.stderr, flush=True)
    _say(created.encode())


def _print_cluster(cluster: dict[str, Any]) -> None:
    from disagg import status as texts  # noqa: PLC0415

    _say(texts.table(cluster))


@app.command()
def status(
    *,
    admin: AdminOption = ADMIN,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until ctrl-C.")] = False,
) -> None:
    """Show hosts and engines: state, load, and why each is as it is."""
    from disagg import ask  # noqa: PLC0415

    if not watch:
        cluster = ask.get(admin, "/admin/cluster")
        _say(json.dumps(cluster)) if as_json else _print_cluster(cluster)
        return
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            _watch_once(admin, as_json=as_json)
            time.sleep(1.0)


def _watch_once(admin: str, *, as_json: bool) -> None:
    """A router that is being restarted does not end the watch."""
    from disagg import ask  # noqa: PLC0415

    try:
        cluster = ask.get(admin, "/admin/cluster")
    except DisaggError as error:
        print(f"disagg: {error}", file=sys.stderr)
        return
    if as_json:
        _say(json.dumps(cluster))
    else:
        _say("\x1b[2J\x1b[H" + time.strftime("%H:%M:%S"))
        _print_cluster(cluster)


@app.command()
def drain(engine: str, *, admin: AdminOption = ADMIN, cause: CauseOption = CAUSE) -> None:
    """Give an engine no new work; what runs may finish, and what has not within drain_timeout_s goes on on other engines."""
    from disagg import ask  # noqa: PLC0415

    _say(ask.post(admin, f"/admin/engines/{ask.quoted(engine)}/drain", {"cause": cause})["will"])


@app.command()
def undrain(engine: str, *, admin: AdminOption = ADMIN, cause: CauseOption = CAUSE) -> None:
    """Bring a drained engine back into service."""
    from disagg import ask  # noqa: PLC0415

    _say(ask.post(admin, f"/admin/engines/{ask.quoted(engine)}/undrain", {"cause": cause})["will"])


@app.command()
def flip(engine: str, role: Role, *, admin: AdminOption = ADMIN, cause: CauseOption = CAUSE) -> None:
    """Move an engine to the other role, live: drain, switch, prove it with one request; else start it anew."""
    from disagg import ask  # noqa: PLC0415

    ask.follow(admin, ask.post(admin, f"/admin/engines/{ask.quoted(engine)}/flip", {"cause": cause, "role": role.value}), _say)


@app.command()
def restart(engine: str, *, admin: AdminOption = ADMIN, cause: CauseOption = CAUSE) -> None:
    """Drain an engine, end its process and start a new one. One that is held after too many deaths gets another chance."""
    from disagg import ask  # noqa: PLC0415

    ask.follow(admin, ask.post(admin, f"/admin/engines/{ask.quoted(engine)}/restart", {"cause": cause}), _say)


@hosts_app.command("ls")
def hosts_ls(*, admin: AdminOption = ADMIN, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the hosts that may connect, and how they are."""
    from disagg import ask  # noqa: PLC0415
    from disagg import status as texts  # noqa: PLC0415

    answer = ask.get(admin, "/admin/hosts")
    _say(json.dumps(answer) if as_json else texts.hosts_table(answer["hosts"]))


@hosts_app.command("revoke")
def hosts_revoke(name: str, *, admin: AdminOption = ADMIN) -> None:
    """Shut a host out, at once: its key opens nothing any more."""
    from disagg import ask  # noqa: PLC0415

    _say(ask.post(admin, f"/admin/hosts/{ask.quoted(name)}/revoke", {})["will"])


@kv_app.command("ls")
def kv_ls(*, admin: AdminOption = ADMIN, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List who holds KV pages: the request, its age and phase, and what of each engine's pool that explains."""
    from disagg import ask  # noqa: PLC0415
    from disagg import status as texts  # noqa: PLC0415

    answer = ask.get(admin, "/admin/kv")
    _say(json.dumps(answer) if as_json else texts.kv_table(answer))


@kv_app.command("reap")
def kv_reap(
    engine: Annotated[str, typer.Argument(help="Only on this engine.")] = "", *, admin: AdminOption = ADMIN, cause: CauseOption = CAUSE
) -> None:
    """Abort what runs on an engine although no request explains it, now; the router does so by itself after seconds."""
    from disagg import ask  # noqa: PLC0415

    which = f"?engine={ask.quoted(engine)}" if engine else ""
    _say(ask.post(admin, f"/admin/kv/reap{which}", {"cause": cause})["will"])


class ReplayPlacement(StrEnum):
    """How a replay chooses engines, see `disagg.plan.dispatch.Placement`."""

    CACHE = "cache"
    PERFECT = "perfect"
    LOAD = "load"
    COUNT = "count"
    RANDOM = "random"


class ReplayFlips(StrEnum):
    """Whether a replay moves engines."""

    AUTO = "auto"
    OFF = "off"


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="A trace: Mooncake's JSONL, or Azure's CSV.")],
    *,
    prefill: Annotated[int, typer.Option(min=0, max=256, help="Prefill engines.")] = 4,
    decode: Annotated[int, typer.Option(min=0, max=256, help="Decode engines.")] = 4,
    unified: Annotated[int, typer.Option(min=0, max=256, help="Unified engines.")] = 0,
    seed: Annotated[int, typer.Option(help="Of what is random; the same one gives the same answer.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with a sample every 10 s.")] = False,
    policy: Annotated[
        ReplayPlacement, typer.Option(help="cache is what the router does; the others know more or less, for comparison.")
    ] = ReplayPlacement.CACHE,
    flips: Annotated[ReplayFlips, typer.Option(help="Move engines between the roles as the router would, or not.")] = ReplayFlips.OFF,
    refuse: Annotated[bool, typer.Option(help="Refuse at once who would come too late, as the router does.")] = True,
    rate: Annotated[float, typer.Option(help="So many times as fast as it was recorded.")] = 1.0,
    minutes: Annotated[float, typer.Option(help="Only so much of it, 0 for all.")] = 0.0,
    ttft: Annotated[float, typer.Option(help="Objective: seconds to the first token.")] = 10.0,
    itl: Annotated[float, typer.Option(help="Objective: mean seconds between two tokens of an answer.")] = 0.1,
    read: Annotated[str, typer.Option(metavar="A,B,C", help="Seconds of a pass: constant, a new token, a token squared.")] = "",
    step: Annotated[str, typer.Option(metavar="A,B,C", help="Seconds of a decode step: constant, an answer, a token of KV.")] = "",
    kv_tokens: Annotated[int, typer.Option(min=1, help="Tokens that an engine's KV holds.")] = 3_000_000,
    kv_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a token's KV.")] = 327_680,
    bandwidth: Annotated[float, typer.Option(help="Gigabytes a second that leave a prefill engine.")] = 12.5,
    batch: Annotated[int, typer.Option(min=0, help="Answers that a decode engine writes at once, 0 for no limit.")] = 0,
) -> None:
    """Replay a trace in virtual time, through the policies that the router runs: what would clients see, who would be moved?

    Without --read and --step an engine is a 70B model on 8 A100.
    """
    if not unified and not (prefill and decode):
        raise typer.BadParameter("a cluster needs a prefill and a decode engine, or a unified one")
    for name, value in (("--rate", rate), ("--ttft", ttft), ("--itl", itl), ("--bandwidth", bandwidth)):
        if not 0.0 < value < float("inf"):
            raise typer.BadParameter(f"{name} {value:g} is not allowed: it is more than 0")
    if not 0.0 <= minutes < float("inf"):
        raise typer.BadParameter(f"--minutes {minutes:g} is not allowed: it is more than 0, or 0 for all")
    import random  # noqa: PLC0415  # only this command needs these

    import msgspec  # noqa: PLC0415

    from disagg.plan.dispatch import Placement  # noqa: PLC0415
    from disagg.plan.hardware import Hardware  # noqa: PLC0415
    from disagg.plan.outcome import told  # noqa: PLC0415
    from disagg.plan.simulate import Cluster  # noqa: PLC0415
    from disagg.plan.simulate import replay as simulate  # noqa: PLC0415
    from disagg.plan.trace import parse_trace  # noqa: PLC0415
    from disagg.policy.books import Slo  # noqa: PLC0415

    usual = Hardware()
    hardware = Hardware(
        read=_line("--read", read) or usual.read,
        step=_line("--step", step) or usual.step,
        kv_tokens=kv_tokens,
        kv_bytes=kv_bytes,
        bandwidth=bandwidth * 1e9,
        batch=batch,
    )
    text = _text_of(trace, TraceError)
    chance = random.Random(seed).random
    load = parse_trace(text, file=str(trace), chance=chance).scaled(rate)
    if minutes:
        load = load.first(minutes * 60)
    placement, moved = Placement(policy.value), flips is ReplayFlips.AUTO
    cluster = Cluster(prefill, decode, unified, hardware, Slo(ttft, itl), placement, refuse, moved)
    with _progress() as progress:
        outcome = simulate(load, cluster, chance=chance, progress=progress)
    if as_json:
        _say(msgspec.json.encode(outcome).decode())
        return
    for line in told(outcome, load, cluster):
        _say(line)


def _line(flag: str, text: str) -> tuple[float, ...]:
    """Three coefficients; none where the flag was not given."""
    if not text:
        return ()
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) != 3 or not all(0.0 <= x < float("inf") for x in found) or not found[0]:
        raise typer.BadParameter(f"{flag} {text!r} is not allowed: write three numbers like 0.025,1.4e-4,5e-9, the first above 0")
    return found


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[float], None]]:
    """Says on standard error how far something is, once a second, where a person looks on."""
    began = last = time.monotonic()
    shown = sys.stderr.isatty()

    def say(share: float) -> None:
        nonlocal last
        now = time.monotonic()
        if shown and now - last >= 1.0:
            last = now
            print(f"\r{share:4.0%} after {now - began:.0f} s", end="", file=sys.stderr, flush=True)

    try:
        yield say
    finally:
        if shown and last > began:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@engine_app.command("run", hidden=True)
def engine_run(name: str, *, state_dir: StateOption = None) -> None:
    """Become the engine of this name: what its systemd unit runs."""
    from disagg.engines import process  # noqa: PLC0415
    from disagg.security import state  # noqa: PLC0415

    process.exec_launch(state.state_root(state_dir, os.environ) / "engines" / name / "launch.json")


def main() -> None:
    """The console script. A `DisaggError` becomes one line and its exit code."""
    try:
        app()
    except DisaggError as error:
        print(f"disagg: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
