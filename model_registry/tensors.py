"""What lies in a checkpoint, from safetensors headers and indexes alone: bytes and elements by dtype, no weights loaded.

A safetensors file is eight bytes (length of the header, little endian), the header (JSON: name -> dtype, shape,
data_offsets), then the data. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from model_registry.errors import ModelUnreadable
from model_registry.model import TensorSummary

INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8} | {
    name: bits
    for bits, names in {
        8: "U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
        16: "I16 U16 F16 BF16",
        32: "I32 U32 F32",
        64: "I64 U64 F64 C64",
    }.items()
    for name in names.split()
}
_BROKEN = "Download the file again; a partial download looks like this."


def summarize(folder: Path) -> TensorSummary | None:
    """The tensors of the checkpoint in `folder`; None if there are no weights and no index.

    With an index, exactly the files that it names count (a `consolidated.safetensors` beside them is a second copy). An
    index without any of its files (a metadata-only directory) gives its `total_size`, marked as not exact; so does a
    checkpoint of `*.bin` files. Raises ModelUnreadable for a damaged or incomplete checkpoint, naming the file.
    """
    index = folder / INDEX
    if index.is_file():
        return _indexed(folder, read_index(index))
    names = weight_files(file.name for file in folder.iterdir())
    if names:
        return add_up(read_header(folder / name) for name in names)
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles:
        return TensorSummary(sum(file.stat().st_size for file in pickles), exact=False)
    return None


def read_index(path: Path) -> Mapping[str, Any]:
    """The parsed index; its `weight_map` (tensor -> file) is there and not empty. Raises ModelUnreadable."""
    index = load_json_object(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelUnreadable("the index names no weight files", where=str(path), remedy=_BROKEN)
    return index


def indexed_files(index: Mapping[str, Any]) -> list[str]:
    """The names of the weight files, in order, each once."""
    return sorted(set(index["weight_map"].values()))


def index_total(index: Mapping[str, Any]) -> int | None:
    """`metadata.total_size` in bytes, where the index has one."""
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return int(total) if isinstance(total, (int, float)) and total > 0 else None


def read_header(path: Path) -> Mapping[str, Any]:
    """The header of one safetensors file: tensor name -> `dtype`, `shape`, `data_offsets`.

    Reads the header's bytes only. Raises ModelUnreadable if it is no safetensors file, damaged or truncated.
    """
    try:
        with path.open("rb") as file:
            return _checked_header(file, path, path.stat().st_size)
    except OSError as error:
        raise ModelUnreadable(f"the file cannot be read: {error.strerror or error}", where=str(path)) from error


def add_up(headers: Iterable[Mapping[str, Any]]) -> TensorSummary:
    """Bytes and elements by dtype over `headers`, as `read_header` gives them."""
    sizes: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for header in headers:
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                sizes[tensor["dtype"]] += end - begin
                elements[tensor["dtype"]] += math.prod(tensor["shape"])
    return TensorSummary(sizes.total(), dict(sizes), dict(elements))


def weight_files(names: Iterable[str]) -> list[str]:
    """Which of a directory's files are the weights, without an index: `model*.safetensors` where there are any, else those
    of Mistral's layout (`consolidated*`), else all; never an adapter's.
    """
    files = sorted(n for n in names if n.endswith(".safetensors") and "/" not in n and not n.startswith("adapter"))
    for prefix in ("model", "consolidated"):
        chosen = [name for name in files if name.startswith(prefix)]
        if chosen:
            return chosen
    return files


def load_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelUnreadable, with the line where it breaks."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelUnreadable(f"the file cannot be read: {error.strerror or error}", where=str(path)) from error
    except json.JSONDecodeError as error:
        raise ModelUnreadable(
            f"this is no JSON: {error.msg}", where=f"{path}:{error.lineno}", remedy=_BROKEN
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ModelUnreadable("this is no JSON", where=str(path), remedy=_BROKEN) from error
    if not isinstance(value, dict):
        raise ModelUnreadable(f"this holds a {type(value).__name__}, not an object", where=str(path))
    return value


def _indexed(folder: Path, index: Mapping[str, Any]) -> TensorSummary:
    names = indexed_files(index)
    outside = [name for name in names if "/" in name or name.startswith(".")]
    if outside:
        raise ModelUnreadable(f"the index names {outside[0]!r}, which is not beside it", where=str(folder / INDEX))
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return add_up(read_header(folder / name) for name in names)
    total = index_total(index)
    if len(missing) == len(names) and total is not None:
        return TensorSummary(total, exact=False)
    listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    raise ModelUnreadable(
        f"{len(missing)} of {len(names)} weight files are missing: {listed}",
        where=str(folder),
        remedy="Finish the download.",
    )


def _checked_header(file: BinaryIO, path: Path, size: int) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise ModelUnreadable(
            "this is no safetensors file, or it is truncated within its header", where=str(path), remedy=_BROKEN
        )
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise ModelUnreadable("the safetensors header is no JSON", where=str(path), remedy=_BROKEN) from error
    if not isinstance(header, dict):
        raise ModelUnreadable("the safetensors header is no object", where=str(path), remedy=_BROKEN)
    end = max((_checked_tensor(name, t, path) for name, t in header.items() if name != "__metadata__"), default=0)
    if 8 + length + end > size:
        raise ModelUnreadable(
            f"the file is truncated: its header speaks of {8 + length + end} bytes, there are {size}",
            where=str(path),
            remedy=_BROKEN,
        )
    return header


def _checked_tensor(name: str, tensor: object, path: Path) -> int:
    """The end offset of one tensor, if what the header says of it agrees with itself."""
    if isinstance(tensor, dict):
        dtype, shape, offsets = tensor.get("dtype"), tensor.get("shape"), tensor.get("data_offsets")
        if isinstance(dtype, str) and _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2:
            begin, end = offsets
            bits = _DTYPE_BITS.get(dtype)
            if begin <= end and (bits is None or math.prod(shape) * bits == (end - begin) * 8):
                return int(end)
    raise ModelUnreadable(f"the safetensors header makes no sense at tensor {name!r}", where=str(path), remedy=_BROKEN)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
