"""The swing, measured and drawn: automatic flips beside every fixed ratio and beside a plan that knows the future."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from disagg.plan.simulate import Outcome
from tests.plan.swing import ENGINES, PERIOD_S, SLO, STEADY_S, Swing, arrivals, best, good, needed, oracle, run

FIXED = (3, 4, 5, 6)
BIN_S = 60.0
WHOLE_S = STEADY_S + PERIOD_S


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def good_a_second(outcome: Outcome) -> list[float]:
    bins = [0] * int(WHOLE_S / BIN_S)
    for at in outcome.good_at:
        bins[min(int(at / BIN_S), len(bins) - 1)] += 1
    return [count / BIN_S for count in bins]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/plot-swing", description=__doc__)
    parser.add_argument("--out", default="docs/swing.png", help="where the picture goes; an empty name for none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-refuse", action="store_true", help="let everybody wait, however long")
    parser.add_argument("--swing", default="9,4.2,1", help="requests/s of code and chat, and the amplitude")
    given = parser.parse_args()
    swing = Swing(*(float(part) for part in given.swing.split(",")))
    trace, refuse = arrivals(swing, seed=given.seed), not given.no_refuse
    began = best(swing, 0.0)
    outcomes = {f"{p}:{ENGINES - p} fixed": run(trace, p, refuse=refuse) for p in FIXED}
    outcomes["oracle"] = run(trace, began, refuse=refuse, plan=oracle(swing))
    outcomes["auto"] = run(trace, began, refuse=refuse, flips=True)
    most = max(good(o) for name, o in outcomes.items() if "fixed" in name)
    swung = sum(a.at >= STEADY_S for a in trace.arrivals)
    say(f"{swung} requests of the swing, {len(trace.arrivals)} in {WHOLE_S / 60:g} min")
    say(f"good: {SLO.ttft_s:g} s to the first token, {1e3 * SLO.itl_s:g} ms between tokens")
    for name, o in outcomes.items():
        say(f"{name:10} good {good(o):6}  {good(o) / most:4.2f} of the best fixed one  refused {o.refused:5}  flips {len(o.flips)}")
    for flip in outcomes["auto"].flips:
        say(f"  {flip.at:5.0f} s  to {flip.role} in {flip.took_s:.0f} s: {flip.reason}")
    if given.out:
        draw(given.out, swing, outcomes, needed)


def draw(out: str, swing: Swing, outcomes: dict[str, Outcome], demand: Callable[[Swing, float], tuple[float, float]]) -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        sys.exit("scripts/plot-swing needs matplotlib: .venv/bin/python -m pip install --require-hashes -r scripts/locks/plot.txt")
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    blue, orange, greys = "#1f5fa8", "#d9730d", ("#c4c4c4", "#a3a3a3", "#828282", "#616161")
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(4, 1, figsize=(9, 10.5), sharex=True, height_ratios=(1, 1, 1, 1.5), constrained_layout=True)
    auto, plan = outcomes["auto"], outcomes["oracle"]
    minutes = [m / 4 for m in range(int(WHOLE_S / 15) + 1)]
    p, d = zip(*(demand(swing, m * 60) for m in minutes), strict=True)
    axes[0].plot(minutes, p, color=blue, label="prefill")
    axes[0].plot(minutes, d, color=orange, label="decode")
    axes[0].set_ylabel("engines needed")
    axes[0].set_title("What is asked: long prompts, then long answers, then long prompts again", loc="left", fontsize=10.5)
    axes[0].legend(frameon=False, ncols=2, loc="upper center")
    times = [s.at / 60 for s in auto.samples]
    axes[1].step([s.at / 60 for s in plan.samples], [s.prefill for s in plan.samples], where="post", color="#888", ls=":", label="oracle")
    axes[1].step(times, [s.prefill for s in auto.samples], where="post", color=blue, lw=2, label="auto")
    for flip in auto.flips:
        axes[1].axvline(flip.at / 60, color=blue, lw=0.6, alpha=0.35)
    axes[1].set_ylabel("prefill engines")
    axes[1].set_ylim(0, ENGINES)
    axes[1].set_yticks(range(0, ENGINES + 1, 2))
    axes[1].set_title(f"What the balance does: {len(auto.flips)} flips of {ENGINES} engines", loc="left", fontsize=10.5)
    axes[1].legend(frameon=False, ncols=2, loc="upper center")
    fixed = [name for name in outcomes if "fixed" in name]
    for grey, name in zip(greys, fixed, strict=True):
        samples = outcomes[name].samples
        axes[2].plot([s.at / 60 for s in samples], [s.queued for s in samples], color=grey, lw=1)
    axes[2].plot(times, [s.queued for s in auto.samples], color=blue, lw=2)
    axes[2].set_yscale("symlog", linthresh=10)
    axes[2].set_ylim(bottom=0)
    axes[2].set_ylabel("prompts waiting")
    axes[2].set_title("The queue, auto in blue, fixed ratios in grey", loc="left", fontsize=10.5)
    middles = [(number + 0.5) * BIN_S / 60 for number in range(int(WHOLE_S / BIN_S))]
    for grey, name in zip(greys, fixed, strict=True):
        axes[3].plot(middles, good_a_second(outcomes[name]), color=grey, lw=1.4, label=f"{name}  {good(outcomes[name]):,}")
    axes[3].plot(middles, good_a_second(plan), color="#888", ls=":", label=f"oracle  {good(plan):,}")
    axes[3].plot(middles, good_a_second(auto), color=blue, lw=2.2, label=f"auto flips  {good(auto):,}")
    axes[3].plot(middles, [sum(swing.rates(m * 60)) for m in middles], color="k", lw=0.8, ls="--", label="asked")
    axes[3].set_ylabel("good requests/s")
    axes[3].set_xlabel("minutes")
    axes[3].set_xlim(0, WHOLE_S / 60)
    axes[3].set_ylim(bottom=0)
    within = f"within {SLO.ttft_s:g} s to the first token and {1e3 * SLO.itl_s:g} ms between tokens"
    axes[3].set_title(f"Requests answered {within}, prefill:decode", loc="left", fontsize=10.5)
    axes[3].legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=9)
    figure.savefig(out, dpi=110)
    say(f"drawn into {out}")


if __name__ == "__main__":
    main()
