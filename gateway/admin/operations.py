"""Everything an operator can change while gateways serve, for the command line and the admin API alike.

Every change is checked, then written to the audit log, then made; a change that cannot be written down is not made. Calls
block on files and locks: off the event loop, please.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any, Literal

import msgspec

from gateway.admin.overlay import Overlay, OverlayStore, applied, with_fields, without_tenant
from gateway.audit import AuditLog
from gateway.config import Config, TenantConfig
from gateway.errors import ConflictingChange, UnknownReplica, UnknownTenant
from gateway.key_uses import read_uses
from gateway.keys import KeyRecord, Keystore
from gateway.routes import external_replicas
from placement.cluster.here import node_of_gateway
from placement.errors import TableUnreadable
from placement.locks import holder
from placement.orders import read_orders, write_orders
from placement.state import StatePaths
from placement.table import read as read_table


@dataclass(frozen=True, slots=True)
class TenantView:
    """A tenant as it counts, where it comes from, and which of its fields operators have set."""

    settings: TenantConfig
    source: Literal["configuration", "operator"]
    changed: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and the API."""
        return self.settings.model_dump(mode="json") | {"source": self.source, "changed": list(self.changed)}


class Operations:
    """Changes in one state directory. `actor` is who asks, for the audit log.

    `load` gives the configuration without what operators changed; `read` reads its file anew, for `reload`; `wall` is seconds since 1970.
    """

    def __init__(
        self, load: Callable[[], Config], *, wall: Callable[[], float], read: Callable[[], Config] | None = None
    ) -> None:
        self._load = load
        self._read = read or load
        self._wall = wall

    # ---- keys

    def create_key(
        self, tenant: str, *, actor: str, name: str = "", lifetime_seconds: float | None = None
    ) -> tuple[str, KeyRecord]:
        """A new key and its record. Raises UnknownTenant."""
        config = self._known(tenant)
        return Keystore.of(config).create(
            tenant,
            now=self._wall(),
            name=name,
            lifetime_seconds=lifetime_seconds,
            announce=lambda record: self._note(config, actor, "key.create", record.id, _told(record)),
        )

    def rotate_key(
        self, key: str, *, actor: str, overlap_seconds: float, lifetime_seconds: float | None = None
    ) -> tuple[str, KeyRecord, KeyRecord]:
        """A new key in the place of `key`, its record, and the old one's. Raises UnknownKey, ConflictingChange."""
        config = self._load()

        def announce(record: KeyRecord) -> None:
            detail = _told(record) | {"replaces": record.replaces, "overlap_seconds": overlap_seconds}
            self._note(config, actor, "key.rotate", record.id, detail)

        return Keystore.of(config).rotate(
            key,
            now=self._wall(),
            overlap_seconds=overlap_seconds,
            lifetime_seconds=lifetime_seconds,
            announce=announce,
        )

    def revoke_key(self, key: str, *, actor: str) -> KeyRecord:
        """Make `key` worthless. Raises UnknownKey."""
        config = self._load()
        return Keystore.of(config).revoke(
            key,
            now=self._wall(),
            announce=lambda record: self._note(config, actor, "key.revoke", record.id, {"tenant": record.tenant}),
        )

    def keys(self, tenant: str | None = None) -> list[KeyRecord]:
        """Every key, or one tenant's, oldest first."""
        return [record for record in Keystore.of(self._load()).records() if tenant in (None, record.tenant)]

    def key_uses(self) -> dict[str, float]:
        """When keys were last used, by id, in seconds since 1970; to the minute, and only those that were used."""
        return read_uses(self._load().state)

    # ---- tenants

    def tenants(self) -> list[TenantView]:
        """Every tenant, those of the configuration first."""
        config, overlay = self._load(), self._store().load()
        listed = {tenant.name for tenant in config.tenants}
        return [
            TenantView(
                tenant,
                "configuration" if tenant.name in listed else "operator",
                tuple(sorted(overlay.tenants.get(tenant.name, ()))),
            )
            for tenant in applied(config, overlay).tenants
        ]

    def tenant(self, name: str) -> TenantView:
        """One tenant. Raises UnknownTenant."""
        views = self.tenants()
        found = next((view for view in views if view.settings.name == name), None)
        if found is None:
            raise _unknown(name, [view.settings.name for view in views])
        return found

    def add_tenant(self, name: str, fields: Mapping[str, Any], *, actor: str) -> TenantView:
        """A tenant that the configuration does not name. Raises ConflictingChange, OperatorError."""
        if any(view.settings.name == name for view in self.tenants()):
            raise ConflictingChange(
                f"there is a tenant {name!r} already", where="tenants", remedy="Change it instead: sliceway tenants set"
            )
        self._change("tenant.add", name, dict(fields), lambda overlay: with_fields(overlay, name, fields), actor)
        return self.tenant(name)

    def change_tenant(self, name: str, fields: Mapping[str, Any], *, actor: str) -> TenantView:
        """Set `fields` of a tenant over what the configuration says; None takes one back. Raises UnknownTenant, OperatorError."""
        self.tenant(name)
        self._change("tenant.change", name, dict(fields), lambda overlay: with_fields(overlay, name, fields), actor)
        return self.tenant(name)

    def remove_tenant(self, name: str, *, actor: str) -> None:
        """Remove a tenant that was added here; its keys open nothing any more. Raises UnknownTenant, ConflictingChange."""
        if self.tenant(name).source == "configuration":
            raise ConflictingChange(
                f"tenant {name!r} stands in the configuration",
                where="tenants",
                remedy="Take it out there and reload, or take back what was set here: sliceway tenants reset",
            )
        self._change("tenant.remove", name, {}, lambda overlay: without_tenant(overlay, name), actor)

    def reset_tenant(self, name: str, *, actor: str) -> TenantView:
        """Take back everything that was set over the configuration. Raises UnknownTenant, ConflictingChange."""
        if self.tenant(name).source == "operator":
            raise ConflictingChange(
                f"tenant {name!r} is nothing but what was set here",
                where="tenants",
                remedy="Remove it: sliceway tenants remove",
            )
        self._change("tenant.reset", name, {}, lambda overlay: without_tenant(overlay, name), actor)
        return self.tenant(name)

    # ---- replicas and the configuration

    def drained(self) -> list[str]:
        """Replicas that take no new requests because an operator said so."""
        config = self._load()
        return sorted({*self._store().load().drained, *read_orders(StatePaths(config.state)).drained})

    def drain(self, replica: str, *, actor: str) -> None:
        """Have a replica take no new requests; those it has go on. Returns at once. Raises UnknownReplica."""
        self._order(replica, "replica.drain", actor, out=True)

    def undrain(self, replica: str, *, actor: str) -> None:
        """Have a drained replica take requests again. Raises UnknownReplica."""
        self._order(replica, "replica.undrain", actor, out=False)

    def reload(self, *, actor: str) -> Config:
        """Have every gateway, and the controller, read the configuration again, if it is good. Raises ConfigError, OperatorError."""
        config = self._read()
        applied(config, self._store().load())
        self._note(config, actor, "config.reload", "configuration", {})
        with self._store().changing() as draft:
            draft[0] = msgspec.structs.replace(draft[0], reloads=draft[0].reloads + 1)
        _wake_controller(StatePaths(config.state))
        return config

    def audit(self) -> AuditLog:
        """The audit log."""
        return AuditLog.of(self._load())

    # ---- inside

    def _known(self, tenant: str) -> Config:
        config = applied(self._load(), self._store().load())
        names = [one.name for one in config.tenants]
        if tenant not in names:
            raise _unknown(tenant, names)
        return config

    def _store(self) -> OverlayStore:
        return OverlayStore(self._load().state)

    def _note(self, config: Config, actor: str, action: str, target: str, detail: Mapping[str, Any]) -> None:
        _refuse_on_a_node(config)
        AuditLog.of(config).append(actor=actor, action=action, target=target, detail=detail, now=self._wall())

    def _change(
        self, action: str, name: str, detail: dict[str, Any], change: Callable[[Overlay], Overlay], actor: str
    ) -> None:
        config = self._load()
        with OverlayStore(config.state).changing() as draft:
            changed = change(draft[0])
            applied(config, changed)
            self._note(config, actor, action, name, detail)
            draft[0] = changed

    def _order(self, replica: str, action: str, actor: str, *, out: bool) -> None:
        config = self._load()
        external = {row.replica for row in external_replicas(config.models)}
        if replica in external:
            with OverlayStore(config.state).changing() as draft:
                self._note(config, actor, action, replica, {})
                left = {*draft[0].drained} - {replica}
                drained = tuple(sorted(left | {replica} if out else left))
                draft[0] = msgspec.structs.replace(draft[0], drained=drained)
            return
        self._order_controller(config, replica, action, actor, sorted(external), out=out)

    def _order_controller(
        self, config: Config, replica: str, action: str, actor: str, external: list[str], *, out: bool
    ) -> None:
        paths = StatePaths(config.state)
        orders, known = read_orders(paths), set[str]()
        with contextlib.suppress(TableUnreadable):
            known = {row.replica for row in read_table(paths.routing_table).replicas}
        if replica not in known | orders.drained:
            raise UnknownReplica(
                f"there is no replica {replica!r}",
                where="replicas",
                remedy=f"There are {', '.join(sorted(known | set(external))) or 'none'}.",
            )
        self._note(config, actor, action, replica, {})
        changed = orders.drain([replica]) if out else orders.start([replica])
        verb = "drain" if out else "start"
        write_orders(paths, changed, verb=verb, replicas=[replica], at=datetime.fromtimestamp(self._wall(), UTC))
        _wake_controller(paths)


def _refuse_on_a_node(config: Config) -> None:
    """A cluster's leader gives every node's gateway its files, so a change made here would be undone. Raises ConflictingChange."""
    if (name := node_of_gateway(config.state)) is not None:
        raise ConflictingChange(
            f"this is the gateway of node {name!r} of a cluster, which has keys, tenants and configuration from the cluster's leader",
            where=str(config.state),
            remedy="Make the change on the machine of `sliceway up CONFIG --ray`, with its CONFIG; every gateway gets it.",
        )


def _wake_controller(paths: StatePaths) -> None:
    if (pid := holder(paths.controller_lock)) is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGHUP)


def _told(record: KeyRecord) -> dict[str, Any]:
    expires = None if record.expires is None else datetime.fromtimestamp(record.expires, UTC).isoformat()
    return {"tenant": record.tenant, "name": record.name, "expires": expires}


def _unknown(tenant: str, names: list[str]) -> UnknownTenant:
    near = get_close_matches(tenant, names, 3)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    there_are = f"There are: {', '.join(names)}." if names else "It has none; add one under `tenants:`."
    return UnknownTenant(f"the configuration has no tenant {tenant!r}", where="tenants", remedy=hint + there_are)
