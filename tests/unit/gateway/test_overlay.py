from __future__ import annotations

from pathlib import Path

import pytest

from gateway.admin.overlay import OverlayStore
from gateway.errors import OverlayError


def refused(root: Path) -> OverlayError:
    with pytest.raises(OverlayError) as caught:
        OverlayStore(root).load()
    return caught.value


def test_a_file_that_the_system_refuses_is_told_in_its_words_without_a_number(tmp_path: Path) -> None:
    (tmp_path / "operator.json").mkdir()
    error = refused(tmp_path)
    assert error.message == "what operators changed cannot be read: Is a directory"
    assert error.where == str(tmp_path / "operator.json")
    assert "Restore" in str(error.remedy)


def test_a_file_that_makes_no_sense_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    (tmp_path / "operator.json").write_text('{"version": "one"}', encoding="utf-8")
    assert "Expected `int`" in refused(tmp_path).message


def test_there_is_an_empty_one_where_nothing_was_decided(tmp_path: Path) -> None:
    assert OverlayStore(tmp_path).load().reloads == 0
