from __future__ import annotations

from pathlib import Path

import pytest

from model_registry.directories import user_directory
from model_registry.errors import NoHome

NAME = "XDG_CACHE_HOME"


def test_the_variable_wins_over_the_home() -> None:
    assert user_directory(NAME, ".cache", {NAME: "/srv/cache", "HOME": "/home/ada"}) == Path("/srv/cache")


@pytest.mark.parametrize("named", [{}, {NAME: ""}, {NAME: "cache"}, {NAME: "./cache"}])
def test_without_an_absolute_path_it_is_below_the_home(named: dict[str, str]) -> None:
    assert user_directory(NAME, ".cache", named | {"HOME": "/home/ada"}) == Path("/home/ada/.cache")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(NoHome, match="no home directory") as told:
        user_directory(NAME, ".cache", {})
    assert NAME in str(told.value.remedy)
