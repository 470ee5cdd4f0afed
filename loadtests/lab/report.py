"""The result of an isolation measurement: one closed value, which JSON, HTML, Markdown and tables are made from.

The JSON schema in docs/isolation-report.schema.json is made from these classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loadtests.problems import Problem, ScenarioError

SCHEMA: Literal["sliceway.isolation/v1"] = "sliceway.isolation/v1"
Status = Literal["pass", "fail", "undecided", "refused", "none"]
Interval = tuple[float, float]
ByPercentile = dict[str, Interval]
MetricName = Literal["ttft_seconds", "itl_seconds", "e2e_seconds"]


class Part(BaseModel):
    """A part of the report."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Percentiles(Part):
    """Exact percentiles in seconds. `p999` is the 99.9th; of too few samples a percentile is the maximum."""

    p50: float | None
    p90: float | None
    p99: float | None
    p999: float | None
    max: float | None
    count: int
    p99_is_maximum: bool


class Row(Part):
    """Requests of one kind: latencies of those that succeeded, failures counted apart by kind."""

    requests: int
    succeeded: int
    failures: dict[str, int]
    output_tokens: int
    ttft_seconds: Percentiles
    itl_seconds: Percentiles
    e2e_seconds: Percentiles

    @model_validator(mode="after")
    def _counts_go_together(self) -> Self:
        failed = sum(self.failures.values())
        if min((self.requests, self.succeeded, *self.failures.values())) < 0:
            raise ValueError("a count of requests is below 0")
        if self.succeeded + failed > self.requests:
            raise ValueError(f"{self.succeeded} requests succeeded and {failed} failed, of {self.requests}")
        return self


class Slo(Part):
    """How far a tenant's SLO was kept."""

    promised: str
    attainment: float | None = Field(description="Share of its requests that met every limit.")
    goodput_per_second: float
    met: bool | None


class Neighbour(Row):
    """The requests of one tenant beside the victim, on one slice."""

    tenant: str
    model: str
    slice: str | None
    slo: Slo | None = Field(default=None, description="Of a tenant among `others` that has one.")


class Service(Part):
    """What each tenant got, and how evenly."""

    tokens_per_second: dict[str, float]
    jain_index: float | None = Field(description="Of the tokens per second of all tenants in this setting.")


class Plots(Part):
    """What is drawn. `ecdf` is [seconds, share] per metric; `timeline` is [seconds since the start, latency] per metric."""

    ecdf: dict[str, list[tuple[float, float]]]
    timeline: dict[str, list[tuple[float, float]]]


class Setting(Part):
    """One setting over all rounds."""

    label: str
    where: str | None
    aggressor: str | None
    kind: str | None = Field(description="What keeps the aggressor apart: mig, gpu, mps, time-slice, cpu.")
    deployment: str | None
    baseline: str = Field(description="The key of the setting that it is compared with.")
    load: dict[str, Any] | None = Field(description="What the aggressor did.")
    victim: Row
    prompt_tokens_mean: float | None = Field(description="As the server counted them.")
    ratio_to_alone: dict[MetricName, dict[str, float | None]]
    ratio_confidence: dict[MetricName, ByPercentile] = Field(description="95% intervals by percentile.")
    confidence: dict[MetricName, ByPercentile] = Field(description="95% intervals of the victim's percentiles.")
    p99_over_p50: dict[MetricName, float | None]
    p99_over_p50_confidence: dict[MetricName, Interval | None]
    round_p50: dict[MetricName, list[float | None]]
    unfinished: int | None = Field(
        default=None,
        description="Requests of anyone without an answer when the run was given up, in no figure; null where not told.",
    )
    slo: Slo | None
    service: Service
    neighbours: list[Neighbour]
    plots: Plots


class Check(Part):
    """One line of the budget against one figure."""

    setting: str
    metric: str
    figure: str = Field(description="Such as `p99 ratio`.")
    measured: float | None
    interval: Interval | None
    limit: float
    outcome: Literal["pass", "fail", "undecided"]


class Outcome(Part):
    """One setting against the budget, whether or not the verdict depends on it. `status` means what it means there."""

    status: Literal["pass", "fail", "undecided", "refused"]
    decides: bool = Field(
        description="Whether the verdict depends on it: whether the budget's `settings` name its place."
    )
    sentence: str
    refusals: list[str]
    checks: list[Check]


class Verdict(Part):
    """`pass`, `fail`, `undecided` (the interval reaches beyond the limit), `refused` (the ruler is not sure), `none` (no budget)."""

    status: Status
    sentence: str
    refusals: list[str]
    checks: list[Check] = Field(description="Of the settings that decide.")
    settings: dict[str, Outcome] = Field(
        default={},
        description="Each setting but the victim alone, by itself, against the same budget; empty without one.",
    )


class Client(Part):
    """How far the ruler itself can be believed."""

    processes: int
    lag_p50_seconds: float | None
    lag_p99_seconds: float | None
    busy_ratio: float
    machine_busy_ratio: float | None
    machine_steal_ratio: float | None
    unfinished: int


class Report(Part):
    """The whole measurement."""

    format: Literal["sliceway.isolation/v1"] = Field(default=SCHEMA, alias="schema")
    name: str
    made_at: str = Field(description="UTC, ISO 8601.")
    simulated: bool = Field(description="Whether the engines were simulated: then it is the gateway that was measured.")
    command: str
    verdict: Verdict
    budget: dict[str, Any] | None
    victim: dict[str, Any]
    neighbour: dict[str, Any] | None = Field(description="The load of the first aggressor.")
    rounds: int
    duration_seconds: float
    warmup_seconds: float
    seed: int
    settings: dict[str, Setting]
    not_isolated: list[str] = Field(description="What is shared in spite of the slices.")
    warnings: list[str]
    client: Client
    machine: dict[str, Any]
    software: dict[str, str]
    layout: dict[str, Any]
    scenario: dict[str, Any]

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def as_dict(self) -> dict[str, Any]:
        """The JSON shape."""
        return self.model_dump(mode="json", by_alias=True)


def read_report(path: Path) -> Report:
    """A report from its JSON file. Raises ScenarioError for a file that is none."""
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ScenarioError(Problem(f"cannot be read: {error.strerror}", str(path))) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        said = first["msg"].removeprefix("Value error, ")
        where = ".".join(map(str, first["loc"]))
        raise ScenarioError(
            Problem(
                f"this is no isolation report of version {SCHEMA}: {f'{where}: {said}' if where else said}",
                str(path),
                "Reports are written by `sliceway bench isolation --report DIR` or `--json`.",
            )
        ) from error
