"""The processes that send a load, seen from the one that gives orders.

The measured tenants and those beside them have processes of their own: a flood costs its sender time, and a victim measured
by the same interpreter would show that as latency.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from typing import Any

from loadtests.load import Lexicons, Places
from loadtests.problems import LoadTestError, ScenarioError
from loadtests.run_result import Run, merged
from loadtests.samples import Sample, quantiles
from loadtests.scenario import Scenario
from loadtests.target import Keys

READY_SECONDS = 120.0
HEAD_START_SECONDS = 0.15
"""How far ahead of now a common start is set: every process has read the order by then."""

_GAPS = [field.name for field in fields(Sample)].index("itl_seconds")
"""The one column of a sample that is a list."""

OnProgress = Callable[[float, int], None]


class Worker:
    """One sending process."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "loadtests.worker"]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", bufsize=1
        )
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def order(self, **command: Any) -> None:
        """Send one command. A process that has ended is noticed when its answer is waited for."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(command) + "\n")
            self._child.stdin.flush()

    def answer(self, what: str, *, seconds: float, on_progress: OnProgress | None = None) -> Any:
        """The value of the next message with `what` in it.

        Raises ScenarioError with the process's own words, LoadTestError if it ended or said nothing for so long.
        """
        while True:
            try:
                message = self._messages.get(timeout=seconds)
            except queue.Empty:
                raise LoadTestError(f"a load process said nothing for {seconds:g} s") from None
            if message is None:
                raise LoadTestError(f"a load process ended with exit code {self._child.wait()}; it says why above")
            if "error" in message:
                raise ScenarioError(message["error"])
            if what in message:
                return message[what]
            if on_progress is not None and "progress" in message:
                on_progress(*message["progress"])

    def close(self) -> None:
        """End the process."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._reader.join()
        self._child.stdout.close()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._messages.put(json.loads(line))
        self._messages.put(None)


class Crew:
    """Processes that carry out one scenario after the other: `front` for the measured tenants, `back` for those beside them."""

    def __init__(self, front: Sequence[Worker], back: Sequence[Worker]) -> None:
        self._front = front
        self._back = back

    def run(
        self,
        scenario: Scenario,
        *,
        keys: Keys,
        lexicons: Lexicons,
        places: Places,
        on_progress: OnProgress = lambda share, sent: None,
    ) -> Run:
        """Send the scenario's load; every process starts at the same instant.

        Background tenants go on until the others are done, and are then cut off: what was under way of them is dropped.
        """
        front = _only(scenario, background=False)
        back = _only(scenario, background=True)
        if front is None:
            raise ScenarioError("every tenant is `background`; nothing would ever end the run")
        told = {"places": asdict(places), "lexicons": {n: x.as_dict() for n, x in lexicons.items()}}
        _prepare(self._front, front, keys, told, until_stopped=False)
        beside = self._back if back is not None else ()
        if back is not None:
            _prepare(self._back, back, keys, told, until_stopped=True)
        at = time.perf_counter() + HEAD_START_SECONDS
        for worker in (*self._front, *beside):
            worker.order(do="start", at=at)
        silence = _silence_seconds(scenario)
        measured = [w.answer("done", seconds=silence, on_progress=on_progress) for w in self._front]
        for worker in beside:
            worker.order(do="stop")
        others = [w.answer("done", seconds=silence) for w in beside]
        return merged([_read(done) for done in measured] + [_background(done) for done in others])


@contextmanager
def crew(*, front: int = 1, back: int = 1) -> Iterator[Crew]:
    """Start the processes, and end them with the block."""
    workers = [Worker() for _ in range(front + back)]
    try:
        yield Crew(workers[:front], workers[front:])
    finally:
        for worker in workers:
            worker.close()


def _only(scenario: Scenario, *, background: bool) -> Scenario | None:
    chosen = tuple(tenant for tenant in scenario.tenants if tenant.background is background)
    return scenario.model_copy(update={"tenants": chosen}) if chosen else None


def _prepare(
    workers: Sequence[Worker], scenario: Scenario, keys: Keys, told: Mapping[str, Any], *, until_stopped: bool
) -> None:
    names = {tenant.name for tenant in scenario.tenants}
    for index, worker in enumerate(workers):
        worker.order(
            do="prepare",
            scenario=_plain(scenario),
            keys={name: key for name, key in keys.items() if name in names},
            shard=[index, len(workers)],
            until_stopped=until_stopped,
            **told,
        )
    for worker in workers:
        worker.answer("ready", seconds=READY_SECONDS)


def _plain(scenario: Scenario) -> dict[str, Any]:
    """The scenario without its keys, which travel apart."""
    without = {"tenants": {"__all__": {"api_key", "api_key_env"}}}
    return scenario.model_dump(mode="json", exclude=without)


def _silence_seconds(scenario: Scenario) -> float:
    """Longer than a sending process is ever silent: it tells its progress twice a second, and waits for its last answers."""
    return 2 * scenario.timeout_seconds + 60.0


def _read(done: Mapping[str, Any]) -> Run:
    samples = tuple(_sample(row) for row in done["samples"])
    return Run(samples, quantiles(done["lags"]), done["unfinished"], done["busy_ratio"], tuple(done["lags"]))


def _sample(row: list[Any]) -> Sample:
    row[_GAPS] = tuple(row[_GAPS])
    return Sample(*row)


def _background(done: Mapping[str, Any]) -> Run:
    """What those beside did. Their processes' lag is their own affair, and what was cut off was to be cut off."""
    return Run(_read(done).samples, quantiles([]))
