"""Integer programs, solved by HiGHS. The only module that knows the solver.

One thread, a fixed seed, and limits that count work instead of time: the same program gives the same answer, on a busy
machine as on an idle one. A clock is the last resort, far beyond; whoever asks is told when it was needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

INFINITY = math.inf
_INTEGRAL = 1e-6

_FEWEST_STEPS = 25
"""However large the program: so far a search gets to a first answer."""


WORK = 4_000_000
"""What one search may do unless somebody says otherwise: some ten seconds of one core."""


class Watch:
    """The last resort against a search without end: expires once `seconds` have gone by on `clock`, and stays so."""

    def __init__(self, seconds: float = 600.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = clock() + seconds
        self.expired = False

    def look(self) -> bool:
        """Whether time is up."""
        self.expired = self.expired or self._clock() >= self._until
        return self.expired


class Allowance:
    """Work that several searches have together, in the units of `Limits`. `cut`: the last one ended before it was decided."""

    def __init__(self, work: int) -> None:
        self.left = work
        self.cut = False

    def spend(self, work: int, *, cut: bool) -> None:
        """Take this much of it, or what is left."""
        self.left = max(0, self.left - work)
        self.cut = cut


@dataclass(frozen=True, slots=True)
class Limits:
    """When a search may end before its proof is complete.

    `work` bounds one search, in steps of the search times the variables and rows of the program: 400,000 are about a second
    of one core. Unlike time it ends every run of the same search at the same place. What was found by then is the answer,
    and its bound says how good that is. None does not bound it.
    `gap_ratio` ends it when the best found is proven to be within that share of the optimum; 0 asks for the optimum.
    `nodes` bounds the search tree. `allowance` is what a search has together with others: it gets no more than is left of
    that, and what it did is taken off.
    `seconds` by the clock end everything that is done with these limits; an answer for which that was needed says so.
    """

    work: int | None = WORK
    gap_ratio: float = 0.0
    nodes: int | None = None
    seconds: float = 600.0
    watch: Watch | None = field(default=None, compare=False, repr=False)
    allowance: Allowance | None = field(default=None, compare=False, repr=False)

    def watched(self, clock: Callable[[], float] = time.monotonic) -> Limits:
        """The same limits with their seconds running from here on, for everything that is done with them together."""
        return replace(self, watch=Watch(self.seconds, clock))

    def share(self, part: float) -> Limits:
        """The same limits with this part of the work."""
        return replace(self, work=None if self.work is None else max(1, round(self.work * part)))

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"a limit of {self.seconds} seconds")
        if self.work is not None and self.work <= 0:
            raise ValueError(f"a limit of {self.work} units of work")
        if not 0 <= self.gap_ratio < 1:
            raise ValueError(f"a gap of {self.gap_ratio}")


@dataclass(frozen=True, slots=True)
class Solved:
    """An answer: the value of every variable, what the objective comes to, and the least that it could be."""

    values: tuple[float, ...]
    objective: float
    lower_bound: float

    def count(self, variable: int) -> int:
        """The value of an integer variable."""
        return round(self.values[variable])


@dataclass(slots=True)
class Program:
    """A linear program over integers and reals, under construction: variables first, then rows, then `minimise`.

    Variables and rows are added in an order that depends on nothing but the input: that makes the answer repeatable.
    """

    _lower: list[float] = field(default_factory=list)
    _upper: list[float] = field(default_factory=list)
    _integer: list[bool] = field(default_factory=list)
    _row_lower: list[float] = field(default_factory=list)
    _row_upper: list[float] = field(default_factory=list)
    _starts: list[int] = field(default_factory=lambda: [0])
    _indices: list[int] = field(default_factory=list)
    _coefficients: list[float] = field(default_factory=list)

    @property
    def variables(self) -> int:
        """How many variables there are."""
        return len(self._lower)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self._row_lower)

    def variable(self, upper: float = INFINITY, *, integer: bool = True) -> int:
        """A new variable between 0 and `upper`; returns its number."""
        self._lower.append(0.0)
        self._upper.append(upper)
        self._integer.append(integer)
        return len(self._lower) - 1

    def upper(self, variable: int) -> float:
        """The largest value that a variable may take."""
        return self._upper[variable]

    def row(self, terms: Mapping[int, float], lower: float = -INFINITY, upper: float = INFINITY) -> None:
        """`lower` <= sum of coefficient x variable <= `upper`. A row that can never bind is left out."""
        if lower == -INFINITY and upper == INFINITY:
            return
        for variable, coefficient in terms.items():
            if coefficient:
                self._indices.append(variable)
                self._coefficients.append(coefficient)
        self._starts.append(len(self._indices))
        self._row_lower.append(lower)
        self._row_upper.append(upper)

    def all_rows(self) -> Iterator[tuple[dict[int, float], float, float]]:
        """Every row: its terms, and between what they may sum up."""
        for row, (lower, upper) in enumerate(zip(self._row_lower, self._row_upper, strict=True)):
            mine = slice(self._starts[row], self._starts[row + 1])
            yield dict(zip(self._indices[mine], self._coefficients[mine], strict=True)), lower, upper

    def copy(self) -> Program:
        """The same program, to go on with by itself."""
        return Program(*(list(getattr(self, part.name)) for part in fields(self)))

    def drop_rows(self, first: int) -> None:
        """Take back the rows from number `first` on."""
        del self._row_lower[first:], self._row_upper[first:], self._starts[first + 1 :]
        del self._indices[self._starts[-1] :], self._coefficients[self._starts[-1] :]

    def minimise(
        self,
        objective: Mapping[int, float],
        limits: Limits,
        *,
        constant: float = 0.0,
        start: tuple[float, ...] | None = None,
        step: float | None = None,
        most: float | None = None,
        presolve: bool = True,
        heuristics: bool = True,
    ) -> Solved | None:
        """The best answer within the limits; None where there is none, or none was found in time.

        `constant` is added to the objective. `start` is an answer that is known to be possible: the result is never worse.
        `step` is a number of which every value of the objective that matters is a multiple; unset, it is worked out.
        `most` is a value above which answers do not matter: where there is none below, one above may be given, or none.
        Without `presolve` the program is not made smaller first, which takes longer than it saves where little is left;
        without `heuristics` no answers are looked for but those of the search itself, which are enough for a proof.
        """
        step = _step(objective, self._integer) if step is None else step
        if not self.variables:
            possible = all(a <= 0 <= b for a, b in zip(self._row_lower, self._row_upper, strict=True))
            return Solved((), constant, constant) if possible else None
        highs = _highs(limits, step=step)
        if most is not None:
            highs.setOptionValue("objective_bound", most)
        if not presolve:
            highs.setOptionValue("presolve", "off")
        if not heuristics:
            _without_heuristics(highs)
        highs.passModel(self._model(objective, constant))
        guard = _Guard(limits, self.variables + self.rows)
        if any(self._integer):
            highs.cbMipInterrupt.subscribe(guard)
        if start is not None:
            import highspy  # costs a tenth of a second, and most commands never plan

            known = highspy.HighsSolution()
            known.col_value = list(start)
            highs.setSolution(known)
        highs.run()
        info = highs.getInfo()
        found_any = info.primal_solution_status == 2  # HiGHS: kSolutionStatusFeasible
        guard.settle(decided=found_any)
        if not found_any:
            return None
        values = tuple(float(v) for v in highs.getSolution().col_value)
        found = float(info.objective_function_value)
        bound = float(info.mip_dual_bound) if any(self._integer) else found
        if not math.isfinite(bound):
            bound = constant + sum(cost * self._upper[v] for v, cost in objective.items() if cost < 0)
        return _rounded(Solved(values, found, min(bound, found)), objective, constant, self._integer, step)

    def relaxed(self) -> Program:
        """The same program with every variable real: its optimum bounds this one's."""
        return replace(self, _integer=[False] * self.variables)

    def within(self, bounds: Mapping[int, tuple[float, float]]) -> Program:
        """The same program with these variables between these bounds, as far as their own admit it."""
        lower, upper = list(self._lower), list(self._upper)
        for variable, (least, most) in bounds.items():
            lower[variable], upper[variable] = max(lower[variable], least), min(upper[variable], most)
        return replace(self, _lower=lower, _upper=upper)

    def _model(self, objective: Mapping[int, float], constant: float) -> Any:
        import highspy
        import numpy as np

        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = self.variables, self.rows
        costs = np.zeros(self.variables)
        for variable, cost in objective.items():
            costs[variable] = cost
        model.col_cost_, model.offset_ = costs, constant
        model.col_lower_, model.col_upper_ = np.array(self._lower), np.array(self._upper)
        model.row_lower_, model.row_upper_ = np.array(self._row_lower), np.array(self._row_upper)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.array(self._starts, dtype=np.int32)
        model.a_matrix_.index_ = np.array(self._indices, dtype=np.int32)
        model.a_matrix_.value_ = np.array(self._coefficients)
        kinds = highspy.HighsVarType
        model.integrality_ = [kinds.kInteger if i else kinds.kContinuous for i in self._integer]
        return model


class Columns:
    """A linear program that gets further variables between solutions, each found from the one before.

    `program` has the rows, and the variables that are there from the start; all are taken as real.
    """

    def __init__(self, program: Program, costs: Mapping[int, float]) -> None:
        self._highs = _highs(Limits(), step=0.0)
        self._highs.setOptionValue("presolve", "off")
        self._highs.passModel(program.relaxed()._model(costs, 0.0))

    def add(self, cost: float, terms: Mapping[int, float]) -> None:
        """A variable of at least 0, with its coefficients by row."""
        import numpy as np

        rows = sorted(terms)
        values = np.array([terms[row] for row in rows])
        self._highs.addCol(cost, 0.0, INFINITY, len(rows), np.array(rows, dtype=np.int32), values)

    def solve(self) -> tuple[float, tuple[float, ...]] | None:
        """The least cost, and for each row what one more of its bound would add to it; None where there is no answer."""
        self._highs.run()
        info = self._highs.getInfo()
        if info.primal_solution_status != 2 or info.dual_solution_status != 2:  # HiGHS: kSolutionStatusFeasible
            return None
        return float(info.objective_function_value), tuple(self._highs.getSolution().row_dual)


class _Guard:
    """Ends a search that has done its work, or for which time is up. HiGHS asks at the same points of every run."""

    def __init__(self, limits: Limits, size: int) -> None:
        self._allowance = limits.allowance
        left = None if self._allowance is None else self._allowance.left
        granted = [work for work in (limits.work, left) if work is not None]
        self._most = max(_FEWEST_STEPS, min(granted) // size) if granted else math.inf
        self._watch = limits.watch or Watch(limits.seconds)
        self._size = size
        self._steps = 0
        self._ended = False

    def __call__(self, event: Any) -> None:
        self._steps += 1
        if self._steps > self._most or self._watch.look():
            self._ended = True
            event.interrupt()

    def settle(self, *, decided: bool) -> None:
        """Take what was done off the allowance. To set the program up and solve its relaxation counts as one step."""
        if self._allowance is not None:
            self._allowance.spend((self._steps + 1) * self._size, cut=self._ended and not decided)


def _highs(limits: Limits, *, step: float) -> Any:
    import highspy

    highs = highspy.Highs()
    for option, value in (
        ("output_flag", False),
        ("threads", 1),
        ("random_seed", 0),
        ("mip_rel_gap", limits.gap_ratio),
        # An objective that only moves in whole steps is optimal when the bound is less than one step away.
        ("mip_abs_gap", max(1e-9, step * (1 - 1e-6))),
        ("mip_feasibility_tolerance", 1e-7),
        ("primal_feasibility_tolerance", 1e-8),
    ):
        highs.setOptionValue(option, value)
    if limits.nodes is not None:
        highs.setOptionValue("mip_max_nodes", limits.nodes)
    return highs


def _without_heuristics(highs: Any) -> None:
    highs.setOptionValue("mip_heuristic_effort", 0.0)
    for option in ("rins", "rens", "root_reduced_cost"):
        highs.setOptionValue(f"mip_heuristic_run_{option}", False)


def _step(objective: Mapping[int, float], integer: list[bool]) -> float:
    """A number of which every value of the objective is a multiple; 0 if there is none."""
    return common_step(objective.values()) if all(integer[v] for v, c in objective.items() if c) else 0.0


def common_step(costs: Iterable[float]) -> float:
    """The largest number of which all costs are multiples, for costs in ten-thousandths; 0 for all others."""
    costs = [c for c in costs if c]
    scaled = [round(c * 10_000) for c in costs]
    whole = all(abs(c * 10_000 - n) < 1e-6 for c, n in zip(costs, scaled, strict=True))
    return math.gcd(*scaled) / 10_000 if costs and whole else 0.0


def _rounded(
    solved: Solved, objective: Mapping[int, float], constant: float, integer: list[bool], step: float
) -> Solved:
    """Integers made whole, the objective added up again, and the bound lifted to the next value that can be had."""
    values = tuple(float(round(v)) if whole else v for v, whole in zip(solved.values, integer, strict=True))
    found = constant + sum(cost * values[variable] for variable, cost in objective.items())
    bound = solved.lower_bound
    if step and math.isfinite(bound):
        bound = constant + math.ceil((bound - constant) / step - _INTEGRAL) * step
    return Solved(values, found, min(bound, found))
