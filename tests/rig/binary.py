"""Compiles ``rig.c``, the fake engines and the load generator, where it is needed.

The rig lives among the tests and not in the package: whoever installs disagg needs no fake engines, and here mypy, ruff and
the tests of the tests reach it. The binary is cached by the digest of its source, so a change of the source is a new binary.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("rig.c")
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


class RigError(Exception):
    """The measuring cannot go on; the sentence says what is missing or broken."""


def cache_dir() -> Path:
    """Where the rig keeps what it builds and installs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "disagg"


def build() -> Path:
    """The compiled rig; compiles it if this source has not been compiled before."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    binary = cache_dir() / "rig" / digest
    if binary.exists():
        return binary
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RigError("the fake engines are written in C and need a C compiler: install gcc or clang, or name one in CC")
    binary.parent.mkdir(parents=True, exist_ok=True)
    fresh = binary.with_suffix(f".{os.getpid()}")  # renamed when complete: two benches may build at once
    done = subprocess.run([compiler, *FLAGS, "-o", fresh, SOURCE], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RigError(f"{compiler} cannot compile {SOURCE.name}:\n{done.stderr}")
    fresh.rename(binary)
    return binary
