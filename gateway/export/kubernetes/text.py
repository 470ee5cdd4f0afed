"""Documents as YAML: blocks throughout, long texts as literal blocks, several documents in one stream."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

# YAML 1.1, which Kubernetes reads, takes these for booleans, numbers or times; ruamel writes 1.2, where some are words.
_AMBIGUOUS = re.compile(r"y|n|yes|no|on|off|true|false|null|[-+]?[.0-9].*|=|<<", re.IGNORECASE)
_WIDE = 4096  # no line is folded: arguments stay whole for who searches them


def yaml_text(content: object) -> str:
    """One document."""
    yaml, text = YAML(), StringIO()
    yaml.width = _WIDE
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(_styled(content), text)
    return text.getvalue()


def yaml_stream(documents: Iterable[Mapping[str, Any]], notes: Iterable[str] = ()) -> str:
    """Several documents, after the notes as comments."""
    head = "".join(f"# {line}\n" for note in notes for line in note.splitlines())
    return head + "".join(f"---\n{yaml_text(document)}" for document in documents)


def _styled(content: object) -> object:
    if isinstance(content, Mapping):
        return {key: _styled(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_styled(value) for value in content]
    if isinstance(content, str) and "\n" in content:
        return LiteralScalarString(content)
    if isinstance(content, str) and _AMBIGUOUS.fullmatch(content):
        return DoubleQuotedScalarString(content)
    return content
