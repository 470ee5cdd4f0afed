#!/usr/bin/env python3
"""How long one changed demand takes between full plans, beside a full plan: `scripts/planner_online.py [--changes N] [GPUS ...]`.

A fleet of three products that runs 3 replicas a GPU, of 10 models (60 from 100 GPUs on). One demand after the other, each on
the fleet as the first plan left it, is changed by half, up and down in turn; the same question is asked online and in full.
Milliseconds are the process's own CPU time, loading the solver's library left out. Prints median and longest of both, the
median of their ratios, and what the online plans cost above the full ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from random import Random
from statistics import mean, median

SEED = 18


def measure(size: int, changes: int) -> str:
    """One row, of so many changed demands."""
    import highspy  # noqa: F401  the planner loads it when it first solves

    from model_registry.catalogue import load_catalogue
    from placement.planner.online_plan import place_online
    from placement.planner.plan import plan
    from placement.planner.solver import Limits
    from placement.planner.testing import demands, fleet
    from placement.planner.types import FleetPlan, Problem

    def timed(maker: Callable[[Problem], FleetPlan], problem: Problem) -> tuple[float, FleetPlan]:
        began = time.process_time()
        made = maker(problem)
        return (time.process_time() - began) * 1000, made

    catalogue = load_catalogue()
    parts = [(catalogue.product(name), price) for name, price in (("a100-80gb", 1.5), ("h100-sxm", 2.5), ("h200", 3.5))]
    share = (size - 2 * (size * 3 // 10), size * 3 // 10, size * 3 // 10)
    gpus = fleet([(product, count, price) for (product, price), count in zip(parts, share, strict=True)])
    models = 10 if size < 100 else 60
    wanted = demands(Random(SEED), [p for p, _ in parts], models=models, replicas=3 * size)
    first = plan(Problem(gpus, wanted), Limits(gap_ratio=0.01))
    online, full, above, unmet = [], [], [], [0, 0]
    for number in range(min(changes, len(wanted))):
        factor = 1.5 if number % 2 == 0 else 0.5
        one = wanted[number]
        if one.rate is not None:
            one = replace(one, rate=one.rate * factor)
        else:
            one = replace(one, replicas=max(1, round((one.replicas or 0) * factor)))
        problem = Problem(first.after(), (*wanted[:number], one, *wanted[number + 1 :]))
        for n, (maker, taken) in enumerate(((place_online, online), (plan, full))):
            spent, made = timed(maker, problem)
            taken.append(spent)
            unmet[n] += len(made.unmet)
            above.append(made.price_per_hour)
    prices = [a / b - 1 for a, b in zip(above[::2], above[1::2], strict=True)]
    ratio = median(b / a for a, b in zip(online, full, strict=True))
    return (
        f"{size:>6} {sum(d.action != 'stop' for d in first.decisions):>8}  "
        f"{median(online):>8.1f} {max(online):>8.1f}  {median(full):>9.1f} {max(full):>9.1f}  {ratio:>7.0f}  "
        f"{mean(prices):>7.1%} {max(prices):>7.1%}  {unmet[0]:>6} {unmet[1]:>6}"
    )


def main() -> None:
    """A row for each size."""
    wanted = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted.add_argument("sizes", nargs="*", type=int, default=[8, 100], metavar="GPUS")
    wanted.add_argument(
        "--changes", type=int, default=4, metavar="N", help="full plans of 100 GPUs take half a minute each"
    )
    asked = wanted.parse_args()
    say(
        f"{'GPUs':>6} {'replicas':>8}  {'online':>8} {'longest':>8}  {'full, ms':>9} {'longest':>9}  {'ratio':>7}  "
        f"{'dearer':>7} {'most':>7}  {'unmet':>6} {'full':>6}"
    )
    for size in asked.sizes:
        say(measure(size, asked.changes))


def say(line: str) -> None:
    """One line of output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
