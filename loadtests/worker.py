"""`python -m loadtests.worker`: a process that sends one part of a load, again and again, as its parent says.

JSON objects, one a line. In: `prepare` (scenario, keys, lexicons, shard, until_stopped), `start` (`at` on the monotonic clock
that processes of one machine share), `stop`, `quit`. Out: `ready`, `progress`, `done` with every sample, `error`. Keys come
this way only, so that they are in no argument list and no file.
"""

from __future__ import annotations

import gevent.monkey

gevent.monkey.patch_all()

# Everything below must see the patched modules.
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from contextlib import suppress  # noqa: E402
from dataclasses import astuple  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402
from gevent.fileobject import FileObjectPosix  # noqa: E402
from gevent.queue import Queue  # noqa: E402

from loadtests.load import Load, Places, Shard  # noqa: E402
from loadtests.problems import ScenarioError  # noqa: E402
from loadtests.run import run  # noqa: E402
from loadtests.scenario import Scenario  # noqa: E402
from loadtests.scenario import environment as process_environment  # noqa: E402
from loadtests.tokens import Lexicon  # noqa: E402

Command = dict[str, Any]


MEASURING_PRIORITY = -10


def main() -> int:
    """Obey until standard input ends."""
    # A ruler that waits for a processor measures the wait. Those who may ask for less of it; others are told how late they were.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, MEASURING_PRIORITY)
    commands: Queue[Command | None] = Queue()
    reader = gevent.spawn(_read, commands)
    load: Load | None = None
    try:
        while (command := commands.get()) is not None and command["do"] != "quit":
            try:
                if command["do"] == "prepare":
                    load = _prepared(command)
                    _say(ready=True)
                elif command["do"] == "start" and load is not None:
                    _carry_out(load, command["at"], commands)
            except ScenarioError as error:
                _say(error=str(error))
    except BrokenPipeError:
        # Nobody is left to tell; what lies in the buffer would be told again on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        reader.kill()
    return 0


def _read(commands: Queue[Command | None]) -> None:
    for line in FileObjectPosix(os.dup(sys.stdin.fileno()), "rb"):
        commands.put(json.loads(line))
    commands.put(None)


def _say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _prepared(command: Command) -> Load:
    return Load(
        Scenario.model_validate(command["scenario"]),
        environment=process_environment(),
        clock=time.perf_counter,
        places=Places(**command["places"]),
        keys=command["keys"],
        lexicons={name: Lexicon(**data) for name, data in command["lexicons"].items()},
        shard=Shard(*command["shard"]),
        until_stopped=command["until_stopped"],
    )


def _carry_out(load: Load, at: float, commands: Queue[Command | None]) -> None:
    """One run, with an ear for `stop`; a parent that is gone means stop as well."""

    def listen() -> None:
        command = commands.get()
        load.stop()
        if command is None:
            commands.put(None)

    ear = gevent.spawn(listen)
    measured = run(load, lambda share, sent: _say(progress=[share, sent]), start_at=at)
    ear.kill()
    _say(
        done={
            "samples": [astuple(sample) for sample in measured.samples],
            "unfinished": measured.unfinished,
            "busy_ratio": measured.busy_ratio,
            "lags": measured.lags,
        }
    )


if __name__ == "__main__":
    raise SystemExit(main())
