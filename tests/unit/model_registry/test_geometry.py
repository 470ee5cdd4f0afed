from __future__ import annotations

import pytest

from model_registry.catalogue import Catalogue, Product, load_catalogue
from model_registry.errors import IllegalLayout, UnknownProfile
from model_registry.geometry import Geometry, Layout, Placement, picture

EIGHT_SLICES = [
    "a100-40gb", "a100-80gb", "h100-sxm", "h100-pcie", "h100-nvl", "gh200-96gb", "h20",
    "h200", "gh200-144gb", "b200", "gb200", "b300", "gb300",
]  # fmt: skip


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue()


@pytest.fixture(scope="module")
def h100(catalogue: Catalogue) -> Product:
    return catalogue.product("h100-sxm")


def counts(geometry: Geometry) -> tuple[int, int, int, int, int]:
    maximal = geometry.maximal_layouts
    distinct = {tuple(sorted(layout.counts.items())) for layout in maximal}
    return (
        len(maximal),
        len(distinct),
        len(geometry.undominated_multisets),
        len(geometry.layouts),
        len(geometry.multisets),
    )


@pytest.mark.parametrize("name", EIGHT_SLICES)
def test_counts_of_layouts_on_eight_slices(catalogue: Catalogue, name: str) -> None:
    product = catalogue.product(name)
    core = tuple(p.name for p in product.base_profiles if not (p.g == 1 and p.memory_slices == 2))
    assert counts(Geometry(product, core)) == (19, 14, 12, 297, 37)
    assert counts(Geometry(product)) == (78, 38, 28, 722, 77)


@pytest.mark.parametrize("name", ["a30", "rtx-pro-6000"])
def test_counts_of_layouts_on_four_and_twelve_slices(catalogue: Catalogue, name: str) -> None:
    assert counts(Geometry(catalogue.product(name))) == (5, 4, 4, 25, 9)


def test_a_product_without_published_starts_has_no_layouts(catalogue: Catalogue) -> None:
    product = catalogue.product("rtx-pro-5000")
    assert Geometry(product).maximal_layouts == ()
    with pytest.raises(UnknownProfile, match="nobody has published"):
        Layout.parse(product, ["1g.12gb@0"])


@pytest.mark.parametrize("text", ["1g.10gb", "1g.10gb@", "@3", "1g.10gb@x", "1g.10gb@-1", "10gb@0", "1g.10gb@3@4", ""])
def test_what_is_not_a_placement_is_refused(text: str) -> None:
    with pytest.raises(UnknownProfile, match="not a placement"):
        Placement.parse(text)


@pytest.mark.parametrize("text", ["1g.10gb@3", "1g.24gb+me.all@9", "1g.24gb-me@0", "2g.48gb+gfx@6"])
def test_placements_are_written_as_they_are_read(text: str) -> None:
    assert str(Placement.parse(text)) == text


@pytest.mark.parametrize(
    ("legal", "placements"),
    [
        (True, ["2g.20gb@0", "2g.20gb@2", "1g.10gb@4", "1g.10gb@5", "1g.10gb@6"]),
        (True, ["1g.10gb@0", "1g.10gb@1", "2g.20gb@2", "3g.40gb@4"]),
        (True, ["3g.40gb@0", "3g.40gb@4"]),
        (False, ["3g.40gb@0", "3g.40gb@4", "1g.10gb@6"]),
        (False, ["7g.80gb@0", "1g.10gb@6"]),
        (False, ["1g.10gb@2", "1g.10gb@2"]),
        (False, ["1g.10gb+me@0", "1g.10gb+me@1"]),
        (True, ["1g.10gb+me@0", "1g.10gb@1"]),
    ],
)
def test_legality_is_overlap_of_memory_slices_not_the_sum_of_g(
    h100: Product, legal: bool, placements: list[str]
) -> None:
    if legal:
        assert sorted(map(str, Layout.parse(h100, placements))) == sorted(placements)
    else:
        with pytest.raises(IllegalLayout):
            Layout.parse(h100, placements)


@pytest.mark.parametrize(
    ("legal", "placements"),
    [
        (True, ["1g.24gb+me.all@0", "1g.24gb-me@3", "2g.48gb-me@6"]),
        (False, ["1g.24gb+me.all@0", "1g.24gb@3"]),
        (False, ["1g.24gb+me.all@0", "1g.24gb+gfx@3"]),
        (False, ["1g.24gb+me.all@0", "1g.24gb+me@3"]),
        (True, ["1g.24gb+me@0", "1g.24gb+gfx@3", "2g.48gb@6"]),
    ],
)
def test_all_media_engines_leave_room_for_profiles_without_any(
    catalogue: Catalogue, legal: bool, placements: list[str]
) -> None:
    product = catalogue.product("rtx-pro-6000")
    if legal:
        assert len(Layout.parse(product, placements)) == len(placements)
    else:
        with pytest.raises(IllegalLayout, match="media"):
            Layout.parse(product, placements)


def test_two_media_profiles_of_different_width_exclude_each_other(catalogue: Catalogue) -> None:
    with pytest.raises(IllegalLayout, match="at most one instance"):
        Layout.parse(catalogue.product("a30"), ["1g.6gb+me@0", "2g.12gb+me@2"])


def test_an_illegal_layout_shows_which_memory_slices_collide(h100: Product) -> None:
    with pytest.raises(IllegalLayout) as refused:
        Layout.parse(h100, ["3g.40gb@0", "2g.20gb@2", "1g.10gb@6"])
    assert "2g.20gb@2 and 3g.40gb@0 both need" not in refused.value.message
    assert "3g.40gb@0 and 2g.20gb@2 both need memory slice 2 and 3" in refused.value.message
    assert "3g.40gb@0     #  #  X  X  .  .  .  ." in refused.value.message
    assert "2g.20gb@2     .  .  X  X  .  .  .  ." in refused.value.message
    assert "1g.10gb@6     .  .  .  .  .  .  #  ." in refused.value.message
    assert refused.value.remedy == "sliceway profiles --gpu h100-sxm shows what can."


def test_the_picture_of_nothing_is_the_ruler(h100: Product) -> None:
    assert picture(h100, []) == "memory slice  0  1  2  3  4  5  6  7"


def test_a_start_that_the_profile_does_not_have_is_refused_with_those_it_has(h100: Product) -> None:
    with pytest.raises(UnknownProfile) as refused:
        Layout.parse(h100, ["2g.20gb@1"])
    assert refused.value.remedy == "It can start at 0, 2, 4."


def test_layouts_are_sorted_values(h100: Product) -> None:
    one, other = Layout.parse(h100, ["3g.40gb@4", "1g.10gb@0"]), Layout.parse(h100, ["1g.10gb@0", "3g.40gb@4"])
    assert one == other
    assert str(one) == "1g.10gb@0 3g.40gb@4"
    assert (one.g, one.mask, one.counts["3g.40gb"]) == (4, 0b11110001, 1)
    assert one.without(Placement(0, "1g.10gb")).adding(Placement(0, "1g.10gb")) == one
    assert Placement(4, "3g.40gb") in one
    assert str(Layout(h100)) == "(empty)"


def test_names_of_other_drivers_become_the_catalogues(catalogue: Catalogue) -> None:
    assert str(Layout.parse(catalogue.product("gb200"), ["3g.95gb@4"])) == "3g.93gb@4"


def test_slice_seven_is_reached_by_few(h100: Product) -> None:
    present = [Placement(i, "1g.10gb") for i in range(6)]
    assert Geometry(h100).free_starts(present) == {"1g.20gb": (6,), "1g.10gb": (6,)}
    assert Geometry(h100).free_starts([Placement(0, "7g.80gb")]) == {}


@pytest.mark.parametrize(
    ("occupied", "profile", "more"),
    [
        ([], "1g.10gb", 7),
        ([], "1g.20gb", 4),
        (["1g.10gb@1"], "2g.20gb", 2),
        (["1g.10gb@1"], "4g.40gb", 0),
        (["3g.40gb@0"], "1g.10gb", 3),
    ],
)
def test_remaining_capacity(h100: Product, occupied: list[str], profile: str, more: int) -> None:
    assert Geometry(h100).remaining_capacity(profile, map(Placement.parse, occupied)) == more


@pytest.mark.parametrize(
    ("wanted", "occupied", "expected"),
    [
        ({"3g.40gb": 1}, [], "3g.40gb@4"),
        ({"1g.10gb": 1}, [], "1g.10gb@6"),
        ({"1g.20gb": 1}, [], "1g.20gb@6"),
        ({"1g.10gb": 2, "2g.20gb": 1, "3g.40gb": 1}, [], "2g.20gb@0 1g.10gb@2 1g.10gb@3 3g.40gb@4"),
        ({"2g.20gb": 1}, ["1g.10gb@0"], "1g.10gb@0 2g.20gb@2"),
        ({}, ["1g.10gb@0"], "1g.10gb@0"),
        ({"3g.40gb": 2, "1g.10gb": 1}, [], None),
        ({"4g.40gb": 1}, ["1g.10gb@2"], None),
    ],
)
def test_placing_by_count_leaves_the_most_useful_rest(
    h100: Product, wanted: dict[str, int], occupied: list[str], expected: str | None
) -> None:
    found = Geometry(h100).place(wanted, map(Placement.parse, occupied))
    assert (str(found) if found else None) == expected


def test_extensions_keep_what_is_there(h100: Product) -> None:
    keep = Placement(4, "3g.40gb")
    found = Geometry(h100).extensions([keep])
    assert {layout for layout in Geometry(h100).maximal_layouts if keep in layout} == set(found)


def test_variants_are_walked_when_asked_for(catalogue: Catalogue) -> None:
    a30 = catalogue.product("a30")
    assert {p.profile for layout in Geometry.with_variants(a30).maximal_layouts for p in layout} == {
        p.name for p in a30.profiles
    }
