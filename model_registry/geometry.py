"""MIG geometry: which instances can be on one GPU together, as values that cannot be illegal.

What makes a layout legal: the memory-slice intervals do not overlap, each starts where its profile may, the compute
slices add up, no profile exceeds its maximum, at most one instance has media extensions, and `+me.all` shares the GPU
with `-me` only. The sum of "g" alone says nothing: 3g+3g+1g is 7g and cannot exist.

Sources: NVIDIA MIG User Guide (placements, 19 maximal layouts of an A100), nvml.h (`+me`, `+me.all`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

from model_registry.catalogue import Product, ProfileInfo
from model_registry.errors import IllegalLayout, UnknownProfile

_PLACEMENT = re.compile(r"(?P<profile>\d+g\.\d+gb(?:[+-][a-z.]+)?)@(?P<start>\d{1,2})")


@dataclass(frozen=True, slots=True, order=True)
class Placement:
    """One GPU instance on a GPU: a profile and the memory slice it starts at. Written `1g.10gb@3`; ordered by start."""

    start: int
    profile: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """The placement that `text` names; raises UnknownProfile if it does not have the form `1g.10gb@3`."""
        match = _PLACEMENT.fullmatch(text.strip())
        if match is None:
            raise UnknownProfile(f"{text!r} is not a placement", remedy="Write profile@start, like 1g.10gb@3.")
        return cls(start=int(match["start"]), profile=match["profile"])

    def __str__(self) -> str:
        return f"{self.profile}@{self.start}"


@dataclass(frozen=True, slots=True)
class Option:
    """A placement with what it takes: `mask` has one bit for each memory slice."""

    placement: Placement
    profile: ProfileInfo
    mask: int

    @property
    def stop(self) -> int:
        """The first memory slice behind it."""
        return self.mask.bit_length()


@dataclass(frozen=True, slots=True)
class Layout:
    """GPU instances that are on one GPU together: legal, or not to be had. Empty is legal. Sorted by start."""

    product: Product
    placements: tuple[Placement, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "placements", tuple(sorted(self.placements)))
        options = tuple(option_of(self.product, p) for p in self.placements)
        if problem := _illegal(self.product, options):
            raise IllegalLayout(
                f"{_listed(self.placements)} cannot be on one {self.product.name}: {problem}\n{picture(self.product, self.placements)}",
                remedy=f"sliceway profiles --gpu {self.product.short_names[0] if self.product.short_names else self.product.name} shows what can.",
            )

    @classmethod
    def parse(cls, product: Product, placements: Iterable[str]) -> Self:
        """The layout of these `profile@start`; names that other drivers use become the catalogue's."""
        parsed = (Placement.parse(text) for text in placements)
        return cls(product, tuple(Placement(p.start, product.profile(p.profile).name) for p in parsed))

    def __str__(self) -> str:
        return " ".join(map(str, self.placements)) or "(empty)"

    def __len__(self) -> int:
        return len(self.placements)

    def __iter__(self) -> Iterator[Placement]:
        return iter(self.placements)

    def __contains__(self, placement: object) -> bool:
        return placement in self.placements

    @property
    def counts(self) -> Counter[str]:
        """How many of each profile."""
        return Counter(p.profile for p in self.placements)

    @property
    def mask(self) -> int:
        """The memory slices that are taken, one bit each."""
        return sum(option_of(self.product, p).mask for p in self.placements)

    @property
    def g(self) -> int:
        """Compute slices that are taken."""
        return sum(self.product.profile(p.profile).g for p in self.placements)

    def adding(self, *placements: Placement) -> Layout:
        """This layout and these; raises IllegalLayout if they do not go together."""
        return Layout(self.product, (*self.placements, *placements))

    def without(self, *placements: Placement) -> Layout:
        """This layout less these."""
        return Layout(self.product, tuple(p for p in self.placements if p not in placements))


def option_of(product: Product, placement: Placement) -> Option:
    """What `placement` takes on `product`.

    Raises UnknownProfile if there is no such profile, it cannot start there, or the catalogue does not know where it can.
    """
    profile = product.profile(placement.profile)
    if not profile.plannable:
        raise UnknownProfile(
            f"nobody has published where {profile.name} can start on {product.name}",
            remedy="Its layouts can only be planned on the machine, with the driver's answer.",
        )
    if placement.start not in profile.placements:
        raise UnknownProfile(
            f"{profile.name} cannot start at memory slice {placement.start} of {product.name}",
            remedy=f"It can start at {', '.join(map(str, profile.placements))}.",
        )
    return _option(profile, placement.start)


def _option(profile: ProfileInfo, start: int) -> Option:
    size = profile.memory_slices or 0
    return Option(Placement(start, profile.name), profile, ((1 << size) - 1) << start)


def _illegal(product: Product, options: Iterable[Option]) -> str | None:
    """Why these cannot be together, in words; None if they can."""
    options = tuple(options)
    for index, option in enumerate(options):
        for other in options[:index]:
            if shared := other.mask & option.mask:
                return f"{other.placement} and {option.placement} both need memory slice {_slices(shared)}"
    g = sum(o.profile.g for o in options)
    if g > product.compute_slices:
        return f"they take {g} compute slices of {product.compute_slices}"
    for name, count in Counter(o.profile.name for o in options).items():
        if count > (limit := product.profile(name).max_instances):
            return f"{count}x {name}, and at most {limit} can be on one GPU"
    return _media_conflict(o.profile for o in options)


def _media_conflict(profiles: Iterable[ProfileInfo]) -> str | None:
    profiles = tuple(profiles)
    media = [p.name for p in profiles if p.media_extensions]
    if not media:
        return None
    if len(media) > 1:
        return f"{' and '.join(media)}: at most one instance on a GPU has media extensions"
    if any(p.variant == "+me.all" for p in profiles):
        others = [p.name for p in profiles if p.variant not in ("+me.all", "-me")]
        return (
            f"{media[0]} takes all media engines and leaves room for -me profiles only, not {others[0]}"
            if others
            else None
        )
    return None


@dataclass(frozen=True)
class Geometry:
    """Every question about what fits on one product, answered by walking its placements.

    `profiles` limits the walk; unset, it is the product's profiles without media or graphics variants. Building one is
    cheap; what it enumerates is kept, so callers that ask often keep the Geometry.
    """

    product: Product
    profiles: tuple[str, ...] | None = None
    options: tuple[Option, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        product = self.product
        chosen = product.base_profiles if self.profiles is None else tuple(map(product.profile, self.profiles))
        options = (_option(p, start) for p in chosen if p.plannable for start in p.placements)
        object.__setattr__(
            self, "options", tuple(sorted(options, key=lambda o: (o.placement.start, -o.mask, o.placement)))
        )

    @classmethod
    def with_variants(cls, product: Product) -> Self:
        """All profiles, media and graphics variants too."""
        return cls(product, tuple(p.name for p in product.profiles))

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """Every legal placed layout but the empty one, in order of starts."""
        return tuple(self._layout(chosen) for chosen in self._walk((), 0) if chosen)

    @cached_property
    def maximal_layouts(self) -> tuple[Layout, ...]:
        """Legal layouts to which nothing can be added: 78 on an H100, 5 on an A30."""
        return tuple(self._layout(chosen) for chosen in self._walk((), 0) if chosen and not self._addable(chosen))

    @cached_property
    def multisets(self) -> tuple[Mapping[str, int], ...]:
        """Every choice of profiles by count that some legal layout realises, but the empty one."""
        return tuple(dict(items) for items in sorted({tuple(sorted(layout.counts.items())) for layout in self.layouts}))

    @cached_property
    def undominated_multisets(self) -> tuple[Mapping[str, int], ...]:
        """Those multisets that no other contains: what is worth choosing between when starts do not matter."""
        counters = [Counter(m) for m in self.multisets]
        return tuple(dict(c) for c in counters if not any(c < other for other in counters))

    def free_starts(self, occupied: Iterable[Placement] = ()) -> dict[str, tuple[int, ...]]:
        """Where each profile could still start beside `occupied`; profiles without a free start are left out."""
        present = tuple(option_of(self.product, p) for p in occupied)
        starts: dict[str, list[int]] = {}
        for option in self._addable(present):
            starts.setdefault(option.placement.profile, []).append(option.placement.start)
        return {name: tuple(sorted(found)) for name, found in starts.items()}

    def remaining_capacity(self, profile: str, occupied: Iterable[Placement] = ()) -> int:
        """How many more of `profile` fit beside `occupied`, all at once: what NVML calls the remaining capacity."""
        name = self.product.profile(profile).name
        present = tuple(option_of(self.product, p) for p in occupied)
        mine = [o for o in self.options if o.placement.profile == name]
        count = 0
        # Placements of one profile are intervals of one length: taking the first that fits leaves room for the most.
        for option in mine:
            if self._fits(present, option):
                present, count = (*present, option), count + 1
        return count

    def extensions(self, occupied: Iterable[Placement] = ()) -> tuple[Layout, ...]:
        """Every maximal layout that contains `occupied`."""
        present = frozenset(occupied)
        keep = tuple(option_of(self.product, p) for p in present)
        return tuple(self._layout(c) for c in self._walk(keep, 0) if c and not self._addable(c))

    def additions(self, occupied: Iterable[Placement] = ()) -> Iterator[tuple[Placement, ...]]:
        """Every set of placements that can be added to `occupied`, each once; the first is the empty one."""
        keep = tuple(option_of(self.product, p) for p in occupied)
        for chosen in self._walk(keep, 0):
            yield tuple(o.placement for o in chosen[len(keep) :])

    def place(self, counts: Mapping[str, int], occupied: Iterable[Placement] = ()) -> Layout | None:
        """A layout that keeps `occupied` and adds `counts`; None if there is none.

        Of all, the one that leaves the most useful rest: the widest profile that still fits, then the number of
        starts left; ties go to starts at the edges, which fewer profiles can use.
        """
        present = tuple(option_of(self.product, p) for p in occupied)
        wanted = Counter({self.product.profile(name).name: n for name, n in counts.items() if n > 0})
        best: tuple[tuple[int, ...], tuple[Option, ...]] | None = None
        for chosen in self._fill(present, wanted):
            rank = self._usefulness(chosen)
            if best is None or rank > best[0]:
                best = rank, chosen
        return self._layout(best[1]) if best else None

    def usefulness(self, layout: Layout) -> tuple[int, ...]:
        """How good what `layout` leaves free is; larger is better. What `place` chooses by."""
        return self._usefulness(tuple(option_of(self.product, p) for p in layout))

    def _layout(self, chosen: Iterable[Option]) -> Layout:
        return Layout(self.product, tuple(o.placement for o in chosen))

    def _addable(self, present: tuple[Option, ...]) -> list[Option]:
        return [o for o in self.options if self._fits(present, o)]

    def _fits(self, present: tuple[Option, ...], option: Option) -> bool:
        """Whether `option` can be added to what is legally there. The masks decide nearly always, and cheaply."""
        mask, mine = option.mask, option.profile
        compute, alike, media = mine.g, 1, bool(mine.media_extensions)
        for other in present:
            if mask & other.mask:
                return False
            compute += other.profile.g
            alike += other.profile.name == mine.name
            media = media or bool(other.profile.media_extensions)
        if compute > self.product.compute_slices or alike > mine.max_instances:
            return False
        return not media or _media_conflict(o.profile for o in (*present, option)) is None

    def _walk(self, chosen: tuple[Option, ...], first: int) -> Iterator[tuple[Option, ...]]:
        """`chosen` and everything that can be added to it from the option number `first` on, each set once."""
        yield chosen
        for index in range(first, len(self.options)):
            if self._fits(chosen, option := self.options[index]):
                yield from self._walk((*chosen, option), index + 1)

    def _fill(self, chosen: tuple[Option, ...], wanted: Counter[str], first: int = 0) -> Iterator[tuple[Option, ...]]:
        """Every way to add exactly `wanted` to `chosen`."""
        if not wanted:
            yield chosen
            return
        for index in range(first, len(self.options)):
            option = self.options[index]
            if wanted[name := option.placement.profile] and self._fits(chosen, option):
                yield from self._fill((*chosen, option), wanted - Counter({name: 1}), index + 1)

    def _usefulness(self, chosen: tuple[Option, ...]) -> tuple[int, ...]:
        rest = self._addable(chosen)
        widest = max((o.profile.memory_slices or 0 for o in rest), default=0)
        return widest, max((o.profile.g for o in rest), default=0), len(rest), self._edge(chosen)

    def _edge(self, chosen: tuple[Option, ...]) -> int:
        """How few alternatives the taken memory slices had: a slice that few placements reach is cheap to take."""
        return -sum((o.mask & c.mask).bit_count() for o in self.options for c in chosen)


def picture(product: Product, placements: Iterable[Placement]) -> str:
    """The memory slices as text, one line per instance; `X` marks a slice that two want, `#` one that a single one takes."""
    options = [option_of(product, p) for p in sorted(placements)]
    count = product.memory_slices or 0
    wanted = Counter(i for o in options for i in range(count) if o.mask >> i & 1)
    width = max((len(str(o.placement)) for o in options), default=0)
    lines = [f"{'memory slice':{max(width, 12)}} {' '.join(f'{i:>2}' for i in range(count))}"]
    for option in options:
        cells = (("X" if wanted[i] > 1 else "#") if option.mask >> i & 1 else "." for i in range(count))
        lines.append(f"{option.placement!s:{max(width, 12)}} {' '.join(f'{c:>2}' for c in cells)}")
    return "\n".join(lines)


def _listed(placements: Iterable[Placement]) -> str:
    return ", ".join(map(str, placements))


def _slices(mask: int) -> str:
    return " and ".join(str(i) for i in range(mask.bit_length()) if mask >> i & 1)
