"""Which replicas answer: consecutive failures and successes, remembered across requests.

The controller looks after the engines it started; this is the gateway's own experience on top, and all there is for engines that something
else runs. Three connections refused in a row take a replica out, two good probes in a row bring it back (the
thresholds of SGLang's gateway, sglang#9198). Pure: the caller reports and asks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gateway.routes import Standing

FAILURES_TO_LEAVE = 3
SUCCESSES_TO_RETURN = 2


@dataclass(slots=True)
class _Record:
    standing: Standing = field(default_factory=Standing)
    failures: int = 0
    successes: int = 0


class HealthBook:
    """The standing of every replica that was ever talked to."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def standings(self) -> dict[str, Standing]:
        """By replica."""
        return {replica: record.standing for replica, record in self._records.items()}

    def standing(self, replica: str) -> Standing:
        """Of one replica."""
        record = self._records.get(replica)
        return record.standing if record else Standing()

    def failed(self, replica: str, reason: str, *, first_contact: bool = False) -> bool:
        """A connection failed. True if that changed the replica's standing. `first_contact`: nobody vouches for this replica yet."""
        record = self._records.setdefault(replica, _Record())
        record.successes = 0
        record.failures += 1
        out = record.failures >= FAILURES_TO_LEAVE or (first_contact and record.standing.reachable is None)
        if not out or record.standing.reachable is False:
            return False
        record.standing = replace(record.standing, reachable=False, reason=reason)
        return True

    def answered(self, replica: str, *, engine_model: str | None = None, max_model_len: int | None = None) -> bool:
        """A probe was answered. True if that changed the replica's standing."""
        record = self._records.setdefault(replica, _Record())
        record.failures = 0
        record.successes += 1
        before = record.standing
        learnt = replace(
            before,
            engine_model=engine_model or before.engine_model,
            max_model_len=max_model_len or before.max_model_len,
        )
        if before.reachable is None or (not before.reachable and record.successes >= SUCCESSES_TO_RETURN):
            learnt = replace(learnt, reachable=True, reason=None)
        record.standing = learnt
        return learnt != before

    def served(self, replica: str) -> None:
        """A request got its answer: what failed before does not count on."""
        if (record := self._records.get(replica)) is not None:
            record.failures = 0

    def retain(self, replicas: set[str]) -> None:
        """Forget the replicas that are gone."""
        for replica in self._records.keys() - replicas:
            del self._records[replica]
