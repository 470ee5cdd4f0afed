"""Is the ruler straight? The load tests measure servers whose latencies are known."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

TTFT_SECONDS = 0.08
ITL_SECONDS = 0.02
TOKENS = 10
SLACK_SECONDS = 0.06
"""What a busy two-core machine may add to a median; a ruler that timed headers, or counted events wrongly, is off by more."""


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(delta: dict[str, str]) -> bytes:
    return chunk(b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n")


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nx-sliceway-replica: chat-0\r\n\r\n"
SLICES = json.dumps([{"slice": {"id": "cpu-9"}, "model": "chat", "replica": "chat-0"}]).encode()
ROLE = event({"role": "assistant", "content": ""})
TOKEN = event({"content": "word "})
DONE = chunk(b"data: [DONE]\n\n")
END = b"0\r\n\r\n"
Script = Sequence[bytes | float]
"""What a server does with a request: bytes to send, or seconds to take."""


class ScriptedServer:
    """Plays a script per request, on a raw socket, so that not even headers are timed by anyone else.

    With several scripts the request's model names the one that is played.
    """

    def __init__(self, script: Script | Mapping[str, Script]) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb") as reader:
            while request := reader.readline():
                length = 0
                while (line := reader.readline().strip()) != b"":
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                if not self._answer(connection, request, reader.read(length)):
                    return

    def _answer(self, connection: socket.socket, request: bytes, body: bytes) -> bool:
        if request.startswith(b"GET"):
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(SLICES), SLICES))
            return True
        script = self._script[json.loads(body)["model"]] if isinstance(self._script, Mapping) else self._script
        for step in script:
            if isinstance(step, bytes):
                connection.sendall(step)
            else:
                sleep(step)
        return script[-1] == END


@contextmanager
def scripted(script: Script | Mapping[str, Script]) -> Iterator[str]:
    server = ScriptedServer(script)
    try:
        yield server.url
    finally:
        server.close()


@pytest.fixture(scope="module")
def fake_engine() -> Iterator[str]:
    """A simulated engine with a known TTFT and ITL, as a process of its own."""
    command = [sys.executable, "-m", "placement.fake_engine", "--port", "0", "--model", "chat"]
    command += ["--ttft-seconds", str(TTFT_SECONDS), "--itl-seconds", str(ITL_SECONDS), "--output-tokens", str(TOKENS)]
    engine = subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8")
    assert engine.stderr is not None
    try:
        url = next(word for line in engine.stderr for word in line.split() if word.startswith("http://"))
        yield url
    finally:
        engine.terminate()
        engine.communicate(timeout=20)


def loadtests(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "loadtests", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LOCUST")}
    return subprocess.run(
        command, input=stdin, capture_output=True, encoding="utf-8", timeout=110, env=environment, check=False
    )


def measure(
    tmp_path: Path, url: str, *tenants: dict[str, Any], duration_seconds: float = 1.5, timeout_seconds: float = 5.0
) -> dict[str, Any]:
    rows = [{"name": f"t{i}", "model": "chat", "output_tokens": TOKENS} | tenant for i, tenant in enumerate(tenants)]
    path = tmp_path / "scenario.yaml"
    settings = {
        "base_url": url,
        "warmup_seconds": 0,
        "duration_seconds": duration_seconds,
        "timeout_seconds": timeout_seconds,
        "tenants": rows,
    }
    path.write_text(json.dumps(settings), encoding="utf-8")
    done = loadtests("run", str(path), "--json", "--samples", str(tmp_path / "samples.jsonl"))
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return {row["tenant"]: row for row in result["rows"]} | {"exit": done.returncode, "warnings": result["warnings"]}


def test_medians_are_the_latencies_that_were_set(fake_engine: str, tmp_path: Path) -> None:
    closed = {"arrival": {"kind": "closed", "users": 2}}
    arriving = {"arrival": {"kind": "open", "requests_per_second": 5}}
    result = measure(tmp_path, fake_engine, closed, arriving, duration_seconds=3.0)
    for tenant in ("t0", "t1"):
        row = result[tenant]
        assert row["failures"] == {}
        assert row["itl_seconds"]["count"] == row["requests"] * (TOKENS - 1)
        assert row["output_tokens"] == row["requests"] * TOKENS
        assert TTFT_SECONDS <= row["ttft_seconds"]["p50"] <= TTFT_SECONDS + SLACK_SECONDS
        assert ITL_SECONDS - 0.002 <= row["itl_seconds"]["p50"] <= ITL_SECONDS + SLACK_SECONDS
        whole = TTFT_SECONDS + (TOKENS - 1) * ITL_SECONDS
        assert whole <= row["e2e_seconds"]["p50"] <= whole + TOKENS * SLACK_SECONDS
    assert result["exit"] == 0
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(samples) == result["t0"]["requests"] + result["t1"]["requests"]


def test_ttft_is_neither_the_headers_nor_the_role(tmp_path: Path) -> None:
    with scripted([HEAD, 0.05, ROLE, 0.15, TOKEN, 0.03, TOKEN, 0.1, DONE, END]) as url:
        row = measure(tmp_path, url, {})["t0"]
    assert 0.2 <= row["ttft_seconds"]["p50"] <= 0.2 + SLACK_SECONDS
    assert 0.028 <= row["itl_seconds"]["p50"] <= 0.03 + SLACK_SECONDS
    assert 0.33 <= row["e2e_seconds"]["p50"] <= 0.33 + SLACK_SECONDS
    assert row["slice"] == "cpu-9"


BROKEN: dict[str, Script] = {
    "truncated": [HEAD, ROLE, TOKEN, END],
    "disconnected": [HEAD, ROLE, TOKEN],
    "error_event": [HEAD, TOKEN, chunk(b'data: {"error": {"message": "the engine ended"}}\n\n'), DONE, END],
    "empty": [HEAD, ROLE, DONE, END],
    "http_503": [b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}", 0.01, END[:0]],
    "no_answer": [b""],
}


def test_a_broken_answer_is_a_failure_and_never_a_fast_success(tmp_path: Path) -> None:
    with scripted({kind: [0.02, *script] for kind, script in BROKEN.items()}) as url:
        result = measure(tmp_path, url, *({"name": kind, "model": kind} for kind in BROKEN), duration_seconds=0.2)
    for kind in BROKEN:
        row = result[kind]
        assert list(row["failures"]) == [kind]
        assert row["succeeded"] == row["e2e_seconds"]["count"] == row["ttft_seconds"]["count"] == 0
        assert any(f"({kind})" in text for text in result["warnings"])
    assert result["exit"] == 1


def test_an_open_loop_counts_the_wait_that_a_slow_server_causes(tmp_path: Path) -> None:
    """Twelve requests a second, one at a time, 0.3 s each: the queue grows, and latency has to show it.

    Every request that was due is in the figures, also those that were sent long after the last one was due.
    """
    slow = {"arrival": {"kind": "constant", "requests_per_second": 12, "max_in_flight": 1}}
    with scripted([0.3, HEAD, TOKEN, DONE, END]) as url:
        row = measure(tmp_path, url, slow, duration_seconds=1.04)["t0"]
    assert (row["requests"], row["succeeded"]) == (12, 12)
    assert row["e2e_seconds"]["p50"] > 0.6
    assert row["e2e_seconds"]["max"] > 11 * (0.3 - 1 / 12)


def test_what_a_server_keeps_from_being_sent_is_told(tmp_path: Path) -> None:
    """One at a time, each given up after 0.2 s: when the run is given up, most of what was due lies in the client."""
    stuck = {"arrival": {"kind": "constant", "requests_per_second": 100, "max_in_flight": 1}}
    with scripted([HEAD, 1.0]) as url:
        result = measure(tmp_path, url, stuck, duration_seconds=0.3, timeout_seconds=0.2)
    assert result["t0"]["succeeded"] == 0
    assert any("requests were still unanswered at the end" in text for text in result["warnings"])


def test_a_stalled_stream_times_out(tmp_path: Path) -> None:
    with scripted([HEAD, TOKEN, 2.0]) as url:
        row = measure(tmp_path, url, {}, duration_seconds=0.3, timeout_seconds=0.5)["t0"]
    assert row["failures"] == {"timeout": 1}


def test_isolation_runs_every_setting_and_ends_in_ratios(fake_engine: str) -> None:
    scenario = {
        "kind": "isolation",
        "base_url": fake_engine,
        "warmup_seconds": 0.1,
        "duration_seconds": 0.5,
        "rounds": 1,
        "victim": {"name": "victim", "model": "chat", "output_tokens": 4},
        "aggressors": [{"kind": "flood", "name": "neighbour", "tenant": "noisy", "users": 4}],
        "settings": [{"where": "same_slice"}, {"where": "other_slice", "model": "chat"}],
    }
    done = loadtests("isolation", "-", "--json", stdin=json.dumps(scenario))
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)["settings"]
    assert list(settings) == ["alone", "neighbour_on_same_slice", "neighbour_on_other_slice"]
    assert settings["alone"]["ratio_to_alone"]["ttft_seconds"]["p50"] == 1.0
    for beside in list(settings)[1:]:
        assert settings[beside]["victim"]["succeeded"] > 0
        assert settings[beside]["neighbours"][0]["requests"] > settings[beside]["victim"]["requests"]
    assert "round 1 of 1: alone" in done.stderr


def test_several_processes_ask_what_one_would(fake_engine: str, tmp_path: Path) -> None:
    """The same seed makes the same arrivals and prompts, however many processes send them."""
    arriving = {
        "arrival": {"kind": "poisson", "requests_per_second": 12},
        "prompt_tokens": {"kind": "uniform", "max": 30},
    }
    scenario = {
        "base_url": fake_engine,
        "warmup_seconds": 0,
        "duration_seconds": 1.5,
        "tenants": [{"name": "a", "model": "chat", "output_tokens": 2} | arriving],
    }
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(scenario), encoding="utf-8")
    sent = []
    for processes in ("1", "3"):
        samples = tmp_path / f"{processes}.jsonl"
        done = loadtests("run", str(path), "--json", "--processes", processes, "--samples", str(samples))
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        sent.append([(row["due_seconds"], row["prompt_tokens"]) for row in rows])
    assert sent[0] == sent[1]
    assert len(sent[0]) > 5


def test_conversations_carry_what_was_said(fake_engine: str, tmp_path: Path) -> None:
    talking = {"turns": {"count": 3}, "prompt_tokens": 10, "output_tokens": 5}
    result = measure(tmp_path, fake_engine, talking, duration_seconds=1.2)
    assert result["t0"]["failures"] == {}
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    # A question of 10 tokens, then with 5 answered and 10 asked, then again.
    assert [row["prompt_tokens"] for row in rows][:4] == [10, 25, 40, 10]


def test_misbehaving_clients_do_what_they_are_told(fake_engine: str, tmp_path: Path) -> None:
    manners = {
        "cancel": {"kind": "cancel", "after": "30ms"},
        "slow": {"kind": "slow_reader", "bytes_per_second": 40, "hold": "300ms"},
        "hold": {"kind": "hold_open", "hold": "200ms"},
    }
    beside = ({"name": name, "manner": manner} for name, manner in manners.items())
    result = measure(tmp_path, fake_engine, {}, *beside, duration_seconds=0.6)
    for name, kind in {"cancel": "left", "slow": "left", "hold": "held"}.items():
        assert list(result[name]["failures"]) == [kind]
        assert result[name]["e2e_seconds"]["count"] == 0
    assert result["t0"]["failures"] == {}
    assert not any("for instance" in text for text in result["warnings"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "'victim' is missing"),
        ("nonsense", "Expecting value"),
        (
            '{"base_url": "http://127.0.0.1:9", "victim": {"name": "v", "model": "m"}, '
            '"aggressors": [{"kind": "flood", "tenant": "n"}], "settings": [{"where": "same_slice"}]}',
            "sliceway up",
        ),
    ],
)
def test_bad_scenarios_and_absent_gateways_exit_2_and_say_why(text: str, said: str) -> None:
    done = loadtests("isolation", "-", stdin=text)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_locusts_own_command_line_ends_in_the_same_table(fake_engine: str, tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    tenant = {"name": "acme", "model": "chat", "arrival": {"kind": "closed", "users": 2}}
    path.write_text(
        json.dumps({"base_url": fake_engine, "warmup_seconds": 0.1, "duration_seconds": 1, "tenants": [tenant]}),
        encoding="utf-8",
    )
    locustfile = Path(__file__).parents[2] / "loadtests" / "locustfile.py"
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(locustfile),
        "--headless",
        "--only-summary",
        "--scenario",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert "TTFT p50 / p99" in done.stdout
    assert "acme" in done.stdout
