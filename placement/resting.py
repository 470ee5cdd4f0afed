"""Which replicas of models that nobody asks for sleep in their place instead of being stopped, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from placement.assign import natural, stem_of
from placement.autoscale import Choice, WakeFigures, choose_sleep
from placement.cgroup import ControlGroup
from placement.goals import Goals
from placement.policy import AutoscalePolicy
from placement.replicas.journal import JournalEntry
from placement.replicas.replica import Replica
from placement.slices import Slice
from placement.table import ReplicaState
from placement.wake_times import WakeTimes

_AWAKE = (ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.ASLEEP)
_HALF = 2


@dataclass(frozen=True, slots=True)
class Rester:
    """A replica that could sleep: what runs, where, and whether it sleeps already. `slice` None: not known any more."""

    replica: str
    model: str
    spec_hash: str
    asleep: bool
    can_sleep: bool | None
    slice: Slice | None = None

    @classmethod
    def of(cls, replica: Replica) -> Rester | None:
        """A replica that serves, or sleeps; None for any other."""
        hash_, view = replica.running_hash, replica.view
        if hash_ is None or view.state not in _AWAKE or not replica.goal.may_sleep:
            return None
        asleep = view.state is ReplicaState.ASLEEP
        return cls(replica.goal.replica, replica.goal.model, hash_, asleep, view.can_sleep, replica.goal.slice)

    @classmethod
    def found(cls, entry: JournalEntry) -> Rester | None:
        """An engine that a controller before this one has put to sleep; None for any other."""
        return cls(entry.replica, entry.model, entry.spec_hash, True, True) if entry.asleep else None


class Resting:
    """Chooses, for every model (`model@tenant`) whose replicas are to go to zero, and remembers why. `available` is the
    host's memory that nobody uses, in bytes.
    """

    def __init__(self, times: WakeTimes, available: Callable[[], int]) -> None:
        self._times = times
        self._available = available
        self.choices: Mapping[str, Choice] = {}

    def choose(
        self, policy: AutoscalePolicy, demanded: Mapping[str, int], resters: Iterable[Rester], goals: Goals | None
    ) -> dict[str, str]:
        """Replicas that sleep on, one for each pool that nobody asks for, with the hash of what runs."""
        budget = policy.sleep_memory or self._available() // _HALF
        choices: dict[str, Choice] = {}
        resting: dict[str, str] = {}
        # Those that sleep come first: their weights lie in the host's memory already.
        for one in sorted(resters, key=lambda r: (not r.asleep, natural(r.replica))):
            pool = stem_of(one.replica)
            if demanded.get(pool) != 0 or (pool in choices and choices[pool].sleep == "sleep-mode"):
                continue
            figures = self._figures(one, goals)
            free = budget if policy.sleep_memory or not one.asleep else max(budget, figures.weights_bytes)
            choices[pool] = choose_sleep(policy, figures, host_free_bytes=free)
            if choices[pool].sleep == "sleep-mode":
                resting[one.replica] = one.spec_hash
                budget -= figures.weights_bytes
        self.choices = {p: c for p, c in self.choices.items() if demanded.get(p) == 0} | choices
        return resting

    def _figures(self, one: Rester, goals: Goals | None) -> WakeFigures:
        sized = goals.models.get(one.model) if goals else None
        known = self._times.of(one.model, one.slice) if one.slice else {}
        return WakeFigures(
            weights_bytes=sized.footprint.weights_bytes if sized and sized.footprint else 0,
            from_sleep_seconds=known.get("wake"),
            from_stop_seconds=known.get("start"),
            supported=bool(one.can_sleep),
            failed="no_wake" in known,
        )


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of this machine's memory that could be given to somebody, as the kernel estimates; 0 where it does not tell."""
    try:
        lines = meminfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    told = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    limit = ControlGroup().memory_limit_bytes()
    available = int(told[1]) * 1024 if told else 0
    return available if limit is None else min(available, limit)
