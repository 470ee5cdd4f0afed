"""The accuracy report: it is what the code makes of the data, and it keeps what it promises."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from model_registry.sizing.accuracy import engine_runs, main, page, published_starts

DATA = Path(__file__).parents[2] / "data" / "sizing"
STARTS = published_starts(json.loads((DATA / "startup_runs.json").read_text(encoding="utf-8")))
ENGINE = json.loads((DATA / "engine_runs.json").read_text(encoding="utf-8"))
RUNS = engine_runs(ENGINE)


def test_the_page_is_up_to_date() -> None:
    assert main(["--check"]) == 0, "run: python -m model_registry.sizing.accuracy"


def test_a_page_that_differs_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("old", encoding="utf-8")

    assert main(["--check", "--out", str(tmp_path / "page.md")]) == 1


def test_every_start_on_one_gpu_is_within_its_budget() -> None:
    for start in (s for s in STARTS if s.gpus == 1):
        assert abs(start.error_gib) <= (0.30 if start.vision else 0.10), start.name
        assert abs(start.weights[0] / start.weights[1] - 1) <= 0.01, start.name


def test_every_start_of_the_cpu_engine_is_equal() -> None:
    assert [r.name for r in RUNS if not r.equal] == []


def test_a_start_that_differs_is_shown_as_such() -> None:
    started = next(r for r in RUNS if r.blocks[1])
    wrong = replace(started, blocks=(started.blocks[0] + 1, started.blocks[1]))

    assert not wrong.equal
    assert "**no**" in page(STARTS, [wrong], ENGINE["versions"])
    assert "**0 of 1**" in page(STARTS, [wrong], ENGINE["versions"])
