"""What the planner is asked and what it answers: frozen values, checked at birth.

`Problem` is the question: GPUs as they are, demands with the options that would meet them, constraints, and the order
of objectives. `FleetPlan` is the answer: for every GPU what it will hold, for every decision its reason, and for every
demand that is not met what would have to change. Nothing here knows configuration files, drivers or engines.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from model_registry.catalogue import Product
from model_registry.geometry import Layout, Placement

WHOLE_GPU = "gpu"
"""The profile of a replica that takes a whole card, MIG off."""

WHOLE = Placement(0, WHOLE_GPU)
"""Where such a replica lies."""


class Objective(StrEnum):
    """What a plan is judged by. A `Problem` lists them, the most important first."""

    DEMAND = "demand"
    PRICE = "price"
    DISTURBANCE = "disturbance"
    FRAGMENTATION = "fragmentation"


DEFAULT_ORDER = (Objective.DEMAND, Objective.PRICE, Objective.DISTURBANCE, Objective.FRAGMENTATION)


@dataclass(frozen=True, slots=True, order=True)
class Option:
    """One way to run a replica of a model: on which slice, and what it gets done there.

    `product` is the catalogue's name of the GPU, `profile` one of its MIG profiles, or `gpu` for the whole card.
    `capacity` is what one replica serves at the model's SLO, in the unit of the demand's `rate` (requests per second);
    1 where replicas are counted. `penalty` decides between options at equal price, the lower first: a slower or a less
    exact way to serve the same. `note` is said where the option is explained (`fp8 KV cache`).
    """

    product: str
    profile: str
    capacity: float = 1.0
    penalty: float = 0.0
    note: str = ""

    def __post_init__(self) -> None:
        if not (self.capacity > 0 and math.isfinite(self.capacity)):
            raise ValueError(f"{self.profile} on {self.product}: capacity is {self.capacity}, must be above 0")
        if not (self.penalty >= 0 and math.isfinite(self.penalty)):
            raise ValueError(f"{self.profile} on {self.product}: penalty is {self.penalty}, must not be below 0")

    @property
    def key(self) -> tuple[str, str]:
        """Product and profile: what tells slices apart."""
        return self.product, self.profile


@dataclass(frozen=True, slots=True)
class Alternative:
    """A change of the model's settings that would let it be placed where it cannot be now.

    `change` is an instruction (`max_model_len: 6144`, `kv_cache_dtype: fp8`), `option` what it would make possible.
    Alternatives are never chosen; they are tried one at a time to explain what could not be placed.
    """

    change: str
    option: Option


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """How much of one model is wanted, and which slices can serve it.

    `name` is the demand's own name and the stem of its replicas' names: the model's, or for a tenant with dedicated
    slices the model's and the tenant's. Exactly one of `replicas` and `rate` is set: a number of replicas, or what all
    replicas together must serve (in the unit of `Option.capacity`), with between `min_replicas` and `max_replicas` of
    them. `tenant` has these slices to itself; None shares them. `priority`: what cannot all be met is met from the
    highest number down. `max_per_gpu` and `max_per_node` spread the replicas of the model, whichever of its demands they
    serve: what a GPU takes with it is missing to everybody. None does not; all demands of one model say the same.
    """

    name: str
    model: str
    options: tuple[Option, ...]
    replicas: int | None = None
    rate: float | None = None
    min_replicas: int = 0
    max_replicas: int | None = None
    tenant: str | None = None
    priority: int = 0
    max_per_gpu: int | None = None
    max_per_node: int | None = None
    alternatives: tuple[Alternative, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(sorted(self.options)))
        object.__setattr__(self, "alternatives", tuple(sorted(self.alternatives, key=lambda a: (a.change, a.option))))
        if (self.replicas is None) == (self.rate is None):
            raise ValueError(f"{self.name!r}: set one of replicas and rate")
        if self.replicas is not None and self.replicas < 0:
            raise ValueError(f"{self.name!r}: {self.replicas} replicas")
        if self.rate is not None and not (self.rate >= 0 and math.isfinite(self.rate)):
            raise ValueError(f"{self.name!r}: a rate of {self.rate}")
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(f"{self.name!r}: at most {self.max_replicas} replicas, and at least {self.min_replicas}")
        for name, limit in (("max_per_gpu", self.max_per_gpu), ("max_per_node", self.max_per_node)):
            if limit is not None and limit < 1:
                raise ValueError(f"{self.name!r}: {name} is {limit}")
        keys = Counter(o.key for o in self.options)
        if twice := next((k for k, n in keys.items() if n > 1), None):
            raise ValueError(f"{self.name!r} has two options for {twice[1]} on {twice[0]}")

    @property
    def floor(self) -> int:
        """The fewest replicas that can be enough."""
        return self.replicas if self.replicas is not None else self.min_replicas

    @property
    def ceiling(self) -> int | None:
        """The most replicas there may be; None for no limit."""
        return self.replicas if self.replicas is not None else self.max_replicas

    def served_by(self, keys: Iterable[tuple[str, str]]) -> float:
        """What replicas on these (product, profile) serve together."""
        capacity = {o.key: o.capacity for o in self.options}
        return sum(capacity.get(key, 0.0) for key in keys)


@dataclass(frozen=True, slots=True, order=True)
class Instance:
    """What one GPU instance is used for. `placement` is `gpu@0` for a card that is used whole.

    `replica` is the replica that runs on it, `demand` the ModelDemand it belongs to; both None on an idle instance.
    `reserved` is the note of who has it, for work that is not ours: never touched. `requests` are those running on the
    replica: what draining it would cost.
    """

    placement: Placement
    replica: str | None = None
    demand: str | None = None
    reserved: str | None = None
    requests: int = 0

    def __post_init__(self) -> None:
        if (self.replica is None) != (self.demand is None):
            raise ValueError(f"{self.placement}: a replica and its demand go together")
        if self.replica is not None and self.reserved is not None:
            raise ValueError(f"{self.placement} is reserved, and {self.replica!r} runs on it")

    @property
    def profile(self) -> str:
        """The instance's profile."""
        return self.placement.profile

    @property
    def idle(self) -> bool:
        """Whether nobody uses it."""
        return self.replica is None and self.reserved is None


@dataclass(frozen=True, slots=True)
class FleetGpu:
    """One GPU as it is.

    `product` is the catalogue's name. `geometry` holds its profiles, None for a card that cannot be cut or must not be
    (only `gpu` options fit it then). `whole` says whether it may be used as a whole card. On a `cordoned` GPU nothing
    comes, and what runs stays; from a `draining` one everything that can goes. `price_per_hour` is in any currency;
    with 1 for each, the fewest GPUs are the cheapest.
    """

    id: str
    product: str
    geometry: Product | None = field(default=None, repr=False)
    node: str = ""
    instances: tuple[Instance, ...] = ()
    cordoned: bool = False
    draining: bool = False
    price_per_hour: float = 1.0
    whole: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "instances", tuple(sorted(self.instances, key=lambda i: i.placement)))
        if not (self.price_per_hour >= 0 and math.isfinite(self.price_per_hour)):
            raise ValueError(f"GPU {self.id}: a price of {self.price_per_hour}")
        if any(i.placement == WHOLE for i in self.instances):
            if len(self.instances) > 1:
                raise ValueError(f"GPU {self.id} is used whole and cut at once")
        elif self.instances:
            if self.geometry is None:
                raise ValueError(f"GPU {self.id} holds instances, and nothing is known of its profiles")
            Layout(self.geometry, tuple(i.placement for i in self.instances))

    @property
    def open(self) -> bool:
        """Whether something new may be put on it."""
        return not (self.cordoned or self.draining)


@dataclass(frozen=True, slots=True, order=True)
class Reservation:
    """Slices kept for other work: created once, then never touched. `note` says for whom, and tells them apart.

    Instances that carry the note already count. `product` None takes any GPU that has the profile.
    """

    profile: str
    count: int = 1
    note: str = "reserved"
    product: str | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"{self.count} reserved slices for {self.note!r}")


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a plan must respect besides demand.

    `headroom_ratio` is added to every `rate`: 0.2 plans for a fifth more than is asked. `max_layout_changes` limits how
    many GPU instances one plan creates and destroys (a card that goes whole or back counts as one); None does not.
    """

    reserve: tuple[Reservation, ...] = ()
    headroom_ratio: float = 0.0
    max_layout_changes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "reserve", tuple(sorted(self.reserve, key=lambda r: (r.note, r.profile, str(r.product))))
        )
        if not 0 <= self.headroom_ratio <= 100:
            raise ValueError(f"a head-room of {self.headroom_ratio}")
        if self.max_layout_changes is not None and self.max_layout_changes < 0:
            raise ValueError(f"{self.max_layout_changes} layout changes")


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything a plan depends on. Two problems that differ in the order of their parts are equal."""

    gpus: tuple[FleetGpu, ...]
    demands: tuple[ModelDemand, ...]
    constraints: Constraints = Constraints()
    order: tuple[Objective, ...] = DEFAULT_ORDER

    def __post_init__(self) -> None:
        object.__setattr__(self, "gpus", tuple(sorted(self.gpus, key=lambda g: g.id)))
        object.__setattr__(self, "demands", tuple(sorted(self.demands, key=lambda d: d.name)))
        _once("GPU", (g.id for g in self.gpus))
        _once("demand", (d.name for d in self.demands))
        _same_limits(self.demands)
        _once("replica", (i.replica for g in self.gpus for i in g.instances if i.replica))
        _once("objective", self.order)

    @property
    def fingerprint(self) -> str:
        """What the plan was made from: see `fingerprint`."""
        return fingerprint(self.gpus)


def fingerprint(gpus: Iterable[FleetGpu]) -> str:
    """A short digest of the observed state: GPUs, their instances, and who is on them; requests in flight left out.

    A plan is carried out only on a fleet with the fingerprint that it was made from.
    """
    state = [
        (
            g.id,
            g.product,
            g.node,
            g.cordoned,
            g.draining,
            [(str(i.placement), i.replica, i.reserved) for i in g.instances],
        )
        for g in sorted(gpus, key=lambda g: g.id)
    ]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


Change = Literal["keep", "create", "reuse", "idle"]
"""What becomes of a slice: it stays with who is on it; is made; is there and gets another user; is there, unused."""


@dataclass(frozen=True, slots=True, order=True)
class PlannedSlice:
    """One slice that a GPU will hold. `placement` is `gpu@0` for a whole card; `was` is where its replica comes from."""

    placement: Placement
    change: Change
    replica: str | None = None
    demand: str | None = None
    reserved: str | None = None
    was: str | None = None

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "slice": str(self.placement),
            "change": self.change,
            "replica": self.replica,
            "model": self.demand,
            "reserved": self.reserved,
            "was": self.was,
        }


@dataclass(frozen=True, slots=True)
class PlannedGpu:
    """What one GPU will hold, and which instances have to go first."""

    gpu: FleetGpu
    slices: tuple[PlannedSlice, ...] = ()
    destroyed: tuple[Placement, ...] = ()

    @property
    def used(self) -> bool:
        """Whether anybody uses it: only then it is paid for."""
        return any(s.replica or s.reserved for s in self.slices)

    @property
    def changes(self) -> int:
        """Instances created and destroyed."""
        return len(self.destroyed) + sum(s.change == "create" for s in self.slices)

    def after(self) -> FleetGpu:
        """The GPU when the plan is carried out."""
        instances = tuple(Instance(s.placement, s.replica, s.demand, s.reserved) for s in self.slices)
        return FleetGpu(
            self.gpu.id,
            self.gpu.product,
            self.gpu.geometry,
            self.gpu.node,
            instances,
            self.gpu.cordoned,
            self.gpu.draining,
            self.gpu.price_per_hour,
            self.gpu.whole,
        )

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "gpu": self.gpu.id,
            "product": self.gpu.product,
            "node": self.gpu.node,
            "used": self.used,
            "slices": [s.as_public() for s in self.slices],
            "destroyed": [str(p) for p in self.destroyed],
            "observed": fingerprint([self.gpu]),
        }


Action = Literal["keep", "add", "move", "stop", "reserve"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one replica or reservation, and why. `gpu` and `placement` are where it goes, `was` where it is."""

    action: Action
    subject: str
    demand: str | None
    reason: str
    gpu: str | None = None
    placement: Placement | None = None
    was: tuple[str, Placement] | None = None

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "action": self.action,
            "subject": self.subject,
            "model": self.demand,
            "gpu": self.gpu,
            "slice": str(self.placement) if self.placement else None,
            "was": f"{self.was[0]}/{self.was[1]}" if self.was else None,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Unmet:
    """A demand that the fleet cannot meet.

    `missing` is in the demand's own unit (replicas, or requests per second), `served` what the plan does give. `reason`
    names what is in the way, `remedies` the smallest changes of which each alone would do. So many further changes as
    `untried` might do as well: the work allowed for trying them was over.
    """

    demand: str
    missing: float
    served: float
    unit: Literal["replicas", "requests/s"]
    reason: str
    remedies: tuple[str, ...] = ()
    untried: int = 0

    @property
    def shortfall(self) -> str:
        """How much is missing, in words: `2 replicas`, `1.5 requests/s`."""
        one = self.missing == 1 and self.unit == "replicas"
        return f"{self.missing:.4g} {'replica' if one else self.unit}"

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "model": self.demand,
            "missing": self.missing,
            "served": self.served,
            "unit": self.unit,
            "reason": self.reason,
            "remedies": list(self.remedies),
            "untried": self.untried,
        }


@dataclass(frozen=True, slots=True)
class Level:
    """One objective of the plan: what it came to, and the least it could possibly be with the earlier ones as they are.

    Demand is in replicas that are missing, price in the GPUs' currency per hour, disturbance in replicas moved or
    stopped plus their running requests, fragmentation in profiles that lost starts (see `placement.planner.fragmentation`).
    """

    objective: Objective
    value: float
    lower_bound: float

    @property
    def optimal(self) -> bool:
        """Whether nothing better exists."""
        return self.value <= self.lower_bound + 1e-6 * max(1.0, abs(self.value))

    @property
    def gap(self) -> float:
        """How far from the bound it may be, as a share of the value; 0 when optimal."""
        return 0.0 if self.optimal else (self.value - self.lower_bound) / abs(self.value)

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "objective": self.objective.value,
            "value": self.value,
            "lower_bound": self.lower_bound,
            "gap": self.gap,
            "optimal": self.optimal,
        }


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """For every GPU of the problem what it will hold, why, and how good that is.

    `levels` are in the problem's order of objectives. `seconds` is what making it took; it is left out of comparison, so
    equal problems have equal plans. Not so where a plan is not `reproducible`: then the clock ended a search that was far too
    long, and another run may find another plan. `fingerprint` is that of the observed state. An `online` plan moves nobody to save
    money: its price has no bound.
    """

    gpus: tuple[PlannedGpu, ...]
    decisions: tuple[Decision, ...]
    unmet: tuple[Unmet, ...]
    levels: tuple[Level, ...]
    fingerprint: str
    seconds: float = field(default=0.0, compare=False)
    reproducible: bool = True
    online: bool = False

    @property
    def optimal(self) -> bool:
        """Whether demand and price are proven to be as good as can be."""
        return all(level.optimal for level in self.levels if level.objective in (Objective.DEMAND, Objective.PRICE))

    @property
    def lower_bound(self) -> float:
        """The least price that any plan as good in demand can have."""
        return next((level.lower_bound for level in self.levels if level.objective is Objective.PRICE), 0.0)

    @property
    def gap(self) -> float:
        """The largest gap of demand and price."""
        return max(
            (level.gap for level in self.levels if level.objective in (Objective.DEMAND, Objective.PRICE)), default=0.0
        )

    @property
    def price_per_hour(self) -> float:
        """What the GPUs in use cost."""
        return sum(g.gpu.price_per_hour for g in self.gpus if g.used)

    @property
    def changed(self) -> bool:
        """Whether anything has to be done."""
        return any(g.changes for g in self.gpus) or any(d.action != "keep" for d in self.decisions)

    @property
    def by_gpu(self) -> Mapping[str, PlannedGpu]:
        """The planned GPUs by id."""
        return {g.gpu.id: g for g in self.gpus}

    def after(self) -> tuple[FleetGpu, ...]:
        """The fleet when the plan is carried out."""
        return tuple(g.after() for g in self.gpus)

    def why(self, demand: str) -> tuple[Decision, ...]:
        """The decisions about one demand, or about a reservation by its note."""
        return tuple(d for d in self.decisions if demand in (d.demand, d.subject))

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {
            "gpus": [g.as_public() for g in self.gpus],
            "decisions": [d.as_public() for d in self.decisions],
            "unmet": [u.as_public() for u in self.unmet],
            "levels": [level.as_public() for level in self.levels],
            "price_per_hour": self.price_per_hour,
            "optimal": self.optimal,
            "lower_bound": self.lower_bound,
            "gap": self.gap,
            "reproducible": self.reproducible,
            "online": self.online,
            "seconds": self.seconds,
            "fingerprint": self.fingerprint,
        }


def _same_limits(demands: Iterable[ModelDemand]) -> None:
    known: dict[str, tuple[int | None, int | None]] = {}
    for demand in demands:
        limits = demand.max_per_gpu, demand.max_per_node
        if known.setdefault(demand.model, limits) != limits:
            raise ValueError(
                f"{demand.name!r}: other limits per GPU or node than another demand of {demand.model!r} has"
            )


def _once(what: str, names: Iterable[str]) -> None:
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise ValueError(f"{what} {twice!r} is named twice")
