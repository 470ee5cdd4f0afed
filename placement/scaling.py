"""Autoscaling as a controller does it: figures from gateways in, numbers of replicas out, and both kept in the state directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from model_registry.atomic import write_atomically
from model_registry.errors import SlicewayError
from model_registry.sizing.throughput import THROUGHPUT_FILE, Throughput, ThroughputStore
from placement.assign import stem_of
from placement.autoscale import Choice, ScaledModel, Scaler, Signals
from placement.autoscale.capacity import UNKNOWN, Capacity, capacity_on, together
from placement.autoscale.scaler import scaled_models
from placement.figures import fresh_for, read_figures
from placement.goals import Goals, PlacementConfig
from placement.launch import SizedModel
from placement.repartitioning import Wish
from placement.replicas.parts import Goal
from placement.state import StatePaths
from placement.status import ScalingRow
from placement.transition.journal import JOURNAL_FILE, TransitionJournal
from placement.workload.measured import Measured

log = logging.getLogger(__name__)

Stamp = tuple[int, int] | None
"""Which state of a file it is: when it was changed, and its size; None where there is none."""


@dataclass(frozen=True, slots=True)
class ThroughputFile:
    """What `sliceway bench capacity` has kept; a file that makes no sense is said in the log and counts as empty."""

    path: Path

    @property
    def stamp(self) -> Stamp:
        """Which state of the file is there."""
        try:
            told = self.path.stat()
        except OSError:
            return None
        return told.st_mtime_ns, told.st_size

    def read(self) -> tuple[Throughput, ...]:
        """Its records."""
        try:
            return ThroughputStore(self.path).all()
        except (SlicewayError, OSError) as error:
            log.warning("scaling by estimates alone: %s", error)
            return ()


def _unknown_version(_: Goal) -> str | None:
    """Nobody knows."""
    return None


class Scaling:
    """The numbers of replicas that demand asks for, on one machine.

    Where `on` is False (a node of a cluster, whose head decides) nothing is ever asked for beyond what is configured.
    """

    def __init__(
        self,
        paths: StatePaths,
        *,
        on: bool = True,
        versions: Callable[[Goal], str | None] = _unknown_version,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`versions` tells the version of the engine that a goal starts, None where that is not known."""
        self._paths = paths
        self._on = on
        self._scaler = Scaler(_read(paths) if on else None)
        self._models: tuple[ScaledModel, ...] = ()
        self._throughput = ThroughputFile(paths.root / THROUGHPUT_FILE)
        self._stamp: Stamp = None
        self._versions = versions
        self._now = now
        self._goals: Goals | None = None
        self._window = 60.0
        self._capacities: Mapping[str, Capacity] = {}
        self._signals: Mapping[str, Signals] = {}

    def numbers(self, config: PlacementConfig) -> Mapping[str, int]:
        """How many replicas of each scaled model should run under `config`. Changes nothing: `config` may yet be refused."""
        known = self._scaler.replicas
        return {m.name: m.bounded(known.get(m.name, m.least)) for m in self._scaled(config)}

    def adopt(self, config: PlacementConfig, goals: Goals | None = None) -> None:
        """`config` counts from here on. `goals` are what comes of it: what replicas bear depends on their slices."""
        self._goals = goals
        self._window = config.fleet.autoscale.window
        self._measure(stamp=self._throughput.stamp)
        self._models = self._scaled(config)
        self._scaler.follow(self._models)
        self._keep()

    def look(self, config: PlacementConfig, *, now_seconds: float, wall_seconds: float) -> bool:
        """Look at the gateways' figures and decide; True if a number has changed. Reads files.

        `now_seconds` is monotonic, `wall_seconds` since 1970. Without a gateway that tells anything, nothing changes, and
        neither does it while a transition is under way: what it starts and stops for a while is nobody's decision.
        """
        if not self._models or self.held:
            return False
        if (stamp := self._throughput.stamp) != self._stamp:
            self._measure(stamp=stamp)
            self._models = self._scaled(config)
        policy = config.fleet.autoscale
        signals = read_figures(self._paths.figures, wall_seconds, fresh_seconds=fresh_for(policy))
        if signals is None:
            return False
        self._signals = signals
        told = {m.name: signals.get(m.name, Signals()) for m in self._models if m.name in signals}
        changes = self._scaler.look(policy, self._models, told, now_seconds)
        for change in changes:
            log.info("%s", change)
        if changes:
            self._keep()
        return bool(changes)

    @property
    def held(self) -> bool:
        """Whether a transition is under way, whose steps come first."""
        return TransitionJournal(self._paths.root / JOURNAL_FILE).in_progress() is not None

    def wish(self) -> Wish:
        """What demand asks for at this moment, as it is weighed against what cutting GPUs anew would disturb."""
        numbers = {m.name: self._scaler.replicas.get(m.name, m.least) for m in self._models}
        seen = {name: self._signals.get(name, Signals()) for name in numbers}
        window = self._window
        return Wish(
            replicas=numbers,
            arrivals_per_second={n: s.arrivals_per_second + s.queued / window for n, s in seen.items()},
            running={n: s.running for n, s in seen.items()},
        )

    def short(self, goals: Goals) -> bool:
        """Whether replicas that demand asks for have no slice."""
        return any(row.short for row in self.rows(goals).values())

    def rows(self, goals: Goals, sleep: Mapping[str, Choice] | None = None) -> dict[str, ScalingRow]:
        """What was decided, model by model, and what of it has a slice."""
        rows: dict[str, ScalingRow] = {}
        wish = self.wish()
        for model in self._models:
            asked = self._scaler.replicas.get(model.name, model.least)
            placed = sum(
                stem_of(name) == model.name and not goal.asleep and goal.in_place_of is None
                for name, goal in goals.replicas.items()
            )
            choice = (sleep or {}).get(model.name)
            capacity = self._capacities.get(model.name, UNKNOWN)
            rows[model.name] = ScalingRow(
                replicas=asked,
                placed=placed,
                least=model.least,
                most=model.most,
                reason=self._scaler.reason(model.name),
                arrivals_per_second=wish.arrivals_per_second.get(model.name, 0.0),
                running=wish.running.get(model.name, 0),
                requests_per_replica=capacity.requests_per_second,
                capacity_source=capacity.origin,
                capacity_reason=capacity.reason,
                sleep=f"{choice.sleep}: {choice.reason}" if choice else None,
                ignored=capacity.ignored,
            )
        return rows

    def _scaled(self, config: PlacementConfig) -> tuple[ScaledModel, ...]:
        rates = {name: capacity.requests_per_second for name, capacity in self._capacities.items()}
        # In the middle of a transition seats tell what moves, not what was planned.
        seats = None if self.held else config.seats
        return scaled_models(config.models, seats, config.pools, rates) if self._on else ()

    def _measure(self, *, stamp: Stamp) -> None:
        """Work out anew what one replica of each pool bears, where it runs or could."""
        self._stamp, goals = stamp, self._goals
        if goals is None or not self._on:
            return
        records = self._throughput.read()
        found: dict[str, Capacity] = {}
        for model in scaled_models(goals.config.models, None, goals.config.pools):
            sized = goals.models.get(model.name.partition("@")[0])
            if sized is not None:
                found[model.name] = self._capacity(goals, model.name, sized, records)
        self._capacities = found

    def _capacity(self, goals: Goals, pool: str, sized: SizedModel, records: tuple[Throughput, ...]) -> Capacity:
        mine = [goal for name, goal in goals.replicas.items() if stem_of(name) == pool]
        slices = [goal.slice for goal in mine] or goals.fitting(sized.config.name)[:1]
        version = next((v for goal in mine if (v := self._versions(goal))), None)
        told = [
            capacity_on(
                sized,
                one,
                goals.fits[sized.config.name, one.id],
                Measured(
                    throughput=tuple(r for r in records if r.simulated == one.simulated),
                    engine_version=version,
                    now=self._now(),
                ),
            )
            for one in slices
            if (sized.config.name, one.id) in goals.fits
        ]
        return together(told)

    def _keep(self) -> None:
        """For the next controller: it must not begin by stopping what is needed."""
        if not self._models and not self._paths.autoscale.exists():
            return
        try:
            write_atomically(self._paths.autoscale, json.dumps({"replicas": dict(self._scaler.replicas)}).encode())
        except OSError as error:
            log.error("what autoscaling decided on cannot be written down: %s", error)


def _read(paths: StatePaths) -> dict[str, int]:
    """The numbers that were decided on last. A file that makes no sense says nothing: the configured least runs then."""
    try:
        raw = json.loads(paths.autoscale.read_bytes())["replicas"]
        return {str(name): number for name, number in raw.items() if isinstance(number, int) and number >= 0}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
