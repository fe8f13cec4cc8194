"""Canaries are requests of the router's own: a test that counts what an engine runs waits until they are over."""

from __future__ import annotations

from collections import Counter

import httpx2


def are_over(admin: str) -> bool:
    """True when every engine is ready and every pair and unified engine has been tried once.

    Args:
        admin: the base URL of a router's admin listener.
    """
    engines = httpx2.get(admin + "/admin/cluster").json()["engines"]
    counts = Counter(e["role"] for e in engines if e["state"] == "ready")
    lines = httpx2.get(admin + "/metrics").text.splitlines()
    tried = sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("disagg_canaries_total{"))
    return counts.total() == len(engines) and tried >= counts["prefill"] * counts["decode"] + counts["unified"]
