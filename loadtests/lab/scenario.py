"""The declaration of an isolation measurement. Closed, frozen, bounded; `docs/isolation.md` has every field.

kind: isolation
config: isolation.yaml
duration_seconds: 60
rounds: 4
victim: {name: quiet, model: chat-a, prompt_tokens: 100, output_tokens: 16, slo: {ttft: 800ms}}
aggressors:
  - {kind: prefill_flood, tenant: noisy}
settings:
  - {where: other_slice}
  - {where: same_slice}
budget: {p99_ratio: 1.10}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from loadtests.aggressors import Aggressor, Cores, Flood, OnHost, Requesting, WeightLoading, parse_cores
from loadtests.arrivals import Closed, Trace, mean_rate
from loadtests.problems import Problem, ScenarioError
from loadtests.samples import METRICS, samples_needed, show_percentile
from loadtests.scenario import STREAMED, BaseUrl, Seconds, Seed, TenantLoad, settled
from loadtests.traces import read_trace
from loadtests.units import Duration
from loadtests.yamlfile import Section, Source

Where = Literal["same_slice", "other_slice", "other_gpu", "same_cores", "other_cores", "machine"]
ON_SLICES = ("same_slice", "other_slice", "other_gpu")
ON_HOST = ("same_cores", "other_cores", "machine")
Metric = Literal["ttft", "itl", "e2e"]
PercentileName = Literal["p50", "p90", "p99", "p999"]
APART: tuple[Where, ...] = ("other_slice", "other_gpu", "other_cores")
"""Where a slice is expected to keep an aggressor from the victim."""


class Setting(Section):
    """One place to do it from."""

    where: Where
    model: str | None = Field(
        default=None, description="The model that is flooded; found on a slice of that kind if unset."
    )
    cores: Cores | None = Field(default=None, description="For same_cores and other_cores; known for our own slices.")
    kind: str | None = Field(
        default=None, description="What keeps them apart there, for the report: mig, mps, cpu, ..."
    )


class Budget(Section):
    """What is allowed. A ratio is the victim's figure beside the aggressor over the same figure alone.

    The certificate holds where the whole confidence interval of each ratio is within; it fails where the measured ratio is
    not.
    """

    p50_ratio: float | None = Field(default=None, gt=0)
    p90_ratio: float | None = Field(default=None, gt=0)
    p99_ratio: float | None = Field(default=None, gt=0)
    p999_ratio: float | None = Field(default=None, gt=0)
    p99_over_p50: float | None = Field(default=None, gt=1, description="p99 / p50 beside the aggressor.")
    failed_ratio: float = Field(default=0.0, ge=0, le=1, description="Share of the victim's requests that may fail.")
    metrics: tuple[Metric, ...] = Field(default=("ttft", "itl", "e2e"), min_length=1)
    settings: tuple[Where, ...] = Field(default=APART, min_length=1, description="Where it has to hold.")

    @model_validator(mode="after")
    def _limits_something(self) -> Budget:
        if not self.ratios and self.p99_over_p50 is None and "failed_ratio" not in self.model_fields_set:
            raise ValueError(
                "a budget without a limit || Give one or more, as in {p99_ratio: 1.10, p99_over_p50: 1.3}."
            )
        return self

    @property
    def ratios(self) -> dict[str, float]:
        """The ratio limits that are set, by percentile."""
        named = {"p50": self.p50_ratio, "p90": self.p90_ratio, "p99": self.p99_ratio, "p999": self.p999_ratio}
        return {name: limit for name, limit in named.items() if limit is not None}

    @property
    def streamed_metrics(self) -> list[str]:
        """Of the metrics that are named those that only answers in events have; unnamed ones are judged where there are any."""
        return [metric for metric in self.metrics if metric in STREAMED] if "metrics" in self.model_fields_set else []

    @property
    def percentiles(self) -> tuple[str, ...]:
        """The percentiles that have to be known for a verdict."""
        return (
            (*self.ratios, "p99") if self.p99_over_p50 is not None and "p99" not in self.ratios else tuple(self.ratios)
        )


class FakeEngines(Section):
    """Simulated engines in the place of real ones: what is measured then is the gateway alone."""

    ttft: Duration = 0.05
    itl: Duration = 0.01
    max_concurrency: int = Field(default=4, ge=0, description="Requests that each runs at once; 0 is no bound.")


class Deployment(Section):
    """One way to serve the models. Each is measured by itself, with its own `alone`, one after the other."""

    name: str = Field(min_length=1, max_length=60)
    config: Path | None = Field(default=None, description="A sliceway configuration, served for the measurement.")
    base_url: BaseUrl | None = Field(default=None, description="A gateway that runs already, without /v1.")
    fake_engines: FakeEngines | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Deployment:
        if sum(way is not None for way in (self.config, self.base_url, self.fake_engines)) != 1:
            raise ValueError("a deployment is one of config, base_url and fake_engines")
        return self


class IsolationScenario(Section):
    """Who is measured, beside whom, from where, how often; and what counts as isolated."""

    kind: Literal["isolation"] = "isolation"
    version: Literal["v1"] = "v1"
    name: str | None = Field(default=None, description="What the report is called.")
    config: Path | None = None
    base_url: BaseUrl | None = None
    deployments: tuple[Deployment, ...] = Field(
        default=(), description="In place of config or base_url, to compare kinds."
    )
    warmup_seconds: float = Field(default=3.0, ge=0, le=3600)
    duration_seconds: Seconds = Field(default=30.0, description="Of each setting in each round.")
    pause_seconds: float = Field(
        default=0.5, ge=0, le=600, description="Between two settings, for engines to calm down."
    )
    rounds: int = Field(default=3, ge=1, le=1000, description="How often all settings are run, in mirrored order.")
    timeout_seconds: float = Field(default=120.0, gt=0)
    seed: Seed = 1
    processes: int = Field(
        default=1, ge=1, le=64, description="Sending processes for the victim, and as many for the rest."
    )
    victim: TenantLoad
    others: tuple[TenantLoad, ...] = Field(
        default=(), description="Well-behaved tenants that are there in every setting."
    )
    aggressors: tuple[Aggressor, ...] = Field(min_length=1)
    settings: tuple[Setting, ...] = Field(min_length=1)
    tokenizers: dict[str, Path] = Field(
        default={}, description="tokenizer.json by model, where the server counts nothing."
    )
    budget: Budget | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> IsolationScenario:
        if sum(map(bool, (self.config, self.base_url, self.deployments))) > 1:
            raise ValueError("give one of config, base_url and deployments")
        deployed = [deployment.name for deployment in self.deployments]
        if len(set(deployed)) != len(deployed):
            raise ValueError("two deployments share a name || Give each a `name` of its own.")
        labels = [aggressor.label for aggressor in self.aggressors]
        if len(set(labels)) != len(labels):
            raise ValueError("two aggressors share a name || Give one of them a `name`.")
        if self.victim.background or any(other.background for other in self.others):
            raise ValueError("`background` is for load files; aggressors are in the background by themselves")
        self._check_names()
        self._check_budget()
        return self

    def _check_names(self) -> None:
        """One name, one row of the report: nobody is there twice, and nobody is disturbed by itself."""
        names = [self.victim.name, *(other.name for other in self.others)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice!r} is there twice among the victim and the others || Name each tenant once.")
        for aggressor in self.aggressors:
            if isinstance(aggressor, Requesting) and aggressor.tenant in names:
                raise ValueError(
                    f"{aggressor.tenant!r} cannot be its own neighbour (aggressor {aggressor.label!r}) || "
                    "Name a tenant that is neither the victim nor among the others."
                )

    def _check_budget(self) -> None:
        """Every aggressor has a setting to work from, and the budget something to judge."""
        places = {setting.where for setting in self.settings}
        for aggressor in self.aggressors:
            fitting = ON_HOST if aggressor.on_host else ON_SLICES
            if not places & set(fitting):
                raise ValueError(f"no setting fits {aggressor.label!r} || It takes one of {', '.join(fitting)}.")
        if self.budget is not None and not places & set(self.budget.settings):
            raise ValueError(
                f"the budget is about {', '.join(self.budget.settings)}, and no setting is one of these || "
                f"Add such a setting, or write budget.settings: [{', '.join(sorted(places))}]."
            )
        unseen = [] if self.victim.streams or self.budget is None else self.budget.streamed_metrics
        if unseen:
            raise ValueError(
                f"the victim's answers come in one piece and have no {unseen[0]} || Write budget.metrics: [e2e]."
            )

    @property
    def tenants(self) -> tuple[str, ...]:
        """Everyone who needs a key, once."""
        requesting = [a.tenant for a in self.aggressors if isinstance(a, Requesting)]
        return tuple(dict.fromkeys([self.victim.name, *(other.name for other in self.others), *requesting]))


class Context(Section):
    """What whoever starts the measurement knows of the gateway: its address, keys, and who there is.

    `slice_cores` are the CPU cores of each slice, `layout` a free description for the report.
    """

    base_url: BaseUrl | None = None
    keys: dict[str, str | None] = Field(default={}, repr=False)
    tenants: tuple[str, ...] | None = Field(default=None, description="Tenants there are; None where it is not known.")
    deployment: str | None = None
    simulated: bool = False
    slice_cores: dict[str, Cores] = Field(default={})
    layout: dict[str, Any] = Field(default={})
    software: dict[str, str] = Field(default={})


def read_isolation(source: Source) -> IsolationScenario:
    """The scenario in `source`, with paths made absolute.

    Raises ScenarioError with every fault: what the schema forbids, and a run too short for the percentile it is judged by.
    """
    scenario = source.parse(IsolationScenario)
    directory = source.directory
    victim, *others = settled((scenario.victim, *scenario.others), directory)
    settled_scenario = scenario.model_copy(
        update={
            "victim": victim,
            "others": tuple(others),
            "aggressors": tuple(_absolute(a, directory) for a in scenario.aggressors),
            "config": _join(directory, scenario.config),
            "deployments": tuple(
                d.model_copy(update={"config": _join(directory, d.config)}) for d in scenario.deployments
            ),
            "tokenizers": {model: (directory / path).absolute() for model, path in scenario.tokenizers.items()},
        }
    )
    if problem := too_short(settled_scenario, source):
        raise ScenarioError(problem)
    return settled_scenario


def check_tenants(scenario: IsolationScenario, context: Context, source: Source) -> None:
    """Raises ScenarioError for every tenant that is not there, with its line and those that are."""
    if context.tenants is None:
        return
    places: list[tuple[str, tuple[str | int, ...]]] = [(scenario.victim.name, ("victim", "name"))]
    places += [(other.name, ("others", i, "name")) for i, other in enumerate(scenario.others)]
    places += [
        (a.tenant, ("aggressors", i, "tenant")) for i, a in enumerate(scenario.aggressors) if isinstance(a, Requesting)
    ]
    known = ", ".join(map(repr, context.tenants)) or "none"
    problems = [
        Problem(f"there is no tenant {name!r}", source.where(*path), f"There are: {known}.")
        for name, path in places
        if name not in context.tenants
    ]
    if problems:
        raise ScenarioError(*problems)


def check_host(scenario: IsolationScenario, source: Source, cores: Collection[int]) -> None:
    """Raises ScenarioError for weights that are not there, and for cores other than `cores`, which can be used here."""
    problems = [
        Problem(
            words, source.where("aggressors", i, "path"), "Name a file of weights, or a directory with *.safetensors."
        )
        for i, aggressor in enumerate(scenario.aggressors)
        if isinstance(aggressor, WeightLoading) and (words := _no_weights(aggressor.path))
    ]
    named = [(a.cores, ("aggressors", i, "cores")) for i, a in enumerate(scenario.aggressors) if isinstance(a, OnHost)]
    named += [(setting.cores, ("settings", i, "cores")) for i, setting in enumerate(scenario.settings)]
    problems += [
        Problem(
            f"this machine has no core {strange[0]}",
            source.where(*path),
            f"It has {len(cores)}: {min(cores)} to {max(cores)}.",
        )
        for written, path in named
        if written and (strange := sorted(set(parse_cores(written)) - set(cores)))
    ]
    if problems:
        raise ScenarioError(*problems)


def _no_weights(path: Path) -> str | None:
    if path.is_dir():
        return None if any(path.glob("*.safetensors")) else f"{path} has no *.safetensors"
    if not path.exists():
        return f"{path} is not there"
    return None if path.stat().st_size else f"{path} is empty"


def too_short(scenario: IsolationScenario, source: Source) -> Problem | None:
    """What is wrong if an open loop cannot give the samples that the budget's percentiles take; None where it can.

    A closed loop's count depends on the answers; there the verdict says it afterwards.
    """
    if scenario.budget is None or isinstance(scenario.victim.arrival, Closed):
        return None
    arrival = scenario.victim.arrival
    rows = read_trace(arrival.file) if isinstance(arrival, Trace) else ()
    rate = mean_rate(arrival, scenario.warmup_seconds + scenario.duration_seconds, rows)
    expected = rate * scenario.duration_seconds * scenario.rounds
    for name in scenario.budget.percentiles:
        needed = samples_needed(name)
        if expected < needed and set(scenario.budget.metrics) & {"ttft", "e2e"}:
            seconds = needed / max(rate, 1e-9) / scenario.rounds
            return Problem(
                f"{scenario.rounds} x {scenario.duration_seconds:g} s give about {expected:.0f} requests per setting, "
                f"and {show_percentile(name)} takes {needed}",
                source.where("duration_seconds"),
                f"Set duration_seconds to {seconds:.0f} or more, or rounds to {-(-needed // max(1, int(expected / scenario.rounds)))}.",
            )
    return None


def metric_seconds(metric: Metric) -> str:
    """`ttft` -> `ttft_seconds`."""
    return next(name for name in METRICS if name.startswith(metric))


def _absolute(aggressor: Any, directory: Path) -> Any:
    if getattr(aggressor, "path", None) is not None:
        return aggressor.model_copy(update={"path": _join(directory, aggressor.path)})
    if isinstance(arrival := getattr(aggressor, "arrival", None), Trace):
        path = _join(directory, arrival.file)
        assert path is not None
        read_trace(path)
        return aggressor.model_copy(update={"arrival": arrival.model_copy(update={"file": path})})
    return aggressor


def _join(directory: Path, path: Path | None) -> Path | None:
    return None if path is None else (directory / path.expanduser()).absolute()


def default_aggressor(tenant: str, users: int) -> Flood:
    """What floods where nobody says how: the victim's own kind of request."""
    return Flood(name="neighbour", tenant=tenant, users=users)


def keys_from(scenario: IsolationScenario, context: Context, environment: Mapping[str, str]) -> dict[str, str | None]:
    """Everyone's key: the context's, else from the variable that the scenario names.

    Raises ScenarioError where such a variable is empty.
    """
    found: dict[str, str | None] = {}
    for tenant in (scenario.victim, *scenario.others):
        found[tenant.name] = context.keys.get(tenant.name) or tenant.key(environment)
    for aggressor in scenario.aggressors:
        if isinstance(aggressor, Requesting):
            name = aggressor.tenant
            asks = TenantLoad(name=name, model="any", api_key_env=aggressor.api_key_env)
            found[name] = found.get(name) or context.keys.get(name) or asks.key(environment)
    return found
