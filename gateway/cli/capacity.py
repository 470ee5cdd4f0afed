"""`sliceway capacity`: how many of which GPUs a configuration needs, what they cost, and what whole cards would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gateway.cli.capacity_chart import Bar, bars_of, svg
from gateway.cli.locate import ConfigArgument, config_path
from gateway.cli.output import Json, err, found_at, out, print_json
from gateway.cli.plan_view import show_assumed_prices
from gateway.config import Config, load_config
from gateway.planning import demanded, measured, tenant_of
from model_registry.atomic import write_atomically
from model_registry.catalogue import Product, load_catalogue
from model_registry.errors import ConfigError
from placement.capacity import Capacity, Purchase, capacity
from placement.schema import SimulatedFleet
from placement.workload import Card, Workload, constraints

_WIDTH = 48
_COLOURS = ("blue", "green", "magenta", "yellow", "cyan", "red", "bright_blue", "bright_green", "bright_magenta")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("capacity")(capacity_command)


def capacity_command(
    config: ConfigArgument = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="PRODUCT", help="Cards to choose from; several times for a mix."),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option("--price", metavar="PRODUCT=AMOUNT", help="Per GPU-hour, over fleet.prices of the configuration."),
    ] = None,
    chart: Annotated[
        Path | None, typer.Option("--chart", metavar="FILE.svg", help="Write the comparison as a picture, too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how many of which GPUs a configuration needs and what they cost. Looks at no machine; exits 1 if no number would do."""
    loaded = load_config(config_path(config))
    if not loaded.models:
        raise ConfigError(
            "there is no model to plan for", where="models", remedy="Name models, with what they must bear (`demand`)."
        )
    products = _products(loaded, gpu or [])
    named = _named(loaded) | _given(price or [])
    prices = _prices(loaded, products, named)
    if chart is not None:
        _refuse_unwritable(chart)
    cards = [Card.of(p) for p in products]
    work = demanded(loaded, cards)
    found = capacity(
        work,
        cards,
        prices,
        constraints=constraints(loaded.fleet),
        tenants=[tenant_of(t) for t in loaded.tenants],
        measured=measured(loaded),
    )
    priced = bool(named)
    assumed = sorted(prices.keys() - named.keys()) if priced else []
    unused = sorted(_given(price or []).keys() - prices.keys())
    if chart is not None:
        _write(chart, svg(bars_of(found, priced=priced), title="Cost per hour" if priced else "GPUs", priced=priced))
    if as_json:
        unreadable = {name: error.as_dict() for name, error in work.unreadable.items()}
        known = {"prices": prices if priced else None, "assumed_prices": assumed, "unused_prices": unused}
        print_json(found.as_public() | known | {"unreadable": unreadable, "estimate": True})
    else:
        _show(found, work, priced=priced)
        show_assumed_prices({name: prices[name] for name in assumed}, also=", or with --price")
        if unused:
            err.print(
                f"[yellow]--price {escape(', '.join(unused))}[/]: no such card was asked about (--gpu)", highlight=False
            )
        if chart is not None:
            out.print(f"[dim]· The picture is in {escape(str(chart))}.[/]", highlight=False)
    raise typer.Exit(0 if found.best.meets_all and not work.unreadable else 1)


def _products(config: Config, names: Sequence[str]) -> list[Product]:
    """The products that were named, once each, or those of a simulated fleet."""
    if not names and isinstance(config.fleet.discover, SimulatedFleet):
        names = [n for n in config.fleet.discover.simulate if n != "plain"]
    if not names:
        raise ConfigError(
            "no GPU product was named to choose from",
            where="--gpu",
            remedy="Name some: sliceway capacity CONFIG --gpu h100-sxm --gpu a100-80gb. `sliceway profiles` lists them.",
        )
    catalogue = load_catalogue()
    with found_at("--gpu"):
        return list({p.name: p for p in (catalogue.product(n) for n in names)}.values())


def _given(prices: Sequence[str]) -> dict[str, float]:
    """What `--price` says, by the catalogue's names."""
    catalogue = load_catalogue()
    found: dict[str, float] = {}
    for text in prices:
        name, equals, amount = text.rpartition("=")
        try:
            with found_at("--price"):
                found[catalogue.product(name).name] = _amount(amount) if equals else _amount("")
        except ValueError as error:
            raise ConfigError(
                f"{text!r} is no price", where="--price", remedy="Write PRODUCT=AMOUNT, like --price h100-sxm=2.5."
            ) from error
    return found


def _prices(config: Config, products: Sequence[Product], named: Mapping[str, float]) -> dict[str, float]:
    fleet = config.fleet.model_copy(update={"prices": dict(named)})
    return {p.name: fleet.price_per_hour(p.name) for p in products}


def _amount(text: str) -> float:
    amount = float(text)
    if not 0 <= amount < 1e6:
        raise ValueError(text)
    return amount


def _named(config: Config) -> dict[str, float]:
    catalogue = load_catalogue()
    return {catalogue.product(name).name: price for name, price in config.fleet.prices.items()}


def _refuse_unwritable(chart: Path) -> None:
    """Before anything is worked out: a picture that could not be written would be told of last."""
    if chart.suffix.lower() != ".svg":
        raise ConfigError(f"{chart.name} would hold an SVG picture", where="--chart", remedy="Name it .svg.")
    if chart.is_dir():
        raise ConfigError("this is a directory", where=f"--chart {chart}", remedy=f"Name a file: {chart / 'cost.svg'}.")
    if not chart.parent.is_dir():
        raise ConfigError(
            f"there is no directory {chart.parent}",
            where=f"--chart {chart}",
            remedy="Name a file in a directory that is there.",
        )


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise ConfigError(
            f"the chart cannot be written: {error.strerror}", where=str(path), remedy="Name a file that you can write."
        ) from error


def _show(found: Capacity, work: Workload, *, priced: bool) -> None:
    _show_unreadable(work)
    best = found.best
    cards = " + ".join(f"[bold]{n} x {escape(p)}[/]" for p, n in best.gpus.items()) or "no card"
    proof = "nothing cheaper exists" if best.proven else f"at most {best.plan.gap:.1%} above the cheapest"
    if not best.gpus:
        proof = "none of them serves any of it" if found.unmet else "nothing is asked of them"
    out.print(f"{cards}{_cost(best.cost_per_hour, priced)}  [dim]{proof}[/]", highlight=False)
    for group in _layouts(best):
        out.print(f"  {group}", highlight=False)
    out.print()
    out.print(_models(found, priced=priced))
    if found.tenants and priced:
        listed = " · ".join(f"{escape(t)} {c:.2f}" for t, c in found.tenants.items())
        out.print(f"\nper tenant and hour: {listed}", highlight=False)
    out.print()
    if bars := bars_of(found, priced=priced):
        _show_bars(bars, priced=priced)
    for unmet in found.unmet:
        help_ = f" [dim]It would do: {escape(' or '.join(unmet.remedies))}[/]" if unmet.remedies else ""
        blocked = work.models[unmet.demand.partition("@")[0]].blocked
        why = f"{unmet.reason}: {blocked}" if blocked else unmet.reason
        err.print(
            f"[bold red]not served[/] {escape(unmet.demand)}: {unmet.shortfall} missing. {escape(why)}.{help_}",
            highlight=False,
        )
    out.print("[dim]· Speeds are estimated from the roofline; fleet.head_room plans for more than is asked.[/]")


def _show_unreadable(work: Workload) -> None:
    for name, error in work.unreadable.items():
        err.print(f"[bold red]not counted[/] {escape(name)}: {escape(error.message)}", highlight=False)
        if error.remedy:
            err.print(f"      [dim]{escape(error.remedy)}[/]")


def _cost(amount: float, priced: bool) -> str:
    return f" for [bold]{amount:.2f}[/] per hour" if priced else ""


def _layouts(purchase: Purchase) -> list[str]:
    told = []
    for group in purchase.as_public()["layouts"]:  # type: ignore[attr-defined]
        slices = "  ".join(f"{s['slice']} [dim]{escape(str(s['for']))}[/]" for s in group["slices"])
        told.append(f"{group['gpus']} x {escape(group['product'])}: {slices}")
    return told


def _models(found: Capacity, *, priced: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("slices")
    for title in ("asked", "served", *(("per hour",) if priced else ()), "whole cards"):
        table.add_column(title, justify="right", no_wrap=True)
    for m in found.models:
        places = ", ".join(f"{n} x {p}" for p, n in m.places.items()) or "[red]none[/]"
        whole = "none holds it" if m.whole_cards is None else f"{m.whole_cards} x {m.whole_product}"
        if priced and m.whole_cost_per_hour is not None:
            whole += f"  {m.whole_cost_per_hour:.2f}"
        cost = (f"{m.cost_per_hour:.2f}",) if priced else ()
        unit = "/s" if m.unit == "requests/s" else ""
        table.add_row(escape(m.demand), places, f"{m.asked:g}{unit}", f"{m.served:.4g}{unit}", *cost, whole)
    return table


def _show_bars(bars: Sequence[Bar], *, priced: bool) -> None:
    """One bar per way to buy, to scale, in the models' colours."""
    most = max((b.total for b in bars), default=0.0)
    names = list(dict.fromkeys(part for b in bars for part, _ in b.parts))
    colours: Mapping[str, str] = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    width = max((len(b.label) for b in bars), default=0)
    for bar in bars:
        line = Text(f"{bar.label:>{width}} ")
        for name, amount in bar.parts:
            line.append("█" * max(1, round(_WIDTH * amount / most)) if amount and most else "", style=colours[name])
        line.append(f" {bar.total:.2f}" if priced else f" {bar.total:g}", style="bold" if bar.best else "")
        if bar.note:
            line.append(f"  {bar.note}", style="dim")
        out.print(line)
    legend = Text(" " * (width + 1))
    for name in names:
        legend.append("█ ", style=colours[name])
        legend.append(f"{name}  ")
    out.print(legend)
