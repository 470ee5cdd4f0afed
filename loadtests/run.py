"""Running one scenario to its end inside this process. Importing this patches the process for gevent."""

from __future__ import annotations

import time
from collections.abc import Callable

import gevent
from gevent.event import Event
from locust.env import Environment

from loadtests import scenario as scenarios
from loadtests.client import Connection
from loadtests.load import Load, Places, read_places
from loadtests.run_result import Run
from loadtests.samples import quantiles
from loadtests.scenario import Scenario, ScenarioError
from loadtests.users import TenantUser

LAG_EVERY_SECONDS = 0.01
PROGRESS_EVERY_SECONDS = 0.5

OnProgress = Callable[[float, int], None]
"""Called with the share of the run's planned time that has passed, and the requests sent so far."""


def run(scenario: Scenario, on_progress: OnProgress = lambda share, sent: None) -> Run:
    """Send the scenario's load and wait for the last answer.

    What is still unanswered two `timeout_seconds` after the last request was due is given up and counted as unfinished.
    Raises ScenarioError where nobody answers at `base_url`, or a key is missing.
    """
    environment = scenarios.environment()
    load = Load(scenario, environment=environment, clock=time.perf_counter, places=places_of(scenario))
    ended = Event()
    load.on_end(ended.set)
    user_class = type("BoundTenantUser", (TenantUser,), {"load": load, "abstract": False})
    locust = Environment(user_classes=[user_class], catch_exceptions=False)
    runner = locust.create_local_runner()
    lags: list[float] = []
    watchers = [gevent.spawn(_watch_lag, lags), gevent.spawn(_watch_progress, load, on_progress)]
    load.start()
    runner.start(load.user_count, spawn_rate=load.user_count)
    ended.wait(scenario.warmup_seconds + scenario.duration_seconds + 2 * scenario.timeout_seconds)
    unfinished = load.in_flight
    gevent.killall(watchers)
    runner.quit()
    return Run(tuple(load.samples), quantiles(lags), unfinished)


def places_of(scenario: Scenario) -> Places:
    """Which slice answers for what, as the gateway tells. Raises ScenarioError where nobody answers."""
    connection = Connection(scenario.base_url, timeout_seconds=scenario.timeout_seconds, clock=time.perf_counter)
    try:
        return read_places(connection.get_json("/slices", key=scenario.tenants[0].key(scenarios.environment())))
    except OSError as error:
        raise ScenarioError(
            f"nobody answers at {scenario.base_url} ({error}); start the gateway: sliceway up CONFIG"
        ) from error
    finally:
        connection.close()


def _watch_lag(lags: list[float]) -> None:
    while True:
        asked = time.perf_counter()
        gevent.sleep(LAG_EVERY_SECONDS)
        lags.append(max(0.0, time.perf_counter() - asked - LAG_EVERY_SECONDS))


def _watch_progress(load: Load, on_progress: OnProgress) -> None:
    planned = load.scenario.warmup_seconds + load.scenario.duration_seconds
    while True:
        on_progress(min(1.0, load.now() / planned), load.sent)
        gevent.sleep(PROGRESS_EVERY_SECONDS)
