"""`sliceway keys`: tenants' API keys. A running gateway takes notice of a change within a second."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from gateway.cli.locate import ConfigArgument, ConfigOption, required_config
from gateway.cli.output import Json, err, out, print_json
from gateway.config import Config
from gateway.errors import UnknownTenant
from gateway.keys import KeyRecord, Keystore
from placement.clock import SystemClock

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_STATES = {"active": "[green]active[/]", "expired": "[yellow]expired[/]", "revoked": "[red]revoked[/]"}

keys = typer.Typer(help="Tenants' API keys: stored as keyed hashes, shown once.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add `sliceway keys`."""
    app.add_typer(keys, name="keys")


def parse_lifetime(text: str) -> float:
    """Seconds from `30d`, `12h`, `90m`, `3600s` or `2w`. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if match is None or float(match.group(1)) == 0:
        raise typer.BadParameter(f"{text!r} is no lifetime; write a number and one of s, m, h, d, w, like 30d")
    return float(match.group(1)) * _UNITS[match.group(2)]


@keys.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key; a tenant of the configuration.")],
    config: ConfigArgument = None,
    config_option: ConfigOption = None,
    name: Annotated[str, typer.Option(help="What it is for, to tell it from others.")] = "",
    expires: Annotated[str | None, typer.Option(metavar="LIFETIME", help="Like 30d, 12h, 2w; never if unset.")] = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it. It cannot be shown again."""
    lifetime = parse_lifetime(expires) if expires else None
    settings = required_config(config_option, config)
    _known(tenant, settings)
    now = SystemClock().now().timestamp()
    key, record = Keystore(settings.state).create(tenant, now=now, name=name, lifetime_seconds=lifetime)
    if as_json:
        print_json({"key": key} | _public(record, now))
        return
    typer.echo(key)
    until = f", valid until {_when(record.expires)}" if record.expires else ""
    err.print(
        f"[dim]Key {record.id} of tenant {escape(tenant)}{until}. It is shown this once; only a hash of it is kept.[/]"
    )
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
    settings, now = required_config(config_option, config), SystemClock().now().timestamp()
    records = [r for r in Keystore(settings.state).records() if tenant in (None, r.tenant)]
    if as_json:
        print_json({"keys": [_public(record, now) for record in records]})
        return
    if not records:
        out.print("There are no keys yet. Make one: sliceway keys create TENANT")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("id", "tenant", "name", "state", "created", "expires"):
        table.add_column(column)
    for record in records:
        state = record.state(now)
        expires = _when(record.expires) if record.expires else "never"
        table.add_row(
            record.id, escape(record.tenant), escape(record.name), _STATES[state], _when(record.created), expires
        )
    out.print(table)


@keys.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The id of a key (`sliceway keys list`), or the key itself.")],
    config: ConfigArgument = None,
    config_option: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Make a key worthless, for good."""
    now = SystemClock().now().timestamp()
    record = Keystore(required_config(config_option, config).state).revoke(key, now=now)
    if as_json:
        print_json(_public(record, now))
    else:
        out.print(f"Key {record.id} of tenant {escape(record.tenant)} is revoked.")


def _known(tenant: str, config: Config) -> None:
    names = [one.name for one in config.tenants]
    if tenant in names:
        return
    near = get_close_matches(tenant, names, 3)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    there_are = f"There are: {', '.join(names)}." if names else "It has none; add one under `tenants:`."
    raise UnknownTenant(f"the configuration has no tenant {tenant!r}", where="tenants", remedy=hint + there_are)


def _public(record: KeyRecord, now: float) -> dict[str, object]:
    times = {
        name: None if (at := getattr(record, name)) is None else _when(at) for name in ("created", "expires", "revoked")
    }
    return record.as_public(now) | times


def _when(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
