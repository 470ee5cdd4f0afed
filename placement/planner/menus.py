"""What a want may be served by: whole menus of replicas instead of replicas one by one (Dantzig and Wolfe).

A want with a rate is met by many combinations of options. A relaxation that mixes fractions of replicas meets any rate
exactly, and its bound is as much too low; one that mixes fractions of menus knows that each menu is whole. It is solved by
adding menus for as long as one is worth its price, which gives a bound, and a price for every slot. A menu that costs more
than its want's share of the bound, by more than the best answer is above the bound, is in no best answer. Few are left,
mostly some ten for each want, and searches over these alone are short.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement.planner.solver import INFINITY, Columns, Program
from placement.planner.wants import Want

_STEPS = 150_000
"""So many beginnings of menus are looked at for one bound: a quarter of a second. Larger fleets may need more, and have none."""

MOST_MENUS = 3_000
"""A want with more menus than these is not held to them."""

_WORTH = 1e-7
"""What a menu must save to be added."""

_MARGIN = 1e-5
"""Menus are kept that cost so much too much: more than the tolerances of all rows add up to."""

Key = tuple[str, str, str]
"""Pool, want and profile."""


@dataclass(frozen=True, slots=True)
class Menu:
    """So many replicas of each option of one want, in the order of its keys, and what is missing then, in replicas."""

    counts: tuple[int, ...]
    missing: float


@dataclass(frozen=True, slots=True)
class Block:
    """One want with a rate in a program: its variables by key, what a replica of each serves, how many there may be."""

    want: Want
    replicas: Mapping[Key, int]
    capacities: tuple[float, ...]
    most: tuple[float, ...]
    missing: int

    @property
    def variables(self) -> tuple[int, ...]:
        """Those of its replicas, then that of what is missing."""
        return (*self.replicas.values(), self.missing)


@dataclass(frozen=True, slots=True)
class Menus:
    """The menus that matter, by want, with the keys of their counts. A want that is not named may be served in any way.

    `keys` are those of all wants: in a program that has others, more may matter.
    """

    keys: frozenset[Key]
    by_want: Mapping[str, tuple[tuple[Key, ...], tuple[Menu, ...]]]


@dataclass(frozen=True, slots=True)
class _Prices:
    """What a replica of each option costs one want, what it costs to miss one, and its share of the bound."""

    replicas: tuple[float, ...]
    missing: float
    share: float


@dataclass(frozen=True, slots=True)
class Priced:
    """The relaxation over menus: the objective of no answer is below `bound`."""

    bound: float
    keys: frozenset[Key]
    blocks: tuple[Block, ...]
    prices: tuple[_Prices, ...]

    def within(self, gap: float, *, most: int = MOST_MENUS, whole: bool = False) -> Menus | None:
        """The menus of all answers that are at most `gap` above the bound; None where it takes too long to list them.

        Wants with over `most` of them are not named. With `whole` only menus count with which nothing is missing.
        """
        steps = _Steps(_STEPS)
        found = {}
        for block, prices in zip(self.blocks, self.prices, strict=True):
            menus = _Walk(block, prices, steps).within(prices.share + gap + _MARGIN)
            if steps.left < 0:
                return None
            menus = tuple(m for m in menus if not (whole and m.missing))
            if len(menus) <= most:
                found[block.want.name] = (tuple(block.replicas), menus)
        return Menus(self.keys, found)


def priced(
    program: Program, objective: Mapping[int, float], blocks: Sequence[Block], keys: frozenset[Key]
) -> Priced | None:
    """The relaxation of `program` in which blocks take fractions of menus; None where it takes too long.

    `objective` must not count replicas. Rows with variables of one block alone are left to its menus; in all others a
    replica must not make anything cheaper.
    """
    desk = _Desk(program, objective, blocks)
    steps = _Steps(_STEPS)
    for number, block in enumerate(blocks):
        desk.add(number, Menu((0,) * len(block.capacities), block.want.missing(0, 0.0)))
    while (solved := desk.lp.solve()) is not None:
        bound, duals = solved
        prices = [desk.prices(number, duals) for number in range(len(blocks))]
        fresh = False
        for number, (block, mine) in enumerate(zip(blocks, prices, strict=True)):
            menu, cost = _Walk(block, mine, steps).cheapest()
            if steps.left < 0 or menu is None:
                return None
            saved = mine.share - cost
            bound -= max(0.0, saved)
            if saved > _WORTH:
                fresh = desk.add(number, menu) or fresh
        if not fresh:
            return Priced(bound, keys, tuple(blocks), tuple(prices))
    return None


class _Desk:
    """The linear program over menus: what blocks have in common, and a row for each block, which its menus fill."""

    def __init__(self, program: Program, objective: Mapping[int, float], blocks: Sequence[Block]) -> None:
        self._objective = objective
        self._blocks = blocks
        self._uses: dict[int, list[tuple[int, float]]] = {v: [] for block in blocks for v in block.variables}
        self._known: list[set[tuple[int, ...]]] = [set() for _ in blocks]
        owner = {v: number for number, block in enumerate(blocks) for v in block.variables}
        outer = Program()
        own = {v: outer.variable(program.upper(v)) for v in range(program.variables) if v not in owner}
        for terms, lower, upper in program.all_rows():
            if terms and len({owner.get(v, -1 - v) for v in terms}) == 1 and not own.keys() & terms:
                continue
            for v, coefficient in terms.items():
                if v in owner:
                    self._uses[v].append((outer.rows, coefficient))
            outer.row({own[v]: c for v, c in terms.items() if v in own}, lower, upper)
        self._first = outer.rows
        for _ in blocks:
            outer.row({}, 1.0, 1.0)
        self.lp = Columns(outer, {own[v]: c for v, c in objective.items() if v in own})

    def add(self, number: int, menu: Menu) -> bool:
        """A menu of one block, unless it is there already."""
        if menu.counts in self._known[number]:
            return False
        self._known[number].add(menu.counts)
        terms: dict[int, float] = {self._first + number: 1.0}
        block = self._blocks[number]
        for v, amount in zip(block.variables, (*menu.counts, menu.missing), strict=True):
            for row, coefficient in self._uses[v] if amount else ():
                terms[row] = terms.get(row, 0.0) + coefficient * amount
        self.lp.add(self._objective.get(block.missing, 0.0) * menu.missing, terms)
        return True

    def prices(self, number: int, duals: Sequence[float]) -> _Prices:
        """What a block pays, where one more of the bound of each row adds so much to the objective."""
        *replicas, missing = (
            max(0.0, self._objective.get(v, 0.0) - sum(duals[row] * c for row, c in self._uses[v]))
            for v in self._blocks[number].variables
        )
        return _Prices(tuple(replicas), missing, duals[self._first + number])


class _Steps:
    """How many partial menus may still be looked at."""

    def __init__(self, left: int) -> None:
        self.left = left


class _Walk:
    """All menus of one want, the cheapest options first, without those whose beginning costs too much already."""

    def __init__(self, block: Block, prices: _Prices, steps: _Steps) -> None:
        self._block = block
        self._want = block.want
        self._rate, self._most_served = block.want.rate or 0.0, block.want.most
        self._floor = block.want.floor
        self._ceiling = math.inf if block.want.ceiling is None else block.want.ceiling
        self._prices, self._short = prices.replicas, prices.missing
        self._steps = steps
        capacities = block.capacities
        units = [p / c if c > 0 else INFINITY for p, c in zip(self._prices, capacities, strict=True)]
        self._order = sorted(range(len(units)), key=lambda option: (units[option], option))
        self._counts = [0] * len(units)
        # What a unit of the rate, and a replica, cost at least with the options that are left, or missing.
        self._per_unit, self._per_replica = [self._short / block.want.best], [self._short]
        for option in reversed(self._order):
            self._per_unit.append(min(self._per_unit[-1], units[option]))
            self._per_replica.append(min(self._per_replica[-1], self._prices[option]))
        self._per_unit.reverse()
        self._per_replica.reverse()
        self._limit = INFINITY
        self._found: list[Menu] = []
        self._only_cheapest = False

    def cheapest(self) -> tuple[Menu | None, float]:
        """The menu that costs least, and no more than what it costs."""
        self._only_cheapest, self._limit = True, INFINITY
        self._visit(0, 0.0, 0, 0.0)
        return self._found[-1] if self._found else None, self._limit

    def within(self, limit: float) -> tuple[Menu, ...]:
        """Every menu that costs no more than `limit`."""
        self._limit = limit
        self._visit(0, 0.0, 0, 0.0)
        return tuple(self._found)

    def _visit(self, depth: int, served: float, count: int, cost: float) -> None:
        self._steps.left -= 1
        need, short = self._rate - served, self._floor - count
        least = cost
        if need > 0:
            least = cost + need * self._per_unit[depth]
        if short > 0:
            least = max(least, cost + short * self._per_replica[depth])
        if least > self._limit or self._steps.left < 0:
            return
        if depth == len(self._order):
            self._take(served, count, cost)
            return
        option = self._order[depth]
        capacity, price = self._block.capacities[option], self._prices[option]
        for number in range(self._most(option, served, count, cost), -1, -1):
            self._counts[option] = number
            self._visit(depth + 1, served + number * capacity, count + number, cost + number * price)
        self._counts[option] = 0

    def _most(self, option: int, served: float, count: int, cost: float) -> int:
        """How many replicas of an option a menu can have beside what it has."""
        capacity, price = self._block.capacities[option], self._prices[option]
        most = min(self._block.most[option], self._ceiling - count)
        if capacity > 0:
            most = min(most, (self._most_served - served) / capacity + 1e-6)
        if price > 0:
            most = min(most, (self._limit - cost) / price + 1e-6)
        if self._only_cheapest:  # one that is not needed makes no menu cheaper
            need = math.ceil((self._rate - served) / capacity - 1e-9) if capacity > 0 else 0
            most = min(most, max(0, need, self._floor - count))
        return max(0, int(most))

    def _take(self, served: float, count: int, cost: float) -> None:
        missing = self._want.missing(count, served)
        missing = missing if missing > 1e-9 else 0.0
        total = cost + self._short * missing
        if total > self._limit:
            return
        self._found.append(Menu(tuple(self._counts), missing))
        if self._only_cheapest:
            self._limit = total - 1e-12
