"""A Deployment and a Service for every replica: one engine, one slice, one address. Pure.

A replica is a Deployment of its own, not one of several pods of a Deployment, because the gateway balances: it must see each engine, and
engines on slices of different sizes have different limits.
"""

from __future__ import annotations

from collections.abc import Mapping

from gateway.export.kubernetes.devices import with_claim, with_limit
from gateway.export.kubernetes.objects import (
    FILES_MAP,
    MODELS_CLAIM,
    Manifest,
    Settings,
    container_security,
    environment,
    hub_token,
    labels,
    literal,
    manifest,
    pod_base,
)
from gateway.export.model import (
    CACHE_DIRECTORY,
    ENGINE_PORT,
    FILES_DIRECTORY,
    MODELS_DIRECTORY,
    EngineUnit,
    Exported,
    Timings,
)
from gateway.export.names import dns_label

COMPONENT = "engine"
_STARTUP_SECONDS = 10
_READINESS_SECONDS = 5
_HUB_CACHE = f"{MODELS_DIRECTORY}/huggingface"


def engine_objects(export: Exported, settings: Settings, *, claims: bool) -> list[Manifest]:
    """Deployment and Service of every replica, and what keeps a drain of nodes from taking all of a model at once.

    `claims`: slices through DRA; else through the device plugin.
    """
    found: list[Manifest] = []
    for engine in export.engines:
        found += [_deployment(engine, export, settings, claims=claims), _service(engine, settings)]
    return found + _budgets(export, settings)


def files_map(export: Exported, settings: Settings) -> list[Manifest]:
    """The ConfigMap with what engines read besides their model: chat templates."""
    if not (files := engine_files(export)):
        return []
    return [manifest("v1", "ConfigMap", FILES_MAP, namespace=settings.namespace, component=COMPONENT, data=dict(files))]


def engine_files(export: Exported) -> Mapping[str, str]:
    """By name, of all engines together."""
    return {name: text for engine in export.engines for name, text in sorted(engine.files.items())}


def model_volumes(*, files: bool) -> tuple[list[Manifest], list[Manifest]]:
    """The volumes of a pod that runs engines, and where they are mounted."""
    volumes: list[Manifest] = [
        {"name": "models", "persistentVolumeClaim": {"claimName": MODELS_CLAIM}},
        {"name": "cache", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
    ]
    mounts: list[Manifest] = [
        {"name": "models", "mountPath": MODELS_DIRECTORY},
        {"name": "cache", "mountPath": CACHE_DIRECTORY},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if files:
        volumes.append({"name": "files", "configMap": {"name": FILES_MAP}})
        mounts.append({"name": "files", "mountPath": FILES_DIRECTORY, "readOnly": True})
    return volumes, mounts


def gpu_tolerations() -> list[Manifest]:
    """GPU nodes are commonly tainted for everything else."""
    return [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def hub_environment() -> dict[str, str]:
    """Where the hub's client and libraries that look for a home directory may write."""
    return {"HF_HOME": _HUB_CACHE, "HOME": CACHE_DIRECTORY}


def _deployment(engine: EngineUnit, export: Exported, settings: Settings, *, claims: bool) -> Manifest:
    own = {"replica": engine.name}
    pod = _pod(engine, export, settings)
    if engine.spread:
        pod["affinity"] = {"podAntiAffinity": _apart(engine)}
    if claims:
        with_claim(pod, engine.slice_type)
    else:
        with_limit(pod, engine.slice_type, export.products[engine.slice_type.product])
    pod_labels = labels(COMPONENT, **own, model=model_label(engine.route))
    return manifest(
        "apps/v1",
        "Deployment",
        engine.name,
        namespace=settings.namespace,
        component=COMPONENT,
        spec={
            "replicas": 1,
            # A second pod would wait for a slice that the first one has.
            "strategy": {"type": "Recreate"},
            "progressDeadlineSeconds": export.timings.start_seconds + export.timings.grace_seconds + 60,
            "selector": {"matchLabels": labels(COMPONENT, **own)},
            "template": {
                "metadata": {"labels": pod_labels, "annotations": _told(engine)},
                "spec": pod,
            },
        },
    )


def model_label(route: str) -> str:
    """The value of `sliceway/model`."""
    return dns_label(route)


def _told(engine: EngineUnit) -> dict[str, str]:
    """For people: names as the configuration has them, which labels cannot hold."""
    return {
        "sliceway/model-name": engine.model,
        "sliceway/slice": f"{engine.slice_type.product} {engine.slice_type.profile}",
    }


def _pod(engine: EngineUnit, export: Exported, settings: Settings) -> Manifest:
    volumes, mounts = model_volumes(files=bool(engine.files))
    variables = hub_environment() | {"OMP_NUM_THREADS": str(settings.engine_cpus)} | dict(engine.environment)
    secrets = [name for name in engine.secret_environment if name != "HF_TOKEN"]
    container = {
        "name": "engine",
        "image": settings.engine_image,
        "imagePullPolicy": "IfNotPresent",
        "args": [literal(part) for part in engine.argv],
        "env": [*environment(variables, secrets), hub_token()],
        "ports": [{"name": "http", "containerPort": ENGINE_PORT}],
        "resources": {"requests": {"cpu": str(settings.engine_cpus), "memory": settings.engine_memory}},
        "securityContext": container_security(read_only=True),
        "volumeMounts": mounts,
        **_probes(export.timings),
    }
    return pod_base() | {
        "terminationGracePeriodSeconds": export.timings.grace_seconds,
        "tolerations": gpu_tolerations(),
        "containers": [container],
        "volumes": volumes,
    }


def _probes(timings: Timings) -> Manifest:
    """`/health` needs no key. Until the first answer only the start's own deadline counts."""
    ask = {"httpGet": {"path": "/health", "port": "http"}}
    timeout = {"timeoutSeconds": timings.liveness_timeout_seconds}
    return {
        "startupProbe": ask
        | timeout
        | {
            "periodSeconds": _STARTUP_SECONDS,
            "failureThreshold": max(1, -(-timings.start_seconds // _STARTUP_SECONDS)),
        },
        "readinessProbe": ask | timeout | {"periodSeconds": _READINESS_SECONDS, "failureThreshold": 2},
        "livenessProbe": ask
        | timeout
        | {"periodSeconds": timings.liveness_seconds, "failureThreshold": timings.liveness_failures},
    }


def _apart(engine: EngineUnit) -> Manifest:
    """No two replicas of the model on one node (`spread: nodes`)."""
    selector = {"matchLabels": labels(COMPONENT, model=model_label(engine.route))}
    term = {"labelSelector": selector, "topologyKey": "kubernetes.io/hostname"}
    return {"requiredDuringSchedulingIgnoredDuringExecution": [term]}


def _service(engine: EngineUnit, settings: Settings) -> Manifest:
    return manifest(
        "v1",
        "Service",
        engine.name,
        namespace=settings.namespace,
        component=COMPONENT,
        spec={
            "selector": labels(COMPONENT, replica=engine.name),
            "ports": [{"name": "http", "port": ENGINE_PORT, "targetPort": "http"}],
        },
    )


def _budgets(export: Exported, settings: Settings) -> list[Manifest]:
    """Of a model with several replicas one at a time may be evicted. One replica alone has none: it would keep its node from ever being drained."""
    routes = [engine.route for engine in export.engines]
    return [
        manifest(
            "policy/v1",
            "PodDisruptionBudget",
            model_label(route),
            namespace=settings.namespace,
            component=COMPONENT,
            spec={
                "maxUnavailable": 1,
                "selector": {"matchLabels": labels(COMPONENT, model=model_label(route))},
            },
        )
        for route in sorted(set(routes))
        if routes.count(route) > 1
    ]
