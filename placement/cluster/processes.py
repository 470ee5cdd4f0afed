"""The controller and the gateway of one node, as processes that outlive the agent."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from model_registry.atomic import write_atomically
from placement.cluster.members import Owner
from placement.cluster.node import NodePaths
from placement.cluster.seats import owner_lives
from placement.replicas.procfs import ProcessIdentity

log = logging.getLogger(__name__)

_KILL_SECONDS = 10.0


class LocalProcesses:
    """Starts `command`'s sub-commands in sessions of their own, and finds them again by what it wrote down.

    `command` is what `sliceway` is on this machine. `environ` is theirs.
    """

    def __init__(self, paths: NodePaths, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self._paths = paths
        self._command = tuple(command)
        self._environ = dict(environ)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._replaced: list[subprocess.Popen[bytes]] = []

    def ensure_controller(self, config: Path, seats: Path) -> None:
        """Have one controller run on this configuration and these seats."""
        self._ensure("controller", "controller", str(config), "--seats", str(seats))

    def reload_controller(self) -> None:
        """Have it read its configuration again."""
        self._signal("controller", signal.SIGHUP)

    def ensure_gateway(self, config: Path) -> None:
        """Have one gateway run on this configuration. One that nobody knows of any more is replaced, and loses no request."""
        self._ensure("gateway", *_gateway(config))

    def reload_gateway(self) -> None:
        """Have it read its configuration again."""
        self._signal("gateway", signal.SIGHUP)

    def renew(self) -> None:
        """Replace both by new processes, of the program as it is installed by now, while engines run and requests go on.

        The gateway hands its socket over and ends by itself; the controller may be killed at any moment.
        """
        if self._found("gateway") is not None:
            self._start("gateway", *_gateway(self._paths.gateway_config))
        controller = self._found("controller")
        if controller is not None:
            self._signal("controller", signal.SIGKILL)
            ends(controller, _KILL_SECONDS)
            self.ensure_controller(self._paths.controller_config, self._paths.seats)

    def stop(self, *, seconds: float) -> None:
        """End the gateway, then the controller with its engines; what does not end in time is killed."""
        for retiring in self._replaced:
            retiring.terminate()
        for name in ("gateway", "controller"):
            self._signal(name, signal.SIGTERM)
            found = self._found(name)
            if found is None:
                continue
            if not ends(found, seconds):
                log.warning("the %s did not end within %g s", name, seconds)
                self._signal(name, signal.SIGKILL)
            self._record(name).unlink(missing_ok=True)

    def _ensure(self, name: str, *arguments: str) -> None:
        if self._found(name) is None:
            self._start(name, *arguments)

    def _start(self, name: str, *arguments: str) -> None:
        logs = self._paths.root / "logs"
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (logs / f"{name}.log").open("ab") as output:
            child = subprocess.Popen(
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environ,
                start_new_session=True,
            )
        if (before := self._children.get(name)) is not None:
            self._replaced.append(before)
        self._children[name] = child
        identity = ProcessIdentity.of(child.pid)
        if identity is not None:  # one that has ended already is started again by the next order
            owner = Owner(pid=identity.pid, start_ticks=identity.start_ticks, boot_id=identity.boot_id)
            write_atomically(self._record(name), owner.model_dump_json().encode(), mode=0o600)

    def _found(self, name: str) -> Owner | None:
        """The process that was started last, if it still runs."""
        self._reap(name)
        try:
            owner = Owner.model_validate(json.loads(self._record(name).read_bytes()))
        except (OSError, ValueError):
            return None
        return owner if owner_lives(owner) else None

    def _signal(self, name: str, number: signal.Signals) -> None:
        found = self._found(name)
        if found is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found.pid, number)

    def _reap(self, name: str) -> None:
        child = self._children.get(name)
        if child is not None and child.poll() is not None:
            del self._children[name]
        self._replaced = [one for one in self._replaced if one.poll() is None]

    def _record(self, name: str) -> Path:
        return self._paths.root / f"{name}.pid.json"


def _gateway(config: Path) -> tuple[str, ...]:
    return "gateway", str(config), "--take-over"


def ends(owner: Owner, seconds: float) -> bool:
    """Whether the process ends within the time."""
    try:
        pidfd = os.pidfd_open(owner.pid)
    except OSError:
        return True
    try:
        return bool(select.select([pidfd], [], [], seconds)[0]) or not owner_lives(owner)
    finally:
        os.close(pidfd)
