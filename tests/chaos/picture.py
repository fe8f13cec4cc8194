"""The run as a picture: requests a second by outcome, the p99 of the time to the first token, a mark for every fault. SVG, by hand."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter, defaultdict
from html import escape
from pathlib import Path

from tests.chaos.judge import OUTCOMES, Log, excused

COLOURS = {
    "right": "#5fa777",
    "left": "#b9c4cc",
    "excused": "#8aa7d6",
    "shed": "#e8c547",
    "lost": "#e08a3c",
    "wrong": "#c0392b",
    "stuck": "#6c3483",
}
WIDTH, HEIGHT = 1600, 760
LEFT, RIGHT, TOP, BOTTOM = 60, 60, 250, 60
BINS = 400
WINDOW_S = 5.0
LEGEND = "answers a second by outcome; line: p99 of the time to the first token; marks: faults"


def draw(log: Log) -> str:
    """The whole picture."""
    seconds = max(log.seconds, 1.0)
    bin_s = max(1.0, seconds / BINS)
    wide = WIDTH - LEFT - RIGHT
    high = HEIGHT - TOP - BOTTOM

    def x(at: float) -> float:
        return LEFT + wide * at / seconds

    counts: dict[int, Counter[str]] = defaultdict(Counter)
    waits: dict[int, list[float]] = defaultdict(list)
    window_s = max(WINDOW_S, bin_s)
    for entry in (excused(e, log.away) for e in log.entries):
        counts[int(entry.ended / bin_s)][entry.outcome] += 1
        if entry.first_s is not None:
            waits[int((entry.began + entry.first_s) / window_s)].append(entry.first_s)
    most = max([sum(c.values()) / bin_s for c in counts.values()], default=1.0)
    p99 = {number: sorted(found)[int(0.99 * (len(found) - 1))] for number, found in waits.items()}
    slowest = max([*p99.values(), 1.0])
    base = TOP + high
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="15">chaos, seed {log.seed}{", storm" if log.storm else ""}: {LEGEND}</text>',
    ]
    for mark in log.marks:
        end = max(x(mark.ended), x(mark.began) + 1)
        parts.append(f'<rect x="{x(mark.began):.1f}" y="{TOP}" width="{end - x(mark.began):.1f}" height="{high}" fill="#f3e9e2"/>')
    for number, found in sorted(counts.items()):
        y = float(base)
        for outcome in OUTCOMES:
            if tall := high * found[outcome] / bin_s / most:
                y -= tall
                width = max(0.5, wide * bin_s / seconds - 0.5)
                parts.append(
                    f'<rect x="{x(number * bin_s):.1f}" y="{y:.1f}" width="{width:.1f}" height="{tall:.1f}" fill="{COLOURS[outcome]}"/>'
                )
    line = " ".join(f"{x((n + 0.5) * window_s):.1f},{base - high * wait / slowest:.1f}" for n, wait in sorted(p99.items()))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1b2a41" stroke-width="1.5"/>')
    small = len(log.marks) > 110
    for mark in log.marks:
        at = x(mark.began)
        parts.append(f'<line x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{base}" stroke="#9a3b26" stroke-width="0.7"/>')
        name = escape(mark.name if small else f"{mark.name}: {mark.target}"[:46])
        parts.append(
            f'<text transform="translate({at + 3:.1f},{TOP - 4}) rotate(-75)" fill="#9a3b26" font-size="{6 if small else 9}">{name}</text>'
        )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = base - high * share
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{most * share:.1f}/s</text>')
        parts.append(f'<text x="{WIDTH - RIGHT + 6}" y="{y + 4:.1f}" fill="#1b2a41">{slowest * share:.2f} s</text>')
        parts.append(f'<text x="{LEFT + wide * share:.0f}" y="{base + 16}" text-anchor="middle">{seconds * share:.0f} s</text>')
    for place, outcome in enumerate(OUTCOMES):
        at = LEFT + 110 * place
        parts.append(f'<rect x="{at}" y="{HEIGHT - 26}" width="12" height="12" fill="{COLOURS[outcome]}"/>')
        parts.append(f'<text x="{at + 17}" y="{HEIGHT - 16}">{outcome}</text>')
    return "\n".join([*parts, "</svg>", ""])


def save(log: Log, path: Path) -> Path:
    """Writes it; as PNG if that is asked for and a tool is there that can, else as SVG. Returns where it is."""
    svg = path.with_suffix(".svg")
    svg.write_text(draw(log))
    if path.suffix != ".png":
        return svg
    for tool, words in (("rsvg-convert", ["-o", str(path), str(svg)]), ("magick", [str(svg), str(path)])):
        if (found := shutil.which(tool)) and subprocess.run([found, *words], check=False, capture_output=True).returncode == 0:
            svg.unlink()
            return path
    return svg
