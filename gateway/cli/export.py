"""`sliceway export`: layouts for other tools, and a whole fleet for Kubernetes or Ansible."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gateway.cli import layouts
from gateway.cli.locate import ConfigArgument, config_path
from gateway.cli.output import Json, err, out, print_json
from gateway.config import load_config
from gateway.export.ansible import ansible_project
from gateway.export.cluster import nodes_of
from gateway.export.kubernetes import FLAVOURS, Flavour, Settings, documents, steps, yaml_stream
from gateway.export.names import check_image, check_label, check_subdomain
from gateway.export.planned import exported
from model_registry.atomic import write_atomically
from model_registry.errors import ConfigError

_DEFAULT = "layouts"

Nodes = Annotated[
    list[str] | None,
    typer.Option(
        "--node",
        metavar="PRODUCT:GPUS",
        help="A GPU node of the cluster, like h100-sxm:8, or several like '4x h100-sxm:8'; once for each kind. "
        "Unset: what a simulated fleet names, a node for each product.",
    ),
]


class _Exports(TyperGroup):
    """What is no command here is meant for `layouts`: `sliceway export mig-parted`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add `export`."""
    group = typer.Typer(
        cls=_Exports, help="Write layouts for other tools (the default), or a fleet for Kubernetes or Ansible."
    )
    group.command(_DEFAULT)(layouts.export)
    group.command("k8s")(k8s)
    group.command("ansible")(ansible)
    app.add_typer(group, name="export")


def k8s(
    config: ConfigArgument = None,
    flavour: Annotated[
        str,
        typer.Option(help="deployments: the device plugin's resources; dra: resource claims; kuberay: a RayService."),
    ] = "deployments",
    node: Nodes = None,
    namespace: Annotated[str, typer.Option(help="Where everything but the MIG layouts goes.")] = "sliceway",
    gateway_image: Annotated[
        str | None, typer.Option(help="Made from docker/gateway.Dockerfile; sliceway-gateway:VERSION if unset.")
    ] = None,
    engine_image: Annotated[
        str | None, typer.Option(help="Made from docker/engine.Dockerfile; sliceway-engine:VERSION if unset.")
    ] = None,
    gateways: Annotated[
        int, typer.Option(min=1, max=100, help="Gateway pods; more than one share a ReadWriteMany volume.")
    ] = 2,
    storage_class: Annotated[str | None, typer.Option(help="Of the volumes; the cluster's default if unset.")] = None,
    operator_namespace: Annotated[
        str, typer.Option(help="The GPU operator's, where its MIG manager looks for layouts.")
    ] = "gpu-operator",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Files instead of one stream.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write Kubernetes manifests for the plan of CONFIG: engines on MIG slices, gateways, layouts, network policy.

    Looks at no machine and at no cluster. What manifests cannot do (labels of nodes, secrets) is told as comments.
    """
    chosen = _flavour(flavour)
    settings = Settings(
        namespace=check_label(namespace, "--namespace"),
        gateway_image=_image(gateway_image, "gateway"),
        engine_image=_image(engine_image, "engine"),
        gateways=gateways,
        storage_class=None if storage_class is None else check_subdomain(storage_class, "--storage-class"),
        operator_namespace=check_label(operator_namespace, "--operator-namespace"),
    )
    loaded = load_config(config_path(config))
    export = exported(loaded, nodes_of(loaded, node or ()))
    files = documents(export, settings, chosen)
    todo = list(steps(export, settings, chosen))
    everything = [document for of_file in files.values() for document in of_file]
    if as_json:
        print_json({"flavour": chosen, "notes": export.notes, "todo": todo, "manifests": everything})
    elif output is None:
        told = [*(f"note: {note}" for note in export.notes), *(f"to do: {step}" for step in todo)]
        sys.stdout.write(yaml_stream(everything, told))
    else:
        _write(output, {f"{name}.yaml": yaml_stream(of_file) for name, of_file in files.items()}, ".yaml")
        _tell(export.notes, todo, f"kubectl apply -f {output}")


def ansible(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the playbook goes.")],
    config: ConfigArgument = None,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="NAME[=ADDRESS]", help="A machine of the inventory; several times for several."),
    ] = None,
    package: Annotated[
        str | None, typer.Option(help="What pip installs on the machines; this version from the index if unset.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an Ansible playbook that serves CONFIG on machines: install, configure, roll one machine after the other."""
    wanted = package or f"sliceway=={_version()}"
    project = ansible_project(load_config(config_path(config)), host or (), package=wanted)
    _write(output, project.files, ".yml")
    last = f"ansible-playbook -i {output}/inventory.yml {output}/site.yml"
    if as_json:
        print_json({"files": sorted(project.files), "notes": project.notes, "run": last})
    else:
        _tell(project.notes, [], last)


def _image(chosen: str | None, part: str) -> str:
    return f"sliceway-{part}:{_version()}" if chosen is None else check_image(chosen, f"--{part}-image")


def _flavour(text: str) -> Flavour:
    for flavour in FLAVOURS:
        if text == flavour:
            return flavour
    raise ConfigError(
        f"there is no flavour {text!r}", where="--flavour", remedy=f"Choose one of {', '.join(FLAVOURS)}."
    )


def _write(directory: Path, files: Mapping[str, str], suffix: str) -> None:
    """Raises ConfigError where the directory has files of another export: they would be applied as well."""
    foreign = sorted(p.name for p in directory.glob(f"*{suffix}") if p.name not in files) if directory.exists() else []
    if foreign:
        raise ConfigError(
            f"there are files here that this export does not write: {', '.join(foreign)}",
            where=str(directory),
            remedy="Name an empty directory, or remove them: whoever applies the directory would apply them, too.",
        )
    try:
        for name, text in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())
    except OSError as error:
        raise ConfigError(f"the files cannot be written: {error.strerror}", where=str(directory)) from error


def _tell(notes: tuple[str, ...], todo: list[str], last: str) -> None:
    for note in notes:
        err.print(f"[yellow]note[/] {note}", highlight=False, soft_wrap=True)
    for step in [*todo, last]:
        out.print(step, highlight=False, markup=False, soft_wrap=True)


def _version() -> str:
    try:
        return version("sliceway")
    except PackageNotFoundError:  # run from a source tree
        return "latest"
