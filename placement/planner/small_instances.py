"""Every small instance of some bounded kinds, numbered: all of them where there is time, spread-out samples where not.

A kind is the product of its axes: what is on each GPU, what each demand asks for, how much. The numbers run over all
combinations, so an instance that fails has a name, and a sample takes as many from every part of the kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, cycle, product
from typing import Any

from model_registry.catalogue import Catalogue, Product
from model_registry.geometry import Geometry, Placement
from placement.planner.types import (
    DEFAULT_ORDER,
    WHOLE,
    Constraints,
    FleetGpu,
    Instance,
    ModelDemand,
    Objective,
    Option,
    Problem,
    Reservation,
)

_STEADY = (Objective.DEMAND, Objective.DISTURBANCE, Objective.PRICE, Objective.FRAGMENTATION)
_IDLE, _RESERVED = "idle", "reserved"

Held = tuple[tuple[Placement, str], ...]
"""What is on one GPU: placements with who has each: a demand's name, `idle` or `reserved`."""

Asked = dict[str, Any]
"""How much a demand asks for, in the fields of `ModelDemand`."""


@dataclass(frozen=True, slots=True)
class Kind:
    """All combinations of `axes`, each made into a problem by `build`."""

    name: str
    axes: tuple[Sequence[Any], ...]
    build: Callable[..., Problem]

    def __len__(self) -> int:
        return math.prod(len(axis) for axis in self.axes)

    def at(self, number: int) -> Problem:
        """Instance `number`, counted from 0."""
        chosen = []
        for axis in reversed(self.axes):
            number, place = divmod(number, len(axis))
            chosen.append(axis[place])
        return self.build(*reversed(chosen))

    def sample(self, count: int) -> Iterator[int]:
        """So many different numbers, spread over all by steps of the golden section; all of them if there are no more."""
        size = len(self)
        step = next(n for n in range(max(1, round(size * 0.618)), 2 * size + 2) if math.gcd(n, size) == 1)
        return (k * step % size for k in range(min(count, size)))


def kinds(catalogue: Catalogue) -> tuple[Kind, ...]:
    """The kinds that the planner is compared with brute force on: one or two GPUs each."""
    a30, a100 = catalogue.product("a30"), catalogue.product("a100-80gb")
    return (
        *(_one_a30(a30), _one_a100(a100), _two_a30(a30), _limits(a30), _mixed(a30, a100), _two_a100(a100)),
        _tenants_apart(a30),
        *(_reservations_a30(a30), _reservations_mixed(a30, a100), _changes_a100(a100), _changes_a30(a30)),
    )


def _one_a30(a30: Product) -> Kind:
    """Everything that can be on one A30, with whoever may have it, and one demand."""
    states: list[Held] = [((WHOLE, "chat"),)]
    for placements in _layouts(a30):
        states += [tuple(zip(placements, users, strict=True)) for users in product(_USERS, repeat=len(placements))]
    wanted = [_options(a30, names) for names in _subsets(("1g.6gb", "2g.12gb", "4g.24gb", "gpu"))]
    asked: list[Asked] = [{"replicas": n} for n in range(4)]
    asked += [{"rate": 1.0}, {"rate": 2.5}, {"rate": 3.5, "min_replicas": 2}]

    def build(held: Held, state: str, options: tuple[Option, ...], much: Asked) -> Problem:
        return Problem((_gpu("a", a30, held, state=state),), (ModelDemand("chat", "chat", options, **much),))

    return Kind("one A30", (states, ("open", "cordoned", "draining"), wanted, asked), build)


def _one_a100(a100: Product) -> Kind:
    """One A100 as it may be in use by two demands, both of which change."""
    chat = [
        _options(a100, names) for names in (("1g.10gb",), ("2g.20gb",), ("1g.10gb", "3g.40gb"), ("4g.40gb", "7g.80gb"))
    ]
    code = [_options(a100, names) for names in (("1g.10gb", "2g.20gb"), ("3g.40gb",), ("2g.20gb", "gpu"))]
    return Kind(
        "one A100",
        (_states(a100, _MIXED_USERS), chat, _FEW, code, ({"replicas": 1}, {"replicas": 2}, {"rate": 2.5})),
        lambda held, one, much, other, many: Problem(
            (_gpu("a", a100, held),), (_demand("chat", one, much), _demand("code", other, many))
        ),
    )


def _two_a30(a30: Product) -> Kind:
    """Two A30s at different prices, any two of their states, two demands, and two orders of objectives."""
    names = (("1g.6gb",), ("2g.12gb",), ("1g.6gb", "2g.12gb"), ("1g.6gb", "4g.24gb"), ("2g.12gb", "gpu"))
    chat = [_options(a30, some) for some in names]
    code = [_options(a30, some) for some in (("1g.6gb", "2g.12gb"), ("4g.24gb",))]
    states = _states(a30, _MIXED_USERS)

    def build(
        first: Held, second: Held, one: tuple[Option, ...], much: Asked, other: tuple[Option, ...], order: Any
    ) -> Problem:
        fleet = (_gpu("a", a30, first), _gpu("b", a30, second, price=1.5))
        return Problem(fleet, (_demand("chat", one, much), _demand("code", other, {"replicas": 2})), order=order)

    return Kind("two A30s", (states, states, chat, _FEW, code, (DEFAULT_ORDER, _STEADY)), build)


def _limits(a30: Product) -> Kind:
    """Two A30s on one node or two; limits per GPU and node, priorities, head-room."""
    pairs = tuple(combinations_with_replacement(_states(a30, (("chat", "code", _IDLE),)), 2))
    options = [_options(a30, names) for names in (("1g.6gb",), ("1g.6gb", "2g.12gb"), ("2g.12gb", "4g.24gb"))]
    limits: tuple[Asked, ...] = ({}, {"max_per_gpu": 1}, {"max_per_gpu": 2}, {"max_per_node": 1}, {"max_per_node": 2})

    def build(
        held: tuple[Held, Held],
        nodes: tuple[str, str],
        one: tuple[Option, ...],
        limit: Asked,
        much: Asked,
        priority: int,
        headroom: float,
    ) -> Problem:
        fleet = (_gpu("a", a30, held[0], node=nodes[0]), _gpu("b", a30, held[1], node=nodes[1]))
        other = ModelDemand("code", "code", _options(a30, ("1g.6gb", "2g.12gb")), replicas=3, priority=priority)
        return Problem(fleet, (_demand("chat", one, limit | much), other), Constraints(headroom_ratio=headroom))

    much = ({"replicas": 2}, {"replicas": 4}, {"rate": 3.0})
    nodes = (("n", "n"), ("n", "m"))
    return Kind("limits on two A30s", (pairs, nodes, options, limits, much, (0, 1), (0.0, 0.5)), build)


def _tenants_apart(a30: Product) -> Kind:
    """Two A30s on one node or two; one model for everybody and for a dedicated tenant, its limits over both, beside another one."""
    pairs = tuple(combinations_with_replacement(_states(a30, (("chat", "chat@acme", _IDLE), ("chat@acme", "code"))), 2))
    options = [_options(a30, names) for names in (("1g.6gb",), ("1g.6gb", "2g.12gb"), ("2g.12gb", "4g.24gb"))]
    limits: tuple[Asked, ...] = ({"max_per_gpu": 1}, {"max_per_gpu": 2}, {"max_per_node": 1}, {"max_per_node": 3})

    def build(
        held: tuple[Held, Held],
        nodes: tuple[str, str],
        fits: tuple[Option, ...],
        limit: Asked,
        much: Asked,
        theirs: Asked,
        price: float,
    ) -> Problem:
        fleet = (_gpu("a", a30, held[0], node=nodes[0]), _gpu("b", a30, held[1], node=nodes[1], price=price))
        shared, own = (
            ModelDemand(name, "chat", fits, **limit, **asked) for name, asked in (("chat", much), ("chat@acme", theirs))
        )
        return Problem(fleet, (shared, own, _demand("code", _options(a30, ("1g.6gb",)), {"replicas": 1})))

    much: tuple[Asked, ...] = ({"replicas": 1}, {"replicas": 2}, {"rate": 2.5})
    nodes = (("n", "n"), ("n", "m"))
    axes = (pairs, nodes, options, limits, much, ({"replicas": 1}, {"replicas": 2}, {"rate": 1.0}), (1.0, 1.5))
    return Kind("a model with a dedicated tenant on two A30s", axes, build)


def _mixed(a30: Product, a100: Product) -> Kind:
    """An A30 beside an A100, with demands that fit either."""
    both = [
        (*_options(a30, small), *_options(a100, large))
        for small, large in (
            (("1g.6gb",), ("1g.10gb",)),
            (("2g.12gb",), ("1g.20gb",)),
            (("4g.24gb",), ("2g.20gb", "3g.40gb")),
            (("gpu",), ("3g.40gb", "7g.80gb")),
        )
    ]

    def build(
        small: Held, large: Held, price: float, one: tuple[Option, ...], much: Asked, other: tuple[Option, ...]
    ) -> Problem:
        fleet = (_gpu("a", a30, small), _gpu("b", a100, large, price=price))
        return Problem(fleet, (_demand("chat", one, much), _demand("code", other, {"replicas": 2})))

    held = _states(a30, (("chat", "code"),)), _states(a100, (("code", "chat"),), most=4)
    return Kind("an A30 and an A100", (*held, (1.0, 2.5), both, _FEW, both[1:3]), build)


def _two_a100(a100: Product) -> Kind:
    """Two A100s in use, and one demand that changes beside one that stays."""
    pairs = tuple(combinations_with_replacement(_states(a100, (("chat", "code"),), most=3), 2))
    chat = [_options(a100, names) for names in (("1g.10gb",), ("1g.10gb", "2g.20gb"), ("3g.40gb",), ("4g.40gb", "gpu"))]

    def build(held: tuple[Held, Held], one: tuple[Option, ...], much: Asked) -> Problem:
        fleet = (_gpu("a", a100, held[0]), _gpu("b", a100, held[1]))
        code = sum(who == "code" for _, who in (*held[0], *held[1]))
        kept = _demand("code", _options(a100, ("1g.10gb", "2g.20gb", "3g.40gb")), {"replicas": min(code, 3)})
        return Problem(fleet, (_demand("chat", one, much), kept))

    return Kind("two A100s", (pairs, chat, _FEW), build)


def _reservations_a30(a30: Product) -> Kind:
    """Slices to be reserved on two A30s in use, some of them there already, one GPU open, cordoned or draining."""
    states = _states(a30, (("chat", _IDLE), (_RESERVED, "chat"), ("chat", _RESERVED, "gone")))
    reserve: list[tuple[Reservation, ...]] = [
        (one,) for one in (_kept("1g.6gb", 1), _kept("1g.6gb", 3), _kept("2g.12gb", 2), _kept("4g.24gb", 1))
    ]
    reserve += [(_kept("1g.6gb", 2), _kept("2g.12gb", 1, "notebooks")), (_kept("gpu", 1), _kept("1g.6gb", 1))]
    options = [_options(a30, names) for names in (("1g.6gb",), ("1g.6gb", "2g.12gb"), ("2g.12gb", "gpu"))]

    def build(
        first: Held,
        second: Held,
        state: str,
        kept: tuple[Reservation, ...],
        one: tuple[Option, ...],
        much: Asked,
        order: Any,
    ) -> Problem:
        fleet = (_gpu("a", a30, first, state=state), _gpu("b", a30, second, price=1.5))
        return Problem(fleet, (_demand("chat", one, much),), Constraints(kept), order)

    asked = ({"replicas": 2}, {"replicas": 5}, {"rate": 2.5})
    axes = (states, states, ("open", "cordoned", "draining"), reserve, options, asked, (DEFAULT_ORDER, _STEADY))
    return Kind("reservations on two A30s", axes, build)


def _reservations_mixed(a30: Product, a100: Product) -> Kind:
    """A slice to be reserved on an A30 beside an A100, of one product or either, with few layout changes or any number."""
    reserve = [(_kept("3g.40gb", 1),), (_kept("1g.10gb", 2), _kept("1g.6gb", 1)), (_kept("gpu", 1, product=a30.name),)]
    reserve += [(_kept("gpu", 1),), (_kept("2g.20gb", 1), _kept("4g.40gb", 1, "notebooks"))]
    chat = (*_options(a30, ("2g.12gb",)), *_options(a100, ("1g.20gb", "2g.20gb")))

    def build(
        small: Held, large: Held, price: float, kept: tuple[Reservation, ...], much: Asked, limit: int | None
    ) -> Problem:
        fleet = (_gpu("a", a30, small), _gpu("b", a100, large, price=price))
        return Problem(fleet, (_demand("chat", chat, much),), Constraints(kept, max_layout_changes=limit))

    held = _states(a30, (("chat", _IDLE),)), _states(a100, (("chat", _RESERVED, _IDLE),), most=4)
    return Kind("reservations on an A30 and an A100", (*held, (1.0, 2.5), reserve, _FEW, (None, 2, 4)), build)


def _changes_a100(a100: Product) -> Kind:
    """Few layout changes allowed on one A100 in use by two demands."""
    chat = [_options(a100, names) for names in (("1g.10gb",), ("2g.20gb",), ("1g.10gb", "3g.40gb"), ("7g.80gb", "gpu"))]
    code = [_options(a100, names) for names in (("1g.10gb", "2g.20gb"), ("3g.40gb",))]

    def build(
        held: Held, one: tuple[Option, ...], much: Asked, other: tuple[Option, ...], limit: int, order: Any
    ) -> Problem:
        demands = _demand("chat", one, much), _demand("code", other, {"replicas": 2})
        return Problem((_gpu("a", a100, held),), demands, Constraints(max_layout_changes=limit), order)

    axes = (_states(a100, _MIXED_USERS), chat, _FEW, code, (0, 1, 2, 3, 5), (DEFAULT_ORDER, _STEADY))
    return Kind("layout changes on an A100", axes, build)


def _changes_a30(a30: Product) -> Kind:
    """Few layout changes allowed on two A30s: between them and what is reserved, who gets them matters."""
    states = _states(a30, (("chat", "code"), (_IDLE, "chat", "gone")))
    options = [_options(a30, names) for names in (("1g.6gb",), ("2g.12gb",), ("1g.6gb", "4g.24gb"), ("2g.12gb", "gpu"))]
    reserve = ((), (_kept("1g.6gb", 1),), (_kept("2g.12gb", 2),))

    def build(
        first: Held,
        second: Held,
        one: tuple[Option, ...],
        much: Asked,
        kept: tuple[Reservation, ...],
        limit: int,
        priority: int,
    ) -> Problem:
        other = ModelDemand("code", "code", _options(a30, ("1g.6gb", "2g.12gb")), replicas=2, priority=priority)
        fleet = (_gpu("a", a30, first), _gpu("b", a30, second, price=1.5))
        return Problem(fleet, (_demand("chat", one, much), other), Constraints(kept, max_layout_changes=limit))

    return Kind("layout changes on two A30s", (states, states, options, _FEW, reserve, (0, 1, 2, 4), (0, 1)), build)


_USERS = ("chat", _IDLE, _RESERVED)
_MIXED_USERS = (("chat",), ("code", "chat"), (_IDLE, "chat", "gone"))
_FEW: tuple[Asked, ...] = ({"replicas": 0}, {"replicas": 1}, {"replicas": 3}, {"rate": 2.5})


def _layouts(of: Product) -> list[tuple[Placement, ...]]:
    return [(), *(layout.placements for layout in Geometry(of).layouts)]


def _states(of: Product, users: Sequence[Sequence[str]], *, most: int = 8) -> list[Held]:
    """An empty GPU, a whole one, and a layout for each choice of up to so many profiles, with users handed out in turn."""
    by_counts: dict[tuple[str, ...], tuple[Placement, ...]] = {}
    for placements in _layouts(of)[1:]:
        by_counts.setdefault(tuple(sorted(p.profile for p in placements)), placements)
    found: list[Held] = [(), ((WHOLE, "chat"),)]
    for placements in (p for p in by_counts.values() if len(p) <= most):
        found += [tuple(zip(placements, cycle(turn), strict=False)) for turn in users]
    return list(dict.fromkeys(found))


def _subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(n for n, taken in zip(names, bits, strict=True) if taken) for bits in product((0, 1), repeat=4)][1:]


def _options(of: Product, names: Sequence[str]) -> tuple[Option, ...]:
    """Options that serve as much as the slice has compute slices, the whole card a little more."""
    return tuple(Option(of.name, n, of.compute_slices + 0.5 if n == "gpu" else float(of.profile(n).g)) for n in names)


def _demand(name: str, options: tuple[Option, ...], asked: Asked) -> ModelDemand:
    return ModelDemand(name, name, options, **asked)


def _kept(profile: str, count: int, note: str = "tuning", *, product: str | None = None) -> Reservation:
    return Reservation(profile, count, note, product)


def _gpu(name: str, of: Product, held: Held, *, state: str = "open", node: str = "n", price: float = 1.0) -> FleetGpu:
    return FleetGpu(
        name,
        of.name,
        of,
        node,
        tuple(_instance(placement, who, f"{who}-{name}{k}") for k, (placement, who) in enumerate(held)),
        cordoned=state == "cordoned",
        draining=state == "draining",
        price_per_hour=price,
    )


def _instance(placement: Placement, who: str, replica: str) -> Instance:
    if who in (_IDLE, _RESERVED):
        return Instance(placement, reserved="tuning" if who == _RESERVED else None)
    return Instance(placement, replica, who)
