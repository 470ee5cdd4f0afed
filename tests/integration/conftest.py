from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """Whatever lies here starts processes: `integration`, unless it starts real engines."""
    if item.path.is_relative_to(HERE) and not item.get_closest_marker("engine"):
        item.add_marker("integration")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines and clusters come last and in the order they are written in: everything cheap fails first, and they start only once."""
    dear = sorted((i for i in items if _is_dear(i)), key=lambda i: (str(i.path), i.location[1] or 0))
    items[:] = [i for i in items if not _is_dear(i)] + dear


def _is_dear(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("engine", "ray"))
