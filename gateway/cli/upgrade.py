"""`sliceway upgrade`: the processes of a running `sliceway up` are replaced by those of the version that is installed by now."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import typer

from gateway.cli.locate import ConfigArgument, ConfigOption, required_config
from gateway.cli.output import Json, out, print_json
from gateway.errors import GatewayError
from gateway.processes import UpRecord, read_record
from placement.cluster.here import node_at_work
from placement.locks import holder
from placement.state import StatePaths
from placement.status import read_status

_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 180.0


class NotUpgraded(GatewayError):
    """The processes that serve could not be replaced; they go on."""

    code = "not_upgraded"


def register(app: typer.Typer) -> None:
    """Add `upgrade`."""
    app.command()(upgrade)


def upgrade(config: ConfigArgument = None, config_option: ConfigOption = None, as_json: Json = False) -> None:
    """Replace gateway and controller by the installed version, without a request lost. Engines run on.

    Engines are replaced, one after another, where the configuration or the installed engine asks for others.
    """
    paths = StatePaths(required_config(config_option, config).state)
    up, before = holder(paths.up_lock), read_record(paths.up_record)
    if (node := node_at_work(paths.root)) is not None:
        raise NotUpgraded(
            f"this machine is node {node.name!r} of a cluster",
            where=str(paths.root),
            remedy="All nodes are upgraded one after another, without a request lost: sliceway node upgrade HOST:PORT",
        )
    if up is None or before is None:
        raise NotUpgraded(
            "`sliceway up` does not run here", where=str(paths.root), remedy="Start it: sliceway up CONFIG"
        )
    os.kill(up, signal.SIGUSR1)
    replaced = wait_for(lambda: _replaced(paths, before), time.monotonic, time.sleep)
    if as_json:
        print_json({"replaced": replaced})
    else:
        for name, (old, new) in replaced.items():
            out.print(f"{name}: process {new} in the place of {old}", highlight=False)


def wait_for(
    look: Callable[[], dict[str, tuple[int, int]] | None],
    monotonic: Callable[[], float],
    sleep: Callable[[float], None],
) -> dict[str, tuple[int, int]]:
    """What `look` finds, as soon as it does. Raises NotUpgraded if it does not in time."""
    deadline = monotonic() + _PATIENCE_SECONDS
    while (found := look()) is None:
        if monotonic() > deadline:
            raise NotUpgraded(
                f"the processes were not replaced within {_PATIENCE_SECONDS:g} s; those that serve go on",
                remedy="`sliceway up` says why; gateway.log and controller.log in the state directory have the details.",
            )
        sleep(_POLL_SECONDS)
    return found


def _replaced(paths: StatePaths, before: UpRecord) -> dict[str, tuple[int, int]] | None:
    """Old and new processes, once all have been replaced and the controller is at work."""
    now, status = read_record(paths.up_record), read_status(paths.controller_status)
    if now is None or status is None:
        return None
    pids = {name: (row.pid, now.processes[name].pid) for name, row in before.processes.items() if name in now.processes}
    done = all(old != new for old, new in pids.values()) and status.pid == now.processes["controller"].pid
    return pids if done else None
