"""The integer program of a plan: how often each class of GPUs takes each shape, and how many replicas get which slices.

Variables: y[class, shape] GPUs, x[pool, want, profile] replicas, k[pool, want, profile] of them that stay where they
run, s[want] what is missing. A pool is all slots of one product; with `by_gpu` classes it is one GPU, which is what limits
per GPU and node are about. Rows: every GPU takes one shape, every slot in use has its replica (equal, so that nothing is
made that nobody needs), every want is met but for what is missing.

Objectives are minimised one after the other, each with the earlier ones held at what they came to.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from model_registry.geometry import Placement
from placement.planner.menu_rows import MenuRows, add_menus, least
from placement.planner.menus import Block, Menus, priced
from placement.planner.places import Places, add_places
from placement.planner.shapes import GpuClass, Shape
from placement.planner.solver import INFINITY, Limits, Program, Solved, common_step
from placement.planner.types import Constraints, FleetGpu, Level, Objective
from placement.planner.wants import Want, spread_together

MOVE = 1000
"""A replica moved or stopped weighs as much as so many layout changes."""

Terms = dict[int, float]
NOTHING = 1e-9
"""What is missing by no more than this many replicas is not missing."""

_FEW_NODES = 500
_AFTER_NEAR = 0.25
"""Where an answer close to the relaxation is known, so much of the work goes into finding a better one."""

_FOR_ECONOMY = 0.1
"""Of a search that is not for the optimum, so much of the work goes into replicas that could be done without."""

_HARDLY = 1.0
"""Where a gap will do, so many replicas more are not searched for: one of all that a large fleet runs."""

NOTHING_MISSING = Level(Objective.DEMAND, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the program came to, by class, pool and want instead of by variable."""

    shapes: Mapping[tuple[int, int], int]
    replicas: Mapping[tuple[str, str, str], int]
    levels: tuple[Level, ...]
    missing: Mapping[str, float]
    places: Mapping[int, tuple[Placement, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class Master:
    """One program, and the terms of every objective in it. `running` is the number of replicas that run by want.

    With `slack` slots may stay empty, which is enough for what does not depend on them: demand, price, number of replicas.
    `menus` are all that matter once demand is settled, where that is known.
    """

    classes: Sequence[GpuClass]
    wants: Sequence[Want]
    constraints: Constraints
    running: Mapping[str, int] = field(default_factory=dict)
    keep: bool = True
    slack: bool = False
    program: Program = field(default_factory=Program)
    _y: dict[tuple[int, int], int] = field(default_factory=dict)
    _x: dict[tuple[str, str, str], int] = field(default_factory=dict)
    _k: dict[tuple[str, str, str], int] = field(default_factory=dict)
    _s: dict[str, int] = field(default_factory=dict)
    _last: Solved | None = None
    _economical: bool = False
    _found: bool = False
    _economy_held: bool = False
    _product: dict[str, str] = field(default_factory=dict)
    _places: dict[int, Places] = field(default_factory=dict)
    menus: Menus | None = None
    _menu_rows: MenuRows | None = None

    def __post_init__(self) -> None:
        self._product.update((c.group, c.product) for c in self.classes)
        self._add_shapes()
        for group, members in self._pools().items():
            self._add_pool(group, members)
        for want in self.wants:
            self._add_want(want)
        for together in spread_together(self.wants):
            self._add_spread(together)
        if (limit := self.constraints.max_layout_changes) is not None:
            self.program.row(self._changes(), upper=limit)

    def hold(self, terms: Mapping[int, float], value: float) -> None:
        """Keep an objective at `value` or below from here on."""
        self.program.row(terms, upper=value + 1e-6 * max(1.0, abs(value)))

    def minimise(self, objective: Objective, limits: Limits) -> Level | None:
        """Make one objective as small as can be and hold it there. None where no answer was found in time."""
        if objective is Objective.DEMAND:
            return self._meet_demand(limits)
        if objective is Objective.PRICE:
            if self.menus is not None and (known := self._least_already(self.price(), limits)) is not None:
                self.hold(self.price(), known)
                return Level(objective, known, known)
            # With menus the last answer is nearly always the best: what is left is to prove it.
            return self._level(objective, self.price(), limits, heuristics=self._menu_rows is None)
        if objective is Objective.DISTURBANCE:
            base = MOVE * sum(self.running.values())
            level = self._level(objective, self._disturbance(), limits, base=base, unit=MOVE)
            self._economical = level is not None and not self._reusable
            return level
        if self.economise(limits) is None:
            return None
        return self._level(objective, self._sum(lambda shape: shape.fragmentation), limits)

    def meet_at_least_price(self, limits: Limits) -> tuple[Level, Level] | None:
        """Demand and price at once, for the usual case that everything can be met; None where that is not found."""
        mark = self.program.rows
        self.miss_nothing()
        price = self.price()
        # Where even fractions of replicas cannot meet everything, this tells at once.
        relaxed = self.program.relaxed().minimise(price, limits)
        if relaxed is not None and limits.gap_ratio and (near := self._near(price, relaxed, limits)) is not None:
            self._last = near
            if near.objective <= relaxed.objective / (1 - limits.gap_ratio):
                self.hold(price, near.objective)
                return NOTHING_MISSING, Level(Objective.PRICE, near.objective, min(near.objective, relaxed.objective))
        level = self._level(Objective.PRICE, price, limits) if relaxed is not None else None
        if level is None:
            self.program.drop_rows(mark)
            return None
        return NOTHING_MISSING, level

    def count(self, limits: Limits) -> Level | None:
        """The fewest replicas: on an empty fleet every one of them is an instance to create."""
        level = self._level(Objective.DISTURBANCE, self.replicas(), limits, unit=MOVE)
        self._economical = level is not None
        return level

    def counted(self, replicas: int) -> Level:
        """What `count` comes to where the answer is known to have the fewest already."""
        self.hold(self.replicas(), replicas)
        self._economical = True
        return Level(Objective.DISTURBANCE, replicas / MOVE, replicas / MOVE)

    def any_answer(self, limits: Limits) -> Answer | None:
        """The first answer that is found, in search of one with few replicas; None where there is none within the limits."""
        solved = self.program.minimise(self.replicas(), limits)
        if solved is None:
            return None
        self.accept(solved)
        return self.answer(())

    def economise(self, limits: Limits) -> float | None:
        """Make the penalties of the options taken, and where it is open their number, as small as can be; None in vain."""
        economy = {} if self._economy_held else self._economy()
        if not economy:
            return 0.0
        value = self._least_already(economy, limits)
        if value is not None:
            self.hold(economy, value)
        elif (level := self._level(Objective.FRAGMENTATION, economy, _for_economy(limits))) is not None:
            value = level.value
        self._economy_held = value is not None
        return value

    def _least_already(self, terms: Terms, limits: Limits) -> float | None:
        """What the last answer comes to, where the relaxation shows that none comes to less; None where it does not."""
        step = common_step(terms.values())
        if self._last is None or not self._found or not step:
            return None
        known = sum(cost * self._last.values[v] for v, cost in terms.items())
        relaxed = self.program.relaxed().minimise(terms, limits)
        return known if relaxed is not None and known - relaxed.objective < step * (1 - 1e-6) else None

    def disturb_least(self, limits: Limits) -> tuple[Level, float] | None:
        """The least disturbance, and what `economise` comes to then; None where no answer was found in time.

        Where nothing but replicas is economised both are found in one search, which takes less than two: a layout change
        weighs more than all replicas together.
        """
        economy = self._economy() if self._reusable and limits.nodes is None and not limits.gap_ratio else {}
        if set(economy.values()) != {1.0}:
            level = self.minimise(Objective.DISTURBANCE, limits)
            value = None if level is None else self.economise(limits)
            return None if level is None or value is None else (level, value)
        disturbance, weight = self._disturbance(), float(1 + self._most_replicas)
        both = {v: weight * cost for v, cost in disturbance.items()}
        both |= {v: cost + both.get(v, 0.0) for v, cost in economy.items()}
        known = self._last.values if self._last else None
        if (solved := self.program.minimise(both, limits, start=known, presolve=self._menu_rows is None)) is None:
            return None
        self.accept(solved)
        base = MOVE * sum(self.running.values())
        least, replicas = (sum(cost * solved.values[v] for v, cost in part.items()) for part in (disturbance, economy))
        self.hold(disturbance, least)
        self.hold(economy, replicas)
        self._economy_held = True
        bound = min(least, math.floor(solved.lower_bound / weight + 1e-6))
        return Level(Objective.DISTURBANCE, (base + least) / MOVE, (base + bound) / MOVE), replicas

    @property
    def _most_replicas(self) -> int:
        """No fewer than the GPUs can hold together."""
        return sum((g.geometry.memory_slices if g.geometry else None) or 1 for c in self.classes for g in c.members)

    def hold_economy(self, value: float) -> None:
        """Keep what `economise` came to in a program that settled the same before."""
        self._economical = not self._reusable
        self.hold(self._economy(), value)
        self._economy_held = True

    def hold_disturbance(self, value: float) -> None:
        """Keep disturbance, in layout changes, at this."""
        self.hold(self._disturbance(), value - MOVE * sum(self.running.values()))

    def hold_changes(self, count: float) -> None:
        """Keep the instances created and destroyed at so many."""
        self.hold(self._changes(), count)

    def stay_near(self, replicas: Mapping[tuple[str, str, str], int], most: int) -> None:
        """Allow each number of replicas (by pool, want and profile) to differ from these by no more than `most`."""
        for key, v in self._x.items():
            self.program.row({v: 1.0}, max(0, replicas.get(key, 0) - most), replicas.get(key, 0) + most)

    def _disturbance(self) -> Terms:
        """Layout changes, less what every replica that stays is worth."""
        return {v: -float(MOVE) for v in self._k.values()} | self._changes()

    def _changes(self) -> Terms:
        """Instances created and destroyed."""
        terms = self._sum(lambda shape: shape.changes)
        for places in self._places.values():
            terms |= places.changes()
        return terms

    def _near(self, terms: Terms, relaxed: Solved, limits: Limits) -> Solved | None:
        """The best answer close to the relaxation; None if there is none.

        The larger the fleet, the less a replica or a GPU more matters, and the better this is: mostly within the gap.
        """
        close = {
            v: (math.floor(relaxed.values[v] + 1e-6) - 1.0, math.ceil(relaxed.values[v] - 1e-6) + 1.0)
            for v in self._x.values()
        }
        full = {v: (math.floor(relaxed.values[v] + 1e-6) - 3.0, INFINITY) for v in self._y.values()}
        brief = replace(limits.share(0.2), nodes=_FEW_NODES)
        return self.program.within(close | full).minimise(terms, brief)

    def miss_nothing(self) -> None:
        """Hold every want at nothing missing, and say so in whole replicas."""
        for want in self.wants:
            self.miss(want, 0.0)

    def _add_rounded(self, want: Want) -> None:
        """What whole replicas imply where nothing may be missing: a rate in units of one option, rounded up (Chvatal, Gomory).

        Without these the relaxation serves 3.4 units by 3.4 replicas, and its bound is as much too low.
        """
        mine = {v: self._capacity(want, key) for key, v in self._of(want).items()}
        for unit in sorted({c for c in mine.values() if c > 0}) if want.rate else ():
            needed = math.ceil((want.rate or 0.0) / unit - 1e-9)
            self.program.row({v: float(math.ceil(c / unit - 1e-9)) for v, c in mine.items()}, needed)

    def _level(
        self,
        objective: Objective,
        terms: Terms,
        limits: Limits,
        *,
        base: float = 0.0,
        unit: float = 1.0,
        heuristics: bool = True,
    ) -> Level | None:
        known = self._last.values if self._last else None
        if self._found and known and not any(known[v] for v in terms) and all(cost >= 0 for cost in terms.values()):
            solved: Solved | None = Solved(known, base, base)
        else:
            presolve = self._menu_rows is None
            solved = self.program.minimise(
                terms, limits, constant=base, start=known, presolve=presolve, heuristics=heuristics
            )
        if solved is None and known is None:
            return None
        self._found = self._found or solved is not None
        if solved is None:
            # Nothing better was found than what was there, and nothing proven.
            value = base + sum(cost * known[v] for v, cost in terms.items()) if known else base
            solved = Solved(known or (), value, 0.0)
        self._last = solved
        self.hold(terms, solved.objective - base)
        return Level(objective, solved.objective / unit, solved.lower_bound / unit)

    def _meet_demand(self, limits: Limits) -> Level | None:
        """What is missing at all; if something must be, from the highest priority down."""
        everything = self.shortfall()
        priorities = sorted({w.priority for w in self.wants}, reverse=True)
        solved = self._least_by_menus(everything, limits) if self.slack and len(priorities) == 1 else None
        solved = solved or self._least_missing(everything, limits)
        if solved is None:
            return None
        self._last = solved
        if solved.objective < 1e-6 or len(priorities) == 1:
            self.hold(everything, solved.objective)
            return Level(Objective.DEMAND, solved.objective, solved.lower_bound)
        levels = [self._level(Objective.DEMAND, self.shortfall(p), limits) for p in priorities]
        found = [level for level in levels if level is not None]
        return Level(Objective.DEMAND, sum(x.value for x in found), sum(x.lower_bound for x in found))

    def restrict(self, menus: Menus) -> None:
        """Serve wants by one of these menus each, which must be all that matter from here on."""
        if not menus.keys.issuperset(self._x):
            return
        self._menu_rows = add_menus(self.program, menus, self._x, self._s)
        if self._last is not None:
            values = self._menu_rows.completed(self._last.values, self.program.variables)
            self._last = replace(self._last, values=values)

    def _least_by_menus(self, missing: Terms, limits: Limits) -> Solved | None:
        """What is missing at least, and the menus that can do with that; None where it takes too long to find them."""
        relaxed = priced(self.program, missing, self.blocks(), frozenset(self._x))
        found = least(self.program, missing, relaxed, self._s, limits) if relaxed is not None else None
        if found is None:
            return None
        solved, self.menus = found
        self.accept(solved)
        if self.menus is not None:
            self.restrict(self.menus)
        return self._last

    def blocks(self) -> tuple[Block, ...]:
        """The wants with a rate: those that menus are made for."""
        return tuple(self._block(want, mine) for want in self.wants if not want.fixed and (mine := self._of(want)))

    def _block(self, want: Want, mine: dict[tuple[str, str, str], int]) -> Block:
        capacities = tuple(self._capacity(want, key) for key in mine)
        return Block(want, mine, capacities, tuple(map(self.program.upper, mine.values())), self._s[want.name])

    def _least_missing(self, missing: Terms, limits: Limits) -> Solved | None:
        """What is missing at least. Where a gap will do, an answer close to the relaxation comes first, and then less work."""
        known = self._last.values if self._last else None
        relaxed = self.program.relaxed().minimise(missing, limits) if limits.gap_ratio else None
        near = self._near(missing, relaxed, limits) if relaxed else None
        if relaxed is None or near is None:
            return self.program.minimise(missing, limits, start=known)
        near = replace(near, lower_bound=min(near.objective, relaxed.objective))
        if near.objective - near.lower_bound <= max(_HARDLY, limits.gap_ratio * near.objective):
            return near
        return self.program.minimise(missing, limits.share(_AFTER_NEAR), start=near.values) or near

    def begin(
        self,
        shapes: Mapping[tuple[int, int], int],
        replicas: Mapping[tuple[str, str, str], int],
        missing: Mapping[str, float],
    ) -> None:
        """Search from this answer on: what is found is never worse."""
        values = [0.0] * self.program.variables
        for key, count in shapes.items():
            values[self._y[key]] = count
        own: Counter[tuple[str, str, str]] = Counter()
        for (c, s), count in shapes.items():
            for (name, profile), n in self._shape(c, s).own:
                own[self.classes[c].group, name, profile] += n * count
        for taken, count in replicas.items():
            values[self._x[taken]] = count
        for kept, v in self._k.items():
            values[v] = min(own[kept], replicas.get(kept, 0))
        for name, short in missing.items():
            values[self._s[name]] = short
        whole = self._menu_rows.completed(tuple(values), len(values)) if self._menu_rows else tuple(values)
        self._last = Solved(whole, 0.0, 0.0)

    def answer(self, levels: Iterable[Level]) -> Answer:
        """The last solution. Must follow a `minimise` that found one."""
        assert self._last is not None, "nothing was minimised"
        solved = self._last
        return Answer(
            {key: n for key, v in self._y.items() if (n := solved.count(v))},
            {key: n for key, v in self._x.items() if (n := solved.count(v))},
            tuple(levels),
            {name: solved.values[v] for name, v in self._s.items() if solved.values[v] > 1e-6},
            {c: places.taken(v for v in places.used.values() if solved.count(v)) for c, places in self._places.items()},
        )

    def shortfall(self, priority: int | None = None) -> Terms:
        """What is missing, in replicas; of one priority only where one is named."""
        return {self._s[w.name]: 1.0 for w in self.wants if priority in (None, w.priority)}

    def miss(self, want: Want, most: float) -> None:
        """Let one want miss no more than so much, in replicas of its best option."""
        if most <= NOTHING:
            # Exactly: a millionth, which `hold` allows for what was computed, would hide from the solver that all is whole.
            self.program.row({self._s[want.name]: 1.0}, upper=0.0)
            self._add_rounded(want)
        else:
            self.hold({self._s[want.name]: 1.0}, most)

    def cost_at_least(self, price: float) -> None:
        """Look at no cheaper answer: where it is known that there is none, the search ends with the first that costs this."""
        self.program.row(self.price(), price)

    def possible(self, limits: Limits) -> bool:
        """Whether there is any answer at all."""
        return self.program.minimise({}, limits) is not None

    def accept(self, solved: Solved) -> None:
        """Take an answer that was found outside: what is found from here on is no worse."""
        self._last, self._found = solved, True

    def replicas(self) -> Terms:
        """The number of replicas."""
        return dict.fromkeys(self._x.values(), 1.0)

    def use(self, gpus: Iterable[FleetGpu], number: int) -> None:
        """Have so many of these GPUs in use: all that are alike but for what runs on them."""
        ids = {g.id for g in gpus}
        among = {c for c, group in enumerate(self.classes) if any(g.id in ids for g in group.members)}
        among |= {c for c, group in enumerate(self.classes) if among.intersection(group.vacated_by)}
        terms = {v: 1.0 for (c, s), v in self._y.items() if c in among and self._shape(c, s).on}
        terms |= {at.on: 1.0 for c, at in self._places.items() if c in among}
        self.program.row(terms, number, number)

    def price(self) -> Terms:
        """Price per hour of the GPUs in use."""
        terms = {
            v: p for (c, s), v in self._y.items() if self._shape(c, s).on and (p := self.classes[c].price_per_hour)
        }
        return terms | {at.on: p for at in self._places.values() if (p := at.gpu.price_per_hour)}

    def _economy(self) -> Terms:
        """Penalties of the options taken, and the replicas that serve rates, where their number has not been settled.

        It has not where there are instances that a replica nobody needs could have at no cost.
        """
        by_name = {w.name: w for w in self.wants}
        terms: Terms = {}
        for (group, name, profile), v in self._x.items():
            option = by_name[name].option(self._product[group], profile)
            cost = (option.penalty * MOVE if option else 0.0) + (
                0.0 if by_name[name].fixed or self._economical else 1.0
            )
            if cost:
                terms[v] = cost
        return terms if not self._economical or any(o.penalty for w in self.wants for o in w.options) else {}

    @property
    def _reusable(self) -> bool:
        """Whether there are instances that somebody else could have."""
        return any(i.reserved is None for group in self.classes for gpu in group.members for i in gpu.instances)

    def _add_shapes(self) -> None:
        for c, group in enumerate(self.classes):
            if not group.shapes:
                self._places[c] = self._add_places(group)
                continue
            count = len(group.members) or sum(len(self.classes[v].members) for v in group.vacated_by)
            for s in range(len(group.shapes)):
                self._y[c, s] = self.program.variable(count)
            mine = {self._y[c, s]: 1.0 for s in range(len(group.shapes))}
            vacated = {self._y[v, s]: -1.0 for v in group.vacated_by for s in self._vacating(v)}
            self.program.row(mine | vacated, len(group.members), len(group.members))

    def _add_places(self, group: GpuClass) -> Places:
        (gpu,) = group.members
        profiles = {o.profile for w in self.wants for o in w.options if o.product == gpu.product}
        return add_places(self.program, gpu, profiles, frozenset(w.name for w in self.wants))

    def _vacating(self, c: int) -> Iterator[int]:
        return (s for s, shape in enumerate(self.classes[c].shapes) if shape.vacated)

    def _pools(self) -> dict[str, list[int]]:
        pools: dict[str, list[int]] = defaultdict(list)
        for c, group in enumerate(self.classes):
            pools[group.group].append(c)
        return dict(sorted(pools.items()))

    def _add_pool(self, group: str, members: Sequence[int]) -> None:
        """Slots of one pool: who may have them, and that each in use has somebody."""
        slots, own = self._supplied(members)
        closed = self.classes[members[0]].closed
        product = self.classes[members[0]].product
        for profile, supply in sorted(slots.items()):
            takers = [w for w in self.wants if w.option(product, profile) and (not closed or (w.name, profile) in own)]
            for want in takers:
                self._x[group, want.name, profile] = self.program.variable(
                    sum(self.program.upper(v) * n for v, n in supply.items())
                )
            row = {self._x[group, w.name, profile]: -1.0 for w in takers} | supply
            self.program.row(row, 0.0, INFINITY if self.slack else 0.0)
        for (name, profile), mine in sorted(own.items()):
            self._add_kept((group, name, profile), mine, closed=closed)

    def _supplied(self, members: Sequence[int]) -> tuple[dict[str, Terms], dict[tuple[str, str], Terms]]:
        """What these classes give: slots by profile, and by (want, profile) those on which a replica of it runs."""
        slots: dict[str, Terms] = defaultdict(dict)
        own: dict[tuple[str, str], Terms] = defaultdict(dict)
        for c in members:
            for s, shape in enumerate(self.classes[c].shapes):
                for profile, n in shape.slots:
                    slots[profile][self._y[c, s]] = n
                for key, n in shape.own:
                    own[key][self._y[c, s]] = n
            if (places := self._places.get(c)) is not None:
                for placement, v in places.used.items():
                    slots[placement.profile][v] = 1
                for key, variables in places.own({w.name for w in self.wants}).items():
                    own[key] |= dict.fromkeys(variables, 1.0)
        return slots, own

    def _add_kept(self, key: tuple[str, str, str], mine: Terms, *, closed: bool) -> None:
        if key not in self._x:
            return
        if closed:
            self.program.row({self._x[key]: 1.0} | {v: -n for v, n in mine.items()}, upper=0.0)
        if self.keep:
            self._k[key] = kept = self.program.variable()
            self.program.row({kept: 1.0, self._x[key]: -1.0}, upper=0.0)
            self.program.row({kept: 1.0} | {v: -n for v, n in mine.items()}, upper=0.0)

    def _add_want(self, want: Want) -> None:
        missing = self.program.variable(INFINITY, integer=want.fixed)
        self._s[want.name] = missing
        mine = self._of(want)
        replicas = dict.fromkeys(mine.values(), 1.0)
        self.program.row(replicas | {missing: 1.0}, want.floor)
        self.program.row(replicas, upper=INFINITY if want.ceiling is None else want.ceiling)
        if want.rate is not None:
            served = {v: self._capacity(want, key) for key, v in mine.items()}
            self.program.row(served | {missing: want.best}, want.rate)
            self.program.row(served, upper=want.most)

    def _add_spread(self, together: Sequence[Want]) -> None:
        """Limits per GPU and node of one model. In a pool of many GPUs these rows are necessary, and nearly always sufficient."""
        per_gpu, per_node = together[0].max_per_gpu, together[0].max_per_node
        pools: dict[str, Terms] = defaultdict(dict)
        for want in together:
            for (group, _, _), v in self._of(want).items():
                pools[group][v] = 1.0
        members = self._pools()
        by_node: dict[str, Terms] = defaultdict(dict)
        for group, replicas in pools.items():
            if per_gpu:
                self.program.row(replicas | self._reach(together, members[group]), upper=0.0)
            nodes = sorted({gpu.node for c in members.get(group, ()) for gpu in self.classes[c].members})
            if per_node:
                self.program.row(replicas, upper=per_node * len(nodes))
                for node in nodes if len(nodes) == 1 else ():
                    by_node[node] |= replicas
        for replicas in by_node.values():
            self.program.row(replicas, upper=per_node or INFINITY)

    def _reach(self, together: Sequence[Want], members: Iterable[int]) -> Terms:
        """Minus how many replicas of one model each shape could take without breaking its limit per GPU."""
        terms: Terms = {}
        most = together[0].max_per_gpu
        for c in members:
            fits = _fitting(together, self.classes[c].product)
            for s, shape in enumerate(self.classes[c].shapes):
                fitting = sum(n for profile, n in shape.slots if profile in fits)
                if fitting:
                    terms[self._y[c, s]] = -float(min(fitting, most or fitting))
            if (places := self._places.get(c)) is not None:
                terms |= self._reach_of(most, {v: -1.0 for p, v in places.used.items() if p.profile in fits})
        return terms

    def _reach_of(self, most: int | None, fitting: Terms) -> Terms:
        reach = self.program.variable(most or len(fitting))
        self.program.row(fitting | {reach: 1.0}, upper=0.0)
        return {reach: -1.0}

    def _of(self, want: Want) -> dict[tuple[str, str, str], int]:
        return {key: v for key, v in self._x.items() if key[1] == want.name}

    def _capacity(self, want: Want, key: tuple[str, str, str]) -> float:
        option = want.option(self._product[key[0]], key[2])
        return option.capacity if option else 0.0

    def _shape(self, c: int, s: int) -> Shape:
        return self.classes[c].shapes[s]

    def _sum(self, of: Callable[[Shape], int]) -> Terms:
        return {v: float(n) for (c, s), v in self._y.items() if (n := of(self._shape(c, s)))}


def _fitting(together: Iterable[Want], product: str) -> frozenset[str]:
    """The profiles of `product` that hold a replica of any of these."""
    return frozenset(o.profile for want in together for o in want.options if o.product == product)


def _for_economy(limits: Limits) -> Limits:
    """Where the tree is bounded an answer near the best will do, and this is what matters least about it."""
    return limits if limits.nodes is None else limits.share(_FOR_ECONOMY)
