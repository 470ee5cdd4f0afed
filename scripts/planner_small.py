#!/usr/bin/env python3
"""How long small fleets take to plan to the optimum: `scripts/planner_small.py [INSTANCES] [--json FILE]`.

Random instances of 8 GPUs and about 40 replicas of 10 models, on one product and on three; each is planned on an empty
fleet, then again on the running one after a fifth of its demands changed by up to a tenth (`changed`), and after half of
them changed by up to a half (`upset`). Seconds are the process's own CPU time, loading the solver's library left out, so a
busy machine does not change them much. Prints median, 90th percentile and the longest for each kind, also for those
where all demands fit and for the others, and how many plans are proven in every objective. `--json` writes one line per
plan, with its objectives: what to compare two versions by.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import median

PRICES = {"a100-80gb": 1.5, "h100-sxm": 2.5, "h200": 3.5}
FLEETS = {"one product": {"h100-sxm": 8}, "three products": {"a100-80gb": 4, "h100-sxm": 2, "h200": 2}}
REPLICAS, MODELS = 40, 10


def rows(instances: int) -> Iterator[dict]:
    """One row for each plan, as soon as it is made."""
    import highspy  # noqa: F401  the planner loads it when it first solves

    from model_registry.catalogue import load_catalogue
    from placement.planner.plan import plan
    from placement.planner.testing import changed, demands, fleet
    from placement.planner.types import Problem

    catalogue = load_catalogue()
    for seed in range(instances):
        for kind, counts in FLEETS.items():
            chance = Random(seed)
            parts = [(catalogue.product(name), count, PRICES[name]) for name, count in counts.items()]
            wanted = demands(chance, [product for product, _, _ in parts], models=MODELS, replicas=REPLICAS)
            problem = Problem(fleet(parts), wanted)
            empty, fresh = timed(plan, problem)
            yield {"kind": f"{kind}, empty", "seed": seed} | fresh
            for name, share, by in (("changed", 0.2, 0.1), ("upset", 0.5, 0.5)):
                _, row = timed(plan, changed(chance, problem, empty.after(), share=share, by=by))
                yield {"kind": f"{kind}, {name}", "seed": seed} | row


def timed(plan, problem) -> tuple:
    """The plan, and what it took."""
    began = time.process_time()
    made = plan(problem)
    seconds = time.process_time() - began
    return made, {
        "seconds": round(seconds, 4),
        "replicas": sum(d.action != "stop" for d in made.decisions),
        "unmet": len(made.unmet),
        "moved": sum(d.action == "move" for d in made.decisions),
        "proven": all(level.optimal for level in made.levels),
        "levels": {level.objective.value: [level.value, level.lower_bound] for level in made.levels},
    }


def say(line: str) -> None:
    """One line of output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Measure, and print a line for each kind."""
    wanted = argparse.ArgumentParser(description=__doc__)
    wanted.add_argument("instances", type=int, nargs="?", default=24)
    wanted.add_argument("--json", type=Path)
    asked = wanted.parse_args()
    by_kind = defaultdict(list)
    for row in rows(asked.instances):
        if asked.json:
            with asked.json.open("a", encoding="utf-8") as lines:
                lines.write(f"{json.dumps(row)}\n")
        fit = "not all fit" if row["unmet"] else "all fit"
        for kind in (row["kind"], f"{row['kind']}, {fit}", "all"):
            by_kind[kind].append(row)
    say(f"{'':36} {'plans':>5} {'median':>8} {'p90':>8} {'longest':>8} {'proven':>7} {'unmet':>6}")
    for kind, some in sorted(by_kind.items()):
        took = sorted(row["seconds"] for row in some)
        proven, unmet = sum(row["proven"] for row in some), sum(row["unmet"] > 0 for row in some)
        middle, high = median(took), took[int(0.9 * (len(took) - 1))]
        say(f"{kind:36} {len(some):>5} {middle:>8.3f} {high:>8.3f} {took[-1]:>8.3f} {proven:>7} {unmet:>6}")


if __name__ == "__main__":
    main()
