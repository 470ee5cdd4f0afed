"""GGUF headers: the configuration they amount to, split files, and every way they can be damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_registry.errors import ModelUnreadable
from model_registry.gguf_config import config_from
from model_registry.gguf_header import Skipped, read_header, summarize
from model_registry.testing import write_gguf

GEMMA = {
    "general.architecture": "gemma3",
    "gemma3.context_length": 32768,
    "gemma3.embedding_length": 640,
    "gemma3.block_count": 18,
    "gemma3.feed_forward_length": 2048,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.sliding_window": 512,
    "gemma3.rope.freq_base": 1e6,
}


def _config(path: Path, metadata: dict, tensors=()) -> dict:
    return config_from(read_header(write_gguf(path / "m.gguf", metadata, tensors)))


def test_gemma_3_reads_as_its_published_configuration(tmp_path: Path):
    config = _config(tmp_path, GEMMA, [("token_embd.weight", (640, 262144), 8)])
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["model_type"] == "gemma3_text"
    assert (config["hidden_size"], config["num_hidden_layers"], config["head_dim"], config["vocab_size"]) == (
        640,
        18,
        256,
        262144,
    )
    assert [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == [5, 11, 17]
    assert config["tie_word_embeddings"] is True


def test_an_output_matrix_unties_the_embeddings_and_a_window_of_zero_is_none(tmp_path: Path):
    config = _config(tmp_path, GEMMA | {"gemma3.attention.sliding_window": 0}, [("output.weight", (1,), 0)])
    assert config["tie_word_embeddings"] is False
    assert "sliding_window" not in config
    assert "layer_types" not in config


def test_a_pattern_in_the_file_wins_over_the_familys(tmp_path: Path):
    per_layer = [True, False] * 9
    config = _config(tmp_path, GEMMA | {"gemma3.attention.sliding_window_pattern": per_layer})
    assert config["layer_types"][:2] == ["sliding_attention", "full_attention"]
    config = _config(tmp_path, GEMMA | {"gemma3.attention.sliding_window_pattern": 9})
    assert config["layer_types"].count("full_attention") == 2


def test_llama_with_experts_is_mixtral_and_deepseek_is_told_by_its_gate(tmp_path: Path):
    mixtral = _config(
        tmp_path, {"general.architecture": "llama", "llama.expert_count": 8, "llama.expert_used_count": 2}
    )
    assert mixtral["architectures"] == ["MixtralForCausalLM"]
    assert (mixtral["num_local_experts"], mixtral["num_experts_per_tok"]) == (8, 2)
    latent = {
        "general.architecture": "deepseek2",
        "deepseek2.attention.head_count": 128,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.kv_lora_rank": 512,
        "deepseek2.attention.q_lora_rank": 1536,
        "deepseek2.attention.key_length": 576,
        "deepseek2.attention.key_length_mla": 192,
        "deepseek2.attention.value_length_mla": 128,
        "deepseek2.rope.dimension_count": 64,
        "deepseek2.expert_count": 256,
        "deepseek2.rope.scaling.type": "yarn",
        "deepseek2.rope.scaling.factor": 40.0,
        "deepseek2.rope.scaling.original_context_length": 4096,
    }
    config = _config(tmp_path, latent)
    assert config["model_type"] == "deepseek_v2"
    assert _config(tmp_path, latent | {"deepseek2.expert_gating_func": 2})["model_type"] == "deepseek_v3"
    assert {k: config[k] for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "num_key_value_heads", "n_routed_experts")} == {
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
    }  # fmt: skip
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}


def test_values_given_per_layer_count_by_the_largest(tmp_path: Path):
    config = _config(tmp_path, {"general.architecture": "lfm2", "lfm2.attention.head_count_kv": [0, 0, 8, 0]})
    assert config["num_key_value_heads"] == 8


def test_long_arrays_are_counted_and_not_kept(tmp_path: Path):
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.tokens": ["é" * 3] * 5000,
        "tokenizer.ggml.scores": [0.5] * 5000,
        "llama.block_count": 3,
    }
    header = read_header(write_gguf(tmp_path / "m.gguf", metadata))
    assert header.metadata["tokenizer.ggml.tokens"] == Skipped(5000)
    assert header.metadata["tokenizer.ggml.scores"] == Skipped(5000)
    assert header.get("block_count") == 3
    assert config_from(header)["vocab_size"] == 5000


def test_a_split_model_is_one_model(tmp_path: Path):
    first = write_gguf(
        tmp_path / "m-00001-of-00002.gguf", {"general.architecture": "llama", "split.count": 2}, [("a", (4,), 0)]
    )
    with pytest.raises(ModelUnreadable, match=r"parts of a split GGUF are missing: m-00002-of-00002\.gguf"):
        summarize(first, read_header(first))
    write_gguf(tmp_path / "m-00002-of-00002.gguf", {}, [("b", (4,), 1)])
    assert summarize(first, read_header(first)).bytes_by_dtype == {"F32": 16, "F16": 8}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "whale9"}, "the GGUF architecture 'whale9' is not known here"),
        ({"general.architecture": "clip", "general.type": "mmproj"}, "holds no language model"),
        ({}, "holds no language model"),
    ],
)
def test_a_header_that_is_no_model_of_ours(tmp_path: Path, metadata: dict, message: str):
    with pytest.raises(ModelUnreadable, match=message):
        _config(tmp_path, metadata)


def test_an_unknown_tensor_type_and_a_truncated_file(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", GEMMA, [("a", (4,), 999)])
    with pytest.raises(ModelUnreadable, match="unknown type 999"):
        summarize(path, read_header(path))
    path = write_gguf(tmp_path / "m.gguf", GEMMA, [("a", (2**30,), 0)])
    with pytest.raises(ModelUnreadable, match="truncated: tensor 'a'"):
        summarize(path, read_header(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"GG", "no GGUF file"),
        (b"PK\x03\x04" + b"\0" * 40, "no GGUF file"),
        (b"GGUF\x00\x00\x00\x03" + b"\0" * 40, "big-endian"),
        (b"GGUF\x09\x00\x00\x00" + b"\0" * 40, "version 9 is not known"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "ends within its header"),
        (
            b"GGUF\x03\x00\x00\x00"
            + b"\0" * 8
            + b"\x01"
            + b"\0" * 7
            + b"\x01"
            + b"\0" * 7
            + b"\xff"
            + b"\x08\0\0\0"
            + b"\0" * 8,
            "not UTF-8",
        ),
        (
            b"GGUF\x03\x00\x00\x00"
            + b"\0" * 8
            + b"\x01"
            + b"\0" * 7
            + b"\x01"
            + b"\0" * 7
            + b"k"
            + b"\x63\0\0\0"
            + b"\0" * 8,
            "unknown type 99",
        ),
    ],
)
def test_damage_is_told_with_the_files_name(tmp_path: Path, data: bytes, message: str):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelUnreadable, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value.where)


@pytest.mark.parametrize("layers", [2**32 - 1, 4097])
def test_a_count_of_layers_that_no_model_has_is_damage(tmp_path: Path, layers: int):
    path = write_gguf(tmp_path / "m.gguf", {**GEMMA, "gemma3.block_count": layers}, [])
    with pytest.raises(ModelUnreadable, match="layers") as caught:
        config_from(read_header(path))
    assert str(path) in str(caught.value.where)


@settings(deadline=None, max_examples=200)
@given(cut=st.integers(0, 400), flips=st.dictionaries(st.integers(0, 400), st.integers(0, 255), max_size=4))
def test_no_damage_breaks_the_reader(tmp_path_factory, cut: int, flips: dict[int, int]):
    path = write_gguf(tmp_path_factory.getbasetemp() / "fuzz.gguf", GEMMA, [("token_embd.weight", (640, 10), 8)])
    data = bytearray(path.read_bytes()[:800])
    for at, byte in flips.items():
        data[at] = byte
    path.write_bytes(data[: len(data) - cut])
    try:
        header = read_header(path)
        json.dumps(config_from(header))
        summarize(path, header)
    except ModelUnreadable as error:
        told = error
    else:
        return
    assert str(path) in str(told.where)
