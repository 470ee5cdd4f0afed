"""Who is measured: this gateway with everything on, and others as they start by default, each before the same engine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from gateway.keys import Keystore
from gateway.overhead.tools import free_port, request, running

OURS = "sliceway"
START_SECONDS = 180.0  # LiteLLM takes most of a minute where others use the machine
MASTER_KEY = "sk-9dE2vQm4Rk7TzW1x"  # LiteLLM refuses a weak one
LIMITS = {"requests_per_minute": 100_000_000, "tokens_per_minute": 10_000_000_000, "max_concurrent": 100_000}
MOST_IN_FLIGHT = 8192  # per replica; the default of 1024 would refuse what is to be held
FEATURES = ("keys", "3 limits", "admission", "fair queue", "cache salts", "metering", "digests", "metrics")

HOW_TO_INSTALL = {
    "nginx": "apt install nginx-light",
    "vllm-router": "pip install vllm-router, in an environment of its own (--peers)",
    "sglang-router": "pip install sglang-router, in an environment of its own (--peers)",
    "litellm": 'pip install "litellm[proxy]", in an environment of its own (--peers)',
}

_NGINX = """
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


@dataclass(frozen=True, slots=True)
class Start:
    """How a gateway is started: its command, the key it wants, and what stands in its environment."""

    command: tuple[str, ...]
    key: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that answers."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    key: str | None

    def cpu_seconds(self) -> float:
        """CPU time of its processes so far, all threads, from the scheduler's own account in nanoseconds."""
        total = 0
        for process in _family(self.process.pid):
            for thread in Path(f"/proc/{process}/task").glob("*/schedstat"):
                with contextlib.suppress(OSError):
                    total += int(thread.read_text(encoding="utf-8").split()[0])
        return total / 1e9

    def resident_bytes(self) -> int:
        """Resident memory of its processes."""
        return sum(psutil.Process(pid).memory_info().rss for pid in _family(self.process.pid))


def _family(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


Maker = Callable[[Path, int, int], Start]
"""Of a directory, the gateway's port and the engine's."""


def makers(peers: Path | None) -> Mapping[str, Maker | None]:
    """Everyone who is compared, in the order of the table; None for who is not installed. `peers` is an environment with their programs."""
    return {
        "nginx": _nginx_maker(),
        "vllm-router": _router(peers, "vllm-router", ()),
        "sglang-router": _router(peers, "sglang-router", ("launch",)),
        OURS: ours,
        "litellm": _litellm(peers),
    }


def ours(directory: Path, port: int, engine: int, *, tree: Path | None = None) -> Start:
    """This gateway with everything on, and its key for a tenant with high limits. `tree` is another source tree to take it from."""
    start, keys = with_tenants(directory, port, engine, {"t": LIMITS})
    return Start(start.command, keys["t"], (("PYTHONPATH", str(tree)),) if tree else ())


def with_tenants(
    directory: Path, port: int, engine: int, tenants: Mapping[str, Mapping[str, int]]
) -> tuple[Start, dict[str, str]]:
    """This gateway for these tenants and their limits, with a key for each; the first one's goes with the start."""
    state = directory / f"state-{port}"
    state.mkdir()
    config = state / "sliceway.yaml"
    gateway = {"listen": f"127.0.0.1:{port}", "admin_listen": "none", "max_in_flight_per_replica": MOST_IN_FLIGHT}
    data = {
        "version": "v1",
        "state_dir": str(state),
        "models": [{"name": "bench", "endpoints": [f"http://127.0.0.1:{engine}"]}],
        "tenants": [{"name": name, "limits": dict(limits)} for name, limits in tenants.items()],
        "gateway": gateway,
    }
    config.write_text(json.dumps(data), encoding="utf-8")
    keys = {name: Keystore(state).create(name, now=time.time_ns() / 1e9)[0] for name in tenants}
    return Start((sys.executable, "-m", "gateway.cli", "gateway", str(config)), next(iter(keys.values()))), keys


def _nginx_maker() -> Maker | None:
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if program is None:
        return None

    def make(directory: Path, port: int, engine: int) -> Start:
        config = directory / "nginx.conf"
        config.write_text(_NGINX.format(dir=directory, engine=engine, port=port), encoding="utf-8")
        return Start((program, "-c", str(config), "-g", "daemon off;"))

    return make


def _program(peers: Path | None, name: str) -> str | None:
    return shutil.which(name, path=str(peers / "bin") if peers else None)


def _router(peers: Path | None, name: str, subcommand: tuple[str, ...]) -> Maker | None:
    program = _program(peers, name)
    if program is None:
        return None

    def make(directory: Path, port: int, engine: int) -> Start:
        where = ("--host", "127.0.0.1", "--port", str(port), "--worker-urls", f"http://127.0.0.1:{engine}")
        quiet = ("--prometheus-port", str(free_port()), "--log-level", "error")
        return Start((program, *subcommand, *where, *quiet))

    return make


def _litellm(peers: Path | None) -> Maker | None:
    program = _program(peers, "litellm")
    if program is None:
        return None

    def make(directory: Path, port: int, engine: int) -> Start:
        config = directory / "litellm.yaml"
        parameters = {"model": "openai/bench", "api_base": f"http://127.0.0.1:{engine}/v1", "api_key": "none"}
        models = [{"model_name": "bench", "litellm_params": parameters}]
        data = {"model_list": models, "general_settings": {"master_key": MASTER_KEY}}
        config.write_text(json.dumps(data), encoding="utf-8")
        environment = (("LITELLM_LOCAL_MODEL_COST_MAP", "True"), ("LITELLM_MODE", "PRODUCTION"))
        command = (program, "--config", str(config), "--port", str(port), "--host", "127.0.0.1")
        return Start(command, MASTER_KEY, environment)

    return make


@contextlib.contextmanager
def started(name: str, start: Start, port: int, directory: Path) -> Iterator[Running | None]:
    """The gateway, answering completions; None where it does not come to that, which its log in `directory` explains."""
    log = directory / f"{name}-{port}.log"
    with running(start.command, log, dict(start.environment)) as process:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            if _answers(port, start.key):
                yield Running(name, port, process, start.key)
                return
            time.sleep(0.2)
        yield None


def _answers(port: int, key: str | None) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            sock.sendall(request(port, stream=False, tokens=1, key=key))
            return sock.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False
