"""The recorded KV figures, measured again on the real CPU engine: one small model per kind of layout.

The fast tests hold the sizing against the recording for every model; this one holds the recording against the engine that is
installed, so that a new engine version cannot drift away unseen.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from placement.engines import find_engine_python

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

DATA = json.loads((Path(__file__).parents[1] / "data" / "sizing" / "engine_runs.json").read_text(encoding="utf-8"))
RUNS = {run["name"]: run for run in DATA["runs"]}
AGAIN = (
    "gemma3-padded-groups-long",  # sliding and full, steps shorter than the window, padded groups
    "deepseek-v2-mla",
    "nemotron-h-mamba2",
    "qwen3-next-long",  # gated delta
    "llama4-chunked",
    "gemma2-pool-exact",  # refused: one block too few
)


@pytest.mark.parametrize("name", AGAIN)
def test_the_engine_still_says_what_was_recorded(name: str, tmp_path: Path) -> None:
    run: dict[str, Any] = RUNS[name]
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    done = subprocess.run(
        [
            find_engine_python("cpu"),
            str(Path(__file__).with_name("kv_engine_probe.py")),
            str(tmp_path / "run.json"),
        ],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=220,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == run["measured"]
