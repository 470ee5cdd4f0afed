"""Engines on TCP under a controller: each start has a secret of its own, which survives the controller and comes out nowhere."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from placement.errors import EngineTlsError
from placement.launch import LaunchSpec
from placement.replicas.journal import Journal
from placement.replicas.probe import Probe
from placement.replicas.process import LocalLauncher
from placement.schema import EngineConfig, EngineTlsConfig
from placement.slices import Slice, SliceKind
from placement.state import StatePaths
from placement.table import ReplicaState
from tests.integration.certificates import Authority

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

A = {"name": "a", "max_num_seqs": 4}
ENGINE = ["{python}", "-m", "placement.fake_engine", "--port", "{port}", "--model", "{served_name}"]
CPU = Slice("cpu-0", SliceKind.CPU, None, 2**30, cores=(min(os.sched_getaffinity(0)),))


def asked(endpoint: str, secret: str | None, path: str = "/health") -> int:
    request = urllib.request.Request(endpoint + path)
    if secret is not None:
        request.add_header("authorization", f"Bearer {secret}")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code


def files_with(root: Path, secret: str) -> dict[str, int]:
    """Files below `root` that hold `secret`, with their modes."""
    return {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in root.rglob("*")
        if path.is_file() and secret.encode() in path.read_bytes()
    }


def test_the_secret_survives_the_controller_and_comes_out_nowhere(site: Any, eventually: Any) -> None:
    site.write(A, transport="tcp", command=ENGINE)
    controller = site.controller()
    pid = site.ready("a-0")
    (row,) = site.table().replicas
    assert row.secret is not None
    assert len(bytes.fromhex(row.secret)) >= 16
    assert site.entry("a-0").secret == row.secret
    for path in ("/health", "/metrics", "/tokenize", "/v1/models"):
        assert asked(row.endpoint, None, path) == 401
    assert asked(row.endpoint, row.secret) == 200

    assert set(files_with(site.paths.root, row.secret).items()) == {("routing.json", 0o600), ("journal.json", 0o600)}
    assert row.secret not in site.log.read_text(encoding="utf-8")
    for process in psutil.process_iter(["cmdline"]):
        assert row.secret not in " ".join(process.info["cmdline"] or ()), "ps shows it to everybody"
    environment = Path(f"/proc/{pid}/environ")
    assert row.secret.encode() in environment.read_bytes()
    assert stat.S_IMODE(environment.stat().st_mode) == 0o400
    status = [sys.executable, "-m", "gateway.cli", "status", str(site.config), "--json"]
    told = subprocess.run(status, env=site.environment, capture_output=True, check=False)
    assert b"a-0" in told.stdout
    assert row.secret.encode() not in told.stdout + told.stderr

    controller.kill()
    controller.wait()
    site.controller()
    eventually(lambda: (s := site.replica("a-0")) and s.adopted and s.state is ReplicaState.READY, "it is adopted")
    assert site.table().replicas[0].secret == row.secret
    os.kill(pid, 9)
    site.ready("a-0", other_than=pid)
    successor = site.table().replicas[0]
    assert successor.secret not in (None, row.secret), "each start has its own"
    assert asked(successor.endpoint, row.secret) == 401


@pytest.fixture
def launcher(tmp_path: Path) -> LocalLauncher:
    paths = StatePaths(tmp_path / "state")
    paths.prepare({})
    return LocalLauncher(paths, Journal(paths), {"PATH": os.environ["PATH"]})


def engine_with(folder: Path, address: str) -> EngineConfig:
    authority = Authority("the cluster's")
    certificate, key = authority.issue(folder, address=address)
    tls = EngineTlsConfig(certificate=certificate, key=key, authority=authority.write(folder))
    return EngineConfig(transport="tcp", tls=tls, drain_timeout_seconds=0, stop_timeout_seconds=5)


def spec(engine: EngineConfig) -> LaunchSpec:
    assert engine.tls is not None
    pair = ("--ssl-certfile", str(engine.tls.certificate), "--ssl-keyfile", str(engine.tls.key))
    argv = (sys.executable, "-m", "placement.fake_engine", "--port", "{port}", "--model", "a", *pair)
    return LaunchSpec("a-0", "a", "generate", CPU, argv)


async def test_an_engine_is_asked_over_tls_and_with_its_secret(launcher: LocalLauncher, eventually_async: Any) -> None:
    engine = engine_with(launcher.paths.root / "tls", "127.0.0.1")
    process = launcher.start(spec(engine), engine)
    try:
        assert str(process.endpoint).startswith("https://127.0.0.1:")
        probe = Probe(process.endpoint, "a", "generate")
        await eventually_async(lambda: probe.healthy(timeout_seconds=5), "it answers its controller")
        assert await probe.answers(timeout_seconds=20)
        assert await probe.activity(timeout_seconds=20) is not None
        stranger = Probe(replace(process.endpoint, secret=""), "a", "generate")
        assert not await stranger.healthy(timeout_seconds=5)
        assert await stranger.text("/metrics", timeout_seconds=5) is None
    finally:
        process.kill()
        await process.wait()


async def test_tls_that_gateways_would_refuse_starts_no_engine(launcher: LocalLauncher) -> None:
    engine = engine_with(launcher.paths.root / "tls", "10.0.0.1")
    with pytest.raises(EngineTlsError, match="the certificate is for another address") as refused:
        launcher.start(spec(engine), engine)
    assert "subjectAltName=IP:127.0.0.1" in str(refused.value.remedy)
    assert Journal(launcher.paths).of("a-0") is None
