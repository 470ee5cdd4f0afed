"""A plan that somebody has looked at (`sliceway plan --json`), against the one that would be carried out by now."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gateway.planning import FleetAnswer
from model_registry.errors import ConfigError
from placement.changeover import Changeover
from placement.errors import StalePlan
from placement.partition import GpuPlan
from placement.planner.current import check_current

_AGAIN = "Look at what would be done by now: sliceway plan CONFIG --json > PLAN; then apply that."
_MOST_NAMED = 3


class _Read(BaseModel):
    """As much of the JSON as is compared; the rest follows from it, or tells how long things take."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Layout(_Read):
    gpu: str
    now: list[str]
    mig: dict[str, Any]
    actions: list[Any]


class _Slice(_Read):
    replica: str | None = None
    model: str | None = None


class _Gpu(_Read):
    gpu: str
    observed: str
    slices: list[_Slice] = []


class _Transition(_Read):
    steps: list[dict[str, Any]]


class _Fleet(_Read):
    gpus: list[_Gpu]
    decisions: list[Any]
    transition: _Transition


class _Replacement(_Read):
    replica: str
    how: str
    slice: str


class _Engines(_Read):
    replacements: list[_Replacement]


class _Demand(_Read):
    replicas: int | None = None
    requests: int = 0


class _Plan(_Read):
    gpus: list[_Layout]
    fleet: _Fleet | None = None
    engines: _Engines | None = None
    demand: dict[str, _Demand] = {}


@dataclass(frozen=True, slots=True)
class ReviewedPlan:
    """What `sliceway plan --json` has said, from the file `path`."""

    path: Path
    plan: _Plan

    @classmethod
    def read(cls, path: Path) -> ReviewedPlan:
        """Raises ConfigError where the file cannot be read, or holds no plan."""
        try:
            return cls(path, _Plan.model_validate_json(path.read_bytes()))
        except OSError as error:
            problem = error.strerror or str(error)
        except ValidationError:
            problem = "this is not what `sliceway plan --json` prints"
        raise ConfigError(problem, where=str(path), remedy="Write it with: sliceway plan CONFIG --json > FILE.")

    @property
    def requests(self) -> dict[str, int]:
        """Requests in flight on a cluster when it was planned, by pool: of replicas that are alike those go that have the fewest."""
        return {pool: demand.requests for pool, demand in self.plan.demand.items()}

    @property
    def numbers(self) -> dict[str, int]:
        """How many replicas demand asked for on a cluster when it was planned, by pool."""
        return {pool: demand.replicas for pool, demand in self.plan.demand.items() if demand.replicas is not None}

    def check_demand(self, now: Mapping[str, int]) -> None:
        """Raise StalePlan where demand asks for other numbers of replicas, by pool, than those that the plan was made for."""
        then = self.numbers
        differ = [
            f"{now.get(pool, 0)} replicas of {pool}, and {then.get(pool, 0)} then"
            for pool in sorted(then.keys() | now.keys())
            if then.get(pool) != now.get(pool)
        ]
        if differ:
            raise StalePlan(
                f"demand asks for others than when the plan was made: {'; '.join(differ)}",
                where=str(self.path),
                remedy=_AGAIN,
            )

    def check_target(self, fleet: FleetAnswer) -> None:
        """Raise StalePlan, naming the models, unless `fleet` comes to as many replicas of each as this plan: on which slices, and by which
        steps, may be others, for GPUs have been cut and replicas seated since.
        """
        now = _Plan.model_validate_json(json.dumps({"gpus": [], "fleet": fleet.as_public()}, default=str))
        would, then = _replicas(now), _replicas(self.plan)
        differ = [
            f"{would[m]} of {m}, and {then[m]} then" for m in sorted(would.keys() | then.keys()) if would[m] != then[m]
        ]
        if differ:
            raise StalePlan(
                f"GPUs are cut as it says, and other numbers of replicas would be seated by now: {'; '.join(differ)}",
                where=str(self.path),
                remedy=_AGAIN,
            )

    def check(
        self, layouts: Iterable[GpuPlan] | None, fleet: FleetAnswer | None, engines: Changeover | None = None
    ) -> None:
        """Raise StalePlan, naming what is different, unless `layouts`, `fleet` and `engines` are this plan; `layouts` None: these
        are done, and `engines` have been compared.

        Compared are the GPUs as they were, with who is on them, and then what is to be done, also to engines by earlier settings.
        """
        public: dict[str, Any] = {"gpus": [p.as_public() for p in layouts or ()]}
        if fleet is not None:
            public["fleet"] = fleet.as_public()
        if engines is not None:
            public["engines"] = engines.as_public()
        now = _Plan.model_validate_json(json.dumps(public, default=str))
        then = self.plan if layouts is not None else self.plan.model_copy(update={"gpus": [], "engines": None})
        alike = (then.fleet is None) == (now.fleet is None)
        if alike:
            check_current(_state(then), _state(now), where=str(self.path), remedy=_AGAIN)
        if not alike or _to_do(then) != _to_do(now):
            raise StalePlan(
                "the fleet is as it was, and another plan would be carried out by now: the configuration or the options "
                f"are others, or what models are measured to take{_other_steps(then, now)}",
                where=str(self.path),
                remedy=_AGAIN,
            )


def _state(plan: _Plan) -> Mapping[str, str]:
    """What every GPU was like, by its id."""
    state = {g.gpu: json.dumps([g.now, g.mig], sort_keys=True) for g in plan.gpus}
    for gpu in plan.fleet.gpus if plan.fleet else ():
        state[gpu.gpu] = state.get(gpu.gpu, "") + gpu.observed
    return state


def _replicas(plan: _Plan) -> Counter[str]:
    """How many there are when all is done, by model."""
    gpus = plan.fleet.gpus if plan.fleet else []
    return Counter(str(s.model) for gpu in gpus for s in gpu.slices if s.replica is not None)


def _to_do(plan: _Plan) -> Sequence[Any]:
    fleet = [plan.fleet.decisions, plan.fleet.transition.steps] if plan.fleet else []
    return [[g.actions for g in plan.gpus], *fleet, plan.engines]


def _other_steps(then: _Plan, now: _Plan) -> str:
    """Some of the steps that only one of the two has, in words."""
    was, is_now = _steps(then), _steps(now)
    parts = [
        f"{word}: {', '.join(steps[:_MOST_NAMED])}{f', and {len(steps) - _MOST_NAMED} more' * (len(steps) > _MOST_NAMED)}"
        for word, steps in (
            ("only by now", [s for s in is_now if s not in was]),
            ("only then", [s for s in was if s not in is_now]),
        )
        if steps
    ]
    return f"; {'; '.join(parts)}" if parts else ""


def _steps(plan: _Plan) -> list[str]:
    """Without their order and numbers."""
    if plan.fleet is None:
        return []
    return [
        " ".join(filter(None, (s.get("action"), s.get("gpu"), s.get("slice"), s.get("replica"))))
        for s in plan.fleet.transition.steps
    ]
