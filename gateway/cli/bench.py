"""`sliceway bench`: the load tests, on a configuration's own tenants and models."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gateway.bench import FLOOD_USERS, BenchError, Cast, choose_cast, plan, served_models
from gateway.cli.output import Json, err
from gateway.config import Config, load_config
from gateway.keys import Keystore
from placement.errors import TableUnreadable
from placement.state import StatePaths
from placement.table import read as read_table

bench = typer.Typer(help="Measure what slices do for tenants.", no_args_is_help=True)

START_SECONDS = 1800.0
STOP_SECONDS = 120.0
KEY_SPARE_SECONDS = 3600.0

Rows = list[dict[str, Any]]


def register(app: typer.Typer) -> None:
    """Add `sliceway bench ...`."""
    app.add_typer(bench, name="bench")


@bench.callback()
def _group() -> None:
    """Measure what slices do for tenants."""


@bench.command()
def isolation(
    config_path: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="The configuration whose tenants and models are used.")
    ],
    victim: Annotated[
        str | None, typer.Option(metavar="TENANT[=MODEL]", help="Who is measured; the first tenant if unset.")
    ] = None,
    neighbour: Annotated[
        str | None, typer.Option(metavar="TENANT[=MODEL]", help="Who floods; the second tenant if unset.")
    ] = None,
    duration: Annotated[
        float, typer.Option(min=0.1, help="Seconds that each setting is measured, in each round.")
    ] = 30.0,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds of load before that, not counted.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often all settings are run, in mirrored order.")] = 3,
    users: Annotated[
        int, typer.Option(min=1, help="How many users the neighbour floods with; each waits for its answer.")
    ] = FLOOD_USERS,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words of each prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    seed: Annotated[int, typer.Option(help="The same seed sends the same prompts.")] = 1,
    samples: Annotated[
        Path | None, typer.Option(help="Write every request to this file, a JSON object a line.")
    ] = None,
    as_json: Json = False,
) -> None:
    """p50/p99 of one tenant: alone, while another floods another slice, and while it floods the same slice.

    Uses the gateway that serves CONFIG, and starts one for the measurement where none does.
    """
    _require_locust()
    config = load_config(config_path)
    with _serving(config_path, config) as (url, rows):
        cast = choose_cast(config, served_models(rows, _tasks(config)), victim=victim, neighbour=neighbour)
        for note in cast.notes:
            err.print(f"[dim]note: {note}[/]")
        with _keys(config, cast, lifetime_seconds=rounds * 3 * (duration + warmup) + KEY_SPARE_SECONDS) as keys:
            made = plan(
                cast,
                base_url=url,
                keys=keys,
                duration_seconds=duration,
                warmup_seconds=warmup,
                rounds=rounds,
                users=users,
                prompt_words=prompt_words,
                output_tokens=output_tokens,
                seed=seed,
            )
            code = _run_loadtests(made, samples, as_json=as_json)
    raise typer.Exit(code)


def _require_locust() -> None:
    if importlib.util.find_spec("locust") is None:
        raise BenchError("the load tests need Locust, which is not installed", remedy="pip install 'sliceway[load]'")


def _run_loadtests(made: dict[str, Any], samples: Path | None, *, as_json: bool) -> int:
    """Run the plan in a process of its own (Locust patches whatever process it is in); keys go through its standard input."""
    command = [sys.executable, "-m", "loadtests", "isolation", "-"]
    command += ["--json"] if as_json else []
    command += ["--samples", str(samples)] if samples else []
    child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    try:
        child.communicate(json.dumps(made))
    except KeyboardInterrupt:
        child.wait()
        raise
    return child.returncode


@contextmanager
def _keys(config: Config, cast: Cast, *, lifetime_seconds: float) -> Iterator[dict[str, str | None]]:
    """Keys for the tenants that take part, worthless again when the block ends."""
    tenants = {party.tenant for party in (cast.victim, cast.neighbour, cast.contrast) if party}
    if config.gateway.authentication == "none":
        yield dict.fromkeys(tenants)
        return
    store = Keystore(config.state)
    made = {
        tenant: store.create(tenant, now=_wall_seconds(), name="bench", lifetime_seconds=lifetime_seconds)
        for tenant in sorted(tenants)
    }
    try:
        yield {tenant: key for tenant, (key, _) in made.items()}
    finally:
        for _, record in made.values():
            store.revoke(record.id, now=_wall_seconds())


@contextmanager
def _serving(path: Path, config: Config) -> Iterator[tuple[str, Rows]]:
    """The address of a gateway that serves `config` and its `/slices`: the one that runs, else one that lives as long as the block."""
    url = base_url(config.gateway.listen)
    if rows := _slices(url):
        yield url, rows
        return
    err.print(f"[dim]nobody serves at {url}; starting `sliceway up {path}` for the measurement[/]")
    # Its words go to standard error: standard output is the result's.
    up = subprocess.Popen([sys.executable, "-m", "gateway.cli", "up", str(path)], stdout=sys.stderr)
    try:
        yield (
            url,
            _wait_until_ready(
                up, url, {model.name for model in config.models if model.least_replicas or model.endpoints}
            ),
        )
    finally:
        if up.poll() is None:
            up.send_signal(signal.SIGINT)
            up.wait(STOP_SECONDS)


def _wait_until_ready(
    up: subprocess.Popen[bytes], url: str, models: set[str], clock: Callable[[], float] = time.monotonic
) -> Rows:
    """The rows of `/slices` once every model has a ready replica. Raises BenchError if that does not come."""
    deadline = clock() + START_SECONDS
    while True:
        rows = _slices(url)
        if models <= {row["model"] for row in rows if row["state"] == "ready"}:
            return rows
        if up.poll() is not None:
            raise BenchError(
                f"`sliceway up` ended with exit code {up.returncode} before the models were ready",
                remedy="It says why above.",
            )
        if clock() > deadline:
            raise BenchError(
                "the models did not become ready",
                remedy="`sliceway status` shows why; logs lie in the state directory.",
            )
        time.sleep(0.5)


def base_url(listen: str) -> str:
    """Where to reach a gateway that listens there; one on every address is reached on the loopback."""
    host, _, port = listen.rpartition(":")
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '[::]') else host}:{port}"


def _slices(url: str) -> Rows:
    """The rows of `/slices`; [] while nobody answers."""
    try:
        with urllib.request.urlopen(f"{url}/slices", timeout=10) as answer:
            rows: Rows = json.load(answer)
    except (OSError, ValueError):
        return []
    return rows


def _tasks(config: Config) -> dict[str, Literal["generate", "embed"]]:
    """What each model is for: as the configuration says, else as the controller found out."""
    found: dict[str, Literal["generate", "embed"]] = {}
    try:
        rows: Sequence[Any] = read_table(StatePaths(config.state).routing_table).models
    except TableUnreadable:
        rows = ()
    for name, task in [(row.name, row.task) for row in rows] + [(model.name, model.task) for model in config.models]:
        if task in ("generate", "embed"):
            found[name] = task
    return found


def _wall_seconds() -> float:
    """Seconds since 1970, which keys are dated with."""
    return datetime.now(UTC).timestamp()
