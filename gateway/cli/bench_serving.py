"""What every load test needs around it: a gateway that serves, keys that are worth nothing afterwards, and the process itself.

The load tests run in processes of their own, because Locust patches whatever process it is in; keys go through their
standard input.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import typer

from gateway.bench import BenchError
from gateway.cli.output import err
from gateway.config import Config, load_config
from gateway.keys import Keystore
from model_registry.errors import SlicewayError
from placement.engines import describe_engine, find_engine_python
from placement.errors import TableUnreadable
from placement.inventory import observe
from placement.simulate import enter
from placement.slices import Slice
from placement.state import StatePaths
from placement.table import read as read_table

START_SECONDS = 1800.0
STOP_SECONDS = 120.0
KEY_SPARE_SECONDS = 3600.0

Rows = list[dict[str, Any]]


def require_locust() -> None:
    """Raises BenchError where the load tests cannot run."""
    if importlib.util.find_spec("locust") is None:
        raise BenchError(
            "the load tests need Locust, which is not installed", remedy="In the checkout: pip install '.[load]'"
        )


def loadtests(arguments: Sequence[str], given: Mapping[str, Any] | None = None) -> int:
    """`python -m loadtests ARGUMENTS` with `given` as JSON on its standard input; its exit code."""
    command = [sys.executable, "-m", "loadtests", *arguments]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, encoding="utf-8")
    try:
        child.communicate(json.dumps(given or {}))
    except KeyboardInterrupt:
        # Ctrl-C reaches every process of the terminal.
        child.wait()
        raise
    except SystemExit:
        child.terminate()
        child.wait()
        raise
    return child.returncode


def asked(arguments: Sequence[str], given: Mapping[str, Any] | None = None) -> tuple[int, Any]:
    """The same for a command whose standard output is JSON: its exit code and that; None where it printed none."""
    command = [sys.executable, "-m", "loadtests", *arguments]
    done = subprocess.run(command, input=json.dumps(given or {}), stdout=subprocess.PIPE, encoding="utf-8", check=False)
    try:
        return done.returncode, json.loads(done.stdout)
    except ValueError:
        return done.returncode, None


def check_first(scenario: Mapping[str, Any], options: Mapping[str, str]) -> None:
    """Ends the command where the load tests say what is wrong with `scenario`: starting engines for it would take minutes.

    `options` are those that fields of it were made from.
    """
    code, _ = asked(["check", "-"], {**scenario, "options": dict(options)})
    if code != 0:
        raise typer.Exit(code)


@dataclass(frozen=True, slots=True)
class Served:
    """A gateway that serves a configuration, and the rows of its `/slices`."""

    config: Config
    base_url: str
    rows: Rows
    simulated: bool = False


@contextmanager
def serving(path: Path, config: Config) -> Iterator[Served]:
    """The gateway that runs for `config`, else one that lives as long as the block."""
    url = base_url(config)
    if rows := _slices(url):
        yield Served(config, url, rows)
        return
    err.print(f"[dim]nobody serves at {url}; starting `sliceway up {path}` for the measurement[/]")
    models = {model.name for model in config.models if model.least_replicas or model.endpoints}
    with _process(["up", str(path)]) as up:
        yield Served(config, url, _wait_until_ready(up, url, models))


@contextmanager
def fake_serving(models: Sequence[str], tenants: Sequence[str], engine: Mapping[str, Any]) -> Iterator[Served]:
    """A gateway of its own before one simulated engine per model: what is measured there is the gateway alone.

    `engine` has `ttft` and `itl` in seconds and `max_concurrency`.
    """
    with tempfile.TemporaryDirectory(prefix="sliceway-bench-") as directory, ExitStack() as stack:
        home = Path(directory)
        addresses = {name: stack.enter_context(_fake_engine(name, engine, home)) for name in models}
        path = home / "sliceway.yaml"
        data = {
            "version": "v1",
            "state_dir": str(home / "state"),
            "models": [{"name": name, "task": "generate", "endpoints": [url]} for name, url in addresses.items()],
            "tenants": [{"name": name} for name in tenants],
            "gateway": {"listen": "127.0.0.1:0"},
        }
        path.write_text(json.dumps(data), encoding="utf-8")
        config = _on_a_free_port(path, data)
        gateway = stack.enter_context(_process(["gateway", str(path)]))
        rows = _wait_until_ready(gateway, base_url(config), set(models))
        yield Served(config, base_url(config), rows, simulated=True)


@contextmanager
def keys_for(served: Served, tenants: Sequence[str], *, lifetime_seconds: float) -> Iterator[dict[str, str | None]]:
    """Keys for the tenants that take part, worthless again when the block ends."""
    if served.config.gateway.authentication == "none":
        yield dict.fromkeys(tenants)
        return
    store = Keystore(served.config.state)
    lifetime = lifetime_seconds + KEY_SPARE_SECONDS
    made = {
        tenant: store.create(tenant, now=_wall_seconds(), name="bench", lifetime_seconds=lifetime)
        for tenant in sorted(set(tenants))
    }
    try:
        yield {tenant: key for tenant, (key, _) in made.items()}
    finally:
        for _, record in made.values():
            store.revoke(record.id, now=_wall_seconds())


def slices_of(config: Config) -> tuple[Slice, ...]:
    """The slices of this machine, or of the simulated one that the configuration names; none where they cannot be read."""
    try:
        enter(config.fleet, config.state)
        return observe(config.fleet).slices
    except SlicewayError:
        return ()


def software(config: Config) -> dict[str, str]:
    """What runs here, by name and version."""
    found = {"sliceway": metadata.version("sliceway"), "locust": metadata.version("locust")}
    if not any(model.source for model in config.models):
        return found
    kinds: tuple[Literal["cpu", "cuda"], ...] = ("cpu", "cuda")
    for kind in kinds:
        try:
            environment = describe_engine(find_engine_python(kind, config.engine.python))
        except SlicewayError:
            continue
        if environment.vllm:
            found |= {"vllm": f"{environment.vllm} ({environment.kind})", "torch": environment.torch or "?"}
            break
    return found


def tasks(config: Config) -> dict[str, Literal["generate", "embed"]]:
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


def base_url(config: Config) -> str:
    """Where to reach its gateway; one on every address is reached on the loopback."""
    if getattr(config.gateway, "tls", None) is not None:
        raise BenchError(
            "the load tests speak plain HTTP, and this gateway HTTPS",
            where="gateway.tls",
            remedy="Measure a copy of the configuration without tls.",
        )
    host, _, port = config.gateway.listen.rpartition(":")
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '[::]') else host}:{port}"


@contextmanager
def _process(arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    # Its words go to standard error: standard output is the result's.
    child = subprocess.Popen([sys.executable, "-m", "gateway.cli", *arguments], stdout=sys.stderr)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            child.wait(STOP_SECONDS)


@contextmanager
def _fake_engine(model: str, engine: Mapping[str, Any], home: Path) -> Iterator[str]:
    """A simulated engine as a process; its address."""
    socket = home / f"{len(list(home.glob('*.log')))}.sock"
    command = [sys.executable, "-m", "placement.fake_engine", "--uds", str(socket), "--model", model]
    command += ["--ttft-seconds", str(engine["ttft"]), "--itl-seconds", str(engine["itl"])]
    command += ["--max-concurrency", str(engine["max_concurrency"]), "--output-tokens", "100000"]
    command += ["--max-model-len", "1000000"]
    with socket.with_suffix(".log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"unix:{socket}"
    finally:
        child.terminate()
        child.wait(STOP_SECONDS)


def _on_a_free_port(path: Path, data: dict[str, Any]) -> Config:
    """The configuration with a port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        data["gateway"]["listen"] = f"127.0.0.1:{probe.getsockname()[1]}"
    path.write_text(json.dumps(data), encoding="utf-8")
    return load_config(path)


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
                f"the gateway ended with exit code {up.returncode} before the models were ready",
                remedy="It says why above.",
            )
        if clock() > deadline:
            raise BenchError(
                "the models did not become ready",
                remedy="`sliceway status` shows why; logs lie in the state directory.",
            )
        time.sleep(0.2)


def _slices(url: str) -> Rows:
    """The rows of `/slices`; [] while nobody answers."""
    try:
        with urllib.request.urlopen(f"{url}/slices", timeout=10) as answer:
            rows: Rows = json.load(answer)
    except (OSError, ValueError):
        return []
    return rows


def _wall_seconds() -> float:
    """Seconds since 1970, which keys are dated with."""
    return datetime.now(UTC).timestamp()
