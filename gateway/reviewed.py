"""A plan that somebody has looked at (`sliceway plan --json`), against the one that would be carried out by now."""

from __future__ import annotations

import json
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


class _Read(BaseModel):
    """As much of the JSON as is compared; the rest follows from it, or tells how long things take."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Layout(_Read):
    gpu: str
    now: list[str]
    mig: dict[str, Any]
    actions: list[Any]


class _Gpu(_Read):
    gpu: str
    observed: str


class _Transition(_Read):
    steps: list[Any]


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


class _Plan(_Read):
    gpus: list[_Layout]
    fleet: _Fleet | None = None
    engines: _Engines | None = None


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
                "are others, or what models are measured to take",
                where=str(self.path),
                remedy=_AGAIN,
            )


def _state(plan: _Plan) -> Mapping[str, str]:
    """What every GPU was like, by its id."""
    state = {g.gpu: json.dumps([g.now, g.mig], sort_keys=True) for g in plan.gpus}
    for gpu in plan.fleet.gpus if plan.fleet else ():
        state[gpu.gpu] = state.get(gpu.gpu, "") + gpu.observed
    return state


def _to_do(plan: _Plan) -> Sequence[Any]:
    fleet = [plan.fleet.decisions, plan.fleet.transition.steps] if plan.fleet else []
    return [[g.actions for g in plan.gpus], *fleet, plan.engines]
