"""Units as files, and what the real systemd-analyze says of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from disagg.deploy.systemd import Site, unit_files

LIMIT_S = 30.0
TRUE = shutil.which("true") or "/bin/true"
HOSTS = ("router", "prefill", "decode", "unified")

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


def write_units(folder: Path, site: Site | None = None) -> dict[str, Path]:
    """Every unit of every role; the template as an instance, since a template cannot be judged."""
    found = {}
    for role in HOSTS:
        for path, text in unit_files(role, site or Site(TRUE)).items():
            if path.endswith((".service", ".socket")):
                name = Path(path).name.replace("@.", "@prefill-0.")
                found[name] = folder / name
                found[name].write_text(text)
    return found


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False)


def exposure(unit: Path) -> float:
    """As `systemd-analyze security` counts it: 0 is closed, 10 is open."""
    result = analyze("security", "--no-pager", "--offline=yes", "--threshold=100", str(unit))
    found = re.search(r"Overall exposure level for \S+: ([\d.]+) ", result.stdout)
    assert found, result
    return float(found[1])
