"""For Locust's own command line and web page: `locust -f loadtests/locustfile.py --headless --scenario FILE`."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import gevent
from locust import events
from locust.env import Environment

from loadtests import reports, users
from loadtests.load import Load
from loadtests.problems import Problem, ScenarioError
from loadtests.scenario import environment as process_environment
from loadtests.scenario import load_scenario
from loadtests.target import Target


class TenantUser(users.TenantUser):
    """Stands for every tenant of the scenario; see `loadtests.users`."""


def add_scenario_option(parser: ArgumentParser) -> None:
    """`--scenario FILE`."""
    parser.add_argument("--scenario", type=Path, required=True, help="what to send, in YAML (loadtests/scenario.py)")


def bind_load(environment: Environment, **_: Any) -> None:
    """Start exactly the users that the scenario has, and none that Locust would add."""
    options = environment.parsed_options
    assert options is not None
    if options.master or options.worker or options.processes:
        raise ScenarioError(
            Problem(
                "one process sends the whole load here; several under Locust would each send all of it",
                "--master, --worker, --processes",
                "python -m loadtests run SCENARIO --processes N shares it among N, and pools every sample.",
            )
        )
    scenario = load_scenario(options.scenario)
    keys = {tenant.name: tenant.key(process_environment()) for tenant in scenario.tenants}
    target = Target(scenario.base_url, keys)
    load = Load(
        scenario,
        environment=process_environment(),
        clock=time.perf_counter,
        places=target.places(),
        keys=keys,
        lexicons=target.lexicons(scenario.tenants, {}),
    )
    options.num_users = options.spawn_rate = load.user_count
    TenantUser.load = load


def begin(environment: Environment, **_: Any) -> None:
    """Time counts from the start of the test, and ends it."""
    runner = environment.runner
    assert runner is not None
    TenantUser.load.on_end(lambda: gevent.spawn(runner.quit))
    TenantUser.load.start()


def show_table(**_: Any) -> None:
    """End with p50/p99 per tenant and slice."""
    reports.console().print(reports.table(reports.by_tenant_and_slice(TenantUser.load.samples)))


events.init_command_line_parser.add_listener(add_scenario_option)
events.init.add_listener(bind_load)
events.test_start.add_listener(begin)
events.quitting.add_listener(show_table)
