"""Which replica goes to which slice: a pure function.

A replica accepts the slices that it fits, that have its profile, or that it is pinned to. Choosing slices for all of them
at once is a bipartite matching. Slices are taken smallest first and a slice is kept only if the replicas chosen so far can
all still be seated (augmenting paths): the sets of slices that can be seated form a transversal matroid, on which this
greedy choice is optimal (Edmonds and Fulkerson 1965). So if every replica can be placed it is, and the slices used
are the smallest possible in total. Replicas that already run stay where they are unless another one could not run at all
otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from placement.errors import NoFreeSlice, PlacementError, SliceTaken
from placement.slices import Inventory, Slice

Fits = Mapping[tuple[str, str], SliceFit]
"""By model name and slice id."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One replica that should run. `pin` is the slice it must have, `profiles` the only profiles it may have; empty: any."""

    replica: str
    model: str
    ordinal: int
    pin: str | None = None
    profiles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Assignment:
    """Slice ids by replica, and why the others have none."""

    slices: Mapping[str, str]
    unplaced: Mapping[str, PlacementError] = field(default_factory=dict)

    def complete(self) -> Mapping[str, str]:
        """The slice ids, if every replica has one. Raises the first replica's reason otherwise."""
        for error in self.unplaced.values():
            raise error
        return self.slices


Pools = Mapping[str, tuple[str | None, ...]]
"""Who has replicas of their own of a model whose number follows demand: dedicated tenants, and None for all others together."""


def stem(model: str, tenant: str | None) -> str:
    """What the names of one pool's replicas begin with: the model's, or `model@tenant` for those of a dedicated tenant."""
    return model if tenant is None else f"{model}@{tenant}"


def stem_of(replica: str) -> str:
    """The pool's part of a replica's name."""
    return replica.rpartition("-")[0]


def wanted_replicas(models: Iterable[ModelConfig], pools: Pools | None = None) -> tuple[Wanted, ...]:
    """The replicas that `models` ask for, ordered by model and number, whatever the order of the models.

    Each of a model's `pools` gets its least. Models with `endpoints` have none: something else runs their engines.
    """
    return tuple(
        Wanted(
            replica=f"{stem(model.name, tenant)}-{i}",
            model=model.name,
            ordinal=i,
            pin=model.slices[i] if model.slices else None,
            profiles=model.accepted_profiles,
        )
        for model in sorted(models, key=lambda m: m.name)
        if model.source
        for tenant in (pools or {}).get(model.name, (None,))
        for i in range(model.least_replicas)
    )


def seated(seats: Mapping[str, str]) -> tuple[Wanted, ...]:
    """The replicas that have a seat, each pinned to its slice. `seats` are slice ids by replica: `MODEL-NUMBER`, or
    `MODEL@TENANT-NUMBER` for a tenant's own.
    """
    wanted = []
    for replica, slice_id in sorted(seats.items()):
        pool, _, ordinal = replica.rpartition("-")
        wanted.append(Wanted(replica, pool.partition("@")[0], int(ordinal), pin=slice_id))
    return tuple(wanted)


def assign(
    wanted: Sequence[Wanted],
    fits: Fits,
    inventory: Inventory,
    *,
    current: Mapping[str, str] | None = None,
    may_move: bool = True,
) -> Assignment:
    """Seat every replica on a slice of its own, or tell which cannot be and what would help.

    `fits` holds an entry for every model and slice. `current` are slice ids of replicas that run, which are kept where
    possible, and in any case unless `may_move`. Equal inputs give equal results, in whatever order they come.
    """
    order = sorted(wanted, key=lambda w: (w.model, w.ordinal, w.replica))
    unplaced = _pinned_twice(order)
    seekers = [w for w in order if w.replica not in unplaced]
    slices = sorted(inventory.slices, key=lambda s: (s.memory_bytes, natural(s.id)))
    seating = _Seating({w.replica: frozenset(s.id for s in slices if _accepts(w, s, fits)) for w in seekers})
    seating.hold(current or {})
    for movable in (False, True) if may_move else (False,):
        for candidate in slices:
            seating.offer(candidate.id, movable=movable)
    seated = seating.by_replica()
    left = [w for w in seekers if w.replica not in seated]
    unplaced |= {w.replica: _reason(w, seekers, left, fits, inventory) for w in left}
    return Assignment({w.replica: seated[w.replica] for w in order if w.replica in seated}, unplaced)


class _Seating:
    """A matching under construction. `accepted` are the slice ids each replica could have, in order of preference to be seated."""

    def __init__(self, accepted: Mapping[str, frozenset[str]]) -> None:
        self._accepted = accepted
        self._slice_of: dict[str, str] = {}
        self._replica_on: dict[str, str] = {}
        self._held: frozenset[str] = frozenset()

    def hold(self, current: Mapping[str, str]) -> None:
        """Seat the replicas that run where they are, as long as that place still suits them."""
        for replica, accepted in self._accepted.items():
            place = current.get(replica)
            if place in accepted and place not in self._replica_on:
                self._seat(replica, place)
        self._held = frozenset(self._slice_of)

    def offer(self, slice_id: str, *, movable: bool) -> None:
        """Use a free slice if that lets one more replica be seated, moving others along a shortest path.

        Held replicas are moved only if `movable`.
        """
        if slice_id in self._replica_on:
            return
        for replica, place in self._path(slice_id, movable=movable):
            self._seat(replica, place)

    def by_replica(self) -> Mapping[str, str]:
        """Slice ids by replica."""
        return dict(self._slice_of)

    def _seat(self, replica: str, slice_id: str) -> None:
        self._slice_of[replica] = slice_id
        self._replica_on[slice_id] = replica

    def _path(self, slice_id: str, *, movable: bool) -> list[tuple[str, str]]:
        """New seats, the last one first in the chain, so that every slice is left before it is taken; empty if there is no path."""
        arrived: dict[str, str] = {}
        frontier = [slice_id]
        for place in frontier:
            for replica, accepted in self._accepted.items():
                if replica in arrived or place not in accepted:
                    continue
                arrived[replica] = place
                leaves = self._slice_of.get(replica)
                if leaves is None:
                    return self._chain(replica, arrived)
                if movable or replica not in self._held:
                    frontier.append(leaves)
        return []

    def _chain(self, newcomer: str, arrived: Mapping[str, str]) -> list[tuple[str, str]]:
        chain = [(newcomer, arrived[newcomer])]
        while (mover := self._replica_on.get(chain[-1][1])) is not None:
            chain.append((mover, arrived[mover]))
        return chain[::-1]


def natural(slice_id: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key that puts `cpu-2` before `cpu-10`."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.findall(r"\d+|\D+", slice_id))


def _accepts(wanted: Wanted, candidate: Slice, fits: Fits) -> bool:
    if wanted.pin is not None and wanted.pin != candidate.id:
        return False
    return _of_profile(wanted, candidate) and fits[wanted.model, candidate.id].fits


def _of_profile(wanted: Wanted, candidate: Slice) -> bool:
    return not wanted.profiles or candidate.profile in wanted.profiles


def _pinned_twice(order: Sequence[Wanted]) -> dict[str, PlacementError]:
    first: dict[str, str] = {}
    taken: dict[str, PlacementError] = {}
    for wanted in order:
        if wanted.pin is None:
            continue
        owner = first.setdefault(wanted.pin, wanted.replica)
        if owner != wanted.replica:
            taken[wanted.replica] = SliceTaken(
                f"slice {wanted.pin!r} is named for {owner!r} and for {wanted.replica!r}; a slice holds one engine",
                where=f"models.{wanted.model}.slices",
                remedy="Name another slice for one of them; `sliceway slices` lists them.",
            )
    return taken


def _reason(
    wanted: Wanted, seekers: Sequence[Wanted], left: Sequence[Wanted], fits: Fits, inventory: Inventory
) -> PlacementError:
    where = f"models.{wanted.model}"
    if not inventory.slices:
        return NoFreeSlice(
            "there is no slice at all", where=where, remedy=" ".join(inventory.notes) or "See `sliceway slices`."
        )
    if wanted.pin is not None and wanted.pin not in inventory.by_id:
        return NoFreeSlice(
            f"there is no slice {wanted.pin!r}", where=f"{where}.slices", remedy=f"There are {_listed(inventory)}."
        )
    eligible = [s for s in inventory.slices if wanted.pin in (None, s.id) and _of_profile(wanted, s)]
    if not eligible:
        profiles = sorted({s.profile for s in inventory.slices if s.profile})
        return NoFreeSlice(
            f"no slice has the profile {' or '.join(map(repr, wanted.profiles))}",
            where=f"{where}.profile{'s' * (len(wanted.profiles) > 1)}",
            remedy=f"There are {', '.join(profiles)}."
            if profiles
            else "The slices here have no profiles; leave `profile` out.",
        )
    fitting = [s for s in eligible if fits[wanted.model, s.id].fits]
    if not fitting:
        return _too_small(wanted, eligible, fits, where)
    return _too_few(wanted, seekers, left, fitting, fits, inventory, where)


def _too_small(wanted: Wanted, eligible: Sequence[Slice], fits: Fits, where: str) -> PlacementError:
    largest = max(eligible, key=lambda s: (s.memory_bytes, s.id))
    fit = fits[wanted.model, largest.id]
    whose = f"slice {largest.id!r}" if wanted.pin else f"the largest slice there is, {largest.id!r}"
    return NoFreeSlice(
        f"{wanted.model!r} does not fit {whose} ({_gib(largest.memory_bytes)}): {fit.reason}",
        where=where,
        remedy=f"{_shortage(fit)}`sliceway size` shows what the model needs and what would fit.",
    )


def _shortage(fit: SliceFit) -> str:
    missing = f"It lacks {_gib(-fit.head_room_bytes)}. " if fit.head_room_bytes < 0 else ""
    lower = "Lower max_model_len or max_num_seqs, or use larger slices. "
    if fit.longest_context_tokens > 0:
        lower = f"max_model_len: {fit.longest_context_tokens} would fit; or use larger slices. "
    return missing + lower


def _too_few(
    wanted: Wanted,
    seekers: Sequence[Wanted],
    left: Sequence[Wanted],
    fitting: Sequence[Slice],
    fits: Fits,
    inventory: Inventory,
    where: str,
) -> PlacementError:
    """Every slice that would do is another replica's. The smallest change is as many slices more, or replicas fewer."""
    mine = sum(w.model == wanted.model for w in seekers)
    short = sum(w.model == wanted.model for w in left)
    rivals = sorted(
        {w.model for w in seekers if w.model != wanted.model and any(_accepts(w, s, fits) for s in fitting)}
    )
    which = (
        f"{len(fitting)} of {len(inventory.slices)} slices fit it"
        if len(fitting) < len(inventory.slices)
        else f"there {_are(len(fitting))}"
    )
    also = f", and {', '.join(map(repr, rivals))} need{'s' * (len(rivals) == 1)} some too" if rivals else ""
    fewer = f"set replicas: {mine - short} for {wanted.model!r}" if mine > short else f"take {wanted.model!r} out"
    cpu = "; on CPU, raise fleet.cpu.slices if there are more cores" if any(s.cores for s in fitting) else ""
    return NoFreeSlice(
        f"no slice is left for {wanted.replica!r}: {which}{also}",
        where=where,
        remedy=f"Provide {len(left)} more slice{'s' * (len(left) > 1)}, or {fewer}{cpu}.",
    )


def _listed(inventory: Inventory) -> str:
    ids = [s.id for s in inventory.slices]
    return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def _are(count: int) -> str:
    return "is 1 slice" if count == 1 else f"are {count} slices"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
