"""How long models took to start and to wake from sleep mode, by kind of slice, kept for choosing between the two."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from model_registry.atomic import write_atomically
from placement.planner.types import WHOLE_GPU
from placement.replicas.parts import Goal, Learned
from placement.slices import Slice, SliceKind

log = logging.getLogger(__name__)

WAKE_TIMES_FILE = "wake_times.json"
"""Its name in the state directory."""


@dataclass(slots=True)
class WakeTimes:
    """The last seconds of each kind, in one file. A file that makes no sense counts as empty; times are learnt again."""

    path: Path
    _known: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            raw = json.loads(self.path.read_bytes())
            self._known = {str(k): {str(n): float(s) for n, s in v.items()} for k, v in raw.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self._known = {}

    def learn(self, goal: Goal, what: Learned, seconds: float) -> None:
        """Keep what was seen. Never raises for a file that cannot be written: what serves goes on."""
        times = dict(self.of(goal.model, goal.slice))
        if what == "wake":
            times.pop("no_wake", None)
        times[what] = round(seconds, 3)
        self._known[_key(goal.model, goal.slice)] = times
        try:
            write_atomically(self.path, json.dumps(self._known).encode(), mode=0o600)
        except OSError as error:
            log.warning("how long %s took is not kept: %s", goal.replica, error)

    def of(self, model: str, target: Slice) -> Mapping[str, float]:
        """Seconds by kind: `start`, `wake`, and `no_wake` (0) where the last wake failed."""
        return self._known.get(_key(model, target), {})

    def starts(self) -> dict[tuple[str, str, str], float]:
        """The last start's seconds by model, product and profile (`gpu` for a whole card), on GPUs."""
        found: dict[tuple[str, str, str], float] = {}
        for key, times in self._known.items():
            model, _, there = key.rpartition(" on ")
            kind, _, there = there.partition(" ")
            product, _, profile = there.rpartition(" ")
            if "start" in times and product:
                found[model, product, WHOLE_GPU if kind == SliceKind.GPU else profile] = times["start"]
        return found


def _key(model: str, target: Slice) -> str:
    product = target.gpu.product if target.gpu else ""
    return f"{model} on {target.kind} {product} {target.profile or len(target.cores)}"
