"""The gateway's configuration where something else runs the engines: models with `endpoints`, and paths as they are in its container. Pure.

A tenant with `isolation: dedicated` has replicas of its own. Where nobody publishes a routing table that says so, its replicas are
models of their own (`chat--acme`), which that tenant alone may use, under the name it knows (`chat`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from gateway.config import Config
from gateway.export.model import (
    ENGINE_PORT,
    SECRETS_DIRECTORY,
    STATE_DIRECTORY,
    TLS_DIRECTORY,
    EngineUnit,
    GatewayUnit,
)
from gateway.relay import LAST_WORDS_SECONDS
from model_registry.errors import ConfigError

PORT = 8080
PRE_STOP_SECONDS = 5
_VARIABLE = re.compile(r"\$\{ENV:([A-Za-z_][A-Za-z0-9_]*)\}")


def route_name(model: str, tenant: str | None) -> str:
    """What gateways call the replicas of `model` that are `tenant`'s alone; the model itself where they are everybody's."""
    return model if tenant is None else f"{model}--{tenant}"


def static_gateway(
    config: Config, engines: Sequence[EngineUnit], max_model_len: Mapping[str, int | None]
) -> GatewayUnit:
    """The gateway in front of `engines`, each at its own host name. Models without an engine are left out.

    `max_model_len` is by route. Raises ConfigError where two secret files would get one name.
    """
    data = _gateway_sections(config)
    data["models"] = [*_planned_models(config, engines, max_model_len), *_models_elsewhere(config)]
    known = {model["name"] for model in data["models"]}
    data["tenants"] = [_tenant(config, index, known) for index in range(len(config.tenants))]
    if aliases := {alias: model for alias, model in config.aliases.items() if model in known}:
        data["aliases"] = aliases
    return gateway_unit(config, data)


def gateway_unit(config: Config, data: dict[str, Any]) -> GatewayUnit:
    """`data` checked as a configuration, with the secrets that it leads to."""
    secret_files: dict[str, str] = {}
    moved = with_secrets_in(SECRETS_DIRECTORY, data, secret_files)
    Config.model_validate(moved)
    grace = config.gateway.drain_timeout_seconds + LAST_WORDS_SECONDS + PRE_STOP_SECONDS
    return GatewayUnit(
        config=moved,
        port=PORT,
        tls=config.gateway.tls is not None,
        secret_variables=secret_variables(moved),
        secret_files=tuple(sorted(secret_files)),
        grace_seconds=int(grace) + 5,
    )


def cluster_configuration(config: Config, models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole configuration for a cluster of sliceway's own, whose nodes discover their slices themselves."""
    data = _gateway_sections(config)
    engine = config.engine.model_dump(
        mode="json", exclude_unset=True, exclude={"network", "transport", "tls", "python"}
    )
    engine["python"] = "python3"  # the image's own, which has vLLM
    engine["environment"] = {k: v for k, v in config.engine.environment.items() if not is_secret(k)}
    data |= {"fleet": {"discover": "none"}, "engine": engine, "models": list(models)}
    if "cluster" in config.model_fields_set:
        data["cluster"] = config.cluster.model_dump(mode="json", exclude_unset=True)
    data["tenants"] = [t.model_dump(mode="json", exclude_unset=True) for t in config.tenants]
    data["aliases"] = dict(config.aliases)
    return data


def is_secret(variable: str) -> bool:
    """Whether an environment variable of this name is taken for a secret, and so never written out."""
    return re.search(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)KEY(_|$)", variable.upper()) is not None


def _gateway_sections(config: Config) -> dict[str, Any]:
    kept = config.model_dump(mode="json", exclude_unset=True, include={"version", "auth", "gateway", "batches"})
    gateway = kept.setdefault("gateway", {})
    gateway["listen"] = f"0.0.0.0:{PORT}"
    if str(gateway.get("admin_listen", "")).startswith("unix:"):
        del gateway["admin_listen"]
    if gateway.get("tls"):
        gateway["tls"] |= {"certificate": f"{TLS_DIRECTORY}/tls.crt", "key": f"{TLS_DIRECTORY}/tls.key"}
    return kept | {"version": "v1", "state_dir": STATE_DIRECTORY}


def _planned_models(
    config: Config, engines: Sequence[EngineUnit], max_model_len: Mapping[str, int | None]
) -> list[dict[str, Any]]:
    limits = {m.name: m.max_num_seqs for m in config.models}
    rows: dict[str, dict[str, Any]] = {}
    for engine in engines:
        row = rows.setdefault(
            engine.route,
            {"name": engine.route, "task": engine.task, "max_num_seqs": limits[engine.model], "endpoints": []},
        )
        if length := max_model_len.get(engine.route):
            row["max_model_len"] = length
        row["endpoints"].append(f"http://{engine.name}:{ENGINE_PORT}")
    return [rows[name] for name in sorted(rows)]


def _models_elsewhere(config: Config) -> list[dict[str, Any]]:
    return [m.model_dump(mode="json", exclude_unset=True) for m in config.models if m.endpoints]


def _tenant(config: Config, index: int, known: set[str]) -> dict[str, Any]:
    """The tenant with the models that there are; what is planned is no business of a gateway."""
    tenant = config.tenants[index]
    data = tenant.model_dump(mode="json", exclude_unset=True, exclude={"demand", "isolation"})
    own = tenant.name if tenant.isolation == "dedicated" else None
    names = [m.name for m in config.models if tenant.may_use(m.name)]
    routes = {name: _reached(name, own, known) for name in names}
    data["models"] = sorted({route for route in routes.values() if route})
    aliases = {alias: routes.get(model) for alias, model in {**config.aliases, **tenant.aliases}.items()}
    aliases |= {name: route for name, route in routes.items() if route != name}
    written = {
        alias: route for alias, route in aliases.items() if route and (alias, route) not in config.aliases.items()
    }
    return {k: v for k, v in data.items() if k != "aliases"} | ({"aliases": written} if written else {})


def _reached(model: str, tenant: str | None, known: set[str]) -> str | None:
    """The route that leads this tenant to `model`: its own where it has one, else everybody's, else none."""
    own = route_name(model, tenant)
    return own if own in known else model if model in known else None


def with_secrets_in(directory: str, value: Any, files: dict[str, str]) -> Any:
    """`value` with every `file:PATH` in `directory`, under the file's own name. `files` gets the paths by name.

    Raises ConfigError where two files would get one name.
    """
    if isinstance(value, dict):
        return {k: with_secrets_in(directory, v, files) for k, v in value.items()}
    if isinstance(value, list):
        return [with_secrets_in(directory, v, files) for v in value]
    if not isinstance(value, str) or not value.startswith("file:"):
        return value
    path = value.removeprefix("file:")
    name = PurePosixPath(path).name
    if files.setdefault(name, path) != path:
        raise ConfigError(
            f"two secrets lie in files called {name!r}, and there is one place for files of a name",
            where=path,
            remedy="Give one of the files another name.",
        )
    return f"file:{directory}/{name}"


def secret_variables(data: object) -> tuple[str, ...]:
    """The environment variables that `data` names as secrets."""
    return tuple(sorted(set(_VARIABLE.findall(str(data)))))
