"""`sliceway status`: slices, replicas and latencies of a running system, once or live."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gateway.cli.locate import ConfigArgument, ConfigOption, required_config
from gateway.cli.output import Json, out, print_json
from gateway.config import Config
from gateway.generations import Announcements
from model_registry.words import counted
from placement.cluster.here import LocalNode, node_at_work
from placement.state import StatePaths
from placement.status import ControllerStatus, read_cluster_scaling, read_status

WATCH_SECONDS = 1.0
HTTP_SECONDS = 2.0
_PIPE_COLUMNS = 240  # nothing is cut off where nobody looks
_COLOURS = {"ready": "green", "idle": "dim", "failed": "bold red", "backoff": "red", "stopped": "dim"}
_METRICS = (("TTFT", "ttft_seconds"), ("ITL", "itl_seconds"), ("E2E", "e2e_seconds"), ("queue", "queue_seconds"))


def register(app: typer.Typer) -> None:
    """Add `sliceway status`."""
    app.command()(status)


def status(
    config: ConfigArgument = None,
    config_option: ConfigOption = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay, and show it anew every second.")] = False,
    window: Annotated[str, typer.Option(help="Of the quantiles: 1m, 5m or 1h.")] = "5m",
    tenants: Annotated[bool, typer.Option("--tenants", help="A line for each tenant on each slice as well.")] = False,
    as_json: Json = False,
) -> None:
    """Show slices, replicas, and p50/p99. Exits 1 if the gateway is not running."""
    if window not in ("1m", "5m", "1h"):
        raise typer.BadParameter(f"{window!r} is no window; there are 1m, 5m and 1h", param_hint="--window")
    settings = required_config(config_option, config)
    if watch and not as_json:
        _watch(settings, window, tenants)
        return
    seen = look(settings)
    if as_json:
        print_json(seen)
    else:
        console = out if out.is_terminal else Console(width=_PIPE_COLUMNS)
        console.print(render(seen, window, tenants))
    raise typer.Exit(0 if seen["gateway"]["running"] else 1)


def look(config: Config) -> dict[str, Any]:
    """What gateway and controller say at this moment: `{"gateway": ..., "controller": ..., "node": ..., "slices": [...]}`.

    `node` is the name of the cluster's node that this machine is, whose gateway and controller those are, else None.

    `slices` is the gateway's `/slices` with the controller's `reason`, `stage` and `restarts` added; where the gateway does not
    run, it is made from the controller's replicas, without latencies.
    """
    node = node_at_work(config.state)
    paths = StatePaths(config.state)
    base, readiness, why = _gateway_of(config, node.paths.gateway if node else paths)
    slices, _ = _fetch(f"{base}/slices")
    controller = read_status((node.paths.engines if node else paths).controller_status)
    alive = controller is not None and _process_lives(controller.pid)
    gateway: dict[str, Any] = {"running": readiness is not None, "url": base}
    gateway |= readiness if isinstance(readiness, dict) else {"problem": why}
    told = {
        "running": alive,
        "state": controller.state if controller and alive else None,
        "pid": controller.pid if controller and alive else None,
        "generation": controller.generation if controller else None,
        "unplaced": _unplaced(controller) | (_without_slice(readiness) if node else {}),
        "refused": controller.refused.model_dump(mode="json") if controller and controller.refused else None,
        "scaling": {n: r.model_dump() | {"short": r.short} for n, r in controller.scaling.items()}
        if controller
        else {},
        "repartition": _repartition_of(controller if alive else None, node),
    }
    rows = slices if isinstance(slices, list) else _rows_without_gateway(controller)
    return {
        "gateway": gateway,
        "controller": told,
        "node": node.name if node else None,
        "slices": [_with_reason(row, controller, readiness) for row in rows],
    }


def _repartition_of(controller: ControllerStatus | None, node: LocalNode | None) -> dict[str, Any] | None:
    """Cutting GPUs anew for demand: by this machine's controller, or on a cluster by its head, as it has told this node last."""
    told = read_cluster_scaling(node.paths.gateway.cluster_scaling) if node else controller
    return told.repartition.model_dump(mode="json") if told is not None else None


def _unplaced(controller: ControllerStatus | None) -> dict[str, Any]:
    return {name: error.model_dump() for name, error in controller.unplaced.items()} if controller else {}


def _without_slice(readiness: Any) -> dict[str, Any]:
    """Replicas of a cluster that have no slice on any node, as a gateway is told by the head."""
    models = readiness.get("models", {}) if isinstance(readiness, dict) else {}
    return {r: {"message": why} for model in models.values() for r, why in (model.get("unplaced") or {}).items()}


def _gateway_of(config: Config, paths: StatePaths) -> tuple[str, Any, str]:
    """The address of a gateway of this state directory that answers, what it says, and why none does.

    Gateways tell where they listen, which need not be where the configuration says (`--listen`).
    """
    told = [one.listen for one in Announcements(paths.gateways).read() if one.listen]
    asked = [base_url(listen, config.gateway.scheme) for listen in dict.fromkeys((*told, config.gateway.listen))]
    problem = ""
    for base in asked:
        readiness, problem = _fetch(f"{base}/readyz")
        if readiness is not None:
            return base, readiness, ""
    return asked[-1], None, problem


def base_url(listen: str, scheme: str = "http") -> str:
    """Where a client on this machine reaches a gateway that listens on `listen`."""
    host, _, port = listen.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    return f"{scheme}://{host}:{port}"


def _fetch(url: str) -> tuple[Any, str]:
    """The JSON at `url`, and why there is none."""
    try:
        # Its certificate is for the name that clients use, not for this machine's loopback; nothing secret is sent or believed.
        unchecked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
        with urllib.request.urlopen(url, timeout=HTTP_SECONDS, context=unchecked) as answer:
            return json.load(answer), ""
    except urllib.error.HTTPError as error:  # /readyz says 503 with a body
        with error:
            try:
                return json.load(error), ""
            except ValueError:
                return None, f"{url} answers {error.code}, and not as a sliceway gateway does"
    except (OSError, ValueError) as error:
        return None, f"{url} does not answer: {getattr(error, 'reason', error)}"


def _process_lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def _rows_without_gateway(controller: ControllerStatus | None) -> list[dict[str, Any]]:
    return [
        {
            "slice": r.slice.model_dump(),
            "model": r.model,
            "replica": r.replica,
            "state": r.state.value,
            "windows": {},
            "tenants": {},
        }
        for r in (controller.replicas if controller else ())
    ]


def _with_reason(row: dict[str, Any], controller: ControllerStatus | None, readiness: Any) -> dict[str, Any]:
    known = next((r for r in (controller.replicas if controller else ()) if r.replica == row["replica"]), None)
    if known is not None:
        return row | {"reason": known.reason, "stage": known.stage, "restarts": known.restarts}
    model = (readiness or {}).get("models", {}).get(row["model"], {})
    reasons = {r["replica"]: r["reason"] for r in model.get("replicas", ())}
    return row | {"reason": reasons.get(row["replica"]), "stage": None, "restarts": None}


# ---- for people


def _watch(config: Config, window: str, tenants: bool) -> None:
    with Live(console=out, auto_refresh=False, screen=False) as live:
        while True:
            live.update(render(look(config), window, tenants), refresh=True)
            time.sleep(WATCH_SECONDS)


def render(seen: dict[str, Any], window: str, tenants: bool) -> RenderableType:
    """The tables for a terminal."""
    return Group(_heads(seen), Text(), _slices(seen, window, tenants))


def _heads(seen: dict[str, Any]) -> RenderableType:
    gateway, controller = seen["gateway"], seen["controller"]
    node = seen.get("node")
    lines = [f"node       {escape(node)} of a cluster; `sliceway node list` shows all of them"] if node else []
    if not gateway["running"]:
        lines.append(f"[bold red]gateway[/]    is not running: {escape(gateway['problem'])}")
    elif gateway.get("draining"):
        lines.append(f"[yellow]gateway[/]    {gateway['url']} is stopping")
    else:
        ready = (
            "[green]ready[/]"
            if gateway["ready"]
            else "[yellow]not ready: no model has a replica that takes requests[/]"
        )
        lines.append(f"gateway    {gateway['url']} {ready}, routing table generation {gateway['generation']}")
        lines += [f"[yellow]           {escape(problem)}[/]" for problem in gateway.get("problems", ())]
    if controller["running"]:
        lines.append(
            f"controller {controller['state']}, pid {controller['pid']}, generation {controller['generation']}"
        )
    else:
        starts = "the node's agent" if node else "`sliceway up CONFIG`"
        lines.append(f"controller is not running; what serves goes on, nothing is restarted ({starts} starts it)")
    lines += [
        f"[red]unplaced[/]   {escape(name)}: {escape(error['message'])}"
        for name, error in controller["unplaced"].items()
    ]
    lines += [_scaled(name, row) for name, row in controller.get("scaling", {}).items()]
    lines += _repartition(controller.get("repartition"))
    if controller["refused"]:
        lines.append(f"[red]refused[/]    a new configuration: {escape(controller['refused']['error']['message'])}")
    return Text.from_markup("\n".join(lines))


def _scaled(model: str, row: dict[str, Any]) -> str:
    """What demand asks for of one model, within its bounds, and what of it no free slice could be found for."""
    bounds = f"{counted(row['replicas'], 'replica')} of {row['least']} to {row['most']}"
    short = (
        f"; [yellow]{row['short']} {'finds' if row['short'] == 1 else 'find'} no free slice[/]" if row["short"] else ""
    )
    asleep = f"; {escape(row['sleep'])}" if row.get("sleep") and not row["replicas"] else ""
    return f"demand     {escape(model)}: {bounds}: {escape(row['reason'])}{asleep}{short}"


def _repartition(told: dict[str, Any] | None) -> list[str]:
    """Cutting GPUs anew for demand: what is done at the moment, else how it ended last."""
    if told is None or not (told["running"] or told["events"] or told.get("proposed")):
        return []
    if told["running"]:
        return [f"[yellow]cutting[/]    GPUs anew for demand: {escape(told['step'] or 'weighing it')}"]
    if told.get("proposed"):
        return [f"cutting    GPUs anew for demand is proposed: {escape(told['proposed'])}"]
    last = told["events"][-1]
    again = f"; tried again in {told['next_in_seconds']:.0f} s at the earliest" if told["next_in_seconds"] else ""
    return [f"cutting    GPUs anew for demand: {last['result']}: {escape(last['reason'])}{again}"]


def _slices(seen: dict[str, Any], window: str, tenants: bool) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("slice", "kind", "model", "replica", "state"):
        table.add_column(name, overflow="fold")
    for title, _ in _METRICS:
        table.add_column(f"{title} p50/p99", justify="right")
    table.add_column(f"requests ({window})", justify="right")
    for row in seen["slices"]:
        colour = _COLOURS.get(row["state"], "yellow")
        told = f"[{colour}]{row['state']}[/]" + (f" ({escape(str(row['stage']))})" if row.get("stage") else "")
        table.add_row(
            *(
                escape(str(value or "-"))
                for value in (row["slice"]["id"], row["slice"]["kind"], row["model"], row["replica"])
            ),
            told,
            *_cells(row["windows"].get(window)),
        )
        if row.get("reason"):
            table.add_row("", "", "", "", f"[dim]{escape(row['reason'].splitlines()[0][:160])}[/]")
        for name, tenant in row["tenants"].items() if tenants else ():
            table.add_row("", "", "", f"[dim]tenant {escape(name)}[/]", "", *_cells(tenant["windows"].get(window)))
    return table if seen["slices"] else Text("no slices are known yet")


def _cells(windows: dict[str, Any] | None) -> list[str]:
    if windows is None:
        return ["-"] * (len(_METRICS) + 1)
    shown = [f"{duration(windows[key]['p50'])}/{duration(windows[key]['p99'])}" for _, key in _METRICS]
    return [*shown, str(windows["queue_seconds"]["count"])]


def duration(seconds: float | None) -> str:
    """Three figures in the unit that suits: `850 us` as `0.85ms`, `12ms`, `3.4s`; `-` for nothing."""
    if seconds is None:
        return "-"
    if seconds < 0.9995:  # what would round to 1000ms
        return f"{seconds * 1000:.3g}ms"
    return f"{seconds:.3g}s"
