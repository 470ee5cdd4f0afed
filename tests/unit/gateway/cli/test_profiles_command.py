from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from gateway.cli.profiles import drawn, register
from model_registry.catalogue import load_catalogue
from model_registry.errors import UnknownProduct
from model_registry.geometry import Geometry


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return app


def test_json_has_exactly_the_public_fields(app: typer.Typer) -> None:
    printed = CliRunner().invoke(app, ["profiles", "--gpu", "h100-sxm", "--json"])
    got = json.loads(printed.stdout)
    assert set(got) == {"product", "memory_slices", "compute_slices", "profiles", "maximal_layouts"}
    assert (got["product"], got["memory_slices"], got["compute_slices"], len(got["maximal_layouts"])) == (
        "H100-80GB-SXM",
        8,
        7,
        78,
    )
    assert set(got["profiles"][0]) == {
        "name", "id", "memory_bytes", "sm_count", "memory_slices", "placements", "max_instances", "confidence",
    }  # fmt: skip
    assert got["profiles"][0]["confidence"]["memory_bytes"] == "measured"
    assert ["4g.40gb@0", "3g.40gb@4"] in got["maximal_layouts"]


def test_without_a_product_all_are_listed(app: typer.Typer) -> None:
    got = json.loads(CliRunner().invoke(app, ["profiles", "--json"]).stdout)
    assert len(got["products"]) == len(load_catalogue().products)
    text = CliRunner().invoke(app, ["profiles"]).stdout
    assert "rtx-pro-6000" in text


def test_text_shows_figures_doubts_and_layouts(app: typer.Typer) -> None:
    text = CliRunner().invoke(app, ["profiles", "--gpu", "h200"]).stdout
    assert "69.75 ~" in text
    assert "78 ways to fill one GPU" in text


def test_a_product_without_starts_says_so(app: typer.Typer) -> None:
    text = CliRunner().invoke(app, ["profiles", "--gpu", "rtx-pro-5000"]).stdout
    assert "driver's answer" in text
    assert "ways to fill" not in text


def test_an_unknown_product_is_an_error(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["profiles", "--gpu", "gtx-1080"])
    assert isinstance(result.exception, UnknownProduct)


@pytest.mark.parametrize("name", ["a30", "h100-sxm", "rtx-pro-6000"])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_layouts_are_drawn_to_scale(name: str, width: int) -> None:
    product = load_catalogue().product(name)
    layouts = Geometry(product).maximal_layouts
    ruler, *bars = drawn(product, layouts, width=width)
    assert len({len(bar) for bar in bars} | {len(ruler)}) == 1
    assert len(ruler) <= width
    assert product.memory_slices is not None
    cell = len(ruler) // product.memory_slices
    for layout, bar in zip(layouts, bars, strict=True):
        edges = [i // cell for i, character in enumerate(bar.plain) if character == "▏"]
        assert edges == [p.start for p in layout]
