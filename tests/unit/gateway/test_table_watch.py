from __future__ import annotations

import os
from pathlib import Path

from gateway.table_watch import Watched
from model_registry.errors import SlicewayError


class Unreadable(SlicewayError):
    pass


def watched(path: Path) -> Watched[str]:
    def load() -> str:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise Unreadable("cannot read", where=str(path)) from error
        if text.startswith("bad"):
            raise Unreadable("damaged", where=str(path))
        return text

    return Watched(path, load, "initial")


def replace(path: Path, text: str) -> None:
    draft = path.with_suffix(".new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def test_a_file_is_read_when_it_changes_and_only_then(tmp_path: Path) -> None:
    file = watched(tmp_path / "f")
    assert file.poll() is False
    assert file.value == "initial"
    assert file.problem is not None
    replace(file.path, "one")
    assert [file.poll(), file.poll(), file.poll()] == [True, False, False]
    assert (file.value, file.problem, file.loads) == ("one", None, 1)
    replace(file.path, "two")
    assert file.poll()
    assert file.value == "two"


def test_a_replacement_of_the_same_size_and_time_is_seen(tmp_path: Path) -> None:
    file = watched(tmp_path / "f")
    replace(file.path, "one")
    file.poll()
    at = file.path.stat().st_mtime_ns
    draft = tmp_path / "draft"
    draft.write_text("two", encoding="utf-8")
    os.utime(draft, ns=(at, at))
    draft.replace(file.path)
    assert file.poll()
    assert file.value == "two"


def test_damage_and_loss_keep_the_last_good_value(tmp_path: Path) -> None:
    file = watched(tmp_path / "f")
    replace(file.path, "one")
    file.poll()
    replace(file.path, "bad")
    assert not file.poll()
    assert (file.value, str(file.problem)) == ("one", f"{file.path}: damaged")
    file.path.unlink()
    assert not file.poll()
    assert (file.value, str(file.problem)) == ("one", f"{file.path}: cannot read")
    replace(file.path, "one")
    assert file.poll()
    assert file.problem is None


def test_a_glance_reads_what_has_changed_and_a_damaged_file_once(tmp_path: Path) -> None:
    file = watched(tmp_path / "f")
    replace(file.path, "one")
    assert [file.glance(), file.glance()] == [True, False]
    replace(file.path, "bad")
    assert not file.glance()
    reads = []
    file._load, load = lambda: reads.append(1) or load(), file._load  # type: ignore[func-returns-value]
    assert [file.glance() for _ in range(3)] == [False] * 3
    assert not reads
    replace(file.path, "two")
    assert file.glance()
    assert (file.value, len(reads)) == ("two", 1)
