"""`sliceway bench isolation` through a real gateway, on two simulated engines."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

SLICEWAY = [sys.executable, "-m", "gateway.cli"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as running:
        try:
            yield running
        finally:
            running.terminate()


def rows(url: str) -> list[dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"{url}/slices", timeout=5) as answer:
            found: list[dict[str, Any]] = json.load(answer)
    except OSError:
        return []
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A configuration with two models on two simulated engines and a gateway that serves it. chat-a runs four at once."""
    directory = tmp_path_factory.mktemp("bench")
    ports = {"chat-a": free_port(), "chat-b": free_port()}
    listen = f"127.0.0.1:{free_port()}"
    path = directory / "config.yaml"
    data = {
        "version": "v1",
        "state_dir": str(directory / "state"),
        "models": [
            {"name": name, "task": "generate", "endpoints": [f"http://127.0.0.1:{port}"]}
            for name, port in ports.items()
        ],
        "tenants": [{"name": "quiet", "models": ["chat-a"]}, {"name": "noisy"}],
        "gateway": {"listen": listen},
    }
    path.write_text(json.dumps(data), encoding="utf-8")
    with ExitStack() as stack:
        for name, port in ports.items():
            command = [
                sys.executable,
                "-m",
                "placement.fake_engine",
                "--port",
                str(port),
                "--model",
                name,
                "--max-concurrency",
                "4",
            ]
            stack.enter_context(
                process([*command, "--ttft-seconds", "0.03", "--itl-seconds", "0.004"], directory / f"{name}.log")
            )
        gateway = stack.enter_context(process([*SLICEWAY, "gateway", str(path)], directory / "gateway.log"))
        ready: list[str] = []
        for _ in range(1500):
            ready = [row["model"] for row in rows(f"http://{listen}") if row["state"] == "ready"]
            if len(ready) == 2 or gateway.poll() is not None:
                break
            threading.Event().wait(0.1)
        assert sorted(ready) == ["chat-a", "chat-b"], (directory / "gateway.log").read_text(encoding="utf-8")
        yield path


def bench(config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*SLICEWAY, "bench", "isolation", str(config), *options]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=170, check=False)


def test_the_other_slice_is_apart_and_the_same_one_is_not(config: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    options = ("--duration", "1.5", "--warmup", "0.3", "--rounds", "1", "--output-tokens", "8", "--json")
    done = bench(config, *options, "--samples", str(samples))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["victim"]["name"], result["victim"]["model"], result["victim"]["slice"]) == (
        "quiet",
        "chat-a",
        "endpoint-0",
    )
    settings = result["settings"]
    assert settings["alone"]["victim"]["failures"] == {}
    apart, together = settings["neighbour_on_other_slice"], settings["neighbour_on_same_slice"]
    assert {row["slice"] for row in apart["neighbours"]} == {"endpoint-1"}
    assert {row["slice"] for row in together["neighbours"]} == {"endpoint-0"}
    # Nine at once on a slice that runs four wait for others' turns, 30 ms and 7 times 4 ms each, however fast the machine is.
    assert together["victim"]["ttft_seconds"]["p50"] > 0.045
    assert together["ratio_to_alone"]["ttft_seconds"]["p50"] is not None
    assert len(samples.read_text(encoding="utf-8").splitlines()) > 20
    store = json.loads((config.parent / "state" / "keys.json").read_text(encoding="utf-8"))
    assert store["keys"]
    assert all(key["revoked"] for key in store["keys"]), "its keys are worthless afterwards"


def test_a_wrong_tenant_is_told_with_the_right_ones(config: Path) -> None:
    done = bench(config, "--victim", "loud")
    assert done.returncode == 2
    assert "'quiet'" in done.stderr
    assert "'noisy'" in done.stderr
    assert "Traceback" not in done.stderr


def test_capacity_is_found_kept_and_shown(config: Path) -> None:
    """Four at once, 0.06 s each: what comes faster than about 70 a second queues up, and two seconds of queue are too much."""
    options = ("--slo", "ttft=2s", "--attainment", "0.9", "--seconds", "1", "--requests", "20", "--probes", "4")
    sizes = ("--model", "chat-a", "--prompt-tokens", "20", "--output-tokens", "8", "--tolerance", "1.5")
    command = [*SLICEWAY, "bench", "capacity", str(config)]
    done = subprocess.run(
        [*command, *options, *sizes, "--gpu-price-per-hour", "2", "--json"],
        capture_output=True,
        encoding="utf-8",
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    measured = result["measured"]
    assert 0.5 < measured["requests_per_second"] < 600
    assert (measured["prompt_tokens"], measured["output_tokens"]) == (20, 8)
    shown = subprocess.run(
        [*command, "--show", "--json"], capture_output=True, encoding="utf-8", timeout=170, check=True
    )
    record = json.loads(shown.stdout)["records"][0]
    assert record == result["records"][0]
    assert (record["model"], record["kind"], record["price_per_hour"]) == ("chat-a", "endpoint", 2.0)
    assert record["requests_per_second"] == measured["requests_per_second"]


@pytest.mark.parametrize(
    ("slo", "said"),
    [
        ("ttft=0.5", "has no unit"),
        ("ttft=3q", "'q' is no unit of time"),
        ("speed=3s", "is no limit"),
        (None, "there is none"),
    ],
)
def test_capacity_wants_an_slo_with_units(config: Path, slo: str | None, said: str) -> None:
    words = ["--slo", slo] if slo else []
    command = [*SLICEWAY, "bench", "capacity", str(config), *words]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=170, check=False)
    assert done.returncode == 2
    assert said in done.stderr
