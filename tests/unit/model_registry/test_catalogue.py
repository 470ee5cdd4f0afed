from __future__ import annotations

from dataclasses import replace

import pytest

from model_registry.catalogue import MIB, Catalogue, Confidence, Product, differences, load_catalogue
from model_registry.errors import UnknownProduct, UnknownProfile


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue()


@pytest.mark.parametrize(
    "name",
    [
        "H100-80GB-SXM",
        "h100-sxm",
        "H100 SXM",
        "NVIDIA H100 80GB HBM3",
        "h100 80gb hbm3",
        "2330",
        "0x2330",
        "0x233010DE",
        "10de:2330",
        "10DE2330",
    ],
)
def test_a_product_is_found_by_every_name_it_has(catalogue: Catalogue, name: str) -> None:
    assert catalogue.product(name).name == "H100-80GB-SXM"


def test_a_name_never_means_two_products(catalogue: Catalogue) -> None:
    for product in catalogue.products:
        for name in (product.name, *product.aliases, *product.pci_device_ids):
            assert catalogue.product(name) is product


def test_a_name_that_several_products_begin_with_is_refused_with_all_of_them(catalogue: Catalogue) -> None:
    with pytest.raises(UnknownProduct, match="could be any of") as refused:
        catalogue.product("a100")
    assert refused.value.remedy == "Say which: a100-40gb, a100-80gb."


def test_a_name_that_one_product_begins_with_is_taken_for_a_misspelt_one(catalogue: Catalogue) -> None:
    with pytest.raises(UnknownProduct, match="there is no GPU product 'a100-80g'") as refused:
        catalogue.product("a100-80g")
    assert str(refused.value.remedy).startswith("Did you mean a100-80gb?")


def test_a_misspelt_product_gets_the_nearest_name(catalogue: Catalogue) -> None:
    with pytest.raises(UnknownProduct) as refused:
        catalogue.product("rtx-pro-600O")
    assert "rtx-pro-6000" in str(refused.value.remedy).split("?")[0]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("h1000", "h100-sxm or h100-pcie or h100-nvl or h100-96gb"),
        ("A1000", "a100-40gb or a100-80gb"),
        ("h100-smx", "h100-sxm"),
        ("NVIDIA B2000", "b200"),
        ("h20O", "h20"),
    ],
)
def test_the_nearest_name_begins_as_the_word_does(catalogue: Catalogue, name: str, near: str) -> None:
    with pytest.raises(UnknownProduct) as refused:
        catalogue.product(name)
    assert str(refused.value.remedy).startswith(f"Did you mean {near}")


@pytest.mark.parametrize("name", ["", "  ", "0x", "dead"])
def test_nonsense_is_refused_with_the_list(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(UnknownProduct, match="no GPU product"):
        catalogue.product(name)


def test_a_misspelt_profile_gets_the_nearest_name(catalogue: Catalogue) -> None:
    with pytest.raises(UnknownProfile) as refused:
        catalogue.product("h200").profile("1g.10gb")
    assert "1g.18gb" in str(refused.value.remedy)


@pytest.mark.parametrize(
    ("product", "old", "name"), [("gb200", "3g.95gb", "3g.93gb"), ("a100-80gb", "7g.79gb", "7g.80gb")]
)
def test_names_that_other_drivers_give_are_known(catalogue: Catalogue, product: str, old: str, name: str) -> None:
    assert catalogue.product(product).profile(old).name == name


@pytest.mark.parametrize(
    ("product", "profile", "mib", "sms", "at_most"),
    [
        ("h100-sxm", "1g.20gb", 20096, 26, 4),
        ("h100-sxm", "3g.40gb", 40448, 60, 2),
        ("h100-pcie", "1g.20gb", 20096, 14, 4),
        ("h100-pcie", "3g.40gb", 40448, 46, 2),
        ("h200", "1g.35gb", 33280, 26, 4),
        ("rtx-pro-6000", "1g.24gb", 24192, 46, 4),
        ("a30", "2g.12gb", 11968, 28, 2),
    ],
)
def test_figures_that_published_tables_get_wrong(
    catalogue: Catalogue, product: str, profile: str, mib: int, sms: int, at_most: int
) -> None:
    found = catalogue.product(product).profile(profile)
    assert (found.memory_bytes, found.sm_count, found.max_instances) == (mib * MIB, sms, at_most)


def test_one_profile_name_means_different_things_on_two_products(catalogue: Catalogue) -> None:
    assert catalogue.product("h200").profile("1g.35gb").memory_slices == 2
    assert catalogue.product("gb300").profile("1g.35gb").memory_slices == 1


def test_figures_keep_their_own_laws(catalogue: Catalogue) -> None:
    for product in catalogue.products:
        for p in product.profiles:
            where = f"{product.name} {p.name}"
            assert set(p.figures) == {"id", "memory_bytes", "sm_count", "placements", "max_instances"}, where
            assert p.g <= product.compute_slices, where
            assert (p.memory_bytes is None) == (p.confidence("memory_bytes") is Confidence.UNKNOWN), where
            assert (p.sm_count is None) == (p.confidence("sm_count") is Confidence.UNKNOWN), where
            assert all(f.source for f in p.figures.values()), where
            if p.plannable:
                assert product.memory_slices is not None
                assert all(s + (p.memory_slices or 0) <= product.memory_slices for s in p.placements), where
            if p.memory_bytes and product.total_memory_bytes:
                assert p.memory_bytes < product.total_memory_bytes, where
        ids = [p.id for p in product.profiles if p.id is not None]
        assert len(ids) == len(set(ids))


def test_a_profile_is_found_by_its_id_on_its_own_product_only(catalogue: Catalogue) -> None:
    names = {
        n: p.name if (p := catalogue.product(n).profile_by_id(14)) else None
        for n in ("h100-sxm", "a30", "rtx-pro-6000")
    }
    assert names == {"h100-sxm": "2g.20gb", "a30": "1g.6gb", "rtx-pro-6000": "1g.24gb"}
    assert catalogue.product("h100-sxm").profile_by_id(99) is None


def test_identify_trusts_memory_over_name(catalogue: Catalogue) -> None:
    found = catalogue.identify(nvml_name="NVIDIA H20", pci_device_id=0x232910DE, total_memory_bytes=97871 * MIB)
    assert found is not None
    assert found.name == "H20-96GB"
    larger = catalogue.identify(nvml_name="NVIDIA H20", pci_device_id=0x232910DE, total_memory_bytes=143771 * MIB)
    assert larger is None


def test_identify_falls_back_to_the_name_and_gives_up_on_strangers(catalogue: Catalogue) -> None:
    h200 = catalogue.identify(nvml_name="NVIDIA H200", pci_device_id=0xFFFF10DE, total_memory_bytes=143771 * MIB)
    assert h200 is catalogue.product("h200")
    assert catalogue.identify(nvml_name="Tesla T4", pci_device_id=0x1EB810DE, total_memory_bytes=15360 * MIB) is None


def test_differences_name_what_the_driver_says_otherwise(catalogue: Catalogue) -> None:
    table = catalogue.product("a100-80gb")
    first, *rest = table.profiles
    driver = replace(
        table,
        profiles=(replace(first, memory_bytes=9856 * MIB, sm_count=None), replace(rest[0], name="1g.99gb"), *rest[1:]),
    )
    assert differences(table, table) == ()
    assert differences(table, driver) == (
        "1g.99gb is not in the table",
        f"1g.10gb: memory_bytes is {9856 * MIB}, the table says {9728 * MIB} (measured)",
    )


def test_what_the_table_does_not_know_is_no_difference(catalogue: Catalogue) -> None:
    table = catalogue.product("gb300")
    driver = replace(table, profiles=tuple(replace(p, memory_bytes=34 * 2**30, sm_count=20) for p in table.profiles))
    assert differences(table, driver) == ()


def test_products_are_values(catalogue: Catalogue) -> None:
    again = load_catalogue().product("h200")
    mine: Product = catalogue.product("h200")
    assert again == mine
    assert hash(again) == hash(mine)
    assert replace(mine, min_driver="1") != mine
