"""Configuration files that change while they are served."""

from __future__ import annotations

from pathlib import Path

from gateway.config_watch import ConfigWatch


def replace(path: Path, text: str) -> None:
    """As editors and mounted volumes do it."""
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def test_a_change_is_told_once_and_when_it_has_come_to_rest(tmp_path: Path) -> None:
    path = tmp_path / "sliceway.yaml"
    path.write_text("version: v1\n", encoding="utf-8")
    watch = ConfigWatch(path)
    assert [watch.poll(), watch.poll()] == [False, False]
    replace(path, "version: v1\nmodels: [\n")
    assert watch.poll() is False, "it may still be written"
    replace(path, "version: v1\nmodels: []\n")
    assert [watch.poll(), watch.poll(), watch.poll()] == [False, True, False]


def test_included_files_belong_to_it(tmp_path: Path) -> None:
    path, models = tmp_path / "sliceway.yaml", tmp_path / "models.yaml"
    path.write_text("version: v1\ninclude: [models.yaml]\n", encoding="utf-8")
    watch = ConfigWatch(path)
    models.write_text("models: []\n", encoding="utf-8")
    assert [watch.poll(), watch.poll()] == [False, True], "a file that was missing has come"
    replace(models, "models: [] # none yet\n")
    assert [watch.poll(), watch.poll()] == [False, True]


def test_a_file_that_goes_and_comes_back_as_it_was_is_no_change(tmp_path: Path) -> None:
    path, away = tmp_path / "sliceway.yaml", tmp_path / "away"
    path.write_text("version: v1\n", encoding="utf-8")
    watch = ConfigWatch(path)
    path.rename(away)
    assert watch.poll() is False
    away.rename(path)
    assert [watch.poll(), watch.poll()] == [False, False]
