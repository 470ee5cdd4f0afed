"""The whole configuration: the sections of every package, composed and checked against one another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from gateway.admission.schema import QueueConfig, SharedLimitsConfig, TenantLimits
from gateway.auth.schema import AuthConfig
from gateway.batches.schema import BatchesConfig
from model_registry.directories import user_directory
from model_registry.errors import ConfigError
from model_registry.loader import load_yaml
from model_registry.schema import (
    FilePath,
    Inconsistent,
    ModelConfig,
    Name,
    Problem,
    ReplicaRange,
    SecretRef,
    Section,
    Size,
)
from placement.schema import ClusterConfig, EngineConfig, FleetConfig

Listen = Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-fA-F:]+\]|[^:\s/]+):\d{1,5}$")]


AdminListen = Annotated[
    str, StringConstraints(pattern=r"^(unix:.+|(127\.\d{1,3}\.\d{1,3}\.\d{1,3}|localhost|\[::1\]):\d{1,5}|none)$")
]


class TenantConfig(Section):
    """Someone who sends requests. Keys are made by `sliceway keys create TENANT`."""

    name: Name
    models: tuple[Name, ...] | Literal["all"] = Field(default="all", description="Models this tenant may use.")
    aliases: dict[Name, Name] = Field(
        default={},
        description="Other names for models, as this tenant sends them; they go before `aliases` of the whole file.",
    )
    limits: TenantLimits | None = Field(default=None, description="Requests and tokens; unset: no limit.")
    weight: float = Field(
        default=1.0, gt=0, le=1000, description="Share of a busy slice, relative to other tenants' weights."
    )
    priority: int = Field(default=0, ge=-10, le=10, description="Higher goes first where requests wait.")
    default_deadline_seconds: float | None = Field(
        default=None, gt=0, description="When a request is worth nothing any more, unless it says so itself."
    )
    isolation: Literal["shared", "dedicated"] = Field(
        default="shared", description="`dedicated`: replicas of its own, on slices that serve no other tenant."
    )
    demand: dict[Name, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        default_factory=dict,
        description="Its part of the models' demands in requests per second, like `{chat-small: 2}`; planning and cost.",
    )

    def may_use(self, model: str) -> bool:
        """Whether its requests may name `model`."""
        return self.models == "all" or model in self.models


class TlsConfig(Section):
    """HTTPS on the public listener. The files are followed: a renewed certificate counts within a second."""

    certificate: Annotated[Path, FilePath()] = Field(description="PEM, with the intermediate certificates after it.")
    key: Annotated[Path, FilePath()] = Field(description="PEM, the private key; readable by this user alone.")
    key_password: SecretRef | None = Field(default=None, description="Of an encrypted key: ${ENV:NAME} or file:PATH.")
    min_version: Literal["1.2", "1.3"] = Field(default="1.2", description="Older TLS is refused.")


class GatewayConfig(Section):
    """The HTTP side."""

    listen: Listen = "127.0.0.1:8080"
    tls: TlsConfig | None = None
    authentication: Literal["keys", "none"] = Field(
        default="keys", description="`none` makes everyone the tenant `anonymous`."
    )
    keys_secret: SecretRef | None = Field(
        default=None,
        description="What API keys are hashed with: ${ENV:NAME} or file:PATH; a file in the state directory if unset.",
    )
    admin_listen: AdminListen | None = Field(
        default=None,
        description="`unix:PATH`, a loopback `host:port`, or `none`; a socket in the state directory if unset.",
    )
    admin_key: SecretRef | None = Field(
        default=None,
        description="What administrators send: ${ENV:NAME} or file:PATH; for TCP made in the state directory if unset.",
    )
    relay: Literal["fast", "asgi"] = Field(
        default="fast",
        description="How completions pass: between two transports, or through ASGI. Both do the same; a restart changes it.",
    )
    watch_config: bool = Field(
        default=False,
        description="`sliceway up` reads the configuration again when its files change; otherwise when it is told to.",
    )
    overhead_header: bool = Field(
        default=False,
        description="Every answer says in `x-sliceway-overhead-ms` what the gateway took; otherwise where a request has the header `x-sliceway-overhead`.",
    )
    max_body: Size = Field(default=32 * 2**20, description="Larger request bodies are refused with 413.")
    max_body_memory: Size | None = Field(
        default=None,
        description="Bytes of request bodies over 256 KiB that may wait in one gateway process; more are refused with 503. Unset: 8 x max_body.",
    )
    max_body_memory_per_tenant: Size | None = Field(
        default=None,
        description="The same of one tenant; more are refused with 429. Unset: 2 x max_body.",
    )
    max_header: Size = Field(default=64 * 2**10, description="Larger request heads are refused.")
    queue: QueueConfig = QueueConfig()
    shared_limits: SharedLimitsConfig = SharedLimitsConfig()
    max_in_flight_per_replica: int = Field(
        default=1024,
        ge=1,
        description="Requests one replica may have from this gateway, its own queue included; more are refused with 503.",
    )
    header_timeout_seconds: float = Field(
        default=10.0, gt=0, description="How long a client may take to send a request's head."
    )
    connect_timeout_seconds: float = Field(default=5.0, gt=0, description="How long connecting to an engine may take.")
    first_byte_timeout_seconds: float = Field(
        default=600.0, gt=0, description="How long an engine may take to its first byte."
    )
    body_timeout_seconds: float = Field(default=60.0, gt=0, description="How long a client may take to send its body.")
    idle_timeout_seconds: float = Field(
        default=300.0,
        gt=0,
        description="How long a stream may stand still: the engine silent, or the client not reading.",
    )
    keep_alive_seconds: float = Field(default=75.0, gt=0, description="How long an idle client connection is kept.")
    drain_timeout_seconds: float = Field(
        default=30.0, ge=0, description="How long streams may go on after a stop was asked for."
    )

    @property
    def most_body_bytes(self) -> int:
        """`max_body_memory`, or what stands for it."""
        return 8 * self.max_body if self.max_body_memory is None else self.max_body_memory

    @property
    def most_body_bytes_of_a_tenant(self) -> int:
        """`max_body_memory_per_tenant`, or what stands for it, and never more than all tenants may have."""
        own = 2 * self.max_body if self.max_body_memory_per_tenant is None else self.max_body_memory_per_tenant
        return min(own, self.most_body_bytes)

    @property
    def scheme(self) -> str:
        """How clients' addresses begin."""
        return "https" if self.tls else "http"


class Config(Section):
    """One configuration file, everything in it."""

    version: Literal["v1"]
    state_dir: Annotated[Path | None, FilePath()] = Field(
        default=None, description="Keys, routing table, logs, journal; under XDG_STATE_HOME if unset."
    )
    fleet: FleetConfig = FleetConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    models: tuple[ModelConfig, ...] = ()
    aliases: dict[Name, Name] = Field(
        default={}, description="Other names for models, as clients send them: `{gpt-4o: chat}`."
    )
    tenants: tuple[TenantConfig, ...] = ()
    auth: AuthConfig = AuthConfig()
    gateway: GatewayConfig = GatewayConfig()
    batches: BatchesConfig = BatchesConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        problems = [
            *_named_twice("models", [m.name for m in self.models]),
            *_named_twice("tenants", [t.name for t in self.tenants]),
            *self._unknown_models(),
            *self._wrong_aliases(),
            *self._unknown_claims(),
            *self._dedicated_without_keys(),
            *self._shared_slices(),
            *self._small_body_memory(),
            *self._tenants_demands(),
            *self._dedicated_without_slices(),
        ]
        if problems:
            raise Inconsistent(*problems)
        return self

    def _unknown_models(self) -> Iterator[Problem]:
        known = self._model_names()
        for index, tenant in enumerate(self.tenants):
            for name in tenant.models if tenant.models != "all" else ():
                if name not in known:
                    yield Problem(
                        f"tenant {tenant.name!r} names the unknown model {name!r}",
                        ("tenants", index, "models"),
                        _nearest(name, known),
                    )

    def _wrong_aliases(self) -> Iterator[Problem]:
        known = self._model_names()
        for alias, model in self.aliases.items():
            at = ("aliases", alias)
            if model not in known:
                yield Problem(f"alias {alias!r} names the unknown model {model!r}", at, _nearest(model, known))
            elif alias in known:
                yield Problem(
                    f"alias {alias!r} is the name of a model, which it would hide from everyone",
                    at,
                    "Choose another name, or put the alias under the tenants that are to get another model.",
                )
        for index, tenant in enumerate(self.tenants):
            for alias, model in tenant.aliases.items():
                where = ("tenants", index, "aliases", alias)
                if model not in known:
                    yield Problem(f"alias {alias!r} names the unknown model {model!r}", where, _nearest(model, known))
                elif not tenant.may_use(model):
                    yield Problem(
                        f"alias {alias!r} names the model {model!r}, which tenant {tenant.name!r} may not use",
                        where,
                        f"Add {model!r} to its `models`, or name one of them.",
                    )

    def _dedicated_without_keys(self) -> Iterator[Problem]:
        for index, tenant in enumerate(self.tenants):
            if tenant.isolation == "dedicated" and self.gateway.authentication == "none":
                yield Problem(
                    f"tenant {tenant.name!r} is to have replicas of its own, but nobody is told apart",
                    ("tenants", index, "isolation"),
                    "Set gateway.authentication to `keys`.",
                )

    def _unknown_claims(self) -> Iterator[Problem]:
        known = sorted({tenant.name for tenant in self.tenants})
        oidc = self.auth.oidc
        for value, name in oidc.tenant_map.items() if oidc else ():
            if name not in known:
                at = ("auth", "oidc", "tenant_map", value)
                yield Problem(f"claim {value!r} leads to the unknown tenant {name!r}", at, _nearest(name, known))

    def _model_names(self) -> list[str]:
        return sorted({model.name for model in self.models})

    def _shared_slices(self) -> Iterator[Problem]:
        owners: dict[str, str] = {}
        for index, model in enumerate(self.models):
            for slice_id in model.slices:
                if slice_id in owners:
                    yield Problem(
                        f"slice {slice_id!r} is named for a second replica; a slice holds one engine",
                        ("models", index, "slices"),
                        f"It already belongs to model {owners[slice_id]!r}; name another slice here.",
                    )
                owners.setdefault(slice_id, model.name)

    def _small_body_memory(self) -> Iterator[Problem]:
        gateway = self.gateway
        for name in ("max_body_memory", "max_body_memory_per_tenant"):
            value = getattr(gateway, name)
            if value is not None and value < gateway.max_body:
                yield Problem(
                    f"{name} has no room for one body of the size that max_body allows",
                    ("gateway", name),
                    f"Set it to at least {gateway.max_body} bytes, or lower gateway.max_body.",
                )

    def _tenants_demands(self) -> Iterator[Problem]:
        models = {model.name: model for model in self.models}
        asked: dict[str, float] = {}
        for index, tenant in enumerate(self.tenants):
            for name, rate in tenant.demand.items():
                at = ("tenants", index, "demand", name)
                model = models.get(name)
                if model is None or not tenant.may_use(name):
                    yield Problem(
                        f"tenant {tenant.name!r} has a demand for {name!r}, which it may not use",
                        at,
                        "Add it to the tenant's `models`, or take this line out.",
                    )
                elif model.demand is None:
                    yield Problem(
                        f"model {name!r} has no demand of which this could be a part",
                        at,
                        f"Add `demand` to models.{name}: it says how long requests are, too.",
                    )
                else:
                    asked[name] = asked.get(name, 0.0) + rate
                    if asked[name] > model.demand.requests_per_second * (1 + 1e-9):
                        yield Problem(
                            f"the tenants' demands for {name!r} come to {asked[name]:g} requests per second, "
                            f"the model's is {model.demand.requests_per_second:g}",
                            at,
                            f"Raise models.{name}.demand.requests_per_second to at least {asked[name]:g}.",
                        )

    def _dedicated_without_slices(self) -> Iterator[Problem]:
        """A dedicated tenant must get a replica of something, and a pinned model cannot be split between tenants."""
        for index, tenant in enumerate(self.tenants):
            if tenant.isolation != "dedicated":
                continue
            usable = [m for m in self.models if m.source and m.most_replicas != 0 and tenant.may_use(m.name)]
            if not usable:
                yield Problem(
                    f"tenant {tenant.name!r} asks for dedicated slices, and no model of it has a replica",
                    ("tenants", index, "isolation"),
                    "Give one of its models replicas, or set isolation: shared.",
                )
            for model in usable:
                others = [t.name for t in self.tenants if t is not tenant and t.may_use(model.name)]
                if model.slices and others:
                    yield Problem(
                        f"tenant {tenant.name!r} asks for dedicated slices, and {model.name!r} is pinned to slices "
                        f"that {', '.join(map(repr, others))} may use too",
                        ("tenants", index, "isolation"),
                        f"Take models.{model.name}.slices out, or give the other tenants another model.",
                    )

    @property
    def planned(self) -> bool:
        """Whether a plan decides who has which GPU slice: more is asked for than layouts and fixed numbers of replicas."""
        asks = any(m.demand or isinstance(m.replicas, ReplicaRange) for m in self.models)
        return asks or bool(self.fleet.reserve) or self.fleet.partition == "planned"

    @property
    def state(self) -> Path:
        """The state directory, absolute."""
        if self.state_dir is not None:
            return self.state_dir.expanduser().absolute()
        return user_directory("XDG_STATE_HOME", ".local/state") / "sliceway"


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, 1)
    advice = f"Did you mean {near[0]!r}? " if near else ""
    return f"{advice}There are: {', '.join(known) or 'none'}."


def _named_twice(section: str, names: list[str]) -> Iterator[Problem]:
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Problem(
                f"the name {name!r} is taken",
                (section, index, "name"),
                f"Names under `{section}` are unique; choose another.",
            )


def load_config(path: Path) -> Config:
    """Read, include, validate.

    Relative paths in the file (`state_dir`, `source`, `chat_template`) mean relative to the file that names them.
    Raises ConfigError with file, line, field and the nearest valid key for every problem found, and where something else than
    a directory is where the state directory has to be.
    """
    config = load_yaml(path, Config)
    if (other := _in_the_way(config.state)) is not None:
        raise ConfigError(
            f"the state directory is to be {config.state}, and {other} is no directory",
            where=f"{path}: state_dir",
            remedy=f"Move {other} away, or name another directory.",
        )
    return config


def _in_the_way(directory: Path) -> Path | None:
    """What has the place of a directory, or of one above it, without being one."""
    with contextlib.suppress(OSError):  # who may not look there is told when it is made
        return next((p for p in (directory, *directory.parents) if p.exists() and not p.is_dir()), None)
    return None
