"""Checkpoints by their headers: which files count, and how damage is told."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from model_registry.errors import ModelUnreadable
from model_registry.model import TensorSummary
from model_registry.tensors import INDEX, read_header, summarize
from model_registry.testing import write_model, write_safetensors


def test_bytes_and_elements_by_dtype(tmp_path: Path):
    write_safetensors(
        tmp_path / "model.safetensors",
        {"a": ("BF16", (3, 5)), "b": ("F32", ()), "c": ("F8_E4M3", (7,)), "d": ("F8_E4M3", (0, 9))},
    )
    assert summarize(tmp_path) == TensorSummary(
        41, {"BF16": 30, "F32": 4, "F8_E4M3": 7}, {"BF16": 15, "F32": 1, "F8_E4M3": 7}
    )


def test_only_the_files_that_the_index_names_count(tmp_path: Path):
    write_model(tmp_path, shards=2)
    write_safetensors(tmp_path / "consolidated.safetensors", {"a": ("BF16", (1000,))})
    summary = summarize(tmp_path)
    assert summary is not None
    assert (summary.total_bytes, summary.exact) == (4000, True)


@pytest.mark.parametrize(
    ("others", "total"),
    [(("consolidated.safetensors", "adapter_model.safetensors"), 2000), (("model-extra.safetensors",), 2020)],
)
def test_without_an_index_second_copies_and_adapters_do_not_count(tmp_path: Path, others: tuple[str, ...], total: int):
    write_model(tmp_path)
    for name in others:
        write_safetensors(tmp_path / name, {"x": ("BF16", (10,))})
    summary = summarize(tmp_path)
    assert summary is not None
    assert summary.total_bytes == total


def test_files_of_any_name_count_where_no_other_does(tmp_path: Path):
    write_safetensors(tmp_path / "weights.safetensors", {"x": ("BF16", (10,))})
    summary = summarize(tmp_path)
    assert summary is not None
    assert summary.total_bytes == 20


def test_metadata_only_directories_and_pickles_are_estimates(tmp_path: Path):
    assert summarize(tmp_path) is None
    (tmp_path / "pytorch_model-00001.bin").write_bytes(b"x" * 30)
    assert summarize(tmp_path) == TensorSummary(30, exact=False)
    write_model(tmp_path, shards=2)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert summarize(tmp_path) == TensorSummary(4000, exact=False)


def test_a_partial_download_names_what_is_missing(tmp_path: Path):
    write_model(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ModelUnreadable,
        match=r"1 of 3 weight files are missing: model-00002-of-00003\.safetensors\nFinish the download",
    ):
        summarize(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {}}',
        '{"weight_map": [1]}',
        "{}",
        '{"weight_map": {"a": 3}}',
        "[",
        '{"weight_map": {"a": "../../x.safetensors"}}',
    ],
)
def test_an_index_that_makes_no_sense(tmp_path: Path, index: str):
    (tmp_path / INDEX).write_text(index, encoding="utf-8")
    with pytest.raises(ModelUnreadable) as caught:
        summarize(tmp_path)
    assert INDEX in str(caught.value.where)


def _file(path: Path, header: object, *, data: bytes = b"", length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (b"", {"length": 2**62}, "no safetensors file, or it is truncated"),
        (b"{}", {"length": 3}, "no safetensors file, or it is truncated"),
        (b"nonsense", {}, "header is no JSON"),
        (b"\xff\xff", {}, "header is no JSON"),
        ([1], {}, "header is no object"),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
            {"data": b"1234567"},
            "truncated: its header speaks of",
        ),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            {"data": b"1234"},
            "makes no sense at tensor 'a'",
        ),
        (
            {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 4]}},
            {"data": b"1234"},
            "makes no sense at tensor 'a'",
        ),
        (
            {"a": {"dtype": "NEW", "shape": [2], "data_offsets": [4, 0]}},
            {"data": b"1234"},
            "makes no sense at tensor 'a'",
        ),
        (
            {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
            {"data": b"1234"},
            "makes no sense at tensor 'a'",
        ),
        ({"a": 3}, {}, "makes no sense at tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, {"data": b"1234"}, "makes no sense at tensor 'a'"),
    ],
)
def test_a_damaged_header_names_its_file(tmp_path: Path, header: object, options: dict, message: str):
    path = _file(tmp_path / "model.safetensors", header, **options)
    with pytest.raises(ModelUnreadable, match=message) as caught:
        summarize(tmp_path)
    assert caught.value.where == str(path)


def test_a_dtype_of_the_future_is_counted_by_its_bytes(tmp_path: Path):
    _file(
        tmp_path / "model.safetensors",
        {"__metadata__": {"x": "y"}, "a": {"dtype": "F5", "shape": [8], "data_offsets": [0, 5]}},
        data=b"12345",
    )
    assert summarize(tmp_path) == TensorSummary(5, {"F5": 5}, {"F5": 8})


def test_an_empty_file_and_a_directory_are_no_safetensors(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelUnreadable, match="truncated within its header"):
        read_header(tmp_path / "model.safetensors")
    with pytest.raises(ModelUnreadable, match="cannot be read: Is a directory"):
        read_header(tmp_path)
