"""GGUF files, from their headers alone: what a `config.json` would say, and bytes by GGML type.

Layout: magic, version, tensor count, key count, keys with typed values, tensor infos, padding, data; little endian.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_registry.errors import ModelUnreadable
from model_registry.model import TensorSummary

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT_ITEMS = 1024  # arrays per layer are kept; vocabularies are only counted
_MAX_NESTING = 4
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A long array that was only counted."""

    length: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its dimensions (innermost first), its GGML type's number, and where its data starts in the data part."""

    name: str
    dimensions: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself. Arrays of more than 1,024 items are `Skipped`."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """`general.architecture`: llama.cpp's name, which is also the prefix of the model's keys."""
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str) -> Any:
        """The model's own value of `key`, without the architecture's prefix; None if it has none."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def has_tensor(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return any(tensor.name == name for tensor in self.tensors)


def read_header(path: Path) -> GgufHeader:
    """The header of one GGUF file. Raises ModelUnreadable if it is none, damaged, or of a version that is not known."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data, path).header()
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise _damaged(path, "a name is not UTF-8") from error
        reason = "the file is empty" if isinstance(error, ValueError) else error.strerror or str(error)
        raise ModelUnreadable(f"the GGUF file cannot be read: {reason}", where=str(path)) from error


def shards(path: Path, header: GgufHeader) -> list[Path]:
    """All files of a split model in order, `path` alone if it is not split. Raises ModelUnreadable if one is missing."""
    match = _SHARD.fullmatch(path.name)
    count = header.metadata.get("split.count", 1)
    if not match or not isinstance(count, int) or count < 2:
        return [path]
    files = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelUnreadable(
            f"parts of a split GGUF are missing: {', '.join(missing[:3])}",
            where=str(path.parent),
            remedy="Put all parts into one directory.",
        )
    return files


def summarize(path: Path, header: GgufHeader) -> TensorSummary:
    """Bytes and elements by GGML type (`Q4_K`, `F32` ...), over all parts of a split model.

    Raises ModelUnreadable for a missing part, an unknown type, or a file shorter than its header says.
    """
    sizes: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for part in shards(path, header):
        for tensor in (header if part == path else read_header(part)).tensors:
            name, size = _stored(tensor, part)
            sizes[name] += size
            elements[name] += math.prod(tensor.dimensions)
    return TensorSummary(sizes.total(), dict(sizes), dict(elements))


def _stored(tensor: GgufTensor, path: Path) -> tuple[str, int]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # pulls in NumPy: 0.2 s that only GGUF files cost

    try:
        kind = GGMLQuantizationType(tensor.ggml_type)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (KeyError, ValueError) as error:
        raise _damaged(path, f"tensor {tensor.name!r} has the unknown type {tensor.ggml_type}") from error
    size = math.prod(tensor.dimensions) // block * block_bytes
    if tensor.offset + size > path.stat().st_size:
        raise _damaged(path, f"it is truncated: tensor {tensor.name!r} lies beyond its end")
    return str(kind.name), size


def _damaged(path: Path, why: str) -> ModelUnreadable:
    return ModelUnreadable(f"the GGUF file is damaged: {why}", where=str(path), remedy="Download the file again.")


class _Cursor:
    """Reads forward through a header; every length is checked against what is left before anything is allocated."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = 0

    def header(self) -> GgufHeader:
        if self._data[:4] != _MAGIC:
            raise ModelUnreadable(
                "this is no GGUF file", where=str(self._path), remedy="A GGUF file starts with the letters GGUF."
            )
        self._at = 4
        version = self._scalar("I")
        if version not in _VERSIONS:
            wrong_order = version & 0xFFFF == 0
            reason = (
                "big-endian GGUF files are not supported" if wrong_order else f"GGUF version {version} is not known"
            )
            raise ModelUnreadable(
                reason, where=str(self._path), remedy="Convert the model again with a current llama.cpp."
            )
        tensor_count, key_count = self._scalar("Q"), self._scalar("Q")
        self._need(tensor_count * 24 + key_count * 13)  # the least that so many entries take
        metadata = dict(self._key_value() for _ in range(key_count))
        return GgufHeader(self._path, metadata, tuple(self._tensor() for _ in range(tensor_count)))

    def _key_value(self) -> tuple[str, Any]:
        return self._string(), self._value(self._scalar("I"), 0)

    def _tensor(self) -> GgufTensor:
        name, rank = self._string(), self._scalar("I")
        self._need(rank * 8)
        return GgufTensor(name, tuple(self._scalar("Q") for _ in range(rank)), self._scalar("I"), self._scalar("Q"))

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY and depth < _MAX_NESTING:
            return self._array(depth)
        if kind not in _SCALARS:
            raise _damaged(self._path, f"a value has the unknown type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self, depth: int) -> Any:
        kind, length = self._scalar("I"), self._scalar("Q")
        if length <= _KEPT_ITEMS:
            return [self._value(kind, depth + 1) for _ in range(length)]
        if kind == _STRING:
            self._skip_strings(length)
        elif kind in _SCALARS:
            self._skip(length * struct.calcsize(_SCALARS[kind]))
        else:
            raise _damaged(self._path, "a long array of arrays")
        return Skipped(length)

    def _skip_strings(self, count: int) -> None:
        self._need(count * 8)
        at, end, unpack = self._at, len(self._data), struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end:
                break
            at += 8 + unpack(self._data, at)[0]
        self._skip(at - self._at)

    def _scalar(self, code: str) -> Any:
        start = self._at
        self._skip(struct.calcsize(code))
        return struct.unpack_from(f"<{code}", self._data, start)[0]

    def _string(self) -> str:
        length = self._scalar("Q")
        start = self._at
        self._skip(length)
        return self._data[start : self._at].decode("utf-8")

    def _skip(self, count: int) -> None:
        self._need(count)
        self._at += count

    def _need(self, count: int) -> None:
        if self._at + count > len(self._data):
            raise _damaged(self._path, "it ends within its header")
