"""How many replicas each model has in the whole cluster, where demand decides: the rule of one machine on all gateways' figures.

Pure but for its memory of what was decided. Time and reports are handed in.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice

from model_registry.schema import ModelConfig
from placement.assign import Pools, natural, stem_of
from placement.autoscale import ScaledModel, Scaler, Signals
from placement.autoscale.capacity import UNKNOWN, Capacity, together
from placement.autoscale.scaler import scaled_models
from placement.cluster.borne import Borne, CapacityOn, nobody_knows
from placement.cluster.members import NodeReport, Seat
from placement.cluster.planned import Planned, replicas_for
from placement.figures import add_up
from placement.policy import AutoscalePolicy
from placement.status import ScalingRow

log = logging.getLogger(__name__)


class ClusterNumbers:
    """The numbers that demand asks for, by pool (a model, or `model@tenant`). `aim` says by what, `look` decides."""

    def __init__(self) -> None:
        self._scaler = Scaler()
        self._models: tuple[ModelConfig, ...] = ()
        self._pools: Pools = {}
        self._policy = AutoscalePolicy()
        self._capacity_on: CapacityOn = nobody_knows
        self._head_room = 0.0
        self._planned: Mapping[str, Planned] = {}
        self._scaled: tuple[ScaledModel, ...] = ()
        self._capacities: Mapping[str, Capacity] = {}
        self._signals: Mapping[str, Signals] = {}
        self._found: Mapping[str, int] = {}
        self._looked_at: float | None = None
        self._counts: Mapping[str, int] = {}

    def restore(self, known: Mapping[str, int]) -> None:
        """Go on with what a head before this one has decided."""
        self._scaler = Scaler(known)

    def aim(
        self,
        models: Iterable[ModelConfig],
        pools: Pools,
        policy: AutoscalePolicy,
        capacity_on: CapacityOn,
        head_room: float = 0.0,
    ) -> None:
        """These models and rules count from the next look on. `head_room` is the share beyond every configured demand."""
        self._head_room = head_room
        self._models, self._pools, self._policy, self._capacity_on = tuple(models), pools, policy, capacity_on
        self._looked_at = None

    def plan(self, counts: Mapping[str, int]) -> None:
        """How many replicas pools have by a plan that was carried out: of a configured demand so many, also where it may grow."""
        asked = {model.name for model in self._models if model.demand is not None}
        found = {pool: number for pool, number in counts.items() if pool.partition("@")[0] in asked}
        if found != self._counts:
            self._counts, self._looked_at = found, None

    @property
    def replicas(self) -> Mapping[str, int]:
        """What was decided last, by pool."""
        known = dict(self._found) | dict(self._scaler.replicas)
        scaled = {
            model.name: model.bounded(max(known.get(model.name, model.least), self._counts.get(model.name, 0)))
            for model in self._scaled
        }
        return scaled | {name: planned.replicas for name, planned in self._planned.items()}

    @property
    def running(self) -> Mapping[str, int]:
        """Requests at once, as gateways told last, by pool."""
        return {pool: signals.running for pool, signals in self._signals.items()}

    @property
    def following(self) -> frozenset[str]:
        """The pools whose numbers follow demand."""
        return frozenset(model.name for model in self._scaled)

    @property
    def planned(self) -> Mapping[str, Planned]:
        """The numbers of models that name a demand and no number, by model."""
        return self._planned

    def look(
        self,
        reports: Mapping[str, NodeReport],
        demand: Iterable[Mapping[str, Signals] | None],
        current: Mapping[str, Seat],
        now_seconds: float,
        *,
        complete: bool = True,
    ) -> None:
        """Decide, if it is time to. `now_seconds` is monotonic; `demand` is what each node's gateways see.

        Where no gateway tells anything, nothing changes. A pool that nothing was decided about begins with the replicas that it
        has, within its bounds: a head that has lost its journal stops nothing that may be needed. As long as the reports are
        not `complete`, because a node may only not have been heard of yet, these are counted anew at every look.
        """
        if complete and self._looked_at is not None and now_seconds - self._looked_at < self._policy.look_every:
            return
        self._looked_at = now_seconds
        borne = Borne(self._capacity_on, reports, current)
        self._planned = {m.name: self._plan(m, borne) for m in self._models if _by_demand(m)}
        if not (unsized := scaled_models(self._models, None, self._pools)):
            self._scaled, self._capacities = (), {}
            return
        self._capacities = {m.name: self._capacity(m.name, borne) for m in unsized}
        rates = {name: capacity.requests_per_second for name, capacity in self._capacities.items()}
        self._scaled = scaled_models(self._models, None, self._pools, rates)
        self._follow(current, complete=complete)
        told = [one for one in demand if one is not None]
        if not told:
            return
        self._signals = add_up(told)
        for change in self._scaler.look(self._policy, self._scaled, self._signals, now_seconds):
            log.info("%s", change)

    def _follow(self, current: Mapping[str, Seat], *, complete: bool) -> None:
        there = Counter(map(stem_of, current))
        self._found = {m.name: m.bounded(there[m.name]) for m in self._scaled}
        if complete:
            self._scaler.begin(self._found)
        known = self._scaler.replicas
        self._scaler.follow([m for m in self._scaled if m.name in known])

    @staticmethod
    def _capacity(pool: str, borne: Borne) -> Capacity:
        """On average over the slices that it has, or on one that it could have."""
        mine = (replica for replica in borne.current if stem_of(replica) == pool)
        has = [bears for replica in mine if (bears := borne.here(pool, replica)) is not None]
        return together(has or list(islice(borne.could(pool), 1)))

    def _plan(self, model: ModelConfig, borne: Borne) -> Planned:
        assert model.demand is not None
        if model.name in self._counts:
            return Planned(self._counts[model.name], "as the plan that was carried out has it")
        mine = sorted((replica for replica in borne.current if stem_of(replica) == model.name), key=natural)
        return replicas_for(
            model.demand.requests_per_second * (1 + self._head_room),
            [bears for replica in mine if (bears := borne.here(model.name, replica)) is not None],
            list(borne.could(model.name)),
        )

    def rows(self, seats: Iterable[str]) -> dict[str, ScalingRow]:
        """What was decided, pool by pool, and how much of it the replicas in `seats` are."""
        placed, asked = Counter(map(stem_of, seats)), self.replicas
        rows: dict[str, ScalingRow] = {}
        for model in self._scaled:
            capacity = self._capacities.get(model.name, UNKNOWN)
            seen = self._signals.get(model.name, Signals())
            rows[model.name] = ScalingRow(
                replicas=asked[model.name],
                placed=placed[model.name],
                least=model.least,
                most=model.most,
                reason=self._scaler.reason(model.name),
                arrivals_per_second=seen.arrivals_per_second + seen.queued / self._policy.window,
                running=seen.running,
                requests_per_replica=capacity.requests_per_second,
                capacity_source=capacity.origin,
                capacity_reason=capacity.reason,
                ignored=capacity.ignored,
            )
        return rows


def _by_demand(model: ModelConfig) -> bool:
    return bool(model.source) and model.demand is not None and model.replicas is None and not model.slices
