"""The nodes that a plan is made for: so many GPUs of one product each, bare, as the catalogue knows them.

No machine is looked at. A node has GPUs of one product only, because Kubernetes knows its product by one label
(`nvidia.com/gpu.product`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.config import Config
from model_registry.catalogue import Product, load_catalogue
from model_registry.errors import ConfigError, UnknownProduct
from placement.gpus import GpuState, MigMode
from placement.schema import SimulatedFleet

MAX_GPUS_PER_NODE = 16
MAX_NODES = 1000
_NODE = re.compile(r"(?:(\d+)\s*x\s*)?([^:]+?)(?::(\d+))?")


@dataclass(frozen=True, slots=True)
class NodeShape:
    """One node: `name` tells it from the others here, Kubernetes need not know it."""

    name: str
    product: Product
    gpus: int

    def states(self) -> tuple[GpuState, ...]:
        """Its GPUs as a driver would show them: MIG on, nothing cut."""
        product = self.product
        memory = product.total_memory_bytes or 0
        device = int(product.pci_device_ids[0], 16) << 16 | 0x10DE if product.pci_device_ids else 0
        return tuple(
            GpuState(
                uuid=f"{self.name}.gpu-{n}",
                index=n,
                name=product.nvml_names[0],
                product=product.name,
                memory_bytes=memory,
                usable_bytes=memory,
                driver="",
                pci_device_id=device,
                geometry=product,
                mode=MigMode(current=True, pending=True),
            )
            for n in range(self.gpus)
        )


def nodes_of(config: Config, given: Sequence[str]) -> tuple[NodeShape, ...]:
    """The nodes that were named (`h100-sxm:8`, `4x h100-sxm:8`), or those that a simulated fleet describes: one per product.

    Raises ConfigError where there are none, UnknownProduct for a card that cannot be planned for.
    """
    if given:
        shapes = [shape for text in given for shape in _parsed(text)]
    elif isinstance(config.fleet.discover, SimulatedFleet):
        shapes = [_shape(product, number) for product, number in config.fleet.discover.simulate.items()]
    else:
        raise ConfigError(
            _nowhere(config), where="fleet.discover", remedy="Name them: --node h100-sxm:8, or --node '4x h100-sxm:8'."
        )
    if len(shapes) > MAX_NODES:
        raise ConfigError(f"{len(shapes)} nodes are more than one plan is made for ({MAX_NODES})", where="--node")
    return tuple(NodeShape(f"node-{i}", product, gpus) for i, (product, gpus) in enumerate(shapes))


def _nowhere(config: Config) -> str:
    if config.fleet.discover == "cpu" or any(s.kind == "cpu" for s in config.fleet.slices):
        return "this configuration runs models on cores of one machine, which no manifest can hand out; a plan for a cluster needs GPU nodes"
    return "the configuration does not say which GPU nodes the cluster has, and this machine's own are not meant"


def _parsed(text: str) -> list[tuple[Product, int]]:
    match = _NODE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"{text!r} describes no node",
            where="--node",
            remedy="Write PRODUCT:GPUS, like h100-sxm:8, or 4x h100-sxm:8.",
        )
    times, product, gpus = match.groups()
    number = int(times or 1)
    if not 1 <= number <= MAX_NODES:
        raise ConfigError(f"{number} nodes make no plan", where="--node", remedy=f"Name 1 to {MAX_NODES}.")
    try:
        return [_shape(product, int(gpus or 1))] * number
    except UnknownProduct as error:
        raise UnknownProduct(error.message, where="--node", remedy=error.remedy) from error


def _shape(name: str, gpus: int) -> tuple[Product, int]:
    product = load_catalogue().product(name)
    if not product.nvml_names:
        raise ConfigError(
            f"nobody has published what the device plugin calls a {product.name}, so no pod could be sent to one",
            remedy="Choose another product: sliceway profiles lists them.",
        )
    if not 1 <= gpus <= MAX_GPUS_PER_NODE:
        raise ConfigError(
            f"a node with {gpus} GPUs is none that is planned for",
            where="--node",
            remedy=f"Name 1 to {MAX_GPUS_PER_NODE} GPUs a node.",
        )
    return product, gpus
