"""`sliceway bench overhead`: what the gateway adds to a request, in pairs with the engine asked directly."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.markup import escape
from rich.table import Table

from gateway.bench import BenchError
from gateway.cli.bench_serving import Served, fake_serving, keys_for, serving
from gateway.cli.output import Json, err, out, print_json
from gateway.config import load_config
from gateway.overhead import Part, Target, arrivals, run_pairs, summarize
from placement.engine_tls import EngineTrust
from placement.errors import TableUnreadable
from placement.state import StatePaths
from placement.table import ReplicaState
from placement.table import read as read_table

PATH = "/v1/chat/completions"
MOST_LAG_SECONDS = 0.005
WARM_UP_PAIRS = 20
SIMULATED = {"ttft": 0.02, "itl": 0.01, "max_concurrency": 4096}


@dataclass(frozen=True, slots=True)
class Setup:
    """One gateway and one engine behind it."""

    served: Served
    model: str
    engine_model: str
    endpoint: str
    engine_key: str | None
    tenant: str
    key: str | None


def register(app: typer.Typer) -> None:
    """Add `overhead`."""
    app.command()(overhead)


def overhead(
    config_path: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="The system to measure; a simulated engine if not given.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model to ask; the first with a ready engine if unset.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose requests they are; the first tenant if unset.")] = None,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests per second, both ways together.")] = 50.0,
    pairs: Annotated[int, typer.Option(min=10, help="Pairs of each kind of request.")] = 1000,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 16,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words of each prompt.")] = 64,
    seed: Annotated[int, typer.Option(help="The same seed sends at the same moments.")] = 1,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Every figure of docs/performance.md: latencies at 500 requests/s and 10,000 events/s, 2,000 streams held, "
            "CPU beside other gateways, isolation. Up to 25 minutes; needs a C compiler.",
        ),
    ] = False,
    only: Annotated[
        list[Part] | None,
        typer.Option(help="With --full: this part of it alone; may be given several times.", show_default=False),
    ] = None,
    peers: Annotated[
        Path | None,
        typer.Option(
            help="With --full: an environment with vllm-router, sglang-router and litellm in it (python -m venv DIR; "
            'DIR/bin/pip install vllm-router sglang-router "litellm\\[proxy]"); nginx is taken from the path. Who is not there is left out.'
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="With --full: rounds of every comparison; fewer than 6 give no intervals.")
    ] = 6,
    markdown_path: Annotated[
        Path | None, typer.Option("--markdown", help="With --full: write the tables there as well.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What the gateway adds: TTFT, ITL and whole answers through it and past it, in pairs, with 95% intervals.

    Requests arrive at random moments (open loop); the two of a pair follow one another in random order. Exit status 1
    if an answer was wrong. With --full, everything else that it costs, too.
    """
    if full:
        report = _everything(config_path, peers, rounds, only or list(Part))
        _told_everything(report, markdown_path, as_json=as_json)
        return
    for option, given in (("--only", only), ("--peers", peers), ("--markdown", markdown_path)):
        if given:
            raise BenchError(f"{option} belongs to --full", remedy=f"Add --full, or leave {option} out.")
    generator = random.Random(seed)
    with _set_up(config_path, model, tenant) as setup:
        kinds: dict[str, Any] = {}
        errors: Counter[str] = Counter()
        lags: list[float] = []
        for stream in (False, True):
            direct, through = _targets(setup, stream=stream, tokens=output_tokens, words=prompt_words)
            for count in (WARM_UP_PAIRS, pairs):
                plan = arrivals(count, rate, generator)
                run = uvloop.run(run_pairs(direct, through, plan, stream=stream))
            errors += run.errors
            lags += run.lag_seconds
            if not run.pairs:
                raise BenchError(f"no pair was answered: {dict(errors)}", remedy="See what the gateway's log says.")
            kinds["stream" if stream else "plain"] = summarize(run.pairs, stream=stream, generator=generator)
        report = _report(setup, kinds, errors, lags) | {"rate_per_second": rate, "output_tokens": output_tokens}
    print_json(report) if as_json else _show(report)
    if errors:
        raise typer.Exit(1)


def _everything(config_path: Path | None, peers: Path | None, rounds: int, only: Sequence[Part]) -> dict[str, Any]:
    from gateway.overhead.everything import Effort, measure_everything

    if config_path is not None:
        raise BenchError(
            "--full measures the gateway before an engine of its own, not a configuration", remedy="Leave CONFIG out."
        )
    if peers is not None and Part.CPU not in only:
        raise BenchError(
            "--peers are compared by their CPU, which --only leaves out", remedy="Add --only cpu, or leave --peers out."
        )
    if peers is not None and not (peers / "bin").is_dir():
        raise BenchError(
            "there is no environment",
            where=str(peers),
            remedy=f"python -m venv {peers}; see --help for what goes into it.",
        )
    return measure_everything(peers, Effort(cost_rounds=rounds, neighbour_rounds=rounds), _tell, only)


def _told_everything(report: dict[str, Any], markdown_path: Path | None, *, as_json: bool) -> None:
    from gateway.overhead.words import markdown

    if markdown_path is not None:
        markdown_path.write_text(markdown(report), encoding="utf-8")
    print_json(report) if as_json else out.print(markdown(report), markup=False, highlight=False)


def _tell(line: str) -> None:
    err.print(f"[dim]{escape(line)}[/]")


def _report(setup: Setup, kinds: dict[str, Any], errors: Counter[str], lags: list[float]) -> dict[str, Any]:
    lags.sort()
    late = lags[int(len(lags) * 0.99)]
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    problems = []
    if late > MOST_LAG_SECONDS:
        problems.append(
            f"one in a hundred requests was sent {late * 1000:.1f} ms late or more: the client did not keep up"
        )
    if load > cores:
        problems.append(f"the load average is {load:.1f} on {cores} cores: others use this machine")
    gateway = setup.served.config.gateway
    features = ["metering", "digests", "metrics", "admission", f"relay: {gateway.relay}"]
    features += ["api keys"] if gateway.authentication == "keys" else []
    limited = next((t.limits for t in setup.served.config.tenants if t.name == setup.tenant), None)
    features += ["rate limits"] if limited is not None else []
    return {
        "model": setup.model,
        "simulated": setup.served.simulated,
        "features": features,
        **kinds,
        "errors": dict(errors),
        "client_lag_p99_ms": round(late * 1000, 3),
        "host": {"cores": cores, "load_average": round(load, 2)},
        "trusted": not problems,
        "problems": problems,
    }


@contextmanager
def _set_up(config_path: Path | None, model: str | None, tenant: str | None) -> Iterator[Setup]:
    if config_path is None:
        with fake_serving(["m"], ["bench"], SIMULATED) as served:
            yield from _with_key(served, model, tenant)
        return
    with serving(config_path, load_config(config_path)) as served:
        yield from _with_key(served, model, tenant)


def _with_key(served: Served, model: str | None, tenant: str | None) -> Iterator[Setup]:
    name, engine_model, endpoint, secret = _engine(served, model)
    who = tenant or next((t.name for t in served.config.tenants if t.may_use(name)), "anonymous")
    with keys_for(served, [who], lifetime_seconds=600.0) as keys:
        yield Setup(served, name, engine_model, endpoint, secret, who, keys[who])


def _engine(served: Served, model: str | None) -> tuple[str, str, str, str | None]:
    """A ready engine: the model's name for clients and for the engine, its endpoint, and the key it asks for. Raises BenchError."""
    try:
        rows = read_table(StatePaths(served.config.state).routing_table).replicas
    except TableUnreadable:
        rows = ()
    for row in rows:
        if row.state is ReplicaState.READY and model in (None, row.model):
            return row.model, row.engine_model, row.endpoint, row.secret
    for known in served.config.models:
        if known.endpoints and model in (None, known.name):
            return known.name, known.name, known.endpoints[0], None
    raise BenchError(
        f"there is no ready engine{f' of {model!r}' if model else ''} that could be asked directly",
        remedy="`sliceway status` shows which models have one.",
    )


def _targets(setup: Setup, *, stream: bool, tokens: int, words: int) -> tuple[Target, Target]:
    def body(name: str) -> bytes:
        options = {"stream_options": {"include_usage": True}} if stream else {}
        messages = [{"role": "user", "content": "word " * words}]
        fields = {"model": name, "messages": messages, "max_tokens": tokens, "stream": stream, "ignore_eos": True}
        return json.dumps(fields | options).encode()

    engine_key = {"authorization": f"Bearer {setup.engine_key}"} if setup.engine_key else {}
    key = {"authorization": f"Bearer {setup.key}"} if setup.key else {}
    encrypted = setup.endpoint.startswith("https:")
    tls = EngineTrust(setup.served.config.engine.tls).context() if encrypted else None
    return (
        Target(setup.endpoint, PATH, body(setup.engine_model), engine_key, tls),
        Target(setup.served.base_url, PATH, body(setup.model), key | {"x-sliceway-overhead": "1"}),
    )


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"What the gateway adds, model {report['model']}, {report['rate_per_second']:g} requests/s")
    for column in (
        "",
        "direct p50 / p99 ms",
        "gateway p50 / p99 ms",
        "added p50 [95%]",
        "added p99 [95%]",
        "paired median [95%]",
    ):
        table.add_column(column)
    for kind, name in (("plain", "e2e"), ("stream", "ttft"), ("stream", "itl")):
        if (row := report[kind].get(name)) is not None:
            both = [f"{row[way]['p50']:.3f} / {row[way]['p99']:.3f}" for way in ("direct_ms", "gateway_ms")]
            added = [
                "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row[figure]).replace("[", "\\[")
                for figure in ("added_p50_ms", "added_p99_ms", "paired_median_ms")
            ]
            table.add_row(f"{kind} {name.upper()}", *both, *added)
    out.print(table)
    out.print(f"{report['plain']['pairs']} pairs of each; features on: {', '.join(report['features'])}")
    for kind in ("plain", "stream"):
        if own := report[kind]["gateway_says_ms"]:
            out.print(f"the gateway itself says ({kind}): p50 {own['p50']:.3f} ms, p99 {own['p99']:.3f} ms")
    for problem in report["problems"]:
        err.print(f"[yellow]not to be trusted[/]: {problem}")
    for what, count in report["errors"].items():
        err.print(f"[red]{count} x[/] {what}")
