"""Which replicas answer: consecutive failures and successes, remembered across requests.

The controller looks after the engines it started; this is the gateway's own experience on top, and all there is for engines that something
else runs. It is a circuit breaker per replica: three failures in a row (connections refused, or ended before an answer) open it; two
good probes in a row close it halfway (the thresholds of SGLang's gateway, sglang#9198), which lets one request at a time through;
the first one served closes it, and a failure opens it again at once. Pure: the caller reports and asks.
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
        """A connection or a request failed. True if that changed the replica's standing. `first_contact`: nobody vouches for this replica yet."""
        record = self._records.setdefault(replica, _Record())
        record.successes = 0
        record.failures += 1
        out = record.failures >= FAILURES_TO_LEAVE or record.standing.on_trial
        out = out or (first_contact and record.standing.reachable is None)
        if not out or record.standing.reachable is False:
            return False
        record.standing = replace(record.standing, reachable=False, reason=reason, on_trial=False)
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
            learnt = replace(learnt, reachable=True, reason=None, on_trial=before.reachable is False)
        record.standing = learnt
        return learnt != before

    def served(self, replica: str) -> bool:
        """A request got its answer: what failed before does not count on. True if that ended a trial."""
        if (record := self._records.get(replica)) is None:
            return False
        record.failures = 0
        if not record.standing.on_trial:
            return False
        record.standing = replace(record.standing, on_trial=False)
        return True

    def retain(self, replicas: set[str]) -> None:
        """Forget the replicas that are gone."""
        for replica in self._records.keys() - replicas:
            del self._records[replica]
