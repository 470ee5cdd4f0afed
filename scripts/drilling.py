"""What the drills share: a simulated fleet under `sliceway up` with everything that it started, and clients that never stop asking."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import sentinel

from placement.state import StatePaths
from placement.status import ControllerStatus, ReplicaStatus, read_status
from placement.table import ReplicaState

ENGINE = "{python} -m placement.fake_engine --uds {uds} --model {served_name} --max-model-len {max_model_len}"

_AFTER_FAILURE_SECONDS = 0.1
_LOG_BYTES = 2000


class DrillFailed(Exception):
    """Something did not come about; the message holds what was seen last."""


class Site:
    """A state directory and a configuration in `directory`, the processes that serve it, and what they tell."""

    def __init__(self, directory: Path, *, simulate: str | None = None) -> None:
        self.paths = StatePaths(directory / "state")
        self.config = directory / "fleet.yaml"
        self.log = directory / "up.log"
        self.port = free_port()
        self.mark = uuid.uuid4().hex
        self.up: subprocess.Popen[bytes] | None = None
        self.simulated = ("--simulate", simulate) if simulate else ()

    @property
    def url(self) -> str:
        """Where clients reach the gateway."""
        return f"http://127.0.0.1:{self.port}"

    def write(self, content: dict[str, Any]) -> None:
        """Replace the configuration. JSON is YAML."""
        fresh = self.config.with_suffix(".new")
        fresh.write_text(json.dumps(content, indent=1), encoding="utf-8")
        fresh.replace(self.config)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Whatever is started here ends with the block at the latest, and with this process however that ends."""
        with guarded(self.mark):
            yield

    def sliceway(self, *words: str) -> subprocess.Popen[bytes]:
        """`sliceway ...`, its words appended to the log."""
        return sliceway(*words, log=self.log, mark=self.mark)

    def environment(self) -> dict[str, str]:
        """Of what this site starts."""
        return environment(self.mark)

    async def start(self, *words: str) -> None:
        """`sliceway up`, which goes on."""
        self.up = self.sliceway("up", str(self.config), *self.simulated, *words)

    async def stop(self) -> None:
        """End `up` as Ctrl-C does. Raises DrillFailed if it does not end well."""
        if self.up is None:
            return
        self.up.send_signal(signal.SIGINT)
        code = await asyncio.to_thread(self.up.wait, 120)
        if code:
            raise DrillFailed(f"up exited with {code}:\n{self.said()}")

    async def run(self, *words: str) -> None:
        """`sliceway ...` to its end. Raises DrillFailed if it does not end well."""
        process = self.sliceway(*words)
        code = await asyncio.to_thread(process.wait, 300)
        if code:
            raise DrillFailed(f"sliceway {' '.join(words)} exited with {code}:\n{self.said()}")

    async def asked(self, *words: str) -> tuple[int, Any]:
        """Exit status of `sliceway ... CONFIG --json`, and what it printed; None if that was no JSON."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway.cli", *words, str(self.config), *self.simulated, "--json"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment(),
            start_new_session=True,
        )
        out, err = await process.communicate()
        with self.log.open("ab") as log:
            log.write(err)
        try:
            return process.returncode or 0, json.loads(out)
        except ValueError:
            return process.returncode or 0, None

    def said(self) -> str:
        """The end of what everything has written."""
        logs = sorted(self.paths.logs.glob("*.log"), key=lambda p: p.stat().st_mtime)[-4:]
        texts = [self.log, *logs]
        return "\n".join(
            f"== {p.name}\n{p.read_text(errors='replace', encoding='utf-8')[-_LOG_BYTES:]}" for p in texts if p.exists()
        )

    def status(self) -> ControllerStatus | None:
        """What the controller tells."""
        return read_status(self.paths.controller_status)

    def ready(self) -> dict[str, ReplicaStatus]:
        """Replicas that serve, by name."""
        status = self.status()
        return {r.replica: r for r in (status.replicas if status else ()) if r.state is ReplicaState.READY}

    def engines(self) -> dict[tuple[str, str], int | None]:
        """The process of each replica that serves, by replica and slice."""
        return {(r.replica, r.slice.id): r.engine_pid for r in self.ready().values()}

    async def slices(self) -> list[dict[str, Any]]:
        """What the simulated driver shows."""
        code, told = await self.asked("slices")
        if code or told is None:
            raise DrillFailed(f"sliceway slices exited with {code}:\n{self.said()}")
        return list(told["slices"])

    def processes(self) -> Counter[str]:
        """What runs here, by kind: `up`, `controller`, `gateway`, `shim`, `engine`, and other commands by their name."""
        return Counter(map(_kind, sentinel.marked(self.mark)))


def _kind(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "ended"
    if "gateway.cli" in words:
        return words[words.index("gateway.cli") + 1]
    if any(word.endswith("shim.py") for word in words):
        return "shim"
    return "engine" if "placement.fake_engine" in words else words[0] or "ended"


async def until(condition: Callable[[], Any], what: str, site: Site, *, seconds: float = 300.0) -> float:
    """Wait for `condition`. Returns how long it took; raises DrillFailed if it took too long, or `up` has ended."""
    began = time.monotonic()
    while not condition():
        if site.up is not None and site.up.poll() is not None:
            raise DrillFailed(f"up ended with {site.up.returncode}:\n{site.said()}")
        if time.monotonic() - began > seconds:
            raise DrillFailed(f"not within {seconds:g} s: {what}\n{site.said()}")
        await asyncio.sleep(0.05)
    return time.monotonic() - began


@dataclass(frozen=True)
class Wish:
    """What one client asks for next: a model, with the key of a tenant where keys are asked for."""

    model: str
    key: str | None = None
    tenant: str = ""


@dataclass(frozen=True)
class Answer:
    """One request's end. `status` is None where there was no answer at all; `generation` as the header tells it."""

    began: float
    at: float
    wish: Wish
    replica: str | None
    status: int | None
    problem: str | None
    generation: str | None = None


class Clients:
    """Clients that send one request after another, every second one streamed, until they are told to stop.

    `wishes` is asked before every request, with the number of the client; None makes it wait a little.
    """

    def __init__(self, url: str, count: int, wishes: Callable[[int], Wish | None]) -> None:
        self._url = url
        self._count = count
        self._wishes = wishes
        self._stop = asyncio.Event()
        self.answers: list[Answer] = []

    @contextlib.asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """For as long as the block runs."""
        timeout = aiohttp.ClientTimeout(total=60)
        connector = aiohttp.TCPConnector(limit=self._count)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            tasks = [asyncio.create_task(self._client(session, i)) for i in range(self._count)]
            try:
                yield
            finally:
                self._stop.set()
                await asyncio.gather(*tasks)

    async def more(self, count: int, site: Site) -> None:
        """Wait until so many more requests have been answered."""
        wanted = len(self.answers) + count
        await until(lambda: len(self.answers) >= wanted, f"{count} more answers", site)

    def since(self, at: float) -> list[Answer]:
        """What was answered after `at`."""
        return [a for a in self.answers if a.at > at]

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        turn = number
        while not self._stop.is_set():
            wish = self._wishes(number)
            if wish is None:
                await asyncio.sleep(_AFTER_FAILURE_SECONDS)
                continue
            turn += 1
            answer = await self._ask(session, wish, f"{number}-{turn} once upon a time", stream=turn % 2 == 0)
            self.answers.append(answer)
            if answer.problem is not None:
                await asyncio.sleep(_AFTER_FAILURE_SECONDS)

    async def _ask(self, session: aiohttp.ClientSession, wish: Wish, words: str, *, stream: bool) -> Answer:
        """No two ask the same, or all would be sent to where the first one's prefix is cached."""
        body = {"model": wish.model, "messages": [{"role": "user", "content": words}], "stream": stream}
        headers = {"authorization": f"Bearer {wish.key}"} if wish.key else {}
        began, replica, status, generation = time.monotonic(), None, None, None
        try:
            async with session.post(f"{self._url}/v1/chat/completions", json=body, headers=headers) as response:
                replica, status = response.headers.get("x-sliceway-replica"), response.status
                generation = response.headers.get("x-sliceway-generation")
                text = await response.text()
                whole = status == 200 and ("data: [DONE]" in text if stream else "choices" in text)
                problem = None if whole and '"error"' not in text else f"{status}: {text[-200:]}"
        except (aiohttp.ClientError, TimeoutError) as error:
            problem = repr(error)
        return Answer(began, time.monotonic(), wish, replica, status, problem, generation)


def sliceway(*words: str, log: Path, mark: str) -> subprocess.Popen[bytes]:
    """`sliceway ...` in a session of its own, with `mark`, what it says appended to `log`."""
    with log.open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "gateway.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=environment(mark),
            start_new_session=True,
        )


def environment(mark: str) -> dict[str, str]:
    """This process's, without its simulators, and with the mark of everything that a site starts."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("SLICEWAY_NVML")}
    return plain | {sentinel.VARIABLE: mark}


def add_steps(parser: argparse.ArgumentParser, steps: Collection[str], told: str) -> None:
    """`--steps`, all of them if unset, and `--keep`."""
    parser.add_argument("--steps", nargs="*", default=list(steps), choices=list(steps), help=told)
    parser.add_argument("--keep", type=Path, help="a directory for logs and state, which stays")


@contextlib.contextmanager
def workplace(kept: Path | None, prefix: str) -> Iterator[Path]:
    """`kept`, which must not be there yet and stays, or a directory that goes with the block; absolute."""
    with contextlib.ExitStack() as stack:
        if kept is not None:
            kept.mkdir(parents=True)
        yield (kept or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))).absolute()


@contextlib.contextmanager
def guarded(mark: str) -> Iterator[None]:
    """Every process that carries `mark` ends with the block at the latest, and with this process however that ends."""
    program = [sys.executable, "-S", str(Path(sentinel.__file__)), mark]
    with subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            assert guard.stdin is not None
            guard.stdin.close()
            guard.wait(60)


def free_port() -> int:
    """A port of the loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
