"""Errors of the placement layer.

PlacementError
├── InventoryError      the host's slices could not be read
├── NoFreeSlice         more replicas than slices that fit them
│   └── NoSliceApart        the slices that are left are too close to another replica of the model
├── SliceTaken          two replicas were pinned to one slice
├── EngineMissing       no interpreter with a vLLM in it
├── EngineInstallFailed the engine's environment could not be made
├── EngineTlsError      TLS between gateway and engine could not come about
├── StateLocked         another controller holds the state directory
├── TableUnreadable     the routing table on disk is damaged
├── NotCarriedOut       an order to a single replica did not come about
│   └── NoSuchReplica       the order names a replica that the controller does not have
├── SimulatorError      a simulated machine could not be made or used
│   └── WrongFleet          what a simulated machine is to have makes no sense
├── PlanError           a fleet could not be planned
│   ├── StalePlan           the fleet is no longer the one that the plan was made from
│   └── TransitionBlocked   no order of steps keeps every model at what it is guaranteed
└── PartitionError      a GPU could not be cut as was asked
    ├── NotPrivileged       only root, or who was given the right, may do or read this
    ├── SliceInUse          something runs on what would have to go
    ├── ModeChangeNeeded    MIG mode would have to be switched, which was not allowed
    ├── ModeBlocked         something keeps MIG mode from being switched
    ├── CannotBeCut         no MIG on this GPU, or not with this driver
    └── GpuLost             the GPU has fallen off the bus
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


class NoSliceApart(NoFreeSlice):
    """Slices that would do are on GPUs or nodes that have a replica of the model already, and `spread` allows one."""

    code = "no_slice_apart"


class SliceTaken(PlacementError):
    """Two replicas were pinned to the same slice."""

    code = "slice_taken"


class EngineMissing(PlacementError):
    """No interpreter with a vLLM in it was found for this kind of slice."""

    code = "engine_missing"


class EngineInstallFailed(PlacementError):
    """The engine's environment could not be made; nothing half-made is left."""

    code = "engine_install_failed"


class EngineTlsError(PlacementError):
    """A certificate, key or authority of `engine.tls` cannot be used, or they do not go together."""

    code = "engine_tls_error"


class StateLocked(PlacementError):
    """Another controller already works on this state directory."""

    code = "state_locked"


class TableUnreadable(PlacementError):
    """The routing table on disk is missing, damaged or of another version."""

    code = "table_unreadable"


class NotCarriedOut(PlacementError):
    """An order was given to a controller and did not come about in time. It stays in force."""

    code = "not_carried_out"


class NoSuchReplica(NotCarriedOut):
    """An order names a replica that the controller does not have; no order was given."""

    code = "unknown_replica"


class SimulatorError(PlacementError):
    """A simulated machine could not be made, or does not allow what was asked of it."""

    code = "simulator_error"


class WrongFleet(SimulatorError):
    """The GPUs that were named for a simulated machine are no machine: a count, a total, or a product without geometry."""

    code = "wrong_fleet"


class PlanError(PlacementError):
    """A fleet could not be planned: the question contradicts itself, or no answer was found in the time allowed."""

    code = "plan_error"


class StalePlan(PlanError):
    """The fleet is not the one that the plan was made from. The message names what is different."""

    code = "stale_plan"


class TransitionBlocked(PlanError):
    """No order of steps keeps every model at what it is guaranteed. The message names the models and what they would have."""

    code = "transition_blocked"


class PartitionError(PlacementError):
    """A GPU could not be cut as was asked. What it holds afterwards is read from the driver and told with this."""

    code = "partition_error"


class NotPrivileged(PartitionError):
    """Creating, destroying or enumerating GPU instances, or switching MIG mode, takes a right that this user lacks."""

    code = "not_privileged"


class SliceInUse(PartitionError):
    """Something runs on an instance that would have to go. The message lists the processes."""

    code = "slice_in_use"


class ModeChangeNeeded(PartitionError):
    """MIG mode would have to be switched (or the GPU reset), and nobody allowed it."""

    code = "mode_change_needed"


class ModeBlocked(PartitionError):
    """MIG mode cannot be switched while something holds the GPU; the message names it."""

    code = "mode_blocked"


class CannotBeCut(PartitionError):
    """The GPU has no MIG, or its driver is too old for it, or nobody knows where its profiles start."""

    code = "cannot_be_cut"


class GpuLost(PartitionError):
    """The GPU does not answer any more."""

    code = "gpu_lost"
