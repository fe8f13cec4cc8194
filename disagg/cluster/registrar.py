"""Who may join: the router's registrations and outstanding tokens, asked for each handshake and each registration."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from disagg.errors import DisaggError
from disagg.model import HostId, Role
from disagg.security.registry import Registration, Registry
from disagg.security.state import router_hosts_path, router_tokens_path
from disagg.security.token import TokenStore
from disagg.wire.messages import Refused, Register, Registered

_PAIRED = frozenset({Role.PREFILL, Role.DECODE})


class Registrar:
    """Reads and writes the router's part of the state directory.

    Args:
        root: the state directory.
        wall: the wall clock, seconds since 1970; tokens expire by the calendar.

    Raises:
        StartError: the registrations cannot be read.
    """

    def __init__(self, root: Path, *, wall: Callable[[], float], log: structlog.typing.FilteringBoundLogger) -> None:
        self._registry = Registry(router_hosts_path(root))
        self._tokens = TokenStore(router_tokens_path(root))
        self._wall = wall
        self._log = log
        self._one_at_a_time = asyncio.Lock()

    def allows(self, public_key: str) -> bool:
        """Whether a peer with this key may connect."""
        if self._registry.by_key(public_key) is not None:
            return True
        try:
            return self._tokens.find(public_key, now_wall=self._wall()) is not None
        except DisaggError as error:
            self._log.error("a token cannot be read", error=str(error))
            return False

    def host_of(self, public_key: str) -> HostId | None:
        """The registered name of a key; None for a token's key, and for one that was revoked since it connected."""
        found = self._registry.by_key(public_key)
        return None if found is None else HostId(found.name)

    def may_be(self, host: HostId, role: Role) -> bool:
        """Whether a host may run an engine in this role: prefill and decode engines change places, unified is another matter."""
        found = self._registry.by_name(host)
        return found is not None and (role in found.roles or (role in _PAIRED and not _PAIRED.isdisjoint(found.roles)))

    def hosts(self) -> tuple[Registration, ...]:
        """Everybody who is registered, by name."""
        return self._registry.all()

    async def exchange(self, token_key: str, register: Register) -> Registered | Refused:
        """Takes a token and registers a host's own key for it, once."""
        async with self._one_at_a_time:
            try:
                return await asyncio.to_thread(self._exchange, token_key, register)
            except DisaggError as error:
                return Refused(str(error), final=True)

    def _exchange(self, token_key: str, register: Register) -> Registered | Refused:
        grant = self._tokens.find(token_key, now_wall=self._wall())
        if grant is None:
            return Refused("the token has expired or was used before: make a new one with `disagg token create`", final=True)
        extra = [role for role in register.roles if role not in grant.roles]
        if extra or not register.roles:
            asked, given = " and ".join(extra) or "no role", " and ".join(grant.roles)
            return Refused(f"the token is for {given} and not for {asked}: make one with `disagg token create --role …`", final=True)
        # The name first: a host that is told to choose another one must still be able to use its token.
        registration = Registration(register.name, register.public_key, grant.roles, self._wall())
        self._registry.refuse(registration)
        if not self._tokens.spend(token_key):
            return Refused("the token was used at this very moment by another host: make a new one", final=True)
        self._registry.register(registration)
        self._log.info("host registered", host=register.name, roles=[r.value for r in grant.roles])
        return Registered(register.name)

    async def revoke(self, host: str) -> bool:
        """Shuts a host out; False when nobody is registered under that name. Raises StartError when it cannot be stored."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._registry.revoke, host) is not None
