"""How many GPUs of each class are used: on small fleets every choice is looked at, the cheapest first.

Price depends on these numbers alone, and the relaxation of the whole program mixes fractions of GPUs to a price that no
choice has. With the numbers fixed, the relaxation tells nearly always which of them do, and what is left to search is small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, prod

from placement.planner.master import NOTHING_MISSING, Master
from placement.planner.shapes import GpuClass
from placement.planner.solver import WORK, Allowance, Limits, Program, Solved
from placement.planner.types import Level, Objective

_CHOICES = 20_000
"""Fleets with more choices than that are not looked at this way."""

_LOOKS = 40
"""So many choices are looked at before the search for the price goes on with all that are left together."""

_ANY = 0.9
"""The gap at which any answer will do."""

Numbers = tuple[int, ...]
"""GPUs in use, by class."""


@dataclass(frozen=True, slots=True)
class Cheapest:
    """Demand and price. `numbers` are the only ones of that price that can do; None where several may.

    `replicas` is the least number of them; None where that was not looked for.
    """

    levels: tuple[Level, Level]
    numbers: Numbers | None = None
    replicas: int | None = None


def cheapest(master: Master, limits: Limits, *, fewest: bool) -> Cheapest | None:
    """The least price at which nothing is missing, and its answer in `master`; None where that is not found.

    `master` is a coarse program that nothing was minimised in. It holds what was found; where the numbers are certain,
    these as well. With `fewest` the answer has the fewest replicas, where the numbers are certain.
    """
    mark = master.program.rows
    master.miss_nothing()
    relaxed = master.program.relaxed().minimise(master.price(), limits)
    found = _looked_at(_Desk(master, limits, fewest), relaxed.objective) if relaxed is not None else None
    if found is None:
        master.program.drop_rows(mark)
    return found


def _looked_at(desk: _Desk, bound: float) -> Cheapest | None:
    """Choices from the cheapest that may do up to the first that does."""
    choices = _choices(desk.master.classes, bound)
    for number, (price, numbers) in enumerate(choices[:_LOOKS]):
        if not desk.may_do(numbers):
            continue
        if desk.does(numbers):
            same = [n for p, n in choices[number + 1 :] if p <= price + 1e-9]
            return desk.settled(price, None if any(desk.may_do(n) for n in same) else numbers)
        if desk.cut:
            return desk.searched(price)
    return desk.searched(choices[_LOOKS][0] if len(choices) > _LOOKS else bound)


def _choices(classes: Sequence[GpuClass], bound: float) -> list[tuple[float, Numbers]]:
    """Every choice that costs at least `bound`, the cheapest first; none where there are too many, or some GPUs cost nothing."""
    prices = [group.price_per_hour for group in classes]
    ranges = [_range(group) for group in classes]
    if not all(prices) or prod(map(len, ranges)) > _CHOICES:
        return []
    priced = ((sum(n * p for n, p in zip(numbers, prices, strict=True)), numbers) for numbers in product(*ranges))
    return sorted((price, numbers) for price, numbers in priced if price >= bound - 1e-6)


def _range(group: GpuClass) -> Sequence[int]:
    """How many GPUs of a class can be in use."""
    least = len(group.members) if all(shape.on for shape in group.shapes) else 0
    most = len(group.members) if any(shape.on for shape in group.shapes) else 0
    return range(least, most + 1)


class _Desk:
    """The program while choices are looked at. `cut`: the last search ended before it was decided."""

    def __init__(self, master: Master, limits: Limits, fewest: bool) -> None:
        self.master = master
        self._limits = limits
        self._fewest = fewest
        self._allowance = Allowance(limits.work or WORK)
        self._solved: Solved | None = None
        self._known: dict[Numbers, int | None] = {}

    @property
    def cut(self) -> bool:
        return self._allowance.cut

    def may_do(self, numbers: Numbers) -> bool:
        """Whether fractions of replicas and shapes can meet everything with these numbers."""
        return self._least(numbers) is not None

    def does(self, numbers: Numbers) -> bool:
        """Whether everything can be met with these numbers: false as well where that was `cut` short."""
        least = self._least(numbers)
        if least is None:
            return False
        # Any answer would do. The way to one with few replicas is the shortest.
        brief = replace(self._limits, allowance=self._allowance, gap_ratio=0.0 if self._fewest else _ANY)
        with _fixed(self.master, numbers) as program:
            program.row(self.master.replicas(), least)
            self._solved = program.minimise(self.master.replicas(), brief)
        return self._solved is not None

    def settled(self, price: float, numbers: Numbers | None) -> Cheapest:
        """What was found last is the answer."""
        solved = self._solved
        assert solved is not None, "the last choice does"
        self.master.accept(solved)
        self.master.hold(self.master.price(), price)
        levels = NOTHING_MISSING, Level(Objective.PRICE, price, price)
        if numbers is None:
            return Cheapest(levels)
        _fix(self.master, numbers)
        proven = self._fewest and solved.objective - solved.lower_bound < 1e-6
        return Cheapest(levels, numbers, round(solved.objective) if proven else None)

    def searched(self, price: float) -> Cheapest | None:
        """All choices that are left together, in one search; none costs less than `price`."""
        self.master.cost_at_least(price)
        level = self.master.minimise(Objective.PRICE, self._limits)
        return None if level is None else Cheapest((NOTHING_MISSING, level))

    def _least(self, numbers: Numbers) -> int | None:
        """A number of replicas that no answer is below; None where not even fractions of them do."""
        if numbers not in self._known:
            with _fixed(self.master, numbers) as program:
                relaxed = program.relaxed().minimise(self.master.replicas(), self._limits)
            self._known[numbers] = None if relaxed is None else ceil(relaxed.objective - 1e-6)
        return self._known[numbers]


@contextmanager
def _fixed(master: Master, numbers: Numbers) -> Iterator[Program]:
    """The program with these numbers, for as long as the context lasts."""
    mark = master.program.rows
    _fix(master, numbers)
    yield master.program
    master.program.drop_rows(mark)


def _fix(master: Master, numbers: Numbers) -> None:
    for group, number in zip(master.classes, numbers, strict=True):
        master.use(group.members, number)
