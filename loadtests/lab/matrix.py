"""From a scenario and what runs: every setting with its aggressor, and the order in which they are measured. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from loadtests.aggressors import OnHost, Requesting, load_of, parse_cores
from loadtests.lab.scenario import ON_HOST, Context, IsolationScenario, Setting
from loadtests.problems import Problem, ScenarioError
from loadtests.scenario import Scenario, TenantLoad

ALONE = "alone"
PLACES: Mapping[str, str] = {
    "same_slice": "the same slice",
    "other_slice": "the other slice",
    "other_gpu": "another GPU",
    "same_cores": "the victim's cores",
    "other_cores": "other cores",
    "machine": "any core",
}
Rows = Sequence[Mapping[str, Any]]
ContextOf = Callable[[str, str], int | None]
"""The context in tokens of (model, tenant)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting of the matrix. `alone` has neither `beside` nor `hog`.

    `beside` is what the aggressor sends, `hog` what it does on the machine, on `cores` (None: wherever it is put).
    """

    key: str
    label: str
    where: str | None = None
    aggressor: str | None = None
    kind: str | None = None
    beside: TenantLoad | None = None
    hog: OnHost | None = None
    cores: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of load: a cell in a round."""

    round: int
    cell: Cell
    scenario: Scenario


def cells_of(scenario: IsolationScenario, rows: Rows, context_of: ContextOf, context: Context) -> tuple[Cell, ...]:
    """`alone`, then every aggressor in every setting that fits it.

    Raises ScenarioError where a setting is not to be had here, with what there is.
    """
    cells = [Cell(ALONE, ALONE)]
    for aggressor in scenario.aggressors:
        for setting in scenario.settings:
            if (setting.where in ON_HOST) != aggressor.on_host:
                continue
            cell = (
                _slice_cell(aggressor, setting, scenario, rows, context_of)
                if isinstance(aggressor, Requesting)
                else _host_cell(aggressor, setting, scenario, rows, context)
            )
            cells.append(_told_apart(cell, cells))
    return tuple(cells)


def phases(scenario: IsolationScenario, cells: Sequence[Cell], base_url: str) -> Iterator[Phase]:
    """Every phase in the order in which they are to run: mirrored from round to round (A B C, C B A, ...).

    A machine that grows slower or faster meanwhile treats all settings alike then. In every setting of a round the victim asks
    at the same times and in the same lengths, but with words of that setting's own: an engine keeps the prefixes that it
    has seen, and whoever asked second would be answered from what the first one paid for.
    """
    wordings = count()
    for number in range(scenario.rounds):
        for cell in cells if number % 2 == 0 else tuple(reversed(cells)):
            beside = (cell.beside,) if cell.beside else ()
            yield Phase(
                number,
                cell,
                Scenario(
                    base_url=base_url,
                    warmup_seconds=scenario.warmup_seconds,
                    duration_seconds=scenario.duration_seconds,
                    timeout_seconds=scenario.timeout_seconds,
                    seed=scenario.seed + number,
                    wording=next(wordings),
                    tenants=(scenario.victim, *scenario.others, *beside),
                ),
            )


def planned_seconds(scenario: IsolationScenario, cells: int) -> float:
    """How long the whole matrix takes, answers that come late left out."""
    each = scenario.warmup_seconds + scenario.duration_seconds + scenario.pause_seconds
    return scenario.rounds * cells * each


def _slice_cell(
    aggressor: Requesting, setting: Setting, scenario: IsolationScenario, rows: Rows, context_of: ContextOf
) -> Cell:
    victim = scenario.victim
    model = setting.model or _model_at(setting.where, victim.model, rows)
    load = load_of(aggressor, victim, model, context_of(model, aggressor.tenant))
    return Cell(
        key=f"{aggressor.label}_on_{setting.where}",
        label=f"{aggressor.label} on {PLACES[setting.where]}",
        where=setting.where,
        aggressor=aggressor.label,
        kind=setting.kind or _kind_of(model, rows),
        beside=load,
    )


def _host_cell(aggressor: OnHost, setting: Setting, scenario: IsolationScenario, rows: Rows, context: Context) -> Cell:
    written = aggressor.cores or setting.cores
    cores = parse_cores(written) if written else _cores_at(setting.where, scenario.victim.model, rows, context)
    return Cell(
        key=f"{aggressor.label}_on_{setting.where}",
        label=f"{aggressor.label} on {PLACES[setting.where]}",
        where=setting.where,
        aggressor=aggressor.label,
        kind=setting.kind,
        hog=aggressor,
        cores=cores,
    )


def _told_apart(cell: Cell, others: Sequence[Cell]) -> Cell:
    """The cell under a key of its own: the same place can be there twice, with two models."""
    taken = {other.key for other in others}
    if cell.key not in taken:
        return cell
    more = cell.beside.model if cell.beside else str(len(taken))
    return Cell(
        f"{cell.key}_{more}",
        f"{cell.label} ({more})",
        cell.where,
        cell.aggressor,
        cell.kind,
        cell.beside,
        cell.hog,
        cell.cores,
    )


def _model_at(where: str, victim_model: str, rows: Rows) -> str:
    """The first model that is where the setting wants it, as `/slices` shows."""
    if where == "same_slice":
        return victim_model
    places = _places(rows)
    mine = places.get(victim_model, {})
    for model, theirs in places.items():
        apart = theirs and not theirs.keys() & mine.keys()
        shares_gpu = bool(set(theirs.values()) & set(mine.values()))
        if apart and shares_gpu == (where == "other_slice"):
            return model
    shown = "; ".join(f"{model} on {', '.join(slices)}" for model, slices in places.items()) or "no slice at all"
    raise ScenarioError(
        Problem(
            f"no model runs on {PLACES[where]}, seen from {victim_model!r}",
            f"settings: {where}",
            f"The gateway shows {shown}. Serve a second model there, or name one with `model:`.",
        )
    )


def _places(rows: Rows) -> dict[str, dict[str, str | None]]:
    """Model -> slice -> GPU, for replicas that are ready."""
    found: dict[str, dict[str, str | None]] = {}
    for row in rows:
        if row.get("model") and row.get("state", "ready") == "ready":
            found.setdefault(row["model"], {})[row["slice"]["id"]] = row["slice"].get("gpu")
    return found


def _kind_of(model: str, rows: Rows) -> str | None:
    kinds = {row["slice"].get("kind") for row in rows if row.get("model") == model}
    return kinds.pop() if len(kinds) == 1 else None


def _cores_at(where: str, victim_model: str, rows: Rows, context: Context) -> tuple[int, ...] | None:
    if where == "machine":
        return None
    mine = set(_places(rows).get(victim_model, {}))
    chosen = [
        core
        for slice_id, cores in context.slice_cores.items()
        for core in parse_cores(cores)
        if (slice_id in mine) == (where == "same_cores")
    ]
    if not chosen:
        raise ScenarioError(
            Problem(
                f"nobody knows which cores are {PLACES[where]}",
                f"settings: {where}",
                "Name them: {where: " + where + ', cores: "0-3"}.',
            )
        )
    return tuple(sorted(chosen))
