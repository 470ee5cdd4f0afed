"""Plans learn from starts: what an engine said about its memory counts instead of the estimate, on slices of that size.

The registry that planning asks is wrapped, so nothing above or below it knows. On a CPU engines say nothing to learn from.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from model_registry.errors import RegistryError
from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from model_registry.sizing.calibration import (
    Calibration,
    CalibrationKey,
    CalibrationStore,
    calibrate,
    calibrated,
    read_engine_log,
)
from placement.goals import Registry
from placement.launch import SizedModel
from placement.slices import Slice, SliceKind

log = logging.getLogger(__name__)


class CalibratedRegistry:
    """A registry whose fits use measured figures where `store` has them. Reads the store once, when it is made.

    A store that cannot be read is said in the log and counts as empty: estimates are better than no service.
    """

    def __init__(self, registry: Registry, store: CalibrationStore) -> None:
        self._registry = registry
        self._store = store
        self._sized: dict[str, SizedModel] = {}
        try:
            self._records = {r.key: r for r in store.all()}
        except (RegistryError, OSError) as error:
            log.warning("planning with estimates alone: %s", error)
            self._records = {}

    def describe(self, model: ModelConfig) -> SizedModel:
        """As the registry below."""
        sized = self._registry.describe(model)
        self._sized[model.name] = sized
        return sized

    def fit(self, sized: SizedModel, target: Slice) -> SliceFit:
        """As the registry below, by what was measured on a slice of this size with these flags."""
        key = _key(sized, target)
        record = self._records.get(key) if key else None
        if record is None or sized.footprint is None:
            return self._registry.fit(sized, target)
        return self._registry.fit(replace(sized, footprint=calibrated(sized.footprint, record)), target)

    def learn(self, model: str, target: Slice, text: str) -> Calibration | None:
        """Keep what the engine of `model` on `target` said in its log `text`; None where it said nothing to keep.

        Never raises for a store that cannot be written: what serves goes on.
        """
        sized = self._sized.get(model)
        key = _key(sized, target) if sized else None
        if sized is None or key is None or sized.limits is None or sized.footprint is None:
            return None
        found = self._registry.fit(sized, target)
        record = calibrate(
            key,
            sized.limits,
            sized.footprint,
            read_engine_log(text.splitlines()),
            utilization=_utilization(found.engine_args),
            product=target.gpu.product if target.gpu else None,
            profile=target.profile,
        )
        if record is None or record == self._records.get(key):
            return record
        self._records[key] = record
        try:
            self._store.put(record)
        except (RegistryError, OSError) as error:
            log.warning("what %s measured on %s is not kept: %s", model, target.id, error)
        return record


def _key(sized: SizedModel, target: Slice) -> CalibrationKey | None:
    """None where nothing can be learnt: on a CPU, and of an engine that is not vLLM."""
    if target.kind is SliceKind.CPU or sized.limits is None:
        return None
    name = f"{sized.source}@{sized.config.revision}" if sized.config.revision else sized.source
    return CalibrationKey.of(name, target.memory_bytes, sized.limits)


def _utilization(arguments: tuple[str, ...]) -> float | None:
    if "--gpu-memory-utilization" not in arguments:
        return None
    return float(arguments[arguments.index("--gpu-memory-utilization") + 1])
