"""The three files of a report."""

from __future__ import annotations

import json
from pathlib import Path

from loadtests.lab.report import Report
from loadtests.problems import LoadTestError
from loadtests.report import html, markdown


def write_reports(report: Report, directory: Path, name: str = "report") -> None:
    """`NAME.html`, `NAME.md` and `NAME.json` in `directory`, which is made. Raises LoadTestError where that cannot be done."""
    texts = {
        "html": html.render(report),
        "md": markdown.render(report),
        "json": json.dumps(report.as_dict(), indent=1) + "\n",
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for ending, text in texts.items():
            (directory / f"{name}.{ending}").write_text(text, encoding="utf-8")
    except OSError as error:
        raise LoadTestError(f"the report cannot be written: {error}", remedy="Name another directory.") from error
