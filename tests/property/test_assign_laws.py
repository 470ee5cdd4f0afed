"""Laws of the assignment, against every way of doing it where the instance is small enough to try them all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from model_registry.model import SliceFit
from placement.assign import Wanted, assign
from placement.slices import Inventory, Slice, SliceKind


@dataclass(frozen=True)
class Case:
    slices: tuple[Slice, ...]
    wanted: tuple[Wanted, ...]
    fits: Mapping[tuple[str, str], SliceFit]

    def accepts(self, wanted: Wanted, target: Slice) -> bool:
        return (
            wanted.pin in (None, target.id)
            and (not wanted.profiles or wanted.profiles[0] == target.profile)
            and self.fits[wanted.model, target.id].fits
        )

    def best(self) -> tuple[int, int]:
        """Most replicas that can be seated at once, and the least memory for that many: by trying everything."""
        options = [[None, *(s for s in self.slices if self.accepts(w, s))] for w in self.wanted]
        best = (0, 0)
        for choice in itertools.product(*options):
            seats = [s for s in choice if s is not None]
            if len({s.id for s in seats}) == len(seats):
                found = (len(seats), -sum(s.memory_bytes for s in seats))
                best = max(best, found)
        return best[0], -best[1]


def fit(fits: bool) -> SliceFit:
    return SliceFit(fits, "why", 1, 1, 1, 1.0, 1, 1 if fits else -1)


PROFILES = {1: "1g.10gb", 2: "2g.20gb", 4: "4g.40gb"}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.sampled_from([1, 2, 4]), max_size=5))
    slices = tuple(
        Slice(f"s-{i}", SliceKind.MIG, PROFILES[size], size, uuid=f"MIG-{i}") for i, size in enumerate(sizes)
    )
    needs = {f"m{i}": draw(st.sampled_from([1, 2, 4, 8])) for i in range(draw(st.integers(1, 3)))}
    wanted = []
    pins = draw(st.permutations([s.id for s in slices]))
    for i in range(draw(st.integers(0, 5))):
        model = draw(st.sampled_from(sorted(needs)))
        pin = pins[i] if i < len(pins) and draw(st.booleans()) and draw(st.booleans()) else None
        profile = draw(st.one_of(st.none(), st.none(), st.sampled_from(sorted(PROFILES.values()))))
        wanted.append(Wanted(f"{model}-{i}", model, i, pin=pin, profiles=(profile,) if profile else ()))
    fits = {(m, s.id): fit(need <= s.memory_bytes) for m, need in needs.items() for s in slices}
    return Case(slices, tuple(wanted), fits)


@given(cases())
def test_every_replica_has_a_slice_of_its_own_that_it_accepts(case: Case) -> None:
    result = assign(case.wanted, case.fits, Inventory(case.slices))
    by_id = {s.id: s for s in case.slices}
    assert len(set(result.slices.values())) == len(result.slices)
    for wanted in case.wanted:
        assert (wanted.replica in result.slices) != (wanted.replica in result.unplaced)
        if wanted.replica in result.slices:
            assert case.accepts(wanted, by_id[result.slices[wanted.replica]])


@given(cases())
def test_as_many_as_possible_are_placed_on_as_little_memory_as_possible(case: Case) -> None:
    result = assign(case.wanted, case.fits, Inventory(case.slices))
    by_id = {s.id: s for s in case.slices}
    most, least_memory = case.best()
    assert len(result.slices) == most
    assert sum(by_id[s].memory_bytes for s in result.slices.values()) == least_memory


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_inputs_does_not_matter(case: Case, chance: random.Random) -> None:
    def shuffled(items: Sequence[object]) -> list[object]:
        return chance.sample(list(items), len(items))

    one = assign(case.wanted, case.fits, Inventory(case.slices))
    other = assign(shuffled(case.wanted), case.fits, Inventory(tuple(shuffled(case.slices))))  # type: ignore[arg-type]
    assert one.slices == other.slices
    assert set(one.unplaced) == set(other.unplaced)


@given(cases())
def test_what_runs_stays_and_a_second_assignment_changes_nothing(case: Case) -> None:
    first = assign(case.wanted, case.fits, Inventory(case.slices))
    again = assign(case.wanted, case.fits, Inventory(case.slices), current=first.slices)
    assert again.slices == first.slices


@given(cases(), st.randoms(use_true_random=False))
def test_a_replica_is_moved_only_for_one_that_could_not_run_otherwise(case: Case, chance: random.Random) -> None:
    running = [w for w in case.wanted if chance.random() < 0.6]
    before = assign(running, case.fits, Inventory(case.slices)).slices
    after = assign(case.wanted, case.fits, Inventory(case.slices), current=before)
    moved = [r for r, s in before.items() if after.slices.get(r) != s]
    kept_fixed = {w.replica: w for w in case.wanted if w.replica not in before}
    if moved:
        free = Inventory(tuple(s for s in case.slices if s.id not in before.values()))
        alone = assign(tuple(kept_fixed.values()), case.fits, free)
        assert len(alone.slices) + len(before) < len(after.slices)
    assert set(before) <= set(after.slices), "nothing that runs loses its place"
