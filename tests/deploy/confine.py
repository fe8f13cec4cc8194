"""Executes a command under the system call rules of a unit, without systemd: `python confine.py UNIT_FILE COMMAND …`.

It reads SystemCallFilter=, MemoryDenyWriteExecute= and RestrictAddressFamilies= of the unit, expands the groups with the real
`systemd-analyze syscall-filter`, and loads the same rules through libseccomp that systemd would load.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path

ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 1  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO(EPERM)
EQUAL, MASKED = 4, 7  # SCMP_CMP_EQ, SCMP_CMP_MASKED_EQ
PROT_WRITE, PROT_EXEC = 2, 4
FAMILIES_LIMIT = 46  # AF_MAX of Linux


class Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp`."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def groups() -> dict[str, set[str]]:
    """Every group of system calls of this systemd, as it lists them: names and other groups."""
    text = subprocess.run(["systemd-analyze", "syscall-filter", "--no-pager"], capture_output=True, text=True, check=True).stdout
    found: dict[str, set[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("@"):
            name = line.strip()
            found[name] = set()
        elif line.startswith(("#", "Ungrouped")):
            name = ""
        elif line.startswith("    ") and name and not line.lstrip().startswith("#"):
            found[name].add(line.strip())
    return found


def expanded(words: set[str], known: dict[str, set[str]]) -> set[str]:
    """These words with each group replaced by what is in it."""
    return {name for word in words for name in (expanded(known[word], known) if word.startswith("@") else {word})}


def values(unit: str, key: str) -> list[str]:
    """What the unit says under a key, line by line."""
    return [line.partition("=")[2] for line in unit.splitlines() if line.startswith(f"{key}=")]


def allowed_calls(unit: str) -> set[str]:
    """What SystemCallFilter= leaves."""
    known = groups()
    allowed: set[str] = set(known["@default"])
    for value in values(unit, "SystemCallFilter"):
        words = set(value.removeprefix("~").split())
        allowed = allowed - expanded(words, known) if value.startswith("~") else allowed | expanded(words, known)
    return allowed


class Filter:
    """A libseccomp context."""

    def __init__(self, default: int) -> None:
        self.library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
        self.library.seccomp_init.restype = ctypes.c_void_p
        self.library.seccomp_init.argtypes = [ctypes.c_uint32]
        self.library.seccomp_load.argtypes = [ctypes.c_void_p]
        self.library.seccomp_rule_add_array.argtypes = [
            *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(Comparison))
        ]
        self.context = self.library.seccomp_init(default)

    def rule(self, action: int, call: str, *comparisons: Comparison) -> None:
        number = self.library.seccomp_syscall_resolve_name(call.encode())
        if number >= 0:  # a name of another processor is none here
            array = (Comparison * max(1, len(comparisons)))(*comparisons)
            assert self.library.seccomp_rule_add_array(self.context, action, number, len(comparisons), array) == 0, call

    def load(self) -> None:
        assert self.library.seccomp_load(self.context) == 0


def masked(arg: int, mask: int) -> Comparison:
    return Comparison(arg, MASKED, mask, mask)


def confine(unit: str) -> None:
    """Loads the rules into this process and all that come from it."""
    calls = Filter(REFUSE)
    for name in allowed_calls(unit):
        calls.rule(ALLOW, name)
    others = Filter(ALLOW)
    if values(unit, "MemoryDenyWriteExecute") == ["yes"]:
        others.rule(REFUSE, "mmap", masked(2, PROT_EXEC | PROT_WRITE))
        others.rule(REFUSE, "mprotect", masked(2, PROT_EXEC))
        others.rule(REFUSE, "pkey_mprotect", masked(2, PROT_EXEC))
    families = {int(getattr(socket, name)) for value in values(unit, "RestrictAddressFamilies") for name in value.split()}
    for family in set(range(FAMILIES_LIMIT)) - families:
        others.rule(REFUSE, "socket", Comparison(0, EQUAL, family, 0))
    others.load()
    calls.load()


if __name__ == "__main__":
    confine(Path(sys.argv[1]).read_text())
    os.execvp(sys.argv[2], sys.argv[2:])
