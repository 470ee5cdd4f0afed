"""Recorded arrivals, one JSON object a line, so that real traffic can be sent again without its texts.

    {"at_seconds": 0.0, "prompt_tokens": 812, "output_tokens": 64}
    {"at_seconds": 0.31, "prompt_tokens": 90, "output_tokens": 12, "prefix": "tools-v2", "prefix_tokens": 60}

`at_seconds` counts from the start and never goes back; rows of the same `prefix` share their first `prefix_tokens` tokens.
Lines of Mooncake's published traces (`timestamp` in ms, `input_length`, `output_length`; `hash_ids` is left out) are read as
well: https://github.com/kvcache-ai/Mooncake, FAST25-release/traces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.problems import Problem, ScenarioError

MOST_TOKENS = 10_000_000
_OURS = {"at_seconds", "prompt_tokens", "output_tokens", "prefix", "prefix_tokens"}
_MOONCAKE = {"timestamp", "input_length", "output_length", "hash_ids"}


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace: when it comes, in seconds from the start, and how long it is, in tokens."""

    at_seconds: float
    prompt_tokens: int
    output_tokens: int
    prefix: str | None = None
    prefix_tokens: int = 0


def read_trace(path: Path) -> tuple[Row, ...]:
    """Every row, in order. Raises ScenarioError with the line of each fault, or where there is no row."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        remedy = "Paths are relative to the scenario's file."
        raise ScenarioError(Problem(f"the trace cannot be read: {reason}", str(path), remedy)) from error
    rows: list[Row] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _row(json.loads(line))
            if rows and row.at_seconds < rows[-1].at_seconds:
                raise ValueError(f"at_seconds goes back, from {rows[-1].at_seconds:g} to {row.at_seconds:g}")
            rows.append(row)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            problems.append(Problem(_words(error), f"{path}:{number}", "See the format in docs/isolation.md."))
    if problems:
        raise ScenarioError(*problems[:20])
    if not rows:
        raise ScenarioError(Problem("the trace has no row", str(path), "See the format in docs/isolation.md."))
    return tuple(rows)


def _row(raw: Any) -> Row:
    if not isinstance(raw, dict):
        raise ValueError("a row is a JSON object")
    if "timestamp" in raw:
        _closed(raw, _MOONCAKE)
        return _checked(Row(float(raw["timestamp"]) / 1000, int(raw["input_length"]), int(raw["output_length"])))
    _closed(raw, _OURS)
    prefix = raw.get("prefix")
    return _checked(
        Row(
            float(raw["at_seconds"]),
            int(raw["prompt_tokens"]),
            int(raw["output_tokens"]),
            None if prefix is None else str(prefix),
            int(raw.get("prefix_tokens", 0)),
        )
    )


def _closed(raw: dict[str, Any], known: set[str]) -> None:
    if strange := sorted(set(raw) - known):
        raise ValueError(f"unknown key {strange[0]!r}; known: {', '.join(sorted(known))}")


def _checked(row: Row) -> Row:
    if not 0 <= row.at_seconds < float("inf"):
        raise ValueError(f"at_seconds {row.at_seconds:g} is no time from the start")
    if row.prompt_tokens < 1 or row.output_tokens < 1:
        raise ValueError("prompt_tokens and output_tokens are at least 1")
    if max(row.prompt_tokens, row.output_tokens) > MOST_TOKENS:
        raise ValueError(f"prompt_tokens and output_tokens are at most {MOST_TOKENS}")
    if not 0 <= row.prefix_tokens <= row.prompt_tokens:
        raise ValueError("prefix_tokens is between 0 and prompt_tokens")
    return row


def _words(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"this is no JSON: {error.msg}"
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
