"""Menus in an integer program: a variable for each, and that every want is served by one of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from placement.planner.menus import Key, Menu, Menus, Priced
from placement.planner.solver import WORK, Allowance, Limits, Program, Solved

_FIRST_GAP, _NEXT_GAP = 0.015, 1.5
"""How far above its bound, in replicas, the least that is missing is looked for first; and how much further each time after."""

_SAME = 1e-6


@dataclass(frozen=True, slots=True)
class MenuRows:
    """The variables of menus in a program, by those of the replicas that they count; and of slots in use, likewise."""

    menus: tuple[tuple[tuple[int | None, ...], tuple[tuple[Menu, int], ...]], ...]
    in_use: Mapping[int, tuple[int, ...]]

    def completed(self, values: tuple[float, ...], variables: int) -> tuple[float, ...]:
        """An answer to the program as it was before, as one to the program with menus, which has so many variables."""
        whole = [*values, *(0.0 for _ in range(variables - len(values)))]
        for counted, menus in self.menus:
            counts = tuple(0 if v is None else round(whole[v]) for v in counted)
            for menu, variable in menus:
                whole[variable] = float(menu.counts == counts)
        for variable, replicas in self.in_use.items():
            whole[variable] = float(sum(round(whole[v]) for v in replicas))
        return tuple(whole)


def add_menus(program: Program, menus: Menus, replicas: Mapping[Key, int], missing: Mapping[str, int]) -> MenuRows:
    """Have every want that `menus` names served by one of its own. `replicas` and `missing` are variables of `program`."""
    added = []
    for name, (keys, some) in sorted(menus.by_want.items()):
        variables = [program.variable(1) for _ in some]
        program.row(dict.fromkeys(variables, 1.0), 1.0, 1.0)
        for number, key in enumerate(keys):
            counted = {v: -float(n) for menu, v in zip(some, variables, strict=True) if (n := menu.counts[number])}
            program.row(counted | ({replicas[key]: 1.0} if key in replicas else {}), 0.0, 0.0)
        short = {v: -menu.missing for menu, v in zip(some, variables, strict=True) if menu.missing}
        program.row({missing[name]: 1.0} | short, 0.0)
        added.append((tuple(replicas.get(key) for key in keys), tuple(zip(some, variables, strict=True))))
    kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for (pool, _, profile), v in replicas.items():
        kinds[pool, profile].append(v)
    # How many slots of a kind are in use decides more than who has which: a variable of its own lets the search branch on it.
    in_use = {program.variable(sum(map(program.upper, mine))): tuple(mine) for mine in kinds.values()}
    for variable, mine in in_use.items():
        program.row({variable: 1.0} | dict.fromkeys(mine, -1.0), 0.0, 0.0)
    return MenuRows(tuple(added), in_use)


def least(
    program: Program, objective: Mapping[int, float], found: Priced, missing: Mapping[str, int], limits: Limits
) -> tuple[Solved, Menus | None] | None:
    """The least of `objective`, which is what is missing in replicas, and the menus of all answers with it.

    It is looked for just above the bound, then further: the nearer, the fewer menus there are. None where that takes too long.
    """
    allowance = Allowance(limits.work or WORK)
    replicas = {key: v for block in found.blocks for key, v in block.replicas.items()}
    gap = _FIRST_GAP
    while (menus := found.within(gap)) is not None:
        trial = program.copy()
        add_menus(trial, menus, replicas, missing)
        most = found.bound + gap + _SAME
        shared = replace(limits, allowance=allowance)
        solved = trial.minimise(objective, shared, most=most, presolve=False, heuristics=False)
        if allowance.cut or (solved is not None and solved.lower_bound < min(most, solved.objective - _SAME)):
            return None
        if solved is not None and solved.objective <= most:
            best = replace(solved, values=solved.values[: program.variables])
            return best, found.within(max(0.0, solved.objective - found.bound))
        gap *= _NEXT_GAP
    return None
