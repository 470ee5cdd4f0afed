"""The guard before every route that the installed vLLM has, development mode and WebSockets included. No engine is started."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from placement.engine_guard import VARIABLE
from placement.engines import find_engine_python
from placement.errors import EngineMissing
from placement.guarding import MIDDLEWARE, guard_environment, new_secret

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

PROBE = Path(__file__).with_name("vllm_guard_probe.py")


def test_no_route_of_vllm_is_answered_without_the_secret(tmp_path: Path) -> None:
    try:
        python = find_engine_python("cpu")
    except EngineMissing as error:
        pytest.skip(f"no engine environment: {error.message}")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "VLLM_SERVER_DEV_MODE": "1"}
    guard = guard_environment([MIDDLEWARE], new_secret(), tmp_path, environment)
    done = subprocess.run(
        [python, PROBE, MIDDLEWARE],
        env=environment | guard,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=220,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert {"POST /v1/chat/completions", "POST /tokenize", "POST /sleep", "GET /metrics", "GET /health"} <= set(
        told["refused"]
    )
    assert {route: code for route, code in told["refused"].items() if code != 401} == {}
    assert told["socket"] == "1008"
    assert set(told["allowed"].values()) & {200}
    assert 401 not in told["allowed"].values()
    assert guard[VARIABLE] not in done.stdout + done.stderr
