"""The playbook's files: the role as it is shipped, and what the configuration adds to it - inventory, variables, the configuration itself.

Every machine serves the same configuration by itself (`sliceway up`) behind a load balancer of the operator's; limits are shared through
`gateway.shared_limits`. Nothing here writes to disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from gateway.config import Config
from gateway.export.gateway_config import is_secret, secret_variables, with_secrets_in
from gateway.export.kubernetes.text import yaml_text
from gateway.relay import LAST_WORDS_SECONDS
from model_registry.errors import ConfigError
from placement.schema import SimulatedFleet

DIRECTORY = "/etc/sliceway"
STATE = "/var/lib/sliceway"
ROLE = "roles/sliceway"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_ADDRESS = re.compile(r"[A-Za-z0-9:.%-]+")


@dataclass(frozen=True, slots=True)
class AnsibleProject:
    """The files by their path, and what the operator should know."""

    files: Mapping[str, str]
    notes: tuple[str, ...] = ()


def ansible_project(config: Config, hosts: Sequence[str], *, package: str) -> AnsibleProject:
    """The playbook for `hosts`, each `NAME` or `NAME=ADDRESS`. `package` is what pip installs there.

    Raises ConfigError for a simulated fleet, for hosts that are none, and for files that cannot be read.
    """
    if isinstance(config.fleet.discover, SimulatedFleet):
        raise ConfigError(
            "the GPUs of this configuration are simulated, so machines would serve with engines that are made up",
            where="fleet.discover",
            remedy="Write `discover: nvidia`: each machine finds its own.",
        )
    secret_files: dict[str, str] = {}
    model_files: dict[str, Path] = {}
    data = with_secrets_in(f"{DIRECTORY}/secrets", _configuration(config, model_files), secret_files)
    Config.model_validate(data)
    variables = sorted({*secret_variables(data), *(k for k in config.engine.environment if is_secret(k))})
    files = dict(_shipped())
    files["inventory.yml"] = _yaml(_inventory(hosts))
    files["group_vars/sliceway.yml"] = _yaml(_variables(config, package, secret_files, variables))
    files[f"{ROLE}/files/sliceway.yaml"] = _yaml(data)
    for name, path in model_files.items():
        files[f"{ROLE}/files/models/{name}"] = _read(path)
    return AnsibleProject(files, tuple(_notes(config, secret_files, variables)))


def _yaml(content: object) -> str:
    return f"---\n{yaml_text(content)}"


def _shipped() -> Iterator[tuple[str, str]]:
    """The files of the package's own playbook."""
    yield from _below(resources.files("gateway.export.ansible") / "playbook", "")


def _below(directory: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in sorted(directory.iterdir(), key=lambda e: e.name):
        if entry.is_dir():
            yield from _below(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith((".yml", ".j2")):
            yield f"{prefix}{entry.name}", entry.read_text(encoding="utf-8")


def _inventory(hosts: Sequence[str]) -> dict[str, Any]:
    if not hosts:
        raise ConfigError("no machine was named", where="--host", remedy="Name each: --host gpu1 --host gpu2=10.0.0.2.")
    found: dict[str, dict[str, str]] = {}
    for text in hosts:
        name, _, address = text.partition("=")
        if not _HOST.fullmatch(name) or ("=" in text and not _ADDRESS.fullmatch(address)):
            raise ConfigError(f"{text!r} is no machine", where="--host", remedy="Write NAME or NAME=ADDRESS.")
        if name in found:
            raise ConfigError(f"the machine {name!r} is named twice", where="--host")
        found[name] = {"ansible_host": address} if address else {}
    return {"sliceway": {"hosts": found}}


def _configuration(config: Config, files: dict[str, Path]) -> dict[str, Any]:
    """The configuration as it lies on the machines, everything in one file. `files` gets what models need beside it."""
    data = config.model_dump(mode="json", exclude_unset=True)
    data["state_dir"] = STATE
    for model, written in zip(config.models, data.get("models", ()), strict=True):
        for field in ("metadata", "chat_template"):
            if path := getattr(model, field):
                written[field] = f"{DIRECTORY}/files/{_file(Path(str(path)), files)}"
    if environment := data.get("engine", {}).get("environment"):
        data["engine"]["environment"] = {k: v for k, v in environment.items() if not is_secret(k)}
    if tls := data.get("gateway", {}).get("tls"):
        tls |= {"certificate": f"{DIRECTORY}/tls/tls.crt", "key": f"{DIRECTORY}/tls/tls.key"}
    gateway = data.setdefault("gateway", {})
    gateway["listen"] = f"0.0.0.0:{_port(config)}"
    if str(gateway.get("admin_listen", "")).startswith("unix:"):
        del gateway["admin_listen"]
    return data


def _file(path: Path, files: dict[str, Path]) -> str:
    if files.setdefault(path.name, path) != path:
        raise ConfigError(
            f"two files are called {path.name!r}, and machines have one place for files of a name",
            where=str(path),
            remedy="Give one of them another name.",
        )
    return path.name


def _port(config: Config) -> int:
    return int(config.gateway.listen.rpartition(":")[2])


def _variables(
    config: Config, package: str, secret_files: Mapping[str, str], secret_names: Sequence[str]
) -> dict[str, Any]:
    engine, gateway = config.engine, config.gateway
    ends = (
        engine.drain_timeout_seconds + engine.stop_timeout_seconds + gateway.drain_timeout_seconds + LAST_WORDS_SECONDS
    )
    found: dict[str, Any] = {
        "sliceway_package": package,
        "sliceway_engine": _engine_kind(config),
        "sliceway_layouts": bool(config.fleet.layouts),
        "sliceway_user": "root" if config.fleet.partition == "planned" else "sliceway",
        "sliceway_port": _port(config),
        "sliceway_scheme": gateway.scheme,
        "sliceway_stop_seconds": math.ceil(ends) + 30,
        "sliceway_start_seconds": math.ceil(engine.start_timeout_seconds) + 60,
    }
    if secret_files:
        found["sliceway_secret_files"] = dict(sorted(secret_files.items()))
    if secret_names:
        found["sliceway_environment"] = {name: f"{{{{ vault_{name.lower()} }}}}" for name in secret_names}
    if gateway.tls:
        found |= {
            "sliceway_tls_certificate": str(gateway.tls.certificate),
            "sliceway_tls_key": str(gateway.tls.key),
        }
    return found


def _engine_kind(config: Config) -> str:
    if config.engine.command or config.engine.python:
        return "none"
    cores = config.fleet.discover == "cpu" or any(s.kind == "cpu" for s in config.fleet.slices)
    return "cpu" if cores else "cuda"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"a file that a model needs cannot be read: {error}", where=str(path)) from error


def _notes(config: Config, secret_files: Mapping[str, str], variables: Sequence[str]) -> Iterator[str]:
    if variables:
        yield f"put {', '.join(f'vault_{v.lower()}' for v in variables)} into a vault: group_vars/all/vault.yml"
    for name, path in sorted(secret_files.items()):
        yield f"{path} is copied to the machines when the playbook runs, as {DIRECTORY}/secrets/{name}"
    for model in config.models:
        if model.source and Path(model.source).is_absolute():
            yield f"{model.name}: {model.source} must lie at the same place on every machine"
    if config.fleet.slices or any(m.slices for m in config.models):
        yield "slices are named by UUID, which differs between machines: this configuration fits one of them only"
    if config.fleet.partition == "planned":
        yield "partition: planned cuts GPUs when sliceway starts, which takes root: the service runs as root"
    if any(t.limits for t in config.tenants) and config.gateway.shared_limits.store == "local":
        yield "each machine counts limits for itself; to share them: gateway.shared_limits: {store: redis, url: ${ENV:...}}"
