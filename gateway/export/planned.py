"""A configuration and nodes -> a plan -> what is exported.

The plan is that of `sliceway plan`, made for bare nodes; engines get the arguments that a controller on one machine would give them
(`placement.launch.build_launch`), so every limit is the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from gateway.config import Config
from gateway.export.cluster import NodeShape
from gateway.export.gateway_config import (
    cluster_configuration,
    gateway_unit,
    is_secret,
    route_name,
    static_gateway,
)
from gateway.export.model import (
    CACHE_DIRECTORY,
    ENGINE_PORT,
    FILES_DIRECTORY,
    MODELS_DIRECTORY,
    EngineUnit,
    Exported,
    GpuContent,
    NodeLayout,
    SliceType,
    Timings,
)
from gateway.export.names import dns_label
from gateway.planning import demanded
from model_registry.catalogue import Product
from model_registry.errors import ConfigError
from model_registry.schema import ModelConfig
from model_registry.sizing.calibration import CalibrationStore
from placement.calibration import CalibratedRegistry
from placement.engines import INSTALLED_VERSIONS
from placement.errors import PlanError
from placement.goals import Registry
from placement.launch import Endpoint, SizedModel, build_launch
from placement.partition import plan as plan_layouts
from placement.planner.plan import plan
from placement.planner.types import FleetPlan, ModelDemand, PlannedGpu, Problem
from placement.registry import ModelRegistry
from placement.schema import EngineConfig
from placement.slices import Gpu, Slice, SliceKind
from placement.state import StatePaths
from placement.workload import Card, Workload, constraints, observed_fleet

_LONGEST_NAME = 50  # a pod's name gets 17 characters more
_OWN_PREFIX = "sliceway"
_SET_ELSEWHERE = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
)  # the device plugin or the DRA driver decides what a container sees
_FOR_A_SHARED_KEY = ("--api-key",)


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """The plan, with the question that it answers."""

    workload: Workload
    demands: Mapping[str, ModelDemand]
    plan: FleetPlan


def planned_cluster(config: Config, nodes: Sequence[NodeShape]) -> ClusterPlan:
    """Plan `config` on `nodes`. Reads models' metadata, and what engines measured; looks at no machine.

    `fleet.layouts` hold on every node; all other GPUs are cut as the models need it. Raises ConfigError for what only one machine can mean,
    and PlanError, naming the first demand, where not everything fits.
    """
    _check_pins(config)
    states = {node.name: node.states() for node in nodes}
    every = [state for of_node in states.values() for state in of_node]
    fleet = tuple(
        gpu
        for node, of_node in states.items()
        for gpu in observed_fleet(plan_layouts(of_node, config.fleet.layouts), config.fleet, node=node)
    )
    products = {node.product.name: node.product for node in nodes}
    work = demanded(config, [Card.of(p) for p in products.values()])
    found = plan(Problem(fleet, work.demands, constraints(config.fleet, every)))
    _check_met(work, found)
    return ClusterPlan(work, {d.name: d for d in work.demands}, found)


def exported(config: Config, nodes: Sequence[NodeShape], *, registry: Registry | None = None) -> Exported:
    """Everything that manifests are written from. `registry` weighs models; made from the configuration if None.

    Raises what `planned_cluster` raises, and ConfigError for what a cluster cannot be told.
    """
    cluster = planned_cluster(config, nodes)
    products = {node.product.name: node.product for node in nodes}
    maker = _EngineMaker(config, registry or _registry(config), products)
    engines = _engines(config, cluster, maker)
    lengths = {e.route: maker.sized(e.model).max_model_len for e in engines}
    return Exported(
        engines=engines,
        nodes=_layouts(cluster.plan, nodes),
        gateway=static_gateway(config, engines, lengths),
        timings=_timings(config.engine),
        products=products,
        weights_bytes=_weights(engines, maker),
        engine_version=INSTALLED_VERSIONS["cuda"],
        notes=tuple(_notes(config, cluster, engines)),
        directories=maker.directories,
        cluster=gateway_unit(config, cluster_configuration(config, list(maker.for_cluster()))),
    )


def _check_pins(config: Config) -> None:
    for model in config.models:
        if model.slices:
            raise ConfigError(
                f"{model.name!r} is pinned to slices of one machine, which a cluster does not know",
                where=f"models.{model.name}.slices",
                remedy="Name the profiles it may have instead: profiles: [1g.10gb].",
            )
    if config.fleet.sharing:
        raise ConfigError(
            "GPUs that several engines share are set up in the device plugin's own configuration, not by a plan",
            where="fleet.sharing",
            remedy="Take `sharing` out for the export.",
        )


def _check_met(work: Workload, found: FleetPlan) -> None:
    for name, error in work.unreadable.items():
        raise PlanError(f"{name!r} cannot be planned: {error.message}", where=error.where, remedy=error.remedy)
    if found.unmet:
        short = found.unmet[0]
        blocked = work.models[short.demand.partition("@")[0]].blocked
        more = f", and {len(found.unmet) - 1} more demands are not met" if len(found.unmet) > 1 else ""
        raise PlanError(
            f"the plan does not fit: {short.missing:g} {short.unit} of {short.demand!r} have no place{more}. "
            f"{blocked or short.reason}",
            where="--node",
            remedy=" or ".join(short.remedies)
            or "Name more nodes, or larger GPUs: sliceway capacity CONFIG --gpu PRODUCT says which.",
        )


def _registry(config: Config) -> Registry:
    registry = ModelRegistry(config.engine, vllm_version=INSTALLED_VERSIONS["cuda"])
    return CalibratedRegistry(registry, CalibrationStore(StatePaths(config.state).calibration))


def _engines(config: Config, cluster: ClusterPlan, maker: _EngineMaker) -> tuple[EngineUnit, ...]:
    units = []
    for gpu in cluster.plan.gpus:
        for one in gpu.slices:
            if one.replica is not None and one.demand is not None:
                demand = cluster.demands[one.demand]
                units.append(maker.unit(one.replica, demand, SliceType(gpu.gpu.product, one.placement.profile)))
    return tuple(sorted(units, key=lambda u: u.replica))


class _EngineMaker:
    """Makes engines of models, each model described once."""

    def __init__(self, config: Config, registry: Registry, products: Mapping[str, Product]) -> None:
        self._models = {m.name: m for m in config.models}
        self._engine = _in_a_container(config.engine)
        self._registry = registry
        self._products = products
        self._sized: dict[str, SizedModel] = {}
        self._directories: dict[str, str] = {}

    def sized(self, model: str) -> SizedModel:
        """The model with its source as engines in containers find it."""
        if model not in self._sized:
            described = self._registry.describe(self._models[model])
            source = self._source(described.source)
            config = described.config.model_copy(update=_moved_template(described.config))
            self._sized[model] = replace(described, config=config, source=source)
        return self._sized[model]

    def unit(self, replica: str, demand: ModelDemand, slice_type: SliceType) -> EngineUnit:
        """The replica on a slice of this type."""
        sized = self.sized(demand.model)
        model = self._models[demand.model]
        _check_arguments(model)
        target = _slice(replica, slice_type, self._products[slice_type.product])
        fit = self._registry.fit(sized, target)
        if not fit.fits:
            raise PlanError(f"{replica!r} does not fit {slice_type.profile} of {slice_type.product}: {fit.reason}")
        python = Path("python3")
        launch = build_launch(
            replica,
            sized,
            target,
            fit,
            self._engine,
            vllm_python=python,
            own_python=python,
            cache=Path(CACHE_DIRECTORY),
        )
        endpoint = Endpoint(port=ENGINE_PORT, host="0.0.0.0")
        environment = {k: v for k, v in launch.environment.items() if k not in _SET_ELSEWHERE}
        return EngineUnit(
            name=_engine_name(replica),
            replica=replica,
            model=model.name,
            route=route_name(model.name, demand.tenant),
            task=sized.task,
            slice_type=slice_type,
            argv=tuple(launch.command(endpoint, drain_seconds=self._engine.drain_timeout_seconds)),
            environment={k: v for k, v in environment.items() if not is_secret(k)},
            secret_environment=tuple(sorted(k for k in environment if is_secret(k))),
            files=_template(model),
            spread=model.spread == "nodes",
        )

    def _source(self, source: str) -> str:
        """A hub id as it is; a directory or file as it is to lie on the volume with the models."""
        if not Path(source).is_absolute():
            return source
        name = PurePosixPath(source).name
        if self._directories.setdefault(name, source) != source:
            raise ConfigError(
                f"two models lie in directories called {name!r}, and the models' volume has one of each name",
                where=source,
                remedy="Rename one of the directories.",
            )
        return f"{MODELS_DIRECTORY}/{name}"

    @property
    def directories(self) -> Mapping[str, str]:
        """Local paths of models that have to be copied, by the name that they are to have on the volume."""
        return self._directories

    def for_cluster(self) -> Iterator[dict[str, object]]:
        """Every model as a configuration in the cluster names it."""
        for name, model in self._models.items():
            if not model.source:
                yield model.model_dump(mode="json", exclude_unset=True)
                continue
            sized = self.sized(name)
            data = sized.config.model_dump(mode="json", exclude_unset=True, exclude={"metadata"})
            yield data | {"source": sized.source}


def _in_a_container(engine: EngineConfig) -> EngineConfig:
    return engine.model_copy(update={"transport": "tcp", "network": None, "tls": None, "python": None})


def _engine_name(replica: str) -> str:
    label = dns_label(replica, longest=_LONGEST_NAME)
    return f"m-{label}" if label.startswith(_OWN_PREFIX) else label


def _slice(replica: str, slice_type: SliceType, product: Product) -> Slice:
    whole = slice_type.whole
    memory = product.total_memory_bytes if whole else product.profile(slice_type.profile).memory_bytes
    if not memory:
        raise PlanError(f"nobody has published the memory of {slice_type.profile} on {product.name}")
    return Slice(
        id=replica,
        kind=SliceKind.GPU if whole else SliceKind.MIG,
        profile=None if whole else slice_type.profile,
        memory_bytes=memory,
        uuid="by-kubernetes",
        gpu=Gpu("by-kubernetes", 0, product.name, product.total_memory_bytes or memory),
    )


def _check_arguments(model: ModelConfig) -> None:
    for argument in model.engine_args:
        if argument.partition("=")[0] in _FOR_A_SHARED_KEY:
            raise ConfigError(
                f"{argument.partition('=')[0]} would write a secret into a manifest",
                where=f"models.{model.name}.engine_args",
                remedy="Take it out: a NetworkPolicy lets gateways alone reach the engines.",
            )


def _moved_template(model: ModelConfig) -> dict[str, object]:
    if not model.chat_template:
        return {}
    return {"chat_template": f"{FILES_DIRECTORY}/{PurePosixPath(str(model.chat_template)).name}"}


def _template(model: ModelConfig) -> dict[str, str]:
    if not model.chat_template:
        return {}
    path = Path(str(model.chat_template))
    try:
        return {path.name: path.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the chat template cannot be read: {error}", where=f"models.{model.name}.chat_template"
        ) from error


def _timings(engine: EngineConfig) -> Timings:
    return Timings(
        start_seconds=math.ceil(engine.start_timeout_seconds),
        liveness_seconds=max(1, math.ceil(engine.liveness.times(on_gpu=True)[0])),
        liveness_timeout_seconds=max(1, math.ceil(engine.liveness.timeout_seconds)),
        liveness_failures=engine.liveness.failures,
        grace_seconds=math.ceil(engine.drain_timeout_seconds + engine.stop_timeout_seconds),
    )


def _weights(engines: Sequence[EngineUnit], maker: _EngineMaker) -> int:
    by_source = {maker.sized(e.model).source: maker.sized(e.model).footprint for e in engines}
    return sum(f.weights_bytes for f in by_source.values() if f is not None)


def _layouts(found: FleetPlan, nodes: Sequence[NodeShape]) -> tuple[NodeLayout, ...]:
    """Nodes of a product that hold the same, whatever the order of their GPUs, share a layout."""
    contents: dict[str, list[GpuContent]] = {node.name: [] for node in nodes}
    for gpu in found.gpus:
        contents[gpu.gpu.node].append(_content(gpu))
    products = {node.name: node.product for node in nodes}
    groups = Counter((products[n].name, tuple(sorted(c, key=_order))) for n, c in contents.items())
    by_name = {node.product.name: node.product for node in nodes}
    numbers: Counter[str] = Counter()
    layouts = []
    for (product, gpus), count in sorted(groups.items(), key=lambda g: (g[0][0], [_order(c) for c in g[0][1]])):
        numbers[product] += 1
        name = dns_label(f"sliceway-{product.lower()}-{numbers[product]}")
        layouts.append(NodeLayout(name, by_name[product], count, gpus))
    return tuple(layouts)


def _content(gpu: PlannedGpu) -> GpuContent:
    if any(s.placement.profile == "gpu" for s in gpu.slices):
        return GpuContent(mig=False)
    counts = Counter(s.placement.profile for s in gpu.slices)
    return GpuContent(mig=True, profiles=tuple(sorted(counts.items())))


def _order(content: GpuContent) -> tuple[bool, int, tuple[tuple[str, int], ...]]:
    """Cut GPUs before whole ones, full before empty."""
    return not content.mig, -sum(n for _, n in content.profiles), content.profiles


def _notes(config: Config, cluster: ClusterPlan, engines: Sequence[EngineUnit]) -> Iterator[str]:
    served = {e.model for e in engines}
    for model in config.models:
        if model.source and model.name not in served:
            yield f"{model.name} has no replica in this plan (replicas.min is 0), and nothing wakes a model in these manifests: it is left out"
        if model.spread == "gpus":
            yield f"{model.name}: spread: gpus holds in the plan; Kubernetes may put two of its replicas on one GPU"
    names = {rule.note for rule in config.fleet.reserve}
    if names:
        yield f"the layouts hold slices reserved for {', '.join(sorted(names))}; nothing keeps other pods from taking them"
    if any(t.limits for t in config.tenants) and config.gateway.shared_limits.store == "local":
        yield "limits are shared through a file on the gateways' volume; with several gateways name a store: gateway.shared_limits: {store: redis, url: ${ENV:...}}"
