"""Where a user's own files go, by the XDG Base Directory Specification."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from model_registry.errors import NoHome


def user_directory(variable: str, default: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The directory that `variable` (like XDG_CACHE_HOME) names, else `default` in the user's home; absolute.

    A relative path in the variable counts as none, as the specification asks: it would mean another directory to every
    process. Raises NoHome where neither is known.
    """
    named = Path(environ.get(variable, ""))
    return named if named.is_absolute() else _home(variable, environ) / default


def _home(variable: str, environ: Mapping[str, str]) -> Path:
    if home := environ.get("HOME"):
        return Path(home).absolute()
    try:
        return Path.home()
    except RuntimeError as error:
        raise NoHome(
            "this user has no home directory", where="HOME", remedy=f"Set HOME, or {variable}, to an absolute path."
        ) from error
