"""What is done of a transition, on disk, so that whoever comes next goes on where the last one was killed.

Written before the first step and after every step, each time the whole file or nothing. A step may have been done without
having been noted: steps are idempotent, and are looked at before they are taken.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from model_registry.atomic import write_atomically
from model_registry.errors import SlicewayError
from placement.errors import PlanError
from placement.replicas.procfs import ProcessIdentity
from placement.transition.steps import Dip, Step, Transition

JOURNAL_FILE = "transition.json"
"""Its name in the state directory."""

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Record:
    """A transition under way. `done` are numbers of steps; `failed` is the step that stopped it, and why."""

    transition: Transition
    started_at: datetime
    done: frozenset[int] = frozenset()
    failed: tuple[int, Mapping[str, str | None]] | None = None

    @property
    def finished(self) -> bool:
        """Whether every step is done."""
        return len(self.done) == len(self.transition.steps)

    @property
    def left(self) -> tuple[Step, ...]:
        """The steps that are not done."""
        return tuple(s for s in self.transition.steps if s.number not in self.done)

    def with_done(self, number: int) -> Record:
        """One step further."""
        return replace(self, done=self.done | {number})

    def with_failure(self, number: int, error: SlicewayError) -> Record:
        """Stopped at a step."""
        return replace(self, failed=(number, error.as_dict()))

    def again(self) -> Record:
        """The same, to be tried once more."""
        return replace(self, failed=None)


@dataclass(frozen=True, slots=True)
class TransitionJournal:
    """The record of one state directory; at most one transition is under way there."""

    path: Path

    def read(self) -> Record | None:
        """What is under way; None if nothing is. Raises PlanError for a file that makes no sense."""
        try:
            raw = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._damaged() from error
        try:
            return record_of(raw)
        except (KeyError, TypeError, ValueError, SlicewayError) as error:
            raise self._damaged() from error

    def write(self, record: Record) -> None:
        """Replace what is noted, with who is at it."""
        me = ProcessIdentity.of(os.getpid())
        by = [me.pid, me.start_ticks, me.boot_id] if me is not None else None
        write_atomically(self.path, json.dumps(public_record(record) | {"by": by}).encode(), mode=0o600)

    def in_progress(self) -> Record | None:
        """What somebody carries out at this moment; None where nothing is under way, or whoever was at it has ended or
        given up. Nothing is raised for a file that makes no sense.
        """
        try:
            raw = json.loads(self.path.read_bytes())
            record, by = record_of(raw), ProcessIdentity(*raw["by"])
        except (OSError, ValueError, KeyError, TypeError, SlicewayError):
            return None
        return record if record.failed is None and by.alive else None

    def clear(self) -> None:
        """Nothing is under way."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _damaged(self) -> PlanError:
        return PlanError(
            "the record of a transition under way cannot be read",
            where=str(self.path),
            remedy="Remove the file and plan again: the plan starts from what the GPUs hold, so nothing is lost but the order.",
        )


def public_record(record: Record) -> dict[str, object]:
    """What is written down of it."""
    transition = record.transition
    return {
        "version": _VERSION,
        "started_at": record.started_at.isoformat(),
        "fingerprint": transition.fingerprint,
        "target": transition.target,
        "wanted": transition.wanted,
        "steps": [s.as_public() for s in transition.steps],
        "seats": dict(transition.seats),
        "before": dict(transition.before),
        "guaranteed": dict(transition.guaranteed),
        "dips": [[d.demand, d.guaranteed, d.lowest] for d in transition.dips],
        "done": sorted(record.done),
        "failed": {"step": record.failed[0], "error": dict(record.failed[1])} if record.failed else None,
    }


def record_of(raw: Mapping[str, Any]) -> Record:
    """The inverse of `public_record`. Raises KeyError, TypeError, ValueError or SlicewayError for what is no record."""
    if raw["version"] != _VERSION:
        raise ValueError(f"version {raw['version']}")
    transition = Transition(
        steps=tuple(Step.of_public(s) for s in raw["steps"]),
        fingerprint=raw["fingerprint"],
        target=raw["target"],
        wanted=raw.get("wanted", ""),
        seats=raw["seats"],
        before=raw["before"],
        guaranteed=raw["guaranteed"],
        dips=tuple(Dip(*d) for d in raw["dips"]),
    )
    numbers = [s.number for s in transition.steps]
    done = frozenset(int(n) for n in raw["done"])
    if numbers != list(range(len(numbers))) or not done <= set(numbers):
        raise ValueError("its steps are not in order")
    failed = (int(raw["failed"]["step"]), raw["failed"]["error"]) if raw["failed"] else None
    return Record(transition, datetime.fromisoformat(raw["started_at"]), done, failed)
