"""Several hosts on one machine: a network namespace each; where that is not allowed, an address of loopback each.

    router       p1          p2          d1          d2         one namespace each, with one interface, eth0
   10.77.1.2  10.77.2.2   10.77.3.2   10.77.4.2   10.77.5.2
      └───────────┴───────── wire ────────┴───────────┘         one more, which routes between them and can be cut

Nothing is made in the machine's own namespace; the test gets at a host by opening its sockets inside of that host's namespace.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

CONTROL_PORT = 7400
HTTP_PORT = 8000
ADMIN_PORT = 8001
FORCE_LOOPBACK = "DISAGG_TEST_LOOPBACK"
"""Set to anything, it keeps the tests from making namespaces."""
_CLONE_NEWNET = 0x40000000
_NAMESPACES = Path("/run/netns")

SocketFactory = Callable[[Any], socket.socket]


class Network(Protocol):
    """Where the hosts are and what can go wrong between them.

    Attributes:
        why_uncut: why no link can be cut here; empty when links can.
        router_address: where the router's listeners are, as seen from the router's host.
    """

    why_uncut: str
    router_address: str

    def address(self, host: str) -> str:
        """The host's address."""

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """The command that runs a command on a host, in the process that is started."""

    def socket_factory(self, host: str) -> SocketFactory | None:
        """Makes sockets on a host, for aiohttp; None for those of the test's own process."""

    def unplug(self, host: str) -> None:
        """Takes the host's cable out."""

    def plug(self, host: str) -> None:
        """Puts it back."""

    def cut(self, source: str, target: str, port: int = 0) -> None:
        """From now on nothing goes from one host to the other, and nobody is told. `port`: of either side; 0 for all."""

    def mend(self, source: str, target: str, port: int = 0) -> None:
        """It goes again."""

    def reset(self, host: str, port: int) -> str:
        """Resets the host's connections to this port. Returns why that cannot be done, empty when it was."""


class Namespaces:
    """A namespace for each host. Made by `open_network`."""

    why_uncut = ""
    router_address = "127.0.0.1"

    def __init__(self, prefix: str, hosts: Sequence[str]) -> None:
        self._prefix = prefix
        self._hosts = tuple(hosts)

    @classmethod
    @contextmanager
    def opened(cls, hosts: Sequence[str]) -> Iterator[Namespaces]:
        """Makes them, and removes them with every process in them.

        Raises:
            RuntimeError: they cannot be made here.
        """
        network = cls(f"disagg-{os.getpid()}-{secrets.token_hex(2)}", hosts)
        with ExitStack() as stack:
            for name in ("wire", *hosts):
                _ip("netns", "add", network.namespace(name))
                stack.callback(_remove, network.namespace(name))
                network._in(name, "link", "set", "lo", "up")
            with _inside(network.namespace("wire")):
                Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="ascii")
            for host in hosts:
                network._connect(host)
            yield network

    def _connect(self, host: str) -> None:
        gateway = self.address(host).rpartition(".")[0] + ".1"
        self._in("wire", "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", self.namespace(host))
        self._in("wire", "addr", "add", f"{gateway}/24", "dev", host)
        self._in("wire", "link", "set", host, "up")
        self._in(host, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        self._in(host, "link", "set", "eth0", "up")
        self._in(host, "route", "add", "default", "via", gateway)

    def namespace(self, host: str) -> str:
        return f"{self._prefix}-{host}"

    def _in(self, host: str, *arguments: str) -> None:
        _ip("-n", self.namespace(host), *arguments)

    def address(self, host: str) -> str:
        return f"10.77.{self._hosts.index(host) + 1}.2"

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.namespace(host), *command]

    def socket_factory(self, host: str) -> SocketFactory:
        namespace = self.namespace(host)

        def make(info: Any) -> socket.socket:
            family, kind, proto, _, _ = info
            with _inside(namespace):
                return socket.socket(family, kind, proto)

        return make

    def unplug(self, host: str) -> None:
        self._in("wire", "link", "set", host, "down")

    def plug(self, host: str) -> None:
        self._in("wire", "link", "set", host, "up")

    def cut(self, source: str, target: str, port: int = 0) -> None:
        for rule in self._rules(source, target, port):
            self._in("wire", "rule", "add", *rule, "blackhole")

    def mend(self, source: str, target: str, port: int = 0) -> None:
        for rule in self._rules(source, target, port):
            self._in("wire", "rule", "del", *rule, "blackhole")

    def _rules(self, source: str, target: str, port: int) -> list[list[str]]:
        between = ["from", self.address(source), "to", self.address(target)]
        return [[*between, "ipproto", "tcp", side, str(port)] for side in ("sport", "dport")] if port else [between]

    def reset(self, host: str, port: int) -> str:
        return _reset(self.command(host, ["ss"]), self.address("router"), port)


class Loopback:
    """An address of loopback for each host: processes can be stopped and killed, but no link can be cut."""

    def __init__(self, hosts: Sequence[str], why: str) -> None:
        self.why_uncut = f"no network namespaces here, so no link can be cut ({why}); the other scenarios run as plain processes"
        self._hosts = tuple(hosts)
        self._net = f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(200) + 20}"
        self.router_address = self.address("router")

    def address(self, host: str) -> str:
        return f"{self._net}.{self._hosts.index(host) + 1}"

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        return list(command)

    def socket_factory(self, host: str) -> SocketFactory | None:
        return None

    def unplug(self, host: str) -> None:
        raise NotImplementedError(self.why_uncut)

    plug = unplug

    def cut(self, source: str, target: str, port: int = 0) -> None:
        raise NotImplementedError(self.why_uncut)

    mend = cut

    def reset(self, host: str, port: int) -> str:
        return _reset(["ss"], self.address("router"), port)


@contextmanager
def open_network(hosts: Sequence[str]) -> Iterator[Network]:
    """A network of these hosts, gone with everything in it at the end."""
    with ExitStack() as stack:
        yield _make_network(stack, hosts)


def _make_network(stack: ExitStack, hosts: Sequence[str]) -> Network:
    if os.environ.get(FORCE_LOOPBACK):
        return Loopback(hosts, f"{FORCE_LOOPBACK} is set")
    try:
        return stack.enter_context(Namespaces.opened(hosts))
    except (RuntimeError, OSError) as error:
        return Loopback(hosts, str(error))


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=10)
    if done.returncode:
        raise RuntimeError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")


def _remove(namespace: str) -> None:
    """Ends what still runs in it, engines without an agent above all, and removes it."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False, timeout=10)
    for pid in map(int, listed.stdout.split()):
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue
    _ip("netns", "del", namespace)


@contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """This thread is in that namespace; a socket stays where it was made."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(_NAMESPACES / namespace)
        try:
            yield
        finally:
            _set_namespace(home)
    finally:
        os.close(home)


def _enter(path: Path) -> None:
    there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _set_namespace(there)
    finally:
        os.close(there)


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _reset(ss: Sequence[str], address: str, port: int) -> str:
    """`ss -K` says nothing when the kernel cannot do it, so what is left is looked at."""
    which = ["state", "established", "dst", address, "dport", "=", f":{port}"]
    try:
        before = _local_ports([*ss, "-Htn", *which])
        subprocess.run([*ss, "-K", "-Htn", *which], capture_output=True, check=False, timeout=10)
        left = before & _local_ports([*ss, "-Htn", *which])
    except FileNotFoundError:
        return "there is no `ss`"
    if not before:
        return f"nobody is connected to {address}:{port}"
    return "this kernel does not let `ss -K` reset a connection" if left else ""


def _local_ports(command: Sequence[str]) -> set[str]:
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    return set(re.findall(r":(\d+)\s+\S+:\d+", shown))
