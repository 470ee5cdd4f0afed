"""Seekers and places: who can sit where at the same time. Pure.

Seekers that would take the same places are kin, and places that the same kin take are of one kind. What is searched is the graph of
kin and kinds, of which a fleet has few, however many replicas and slices there are. Kin may be limited to one place in each
group (a GPU, a node). That is a flow through a node of capacity one for each kin and group, and the sets of places, as those of seekers, that
a flow can link are the independent sets of a matroid, a gammoid (Perfect 1968), as they are without groups: taking places, or
seekers, greedily in an order, each along a path that moves others, loses nothing.

Where a search finds no way out, no later one will from anything it has seen: a later path cannot enter what has no way
out, so it opens none. What was seen is closed for good, and all searches in vain together cost no more than one.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Kind = int
Member = tuple[int, str | None]
"""Kin as such, or (with a group) only within the group."""


@dataclass(frozen=True, slots=True)
class Kin:
    """Seekers that would take the same places, by number, ascending. `group_of` is the group of each place of which they may have
    one only; a place that is not in it is in no group.
    """

    seekers: tuple[int, ...]
    group_of: Mapping[str, str] = field(default_factory=dict)


class Ground:
    """Who would take what. `takers` are the kin, by index and ascending, that would take each place."""

    def __init__(self, kin: Sequence[Kin], takers: Mapping[str, tuple[int, ...]]) -> None:
        self.kin = tuple(kin)
        self.kin_of = {seeker: i for i, one in enumerate(self.kin) for seeker in one.seekers}
        self.kind_of: dict[str, Kind] = {}
        self.takers: list[tuple[int, ...]] = []
        self.groups: list[tuple[str | None, ...]] = []
        """Of each kind: the group that it is in, for each of its takers."""
        kinds: dict[tuple[tuple[int, ...], tuple[str | None, ...]], Kind] = {}
        for place, who in takers.items():
            groups = tuple(self.kin[i].group_of.get(place) for i in who)
            kind = self.kind_of[place] = kinds.setdefault((who, groups), len(kinds))
            if kind == len(self.takers):
                self.takers.append(who)
                self.groups.append(groups)


class Matching:
    """Who sits where, while it is worked out: `hold` first, then `offer` places in the order in which they are to be used."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._place_of: dict[int, str] = {}
        self._seeker_on: dict[str, int] = {}
        self._held: frozenset[int] = frozenset()
        self._next = [0] * len(ground.kin)  # how far into its seekers each kin is seated
        self._in_group: dict[tuple[int, str], str] = {}
        self._movable: list[dict[Kind, list[tuple[int, str]]]] = [defaultdict(list) for _ in ground.kin]
        self._closed: set[Kind] = set()

    @property
    def places(self) -> Mapping[int, str]:
        """The places, by seeker."""
        return self._place_of

    @property
    def complete(self) -> bool:
        """Whether everybody has a place."""
        return len(self._place_of) == len(self._ground.kin_of)

    def is_free(self, place: str) -> bool:
        """Whether nobody sits there."""
        return place not in self._seeker_on

    def hold(self, current: Mapping[int, str]) -> None:
        """Seat those who have a place already where they are, as far as they may be there; they do not move for others."""
        for seeker in sorted(current):
            place, kin = current[seeker], self._ground.kin_of[seeker]
            takers = self._ground.takers[self._ground.kind_of[place]] if place in self._ground.kind_of else ()
            group = self._ground.kin[kin].group_of.get(place)
            if kin in takers and self.is_free(place) and (group is None or (kin, group) not in self._in_group):
                self._sit(seeker, place)
        self._held = frozenset(self._place_of)
        self._movable = [defaultdict(list) for _ in self._ground.kin]

    def release(self) -> None:
        """From here on those who are held may move as well."""
        for seeker in self._held:
            self._may_move(seeker, self._place_of[seeker])
        self._held = frozenset()
        self._closed.clear()

    def offer(self, place: str) -> None:
        """Use a free place if that lets one more be seated, moving others along a shortest path."""
        for seeker, to in self._path(place):
            self._sit(seeker, to)

    def _path(self, start: str) -> list[tuple[int, str]]:
        """Who moves where, so that every place is left before it is taken; empty if there is no path.

        Breadth first from the place to somebody without one; of several, the one with the lowest number.
        """
        kind_of = self._ground.kind_of
        if kind_of[start] in self._closed:
            return []
        seen = {kind_of[start]}
        goes: dict[str, str] = {}  # who sits on the place would go there
        reached: set[int] = set()
        frontier = [start]
        for place in frontier:
            newcomer = self._newcomer(place, reached)
            if newcomer is not None:
                return self._chain(newcomer, place, goes)
            for _, left in sorted(self._leavers(place, reached)):
                if (kind := kind_of[left]) not in seen and kind not in self._closed:
                    seen.add(kind)
                    goes[left] = place
                    frontier.append(left)
        self._closed |= seen
        return []

    def _newcomer(self, place: str, reached: set[int]) -> int | None:
        """The first without a place who could have this one."""
        waiting = (self._waiting(kin) for kin, fellow in self._takers(place, reached) if fellow is None)
        return min((seeker for seeker in waiting if seeker is not None), default=None)

    def _leavers(self, place: str, reached: set[int]) -> Iterator[tuple[int, str]]:
        """Who could come here from the first place of each kind, and that place. The kin that come are `reached`."""
        for kin, fellow in list(self._takers(place, reached)):
            if fellow is None:
                reached.add(kin)
                yield from self._first_of_each_kind(kin)
            elif (seeker := self._seeker_on[fellow]) not in self._held:
                yield seeker, fellow

    def _takers(self, place: str, reached: set[int]) -> Iterator[tuple[int, str | None]]:
        """Kin that would take the place, with the place of the one who has one in its group: nobody else may have another there."""
        kind = self._ground.kind_of[place]
        for kin, group in zip(self._ground.takers[kind], self._ground.groups[kind], strict=True):
            if kin not in reached:
                yield kin, None if group is None else self._in_group.get((kin, group))

    def _first_of_each_kind(self, kin: int) -> Iterator[tuple[int, str]]:
        for heap in self._movable[kin].values():
            while heap and self._place_of[heap[0][0]] != heap[0][1]:
                heapq.heappop(heap)
            if heap:
                yield heap[0]

    def _waiting(self, kin: int) -> int | None:
        """The first of the kin that has no place."""
        seekers = self._ground.kin[kin].seekers
        while self._next[kin] < len(seekers):
            if seekers[self._next[kin]] not in self._place_of:
                return seekers[self._next[kin]]
            self._next[kin] += 1
        return None

    def _chain(self, newcomer: int, place: str, goes: Mapping[str, str]) -> list[tuple[int, str]]:
        chain = [(newcomer, place)]
        while (to := goes.get(chain[-1][1])) is not None:
            chain.append((self._seeker_on[chain[-1][1]], to))
        return chain[::-1]

    def _sit(self, seeker: int, place: str) -> None:
        kin = self._ground.kin_of[seeker]
        group_of = self._ground.kin[kin].group_of
        if (left := self._place_of.get(seeker)) is not None:
            del self._seeker_on[left]
            if left in group_of:
                del self._in_group[kin, group_of[left]]
        self._place_of[seeker] = place
        self._seeker_on[place] = seeker
        if place in group_of:
            self._in_group[kin, group_of[place]] = place
        self._may_move(seeker, place)

    def _may_move(self, seeker: int, place: str) -> None:
        kinds = self._movable[self._ground.kin_of[seeker]]
        heapq.heappush(kinds[self._ground.kind_of[place]], (seeker, place))


def can_all_sit(ground: Ground, order: Iterable[int]) -> frozenset[int]:
    """The seekers to seat, in this order as long as those before can all keep a place."""
    room = _Room(ground)
    return frozenset(seeker for seeker in order if room.add(ground.kin_of[seeker]))


class _Room:
    """How many of which kin sit on which kind: enough to know whether there is room for one more."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._free = Counter(ground.kind_of.values())
        self._sat: list[Counter[int]] = [Counter() for _ in ground.takers]  # by kind: how many of which kin
        self._takes: list[list[Kind]] = [[] for _ in ground.kin]
        self._group: dict[tuple[int, Kind], str] = {}
        self._of_group: dict[Member, list[Kind]] = defaultdict(list)
        for kind, (takers, groups) in enumerate(zip(ground.takers, ground.groups, strict=True)):
            for kin, group in zip(takers, groups, strict=True):
                self._takes[kin].append(kind)
                if group is not None:
                    self._group[kin, kind] = group
                    self._of_group[kin, group].append(kind)
        self._in_group: dict[Member, Kind] = {}
        self._looked_at = [0] * len(ground.kin)
        self._closed: set[Kind] = set()
        self._full: set[int] = set()  # kin of which nobody else can sit

    def add(self, kin: int) -> bool:
        """Seat one more of the kin, moving others where that is needed. Whether it could be done."""
        return kin not in self._full and (self._at_once(kin) or self._by_moving(kin))

    def _at_once(self, kin: int) -> bool:
        """Take a free place. Kinds that were passed by are not looked at again here, so all of these looks together are one."""
        kinds = self._takes[kin]
        while self._looked_at[kin] < len(kinds):
            kind = kinds[self._looked_at[kin]]
            if self._free[kind] and not self._barred(kin, kind):
                self._sit(kin, kind)
                return True
            self._looked_at[kin] += 1
        return False

    def _by_moving(self, kin: int) -> bool:
        """Breadth first over who would have to go on to another kind."""
        begin: Member = (kin, None)
        taken_by: dict[Kind, Member] = {}
        left: dict[Member, Kind | None] = {begin: None}
        frontier = [begin]
        for member in frontier:
            for kind in self._open_to(member):
                if kind in taken_by or kind in self._closed:
                    continue
                taken_by[kind] = member
                if self._free[kind]:
                    self._shift(kind, taken_by, left)
                    return True
                for mover in self._who_sits(kind):
                    if mover not in left:
                        left[mover] = kind
                        frontier.append(mover)
        self._closed |= taken_by.keys()
        self._full |= {one for one, group in left if group is None}
        return False

    def _open_to(self, member: Member) -> Iterator[Kind]:
        kin, group = member
        if group is not None:
            yield from self._of_group[member]
        else:
            yield from (kind for kind in self._takes[kin] if not self._barred(kin, kind))

    def _who_sits(self, kind: Kind) -> Iterator[Member]:
        """Who could leave the kind: for anywhere, or for another place of its group."""
        for kin in +self._sat[kind]:
            yield kin, None
            if (kin, kind) in self._group:
                yield kin, self._group[kin, kind]

    def _barred(self, kin: int, kind: Kind) -> bool:
        group = self._group.get((kin, kind))
        return group is not None and (kin, group) in self._in_group

    def _shift(self, kind: Kind, taken_by: Mapping[Kind, Member], left: Mapping[Member, Kind | None]) -> None:
        """Have everybody on the path to a free place of `kind` go on by one."""
        to: Kind | None = kind
        while to is not None:
            member = taken_by[to]
            self._sit(member[0], to)
            to = left[member]
            if to is not None:
                self._leave(member[0], to)

    def _sit(self, kin: int, kind: Kind) -> None:
        self._free[kind] -= 1
        self._sat[kind][kin] += 1
        if (group := self._group.get((kin, kind))) is not None:
            self._in_group[kin, group] = kind

    def _leave(self, kin: int, kind: Kind) -> None:
        self._free[kind] += 1
        self._sat[kind][kin] -= 1
        group = self._group.get((kin, kind))
        if group is not None and self._in_group.get((kin, group)) == kind:
            del self._in_group[kin, group]
