"""Autoscaling as a controller does it: figures from gateways in, numbers of replicas out, and both kept in the state directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence

from model_registry.atomic import write_atomically
from model_registry.catalogue import load_catalogue
from model_registry.errors import SlicewayError
from placement.autoscale import ScaledModel, Scaler, Signals
from placement.autoscale.scaler import scaled_models
from placement.figures import FRESH_SECONDS, read_figures
from placement.goals import Goals, PlacementConfig
from placement.partition.select import GpuSelection, selected
from placement.reservations import RESERVATIONS_FILE, Reservations
from placement.slices import Inventory
from placement.state import StatePaths
from placement.status import ScalingRow

log = logging.getLogger(__name__)

_INTERVALS = 3


class Scaling:
    """The numbers of replicas that demand asks for, on one machine.

    Where `on` is False (a node of a cluster, whose head decides) nothing is ever asked for beyond what is configured.
    """

    def __init__(self, paths: StatePaths, *, on: bool = True) -> None:
        self._paths = paths
        self._on = on
        self._scaler = Scaler(_read(paths) if on else None)
        self._models: tuple[ScaledModel, ...] = ()

    def numbers(self, config: PlacementConfig) -> Mapping[str, int]:
        """How many replicas of each scaled model should run under `config`. Changes nothing: `config` may yet be refused."""
        known = self._scaler.replicas
        return {m.name: m.bounded(known.get(m.name, m.least)) for m in self._scaled(config)}

    def adopt(self, config: PlacementConfig) -> None:
        """`config` counts from here on."""
        self._models = self._scaled(config)
        self._scaler.follow(self._models)
        self._keep()

    def look(self, config: PlacementConfig, *, now_seconds: float, wall_seconds: float) -> bool:
        """Look at the gateways' figures and decide; True if a number has changed. Reads files.

        `now_seconds` is monotonic, `wall_seconds` since 1970. Without a gateway that tells anything, nothing changes.
        """
        if not self._models:
            return False
        policy = config.fleet.autoscale
        fresh_seconds = max(FRESH_SECONDS, _INTERVALS * policy.look_every)
        signals = read_figures(self._paths.figures, wall_seconds, fresh_seconds=fresh_seconds)
        if signals is None:
            return False
        told = {m.name: signals.get(m.name, Signals()) for m in self._models if m.name in signals}
        changes = self._scaler.look(policy, self._models, told, now_seconds)
        for change in changes:
            log.info("%s", change)
        if changes:
            self._keep()
        return bool(changes)

    def rows(self, goals: Goals) -> dict[str, ScalingRow]:
        """What was decided, model by model, and what of it has a slice."""
        rows: dict[str, ScalingRow] = {}
        for model in self._models:
            asked = self._scaler.replicas.get(model.name, model.least)
            placed = sum(goal.model == model.name for goal in goals.replicas.values())
            rows[model.name] = ScalingRow(
                replicas=asked,
                placed=placed,
                least=model.least,
                most=model.most,
                reason=self._scaler.reason(model.name),
            )
        return rows

    def _scaled(self, config: PlacementConfig) -> tuple[ScaledModel, ...]:
        return scaled_models(config.models, config.seats) if self._on else ()

    def _keep(self) -> None:
        """For the next controller: it must not begin by stopping what is needed."""
        if not self._models and not self._paths.autoscale.exists():
            return
        try:
            write_atomically(self._paths.autoscale, json.dumps({"replicas": dict(self._scaler.replicas)}).encode())
        except OSError as error:
            log.error("what autoscaling decided on cannot be written down: %s", error)


def barred(config: PlacementConfig, inventory: Inventory, paths: StatePaths) -> frozenset[str]:
    """The slices that demand gets nothing of: reserved for other work, or on a cordoned GPU. All, where nobody can tell."""
    try:
        reserved: Collection[str] = Reservations(paths.root / RESERVATIONS_FILE).read()
        cordoned = _cordoned(config, inventory)
    except SlicewayError as error:
        log.warning("no replica is added for demand: %s", error)
        return frozenset(inventory.by_id)
    return frozenset(s.id for s in inventory.slices if s.id in reserved or (s.gpu and s.gpu.uuid in cordoned))


def _cordoned(config: PlacementConfig, inventory: Inventory) -> Sequence[str]:
    if not config.fleet.cordon:
        return ()
    rule = GpuSelection(gpus=config.fleet.cordon)
    return [g.uuid for g in selected(inventory.gpus, rule, "fleet.cordon", load_catalogue())]


def _read(paths: StatePaths) -> dict[str, int]:
    """The numbers that were decided on last. A file that makes no sense says nothing: the configured least runs then."""
    try:
        raw = json.loads(paths.autoscale.read_bytes())["replicas"]
        return {str(name): number for name, number in raw.items() if isinstance(number, int) and number >= 0}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
