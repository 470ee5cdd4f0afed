"""`sliceway bench isolation`: a certificate that one tenant does not disturb another, or the figures that say it does."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gateway.bench import FLOOD_USERS, OPTIONS, BenchError, ServedModel, choose_cast, context, scenario, served_models
from gateway.cli.bench_serving import (
    Served,
    asked,
    check_first,
    fake_serving,
    keys_for,
    loadtests,
    require_locust,
    serving,
    slices_of,
    software,
    tasks,
)
from gateway.cli.output import Json, err
from gateway.config import load_config
from model_registry.errors import ConfigError

Samples = Annotated[Path | None, typer.Option(help="Write every request to this file, a JSON object a line.")]
ReportDir = Annotated[
    Path | None, typer.Option("--report", metavar="DIR", help="Write report.html, report.md and report.json there.")
]


def register(app: typer.Typer) -> None:
    """Add `isolation`."""
    app.command()(isolation)


def isolation(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="SCENARIO", help="A scenario (kind: isolation), or a configuration whose tenants are taken."
        ),
    ],
    victim: Annotated[
        str | None, typer.Option(metavar="TENANT[=MODEL]", help="Who is measured; the first tenant if unset.")
    ] = None,
    neighbour: Annotated[
        str | None, typer.Option(metavar="TENANT[=MODEL]", help="Who floods; the second tenant if unset.")
    ] = None,
    aggressor: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="prefill_flood, decode_flood, long_context, cancel_storm, ...; repeatable."),
    ] = None,
    duration: Annotated[
        float, typer.Option(min=0.1, help="Seconds that each setting is measured, in each round.")
    ] = 30.0,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds of load before that, not counted.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often all settings are run, in mirrored order.")] = 3,
    users: Annotated[
        int, typer.Option(min=1, help="How many users the neighbour floods with; each waits for its answer.")
    ] = FLOOD_USERS,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words of each prompt.")] = 64,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each prompt instead, as the model counts them.")
    ] = None,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    p99_ratio: Annotated[
        float | None, typer.Option(min=0.0, help="Budget: the p99 beside the neighbour, over the p99 alone.")
    ] = None,
    p99_over_p50: Annotated[float | None, typer.Option(min=1.0, help="Budget: p99 / p50 beside the neighbour.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Sending processes for the victim, and for the rest.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed sends the same prompts.")] = 1,
    samples: Samples = None,
    report: ReportDir = None,
    as_json: Json = False,
) -> None:
    """One tenant alone, and beside one that misbehaves: on its own slice, on another slice, on another GPU.

    Ends with 0 within the budget (or without one), 1 beyond it, 3 if the figures are not to be trusted. Uses the gateway that
    serves the configuration, and starts one for the measurement where none does. A SCENARIO has its own numbers; the options
    from --victim to --seed are for a configuration.
    """
    require_locust()
    output = _Output(samples, report, as_json)
    if _is_scenario(path):
        raise typer.Exit(_run_scenario(path, output))
    budget = {"p99_ratio": p99_ratio, "p99_over_p50": p99_over_p50}
    code = _run_config(
        path,
        output,
        victim=victim,
        neighbour=neighbour,
        aggressors=aggressor or [],
        budget={name: limit for name, limit in budget.items() if limit is not None},
        duration_seconds=duration,
        warmup_seconds=warmup,
        rounds=rounds,
        users=users,
        prompt_words=prompt_words,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        processes=processes,
        seed=seed,
    )
    raise typer.Exit(code)


@dataclass(frozen=True, slots=True)
class _Output:
    """Where the results go."""

    samples: Path | None
    report: Path | None
    as_json: bool

    def words(self) -> list[str]:
        """As arguments of the load tests."""
        samples = ["--samples", str(self.samples)] if self.samples else []
        return [*self.final_words(), *samples, *_repeat()]

    def final_words(self) -> list[str]:
        """The same without the samples, for a report that is made of others."""
        report = ["--report", str(self.report)] if self.report else []
        return [*(["--json"] if self.as_json else []), *report]

    def of_part(self, number: int, report: Path) -> list[str]:
        """For one deployment of several: its report goes to `report`, its samples to a file of their own."""
        if self.samples is None:
            samples = []
        else:
            samples = ["--samples", str(self.samples.with_stem(f"{self.samples.stem}-{number}"))]
        return ["--report", str(report), *samples, *_repeat()]


def _repeat() -> list[str]:
    return ["--command-line", shlex.join(["sliceway", *sys.argv[1:]])]


def _is_scenario(path: Path) -> bool:
    """Whether `path` is for the load tests: those say what they are by `kind`, which no configuration has."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False  # whoever reads configurations tells what is wrong with it
    return any(line.startswith("kind:") for line in text.splitlines())


def _run_config(path: Path, output: _Output, *, victim: str | None, neighbour: str | None, **numbers: Any) -> int:
    """The configuration's own tenants, chosen by hand or by themselves."""
    config = load_config(path)
    # As if every model were ready on a slice of its own: what is wrong with the question shows before an engine is started.
    likely = [ServedModel(m.name, tasks(config).get(m.name, "generate"), frozenset({m.name})) for m in config.models]
    check_first(scenario(choose_cast(config, likely, victim=victim, neighbour=neighbour), **numbers), OPTIONS)
    with serving(path, config) as served:
        cast = choose_cast(config, served_models(served.rows, tasks(config)), victim=victim, neighbour=neighbour)
        for note in cast.notes:
            err.print(f"[dim]note: {note}[/]")
        made = scenario(cast, **numbers)
        tenants = [party.tenant for party in (cast.victim, cast.neighbour, cast.contrast) if party]
        lifetime = numbers["rounds"] * 3 * (numbers["duration_seconds"] + numbers["warmup_seconds"])
        with keys_for(served, tenants, lifetime_seconds=lifetime) as keys:
            told = _context(served, keys, tenants)
            return loadtests(
                ["isolation", "-", *output.words()], {"scenario": made, "context": told, "options": OPTIONS}
            )


def _run_scenario(path: Path, output: _Output) -> int:
    """Everything that the scenario names, one deployment after the other; several become one report."""
    needs = _checked(path)
    deployments: list[Mapping[str, Any]] = needs["deployments"]
    if not deployments:
        with _deployed(path, needs, needs) as told:
            return loadtests(["isolation", str(path), "--context", *output.words()], told)
    with tempfile.TemporaryDirectory(prefix="sliceway-bench-") as directory:
        results = []
        for number, one in enumerate(deployments):
            into = Path(directory) / str(number)
            results.append(_run_deployment(path, needs, one, output.of_part(number, into), into))
        return loadtests(["render", *map(str, results), *output.final_words()])


def _run_deployment(
    path: Path, needs: Mapping[str, Any], one: Mapping[str, Any], words: Sequence[str], into: Path
) -> Path:
    """One deployment's result as a file. Raises BenchError where it could not be measured."""
    err.print(f"[dim]deployment {one['name']!r}[/]")
    with _deployed(path, needs, one) as told:
        code, _ = asked(["isolation", str(path), "--context", *words], told)
    result = into / "report.json"
    if not result.exists():
        raise BenchError(
            f"deployment {one['name']!r} could not be measured (exit code {code})", remedy="It says why above."
        )
    return result


@contextmanager
def _deployed(path: Path, needs: Mapping[str, Any], one: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The context of one deployment while it is served. Raises ConfigError for a tenant that it does not have."""
    name = one.get("name") if one is not needs else None
    lifetime = 20.0 * needs["seconds_per_setting"]
    if one.get("base_url"):
        yield {"base_url": one["base_url"], "deployment": name}
    elif one.get("fake_engines"):
        engine = _in_seconds(one["fake_engines"])
        models = needs["models"] if len(needs["models"]) > 1 else [*needs["models"], "neighbour"]
        with (
            fake_serving(models, needs["tenants"], engine) as served,
            keys_for(served, needs["tenants"], lifetime_seconds=lifetime) as keys,
        ):
            yield _context(served, keys, needs["tenants"], deployment=name)
    elif one.get("config"):
        config_path = Path(one["config"])
        config = load_config(config_path)
        known = [tenant.name for tenant in config.tenants]
        _checked(path, {"tenants": known} if known else None)
        with (
            serving(config_path, config) as served,
            keys_for(served, needs["tenants"], lifetime_seconds=lifetime) as keys,
        ):
            yield _context(served, keys, known or needs["tenants"], deployment=name)
    else:
        raise ConfigError(
            "the scenario names no gateway",
            where=str(path),
            remedy="Set `config:` (a configuration to serve), `base_url:` or `deployments:` in it.",
        )


def _checked(path: Path, told: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """What the scenario needs. Ends the command where it is wrong, as the load tests have said then."""
    code, needs = asked(["check", str(path), "--context"], told)
    if code != 0 or not isinstance(needs, dict):
        raise typer.Exit(code or 1)
    if needs["kind"] != "isolation":
        raise ConfigError(
            f"this is a scenario of kind {needs['kind']}", where=str(path), remedy="isolation is wanted here."
        )
    return needs


def _in_seconds(engine: Mapping[str, Any]) -> dict[str, Any]:
    def seconds(text: str) -> float:
        number = text.rstrip("mus")
        return float(number) * {"ms": 1e-3, "us": 1e-6, "s": 1.0}[text[len(number) :]]

    return {
        "ttft": seconds(engine["ttft"]),
        "itl": seconds(engine["itl"]),
        "max_concurrency": engine["max_concurrency"],
    }


def _context(
    served: Served, keys: Mapping[str, str | None], tenants: Sequence[str], deployment: str | None = None
) -> dict[str, Any]:
    return context(
        base_url=served.base_url,
        keys=keys,
        tenants=tenants,
        slices=() if served.simulated else slices_of(served.config),
        rows=served.rows,
        software=software(served.config),
        deployment=deployment,
        simulated=served.simulated,
    )
