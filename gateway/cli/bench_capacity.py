"""`sliceway bench capacity`: the highest load that a model on a slice bears within its SLO, kept for planning."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gateway.bench import BenchError, ServedModel, check_asked, context, served_models, tenant_for
from gateway.cli.bench_serving import (
    Served,
    asked,
    check_first,
    keys_for,
    require_locust,
    serving,
    slices_of,
    software,
    tasks,
)
from gateway.cli.output import Json, err, out, print_json
from gateway.config import Config, load_config
from model_registry.catalogue import load_catalogue
from model_registry.errors import ConfigError, SlicewayError
from model_registry.sizing.throughput import THROUGHPUT_FILE, Throughput, ThroughputKey, ThroughputStore
from placement.cluster.members import slice_key
from placement.engines import describe_engine, find_engine_python
from placement.goals import engine_kind
from placement.slices import Slice, SliceKind

LIMITS = ("ttft", "tpot", "itl", "e2e")
KEYS_SECONDS = 4 * 3600.0

_OPTIONS = {
    "probe_seconds": "--seconds",
    "requests_per_probe": "--requests",
    "most_probes": "--probes",
    "tolerance_ratio": "--tolerance",
    "processes": "--processes",
    "seed": "--seed",
    "prompt_tokens": "--prompt-tokens",
    "output_tokens": "--output-tokens",
    "attainment": "--attainment",
    "slo": "--slo",
}
"""The options that fields of the scenario are made from."""


def register(app: typer.Typer) -> None:
    """Add `capacity`."""
    app.command()(capacity)


def capacity(
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="The configuration that serves the model.")],
    slo: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DURATION", help="ttft=500ms, tpot=50ms, itl=..., e2e=3s; repeatable, with units."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model; the first that generates if unset.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Who asks; the first that may use the model if unset.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 256,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    attainment: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of requests that has to meet it.")] = 0.99,
    seconds: Annotated[float, typer.Option(min=0.5, help="Each probe takes at least so long.")] = 20.0,
    requests: Annotated[int, typer.Option(min=10, help="And sends at least so many requests.")] = 100,
    probes: Annotated[int, typer.Option(min=2, help="At most so many loads are tried.")] = 12,
    tolerance: Annotated[float, typer.Option(min=1.01, max=2.0, help="How close the two ends have to come.")] = 1.1,
    processes: Annotated[int, typer.Option(min=1, help="Sending processes.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed sends the same prompts.")] = 1,
    gpu_price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="What a whole card (or machine) costs; a slice costs its share.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Only show what was measured before.")] = False,
    as_json: Json = False,
) -> None:
    """The highest load at which a model meets its SLO, in requests and tokens per second, and what a million tokens cost.

    The result is kept in the state directory, where planning finds it. Ends with 1 where no load meets the SLO.
    """
    config = load_config(path)
    store = ThroughputStore(config.state / THROUGHPUT_FILE)
    if show:
        _show(store.all(), store.all(), as_json=as_json)
        return
    require_locust()
    limits = _slo(slo or [])
    load = {
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "slo": limits | {"attainment": attainment},
    }
    made = {
        "kind": "capacity",
        "probe_seconds": seconds,
        "most_probe_seconds": max(seconds, 300.0),
        "requests_per_probe": requests,
        "most_probes": probes,
        "tolerance_ratio": tolerance,
        "processes": processes,
        "seed": seed,
    }
    check_asked(config, model, tenant)
    embeds = model is not None and tasks(config).get(model) == "embed"
    likely = {"name": tenant or "any", "model": model or "any", "task": "embedding" if embeds else "chat"}
    check_first(made | {"load": load | likely}, _OPTIONS)
    with serving(path, config) as served:
        chosen, asking = _chosen(config, served, model, tenant)
        load |= {
            "name": asking,
            "model": chosen.name,
            "task": "embedding" if chosen.task == "embed" else "chat",
        }
        made |= {"load": load}
        slices = slices_of(config)
        versions = software(config)
        with keys_for(served, [asking], lifetime_seconds=KEYS_SECONDS) as keys:
            told = context(base_url=served.base_url, keys=keys, tenants=[asking], slices=slices, rows=served.rows)
            code, found = asked(["capacity", "-", "--json"], {"scenario": made, "context": told, "options": _OPTIONS})
    if found is None:
        raise typer.Exit(code or 1)
    for warning in found["warnings"]:
        err.print(f"note: {warning}", markup=False, highlight=False)
    if found["at_capacity"]:
        record = _record(config, found, slices, versions.get("vllm"), gpu_price_per_hour)
        store.put(record)
        _show(store.of(record.key.source), store.all(), as_json=as_json, measured=found)
    elif as_json:
        print_json({"measured": found, "records": []})
    raise typer.Exit(code)


def _slo(written: Sequence[str]) -> dict[str, Any]:
    """`ttft=500ms` as data; the load tests check the durations."""
    found: dict[str, Any] = {}
    for text in written:
        name, equals, value = text.partition("=")
        if not equals or name not in LIMITS:
            raise ConfigError(
                f"{text!r} is no limit of an SLO",
                where="--slo",
                remedy=f"Write it like ttft=500ms; known: {', '.join(LIMITS)}.",
            )
        if re.fullmatch(r"[0-9.]+", value):
            raise ConfigError(f"{text!r} has no unit", where="--slo", remedy=f"Did you mean {text}s or {text}ms?")
        found[name] = value
    if not found:
        raise ConfigError(
            "capacity is the load that meets an SLO, and there is none",
            where="--slo",
            remedy="Give one or more, as in --slo ttft=500ms --slo tpot=50ms.",
        )
    return found


def _chosen(config: Config, served: Served, model: str | None, tenant: str | None) -> tuple[ServedModel, str]:
    models = served_models(served.rows, tasks(config))
    found = [one for one in models if model in (None, one.name)]
    if not found:
        known = ", ".join(repr(one.name) for one in models) or "none"
        raise ConfigError(f"no model {model!r} is ready", where="--model", remedy=f"Ready: {known}.")
    chosen = next((one for one in found if one.task == "generate"), found[0])
    if len(chosen.slices) > 1:
        err.print(
            f"[dim]note: {chosen.name} has {len(chosen.slices)} replicas; the figures are of all, divided by them[/]"
        )
    return chosen, tenant_for(config, chosen.name, tenant)


def _record(
    config: Config, found: Mapping[str, Any], slices: Sequence[Slice], engine: str | None, price: float | None
) -> Throughput:
    """What planning keeps: per replica, for the slice that the model is on."""
    replicas = max(1, len(found["slices"]))
    on = measured_on(slices, found["slices"])
    at = found["at_capacity"]
    model = next((m for m in config.models if m.name == found["model"]), None)
    return Throughput(
        key=ThroughputKey(
            source=str(model.source) if model and model.source else found["model"],
            kind=on.kind.value if on else "endpoint",
            profile=on.profile if on else None,
            product=on.gpu.product if on and on.gpu else None,
            cores=len(on.cores) if on and on.kind is SliceKind.CPU else None,
            prompt_tokens=round(found["prompt_tokens"]),
            output_tokens=round(found["output_tokens"]),
            slo=found["slo"],
            engine_version=_engine_version(config, on, engine),
        ),
        model=found["model"],
        requests_per_second=found["requests_per_second"] / replicas,
        fails_at=found["fails_at_requests_per_second"] and found["fails_at_requests_per_second"] / replicas,
        output_tokens_per_second=at["output_tokens_per_second"] / replicas,
        prompt_tokens_per_second=at["prompt_tokens_per_second"] / replicas,
        attainment=at["attainment"],
        ttft_p99_seconds=at["ttft_p99_seconds"],
        itl_p99_seconds=at["itl_p99_seconds"],
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        price_per_hour=price * share_of_card(on, slices) if price is not None and on else price,
        simulated=bool(on and on.simulated),
        notes=tuple(found["warnings"]),
    )


def measured_on(slices: Sequence[Slice], told: Collection[str]) -> Slice | None:
    """The slice of this machine that has one of these names, which are `NODE/SLICE` on a cluster."""
    here = socket.gethostname()
    return next((one for one in slices if not {one.id, slice_key(here, one.id)}.isdisjoint(told)), None)


def _engine_version(config: Config, on: Slice | None, found: str | None) -> str | None:
    """Of the vLLM on that slice: a machine may have one for its cores and one for its GPUs. None for another engine."""
    if config.engine.command:
        return None
    if on is None:
        return found
    try:
        environment = describe_engine(find_engine_python(engine_kind(on), config.engine.python))
    except SlicewayError:
        return found
    return f"{environment.vllm} ({environment.kind})" if environment.vllm else found


def share_of_card(one: Slice, slices: Sequence[Slice]) -> float:
    """The part of a card, or of the machine, that a slice is: by memory slices under MIG, by sharers, by cores."""
    if one.kind is SliceKind.CPU:
        return len(one.cores) / max(1, len({core for other in slices for core in other.cores}))
    if one.kind is SliceKind.MIG and one.gpu is not None and one.profile is not None:
        try:
            product = load_catalogue().product(one.gpu.product)
            profile = product.profile(one.profile)
        except SlicewayError:
            return one.memory_bytes / one.gpu.memory_bytes
        if product.memory_slices and profile.memory_slices:
            return profile.memory_slices / product.memory_slices
        return one.memory_bytes / one.gpu.memory_bytes
    return 1 / one.sharers


def whole_card(one: Throughput, records: Sequence[Throughput]) -> Throughput | None:
    """What the same model got on a whole card of the same product, asked the same; the newest. None where nobody measured that."""

    def asked(record: Throughput) -> tuple[object, ...]:
        key = record.key
        return key.source, key.product, key.prompt_tokens, key.output_tokens, dict(key.slo), record.simulated

    found = [r for r in records if r.key.kind == SliceKind.GPU and r.key.product and asked(r) == asked(one)]
    return max(found, key=lambda r: r.measured_at, default=None)


def _show(
    shown: Sequence[Throughput],
    records: Sequence[Throughput],
    *,
    as_json: bool,
    measured: Mapping[str, Any] | None = None,
) -> None:
    """The records `shown`, each beside what the same model got on a whole card, from all `records`."""
    rows = [public(one, whole_card(one, records)) for one in shown]
    if as_json:
        print_json({"measured": measured, "records": rows})
        return
    if not rows:
        raise BenchError("nothing was measured yet", remedy="sliceway bench capacity CONFIG --slo ttft=500ms")
    table = Table(title="capacity per replica", title_justify="left", caption_justify="left", box=None)
    for heading in (
        "model",
        "slice",
        "tokens in/out",
        "SLO",
        "requests/s",
        "tokens/s out",
        "of a whole card's",
        "per hour",
        "per million tokens",
    ):
        table.add_column(heading)
    pairs = zip(shown, rows, strict=True)
    for one, row in sorted(pairs, key=lambda pair: (pair[0].model, -pair[0].output_tokens_per_second)):
        table.add_row(
            one.model + (" (simulated)" if one.simulated else ""),
            row["slice"],
            f"{one.key.prompt_tokens}/{one.key.output_tokens}",
            ", ".join(
                f"{k.removesuffix('_seconds')} {v:g}{' s' if k.endswith('_seconds') else ''}"
                for k, v in one.key.slo.items()
            ),
            f"{one.requests_per_second:.3g}" + (f" (not {one.fails_at:.3g})" if one.fails_at else ""),
            f"{one.output_tokens_per_second:.1f}",
            _of_whole(row),
            "-" if one.price_per_hour is None else f"{one.price_per_hour:.3g}",
            "-" if one.price_per_million_tokens is None else f"{one.price_per_million_tokens:.3g}",
        )
    out.print(table)


def _of_whole(row: Mapping[str, Any]) -> str:
    whole = row["whole_card"]
    if whole is None:
        return "-"
    return f"{row['share_of_whole_card']:.0%} of {whole['output_tokens_per_second']:.1f}"


def public(one: Throughput, whole: Throughput | None) -> dict[str, Any]:
    """One record as `--json` shows it, beside what the same model got on a whole card."""
    key = one.key
    cores = f"cpu, {key.cores} cores" if key.cores else key.kind
    return {
        "model": one.model,
        "source": key.source,
        "slice": " ".join(filter(None, [key.product, key.profile])) or cores,
        "kind": key.kind,
        "product": key.product,
        "profile": key.profile,
        "cores": key.cores,
        "prompt_tokens": key.prompt_tokens,
        "output_tokens": key.output_tokens,
        "slo": dict(key.slo),
        "engine_version": key.engine_version,
        "requests_per_second": one.requests_per_second,
        "fails_at_requests_per_second": one.fails_at,
        "output_tokens_per_second": one.output_tokens_per_second,
        "prompt_tokens_per_second": one.prompt_tokens_per_second,
        "attainment": one.attainment,
        "ttft_p99_seconds": one.ttft_p99_seconds,
        "itl_p99_seconds": one.itl_p99_seconds,
        "share_of_whole_card": one.output_tokens_per_second / whole.output_tokens_per_second
        if whole and whole.output_tokens_per_second
        else None,
        "whole_card": {
            "requests_per_second": whole.requests_per_second,
            "output_tokens_per_second": whole.output_tokens_per_second,
            "price_per_million_tokens": whole.price_per_million_tokens,
        }
        if whole
        else None,
        "price_per_hour": one.price_per_hour,
        "price_per_million_tokens": one.price_per_million_tokens,
        "measured_at": one.measured_at,
        "simulated": one.simulated,
    }
