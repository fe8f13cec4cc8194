"""What `disagg status` prints: plain columns, the reason of everything that is not well. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from disagg.policy.cost import ENOUGH, in_words

WELL = frozenset({"ready", "online"})
GONE = frozenset({"dead", "held"})
"""Nothing runs there: what was reported last is the past."""
_ANY_TOKENS = 1 << 17  # no longer ones are asked about
_WORTH_SAYING = (", but ", "; ")
"""What joins something that is not well to the reason of something that is."""


def table(cluster: Mapping[str, Any]) -> str:
    """Hosts and engines of ``/admin/cluster``."""
    hosts = [h for h in cluster["hosts"] if "state" in h]
    engines = cluster["engines"]
    parts = []
    if hosts:
        rows = [(h["id"], h["state"], str(h["incarnation"]), h["release"], _why(h)) for h in hosts]
        parts.append(_columns(("HOST", "STATE", "START", "RELEASE", ""), rows))
    if engines:
        parts.append(_columns(("ENGINE", "HOST", "ROLE", "STATE", "RUN", "WAIT", "KV", "MODEL", "URL", ""), [_row(e) for e in engines]))
    bad = [f"{q['prefill']} with {q['decode']}" if q["prefill"] else q["decode"] for q in cluster.get("quarantined", [])]
    if bad:
        reasons = [(name, str(q["reason"])) for name, q in zip(bad, cluster["quarantined"], strict=True)]
        parts.append(_columns(("QUARANTINED", "WHY (restart the engine at fault, it is then tried again)"), reasons))
    cut = [(f"{c['prefill']} with {c['decode']}", str(c["reason"])) for c in cluster.get("cut", [])]
    if cut:
        parts.append(_columns(("CUT", "WHY (the router tries again by itself)"), cut))
    parts += [_ratio(row) for row in cluster.get("ratio", [])]
    parts += [_alone(model, tokens) for model, tokens in cluster.get("unified_up_to_tokens", {}).items()]
    parts += [_arms(cluster["ab"])] if "ab" in cluster else []
    served = "Requests can be served." if cluster.get("ready") else f"No request can be served: {cluster.get('reason', 'unknown')}."
    parts.append(" ".join([served, *_requests(cluster.get("requests", {}))]))
    return "\n\n".join(parts)


def _ratio(row: Mapping[str, Any]) -> str:
    """How the pools of a model stand, and why engines are moved or not."""
    shares = zip(("prefill", "decode"), row["offered"], row["pressures"], strict=True)
    asked = ", ".join(
        f"{offered:.2f} {role} engines" + (f" ({p:.0%} of what they may do)" if p is not None else "") for role, offered, p in shares
    )
    here, wanted = f"{row['prefill']}P:{row['decode']}D", f"{row['wanted'][0]}P:{row['wanted'][1]}D"
    lines = [
        f"RATIO of {row['model']}: {here}, wanted {wanted}; flips are {row['flips']}",
        f"  asked for: {asked}, seen for {row['watched_s']:.0f} s",
        f"  {row['decided_s_ago']:.0f} s ago: {row['reason']}",
    ]
    lines += [f"  {ago:.0f} s ago: {what}" for ago, what in row["history"]]
    return "\n".join(_printable(line) for line in lines)


def _alone(model: str, tokens: int) -> str:
    """Conditional disaggregation: what goes to unified engines now."""
    what = f"prompts of up to {tokens} tokens go" if 0 < tokens < _ANY_TOKENS else "any prompt goes" if tokens else "no prompt goes"
    return f"UNIFIED: as things stand {what} to a unified engine of {_printable(model)} rather than to a pair."


def _arms(compared: Mapping[str, Any]) -> str:
    """Pairs against unified engines."""

    def ms(row: Mapping[str, Any], name: str) -> str:
        p50, p99 = row[f"{name}_p50_s"], row[f"{name}_p99_s"]
        return "-" if p50 is None else f"{p50 * 1000:.0f} / {p99 * 1000:.0f} ms"

    rows = [
        (
            row["arm"],
            str(row["streams"]),
            str(row["good"]),
            ms(row, "ttft"),
            ms(row, "itl"),
            "-" if row["good_per_engine_hour"] is None else f"{row['good_per_engine_hour']:.0f}",
        )
        for row in compared["arms"]
    ]
    head = ("COMPARED", "STREAMS", "GOOD", "TTFT p50 / p99", "ITL p50 / p99", "GOOD PER ENGINE-HOUR")
    return f"{_columns(head, rows)}\n  {compared['verdict']}"


def _requests(requests: Mapping[str, Any]) -> list[str]:
    """Sentences about requests that are not served at once; none where all are."""
    waiting, sent_away = requests.get("waiting", 0), requests.get("sent_away", 0)
    said = [f"{waiting} of {requests['inflight']} wait for room."] if waiting else []
    return [*said, f"{sent_away} were sent away since the router started."] if sent_away else said


def _row(engine: Mapping[str, Any]) -> tuple[str, ...]:
    load = engine["load"]
    total = load["kv_total_tokens"]
    used = f"{100 * load['kv_used_tokens'] // total} %" if total else "-"
    counts = ("-", "-", "-") if engine["state"] in GONE else (str(load["running"]), str(load["waiting"]), used)
    return (engine["id"], engine["host"], engine["role"], engine["state"], *counts, engine["model"] or "-", engine["url"], _why(engine))


def _why(thing: Mapping[str, Any]) -> str:
    """The reason where a person needs one."""
    reason = str(thing["reason"])
    said = "" if thing["state"] in WELL and not any(mark in reason for mark in _WORTH_SAYING) else reason
    cache = thing.get("cache", {"known": True})
    kept = thing.get("load", {}).get("kv_quarantined_tokens", 0)
    notes = [said] if said else []
    notes += ["it is being measured"] if thing.get("measuring") else []
    notes += [] if said or cache["known"] else [f"prefix cache unknown, routing guesses what it holds: {cache['reason']}"]
    slow = thing.get("weight", 1.0)
    notes += thing.get("distrusted", [])
    notes += _doubts(thing.get("forecast"))
    notes += [f"it is {slow:g} times as slow as the median of its pool, and gets that much less work"] if slow > 1.0 else []
    notes += [f"{kept} tokens of its KV pool are kept from use: a peer that is gone might still write into them"] if kept else []
    return "; ".join(notes)


def _doubts(forecast: Mapping[str, Any] | None) -> list[str]:
    """What of an engine's predictions is not to be trusted, once it has worked for a while."""
    if forecast is None:
        return []
    names = {"reads": "how long it reads", "steps": "how long its steps take"}
    told = [(names[name], forecast[name]) for name in names if name in forecast]
    notes = []
    for what, line in told:
        changed = line.get("changed")
        if changed is not None:
            notes.append(f"{what}: {in_words(changed['times'])} than it was, since {changed['ago_s']:.0f} s")
        elif line["doubt"] and (line["samples"] >= ENOUGH or (line["samples"] and line.get("restarted"))):
            notes.append(f"{what} is not trusted: {line['doubt']}")
    return notes


def hosts_table(hosts: Sequence[Mapping[str, Any]]) -> str:
    """The hosts of ``/admin/hosts``."""
    if not hosts:
        return "No host is registered. Make a token with `disagg token create --role prefill`, and join with it."
    rows = [(h["name"], ",".join(h["roles"]), h["state"], h["key"], _why(h)) for h in hosts]
    return _columns(("HOST", "ROLES", "STATE", "KEY", ""), rows)


def kv_table(kv: Mapping[str, Any]) -> str:
    """Holds and engines of ``/admin/kv``."""
    parts = []
    if kv["engines"]:
        head = ("ENGINE", "CAPACITY", "USED", "EXPLAINED", "DRIFT", "QUARANTINED", "ORPHANED", "FOR", "")
        parts.append(_columns(head, [_account_row(e) for e in kv["engines"]]))
    holds = sorted(kv["holds"], key=lambda h: (-h["age_s"], h["request"], h["engine"]))
    if holds:
        parts.append(_columns(("REQUEST", "ENGINE", "LEG", "PHASE", "AGE", "TOKENS", "RID"), [_hold_row(h) for h in holds]))
    parts.append(f"Holds: {len(holds)}. Requests that no hold explained, reaped since the router started: {kv['reaped']}.")
    return "\n\n".join(parts)


def _account_row(account: Mapping[str, Any]) -> tuple[str, ...]:
    names = ("capacity_tokens", "used_tokens", "explained_tokens", "drift_tokens", "quarantined_tokens", "orphan_tokens")
    since = f"{account['orphan_for_s']:.1f} s" if account["orphan_for_s"] else "-"
    return (account["id"], *(str(account[name]) for name in names), since, account["note"])


def _hold_row(hold: Mapping[str, Any]) -> tuple[str, ...]:
    rids = hold["rids"]
    shown = rids[0] if len(rids) == 1 else f"{rids[0]} and {len(rids) - 1} more"
    return (hold["request"], hold["engine"], hold["leg"], hold["phase"], f"{hold['age_s']:.1f} s", str(hold["tokens"] or "-"), shown)


def _columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [tuple(map(_printable, line)) for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _printable(text: str) -> str:
    """What hosts say of themselves must not move the cursor of who reads it."""
    return "".join(c if c.isprintable() else "?" for c in text)
