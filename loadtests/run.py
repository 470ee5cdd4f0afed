"""Running one scenario to its end inside this process. Importing this patches the process for gevent."""

from __future__ import annotations

import time
from collections.abc import Callable

import gevent
from gevent.event import Event
from locust.env import Environment

from loadtests.load import Load
from loadtests.run_result import Run
from loadtests.samples import quantiles
from loadtests.users import TenantUser

LAG_EVERY_SECONDS = 0.01
PROGRESS_EVERY_SECONDS = 0.5

OnProgress = Callable[[float, int], None]
"""Called with the share of the run's planned time that has passed, and the requests sent so far."""


def run(load: Load, on_progress: OnProgress = lambda share, sent: None, *, start_at: float | None = None) -> Run:
    """Send the load and wait for the last answer; time counts from `start_at` on `time.perf_counter`, or from now.

    What is still unanswered, or not even sent, two `timeout_seconds` after the last request was due, or when `load.stop` is
    called, is given up and counted as unfinished.
    """
    ended = Event()
    load.on_end(ended.set)
    user_class = type("BoundTenantUser", (TenantUser,), {"load": load, "abstract": False})
    locust = Environment(user_classes=[user_class], catch_exceptions=False)
    runner = locust.create_local_runner()
    lags: list[float] = []
    load.start(start_at)
    began, spent = time.perf_counter(), time.process_time()
    watchers = [gevent.spawn(_watch_lag, lags), gevent.spawn(_watch_progress, load, on_progress)]
    runner.start(load.user_count, spawn_rate=max(1, load.user_count))
    if load.user_count:
        _wait(load, ended)
    busy = (time.process_time() - spent) / max(time.perf_counter() - began, 1e-9)
    unfinished = load.in_flight + (0 if ended.is_set() else load.unsent())
    gevent.killall(watchers)
    runner.quit()
    return Run(tuple(load.samples), quantiles(lags), unfinished, busy, tuple(lags))


def _wait(load: Load, ended: Event) -> None:
    """Until every user has left, the time is up, or a background load was told to stop."""
    scenario = load.scenario
    last = scenario.warmup_seconds + scenario.duration_seconds + 2 * scenario.timeout_seconds
    while not ended.wait(PROGRESS_EVERY_SECONDS / 2):
        if load.was_told_to_stop or (load.now() > last and not load.is_endless):
            return


def _watch_lag(lags: list[float]) -> None:
    while True:
        asked = time.perf_counter()
        gevent.sleep(LAG_EVERY_SECONDS)
        lags.append(max(0.0, time.perf_counter() - asked - LAG_EVERY_SECONDS))


def _watch_progress(load: Load, on_progress: OnProgress) -> None:
    planned = load.scenario.warmup_seconds + load.scenario.duration_seconds
    while True:
        on_progress(max(0.0, min(1.0, load.now() / planned)), load.sent)
        gevent.sleep(PROGRESS_EVERY_SECONDS)
