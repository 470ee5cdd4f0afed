"""The declaration of a capacity measurement. Closed, frozen, bounded.

kind: capacity
config: sliceway.yaml
load: {name: acme, model: chat, prompt_tokens: 300, output_tokens: 100, slo: {ttft: 500ms, tpot: 50ms}}
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from loadtests.arrivals import Closed
from loadtests.problems import Problem, ScenarioError
from loadtests.scenario import BaseUrl, Seconds, Seed, Slo, TenantLoad
from loadtests.yamlfile import Section, Source


class CapacityScenario(Section):
    """What is sent, the SLO that it has to meet, and how long each probe may take."""

    kind: Literal["capacity"] = "capacity"
    version: Literal["v1"] = "v1"
    config: Path | None = None
    base_url: BaseUrl | None = None
    load: TenantLoad = Field(description="Its arrival is set by the search; its slo decides.")
    warmup_seconds: float = Field(default=2.0, ge=0, le=3600)
    probe_seconds: Seconds = Field(default=20.0, description="At least so long per probe.")
    most_probe_seconds: Seconds = Field(default=300.0, description="At most so long, however few requests that gives.")
    requests_per_probe: int = Field(default=100, ge=10, le=1_000_000, description="As many as a p99 takes.")
    start_per_second: float | None = Field(
        default=None, gt=0, description="Where to begin; found by asking once if unset."
    )
    tolerance_ratio: float = Field(default=1.1, gt=1.0, le=2.0, description="How close the two ends have to come.")
    most_probes: int = Field(default=12, ge=2, le=100)
    timeout_seconds: float = Field(default=120.0, gt=0)
    processes: int = Field(default=1, ge=1, le=64)
    seed: Seed = 1

    @model_validator(mode="after")
    def _makes_sense(self) -> CapacityScenario:
        if self.load.slo is None:
            raise ValueError("capacity is the load that meets an SLO || Add load.slo, as in {ttft: 500ms}.")
        if not isinstance(self.load.arrival, Closed):
            raise ValueError("the search sets the arrivals || Leave load.arrival out.")
        return self

    @property
    def slo(self) -> Slo:
        """The SLO that decides."""
        assert self.load.slo is not None
        return self.load.slo


def read_capacity(source: Source) -> CapacityScenario:
    """The scenario in `source`. Raises ScenarioError with every fault."""
    scenario = source.parse(CapacityScenario)
    needed = round(1 / (1 - scenario.slo.attainment)) if scenario.slo.attainment < 1 else 1
    if scenario.requests_per_probe < needed:
        raise ScenarioError(
            Problem(
                f"an attainment of {scenario.slo.attainment:g} cannot be seen in {scenario.requests_per_probe} requests",
                source.where("requests_per_probe"),
                f"Set requests_per_probe to {needed} or more, or a lower slo.attainment.",
            )
        )
    if scenario.config is not None:
        return scenario.model_copy(update={"config": (source.directory / scenario.config.expanduser()).absolute()})
    return scenario
