"""Being somebody else for a while: root ignores the permissions that most of these tests are about."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534
STRANGER = 12345

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of other users")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root becomes an ordinary user; an ordinary user stays who he is."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def folder_of_nobody() -> Iterator[Path]:
    """A folder that `as_nobody` can reach, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp(prefix="state-"))
    try:
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        yield folder
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o7777
