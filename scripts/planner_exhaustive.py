#!/usr/bin/env python3
"""Compare the planner with brute force on every small instance: `scripts/planner_exhaustive.py [--every N] [--only WORD]`.

Packing: every state of up to two GPUs at the start (those alike to whoever packs once), every demand that two GPUs can
hold, and every one that a single slice puts beyond them. Planning: every instance of the kinds in
`placement/planner/small_instances.py`, one or two GPUs each, against all ways of using them: what the plan does, what its
levels say, and that every objective is proven. `--every 20` looks at a twentieth, spread over everything. Prints a line for
each kind, and every instance that differs by its number; the exit status is 1 if one does. All of it takes some eight hours
of one core; `--processes` shares it out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache

from model_registry.catalogue import load_catalogue
from placement.planner.brute_force import BruteForce
from placement.planner.pack import pack
from placement.planner.plan import plan
from placement.planner.small_instances import kinds
from placement.planner.small_packings import SmallPackings

PACKED = ("a30", "a100-80gb", "h200", "rtx-pro-6000")
Part = tuple[str, int, int]
"""A kind, the first number to look at, and the step to the next."""


@cache
def packings(name: str) -> SmallPackings:
    """What two GPUs of a product can hold."""
    return SmallPackings(load_catalogue().product(name))


def packed(part: Part) -> tuple[int, float, list[str]]:
    """How many packing problems were compared, the CPU seconds that took, and what differs."""
    name, first, step = part
    began, count, wrong = time.process_time(), 0, []
    for number, (start, demand, fewest) in enumerate(every_packing(packings(name))):
        if number % step != first:
            continue
        count += 1
        made = pack(packings(name).product, packings(name).named(demand), start)
        right = made.gpus == fewest if fewest is not None else made.gpus > 2
        if not (right and made.optimal and len(made.layouts()) >= made.gpus):
            wrong.append(f"pack {name} {number}: {made.gpus} GPUs, {fewest} are the fewest")
    return count, time.process_time() - began, wrong


def every_packing(small: SmallPackings) -> Iterator[tuple]:
    """Start, demand and the fewest GPUs of every packing problem."""
    for start in small.starts():
        for demand, fewest in sorted(small.demands(start).items()):
            yield start, demand, fewest


def planned(part: Part) -> tuple[int, float, list[str]]:
    """The same for the plans of one kind."""
    name, first, step = part
    kind = next(k for k in kinds(load_catalogue()) if k.name == name)
    began, count, wrong = time.process_time(), 0, []
    for number in range(first, len(kind), step):
        problem = kind.at(number)
        count += 1
        if difference := BruteForce(problem).differs(plan(problem)):
            wrong.append(f"plan {name} {number}: {difference}")
    return count, time.process_time() - began, wrong


def main() -> int:
    """Compare, and say what came out."""
    wanted = argparse.ArgumentParser(description=__doc__)
    wanted.add_argument("--every", type=int, default=1, metavar="N", help="look at one instance in N")
    wanted.add_argument("--only", default="", metavar="WORD", help="only what has this in its name")
    wanted.add_argument("--processes", type=int, default=1)
    asked = wanted.parse_args()
    jobs = [(f"pack {name}", packed, name) for name in PACKED]
    jobs += [(f"plan {kind.name}", planned, kind.name) for kind in kinds(load_catalogue())]
    differing = 0
    with ProcessPoolExecutor(asked.processes) as pool:
        for label, work, name in jobs:
            if asked.only not in label:
                continue
            step = asked.every * asked.processes
            parts = [(name, asked.every // 2 + k * asked.every, step) for k in range(asked.processes)]
            found = list(pool.map(work, parts))
            wrong = [line for _, _, lines in found for line in lines]
            differing += len(wrong)
            say(
                f"{label:28} {sum(n for n, _, _ in found):>8} compared, {len(wrong)} differ, "
                f"{sum(seconds for _, seconds, _ in found):.0f} s of one core"
            )
            for line in wrong:
                say(f"  {line}")
    return 1 if differing else 0


def say(line: str) -> None:
    """One line of output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
