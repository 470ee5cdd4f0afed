"""What an operator asks of planning: prices, GPUs to leave alone, slices for other work, head-room, and autoscaling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from model_registry.catalogue import Catalogue, load_catalogue
from model_registry.errors import SlicewayError
from model_registry.schema import Duration, Section, Size
from placement.partition.select import GpuSelection, in_one

_RESERVE_WORDS = frozenset({"profiles", "note", "gpus", "products"})
_NO_PRICE = 1.0
"""A card whose price nobody named counts as one: then the fewest cards are the cheapest."""


def parse_ratio(value: object) -> object:
    """A share from `20%` or `0.2`."""
    if not isinstance(value, str):
        return value
    number = value.strip()
    try:
        return float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError as error:
        raise ValueError(f"{value!r} is no share; write 20% or 0.2") from error


Ratio = Annotated[float, BeforeValidator(parse_ratio)]
"""A share of one; in YAML also as per cent."""


class ReserveRule(GpuSelection):
    """Slices for work that is not ours: made once, shown with UUID and CPU cores, and never touched again.

    Written `{4g.40gb: 1, note: fine-tuning}`; `gpus` and `products` say where, any GPU with the profile if unset.
    """

    profiles: dict[str, Annotated[int, Field(ge=1, le=10_000)]] = Field(
        min_length=1, description="Slices by profile, like `4g.40gb: 1`."
    )
    note: str = Field(min_length=1, max_length=80, description="For whom or what; it tells reservations apart.")

    @model_validator(mode="before")
    @classmethod
    def _profiles_beside_the_note(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        plain = {k: v for k, v in value.items() if k in _RESERVE_WORDS}
        inline = {k: v for k, v in value.items() if k not in _RESERVE_WORDS}
        return plain | ({"profiles": {**plain.get("profiles", {}), **inline}} if inline else {})

    @model_validator(mode="after")
    def _known_profiles(self) -> ReserveRule:
        catalogue = load_catalogue()
        named = [catalogue.product(p) for p in self.products if not p.startswith("0x")] or list(catalogue.products)
        known = sorted({n for product in named for p in product.profiles for n in (p.name, *p.alternate_names)})
        for name in self.profiles:
            if name not in known:
                near = get_close_matches(name, known, n=3, cutoff=0.5)
                advice = f"did you mean {' or '.join(near)}?" if near else "`sliceway profiles` lists them by product"
                raise ValueError(f"no GPU product meant here has a profile {name!r}; {advice}")
        return self


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, Mapping) else value


Reserve = Annotated[tuple[ReserveRule, ...], BeforeValidator(_one_or_many)]
"""One reservation or a list of them."""


class AutoscalePolicy(Section):
    """How replicas follow demand between `min` and `max`. Up quickly and down slowly, since a queue hurts at once."""

    look_every: Duration = Field(
        default=1.0, description="How often gateways tell what they see, and the controller looks at it."
    )
    window: Duration = Field(default=60.0, description="Rates and latencies are means over so long.")
    target_busy: Ratio = Field(
        default=0.7, gt=0, le=1, description="Share of its capacity that a replica is to be used to."
    )
    tolerance: Ratio = Field(
        default=0.1, ge=0, lt=1, description="Deviations from the target that change nothing: hysteresis."
    )
    scale_up_after: Duration = Field(default=15.0, description="How long demand must stay above before replicas come.")
    scale_down_after: Duration = Field(default=300.0, description="How long it must stay below before they go.")
    cool_down: Duration = Field(default=60.0, description="After a change, so long nothing else changes for the model.")
    sleep_after: Duration = Field(
        default=900.0, description="Without a request, a model with min: 0 sleeps after that."
    )
    sleep: Literal["auto", "sleep-mode", "stop"] = Field(
        default="auto",
        description="How: vLLM's sleep mode keeps the slice, a stopped engine frees it; `auto` takes what wakes faster.",
    )
    sleep_memory: Size | None = Field(
        default=None,
        description="Host memory that the weights of sleeping models may take together; half of what is available if unset.",
    )
    repartition: Literal["propose", "automatic"] = Field(
        default="propose",
        description="Whether GPUs may be cut anew for demand, or it is only shown by `sliceway plan`.",
    )
    repartition_gain: Ratio = Field(
        default=2.0,
        gt=1,
        le=100,
        description="Requests gained for each one disturbed, at least, before GPUs are cut anew.",
    )

    repartition_horizon: Duration = Field(
        default=600.0, description="For how long a repartition's gain is counted: demand seldom lasts for ever."
    )

    @model_validator(mode="after")
    def _times_go_together(self) -> AutoscalePolicy:
        if self.window < self.look_every:
            raise ValueError(
                f"window ({self.window:g}s) is shorter than look_every ({self.look_every:g}s), so requests between two looks "
                "would not count; make it at least as long"
            )
        if self.scale_down_after < self.scale_up_after:
            raise ValueError(
                "scale_down_after is shorter than scale_up_after, so replicas would come and go; make it longer"
            )
        return self


class PlanningConfig(Section):
    """The part of `fleet:` that planning reads."""

    partition: Literal["layouts", "planned"] = Field(
        default="layouts",
        description="`planned`: GPUs that no layout names are cut as the plan for models and demands says. `layouts`: they stay.",
    )
    prices: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = Field(
        default_factory=dict, description="Per GPU-hour by product, in any currency: `{h100-sxm: 2.5}`."
    )
    cordon: tuple[Annotated[int, Field(ge=0, strict=True)] | str, ...] = Field(
        default=(), description="GPUs that nothing new is put on, by index, UUID or product; what runs there stays."
    )
    reserve: Reserve = Field(
        default=(), description="Slices for other work: `[{4g.40gb: 1, note: fine-tuning}]`; made, then never touched."
    )
    head_room: Ratio = Field(
        default=0.0, ge=0, le=10, description="Planned beyond every demand: `20%` or 0.2. Replicas by number get none."
    )
    max_layout_changes: int | None = Field(
        default=None, ge=0, le=10_000, description="Instances that one run may make and destroy; no limit if unset."
    )
    autoscale: AutoscalePolicy = AutoscalePolicy()

    @field_validator("prices")
    @classmethod
    def _products_once(cls, value: dict[str, float]) -> dict[str, float]:
        catalogue, seen = load_catalogue(), dict[str, str]()
        for name in value:
            product = _product_name(catalogue, name)
            if product in seen:
                raise ValueError(f"{seen[product]!r} and {name!r} are the same product; name one price for it")
            seen[product] = name
        return value

    @field_validator("cordon")
    @classmethod
    def _known_gpus(cls, value: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if value:
            GpuSelection(gpus=value)
        return value

    @field_validator("reserve")
    @classmethod
    def _notes_once(cls, value: tuple[ReserveRule, ...]) -> tuple[ReserveRule, ...]:
        notes = [rule.note for rule in value]
        for note in notes:
            if notes.count(note) > 1:
                raise ValueError(
                    f"two reservations have the note {note!r}; the note tells them apart, so name each its own"
                )
        return value

    def assumed_prices(self, products: Iterable[str]) -> dict[str, float]:
        """What is counted for those of `products` (the catalogue's names) that have no price, where others have one."""
        if not self.prices:
            return {}
        catalogue = load_catalogue()
        named = {_product_name(catalogue, name) for name in self.prices}
        return {product: self.price_per_hour(product) for product in sorted(set(products) - named)}

    def price_per_hour(self, product: str) -> float:
        """What a GPU-hour of `product` (the catalogue's name) costs; 1 where no price is named at all.

        Where some products have a price and this one has none, it costs the mean of those that have: neither free nor
        beyond reach.
        """
        catalogue = load_catalogue()
        known = {_product_name(catalogue, name): price for name, price in self.prices.items()}
        if not known:
            return _NO_PRICE
        return known.get(product, sum(known.values()) / len(known))


def _product_name(catalogue: Catalogue, name: str) -> str:
    try:
        return catalogue.product(name).name
    except SlicewayError as error:
        raise ValueError(in_one(error)) from error
