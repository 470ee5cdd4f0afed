"""The gateway as a Ray Serve deployment: the same ASGI application behind Serve's proxies, which pass every token on (docs/cluster.md).

`serve run gateway.serve_ingress:application config=/etc/sliceway/cluster.yaml` on a machine of the cluster. The routing table and the
keys are read from the configuration's state directory: on a node of a cluster that is the agent's, `nodes/NAME/gateway`.
Ray is imported when the application is built, by the Ray that runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_registry.errors import ConfigError

ARGUMENTS = frozenset({"config", "replicas"})


def application(arguments: Mapping[str, Any]) -> Any:
    """The application, as `import_path` of a Serve configuration names it.

    `config` is the configuration's file, on every machine where a replica may run; `replicas` how many gateways there are (1).
    Raises ConfigError for other arguments, or none.
    """
    if "config" not in arguments or not ARGUMENTS.issuperset(arguments):
        raise ConfigError(
            f"the ingress takes `config` and `replicas`, and was given {', '.join(sorted(arguments)) or 'nothing'}",
            remedy="serve run gateway.serve_ingress:application config=/path/to/cluster.yaml",
        )
    from ray import serve

    path = Path(str(arguments["config"])).absolute()

    def gateway() -> Any:
        """Made where the replica runs."""
        from gateway.config import load_config
        from gateway.wiring import create_app

        return create_app(load_config(path), config_path=path)

    made = serve.ingress(gateway)(type("Gateway", (), {}))
    deployment = serve.deployment(
        name="gateway",
        num_replicas=int(arguments.get("replicas", 1)),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,  # the gateway has its own queues, which know tenants
    )
    return deployment(made).bind()
