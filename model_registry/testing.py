"""Models that are all header and no weight, and a hub without a network, for tests and demonstrations."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model_registry.errors import ModelNotFound
from model_registry.hub import HubModel
from model_registry.tensors import INDEX

_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1, "I64": 8}

TINY_LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 1000,
    "torch_dtype": "bfloat16",
}


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> None:
    """A safetensors file with `tensors` (name -> dtype, shape); the data are a hole in the file."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)


def write_model(
    folder: Path, config: Mapping[str, Any] = TINY_LLAMA, *, shards: int = 1, dtype: str = "BF16", **files: object
) -> Path:
    """A model directory: `config.json`, `shards` weight files of 1,000 elements each, and `files` (`name__json=object`)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    )
    for i, name in enumerate(names):
        write_safetensors(folder / name, {f"layer.{i}.weight": (dtype, (10, 100))})
    if shards > 1:
        weight_map = {f"layer.{i}.weight": name for i, name in enumerate(names)}
        total = shards * 1000 * _BYTES[dtype]
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}), encoding="utf-8"
        )
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[tuple[str, Sequence[int], int]] = ()) -> Path:
    """A GGUF file, version 3: `metadata` of str, bool, int, float or lists of one of them; `tensors` as name, dimensions
    (innermost first), GGML type. All tensors start at offset 0, and the data are a hole of 1 MiB.
    """
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _text(key) + _typed(value)
    for name, dimensions, kind in tensors:
        out += _text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, 0)
    with path.open("wb") as file:
        file.write(out)
        file.truncate(len(out) + 2**20)
    return path


class FakeHub:
    """A hub whose models are given; it implements `model_registry.hub.Hub`."""

    def __init__(self, models: Mapping[str, HubModel]) -> None:
        self.models = models
        self.asked: list[tuple[str, str | None]] = []

    def model(self, repo: str, revision: str | None) -> HubModel:
        """The model as it was given; ModelNotFound for others."""
        self.asked.append((repo, revision))
        if repo not in self.models:
            raise ModelNotFound(f"the hub has no model {repo!r}", where=repo)
        return self.models[repo]


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    if isinstance(value, list):
        kind = _kind(value[0]) if value else 4
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(_payload(item) for item in value)
    return struct.pack("<I", _kind(value)) + _payload(value)


def _kind(value: Any) -> int:
    return {str: 8, bool: 7, int: 4, float: 6}[type(value)]


def _payload(value: Any) -> bytes:
    return (
        _text(value)
        if isinstance(value, str)
        else struct.pack({bool: "<?", int: "<I", float: "<f"}[type(value)], value)
    )
