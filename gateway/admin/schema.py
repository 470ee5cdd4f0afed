"""What the admin API takes and gives, as its OpenAPI document shows it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from gateway.admin.operations import TenantView
from gateway.audit import Entry, Verdict
from gateway.config import TenantConfig
from gateway.keys import KeyRecord
from model_registry.schema import Name, Section

CENTURY_SECONDS = 100 * 365.25 * 86400

Lifetime = Annotated[float, Field(gt=0, le=CENTURY_SECONDS)]


class Shown(BaseModel):
    """An answer."""

    model_config = ConfigDict(frozen=True)


class NewKey(Section):
    """A key to be made."""

    tenant: Name
    name: str = Field(default="", max_length=200, description="What it is for, to tell it from others.")
    lifetime_seconds: Lifetime | None = Field(default=None, description="It never expires if unset.")


class Rotation(Section):
    """How a key is handed over to its successor."""

    overlap_seconds: float = Field(
        default=86400.0, ge=0, le=CENTURY_SECONDS, description="How long the old key goes on."
    )
    lifetime_seconds: Lifetime | None = Field(default=None, description="As long as the old one's if unset.")


class KeyShown(Shown):
    """A key without what would open anything."""

    id: str
    tenant: str
    name: str
    state: Literal["active", "expired", "revoked"]
    created: datetime
    expires: datetime | None
    revoked: datetime | None
    replaces: str | None
    last_used: datetime | None = Field(description="To the minute; null: never, as far as is known.")


class MadeKey(KeyShown):
    """A key that was just made. `key` is shown this once."""

    key: str


class RotatedKey(MadeKey):
    """A key that was just made in the place of another."""

    replaced: KeyShown


class Keys(Shown):
    """Every key, oldest first."""

    keys: list[KeyShown]


class TenantShown(TenantConfig):
    """A tenant as it counts. `changed` names the fields that operators set over the configuration."""

    source: Literal["configuration", "operator"]
    changed: list[str]


class Tenants(Shown):
    """Every tenant."""

    tenants: list[TenantShown]


def _optional_fields() -> dict[str, Any]:
    """Every field of a tenant but its name, none required; null takes one back."""
    fields = TenantConfig.model_fields
    return {name: (field.annotation | None, None) for name, field in fields.items() if name != "name"}  # type: ignore[operator]


class LimitShown(Shown):
    """One limit, as this gateway process counts it."""

    tenant: str
    model: str | None = Field(description="Null: over all models.")
    limit: str
    full: int
    used: int
    refused: int


class Limits(Shown):
    """Every limit that is in use, or was."""

    limits: list[LimitShown]


class ReplicaShown(Shown):
    """A replica as this gateway sees it."""

    replica: str
    model: str
    slice: str
    state: str
    reason: str | None
    drained: bool = Field(description="Whether an operator has taken it out.")


class Replicas(Shown):
    """Every replica."""

    replicas: list[ReplicaShown]


class Drained(Shown):
    """Replicas that operators have taken out."""

    drained: list[str]


class Reloaded(Shown):
    """What the configuration holds that gateways are reading again."""

    models: int
    tenants: int


class AuditEntry(Shown):
    """One change."""

    seq: int
    at: str
    actor: str
    action: str
    target: str
    detail: dict[str, Any]
    prev: str
    mac: str
    torn: str | None = None


class AuditTail(Shown):
    """The last changes, oldest first."""

    entries: list[AuditEntry]


class AuditVerdict(Shown):
    """Whether the log is as it was written. `head` is to be noted elsewhere and compared later."""

    intact: bool
    entries: int
    head: str
    problems: list[str]


class Problem(Shown):
    """What went wrong, where, and what to do."""

    code: str
    message: str
    where: str | None
    remedy: str | None


class ProblemBody(Shown):
    """Every answer above 399."""

    error: Problem


def tenant_change() -> type[BaseModel]:
    """The body of a change of a tenant: any of its fields. Made from the configuration's schema, so that it cannot fall behind."""
    return create_model("TenantChange", __base__=Section, **_optional_fields())


def key_fields(record: KeyRecord, now: float, uses: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The fields of KeyShown. `uses` are the last uses by id, in seconds since 1970."""
    times = {name: _time(getattr(record, name)) for name in ("created", "expires", "revoked")}
    return record.as_public(now) | times | {"last_used": _time((uses or {}).get(record.id))}


def tenant_shown(view: TenantView) -> TenantShown:
    """A tenant for the API."""
    return TenantShown.model_validate(view.as_dict())


def entry_shown(entry: Entry) -> AuditEntry:
    """A line of the log for the API."""
    return AuditEntry.model_validate(entry.as_public())


def verdict_shown(verdict: Verdict) -> AuditVerdict:
    """What verification found, for the API."""
    head = f"{verdict.head.seq}:{verdict.head.mac}"
    return AuditVerdict(intact=verdict.intact, entries=verdict.entries, head=head, problems=list(verdict.problems))


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
