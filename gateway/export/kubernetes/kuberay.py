"""A RayService: sliceway's own cluster (docs/cluster.md) in pods, one worker group per node layout. Pure.

A worker pod takes all slices of its node and runs `sliceway node join`; sliceway seats the replicas, not Kubernetes. Ray itself is started
by KubeRay in the head pod and by `node join` in the others, which is why the pods bring commands of their own
(`ray.io/overwrite-container-cmd`). The Serve application only tells how the cluster is: tokens go from engine to gateway to client.

Source of the fields: the custom resource definition of KubeRay 1.7, ray-operator/apis/ray/v1.
"""

from __future__ import annotations

from importlib import metadata

from gateway.export.gateway_config import PRE_STOP_SECONDS
from gateway.export.kubernetes.devices import on_product, resource_of
from gateway.export.kubernetes.engines import (
    engine_files,
    gpu_tolerations,
    hub_environment,
    model_volumes,
)
from gateway.export.kubernetes.front import config_map, gateway_probes, gateway_volumes, service
from gateway.export.kubernetes.objects import (
    STATE_CLAIM,
    Manifest,
    Settings,
    container_security,
    environment,
    hub_token,
    labels,
    manifest,
    network_policy,
    pod_base,
)
from gateway.export.kubernetes.text import yaml_text
from gateway.export.model import (
    CACHE_DIRECTORY,
    CONFIG_DIRECTORY,
    CONFIG_FILE,
    STATE_MOUNT,
    Exported,
    GatewayUnit,
    NodeLayout,
)
from model_registry.errors import ConfigError

NAME = "sliceway"
HEAD, WORKER = "ray-head", "ray-worker"
GCS_PORT = 6379
_CONFIG = f"{CONFIG_DIRECTORY}/{CONFIG_FILE}"
_RAY_REQUIREMENT = "ray[serve]=="
_LEAD = (
    "ulimit -n 65536; "
    'eval "$KUBERAY_GEN_RAY_START_CMD" & '
    f'until ray health-check --address "$POD_IP:{GCS_PORT}"; do sleep 1; done; '
    f'exec sliceway up {_CONFIG} --ray "$POD_IP:{GCS_PORT}"'
)
_JOIN = (
    "ulimit -n 65536; "
    f'exec sliceway node join "$FQ_RAY_IP:{GCS_PORT}" --name "$POD_NAME" --state-dir {CACHE_DIRECTORY}/sliceway'
)


def kuberay_objects(export: Exported, settings: Settings) -> list[Manifest]:
    """The RayService, the configuration that its head works by, one address for clients, and who may connect."""
    unit = export.cluster
    if unit.tls:
        raise ConfigError(
            "gateways of a Ray cluster get no certificate from these manifests",
            where="gateway.tls",
            remedy="End TLS in front of the Service, or export another flavour.",
        )
    return [
        config_map(unit, settings),
        manifest(
            "ray.io/v1",
            "RayService",
            NAME,
            namespace=settings.namespace,
            component="cluster",
            spec=_spec(export, settings),
        ),
        service(unit, settings, labels(WORKER)),
        *_policies(unit, settings),
    ]


def _spec(export: Exported, settings: Settings) -> Manifest:
    application = {
        "name": NAME,
        "route_prefix": "/",
        "import_path": "gateway.ray_status:application",
        "args": {},
    }
    return {
        # A second cluster beside the first would find no slice free.
        "upgradeStrategy": {"type": "None"},
        "serveConfigV2": yaml_text({"applications": [application]}),
        "rayClusterConfig": {
            "rayVersion": _ray_version(),
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
                "template": _head(export, settings),
            },
            "workerGroupSpecs": [_group(layout, export, settings) for layout in export.nodes if _used(layout)],
        },
    }


def _used(layout: NodeLayout) -> bool:
    return bool(layout.slices)


def _ray_version() -> str:
    """The Ray that this version of sliceway asks for."""
    asked = (r for r in metadata.requires("sliceway") or () if r.startswith(_RAY_REQUIREMENT))
    return next((r.removeprefix(_RAY_REQUIREMENT).partition(";")[0].strip() for r in asked), "2.60.0")


def _template(component: str, pod: Manifest) -> Manifest:
    return {
        "metadata": {"labels": labels(component), "annotations": {"ray.io/overwrite-container-cmd": "true"}},
        "spec": pod,
    }


def _head(export: Exported, settings: Settings) -> Manifest:
    unit = export.cluster
    volumes, mounts = gateway_volumes(unit)
    scratch = (("tmp", "/tmp"), ("home", CACHE_DIRECTORY))
    container = {
        "name": HEAD,
        "image": settings.engine_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["/bin/bash", "-c", "--"],
        "args": [_LEAD],
        "env": [*environment({"HOME": CACHE_DIRECTORY}, unit.secret_variables), _field("POD_IP", "status.podIP")],
        "ports": [
            {"name": "gcs-server", "containerPort": GCS_PORT},
            {"name": "dashboard", "containerPort": 8265},
            {"name": "client", "containerPort": 10001},
            {"name": "serve", "containerPort": 8000},
        ],
        "resources": {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
        "securityContext": container_security(read_only=True),
        "volumeMounts": [
            *mounts,
            {"name": "state", "mountPath": STATE_MOUNT},
            *({"name": name, "mountPath": path} for name, path in scratch),
        ],
    }
    pod = pod_base() | {
        "containers": [container],
        "volumes": [
            *volumes,
            {"name": "state", "persistentVolumeClaim": {"claimName": STATE_CLAIM}},
            *({"name": name, "emptyDir": {}} for name, _ in scratch),
        ],
    }
    return _template(HEAD, pod)


def _group(layout: NodeLayout, export: Exported, settings: Settings) -> Manifest:
    return {
        "groupName": layout.name,
        "replicas": layout.count,
        "minReplicas": layout.count,
        "maxReplicas": layout.count,
        "rayStartParams": {},
        "template": _template(WORKER, _worker(layout, export, settings)),
    }


def _worker(layout: NodeLayout, export: Exported, settings: Settings) -> Manifest:
    unit = export.cluster
    volumes, mounts = model_volumes(files=bool(engine_files(export)))
    _, secret_mounts = gateway_volumes(unit)
    number = sum(layout.slices.values())
    container = {
        "name": WORKER,
        "image": settings.engine_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["/bin/bash", "-c", "--"],
        "args": [f"{_JOIN} --listen 0.0.0.0:{unit.port}"],
        "env": [
            *environment(hub_environment(), [*unit.secret_variables, *_engine_secrets(export, unit)]),
            hub_token(),
            _field("POD_NAME", "metadata.name"),
        ],
        "ports": [{"name": "public", "containerPort": unit.port}],
        "resources": {
            "requests": {"cpu": str(settings.engine_cpus * number)},
            "limits": {resource_of(kind): count for kind, count in layout.slices.items()},
        },
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
        "securityContext": container_security(read_only=True),
        "volumeMounts": [*mounts, *(m for m in secret_mounts if m["name"] == "secrets")],
        **_probes(unit, export),
    }
    secret_volumes = [v for v in gateway_volumes(unit)[0] if v["name"] == "secrets"]
    return pod_base() | {
        "terminationGracePeriodSeconds": export.timings.grace_seconds + unit.grace_seconds,
        "tolerations": gpu_tolerations(),
        "affinity": on_product(layout.product) | _one_per_node(),
        "containers": [container],
        "volumes": [*volumes, *secret_volumes],
    }


def _engine_secrets(export: Exported, unit: GatewayUnit) -> list[str]:
    """Variables of the engines that are secrets: inherited from the pod, as they are in no configuration."""
    names = {name for engine in export.engines for name in engine.secret_environment}
    return sorted(names - set(unit.secret_variables) - {"HF_TOKEN"})


def _probes(unit: GatewayUnit, export: Exported) -> Manifest:
    """The gateway's: it takes a machine as long to join as its discovery takes, so the start has the engines' deadline."""
    probes = gateway_probes(unit)
    patience = max(30, -(-export.timings.start_seconds // 10))
    return probes | {"startupProbe": probes["startupProbe"] | {"periodSeconds": 10, "failureThreshold": patience}}


def _one_per_node() -> Manifest:
    term = {"labelSelector": {"matchLabels": labels(WORKER)}, "topologyKey": "kubernetes.io/hostname"}
    return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def _field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _policies(unit: GatewayUnit, settings: Settings) -> list[Manifest]:
    """Ray's many ports are open between the cluster's pods and to KubeRay's operator; clients reach the gateways."""
    inside = {"from": [{"podSelector": {"matchExpressions": [_is(HEAD, WORKER)]}}]}
    operator = {
        "from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay"}}}],
        "ports": [{"protocol": "TCP", "port": 8265}, {"protocol": "TCP", "port": 8000}],
    }
    clients = {"ports": [{"protocol": "TCP", "port": unit.port}]}
    return [
        network_policy("sliceway-ray-head", HEAD, [inside, operator], settings),
        network_policy("sliceway-ray-workers", WORKER, [inside, operator, clients], settings),
    ]


def _is(*components: str) -> Manifest:
    return {"key": "app.kubernetes.io/component", "operator": "In", "values": list(components)}
