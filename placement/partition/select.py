"""Which GPUs a rule of the configuration means: by index, UUID, product or PCI id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator

from model_registry.catalogue import Catalogue, load_catalogue
from model_registry.errors import ConfigError, SlicewayError
from model_registry.schema import Section
from placement.gpus import GpuState

UUID = re.compile(r"GPU-[0-9A-Za-z-]+")
PCI = re.compile(r"0x[0-9A-Fa-f]{4}(10[dD][eE])?")
Selector = Annotated[int, Field(ge=0, strict=True)] | str


class GpuSelection(Section):
    """The base of rules about GPUs."""

    gpus: Literal["all"] | tuple[Selector, ...] = Field(
        default="all",
        description="`all` that it can apply to, or a list of indices, UUIDs, products (`h100-sxm`) and PCI ids (`0x2330`).",
    )
    products: tuple[str, ...] = Field(
        default=(), description="Of those, only GPUs of these products or PCI ids. Every one if unset."
    )

    @field_validator("gpus")
    @classmethod
    def _known_selectors(cls, value: Literal["all"] | tuple[Selector, ...]) -> Literal["all"] | tuple[Selector, ...]:
        names = tuple(s for s in value if isinstance(s, str)) if value != "all" else ()
        _check_products(tuple(n for n in names if not UUID.fullmatch(n)))
        if value == ():
            raise ValueError("name at least one GPU, or `all`")
        return value

    @field_validator("products")
    @classmethod
    def _known_products(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _check_products(value)
        return value

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """What `gpus` lists; empty for `all`."""
        return () if self.gpus == "all" else self.gpus


def selected(gpus: Sequence[GpuState], rule: GpuSelection, where: str, catalogue: Catalogue) -> list[GpuState]:
    """The GPUs that `rule` means, in their order; for `all`, every one of its products.

    Raises ConfigError for a single GPU that is not there. Of a product a machine may have none.
    """
    of_product = [g for g in gpus if not rule.products or any(_is_product(g, p, catalogue) for p in rule.products)]
    if rule.gpus == "all":
        return of_product
    for selector in rule.selectors:
        if not _is_kind(selector) and not any(_matches(g, selector, catalogue) for g in gpus):
            raise ConfigError(
                f"there is no GPU {selector}",
                where=f"{where}.gpus",
                remedy=f"There are: {', '.join(f'{g.index} = {g.uuid} ({g.product})' for g in gpus) or 'none'}.",
            )
    return [g for g in of_product if any(_matches(g, selector, catalogue) for selector in rule.selectors)]


def names_gpu(gpus: Sequence[GpuState], selector: Selector) -> bool:
    """Whether `selector` means any of `gpus`."""
    catalogue = load_catalogue()
    return any(_matches(gpu, selector, catalogue) for gpu in gpus)


def _is_kind(selector: Selector) -> bool:
    """Whether it names GPUs of a kind rather than one GPU."""
    return isinstance(selector, str) and not UUID.fullmatch(selector)


def _matches(gpu: GpuState, selector: Selector, catalogue: Catalogue) -> bool:
    if isinstance(selector, int):
        return gpu.index == selector
    if UUID.fullmatch(selector):
        return gpu.uuid.rpartition("/")[2] == selector  # a cluster calls its GPUs NODE/UUID
    return _is_product(gpu, selector, catalogue)


def _is_product(gpu: GpuState, name: str, catalogue: Catalogue) -> bool:
    if PCI.fullmatch(name):
        return gpu.pci_device_id >> 16 == int(name[2:6], 16)
    return gpu.product == catalogue.product(name).name


def _check_products(names: tuple[str, ...]) -> None:
    catalogue = load_catalogue()
    for name in names:
        try:
            if not PCI.fullmatch(name):
                catalogue.product(name)
        except SlicewayError as error:
            raise ValueError(in_one(error)) from error


def in_one(error: SlicewayError) -> str:
    """Message and remedy as one text, for errors that pydantic carries."""
    return "\n".join(filter(None, (error.message, error.remedy)))
