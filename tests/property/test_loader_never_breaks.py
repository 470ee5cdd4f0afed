"""Whatever stands in a configuration file, loading it gives a Config or a ConfigError that names the file."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import load_config
from model_registry.errors import ConfigError

_WORDS = st.sampled_from(
    ["version", "v1", "models", "tenants", "name", "source", "all", "fleet", "cpu", "slices", "memory", "gateway", "listen", "include", "8GiB", "auto", "engine", "python", "<<"]
)  # fmt: skip
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | _WORDS | st.text(max_size=8)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
_SNIPPETS = st.lists(
    st.sampled_from(["version: v1\n", "models:\n", "  - name: a\n", "    source: x/y\n", "\t", "- ", ": ", "&a ", "*a ", "<<: ", "!t ", "[", "]", "{", "}", "|\n", ">\n", "'", '"', "%YAML 1.1\n", "---\n", "? ", "#", "\\", "\x85", "\ufeff", "1_0:2", "0x", ".nan ", "~\n"])
    | st.text(max_size=5),
    max_size=25,
).map("".join)  # fmt: skip


def _check(data: bytes, folder: Path) -> None:
    path = folder / "c.yaml"
    path.write_bytes(data)
    try:
        load_config(path)
    except ConfigError as error:
        problems = error.problems
    else:
        return
    assert problems
    for problem in problems:
        assert problem.where
        assert problem.message
        assert "pydantic" not in str(problem)


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=200) | _SNIPPETS)
def test_any_text(tmp_path_factory, text: str):
    _check(text.encode("utf-8", "surrogatepass"), tmp_path_factory.getbasetemp())


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=100))
def test_any_bytes(tmp_path_factory, data: bytes):
    _check(data, tmp_path_factory.getbasetemp())


@settings(deadline=None, max_examples=150)
@given(value=st.dictionaries(_WORDS, _VALUES, max_size=6))
def test_any_tree_of_known_words(tmp_path_factory, value: dict[str, object]):
    # JSON is YAML, but for some floats and escapes, which are good trouble here.
    _check(json.dumps({"version": "v1"} | value).encode(), tmp_path_factory.getbasetemp())
