"""The state directory: where keys, tokens and registrations are, and how such a private file is written and read.

    <state>/router/key             the router's key pair
    <state>/router/public          its public half alone, where the pair is kept elsewhere
    <state>/router/tokens/<hex>    an outstanding join token; its name is the public half of its secret
    <state>/router/hosts.json      the hosts that may connect
    <state>/hosts/<name>/key       the key pair of the host of that name

A private file is whole or absent, whatever happens to its writer: the bytes go to a draft beside it, to the disk, and only then under its
name. A draft that a crashed writer left has a name of its own, which nobody reads or writes again. Nobody but its owner may read it, which
is checked at each reading. The folder is opened once and everything is done relative to it, so that a folder that is swapped for a link in
between cannot lead root elsewhere.

Every call blocks until the disk has it: milliseconds, on a slow disk more.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from disagg.errors import ConfigError, StartError

# What a decoder raises for bytes that make no sense: bad text in a name is a UnicodeDecodeError, brackets without end a RecursionError.
UNDECODABLE = (msgspec.DecodeError, ValueError, RecursionError)

_FOLDER_MODE = 0o700
_FILE_MODE = 0o600
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OTHERS_READ = stat.S_IRGRP | stat.S_IROTH
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_ELSEWHERE = "choose another folder with --state-dir"
_OWNER = f"run as the folder's owner or {_ELSEWHERE}"
_ADVICE = {
    errno.EROFS: f"the file system is read-only; {_ELSEWHERE}",
    errno.ENOSPC: "the disk is full; free some space and try again",
    errno.EDQUOT: "the disk quota is used up; free some space and try again",
    errno.EACCES: f"not permitted; {_OWNER}",
    errno.EPERM: f"not permitted; {_OWNER}",
}


def state_root(flag: str | Path | None, environ: Mapping[str, str]) -> Path:
    """The state directory, absolute; it need not exist.

    The flag wins over ``DISAGG_STATE_DIR``, that over systemd's ``STATE_DIRECTORY``, that over the defaults. An empty variable is unset.

    Raises:
        StartError: nothing says where, and this user has no home.
    """
    systemd = environ.get("STATE_DIRECTORY", "").partition(":")[0]  # a list where the unit asks for several
    given = flag or environ.get("DISAGG_STATE_DIR") or systemd
    return Path(given).absolute() if given else _default_root(environ)


def _default_root(environ: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/disagg")
    state_home = environ.get("XDG_STATE_HOME", "")
    if Path(state_home).is_absolute():  # the specification says to ignore any other
        return Path(state_home) / "disagg"
    return _home(environ) / ".local" / "state" / "disagg"


def _home(environ: Mapping[str, str]) -> Path:
    if environ.get("HOME"):
        return Path(environ["HOME"]).absolute()
    try:
        return Path.home()
    except RuntimeError as error:
        raise StartError("there is no place for the state, for this user has no home: give one with --state-dir") from error


def router_key_path(root: Path) -> Path:
    """The router's key pair."""
    return root / "router" / "key"


def router_public_path(root: Path) -> Path:
    """The public half of a router's key that lies elsewhere."""
    return root / "router" / "public"


def router_tokens_path(root: Path) -> Path:
    """The folder of outstanding join tokens."""
    return root / "router" / "tokens"


def router_hosts_path(root: Path) -> Path:
    """The router's registrations."""
    return root / "router" / "hosts.json"


def is_host_name(name: str) -> bool:
    """Whether a host may be called so: it becomes the name of a folder and stands in logs."""
    return _HOST_NAME.fullmatch(name) is not None


def host_folder(root: Path, name: str) -> Path:
    """The folder of what belongs to one host; its key pair is ``key`` in it.

    Raises:
        ConfigError: the name would not do as the name of a folder.
    """
    if not is_host_name(name):
        raise ConfigError(f"--name = {name!r} is not allowed: write 1 to 63 letters, digits, '.', '_' or '-', a letter or digit first")
    return root / "hosts" / name


def write_private(path: Path, data: bytes) -> None:
    """Puts these bytes under this name, mode 0600, in place of what was there. Folders that are missing are made, mode 0700.

    What root writes in a folder of somebody else is made theirs, so that the service can read what its admin wrote.

    Raises:
        StartError: it cannot be written; what was there is still there.
    """
    with _in_one_sentence("write", path), _folder(path.parent) as folder, _draft(path.name, data, folder) as draft:
        os.replace(draft, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)


def create_private(path: Path, data: bytes) -> bool:
    """As `write_private`, but never in place of another file: False, and nothing is written, if there is one.

    Of several that try at once exactly one succeeds.
    """
    with _in_one_sentence("write", path), _folder(path.parent) as folder, _draft(path.name, data, folder) as draft:
        try:
            os.link(draft, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except FileExistsError:
            return False
        os.fsync(folder)
        return True


def read_private(path: Path) -> bytes | None:
    """What the file holds, or None if there is no such file.

    Raises:
        StartError: it cannot be read, or others could have read or written it.
    """
    with _in_one_sentence("read", path):
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe of that name must not hold us up
        except FileNotFoundError:
            return None
        try:
            _refuse_what_is_not_private(path, os.fstat(file))
            with os.fdopen(file, "rb", closefd=False) as stream:
                return stream.read()
        finally:
            os.close(file)


def remove_private(path: Path) -> bool:
    """Removes the file for good. Of several that try at once exactly one gets True; False if there is none.

    Raises:
        StartError: it cannot be removed, or it is not sure that it stays so when the power fails.
    """
    with _in_one_sentence("remove", path):
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return False
        with _folder(path.parent) as folder:
            os.fsync(folder)
        return True


# --- how it is done


@contextmanager
def _in_one_sentence(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0) or f"{error.strerror}; {_ELSEWHERE}"
        raise StartError(f"cannot {verb} {path}: {advice}") from error


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    folder = _open_folder(path)
    try:
        yield folder
    finally:
        os.close(folder)


def _open_folder(path: Path) -> int:
    """Opens the folder and makes it first where it is missing, its parents too."""
    try:
        return os.open(path, _OPEN_FOLDER)
    except FileNotFoundError:
        with _folder(path.parent) as parent:
            return _make_folder(path.name, parent)


def _make_folder(name: str, parent: int) -> int:
    with suppress(FileExistsError):  # somebody else makes the same one at this moment
        os.mkdir(name, _FOLDER_MODE, dir_fd=parent)
    folder = os.open(name, _OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=parent)
    try:
        os.fchmod(folder, _FOLDER_MODE)  # whatever the umask took away
        _give_to_owner(folder, parent)
        os.fsync(parent)
    except BaseException:
        os.close(folder)
        raise
    return folder


@contextmanager
def _draft(name: str, data: bytes, folder: int) -> Iterator[str]:
    """The bytes, safe on the disk under a name of their own, which is gone at the end."""
    draft = f".{name}.{secrets.token_hex(8)}.tmp"
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE, dir_fd=folder)
    try:
        with os.fdopen(file, "wb") as stream:
            os.fchmod(file, _FILE_MODE)
            _give_to_owner(file, folder)
            stream.write(data)
            stream.flush()
            os.fsync(file)
        yield draft
    finally:
        with suppress(FileNotFoundError):  # it has its name by now
            os.unlink(draft, dir_fd=folder)


def _give_to_owner(made: int, folder: int) -> None:
    """What root made in somebody's folder becomes that somebody's."""
    owner = os.fstat(folder)
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.fchown(made, owner.st_uid, owner.st_gid)


def _refuse_what_is_not_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise StartError(f"{path} is not a file: remove it or {_ELSEWHERE}")
    mode = stat.S_IMODE(status.st_mode)
    if mode & (_OTHERS_READ | _OTHERS_WRITE):
        verb = "read" if mode & _OTHERS_READ else "written"
        raise StartError(f"{path} can be {verb} by others (mode {mode:04o}): chmod 600 {shlex.quote(str(path))}")
    if not _may_be_trusted(status.st_uid, path):
        raise StartError(f"{path} belongs to uid {status.st_uid}: give it to the user who runs disagg, uid {os.geteuid()}, or remove it")


def _may_be_trusted(owner: int, path: Path) -> bool:
    """Ours, root's or, where we are root, a service's own file in its own folder."""
    us = os.geteuid()
    return owner in {us, 0} or (us == 0 and owner == path.parent.stat().st_uid)
