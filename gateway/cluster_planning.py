"""A configuration and a cluster as a question to the planner: `gateway.planning` on what all nodes' drivers show.

What runs where is what the cluster's head says, so nothing of a machine's state directory is read but what was measured there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gateway.config import Config
from gateway.layouts import ReplicaDifference
from gateway.planning import FleetAnswer, ReservedSlice, answered, demanded, stranded, timings
from gateway.tenant_pools import tenant_pools
from model_registry.errors import ConfigError
from model_registry.schema import ModelConfig, ReplicaRange
from placement.assign import stem_of
from placement.autoscale.repartition import Repartition, rescale
from placement.cluster.survey import Survey, fleet_of, gpu_of, layouts_of
from placement.gpu_slices import slices_of
from placement.gpus import GpuState
from placement.partition import GpuPlan
from placement.planner.types import WHOLE, Problem
from placement.repartitioning import Wish
from placement.schema import SimulatedFleet
from placement.table import ReplicaState
from placement.transition import Step
from placement.workload import Card, Workload, cards_of, check_pins, constraints


@dataclass(frozen=True, slots=True)
class KeptReplica:
    """A replica of a model that is not planned. Some of the model's are on slices `of_no_gpu`, or on nodes that are `frozen`."""

    replica: str
    model: str
    slice: str
    state: str
    of_no_gpu: bool = False
    frozen: bool = False

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape; `why` is what keeps its model from being planned, empty where that is another replica of it."""
        why = "slice of no GPU" if self.of_no_gpu else "node of another version" if self.frozen else ""
        return {"replica": self.replica, "model": self.model, "slice": self.slice, "state": self.state, "why": why}


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What a configuration makes of a cluster. `layouts` is empty where none is configured; `apart` are models that it says nothing
    about, because replicas of theirs are on slices of no GPU. `worked_by` is whether the head works by this configuration,
    `desired` how many replicas demand asks for at the moment, by pool.
    """

    survey: Survey
    answer: FleetAnswer
    layouts: tuple[GpuPlan, ...]
    apart: tuple[str, ...]
    worked_by: bool
    desired: Mapping[str, int] = field(default_factory=dict)

    @property
    def gpus(self) -> tuple[GpuState, ...]:
        """Every GPU, as `NODE/UUID`."""
        return self.survey.gpus

    @property
    def replicas(self) -> ReplicaDifference:
        """What the head has seated against what of it serves."""
        return ReplicaDifference(
            controller=True,
            missing=tuple(sorted(self.survey.unplaced)),
            not_ready=tuple(
                (name, now.state)
                for name, now in sorted(self.survey.replicas.items())
                if now.state != ReplicaState.READY.value
            ),
        )

    @property
    def reserved(self) -> tuple[ReservedSlice, ...]:
        """Slices that are kept for other work."""
        there = {s.id: s for gpu in self.gpus for s in slices_of(gpu)}
        return tuple(
            ReservedSlice(key, note, there[key].uuid, "")
            for key, note in sorted(self.survey.reserved.items())
            if key in there
        )

    @property
    def kept(self) -> tuple[KeptReplica, ...]:
        """The replicas of models that it does not decide about: each stays where it is, and the head seats who is missing."""
        frozen = {n.node for n in self.survey.nodes if n.frozen}
        gpus = {gpu.uuid for gpu in self.gpus}
        return tuple(
            KeptReplica(
                replica,
                now.seat.model,
                now.seat.key,
                now.state,
                of_no_gpu=gpu_of(now.seat.key) not in gpus,
                frozen=now.seat.node in frozen,
            )
            for replica, now in sorted(self.survey.replicas.items())
            if now.seat.model in self.apart
        )

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape: that of `sliceway plan --json`, with the nodes of the GPUs."""
        return {
            "changes": any(p.actions for p in self.layouts) or self.answer.plan.changed,
            "blocked": any(p.obstacles for p in self.layouts) or self.answer.blocked is not None,
            "simulated": self.survey.simulated,
            "gpus": [p.as_public() for p in self.layouts],
            "replicas": self.replicas.as_public(),
            "nodes": [{"node": n.node, "gpus": len(n.gpus), "frozen": n.frozen} for n in self.survey.nodes],
            "apart": list(self.apart),
            "kept": [one.as_public() for one in self.kept],
            "same_configuration": self.worked_by,
            "fingerprint": self.survey.fingerprint,
            "demand": {
                pool: {"replicas": self.desired.get(pool), "requests": self.survey.running.get(pool, 0)}
                for pool in sorted(self.desired.keys() | self.survey.running.keys())
            },
        }


def plan_cluster(config: Config, survey: Survey, *, allow_dip: bool = False) -> ClusterPlan:
    """Plan `config` on the GPUs of all nodes. Reads models' metadata, here, and what was measured from the state directory.

    Replicas that demand asks for at the moment count as asked for, where the model names no demand. Raises ConfigError where there
    is no GPU, and for contradictions (a pin on a cordoned GPU), and what the planner raises.
    """
    if not survey.gpus:
        raise ConfigError(
            "only GPUs are planned, and no node of this cluster has one",
            where="fleet",
            remedy="The head seats replicas on the slices of cores that nodes offer: sliceway node list.",
        )
    apart = survey.elsewhere
    config = _planned(config, survey)
    layouts = layouts_of(survey, config.fleet.layouts)
    recut = config.fleet.partition == "planned"
    fleet = fleet_of(survey, layouts, config.fleet, config.models, recut=recut)
    check_pins(config.models, fleet)
    anew = None if recut else fleet_of(survey, layouts, config.fleet, config.models, recut=True)
    desired = _desired(config, survey)
    work = _demanded(config, cards_of(survey.gpus), desired)
    found = answered(config, work, fleet, constraints(config.fleet, survey.gpus), anew=anew, allow_dip=allow_dip)
    if found.transition is not None:
        # What the head looks at before the first step is the survey, and not what one configuration makes of it.
        found = replace(found, transition=replace(found.transition, fingerprint=survey.fingerprint))
    whole = {p.gpu.uuid for p in layouts if not p.then_mig}
    running = {stem_of(replica) for replica in survey.replicas}
    found = replace(found, stranded=stranded(config, found, whole, running))
    found = replace(found, proposal=repartition_for(config, survey) or _careful(found.proposal, survey))
    return ClusterPlan(
        survey,
        found,
        layouts if config.fleet.layouts else (),
        tuple(sorted(apart)),
        same_configuration(config, survey),
        desired,
    )


def repartition_for(config: Config, survey: Survey) -> Repartition | None:
    """What cutting GPUs anew would add where demand finds no slices, weighed as on one machine; None where it finds some, or nothing
    would be served better. Reads models' metadata. Raises as `plan_cluster`.

    GPUs that `fleet.layouts` names stay as they are, and so do those that would have to change their mode.
    """
    wish = wish_of(config, survey)
    if wish is None or not survey.gpus:
        return None
    config = _planned(config, survey)
    layouts = layouts_of(survey, config.fleet.layouts)
    fixed, anew = (fleet_of(survey, layouts, config.fleet, config.models, recut=recut) for recut in (False, True))
    check_pins(config.models, anew)
    off = {gpu.uuid for gpu in survey.gpus if not gpu.mig}
    anew = tuple(here if there.id in off else there for here, there in zip(fixed, anew, strict=True))
    work = _demanded(config, cards_of(survey.gpus), wish.replicas)
    problem = Problem(fixed, work.demands, constraints(config.fleet, survey.gpus))
    found = rescale(
        problem,
        replace(problem, gpus=anew),
        config.fleet.autoscale,
        timings(config),
        rates=wish.arrivals_per_second,
    )
    return _careful(found.proposal, survey)


def layouts_differ(config: Config, survey: Survey) -> str | None:
    """A GPU that is not cut as `fleet.layouts` says, so that no plan can be carried out; None where all are. Raises as `layouts_of`."""
    return next((p.gpu.label for p in layouts_of(survey, config.fleet.layouts) if p.actions), None)


def wish_of(config: Config, survey: Survey) -> Wish | None:
    """What demand asks for at this moment, of what a plan decides about, where it finds no slices; None where it does."""
    decided = {m.name for m in config.models} - survey.elsewhere
    pools = [pool for pool in survey.arrivals if pool.partition("@")[0] in decided]
    if not any(survey.short.get(pool) for pool in pools):
        return None
    return Wish(
        {pool: survey.numbers[pool] for pool in pools if pool in survey.numbers},
        {pool: survey.arrivals[pool] for pool in pools},
        {pool: survey.running.get(pool, 0) for pool in pools},
    )


def _careful(proposal: Repartition | None, survey: Survey) -> Repartition | None:
    """As the head takes it: it looks at the survey before the first step. MIG is never switched unasked."""
    if proposal is None:
        return None
    proposal = replace(proposal, transition=replace(proposal.transition, fingerprint=survey.fingerprint))
    mig = {gpu.uuid: gpu.mig for gpu in survey.gpus}
    switched = sorted({s.place.gpu for s in proposal.transition.steps if _switches(s, mig[s.place.gpu])})
    if not switched:
        return proposal
    reason = f"{proposal.reason}; MIG would be switched on {', '.join(switched)}"
    return replace(proposal, automatic=False, reason=reason)


def _switches(step: Step, mig: bool) -> bool:
    """Whether it changes the GPU's mode: of a whole card `create` turns MIG off, and everything else needs it on."""
    if step.kind not in ("create", "destroy"):
        return False
    return mig is (step.place.placement == WHOLE and step.kind == "create")


def config_text(config: Config) -> str:
    """The configuration as a cluster's head is told it."""
    return json.dumps(config.model_dump(mode="json", exclude_unset=True))


def same_configuration(config: Config, survey: Survey) -> bool:
    """Whether the head works by this configuration, as far as plans are concerned: whichever models it says nothing about may differ."""
    try:
        known = Config.model_validate(json.loads(survey.config))
    except ValueError:
        return False
    worked, asked = ({m.name: m for m in one.models if m.name not in survey.elsewhere} for one in (known, config))
    return worked == asked and (known.tenants, known.engine) == (config.tenants, config.engine)


def _planned(config: Config, survey: Survey) -> Config:
    """With the models that a plan decides about."""
    models = tuple(m for m in config.models if m.name not in survey.elsewhere)
    return _on(config, survey).model_copy(update={"models": models})


def _on(config: Config, survey: Survey) -> Config:
    """What was measured on simulated GPUs counts where all are, and nowhere else."""
    named = isinstance(config.fleet.discover, SimulatedFleet)
    if named == survey.simulated:
        return config
    discover = SimulatedFleet(simulate={"h100-sxm": 1}) if survey.simulated else "auto"
    return config.model_copy(update={"fleet": config.fleet.model_copy(update={"discover": discover})})


def _desired(config: Config, survey: Survey) -> dict[str, int]:
    """The numbers that gateways' figures have led to; a configured demand is weighed by the plan itself."""
    counted = {m.name for m in config.models if isinstance(m.replicas, ReplicaRange) and m.demand is None}
    return {pool: number for pool, number in survey.numbers.items() if pool.partition("@")[0] in counted}


def _demanded(config: Config, cards: tuple[Card, ...], desired: Mapping[str, int]) -> Workload:
    """As on one machine, except that tenants have replicas of their own only where the head gives them some: of models whose
    number follows demand.
    """
    pools = tenant_pools(config)
    shared = config.model_copy(
        update={"tenants": tuple(t.model_copy(update={"isolation": "shared"}) for t in config.tenants)}
    )
    parts = [
        demanded(_with(one, models), cards, desired=desired)
        for one, models in (
            (config, [m for m in config.models if m.name in pools]),
            (shared, [m for m in config.models if m.name not in pools]),
        )
    ]
    return Workload(
        demands=tuple(d for part in parts for d in part.demands),
        models={name: choices for part in parts for name, choices in part.models.items()},
        shares={name: shares for part in parts for name, shares in part.shares.items()},
        unreadable={name: error for part in parts for name, error in part.unreadable.items()},
        resting=tuple(d for part in parts for d in part.resting),
    )


def _with(config: Config, models: list[ModelConfig]) -> Config:
    return config.model_copy(update={"models": tuple(models)})
