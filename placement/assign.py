"""Which replica goes to which slice: a pure function.

A replica accepts the slices that it fits, that have its profile, or that it is pinned to. Choosing slices for all of them
at once is a bipartite matching. Slices are taken smallest first and a slice is kept only if the replicas chosen so far can
all still be seated (augmenting paths): the sets of slices that can be seated form a transversal matroid, on which this
greedy choice is optimal (Edmonds and Fulkerson 1965). So if every replica can be placed it is, and the slices used
are the smallest possible in total. A model may be limited to one slice of each GPU or node, by which nothing of this changes
(`placement.matching`). Replicas that already run stay where they are unless another one could not run at all
otherwise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Literal

from model_registry.model import SliceFit
from model_registry.schema import ModelConfig
from model_registry.words import are, counted
from placement.errors import NoFreeSlice, NoSliceApart, PlacementError, SliceTaken
from placement.matching import Ground, Kin, Matching
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

    @property
    def wish(self) -> tuple[str, str | None, tuple[str, ...]]:
        """Equal for replicas that would take the same slices."""
        return self.model, self.pin, self.profiles


@dataclass(frozen=True, slots=True)
class Apart:
    """What no two replicas of a model may share. `group_of` says by slice id on which GPU or node a slice is; those that are not
    in it share nothing.
    """

    what: Literal["GPU", "node"]
    group_of: Mapping[str, str]

    @property
    def setting(self) -> str:
        """As the configuration has it."""
        return f"spread: {self.what.lower()}s"


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


def wanted_replicas(
    models: Iterable[ModelConfig], pools: Pools | None = None, names: Sequence[str] = ()
) -> tuple[Wanted, ...]:
    """The replicas that `models` ask for, ordered by model and number, whatever the order of the models.

    Each of a model's `pools` gets its least, numbered from 0; those of `names` that are the pool's come first, in their order
    (see `placement.renewals`). Models with `endpoints` have none: something else runs their engines.
    """
    return tuple(
        Wanted(
            replica=name,
            model=model.name,
            ordinal=i,
            pin=model.slices[i] if model.slices else None,
            profiles=model.accepted_profiles,
        )
        for model in sorted(models, key=lambda m: m.name)
        if model.source
        for tenant in (pools or {}).get(model.name, (None,))
        for i, name in enumerate(_names(stem(model.name, tenant), model, names))
    )


def _names(pool: str, model: ModelConfig, names: Sequence[str]) -> list[str]:
    """What the pool's replicas are called: as many as it has at least."""
    mine = [] if model.slices else [name for name in names if stem_of(name) == pool]
    fresh = (f"{pool}-{i}" for i in count())
    return list(islice(chain(mine, (name for name in fresh if name not in mine)), model.least_replicas))


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
    apart: Mapping[str, Apart] | None = None,
) -> Assignment:
    """Seat every replica on a slice of its own, or tell which cannot be and what would help.

    `fits` holds an entry for every model and slice. `current` are slice ids of replicas that run, which are kept where
    possible, and in any case unless `may_move`. `apart` says by model which replicas must not share what; all of such a
    model's are pinned, or none. Equal inputs give equal results, in whatever order they come.
    """
    apart = apart or {}
    order = sorted(wanted, key=lambda w: (_freedom(apart.get(w.model)), w.model, w.ordinal, w.replica))
    unplaced = pinned_amiss(order, apart)
    seekers = [w for w in order if w.replica not in unplaced]
    places = _match(seekers, ground_of(seekers, fits, inventory, apart), inventory, current or {}, may_move=may_move)
    seated = {w.replica: places[i] for i, w in enumerate(seekers) if i in places}
    return Assignment(seated, unplaced | why_not(seekers, seated, fits, inventory, apart))


def _freedom(limit: Apart | None) -> int:
    """Who is limited most chooses first: fewer are moved then."""
    return 2 if limit is None else ("node", "GPU").index(limit.what)


def ground_of(seekers: Sequence[Wanted], fits: Fits, inventory: Inventory, apart: Mapping[str, Apart]) -> Ground:
    """Which of `seekers`, by their index, would take which slices, by their ids."""
    kin: dict[tuple[str, str | None, tuple[str, ...]], list[int]] = {}
    for number, one in enumerate(seekers):
        kin.setdefault(one.wish, []).append(number)
    anywhere: list[tuple[int, Wanted]] = []
    pinned: dict[str, list[tuple[int, Wanted]]] = {}
    for index, numbers in enumerate(kin.values()):
        one = seekers[numbers[0]]
        (anywhere if one.pin is None else pinned.setdefault(one.pin, [])).append((index, one))
    takers = {
        s.id: tuple(sorted(i for i, one in (*anywhere, *pinned.get(s.id, ())) if _accepts(one, s, fits)))
        for s in inventory.slices
    }
    limits = {model: limit.group_of for model, limit in apart.items()}
    return Ground(
        [Kin(tuple(n), limits.get(model, {}) if pin is None else {}) for (model, pin, _), n in kin.items()], takers
    )


def _match(
    seekers: Sequence[Wanted], ground: Ground, inventory: Inventory, current: Mapping[str, str], *, may_move: bool
) -> Mapping[int, str]:
    """Slice ids by index of the seeker."""
    matching = Matching(ground)
    matching.hold({i: current[w.replica] for i, w in enumerate(seekers) if w.replica in current})
    free = [s for s in inventory.slices if matching.is_free(s.id)]
    free.sort(key=lambda s: (s.memory_bytes, natural(s.id)))
    for movable in (False, True) if may_move else (False,):
        if movable:
            matching.release()
        for candidate in free:
            if matching.complete:
                return matching.places
            if matching.is_free(candidate.id):
                matching.offer(candidate.id)
    return matching.places


def natural(slice_id: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key that puts `cpu-2` before `cpu-10`."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.findall(r"\d+|\D+", slice_id))


def _accepts(wanted: Wanted, candidate: Slice, fits: Fits) -> bool:
    if wanted.pin is not None and wanted.pin != candidate.id:
        return False
    return _of_profile(wanted, candidate) and fits[wanted.model, candidate.id].fits


def _of_profile(wanted: Wanted, candidate: Slice) -> bool:
    return not wanted.profiles or candidate.profile in wanted.profiles


def pinned_amiss(order: Sequence[Wanted], apart: Mapping[str, Apart]) -> dict[str, PlacementError]:
    """Those whose slice is named for one before them as well, or is not far enough from it, with what to change."""
    return _pinned_twice(order) | pinned_together(order, apart)


def pinned_together(order: Sequence[Wanted], apart: Mapping[str, Apart]) -> dict[str, PlacementError]:
    """Those that are pinned to the GPU or node of one before them although they are to be apart."""
    first: dict[tuple[str, str], str] = {}
    amiss: dict[str, PlacementError] = {}
    for wanted in order:
        limit = apart.get(wanted.model)
        group = limit.group_of.get(wanted.pin) if limit and wanted.pin is not None else None
        if limit is None or wanted.pin is None or group is None:
            continue
        other = first.setdefault((wanted.model, group), wanted.pin)
        if other != wanted.pin:
            amiss[wanted.replica] = NoSliceApart(
                f"{wanted.replica!r} is pinned to {wanted.pin!r}, which is on one {limit.what} with {other!r}, and {limit.setting} "
                f"allows one replica of {wanted.model!r} there",
                where=f"models.{wanted.model}.slices",
                remedy=f"Name a slice of another {limit.what}, or set spread: none for {wanted.model!r}.",
            )
    return amiss


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


def why_not(
    seekers: Sequence[Wanted],
    seated: Mapping[str, str],
    fits: Fits,
    inventory: Inventory,
    apart: Mapping[str, Apart],
) -> dict[str, PlacementError]:
    """Why those of `seekers` that are not `seated` have no slice, and the smallest change that would help."""
    left = [w for w in seekers if w.replica not in seated]
    if not left:
        return {}
    shortage = _Shortage(seekers, left, set(seated.values()), fits, inventory, apart)
    return {w.replica: shortage.reason(w) for w in left}


@dataclass(frozen=True, slots=True)
class _Choice:
    """What replicas of one wish could have: slices that they may have, those that fit, and other models that want those too."""

    eligible: Sequence[Slice]
    fitting: Sequence[Slice]
    rivals: Sequence[str]


class _Shortage:
    """More replicas than places. What is the same for all of one wish is worked out once."""

    def __init__(
        self,
        seekers: Sequence[Wanted],
        left: Sequence[Wanted],
        taken: Collection[str],
        fits: Fits,
        inventory: Inventory,
        apart: Mapping[str, Apart],
    ) -> None:
        self._wishes = list({w.wish: w for w in seekers}.values())
        self._asked = Counter(w.model for w in seekers)
        self._left = Counter(w.model for w in left)
        self._taken = taken
        self._fits = fits
        self._inventory = inventory
        self._apart = apart
        self._choices: dict[tuple[str, str | None, tuple[str, ...]], _Choice] = {}

    def reason(self, wanted: Wanted) -> PlacementError:
        """Of one that is left."""
        where, inventory = f"models.{wanted.model}", self._inventory
        if not inventory.slices:
            return NoFreeSlice(
                "there is no slice at all", where=where, remedy=" ".join(inventory.notes) or "See `sliceway slices`."
            )
        if wanted.pin is not None and wanted.pin not in inventory.by_id:
            return NoFreeSlice(
                f"there is no slice {wanted.pin!r}", where=f"{where}.slices", remedy=f"There are {_listed(inventory)}."
            )
        choice = self._choice(wanted)
        if not choice.eligible:
            return self._no_profile(wanted, where)
        if not choice.fitting:
            return _too_small(wanted, choice.eligible, self._fits, where)
        return self._too_close(wanted, choice, where) or self._too_few(wanted, choice, where)

    def _choice(self, wanted: Wanted) -> _Choice:
        if wanted.wish not in self._choices:
            slices = self._inventory.slices if wanted.pin is None else (self._inventory.by_id[wanted.pin],)
            eligible = [s for s in slices if _of_profile(wanted, s)]
            fitting = [s for s in eligible if self._fits[wanted.model, s.id].fits]
            others = (w for w in self._wishes if w.model != wanted.model)
            rivals = {w.model for w in others if any(_accepts(w, s, self._fits) for s in fitting)}
            self._choices[wanted.wish] = _Choice(eligible, fitting, sorted(rivals))
        return self._choices[wanted.wish]

    def _no_profile(self, wanted: Wanted, where: str) -> PlacementError:
        profiles = sorted({s.profile for s in self._inventory.slices if s.profile})
        return NoFreeSlice(
            f"no slice has the profile {' or '.join(map(repr, wanted.profiles))}",
            where=f"{where}.profile{'s' * (len(wanted.profiles) > 1)}",
            remedy=f"There are {', '.join(profiles)}."
            if profiles
            else "The slices here have no profiles; leave `profile` out.",
        )

    def _too_close(self, wanted: Wanted, choice: _Choice, where: str) -> PlacementError | None:
        """Slices would be left, but on GPUs or nodes that have a replica of the model; None where that is not it."""
        limit = self._apart.get(wanted.model)
        if limit is None or wanted.pin is not None:
            return None
        groups = len({limit.group_of.get(s.id, s.id) for s in choice.fitting})
        free = sum(s.id not in self._taken for s in choice.fitting)
        missing = max(self._asked[wanted.model] - groups, 0)
        if not free and not missing:
            return None
        there = counted(free, "slice")
        return NoSliceApart(
            f"no {limit.what} is left for {wanted.replica!r} that has no other replica of {wanted.model!r} ({limit.setting}): "
            f"slices that fit it are on {counted(groups, limit.what)}, and of those {there} {'is' if free == 1 else 'are'} free",
            where=f"{where}.spread",
            remedy=f"Provide {counted(max(missing, 1), f'more {limit.what}')} with such a slice, {self._fewer(wanted)}, or set "
            f"{'spread: gpus or ' if limit.what == 'node' else ''}spread: none.",
        )

    def _too_few(self, wanted: Wanted, choice: _Choice, where: str) -> PlacementError:
        """Every slice that would do is another replica's. The smallest change is as many slices more, or replicas fewer."""
        fitting, rivals = len(choice.fitting), choice.rivals
        there = len(self._inventory.slices)
        which = (
            f"{fitting} of {there} slices fit it"
            if fitting < there
            else f"there {are(fitting)} {counted(fitting, 'slice')}"
        )
        also = f", and {', '.join(map(repr, rivals))} need{'s' * (len(rivals) == 1)} some too" if rivals else ""
        cpu = "; on CPU, raise fleet.cpu.slices if there are more cores" if any(s.cores for s in choice.fitting) else ""
        return NoFreeSlice(
            f"no slice is left for {wanted.replica!r}: {which}{also}",
            where=where,
            remedy=f"Provide {counted(self._left.total(), 'more slice')}, or {self._fewer(wanted)}{cpu}.",
        )

    def _fewer(self, wanted: Wanted) -> str:
        mine, short = self._asked[wanted.model], self._left[wanted.model]
        return f"set replicas: {mine - short} for {wanted.model!r}" if mine > short else f"take {wanted.model!r} out"


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


def _listed(inventory: Inventory) -> str:
    ids = [s.id for s in inventory.slices[:8]]
    return ", ".join(ids) + (f" and {more} more" if (more := len(inventory.slices) - 8) > 0 else "")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
