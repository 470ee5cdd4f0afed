"""The converter in the engine's own interpreter, on GGUF files of a few kilobytes that are written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from model_registry.conversion import EngineConverter, ImportProgress
from model_registry.errors import ImportFailed
from model_registry.importer import import_model
from model_registry.source import resolve_source
from placement.engines import find_engine_python

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

HIDDEN, FEED_FORWARD, HEADS, LAYERS = 32, 64, 2, 2
LETTERS = [chr(c) for c in range(33, 127)]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
KINDS = [2, 3, 3, *[6] * 256, *[1] * (1 + len(LETTERS))]
MATRICES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN, HIDDEN),
    "attn_v": (HIDDEN, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FEED_FORWARD, HIDDEN),
    "ffn_up": (FEED_FORWARD, HIDDEN),
    "ffn_down": (HIDDEN, FEED_FORWARD),
}


def write_tiny_llama(
    path: Path,
    *,
    template: str | None = None,
    add_bos: bool | None = True,
    spoil: Callable[[np.ndarray], Any] | None = None,
) -> Path:
    """A Llama of random weights, its matrices in Q8_0, with a vocabulary of bytes and ASCII characters."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(TOKENS))])
    writer.add_token_types(KINDS)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    if template:
        writer.add_chat_template(template)
    random = np.random.default_rng(0)
    for name, shape in _tensors():
        data = random.normal(0, 0.05, shape).astype(np.float32) if len(shape) == 2 else np.ones(shape, np.float32)
        if spoil:
            spoil(data)
        if len(shape) == 2 and "token" not in name:
            packed = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors() -> list[tuple[str, tuple[int, ...]]]:
    layers = [(f"blk.{i}.{name}.weight", shape) for i in range(LAYERS) for name, shape in MATRICES.items()]
    norms = [(f"blk.{i}.{name}.weight", (HIDDEN,)) for i in range(LAYERS) for name in ("attn_norm", "ffn_norm")]
    ends = [
        ("token_embd.weight", (len(TOKENS), HIDDEN)),
        ("output_norm.weight", (HIDDEN,)),
        ("output.weight", (len(TOKENS), HIDDEN)),
    ]
    return [*layers, *norms, *ends]


@pytest.fixture(scope="module")
def convert() -> EngineConverter:
    python = find_engine_python("cpu")
    return EngineConverter(lambda: python)


def test_a_gguf_file_becomes_a_model_that_reads_back(tmp_path: Path, convert: EngineConverter):
    seen: list[ImportProgress] = []
    source = write_tiny_llama(tmp_path / "tiny-q8_0.gguf")
    model = import_model(str(source), into=tmp_path / "models", convert=convert, report=seen.append).model
    spec = resolve_source(model.path)
    assert (model.name, spec.architecture, spec.max_context_tokens, spec.has_chat_template) == (
        "tiny",
        "LlamaForCausalLM",
        128,
        True,
    )
    assert spec.tensors is not None
    assert set(spec.tensors.bytes_by_dtype) == {"BF16"}
    assert "quantization_config" not in spec.config
    assert model.made["adds_bos"] is True
    assert model.made["chat_template"] == "fallback"
    fractions = [p.fraction for p in seen if p.fraction is not None]
    assert fractions == sorted(fractions)
    ends = json.loads((model.path / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert TOKENS.index("<0x0A>") in ends, "a vocabulary without a token for a blank line ends answers at the line"


def test_the_files_own_template_and_silence_about_bos_are_respected(tmp_path: Path, convert: EngineConverter):
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    source = write_tiny_llama(tmp_path / "m.gguf", template=template, add_bos=False)
    model = import_model(str(source), into=tmp_path / "models", convert=convert).model
    assert (model.made["chat_template"], model.made["adds_bos"]) == ("gguf", False)
    assert (model.path / "chat_template.jinja").read_text(encoding="utf-8") == template


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ bos_token }}{{ nothing.at.all }}", "the chat template fails: "),
        ("{{ bos_token }}Hi", "leaves out what the user says"),
        ("{{ messages[0]['content'] }}", "writes '<s>' 0 times; it must write it once"),
    ],
)
def test_a_template_that_would_spoil_every_answer_is_refused(
    tmp_path: Path, convert: EngineConverter, template: str, message: str
):
    source = write_tiny_llama(tmp_path / "m.gguf")
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(ImportFailed) as caught:
        import_model(str(source), into=tmp_path / "models", convert=convert, chat_template=tmp_path / "t.jinja")
    assert message in caught.value.message
    assert list((tmp_path / "models").iterdir()) == []


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, convert: EngineConverter):
    source = write_tiny_llama(tmp_path / "m.gguf", spoil=lambda data: data.fill(np.nan) if data.ndim == 1 else None)
    with pytest.raises(ImportFailed, match="computes no finite numbers"):
        import_model(str(source), into=tmp_path / "models", convert=convert)
