"""`sliceway profiles`: the MIG catalogue, and what fits on one GPU drawn to scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from gateway.cli.output import Json, out, print_json
from model_registry.catalogue import Catalogue, Confidence, Product, ProfileInfo, load_catalogue
from model_registry.geometry import Geometry, Layout

_COLOURS = {1: "blue", 2: "green", 3: "magenta", 4: "cyan", 7: "yellow"}
_MARKS = {
    Confidence.MEASURED: "",
    Confidence.DOCUMENTED: "",
    Confidence.INFERRED: " ~",
    Confidence.WEAK: " ?",
    Confidence.UNKNOWN: "",
}


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("profiles")(profiles)


def profiles(
    gpu: Annotated[
        str | None,
        typer.Option(help="A product: h100-sxm, an NVML name, or a PCI device id. Unset: the list of products."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which MIG profiles a GPU product has and every way to fill one GPU with them."""
    catalogue = load_catalogue()
    if gpu is None:
        _show_products(catalogue, as_json=as_json)
        return
    product = catalogue.product(gpu)
    geometry = Geometry(product)
    if as_json:
        print_json(_public(product, geometry))
        return
    _show_product(product, geometry)


def _public(product: Product, geometry: Geometry) -> dict[str, object]:
    return {
        "product": product.name,
        "memory_slices": product.memory_slices,
        "compute_slices": product.compute_slices,
        "profiles": [p.as_public() for p in product.profiles],
        "maximal_layouts": [[str(p) for p in layout] for layout in geometry.maximal_layouts],
    }


def _show_products(catalogue: Catalogue, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "products": [
                    {
                        "product": p.name,
                        "short_names": list(p.short_names),
                        "nvml_names": list(p.nvml_names),
                        "architecture": p.architecture,
                        "profiles": [q.name for q in p.profiles],
                    }
                    for p in catalogue.products
                ]
            }
        )
        return
    table = Table(box=None, pad_edge=False)
    for title in ("short name", "product", "GiB", "slices"):
        table.add_column(title, no_wrap=True)
    table.add_column("profiles", overflow="fold")
    for p in catalogue.products:
        names = " ".join(q.name for q in p.base_profiles)
        table.add_row(p.short_names[0], p.name, _gib(p.total_memory_bytes), str(p.memory_slices or "?"), names)
    out.print(table)
    out.print("[dim]sliceway profiles --gpu NAME shows one of them.[/]")


def _show_product(product: Product, geometry: Geometry) -> None:
    out.print(
        f"[bold]{product.name}[/] · {product.architecture} · compute capability {product.compute_capability} · "
        f"{product.memory_slices or '?'} memory slices · {product.compute_slices} compute slices · driver {product.min_driver or '?'} or later"
    )
    table = Table("profile", "id", "memory GiB", "SMs", "slices", "starts", "at most", box=None, pad_edge=False)
    for p in product.profiles:
        table.add_row(*_row(p))
    out.print(table)
    out.print("[dim]~ inferred · ? weak source, or sources that disagree[/]")
    for note in product.notes:
        out.print(f"[dim]- {note}[/]")
    if not geometry.maximal_layouts:
        out.print(
            "[yellow]Nobody has published where these profiles start: layouts can only be planned with the driver's answer.[/]"
        )
        return
    out.print(
        f"\n{len(geometry.maximal_layouts)} ways to fill one GPU (profiles without variants), memory slices to scale:"
    )
    for line in drawn(product, geometry.maximal_layouts, width=out.width):
        out.print(line, no_wrap=True)


def _row(profile: ProfileInfo) -> tuple[str, ...]:
    def marked(text: str, figure: str) -> str:
        return text + _MARKS[profile.confidence(figure)]

    return (
        profile.name,
        marked(str(profile.id if profile.id is not None else "?"), "id"),
        marked(_gib(profile.memory_bytes), "memory_bytes"),
        marked(str(profile.sm_count or "?"), "sm_count"),
        str(profile.memory_slices or "?"),
        marked(",".join(map(str, profile.placements)) or "?", "placements"),
        marked(str(profile.max_instances), "max_instances"),
    )


def _gib(value: int | None) -> str:
    return "?" if value is None else f"{value / 2**30:.2f}"


def drawn(product: Product, layouts: Iterable[Layout], *, width: int = 80) -> list[Text]:
    """One line per layout, each memory slice equally wide, with a ruler of slice numbers on top."""
    slices = product.memory_slices or 0
    longest = max(((len(p.name) + 2) / (p.memory_slices or 1) for p in product.base_profiles), default=4)
    cell = max(2, min(int(-(-longest // 1)), (width - 1) // max(slices, 1)))
    ruler = Text("".join(f"{i:<{cell}}" for i in range(slices)), style="dim")
    return [ruler, *(_bar(product, layout, cell=cell) for layout in layouts)]


def _bar(product: Product, layout: Layout, *, cell: int) -> Text:
    line, at = Text(), 0
    for placement in layout:
        profile = product.profile(placement.profile)
        size = profile.memory_slices or 0
        line.append("·".ljust(cell) * (placement.start - at), style="dim")
        line.append(
            "▏" + placement.profile[: cell * size - 1].center(cell * size - 1),
            style=f"black on {_COLOURS.get(profile.g, 'white')}",
        )
        at = placement.start + size
    line.append("·".ljust(cell) * ((product.memory_slices or 0) - at), style="dim")
    return line
