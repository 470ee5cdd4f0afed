"""`sliceway pack`: the fewest GPUs of one product that hold given slices, and how each is cut."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from gateway.cli.output import Json, found_at, out, print_json
from gateway.cli.profiles import drawn
from model_registry.catalogue import Product, load_catalogue
from model_registry.errors import ConfigError
from model_registry.geometry import Layout, Placement
from model_registry.words import counted
from placement.planner.pack import Packing
from placement.planner.pack import pack as fewest_gpus
from placement.planner.solver import Limits

_MOST = 1_000_000


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("pack")(pack)


def pack(
    gpu: Annotated[str, typer.Option(help="The product: a100-80gb, an NVML name, or a PCI device id.")],
    demand: Annotated[
        list[str], typer.Option(metavar="PROFILE=N", help="So many slices of a profile, like 2g.20gb=7. Repeatable.")
    ],
    occupied: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='GPUs in use, as JSON: [["3g.40gb@4"], ["1g.10gb@0", "1g.10gb@1"]]. These slices stay.'
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="How long to search for a proof.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Find the fewest GPUs that hold these slices, with proof, and the memory slice at which each starts."""
    with found_at("--gpu"):
        product = load_catalogue().product(gpu)
    wanted = _demand(product, demand)
    in_use = _occupied(product, occupied) if occupied else ()
    began = time.perf_counter()
    packing = fewest_gpus(product, wanted, in_use, Limits(seconds=seconds))
    took = time.perf_counter() - began
    if as_json:
        print_json(_public(packing, took))
        return
    _show(packing, took)


def _demand(product: Product, entries: Iterable[str]) -> Counter[str]:
    wanted: Counter[str] = Counter()
    for entry in entries:
        name, equals, number = entry.partition("=")
        with found_at("--demand"):
            profile = product.profile(name.strip())
        try:
            count = int(number) if equals else -1
        except ValueError:
            count = -1
        if not 0 <= count <= _MOST:
            raise ConfigError(
                f"{entry!r} is not a profile with a number from 0 to {_MOST:,}",
                where="--demand",
                remedy=f"Write it like {profile.name}=3.",
            )
        wanted[profile.name] += count
    return wanted


def _occupied(product: Product, path: Path) -> tuple[Layout, ...]:
    raw = _read(path)
    if not isinstance(raw, list):
        raise _malformed(f"a list of GPUs is expected, and this is {_kind(raw)}", str(path))
    return tuple(_layout(product, entry, f"{path}[{number}]") for number, entry in enumerate(raw))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise _malformed(f"not JSON: {error.msg}", f"{path}:{error.lineno}:{error.colno}") from error
    except UnicodeDecodeError as error:
        raise _malformed(f"not text: byte {error.start} is no UTF-8", str(path)) from error
    except RecursionError as error:
        raise _malformed("nested too deeply", str(path)) from error
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", where=str(path), remedy="Name a readable file."
        ) from error


def _layout(product: Product, entry: object, where: str) -> Layout:
    if not isinstance(entry, list):
        raise _malformed(f"each GPU is a list of profile@start, and this is {_kind(entry)}", where)
    for number, text in enumerate(entry):
        if not isinstance(text, str):
            raise _malformed(f"profile@start is expected, and this is {_kind(text)}", f"{where}[{number}]")
    with found_at(where):
        return Layout.parse(product, entry)


def _malformed(message: str, where: str) -> ConfigError:
    return ConfigError(
        message, where=where, remedy='Per GPU a list of what it holds: [["3g.40gb@4"], ["1g.10gb@0", "1g.10gb@1"]].'
    )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _public(packing: Packing, took: float) -> dict[str, object]:
    # GPUs that get the same share one tuple: it is written out once, however many they are.
    written = {id(added): [str(p) for p in added] for added in {id(a): a for a in packing.created}.values()}
    return {
        "product": packing.product.name,
        "gpus": packing.gpus,
        "optimal": packing.optimal,
        "lower_bound": packing.lower_bound,
        "layouts": [written[id(added)] for added in packing.created],
        "seconds": round(took, 6),
    }


def _show(packing: Packing, took: float) -> None:
    proof = "no fewer will do" if packing.optimal else f"at least {packing.lower_bound} are needed"
    out.print(
        f"[bold]{counted(packing.gpus, 'GPU')}[/] {packing.product.name} ({proof}; {took:.2f} s)", highlight=False
    )
    if not packing.gpus:
        return
    groups = _alike(packing)
    margin = max(len(label) for label, _, _ in groups) + 2
    ruler, *bars = drawn(packing.product, [layout for _, _, layout in groups], width=out.width - margin)
    out.print(Text(" " * margin) + ruler, no_wrap=True)
    for (label, stays, _), bar in zip(groups, bars, strict=True):
        out.print(Text(label.ljust(margin)) + bar, no_wrap=True)
        if stays:
            out.print(f"[dim]{' ' * margin}stays: {', '.join(map(str, stays))}[/]", highlight=False)


def _alike(packing: Packing) -> Sequence[tuple[str, tuple[Placement, ...], Layout]]:
    """GPUs that end up the same, in order of the first: how many, what stays there, and what they hold."""
    fresh = len(packing.created) - len(packing.occupied)
    kept = (*(o.placements for o in packing.occupied), *((),) * fresh)
    counts = Counter(zip(kept, packing.created, strict=True))
    return [
        (f"{count:,}x{' in use' if before else ''}", before, Layout(packing.product, (*before, *added)))
        for (before, added), count in counts.items()
    ]
