"""Join tokens: a host's first word to the router.

The one-time secret in a token is itself a CURVE secret key. A host that joins connects with it as its client key; the router lets a key
connect only if it belongs to a registered host or to an outstanding token. So no frame of a stranger is ever parsed, and the router stores
only the public half: who reads its disk cannot join.

A token is outstanding as long as its file is there. Whoever removes the file has spent it; the file system decides who that was.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from disagg.errors import ConfigError, StartError
from disagg.model import Role
from disagg.security.keys import KEY_BYTES, key_bytes, key_text, make_key, public_half
from disagg.security.state import UNDECODABLE, read_private, remove_private, write_private

PREFIX = "dgt1_"
_LONGEST = 512  # characters; a real one has some 120
_BODY = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_FILE_NAME = re.compile(r"[0-9a-f]{64}", re.ASCII)

_Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_Roles = Annotated[tuple[Role, ...], msgspec.Meta(min_length=1)]
_WallSeconds = Annotated[int, msgspec.Meta(ge=0)]


class _Wire(msgspec.Struct, frozen=True, array_like=True):
    router_key: _Key
    secret_key: _Key
    roles: _Roles
    expires_at: _WallSeconds

    def __repr__(self) -> str:
        return "<_Wire>"


class _GrantFile(msgspec.Struct, frozen=True):
    roles: _Roles
    expires_at: _WallSeconds


@dataclass(frozen=True)
class Token:
    """What a host needs to join, once. It does not show its secret.

    Attributes:
        router_key: the router's public key, Z85.
        secret_key: the client key of the first connection, Z85.
        roles: what the host may be.
        expires_at: wall clock, seconds since 1970.
    """

    router_key: str
    secret_key: str = field(repr=False)
    roles: tuple[Role, ...]
    expires_at: int

    @property
    def public_key(self) -> str:
        """The public half of the secret, by which the router knows the token."""
        return public_half(self.secret_key)

    def encode(self) -> str:
        """The token as one word of ASCII that needs no quotes in a shell."""
        router, secret = key_bytes(self.router_key), key_bytes(self.secret_key)
        assert router is not None
        assert secret is not None
        body = msgspec.msgpack.encode(_Wire(router, secret, self.roles, self.expires_at))
        return PREFIX + base64.urlsafe_b64encode(body).decode("ascii").rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Token:
        """Reads a token as a person pasted it.

        Raises:
            ConfigError: it is none; the sentence does not repeat it.
        """
        word = text.strip()
        if not word.startswith(PREFIX):
            raise ConfigError(f"this is no join token, which begins with {PREFIX}: make one with `disagg token create`")
        wire = _decode_body(word.removeprefix(PREFIX))
        if wire is None:
            raise ConfigError("the join token is damaged or not complete: copy all of it, or make another with `disagg token create`")
        return cls(key_text(wire.router_key), key_text(wire.secret_key), wire.roles, wire.expires_at)


def _decode_body(body: str) -> _Wire | None:
    if len(body) > _LONGEST or not _BODY.fullmatch(body):  # the decoder would skip characters that it does not know
        return None
    try:
        packed = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        return msgspec.msgpack.decode(packed, type=_Wire)
    except UNDECODABLE:
        return None


class Grant(msgspec.Struct, frozen=True):
    """What an outstanding token allows.

    Attributes:
        public_key: the public half of the token's secret, Z85.
        expires_at: wall clock, seconds since 1970.
    """

    public_key: str
    roles: tuple[Role, ...]
    expires_at: int


class TokenStore:
    """The outstanding tokens of a router: one file each, so that the command that makes one and the router need no lock.

    Args:
        folder: it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self, roles: Iterable[Role], ttl_s: int, *, now_wall: float, router_key: str) -> Token:
        """Makes a token that a host of one of these roles may use once within that time.

        Raises:
            StartError: it cannot be stored.
        """
        pair = make_key()
        token = Token(router_key, pair.secret, tuple(dict.fromkeys(roles)), int(now_wall + ttl_s))
        assert token.roles
        stored = _GrantFile(token.roles, token.expires_at)
        write_private(self._path(pair.public), msgspec.json.encode(stored) + b"\n")
        return token

    def find(self, public_key: str, *, now_wall: float) -> Grant | None:
        """The grant of this key, or None if there is none, if it was spent or expired, or if the text is no key.

        Raises:
            StartError: there is a file for it, but it cannot be trusted or makes no sense. Only somebody with access to the folder can
                bring that about, no peer.
        """
        if key_bytes(public_key) is None:
            return None
        path = self._path(public_key)
        stored = _read_grant(path)
        if stored is None:
            return None
        if stored.expires_at <= now_wall:
            with suppress(StartError):  # it is refused all the same
                remove_private(path)
            return None
        return Grant(public_key, stored.roles, stored.expires_at)

    def spend(self, public_key: str) -> bool:
        """Takes the token out of use. True for one caller only, whoever else tries at the same moment.

        It does not look at the time: ask `find` first.

        Raises:
            StartError: the file cannot be removed; nobody may count the token as spent by him.
        """
        return key_bytes(public_key) is not None and remove_private(self._path(public_key))

    def sweep(self, now_wall: float) -> int:
        """Removes what expired. Returns how many. What cannot be read or removed stays; `find` refuses it anyway."""
        return sum(_remove_expired(path, now_wall) for path in self._files())

    def _files(self) -> list[Path]:
        try:
            return [path for path in self._folder.iterdir() if _FILE_NAME.fullmatch(path.name)]
        except OSError:
            return []

    def _path(self, public_key: str) -> Path:
        """The file of a key. Its name is hex digits, so that nothing a peer sends can name a path."""
        key = key_bytes(public_key)
        assert key is not None
        return self._folder / key.hex()

    def __repr__(self) -> str:
        return f"<TokenStore {self._folder} files={len(self._files())}>"


def _remove_expired(path: Path, now_wall: float) -> bool:
    with suppress(StartError):
        stored = _read_grant(path)
        return stored is not None and stored.expires_at <= now_wall and remove_private(path)
    return False


def _read_grant(path: Path) -> _GrantFile | None:
    text = read_private(path)
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=_GrantFile)
    except UNDECODABLE as error:
        raise StartError(f"{path} is no token: remove it and make another with `disagg token create`") from error
