"""The main job, seen from outside: `sliceway up` on a configuration, and two tenants with the official `openai` client.

Run by `make demo`. Everything here goes through what any user has: two commands and HTTP. With DEMO_ONCE=1, or without a
terminal, it stops by itself; DEMO_PORT moves the gateway to another port. Another configuration can be named as the argument;
its tenants must be those below, and a model named `chat...` or `embed...` is asked.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from rich.box import SIMPLE
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SLICEWAY = (str(Path(sys.executable).parent / "sliceway"),)
START_SECONDS = 900.0
STOP_SECONDS = 90.0
TENANTS = ("acme", "globex")
QUESTIONS = {"acme": "Name three colours.", "globex": "What is a cat?"}
SENTENCE = "A slice of a GPU is a small GPU of its own."


class DemoFailed(Exception):
    """What went wrong, and what to do."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. `config` depends on the cores: with one there is one slice, and one model on it."""

    config: Path
    cores: int
    port: int
    once: bool

    @property
    def url(self) -> str:
        """The gateway's address."""
        return f"http://127.0.0.1:{self.port}"


def settings(arguments: Sequence[str]) -> Settings:
    """Read the environment and look at the machine. Raises DemoFailed for a port that is none."""
    cores = len(os.sched_getaffinity(0))
    text = os.environ.get("DEMO_PORT", "8080")
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise DemoFailed(f"DEMO_PORT={text!r} is no port; try DEMO_PORT=8090")
    once = os.environ.get("DEMO_ONCE", "") not in ("", "0") or not sys.stdout.isatty()
    config = (
        Path(arguments[0]) if arguments else ROOT / "configs" / ("demo.yaml" if cores > 1 else "demo-one-core.yaml")
    )
    return Settings(config, cores, int(text), once)


def check_port(port: int) -> None:
    """Minutes of engine start should not end in a port that somebody has. Raises DemoFailed."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise DemoFailed(
                f"port {port} is taken ({error.strerror}); choose another: make demo DEMO_PORT={port + 10}"
            ) from error


def create_key(config: Path, tenant: str) -> str:
    """A new API key, as an operator makes one."""
    about = ("--name", "demo", "--expires", "7d")  # every demo makes its own: old ones end by themselves
    command = [*SLICEWAY, "keys", "create", tenant, "--config", str(config), *about, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    if done.returncode:
        raise DemoFailed(f"`sliceway keys create {tenant}` failed")
    key: str = json.loads(done.stdout)["key"]
    return key


def slices(url: str) -> list[dict[str, Any]]:
    """The rows of `/slices`; [] while nobody answers."""
    with (
        suppress(urllib.error.URLError, ConnectionError, TimeoutError),
        urllib.request.urlopen(f"{url}/slices", timeout=5) as answer,
    ):
        shown = json.load(answer)
        return [row for row in (shown["slices"] if isinstance(shown, dict) else shown) if row.get("model")]
    return []


def wait_until_ready(up: subprocess.Popen[bytes], url: str) -> None:
    """Every replica is ready; `sliceway up` shows how far it is. Raises DemoFailed if one cannot be, or it takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while not ((rows := slices(url)) and all(row["state"] == "ready" for row in rows)):
        if up.poll() is not None:
            raise DemoFailed(f"`sliceway up` ended with exit code {up.returncode}; it says why above")
        for row in rows:
            if row["state"] == "failed":
                raise DemoFailed(f"{row['replica']} cannot run: {row.get('reason')}")
        if time.monotonic() > deadline:
            raise DemoFailed(f"not ready after {START_SECONDS:.0f} s; `sliceway status` shows why")
        time.sleep(0.5)
    time.sleep(0.5)  # `sliceway up` looks a few times a second; its last word comes before the first answer


def chat(client: openai.OpenAI, model: str, tenant: str, console: Console) -> None:
    """One streamed chat completion, printed as it comes."""
    question = QUESTIONS[tenant]
    console.print(f"[bold]{tenant}[/] asks {model}: [italic]{question}[/]")
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=48, temperature=0, stream=True
    )
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            console.print(event.choices[0].delta.content, end="", style="green", markup=False, highlight=False)
    console.print()


def embed(client: openai.OpenAI, model: str, tenant: str, console: Console) -> None:
    """One embedding, shown by its size and its first numbers."""
    answer = client.embeddings.create(model=model, input=SENTENCE)
    vector = answer.data[0].embedding
    head = ", ".join(f"{x:+.4f}" for x in vector[:4])
    console.print(
        f"[bold]{tenant}[/] embeds with {model}: [italic]{SENTENCE}[/]\n[green]{len(vector)} numbers: {head}, ...[/]"
    )


def serve_tenants(settings: Settings, keys: dict[str, str], console: Console) -> None:
    """Every tenant lists its models, chats, and embeds where there is a model for it."""
    for tenant, key in keys.items():
        console.print(Rule(f"tenant {tenant}", align="left"))
        client = openai.OpenAI(base_url=f"{settings.url}/v1", api_key=key)
        models = [model.id for model in client.models.list()]
        for ask in (chat, embed):
            name = next((m for m in models if m.startswith(ask.__name__)), None)
            if name:
                ask(client, name, tenant, console)
        console.print()


def counted(url: str) -> list[dict[str, Any]]:
    """The rows of `/slices` with what was just asked in them: the gateway computes them once a second."""
    time.sleep(1.1)
    return slices(url)


def latency_table(rows: list[dict[str, Any]]) -> Table:
    """p50/p99 of the last five minutes: a row per slice, and one below it per tenant."""
    shown = Table(title="p50 / p99 in ms over the last five minutes, from /slices", title_justify="left", box=SIMPLE)
    for heading in ("slice", "model", "tenant"):
        shown.add_column(heading)
    for heading in ("requests", "TTFT", "ITL", "E2E"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(row["slice"]["id"], row["model"], "all", *figures(row["windows"]["5m"]), style="bold")
        for tenant, its in row["tenants"].items():
            shown.add_row("", "", tenant, *figures(its["windows"]["5m"]))
    return shown


def figures(window: dict[str, Any]) -> tuple[str, ...]:
    """Requests, then p50 / p99 of each latency; a dash where nothing was measured (an embedding has no tokens)."""

    def pair(name: str) -> str:
        values = window[name]
        return (
            "-"
            if not values["count"]
            else " / ".join(f"{values[q] * 1000:.{0 if values[q] >= 0.1 else 1}f}" for q in ("p50", "p99"))
        )

    return (str(window["e2e_seconds"]["count"]), *map(pair, ("ttft_seconds", "itl_seconds", "e2e_seconds")))


def stop(up: subprocess.Popen[bytes]) -> int:
    """Ask `sliceway up` to drain and stop, and wait for it; Ctrl-C meanwhile asks it to hurry."""
    if up.poll() is None:
        up.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        try:
            return up.wait(max(0.0, deadline - time.monotonic()))
        except KeyboardInterrupt:
            up.send_signal(signal.SIGTERM)
        except subprocess.TimeoutExpired:
            break
    raise DemoFailed(f"`sliceway up` (pid {up.pid}) did not stop within {STOP_SECONDS:.0f} s")


def keep_serving(settings: Settings, keys: dict[str, str], up: subprocess.Popen[bytes], console: Console) -> None:
    """Say how to go on, and serve until Ctrl-C."""
    key = keys[TENANTS[0]]
    console.print(f"\nServing on [bold]{settings.url}/v1[/] until Ctrl-C. In another terminal:\n")
    console.print(
        f"  curl -s {settings.url}/v1/models -H 'authorization: Bearer {key}'", highlight=False, soft_wrap=True
    )
    console.print(f"  .venv/bin/sliceway status --watch {os.path.relpath(settings.config)}\n", highlight=False)
    up.wait()


def run(settings: Settings, console: Console) -> None:
    """Start, ask, show, and stop or go on serving."""
    check_port(settings.port)
    if settings.cores == 1:
        console.print(
            "This machine gives one core, so there is one slice, with the chat model on it; embeddings are left out."
        )
    keys = {tenant: create_key(settings.config, tenant) for tenant in TENANTS}
    listen = ("--listen", f"127.0.0.1:{settings.port}")
    # A process group of its own: Ctrl-C in the terminal reaches this process only, which then asks `up` to stop, once.
    up = subprocess.Popen([*SLICEWAY, "up", str(settings.config), *listen], process_group=0)
    try:
        wait_until_ready(up, settings.url)
        serve_tenants(settings, keys, console)
        console.print(latency_table(counted(settings.url)))
        if not settings.once:
            keep_serving(settings, keys, up, console)
    finally:
        code = stop(up)
    if code:
        raise DemoFailed(f"`sliceway up` ended with exit code {code}")


def main() -> int:
    """0 when everything was answered and stopped cleanly, also by Ctrl-C; 1 with the reason otherwise."""
    console = Console(highlight=False)
    interrupt: Callable[..., Any] = signal.default_int_handler
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        run(settings(sys.argv[1:]), console)
    except DemoFailed as error:
        Console(stderr=True).print(f"[bold red]error[/] {error}")
        return 1
    except openai.OpenAIError as error:
        Console(stderr=True).print(f"[bold red]error[/] the gateway answered: {error}")
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
