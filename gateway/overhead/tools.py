"""The engine and the client of the measurement, in C so that they cost next to nothing: compiled when they are needed, run as processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from gateway.bench import BenchError
from gateway.overhead.pairs import Arrival, Pair, Run, Timing

PATH = "/v1/chat/completions"
PATIENCE_SECONDS = 120.0  # for what a plan has left over when its time is up


@dataclass(frozen=True, slots=True)
class Closed:
    """What came of a closed loop: so many answered, and the events they brought. `unfinished` were under way when time was up."""

    requests: int
    events: int
    errors: int
    seconds: float
    first_p50_us: int
    first_p99_us: int
    whole_p50_us: int
    whole_p99_us: int
    unfinished: int


@dataclass(frozen=True, slots=True)
class Tools:
    """The compiled programs in `directory`, which is the measurement's own."""

    directory: Path

    @classmethod
    def compiled(cls, directory: Path) -> Tools:
        """Compile both. Raises BenchError where there is no C compiler, or it fails."""
        compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
        if compiler is None:
            raise BenchError("measuring needs a C compiler, and there is none", remedy="Install one: apt install gcc")
        for name in ("engine", "load"):
            source = directory / f"{name}.c"
            source.write_bytes(files("gateway.overhead").joinpath(f"{name}.c").read_bytes())
            command = [compiler, "-std=gnu11", "-O2", "-w", "-o", str(directory / name), str(source)]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
            if done.returncode:
                raise BenchError(f"{name}.c could not be compiled: {done.stderr.strip()[-300:]}", where=compiler)
        return cls(directory)

    @contextlib.contextmanager
    def engine(self, *, event_seconds: float = 0.01, first_seconds: float = 0.0) -> Iterator[int]:
        """An engine on a port of its own, for as long as the block: the port. Its first event comes after `first_seconds`."""
        port = free_port()
        command = [
            str(self.directory / "engine"),
            str(port),
            *(str(round(s * 1e6)) for s in (event_seconds, first_seconds)),
        ]
        with running(command, self.directory / f"engine-{port}.log"):
            wait_for_port(port)
            yield port

    def closed(self, port: int, request: bytes, *, connections: int, seconds: float) -> Closed:
        """Every connection asks again as soon as it is answered. Raises BenchError where nobody could be asked."""
        command = ["closed", str(port), str(connections), str(seconds), str(self._written(request))]
        return Closed(**json.loads(self._load(command, "", seconds + PATIENCE_SECONDS)))

    def opened(self, ports: tuple[int, int], requests: tuple[bytes, bytes], plan: Sequence[Arrival]) -> Run:
        """Carry out a plan of pairs: (direct, through the gateway). Raises BenchError where nobody could be asked."""
        lines = "".join(f"{round(arrival.at * 1e6)} {int(arrival.through)}\n" for arrival in plan)
        command = ["open", *map(str, ports), *(str(self._written(request)) for request in requests)]
        last = plan[-1].at if plan else 0.0
        return _run_of(self._load(command, lines, last + PATIENCE_SECONDS), plan)

    def _load(self, arguments: Sequence[str], given: str, timeout_seconds: float) -> str:
        command = [str(self.directory / "load"), *arguments]
        try:
            done = subprocess.run(
                command, input=given, capture_output=True, encoding="utf-8", timeout=timeout_seconds, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BenchError("the gateway stopped answering", remedy="See what its log says.") from error
        if done.returncode:
            raise BenchError(f"the load could not be carried out: {done.stderr.strip()[-300:]}")
        return done.stdout

    def _written(self, request: bytes) -> Path:
        path = self.directory / f"request-{abs(hash(request))}"
        path.write_bytes(request)
        return path


def _run_of(printed: str, plan: Sequence[Arrival]) -> Run:
    run, halves = Run(), dict[tuple[int, bool], Timing]()
    for line in printed.splitlines():
        number, way, *rest = line.split()
        arrival = plan[int(number)]
        if rest[0] == "error":
            run.errors[f"{'gateway' if int(way) else 'direct'}: {' '.join(rest[1:])}"] += 1
            continue
        late, first, whole, says, *gaps = (int(word) / 1e6 for word in rest)
        run.lag_seconds.append(late)
        halves[arrival.pair, arrival.through] = Timing(first, whole, tuple(gaps), says if says >= 0 else None)
    for pair in sorted({pair for pair, _ in halves}):
        if (pair, True) in halves and (pair, False) in halves:
            run.pairs.append(Pair(halves[pair, False], halves[pair, True]))
    return run


def request(
    port: int, *, stream: bool, tokens: int, key: str | None = None, words: int = 64, ask_overhead: bool = False
) -> bytes:
    """The bytes of one completion request. With `ask_overhead` the answer is to say what the gateway took."""
    message = {"role": "user", "content": ("word " * words).strip()}
    fields = {"model": "bench", "messages": [message], "max_tokens": tokens} | ({"stream": True} if stream else {})
    body = json.dumps(fields, separators=(",", ":")).encode()
    further = f"authorization: Bearer {key}\r\n" if key else ""
    further += "x-sliceway-overhead: 1\r\n" if ask_overhead else ""
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n{further}content-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for_port(port: int, seconds: float = 10.0) -> None:
    """Wait until somebody listens. Raises BenchError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise BenchError(f"nobody listens on port {port} after {seconds:g} s")


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process group of this measurement, ended with the block. Raises BenchError where it cannot be started."""
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True, env=os.environ | dict(environment or {})
            )
        except OSError as error:
            raise BenchError(f"{command[0]} could not be started: {error.strerror}") from error
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
