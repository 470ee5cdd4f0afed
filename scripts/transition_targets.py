"""Fleets as an operator might ask for them, one after the other: what the transition drill applies. Pure; the generator is handed in."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

MODELS = ("alpha", "bravo", "charlie", "delta", "echo")
TENANTS = ("acme", "globex")
PROFILES = {"1g.10gb": 1, "2g.20gb": 2, "3g.40gb": 4}
"""The profiles that models ask for, with the memory slices of an H100 that each takes."""

RESERVED = "1g.20gb"
RESERVED_SLICES = 2
NOTE = "fine-tuning"

_SLICES_PER_GPU = 8
_FULL = 0.7
_MOST_REPLICAS = 3
_LENGTHS = (2048, 4096)
_TRIES = 100


@dataclass(frozen=True)
class Model:
    """So many replicas, each on a slice of any of these profiles. `max_model_len` is a setting of the engine itself."""

    replicas: int
    profiles: tuple[str, ...]
    max_model_len: int = _LENGTHS[0]


@dataclass(frozen=True)
class Target:
    """What one configuration asks for. `dedicated` is the model that the tenant acme has replicas of its own of."""

    models: Mapping[str, Model] = field(default_factory=dict)
    dedicated: str | None = None
    reserve: bool = False
    cordon: int | None = None

    @property
    def floors(self) -> dict[str, int]:
        """Replicas of each demand: a model, or `model@tenant` where a tenant has its own."""
        return {demand: self.models[demand.partition("@")[0]].replicas for demand in self._demands()}

    @property
    def memory_slices(self) -> int:
        """What it takes at most."""
        each = {name: max(PROFILES[p] for p in model.profiles) for name, model in self.models.items()}
        taken = sum(number * each[demand.partition("@")[0]] for demand, number in self.floors.items())
        return taken + RESERVED_SLICES * self.reserve

    def sections(self) -> dict[str, Any]:
        """Its part of the configuration: models, tenants, and what is asked of the fleet."""
        models = [
            {
                "name": name,
                "source": "simulated",
                "replicas": model.replicas,
                "profiles": list(model.profiles),
                "max_model_len": model.max_model_len,
            }
            for name, model in sorted(self.models.items())
        ]
        alone = {"models": [self.dedicated], "isolation": "dedicated"} if self.dedicated else {}
        fleet = {
            **({"reserve": [{RESERVED: 1, "note": NOTE}]} if self.reserve else {}),
            **({"cordon": [self.cordon]} if self.cordon is not None else {}),
        }
        return {
            "models": models,
            "tenants": [{"name": "acme", **alone}, {"name": "globex"}],
            "fleet": fleet,
        }

    def _demands(self) -> Iterator[str]:
        for name in self.models:
            yield name
            if name == self.dedicated:
                yield f"{name}@acme"


def kept(before: Target, after: Target, *, in_place: Container[str] = ()) -> dict[str, int]:
    """Replicas of each demand that have to be there all along: what there was, as far as it will be there afterwards.

    Also of models whose engines' own settings change. One less of demands that had to be replaced `in_place`, for want of room.
    """
    floors = after.floors
    return {d: min(n, floors[d]) - (d in in_place) for d, n in before.floors.items() if d in floors}


def first(gpus: int) -> Target:
    """Where every drill begins."""
    return Target({"alpha": Model(2, ("1g.10gb",)), "bravo": Model(1, ("2g.20gb",))})


def following(target: Target, generator: random.Random, gpus: int) -> Target:
    """Another target: one to three things changed, and no more asked for than fits with some room to move."""
    for _ in range(_TRIES):
        found = target
        for _ in range(generator.randint(1, 3)):
            found = generator.choice(_CHANGES)(found, generator, gpus)
        room = gpus - (found.cordon is not None)
        if found != target and found.memory_slices <= _FULL * _SLICES_PER_GPU * room:
            return found
    return first(gpus) if target != first(gpus) else replace(target, reserve=True)


def _add(target: Target, generator: random.Random, _: int) -> Target:
    free = [name for name in MODELS if name not in target.models]
    return _with(target, generator.choice(free), _model(generator)) if free else target


def _remove(target: Target, generator: random.Random, _: int) -> Target:
    if len(target.models) == 1:
        return target
    gone = generator.choice(sorted(target.models))
    models = {name: model for name, model in target.models.items() if name != gone}
    return replace(target, models=models, dedicated=None if target.dedicated == gone else target.dedicated)


def _count(target: Target, generator: random.Random, _: int) -> Target:
    name = generator.choice(sorted(target.models))
    return _with(target, name, replace(target.models[name], replicas=generator.randint(1, _MOST_REPLICAS)))


def _profiles(target: Target, generator: random.Random, _: int) -> Target:
    name = generator.choice(sorted(target.models))
    return _with(target, name, replace(target.models[name], profiles=_model(generator).profiles))


def _length(target: Target, generator: random.Random, _: int) -> Target:
    name = generator.choice(sorted(target.models))
    return _with(target, name, replace(target.models[name], max_model_len=generator.choice(_LENGTHS)))


def _dedicate(target: Target, generator: random.Random, _: int) -> Target:
    return replace(target, dedicated=None if target.dedicated else generator.choice(sorted(target.models)))


def _reserve(target: Target, _: random.Random, __: int) -> Target:
    return replace(target, reserve=not target.reserve)


def _cordon(target: Target, generator: random.Random, gpus: int) -> Target:
    return replace(target, cordon=None if target.cordon is not None else generator.randrange(gpus))


_Change = Callable[[Target, random.Random, int], Target]
_CHANGES: tuple[_Change, ...] = (_add, _add, _remove, _count, _count, _profiles, _length, _dedicate, _reserve, _cordon)


def _model(generator: random.Random) -> Model:
    profiles = tuple(sorted(generator.sample(sorted(PROFILES), generator.choice((1, 1, 2)))))
    return Model(generator.randint(1, 2), profiles)


def _with(target: Target, name: str, model: Model) -> Target:
    return replace(target, models={**target.models, name: model})
