"""Carrying out an isolation scenario: the only part of the lab that talks to a gateway and starts processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from loadtests import hogs, machine
from loadtests.lab.evaluate import Measured, Surroundings, check_first, evaluate
from loadtests.lab.matrix import Cell, Phase, cells_of, phases
from loadtests.lab.report import Report
from loadtests.lab.scenario import Context, IsolationScenario, keys_from
from loadtests.load import Lexicons, Places
from loadtests.problems import Problem, ScenarioError
from loadtests.progress import steps
from loadtests.scenario import environment
from loadtests.target import Keys, Target
from loadtests.workers import Crew, crew


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that is known before the first request is sent."""

    scenario: IsolationScenario
    context: Context
    base_url: str
    keys: Keys
    cells: tuple[Cell, ...]
    places: Places
    lexicons: Mapping[str, Lexicons]


def prepare(scenario: IsolationScenario, context: Context) -> Prepared:
    """Ask the gateway what is where, and how prompts are tokenised. Raises ScenarioError for what cannot be had there."""
    base_url = context.base_url or scenario.base_url
    if base_url is None:
        raise ScenarioError(
            Problem(
                "the scenario names no gateway",
                remedy="Set base_url in it; or run it with `sliceway bench isolation`, which serves its config.",
            )
        )
    keys = keys_from(scenario, context, environment())
    target = Target(base_url, keys)
    cells = cells_of(scenario, target.slices(), target.max_model_len, context)
    ours = (scenario.victim, *scenario.others)
    lexicons = {
        cell.key: target.lexicons((*ours, cell.beside) if cell.beside else ours, scenario.tokenizers) for cell in cells
    }
    return Prepared(scenario, context, base_url, keys, cells, target.places(), lexicons)


def carry_out(prepared: Prepared) -> list[Measured]:
    """Every phase of the matrix, in order; the victim alone comes first. Raises LoadTestError where it is only refused there."""
    scenario = prepared.scenario
    order = list(phases(scenario, prepared.cells, prepared.base_url))
    measured = []
    began = time.perf_counter()
    with steps("isolation", len(order)) as advance, _processes(scenario, prepared.cells) as workers:
        for phase in order:
            on_progress = advance(f"round {phase.round + 1} of {scenario.rounds}: {phase.cell.label}")
            since = time.perf_counter() - began
            with hogs.running(phase.cell.hog, phase.cell.cores):
                done = workers.run(
                    phase.scenario,
                    keys=prepared.keys,
                    lexicons=prepared.lexicons[phase.cell.key],
                    places=prepared.places,
                    on_progress=on_progress,
                )
            measured.append(Measured(phase.round, phase.cell, since, done))
            check_first(scenario.victim, measured[0])
            _rest(scenario, phase, order)
    return measured


def measure(scenario: IsolationScenario, context: Context, command: str) -> tuple[Report, list[Measured]]:
    """The whole measurement: its report, and every sample."""
    prepared = prepare(scenario, context)
    described, before = machine.describe(), machine.clicks()
    measured = carry_out(prepared)
    surroundings = Surroundings(
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        machine=described,
        machine_use=machine.used_between(before, machine.clicks()),
    )
    report = evaluate(scenario, prepared.cells, measured, context=context, surroundings=surroundings)
    return report, measured


@contextmanager
def _processes(scenario: IsolationScenario, cells: Sequence[Cell]) -> Iterator[Crew]:
    beside = any(cell.beside for cell in cells)
    with crew(front=scenario.processes, back=scenario.processes if beside else 0) as workers:
        yield workers


def _rest(scenario: IsolationScenario, phase: Phase, order: Sequence[Phase]) -> None:
    """What was cut off needs a moment to leave the engines; after the last phase nobody waits."""
    if phase is not order[-1]:
        time.sleep(scenario.pause_seconds)
