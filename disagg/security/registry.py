"""The hosts that may connect: a name, a key and the roles it was given. One writer, the router; every change is on the disk at once."""

from __future__ import annotations

from pathlib import Path

import msgspec

from disagg.errors import NameTakenError, RequestError, StartError
from disagg.model import Role
from disagg.security.keys import key_bytes
from disagg.security.state import UNDECODABLE, is_host_name, read_private, write_private


class Registration(msgspec.Struct, frozen=True):
    """A host that joined.

    Attributes:
        public_key: its own key, Z85.
        roles: those of the token that it joined with.
        registered_at_wall: wall clock, seconds since 1970.
    """

    name: str
    public_key: str
    roles: tuple[Role, ...]
    registered_at_wall: float


class _RegistryFile(msgspec.Struct, frozen=True):
    hosts: tuple[Registration, ...]


class Registry:
    """The registrations of a router, in memory and in its file.

    Args:
        path: the file; none means that no host joined yet.

    Raises:
        StartError: the file is there but cannot be read, trusted or understood.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved = True
        self._by_name: dict[str, Registration] = {}
        self._by_key: dict[str, Registration] = {}
        self._put(_load(path))

    def by_key(self, public_key: str) -> Registration | None:
        """The host of this key. Any text may be asked for."""
        return self._by_key.get(public_key)

    def by_name(self, name: str) -> Registration | None:
        """The host of this name."""
        return self._by_name.get(name)

    def all(self) -> tuple[Registration, ...]:
        """All hosts, by name."""
        return tuple(self._by_name[name] for name in sorted(self._by_name))

    def register(self, registration: Registration) -> None:
        """Lets a host connect from now on. A host that is registered already, by name and key, gets the new roles.

        Raises:
            NameTakenError: the name belongs to another key, or the key to another name.
            RequestError: the name or the key cannot be one.
            StartError: it cannot be stored, and then it does not count either.
        """
        self.refuse(registration)
        self._save([*(r for r in self.all() if r.name != registration.name), registration])

    def refuse(self, registration: Registration) -> None:
        """Raises what `register` would raise for this registration, and changes nothing."""
        self._refuse_nonsense(registration)
        self._refuse_taken(registration)

    def revoke(self, name: str) -> Registration | None:
        """Shuts a host out from now on; None if there is none of this name.

        Raises:
            StartError: it cannot be stored. The host is out all the same, but may be back after a restart: revoke again.
        """
        found = self._by_name.get(name)
        if found is None and self._saved:
            return None
        rest = [r for r in self.all() if r.name != name]
        self._put(rest)
        self._save(rest)
        return found

    def __repr__(self) -> str:
        return f"<Registry {self._path} hosts={len(self._by_name)}>"

    def _refuse_nonsense(self, registration: Registration) -> None:
        if not is_host_name(registration.name):
            raise RequestError("the host's name is not allowed: start it with another --name", param="name")
        if key_bytes(registration.public_key) is None:
            raise RequestError("the host's public key is not a key: start it with a key that `disagg` made", param="public_key")

    def _refuse_taken(self, registration: Registration) -> None:
        name = registration.name
        holder = self._by_name.get(name)
        if holder is not None and holder.public_key != registration.public_key:
            raise NameTakenError(
                f"a host {name!r} is registered with another key: `disagg hosts revoke {name}` first, or choose another --name"
            )
        holder = self._by_key.get(registration.public_key)
        if holder is not None and holder.name != name:
            raise NameTakenError(
                f"the key of host {name!r} is registered as {holder.name!r}: `disagg hosts revoke {holder.name}` first, or make a new key"
            )

    def _put(self, hosts: list[Registration]) -> None:
        self._by_name = {r.name: r for r in hosts}
        self._by_key = {r.public_key: r for r in hosts}

    def _save(self, hosts: list[Registration]) -> None:
        self._saved = False
        text = msgspec.json.format(msgspec.json.encode(_RegistryFile(tuple(sorted(hosts, key=lambda r: r.name)))))
        write_private(self._path, text + b"\n")
        self._put(hosts)
        self._saved = True


def _load(path: Path) -> list[Registration]:
    text = read_private(path)
    if text is None:
        return []
    try:
        hosts = list(msgspec.json.decode(text, type=_RegistryFile).hosts)
    except UNDECODABLE as error:
        raise _broken(path, str(error)) from error
    for host in hosts:
        if not is_host_name(host.name) or key_bytes(host.public_key) is None:
            raise _broken(path, f"{host.name!r} is no host with a key")
    if len({h.name for h in hosts}) < len(hosts) or len({h.public_key for h in hosts}) < len(hosts):
        raise _broken(path, "a name or a key stands there twice")
    return hosts


def _broken(path: Path, why: str) -> StartError:
    return StartError(f"{path} is broken ({why}): restore it from a backup, or remove it and let every host join again with a token")
