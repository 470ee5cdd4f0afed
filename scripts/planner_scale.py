#!/usr/bin/env python3
"""How long a plan takes, and how much memory, from 8 GPUs to 10,000: `scripts/planner_scale.py docs/planner_scale.svg`.

Each size is planned in a process of its own, first on an empty fleet, then again with what runs after a fifth of the
demands changed by up to a tenth. Half the models ask for a number of replicas, half for a rate. Seconds are those of one
core: the planner uses no second one, and a busy machine does not change them; loading the solver's library, a tenth of a
second once in a process, is left out. Up to 8 GPUs the optimum is asked for, then a proven hundredth. Prints one row for
each and draws both into the file, if one is named.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from random import Random

SIZES = (8, 30, 100, 300, 1000, 3000, 10_000)
SEED = 18


def measure(size: int) -> dict[str, object]:
    """Plan one size, fresh and changed."""
    import highspy  # noqa: F401  the planner loads it when it first solves

    from model_registry.catalogue import load_catalogue
    from placement.planner.plan import plan
    from placement.planner.solver import Limits
    from placement.planner.testing import changed, demands, fleet
    from placement.planner.types import Problem

    catalogue, chance = load_catalogue(), Random(SEED)
    parts = [(catalogue.product(name), price) for name, price in (("a100-80gb", 1.5), ("h100-sxm", 2.5), ("h200", 3.5))]
    share = (size - 2 * (size * 3 // 10), size * 3 // 10, size * 3 // 10)
    gpus = fleet([(product, count, price) for (product, price), count in zip(parts, share, strict=True)])
    models = 10 if size < 100 else 60
    problem = Problem(gpus, demands(chance, [p for p, _ in parts], models=models, replicas=5 * size))
    found: dict[str, object] = {"gpus": size, "models": models}
    for name in ("fresh", "changed"):
        began = time.process_time()
        made = plan(problem, Limits(gap_ratio=0.0 if size <= 8 else 0.01))
        found[name] = {
            "seconds": round(time.process_time() - began, 3),
            "replicas": sum(d.action != "stop" for d in made.decisions),
            "moved": sum(d.action == "move" for d in made.decisions),
            "unmet": len(made.unmet),
            "gap": round(made.gap, 5),
            "levels": {level.objective.value: [level.value, level.lower_bound] for level in made.levels},
        }
        problem = changed(chance, problem, made.after())
    found["memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return found


def say(line: str) -> None:
    """One line of output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Measure every size, print rows, draw."""
    say(
        f"{'GPUs':>6} {'models':>6} {'replicas':>8}  {'fresh s':>8} {'gap':>7}  {'changed s':>9} {'gap':>7} {'moved':>5}  {'MiB':>5}"
    )
    rows = []
    for size in SIZES:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(size)], stdout=subprocess.PIPE, encoding="utf-8", check=True
        )
        row = json.loads(done.stdout)
        rows.append(row)
        fresh, again = row["fresh"], row["changed"]
        say(
            f"{size:>6} {row['models']:>6} {fresh['replicas']:>8}  {fresh['seconds']:>8.2f} {fresh['gap']:>7.2%}  "
            f"{again['seconds']:>9.2f} {again['gap']:>7.2%} {again['moved']:>5}  {row['memory_mib']:>5}",
        )
    if len(sys.argv) > 1:
        draw(rows, Path(sys.argv[1]))


def draw(rows: list[dict], path: Path) -> None:
    """Time and memory over fleet size, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "planner"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sizes = [row["gpus"] for row in rows]
    for name, label in (("fresh", "an empty fleet"), ("changed", "a running one, changed")):
        left.plot(sizes, [row[name]["seconds"] for row in rows], marker="o", label=label)
    left.axhline(10, color="grey", linewidth=0.8, linestyle="--")
    left.set(
        xscale="log", yscale="log", xlabel="GPUs", ylabel="seconds of one core", title="time to plan, 5 replicas a GPU"
    )
    left.legend(frameon=False)
    right.plot(sizes, [row["memory_mib"] for row in rows], marker="o", color="tab:green")
    right.set(xscale="log", xlabel="GPUs", ylabel="MiB", title="memory at its highest", ylim=(0, None))
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        say(json.dumps(measure(int(sys.argv[2]))))
    else:
        main()
