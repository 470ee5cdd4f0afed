"""From what an operator names as `source` to a ModelSpec: a directory, a GGUF file, a lone config.json, or a hub id."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from model_registry import gguf_header, tensors
from model_registry.errors import ModelUnreadable, NoSuchSource
from model_registry.gguf_config import config_from
from model_registry.hub import BOTH_WAYS, Hub, HubSettings, HuggingFaceHub, is_repo_id
from model_registry.model import ModelSpec, Task, TensorSummary
from model_registry.sizing.dimensions import Dimensions, text_section
from model_registry.sizing.rope import context_limit

_GENERATES = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel", "LMHead")
_CONTEXT_UNKNOWN = 2048  # what vLLM assumes where a configuration says nothing
_POOLING_KINDS = ("bert", "nomic_bert")


def resolve_source(
    source: str | Path, *, revision: str | None = None, environ: Mapping[str, str] | None = None, hub: Hub | None = None
) -> ModelSpec:
    """What the model at `source` is, from its metadata alone: no weights are loaded or downloaded.

    A path that exists is taken before a hub id. `revision` is for hub ids. `environ` (the process's if None) gives the
    hub's settings; `hub` replaces the Hugging Face hub.
    Raises ModelNotFound, with both ways to name a model (NoSuchSource where no hub was asked), and ModelUnreadable, which
    names the broken file.
    """
    text = str(source)
    path = _expanded(text)
    if text and path.is_dir():
        return read_directory(path, source=text)
    if text and path.exists():
        return _read_file(path, source=text)
    if _is_meant_as_path(text):
        raise NoSuchSource("there is no such file or directory", where=text, remedy=BOTH_WAYS)
    if not is_repo_id(text):
        raise NoSuchSource(
            "this is no path that exists and no hub id, which has the form org/name", where=text, remedy=BOTH_WAYS
        )
    return _from_hub(
        text, revision, hub or HuggingFaceHub(HubSettings.from_environ(os.environ if environ is None else environ))
    )


def read_directory(folder: Path, *, source: str) -> ModelSpec:
    """The model in `folder`: `config.json` with what lies beside it, or a single GGUF file. Raises ModelUnreadable."""
    if (folder / "config.json").is_file():
        return describe(folder, source=source, weights=tensors.summarize(folder))
    ggufs = sorted(folder.glob("*.gguf"))
    first_parts = [g for g in ggufs if "-of-" not in g.name or "-00001-of-" in g.name]
    if len(first_parts) == 1:
        return read_gguf(first_parts[0], source=source)
    if first_parts:
        names = ", ".join(g.name for g in first_parts[:4])
        raise ModelUnreadable(
            f"the directory holds {len(first_parts)} GGUF models: {names}",
            where=str(folder),
            remedy="Name one of the files.",
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelUnreadable("this is a LoRA adapter, not a model", where=str(folder), remedy="Name the base model.")
    if (folder / "params.json").is_file():
        raise ModelUnreadable(
            "this is in Mistral's own format: params.json, no config.json",
            where=str(folder),
            remedy="Take the copy in Hugging Face format.",
        )
    raise ModelUnreadable("there is no config.json in this directory", where=str(folder), remedy=BOTH_WAYS)


def read_gguf(path: Path, *, source: str) -> ModelSpec:
    """The model in a GGUF file, from its header. Raises ModelUnreadable."""
    header = gguf_header.read_header(path)
    config = config_from(header)
    pooled = config["model_type"] in _POOLING_KINDS or header.get("pooling_type") is not None
    return ModelSpec(
        source=source,
        architecture=config["architectures"][0],
        config=config,
        task="embed" if pooled else "generate",
        max_context_tokens=_limit(config, path),
        tensors=gguf_header.summarize(path, header),
        path=path.absolute(),
        has_chat_template="tokenizer.chat_template" in header.metadata,
        quant_config={"quant_method": "gguf"},
    )


def describe(folder: Path, *, source: str, weights: TensorSummary | None) -> ModelSpec:
    """The model whose `config.json` and further metadata files lie in `folder`. Raises ModelUnreadable."""
    config = tensors.load_json_object(folder / "config.json")
    architecture = _architecture(config, folder / "config.json")
    tokenizer = _optional(folder / "tokenizer_config.json")
    task: Task = "embed" if _is_sentence_transformer(folder) else _task_of(architecture)
    return ModelSpec(
        source=source,
        architecture=architecture,
        config=config,
        task=task,
        max_context_tokens=_max_context(config, task, folder, tokenizer),
        tensors=weights,
        path=folder.absolute(),
        has_chat_template=_has_chat_template(folder, tokenizer),
        quant_config=_quant_config(config, folder),
        has_remote_code="auto_map" in config,
    )


def _from_hub(repo: str, revision: str | None, hub: Hub) -> ModelSpec:
    found = hub.model(repo, revision)
    if found.complete:
        return describe(found.folder, source=repo, weights=tensors.summarize(found.folder))
    return replace(describe(found.folder, source=repo, weights=found.tensors), path=None)


def _read_file(path: Path, *, source: str) -> ModelSpec:
    if path.suffix == ".gguf":
        return read_gguf(path, source=source)
    if path.suffix == ".json":
        config = tensors.load_json_object(path)
        architecture = _architecture(config, path)
        task = _task_of(architecture)
        limit = _limit(config, path)
        quant = _own_quant_config(config)
        return ModelSpec(
            source, architecture, config, task, limit, quant_config=quant, has_remote_code="auto_map" in config
        )
    if path.suffix in (".safetensors", ".bin"):
        raise ModelUnreadable(
            "these are weights without the configuration beside them",
            where=str(path),
            remedy="Name the directory that holds them.",
        )
    raise ModelUnreadable(
        "this is neither a directory, nor a GGUF file, nor a config.json", where=str(path), remedy=BOTH_WAYS
    )


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # `~name` of a user who is not there: a path that does not exist
        return Path(text)


def _is_meant_as_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.endswith((".gguf", ".json")) or text.count("/") > 1


def _architecture(config: Mapping[str, Any], file: Path) -> str:
    named = config.get("architectures") or text_section(config).get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return named[0]
    raise ModelUnreadable(
        "`architectures` is missing, so no engine knows what to load",
        where=str(file),
        remedy="Take the config.json that belongs to the model's weights; tokenizers, adapters and pipelines have others.",
    )


def _task_of(architecture: str) -> Task:
    """As vLLM decides by the class's name (`config/model.py`, `_SUFFIX_TO_DEFAULTS`); all pooling models count as `embed`."""
    return "generate" if architecture.endswith(_GENERATES) else "embed"


def _is_sentence_transformer(folder: Path) -> bool:
    """Sentence-transformers list their stages in modules.json; one that pools makes any model an embedding model."""
    try:
        return "Pooling" in (folder / "modules.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return (folder / "1_Pooling").is_dir()


def _max_context(config: Mapping[str, Any], task: Task, folder: Path, tokenizer: Mapping[str, Any]) -> int:
    """What vLLM allows (`config/model.py`, `get_and_verify_max_len`): sentence-transformers say it themselves, and a
    tokenizer's limit counts for pooling models with absolute positions.
    """
    if task == "embed":
        own = _optional(folder / "sentence_bert_config.json").get("max_seq_length")
        if isinstance(own, int) and own > 0:
            return own
    limit = _limit(config, folder / "config.json")
    tokens = tokenizer.get("model_max_length")
    if task == "embed" and config.get("position_embedding_type") == "absolute" and isinstance(tokens, int):
        return min(limit, tokens)
    return limit


def _limit(config: Mapping[str, Any], file: Path) -> int:
    try:
        return context_limit(Dimensions(config)) or _CONTEXT_UNKNOWN
    except (AttributeError, OverflowError, TypeError, ValueError) as error:  # text or NaN where a number should be
        raise ModelUnreadable("its context length, or the scaling of it, makes no sense", where=str(file)) from error


def _has_chat_template(folder: Path, tokenizer: Mapping[str, Any]) -> bool:
    return bool(tokenizer.get("chat_template")) or any(
        (folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")
    )


def _own_quant_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for section in (config, text_section(config)):
        for key in ("quantization_config", "compression_config"):
            if isinstance(section.get(key), dict):
                return dict(section[key])
    return None


def _quant_config(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any] | None:
    """The configuration's own; ModelOpt's older checkpoints keep it in a file beside."""
    return _own_quant_config(config) or _optional(folder / "hf_quant_config.json") or None


def _optional(path: Path) -> Mapping[str, Any]:
    return tensors.load_json_object(path) if path.is_file() else {}
