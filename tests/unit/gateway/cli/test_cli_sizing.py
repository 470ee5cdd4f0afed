"""`sliceway size`: the stable JSON, the terminal's picture, errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from model_registry.errors import ConfigError, ModelNotFound, UnknownProduct
from model_registry.sizing.units import GIB

PUBLIC = {
    "weights_bytes", "activation_bytes", "non_torch_bytes", "cuda_graph_bytes", "available_kv_bytes", "kv_block_tokens",
    "kv_block_bytes", "kv_blocks", "kv_blocks_per_request", "max_concurrency", "longest_context_tokens", "fits", "reason",
    "engine_args", "assumptions", "profiles",
}  # fmt: skip
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 640,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 2048,
    "vocab_size": 262_144,
    "sliding_window": 512,
    "max_position_embeddings": 32_768,
    "dtype": "bfloat16",
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GEMMA), encoding="utf-8")
    return str(path)


def run(*words: str) -> str:
    result = CliRunner().invoke(
        app, ["size", *words], catch_exceptions=False, env={"COLUMNS": "160", "XDG_STATE_HOME": "/nonexistent"}
    )
    assert result.exit_code == 0, result.output
    return result.output


def asked(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*words, "--json"))
    return found


def test_the_json_has_every_public_field(config: str) -> None:
    got = asked(config, "--gpu", "h100-sxm", "--max-model-len", "2048")

    assert set(got) >= PUBLIC
    assert got["fits"] is True
    assert (got["product"], got["profile"]) == ("H100-80GB-SXM", "1g.10gb")
    assert [r["profile"] for r in got["profiles"]][:2] == ["1g.10gb", "1g.10gb+me"]
    assert all({"product", "profile", "fits", "reason", "memory_bytes"} <= set(r) for r in got["profiles"])


def test_without_a_product_every_profile_of_every_product_has_a_row(config: str) -> None:
    got = asked(config, "--max-model-len", "2048")

    assert len({r["product"] for r in got["profiles"]}) > 10
    unknown = [r for r in got["profiles"] if r["memory_bytes"] is None]
    assert unknown
    assert not any(r["fits"] for r in unknown)


def test_a_kv_pool_alone_means_a_cpu_as_the_engine_logged_it(config: str) -> None:
    got = asked(
        config, "--kv-cache-memory-gib", "1", "--max-model-len", "2048", "--max-num-batched-tokens", "2048",
        "--max-num-seqs", "256", "--vllm-version", "0.32.0", "--weights-bytes", "1",
    )  # fmt: skip

    assert (got["device"], got["kv_block_tokens"], got["kv_blocks"]) == ("cpu", 128, 2730)
    assert round(got["max_concurrency"], 2) == 27.03
    assert got["profiles"] == []


def test_a_pool_on_a_named_slice_stays_a_gpu(config: str) -> None:
    got = asked(config, "--kv-cache-memory-gib", "1", "--gpu", "h100-sxm", "--max-model-len", "2048")

    assert got["device"] == "cuda"
    assert got["available_kv_bytes"] == GIB


def test_memory_by_size_reproduces_a_whole_gpu(config: str) -> None:
    got = asked(config, "--memory-gib", "79.19", "--gpu-memory-utilization", "0.95", "--max-model-len", "2048")

    assert got["memory_bytes"] == int(79.19 * GIB)
    assert "--gpu-memory-utilization 0.95" in " ".join(got["engine_args"])


def test_the_version_changes_the_default_share_and_what_is_charged(config: str) -> None:
    old = asked(config, "--memory-gib", "20", "--vllm-version", "0.19.0", "--max-model-len", "2048")

    assert old["limits"]["gpu_memory_utilization"] == 0.9
    with pytest.raises(ConfigError):
        run(config, "--vllm-version", "newest")


def test_tensor_parallelism_is_refused_on_slices_and_allowed_on_whole_gpus(config: str) -> None:
    words = (config, "--tensor-parallel-size", "2", "--max-model-len", "2048")

    rows = asked(*words, "--gpu", "h100-sxm")["profiles"]
    assert {r["breaking_term"] for r in rows if r["memory_bytes"]} == {"tensor_parallel_size"}
    assert asked(*words, "--memory-gib", "79")["fits"]


def test_the_terminal_shows_a_bar_a_table_and_one_sentence(config: str) -> None:
    text = run(config, "--gpu", "a100-40gb", "--max-model-len", "2048")

    assert "█" in text
    assert "weights" in text
    assert "1g.5gb" in text
    assert "Needs no more than 1g.5gb" in text
    assert "--max-num-batched-tokens 2048" in text


def test_what_does_not_fit_is_told_in_red_and_without_arguments(config: str) -> None:
    text = run(config, "--memory-gib", "0.9", "--max-model-len", "2048")

    assert "exceed" in text
    assert "vllm serve" not in text


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--gpu", "h1000"), UnknownProduct),
        (("--kv-cache-dtype", "fp7"), ConfigError),
        (("--dtype", "int3"), ConfigError),
        (("--device", "tpu"), ConfigError),
        (("--profile", "9g.9gb"), ConfigError),
    ],
)
def test_a_wrong_option_is_an_error_that_lists_what_there_is(
    config: str, words: tuple[str, str], error: type[ConfigError]
) -> None:
    with pytest.raises(error) as caught:
        run(config, *words)

    assert caught.value.remedy


def test_a_source_that_is_not_there() -> None:
    with pytest.raises(ModelNotFound):
        run("./no/such/config.json")
