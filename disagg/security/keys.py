"""CURVE key pairs: made, kept in a private file, loaded. A key is 32 bytes, written as 40 characters of Z85."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from disagg.errors import StartError
from disagg.security.state import UNDECODABLE, create_private, read_private, write_private

KEY_BYTES = 32
_KEY_CHARACTERS = 40
_FILE = """\
# A key of disagg. `public` may be shown to anybody; who has `secret` is this router or host.
public = "{public}"
secret = "{secret}"
"""


@dataclass(frozen=True)
class KeyPair:
    """Both halves of a key, Z85. It does not show its secret."""

    public: str
    secret: str = field(repr=False)


class _KeyFile(msgspec.Struct, frozen=True):
    public: str
    secret: str

    def __repr__(self) -> str:
        return "<_KeyFile>"


def key_bytes(text: str) -> bytes | None:
    """The 32 bytes of a key, or None if the text is no key. Two different texts never give the same bytes."""
    if len(text) != _KEY_CHARACTERS:
        return None
    try:
        return z85.decode(text)
    except (KeyError, ValueError, struct.error):  # not an ASCII text, not of the alphabet, five characters beyond 32 bits
        return None


def key_text(key: bytes) -> str:
    """The Z85 text of a key's 32 bytes."""
    assert len(key) == KEY_BYTES
    return z85.encode(key).decode("ascii")


def public_half(secret: str) -> str:
    """The public key that belongs to this secret key."""
    assert key_bytes(secret) is not None
    return zmq.curve_public(secret.encode("ascii")).decode("ascii")


def make_key() -> KeyPair:
    """A new key pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode("ascii"), secret.decode("ascii"))


def load_key(path: Path) -> KeyPair:
    """Reads a key pair.

    Raises:
        StartError: there is none, others could have read it, or it makes no sense.
    """
    text = read_private(path)
    if text is None:
        raise StartError(f"there is no key at {path}: make one with `disagg keygen`")
    return _parse(text, path)


def load_or_make_key(path: Path) -> tuple[KeyPair, bool]:
    """Reads a key pair or, where there is none, makes one. The second is True if it was made now. Never overwrites.

    Raises:
        StartError: as `load_key`, or it cannot be written.
    """
    if read_private(path) is None:
        made = make_key()
        if create_private(path, _FILE.format(public=made.public, secret=made.secret).encode()):
            return made, True
    return load_key(path), False  # somebody else may have made it at this moment: theirs is the key


def load_given_key(path: Path, environ: Mapping[str, str]) -> KeyPair | None:
    """Reads a key pair that somebody keeps apart from the state; None where the file is empty.

    A credential that systemd shows to its service may be readable by its group: systemd guards its folder.

    Raises:
        StartError: as `load_key`; a file that is missing is an error too, for a router that made itself another key would lock out
            every host.
    """
    if not path.exists():
        raise StartError(f"there is no key file {path}: mend --key-file, or leave it out to use the key of the state directory")
    credentials = environ.get("CREDENTIALS_DIRECTORY", "")
    is_credential = bool(credentials) and path.parent == Path(credentials)
    text = _read_credential(path) if is_credential else read_private(path) or b""
    return _parse(text, path) if text.strip() else None


def _read_credential(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def publish_key(path: Path, key: KeyPair) -> None:
    """Writes down the public half alone, for `disagg token create` on a router whose key lies elsewhere."""
    write_private(path, key.public.encode() + b"\n")


def load_published_key(path: Path) -> str | None:
    """The public key that `publish_key` wrote; None where there is none."""
    text = (read_private(path) or b"").decode("ascii", errors="replace").strip()
    return text if key_bytes(text) is not None else None


def _parse(text: bytes, path: Path) -> KeyPair:
    try:
        found = msgspec.toml.decode(text, type=_KeyFile)
    except UNDECODABLE:
        found = None
    if found is None or key_bytes(found.public) is None or key_bytes(found.secret) is None:
        raise StartError(f"{path} holds no key: restore it from a backup, or remove it to have a new key made")
    if public_half(found.secret) != found.public:
        raise StartError(f"{path} holds a public key that does not belong to its secret: restore it, or remove it to have a new key made")
    return KeyPair(found.public, found.secret)
