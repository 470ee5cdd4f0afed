"""The fewest GPUs: known answers, published deployments, and every instance of up to two GPUs against trying them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import pytest

from model_registry.catalogue import Product, load_catalogue
from model_registry.errors import UnknownProfile
from model_registry.geometry import Geometry, Layout
from placement.planner.pack import Packing, pack


def product(name: str) -> Product:
    return load_catalogue().product(name)


def created(packing: Packing) -> Counter[str]:
    return Counter(p.profile for added in packing.created for p in added)


def check(packing: Packing, demand: Mapping[str, int]) -> None:
    """Complete, legal, and nothing that was not asked for."""
    assert created(packing) == Counter(demand)
    assert len(packing.layouts()) == packing.gpus  # building a Layout refuses what cannot be


@pytest.mark.parametrize(
    ("name", "demand", "gpus"),
    [
        ("a100-80gb", {"2g.20gb": 7}, 3),
        ("a100-80gb", {"3g.40gb": 2, "1g.10gb": 1}, 2),
        ("a100-80gb", {"4g.40gb": 2}, 2),
        ("a100-80gb", {"4g.40gb": 1, "3g.40gb": 1}, 1),
        ("a100-80gb", {"1g.10gb": 8}, 2),
        ("a100-80gb", {"1g.20gb": 4}, 1),
        ("a30", {"1g.6gb": 5, "2g.12gb": 3}, 3),
        ("h200", {"3g.71gb": 1, "1g.18gb": 4}, 1),
        ("a100-80gb", {"1g.10gb+me": 2}, 2),
        ("a100-80gb", {"1g.10gb+me": 1, "1g.10gb": 6}, 1),
        ("rtx-pro-6000", {"1g.24gb+me.all": 1, "1g.24gb": 1}, 2),
        ("rtx-pro-6000", {"1g.24gb+me.all": 1, "1g.24gb-me": 3}, 1),
    ],
)
def test_known_answers(name: str, demand: Mapping[str, int], gpus: int) -> None:
    packing = pack(product(name), demand)
    assert (packing.gpus, packing.lower_bound, packing.optimal) == (gpus, gpus, True)
    check(packing, demand)


# ParvaGPU (SC24, github.com/MunQ-Lee/ParvaGPU_SC24, MIT): the segments of its own deployments, by compute slices, and
# the A100s that they took.
PARVA = {
    "S1": ({3: 1, 2: 2, 1: 3}, 2),
    "S2": ({3: 1, 2: 7, 1: 3}, 3),
    "S3": ({3: 5, 2: 5, 1: 8}, 5),
    "S4": ({3: 7, 2: 8, 1: 11}, 7),
    "S5": ({3: 12, 2: 13, 1: 28}, 13),
    "S6": ({7: 2, 4: 2, 3: 14, 2: 4, 1: 40}, 16),
}
SEGMENTS = {1: "1g.10gb", 2: "2g.20gb", 3: "3g.40gb", 4: "4g.40gb", 7: "7g.80gb"}


@pytest.mark.parametrize("scenario", PARVA)
def test_published_segment_lists_need_no_more_gpus_than_published(scenario: str) -> None:
    segments, gpus = PARVA[scenario]
    packing = pack(product("a100-80gb"), {SEGMENTS[g]: n for g, n in segments.items()})
    assert (packing.gpus, packing.optimal) == (gpus, True)


def single_gpu_multisets(geometry: Geometry) -> set[frozenset[tuple[str, int]]]:
    """Every count of profiles that one GPU can hold, found by walking all placed layouts."""
    return {
        frozenset(Counter(p.profile for p in layout).items())
        for layout in (*geometry.layouts, Layout(geometry.product))
    }


def added_up(a: Iterable[tuple[str, int]], b: Iterable[tuple[str, int]]) -> frozenset[tuple[str, int]]:
    return frozenset((Counter(dict(a)) + Counter(dict(b))).items())


@pytest.mark.parametrize(
    ("name", "profiles"),
    [
        ("a30", None),
        ("a100-80gb", ("1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb")),
        ("h100-sxm", ("1g.20gb", "2g.20gb", "3g.40gb")),
    ],
)
def test_every_instance_of_up_to_two_gpus_agrees_with_trying_them_all(
    name: str, profiles: tuple[str, ...] | None
) -> None:
    geometry = Geometry(product(name), profiles)
    one = single_gpu_multisets(geometry)
    two = {added_up(a, b) for a in one for b in one}
    names = sorted({p for counts in one for p, _ in counts})
    beyond = {added_up(counts, [(p, 1)]) for counts in two for p in names} - two
    for counts in two:
        packing = pack(geometry.product, dict(counts))
        assert packing.gpus == (0 if not counts else 1 if counts in one else 2), dict(counts)
        assert packing.optimal
        check(packing, dict(counts))
    for counts in sorted(beyond, key=sorted)[::7]:
        assert pack(geometry.product, dict(counts)).gpus == 3, dict(counts)


def test_every_occupied_gpu_of_a_product_agrees_with_trying_them_all() -> None:
    geometry = Geometry(product("a30"))
    demands = sorted(single_gpu_multisets(geometry), key=sorted)
    for occupied in geometry.layouts:
        beside = {
            frozenset(Counter(p.profile for p in added).items()) for added in geometry.additions(occupied.placements)
        }
        for counts in demands:
            packing = pack(geometry.product, dict(counts), [occupied])
            assert packing.gpus == (1 if counts in beside else 2), (str(occupied), dict(counts))
            check(packing, dict(counts))


def test_start_slots_decide_on_occupied_gpus_not_sums() -> None:
    a100 = product("a100-80gb")
    low, high = (Layout.parse(a100, [f"3g.40gb@{start}"]) for start in (0, 4))
    demand = {"2g.20gb": 1, "1g.10gb": 2}
    assert pack(a100, demand, [high]).gpus == 1
    assert pack(a100, {"4g.40gb": 1}, [high]).gpus == 1
    assert pack(a100, {"4g.40gb": 1}, [low]).gpus == 2


def test_what_stays_free_is_left_useful() -> None:
    """A lone 3g goes to start 4, a lone 1g to 6."""
    a100 = product("a100-80gb")
    assert [str(p) for p in pack(a100, {"3g.40gb": 1}).created[0]] == ["3g.40gb@4"]
    assert [str(p) for p in pack(a100, {"1g.10gb": 1}).created[0]] == ["1g.10gb@6"]


def test_order_of_demand_makes_no_difference() -> None:
    h100 = product("h100-sxm")
    demand = {"1g.10gb": 13, "2g.20gb": 5, "3g.40gb": 3, "1g.20gb": 2}
    assert pack(h100, demand) == pack(h100, dict(reversed(demand.items())))


def test_wrong_input() -> None:
    a100 = product("a100-80gb")
    with pytest.raises(UnknownProfile):
        pack(a100, {"5g.50gb": 1})
    with pytest.raises(ValueError, match="-1x"):
        pack(a100, {"1g.10gb": -1})
    with pytest.raises(UnknownProfile, match="nobody has published"):
        pack(product("rtx-pro-5000"), {"1g.12gb": 1})


@pytest.mark.parametrize(
    ("held", "demand", "gpus", "created"),
    [
        ([()], {}, 0, [()]),
        ([()], {"1g.10gb": 1}, 1, [("1g.10gb",)]),
        ([(), ("7g.80gb@0",), ()], {"7g.80gb": 1}, 2, [("7g.80gb",), (), ()]),
        ([(), ("4g.40gb@0",)], {"3g.40gb": 1}, 1, [(), ("3g.40gb",)]),
        ([()], {"7g.80gb": 2}, 2, [("7g.80gb",), ("7g.80gb",)]),
    ],
)
def test_a_gpu_that_holds_nothing_counts_once_something_is_put_on_it(
    held: list[tuple[str, ...]], demand: dict[str, int], gpus: int, created: list[tuple[str, ...]]
) -> None:
    product = load_catalogue().product("a100-80gb")
    found = pack(product, demand, [Layout.parse(product, texts) for texts in held])
    assert (found.gpus, found.lower_bound, found.optimal) == (gpus, gpus, True)
    assert [tuple(p.profile for p in added) for added in found.created] == created
