"""What gateways share: their tenants' limits, and the room on replicas that all of them send requests to.

`gateway.admission.sharing.sharing` keeps either in step with a store, and sees both in the same way: as gauges, of each of which this process may
use a share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, Protocol

from gateway.admission.admission import Admission
from gateway.admission.loads import Load
from gateway.admission.pools import Pool


class Held(Protocol):
    """What is used of a gauge, and at most may be (`limit`), by this process."""

    limit: int

    @property
    def used(self) -> int:
        """As of the last `advance`."""
        ...

    @property
    def seconds(self) -> float:
        """The length of the window; 0 where what is used comes back when it is given back."""
        ...

    def advance(self, now: float) -> int:
        """Let go what is too old."""
        ...

    def ages(self, now: float) -> list[tuple[float, int]]:
        """What is used, as pairs (seconds for which it still counts, units)."""
        ...


class Shared(Protocol):
    """Something with a height (`full`) that is used up by several processes together.

    `wanted` is what was lacking since the store was last asked, `spare` what others had left over then.
    """

    spare: int
    wanted: int

    @property
    def name(self) -> str:
        """What the store calls it."""
        ...

    @property
    def full(self) -> int:
        """All of it."""
        ...

    @property
    def window(self) -> Held:
        """This process's part."""
        ...


class Shares(Protocol):
    """Everything of one kind that is shared."""

    what: str

    def attach(self, wake: Callable[[], None], lapsed: Callable[[], None]) -> None:
        """Hold nothing from here on but what the store grants. `wake` asks it at once; `lapsed` is to be called where the lease may be over."""
        ...

    def gauges(self) -> Iterable[Shared]:
        """All of them, with what is lacking at this moment."""
        ...

    def came(self, peers: int, until: float) -> None:
        """The store has answered, or not: those that waited for it go on. There are `peers` processes; what is held is held until `until`."""
        ...


class LimitShares:
    """Tenants' limits."""

    what = "limits"

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def attach(self, wake: Callable[[], None], lapsed: Callable[[], None]) -> None:
        """See Shares."""
        admission = self._admission
        admission.shared = True
        admission.limits.fresh_share = lambda full: 0  # nothing is known of the others yet
        admission.ask_store = wake
        admission.shares_lapsed = lapsed
        for gauge in admission.limits:
            gauge.window.limit = 0

    def gauges(self) -> Iterable[Shared]:
        """See Shares."""
        return self._admission.limits

    def came(self, peers: int, until: float) -> None:
        """See Shares."""
        self._admission.shares_until = until
        self._admission.shares_came()


class RoomShares:
    """Seats and KV tokens of the replicas."""

    what = "room on replicas"

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._rooms: dict[str, tuple[Load, tuple[Room, ...]]] = {}

    def attach(self, wake: Callable[[], None], lapsed: Callable[[], None]) -> None:
        """See Shares."""
        self._admission.loads.share()
        self._admission.ask_room = wake

    def gauges(self) -> Iterable[Shared]:
        """See Shares."""
        rooms: dict[str, tuple[Load, tuple[Room, ...]]] = {}
        for load in self._admission.loads:
            known = self._rooms.get(load.row.replica)
            made = known if known is not None and known[0] is load else (load, (Room(load, "seats"), Room(load, "kv")))
            rooms[load.row.replica] = made
        self._rooms = rooms
        for pool in self._admission.pools():
            if pool.waiting:
                self._note_lacking(pool)
        return [room for load, both in rooms.values() for room in both if room.bounded]

    def came(self, peers: int, until: float) -> None:
        """See Shares."""
        now = self._admission.now()
        for load in self._admission.loads:
            load.sharers = peers
        for pool in self._admission.pools():
            if pool.waiting:
                pool.dispatch(now)

    def _note_lacking(self, pool: Pool) -> None:
        """What the next ones in the queue lack of each replica that might take them."""
        for claim in pool.next_ones(self._admission.now()):
            needs = claim.estimate.sequences, claim.estimate.prompt + claim.estimate.output
            for load in pool.loads:
                for room, need in zip(self._rooms[load.row.replica][1], needs, strict=True):
                    room.wanted = max(room.wanted, min(need, room.full))


class Room:
    """The seats of one replica, or its KV tokens, as something shared."""

    __slots__ = ("_kind", "_load", "spare", "wanted")

    seconds = 0.0

    def __init__(self, load: Load, kind: Literal["seats", "kv"]) -> None:
        self._load = load
        self._kind = kind
        self.spare = self.wanted = 0

    @property
    def name(self) -> str:
        """See Shared."""
        return f"{self._load.row.replica}\n{self._kind}"

    @property
    def window(self) -> Room:
        """Itself: nothing here leaves with time."""
        return self

    @property
    def bounded(self) -> bool:
        """Whether there is a bound to share: an engine that told of no KV cache has none."""
        return self._kind == "seats" or self._load.row.kv_cache_tokens is not None

    @property
    def full(self) -> int:
        """What the replica has."""
        return self._load.seats if self._kind == "seats" else self._load.kv_room

    @property
    def limit(self) -> int:
        """What this process may use of it."""
        return self._load.seat_share if self._kind == "seats" else self._load.kv_share

    @limit.setter
    def limit(self, units: int) -> None:
        if self._kind == "seats":
            self._load.seat_share = min(units, self._load.seats)
        else:
            self._load.kv_share = min(units, self._load.kv_room)

    @property
    def used(self) -> int:
        """What requests of this process take."""
        return self._load.sequences if self._kind == "seats" else self._load.kv_tokens

    def advance(self, now: float) -> int:
        """Nothing leaves by itself."""
        return 0

    def ages(self, now: float) -> list[tuple[float, int]]:
        """All of it, for no time beyond its end."""
        return [(0.0, self.used)] if self.used else []
