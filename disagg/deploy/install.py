"""Writes the units of `deploy/systemd` onto a machine, or into a folder that looks like one, and says each thing that it did."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from disagg.deploy.systemd import POLKIT_FILE, ROUTER, SYSUSERS_FILE, TOKEN_FILE, Site, to_enable, unit_files
from disagg.errors import InstallError
from disagg.model import Role

COMMAND_LIMIT_S = 60.0
CONFIG_TEXT = "# The settings of this host. `disagg check --default` prints every setting with its default.\n"

Say = Callable[[str], None]


class Installer:
    """One installation.

    Args:
        site: what the units must know of the machine.
        root: the folder that stands for /; with any other than / nothing outside of it changes, and nothing is started.
        say: takes each sentence about what was done.
    """

    def __init__(self, site: Site, *, root: Path, say: Say) -> None:
        self._site = site
        self._root = root
        self._say = say
        self._real = root == Path("/")

    def install(self, role: Role | str) -> None:
        """Writes the files, makes the user, tells systemd. Can be repeated: a second run changes nothing.

        Raises:
            ConfigError: a path or the user's name cannot be written into a unit.
            InstallError: not root, or a file or a command failed.
        """
        files = unit_files(role, self._site)
        if self._real and os.geteuid() != 0:
            raise InstallError(f"installing units needs root: run `sudo disagg systemd {role} --install`, or try it with --root DIR")
        for path, text in files.items():
            self._write(path, text)
        self._write_config()
        self._make_user()
        self._reload()
        self._warn(role)
        self._say(f"Next: {_next(role)}")

    def _inside(self, path: str) -> Path:
        return self._root / path.removeprefix("/")

    def _write(self, path: str, text: str) -> None:
        target = self._inside(path)
        try:
            if target.is_file() and target.read_text(encoding="utf-8") == text:
                self._say(f"{target} is as it should be.")
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, text)
        except (OSError, UnicodeDecodeError) as error:
            raise InstallError(f"{target} cannot be written: {getattr(error, 'strerror', None) or error}") from error
        self._say(f"Wrote {target}.")

    def _write_config(self) -> None:
        """Only if there is none: it belongs to the person who runs this host."""
        if self._inside(self._site.config_path).exists():
            self._say(f"{self._inside(self._site.config_path)} exists and stays as it is.")
        else:
            self._write(self._site.config_path, CONFIG_TEXT)

    def _make_user(self) -> None:
        user = self._site.user
        if self._real and _exists(user):
            self._say(f"The user {user} exists.")
            return
        if shutil.which("systemd-sysusers"):
            _run("systemd-sysusers", f"--root={self._root}", Path(SYSUSERS_FILE).name)
        elif self._real:
            _run("useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/var/lib/disagg", user)
        else:
            self._say(f"Did not make the user {user}: there is no systemd-sysusers here; at the next boot it is made of {SYSUSERS_FILE}.")
            return
        self._say(f"The system user {user} is there.")

    def _reload(self) -> None:
        if not self._real:
            self._say(f"Did not tell systemd: {self._root} is not the root of this machine.")
        elif not Path("/run/systemd/system").is_dir():  # as in sd_booted(3)
            self._say("Did not tell systemd: it does not run on this machine.")
        else:
            _run("systemctl", "daemon-reload")
            self._say("Told systemd to read its units again.")

    def _warn(self, role: Role | str) -> None:
        user, executable = self._site.user, self._site.executable
        closed = closed_to_others(Path(executable))
        if closed:
            self._say(
                f"Warning: {closed} is closed to the user {user}, who must execute {executable}: "
                "install disagg elsewhere, as in /opt/disagg, or open that folder."
            )
        if role != ROUTER and not self._inside("/usr/share/polkit-1/rules.d").is_dir():
            self._say(
                "Warning: polkit is not installed, or is older than 0.106 and reads no rules: the agent cannot start its engines "
                f"without it. Install polkitd; {POLKIT_FILE} is in place."
            )


def _next(role: Role | str) -> str:
    start = f"systemctl enable --now {to_enable(role)}"
    if role == ROUTER:
        return start
    return (
        f"write the token that `disagg token create --role {role}` printed to {TOKEN_FILE} (mode 0600), "
        f"the router's address to the config, then: {start}"
    )


def closed_to_others(path: Path) -> Path | None:
    """The first thing on the way to `path` that a user without special rights cannot pass or execute; None if the way is open."""
    with contextlib.suppress(OSError):
        real = path.resolve(strict=True)
        for step in (*reversed(real.parents), real):
            if not step.stat().st_mode & 0o001:
                return step
        return None
    return path


def write_atomically(target: Path, text: str) -> None:
    """A reader, systemd above all, sees the old file or the new one and never a part."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def _run(*command: str) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(f"`{' '.join(command)}` cannot be run: {error}") from error
    if result.returncode:
        said = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise InstallError(f"`{' '.join(command)}` failed: {said[-1]}")
