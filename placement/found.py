"""What runs against what should run: engines that a controller finds when it starts, and its own replicas under new goals. Pure."""

from __future__ import annotations

from model_registry.errors import RegistryError
from placement.errors import EngineMissing
from placement.goals import Goals
from placement.replicas.journal import JournalEntry
from placement.replicas.parts import Goal
from placement.replicas.replica import Replica
from placement.table import ReplicaState


def keeps(goal: Goal, entry: JournalEntry) -> bool:
    """Whether an engine that was found is what `goal` asks for, or served in its place and may wait until it is replaced."""
    if goal.slice.id != entry.slice_id:
        return False
    if goal.spec is None or goal.spec_hash == entry.spec_hash:
        return True
    return entry.ready_at is not None and entry.place_hash == goal.spec.place_hash


def kept_as_found(entry: JournalEntry, goals: Goals) -> Goal | None:
    """A goal for an engine that could not be started at the moment (the hub is down, say) but runs: it goes on as it is."""
    target = goals.inventory.by_id.get(entry.slice_id)
    if target is None or not isinstance(goals.unplaced.get(entry.replica), (RegistryError, EngineMissing)):
        return None
    return Goal(entry.replica, entry.model, entry.task, target, max_num_seqs=None, spec=None)


def unchanged(replica: Replica, goal: Goal) -> bool:
    """Whether the replica already is, or is becoming, what `goal` asks for. One that has failed is tried again."""
    if replica.view.state in (ReplicaState.FAILED, ReplicaState.STOPPED):
        return False
    return replica.goal.slice.id == goal.slice.id and replica.running_hash == goal.spec_hash


def cannot_rest(replica: Replica) -> bool:
    """Whether a replica that was to sleep has no engine that does: then it gives its slice back."""
    if not replica.goal.asleep:
        return False
    return replica.view.can_sleep is False or replica.view.state is ReplicaState.STOPPED
