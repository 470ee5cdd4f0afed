"""Room for one more instance like another: where it takes least from what could still be placed. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from model_registry.errors import IllegalLayout
from model_registry.geometry import Geometry, Layout, Placement
from placement.planner.fragmentation import Fragmentation
from placement.planner.types import WHOLE, FleetGpu
from placement.transition.steps import Place


def room_for(
    fleet: Sequence[FleetGpu], like: Place, *, not_on: Collection[str] = (), beyond: bool = False
) -> Place | None:
    """Where an instance of the profile of `like` could be made beside everything that there is, on a GPU of the same product
    that may be cut, that is open to newcomers and not among `not_on` (GPU ids). None where there is no room.

    GPUs in use come first, then the place after which least is lost (`placement.planner.fragmentation`). One that is not in use is
    taken only where the other one is left empty for it, so that no GPU more is used; or `beyond` that, where there is no other room.
    """
    home = next((g for g in fleet if g.id == like.gpu), None)
    if home is None or like.placement == WHOLE:
        return None
    alone = all(i.idle or i.placement == like.placement for i in home.instances)
    ranked = [
        (not _in_use(gpu), _loss(gpu, place), gpu.id, place)
        for gpu in fleet
        if gpu.product == home.product and gpu.open and gpu.id not in not_on and (alone or beyond or _in_use(gpu))
        for place in _free(gpu, like.placement.profile)
    ]
    return Place(*min(ranked)[2:]) if ranked else None


def _in_use(gpu: FleetGpu) -> bool:
    return any(not i.idle for i in gpu.instances)


def _free(gpu: FleetGpu, profile: str) -> Iterator[Placement]:
    """The starts of the profile that fit beside what the GPU holds."""
    held = tuple(i.placement for i in gpu.instances)
    if gpu.geometry is None or WHOLE in held:
        return
    for option in Geometry.with_variants(gpu.geometry).options:
        if option.placement.profile != profile or option.placement in held:
            continue
        try:
            Layout(gpu.geometry, (*held, option.placement))
        except IllegalLayout:
            continue
        yield option.placement


def _loss(gpu: FleetGpu, place: Placement) -> int:
    assert gpu.geometry is not None
    return Fragmentation(gpu.geometry).of((*(i.placement for i in gpu.instances), place))
