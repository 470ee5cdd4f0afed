"""`check`: what a scenario file asks for, without sending anything."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from loadtests.capacity.scenario import read_capacity
from loadtests.commands.base import add_context, print_json, read_context, read_source
from loadtests.lab.scenario import check_host, check_tenants, read_isolation
from loadtests.machine import usable_cores
from loadtests.problems import Problem, ScenarioError
from loadtests.scenario import settle


def add_arguments(parser: ArgumentParser) -> None:
    """The scenario."""
    parser.add_argument("file", type=Path, metavar="SCENARIO")
    add_context(parser)


def run(chosen: Namespace) -> int:
    """0 and what it needs, as JSON: its kind, configuration, deployments and tenants."""
    source = read_source(chosen.file)
    kind = source.data.get("kind", "load") if isinstance(source.data, dict) else "load"
    if kind == "isolation":
        scenario = read_isolation(source)
        check_tenants(scenario, read_context(chosen), source)
        check_host(scenario, source, usable_cores())
        models = [
            scenario.victim.model,
            *(o.model for o in scenario.others),
            *(s.model for s in scenario.settings if s.model),
        ]
        needs = {
            "config": scenario.config and str(scenario.config),
            "base_url": scenario.base_url,
            "deployments": [d.model_dump(mode="json") for d in scenario.deployments],
            "tenants": list(scenario.tenants),
            "models": list(dict.fromkeys(models)),
            "task": scenario.victim.task,
            "rounds": scenario.rounds,
            "seconds_per_setting": scenario.rounds * (scenario.warmup_seconds + scenario.duration_seconds),
        }
    elif kind == "capacity":
        capacity = read_capacity(source)
        needs = {
            "config": capacity.config and str(capacity.config),
            "base_url": capacity.base_url,
            "tenants": [capacity.load.name],
            "models": [capacity.load.model],
        }
    elif kind == "load":
        needs = {"tenants": [tenant.name for tenant in settle(source).tenants]}
    else:
        raise ScenarioError(
            Problem(f"{kind!r} is no kind of scenario", source.where("kind"), "Known: isolation, capacity, load.")
        )
    print_json({"kind": kind} | needs)
    return 0
