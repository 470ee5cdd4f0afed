"""`run`: one scenario, and a table per tenant and slice."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from loadtests import reports
from loadtests.commands.base import add_output, check_writable, keep_samples, print_json
from loadtests.problems import ScenarioError
from loadtests.progress import steps
from loadtests.scenario import environment, load_scenario
from loadtests.target import Target
from loadtests.workers import crew

MOST_PROCESSES = 64


def add_arguments(parser: ArgumentParser) -> None:
    """The scenario, and how many processes send it."""
    parser.add_argument("file", type=Path, metavar="SCENARIO")
    parser.add_argument("--processes", type=int, default=1, help="sending processes; their samples are pooled")
    add_output(parser)


def run(chosen: Namespace) -> int:
    """0 measured · 1 nothing was answered."""
    if not 1 <= chosen.processes <= MOST_PROCESSES:
        raise ScenarioError(f"--processes {chosen.processes}: 1 to {MOST_PROCESSES} can send a load")
    scenario = load_scenario(chosen.file)
    check_writable(samples=chosen.samples)
    keys = {tenant.name: tenant.key(environment()) for tenant in scenario.tenants}
    target = Target(scenario.base_url, keys)
    lexicons, places = target.lexicons(scenario.tenants, {}), target.places()
    background = any(tenant.background for tenant in scenario.tenants)
    with (
        steps("load", 1) as advance,
        crew(front=chosen.processes, back=chosen.processes if background else 0) as workers,
    ):
        measured = workers.run(scenario, keys=keys, lexicons=lexicons, places=places, on_progress=advance("load"))
    keep_samples(chosen.samples, [("", measured.samples)])
    if chosen.json:
        print_json(reports.as_dict(measured, scenario))
    else:
        console = reports.console()
        console.print(reports.table(reports.by_tenant_and_slice(measured.samples)))
        for tenant, slo in reports.promises(measured, scenario).items():
            share = "nothing to judge" if slo["attainment"] is None else f"{slo['attainment']:.1%} met"
            told = (
                f"{tenant}: {share}, {slo['goodput_per_second']:.3g} requests/s of goodput; promised {slo['promised']}"
            )
            console.print(told, markup=False, highlight=False)
        for text in reports.warnings([measured]):
            console.print(f"note: {text}", markup=False, highlight=False)
    return 0 if any(sample.failure is None for sample in measured.samples) else 1
