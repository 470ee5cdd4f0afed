"""Random fleets and demands for tests and measurements. Everything random comes from the generator handed in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random

from model_registry.catalogue import Product
from placement.planner.types import FleetGpu, ModelDemand, Option, Problem

# The four request mixes that arXiv 2511.18906 evaluates with, on the profiles of an A100-80GB. The names are the
# paper's; the shares are ours in the shape that each name describes.
MIXES: Mapping[str, Mapping[str, float]] = {
    "uniform": dict.fromkeys(("7g.80gb", "4g.40gb", "3g.40gb", "2g.20gb", "1g.20gb", "1g.10gb"), 1 / 6),
    "skew-small": {"7g.80gb": 0.05, "4g.40gb": 0.1, "3g.40gb": 0.1, "2g.20gb": 0.2, "1g.20gb": 0.25, "1g.10gb": 0.3},
    "skew-big": {"7g.80gb": 0.3, "4g.40gb": 0.25, "3g.40gb": 0.2, "2g.20gb": 0.1, "1g.20gb": 0.1, "1g.10gb": 0.05},
    "bimodal": {"7g.80gb": 0.3, "4g.40gb": 0.15, "3g.40gb": 0.05, "2g.20gb": 0.05, "1g.20gb": 0.15, "1g.10gb": 0.3},
}


def arrivals(chance: Random, mix: str, count: int) -> Iterator[str]:
    """So many requested profiles of one mix, one after the other."""
    shares = MIXES[mix]
    yield from chance.choices(list(shares), list(shares.values()), k=count)


def fleet(parts: Sequence[tuple[Product, int, float]], *, gpus_per_node: int = 8) -> tuple[FleetGpu, ...]:
    """Empty GPUs: products with their number and price per hour, in nodes of one product."""
    return tuple(
        FleetGpu(
            f"{product.short_names[0]}-{n:05d}",
            product.name,
            product,
            f"{product.short_names[0]}-node-{n // gpus_per_node}",
            price_per_hour=price,
        )
        for product, count, price in parts
        for n in range(count)
    )


def demands(chance: Random, products: Sequence[Product], *, models: int, replicas: int) -> tuple[ModelDemand, ...]:
    """Models that together need about so many replicas: mostly small ones, half with a rate and half by number.

    A model fits the profiles from its own size to a little over twice that, on every product; a profile serves in
    proportion to its compute slices, and half as much again on each further product.
    """
    weights = [chance.random() + 0.2 for _ in range(models)]
    found = []
    for number, weight in enumerate(weights):
        count = max(1, round(replicas * weight / sum(weights)))
        size = chance.choice([1] * 8 + [2, 2, 4])
        options = tuple(_options(chance, products, size))
        name = f"model-{number:03d}"
        demand = ModelDemand(name, name, options, replicas=count)
        if number % 2 and options:
            typical = sorted(o.capacity for o in options)[len(options) // 2]
            demand = replace(demand, replicas=None, rate=round(count * typical, 2))
        found.append(demand)
    return tuple(found)


def _options(chance: Random, products: Sequence[Product], size: int) -> Iterator[Option]:
    for rank, product in enumerate(products):
        for profile in product.base_profiles:
            slices = (profile.memory_slices or 0) * 8 / (product.memory_slices or 8)
            if size <= slices <= 2.1 * size:
                speed = profile.g * (1 + 0.5 * rank) * chance.uniform(0.9, 1.1)
                yield Option(product.name, profile.name, capacity=round(speed, 2))


def changed(
    chance: Random, problem: Problem, gpus: Sequence[FleetGpu], *, share: float = 0.2, by: float = 0.1
) -> Problem:
    """The same fleet with these GPUs' instances, and a share of the demands up or down by up to a tenth, or `by`."""

    def one(demand: ModelDemand) -> ModelDemand:
        if chance.random() >= share:
            return demand
        factor = chance.uniform(1 - by, 1 + by)
        if demand.rate is not None:
            return replace(demand, rate=round(demand.rate * factor, 2))
        return replace(demand, replicas=max(0, round((demand.replicas or 0) * factor)))

    return replace(problem, gpus=tuple(gpus), demands=tuple(one(d) for d in problem.demands))
