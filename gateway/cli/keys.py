"""`sliceway keys`: tenants' API keys. A running gateway takes notice of a change within a second."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from gateway.cli.locate import ConfigArgument, ConfigOption, required_config
from gateway.cli.operate import actor, operations, parse_duration, parse_lifetime, wall_seconds, when
from gateway.cli.output import Json, err, out, print_json
from gateway.keys import KeyRecord

_STATES = {"active": "[green]active[/]", "expired": "[yellow]expired[/]", "revoked": "[red]revoked[/]"}

Expires = Annotated[str | None, typer.Option(metavar="LIFETIME", help="Like 30d, 12h, 2w; never if unset.")]
Key = Annotated[str, typer.Argument(help="The id of a key (`sliceway keys list`), or the key itself.")]

keys = typer.Typer(help="Tenants' API keys: stored as keyed hashes, shown once.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add `sliceway keys`."""
    app.add_typer(keys, name="keys")


@keys.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key; a tenant of the configuration.")],
    config: ConfigArgument = None,
    config_option: ConfigOption = None,
    name: Annotated[str, typer.Option(help="What it is for, to tell it from others.")] = "",
    expires: Expires = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it. It cannot be shown again."""
    lifetime = parse_lifetime(expires, "--expires") if expires else None
    settings = required_config(config_option, config)
    key, record = operations(settings).create_key(tenant, actor=actor(), name=name, lifetime_seconds=lifetime)
    if as_json:
        print_json({"key": key} | shown(record))
        return
    _show_key(key, record)
    if settings.gateway.authentication == "none":
        err.print("[yellow]note[/] gateway.authentication is `none`: the gateway asks for no keys.")


@keys.command("list")
def list_keys(
    config: ConfigArgument = None,
    config_option: ConfigOption = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: Json = False,
) -> None:
    """List keys by their ids; the keys themselves are nowhere."""
    asked = operations(required_config(config_option, config))
    records, uses = asked.keys(tenant), asked.key_uses()
    if tenant is not None and not records:  # a tenant that was removed may have keys left: those are listed
        asked.tenant(tenant)
    if as_json:
        print_json({"keys": [shown(record, uses.get(record.id)) for record in records]})
        return
    if not records:
        out.print("There are no keys yet. Make one: sliceway keys create TENANT")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("id", "tenant", "name", "state", "created", "expires", "last used"):
        table.add_column(column)
    now = wall_seconds()
    for record in records:
        state = record.state(now)
        expires = when(record.expires) if record.expires else "never"
        used = when(uses[record.id]) if record.id in uses else "never"
        names = (record.id, escape(record.tenant), escape(record.name))
        table.add_row(*names, _STATES[state], when(record.created), expires, used)
    out.print(table)


@keys.command()
def rotate(
    key: Key,
    config: ConfigArgument = None,
    config_option: ConfigOption = None,
    overlap: Annotated[
        str, typer.Option(metavar="DURATION", help="How long the old key goes on; 0s ends it at once.")
    ] = "24h",
    expires: Annotated[
        str | None,
        typer.Option(metavar="LIFETIME", help="Of the new key, like 30d; as long as the old one's if unset."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a new key in the place of one, which goes on for the overlap: clients change over without a gap."""
    asked = operations(required_config(config_option, config))
    made, record, old = asked.rotate_key(
        key,
        actor=actor(),
        overlap_seconds=parse_duration(overlap, "--overlap"),
        lifetime_seconds=parse_lifetime(expires, "--expires") if expires else None,
    )
    if as_json:
        print_json({"key": made} | shown(record) | {"replaced": shown(old, asked.key_uses().get(old.id))})
        return
    _show_key(made, record)
    err.print(f"[dim]Key {old.id}, which it replaces, counts until {when(old.expires)}.[/]")


@keys.command()
def revoke(key: Key, config: ConfigArgument = None, config_option: ConfigOption = None, as_json: Json = False) -> None:
    """Make a key worthless, for good."""
    asked = operations(required_config(config_option, config))
    record = asked.revoke_key(key, actor=actor())
    if as_json:
        print_json(shown(record, asked.key_uses().get(record.id)))
    else:
        out.print(f"Key {record.id} of tenant {escape(record.tenant)} is revoked.")


def shown(record: KeyRecord, last_used: float | None = None) -> dict[str, object]:
    """For `--json`: everything but the digest, times in ISO 8601. `last_used` is in seconds since 1970."""
    at = {"created": record.created, "expires": record.expires, "revoked": record.revoked, "last_used": last_used}
    times = {name: None if seconds is None else when(seconds) for name, seconds in at.items()}
    return record.as_public(wall_seconds()) | times


def _show_key(key: str, record: KeyRecord) -> None:
    typer.echo(key)
    until = f", valid until {when(record.expires)}" if record.expires else ""
    err.print(
        f"[dim]Key {record.id} of tenant {escape(record.tenant)}{until}. It is shown this once; only a hash of it is kept.[/]"
    )
