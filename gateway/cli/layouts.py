"""`sliceway plan`, `apply`, `assert` and `import`, and `export` of layouts: how GPUs are cut, against how they are to be."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from gateway.applying import tell_gateways
from gateway.changes import refuse_dip
from gateway.cli.changes_view import show_changes
from gateway.cli.cluster_apply import apply_on_ray
from gateway.cli.cluster_plan import OnRay, TokenFile, plan_on_ray
from gateway.cli.layout_view import show_outcomes, show_plans, show_replicas
from gateway.cli.locate import ConfigArgument, config_path
from gateway.cli.output import Json, err, out, print_json
from gateway.cli.plan import AllowDip, Online, PlannedFleet, carry_out, gpu_labels, planned_fleet, told_changes
from gateway.cli.plan_view import show_applied, show_fleet, show_left_out, show_why
from gateway.cli.simulate import Simulate
from gateway.cluster_config import led_elsewhere
from gateway.config import Config, load_config
from gateway.doctor import default_config_path
from gateway.drain import ControllerDrain
from gateway.layouts import (
    ReplicaDifference,
    controller_is_behind,
    machine_of,
    one_at_a_time,
    plans_fleet,
    replica_difference,
    tell_controller,
    with_simulation,
)
from gateway.reviewed import ReviewedPlan
from model_registry.errors import ConfigError
from placement.exports import (
    export_config,
    export_labels,
    export_mig_parted,
    export_systemd,
    import_mig_parted,
)
from placement.partition import Applied, GpuPlan, LayoutRule
from placement.partition import apply as apply_layouts
from placement.partition import plan as plan_layouts
from placement.schema import SimulatedFleet

_LONG_LINE = 110

Format = Literal["config", "mig-parted", "labels", "systemd"]

LayoutsOnly = Annotated[
    bool, typer.Option("--layouts-only", help="GPUs only; engines are neither looked at nor told. What needs root.")
]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("plan")(plan)
    app.command("apply")(apply)
    app.command("assert")(assert_)
    app.command("import")(import_)


def plan(
    config: ConfigArgument = None,
    layouts_only: LayoutsOnly = False,
    why: Annotated[
        str | None, typer.Option("--why", metavar="MODEL", help="Why this model is where the plan puts it.")
    ] = None,
    allow_dip: AllowDip = False,
    online: Online = False,
    simulate: Simulate = None,
    ray: OnRay = None,
    token: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Show what `apply` would do, as a difference, and what stands in its way. Changes nothing.

    With --ray, for all nodes of a cluster at once.
    """
    _refuse_with_online(online=online, on_ray=ray is not None, layouts_only=layouts_only)
    if ray is not None:
        _refuse_with_ray(layouts_only=layouts_only, simulate=simulate)
        plan_on_ray(load_config(config_path(config)), ray, token, why=why, allow_dip=allow_dip, as_json=as_json)
        return
    loaded = with_simulation(load_config(config_path(config)), simulate)
    plans = _planned(loaded)
    fleet = (
        None
        if layouts_only
        else planned_fleet(loaded, asked=online or why is not None, allow_dip=allow_dip, online=online)
    )
    replicas = (
        None if layouts_only else replica_difference(loaded, fleet.replicas(loaded) if fleet is not None else None)
    )
    engines = None if layouts_only or why is not None else told_changes(loaded, fleet)
    if as_json:
        public = _plan_json(loaded, plans, replicas, fleet) | ({"fleet": fleet.as_public(why)} if fleet else {})
        print_json(public | ({"engines": engines.as_public()} if engines is not None else {}))
        return
    _say_what_is_simulated(loaded)
    _say_who_leads(loaded)
    if fleet is not None and why is not None:
        show_why(fleet.answer, why, fleet.gpus)
        return
    if not loaded.fleet.layouts and fleet is None:
        out.print("fleet.layouts names no GPU: all stay as they are")
    show_plans(plans)
    if fleet is not None:
        show_fleet(fleet.answer, fleet.gpus, fleet.reserved)
        show_left_out(fleet.left_out)
    if replicas is not None and not replicas.same:
        _show_replicas(replicas, fleet)
    if engines is not None:
        show_changes(engines, gpu_labels(loaded, engines), planned=True)


def _refuse_with_ray(*, layouts_only: bool, simulate: str | None) -> None:
    """Raises ConfigError for what is said with --ray and means nothing there."""
    if layouts_only or simulate is not None:
        raise ConfigError(
            "a cluster's GPUs are those of its nodes, with what runs on them",
            where="--layouts-only" if layouts_only else "--simulate",
            remedy="Leave it out; a node has simulated GPUs with: sliceway node join ADDRESS --simulate h100-sxm:8.",
        )


def _refuse_with_online(*, online: bool, on_ray: bool, layouts_only: bool) -> None:
    """Raises ConfigError for what is said with --online and cannot be had with it."""
    if online and on_ray:
        raise ConfigError(
            "a cluster is planned in full",
            where="--online",
            remedy="Leave --online out, or plan one machine without --ray.",
        )
    if online and layouts_only:
        raise ConfigError(
            "models are placed online, and --layouts-only looks at none",
            where="--online",
            remedy="Leave one of the two out.",
        )


def apply(
    config: ConfigArgument = None,
    layouts_only: LayoutsOnly = False,
    drain: Annotated[
        bool, typer.Option("--drain", help="Have engines end that are on slices which fleet.layouts takes away.")
    ] = False,
    allow_mode_change: Annotated[
        bool, typer.Option("--allow-mode-change", help="Switch MIG on or off where a layout needs it; reset such GPUs.")
    ] = False,
    allow_dip: AllowDip = False,
    online: Online = False,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="What `plan --json` printed: carry out this, and nothing where fleet or configuration are others by now.",
        ),
    ] = None,
    simulate: Simulate = None,
    ray: OnRay = None,
    token: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Cut GPUs as `fleet.layouts` says, then carry out the plan for the models' demands, if it has any.

    Slices that stay are not touched; exits 1 if not all of it could be done. With --ray the head of a cluster carries the plan out on
    all nodes, and goes on with it also if this command is ended.
    """
    _refuse_with_online(online=online, on_ray=ray is not None, layouts_only=layouts_only)
    path = config_path(config)
    if ray is not None:
        _refuse_with_ray(layouts_only=layouts_only, simulate=simulate)
        apply_on_ray(
            load_config(path),
            ray,
            token,
            allow_dip=allow_dip,
            allow_mode_change=allow_mode_change,
            as_json=as_json,
            plan_file=plan_file,
            drain=drain,
        )
        return
    loaded = with_simulation(load_config(path), simulate)
    _refuse_if_led(loaded)
    reviewed = _reviewed(loaded, plan_file, layouts_only=layouts_only, allow_dip=allow_dip, online=online)
    if not (layouts_only or allow_dip):
        _refuse_dip(loaded)
    applied = _apply(loaded, drain=drain, allow_mode_change=allow_mode_change)
    told = not layouts_only and applied.changed and tell_controller(loaded, path)
    fleet, gateways, engines = None, 0, None
    if not layouts_only and applied.ok:
        fleet = carry_out(
            loaded,
            allow_dip=allow_dip,
            allow_mode_change=allow_mode_change,
            quiet=as_json,
            online=online,
            reviewed=reviewed,
        )
        engines = fleet.changes if fleet is not None else told_changes(loaded, None)
        gateways = fleet.gateways if fleet is not None else tell_gateways(loaded)
        told = (controller_is_behind(loaded) and tell_controller(loaded, path)) or told
    if as_json:
        print_json(
            {
                "ok": applied.ok,
                "changed": applied.changed or (fleet is not None and bool(fleet.outcome.done)),
                "simulated": _is_simulated(loaded),
                "controller_told": told,
                "gateways_told": gateways,
                "gpus": [g.as_public() for g in applied.gpus],
            }
            | ({"fleet": fleet.as_public()} if fleet else {})
            | ({"engines": engines.as_public()} if engines is not None else {})
        )
    else:
        _say_what_is_simulated(loaded)
        show_outcomes(applied.gpus)
        if not loaded.fleet.layouts and fleet is None:
            out.print("fleet.layouts names no GPU: all stay as they are")
        if told:
            out.print("the controller looks at configuration and slices again")
        if gateways:
            out.print(f"{gateways} gateway{'s' * (gateways > 1)} went over to this configuration")
        if fleet is not None:
            show_applied(fleet)
            show_left_out(machine_of(loaded).driver.left_out())
        if engines is not None:
            show_changes(engines, gpu_labels(loaded, engines))
    raise typer.Exit(0 if applied.ok and (fleet is None or fleet.ok) else 1)


def _reviewed(
    config: Config, file: Path | None, *, layouts_only: bool, allow_dip: bool, online: bool
) -> ReviewedPlan | None:
    """The plan in `file`, which is still the one that would be carried out; None without a file."""
    if file is None:
        return None
    reviewed = ReviewedPlan.read(file)
    now = None if layouts_only else planned_fleet(config, allow_dip=allow_dip, online=online)
    engines = None if layouts_only else told_changes(config, now, quiet=True)
    reviewed.check(_planned(config), now.answer if now is not None else None, engines)
    return reviewed


def _refuse_dip(config: Config) -> None:
    """Where a fleet is planned, that is known when the plan is. What cannot be told is said once, afterwards."""
    changes = None if plans_fleet(config) else told_changes(config, None, quiet=True)
    if changes is not None:
        refuse_dip(changes)


def assert_(
    config: ConfigArgument = None,
    layouts_only: LayoutsOnly = False,
    simulate: Simulate = None,
    as_json: Json = False,
) -> None:
    """Exit 0 if everything is as the configuration says, else 1 and show the difference. Changes nothing."""
    loaded = with_simulation(load_config(config_path(config)), simulate)
    plans = _planned(loaded)
    fleet = None if layouts_only else planned_fleet(loaded)
    replicas = (
        None if layouts_only else replica_difference(loaded, fleet.replicas(loaded) if fleet is not None else None)
    )
    engines = None if layouts_only else told_changes(loaded, fleet)
    same = not any(p.actions for p in plans) and (replicas is None or replicas.same)
    same = same and (fleet is None or not fleet.answer.plan.changed) and not engines
    if as_json:
        public = _plan_json(loaded, plans, replicas, fleet) | ({"fleet": fleet.as_public()} if fleet else {})
        public |= {"engines": engines.as_public()} if engines is not None else {}
        print_json({"same": same} | public)
        raise typer.Exit(0 if same else 1)
    _say_what_is_simulated(loaded)
    if same:
        out.print("[green]as configured[/]")
    else:
        show_plans([p for p in plans if p.actions])
        if fleet is not None and fleet.answer.plan.changed:
            show_fleet(fleet.answer, fleet.gpus, fleet.reserved)
        if replicas is not None:
            _show_replicas(replicas, fleet)
        if engines is not None:
            show_changes(engines, gpu_labels(loaded, engines))
    raise typer.Exit(0 if same else 1)


def export(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FORMAT] [CONFIG]", help="config, mig-parted, labels or systemd; and a configuration."),
    ] = None,
    format: Annotated[
        Format | None, typer.Option("--format", help="The same as FORMAT; `config` is this program's own.")
    ] = None,
    label: Annotated[
        str, typer.Option("--label", help="What mig-parted's file and the labels call this layout.")
    ] = "current",
    simulate: Simulate = None,
    as_json: Json = False,
) -> None:
    """Write how the GPUs are cut: as a configuration, for mig-parted, as node labels, or as a unit that restores it."""
    chosen, path = _words(words or [], format)
    if chosen == "systemd":
        _export_systemd(path, as_json=as_json)
        return
    loaded = with_simulation(load_config(path) if path else Config(version="v1"), simulate)
    gpus = machine_of(loaded).driver.observe()
    if chosen == "labels":
        labels = export_labels(gpus, label)
        if as_json:
            print_json(labels.as_public())
        else:
            sys.stdout.write("".join(f"{name}={value}\n" for name, value in labels.labels.items()))
        return
    content = export_mig_parted(gpus, label) if chosen == "mig-parted" else _with_discovery(export_config(gpus), loaded)
    if as_json:
        print_json(content)
    else:
        sys.stdout.write(yaml_text(content))


def import_(
    file: Annotated[Path, typer.Argument(help="A configuration file of NVIDIA's mig-parted.")],
    label: Annotated[
        str | None, typer.Option("--label", help="Which of its configurations, if there are several.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a mig-parted file into `fleet.layouts` with the same meaning."""
    rules = import_mig_parted(file, label)
    content = {"version": "v1", "fleet": {"layouts": [_rule(r) for r in rules]}}
    if as_json:
        print_json(content)
    else:
        sys.stdout.write(yaml_text(content))


def _planned(config: Config) -> tuple[GpuPlan, ...]:
    """One plan per GPU; none, and no driver asked, where no layout is configured."""
    if not config.fleet.layouts:
        return ()
    machine = machine_of(config)
    return plan_layouts(machine.driver.observe(), config.fleet.layouts, clients=machine.tools().clients)


def _apply(config: Config, *, drain: bool, allow_mode_change: bool) -> Applied:
    if not config.fleet.layouts:
        return Applied(())
    machine = machine_of(config)
    with one_at_a_time(config, machine), ControllerDrain(config) as controller:
        tools = machine.tools(controller if drain else None)
        return apply_layouts(machine.driver, config.fleet.layouts, allow_mode_change=allow_mode_change, tools=tools)


def _plan_json(
    config: Config, plans: tuple[GpuPlan, ...], replicas: ReplicaDifference | None, fleet: PlannedFleet | None
) -> dict[str, object]:
    return {
        "changes": any(p.actions for p in plans) or (fleet is not None and fleet.answer.plan.changed),
        "blocked": any(p.obstacles for p in plans) or (fleet is not None and fleet.answer.blocked is not None),
        "simulated": _is_simulated(config),
        "gpus": [p.as_public() for p in plans],
        "replicas": replicas.as_public() if replicas is not None else None,
    }


def _show_replicas(replicas: ReplicaDifference, fleet: PlannedFleet | None) -> None:
    if fleet is None:
        show_replicas(replicas)
    else:
        show_replicas(replicas, fleet.started(replicas.missing), met=fleet.answer.met)


def _is_simulated(config: Config) -> bool:
    return isinstance(config.fleet.discover, SimulatedFleet)


def _refuse_if_led(config: Config) -> None:
    if (why := led_elsewhere(config)) is not None:
        raise why


def _say_who_leads(config: Config) -> None:
    if (why := led_elsewhere(config)) is not None:
        err.print(f"planned as if nothing ran here: {why.message}", highlight=False, markup=False)


def _say_what_is_simulated(config: Config) -> None:
    if isinstance(config.fleet.discover, SimulatedFleet):
        err.print(
            f"[yellow]simulated[/]: {config.fleet.discover.text}; no GPU of this machine is touched", highlight=False
        )


def _words(words: list[str], chosen: Format | None) -> tuple[Format, Path | None]:
    """A format and a configuration, in any order; a file of that name is a file."""
    path: Path | None = None
    for word in words:
        if word in get_args(Format) and not Path(word).exists() and chosen is None:
            chosen = word  # type: ignore[assignment]
        elif path is None and (Path(word).exists() or Path(word).suffix):
            path = Path(word)
        elif path is None:
            raise ConfigError(
                f"{word!r} is neither a format nor a file",
                remedy=f"{_meant(word)}Formats are {', '.join(get_args(Format))}; then one configuration.",
            )
        else:
            raise ConfigError(
                f"{word!r} is one word too many",
                remedy=f"Formats are {', '.join(get_args(Format))}; then one configuration.",
            )
    return chosen or "config", path or default_config_path()


def _meant(word: str) -> str:
    near = get_close_matches(word, get_args(Format), n=1)
    return f"Did you mean {near[0]!r}? " if near else ""


def _export_systemd(path: Path | None, *, as_json: bool) -> None:
    if path is None:
        raise ConfigError(
            "a unit needs a configuration to apply at boot",
            remedy="Write one first: sliceway export > sliceway.yaml; then: sliceway export systemd sliceway.yaml",
        )
    loaded = load_config(path)
    if not loaded.fleet.layouts:
        raise ConfigError(
            "fleet.layouts is empty, so there is nothing to bring back at boot",
            where=str(path),
            remedy="Write what GPUs are to be cut into under fleet.layouts; what they hold at present: sliceway export",
        )
    script = shutil.which("sliceway")
    command = [script] if script else [sys.executable, "-m", "gateway.cli"]
    unit = export_systemd(command, path.absolute())
    if as_json:
        print_json({"unit": unit})
    else:
        sys.stdout.write(unit)


def _with_discovery(content: dict[str, object], config: Config) -> dict[str, object]:
    """Of simulated GPUs the configuration must say so, or it would mean others."""
    discover = config.fleet.discover
    if isinstance(discover, SimulatedFleet) and isinstance(content["fleet"], dict):
        content["fleet"] = {"discover": discover.model_dump()} | content["fleet"]
    return content


def _rule(rule: LayoutRule) -> dict[str, object]:
    told = rule.model_dump(exclude_defaults=True, mode="json")
    return (
        {"gpus": rule.model_dump(mode="json")["gpus"]} | told | ({"layout": {}} if rule.mig and not rule.layout else {})
    )


def yaml_text(content: object) -> str:
    """`content` as YAML that people read: short lists on one line."""
    yaml, text = YAML(), StringIO()
    yaml.width = _LONG_LINE
    yaml.dump(_styled(content), text)
    return text.getvalue()


def _styled(content: object) -> object:
    """Short lists and mappings of plain values on one line, everything else in blocks."""
    if isinstance(content, Mapping):
        styled: CommentedMap | CommentedSeq = CommentedMap((k, _styled(v)) for k, v in content.items())
        inside: Iterable[object] = content.values()
    elif isinstance(content, (list, tuple)):
        styled, inside = CommentedSeq(map(_styled, content)), content
    else:
        return content
    if not any(isinstance(v, (Mapping, list, tuple)) for v in inside) and len(str(content)) <= _LONG_LINE:
        styled.fa.set_flow_style()
    return styled
