"""Errors of the placement layer.

PlacementError
├── InventoryError      the host's slices could not be read
├── NoFreeSlice         more replicas than slices that fit them
├── SliceTaken          two replicas were pinned to one slice
├── EngineMissing       no interpreter with a vLLM in it
├── EngineInstallFailed the engine's environment could not be made
├── StateLocked         another controller holds the state directory
├── TableUnreadable     the routing table on disk is damaged
└── SimulatorError      a simulated machine could not be made or used
"""

from __future__ import annotations

from model_registry.errors import SlicewayError


class PlacementError(SlicewayError):
    """A replica could not be put where it should run."""

    code = "placement_error"


class InventoryError(PlacementError):
    """The host's slices could not be read."""

    code = "inventory_error"


class NoFreeSlice(PlacementError):
    """A replica fits no slice that is left. The remedy names the smallest change that would help."""

    code = "no_free_slice"


class SliceTaken(PlacementError):
    """Two replicas were pinned to the same slice."""

    code = "slice_taken"


class EngineMissing(PlacementError):
    """No interpreter with a vLLM in it was found for this kind of slice."""

    code = "engine_missing"


class EngineInstallFailed(PlacementError):
    """The engine's environment could not be made; nothing half-made is left."""

    code = "engine_install_failed"


class StateLocked(PlacementError):
    """Another controller already works on this state directory."""

    code = "state_locked"


class TableUnreadable(PlacementError):
    """The routing table on disk is missing, damaged or of another version."""

    code = "table_unreadable"


class SimulatorError(PlacementError):
    """A simulated machine could not be made, or does not allow what was asked of it."""

    code = "simulator_error"
