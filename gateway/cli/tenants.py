"""`sliceway tenants`: who may ask for what, seen and changed while gateways serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from gateway.admin import TenantView
from gateway.cli.locate import ConfigArgument, ConfigOption, required_config
from gateway.cli.operate import actor, operations
from gateway.cli.output import Json, out, print_json

tenants = typer.Typer(help="Tenants: models, aliases, limits, weights.", no_args_is_help=True)

_FILES = (".yaml", ".yml", ".json")

Tenant = Annotated[str, typer.Argument(help="A tenant's name.")]
Settings = Annotated[
    list[str],
    typer.Argument(
        metavar="FIELD=VALUE... [CONFIG]",
        help="As in the configuration, values in JSON: weight=2 models='[\"chat\"]' limits='{\"tokens_per_minute\": 9000}'; "
        "null takes a field back. A file at the end is the configuration.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add `sliceway tenants`."""
    app.add_typer(tenants, name="tenants")


@tenants.command("list")
def list_tenants(config: ConfigArgument = None, config_option: ConfigOption = None, as_json: Json = False) -> None:
    """List tenants as they count at the moment."""
    views = operations(required_config(config_option, config)).tenants()
    if as_json:
        print_json({"tenants": [view.as_dict() for view in views]})
        return
    if not views:
        out.print("There are no tenants. Add one under `tenants:`, or: sliceway tenants add NAME")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tenant", "models", "isolation", "weight", "priority", "changed here"):
        table.add_column(column)
    for view in views:
        one = view.settings
        models = "all" if one.models == "all" else ", ".join(one.models)
        changed = "added" if view.source == "operator" else ", ".join(view.changed)
        table.add_row(escape(one.name), escape(models), one.isolation, f"{one.weight:g}", str(one.priority), changed)
    out.print(table)


@tenants.command()
def show(
    tenant: Tenant, config: ConfigArgument = None, config_option: ConfigOption = None, as_json: Json = False
) -> None:
    """Show every setting of a tenant."""
    _tell(operations(required_config(config_option, config)).tenant(tenant), as_json=as_json)


@tenants.command()
def add(tenant: Tenant, settings: Settings = [], config: ConfigOption = None, as_json: Json = False) -> None:  # noqa: B006  # typer copies it
    """Add a tenant without touching the configuration."""
    written, named = _apart(settings)
    fields = _fields(written)
    _tell(operations(required_config(config, named)).add_tenant(tenant, fields, actor=actor()), as_json=as_json)


@tenants.command("set")
def set_fields(tenant: Tenant, settings: Settings, config: ConfigOption = None, as_json: Json = False) -> None:
    """Set fields of a tenant over what the configuration says; counts within a second."""
    written, named = _apart(settings)
    fields = _fields(written, least=1)
    _tell(operations(required_config(config, named)).change_tenant(tenant, fields, actor=actor()), as_json=as_json)


@tenants.command()
def reset(
    tenant: Tenant, config: ConfigArgument = None, config_option: ConfigOption = None, as_json: Json = False
) -> None:
    """Take back everything that was set here: the configuration alone counts again."""
    asked = operations(required_config(config_option, config))
    _tell(asked.reset_tenant(tenant, actor=actor()), as_json=as_json)


@tenants.command()
def remove(
    tenant: Tenant, config: ConfigArgument = None, config_option: ConfigOption = None, as_json: Json = False
) -> None:
    """Remove a tenant that was added here; its keys open nothing any more."""
    operations(required_config(config_option, config)).remove_tenant(tenant, actor=actor())
    if as_json:
        print_json({"name": tenant, "removed": True})
    else:
        out.print(f"Tenant {escape(tenant)} is removed.")


def _apart(words: list[str]) -> tuple[list[str], Path | None]:
    """The settings, and the configuration where the last word names one: a file, not FIELD=VALUE."""
    last = words[-1] if words else ""
    if "=" in last or not (Path(last).suffix in _FILES or Path(last).is_file()):
        return words, None
    return words[:-1], Path(last)


def _fields(settings: list[str], *, least: int = 0) -> dict[str, Any]:
    if len(settings) < least:
        raise typer.BadParameter("nothing is to be set; give at least one, like weight=2", param_hint="FIELD=VALUE")
    return dict(_field(text) for text in settings)


def _field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name or name == "name":
        raise typer.BadParameter(f"{text!r} is no FIELD=VALUE, like weight=2", param_hint="FIELD=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value  # a bare word is text: isolation=dedicated


def _tell(view: TenantView, *, as_json: bool) -> None:
    if as_json:
        print_json(view.as_dict())
        return
    for name, value in view.as_dict().items():
        mark = "  [dim](set here)[/]" if name in view.changed else ""
        out.print(f"{name}: {escape(json.dumps(value))}{mark}", highlight=False)
