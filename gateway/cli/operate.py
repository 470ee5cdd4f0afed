"""What the commands that change a running system share: who asks, lifetimes, and times as people read them."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable
from datetime import UTC, datetime

import typer

from gateway.admin import Operations
from gateway.config import Config
from placement.clock import SystemClock

CENTURY_SECONDS = 100 * 365.25 * 86400
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def operations(config: Config) -> Operations:
    """Changes under `config`."""
    return Operations(lambda: config, wall=wall_seconds)


def wall_seconds() -> float:
    """Seconds since 1970, UTC."""
    return SystemClock().now().timestamp()


def actor(user_name: Callable[[int], str] = lambda uid: pwd.getpwuid(uid).pw_name) -> str:
    """Who runs this command, for the audit log."""
    uid = os.getuid()
    try:
        return f"cli:{user_name(uid)}"
    except KeyError:
        return f"cli:uid={uid}"


def parse_lifetime(text: str, option: str) -> float:
    """Seconds from `30d`, `12h`, `90m`, `3600s` or `2w`, which `option` was given. Raises typer.BadParameter."""
    if (seconds := parse_duration(text, option)) == 0:
        raise _no_lifetime(text, option)
    return seconds


def parse_duration(text: str, option: str) -> float:
    """The same, and `0s` as well."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhdw])", text)
    if match is None:
        raise _no_lifetime(text, option)
    seconds = float(match.group(1)) * _UNITS[match.group(2)]
    if seconds > CENTURY_SECONDS:
        raise typer.BadParameter(f"{text!r} is more than a hundred years; leave the option out", param_hint=option)
    return seconds


def _no_lifetime(text: str, option: str) -> typer.BadParameter:
    return typer.BadParameter(
        f"{text!r} is no lifetime; write a number and one of s, m, h, d, w, like 30d", param_hint=option
    )


def when(seconds: float | None) -> str:
    """A time as people and programs read it; empty for None."""
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
