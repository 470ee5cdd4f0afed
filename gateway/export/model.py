"""What is exported, before it is anybody's format: engines with their slices, nodes with their layouts, the gateway's configuration.

Values only. `gateway.export.planned` makes them from a plan; `gateway.export.kubernetes` writes them down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from model_registry.catalogue import Product
from model_registry.model import Task
from placement.planner.types import WHOLE_GPU

ENGINE_PORT = 8000
STATE_MOUNT = "/var/lib/sliceway"
STATE_DIRECTORY = f"{STATE_MOUNT}/state"
"""Below the mount: its owner is who runs, whoever owns the volume's root."""
CONFIG_DIRECTORY = "/etc/sliceway"
CONFIG_FILE = "sliceway.yaml"
FILES_DIRECTORY = "/etc/sliceway-files"
SECRETS_DIRECTORY = "/run/secrets/sliceway"
TLS_DIRECTORY = "/run/secrets/sliceway-tls"
MODELS_DIRECTORY = "/models"
CACHE_DIRECTORY = "/cache"


@dataclass(frozen=True, slots=True, order=True)
class SliceType:
    """What a replica asks its cluster for: a profile of a product, or all of a card (`gpu`)."""

    product: str
    profile: str

    @property
    def whole(self) -> bool:
        """Whether it is a card that is not cut."""
        return self.profile == WHOLE_GPU


@dataclass(frozen=True, slots=True)
class EngineUnit:
    """One replica: an engine of its own on a slice of its own.

    `name` is a DNS label and the host name that gateways reach it by. `argv` is complete; `environment` holds no secrets: names of
    variables that are to come from a Secret are in `secret_environment`. `files` are text files that it reads, by name, in `FILES_DIRECTORY`.
    `route` is the model that gateways know it as, `spread` whether no node may hold two replicas of that.
    """

    name: str
    replica: str
    model: str
    route: str
    task: Task
    slice_type: SliceType
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    secret_environment: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    spread: bool = False


@dataclass(frozen=True, slots=True)
class GpuContent:
    """What one GPU of a node holds: instances by profile (mig-parted's counts), or MIG off where `mig` is False."""

    mig: bool
    profiles: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class NodeLayout:
    """Nodes that hold the same: `count` of them, each with these GPUs. `name` is what mig-parted's configuration is called."""

    name: str
    product: Product
    count: int
    gpus: tuple[GpuContent, ...]

    @property
    def slices(self) -> Mapping[SliceType, int]:
        """What one such node offers."""
        found: dict[SliceType, int] = {}
        for gpu in self.gpus:
            for profile, number in gpu.profiles if gpu.mig else ((WHOLE_GPU, 1),):
                key = SliceType(self.product.name, profile)
                found[key] = found.get(key, 0) + number
        return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class GatewayUnit:
    """The gateway: its configuration as data, and what that leads to.

    `secret_variables` are environment variables that hold secrets, `secret_files` file names of secrets below `SECRETS_DIRECTORY`;
    `tls` whether it speaks HTTPS, with a certificate from a Secret.
    """

    config: Mapping[str, object]
    port: int
    tls: bool = False
    secret_variables: tuple[str, ...] = ()
    secret_files: tuple[str, ...] = ()
    grace_seconds: int = 60


@dataclass(frozen=True, slots=True)
class Timings:
    """What probes and ends take, in seconds, from the configuration's `engine:` section."""

    start_seconds: int
    liveness_seconds: int
    liveness_timeout_seconds: int
    liveness_failures: int
    grace_seconds: int


@dataclass(frozen=True, slots=True)
class Exported:
    """A fleet, ready to be written down.

    `gateway` is for engines that Kubernetes seats, `cluster` for a cluster in which sliceway seats them. `weights_bytes` are those of all
    sources together; `directories` are local paths that have to be copied to the models' volume, by their name there. `notes` are
    what the operator should know: what could not be carried over.
    """

    engines: tuple[EngineUnit, ...]
    nodes: tuple[NodeLayout, ...]
    gateway: GatewayUnit
    timings: Timings
    products: Mapping[str, Product]
    weights_bytes: int
    engine_version: str
    cluster: GatewayUnit
    notes: tuple[str, ...] = ()
    directories: Mapping[str, str] = field(default_factory=dict)
