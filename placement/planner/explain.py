"""Why a demand is not met, and the smallest changes that would meet it: each one tried, none guessed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from model_registry.words import are, counted
from placement.planner.master import Master
from placement.planner.shapes import Shaper
from placement.planner.solver import Allowance, Limits, Watch
from placement.planner.types import (
    Alternative,
    Constraints,
    FleetGpu,
    ModelDemand,
    Objective,
    PlannedGpu,
    Problem,
    Unmet,
)
from placement.planner.wants import Want, want_of, wants_of

_TRIED = 6
"""So many unmet demands share the work for changes that have to be tried out; the others get what is known without."""

_WORK = 1_200_000
"""What all trials may do together: some three seconds of one core, however many demands are unmet."""

_TRIAL = Limits(work=400_000)
_MOST_GPUS = 10_000
_CONTEXT = "max_model_len: "


@dataclass(frozen=True, slots=True)
class _Placed:
    """What a plan gives one want."""

    replicas: int
    served: float


def unmet(
    problem: Problem,
    wants: Sequence[Want],
    gpus: Sequence[PlannedGpu],
    watch: Watch | None = None,
    *,
    work: int = _WORK,
) -> tuple[Unmet, ...]:
    """Every want that the planned GPUs do not meet, the most important first, with its reason and what would help.

    Changes are tried out with `work` in all, in the units of `Limits`, divided among the demands that are left.
    """
    placed = {w.name: _placed(w, gpus) for w in wants}
    missing = {w.name: w.missing(p.replicas, p.served) for w in wants if (p := placed[w.name])}
    short = sorted((w for w in wants if missing[w.name] > 1e-6), key=lambda w: (-w.priority, w.name))
    found, left = [], work
    for number, want in enumerate(short):
        sharing = min(len(short), _TRIED) - number
        mine = Allowance(left // sharing if sharing > 0 else 0)
        left -= mine.left
        trials = _Trials(problem, missing, want, placed[want.name], replace(_TRIAL, watch=watch, allowance=mine))
        found.append(_unmet(problem, want, placed[want.name], gpus, trials))
        left += mine.left
    return tuple(found)


def _placed(want: Want, gpus: Iterable[PlannedGpu]) -> _Placed:
    kinds: Counter[tuple[str, str]] = Counter()
    for planned in gpus:
        for at in planned.slices:
            mine = at.demand == want.name if want.demand else at.reserved == _note(want) and at.change != "keep"
            if mine:
                kinds[planned.gpu.product, at.placement.profile] += 1
    options = ((want.option(*kind), n) for kind, n in kinds.items())
    fitting = [(o.capacity, n) for o, n in options if o is not None]
    return _Placed(sum(n for _, n in fitting), sum(c * n for c, n in fitting))


def _note(want: Want) -> str | None:
    return want.reservation.note if want.reservation else None


def _unmet(problem: Problem, want: Want, placed: _Placed, gpus: Sequence[PlannedGpu], trials: _Trials) -> Unmet:
    by_rate = want.rate is not None and want.rate - placed.served > 1e-9
    missing = (want.rate or 0.0) - placed.served if by_rate else float(want.floor - placed.replicas)
    helps = trials.remedies()
    remedies = (*helps, *_less(want, placed, trials, by_rate=by_rate), *_other_profiles(problem, want))
    return Unmet(
        demand=want.name,
        missing=missing,
        served=placed.served if by_rate else float(placed.replicas),
        unit="requests/s" if by_rate else "replicas",
        reason=_reason(problem, want, gpus, helps),
        remedies=remedies,
        untried=trials.untried,
    )


def _less(want: Want, placed: _Placed, trials: _Trials, *, by_rate: bool) -> Iterator[str]:
    """What the fleet can give as it is, where that is anything: to want nothing is no way to be served.

    `replicas` is asked for every demand of a model: where it has several it is named only if all are met then.
    """
    if placed.replicas == 0:
        return
    if want.reservation is not None:
        yield f"reserve {placed.replicas} of them"
    elif by_rate:
        yield f"ask for {placed.served:g} requests/s"
    elif trials.all_met(placed.replicas):
        yield f"replicas: {placed.replicas}"


def _other_profiles(problem: Problem, want: Want) -> Iterator[str]:
    """What can be reserved instead of a profile that no GPU has."""
    if want.reservation is None or want.options:
        return
    names = sorted({p.name for g in problem.gpus if g.geometry is not None for p in g.geometry.base_profiles})
    if names:
        yield f"reserve what there is: {_listed(names)}"


def _reason(problem: Problem, want: Want, gpus: Sequence[PlannedGpu], helps: Sequence[str]) -> str:
    """What is in the way, the plainest first. `helps` are the remedies that were tried: a limit among them is in the way."""
    if want.reservation is not None and not want.options:
        return f"no GPU here can be cut to hold {want.reservation.profile}"
    if not want.options:
        return "no slice of any GPU here holds it"
    fitting = [g for g in problem.gpus if any(o.product == g.product for o in want.options)]
    kinds = _listed(sorted({f"{o.profile} of {o.product}" for o in want.options}))
    if not fitting:
        return f"it fits {kinds}, and there is no such GPU here"
    if not any(g.open for g in fitting):
        return f"every GPU that it fits ({kinds}) is cordoned or draining"
    if contradiction := _contradiction(problem, want, fitting):
        return contradiction
    rivals = _rivals(want, gpus)
    taken = f": taken by {_listed(rivals)}" if rivals else ""
    have = "has" if len(fitting) == 1 else "have"
    within = " within its spread" if any("(spread: " in change for change in helps) else ""
    return f"the {_gpus(len(fitting))} that it fits ({kinds}) {have} no room left{within}{taken}"


def _contradiction(problem: Problem, want: Want, fitting: Sequence[FleetGpu]) -> str | None:
    """Limits that cannot all hold, whatever else is on the GPUs."""
    nodes = len({g.node for g in fitting})
    factor = 1.0 + problem.constraints.headroom_ratio
    same = tuple(want_of(d, factor) for d in _same_model(problem, want.demand)) if want.demand else (want,)
    least = sum(map(_fewest_replicas, same))
    each = f" of {want.model}" if len(same) > 1 else ""
    shares = f" ({_listed([f'{_fewest_replicas(w)} for {w.name}' for w in same])})" if len(same) > 1 else ""
    for limit, places, what in ((want.max_per_gpu, len(fitting), "GPU"), (want.max_per_node, nodes, "node")):
        if limit is not None and limit * places < least:
            where = f"the one {what} that there is for it" if places == 1 else f"each of {places} {what}s"
            asked = "are wanted" if not any(w.rate for w in same) else "are the fewest that serve what is asked for"
            return f"{least} replicas{each} {asked}{shares}, and at most {limit} on {where} {are(limit)} allowed"
    if want.rate is not None and want.ceiling is not None and want.ceiling * want.best < want.rate - 1e-9:
        most, serve = counted(want.ceiling, "replica"), "serves" if want.ceiling == 1 else "serve"
        return f"at most {most} {are(want.ceiling)} allowed, which {serve} {want.ceiling * want.best:g} of {want.rate:g} requests/s"
    return None


def _fewest_replicas(want: Want) -> int:
    """What it takes at least, were all of them on its best option; never more than it may have."""
    for_rate = 0 if want.rate is None or not want.options else math.ceil(want.rate / want.best - 1e-9)
    least = max(want.floor, for_rate)
    return least if want.ceiling is None else min(least, want.ceiling)


def _same_model(problem: Problem, demand: ModelDemand) -> tuple[ModelDemand, ...]:
    """The demands of the model, this one among them: they keep its limits per GPU and node together."""
    return tuple(d for d in problem.demands if d.model == demand.model)


def _rivals(want: Want, gpus: Sequence[PlannedGpu]) -> list[str]:
    """Who else is on the GPUs that it fits, the largest holders first."""
    products = {o.product for o in want.options}
    held: Counter[str] = Counter()
    for planned in gpus:
        if planned.gpu.product in products:
            held.update(_holder(s.demand, s.reserved) for s in planned.slices if s.replica or s.reserved)
    del held[want.name]
    return [name for name, _ in sorted(held.items(), key=lambda item: (-item[1], item[0]))]


def _holder(demand: str | None, reserved: str | None) -> str:
    return demand if demand is not None else f"{reserved} (reserved)"


class _Trials:
    """Changes to the problem, tried out for one want: would it be met, with the others no worse off than they are?

    `untried` counts those for which the allowance of `limits` was not enough.
    """

    def __init__(
        self, problem: Problem, missing: Mapping[str, float], want: Want, placed: _Placed, limits: Limits
    ) -> None:
        self._allowance = limits.allowance or Allowance(0)
        self._limits = replace(limits, allowance=self._allowance)
        self._problem = problem
        self._missing = missing
        self._want = want
        self._placed = placed
        self.untried = 0

    def remedies(self) -> tuple[str, ...]:
        """Everything that helps by itself."""
        limit = self._problem.constraints.max_layout_changes
        if limit is not None and self._met(self._problem):
            return (f"allow more than {limit} layout changes (max_layout_changes)",)
        return (*self._gpus(), *self._settings(), *self._spread(), *self._open(), *self._headroom())

    def all_met(self, replicas: int) -> bool:
        """Whether all demands of the model would be met, if so many replicas were asked for by each that asks for a number."""
        demand = self._want.demand
        same = () if demand is None else _same_model(self._problem, demand)
        if len(same) <= 1:
            return True
        fewer = self._with(*(d if d.replicas is None else replace(d, replicas=replicas) for d in same))
        return self._met(fewer, *(d.name for d in same))

    def _gpus(self) -> Iterator[str]:
        """So many more of a product, the cheapest first; one of a product that is not here at all."""
        here: dict[str, FleetGpu] = {}
        for gpu in self._problem.gpus:
            here.setdefault(gpu.product, gpu)
        products = sorted({o.product for o in self._want.options})
        found = [(n * here[p].price_per_hour, n, p) for p in products if p in here and (n := self._more(here[p]))]
        apart = self._want.max_per_node is not None
        for _, count, product in sorted(found):
            where = "" if not apart else " on another node" if count == 1 else ", each on another node"
            yield f"{count} more {product}{where}"
        for product in products:
            if product not in here:
                yield f"a {product}, of which there is none here"

    def _more(self, like: FleetGpu) -> int | None:
        """How many more GPUs like this one would do; None if no number does.

        With everything else as it is planned, GPUs that nobody else uses are enough for certain, at a number that needs no
        search. One is the least there can be; what is looked for is whether fewer do where others make room.
        """
        enough = self._alone_on(like)
        if enough == 1:
            return 1
        if not self._allowance.left:
            self.untried += enough is None
            return enough
        fewer = self._fewest(like, self._one_each(like) if enough is None else enough - 1)
        self.untried += fewer is None and enough is None and self._allowance.cut
        return enough if fewer is None else fewer

    def _alone_on(self, like: FleetGpu) -> int | None:
        """How many GPUs like this one do, each cut alike, with what is missing alone on them."""
        fresh = FleetGpu("more", like.product, like.geometry, "more", whole=like.whole)
        capacities = {o.profile: o.capacity for o in self._want.options if o.product == like.product}
        most = min((m for m in (self._want.max_per_gpu, self._want.max_per_node) if m), default=None)
        (group,) = Shaper((self._want,)).coarse((fresh,), maximal=True)
        counts = []
        for shape in group.shapes:
            slots = sorted((capacities[profile] for profile, n in shape.slots for _ in range(n)), reverse=True)
            counts.append(_needed(self._want, self._placed, slots[:most]))
        return min((n for n in counts if n is not None), default=None)

    def _one_each(self, like: FleetGpu) -> int:
        """One GPU for every replica that is missing."""
        capacity = min(o.capacity for o in self._want.options if o.product == like.product)
        return min(_MOST_GPUS, max(1, math.ceil(self._missing[self._want.name] * self._want.best / capacity)))

    def _fewest(self, like: FleetGpu, most: int) -> int | None:
        """The fewest GPUs like this one that do, of at most so many; None where that many do not, or none were found."""
        fresh = [
            FleetGpu(f"more-{n}", like.product, like.geometry, f"more-{n}", price_per_hour=1.0, whole=like.whole)
            for n in range(most)
        ]
        master = self._master(replace(self._problem, gpus=(*self._unpaid, *fresh)))
        master.cost_at_least(1.0)
        # Mostly fractions of replicas show that fewer do not, which takes a hundredth of a search.
        relaxed = master.program.relaxed().minimise(master.price(), self._limits)
        if relaxed is None:
            return None
        master.cost_at_least(math.ceil(relaxed.objective - 1e-6))
        level = master.minimise(Objective.PRICE, self._limits)
        return None if level is None else max(1, round(level.value))

    @cached_property
    def _unpaid(self) -> tuple[FleetGpu, ...]:
        """The GPUs that are there, at no price: what counts is how many are added."""
        return tuple(replace(g, price_per_hour=0.0) for g in self._problem.gpus)

    def _settings(self) -> Iterator[str]:
        """Alternatives that the sizing side offers: a shorter context, a smaller cache type.

        Of several shorter contexts only the longest that helps, since it stands for all that are shorter.
        """
        demand = self._want.demand
        if demand is None:
            return
        found: list[str] = []
        for alternative in sorted(demand.alternatives, key=_longest_first):
            told = alternative.change in found or (_context(alternative) and any(map(_is_context, found)))
            if not told and self._met(self._with(_offering(demand, alternative))):
                found.append(alternative.change)
        yield from sorted(found)

    def _spread(self) -> Iterator[str]:
        demand = self._want.demand
        if demand is None:
            return
        same = _same_model(self._problem, demand)
        on_gpu, on_node = demand.max_per_gpu, demand.max_per_node
        if on_node is not None and self._met(self._with(*(replace(d, max_per_node=None) for d in same))):
            yield f"allow more than {on_node} on a node (spread: gpus)"
        elif on_gpu is not None and self._met(
            self._with(*(replace(d, max_per_gpu=None, max_per_node=None) for d in same))
        ):
            yield f"allow more than {on_gpu} on a GPU (spread: none)"
        limited = demand.rate is not None and demand.max_replicas is not None
        if limited and self._met(self._with(replace(demand, max_replicas=None))):
            yield f"allow more than {counted(demand.max_replicas or 0, 'replica')} (replicas: {{max: ...}})"

    def _open(self) -> Iterator[str]:
        """The first closed GPU that would do by itself."""
        products = {o.product for o in self._want.options}
        for gpu in [g for g in self._problem.gpus if not g.open and g.product in products][:8]:
            others = (g for g in self._problem.gpus if g is not gpu)
            if self._met(replace(self._problem, gpus=(*others, replace(gpu, cordoned=False, draining=False)))):
                yield f"take {gpu.id} out of fleet.cordon" if gpu.cordoned else f"open GPU {gpu.id} again"
                return

    def _headroom(self) -> Iterator[str]:
        constraints = self._problem.constraints
        bare = replace(self._problem, constraints=replace(constraints, headroom_ratio=0.0))
        if constraints.headroom_ratio and self._want.rate is not None and self._met(bare):
            yield f"plan without the head-room of {constraints.headroom_ratio:.0%}"

    def _with(self, *changed: ModelDemand) -> Problem:
        names = {d.name for d in changed}
        others = (d for d in self._problem.demands if d.name not in names)
        return replace(self._problem, demands=(*others, *changed))

    def _met(self, problem: Problem, *also: str) -> bool:
        """Whether the want would be met, and those named. Where that is not found out, it counts as untried."""
        if not self._allowance.left:
            self.untried += 1
            return False
        met = self._master(problem, *also).possible(self._limits)
        self.untried += not met and self._allowance.cut
        return met

    def _master(self, problem: Problem, *also: str) -> Master:
        """The coarse program of a changed problem, with every want held at what it misses, and this one and those named at nothing."""
        wants = wants_of(problem)
        unlimited = Constraints(problem.constraints.reserve, problem.constraints.headroom_ratio)
        classes = Shaper(wants).coarse(problem.gpus, maximal=True)
        master = Master(classes, wants, unlimited, keep=False, slack=True)
        for want in wants:
            allowed = 0.0 if want.name in (self._want.name, *also) else self._missing.get(want.name, 0.0)
            master.miss(want, allowed)
        return master


def _needed(want: Want, placed: _Placed, slots: Sequence[float]) -> int | None:
    """How many GPUs with slots of such capacities, the largest first, bring a want from what it has to what it asks.

    None where that takes more replicas than it may have, or there are no slots.
    """
    if not slots:
        return None
    replicas = max(0, want.floor - placed.replicas)
    rate = max(0.0, (want.rate or 0.0) - placed.served)
    count = max(1, math.ceil(replicas / len(slots)), math.ceil(rate / sum(slots) - 1e-9))
    for_rate = 0
    for capacity in slots:
        taken = min(count, max(0, math.ceil(rate / capacity - 1e-9)))
        for_rate, rate = for_rate + taken, rate - taken * capacity
    allowed = math.inf if want.ceiling is None else want.ceiling - placed.replicas
    return count if max(replicas, for_rate) <= allowed else None


def _context(alternative: Alternative) -> int:
    """The context length that an alternative names, 0 where it is about something else."""
    return int(alternative.change.removeprefix(_CONTEXT)) if _is_context(alternative.change) else 0


def _is_context(change: str) -> bool:
    return change.startswith(_CONTEXT)


def _longest_first(alternative: Alternative) -> int:
    return -_context(alternative)


def _offering(demand: ModelDemand, alternative: Alternative) -> ModelDemand:
    others = (o for o in demand.options if o.key != alternative.option.key)
    return replace(demand, options=(*others, alternative.option), alternatives=())


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _gpus(count: int) -> str:
    return "GPU" if count == 1 else f"{count} GPUs"
