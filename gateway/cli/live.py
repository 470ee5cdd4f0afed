"""How `sliceway up` shows what happens: a live table on a terminal, lines elsewhere, JSON lines with `--json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table

from gateway.front import Snapshot
from placement.status import ReplicaStatus
from placement.table import ReplicaState

_HEARTBEAT_SECONDS = 15.0
_COLOURS = {
    ReplicaState.READY: "green",
    ReplicaState.FAILED: "bold red",
    ReplicaState.BACKOFF: "yellow",
    ReplicaState.DRAINING: "yellow",
}

Now = Callable[[], datetime]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class View(Protocol):
    """Something that shows snapshots, several times a second."""

    def show(self, snapshot: Snapshot) -> None:
        """Show what is new."""

    def say(self, line: str) -> None:
        """Show one line that stays."""

    def close(self) -> None:
        """Show nothing any more."""


class TerminalView:
    """A table that is redrawn in place while something changes; lines that stay above it."""

    def __init__(self, console: Console, now: Now = _utc_now) -> None:
        self._console = console
        self._now = now
        self._live: Live | None = None
        self._lines = _Changes(now)

    def show(self, snapshot: Snapshot) -> None:
        """Redraw while starting or stopping; afterwards only tell what changes."""
        for notice in snapshot.notices:
            self.say(notice)
        if snapshot.settled and not snapshot.stopping:
            self._end_live(snapshot)
            for line in self._lines.since_last(snapshot):
                self.say(line)
            return
        self._lines.since_last(snapshot)  # the table shows these
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        self._live.update(_picture(snapshot, self._now()))

    def say(self, line: str) -> None:
        """A line above the table."""
        self._console.print(line, highlight=False)

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _end_live(self, snapshot: Snapshot) -> None:
        if self._live is not None:
            self.close()
            self._console.print(_table(snapshot, self._now()))


class PlainView:
    """A line for every change, and one now and then that nothing has changed, so that a log shows life."""

    def __init__(self, console: Console, now: Now = _utc_now) -> None:
        self._console = console
        self._now = now
        self._changes = _Changes(now)
        self._said_at = now()

    def show(self, snapshot: Snapshot) -> None:
        """Tell what is new since the last snapshot."""
        for notice in snapshot.notices:
            self.say(escape(notice))
        for line in self._changes.since_last(snapshot):
            self.say(line)
        if not snapshot.settled and (self._now() - self._said_at).total_seconds() >= _HEARTBEAT_SECONDS:
            self.say(_waiting_for(snapshot, self._now()))

    def say(self, line: str) -> None:
        """One line."""
        self._said_at = self._now()
        self._console.print(line, highlight=False)

    def close(self) -> None:
        """Nothing is open."""


class JsonView:
    """One JSON object per change: `{"event": "replica", ...}` as in `controller.json`, or `{"event": "notice", "text": ...}`."""

    def __init__(self, now: Now = _utc_now) -> None:
        self._changes = _Changes(now)

    def show(self, snapshot: Snapshot) -> None:
        """Tell what is new since the last snapshot."""
        for notice in snapshot.notices:
            self._write({"event": "notice", "text": notice})
        for replica in self._changes.replicas(snapshot):
            self._write({"event": "replica"} | replica.model_dump(mode="json"))

    def say(self, line: str) -> None:
        """A notice."""
        self._write({"event": "notice", "text": line})

    def close(self) -> None:
        """Nothing is open."""

    def _write(self, value: object) -> None:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()


class _Changes:
    """Remembers what was told of each replica."""

    def __init__(self, now: Now) -> None:
        self._now = now
        self._told: dict[str, tuple[object, ...]] = {}
        self._reasons: dict[str, str | None] = {}

    def replicas(self, snapshot: Snapshot) -> list[ReplicaStatus]:
        """Those whose state, stage or reason is another than last time."""
        changed = []
        for replica in snapshot.status.replicas if snapshot.status else ():
            telling = (replica.state, _coarse(replica.stage), replica.reason)
            if self._told.get(replica.replica) != telling:
                self._told[replica.replica] = telling
                changed.append(replica)
        return changed

    def since_last(self, snapshot: Snapshot) -> list[str]:
        """The same as lines. A reason that was told is not told again at every step of the next start."""
        lines = []
        for replica in self.replicas(snapshot):
            known = self._reasons.get(replica.replica) == replica.reason and replica.state is ReplicaState.STARTING
            self._reasons[replica.replica] = replica.reason
            lines.append(_line(replica, self._now(), with_reason=not known))
        return lines


def _coarse(stage: str | None) -> str | None:
    """A stage without its percentage, so that a log has a line per stage and not per percent."""
    return stage.rstrip("%0123456789 ") if stage else None


def _picture(snapshot: Snapshot, now: datetime) -> RenderableType:
    if snapshot.status is None:
        words = "stopping" if snapshot.stopping else "starting the controller and the gateway"
        return Spinner("dots", text=words)
    words = "stopping: requests may finish" if snapshot.stopping else _waiting_for(snapshot, now)
    return Group(_table(snapshot, now), Spinner("dots", text=words))


def _table(snapshot: Snapshot, now: datetime) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("replica", "slice", "cores", "state", "memory", "since", ""):
        table.add_column(name, justify="right" if name in ("memory", "since") else "left")
    for replica in snapshot.status.replicas if snapshot.status else ():
        colour = _COLOURS.get(replica.state, "cyan")
        table.add_row(
            escape(replica.replica),
            escape(replica.slice.id),
            replica.cores,
            f"[{colour}]{replica.state.value}[/]",
            _memory(replica),
            f"{max(0.0, (now - replica.since).total_seconds()):.0f} s",
            escape(replica.stage or replica.reason or ""),
        )
    return table


def _line(replica: ReplicaStatus, now: datetime, *, with_reason: bool) -> str:
    details = [replica.stage, f"pid {replica.engine_pid}" if replica.engine_pid and not replica.stage else None]
    if replica.retry_at:
        details.append(f"again in {max(0.0, (replica.retry_at - now).total_seconds()):.1f} s")
    about = ", ".join(d for d in details if d)
    colour = _COLOURS.get(replica.state, "cyan")
    line = f"{escape(replica.replica)} on {escape(replica.slice.id)}: [{colour}]{replica.state.value}[/]"
    line += f" ({escape(about)})" if about else ""
    if replica.reason and with_reason:
        line += f"\n    {escape(replica.reason)}"
    if replica.remedy and with_reason:
        line += f"\n    [dim]{escape(replica.remedy)}[/]"
    if replica.state is ReplicaState.FAILED:
        line += f"\n    [dim]Its log: {escape(replica.log)}[/]"
    return line


def _waiting_for(snapshot: Snapshot, now: datetime) -> str:
    status = snapshot.status
    if status is None:
        return "waiting for the controller"
    waiting = [r for r in status.replicas if r.state not in (ReplicaState.READY, ReplicaState.FAILED)]
    if not waiting:
        return "waiting for the gateway"
    names = ", ".join(
        f"{r.replica} ({r.stage or r.state.value}, {(now - r.since).total_seconds():.0f} s)" for r in waiting[:4]
    )
    return f"waiting for {escape(names)}" + (f" and {len(waiting) - 4} more" if len(waiting) > 4 else "")


def _memory(replica: ReplicaStatus) -> str:
    if replica.memory_used_bytes is None:
        return f"{replica.memory_bytes / 2**30:.1f} GiB"
    return f"{replica.memory_used_bytes / 2**30:.1f} of {replica.memory_bytes / 2**30:.1f} GiB"
