"""What a request and a relayed event cost the gateway in CPU time, beside other gateways, in turns in one run.

    .venv/bin/python scripts/relay_cost.py --tools DIR [--peers VENV] [--rounds 5] [--seconds 4] [--json FILE]

DIR holds `upstream.c` (an OpenAI-compatible server that costs next to nothing) and `loadgen.c` (a closed-loop client that adds up
the CPU time of a process and its descendants); they are compiled into a temporary directory. VENV is an environment with
`vllm-router`, `sglang-router` and `litellm[proxy]` in it; nginx is taken from the path. What is not there is left out, and said.

The gateway runs as it serves: authentication by key, admission, metering, digests and metrics on. Contestants are measured
one at a time while the others idle, in another order every round. Only CPU time counts, so that engine and client do not matter. Compare figures of one run with each other and with nothing else: machines differ, and so do their neighbours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gateway.config import load_config
from gateway.keys import Keystore
from gateway.testing import wait_until
from gateway.wiring import serve_gateway, wall_clock

EVENTS = 100
EVENT_MICROSECONDS = 10_000
MASTER_KEY = "sk-9dE2vQm4Rk7TzW1x"  # LiteLLM refuses a weak one
START_SECONDS = 120.0
LONGER = {"litellm": 4.0}  # so many times as long as others, since it answers that much less
NGINX = """
worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/nginx.err;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p;
  fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  upstream engine {{ server 127.0.0.1:{engine}; keepalive 1024; }}
  keepalive_requests 1000000;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }}
  }}
}}
"""


@dataclass
class Contestant:
    """A relaying process, and the samples taken of it."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    key: str = "none"
    plain: list[float] = field(default_factory=list)
    event: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """Where things are."""

    directory: Path
    tools: Path
    peers: Path | None
    engine: int

    def compiled(self, tool: str) -> Path:
        """One of the C programs."""
        binary = self.directory / tool
        if not binary.exists():
            subprocess.run(["gcc", "-O2", "-w", "-o", binary, self.tools / f"{tool}.c"], check=True)
        return binary

    def peer(self, name: str) -> str | None:
        """A peer's program, if it is installed."""
        path = self.peers / "bin" / name if self.peers else None
        return str(path) if path and path.exists() else None


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process group of this run, ended with it."""
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int, key: str) -> bool:
    """Whether a completion comes through."""
    body = b'{"model":"bench","messages":[{"role":"user","content":"a"}],"max_tokens":1}'
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            sock.sendall(head.encode() + body)
            return sock.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def gateway(bench: Bench, port: int, relay: str) -> tuple[tuple[str, ...], str]:
    """sliceway with everything on, by one of its relays."""
    state = bench.directory / f"state-{relay}"
    state.mkdir()
    config = state / "sliceway.yaml"
    limits = {"requests_per_minute": 100_000_000, "tokens_per_minute": 10_000_000_000, "max_concurrent": 100_000}
    config.write_text(
        json.dumps(
            {
                "version": "v1",
                "state_dir": str(state),
                "models": [{"name": "bench", "endpoints": [f"http://127.0.0.1:{bench.engine}"]}],
                "tenants": [{"name": "t", "limits": limits}],
                "gateway": {"listen": f"127.0.0.1:{port}", "relay": relay},
            }
        )
    )
    key, _ = Keystore(state).create("t", now=wall_clock())
    return (sys.executable, __file__, "--serve-gateway", str(config)), key


def contestants(bench: Bench) -> dict[str, Callable[[int], tuple[tuple[str, ...], str]]]:
    """Everyone who can be started here: name -> port -> command and key."""
    engine = f"http://127.0.0.1:{bench.engine}"
    found: dict[str, Callable[[int], tuple[tuple[str, ...], str]]] = {}
    if nginx := shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin"):

        def with_nginx(port: int) -> tuple[tuple[str, ...], str]:
            config = bench.directory / "nginx.conf"
            config.write_text(NGINX.format(dir=bench.directory, engine=bench.engine, port=port))
            return (nginx, "-c", str(config), "-g", "daemon off;"), "none"

        found["nginx"] = with_nginx
    for name, start in (("vllm-router", ()), ("sglang-router", ("launch",))):
        if program := bench.peer(name):
            found[name] = lambda port, program=program, start=start: (
                (
                    *(program, *start, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", engine),
                    *("--prometheus-port", str(free_port()), "--log-level", "error"),
                ),
                "none",
            )
    found["sliceway"] = lambda port: gateway(bench, port, "fast")
    found["sliceway, relay: asgi"] = lambda port: gateway(bench, port, "asgi")
    if litellm := bench.peer("litellm"):

        def with_litellm(port: int) -> tuple[tuple[str, ...], str]:
            config = bench.directory / "litellm.yaml"
            parameters = {"model": "openai/bench", "api_base": f"{engine}/v1", "api_key": "none"}
            models = [{"model_name": "bench", "litellm_params": parameters}]
            config.write_text(json.dumps({"model_list": models, "general_settings": {"master_key": MASTER_KEY}}))
            return (litellm, "--config", str(config), "--port", str(port), "--host", "127.0.0.1"), MASTER_KEY

        found["litellm"] = with_litellm
    return found


@contextlib.contextmanager
def started(bench: Bench, only: set[str]) -> Iterator[list[Contestant]]:
    """Every contestant, answering."""
    with contextlib.ExitStack() as stack:
        ready: list[Contestant] = []
        for name, command_for in contestants(bench).items():
            if only and name not in only:
                continue
            port = free_port()
            command, key = command_for(port)
            log = bench.directory / f"{name}.log"
            process = stack.enter_context(running(log, *command))
            contestant = Contestant(name, port, process, key)
            try:
                wait_until(
                    lambda c=contestant: answers(c.port, c.key) or c.process.poll() is not None,
                    what=f"{name} answers",
                    seconds=START_SECONDS,
                )
                assert process.poll() is None, log.read_text()[-2000:]
            except AssertionError as error:
                sys.stderr.write(f"{name} is left out: {error}\n")
                continue
            ready.append(contestant)
        yield ready


def loaded(bench: Bench, contestant: Contestant, *, stream: bool, connections: int, seconds: float) -> dict[str, float]:
    """One run of the load generator. Raises RuntimeError where no request succeeded."""
    command = (
        *(str(bench.compiled("loadgen")), str(contestant.port), str(connections), str(seconds)),
        *("stream" if stream else "plain", contestant.key, "bench", "200", str(contestant.process.pid)),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    numbers = re.search(
        r"([\d.]+) req/s, ([\d.]+) events/s, first byte p50 ([\d.]+) p99 ([\d.]+).*errors (\d+).*?"
        r"([\d.]+) cores, ([\d.]+) us/request, ([\d.]+) us/event",
        done.stdout,
    )
    if numbers is None or done.returncode:
        raise RuntimeError(f"{contestant.name}: {done.stdout}{done.stderr}")
    names = ("requests_per_second", "events_per_second", "p50_ms", "p99_ms", "errors", "cores", "request", "event")
    return dict(zip(names, map(float, numbers.groups()), strict=True))


def measure(bench: Bench, ready: list[Contestant], a: argparse.Namespace) -> None:
    """Take turns, in another order every round."""
    generator = random.Random(1)
    for number in range(a.rounds + 1):  # the first round warms up connections and caches
        for contestant in generator.sample(ready, len(ready)):
            seconds = (a.seconds if number else 1.0) * LONGER.get(contestant.name, 1.0)
            plain = loaded(bench, contestant, stream=False, connections=a.connections, seconds=seconds)
            stream = loaded(bench, contestant, stream=True, connections=a.streams, seconds=seconds)
            if number:
                contestant.plain.append(plain["request"])
                contestant.event.append(stream["event"])
                line = f"{plain['request']:9.1f} us/request {stream['event']:8.2f} us/event, {plain['errors'] + stream['errors']:.0f} errors"
                sys.stderr.write(f"  round {number} {contestant.name:22} {line}\n")


def report(ready: list[Contestant], a: argparse.Namespace) -> None:
    """Medians, and the median of the ratios to sliceway within each round."""
    ours = next((c for c in ready if c.name == "sliceway"), ready[0])
    sys.stdout.write(
        f"\n| gateway | us CPU / request | x {ours.name} | us CPU / event | x {ours.name} |\n|---|---|---|---|---|\n"
    )
    rows = []
    for c in ready:
        plain, event = statistics.median(c.plain), statistics.median(c.event)
        plain_ratio = statistics.median(theirs / mine for theirs, mine in zip(c.plain, ours.plain, strict=True))
        event_ratio = statistics.median(theirs / mine for theirs, mine in zip(c.event, ours.event, strict=True))
        sys.stdout.write(f"| {c.name} | {plain:.1f} | {plain_ratio:.2f} | {event:.2f} | {event_ratio:.2f} |\n")
        rows.append({"name": c.name, "request_us": c.plain, "event_us": c.event})
    load = os.getloadavg()
    sys.stdout.write(
        f"\n{a.rounds} rounds of {a.seconds:g} s; {a.connections} connections plain, {a.streams} streams at "
        f"{EVENT_MICROSECONDS / 1000:g} ms per event; load average {load[0]:.1f} on {os.cpu_count()} cores.\n"
    )
    if a.json:
        a.json.write_text(json.dumps({"rows": rows, "rounds": a.rounds, "seconds": a.seconds, "load": load}, indent=1))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--only", action="append", default=[], help="Measure these alone; may be repeated.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--streams", type=int, default=400)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve-gateway", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve_gateway:
        serve_gateway(load_config(a.serve_gateway), config_path=a.serve_gateway)
        return
    if a.tools is None:
        parser.error("--tools DIR is needed: the directory with upstream.c and loadgen.c")
    with tempfile.TemporaryDirectory(prefix="sliceway-") as directory:
        bench = Bench(Path(directory), a.tools, a.peers, free_port())
        engine = (str(bench.compiled("upstream")), str(bench.engine), str(EVENTS), str(EVENT_MICROSECONDS))
        with running(bench.directory / "engine.log", *engine), started(bench, set(a.only)) as ready:
            measure(bench, ready, a)
            report(ready, a)


if __name__ == "__main__":
    main()
