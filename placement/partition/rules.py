"""`fleet.layouts`: which GPUs are to hold which MIG instances, as the operator writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated

from pydantic import Field, model_validator

from model_registry.catalogue import Catalogue, Product, load_catalogue
from model_registry.errors import SlicewayError, UnknownProfile
from model_registry.geometry import Placement
from placement.partition.select import PCI, UUID, GpuSelection, in_one
from placement.partition.wanted import Wanted, check_possible, wanted_on


class LayoutRule(GpuSelection):
    """What some GPUs are to hold. A GPU that several rules name follows the last of them; one that none names stays."""

    mig: bool = Field(default=True, description="false: MIG off, the GPU is one slice.")
    layout: dict[str, Annotated[int, Field(ge=0, le=64)]] | tuple[str, ...] = Field(
        default_factory=dict,
        description="By count, `{1g.10gb: 4, 3g.40gb: 1}`, or a list like `[3g.40gb@4, 1g.10gb]`; empty: no instances.",
    )

    @model_validator(mode="after")
    def _possible(self) -> LayoutRule:
        if not self.mig and self.layout:
            raise ValueError("a layout needs MIG: take away `layout`, or `mig: false`")
        if self.layout:
            _check_layout(self, load_catalogue())
        return self

    @property
    def entries(self) -> tuple[tuple[str, int], ...]:
        """`profile` or `profile@start`, and how many of it."""
        if isinstance(self.layout, Mapping):
            return tuple((name, count) for name, count in self.layout.items() if count)
        return tuple((entry, 1) for entry in self.layout)


def _check_layout(rule: LayoutRule, catalogue: Catalogue) -> None:
    """Refuse what no GPU that the rule can mean could hold. What a GPU really is, only the machine tells."""
    for entry, _ in rule.entries:
        if "@" in entry:
            _check_form(entry)
    candidates = tuple(_candidates(rule, catalogue))
    errors: dict[Product, SlicewayError] = {}
    for product in candidates:
        try:
            wanted: Wanted = wanted_on(product, rule.entries, where="layout")
            if all(product.profile(p).plannable for p in wanted.profiles):
                check_possible(product, wanted)
            return
        except SlicewayError as error:
            errors[product] = error
    impossible = {p: e for p, e in errors.items() if not isinstance(e, UnknownProfile)}
    if impossible:
        raise ValueError(_impossible(impossible))
    if len(candidates) == 1:
        raise ValueError(in_one(errors[candidates[0]]))
    known = {p.name for product in candidates for p in product.profiles}
    for entry, _ in rule.entries:
        if (name := entry.partition("@")[0]) not in known:
            raise ValueError(in_one(_unknown(name, known)))
    raise ValueError(f"no GPU product has all of {', '.join(e for e, _ in rule.entries)}; sliceway profiles lists them")


def _impossible(errors: Mapping[Product, SlicewayError]) -> str:
    """One product's picture stands for all that have these profiles; the others are named, since the fleet may be theirs."""
    (_, error), *others = errors.items()
    if not others:
        return in_one(error)
    names = ", ".join(product.name for product, _ in others)
    return f"{in_one(error)}\nNor on any other product with these profiles: {names}."


def _check_form(entry: str) -> None:
    try:
        Placement.parse(entry)
    except SlicewayError as error:
        raise ValueError(in_one(error)) from error


def _candidates(rule: LayoutRule, catalogue: Catalogue) -> Iterator[Product]:
    names = rule.products or tuple(g for g in rule.selectors if isinstance(g, str))
    named = [n for n in names if not UUID.fullmatch(n)]
    only_named = bool(rule.products) or (bool(named) and len(named) == len(rule.selectors))
    if not only_named:
        yield from catalogue.products
        return
    for name in named:
        product = catalogue.by_pci(name[2:6]) if PCI.fullmatch(name) else catalogue.product(name)
        yield from (product,) if product else catalogue.products


def _unknown(name: str, known: set[str]) -> UnknownProfile:
    near = get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    advice = f"Did you mean {' or '.join(near)}? " if near else ""
    return UnknownProfile(
        f"no GPU product has a profile {name!r}", remedy=f"{advice}`sliceway profiles` lists them by product."
    )
