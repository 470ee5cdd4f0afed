"""What a node offers in Ray's books: one custom resource for each slice that it has or could be cut into.

Ray counts whole GPUs only (`python/ray/_private/accelerators/nvidia_gpu.py`, 2.60.0), and a node's resources are fixed when it
joins. So its GPUs are not offered to Ray at all (`num_gpus=0`), and every identity that a slice of them may ever have, a profile
at a start, is a resource of its own from the beginning: cutting a GPU anew changes nothing in the books.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from model_registry.catalogue import load_catalogue
from model_registry.errors import SlicewayError
from placement.cluster.members import slice_key
from placement.gpus import GpuState
from placement.slices import Inventory

PREFIX = "sliceway-slice:"
NODE_PREFIX = "sliceway-node:"
JOIN_PREFIX = "sliceway-join:"  # one of each machine that joins, by which it knows itself in the books
NODE_UNITS = 1000.0  # of what says that a node is this one; more of it is two nodes of one name


def resource_of(key: str) -> str:
    """The resource of a slice in the cluster."""
    return PREFIX + key


def node_resource(node: str) -> str:
    """What only this node has, so that its agent runs there."""
    return NODE_PREFIX + node


def offered(node: str, inventory: Inventory) -> Mapping[str, float]:
    """Every resource of a node: itself, its slices, and the slices that its GPUs could be cut into, or be without MIG."""
    resources = {node_resource(node): NODE_UNITS}
    resources |= {resource_of(slice_key(node, s.id)): 1.0 for s in inventory.slices}
    for gpu in (g for g in inventory.gpus if g.mode is not None):
        resources |= {resource_of(slice_key(node, identity)): 1.0 for identity in (gpu.uuid, *_identities(gpu))}
    return resources


def _identities(gpu: GpuState) -> Iterable[str]:
    try:
        product = load_catalogue().product(gpu.product)
    except SlicewayError:  # a card that the catalogue does not know is offered as it is cut now
        return
    for profile in product.profiles:
        for start in profile.placements:
            yield f"{gpu.uuid}/{profile.name}@{start}"
