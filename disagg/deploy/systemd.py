"""The systemd units, as text. Pure: `deploy/install` writes them.

Theory of operation. A router host runs `disagg-router.service`; its public socket is held by `disagg-router.socket`, so that clients who
come while the service restarts wait in the kernel's queue and are not refused. An engine host runs one agent, `disagg-<role>.service`,
and each of its engines in a unit of its own, `disagg-engine@NAME.service`:

    systemd ─┬─ disagg-prefill.service            the agent ── D-Bus ──► systemctl start disagg-engine@prefill-0
             ├─ disagg-engine@prefill-0.service   `disagg engine run prefill-0`, which becomes the engine
             └─ disagg-engine@prefill-1.service

A unit is a control group, and stopping a unit ends all that is in its group. An engine that were a child of the agent would end with
`systemctl restart disagg-prefill`, and a warm engine with gigabytes of weights and KV is what a restart of the agent must not cost. So
nothing ties the engines' units to the agent's; only the order of going down at a shutdown is given: the agent drains first.

All of it runs as one unprivileged user. The agent must see `/proc/PID` of its engines and signal them, which the same user may, and needs
just one right that this user lacks: to start and stop those units. A polkit rule gives it that, for those units and these verbs alone.

Everything here is understood by systemd 252 (Debian 12); what older ones do not know they ignore with a warning.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import PurePosixPath

import msgspec

from disagg import __version__
from disagg.config import RouterSection, parse_listen
from disagg.errors import ConfigError
from disagg.model import Role

UNIT_DIR = "/etc/systemd/system"
POLKIT_FILE = "/etc/polkit-1/rules.d/50-disagg.rules"
SYSUSERS_FILE = "/etc/sysusers.d/disagg.conf"
CONFIG_FILE = "/etc/disagg/disagg.toml"
TOKEN_FILE = "/etc/disagg/token"  # noqa: S105  # a path
KEY_FILE = "/etc/disagg/key"
USER = "disagg"
ROUTER = "router"
ROUTER_SOCKET = "disagg-router.socket"
HOMES = ("/home", "/root", "/run/user")  # what ProtectHome= hides

_USER = re.compile(r"[a-z_][a-z0-9_-]{0,30}", re.ASCII)
_PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)


class Site(msgspec.Struct, frozen=True):
    """What the units must know of the machine.

    Attributes:
        executable: absolute path of `disagg`.
        config_path: absolute path of the config file.
        user: as whom everything runs; made if missing.
        reads: further absolute paths that `disagg` needs to run, such as the folder of its Python.
        http: where the router serves clients, HOST:PORT.
    """

    executable: str
    config_path: str = CONFIG_FILE
    user: str = USER
    reads: tuple[str, ...] = ()
    http: str = RouterSection().http

    @property
    def in_a_home(self) -> bool:
        """True when a part of disagg lies where `ProtectHome=yes` would hide it."""
        paths = [PurePosixPath(p) for p in (self.executable, self.config_path, *self.reads)]
        return any(path.is_relative_to(home) for path in paths for home in HOMES)


def unit_files(role: Role | str, site: Site) -> dict[str, str]:
    """The files that make a host of this role: absolute path -> text, the service to enable first.

    Args:
        role: router, prefill, decode or unified.
        site: what the units must know of the machine.

    Raises:
        ConfigError: a path or the user's name cannot be written into a unit.
    """
    _check(site)
    if role == ROUTER:
        return {
            f"{UNIT_DIR}/{service_name(role)}": _router(site),
            f"{UNIT_DIR}/{ROUTER_SOCKET}": _router_socket(site),
            SYSUSERS_FILE: _sysusers(site),
        }
    return {
        f"{UNIT_DIR}/{service_name(role)}": _agent(Role(role), site),
        f"{UNIT_DIR}/disagg-engine@.service": _engine(site),
        POLKIT_FILE: _polkit(site),
        SYSUSERS_FILE: _sysusers(site),
    }


def service_name(role: Role | str) -> str:
    """The service of a host."""
    return f"disagg-{role}.service"


def to_enable(role: Role | str) -> str:
    """The units that a person enables, as `systemctl` takes them."""
    service = service_name(role).removesuffix(".service")
    return f"{ROUTER_SOCKET} {service}" if role == ROUTER else service


def _check(site: Site) -> None:
    if not _USER.fullmatch(site.user) or site.user == "root":
        raise ConfigError(
            f"--user = {site.user!r} is not allowed: write the name of an unprivileged system user, lower-case letters, digits, - and _"
        )
    for path, refused in ((site.executable, "\"'\\"), (site.config_path, "")):  # systemd executes nothing with a quote in its name
        if not path.startswith("/") or not path.isprintable() or set(path) & set(refused):
            raise ConfigError(f"the path {path!r} cannot stand in a unit: it must be absolute, of printable characters, without quotes")


# --- the units


def _router(site: Site) -> str:
    return _text(
        _header("router", "disagg-router"),
        "[Unit]",
        "Description=disagg router",
        *_network_and_patience(),
        "",
        "[Service]",
        *_notifying(site, f"serve --role router --config {_word(site.config_path)} --key-file %d/disagg-key"),
        f"# Clients are served on the socket of {ROUTER_SOCKET} where that unit runs, else on router.http of the config.",
        "# Without it, to serve them on a port below 1024: systemctl edit disagg-router, and there, under [Service],",
        "#   AmbientCapabilities=CAP_NET_BIND_SERVICE",
        "#   CapabilityBoundingSet=CAP_NET_BIND_SERVICE",
        "#   PrivateUsers=no",
        "",
        *_identity(site),
        *_key("disagg-router"),
        "",
        *(_hardened("ProtectHome=read-only", "disagg itself lies in a home.") if site.in_a_home else _hardened("ProtectHome=yes")),
        *_closed_to_devices(),
        "# Plain CPython with uvloop, libzmq and msgspec makes no code at run time.",
        "MemoryDenyWriteExecute=yes",
        "PrivateUsers=yes",
        "ProcSubset=pid",
        *_calls_of_python(),
        "",
        *_install(),
    )


def _router_socket(site: Site) -> str:
    return _text(
        _header("router", ROUTER_SOCKET),
        "[Unit]",
        "Description=disagg router, where clients come in",
        "",
        "[Socket]",
        "# router.http of the config when this was written; after a change of it: disagg systemd router --install, and restart this unit.",
        f"ListenStream={_stream(site.http)}",
        "FileDescriptorName=http",
        "# Who comes while the service restarts waits in this queue (net.core.somaxconn is its limit) and is served by the next process.",
        "# So a client makes the service start again: to stop it, stop both, systemctl stop disagg-router.socket disagg-router",
        "Backlog=4096",
        "NoDelay=yes",
        "",
        "[Install]",
        "WantedBy=sockets.target",
    )


def _stream(http: str) -> str:
    """An address as systemd takes it: it looks up no names."""
    host, port = parse_listen("router.http", http)
    host = "127.0.0.1" if host == "localhost" else host
    try:
        found = ip_address(host)
    except ValueError:
        raise ConfigError(f"router.http = {http!r} cannot stand in a socket unit: systemd looks up no names, so write an address") from None
    if not port:
        raise ConfigError(f"router.http = {http!r} cannot stand in a socket unit: write the port")
    return f"[{host}]:{port}" if found.version == 6 else f"{host}:{port}"


def _agent(role: Role, site: Site) -> str:
    name = f"disagg-{role}"
    return _text(
        _header(str(role), name),
        "[Unit]",
        f"Description=disagg agent of a {role} host",
        *_network_and_patience(),
        "",
        "[Service]",
        *_notifying(site, _agent_command(role, site)),
        "",
        *_identity(site),
        *_token(name),
        *_key(name),
        "",
        *_hardened("ProtectHome=read-only", "Models may lie in a home; they are read and never written."),
        *_closed_to_devices(),
        "# Plain CPython with uvloop, libzmq and msgspec makes no code at run time. Engines do, but they are no children of this unit.",
        "MemoryDenyWriteExecute=yes",
        "# Not PrivateUsers=yes: from a user namespace of its own the agent would no longer see /proc/PID of its engines.",
        "# Not ProcSubset=pid: it reads /proc/sys/kernel/random/boot_id, to know its engines again after a restart of its own.",
        *_calls_of_python(),
        "",
        *_install(),
    )


def _agent_command(role: Role, site: Site) -> str:
    credentials = "--token-file %d/disagg-token --key-file %d/disagg-key"
    return f"serve --role {role} --config {_word(site.config_path)} --supervise systemd {credentials}"


def _engine(site: Site) -> str:
    agents = " ".join(service_name(role) for role in Role)
    return _text(
        _header("prefill|decode|unified", "disagg-engine@.service"),
        "# The agent starts and stops these units: disagg-engine@NAME, one for each engine. There is nothing to enable.",
        "",
        "[Unit]",
        "Description=disagg engine %i",
        "# Deliberately no PartOf=, BindsTo=, Requires= or After= of the agent: an engine outlives `systemctl restart` of its agent, which",
        "# adopts it again. Before= only gives the order of a shutdown: the agent drains while its engines still work.",
        f"Before={agents}",
        "# DeviceAllow= can name only what the kernel has: the driver is loaded first. Where there is none, nothing happens.",
        "Wants=modprobe@nvidia_uvm.service",
        "After=modprobe@nvidia_uvm.service nvidia-persistenced.service",
        "# The agent decides when an engine is started again; systemd never refuses.",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "# `disagg engine run` becomes the engine (exec). Engines know nothing of sd_notify: no Type=notify and no watchdog here; the",
        "# agent watches their progress.",
        "Type=exec",
        f"ExecStart={_executable(site)} engine run %i",
        "Restart=no",
        "TimeoutStopSec=60s",
        "KillMode=control-group",
        "# The kernel ran out of memory and chose one rank of an engine: the others would wait for it forever.",
        "OOMPolicy=kill",
        "",
        *_identity(site),
        "CacheDirectory=disagg",
        "CacheDirectoryMode=0700",
        "# Kernels that engines compile, and what model hubs download, go to ~/.cache, ~/.triton and the like.",
        "Environment=HOME=%C/disagg XDG_CACHE_HOME=%C/disagg",
        "",
        "# RDMA and pinned host memory.",
        "LimitMEMLOCK=infinity",
        "TasksMax=infinity",
        "",
        *_hardened("ProtectHome=read-only", "Models may lie in a home; they are read and never written."),
        "# GPUs and RDMA, and nothing else. For AMD's: systemctl edit disagg-engine@.service, and SupplementaryGroups=render video",
        "DevicePolicy=closed",
        *(f"DeviceAllow={device} rw" for device in _DEVICES),
        "# Not PrivateDevices=yes: it hides the devices above. Not MemoryDenyWriteExecute=yes: engines compile kernels as they run.",
        "# Not PrivateUsers=yes: the agent could not see /proc/PID. Not PrivateIPC=yes: CUDA shares memory between the engines of a host.",
        "# AF_NETLINK: NCCL and libibverbs list the network's interfaces with it.",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK",
        "# @resources stays: engines bind themselves to cores and NUMA nodes. pidfd_getfd: PyTorch's memory shared between ranks.",
        "SystemCallFilter=@system-service pidfd_getfd",
        "SystemCallFilter=~@privileged",
    )


_DEVICES = ("char-nvidia*", "char-infiniband*", "/dev/infiniband/rdma_cm", "char-gdrdrv", "char-kfd", "char-drm")


def _polkit(site: Site) -> str:
    return _text(
        "// " + _made_by("prefill|decode|unified"),
        "//",
        f"// The agent runs as the user {site.user} and may start and stop the units of its engines: these and no others, so not any unit",
        "// of root's. No engine can be disguised as a transient unit: systemd refuses one where a unit file of that name exists. Changing",
        "// a unit (verb set-property) is not among the verbs.",
        "// Needs polkit 0.106 or newer; it reads this file by itself as soon as it is there.",
        "polkit.addRule(function (action, subject) {",
        '    if (action.id === "org.freedesktop.systemd1.manage-units" &&',
        f'        subject.user === "{site.user}" &&',
        r'        /^disagg-engine@[A-Za-z0-9_.:-]+\.service$/.test(action.lookup("unit")) &&',
        '        ["start", "stop", "restart", "reset-failed"].indexOf(action.lookup("verb")) !== -1) {',
        "        return polkit.Result.YES;",
        "    }",
        "});",
    )


def _sysusers(site: Site) -> str:
    return _text(f"# {_made_by('ROLE')}", f'u {site.user} - "disagg" /var/lib/disagg')


# --- what the units have in common


def _network_and_patience() -> list[str]:
    return [
        "After=network-online.target",
        "Wants=network-online.target",
        "# It is tried again for as long as it takes: a cluster heals by itself when the reason is gone.",
        "StartLimitIntervalSec=0",
    ]


def _notifying(site: Site, arguments: str) -> list[str]:
    return [
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={_executable(site)} {arguments}",
        "# Its loop says every 5 s that it turns. Silent for 10 s: it is killed and started again.",
        "WatchdogSec=10s",
        "Restart=always",
        "RestartSec=1s",
        "# 2 is wrong usage and 78 a wrong configuration: trying again would not help.",
        "RestartPreventExitStatus=2 78",
        "TimeoutStartSec=60s",
        "# SIGTERM drains; keep this above drain_timeout_s + 15 s + stop_timeout_s of the config.",
        "TimeoutStopSec=60s",
        "KillMode=mixed",
        "# It is small, and everything else depends on it: not the first to go when memory is short.",
        "OOMScoreAdjust=-500",
    ]


def _identity(site: Site) -> list[str]:
    return [
        f"User={site.user}",
        "StateDirectory=disagg",
        "StateDirectoryMode=0700",
        "Environment=DISAGG_STATE_DIR=%S/disagg",
        "UMask=0077",
        "LimitNOFILE=1048576",
        "# Prompts and keys are in its memory: no core dumps.",
        "LimitCORE=0",
    ]


def _token(name: str) -> list[str]:
    return _credential(name, "disagg-token", TOKEN_FILE, "The join token, needed once; after the first join the file may go.")


def _key(name: str) -> list[str]:
    return _credential(
        name, "disagg-key", KEY_FILE, "The key pair, for who keeps it apart; without the file it is made in the state directory."
    )


def _credential(name: str, credential: str, path: str, what: str) -> list[str]:
    """A file of root's that systemd shows to this unit alone, and which may be missing.

    SetCredential= gives an empty one then; without it systemd would refuse to start the unit.
    """
    return [
        f"# {what}",
        f"# Write it to {path} (root, mode 0600); systemd shows a copy of it to this unit alone.",
        f"LoadCredential={credential}:{path}",
        rf"SetCredential={credential}:\n",
        f"# Encrypted at rest: systemd-creds encrypt --name={credential} {path} {path}.cred",
        f"# and with systemctl edit {name}, under [Service]:",
        f"#   LoadCredentialEncrypted={credential}:{path}.cred",
    ]


def _hardened(home: str, why: str = "") -> list[str]:
    return [
        "CapabilityBoundingSet=",
        "AmbientCapabilities=",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        *([f"# {why}"] if why else []),
        home,
        "PrivateTmp=yes",
        "PrivateMounts=yes",
        "ProtectClock=yes",
        "ProtectControlGroups=yes",
        "ProtectHostname=yes",
        "ProtectKernelLogs=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "ProtectProc=invisible",
        "KeyringMode=private",
        "LockPersonality=yes",
        "RemoveIPC=yes",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "SystemCallArchitectures=native",
        "SystemCallErrorNumber=EPERM",
    ]


def _calls_of_python() -> list[str]:
    return [
        "# AF_NETLINK: libzmq lists the network's interfaces when it binds, and ends the process if it may not.",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK",
        "SystemCallFilter=@system-service",
        "SystemCallFilter=~@privileged @resources",
        "# Each thread of libzmq sets its own scheduling to what it is already, and ends the process if it may not.",
        "SystemCallFilter=sched_setscheduler",
    ]


def _closed_to_devices() -> list[str]:
    return ["PrivateDevices=yes", "DevicePolicy=closed"]


def _install() -> list[str]:
    return ["[Install]", "WantedBy=multi-user.target"]


def _made_by(role: str) -> str:
    return f"Made by disagg {__version__}: `disagg systemd {role} --install` writes it anew."


def _header(role: str, unit: str) -> str:
    return f"# {_made_by(role)}\n# Change it with `systemctl edit {unit}`: such changes stay when disagg is upgraded.\n"


# --- words of a command line


def _executable(site: Site) -> str:
    return _quoted(site.executable)  # systemd expands no variables in the first word


def _word(text: str) -> str:
    return _quoted(text).replace("$", "$$")


def _quoted(text: str) -> str:
    if _PLAIN.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def _text(*lines: str) -> str:
    return "\n".join(lines) + "\n"
