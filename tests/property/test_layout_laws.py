"""Laws that hold for every legal layout of every product, checked against the definition and not against the code."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_registry.catalogue import load_catalogue
from model_registry.errors import IllegalLayout
from model_registry.geometry import Geometry, Layout, Placement

CATALOGUE = load_catalogue()
PRODUCTS = [p for p in CATALOGUE.products if Geometry(p).options]
PLACEMENTS = {p.name: [Placement(s, q.name) for q in p.profiles for s in q.placements] for p in PRODUCTS}


def taken(product_name: str, placement: Placement) -> set[int]:
    profile = CATALOGUE.product(product_name).profile(placement.profile)
    assert profile.memory_slices is not None
    return set(range(placement.start, placement.start + profile.memory_slices))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_can_be_built_obeys_the_definition(data: st.DataObject) -> None:
    product = data.draw(st.sampled_from(PRODUCTS))
    chosen = data.draw(st.lists(st.sampled_from(PLACEMENTS[product.name]), max_size=7))
    profiles = [product.profile(p.profile) for p in chosen]
    disjoint = all(not taken(product.name, a) & taken(product.name, b) for a, b in combinations(chosen, 2))
    within = sum(p.g for p in profiles) <= product.compute_slices
    few = all(sum(q.name == p.name for q in profiles) <= p.max_instances for p in profiles)
    media = sum(p.media_extensions for p in profiles) <= 1
    alone = not any(p.variant == "+me.all" for p in profiles) or all(p.variant in ("+me.all", "-me") for p in profiles)
    if disjoint and within and few and media and alone:
        layout = Layout(product, tuple(chosen))
        assert Layout.parse(product, str(layout).split() if chosen else []) == layout
    else:
        with pytest.raises(IllegalLayout):
            Layout(product, tuple(chosen))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_placing_by_count_keeps_what_is_there_and_adds_exactly_that(data: st.DataObject) -> None:
    product = data.draw(st.sampled_from(PRODUCTS))
    geometry = Geometry(product)
    target = data.draw(st.sampled_from(geometry.layouts))
    kept = data.draw(st.sets(st.sampled_from(target.placements)))
    wanted = target.counts - Layout(product, tuple(kept)).counts
    found = geometry.place(wanted, kept)
    assert found is not None
    assert kept <= set(found)
    assert found.counts == target.counts


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_capacity_is_what_can_be_placed(data: st.DataObject) -> None:
    product = data.draw(st.sampled_from(PRODUCTS))
    geometry = Geometry(product)
    occupied = data.draw(st.sampled_from(geometry.layouts)).placements
    for profile in product.base_profiles:
        room = geometry.remaining_capacity(profile.name, occupied)
        assert (geometry.place({profile.name: room}, occupied) is not None) or room == 0
        assert geometry.place({profile.name: room + 1}, occupied) is None
