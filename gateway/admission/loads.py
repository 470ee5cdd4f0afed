"""What each replica has from this gateway: requests, sequences and KV tokens, counted here and never scraped.

Gauges scraped from engines overshoot between two scrapes (llm-d-router#2066). A `Load` outlives changes of the routing table, so
what runs on a replica stays counted whatever the table says of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

from placement.table import ReplicaRow

_LEARNING = 0.1
_ENOUGH = 32  # requests, before a replica's pace is believed
_NO_BOUND = sys.maxsize


class Load:
    """One replica: its room and what this process has taken of it. `requests`, `sequences` and `kv_tokens` are zero when nothing runs.

    `seats` and `kv_room` are what the replica has, `seat_share` and `kv_share` what this process may use of it, which is less where
    other gateways hold the rest; `sharers` is how many gateways there are.
    """

    __slots__ = (
        "busy_seconds",
        "ended",
        "kv_room",
        "kv_share",
        "kv_tokens",
        "requests",
        "row",
        "seat_share",
        "seats",
        "sequences",
        "sharers",
        "trial",
        "work_tokens",
    )

    def __init__(self, row: ReplicaRow, bound: int) -> None:
        self.sharers = 1
        self.seat_share = self.kv_share = self.seats = self.kv_room = _NO_BOUND
        self.requests = 0
        self.sequences = 0
        self.kv_tokens = 0
        self.busy_seconds = 0.0  # summed over ended requests, fading: what `pace` is made of
        self.work_tokens = 0.0
        self.ended = 0
        self.trial = False  # half-open: one request at a time, until one is served
        self.seen_as(row, bound)

    def seen_as(self, row: ReplicaRow, bound: int) -> None:
        """The replica's row is now `row`. `bound` is the most requests where the engine told no `max_num_seqs`."""
        whole = not self.partial
        self.row = row
        self.seats = min(row.max_num_seqs or bound, bound)
        self.kv_room = row.kv_cache_tokens or _NO_BOUND
        self.seat_share = self.seats if whole else min(self.seat_share, self.seats)
        self.kv_share = self.kv_room if whole or row.kv_cache_tokens is None else min(self.kv_share, self.kv_room)

    def has_room(self, sequences: int, kv_tokens: int) -> bool:
        """Whether a request fits. One that fits nowhere may run alone: the engine then decides.

        With several gateways it runs as the only one of a gateway that holds its fair part: more cannot be had while the others are busy.
        """
        if self.sequences + sequences <= self.seat_share and self.kv_tokens + kv_tokens <= self.kv_share:
            return not (self.trial and self.sequences)
        return not self.sequences and self._has_fair_part()

    def _has_fair_part(self) -> bool:
        sharers = self.sharers
        return self.seat_share >= max(1, self.seats // sharers) and self.kv_share >= self.kv_room // sharers

    def hold_nothing(self) -> None:
        """Have no share until one is granted."""
        self.seat_share = 0
        if self.row.kv_cache_tokens is not None:
            self.kv_share = 0

    @property
    def partial(self) -> bool:
        """Whether this process may use less than the replica has."""
        return self.seat_share < self.seats or self.kv_share < self.kv_room

    def take(self, sequences: int, kv_tokens: int) -> None:
        """Count one more request."""
        self.requests += 1
        self.sequences += sequences
        self.kv_tokens += kv_tokens

    def give(self, sequences: int, kv_tokens: int) -> None:
        """Count it no longer."""
        self.requests -= 1
        self.sequences -= sequences
        self.kv_tokens -= kv_tokens

    def served(self, seconds: float, tokens: int) -> None:
        """A request held its place for `seconds` and made `tokens`."""
        self.ended += 1
        self.busy_seconds += seconds - _LEARNING * self.busy_seconds
        self.work_tokens += (tokens or 1) - _LEARNING * self.work_tokens

    @property
    def pace(self) -> float:
        """Seconds per token of its requests lately; 0.0 as long as too few have ended to tell."""
        return self.busy_seconds / self.work_tokens if self.ended >= _ENOUGH else 0.0


class Loads:
    """The loads of all replicas, by name."""

    def __init__(self, *, bound: int) -> None:
        self._bound = bound
        self._loads: dict[str, Load] = {}
        self.shared = False  # whether other gateways send requests to the same replicas, or might

    def of(self, row: ReplicaRow) -> Load:
        """The load of the replica of this row."""
        load = self._loads.get(row.replica)
        if load is None:
            load = self._loads[row.replica] = Load(row, self._bound)
            if self.shared:
                load.hold_nothing()
        elif load.row is not row:
            load.seen_as(row, self._bound)
        return load

    def share(self) -> None:
        """Hold nothing of any replica, known or new, but what is granted."""
        self.shared = True
        for load in self._loads.values():
            load.hold_nothing()

    def __iter__(self) -> Iterator[Load]:
        return iter(self._loads.values())

    def retain(self, replicas: Iterable[str]) -> None:
        """Forget the others, as soon as nothing runs on them."""
        kept = set(replicas)
        for name in [name for name, load in self._loads.items() if name not in kept and not load.requests]:
            del self._loads[name]

    def count(self, replica: str) -> int:
        """Requests on one replica."""
        load = self._loads.get(replica)
        return load.requests if load else 0

    def get(self, replica: str) -> Load | None:
        """The load of a replica, if anything ran there."""
        return self._loads.get(replica)

    def total(self) -> int:
        """Requests on all replicas."""
        return sum(load.requests for load in self._loads.values())


def choose(fitting: Sequence[Load], turn: int, home: Load | None = None) -> Load:
    """The replica with the least expected wait among `fitting`, which are not empty; in turn among equals.

    The wait grows with what runs there, as a share of its seats, and with its pace relative to the fastest; paces within a quarter of
    each other count as equal. `home` has the prompt's beginning in its cache: it is taken as long as it runs at most a quarter of its
    seats (at least one request) more than the least loaded.
    """
    best = min(range(len(fitting)), key=lambda i: (*_wait(fitting[i], fitting), (i - turn) % len(fitting)))
    chosen = fitting[best]
    if home is not None and home is not chosen and home in fitting:
        allowance = max(1, min(home.seats, 1024) // 4)
        if home.sequences <= chosen.sequences + allowance:
            return home
    return chosen


def _wait(load: Load, among: Sequence[Load]) -> tuple[float, int]:
    fastest = min((other.pace for other in among if other.pace), default=0.0)
    slowness = load.pace / fastest if load.pace and fastest else 1.0
    return (load.sequences + 1) * (slowness if slowness > 1.25 else 1.0), load.kv_tokens
