"""What a source is: directories, lone configurations, GGUF files, hub ids; and what is said of those that are nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_registry.errors import ModelNotFound, ModelUnreadable
from model_registry.hub import HubModel
from model_registry.model import TensorSummary
from model_registry.source import resolve_source
from model_registry.testing import TINY_LLAMA, FakeHub, write_gguf, write_model, write_safetensors

NO_HUB = FakeHub({})


def test_a_directory_is_described_by_its_metadata(tmp_path: Path):
    folder = write_model(tmp_path / "m", shards=3, tokenizer_config__json={"chat_template": "{{ x }}"})
    spec = resolve_source(folder, hub=NO_HUB)
    assert (spec.architecture, spec.task, spec.max_context_tokens) == ("LlamaForCausalLM", "generate", 2048)
    assert spec.tensors == TensorSummary(6000, {"BF16": 6000}, {"BF16": 3000})
    assert spec.path == folder
    assert spec.has_chat_template
    assert not spec.has_remote_code
    assert spec.quant_config is None


def test_a_model_without_a_template_or_with_code_of_its_own_is_flagged(tmp_path: Path):
    spec = resolve_source(write_model(tmp_path / "m", {**TINY_LLAMA, "auto_map": {"AutoModel": "m.M"}}), hub=NO_HUB)
    assert not spec.has_chat_template
    assert spec.has_remote_code


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_may_lie_in_a_file_of_its_own(tmp_path: Path, name: str):
    folder = write_model(tmp_path / "m")
    (folder / name).write_text("{}", encoding="utf-8")
    assert resolve_source(folder, hub=NO_HUB).has_chat_template


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("Qwen3ForCausalLM", "generate"),
        ("Gemma3ForConditionalGeneration", "generate"),
        ("GPT2LMHeadModel", "generate"),
        ("BertModel", "embed"),
        ("XLMRobertaForSequenceClassification", "embed"),
        ("NomicBertModel", "embed"),
    ],
)
def test_the_architecture_decides_the_task(tmp_path: Path, architecture: str, task: str):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**TINY_LLAMA, "architectures": [architecture]}), encoding="utf-8")
    assert resolve_source(file, hub=NO_HUB).task == task


def test_a_sentence_transformer_embeds_whatever_its_architecture_and_brings_its_own_length(tmp_path: Path):
    pooling = [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Pooling"}]
    folder = write_model(tmp_path / "m", modules__json=pooling, sentence_bert_config__json={"max_seq_length": 256})
    spec = resolve_source(folder, hub=NO_HUB)
    assert (spec.task, spec.max_context_tokens) == ("embed", 256)


def test_a_tokenizers_limit_counts_for_absolute_positions_only(tmp_path: Path):
    tokenizer = {"model_max_length": 512}
    bert = {**TINY_LLAMA, "architectures": ["BertModel"], "position_embedding_type": "absolute"}
    assert (
        resolve_source(
            write_model(tmp_path / "a", bert, tokenizer_config__json=tokenizer), hub=NO_HUB
        ).max_context_tokens
        == 512
    )
    assert (
        resolve_source(write_model(tmp_path / "b", tokenizer_config__json=tokenizer), hub=NO_HUB).max_context_tokens
        == 2048
    )


def test_quantisation_is_found_in_the_config_in_its_text_section_and_beside_it(tmp_path: Path):
    fp8 = {"quant_method": "fp8"}
    modelopt = {"quantization": {"quant_algo": "NVFP4"}}
    own = write_model(tmp_path / "own", {**TINY_LLAMA, "quantization_config": fp8}, hf_quant_config__json=modelopt)
    nested = write_model(
        tmp_path / "nested", {"architectures": ["X"], "text_config": {**TINY_LLAMA, "quantization_config": fp8}}
    )
    beside = write_model(tmp_path / "beside", hf_quant_config__json=modelopt)
    assert resolve_source(own, hub=NO_HUB).quant_config == fp8
    assert resolve_source(nested, hub=NO_HUB).quant_config == fp8
    assert resolve_source(beside, hub=NO_HUB).quant_config == modelopt


def test_a_multimodal_configuration_is_read_through_its_text_section(tmp_path: Path):
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {**TINY_LLAMA, "max_position_embeddings": 777},
    }
    assert resolve_source(write_model(tmp_path / "m", config), hub=NO_HUB).max_context_tokens == 777


def test_a_lone_config_has_no_weights_and_no_path(tmp_path: Path):
    file = tmp_path / "some_config.json"
    file.write_text(json.dumps(TINY_LLAMA), encoding="utf-8")
    spec = resolve_source(str(file), hub=NO_HUB)
    assert (spec.tensors, spec.path, spec.architecture) == (None, None, "LlamaForCausalLM")


# -- GGUF ---------------------------------------------------------------------------------------------------------------

LLAMA_GGUF = {
    "general.architecture": "llama",
    "llama.context_length": 4096,
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "tokenizer.chat_template": "{{ messages }}",
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(2000)],
}


def test_a_gguf_file_reads_like_a_directory(tmp_path: Path):
    path = write_gguf(
        tmp_path / "m.gguf", LLAMA_GGUF, [("token_embd.weight", (64, 2000), 12), ("output_norm.weight", (64,), 0)]
    )
    for source in (path, tmp_path):
        spec = resolve_source(source, hub=NO_HUB)
        assert (spec.architecture, spec.max_context_tokens, spec.path) == ("LlamaForCausalLM", 4096, path)
        assert spec.has_chat_template
        assert spec.config["vocab_size"] == 2000
        assert spec.config["tie_word_embeddings"] is True
        assert spec.tensors is not None
        assert spec.tensors.bytes_by_dtype == {"Q4_K": 128_000 // 256 * 144, "F32": 256}


def test_several_gguf_files_in_one_directory_are_not_guessed_between(tmp_path: Path):
    write_gguf(tmp_path / "a.gguf", LLAMA_GGUF)
    write_gguf(tmp_path / "b.gguf", LLAMA_GGUF)
    with pytest.raises(ModelUnreadable, match=r"holds 2 GGUF models: a\.gguf, b\.gguf\nName one"):
        resolve_source(tmp_path, hub=NO_HUB)


# -- hub ids ------------------------------------------------------------------------------------------------------------


def test_a_hub_id_known_by_its_metadata_has_no_path(tmp_path: Path):
    folder = write_model(tmp_path / "snapshot")
    (folder / "model.safetensors").unlink()
    remote = TensorSummary(10, {"BF16": 10}, {"BF16": 5})
    hub = FakeHub({"org/name": HubModel(folder, complete=False, tensors=remote)})
    spec = resolve_source("org/name", revision="v2", hub=hub)
    assert (spec.source, spec.path, spec.tensors) == ("org/name", None, remote)
    assert hub.asked == [("org/name", "v2")]


def test_a_hub_id_with_its_weights_in_the_cache_is_a_directory(tmp_path: Path):
    folder = write_model(tmp_path / "snapshot")
    spec = resolve_source("org/name", hub=FakeHub({"org/name": HubModel(folder, complete=True)}))
    assert spec.path == folder
    assert spec.tensors is not None
    assert spec.tensors.total_bytes == 2000


def test_a_directory_that_looks_like_a_hub_id_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "org" / "name")
    assert resolve_source("org/name", hub=NO_HUB).path == tmp_path / "org" / "name"


# -- what is no model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["./nowhere", "/no/where", "nowhere.gguf", "~/nowhere", "~nobody-here/x", "nowhere", "a/b/c", "", "a b/c"]
)
def test_a_missing_model_names_both_ways(source: str):
    with pytest.raises(ModelNotFound) as caught:
        resolve_source(source, hub=NO_HUB)
    assert caught.value.remedy is not None
    assert "sliceway models import FILE.gguf" in caught.value.remedy
    assert "HF_TOKEN" in caught.value.remedy


def _nothing(folder: Path) -> Path:
    return folder


def _broken_json(folder: Path) -> Path:
    (folder / "config.json").write_text('{"architectures": [\n"X",,\n', encoding="utf-8")
    return folder


def _list(folder: Path) -> Path:
    (folder / "config.json").write_text("[1]", encoding="utf-8")
    return folder


def _no_architecture(folder: Path) -> Path:
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def _adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    return folder


def _mistral(folder: Path) -> Path:
    (folder / "params.json").write_text("{}", encoding="utf-8")
    return folder


def _weights_alone(folder: Path) -> Path:
    write_safetensors(folder / "w.safetensors", {})
    return folder / "w.safetensors"


def _text(folder: Path) -> Path:
    (folder / "notes.txt").write_text("x", encoding="utf-8")
    return folder / "notes.txt"


def _nan_context(folder: Path) -> Path:
    (folder / "config.json").write_text(
        '{"architectures": ["XForCausalLM"], "max_position_embeddings": NaN}', encoding="utf-8"
    )
    return folder


def _broken_tokenizer(folder: Path) -> Path:
    write_model(folder)
    (folder / "tokenizer_config.json").write_text("{", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_nothing, "no config.json in this directory"),
        (_broken_json, r"config\.json:2: this is no JSON"),
        (_list, "holds a list, not an object"),
        (_no_architecture, "`architectures` is missing"),
        (_adapter, "LoRA adapter"),
        (_mistral, "params.json"),
        (_weights_alone, "weights without the configuration"),
        (_text, "neither a directory, nor a GGUF file"),
        (_nan_context, "makes no sense"),
        (_broken_tokenizer, r"tokenizer_config\.json:1: this is no JSON"),
    ],
)
def test_what_is_there_but_no_model_says_why(tmp_path: Path, make, message: str):
    with pytest.raises(ModelUnreadable, match=message):
        resolve_source(make(tmp_path), hub=NO_HUB)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("LlamaForCausalLM"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_CONFIG_KEYS = st.sampled_from(
    ["architectures", "text_config", "max_position_embeddings", "rope_scaling", "rope_parameters", "model_type", "quantization_config", "model_max_length", "auto_map"]
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(config=st.dictionaries(_CONFIG_KEYS, _JSON, max_size=6) | _JSON)
def test_no_configuration_breaks_the_reader(tmp_path_factory, config: object):
    file = tmp_path_factory.getbasetemp() / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    try:
        spec = resolve_source(file, hub=NO_HUB)
    except ModelUnreadable as error:
        spec = None
        where = error.where
    assert spec.max_context_tokens > 0 if spec else str(file) in str(where)
